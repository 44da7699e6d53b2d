"""CBIS-DDSM from its download to prepared folders: the real tables, every layout, every oddity, bad input."""

import csv
import functools
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from mammo.base.files import InputError
from mammo.commands import prepare_cbis_ddsm
from mammo.commands.prepare_cbis_ddsm import main, run
from mammo.data.cbis_ddsm import as_mask, find_tables, is_where_named, read_table, read_tables
from mammo.data.prepare import read_image_table, split_patients
from mammo.images.reading import read_img
from mammo.phantom.cbis_ddsm import TREES, make_download, write_dicom
from mammo.phantom.draw import draw_view
from tests.outputs import check_going_on, files_of, read_csv, read_folder, read_png, read_report

SIZE = 144, 128  # of the phantoms
WHOLE = {"img_size": [72, 56]}

# ------------------------------------------------------------------------------------------------ real tables


@pytest.fixture(scope="session")
def real_tables(spec):
    """Folder of the four real description files, and what is read from them."""
    folder = spec.parent / "cbis_ddsm_csv"
    return folder, read_tables(find_tables(folder))


def test_counts_of_the_real_tables(real_tables):
    """The figures that the data set's description gives."""
    _, tables = real_tables
    counts = tables.counts["tables"]
    names = ["calc_train", "calc_test", "mass_train", "mass_test"]
    files = [counts["{}_case_description_{}_set.csv".format(*name.split("_"))] for name in names]
    assert [file["rows"] for file in files] == [1546, 326, 1318, 378]
    assert [file["images"] for file in files] == [1227, 284, 1231, 361]
    assert [file["patients"] for file in files] == [602, 151, 691, 201]
    assert [file["roi_and_crop_in_different_folders"] for file in files] == [1, 0, 92, 11]
    assert all(file["newline_in_path_cell"] == file["rows"] for file in files)
    together = tables.counts["all"]
    assert (together["image_folders"], together["patients"]) == (3103, 1566)
    assert (together["images"], together["positive_images"]) == (3032, 1347)
    repairs = {kind: len(items) for kind, items in tables.repairs.items()}
    assert repairs["patients_in_both_official_sets"] == 31
    assert repairs["images_in_both_official_sets"] == 29
    assert repairs["images_in_calc_and_mass_of_one_set"] == 42
    assert repairs["images_in_calc_and_mass"] == 42 + 29
    assert repairs["mixed_pathologies"] == 33
    assert repairs["duplicate_rows_merged"] == repairs["pathologies_of_one_lesion_differ"] == 0


@pytest.mark.parametrize("split, test_patients", [("author", 235), ("official", 151 + 201 - 3)])
def test_dry_run_on_the_real_tables(real_tables, capsys, split, test_patients):
    folder, tables = real_tables
    assert main([str(folder), "--dry-run", "--split", split]) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split()[0]: list(map(int, re.findall(r"\d+", line))) for line in lines if line.startswith("  ")}
    assert list(figures) == ["train", "val", "test"]
    assert figures["test"][0] == test_patients
    # patients, cancer patients, images, positive images
    assert np.sum(list(figures.values()), axis=0).tolist() == [1566, sum(tables.cancer().values()), 3032, 1347]
    assert "no patient is in two sets: 1566 places, 1566 patients" in lines
    assert any("in both official sets: 31 patients, 29 images" in line for line in lines)


def split_tables(tables, *options):
    parser = prepare_cbis_ddsm.make_parser()
    args = parser.parse_args(["x", "y", *options])
    images = prepare_cbis_ddsm.list_images(tables).values()
    return split_patients(images, args, parser, {"test": prepare_cbis_ddsm.official_test(tables)})


def test_author_split_of_the_real_tables_is_stratified(real_tables):
    _, tables = real_tables
    sets = split_tables(tables)
    cancer = tables.cancer()
    shares = [np.mean([cancer[patient] for patient in patients]) for patients in sets.values()]
    assert shares == pytest.approx([np.mean(list(cancer.values()))] * 3, abs=0.01)
    assert len(sets["test"]) == pytest.approx(0.15 * 1566, abs=1)
    assert len(sets["val"]) == pytest.approx(0.1 * 0.85 * 1566, abs=1)


def test_official_split_of_the_real_tables_keeps_shared_patients_for_the_test(real_tables):
    _, tables = real_tables
    sets = split_tables(tables, "--split", "official")
    assert set(tables.repairs["patients_in_both_official_sets"]) <= set(sets["test"])
    in_test_tables = {row.patient for rows in tables.images.values() for row in rows if row.official == "test"}
    assert set(sets["test"]) == in_test_tables


# ------------------------------------------------------------------------------------------- phantom downloads


def download_phantom(out, tree, **options):
    options = {"patients": 12, "height": SIZE[0], "width": SIZE[1], "seed": 5} | options
    return make_download(out, tree=tree, **options), json.loads((out / "oddities.json").read_text())


@pytest.fixture(scope="session", params=TREES)
def prepared(request, tmp_path_factory):
    """(download, its rows, its oddities.json, prepared folder, report) of each layout."""
    folder = tmp_path_factory.mktemp(request.param)
    rows, odd = download_phantom(folder / "download", request.param, old_header=request.param == "descriptive")
    run(download=str(folder / "download"), out=str(folder / "out"), on_error="skip", **WHOLE)
    return folder / "download", rows, odd, folder / "out", read_report(folder / "out")


def by_key(rows):
    groups = defaultdict(list)
    for row in rows:
        groups[row.key].append(row)
    return groups


def test_full_images_and_masks_are_those_drawn(prepared):
    _, rows, odd, out, _ = prepared
    lossy = odd["tree"] == "jpeg"
    for key, group in by_key(rows).items():
        path = out / f"full_img/{key}.png"
        assert path.exists() == (key not in odd["oddities"]["truncated"])
        if not path.exists():
            continue
        img, masks = draw_view(group[0].patient, group[0].view, 5, *SIZE)
        full = read_png(path)
        assert full.dtype == np.uint16
        if lossy:
            assert (full % 257 == 0).all()
            assert np.abs(full / 257 - (img >> 8)).mean() < 2
        else:
            np.testing.assert_array_equal(full, img)
        lesions = defaultdict(lambda: np.zeros(SIZE, bool))
        for row in group:
            lesions[row.kind, row.number] |= masks[row.index] > 0
        for (kind, number), expected in lesions.items():
            mask = read_png(out / f"roi_mask/{kind.capitalize()}-Training_{key}_{number}.png")
            assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
            if key in odd["oddities"]["mask_size"]:  # what remains of it, made smaller by the phantom and resized back
                small = cv2.resize(
                    expected.astype("uint8"), (round(0.83 * SIZE[1]), round(0.87 * SIZE[0])), None, 0, 0, 0
                )
                expected = cv2.resize(small, SIZE[::-1], None, 0, 0, 0) > 0
            overlap = ((mask > 0) & expected).sum() / ((mask > 0) | expected).sum()
            assert overlap > 0.98 if lossy else overlap == 1


def test_lists_and_tables_agree_with_the_rows(prepared):
    _, rows, odd, out, report = prepared
    lesions, breasts = {}, defaultdict(bool)
    for row in rows:
        malignant = row.pathology == "MALIGNANT"
        if row.key not in odd["oddities"]["truncated"]:
            lesions[*row.key.rsplit("_", 2), str(row.number), row.kind] = row.pathology
        breasts[row.patient.name, row.patient.side] |= malignant
    written = read_csv(out / "roi_mask_path.csv")
    assert list(written[0]) == ["patient_id", "side", "view", "abn_num", "pathology", "type"]
    columns = ["patient_id", "side", "view", "abn_num", "type"]
    assert {tuple(line[name] for name in columns): line["pathology"] for line in written} == lesions
    assert len(list((out / "roi_mask").iterdir())) == len(lesions) == report["counts"]["masks_prepared"]
    sides = {
        (line["patient_id"], line["side"]): line["cancer"] == "1" for line in read_csv(out / "pat_side_cancer.csv")
    }
    assert sides == breasts


def test_whole_images_lie_in_the_set_of_their_patient_and_the_class_of_their_findings(prepared):
    download, rows, odd, out, report = prepared
    table = {Path(row["file"]).stem: row for row in read_image_table(out / "images.csv").to_dict("records")}
    sets = {name: (out / f"pat_{name}.txt").read_text().split() for name in ("train", "val", "test")}
    assert sorted(patient for patients in sets.values() for patient in patients) == sorted(
        {r.patient.name for r in rows}
    )
    total = 0
    for key, group in by_key(rows).items():
        name = next(name for name, patients in sets.items() if group[0].patient.name in patients)
        label = "pos" if any(row.pathology == "MALIGNANT" for row in group) else "neg"
        found = [path.relative_to(out).as_posix() for path in out.glob(f"t*/*/{key}.png")] + [
            path.relative_to(out).as_posix() for path in out.glob(f"val/*/{key}.png")
        ]
        assert found == ([] if key in odd["oddities"]["truncated"] else [f"{name}/{label}/{key}.png"])
        total += len(found)
        line = table.pop(key, None)
        assert ([line["file"]] if line else []) == found
        if line:
            assert (line["set"], line["label"], line["patient"]) == (name, label, group[0].patient.name)
            assert (line["side"], line["view"]) == (group[0].patient.side, group[0].view)
            drawn = draw_view(group[0].patient, group[0].view, 5, *SIZE)[0]
            source = read_img(download / line["source"], gs_255=True)
            assert np.corrcoef(drawn.ravel(), source.ravel())[0, 1] > 0.99
    assert not table
    assert total == report["counts"]["images_prepared"] == sum(s["images"] for s in report["sets"].values())


def test_featurewise_mean_is_that_of_the_training_images(prepared):
    *_, out, report = prepared
    images = [read_png(path) for path in (out / "train").rglob("*.png")]
    assert {(img.shape, img.dtype.name) for img in images} == {(tuple(WHOLE["img_size"]), "uint16")}
    assert report["rescale_factor"] == 0.003891
    assert report["featurewise_mean"] == pytest.approx(0.003891 * np.mean(images), abs=1e-3)


def test_every_oddity_is_counted(prepared):
    _, rows, odd, _, report = prepared
    repairs = {kind: repair["count"] for kind, repair in report["repairs"].items()}
    assert all(repair["count"] == len(repair["items"]) for repair in report["repairs"].values())
    found = {name: len(where) for name, where in odd["oddities"].items()}
    assert all(found[name] for name in found if (name, odd["tree"]) != ("monochrome1", "jpeg"))
    assert {name: report["counts"][name] for name in ("rows", "patients", "images", "image_folders")} == {
        name: odd["counts"][name] for name in ("rows", "patients", "images", "image_folders")
    }
    assert report["counts"]["positive_images"] == odd["counts"]["malignant_images"]
    assert repairs["duplicate_rows_merged"] == found["repeated_row"]
    assert repairs["mixed_pathologies"] == found["mixed_pathologies"]
    assert repairs["patients_in_both_official_sets"] == found["patient_in_both_sets"]
    assert repairs["images_in_both_official_sets"] == found["key_in_both_sets"]
    assert repairs["images_in_calc_and_mass"] == found["key_in_both_types"]
    assert repairs["one_copy_of_image_kept"] == odd["counts"]["image_folders"] - odd["counts"]["images"]
    assert repairs["mask_resized"] == found["mask_size"]
    assert repairs["masks_united"] == found["several_masks"]
    assert repairs["monochrome1_inverted"] == found["monochrome1"]
    lossy = odd["tree"] == "jpeg"
    assert repairs["8_bit_scaled_to_16_bit"] == (report["counts"]["images_prepared"] if lossy else 0)
    usable = [row for row in rows if row.key not in odd["oddities"]["truncated"]]
    swapped = {row.roi_folder for row in usable if "swapped" in row.oddities}
    if odd["tree"].startswith("descriptive"):  # a mask alone in a folder that no table names is where it should be
        swapped -= {row.roi_folder for row in usable if "separate_folders" in row.oddities}
    cells = [item.split(", not ")[1] for item in report["repairs"]["mask_found_by_content"]["items"]]
    assert {cell.split("/")[0] for cell in cells} == swapped
    tables = report["tables"].values()
    assert sum(table["newline_in_path_cell"] for table in tables) == odd["counts"]["rows"]
    assert sum(table["backslash_path"] for table in tables) == (
        odd["counts"]["rows"] if odd["tree"] == "descriptive" else 0
    )
    assert sum(table["roi_and_crop_in_different_folders"] for table in tables) == found["separate_folders"]
    assert [skipped["image"] for skipped in report["skipped"]] == odd["oddities"]["truncated"]
    assert report["counts"]["images_skipped"] == found["truncated"]


# --------------------------------------------------------------------------------- downloads changed by hand


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A small download by UID without oddities, and its rows."""
    folder = tmp_path_factory.mktemp("plain") / "download"
    return folder, download_phantom(folder, "uid", patients=6, views=("CC",), oddities="none")[0]


@pytest.fixture
def download(plain, tmp_path):
    """A copy of the plain download, to be changed."""
    shutil.copytree(plain[0], tmp_path / "download")
    return tmp_path / "download", plain[1]


def prepare(folder, out, **options):
    run(download=str(folder), out=str(out), **WHOLE | options)
    return read_report(out)


def single(folder, pattern):
    (path,) = folder.glob(f"CBIS-DDSM/{pattern}")
    return path


def test_folders_without_names_are_told_by_their_patient_id(download, plain, tmp_path):
    folder, _ = download
    (folder / "CBIS-DDSM").rename(folder / "old")
    for index, path in enumerate(sorted((folder / "old").rglob("*.dcm"))):
        target = folder / f"S{index // 7}/{index}.dcm"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    prepare(folder, tmp_path / "moved")
    prepare(plain[0], tmp_path / "out")
    assert files_of(tmp_path / "moved") == files_of(tmp_path / "out")


def test_jpeg_without_dicom_info(tmp_path):
    folder = tmp_path / "download"
    download_phantom(folder, "jpeg", patients=6, views=("CC",), oddities="none")
    prepare(folder, tmp_path / "out")
    (folder / "csv/dicom_info.csv").unlink()
    prepare(folder, tmp_path / "without")
    assert files_of(tmp_path / "without") == files_of(tmp_path / "out")


def test_mask_in_a_folder_of_its_own_under_any_description(download, plain, tmp_path):
    folder, rows = download
    for row in rows:
        (inner,) = (folder / "CBIS-DDSM" / row.roi_folder).glob("*/*")
        for file, name in (("000000.dcm", "1.000000-ROI mask images-1"), ("000001.dcm", "1.000000-NA-2")):
            (inner.parent / name).mkdir()
            (inner / file).rename(inner.parent / name / "1-1.dcm")
    prepare(folder, tmp_path / "split")
    prepare(plain[0], tmp_path / "out")
    assert files_of(tmp_path / "split") == files_of(tmp_path / "out")


def test_other_copy_is_used_when_one_is_unreadable(download, plain, tmp_path):
    folder, rows = download
    row = next(row for row in rows if row.division == "Training")
    name = f"{row.kind}_case_description_{{}}_set.csv"
    text = (folder / name.format("train")).read_bytes()
    (folder / name.format("test")).write_bytes(text.replace(b"-Training_", b"-Test_"))
    for path in list((folder / "CBIS-DDSM").glob(f"{row.kind.capitalize()}-Training_*")):
        shutil.copytree(path, path.with_name(path.name.replace("Training", "Test")))
    broken = next((folder / "CBIS-DDSM" / row.image_folder).rglob("*.dcm"))
    broken.write_bytes(b"")
    report = prepare(folder, tmp_path / "out")
    assert report["skipped"] == []
    (problem,) = report["repairs"]["unreadable_copy_of_image_not_needed"]["items"]
    assert row.key in problem and row.image_folder in problem
    img, _ = draw_view(row.patient, row.view, 5, *SIZE)
    np.testing.assert_array_equal(read_png(tmp_path / f"out/full_img/{row.key}.png"), img)


def spoil_image(folder, row, how):
    path = next((folder / "CBIS-DDSM" / row.image_folder).rglob("*.dcm"))
    if how == "missing":
        shutil.rmtree(folder / "CBIS-DDSM" / row.image_folder)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "text":
        path.write_text("no DICOM file, though it is named so")
    elif how == "two values":
        write_dicom(path, np.repeat(np.uint16([[0], [65535]]), SIZE[1], 1), PatientID=row.image_folder)
    elif how == "constant":
        write_dicom(path, np.full(SIZE, 9, np.uint16), PatientID=row.image_folder)
    return row.image_folder


def spoil_mask(folder, row, how):
    paths = sorted((folder / "CBIS-DDSM" / row.roi_folder).rglob("*.dcm"))
    mask = paths[0 if row.kind == "calc" else 1]
    if how == "missing folder":
        shutil.rmtree(folder / "CBIS-DDSM" / row.roi_folder)
    elif how == "missing":
        mask.unlink()
    elif how == "truncated":
        mask.write_bytes(mask.read_bytes()[:-100])
    elif how == "all zero":
        write_dicom(mask, np.zeros(SIZE, np.uint8), PatientID=row.roi_folder)
    elif how == "not binary":
        write_dicom(mask, np.random.RandomState(0).randint(0, 255, SIZE).astype(np.uint8), PatientID=row.roi_folder)
    return row.roi_folder


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "text", "constant", "two values"])
def test_bad_image_is_named_and_all_others_are_done(download, plain, tmp_path, capsys, how):
    folder, rows = download
    name = spoil_image(folder, rows[0], how)
    out = tmp_path / "out"
    options = ["--img-size", "72", "56"]
    assert main([str(folder), str(out), *options]) == 1
    message = capsys.readouterr().err
    assert name in message and message.count("\n") == 1 and "--on-error skip" in message
    report = read_report(out)
    (skipped,) = report["skipped"]
    assert skipped["image"] == rows[0].key and name in skipped["reason"]
    assert report["counts"]["images_prepared"] == report["counts"]["images"] - 1
    assert not list(out.rglob(f"*{rows[0].key}*"))
    assert rows[0].patient.name not in "".join(path.read_text() for path in out.glob("pat*"))
    assert main([str(folder), str(out), *options, "--on-error", "skip"]) == 0
    assert main([str(folder), str(out), *options, "--on-error", "stop"]) == 1
    assert not (out / "report.json").exists()
    shutil.rmtree(folder)
    shutil.copytree(plain[0], folder)
    assert main([str(folder), str(out), *options]) == 0  # mended: the rest is kept
    prepare(folder, tmp_path / "fresh")
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("how", ["missing folder", "missing", "truncated", "all zero", "not binary"])
def test_bad_mask_is_named_and_its_image_kept(download, tmp_path, how):
    folder, rows = download
    row = next(row for row in rows if row.kind == "mass")
    name = spoil_mask(folder, row, how)
    report = prepare(folder, tmp_path / "out", on_error="skip")
    (skipped,) = report["skipped"]
    assert skipped["image"] == row.key and f"{row.key} {row.kind} {row.number}: no mask" in skipped["reason"]
    assert name in skipped["reason"]
    assert report["counts"]["masks_skipped"] == 1
    assert (tmp_path / f"out/full_img/{row.key}.png").exists()
    lesions = [
        (line["patient_id"], line["type"], line["abn_num"]) for line in read_csv(tmp_path / "out/roi_mask_path.csv")
    ]
    assert (row.patient.name, row.kind, str(row.number)) not in lesions


def mask_of(row, *corner):
    """The drawn mask, with a rectangle from the corner (height, width) that no lesion has."""
    mask = draw_view(row.patient, row.view, 5, *SIZE)[1][row.index].copy()
    mask[: corner[0], : corner[1]] = 255
    return mask


def add_row(folder, row, mask, series="9.3", number=None, **tags):
    """Add a row of the same image, and a mask (None: there is none) with a crop. number: None for the row's own."""
    number = number or row.number
    roi_folder = f"{row.image_folder}_{number}"
    path = folder / f"{row.kind}_case_description_train_set.csv"
    lines = list(csv.reader(path.read_bytes().decode().splitlines(keepends=True)))
    line = next(line for line in lines if line[0] == row.patient.name and int(line[4]) == row.number)
    cells = [re.sub(r".*/", f"{roi_folder}/{series}/{series}/", cell) for cell in line[-2:]]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([*lines, [*line[:4], number, *line[5:-2], *cells]])
    inner = folder / "CBIS-DDSM" / roi_folder / series / series
    crop = np.random.RandomState(0).randint(0, 60000, (20, 20)).astype(np.uint16)
    write_dicom(inner / f"00000{int(row.kind == 'calc')}.dcm", crop, PatientID=roi_folder)
    if mask is not None:
        write_dicom(inner / f"00000{int(row.kind == 'mass')}.dcm", mask, PatientID=roi_folder, **tags)
    return inner


@pytest.fixture
def second_row(download):
    """The folder of a download, and one of its rows, the mask of which can get a second part."""
    return download[0], next(row for row in download[1] if row.division == "Training" and row.kind == "mass")


def read_mask_of(out, row):
    return read_png(out / f"roi_mask/{row.kind.capitalize()}-Training_{row.key}_{row.number}.png")


@pytest.mark.parametrize("description", [{}, {"SeriesDescription": "ROI mask images"}])
@pytest.mark.parametrize("size", [SIZE, (124, 107)])
@pytest.mark.parametrize("named", [True, False])
def test_every_row_gives_its_own_mask(second_row, tmp_path, size, description, named):
    """Also one of another size, and in folders that the table does not name."""
    folder, row = second_row
    part = cv2.resize(mask_of(row, 20, 12) * np.uint8(1), size[::-1], interpolation=cv2.INTER_NEAREST)
    inner = add_row(folder, row, part, **description)
    if not named:
        for index, series in enumerate(sorted((folder / "CBIS-DDSM" / row.roi_folder).glob("*/*"))):
            series.rename(series.with_name(f"1-ROI mask images-{index}"))
    report = prepare(folder, tmp_path / "out")
    assert report["skipped"] == []
    mask = read_mask_of(tmp_path / "out", row)
    assert (mask[:18, :10] == 255).all() and (mask[mask_of(row, 0, 0) > 0] == 255).all()
    repairs = {kind: repair["count"] for kind, repair in report["repairs"].items()}
    assert repairs["masks_united"] == 1 and repairs["mask_resized"] == int(size != SIZE)
    assert repairs["mask_found_by_content"] == 0
    assert inner.parent.exists()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("how", ["missing", "truncated", "folder missing"])
def test_row_without_its_own_mask_is_named(second_row, tmp_path, how, named):
    folder, row = second_row
    inner = add_row(folder, row, None if how == "missing" else mask_of(row, 5, 4))
    if how == "truncated":
        path = inner / "000001.dcm"
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "folder missing":
        shutil.rmtree(inner.parent)
    if not named:
        for index, series in enumerate(sorted((folder / "CBIS-DDSM" / row.roi_folder).glob("*/*"))):
            series.rename(series.with_name(f"1-ROI mask images-{index}"))
    report = prepare(folder, tmp_path / "out", on_error="skip")
    (skipped,) = report["skipped"]
    assert f"{row.key} mass {row.number}: no mask" in skipped["reason"] and "9.3/000001.dcm" in skipped["reason"]
    assert read_mask_of(tmp_path / "out", row) is None
    problems = skipped["reason"].split("Received ")[-1].split("; ")
    assert len(problems) == len(set(problems))


def test_mask_in_the_place_of_a_crop_elsewhere(second_row, plain, tmp_path):
    """Swapped, and the crop has a folder of its own."""
    folder, row = second_row
    (series,) = (folder / "CBIS-DDSM" / row.roi_folder).glob("*/*")
    place = f"{row.roi_folder}8/8/8/000000.dcm"
    (folder / "CBIS-DDSM" / place).parent.mkdir(parents=True)
    (series / "000001.dcm").rename(folder / "CBIS-DDSM" / place)
    (series / "000000.dcm").rename(series / "000001.dcm")
    crop = re.escape(f"{row.roi_folder}/{series.parent.name}/{series.name}/000000.dcm")
    rewrite(folder, "mass*train*.csv", lambda text: re.sub(crop, place, text))
    report = prepare(folder, tmp_path / "out")
    prepare(plain[0], tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    (item,) = report["repairs"]["mask_found_by_content"]["items"]
    assert place in item


@pytest.mark.parametrize("tables", ["short", "as they are"])
def test_series_of_one_name_are_told_by_their_folder(download, plain, tmp_path, tables):
    folder, rows = download
    for row in rows:
        for name in (row.image_folder, row.roi_folder):
            for series in (folder / "CBIS-DDSM" / name).glob("1.3*/*"):
                (folder / "CBIS-DDSM" / name / "1").mkdir()
                series.rename(folder / "CBIS-DDSM" / name / "1/2")
    if tables == "short":
        for path in folder.glob("*train*.csv"):
            rewrite(folder, path.name, lambda text: re.sub(r"/1\.3\.[\d.]+/1\.3\.[\d.]+/", "/1/2/", text))
    report = prepare(folder, tmp_path / "out")
    prepare(plain[0], tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert report["repairs"]["several_files_for_one_image"]["count"] == 0


def test_smaller_mask_beside_the_mask_is_reported(second_row, tmp_path):
    folder, row = second_row
    (series,) = (folder / "CBIS-DDSM" / row.roi_folder).glob("*/*")
    write_dicom(series / "000002.dcm", mask_of(row, 5, 4)[:100, :100])
    report = prepare(folder, tmp_path / "out")
    np.testing.assert_array_equal(read_mask_of(tmp_path / "out", row), mask_of(row, 0, 0))
    (item,) = report["repairs"]["mask_of_another_size_not_taken"]["items"]
    assert "000002.dcm" in item


def gather_views(folder, rename):
    """Move all files of a view and its lesions into the folder of the view, by name or as unnamed series."""
    (folder / "CBIS-DDSM").rename(folder / "old")
    for index, path in enumerate(sorted((folder / "old").rglob("*.dcm"), reverse=True)):
        view = re.match(r".*_(CC|MLO)", path.relative_to(folder / "old").parts[0])[0]
        if rename:
            target = folder / f"S{index // 7}/{index}.dcm"
            dataset = pydicom.dcmread(path)
            dataset.PatientID = view
            dataset.save_as(path)
        else:
            target = folder / "CBIS-DDSM" / view / f"1-ROI mask images-{index}" / "000000.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("unnamed", [True, False])
def test_mask_beside_its_image_is_not_taken_for_it(tmp_path, unnamed, described):
    folder = tmp_path / "download"
    rows, _ = download_phantom(folder, "uid", patients=6, views=("CC",), oddities="none")
    prepare(folder, tmp_path / "expected")
    if not described:
        for path in folder.rglob("*.dcm"):
            dataset = pydicom.dcmread(path)
            del dataset.SeriesDescription
            dataset.save_as(path)
    gather_views(folder, unnamed)
    report = prepare(folder, tmp_path / "out")
    assert report["repairs"]["several_files_for_one_image"]["count"] == len({row.image_folder for row in rows})
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


@pytest.mark.parametrize("unnamed", [True, False])
def test_masks_of_two_lesions_in_one_folder_are_not_mixed(second_row, tmp_path, unnamed):
    folder, row = second_row
    add_row(folder, row, mask_of(row, 5, 4), number=7)
    gather_views(folder, unnamed)
    report = prepare(folder, tmp_path / "out", on_error="skip")
    assert [skipped["image"] for skipped in report["skipped"]] == [row.key] * 2
    assert all("any of 2 lesions. Expected a folder" in skipped["reason"] for skipped in report["skipped"])
    assert read_mask_of(tmp_path / "out", row) is None
    assert (tmp_path / f"out/full_img/{row.key}.png").exists()


def test_crop_is_no_mammogram(tmp_path):
    """The mammogram of a folder that holds all is missing; its mask and crop are there."""
    folder = tmp_path / "download"
    rows, _ = download_phantom(folder, "uid", patients=6, views=("CC",), oddities="none")
    shutil.rmtree(folder / "CBIS-DDSM" / rows[0].image_folder)
    gather_views(folder, rename=False)
    report = prepare(folder, tmp_path / "out", on_error="skip")
    assert f"no image of {rows[0].image_folder}" in report["skipped"][0]["reason"]
    assert not list((tmp_path / "out").rglob(f"*{rows[0].key}*"))


@pytest.mark.parametrize("described", [True, False])
def test_jpeg_crop_of_black_and_bright_is_no_mask(tmp_path, described):
    folder = tmp_path / "download"
    rows, _ = download_phantom(folder, "jpeg", patients=6, views=("CC",), oddities="none")
    for path in (folder / "jpeg").rglob("*.jpg"):
        img = read_png(path)
        if img.shape != SIZE:  # at the breast's edge
            img[:] = 220
            img[:, : img.shape[1] // 2] = 0
            cv2.imwrite(str(path), img)
        elif ((img < 20) | (img > 235)).mean() > 0.97:
            path.unlink()
    if not described:
        rewrite(folder, "csv/dicom_info.csv", lambda text: text.replace("cropped images", ""))
    report = prepare(folder, tmp_path / "out", on_error="skip")
    assert report["counts"]["masks_prepared"] == 0 and len(report["skipped"]) == len(rows)
    assert all("pixels, a crop" in skipped["reason"] for skipped in report["skipped"])


def test_output_folder_inside_the_download_is_not_searched(download, tmp_path):
    folder, _ = download
    for out in (folder / "prepared", folder):
        first = prepare(folder, out)
        content = read_folder(out)
        assert prepare(folder, out) == first
        assert read_folder(out) == content
        if out != folder:
            shutil.rmtree(out)


def test_link_to_a_folder_above_is_no_trap(download, tmp_path):
    folder, rows = download
    (folder / "CBIS-DDSM/above").symlink_to(folder)
    report = prepare(folder, tmp_path / "out")
    assert report["counts"]["files_found"] == len({row.image_folder for row in rows}) + 2 * len(rows)
    assert report["repairs"]["several_files_for_one_image"]["count"] == 0


def test_no_images_in_a_set_is_said(download, tmp_path, capsys):
    folder, _ = download
    for path in (folder / "CBIS-DDSM").glob("*_CC/*/*/*.dcm"):
        path.write_bytes(b"")
    prepare(folder, tmp_path / "out", on_error="skip")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Warning")] == [
        f"Warning: {name} has no images" for name in ("train", "val", "test")
    ]


def test_near_duplicates_are_told(download, tmp_path, capsys):
    """The image of one patient is also that of another, with other grey levels."""
    folder, rows = download
    files = [single(folder, f"{row.image_folder}/*/*/*.dcm") for row in by_key(rows).values() for row in row[:1]]
    one, other = files[0], next(path for path in files if path.parts[-4][:-8] != files[0].parts[-4][:-8])
    dataset = pydicom.dcmread(one)
    dataset.PixelData = (dataset.pixel_array // 2).astype(np.uint16).tobytes()
    dataset.save_as(other)
    report = prepare(folder, tmp_path / "out")
    (pair,) = report["near_duplicates"]
    table = read_csv(tmp_path / "out/near_duplicates.csv")
    assert table == [{name: str(value) for name, value in pair.items()}]
    names = {Path(pair[name]).stem for name in ("file", "other_file")}
    assert names == {path.parts[-4].split("_", 1)[1] for path in (one, other)}
    assert pair["patient"] != pair["other_patient"] and pair["difference"] < 0.02
    assert f"such as {pair['file']} and {pair['other_file']}" in capsys.readouterr().out


def test_files_of_no_row_are_counted(download, tmp_path):
    folder, rows = download
    write_dicom(folder / "CBIS-DDSM/Mass-Training_P_77777_LEFT_CC/1/2/000000.dcm", np.eye(9, dtype=np.uint16))
    (folder / "._calc_case_description_train_set.csv").write_bytes(b"left by a file system")
    counts = prepare(folder, tmp_path / "out")["counts"]
    assert counts["files_of_no_row"] == 1
    assert counts["files_found"] == 1 + len({row.image_folder for row in rows}) + 2 * len(rows)


def test_truncated_crop_is_not_needed(download, tmp_path):
    folder, rows = download
    paths = sorted((folder / "CBIS-DDSM" / rows[0].roi_folder).rglob("*.dcm"))
    crop = paths[1 if rows[0].kind == "calc" else 0]
    crop.write_bytes(crop.read_bytes()[:-100])
    report = prepare(folder, tmp_path / "out")
    assert report["skipped"] == []
    assert report["repairs"]["unreadable_file_not_needed"]["count"] == 1


@pytest.mark.parametrize("tables", ["pathologies differ", "masks of one number"])
def test_rows_of_one_lesion_are_merged(download, tmp_path, tables):
    folder, rows = download
    row = next(row for row in rows if row.pathology == "BENIGN" and row.division == "Training")
    path = folder / f"{row.kind}_case_description_train_set.csv"
    lines = list(csv.reader(path.read_bytes().decode().splitlines(keepends=True)))
    line = next(line for line in lines if line[0] == row.patient.name and int(line[4]) == row.number)
    if tables == "pathologies differ":
        line = ["MALIGNANT" if cell == "BENIGN" else cell for cell in line]
    else:  # the mask of a second row, in a folder of its own
        line = [
            *line[:-2],
            *(cell.replace(row.roi_folder, f"{row.roi_folder}9").replace("/1.3", "/9.3") for cell in line[-2:]),
        ]
        mask = np.zeros(SIZE, np.uint8)
        mask[:5, :4] = 1
        write_dicom(folder / "CBIS-DDSM" / f"{row.roi_folder}9/9.3/9.3/000000.dcm", mask)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([*lines, line])
    report = prepare(folder, tmp_path / "out")
    (written,) = [
        line["pathology"]
        for line in read_csv(tmp_path / "out/roi_mask_path.csv")
        if (line["patient_id"], line["type"], line["abn_num"]) == (row.patient.name, row.kind, str(row.number))
    ]
    if tables == "pathologies differ":
        assert written == "MALIGNANT" and report["repairs"]["pathologies_of_one_lesion_differ"]["count"] == 1
        assert list(tmp_path.glob(f"out/*/pos/{row.key}.png"))
    else:
        assert written == "BENIGN" and report["repairs"]["masks_united"]["count"] == 1
        name = f"{row.kind.capitalize()}-Training_{row.key}_{row.number}.png"
        mask = read_png(tmp_path / "out/roi_mask" / name)
        assert (mask[:5, :4] == 255).all()
        expected = draw_view(row.patient, row.view, 5, *SIZE)[1][row.index]
        assert (mask[expected > 0] == 255).all()


# ----------------------------------------------------------------------------------------- bad tables, options


def rewrite(folder, name, change):
    path = next(folder.glob(name))
    text = path.read_bytes().decode()
    changed = change(text)
    assert changed != text
    path.write_bytes(changed.encode())
    return path


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.replace("pathology", "outcome"), "line 1: missing columns pathology"),
        (lambda t: t.replace("image file path", "x", 1), "line 1: missing columns image file path. Received "),
        (lambda t: t.replace(",LEFT,", ",LFET,", 1), "unknown side: Expected LEFT or RIGHT. Received 'LFET'"),
        (lambda t: t.replace(",CC,", ",XCCL,", 1), "line 2: unknown view: Expected CC or MLO. Received 'XCCL'"),
        (lambda t: t.replace(",BENIGN", ",HARMLESS", 1), "unknown pathology: Expected MALIGNANT"),
        (lambda t: t.replace(",mass,", ",lump,", 1), "line 2: unknown type"),
        (lambda t: t.replace("\nP_", "\nQ_", 1), "line 2: unknown patient: Expected an id like P_00001. Received 'Q_"),
        (lambda t: t.replace("CC,1,", "CC,one,", 1), "unknown abnormality id"),
        (lambda t: re.sub(r"Mass-\w+/", "../", t, count=1), r"line 2, image file path: Expected a path below"),
        (
            lambda t: re.sub(r"Mass-\w+/", "E:\\\\DDSM\\\\..\\\\", t, count=1),
            r"line 2, image file path: Expected a path below",
        ),
        (
            lambda t: re.sub(r"P_(\d+)_(LEFT|RIGHT)", "P_99999_RIGHT", t, count=1),
            "line 2: the image path is of another",
        ),
        (lambda t: t[:-40], r"is the file whole\?|unexpected end of data"),
        (lambda t: "", "line 1: missing columns"),
    ],
)
def test_bad_table_is_named_with_its_line(download, tmp_path, capsys, change, message):
    folder, _ = download
    path = rewrite(folder, "mass*train*.csv", change)
    assert main([str(folder), str(tmp_path / "out"), "--on-error", "skip"]) == 1
    error = capsys.readouterr().err
    assert str(path) in error and re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["E:\\DDSM\\", "/data/ddsm/", "\\\\server\\share\\", "./CBIS-DDSM/"])
def test_paths_of_another_machine_are_read(download, plain, tmp_path, start):
    folder, _ = download
    for path in folder.glob("*train*.csv"):
        rewrite(folder, path.name, lambda text: re.sub(r"(?=(Calc|Mass)-T)", lambda _: start, text))
    prepare(folder, tmp_path / "out")
    prepare(plain[0], tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")


def test_lines_are_counted_with_newlines_in_cells(download):
    path = rewrite(download[0], "mass*train*.csv", lambda text: text[::-1].replace("NGINEB", "DOOG", 1)[::-1])
    line = path.read_bytes().decode().split("GOOD")[0].count("\n") + 1
    with pytest.raises(InputError, match=f"line {line}: unknown pathology"):
        read_table(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no output folder"),
        (["out", "--split", "lists"], "Missing --pat-train, --pat-val, --pat-test"),
        (["out", "--pat-test", "test.txt"], "--pat-test: Expected --split lists. Received --split author"),
        (["out", "--csv-dir", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_options_are_named(plain, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(plain[0]), *options]) == 1
    assert message in capsys.readouterr().err


def test_download_without_images_or_tables(plain, tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no description files" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "out"), "--csv-dir", str(plain[0])]) == 1
    assert f"{tmp_path}: no images below it" in capsys.readouterr().err


def test_jpeg_table_without_its_columns(tmp_path):
    folder = tmp_path / "download"
    download_phantom(folder, "jpeg", patients=6, views=("CC",), oddities="none")
    rewrite(folder, "csv/dicom_info.csv", lambda text: text.replace("PatientID", "patient"))
    with pytest.raises(InputError, match=r"dicom_info\.csv, line 1: missing columns PatientID"):
        prepare(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"\xff\xfe\x00\x01", "not a text file"),
        (lambda data: data.replace(b"Mass", b"M\xe4ss", 1), "not a text file"),
        (lambda data: data + b'"' + b"x" * 200_000, "field larger than field limit"),
        (lambda data: data[:-130], "cells. Received|unexpected end of data"),
        (lambda data: b"", "line 1: missing columns image_path"),
    ],
)
def test_damaged_jpeg_table_is_named(tmp_path, change, message):
    folder = tmp_path / "download"
    download_phantom(folder, "jpeg", patients=6, views=("CC",), oddities="none")
    path = folder / "csv/dicom_info.csv"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        prepare(folder, tmp_path / "out")
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------------ splits and options


def write_lists(folder, **lists):
    for name, patients in lists.items():
        (folder / name).write_text("".join(f"{patient}\n" for patient in patients))
    return {f"pat_{name}": str(folder / name) for name in lists}


def test_split_by_lists(plain, tmp_path):
    folder, rows = plain
    patients = sorted({row.patient.name for row in rows})
    files = write_lists(tmp_path, train=["patient_id", *patients[:2]], val=patients[2:3], test=patients[3:5])
    report = prepare(folder, tmp_path / "out", split="lists", **files)
    assert {name: counts["patients"] for name, counts in report["sets"].items()} == {"train": 2, "val": 1, "test": 2}
    assert report["counts"]["patients_in_no_set"] == 1
    assert (tmp_path / "out/pat_train.txt").read_text().split() == patients[:2]
    # Those in no set are there for the sampler, not for the trainer.
    left = next(row for row in rows if row.patient.name == patients[5])
    assert [path.parent.name for path in (tmp_path / "out").rglob(f"{left.key}.png")] == ["full_img"]


@pytest.mark.parametrize("fault, message", [("twice", "1 patient in both train and test"), ("unknown", "P_99999")])
def test_lists_with_faults_are_refused(plain, tmp_path, fault, message):
    patients = sorted({row.patient.name for row in plain[1]})
    lists = {"train": patients[:2], "val": patients[2:3], "test": patients[3:]}
    lists["test"].append(patients[0] if fault == "twice" else "P_99999")
    with pytest.raises(InputError, match=message):
        prepare(plain[0], tmp_path / "out", split="lists", **write_lists(tmp_path, **lists))


def test_another_split_moves_whole_images(plain, tmp_path):
    prepare(plain[0], tmp_path / "out", random_state=1)
    before = read_folder(tmp_path / "out")
    message = r"out: has the work .* \(random_state 1 there, 12345 now, split \S+ there, official now\).*--fresh"
    with pytest.raises(InputError, match=message):
        prepare(plain[0], tmp_path / "out", split="official")
    assert read_folder(tmp_path / "out") == before
    prepare(plain[0], tmp_path / "out", split="official", fresh=True)
    prepare(plain[0], tmp_path / "new", split="official")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "new")


def test_whole_image_options_leave_full_images_alone(plain, tmp_path):
    from mammo.data.prepare import make_whole

    options = {"resize": "pad", "segment_breast": True, "auto_levels": True, "face": "left"}
    prepare(plain[0], tmp_path / "plain")
    prepare(plain[0], tmp_path / "out", **options)
    plain_files, files = read_folder(tmp_path / "plain"), read_folder(tmp_path / "out")
    kept = {name for name in files if name.startswith(("full_img", "roi_mask", "pat_"))}
    assert all(files[name] == plain_files[name] for name in kept)
    levels = {**options, "levels": options["auto_levels"]}
    del levels["auto_levels"]
    for path in (tmp_path / "out").glob("t*/*/*.png"):
        full = read_png(tmp_path / "out/full_img" / path.name)
        np.testing.assert_array_equal(read_png(path), make_whole(full, (72, 56), **levels))


# ----------------------------------------------------------------------------------------------- whole command


@pytest.mark.parametrize("jobs, backend", [(2, "loky"), (2, "threading")])
def test_any_number_of_jobs_gives_the_same_files(plain, tmp_path, jobs, backend):
    prepare(plain[0], tmp_path / "one")
    prepare(plain[0], tmp_path / "many", jobs=jobs, backend=backend)
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "many")


def test_killed_process_goes_on_and_ends_with_the_same_files(plain, tmp_path):
    options = ["--img-size", "1152", "896"]
    here = functools.partial(prepare, plain[0], img_size=[1152, 896])
    check_going_on(prepare_cbis_ddsm, plain[0], options, here, tmp_path)


def test_sampler_takes_what_is_prepared(plain, tmp_path):
    from ddsm_train import sample_patches_combined

    out = tmp_path / "out"
    prepare(plain[0], out)
    patients = "".join((out / f"pat_{name}.txt").read_text() for name in ("train", "val", "test"))
    (tmp_path / "all.txt").write_text(patients)
    sample_patches_combined.run(
        *map(str, (out / "roi_mask_path.csv", out / "roi_mask", tmp_path / "all.txt", out / "full_img")),
        str(tmp_path / "patches"), str(tmp_path / "val"),
        target_height=SIZE[0], patch_size=16, nb_abn=1, nb_bkg=1, nb_hns=0, val_size=0, on_error="stop", verbose=False,
    )  # fmt: skip
    lesions = {(row.patient.name, row.kind, row.number) for row in plain[1]}
    rows = read_csv(tmp_path / "patches/patches.csv")
    assert sum(row["kind"] == "abn" for row in rows) == len(lesions)


# ------------------------------------------------------------------------------------------------ mask or crop


def test_mask_is_told_by_its_values():
    mask = np.zeros((60, 50), np.uint8)
    mask[20:30, 10:25] = 255
    np.testing.assert_array_equal(as_mask(mask, lossy=False), mask > 0)
    np.testing.assert_array_equal(as_mask(mask.astype(np.uint16) * 257, lossy=False), mask > 0)
    blurred = cv2.imdecode(cv2.imencode(".jpg", mask, [cv2.IMWRITE_JPEG_QUALITY, 75])[1], cv2.IMREAD_GRAYSCALE)
    assert len(np.unique(blurred)) > 2
    assert as_mask(blurred, lossy=False) is None
    np.testing.assert_array_equal(as_mask(blurred, lossy=True), mask > 0)
    crop = np.random.RandomState(0).normal(120, 20, (60, 50)).clip(0, 255).astype(np.uint8)
    assert as_mask(crop, lossy=True) is None
    assert as_mask(np.full((4, 4), 255, np.uint8), lossy=False) is None


@pytest.mark.parametrize(
    "path, cell, beside, expected",
    [
        ("R/1/2/000000.dcm", "R/1/2/000000.dcm", "R/1/2/000001.dcm", True),
        ("R/1/2/000001.dcm", "R/1/2/000000.dcm", "R/1/2/000000.dcm", False),
        ("R/1/2/1-1.dcm", "R/1/2/000000.dcm", "R/1/2/1-2.dcm", True),
        ("R/1/2/1-2.dcm", "R/1/2/000000.dcm", "R/1/2/1-1.dcm", False),
        ("R/date/ROI mask/1-2.dcm", "R/1/2/000001.dcm", "R/date/ROI mask/1-1.dcm", True),
        ("R/date/ROI mask/1-1.dcm", "R/1/2/000001.dcm", "R/date/ROI mask/1-2.dcm", False),
        ("R/date/ROI mask/1-1.dcm", "R/1/2/000001.dcm", "R/date/cropped/1-1.dcm", True),  # alone
        ("R/1/3/000000.dcm", "R/1/2/000000.dcm", "R/1/2/000000.dcm", False),  # alone in the folder of the crop
        ("jpeg/2/1-234.jpg", "R/1/2/000000.dcm", "jpeg/2/2-234.jpg", True),
        ("jpeg/2/2-234.jpg", "R/1/2/000000.dcm", "jpeg/2/1-234.jpg", False),
        ("S7/33.dcm", "R/1/2/000000.dcm", "S7/20.dcm", True),  # a name that says nothing
    ],
)
def test_where_a_cell_says_that_the_mask_is(path, cell, beside, expected):
    folder = "Mass-Training_P_00001_LEFT_CC_1"
    path, cell, beside = (text.replace("R/", f"{folder}/") for text in (path, cell, beside))
    assert is_where_named(path, [cell], [path, beside]) == expected
