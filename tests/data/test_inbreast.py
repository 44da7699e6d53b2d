"""INbreast from its download to prepared folders: the counts of its table, every oddity, annotations, bad input."""

import functools
import json
import os
import plistlib
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from inbreast import prepare_inbreast
from inbreast.prepare_inbreast import main, make_parser, run
from mammo.base.files import InputError
from mammo.commands import phantom
from mammo.data.inbreast import (
    POINT_RADIUS,
    Outline,
    Region,
    count_rows,
    draw_mask,
    group_findings,
    list_images,
    read_annotation,
    read_classes,
    read_inbreast_table,
    scan_inbreast,
)
from mammo.data.splits import cancer_patients, split_by_options
from mammo.phantom.inbreast import HEADER, ODDITIES, write_dicom
from tests.data import phantoms
from tests.data.phantoms import SIZE, draw_inbreast, usable
from tests.fuzz.seeds import as_biff2
from tests.helpers import files_of, make_python, read_csv, read_folder, read_png

prepare = functools.partial(phantoms.prepare, "inbreast")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")

# What is known of the real table.
BIRADS = {"1": 67, "2": 220, "3": 23, "4a": 13, "4b": 8, "4c": 22, "5": 49, "6": 8}
VIEWS = {"CC": 203, "FB": 1, "MLO": 206}

# --------------------------------------------------------------------------------- a table like the real one


def make_table(seed=0, patients=115):
    """Rows of 410 images with the counts of the real table, in its form: a patient's images have numbers in a row."""
    rng = np.random.default_rng(seed)
    birads = rng.permutation([value for value, count in BIRADS.items() for _ in range(count)])
    views = rng.permutation([value for value, count in VIEWS.items() for _ in range(count)])
    owners = np.sort(np.concatenate([np.arange(patients), rng.integers(patients, size=410 - patients)]))
    rows, names = [], []
    for place, (category, view, owner) in enumerate(zip(birads, views, owners, strict=True)):
        side, number = rng.choice(["L", "R"]), 20586908 + 38 * place
        acr = " " * 190 if place == 100 else str(rng.integers(1, 5))
        rows.append(["removed", "removed", str(side), str(view), "201001", str(number), acr, str(category)])
        in_name = "ML" if view == "MLO" else view
        names.append(f"{number}_{owner:016x}_MG_{side}_{in_name}_ANON.dcm")
    return rows, names


def write_table(path, rows, header=HEADER, delimiter=";"):
    path.write_bytes("".join(delimiter.join(cells) + "\r\n" for cells in [header, *rows]).encode())
    return path


@pytest.fixture(scope="session")
def real_form(tmp_path_factory):
    """Folder with a table like the real one, and DICOM files that have names and nothing else."""
    folder = tmp_path_factory.mktemp("real_form")
    rows, names = make_table()
    write_table(folder / "INbreast.csv", rows)
    (folder / "AllDICOMs").mkdir()
    for name in names:
        (folder / "AllDICOMs" / name).touch()
    return folder, rows


def test_counts_of_a_table_of_the_real_form(real_form, capsys):
    folder, rows = real_form
    table = read_inbreast_table(folder / "INbreast.csv")
    assert count_rows(table.rows) == {"rows": 410, "birads": BIRADS, "views": VIEWS}
    assert not table.repairs
    assert main([str(folder), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "INbreast.csv: 410 rows" in lines
    assert "  views: CC 203, FB 1, MLO 206" in lines
    assert "  BI-RADS: 1 67, 2 220, 3 23, 4a 13, 4b 8, 4c 22, 5 49, 6 8" in lines
    assert "  negative: 287 (BI-RADS 1, 2)" in lines
    assert "  positive: 100 (BI-RADS 4a, 4b, 4c, 5, 6)" in lines
    assert "  in neither class: 23 (BI-RADS 3)" in lines
    (fb,) = (row for row in rows if row[3] == "FB")
    used = [row for row in rows if row[7] != "3" and row is not fb]
    positive = sum(row[7] not in "12" for row in used)
    assert any(line.startswith(f"used: {len(used)} images ({positive} positive) of") for line in lines)


def test_dry_run_needs_the_table_alone(real_form, tmp_path, capsys):
    shutil.copy(real_form[0] / "INbreast.csv", tmp_path)
    assert main([str(tmp_path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "  positive: 100 (BI-RADS 4a, 4b, 4c, 5, 6)\n" in out
    assert out.splitlines()[-1] == "no DICOM files here, whose names tell the patients: no split"
    assert [path.name for path in tmp_path.iterdir()] == ["INbreast.csv"]


def split(folder, *options):
    """Patients of each set, and whether a patient has a positive image."""
    parser = make_parser()
    args = parser.parse_args([str(folder), "out", *options])
    download = scan_inbreast(folder)
    table = read_inbreast_table(download.find_table(folder))
    pictures = list_images(table, download, read_classes(args.neg_birads, args.pos_birads)).pictures
    return split_by_options(pictures, args, parser), cancer_patients(pictures)


def test_split_is_by_patient_and_stratified(real_form):
    sets, cancer = split(real_form[0])
    assert sorted(patient for patients in sets.values() for patient in patients) == sorted(cancer)
    assert len(sets["test"]) == pytest.approx(0.3 * len(cancer), abs=1)
    assert len(sets["val"]) == pytest.approx(0.1 * 0.7 * len(cancer), abs=1)
    for patients in sets.values():
        expected = np.mean(list(cancer.values())) * len(patients)
        assert sum(cancer[patient] for patient in patients) == pytest.approx(expected, abs=1)
    assert split(real_form[0])[0] == sets
    assert split(real_form[0], "--random-state", "1")[0] != sets


def test_excel_table_holds_the_same(real_form, tmp_path):
    pytest.importorskip("xlrd")
    folder, rows = real_form
    sums = ["", "", "", "", "", "", "", "410"]  # as at the end of the real .xls
    path = tmp_path / "INbreast.xls"
    path.write_bytes(as_biff2([HEADER, *rows, sums]))
    table = read_inbreast_table(path)
    assert list(table.rows) == list(read_inbreast_table(folder / "INbreast.csv").rows)
    assert table.repairs == {"rows_without_file_name": [f"{path}, row 412"]}


def test_excel_without_its_package_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "INbreast.xls").write_bytes(as_biff2([HEADER]))
    assert main([str(tmp_path), "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert "pip install xlrd, or save it as .csv" in error and error.count("\n") == 1


def test_damaged_excel_is_named(tmp_path):
    pytest.importorskip("xlrd")
    path = tmp_path / "INbreast.xls"
    for content in (as_biff2([HEADER])[:20], b"", b"no table"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"INbreast\.xls: not a readable table"):
            read_inbreast_table(path)
    path.write_bytes(as_biff2([]))
    with pytest.raises(InputError, match="missing columns"):
        read_inbreast_table(path)


def test_csv_is_preferred_and_two_are_refused(real_form, tmp_path):
    folder = tmp_path / "download"
    (folder / "sub").mkdir(parents=True)
    (folder / "INbreast.xls").write_bytes(b"not looked at")
    shutil.copy(real_form[0] / "INbreast.csv", folder)
    assert scan_inbreast(folder).find_table(folder) == folder / "INbreast.csv"
    shutil.copy(folder / "INbreast.csv", folder / "sub")
    with pytest.raises(InputError, match=r"two tables, INbreast\.csv and sub/INbreast\.csv: name the right one"):
        run(data=str(folder), dry_run=True)
    run(data=str(folder), dry_run=True, table=str(folder / "INbreast.csv"))


def test_table_of_commas(real_form, tmp_path):
    path = write_table(tmp_path / "INbreast.csv", real_form[1], delimiter=",")
    assert list(read_inbreast_table(path).rows) == list(read_inbreast_table(real_form[0] / "INbreast.csv").rows)


# ------------------------------------------------------------------------------------------- phantom downloads


@pytest.fixture
def prepared(prepared_data):
    """(download with all oddities, its views, oddities.json, prepared folder, report)."""
    made, out, report = prepared_data("inbreast")
    return made.folder, made.views, made.odd, out, report


def test_phantom_has_every_oddity(prepared):
    download, views, odd, *_ = prepared
    assert set(odd) == set(ODDITIES) and all(len(found) == 1 for found in odd.values())
    text = (download / "INbreast.csv").read_bytes().decode()
    lines = text.split("\r\n")
    assert lines[0] == "Patient ID;Patient age;Laterality;View;Acquisition date;File Name;ACR;Bi-Rads"
    assert text.count("\n") == text.count("\r\n") == len(views) + 1  # one row less, one more
    rows = [line.split(";") for line in lines[1:-1]]
    assert {row[0] for row in rows} == {"removed"}
    (blank,) = (row for row in rows if not row[6].strip())
    assert (len(blank[6]), int(blank[5])) == (190, odd["blank_acr"][0])
    names = [path.name for path in (download / "AllDICOMs").iterdir()]
    assert not any("MLO" in name for name in names) and any("_MG_L_ML_ANON" in name for name in names)


def test_phantom_from_the_command_line(tmp_path, capsys):
    options = ["--layout", "inbreast", "--patients", "3", "--height", "128", "--width", "128", "--views", "CC"]
    assert phantom.main([str(tmp_path / "one"), *options, "--jobs", "1"]) == 0
    assert phantom.main([str(tmp_path / "two"), *options, "--jobs", "2", "--style", "digital"]) == 0
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")
    header = pydicom.dcmread(next((tmp_path / "one/AllDICOMs").iterdir()))
    assert (header.BitsAllocated, header.BitsStored, header.HighBit, header.PatientID) == (16, 14, 13, "removed")
    for option, value, layouts in (("--tree", "jpeg", "cbis-ddsm"), ("--test-size", "0.3", "cbis-ddsm or prepared")):
        assert phantom.main([str(tmp_path / "three"), *options, option, value]) == 1
        error = capsys.readouterr().err
        assert f"{option} is for --layout" in error and all(name in error for name in layouts.split(" or "))
    assert not (tmp_path / "three").exists()


def test_full_images_are_those_drawn(prepared):
    _, views, odd, out, _ = prepared
    images = usable(views, odd)
    assert any(name.endswith("_CC_2") for name in images)
    assert {path.stem for path in (out / "full_img").iterdir()} == set(images)
    for name, view in images.items():
        np.testing.assert_array_equal(read_png(out / f"full_img/{name}.png"), draw_inbreast(view)[0])


def test_masks_are_those_drawn(prepared):
    _, views, odd, out, report = prepared
    found = defaultdict(list)
    for path in (out / "roi_mask").iterdir():
        kind, rest = path.stem.split("-INbreast_")
        found[rest.rpartition("_")[0]].append((int(rest.rpartition("_")[2]), kind, path))
    images = {name: view for name, view in usable(views, odd).items() if view.number not in odd["damaged_xml"]}
    assert set(found) == {name for name, view in images.items() if view.breast.findings}
    for name, masks in found.items():
        view = images[name]
        drawn = draw_inbreast(view)[1]
        kinds = ["Mass" if kind == "mass" else "Cluster" for kind, _ in view.breast.findings]
        regions = [(kind, path) for _, kind, path in sorted(masks) if kind != "Calc"]
        assert [kind.replace("Spiculated", "Mass") for kind, _ in regions] == kinds
        assert sorted(number for number, *_ in masks) == list(range(1, len(masks) + 1))
        for (_, path), mask in zip(regions, drawn, strict=True):
            np.testing.assert_array_equal(read_png(path), mask)
        assert ("Calc" in [kind for _, kind, _ in masks]) == ("Cluster" in kinds)
        for _, kind, path in masks:
            if kind == "Calc":  # points are drawn somewhere in a cluster
                inside = cv2.dilate(np.maximum.reduce(drawn), np.ones((2 * POINT_RADIUS + 1,) * 2)) > 0
                assert read_png(path).any() and not (read_png(path) > 0)[~inside].any()
    rows = read_csv(out / "roi_masks.csv")
    files = [f"roi_mask/{path.name}" for masks in found.values() for *_, path in masks]
    assert sorted(row["file"] for row in rows) == sorted(files)
    assert report["counts"]["masks_prepared"] == len(rows)
    (name,) = (name for name, view in usable(views, odd).items() if view.number in odd["damaged_xml"])
    assert (out / f"full_img/{name}.png").exists()


def test_localisation_reads_the_masks(prepared):
    from mammo.data.patches import read_lesion_masks

    *_, out, _ = prepared
    path = next((out / "roi_mask").glob("Mass-*.png"))
    name = path.stem.removeprefix("Mass-INbreast_").rpartition("_")[0]
    lesions = read_lesion_masks(out / "roi_mask", name, out / f"full_img/{name}.png")
    lesion = next(lesion for lesion in lesions if lesion.type == "mass")
    np.testing.assert_array_equal(lesion.pixels, read_png(path) > 0)


def test_everything_left_out_is_counted_and_explained(prepared):
    _, views, odd, _, report = prepared
    threes = [view.number for view in views if view.birads == "3"]
    excluded = report["excluded"]
    assert threes and excluded["birads_of_no_class"]["items"] == [f"{number}: BI-RADS 3" for number in threes]
    assert excluded["no_screening_view"]["items"] == [f"{odd['fb_view'][0]}: FB"]
    (path,) = excluded["dicom_without_row"]["items"]
    assert path.startswith(f"AllDICOMs/{odd['dicom_without_row'][0]}_")
    assert all(kind["count"] == len(kind["items"]) and kind["why"] for kind in excluded.values())
    repairs = {kind: repair["count"] for kind, repair in report["repairs"].items()}
    assert repairs["duplicate_rows_merged"] == repairs["monochrome1_inverted"] == 1
    assert repairs["findings_of_unknown_name"] == repairs["several_files_for_one_image"] == 0
    reasons = {fault["image"]: fault["reason"] for fault in report["skipped"]}
    assert len(reasons) == 4 and report["counts"]["images_skipped"] == 3
    numbers = {kind: odd[kind][0] for kind in ("other_laterality", "row_without_dicom", "truncated", "damaged_xml")}
    assert "but its DICOM file is called AllDICOMs/" in reasons[str(numbers["other_laterality"])]
    assert "no DICOM file: Expected" in reasons[str(numbers["row_without_dicom"])]
    assert sum(f"{numbers['truncated']}_" in reason for reason in reasons.values()) == 1
    assert sum(f"{numbers['damaged_xml']}.xml: not an annotation file" in reason for reason in reasons.values()) == 1
    total = len(views) + 1 - 1  # a row more, and one less
    assert report["table"]["rows"] == total - repairs["duplicate_rows_merged"]
    used, left = report["counts"]["images_prepared"] + 3, len(threes) + 1
    assert used + left == report["table"]["rows"]


# --------------------------------------------------------------------------------- downloads changed by hand


@pytest.fixture
def plain(plain_data):
    """A small download without oddities."""
    return plain_data("inbreast")


def edit(folder, old, new):
    path = folder / "INbreast.csv"
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())


def test_other_classes(download, tmp_path):
    folder, views = download
    benign = next(view for view in views if view.birads == "2")
    edit(folder, f";{benign.number};{1 + benign.breast.index % 4};2", f";{benign.number};1;4b")
    counts = Counter(view.birads for view in views if view is not benign)
    pos = ["4b", "3"]
    report = prepare(folder, tmp_path / "out", neg_birads=["2"], pos_birads=pos, on_error="skip")
    assert report["options"]["neg_birads"] == ["2"] and report["options"]["pos_birads"] == pos
    images = sum(s["images"] for s in report["sets"].values())
    positive = sum(s["positive_images"] for s in report["sets"].values())
    assert (images - positive, positive) == (counts["2"], counts["4b"] + 1 + counts["3"])
    rest = sum(counts.values()) - counts["2"] - counts["4b"] - counts["3"]
    assert report["excluded"]["birads_of_no_class"]["count"] == rest


def test_categories_and_classes():
    classes = read_classes(["1", "2"], ["4", "5", "6"])
    expected = {"0": None, "1": "neg", "2": "neg", "3": None} | dict.fromkeys(("4a", "4b", "4c", "5", "6", "4"), "pos")
    assert {birads: classes.label(birads) for birads in expected} == expected
    assert set(BIRADS) <= set(expected)
    assert read_classes(["4a"], ["4b", "4c"]).label("4") is None
    with pytest.raises(InputError, match="BI-RADS 4a: in both classes"):
        read_classes(["1", "4a"], ["4"])


def used(views):
    return [view for view in views if view.birads != "3"]


def test_auto_levels_take_what_bits_stored_do_not_tell(download, tmp_path):
    folder, views = download
    pixels = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE)
    write_dicom(folder / views[0].dicom, pixels, bits=12, PatientID="removed")
    report = prepare(folder, tmp_path / "out", auto_levels=True)
    assert not report["skipped"]
    img = read_png(next((tmp_path / "out").rglob(f"{views[0].patient}_{views[0].breast.side}_CC.png")))
    assert img.min() < 500 and img.max() > 65000


def test_copies_of_a_file_are_one_image(download, plain, tmp_path):
    folder, views = download
    (folder / "again").mkdir()
    shutil.copy(folder / views[0].dicom, folder / "again")
    (folder / "AllDICOMs" / f"._{Path(views[0].dicom).name}").write_bytes(b"left by a Mac")
    report = prepare(folder, tmp_path / "out")
    (text,) = report["repairs"]["several_files_for_one_image"]["items"]
    assert views[0].dicom in text and "again/" in text
    prepare(plain.folder, tmp_path / "plain")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "plain")


def test_no_images_at_all(download, tmp_path, capsys):
    folder, _ = download
    shutil.rmtree(folder / "AllDICOMs")
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert "no DICOM files: Expected AllDICOMs there or below" in capsys.readouterr().err
    assert main([str(folder / "none"), str(tmp_path / "out")]) == 1
    assert "none: no such folder" in capsys.readouterr().err
    assert main([str(folder)]) == 1
    assert "no output folder given" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_images_of_either_class(plain, tmp_path, capsys):
    views = plain.content
    assert not any(view.birads in ("0", "6") for view in views)
    assert main([str(plain.folder), str(tmp_path / "out"), "--neg-birads", "0", "--pos-birads", "6"]) == 1
    printed = capsys.readouterr()
    assert f"left out: {len(views)} images such as 20586900: BI-RADS {views[0].birads}, since" in printed.out
    assert "no images of either class" in printed.err and printed.err.count("\n") == 1


# ------------------------------------------------------------------------------------------------- annotations


def write_annotation(path, *rois):
    """rois: name and points of each."""
    images = [{"ROIs": [{"Name": name, "NumberOfPoints": len(points), "Point_px": points} for name, points in rois]}]
    path.write_bytes(plistlib.dumps({"Images": images}))
    return path


def test_regions_are_filled_and_points_are_discs(tmp_path):
    square = ["(10.0, 20.0)", "(19.4, 20.4)", "(19, 29)", "( 10 , 29 )"]
    path = write_annotation(
        tmp_path / "1.xml",
        ("Mass ", square),
        ("Calcification", ["(40, 50)"]),
        ("Espiculated  Region", square[:3]),
        ("Calcifications", ["(60, 70)", "(62, 70)", "(62, 72)", "(60, 72)"]),
        ("Mass", ["(3, 4)"]),
        ("Assymetry", square),
        ("Unnamed", square),
        ("Cluster", ["(1, 1)", "(5, 1)"]),
        ("Calcification", []),
    )
    lesions, repairs = group_findings(read_annotation(path))
    kinds = [(lesion.kind, lesion.number) for lesion in lesions]
    assert kinds == [("Mass", 1), ("Calc", 2), ("Spiculated", 3), ("Asymmetry", 4), ("Other", 5), ("Cluster", 6)]
    assert repairs == [
        ("points_without_extent_left_out", "Mass"),
        ("findings_of_unknown_name", "Unnamed"),
        ("points_without_extent_left_out", "Calcification"),
        ("points_drawn_as_discs", "1 of Calc"),
    ]
    mask = draw_mask(lesions[0], (100, 90))
    expected = np.zeros((100, 90), np.uint8)
    expected[20:30, 10:20] = 255  # columns are x, and the border belongs to it
    np.testing.assert_array_equal(mask, expected)
    calcs = draw_mask(lesions[1], (100, 90)) > 0
    rows, columns = np.mgrid[:100, :90]
    distance = np.hypot(rows - 50, columns - 40)
    assert calcs[distance <= POINT_RADIUS].all() and calcs[70:73, 60:63].all()
    assert not (calcs & (distance > POINT_RADIUS + 1))[:65].any()
    assert calcs.sum() == calcs[:65].sum() + 9
    triangle = draw_mask(lesions[2], (100, 90)) > 0
    assert triangle[20, 10:20].all() and triangle[29, 19] and not triangle[29, 10]
    assert (draw_mask(lesions[5], (100, 90)) > 0).sum() == 5  # two points: a line


def test_what_juts_out_is_cut_and_what_lies_beside_is_refused():
    box = [(-5.0, -5.0), (3.0, -5.0), (3.0, 3.0), (-5.0, 3.0)]
    mask = draw_mask(Region("Mass", 1, [Outline("Mass", box)]), (10, 12))
    assert (mask > 0).sum() == 16 and (mask[:4, :4] == 255).all()
    far = [(x + 100, y) for x, y in box]
    with pytest.raises(InputError, match="lies beside the image of 10 x 12 pixels"):
        draw_mask(Region("Mass", 1, [Outline("Mass", far)]), (10, 12))


ENTITIES = b"""<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>
<plist version="1.0"><dict><key>Images</key><array><string>&b;</string></array></dict></plist>"""


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no XML",
        b"<?xml version='1.0'?><plist><dict>",
        b"<?xml version='1.0'?><svg/>",
        ENTITIES,
        plistlib.dumps([1]),
        plistlib.dumps({"Images": [{}]}),
        plistlib.dumps({"Images": [{"ROIs": [{"Name": "Mass", "Point_px": ["(1, 2, 3)"]}]}]}),
        plistlib.dumps({"Images": [{"ROIs": [{"Name": "Mass", "Point_px": ["(1, nan)"]}]}]}),
        plistlib.dumps({"Images": [{"ROIs": [{"Name": "Mass", "Point_px": ["(1, 1e30)"]}]}]}),
        plistlib.dumps({"Images": [{"ROIs": [{"Name": "Mass", "Point_px": [[1, 2]]}]}]}),
        plistlib.dumps({"Images": [{"ROIs": []}]}, fmt=plistlib.FMT_BINARY),
    ],
    ids=["empty", "text", "cut", "another", "entities", "list", "no ROIs", "3D", "nan", "huge", "no text", "binary"],
)
def test_damaged_annotations_cost_the_masks_alone(download, tmp_path, content):
    folder, views = download
    view = next(view for view in used(views) if view.breast.findings)
    (folder / view.annotation).write_bytes(content)
    report = prepare(folder, tmp_path / "out", roi_masks=True, on_error="skip")
    (skipped,) = report["skipped"]
    assert f"{view.number}.xml: not an annotation file" in skipped["reason"] and "\n" not in skipped["reason"]
    assert (tmp_path / f"out/full_img/{skipped['image']}.png").exists()
    assert not list((tmp_path / "out/roi_mask").glob(f"*{skipped['image']}*"))
    assert report["counts"]["images_prepared"] == len(used(views))
    if not content:
        prepare(folder, tmp_path / "without")  # nobody asked for masks


def test_annotations_of_another_image_and_of_muscles(download, tmp_path):
    folder, views = download
    view = next(view for view in used(views) if view.breast.findings)
    (folder / "Pectoral Muscle XML").mkdir()
    write_annotation(folder / "Pectoral Muscle XML" / f"{view.number}.xml", ("Mass", ["(1, 1)", "(2, 2)", "(3, 1)"]))
    write_annotation(folder / view.annotation, ("Mass", ["(500, 1)", "(520, 2)", "(510, 9)"]))
    report = prepare(folder, tmp_path / "out", roi_masks=True, on_error="skip")
    assert report["repairs"]["several_files_for_one_image"]["count"] == 0
    (skipped,) = report["skipped"]
    assert "Mass 1: it lies beside the image of 144 x 128 pixels" in skipped["reason"]


def test_masks_can_be_added_and_taken_away(plain, tmp_path):
    prepare(plain.folder, tmp_path / "out")
    prepare(plain.folder, tmp_path / "out", roi_masks=True, fresh=True)
    report = prepare(plain.folder, tmp_path / "fresh", roi_masks=True)
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "fresh")
    without = [view for view in used(plain.content) if not view.breast.findings]
    assert report["counts"]["images_without_annotations"] == len(without)
    prepare(plain.folder, tmp_path / "out", fresh=True)
    prepare(plain.folder, tmp_path / "plain")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "plain")


# -------------------------------------------------------------------------------------------------- finetuning

FINETUNE = Path(prepare_inbreast.__file__).with_name("finetune.sh")


def finetune(folder, *args, python=sys.executable, **env):
    """Run finetune.sh in `folder` with this Python; returns the finished process."""
    make_python(folder / "bin", python)
    inherited = {name: value for name, value in os.environ.items() if name != "MEAN"}
    env = inherited | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"} | env
    return subprocess.run([FINETUNE, *map(str, args)], cwd=folder, env=env, capture_output=True, text=True)


def test_finetuning_takes_the_published_mean_a_number_or_the_measured_one(plain, tmp_path):
    report = prepare(plain.folder, tmp_path / "data")

    def mean(data="data", *args, **env):
        done = finetune(tmp_path, "m.h5", data, "best.h5", *args, python="echo", **env)
        words = done.stdout.split()
        return words[len(words) - words[::-1].index("--featurewise-mean")] if words else done.stderr

    assert mean() == "44.33"
    assert mean(MEAN="41.5") == "41.5"
    assert float(mean(MEAN="report")) == report["featurewise_mean"]
    assert mean("data", "--featurewise-mean", "40", MEAN="report") == "40"
    assert mean("none", MEAN="report").startswith("finetune.sh: error: none/report.json: no such file")
    (tmp_path / "data/report.json").write_text('{\n  "featurewise_mean": null\n}\n')
    assert mean(MEAN="report").startswith("finetune.sh: error: data/report.json: no featurewise_mean in it")


@pytest.mark.slow
def test_finetuning_runs_on_what_is_prepared(plain, tmp_path):
    """The recipe as it stands, but for the size of images and the number of epochs."""
    import keras

    report = prepare(plain.folder, tmp_path / "data")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((72, 56, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 5, strides=4, activation="relu")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    model.save(tmp_path / "model.h5")
    options = ["--img-size", "72", "56", "--all-layer-epochs", "2"]
    done = finetune(tmp_path, "model.h5", "data", "models/best.h5", *options, MEAN="report")
    assert done.returncode == 0, done.stderr
    args = json.loads((tmp_path / "models/best/args.json").read_text())
    assert args["featurewise_mean"] == report["featurewise_mean"]
    rates = [float(row["learning_rate"]) for row in read_csv(tmp_path / "models/best/history.csv")]
    assert rates == pytest.approx([1e-6] * 2)
    tuned = keras.models.load_model(tmp_path / "models/best.h5", compile=False)
    assert all((a != b).any() for a, b in zip(model.get_weights(), tuned.get_weights(), strict=True))
    files = [row["file"] for row in read_csv(tmp_path / "models/best/predictions.csv")]
    assert sorted(files) == sorted(name for name in read_folder(tmp_path / "data/test") if name.endswith(".png"))
