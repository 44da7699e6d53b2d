"""The report: a whole and valid page of its own, whose every figure is that of the results, whatever the names hold."""

import base64
import html
import re
import shlex
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from mammo.base.files import InputError
from mammo.evaluate import evaluation
from mammo.evaluate.report import write_report
from mammo.maps.draw import blend
from mammo.maps.files import Grid

NASTY = '<script>alert("1")</script>&amp;\'é'
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The elements of a page; asserts that every one is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.tables, self.cell = [], None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)  # none twice
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            assert len({len(row) for row in self.tables[-1]}) == 1

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(table, results, folder): 24 patients with two images of each breast, and two models, one with a nasty name."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for patient in range(24):
        for side in ("LEFT", "RIGHT"):
            for view in ("CC", "MLO"):
                label = int(patient % 3 == 0 and side == "LEFT")
                scores = [0.3 + strength * label + 0.3 * rng.standard_normal() for strength in (0.4, 0.1)]
                image = f"P{patient}_{side}_{view}.png", f"P{patient}", side, view, label
                rows.append((*image, *np.clip(scores, 0, 1)))
    table = pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, "good", NASTY])
    for file in table["file"]:
        img = np.zeros((80, 60), np.uint16)
        img[20:60, :30] = rng.integers(20000, 60000, (40, 30))
        cv2.imwrite(str(folder / file), img)
    results = evaluation.evaluate_models(table, ["good", NASTY], replicates=200)
    results["data"] |= {
        "skipped": [f"{NASTY}.png: empty"],
        "model_files": {"good": f"/{NASTY}/good.h5"},
        "pixel_options": {"good": {"img_size": [80, 60], "rescale_factor": 0.003891}},
        "average_weights": {NASTY: {"good": 0.25, NASTY: 0.75}},
    }
    results |= {"command": ["evaluate.py", NASTY, "a b"], "versions": {"keras": "3.15", NASTY: NASTY}}
    return table, results, folder


def explain(file):
    """A `Predictor`'s method: a bright cell at the upper left."""
    heatmap = np.zeros((2, 2, 2), np.float32)
    heatmap[0, 0, 1] = 3
    return cv2.imread(str(file), -1).astype(np.float32) * 0.003891, heatmap, Grid((80, 60), (20, 15), (40, 30))


PREDICTORS = {"good": SimpleNamespace(explain=explain, class_list=["neg", "pos"])}


def report(path, table, results, **options):
    write_report(path, results, table, **options)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(data, tmp_path_factory):
    table, results, folder = data
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    return report(path, table, results, root=folder, predictors=PREDICTORS, title=f"Test {NASTY}")


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_page_is_whole_and_needs_nothing_else(text, page):
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    for forbidden in ("script", "link", "iframe", "object", "form"):
        assert page.all(forbidden) == []
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert not re.search(r"url\(|@import|https?://", text)


def test_links_and_titles_lead_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in page.all("a")]
    assert links == ["#summary", "#image", "#breast", "#patient", "#errors", "#methods", "#origin"]
    assert {link[1:] for link in links} <= set(ids)
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_names_of_users_are_text(text, page):
    assert "<script" not in text
    assert page.text.count(NASTY) > 10
    assert f"Skipped: {NASTY}.png: empty" in page.text
    assert f"good: /{NASTY}/good.h5; img_size [80, 60]; rescale_factor 0.003891" in page.text
    assert f"{NASTY}: 0.250 x good + 0.750 x {NASTY}" in page.text
    assert shlex.join(["evaluate.py", NASTY, "a b"]) in page.text
    [title] = re.findall("<title>(.*?)</title>", text)
    assert html.unescape(title) == f"Test {NASTY}"


def test_pictures_can_be_opened_and_are_described(page):
    kinds = {"svg+xml": 0, "jpeg": 0}
    for image in page.all("img"):
        kind, content = re.fullmatch(r"data:image/([a-z+]+);base64,(.*)", image["src"]).groups()
        content = base64.b64decode(content, validate=True)
        kinds[kind] += 1
        assert len(image["alt"]) > 15
        if kind == "jpeg":
            picture = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
            assert picture.shape[:2] == (int(image["height"]), int(image["width"]))
            assert picture.shape[1] / picture.shape[0] == pytest.approx(60 / 80, abs=0.01)
        else:
            svg = ElementTree.fromstring(content)
            assert svg.tag == "{http://www.w3.org/2000/svg}svg"
            targets = [value for element in svg.iter() for name, value in element.attrib.items() if "href" in name]
            assert targets
            assert all(target.startswith("#") for target in targets)
    assert kinds["svg+xml"] == 3 * 5  # at each level three of curves and a histogram a model
    assert kinds["jpeg"] > 0


def test_tables_hold_the_results(data, page):
    _, results, _ = data
    by_head = {}
    for head, *rows in page.tables:
        by_head.setdefault(tuple(head[:2]), []).append(rows)
    assert {tuple(row) for row in by_head["Side, view", "Images"][0]} == {
        ("LEFT CC", "24", "16", "8"),
        ("LEFT MLO", "24", "16", "8"),
        ("RIGHT CC", "24", "24", "0"),
        ("RIGHT MLO", "24", "24", "0"),
    }
    for index, level in enumerate(("image", "breast", "patient")):
        models = results["levels"][level]["models"]
        rows = by_head["Model", "AUC"][index]
        assert [row[0] for row in rows] == ["good", NASTY]
        for name, auc, delong, bootstrap, precision in rows:
            found = models[name]
            assert float(auc) == pytest.approx(found["auc"]["value"], abs=5.1e-4)
            assert numbers(delong) == pytest.approx(found["auc"]["delong"], abs=5.1e-4)
            assert numbers(bootstrap) == pytest.approx(found["auc"]["bootstrap"], abs=5.1e-4)
            area = found["average_precision"]
            assert numbers(precision) == pytest.approx([area["value"], *area["bootstrap"]], abs=5.1e-4)
        rows = by_head["Model and operating point", "Threshold"][index]
        points = [(name, point) for name, model in models.items() for point in model["points"]]
        assert len(rows) == len(points) == 8
        for (title, threshold, sensitivity, specificity), (name, point) in zip(rows, points, strict=True):
            assert title == f"{name}: {point['name']}"
            assert float(threshold) == pytest.approx(point["threshold"], rel=5e-3)
            for cell, of in ((sensitivity, point["sensitivity"]), (specificity, point["specificity"])):
                assert numbers(cell) == pytest.approx([of["value"], *of["interval"]], abs=5.1e-4)
        [[pair, difference, interval, p]] = by_head["Models", "Difference"][index]
        [comparison] = results["levels"][level]["comparisons"]
        assert pair == f"good - {NASTY}"
        assert numbers(difference) == pytest.approx([comparison["difference"]], abs=5.1e-4)
        assert numbers(interval) == pytest.approx(comparison["interval"], abs=5.1e-4)
        assert p == "< 0.001" if comparison["p"] < 0.001 else float(p) == pytest.approx(comparison["p"], abs=5.1e-4)
        for name, brier, intercept, slope in by_head["Model", "Brier score (95%)"][index]:
            found = models[name]["calibration"]
            assert numbers(brier) == pytest.approx([found["brier"]["value"], *found["brier"]["bootstrap"]], abs=5.1e-4)
            for cell, of in ((intercept, found["intercept"]), (slope, found["slope"])):
                expected = [] if of["value"] is None else [of["value"], *of["interval"]]
                assert numbers(cell) == pytest.approx(expected, abs=5.1e-4)
    assert by_head["Package", "Version"] == [[["keras", "3.15"], [NASTY, NASTY]]]


def numbers(cell):
    return [float(part) for part in re.findall(r"[-+]?\d+\.\d+", cell.replace("\u2212", "-"))]


def test_errors_are_the_most_confident_ones(data, text):
    table, results, _ = data
    threshold = results["levels"]["image"]["models"]["good"]["points"][0]["threshold"]
    false_positive = table[(table["good"] >= threshold) & (table["label"] == 0)].sort_values("good", ascending=False)
    false_negative = table[(table["good"] < threshold) & (table["label"] == 1)].sort_values("good")
    assert min(len(false_positive), len(false_negative)) > 0
    part = text[text.index("<h3>good</h3>") : text.index("<h3>&lt;script")]
    assert f"False positives: {len(false_positive)}<" in part
    assert f"False negatives: {len(false_negative)}<" in part
    shown = re.findall(r'<span class="file">(.*?)</span>', part)
    assert shown == [*false_positive["file"][:4], *false_negative["file"][:4]]
    # The mammogram and the map beside it for a network, the mammogram alone for what is none.
    assert part.count("data:image/jpeg") == 2 * len(shown)
    other = text[text.index("<h3>&lt;script") :]
    assert other.count("data:image/jpeg") == other.count('class="file"')


@pytest.mark.parametrize(
    ("score", "threshold", "shown"),
    [
        (0.999994, 0.9999951, "0.999994 (threshold 0.9999951)"),
        (0.9987, np.nextafter(1, 2), "0.9987 (threshold 1.0000000000000002)"),
        (0.25, 1, "0.25 (threshold 1)"),
        (0.0000061, 0.12345, "6.1e-06 (threshold 0.123)"),
    ],
)
def test_scores_near_0_and_1_are_told_from_them(tmp_path, score, threshold, shown):
    rows = [(f"{i}.png", "", "", "", i % 2, score if i == 1 else 0.0) for i in range(6)]
    table = pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, "m"])
    points = evaluation.OperatingPoints(False, (), (), (threshold,))
    results = evaluation.evaluate_models(table, ["m"], points, replicates=10)
    assert f"scored {shown}" in report(tmp_path / "a.html", table, results)


def test_flips_and_averages_are_no_models(tmp_path):
    rows = [(f"{i}.png", "", "", "", i % 2, i / 9, i / 8, i / 9, i / 8) for i in range(6)]
    table = pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, "a", "b", "a_flips", "b_flips"])
    table, names, _ = evaluation.add_averages(table, ["a", "b", "a_flips", "b_flips"])
    for models, count in ((names, "2 models, 6 columns of predictions"), (["a", "b"], "2 models"), (["a"], "Model a")):
        results = evaluation.evaluate_models(table, models, replicates=10)
        assert f'"lead">{count} on 6 images (3 with cancer).' in report(tmp_path / "a.html", table, results)


def test_map_lies_over_the_mammogram(data):
    _, _, folder = data
    img, _, _ = explain(next(folder.iterdir()))
    plain = blend(img)
    assert (np.ptp(plain, axis=-1) == 0).all()
    assert plain.max() == 255
    assert (plain[img == 0] == 0).all()
    values = np.zeros((80, 60))
    values[:40, :30] = 1
    covered = blend(img, values)
    assert (covered[40:] == plain[40:]).all()
    blue, green, red = np.moveaxis(covered[:20, :30].astype(int), -1, 0)  # over black
    assert (red > blue).all()
    assert (green > blue).all()


@pytest.fixture(scope="module")
def little():
    """(table, results) of six images of which nothing is known, at no operating point."""
    rows = [(f"{i}.png", "", "", "", int(i > 1), abs(i - 2) / 3) for i in range(6)]
    table = pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, "scores"])
    points = evaluation.OperatingPoints(False, (), (), ())
    return table, evaluation.evaluate_models(table, ["scores"], points, replicates=50)


def test_little_data_make_a_report_too(little, tmp_path):
    page = Page(report(tmp_path / "a.html", *little))
    assert [link["href"] for link in page.all("a")] == ["#summary", "#image", "#errors", "#methods", "#origin"]
    assert "not known" in page.text
    assert "breast level left out" in page.text


def test_same_results_give_the_same_page(little, tmp_path):
    assert report(tmp_path / "a", *little) == report(tmp_path / "b", *little)


def test_missing_pictures_are_said_in_their_place(little, tmp_path):
    def fail(file):
        raise InputError(f"{file}: no <map>")

    broken = {"scores": SimpleNamespace(explain=fail, class_list=["neg", "pos"])}
    for predictors in ({}, broken):
        page = Page(report(tmp_path / "a.html", *little, root=tmp_path, predictors=predictors))
        assert page.text.count("No picture: ") == page.text.count("No such file") == 3
        assert page.text.count("No map: ") == page.text.count("no <map>") == 3 * len(predictors)
        assert all("svg" in image["src"][:20] for image in page.all("img"))
    cv2.imwrite(str(tmp_path / "2.png"), np.arange(4800, dtype=np.uint16).reshape(80, 60))
    page = Page(report(tmp_path / "a.html", *little, root=tmp_path, predictors=broken))
    assert [page.text.count(note) for note in ("No picture: ", "No map: ")] == [2, 3]
    assert sum("jpeg" in image["src"][:20] for image in page.all("img")) == 1


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (360, 390, 700, 790, 820, 1400)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_no_width_of_a_browser_makes_it_scroll_sideways(text, tmp_path):
    frames = [f'<iframe width="{width}" srcdoc="{html.escape(text)}"></iframe>' for width in WIDTHS]
    script = (
        "onload = () => document.title = Array.from(document.querySelectorAll('iframe'), frame => {"
        "const { clientWidth, scrollWidth } = frame.contentDocument.documentElement;"
        "return clientWidth + ' ' + scrollWidth}).join(' ')"
    )
    page = f"<meta charset=utf-8><style>iframe {{ border: 0 }}</style>{''.join(frames)}<script>{script}</script>"
    (tmp_path / "frames.html").write_text(page, encoding="utf-8")
    quiet = ["background-networking", "component-update", "sync", "quic", "gpu"]
    flags = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'user'}", "--dump-dom", f"file://{tmp_path}/frames.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    sizes = [int(size) for size in re.search("<title>([0-9 ]+)</title>", done.stdout).group(1).split()]
    for width, shown, needed in zip(WIDTHS, sizes[::2], sizes[1::2], strict=True):
        assert width - 20 <= shown <= width  # less the scroll bar
        assert needed == shown
