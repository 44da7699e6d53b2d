"""The patch samplers' command lines: golden runs, bad input, and what the output folders hold."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from ddsm_train import sample_patches_combined, sample_patches_main
from mammo.base.files import InputError
from mammo.base.work import MANIFEST, OPTIONS
from mammo.data.patches import TABLES, read_lesions
from tests.helpers import check_options, read_csv, read_folder

KINDS = {"blob patch": "blob", "abn patch": "abn", "bkg patch": "bkg"}


def read_rows(folder):
    return read_csv(folder / "patches.csv")


def sampled_events(out):
    """(image, kind, x, y) of every patch, in order."""
    return [
        (f"{row['patient']}_{row['side']}_{row['view']}", row["kind"], int(row["x"]), int(row["y"]))
        for name in ("train", "val")
        if (out / name).exists()
        for row in read_rows(out / name)
    ]


def golden_events(config):
    return [
        (image["img_id"], KINDS[kind], *centre)
        for image in config["images"]
        for kind, *centre in image["events"]
        if kind in KINDS
    ]


def patch_files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))


def read_patch(path):
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert pixels.dtype == np.uint16
    return pixels


def assert_hashes_match(out, table):
    """Compare the pixels of patches with the golden SHA-1 of theirs; return the files of the golden table."""
    hashes = json.loads(table.read_text())
    for file, (sha1, *_) in hashes.items():
        assert hashlib.sha1(read_patch(out / file).tobytes()).hexdigest() == sha1, file
    return list(hashes)


def arguments(source, out):
    read = [source / name for name in ("roi_mask_path.csv", "roi_mask", "pat_train.txt", "full_img")]
    return [*map(str, (*read, out / "train", out / "val"))]


# ------------------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("name", ["cfg_s5", "cfg_s1", "cfg_noseg_width", "cfg_cutoffs"])
def test_sampler_matches_golden(golden, tmp_path, name):
    folder = golden / "patches"
    config = json.loads((folder / f"{name}.json").read_text())
    assert sample_patches_combined.main([*arguments(folder / "input", tmp_path), *config["args"]]) == 0

    assert sampled_events(tmp_path) == golden_events(config)
    assert patch_files(tmp_path) == sorted(config["files"])
    for part, patients in config["pat_lst"].items():
        if patients is None:
            assert not (tmp_path / part).exists()
        else:
            assert (tmp_path / part / "pat_lst.txt").read_text().split() == patients
    if (folder / f"{name}_patches.npz").exists():
        for file, pixels in np.load(folder / f"{name}_patches.npz").items():
            np.testing.assert_array_equal(read_patch(tmp_path / file), pixels, err_msg=file)
    else:
        assert_hashes_match(tmp_path, folder / f"{name}_sha1.json")


# The original crashed in two of these: there, what it had written must be among ours.
@pytest.mark.parametrize(
    ("name", "whole"),
    [("edge_s1_nohns", True), ("edge_s3_noverbose", True), ("edge_s1_hns", False), ("edge_s1_noverbose", False)],
)
def test_edge_cases_match_golden(golden, tmp_path, capsys, name, whole):
    folder = golden / "patches"
    config = json.loads((folder / f"{name}.json").read_text())
    command = [*arguments(folder / "input_edge", tmp_path), *config["args"], "--on-error", "skip"]
    assert sample_patches_combined.main(command) == 0

    files = assert_hashes_match(tmp_path, folder / f"{name}_sha1.json")
    written = patch_files(tmp_path)
    assert written == sorted(files) if whole else set(files) < set(written)
    if "--no-verbose" not in config["args"]:
        expected = golden_events(config)
        assert sampled_events(tmp_path)[: len(expected)] == expected
    # The line-shaped lesion, which crashed it, is sampled from the centre of its box.
    assert "train/calc_ben/P_9044_RIGHT_CC_1_0000.png" in written
    output = capsys.readouterr().out
    assert "3 left out" in output
    for file in ("P_9011_LEFT_CC.png", "Mass-Training_P_9022_RIGHT_CC_2.png", "Calc-Training_P_9033_LEFT_CC_1.png"):
        assert file in output


def test_too_few_patients_to_split_are_an_error(golden, tmp_path, capsys):
    """Where the original ended in scikit-learn's stack trace."""
    config = json.loads((golden / "patches/edge_default_val.json").read_text())
    assert config["exit_code"] == 1
    assert sample_patches_combined.main([*arguments(golden / "patches/input_edge", tmp_path), *config["args"]]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--val-size" in error
    assert not list(tmp_path.iterdir())


def test_single_type_sampler_matches_golden(golden, tmp_path):
    source = golden / "patches/input"
    config = json.loads((golden / "patches/main_mass.json").read_text())
    images = tmp_path / "full_img"
    images.mkdir()
    for path in (source / "full_img").iterdir():
        shutil.copy(path, images / f"Mass-Training_{path.name}")
    patients = tmp_path / "pat.txt"
    patients.write_text("\n".join(config["pat_train_order"]))
    out = tmp_path / "out"
    command = arguments(source, out)
    command[2:4] = str(patients), str(images)
    assert sample_patches_main.main([*command, *config["args"]]) == 0
    assert sampled_events(out) == golden_events(config)
    assert patch_files(out) == sorted(config["files"])
    assert sorted(assert_hashes_match(out, golden / "patches/main_mass_sha1.json")) == patch_files(out)


# ---------------------------------------------------------------------------------------------------- synthetic

SMALL = {"target_height": 120, "patch_size": 16, "nb_abn": 3, "nb_bkg": 4, "nb_hns": 1}
SMALL |= {"val_size": 0.5, "verbose": False}
HEADER = "patient_id,side,view,abn_num,pathology,type"


@pytest.fixture
def study(tmp_path):
    """Four patients with one image each, noise within a bright half-disc; the first has two lesions."""
    rng = np.random.default_rng(0)
    for folder in ("full_img", "roi_mask"):
        (tmp_path / folder).mkdir()
    rows = []
    for number in range(4):
        breast = np.zeros((120, 100), "uint8")
        cv2.circle(breast, (0, 60), 55, 255, -1)
        image = np.where(breast > 0, rng.integers(10_000, 60_000, breast.shape), 0).astype("uint16")
        image_id = f"P_{number}_LEFT_CC"
        cv2.imwrite(str(tmp_path / f"full_img/{image_id}.png"), image)
        lesions = [("calc", (20, 50)), ("mass", (20, 90))] if number == 0 else [("mass", (20, 50))]
        for index, (lesion_type, centre) in enumerate(lesions, 1):
            mask = cv2.circle(np.zeros_like(breast), centre, 8, 255, -1)
            name = f"{lesion_type.capitalize()}-Training_{image_id}_{index}.png"
            cv2.imwrite(str(tmp_path / f"roi_mask/{name}"), mask)
            pathology = "MALIGNANT" if number % 2 else "BENIGN_WITHOUT_CALLBACK"
            rows.append(f"P_{number},LEFT,CC,{index},{pathology},{lesion_type}")
    (tmp_path / "roi_mask_path.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (tmp_path / "pat_train.txt").write_text("".join(f"P_{number}\n" for number in range(4)))
    return tmp_path


def sample(study, out=None, **options):
    out = out or study / "out"
    sample_patches_combined.run(*arguments(study, out), **SMALL | options)
    return out


@pytest.mark.parametrize("backend", ["loky", "threading", pytest.param("dask", marks=pytest.mark.slow)])
def test_output_does_not_depend_on_who_works(study, backend):
    if backend == "dask":
        pytest.importorskip("distributed")
    one, two = sample(study, study / "one"), sample(study, study / "two", jobs=2, backend=backend)
    assert read_folder(one) == read_folder(two)
    assert len(read_folder(one)) == 5 * 3 + 4 * 4 + 2 * len((*TABLES, OPTIONS, MANIFEST))


def test_a_killed_run_started_again_ends_with_the_same_files(study):
    options = {"--target-height": 120, "--patch-size": 16, "--nb-abn": 5, "--nb-bkg": 400, "--val-size": 0.5}
    options = [str(part) for option in options.items() for part in option]
    whole, out = study / "whole", study / "out"
    assert sample_patches_combined.main([*arguments(study, whole), *options]) == 0
    # Of a finished run: its tables must not pass for those of the killed one.
    shutil.copytree(whole, out)
    shutil.rmtree(out / "train/background")

    command = [sys.executable, sample_patches_combined.__file__, *arguments(study, out), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while not list((out / "train").glob("background/*.png")) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (out / "train/patches.csv").exists() and not (out / "train/pat_lst.txt").exists()
    (out / "train/background/.partial.P_1_LEFT_CC.abc.png").write_bytes(b"half")

    assert sample_patches_combined.main([*arguments(study, out), *options]) == 0
    assert read_folder(out) == read_folder(whole)


def test_hard_negatives_lie_beside_their_lesion(study):
    without, out = sample(study, study / "without"), sample(study, nb_hard_neg=5)
    rows = read_rows(out / "train") + read_rows(out / "val")
    assert [row for row in rows if row["kind"] != "hard"] == read_rows(without / "train") + read_rows(without / "val")
    hard = [row for row in rows if row["kind"] == "hard"]
    assert len(hard) == 5 * 5 and {row["class"] for row in hard} == {"background"}
    for row in hard:
        # Discs with a radius of 8 around (20, 50) and, for number 2, (20, 90); patches of 16.
        across, down = int(row["image_x"]) - 20, int(row["image_y"]) - (90 if row["abnormality"] == "2" else 50)
        assert max(abs(across), abs(down)) <= 17 and float(row["overlap"]) < 0.35


def test_lesions_of_one_number_share_the_background_folder(study):
    """A mass and a calcification, both number 1, in one image."""
    shutil.copy(study / "roi_mask/Mass-Training_P_0_LEFT_CC_2.png", study / "roi_mask/Mass-Training_P_0_LEFT_CC_1.png")
    table = study / "roi_mask_path.csv"
    numbered = sample(study, study / "numbered", nb_hard_neg=5)
    table.write_text(table.read_text().replace("P_0,LEFT,CC,2,", "P_0,LEFT,CC,1,"))
    out = sample(study, nb_hard_neg=5)
    rows = read_rows(out / "train") + read_rows(out / "val")
    assert len({row["file"] for row in rows}) == len(rows) == len(patch_files(out)) == len(patch_files(numbered))
    centres = [[(row["kind"], row["x"], row["y"]) for row in read_rows(o / "train")] for o in (out, numbered)]
    assert centres[0] == centres[1]


@pytest.mark.parametrize("name", ["full_img/P_2_LEFT_CC.png", "roi_mask/Mass-Training_P_2_LEFT_CC_1.png"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "truncated"),
        (lambda path: path.write_text("no image"), "not a readable image"),
        (lambda path: cv2.imwrite(str(path), np.full((120, 100, 3), 9, "uint8")), "colour"),
        (lambda path: cv2.imwrite(str(path), np.zeros((120, 100), "uint16")), "above (0|zero)"),
    ],
)
def test_damaged_files_are_named_and_the_rest_is_sampled(study, capsys, name, damage, message):
    damage(study / name)
    options = ["--target-height", "120", "--patch-size", "16", "--nb-hns", "0", "--val-size", "0", "--no-verbose"]
    assert sample_patches_combined.main([*arguments(study, study / "out"), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(rf"The first: .*{name}.*{message}", error), error
    assert {row["patient"] for row in read_rows(study / "out/train")} == {"P_0", "P_1", "P_3"}


def check_place(study, out, row):
    """A patch is what the image has where its row says."""
    name = f"{row['patient']}_{row['side']}_{row['view']}"
    image = np.pad(cv2.imread(str(study / f"full_img/{name}.png"), cv2.IMREAD_UNCHANGED), 8)
    x, y = int(row["image_x"]), int(row["image_y"])
    np.testing.assert_array_equal(read_patch(out / "train" / row["file"]), image[y : y + 16, x : x + 16])


def test_patches_csv_leads_back_to_the_image(study):
    out = sample(study, segment_breast=False, nb_hns=0)
    rows = read_rows(out / "train")
    assert {row["class"] for row in rows} == {"background", *(row["file"].split("/")[0] for row in rows)}
    for row in rows:
        check_place(study, out, row)
        sizes = [row[key] for key in ("image_height", "image_width", "source_height", "source_width")]
        assert sizes == ["120", "100", "120", "100"]
        assert (float(row["overlap"]) < 0.35) == (row["kind"] == "bkg")


def test_segmented_patches_lie_where_patches_csv_says(study):
    out = sample(study)
    for row in read_rows(out / "train"):
        check_place(study, out, row)


@pytest.mark.parametrize("avoid", [False, True])
def test_background_avoids_the_first_lesion_or_all(study, avoid):
    out = sample(study, avoid_all_rois=avoid, nb_bkg=60, val_size=0.0, nb_hns=0)
    mask = cv2.imread(str(study / "roi_mask/Mass-Training_P_0_LEFT_CC_2.png"), cv2.IMREAD_UNCHANGED) > 0
    mask = np.pad(mask, 8)
    shares = []
    for row in read_rows(out / "train"):
        if row["patient"] == "P_0" and row["kind"] == "bkg":
            assert row["abnormality"] == "1"
            x, y = int(row["image_x"]), int(row["image_y"])
            shared = mask[y : y + 16, x : x + 16]
            shares.append(max(shared.mean(), shared.sum() / mask.sum()))
    assert len(shares) == 60
    assert (max(shares) < 0.35) == avoid


def test_constant_image_keeps_its_value(study):
    for path in (study / "full_img").iterdir():
        cv2.imwrite(str(path), np.full((120, 100), 40_000, "uint16"))
    out = sample(study, nb_bkg=0, nb_hns=0)
    files = patch_files(out)
    assert len(files) == 5 * 3
    for file in files:
        assert set(np.unique(read_patch(out / file))) <= {0, 40_000}  # 0: the margin
    assert any((read_patch(out / file) == 40_000).all() for file in files)


def test_default_goes_on_past_faults_and_exits_with_1(study, capsys):
    (study / "full_img/P_1_LEFT_CC.png").write_bytes(b"\x89PNG broken")
    options = ["--target-height", "120", "--patch-size", "16", "--nb-hns", "0", "--val-size", "0"]
    out = study / "out"
    assert sample_patches_combined.main([*arguments(study, out), *options]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "P_1_LEFT_CC.png" in error and "Traceback" not in error
    assert {row["patient"] for row in read_rows(out / "train")} == {"P_0", "P_2", "P_3"}

    assert sample_patches_combined.main([*arguments(study, out), *options, "--on-error", "skip"]) == 0
    stopped = study / "stopped"
    assert sample_patches_combined.main([*arguments(study, stopped), *options, "--on-error", "stop"]) == 1
    assert not (stopped / "train/patches.csv").exists()


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((120, 50), 255, "does not fit its image: Expected the shape of 120 x 100 pixels. Received 120 x 50"),
        ((120, 100), 0, "marks no lesion"),
    ],
)
def test_bad_masks_are_named(study, shape, value, message):
    path = study / "roi_mask/Mass-Training_P_2_LEFT_CC_1.png"
    cv2.imwrite(str(path), np.full(shape, value, "uint8"))
    with pytest.raises(InputError, match=message) as error:
        sample(study, on_error="stop")
    assert str(path) in str(error.value)


def test_unknown_lesion_leaves_no_background_when_all_are_to_be_avoided(study):
    (study / "roi_mask/Mass-Training_P_0_LEFT_CC_2.png").unlink()
    out = sample(study, avoid_all_rois=True, on_error="skip", val_size=0.0)
    kinds = [row["kind"] for row in read_rows(out / "train") if row["patient"] == "P_0"]
    assert kinds == ["abn"] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("P_9,L,CC,1,BENIGN,calc", "line 2: unknown side: Expected LEFT or RIGHT. Received 'L'"),
        ("P_9,LEFT,ML,1,BENIGN,calc", "line 2: unknown view"),
        ("P_9,LEFT,CC,1,benign,calc", "line 2: unknown pathology"),
        ("P_9,LEFT,CC,1,BENIGN,cyst", "line 2: unknown type"),
        ("P_9,LEFT,CC", "line 2: Expected 6 cells. Received 3"),
        ("../P_9,LEFT,CC,1,BENIGN,calc", "line 2: patient_id is part of file names"),
        ("/tmp/P_9,LEFT,CC,1,BENIGN,calc", "line 2: patient_id is part of file names"),
        ("P_9,LEFT,CC,..\\1,BENIGN,calc", "line 2: abn_num is part of file names"),
        (",LEFT,CC,1,BENIGN,calc", "line 2: patient_id is part of file names"),
        ("P_9,LEFT,CC,1,BENIGN,calc\nP_9,LEFT,CC,1,MALIGNANT,calc", "line 3: repeats line 2"),
    ],
)
def test_wrong_table_rows_are_named(tmp_path, row, message):
    path = tmp_path / "table.csv"
    path.write_text(f"{HEADER}\n{row}\n")
    with pytest.raises(InputError, match=r"table\.csv, ") as error:
        read_lesions(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"missing or repeated columns {HEADER.replace(',', ', ')}"),
        ("patient_id,side,view\nP_1,LEFT,CC\n", "missing or repeated columns abn_num, pathology, type"),
        (f"{HEADER.replace(',', ';')}\n", "missing or repeated columns patient_id"),
        (f"{HEADER},type\n", "missing or repeated columns type"),
        (f"{HEADER}\n{'x' * 200_000}\n", r"line 2: not a CSV file"),
    ],
)
def test_tables_without_their_columns_are_refused(tmp_path, text, message):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_lesions(path)


def test_tables_that_are_no_text_are_refused(study):
    for name in ("roi_mask_path.csv", "pat_train.txt"):
        (study / name).write_bytes(b"\x89PNG")
        with pytest.raises(InputError, match=rf"{name}: not a text file"):
            sample(study)
        (study / name).write_text(f"{HEADER}\nP_0,LEFT,CC,1,BENIGN,calc\n")


@pytest.mark.parametrize(
    ("text", "message"), [("", "no patients"), ("P_0\nP_0\n", "P_0 stands there 2 times"), ("P_8\n", "no patient in")]
)
def test_bad_patient_lists_are_named(study, text, message):
    (study / "pat_train.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        sample(study)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 1}, "--patch-size"),
        ({"bkg_dir": "calc_ben"}, "--bkg-dir"),
        *(({"bkg_dir": path}, "--bkg-dir: Expected the name of a folder") for path in ("../x", "", ".", "a/b")),
        ({"calc_neg_dir": "../x"}, "--calc-neg-dir: Expected the name"),
        ({"val_size": 0.9}, "--val-size 0.9"),
    ],
)
def test_options_that_cannot_work_are_refused(study, options, message):
    with pytest.raises(InputError, match=message):
        sample(study, **options)
    assert not (study / "out").exists() and not (study / "x").exists()


def test_arguments_of_run_are_checked_as_those_of_a_function(study):
    paths = arguments(study, study / "out")
    for script in (sample_patches_combined, sample_patches_main):
        with pytest.raises(TypeError, match="too many positional arguments"):
            script.run(*paths, "extra")
        with pytest.raises(TypeError, match="'val_out_dir'"):
            script.run(*paths, val_out_dir="other")
        with pytest.raises(TypeError, match="missing options: val_out_dir"):
            script.run(*paths[:-1])


def test_patient_lists_may_have_a_header(study, capsys):
    without = sample(study, study / "without")
    path = study / "pat_train.txt"
    path.write_text("patient_id\n" + path.read_text())
    assert read_folder(sample(study)) == read_folder(without)
    assert "listed patients have no lesion" not in capsys.readouterr().out


def test_one_folder_for_training_and_validation_is_refused(study):
    with pytest.raises(InputError, match="are the same"):
        sample_patches_combined.run(*arguments(study, study)[:4], study / "out", study / "x/../out", **SMALL)


def test_lesions_that_would_share_file_names_are_refused(study):
    with open(study / "roi_mask_path.csv", "a") as file:
        file.write("P_0,LEFT,CC,1,BENIGN,mass\n")
    with pytest.raises(InputError, match="2 lesions would share the file names ben/P_0_LEFT_CC_1_"):
        sample(study, calc_neg_dir="ben", mass_neg_dir="ben")


@pytest.mark.parametrize("killed", [False, True])
def test_patches_of_patients_of_the_other_set_are_refused(study, killed):
    """Of an earlier run with another split: whether it has written its tables or not."""
    out = sample(study)
    before = read_folder(out)
    if killed:
        for path in out.rglob("patches.csv"):
            path.unlink()
    with pytest.raises(InputError, match=r"out/val: has patches of 2 patients, such as P_.*new folders"):
        sample(study, out, val_size=0)
    sample(study, out)
    assert read_folder(out) == before
    other, *rest = {row["patient"] for row in read_rows(out / "train")}
    (study / "pat_train.txt").write_text("\n".join(rest))
    message = f"out/train: has patches of 1 patient, such as {other}, not in the train set"
    with pytest.raises(InputError, match=message):
        sample_patches_combined.run(*arguments(study, out)[:5], study / "new", **SMALL | {"val_size": 0})
    assert read_folder(out) == before and not (study / "new").exists()


def test_pictures_of_others_are_refused_in_class_folders_and_kept_elsewhere(study):
    other = study / "out/train/neg/P_9_LEFT_CC.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"mine")
    sample(study)
    path = study / "out/train/background/notes.png"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"background/notes\.png: not made by this script"):
        sample(study)
    assert path.read_bytes() == other.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"nb_abn": 1}, "nb_abn 3 there, 1 now"),
        ({"avoid_all_rois": True, "bkg_dir": "none"}, "avoid_all_rois False there, True now, bkg_dir background there"),
    ],
)
def test_patches_of_other_options_are_not_mixed(study, options, named):
    out = sample(study)
    before = read_folder(out)
    with pytest.raises(InputError, match=rf"out/train: has the work of a run with other options \({named}"):
        sample(study, out, **options)
    assert read_folder(out) == before
    shutil.rmtree(out / "train")
    with pytest.raises(InputError, match=rf"out/val: has the work of a run with other options \({named}"):
        sample(study, out, **options)
    sample(study, out)
    assert read_folder(out) == before


def test_fresh_replaces_patches_of_other_options_and_patients(study):
    out, options = sample(study, val_size=0.0), {"nb_abn": 2, "val_size": 0.5}
    sample(study, out, fresh=True, **options)
    assert read_folder(out) == read_folder(sample(study, study / "new", **options))


@pytest.mark.parametrize("change", ["patch gone", "patch damaged", "patch replaced", "image changed", "other lesions"])
def test_what_is_whole_is_not_sampled_again(study, change):
    """After a change to the first image, its patches alone are cut again, and all is as in new folders."""
    out = sample(study, val_size=0.0)
    for path in (out / "train").glob("*/*.png"):
        os.utime(path, ns=(1, 1))
    patch = out / "train/mass_ben/P_0_LEFT_CC_2_0001.png"
    image = study / "full_img/P_0_LEFT_CC.png"
    if change == "patch gone":
        patch.unlink()
    elif change == "patch damaged":
        patch.write_bytes(patch.read_bytes()[:-20])
    elif change == "patch replaced":
        shutil.copy(out / "train/mass_ben/P_0_LEFT_CC_2_0002.png", patch)
    elif change == "image changed":
        cv2.imwrite(str(image), 60_000 - cv2.imread(str(image), cv2.IMREAD_UNCHANGED))
    else:
        table = study / "roi_mask_path.csv"
        table.write_text(table.read_text().replace("P_0,LEFT,CC,2,BENIGN_WITHOUT_CALLBACK", "P_0,LEFT,CC,2,MALIGNANT"))
    sample(study, val_size=0.0)
    again = {path.name[:3] for path in (out / "train").glob("*/*.png") if path.stat().st_mtime_ns != 1}
    assert again == {"P_0"}
    assert read_folder(out) == read_folder(sample(study, study / "new", val_size=0.0))


@pytest.mark.parametrize("script", [sample_patches_combined, sample_patches_main])
def test_options_are_those_of_the_original(spec, script):
    name = Path(script.__file__).stem
    check_options(script.make_parser(), json.loads((spec / "cli_flags.json").read_text())[name])


@pytest.mark.parametrize("script", [sample_patches_combined, sample_patches_main])
def test_cutoffs_may_be_zero_as_in_the_original(script):
    paths = ["csv", "masks", "patients", "images", "train", "val"]
    args = script.make_parser().parse_args([*paths, "--neg-cutoff", "0", "--pos-cutoff", "0"])
    assert (args.neg_cutoff, args.pos_cutoff) == (0, 0)
