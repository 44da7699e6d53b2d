"""CBIS-DDSM from its download to prepared folders: the real tables, every layout, every oddity, bad input."""

import csv
import functools
import re
import shutil
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest

from mammo.base.files import InputError
from mammo.commands import prepare as command
from mammo.data.cbis_ddsm import as_mask, is_where_named
from mammo.data.cbis_tables import find_tables, read_cbis_table, read_cbis_tables
from mammo.data.splits import cancer_patients, split_by_options
from mammo.images.reading import read_img
from mammo.phantom.cbis_ddsm import TREES, write_dicom
from tests.data import phantoms
from tests.data.phantoms import SIZE, by_key, download_cbis, draw_row
from tests.helpers import files_of, read_csv, read_folder, read_png

prepare = functools.partial(phantoms.prepare, "cbis-ddsm")


def main(argv):
    return command.main(["cbis-ddsm", *argv])


# ------------------------------------------------------------------------------------------------ real tables


@pytest.fixture(scope="session")
def real_tables(spec):
    """Folder of the four real description files, and what is read from them."""
    folder = spec.parent / "cbis_ddsm_csv"
    return folder, read_cbis_tables(find_tables(folder))


def test_counts_of_the_real_tables(real_tables):
    """The figures that the data set's description gives."""
    _, tables = real_tables
    counts = tables.report["tables"]
    names = ["calc_train", "calc_test", "mass_train", "mass_test"]
    files = [counts["{}_case_description_{}_set.csv".format(*name.split("_"))] for name in names]
    assert [file["rows"] for file in files] == [1546, 326, 1318, 378]
    assert [file["images"] for file in files] == [1227, 284, 1231, 361]
    assert [file["patients"] for file in files] == [602, 151, 691, 201]
    assert [file["roi_and_crop_in_different_folders"] for file in files] == [1, 0, 92, 11]
    assert all(file["newline_in_path_cell"] == file["rows"] for file in files)
    together = tables.counts
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
    cancer = sum(cancer_patients(tables.pictures).values())
    assert np.sum(list(figures.values()), axis=0).tolist() == [1566, cancer, 3032, 1347]
    assert "no patient is in two sets: 1566 places, 1566 patients" in lines
    assert any("in both official sets: 31 patients, 29 images" in line for line in lines)


def split_tables(tables, *options):
    parser = command.make_parser("cbis-ddsm")
    return split_by_options(tables.pictures, parser.parse_args(["x", "y", *options]), parser)


def test_author_split_of_the_real_tables_is_stratified(real_tables):
    _, tables = real_tables
    sets = split_tables(tables)
    cancer = cancer_patients(tables.pictures)
    shares = [np.mean([cancer[patient] for patient in patients]) for patients in sets.values()]
    assert shares == pytest.approx([np.mean(list(cancer.values()))] * 3, abs=0.01)
    assert len(sets["test"]) == pytest.approx(0.15 * 1566, abs=1)
    assert len(sets["val"]) == pytest.approx(0.1 * 0.85 * 1566, abs=1)


def test_official_split_of_the_real_tables_keeps_shared_patients_for_the_test(real_tables):
    _, tables = real_tables
    sets = split_tables(tables, "--split", "official")
    assert set(tables.repairs["patients_in_both_official_sets"]) <= set(sets["test"])
    in_test_tables = {row.patient for picture in tables.pictures for row in picture.findings if row.official == "test"}
    assert set(sets["test"]) == in_test_tables


# ------------------------------------------------------------------------------------------- phantom downloads


@pytest.fixture(params=TREES)
def prepared(request, prepared_data):
    """(download, its rows, its oddities.json, prepared folder, report) of each layout."""
    made, out, report = prepared_data(request.param)
    return made.folder, made.rows, made.odd, out, report


def test_full_images_and_masks_are_those_drawn(prepared):
    download, rows, odd, out, _ = prepared
    lossy = odd["tree"] == "jpeg"
    sources = {Path(row["file"]).stem: row["source"] for row in read_csv(out / "images.csv")}
    for key, group in by_key(rows).items():
        path = out / f"full_img/{key}.png"
        assert path.exists() == (key not in odd["oddities"]["truncated"])
        if not path.exists():
            continue
        img, masks = draw_row(group[0])
        source = read_img(download / sources[key], gs_255=True)
        assert np.corrcoef(img.ravel(), source.ravel())[0, 1] > 0.99
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
                small = round(0.83 * SIZE[1]), round(0.87 * SIZE[0])
                small = cv2.resize(expected.astype("uint8"), small, None, 0, 0, 0)
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
    sides = read_csv(out / "pat_side_cancer.csv")
    assert {(line["patient_id"], line["side"]): line["cancer"] == "1" for line in sides} == breasts


def test_every_oddity_is_counted(prepared):
    _, rows, odd, _, report = prepared
    repairs = {kind: repair["count"] for kind, repair in report["repairs"].items()}
    assert all(repair["count"] == len(repair["items"]) for repair in report["repairs"].values())
    found = {name: len(where) for name, where in odd["oddities"].items()}
    assert all(found[name] for name in found if (name, odd["tree"]) != ("monochrome1", "jpeg"))
    for name in ("rows", "patients", "images", "image_folders"):
        assert report["counts"][name] == odd["counts"][name], name
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
    backslashes = odd["counts"]["rows"] if odd["tree"] == "descriptive" else 0
    assert sum(table["backslash_path"] for table in tables) == backslashes
    assert sum(table["roi_and_crop_in_different_folders"] for table in tables) == found["separate_folders"]
    assert [skipped["image"] for skipped in report["skipped"]] == odd["oddities"]["truncated"]
    assert report["counts"]["images_skipped"] == found["truncated"]


# --------------------------------------------------------------------------------- downloads changed by hand


@pytest.fixture
def plain(plain_data):
    """A small download by UID without oddities."""
    return plain_data("cbis-ddsm")


@pytest.fixture(scope="session")
def plain_jpeg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpeg") / "download"
    return folder, download_cbis(folder, "jpeg", patients=6, views=("CC",), oddities="none")[0]


@pytest.fixture
def jpeg(plain_jpeg, tmp_path):
    """A copy of a small download of JPEG files without oddities, to be changed, and its rows."""
    return shutil.copytree(plain_jpeg[0], tmp_path / "download"), plain_jpeg[1]


def test_folders_without_names_are_told_by_their_patient_id(download, plain, tmp_path):
    folder, _ = download
    (folder / "CBIS-DDSM").rename(folder / "old")
    for index, path in enumerate(sorted((folder / "old").rglob("*.dcm"))):
        target = folder / f"S{index // 7}/{index}.dcm"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    prepare(folder, tmp_path / "moved")
    assert files_of(tmp_path / "moved") == files_of(plain.ready)


def test_jpeg_without_dicom_info(jpeg, tmp_path):
    folder, _ = jpeg
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
    assert files_of(tmp_path / "split") == files_of(plain.ready)


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
    img, _ = draw_row(row)
    np.testing.assert_array_equal(read_png(tmp_path / f"out/full_img/{row.key}.png"), img)


MASK_FAULTS = {
    "missing folder": lambda mask: shutil.rmtree(mask.parents[2]),
    "missing": lambda mask: mask.unlink(),
    "truncated": lambda mask: mask.write_bytes(mask.read_bytes()[:-100]),
    "all zero": lambda mask: write_dicom(mask, np.zeros(SIZE, np.uint8), PatientID=mask.parents[2].name),
    "not binary": lambda mask: write_dicom(
        mask, np.random.RandomState(0).randint(0, 255, SIZE).astype(np.uint8), PatientID=mask.parents[2].name
    ),
}


@pytest.mark.parametrize("how", MASK_FAULTS)
def test_bad_mask_is_named_and_its_image_kept(download, tmp_path, how):
    folder, rows = download
    row = next(row for row in rows if row.kind == "mass")
    MASK_FAULTS[how](sorted((folder / "CBIS-DDSM" / row.roi_folder).rglob("*.dcm"))[1])  # of a mass after its crop
    report = prepare(folder, tmp_path / "out", on_error="skip")
    (skipped,) = report["skipped"]
    assert skipped["image"] == row.key and f"{row.key} {row.kind} {row.number}: no mask" in skipped["reason"]
    assert row.roi_folder in skipped["reason"]
    assert report["counts"]["masks_skipped"] == 1
    assert (tmp_path / f"out/full_img/{row.key}.png").exists()
    assert pathologies_of(tmp_path / "out", row) == []


def mask_of(row, *corner):
    """The drawn mask, with a rectangle from the corner (height, width) that no lesion has."""
    mask = draw_row(row)[1][row.index].copy()
    mask[: corner[0], : corner[1]] = 255
    return mask


def table_of(folder, row):
    """The table with a row of the training set, its lines, and that of the row."""
    path = folder / f"{row.kind}_case_description_train_set.csv"
    lines = list(csv.reader(path.read_bytes().decode().splitlines(keepends=True)))
    return path, lines, next(line for line in lines if line[0] == row.patient.name and int(line[4]) == row.number)


def add_row(folder, row, mask, series="9.3", number=None, **tags):
    """Add a row of the same image, and a mask (None: there is none) with a crop. number: None for the row's own."""
    number = number or row.number
    roi_folder = f"{row.image_folder}_{number}"
    path, lines, line = table_of(folder, row)
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


def pathologies_of(out, row):
    """What the table of masks says of the lesion of this row."""
    lesion = {"patient_id": row.patient.name, "type": row.kind, "abn_num": str(row.number)}
    return [line["pathology"] for line in read_csv(out / "roi_mask_path.csv") if lesion.items() <= line.items()]


def read_mask_of(out, row):
    return read_png(out / f"roi_mask/{row.kind.capitalize()}-Training_{row.key}_{row.number}.png")


def rename_series(folder, row):
    """Give the series of a lesion names that the table does not have."""
    for index, series in enumerate(sorted((folder / "CBIS-DDSM" / row.roi_folder).glob("*/*"))):
        series.rename(series.with_name(f"1-ROI mask images-{index}"))


@pytest.mark.parametrize("description", [{}, {"SeriesDescription": "ROI mask images"}])
@pytest.mark.parametrize("size", [SIZE, (124, 107)])
@pytest.mark.parametrize("named", [True, False])
def test_every_row_gives_its_own_mask(second_row, tmp_path, size, description, named):
    """Also one of another size, and in folders that the table does not name."""
    folder, row = second_row
    part = cv2.resize(mask_of(row, 20, 12) * np.uint8(1), size[::-1], interpolation=cv2.INTER_NEAREST)
    inner = add_row(folder, row, part, **description)
    if not named:
        rename_series(folder, row)
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
        rename_series(folder, row)
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
    assert files_of(tmp_path / "out") == files_of(plain.ready)
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
    assert files_of(tmp_path / "out") == files_of(plain.ready)
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
def test_mask_beside_its_image_is_not_taken_for_it(download, plain, tmp_path, unnamed, described):
    folder, rows = download
    if not described:
        for path in folder.rglob("*.dcm"):
            dataset = pydicom.dcmread(path)
            del dataset.SeriesDescription
            dataset.save_as(path)
    gather_views(folder, unnamed)
    report = prepare(folder, tmp_path / "out")
    assert report["repairs"]["several_files_for_one_image"]["count"] == len({row.image_folder for row in rows})
    assert files_of(tmp_path / "out") == files_of(plain.ready)


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


def test_crop_is_no_mammogram(download, tmp_path):
    """The mammogram of a folder that holds all is missing; its mask and crop are there."""
    folder, rows = download
    shutil.rmtree(folder / "CBIS-DDSM" / rows[0].image_folder)
    gather_views(folder, rename=False)
    report = prepare(folder, tmp_path / "out", on_error="skip")
    assert f"no image of {rows[0].image_folder}" in report["skipped"][0]["reason"]
    assert not list((tmp_path / "out").rglob(f"*{rows[0].key}*"))


@pytest.mark.parametrize("described", [True, False])
def test_jpeg_crop_of_black_and_bright_is_no_mask(jpeg, tmp_path, described):
    folder, rows = jpeg
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
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert warnings == [f"Warning: {name} has no images" for name in ("train", "val", "test")]


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
    path, lines, line = table_of(folder, row)
    if tables == "pathologies differ":
        line = ["MALIGNANT" if cell == "BENIGN" else cell for cell in line]
    else:  # the mask of a second row, in a folder of its own
        cells = [cell.replace(row.roi_folder, f"{row.roi_folder}9").replace("/1.3", "/9.3") for cell in line[-2:]]
        line = [*line[:-2], *cells]
        mask = np.zeros(SIZE, np.uint8)
        mask[:5, :4] = 1
        write_dicom(folder / "CBIS-DDSM" / f"{row.roi_folder}9/9.3/9.3/000000.dcm", mask)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([*lines, line])
    report = prepare(folder, tmp_path / "out")
    (written,) = pathologies_of(tmp_path / "out", row)
    if tables == "pathologies differ":
        assert written == "MALIGNANT" and report["repairs"]["pathologies_of_one_lesion_differ"]["count"] == 1
        assert list(tmp_path.glob(f"out/*/pos/{row.key}.png"))
    else:
        assert written == "BENIGN" and report["repairs"]["masks_united"]["count"] == 1
        mask = read_mask_of(tmp_path / "out", row)
        assert (mask[:5, :4] == 255).all()
        expected = draw_row(row)[1][row.index]
        assert (mask[expected > 0] == 255).all()


# ----------------------------------------------------------------------------------------- bad tables, options


def rewrite(folder, name, change):
    path = next(folder.glob(name))
    text = path.read_bytes().decode()
    changed = change(text)
    assert changed != text
    path.write_bytes(changed.encode())
    return path


@pytest.mark.parametrize("start", ["E:\\DDSM\\", "/data/ddsm/", "\\\\server\\share\\", "./CBIS-DDSM/"])
def test_paths_of_another_machine_are_read(download, plain, tmp_path, start):
    folder, _ = download
    for path in folder.glob("*train*.csv"):
        rewrite(folder, path.name, lambda text: re.sub(r"(?=(Calc|Mass)-T)", lambda _: start, text))
    prepare(folder, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(plain.ready)


def test_lines_are_counted_with_newlines_in_cells(download):
    path = rewrite(download[0], "mass*train*.csv", lambda text: text[::-1].replace("NGINEB", "DOOG", 1)[::-1])
    line = path.read_bytes().decode().split("GOOD")[0].count("\n") + 1
    with pytest.raises(InputError, match=f"line {line}: unknown pathology"):
        read_cbis_table(path)


def test_download_without_images_or_tables(plain, tmp_path, capsys):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "no description files" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "out"), "--csv-dir", "nowhere"]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "out"), "--csv-dir", str(plain.folder)]) == 1
    assert f"{tmp_path}: no images below it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: b"\xff\xfe\x00\x01", "not a text file"),
        (lambda data: data.replace(b"Mass", b"M\xe4ss", 1), "not a text file"),
        (lambda data: data + b'"' + b"x" * 200_000, "field larger than field limit"),
        (lambda data: data[:-130], "cells. Received|unexpected end of data"),
        (lambda data: b"", "missing or repeated columns image_path"),
        (lambda data: data.replace(b"PatientID", b"patient"), "missing or repeated columns PatientID"),
    ],
)
def test_damaged_jpeg_table_is_named(jpeg, tmp_path, change, message):
    folder, _ = jpeg
    path = folder / "csv/dicom_info.csv"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=message) as error:
        prepare(folder, tmp_path / "out")
    assert str(path) in str(error.value)


def test_official_split_replaces_the_other(plain, tmp_path):
    shutil.copytree(plain.ready, tmp_path / "out")
    with pytest.raises(InputError, match=r"out: has the work .* \(split author there, official now\).*--fresh"):
        prepare(plain.folder, tmp_path / "out", split="official")
    prepare(plain.folder, tmp_path / "out", split="official", fresh=True)
    prepare(plain.folder, tmp_path / "new", split="official")
    assert read_folder(tmp_path / "out") == read_folder(tmp_path / "new")


def test_sampler_takes_what_is_prepared(plain, tmp_path):
    from ddsm_train import sample_patches_combined

    out = tmp_path / "out"
    prepare(plain.folder, out)
    patients = "".join((out / f"pat_{name}.txt").read_text() for name in ("train", "val", "test"))
    (tmp_path / "all.txt").write_text(patients)
    places = out / "roi_mask_path.csv", out / "roi_mask", tmp_path / "all.txt", out / "full_img"
    options = {"target_height": SIZE[0], "patch_size": 16, "nb_abn": 1, "nb_bkg": 1, "nb_hns": 0, "val_size": 0}
    options |= {"on_error": "stop", "verbose": False}
    sample_patches_combined.run(*map(str, (*places, tmp_path / "patches", tmp_path / "val")), **options)
    lesions = {(row.patient.name, row.kind, row.number) for row in plain.content}
    rows = read_csv(tmp_path / "patches/patches.csv")
    assert sum(row["kind"] == "abn" for row in rows) == len(lesions)


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
