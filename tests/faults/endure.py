"""Long runs: whether a training's memory stays flat, and whether its best model always opens while it is written."""

import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.faults.commands import ENVIRONMENT, PIXELS, ROOT, script


class Memory(NamedTuple):
    """Of a training, at one moment. megabytes: its resident memory."""

    epochs: int
    megabytes: float
    seconds: float


def soak(data: Path, out: Path, epochs: int) -> Iterator[Memory]:
    """Train a whole-image classifier of a few images for many epochs, through the trainer's command line.

    Each epoch ends with a validation, its AUC, the history, and the best model where it is better. Yields, twice a
    second, its memory. Raises CalledProcessError when the training fails. data: of `make_inputs`.
    """
    images = data / "phantom"
    words = script(
        "ddsm_train/image_clf_train.py", *PIXELS, "--img-size", 128, 128, "--patch-model-state", data / "patch.h5",
        "--patch-net", "yaroslav", "--block-type", "vgg", "--top-depths", 8, "--top-repetitions", 1, "--augmentation",
        "--load-train-ram", "--load-val-ram", "--optimizer", "adam", "--batch-size", 8, "--nb-epoch", epochs // 2,
        "--all-layer-epochs", epochs, "--es-patience", epochs, "--init-learningrate", 1e-5, "--best-model",
        out / "best.h5", "--final-model", out / "final.keras", images / "test", images / "val", images / "test",
    )  # fmt: skip
    out.mkdir(parents=True)
    started = time.monotonic()
    with open(out / "log.txt", "w") as log:
        process = subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if (size := _resident(process.pid)) is not None:
                yield Memory(_epochs(out / "best" / "history.csv"), size, time.monotonic() - started)
    finally:
        process.kill()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words, (out / "log.txt").read_text()[-2000:])


def _resident(pid: int) -> float | None:
    """Megabytes, of a process that has not ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(sizes[0]) / 1024 if sizes else None


def _epochs(history: Path) -> int:
    try:
        with open(history, newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    except FileNotFoundError:
        return 0


def growth(memory: list[Memory], epochs: int) -> tuple[float, float]:
    """Memory over the tenth of a training's second stage after its first one, and over its last tenth: medians.

    The second stage compiles steps of its own, which take memory; what comes after must not.
    """
    tenth = epochs // 20
    parts = ((epochs // 2 + tenth, epochs // 2 + 2 * tenth), (epochs - tenth, epochs))
    early, late = ([m.megabytes for m in memory if first <= m.epochs < last] for first, last in parts)
    return statistics.median(early), statistics.median(late)


# A training whose every epoch is the best so far. Arguments: model file, epochs.
_WRITER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import keras, numpy as np
from mammo.train.callbacks import BestModel
from dm_keras_ext import Yaroslav

class Always(BestModel):
    def score(self, epoch, logs):
        return epoch

keras.utils.set_random_seed(1)
model = Yaroslav(classes=2, nb_init_filter=4)
model.compile("adam", "categorical_crossentropy")
rng = np.random.default_rng(0)
images, labels = rng.random((4, 64, 64, 1)), np.eye(2)[[0, 1, 0, 1]]
model.fit(images, labels, epochs=int(sys.argv[2]), verbose=0, callbacks=[Always(sys.argv[1])])
"""


class Reading(NamedTuple):
    opens: int
    versions: int  # different models among those opened
    writes: int


def read_while_written(path: Path, epochs: int) -> Reading:
    """Open the best model, again and again, while a training of so many epochs writes it after each of them.

    Raises InputError when it does not open, RuntimeError when its weights are not those of a model.
    """
    import numpy as np

    from mammo.train import checkpoint

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(epochs)], env=ENVIRONMENT)
    opens, versions = 0, set()
    try:
        while not path.exists() and writer.poll() is None:
            time.sleep(0.001)
        while writer.poll() is None:
            weights = checkpoint.load_model(path).get_weights()
            if not all(np.isfinite(values).all() for values in weights):
                raise RuntimeError(f"{path}: holds other numbers than weights")
            opens += 1
            versions.add(hash(b"".join(values.tobytes() for values in weights)))
        if writer.returncode:
            raise subprocess.CalledProcessError(writer.returncode, "the training")
    finally:
        writer.kill()
    return Reading(opens, len(versions), epochs)
