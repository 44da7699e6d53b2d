"""Images checked before a training: every cause found and counted, each file read once, by any number of threads."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.commands import check_data
from mammo.images import check as image_check
from mammo.images.check import check_image, check_images, report_faults, warn_of_types
from tests.helpers import png, read_csv


def picture(seed=0, dtype="uint16", shape=(40, 30)):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype)


def with_nan():
    img = picture().astype(np.float32)
    img[3, 3] = np.nan
    return cv2.imencode(".tif", img)[1].tobytes()


def with_wrong_byte(data):
    """In the compressed pixels: the checksum of the chunk is then wrong."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


# What the file holds (None: not there), by name: the cause expected.
FAULTS = {
    "gone.png": (None, "unreadable"),
    "empty.png": (b"", "empty"),
    "half.png": (png(picture())[:500], "truncated"),
    "half.jpg": (cv2.imencode(".jpg", picture(0, "uint8"))[1].tobytes()[:500], "truncated"),
    "byte.png": (with_wrong_byte(png(picture())), "damaged"),
    "text.png": (b"no image", "wrong type"),
    "colour.png": (png(picture(0, "uint8", (40, 30, 3))), "colour"),
    "nan.tif": (with_nan(), "not finite"),
    "constant.png": (png(np.full((40, 30), 7, np.uint16)), "constant"),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two good images of 16 bits and one of 8, and one of each fault but a missing file."""
    for name, dtype in (("a.png", "uint16"), ("b.png", "uint16"), ("c.png", "uint8")):
        write(tmp_path / "images" / name, png(picture(1, dtype)))
    for name, (content, _) in FAULTS.items():
        write(tmp_path / "images" / "bad" / name, content)
    return tmp_path / "images"


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_has_its_cause(tmp_path, name):
    content, cause = FAULTS[name]
    check = check_image(write(tmp_path / name, content))
    assert check.cause == cause
    assert check.message.startswith(f"{tmp_path / name}: ")
    assert check.bytes == (-1 if content is None else len(content))


def test_what_cannot_be_opened_is_unreadable(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    for name in ("folder.png", "link.png"):
        assert check_image(tmp_path / name).cause == "unreadable"


def test_a_good_image_is_described(tmp_path):
    path = write(tmp_path / "a.png", png(picture()))
    status = path.stat()
    check = check_image(path)
    assert check == (str(path), status.st_size, status.st_mtime_ns, "uint16", 40, 30, "", "")


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_checks_are_the_same_for_any_number_of_threads(folder, jobs):
    paths = [*sorted(folder.rglob("*.*")), folder / "gone.png", folder / "a.png"]
    checks = check_images(paths, jobs=jobs)
    assert [check.file for check in checks] == list(map(str, paths))
    expected = {name: cause.replace("constant", "") for name, (_, cause) in FAULTS.items()}
    assert [check.cause for check in checks] == [expected.get(path.name, "") for path in paths]
    assert {check.cause for check in check_images(paths, allow_constant=False, jobs=jobs)} > {"constant"}


@pytest.fixture
def counted(monkeypatch):
    """The files that are read."""
    read, check = [], image_check.check_image

    def counting(path, gs_255=False):
        read.append(os.path.basename(path))
        return check(path, gs_255)

    monkeypatch.setattr(image_check, "check_image", counting)
    return read


def test_files_are_read_once_until_they_change(folder, tmp_path, counted):
    paths, table = sorted(folder.rglob("*.*")), tmp_path / "table.csv"
    first = check_images(paths, table, allow_constant=False)
    assert sorted(counted) == sorted(path.name for path in paths)
    # Faults are looked at again, but for one that no decoder or permission could mend.
    counted.clear()
    assert check_images(paths, table, allow_constant=False) == first
    assert sorted(counted) == sorted({path.name for path in (folder / "bad").iterdir()} - {"constant.png"})

    counted.clear()
    good = [path for path in paths if path.parent == folder]
    write(folder / "a.png", png(picture(2, "uint16", (50, 60))))  # another size
    os.utime(folder / "b.png", ns=(0, 0))  # another time
    (folder / "c.png").unlink()
    checks = check_images(good, table)
    assert sorted(counted) == ["a.png", "b.png", "c.png"]
    found = [(check.rows, check.columns, check.cause) for check in checks]
    assert found == [(50, 60, ""), (40, 30, ""), (0, 0, "unreadable")]
    for row, check in zip(read_csv(table), checks, strict=True):
        assert (row["file"], row["rows"], row["cause"]) == (check.file, str(check.rows), check.cause)


@pytest.mark.parametrize("content", [b"", b"file,bytes\nx,1\n", b"\xff\xfe\0", None])
def test_a_table_that_is_not_ours_saves_nothing(folder, tmp_path, counted, content):
    table = tmp_path / "table.csv"
    check_images([folder / "a.png"], table)
    if content is None:  # one of our rows is damaged
        content = table.read_bytes().replace(b"uint16,40,", b"uint16,forty,")
    write(table, content)
    assert check_images([folder / "a.png"], table)[0].rows == 40
    assert counted == ["a.png", "a.png"]


def test_what_was_read_is_kept_when_interrupted(folder, tmp_path, monkeypatch):
    paths, table, check = sorted(folder.glob("*.png")), tmp_path / "table.csv", image_check.check_image

    def interrupted(path, gs_255=False):
        if path.endswith("c.png"):
            raise KeyboardInterrupt
        return check(path, gs_255)

    monkeypatch.setattr(image_check, "check_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check_images(paths, table, jobs=1)
    assert [Path(row["file"]).name for row in read_csv(table)] == ["a.png", "b.png"]


def test_faults_are_listed_by_cause(folder, capsys):
    for name in ("1.png", "2.png", "3.png"):
        write(folder / "bad" / "empty" / name, b"")
    checks = check_images(sorted(folder.rglob("*.*")), allow_constant=False)
    with pytest.raises(InputError, match=r"^11 images cannot be used; t\.csv lists all\. The first: .*byte\.png: "):
        report_faults(checks, "t.csv")
    shown = capsys.readouterr().out
    report_faults(checks, "t.csv", on_error="skip")
    assert capsys.readouterr().out == shown
    lines = shown.splitlines()
    assert lines[0] == "11 of 14 images cannot be used:"
    empty = lines.index("  empty: 4, such as")
    assert lines[empty + 1 : empty + 4] == [f"    {folder}/bad/empty/{i}.png" for i in "123"]
    counts = dict(line.strip().removesuffix(", such as").split(": ") for line in lines[1:] if ": " in line)
    single = dict.fromkeys(("damaged", "wrong type", "not finite", "colour", "constant"), "1")
    assert counts == {"empty": "4", "truncated": "2"} | single
    report_faults([check for check in checks if not check.cause])
    assert capsys.readouterr().out == ""


def test_mixed_pixel_types_are_warned_of(folder, capsys):
    checks = check_images(sorted(folder.rglob("*.*")))
    warn_of_types(checks)
    message = capsys.readouterr().err
    assert "Received 3 of uint16, 1 of uint8, such as" in message and message.rstrip().endswith("c.png")
    warn_of_types([check for check in checks if check.type != "uint8"])
    assert capsys.readouterr().err == ""


# -------------------------------------------------------------------------------------------- the command line


def run_script(*arguments, **options):
    command = [sys.executable, "-m", "mammo", "check-data", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_the_script_lists_faults_and_fails(folder, tmp_path):
    run = run_script(folder, cwd=tmp_path)
    assert run.returncode == 1
    assert run.stdout.startswith("pixel types: uint16 (2), uint8 (1)\nsizes: 40 x 30 (3)\n11 images listed in ")
    assert "8 of 11 images cannot be used:" in run.stdout
    [*_, line] = run.stderr.splitlines()
    assert line.startswith("mammo check-data: error: 8 images cannot be used; data_check.csv lists")
    assert len(read_csv(tmp_path / "data_check.csv")) == 11


def test_a_name_that_is_no_text_is_one_line(folder, tmp_path, capsys):
    (folder / "a.png").rename(folder / os.fsdecode(b"M\xfcller.png"))
    assert check_data.main([str(folder), "--table", str(tmp_path / "t.csv")]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "M?ller.png" in line
    assert line.endswith("Expected file names in UTF-8. Received other bytes in one; rename it")


def test_the_script_accepts_good_images(folder, tmp_path, capsys):
    table = tmp_path / "t.csv"
    given = [folder / "a.png", folder / "bad/constant.png"]
    assert check_data.main([*map(str, given), "--table", str(table), "--allow-constant", "--jobs", "2"]) == 0
    figures = "pixel types: uint16 (2)\nsizes: 40 x 30 (2)\n"
    assert capsys.readouterr() == (f"{figures}2 images listed in {table}: all of them can be used\n", "")
    assert check_data.main([*map(str, given), "--table", str(table)]) == 1
    assert "constant image: all pixels are 7" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["none", "0"])
def test_a_wrong_number_of_threads_is_one_line(folder, tmp_path, monkeypatch, capsys, variable):
    monkeypatch.setenv("NUM_CPU_CORES", variable)
    assert check_data.main([str(folder), "--table", str(tmp_path / "t.csv")]) == 1
    assert capsys.readouterr().err.count(": error: environment variable NUM_CPU_CORES: Expected ") == 1


# ---------------------------------------------------------------------------------------- before and in a training

CLASSES = ("neg", "pos")
TRAINER = {
    "img_size": [64, 64], "rescale_factor": 0.003891, "featurewise_mean": 44.0, "equalize_hist": False,
    "net": "yaroslav", "nb_init_filter": 1, "use_pretrained": False, "class_list": list(CLASSES), "batch_size": 4,
    "nb_epoch": 1, "all_layer_epochs": 1, "augmentation": False,
}  # fmt: skip


@pytest.fixture
def sets(tmp_path):
    """Five images a class of training, validation and test."""
    for seed, (part, label, k) in enumerate(itertools.product(("train", "val", "test"), CLASSES, range(5))):
        img = picture(seed, "uint16", (64, 64)) // 4 + (32000 if label == "pos" else 0)
        write(tmp_path / part / label / f"{part}{k}.png", png(img.astype(np.uint16)))
    return tmp_path


def train(sets, **options):
    from ddsm_train import patch_clf_train

    folders = {f"{part}_dir": str(sets / part) for part in ("train", "val", "test")}
    return patch_clf_train.run(**TRAINER | folders | {"best_model": str(sets / "out" / "best.h5")} | options)


def test_training_does_not_begin_with_faults_in_any_set(sets, capsys):
    write(sets / "train/neg/empty.png", b"")
    write(sets / "val/pos/text.png", b"no image")
    write(sets / "test/neg/constant.png", FAULTS["constant.png"][0])
    table = sets / "out/best/data_check.csv"
    with pytest.raises(InputError, match=rf"^2 images cannot be used; {table} lists all\. The first: .*empty\.png: "):
        train(sets)
    shown = capsys.readouterr().out
    assert "2 of 33 images cannot be used:\n  empty: 1, such as\n" in shown and "  wrong type: 1, such as\n" in shown
    assert {row["file"]: row["cause"] for row in read_csv(table) if row["cause"]} == {
        str(sets / "train/neg/empty.png"): "empty", str(sets / "val/pos/text.png"): "wrong type",
        str(sets / "test/neg/constant.png"): "constant",
    }  # fmt: skip
    assert not (sets / "out/best/history.csv").exists()


def test_each_image_is_read_once_before_training(sets, counted, monkeypatch):
    """Also those of sets that go to memory, so that all that are at fault are listed; without a check, none are."""
    from ddsm_train import training

    class StopHere(Exception):
        pass

    def stop(*args, **kwargs):
        raise StopHere

    monkeypatch.setattr(training, "sample_images", stop)  # all sets are made by then

    def begin(**options):
        counted.clear()
        with pytest.raises(StopHere):
            train(sets, **options)
        return [sum(name.startswith(part) for name in counted) for part in ("train", "val", "test")]

    assert begin(load_train_ram=True) == [10, 10, 10]
    assert begin() == [0, 0, 0]
    assert begin(on_error="skip") == [0, 0, 0]
    assert begin(best_model="NOSAVE", check_data=False) == [0, 0, 0]
    assert begin(best_model="NOSAVE", on_error="skip") == [10, 10, 10]
    write(sets / "val/neg/val1.png", png(picture(1, "uint16", (50, 50))))
    assert begin(load_val_ram=True) == [0, 1, 0]


def lose_images(sets, training, monkeypatch):
    """Let one image of each set vanish once training begins; return what they held."""
    start = training.train_run
    lost = [sets / part / "neg" / f"{part}3.png" for part in ("train", "val", "test")]

    def lose_and_train(*args, **kwargs):
        for path in lost:
            path.unlink()
        return start(*args, **kwargs)

    monkeypatch.setattr(training, "train_run", lose_and_train)
    return {path: path.read_bytes() for path in lost}


@pytest.mark.slow
def test_images_lost_during_training_count_nowhere(sets, monkeypatch, capsys):
    """One of each set vanishes once training begins: losses, AUCs and predictions are those without them."""
    import pandas as pd

    from ddsm_train import training

    start = training.train_run
    write(sets / "train/pos/text.png", b"no image")
    lost = lose_images(sets, training, monkeypatch)
    train(sets, on_error="skip", final_model=str(sets / "out/final.h5"))
    shown = capsys.readouterr()
    table = pd.read_csv(sets / "out/best/predictions.csv")
    names = [f"{label}/test{k}.png" for label in CLASSES for k in range(5)]
    assert list(table.file) == [name for name in names if name != "neg/test3.png"]
    assert list(table.label) == [name.split("/")[0] for name in table.file]
    for path in (*lost, sets / "train/pos/text.png"):
        assert f"skipped: {path}: " in shown.err
    assert "warning: 2 of 11 training images skipped" in shown.err
    assert "warning: 1 of 10 test images skipped" in shown.err

    monkeypatch.setattr(training, "train_run", start)
    train(sets, on_error="skip", resume_from=str(sets / "out/best.h5"), nb_epoch=0, all_layer_epochs=0,
          best_model=str(sets / "out/again.h5"))  # fmt: skip
    again = pd.read_csv(sets / "out/again/predictions.csv")
    pd.testing.assert_frame_equal(table, again, rtol=1e-5)


@pytest.mark.slow
def test_a_training_that_lost_images_is_resumed_to_the_same_end(sets, monkeypatch):
    """They are lost for good, so that the order of the others is that of the uninterrupted training."""
    import pandas as pd

    from ddsm_train import training

    start = training.train_run
    options = {"on_error": "skip", "nb_epoch": 4, "all_layer_epochs": 4}
    lost = lose_images(sets, training, monkeypatch)

    def begin(name, **more):
        train(sets, best_model=str(sets / f"{name}.h5"), **options | more)

    begin("whole")
    for path, content in lost.items():
        path.write_bytes(content)

    epoch_begin = training.HistoryFile.on_epoch_begin

    def interrupt(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt
        return epoch_begin(self, epoch, logs)

    with monkeypatch.context() as context:
        context.setattr(training.HistoryFile, "on_epoch_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            begin("stopped")
    monkeypatch.setattr(training, "train_run", start)
    begin("stopped")
    for name in ("history.csv", "predictions.csv"):
        whole, resumed = (pd.read_csv(sets / run / name) for run in ("whole", "stopped"))
        pd.testing.assert_frame_equal(whole, resumed, rtol=1e-3)
