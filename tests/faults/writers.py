"""Each kind of output written where it cannot be. In a process of its own: HDF5 may crash Python after a failed write.

  python -m tests.faults.writers FOLDER limit|full|read-only ...     a JSON line for each writer: see `disturb`

FOLDER is empty; for `full` and `read-only` it is a small file system of its own, whose mounting is allowed.
"""

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from mammo.base.cli import run_main
from mammo.base.files import write_img
from mammo.data.prepare import ImageRow, write_image_table
from mammo.maps.draw import draw_overlays
from mammo.maps.files import Grid, HeatmapRecord, save_heatmaps
from mammo.maps.trees import HeatmapClassifier, make_model, save_classifier
from mammo.phantom.cbis_ddsm import write_dicom
from mammo.train import checkpoint
from mammo.train.callbacks import plot_history
from mammo.train.scoring import write_test_results

# Of the largest file that a writer makes: how much may be written before the disk is full.
SHARES = (0.0, 0.5, 0.9)


def model(folder: Path, number: int, name: str) -> None:
    keras.utils.set_random_seed(number)
    inputs = keras.Input((40,))
    checkpoint.save_model(keras.Model(inputs, keras.layers.Dense(300)(inputs)), folder / name)


def image(folder: Path, number: int, name: str, dtype: str) -> None:
    pixels = np.random.default_rng(number).integers(0, np.iinfo(dtype).max, (60, 50))
    write_img(folder / name, pixels.astype(dtype))


def records(number: int, **files) -> list[HeatmapRecord]:
    maps = np.random.default_rng(number).random((20, 15, 2), dtype=np.float32)
    grid = Grid((60, 50), (2.0, 2.0), (3.0, 3.0))
    return [HeatmapRecord("P_1", "LEFT", 1, cc=maps, cc_grid=grid, **files)]


def maps(folder: Path, number: int, name: str) -> None:
    save_heatmaps(folder / name, records(number), class_names=["neg", "pos"], strides=(3, 3))


def overlay(folder: Path, number: int) -> None:
    source = folder.with_suffix(".source.png")
    if not source.exists():
        image(source.parent, 0, source.name, "uint16")
    draw_overlays(records(number, cc_file=str(source))[0], folder, class_names=["neg", "pos"])


def classifier(folder: Path, number: int, name: str) -> None:
    rng = np.random.default_rng(number)
    trees = make_model("rf", 5, number).fit(rng.random((40, 3)), np.arange(40) % 2)
    save_classifier(folder / name, HeatmapClassifier(trees, [0.5], 1, {}))


def results(folder: Path, number: int) -> None:
    scores = np.random.default_rng(number).random(40)
    predictions = {"single": np.stack([1 - scores, scores], axis=1)}
    names = [f"pos/{i}.png" for i in range(40)]
    write_test_results(folder, names, np.eye(2)[np.arange(40) % 2], predictions, ["neg", "pos"])


def history(folder: Path, number: int) -> None:
    values = np.random.default_rng(number).random(30)
    table = pd.DataFrame({"epoch": np.arange(30) + 1, "loss": values, "val_loss": values[::-1]})
    plot_history(folder / "history.png", table)


def image_table(folder: Path, number: int) -> None:
    rows = [ImageRow(f"train/neg/{number}_{i}.png", "train", "neg", f"P_{i}", "LEFT", "CC", "a") for i in range(99)]
    write_image_table(folder / "images.csv", rows)


def dicom(folder: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 4000, (60, 50)).astype(np.uint16)
    write_dicom(folder / "image.dcm", pixels, PatientID="P_1")


# By name: what writes, into a folder and given a number, files whose content depends on the number.
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "model.h5": lambda folder, number: model(folder, number, "best.h5"),
    "model.keras": lambda folder, number: model(folder, number, "best.keras"),
    "model.weights.h5": lambda folder, number: model(folder, number, "best.weights.h5"),
    "patches and prepared images": lambda folder, number: image(folder, number, "a.png", "uint16"),
    "jpeg": lambda folder, number: image(folder, number, "a.jpg", "uint8"),
    "maps.npz": lambda folder, number: maps(folder, number, "maps.npz"),
    "maps.h5": lambda folder, number: maps(folder, number, "maps.h5"),
    "maps.pkl": lambda folder, number: maps(folder, number, "maps.pkl"),
    "overlays": overlay,
    "classifier.skops": lambda folder, number: classifier(folder, number, "forest.skops"),
    "classifier.joblib": lambda folder, number: classifier(folder, number, "forest.joblib"),
    "predictions, metrics, ROC curve": results,
    "learning curves": history,
    "images.csv": image_table,
    "dicom": dicom,
}


# ------------------------------------------------------------------------------------------------------- the faults


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def limited(folder: Path, room: int) -> Iterator[None]:
    """No file of this process grows beyond `room` bytes: more is EFBIG, since Python ignores the signal."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextlib.contextmanager
def full(folder: Path, room: int) -> Iterator[None]:
    """No more than `room` bytes, rounded down to pages, can be added to the file system of `folder`."""
    filler = folder.parent / "filler"
    with open(filler, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        file.truncate(max(0, file.tell() - room // 4096 * 4096))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def read_only(folder: Path, room: int) -> Iterator[None]:
    def remount(mode):
        subprocess.run(["mount", "-o", f"remount,{mode}", folder.parent], check=True)

    remount("ro")
    try:
        yield
    finally:
        remount("rw")


FAULTS = {"limit": limited, "full": full, "read-only": read_only}


def disturb(name: str, write: Callable, root: Path, fault: str, shares: Sequence[float]) -> Iterator[dict]:
    """Write once undisturbed, then, over it, other content while the fault lasts; what came of it, for each share.

    status, error: exit status and standard error of a command that writes. named: whether the error names a file that
    kept its content. torn: files that are neither as they were nor as they should have become. left: other files.
    """
    folder, fresh = root / name.replace(" ", "_"), root / "fresh"
    for place, number in ((folder, 0), (fresh, 1)):
        place.mkdir(exist_ok=True)
        write(place, number)
    before, wanted = contents(folder), contents(fresh)
    for path in fresh.iterdir():
        path.unlink()
    for share in shares:
        stderr, room = io.StringIO(), int(share * max(map(len, wanted.values())))
        parser = argparse.ArgumentParser(prog="command")
        with contextlib.redirect_stderr(stderr), FAULTS[fault](folder, room):
            status = run_main(parser, lambda: write(folder, 1), [])
        error, after = stderr.getvalue(), contents(folder)
        named = any(str(folder / file) in error and after.get(file) == before[file] for file in before)
        torn = sorted(file for file in before if after.get(file) not in (before[file], wanted[file]))
        yield {"writer": name, "fault": fault, "share": share, "status": status, "error": error, "named": named,
               "torn": torn, "left": sorted(after.keys() - before.keys())}  # fmt: skip
        for file in after.keys() - before.keys():
            (folder / file).unlink()
        for file, content in before.items():
            (folder / file).write_bytes(content)


def main(folder: str, *faults: str) -> None:
    for fault in faults:
        for name, write in WRITERS.items():
            for outcome in disturb(name, write, Path(folder), fault, SHARES if fault != "read-only" else (0.0,)):
                print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
