"""What holds for every data set: whole images, lists and report, going on, splits, options, faults, several workers."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest

from mammo.base.files import InputError
from mammo.commands.prepare import DATA_SETS, main
from mammo.data.prepare import make_whole, read_image_table
from mammo.images.reading import parse_image_name
from mammo.phantom.cbis_ddsm import write_dicom
from tests.data.phantoms import OWN, SIZE, WHOLE, images_of, prepare
from tests.helpers import files_of, read_folder, read_png, read_report

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


# ------------------------------------------------------------------------------------------------------ outputs


def test_whole_images_are_those_of_the_files(prepared):
    made, out, report = prepared
    found = images_of(out)
    assert found.keys() == made.keys()
    lossy = made.name == "cbis-ddsm" and made.odd["tree"] == "jpeg"
    for name, path in found.items():
        whole, expected = read_png(out / path), make_whole(made[name], WHOLE["img_size"])
        assert whole.dtype == np.uint16
        if lossy:
            assert np.abs(whole / 257 - expected / 257).mean() < 2
        else:
            np.testing.assert_array_equal(whole, expected)
        assert path.split("/")[1] == ("pos" if name in made.positive else "neg")
    assert report["counts"]["images_prepared"] == len(made)


def test_table_and_lists_tell_sets_patients_and_sources(prepared):
    made, out, report = prepared
    table = read_image_table(out / "images.csv")
    assert sorted(table["file"]) == sorted(images_of(out).values())
    lists = {name: (out / f"pat_{name}.txt").read_text().split() for name in ("train", "val", "test")}
    for row in table.itertuples():
        name = Path(row.file).stem
        assert made.sources[name] in (None, row.source) and (made.folder / row.source).is_file()
        assert row.file == f"{row.set}/{row.label}/{name}.png"
        assert parse_image_name(name) == (row.patient, row.side, row.view)
        assert [part for part, patients in lists.items() if row.patient in patients] == [row.set]
    assert sorted(patient for patients in lists.values() for patient in patients) == sorted(set(table["patient"]))
    assert all(numbers["images"] for numbers in report["sets"].values())
    assert sum(numbers["images"] for numbers in report["sets"].values()) == len(made)
    assert len(report["skipped"]) == made.faults
    if made.name in OWN:
        assert all(numbers["positive_images"] for numbers in report["sets"].values())
        assert report["near_duplicates"] == []


def test_featurewise_mean_is_that_of_the_training_images(prepared):
    _, out, report = prepared
    images = [read_png(path) for path in (out / "train").rglob("*.png")]
    assert {(img.shape, img.dtype.name) for img in images} == {(tuple(WHOLE["img_size"]), "uint16")}
    assert report["rescale_factor"] == 0.003891
    assert report["featurewise_mean"] == pytest.approx(0.003891 * np.mean(images), abs=1e-3)


def test_everything_listed_is_counted(prepared):
    *_, report = prepared
    for listed in (report["repairs"], report.get("excluded", {})):
        assert all(kind["count"] == len(kind["items"]) for kind in listed.values())
    assert all(kind["why"] for kind in report.get("excluded", {}).values())


# --------------------------------------------------------------------------------------------- again, and going on


def test_second_run_keeps_all_but_the_faulty(prepared, capsys):
    made, out, report = prepared
    changed = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*.png")}
    content = read_folder(out)
    assert prepare(made.name, made.folder, out, **made.options) == report
    printed = capsys.readouterr().out
    assert read_folder(out) == content
    assert sum(path.stat().st_mtime_ns != before for path, before in changed.items()) <= made.faults
    if not made.faults:
        assert f"{len(made)} of {len(made)} images are there from an earlier run" in printed
    assert ("names no patients: each exam counts as one" in printed) == (made.name == "nyu")


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_any_number_of_jobs_gives_the_same_files(plain, tmp_path, backend):
    plain.prepare(tmp_path / "out", jobs=2, backend=backend)
    assert read_folder(tmp_path / "out") == read_folder(plain.ready)


def test_killed_process_goes_on_and_ends_with_the_same_files(plain, tmp_path):
    out, size = tmp_path / "out", [768, 576]
    command = [sys.executable, "-m", "mammo", "prepare", *plain.command(plain.folder, out, "--img-size", *size)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(made := list(out.glob("[tv]*/*/[!.]*.png"))) < 2:
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert not (out / "report.json").exists()
    kept = {path: os.stat(path).st_mtime_ns for path in made}
    plain.prepare(out, img_size=size)
    assert any(os.stat(path).st_mtime_ns == changed for path, changed in kept.items())
    plain.prepare(tmp_path / "fresh", img_size=size)
    assert read_folder(out) == read_folder(tmp_path / "fresh")


def test_output_folder_inside_the_data_is_not_searched(plain, copy):
    before = read_folder(copy)
    for out in (copy / "prepared", copy):
        first = plain.prepare(out, copy)
        content = read_folder(out)
        assert files_of(plain.ready).items() <= content.items()
        assert plain.prepare(out, copy) == first
        assert read_folder(out) == content
        if out != copy:
            shutil.rmtree(out)
    assert content.keys() - read_folder(plain.ready).keys() == before.keys()


def test_foreign_files_among_the_images_are_refused(plain, tmp_path):
    shutil.copytree(plain.ready, tmp_path / "out")
    (tmp_path / "out/train/neg/mine.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"mine\.png: not made by this script"):
        plain.prepare(tmp_path / "out")


# -------------------------------------------------------------------------------------------------------- splits


def test_test_set_of_the_data_is_kept(prepared_data):
    _, out, report = prepared_data("vindr")
    assert (out / "pat_test.txt").read_text().split() == [f"{number:032x}" for number in (8, 9, 10)]
    assert report["sets"]["val"]["patients"] == 2  # one of each class


def test_another_split_is_refused_or_moves_whole_images(plain, tmp_path):
    out = tmp_path / "out"
    plain.prepare(out, random_state=1)
    before = read_folder(out)
    with pytest.raises(InputError, match=r"out: has the work .* \(random_state 1 there, 12345 now\).*--fresh"):
        plain.prepare(out)
    assert read_folder(out) == before
    plain.prepare(out, fresh=True)
    assert read_folder(out) == read_folder(plain.ready)


def write_lists(folder, **lists):
    for name, patients in lists.items():
        (folder / name).write_text("".join(f"{patient}\n" for patient in patients))
    return {"split": "lists"} | {f"pat_{name}": str(folder / name) for name in lists}


def test_split_by_lists(plain, tmp_path):
    """The last patient is in no set: CBIS-DDSM makes its full image for the sampler, and no other anything."""
    *_, left = patients = plain.owners
    lists = write_lists(tmp_path, train=["patient_id", *patients[:2]], val=patients[2:3], test=patients[3:-1])
    report = plain.prepare(tmp_path / "out", **lists)
    sizes = {"train": 2, "val": 1, "test": len(patients) - 4}
    assert {name: counts["patients"] for name, counts in report["sets"].items()} == sizes
    assert report["counts"]["patients_in_no_set"] == 1
    assert (tmp_path / "out/pat_train.txt").read_text().split() == patients[:2]
    found = [path.parent.name for path in (tmp_path / "out").rglob(f"{left}*.png")]
    assert found == (["full_img"] if plain.name == "cbis-ddsm" else [])


@pytest.mark.parametrize(
    "fault, message", [("twice", "1 patient in both train and test, such as "), ("x", "such as x")]
)
def test_lists_with_faults_are_refused(plain, tmp_path, fault, message):
    patients = plain.owners
    lists = {"train": patients[:2], "val": patients[2:3], "test": patients[3:]}
    lists["test"].append(patients[0] if fault == "twice" else fault)
    with pytest.raises(InputError, match=message):
        plain.prepare(tmp_path / "out", **write_lists(tmp_path, **lists))


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "no output folder given"),
        (["out", "--split", "lists"], "Missing --pat-train, --pat-val, --pat-test"),
        (["out", "--pat-test", "test.txt"], "--pat-test: Expected --split lists. Received --split "),
    ],
)
def test_bad_options_are_named(plain, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main([plain.name, str(plain.folder), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(plain, capsys):
    before = read_folder(plain.folder)
    assert main([plain.name, str(plain.folder), "--dry-run"]) == 0
    patients = len(plain.owners)
    assert f"no patient is in two sets: {patients} places, {patients} patients" in capsys.readouterr().out
    assert read_folder(plain.folder) == before


def test_whole_image_options_leave_the_rest_alone(plain, tmp_path):
    options = {"resize": "pad", "segment_breast": True, "auto_levels": True, "face": "left"}
    plain.prepare(tmp_path / "out", **options)
    before, files = read_folder(plain.ready), read_folder(tmp_path / "out")
    full = ("full_img",) if plain.name == "cbis-ddsm" else ()  # INbreast's has the levels too
    kept = {name for name in files if name.startswith((*full, "roi_mask", "pat_"))}
    assert all(files[name] == before[name] for name in kept)
    if plain.name == "cbis-ddsm":
        levels = {"resize": "pad", "segment_breast": True, "levels": True, "face": "left"}
        for path in (tmp_path / "out").glob("t*/*/*.png"):
            full = read_png(tmp_path / "out/full_img" / path.name)
            np.testing.assert_array_equal(read_png(path), make_whole(full, (72, 56), **levels))


def test_help_is_of_one_data_set_and_loads_nothing_heavy():
    """In one process; each has its own options and no others."""
    code = (
        "import sys\nfrom mammo.commands.prepare import DATA_SETS, main\n"
        "for name in [[], *[[name] for name in DATA_SETS]]:\n"
        "    try: main([*name, '--help'])\n    except SystemExit: print('====')\n"
        "heavy = {'keras', 'tensorflow', 'pandas', 'pydicom', 'sklearn', 'joblib', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    names, *helps = done.stdout.split("====\n")[:-1]
    assert all(f"\n  {name} " in names for name in DATA_SETS)
    own = {
        "--csv-dir": ["cbis-ddsm"], "--roi-masks": ["inbreast"], "--neg-birads": ["inbreast", "vindr"],
        "--table": ["inbreast", "csv", "cmmd", "vindr", "mias", "nyu"], "--patient-regex": ["csv", "folders"],
        "--file-column": ["csv"], "--neg-labels": ["csv", "folders"], "--voi-lut": list(OWN),
    }  # fmt: skip
    for option, having in own.items():
        assert [name for name, text in zip(DATA_SETS, helps, strict=True) if option in text] == having


@pytest.mark.parametrize("words", [[], ["foo"], ["--foo"], ["csv", "x"]])
def test_command_lines_without_a_data_set_are_refused(words, capsys):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2 and "error: " in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- faults


def test_bad_image_is_named_and_all_others_are_done(plain, copy, tmp_path, capsys):
    """It is left out, ends the run, or is left out without an error; mended, it is made and the rest is kept."""
    image, file = next(iter(plain.files.items()))
    (copy / file).write_bytes((copy / file).read_bytes()[:-100])
    out = tmp_path / "out"
    command = plain.command(copy, out)
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "images or masks at fault: 1, all others done" in error
    assert Path(file).name in error and error.count("\n") == 1 and "--on-error skip" in error
    report = read_report(out)
    (skipped,) = report["skipped"]
    assert skipped["image"] == image and file in skipped["reason"]
    counts = report["counts"]
    assert (counts["images_prepared"], counts["images_skipped"]) == (len(plain.files) - 1, 1)
    assert not list(out.rglob(f"*{image}*"))
    others = {patient for name, patient in plain.patients.items() if name != image}
    assert {line for path in out.glob("pat_[!s]*.txt") for line in path.read_text().split()} == others
    assert main([*command, "--on-error", "skip"]) == 0
    assert main([*command, "--on-error", "stop"]) == 1
    assert not (out / "report.json").exists()
    shutil.copy(plain.folder / file, copy / file)
    assert main(command) == 0
    assert files_of(out) == files_of(plain.ready)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def write_pixels(path, pixels, **options):
    write_dicom(path, pixels, PatientID=pydicom.dcmread(path).PatientID, **options)


def rename(path, pattern, new):
    path.rename(path.with_name(re.sub(pattern, new, path.name, count=1)))


DAMAGE = {
    "missing": (lambda path: path.unlink(), {"cbis-ddsm": "no image of ", "inbreast": "line 2: no DICOM file: "}),
    "empty": (
        lambda path: path.write_bytes(b""),
        {"cbis-ddsm": "cannot read the header", "inbreast": "the image file is empty"},
    ),
    "truncated": (cut, dict.fromkeys(("cbis-ddsm", "inbreast"), "cannot decode this DICOM file")),
    "text": (
        lambda path: path.write_text("no DICOM file, though it is named so"),
        {"cbis-ddsm": "cannot read the header", "inbreast": "this DICOM file holds no pixels"},
    ),
    "constant": (
        lambda path: write_pixels(path, np.full(SIZE, 9, np.uint16)),
        {"cbis-ddsm": "constant", "inbreast": "constant image: all pixels are "},
    ),
    "two values": (
        lambda path: write_pixels(path, np.repeat(np.uint16([[0], [65535]]), SIZE[1], 1)),
        {"cbis-ddsm": "the image has two values, as masks have"},
    ),
    "more bits than stored": (
        lambda path: write_pixels(path, np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE), bits=12),
        {"inbreast": "pixels do not fit the 12 bits"},
    ),
    "name without patient": (
        lambda path: rename(path, r"_.*", ".dcm"),
        {"inbreast": "AllDICOMs/20586900.dcm: the name tells no patient: Expected 20586900_<patient>_MG_"},
    ),
    "name of another view": (
        lambda path: rename(path, "_CC_", "_ML_"),
        {"inbreast": "CC, but its DICOM file is called AllDICOMs/20586900_"},
    ),
    "name of another side": (
        lambda path: rename(path, "_([LR])_", lambda match: "_R_" if match[1] == "L" else "_L_"),
        {"inbreast": "CC, but its DICOM file is called AllDICOMs/20586900_"},
    ),
    "files of 2 patients": (
        lambda path: shutil.copy(path, path.with_name(re.sub("_[0-9a-z]+_MG", "_0123456789abcdef_MG", path.name))),
        {"inbreast": "line 2: DICOM files of 2 patients: Expected one. Received AllDICOMs/20586900_"},
    ),
}


@pytest.mark.parametrize("name, how", [(name, how) for how, (_, says) in DAMAGE.items() for name in says])
def test_every_fault_of_an_image_is_said(plain_data, tmp_path, name, how):
    plain = plain_data(name)
    damage, says = DAMAGE[how]
    image, file = next(iter(plain.files.items()))
    folder = shutil.copytree(plain.folder, tmp_path / "copy")
    damage(folder / file)
    report = prepare(name, folder, tmp_path / "out", on_error="skip")
    (skipped,) = report["skipped"]
    assert says[name] in skipped["reason"] and "\n" not in skipped["reason"]
    place = file.split("/")[1] if name == "cbis-ddsm" else Path(file).name.split("_")[0]
    assert place in skipped["reason"]
    assert report["counts"]["images_prepared"] == len(plain.files) - 1
    assert not list((tmp_path / "out").rglob(f"*{image}*"))


def change(old, new, count=1):
    """Function that replaces the pattern `old`."""
    return lambda text: re.sub(old, new, text, count=count)


def without(column):
    """Function that removes a column."""

    def remove(text):
        place = text.split("\r\n")[0].split(";").index(column)
        rows = [line.split(";") for line in text.split("\r\n")[:-1]]
        return "".join(";".join(row[:place] + row[place + 1 :]) + "\r\n" for row in rows)

    return remove


CBIS, INBREAST = ("cbis-ddsm", "mass_case_description_train_set.csv"), ("inbreast", "INbreast.csv")
BIRADS = "line 2: unknown Bi-Rads: Expected "
NUMBER = "line 2: unknown File Name: Expected a number as in 20588072. Received "


@pytest.mark.parametrize(
    "table, change, message",
    [
        (CBIS, change("pathology", "outcome", 0), "line 1: missing columns pathology"),
        (CBIS, change("image file path", "x"), "line 1: missing columns image file path. Received "),
        (CBIS, change(",LEFT,", ",LFET,"), "unknown side: Expected LEFT or RIGHT. Received 'LFET'"),
        (CBIS, change(",CC,", ",XCCL,"), "line 2: unknown view: Expected CC or MLO. Received 'XCCL'"),
        (CBIS, change(",BENIGN", ",HARMLESS"), "unknown pathology: Expected MALIGNANT"),
        (CBIS, change(",mass,", ",lump,"), "line 2: unknown type"),
        (CBIS, change("\nP_", "\nQ_"), "line 2: unknown patient: Expected an id like P_00001. Received 'Q_"),
        (CBIS, change("CC,1,", "CC,one,"), "unknown abnormality id"),
        (CBIS, change(r"Mass-\w+/", "../"), "line 2, image file path: Expected a path below"),
        (CBIS, change(r"Mass-\w+/", r"E:\\DDSM\\..\\"), "line 2, image file path: Expected a path below"),
        (CBIS, change(r"P_(\d+)_(LEFT|RIGHT)", "P_99999_RIGHT"), "line 2: the image path is of another"),
        (CBIS, lambda text: text[:-40], "cells. Received|is the file whole|unexpected end of data"),
        (CBIS, lambda text: "", "line 1: missing columns"),
        (INBREAST, change(r"(\n.*;)\w+\r", r"\g<1>7\r"), BIRADS + "0, 1, 2, 3, 4, 4a, 4b, 4c, 5, 6. Received '7'"),
        (INBREAST, change(r"(\n.*;)\w+\r", r"\1\r"), BIRADS + "0, 1"),
        (INBREAST, change(";[LR];", ";B;"), "line 2: unknown Laterality: Expected L, R. Received 'B'"),
        (INBREAST, change(";CC;", ";XCC;"), "line 2: unknown View: Expected CC, MLO, ML, FB. Received 'XCC'"),
        (INBREAST, change("20586900", "IMG1"), NUMBER + "'IMG1'"),
        (INBREAST, change("20586900", "1" * 5000), NUMBER + "'1111"),
        (INBREAST, change(r"(\n.*;)(\w+)\r", r"\1\2\r\g<1>6\r"), "line 3: another row of File Name 20586900"),
        (INBREAST, without("Bi-Rads"), "line 1: missing columns bi-rads. Received Patient ID, "),
        (INBREAST, without("Laterality"), "line 1: missing columns laterality. Received Patient ID,"),
        (INBREAST, change(r"(\n.*);\w+\r", r"\1\r"), "line 2: Expected 8 cells. Received 7"),
        (INBREAST, lambda text: "\udcff\udcfe\0\1", "INbreast.csv: not a text file"),
        (INBREAST, lambda text: text.partition("\n")[0] + "\n", "INbreast.csv: no rows below the header"),
        (INBREAST, lambda text: "", "line 1: missing columns file name, laterality, view, bi-rads. Received nothing"),
        (INBREAST, lambda text: None, "no table: Expected INbreast.csv or .xls there or below"),
    ],
)  # fmt: skip
def test_bad_table_is_named_before_anything_is_written(plain_data, tmp_path, capsys, table, change, message):
    name, file = table
    folder = shutil.copytree(plain_data(name).folder, tmp_path / "copy")
    text = (folder / file).read_bytes().decode()
    changed = change(text)
    assert changed != text
    if changed is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(changed.encode(errors="surrogateescape"))
    assert main([name, str(folder), str(tmp_path / "out"), "--on-error", "skip"]) == 1
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")) and error.count("\n") == 1
    assert str(folder / file if changed is not None else folder) in error
    assert not (tmp_path / "out").exists()
