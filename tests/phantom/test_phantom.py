"""The phantom: its texture's spectrum, lesions inside their masks, files that agree, and its splits."""

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.commands.phantom import main
from mammo.data.splits import stratified_split
from mammo.images.breast import DMImagePreprocessor
from mammo.images.reading import read_img
from mammo.phantom import cbis_ddsm
from mammo.phantom.cbis_ddsm import ODDITIES, make_download
from mammo.phantom.draw import STYLES, Patient, draw_breast, draw_calcs, draw_mass, draw_view, power_law_noise
from mammo.phantom.prepared import make_phantom
from tests.helpers import read_csv, read_folder

HEIGHT, WIDTH = 192, 144
PATHOLOGIES = ["BENIGN", "MALIGNANT"]


def spectral_exponent(img, low, high):
    """Minus the slope of the radially averaged power spectrum between two frequencies (cycles a pixel)."""
    power = np.abs(np.fft.fft2(img - img.mean())) ** 2
    frequency = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) for n in img.shape), indexing="ij"))
    edges = np.geomspace(low, high, 9)
    means = [power[(frequency >= a) & (frequency < b)].mean() for a, b in pairwise(edges)]
    return -np.polyfit(np.log(np.sqrt(edges[1:] * edges[:-1])), np.log(means), 1)[0]


@pytest.mark.parametrize("exponent", [2.0, 3.0])
def test_the_texture_has_a_power_law_spectrum(exponent):
    noise = power_law_noise((384, 320), np.random.default_rng(1), exponent)
    assert spectral_exponent(noise, 0.01, 0.45) == pytest.approx(exponent, abs=0.15)
    assert abs(noise.mean()) < 1e-4
    assert noise.std() == pytest.approx(1, abs=1e-4)


def test_breast_tissue_has_about_the_spectrum_of_mammograms():
    """Inside the breast, density and texture together: published exponents are about 3."""
    breast = draw_breast(576, 448, "CC", np.random.default_rng(3))
    tissue = breast.brightness[200:328, 40:168] * np.hanning(128)[:, None] * np.hanning(128)
    assert spectral_exponent(tissue, 0.05, 0.4) == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("side", ["LEFT", "RIGHT"])
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_segment_breast_finds_the_breast_and_drops_the_label(side, view):
    patient = Patient("P_00001", 1, side, [])
    img, masks = draw_view(patient, view, seed=5, height=HEIGHT, width=WIDTH)
    assert masks == []
    rng = np.random.default_rng([5, 1, {"CC": 1, "MLO": 2}[view]])
    expected = draw_breast(HEIGHT, WIDTH, view, rng).clearance >= 0
    if side == "RIGHT":
        expected = expected[:, ::-1]
    assert img[:30][~expected[:30]].max() > 40000  # the label
    breast, (x, _, width, _) = DMImagePreprocessor.segment_breast(img, crop=False)
    found = breast > 0
    assert (found & expected).sum() / (found | expected).sum() > 0.93
    assert x == 0 if side == "LEFT" else x + width == WIDTH


@pytest.mark.parametrize("kind", ["mass", "calc"])
@pytest.mark.parametrize("pathology", PATHOLOGIES)
def test_masks_hold_the_lesions_and_little_else(kind, pathology):
    for index, (side, view) in enumerate([("LEFT", "CC"), ("RIGHT", "MLO")], start=1):
        patient = Patient("P", index, side, [(kind, pathology)] * 2)
        with_lesions, masks = draw_view(patient, view, 0, HEIGHT, WIDTH)
        without, _ = draw_view(patient, view, 0, HEIGHT, WIDTH, contrast=0)
        lesions = with_lesions != without
        assert not lesions[(masks[0] == 0) & (masks[1] == 0)].any()
        for mask in masks:
            assert mask.dtype == np.uint8
            assert set(np.unique(mask)) == {0, 255}
            rows, columns = np.nonzero(lesions & (mask > 0))
            _, _, width, height = cv2.boundingRect(mask)
            assert height - np.ptp(rows) <= 6  # pixels: the margin and the faintest rim
            assert width - np.ptp(columns) <= 6
            assert 0.03 * HEIGHT < max(width, height) < 0.2 * HEIGHT


STYLED = [
    Patient("P", 1, "LEFT", [("mass", "MALIGNANT"), ("calc", "BENIGN")]),
    Patient("P", 2, "RIGHT", [("calc", "MALIGNANT"), ("mass", "BENIGN")]),
]


@pytest.mark.parametrize(
    ("patient", "view", "means", "areas"),
    [
        (STYLED[0], "MLO", [[32314.14, 11287.07, 5416.24], [26390.01, 23465.93, 47.61],
                            [15559.91, 16360.40, 48.64], [7924.87, 2791.45, 46.72]], [401, 220]),
        (STYLED[1], "CC", [[525.77, 642.88, 6505.83], [47.38, 16798.65, 19954.75],
                           [47.13, 15497.32, 19415.02], [49.35, 774.56, 5197.13]], [399, 435]),
    ],
    ids=["MLO", "CC"],
)  # fmt: skip
def test_film_is_drawn_as_ever(patient, view, means, areas):
    """Means of blocks of 48 x 48 pixels and areas of masks, as before there was another style; a checksum of pixels
    would not do, since other processors round a pixel in many by one."""
    img, masks = draw_view(patient, view, 7, HEIGHT, WIDTH)
    assert (img == draw_view(patient, view, 7, HEIGHT, WIDTH, style="film")[0]).all()
    np.testing.assert_allclose(img.reshape(4, 48, 3, 48).mean(axis=(1, 3)), means, atol=0.05)
    assert [(mask > 0).sum() for mask in masks] == areas


@pytest.mark.parametrize(("patient", "view"), list(zip(STYLED, ("MLO", "CC"), strict=True)), ids=["MLO", "CC"])
def test_digital_pictures_show_the_same_breast_otherwise(patient, view):
    from scipy.stats import spearmanr

    film, masks = draw_view(patient, view, 7, HEIGHT, WIDTH)
    digital, same_masks = draw_view(patient, view, 7, HEIGHT, WIDTH, style="digital")
    assert all((one == two).all() for one, two in zip(masks, same_masks, strict=True))
    # 14 bits, the upper ones: more levels than 12 bits have.
    assert digital.dtype == np.uint16
    assert not (digital & 3).any()
    assert len(np.unique(digital)) > 4096
    rng = np.random.default_rng([7, patient.index, 1 + (view == "MLO")])
    thickness = draw_breast(HEIGHT, WIDTH, view, rng).thickness
    if patient.side == "RIGHT":
        thickness = thickness[:, ::-1]
    # Around the breast nothing, where film has grain and a label.
    assert digital[thickness == 0].max() == 0
    assert (film[thickness == 0] > 0).mean() > 0.4
    assert film[thickness == 0].max() > 39000
    # Inside, what is bright stays bright; more contrast, and more of it in fine detail.
    inside = thickness > 0.999
    pictures = [img.astype("float32") for img in (film, digital)]
    smooth = [cv2.GaussianBlur(img, (0, 0), 2)[inside] for img in pictures]
    assert spearmanr(*smooth).statistic > 0.99
    ranges = [np.ptp(np.quantile(img[inside], [0.1, 0.9])) for img in pictures]
    assert ranges[1] > 1.4 * ranges[0]
    detail = [np.abs(cv2.Laplacian(img, cv2.CV_32F))[inside].mean() / img[inside].std() for img in pictures]
    assert detail[1] > 1.8 * detail[0]


def test_digital_noise_is_of_photons():
    """A flat field of no lesions: after the curve is undone, the variance is that of photon counts, so it grows
    with brightness as their number falls."""
    rng, variances = np.random.default_rng(0), []
    for level in (0.2, 0.4, 0.6):
        flat = np.full((400, 400), level, "float32")
        grey = STYLES["digital"](flat, np.ones_like(flat), rng)
        variances.append(np.log(grey / (1 - grey)).var())
    # Photons are e^-4 fewer for each unit of brightness; the scale, of curve and edges, is the same for all.
    np.testing.assert_allclose(np.diff(np.log(variances)), 0.8, atol=0.05)


def test_digital_lesions_are_where_the_masks_are():
    drawn = [draw_view(STYLED[0], "MLO", 7, HEIGHT, WIDTH, contrast, "digital") for contrast in (1, 0)]
    (with_lesions, masks), (without, _) = drawn
    change = np.abs(with_lesions.astype(int) - without)
    inside = np.maximum.reduce(masks) > 0
    assert change[inside].max() > 20000
    assert change[~inside].max() < 0.05 * change[inside].max()  # what the enhanced edges reach beyond


@pytest.mark.parametrize("layout", ["prepared", "cbis-ddsm"])
def test_the_style_of_a_data_set(tmp_path, layout):
    options = "--patients 3 --views CC --height 192 --width 144 --test-size 0 --jobs 1"
    options += " --val-size 0" if layout == "prepared" else " --oddities none"
    for style in ("", "film", "digital"):
        chosen = ["--style", style] if style else []
        assert main([f"{tmp_path}/{style}/out", "--layout", layout, *options.split(), *chosen]) == 0
    found = {}
    for style in ("", "film", "digital"):
        images = [read_img(path) for path in sorted(Path(tmp_path, style, "out").rglob("*"))
                  if path.suffix in (".png", ".dcm")]  # fmt: skip
        found[style] = [img for img in images if img.dtype == np.uint16 and img.shape == (HEIGHT, WIDTH)]
        assert f"style {style or 'film'}" in (tmp_path / style / "out" / "README.txt").read_text()
    for default, film, digital in zip(*found.values(), strict=True):
        assert (film == default).all()
        assert (film & 3).any()
        assert not (digital & 3).any()


def test_benign_masses_are_smooth_and_malignant_ones_spiculated():
    def compactness(malignant, seed):
        """4 pi area / perimeter^2: 1 for a disc."""
        lesion = draw_mass(malignant, 24, np.random.default_rng(seed))
        contours, _ = cv2.findContours((lesion > 0.2).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outline = max(contours, key=cv2.contourArea)
        return 4 * np.pi * cv2.contourArea(outline) / cv2.arcLength(outline, True) ** 2

    assert min(compactness(False, seed) for seed in range(20)) > 0.75
    assert max(compactness(True, seed) for seed in range(20)) < 0.4


def test_benign_calcifications_are_round_and_even_and_malignant_ones_are_not():
    def spread(malignant, seed):
        """Coefficient of variation of the areas of the separate calcifications."""
        lesion = draw_calcs(malignant, 100, 1152, np.random.default_rng(seed))
        stats = cv2.connectedComponentsWithStats((lesion > 0.15).astype(np.uint8))[2][1:]
        return stats[:, cv2.CC_STAT_AREA].std() / stats[:, cv2.CC_STAT_AREA].mean()

    benign, malignant = ([spread(kind, seed) for seed in range(20)] for kind in (False, True))
    assert np.mean(benign) < 0.5 * np.mean(malignant)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantom")
    shares = {"prevalence": 0.3, "benign_rate": 0.5, "test_size": 0.25, "val_size": 0.2}
    return out, make_phantom(out, patients=40, height=HEIGHT, width=WIDTH, **shares)


def test_shares_are_exact(phantom):
    _, people = phantom
    assert sum(p.malignant for p in people) == 12
    assert sum(bool(p.findings) and not p.malignant for p in people) == 20
    assert sum(not p.findings for p in people) == 8


def test_tables_masks_and_images_agree(phantom):
    out, people = phantom
    views = ("CC", "MLO")
    names = {f"{p.name}_{p.side}_{view}.png" for p in people for view in views}
    assert {path.name for path in (out / "full_img").iterdir()} == names
    rows = read_csv(out / "roi_mask_path.csv")
    assert list(rows[0]) == ["patient_id", "side", "view", "abn_num", "pathology", "type"]
    assert len(rows) == 2 * sum(len(p.findings) for p in people)
    masks = set()
    for row in rows:
        stem = "_".join((row["patient_id"], row["side"], row["view"]))
        masks.add(f"{row['type'].capitalize()}-Training_{stem}_{row['abn_num']}.png")
        assert f"{stem}.png" in names
        assert row["pathology"] in {"MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK"}
    assert {path.name for path in (out / "roi_mask").iterdir()} == masks
    for path, dtype in ((next((out / "full_img").iterdir()), "uint16"), (out / "roi_mask" / masks.pop(), "uint8")):
        img = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert img.dtype == dtype
        assert img.shape == (HEIGHT, WIDTH)
    positive = {(row["patient_id"], row["side"]) for row in rows if row["pathology"] == "MALIGNANT"}
    cancers = read_csv(out / "pat_side_cancer.csv")
    assert {(row["patient_id"], row["side"]) for row in cancers if row["cancer"] == "1"} == positive
    assert len(cancers) == len(people)
    whole = {folder: {p.name for p in out.glob(f"*/{folder}/*.png")} for folder in ("neg", "pos")}
    assert whole["pos"] == {f"{patient}_{side}_{view}.png" for patient, side in positive for view in views}
    assert whole["neg"] == names - whole["pos"]


def test_patients_are_divided_as_the_patch_sampler_divides_them(phantom):
    out, people = phantom
    found = {s: {path.name[:7] for path in out.glob(f"{s}/*/*.png")} for s in ("train", "val", "test")}
    listed = {s: (out / f"pat_{s}.txt").read_text().split() for s in ("train", "test")}
    assert sum(map(len, found.values())) == len(people)
    assert found["train"] | found["val"] == set(listed["train"])
    assert found["test"] == set(listed["test"])
    rows = read_csv(out / "roi_mask_path.csv")
    annotated = {row["patient_id"] for row in rows}
    cancer = {row["patient_id"] for row in rows if row["pathology"] == "MALIGNANT"}
    patients = [patient for patient in listed["train"] if patient in annotated]
    _, val = stratified_split(patients, [patient in cancer for patient in patients], 0.2)
    assert found["val"] & annotated == set(val)
    for group in found.values():
        assert group - annotated, "normal patients"
        assert group & cancer
        assert group & (annotated - cancer)


def test_same_seed_same_bytes_for_any_number_of_jobs(tmp_path):
    options = {"patients": 12, "height": HEIGHT, "width": WIDTH, "views": ["CC"], "test_size": 0, "val_size": 0}
    for name, seed, jobs in (("one", 7, 1), ("two", 7, 2), ("other", 8, 1)):
        make_phantom(tmp_path / name, seed=seed, jobs=jobs, **options)
    one, two, other = (read_folder(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert not {v for k, v in one.items() if "full_img" in k} & {v for k, v in other.items() if "full_img" in k}


def test_whole_images_are_resized_on_demand(tmp_path):
    options = "--patients 3 --views CC --height 160 --width 128 --img-size 80 64 --test-size 0 --val-size 0 --jobs 1"
    assert main([f"{tmp_path}/out", *options.split()]) == 0
    whole = list(Path(tmp_path).glob("out/train/*/*.png"))
    assert len(whole) == 3
    for path in whole:
        img = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        full = cv2.imread(str(tmp_path / "out" / "full_img" / path.name), cv2.IMREAD_UNCHANGED)
        means = full.reshape(80, 2, 64, 2).mean(axis=(1, 3))
        assert np.abs(img - means).max() <= 0.5
    assert "SYNTHETIC" in (tmp_path / "out" / "README.txt").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prevalence": 0.7, "benign_rate": 0.7}, "--benign-rate"),
        ({"patients": 4}, r"at --test-size 0\.2 .* another --test-size, or 0 for no split, or more --patients than 4"),
        ({"patients": 4, "test_size": 0}, r"at --val-size 0\.1 .* give another --val-size, or 0 .*more --patients"),
        ({"height": 64}, "--height"),
        ({"views": ("CC", "CC")}, "Expected each of --views once. Received CC CC"),
    ],
)
def test_impossible_options(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        make_phantom(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_content_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main([str(tmp_path)]) == 1
    assert "new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ------------------------------------------------------------------------------------- the CBIS-DDSM download

TABLES = {
    f"{kind}_case_description_{division}_set.csv": (kind, division)
    for kind in ("calc", "mass")
    for division in ("train", "test")
}
# As published.
HEADERS = {
    "calc": "patient_id,breast density,left or right breast,image view,abnormality id,abnormality type,calc type,"
    "calc distribution,assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path",
    "mass": "patient_id,breast_density,left or right breast,image view,abnormality id,abnormality type,mass shape,"
    "mass margins,assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path",
}
PATHS = ("image file path", "cropped image file path", "ROI mask file path")
DOWNLOAD = {"patients": 14, "height": HEIGHT, "width": WIDTH, "seed": 3}


@pytest.fixture(scope="module", params=cbis_ddsm.TREES)
def download(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    return out, request.param, make_download(out, tree=request.param, **DOWNLOAD)


def tables_of(out, tree):
    return {name: out / ("csv" if tree == "jpeg" else "") / name for name in TABLES}


def headers_of(out, tree):
    """For each file of a download: (PatientID, SeriesDescription or None, PhotometricInterpretation)."""
    if tree == "jpeg":
        rows = {out / row["image_path"].removeprefix("CBIS-DDSM/"): row for row in read_csv(out / "csv/dicom_info.csv")}
        columns = ("PatientID", "SeriesDescription", "PhotometricInterpretation")
        return {path: tuple(row[column] or None for column in columns) for path, row in rows.items()}
    import pydicom

    found = {}
    for path in out.rglob("*.dcm"):
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        assert dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        found[path] = dataset.PatientID, dataset.get("SeriesDescription"), dataset.PhotometricInterpretation
    return found


def test_description_files_look_like_the_real_ones(download):
    out, tree, rows = download
    counts = json.loads((out / "oddities.json").read_text())["counts"]
    total = 0
    for name, path in tables_of(out, tree).items():
        kind, division = TABLES[name]
        text = path.read_bytes()
        found = read_csv(path)
        assert text.startswith(HEADERS[kind].encode() + b"\r\n")
        assert text.count(b"\r\n") == len(found) + 1
        assert text.count(b"\n") == 2 * len(found) + 1
        total += len(found)
        for row in found:
            lines = [row[cell].count("\n") for cell in PATHS]
            assert lines == ([0, 1, 0] if kind == "calc" else [0, 0, 1])
            key = "_".join(row[cell] for cell in ("patient_id", "left or right breast", "image view"))
            folder = f"{kind.capitalize()}-{'Training' if division == 'train' else 'Test'}_{key}"
            folders = folder, f"{folder}_{row['abnormality id']}", f"{folder}_{row['abnormality id']}"
            assert tuple(row[cell].split("/")[0] for cell in PATHS) == folders
            assert row["abnormality type"] == ("calcification" if kind == "calc" else "mass")
    assert total == counts["rows"] == len(rows) + 1
    assert counts["images"] == len({row.key for row in rows}) == 28


def test_files_hold_what_was_drawn(download):
    """Mask and crop told apart by content alone, against the drawing itself."""
    out, tree, rows = download
    files = defaultdict(list)
    for path, (folder, *_) in headers_of(out, tree).items():
        files[folder].append(path)
    assert sum(map(len, files.values())) == sum(1 for p in out.rglob("*") if p.suffix in (".dcm", ".jpg"))
    tolerance = 24 if tree == "jpeg" else 0
    drawn = {}
    for row in rows:
        if row.key not in drawn:
            drawn[row.key] = draw_view(row.patient, row.view, 3, HEIGHT, WIDTH)
        img, masks = drawn[row.key]
        (image_file,) = files[row.image_folder]
        if tree == "jpeg":
            img = img >> 8
        if "truncated" in row.oddities:
            with pytest.raises(InputError, match=r"truncated|less than expected"):
                read_img(image_file)
        else:
            assert np.abs(read_img(image_file).astype(int) - img).max() <= tolerance
        roi_files = files[row.roi_folder]
        assert len(roi_files) == (4 if "several_masks" in row.oddities else 2)
        found = [read_img(path) for path in roi_files]
        binary = [(x > 127).astype(np.uint8) for x in found if ((x < 64) | (x > 191)).all() and x.max() <= 255]
        if "mask_size" in row.oddities:
            assert binary[0].shape == (167, 120)
            binary = [cv2.resize(binary[0], (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)]
        mask = masks[row.index] > 0
        share = max((mask & (x > 0)).sum() / (mask | (x > 0)).sum() for x in binary if x.shape == mask.shape)
        assert share > 0.7 if "mask_size" in row.oddities else share == 1
        crops = [x for x in found if x.shape != mask.shape and x.shape != (167, 120)]
        assert len(crops) == len(roi_files) / 2


def test_oddities_are_those_of_the_list(download):
    """Recounted from the files and tables alone."""
    out, tree, _ = download
    found = {name: set() for name in [*ODDITIES, "swapped"]}
    key_of = lambda folder: folder.split("_", 1)[1]  # noqa: E731
    headers = headers_of(out, tree)
    for path, (folder, description, photometric) in headers.items():
        if description is None:
            found["mask_without_description"].add(key_of(folder).rsplit("_", 1)[0])
        if photometric == "MONOCHROME1":
            found["monochrome1"].add(key_of(folder))
        if description == "full mammogram images":
            try:
                read_img(path)
            except InputError:
                found["truncated"].add(key_of(folder))
    if tree == "uid":
        found["mask_size"] = {
            key_of(folder).rsplit("_", 1)[0]
            for path, (folder, description, _) in headers.items()
            if description == "ROI mask images" and read_img(path).shape != (HEIGHT, WIDTH)
        }
    sets, kinds, pathologies, numbers, masks = (defaultdict(set) for _ in range(5))
    for name, path in tables_of(out, tree).items():
        kind, division = TABLES[name]
        table = read_csv(path)
        lines = Counter(tuple(row.values()) for row in table)
        for row in table:
            key = "_".join(row[cell] for cell in ("patient_id", "left or right breast", "image view"))
            sets[key].add(division)
            sets[row["patient_id"]].add(division)
            kinds[key].add(kind)
            pathologies[key].add(row["pathology"])
            numbers[key].add(row["abnormality id"])
            if lines[tuple(row.values())] > 1:
                found["repeated_row"].add(key)
            _, crop, mask = (row[cell].strip() for cell in PATHS)
            masks[key, kind, row["abnormality id"]].add(mask)
            if mask.rsplit("/", 1)[0] != crop.rsplit("/", 1)[0]:
                found["separate_folders"].add(key)
            if tree == "uid":
                is_swapped = headers[out / "CBIS-DDSM" / crop][1] in ("ROI mask images", None)
                found["swapped"] |= {mask.split("/")[0]} if is_swapped else set()
    found["patient_in_both_sets"] = {name for name, s in sets.items() if len(s) == 2 and name.count("_") == 1}
    found["key_in_both_sets"] = {name for name, s in sets.items() if len(s) == 2 and name.count("_") == 3}
    found["key_in_both_types"] = {key for key, group in kinds.items() if len(group) == 2}
    found["mixed_pathologies"] = {key for key, p in pathologies.items() if "MALIGNANT" in p and len(p) > 1}
    found["several_abnormalities"] = {key for key, group in numbers.items() if len(group) > 1}
    found["several_masks"] = {key for (key, *_), group in masks.items() if len(group) > 1}
    listed = json.loads((out / "oddities.json").read_text())["oddities"]
    assert set(listed) == set(found)
    for name, keys in found.items():
        if name in ("mask_size", "swapped") and tree != "uid":
            continue
        assert set(listed[name]) == keys, name
        assert keys or (name, tree) == ("monochrome1", "jpeg"), name


def test_folders_are_named_as_in_the_downloads_in_circulation(download):
    import re

    out, tree, _ = download
    case = r"(Calc|Mass)-(Training|Test)_P_\d{5}_(LEFT|RIGHT)_(CC|MLO)(_\d)?"
    uid = r"1\.3\.6\.1\.4\.1\.9590\.100\.1\.2\.\d{39}"
    description = r"(full mammogram images|ROI mask images|cropped images|NA)"
    pattern = {
        "uid": rf"CBIS-DDSM/{case}/{uid}/{uid}/00000[01]\.dcm",
        "descriptive": rf"CBIS-DDSM/{case}/07-20-2016-DDSM-\d{{5}}/1-{description}-\d{{5}}/00000[01]\.dcm",
        "descriptive2": rf"CBIS-DDSM/{case}/07-20-2016-DDSM-NA-\d{{5}}/1\.000000-{description}-\d{{5}}/1-[12]\.dcm",
        "jpeg": rf"jpeg/{uid}/[12]-\d{{3}}\.jpg",
    }[tree]
    for path in out.rglob("*"):
        if path.suffix in (".dcm", ".jpg"):
            assert re.fullmatch(pattern, path.relative_to(out).as_posix())


def test_a_download_without_oddities(tmp_path):
    rows = make_download(tmp_path, oddities="none", old_header=True, **DOWNLOAD | {"patients": 10})
    listed = json.loads((tmp_path / "oddities.json").read_text())["oddities"]
    of_people = {"mixed_pathologies", "several_abnormalities", "key_in_both_types"}
    assert {name for name, found in listed.items() if found} <= of_people
    for path in tmp_path.rglob("*.dcm"):
        read_img(path)
    table = read_csv(tmp_path / "mass_case_description_train_set.csv")
    columns = (
        "patient_id,breast_density,side,view,abn_num,abnormality_type,mass_shape,mass_margins,assessment,pathology,"
        "subtlety,od_img_path,od_crop_path,mask_path"
    )
    assert list(table[0]) == columns.split(",")
    for row in table:
        folder, study, series, name = row["mask_path"].strip().split("\\")
        assert name == "000001.dcm"
        assert read_img(tmp_path / "CBIS-DDSM" / folder / study / series / name).dtype == np.uint8
    divisions = {row.patient.name: row.division for row in rows}
    assert Counter(divisions.values()) == {"Training": 8, "Test": 2}


def test_all_trees_hold_the_same_rows(tmp_path):
    rows = {tree: make_download(tmp_path / tree, views=["CC"], tree=tree, **DOWNLOAD) for tree in ("uid", "jpeg")}
    without = [row._replace(oddities=row.oddities - {"monochrome1"}) for row in rows["uid"]]
    assert rows["jpeg"] == without != rows["uid"]


def test_downloads_are_the_same_for_any_number_of_jobs(tmp_path):
    for jobs in (1, 2):
        options = f"--layout cbis-ddsm --tree jpeg --patients 10 --height 128 --width 128 --views CC --jobs {jobs}"
        assert main([f"{tmp_path}/{jobs}", *options.split()]) == 0
    assert read_folder(tmp_path / "1") == read_folder(tmp_path / "2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--layout cbis-ddsm --img-size 80 64", "--img-size is for --layout prepared"),
        ("--tree jpeg", "--tree is for --layout cbis-ddsm"),
        ("--layout cbis-ddsm --patients 3", "give another --test-size, or 0 for no split, or more --patients than 3"),
        ("--layout cbis-ddsm --height 100", "at least 128"),
    ],
)
def test_options_of_the_other_layout_and_impossible_ones(tmp_path, capsys, options, words):
    assert main([f"{tmp_path}/out", *options.split()]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
