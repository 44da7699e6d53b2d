"""The commands to disturb, on phantoms so small that each takes seconds, and what their outputs must be."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.helpers import ROOT, read_members

# One process a core: several threads in each would only slow them down, and draw the kill moments apart.
ENVIRONMENT = os.environ | {
    "NUM_CPU_CORES": "2",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
CLASSES = ("background", "calc_mal", "calc_ben", "mass_mal", "mass_ben")
PIXELS = ("--rescale-factor", "0.003891", "--featurewise-center", "--featurewise-mean", "44", "--no-equalize-hist")


class Command(NamedTuple):
    """words: the command line, given the folder of `make_inputs` and the folder to write to."""

    name: str
    words: Callable[[Path, Path], list]


def script(path: str, *words) -> list[str]:
    return [sys.executable, str(ROOT / path), *map(str, words)]


def mammo(*words) -> list[str]:
    return [sys.executable, "-m", "mammo", *map(str, words)]


def sample(data: Path, out: Path, *options) -> list[str]:
    phantom = data / "phantom"
    tables = (phantom / "roi_mask_path.csv", phantom / "roi_mask", phantom / "pat_train.txt", phantom / "full_img")
    return script(
        "ddsm_train/sample_patches_combined.py", *tables, out / "train", out / "val", "--target-height", 192,
        "--patch-size", 32, "--val-size", 0.2, "--nb-hns", 2, "--no-verbose", "--jobs", 2, *options,
    )  # fmt: skip


PREPARING = ("--img-size", 96, 80, "--on-error", "skip", "--jobs", 2)


def prepare_cbis(data: Path, out: Path) -> list[str]:
    return mammo("prepare", "cbis-ddsm", data / "cbis-ddsm", out, *PREPARING)


def prepare_inbreast(data: Path, out: Path) -> list[str]:
    return script("inbreast/prepare_inbreast.py", data / "inbreast", out, "--roi-masks", *PREPARING)


def prepare_own(data: Path, out: Path) -> list[str]:
    return mammo("prepare", "folders", data / "phantom", out, *PREPARING)


def map_lesions(data: Path, out: Path) -> list[str]:
    phantom = data / "phantom"
    return script(
        "ddsm_train/heatmap_score.py", phantom / "full_img", data / "patch.h5", *PIXELS, "--img-size", 192, 160,
        "--patch-size", 64, "--stride", 8, "--pat-csv", phantom / "pat_side_cancer.csv", "--out", out / "maps.npz",
        "--overlay", out / "pictures", "--roi-mask-dir", phantom / "roi_mask",
    )  # fmt: skip


def train_patches(data: Path, out: Path, *options) -> list[str]:
    """Three stages."""
    patches = data / "patches"
    return script(
        "ddsm_train/patch_clf_train.py", *PIXELS, "--img-size", 64, 64, "--class-list", *CLASSES, "--net", "yaroslav",
        "--nb-init-filter", 2, "--top-layer-nb", 30, "--augmentation", "--optimizer", "adam", "--batch-size", 32,
        "--auto-batch-balance",
        "--nb-epoch", 3, "--top-layer-epochs", 6, "--all-layer-epochs", 9, "--init-learningrate", 0.01,
        "--deterministic", "--best-model", out / "best.h5", "--final-model", out / "final.keras", *options,
        patches / "train", patches / "val", patches / "val",
    )  # fmt: skip


def train_images(data: Path, out: Path, *options) -> list[str]:
    """Two stages."""
    phantom = data / "phantom"
    return script(
        "ddsm_train/image_clf_train.py", *PIXELS, "--img-size", 192, 160, "--patch-model-state", data / "patch.h5",
        "--patch-net", "yaroslav", "--block-type", "vgg", "--top-depths", 8, "--top-repetitions", 1,
        "--hidden-dropout", 0, "--hidden-dropout2", 0.2, "--optimizer", "adam", "--batch-size", 8, "--nb-epoch", 4,
        "--all-layer-epochs", 9, "--init-learningrate", 0.001, "--deterministic", "--best-model", out / "best.h5",
        "--final-model", out / "final.keras", *options, *(phantom / part for part in ("train", "val", "test")),
    )  # fmt: skip


def saving(train: Callable, every: int) -> Callable[[Path, Path], list]:
    """The training, with its state saved every so many steps and not at the end of epochs alone."""
    return lambda data, out: train(data, out, "--save-every", every)


COMMANDS = [
    Command("sampling", sample),
    Command("preparation of CBIS-DDSM", prepare_cbis),
    Command("preparation of INbreast", prepare_inbreast),
    Command("preparation of own data", prepare_own),
    Command("heatmaps", map_lesions),
    Command("three-stage training", train_patches),
    Command("three-stage training, --save-every 3", saving(train_patches, 3)),
    Command("two-stage training", train_images),
    Command("two-stage training, --save-every 2", saving(train_images, 2)),
]


def make_inputs(data: Path) -> None:
    """Write what the commands read into the new folder `data`."""
    small = ("--height", 192, "--width", 160, "--jobs", 2)
    phantom = mammo("phantom", data / "phantom", *small, "--patients", 40, "--val-size", 0.2)
    downloads = [
        mammo("phantom", data / layout, *small, "--patients", 24, "--layout", layout)
        for layout in ("cbis-ddsm", "inbreast")
    ]
    patches = sample(data, data / "patches", "--nb-abn", 4, "--nb-bkg", 4)
    model = [
        sys.executable, "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import keras, dm_keras_ext\n"
        "from mammo.train import checkpoint\n"
        "keras.utils.set_random_seed(1)\n"
        f"network = dm_keras_ext.Yaroslav(classes={len(CLASSES)}, nb_init_filter=2)\n"
        f"checkpoint.save_model(network, {str(data / 'patch.h5')!r})",
    ]  # fmt: skip
    for words in (phantom, *downloads, patches, model):
        subprocess.run(words, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ----------------------------------------------------------------------------------------------------- the outputs


def files_below(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def content(path: Path) -> object:
    """What must be equal in two runs: the bytes of a file, less the times of saving that Keras puts into `.keras`."""
    if path.suffix != ".keras":
        return path.read_bytes()
    members = read_members(path)
    del members["metadata.json"]
    return members


def differences(one: Path, two: Path) -> list[str]:
    """Names of the files that are in one of the folders alone, or not equal in both.

    What a training keeps to go on is left out: it counts how often it was saved, and signals save it too.
    """
    first, second = (
        {name: path for name, path in files_below(folder).items() if path.parent.name != "state"}
        for folder in (one, two)
    )
    return sorted(
        name for name in first | second
        if name not in first or name not in second or content(first[name]) != content(second[name])
    )  # fmt: skip


def damaged(folder: Path) -> list[str]:
    """What is not whole in `folder`: each file that an output's name says is there must open, to its last byte.

    Hidden files are those being written, and locks. The log may have lines cut off where a run ended.
    """
    import cv2
    import h5py
    import pandas as pd

    def read_h5(path):
        with h5py.File(path) as h5:
            h5.visititems(lambda _, node: node[()] if isinstance(node, h5py.Dataset) else None)

    def read_archive(path):
        with zipfile.ZipFile(path) as archive:
            if (member := archive.testzip()) is not None:
                raise ValueError(member)

    def read_png(path):
        # OpenCV fills up what is cut off; a whole file ends with this chunk.
        if not path.read_bytes().endswith(b"IEND\xaeB`\x82") or cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None:
            raise ValueError("no whole picture")

    readers = {
        ".png": read_png,
        ".csv": pd.read_csv,
        ".json": lambda path: json.loads(path.read_text()),
        ".jsonl": lambda path: path.read_text(),
        ".h5": read_h5,
        ".keras": read_archive,
        ".npz": read_archive,
        ".skops": read_archive,
        ".txt": lambda path: path.read_text(),
        ".html": lambda path: path.read_text(),
    }
    faults = []
    for name, path in sorted(files_below(folder).items()):
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            readers[path.suffix](path)
        except Exception as error:  # each reader has its own
            faults.append(f"{name}: {type(error).__name__} {error}")
    return faults
