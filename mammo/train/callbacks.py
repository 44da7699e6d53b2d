"""What watches a training: the best model, AUC by class, the history file and its picture, losses that are no number.

All are Keras callbacks. One instance serves all stages of a training, and the order is by epoch over all stages.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import Model, ops
from keras.callbacks import Callback

from mammo.base.files import InputError, atomic_write
from mammo.train import checkpoint
from mammo.train.scoring import NotFiniteError, auc_by_class, auc_line, drop_unreadable, predict

if TYPE_CHECKING:
    import pandas as pd


class BestModel(Callback):
    """Keep the model of the best epoch of all stages in `filepath`, or in memory when that is `NOSAVE`.

    model_to_save: the single-device twin of a model trained on several.
    """

    kept = ("best", "best_epoch")  # what `mammo.train.resume` needs to go on

    def __init__(
        self, filepath: str | Path, monitor: str = "val_accuracy", mode: str = "max", model_to_save: Model | None = None
    ):
        super().__init__()
        self.filepath, self.model_to_save = filepath, model_to_save
        self.monitor, self.sign = monitor, 1 if mode == "max" else -1
        self.best, self.best_epoch = -np.inf, None
        self.weights: list[np.ndarray] | None = None  # of the best epoch, without a file

    @property
    def files(self) -> list[str]:
        """List the file of the best model, once there is one."""
        return [] if self.filepath == "NOSAVE" or self.best_epoch is None else [str(self.filepath)]

    def score(self, epoch: int, logs: dict) -> float:
        """Score an epoch, higher being better. Subclasses may compute what Keras does not log."""
        if self.monitor not in logs:
            raise InputError(f"best model: Expected the metric {self.monitor}. Received {', '.join(logs)}")
        return self.sign * logs[self.monitor]

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs  # which subclasses add to
        score = self.score(epoch, logs)
        diverged = not np.isfinite([logs.get("loss", 0.0), logs.get("val_loss", 0.0)]).all()
        if diverged or not score > self.best:
            return
        self.best, self.best_epoch = score, epoch
        model = self.model_to_save or self.model
        if self.filepath == "NOSAVE":
            self.weights = model.get_weights()
        else:
            with _thawed(model):
                checkpoint.save_model(model, self.filepath)

    def restore(self, model: Model) -> None:
        """Give `model` the best weights; without a finished epoch it stays as it is. InputError for another's file.

        Weights alone are read: no code is run, should the file have come from elsewhere meanwhile.
        """
        if self.weights is not None:
            model.set_weights(self.weights)
        elif self.best_epoch is not None:
            checkpoint.load_weights(model, self.filepath)


@contextmanager
def _thawed(model: Model) -> Iterator[None]:
    """Within the block all layers are trainable, so that files of all stages hold the weights in one order.

    `model.load_weights` of Keras goes by position, which in a nested model depends on what was frozen.
    """
    layers, variables = list(model._flatten_layers()), model.variables  # nested models come before their layers
    flags = [(part, part.trainable) for part in (*layers, *variables)]
    for layer in layers:
        layer.trainable = False  # TensorFlow's object tracking ignores an assignment that changes nothing
        layer.trainable = True
    try:
        yield
    finally:
        for part, flag in flags:
            part.trainable = flag


class DMAucModelCheckpoint(BestModel):
    """Keep the model of the best mean AUC by class over `test_data`, and print the AUC after each epoch.

    Where the set holds a single class, the AUC is undefined: this is said once, and the lowest validation loss decides.
    """

    def __init__(
        self,
        filepath: str | Path,
        test_data: Any,
        test_samples: int | None = None,
        batch_size: int | None = None,
        *,
        model_to_save: Model | None = None,
    ):
        super().__init__(filepath, monitor="val_loss", mode="min", model_to_save=model_to_save)
        self.test_data, self.test_samples, self.batch_size = test_data, test_samples, batch_size
        self.on_batch: Callable[[], None] | None = None  # called after each batch of a prediction; may raise
        self._warned = False

    def score(self, epoch, logs):
        try:
            model = self.model_to_save or self.model
            auc = self.calc_test_auc(self.test_data, model, self.batch_size, self.test_samples, on_batch=self.on_batch)
        except NotFiniteError as error:
            print(f"epoch {epoch + 1}: {error}; lower --init-learningrate", file=sys.stderr)
            logs["val_auc"] = np.nan
            return np.nan  # never the best; early stopping ends the stage
        logs["val_auc"] = mean = float(np.mean(auc)) if np.isfinite(auc).all() else np.nan
        names = list(getattr(self.test_data, "class_indices", ()))
        print(f" - Epoch: {epoch + 1}, AUC by class: {auc_line(np.atleast_1d(auc), names)}", flush=True)
        if np.isfinite(mean):
            return mean
        if not self._warned:
            self._warned = True
            reason = "the AUC is undefined because a class has no samples"
            print(f"validation set: {reason}; the model of the lowest validation loss is kept", file=sys.stderr)
        return super().score(epoch, logs)

    @staticmethod
    def calc_test_auc(
        test_set: Any,
        model: Model,
        batch_size: int | None = None,
        test_samples: int | None = None,
        return_y_res: bool = False,
        test_augment: bool = False,
        *,
        on_batch: Callable[[], None] | None = None,
    ) -> float | np.ndarray | tuple[float | np.ndarray, np.ndarray, np.ndarray]:
        """Return the AUC of `model` on a set: (C,) by class, NaN where undefined, or a float for a single output.

        test_set: a `PyDataset`, or arrays (x, y) or (x, y, sample weights); one-hot or 0/1 labels. test_samples: use
        this many samples; default all, each once. test_augment: score the mean prediction of the four flips. on_batch:
        called after each batch. With `return_y_res`: (auc, y_true, y_pred). Lost images are left out.
        """
        results = predict(model, test_set, batch_size, test_samples, test_augment, on_batch=on_batch)
        y_true, y_pred, weights, y_flips = drop_unreadable(*results)
        if test_augment:
            y_pred = y_flips
        auc = auc_by_class(y_true, y_pred, weights)
        auc = float(auc[0]) if len(auc) == 1 else auc
        return (auc, y_true, y_pred) if return_y_res else auc


class DMFlush(Callback):
    """Flush standard output after each epoch, so that logs of batch systems are current."""

    def on_epoch_end(self, epoch, logs=None):
        sys.stdout.flush()


class FiniteLoss(Callback):
    """Stop as soon as the loss is NaN or infinite, and say in which batch of `train_set` and in which files."""

    def __init__(self, train_set: Any):
        super().__init__()
        self.train_set = train_set
        self.failed, self._epoch = False, 0

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        # Keras logs the mean over the epoch so far, which is no number from the batch on that has none.
        if np.isfinite((logs or {}).get("loss", 0.0)):
            return
        self.failed = self.model.stop_training = True
        names = getattr(self.train_set, "batch_names", None)
        files = f" ({', '.join(names(batch))})" if names else ""
        place = f"training stopped in epoch {self._epoch + 1} at batch {batch + 1}"
        remedy = "Lower --init-learningrate, or check the rescale factor and the mean"
        print(f"{place}: the loss is not finite{files}. {remedy}", file=sys.stderr)


class HistoryFile(Callback):
    """Write one row an epoch to a CSV, over all stages, whole after every epoch, and after every stage a picture.

    The picture has the name of the CSV with the ending .png: losses, accuracies and AUC by epoch, with a line where
    each stage began.
    """

    kept = ("rows", "begins")

    def __init__(self, filepath: str | Path):
        super().__init__()
        self.filepath = Path(filepath)
        self.rows: list[dict] = []
        self.begins: list[int] = []  # epochs run before each stage

    def on_train_begin(self, logs=None):
        self.begins.append(len(self.rows))

    def on_epoch_end(self, epoch, logs=None):
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        self.rows.append({"epoch": epoch + 1, "learning_rate": rate, **(logs or {})})
        with atomic_write(self.filepath) as temporary:
            self._table().to_csv(temporary, index=False)

    def on_train_end(self, logs=None):
        """Write the picture, if there are epochs."""
        if self.rows:
            plot_history(self.filepath.with_suffix(".png"), self._table(), self.begins[1:])

    def _table(self) -> "pd.DataFrame":
        import pandas as pd

        return pd.DataFrame(self.rows)


def plot_history(path: Path, table: "pd.DataFrame", stage_begins: Sequence[int] = ()) -> None:
    """Draw the learning curves of `table`, as `HistoryFile` writes it; a line follows each epoch of `stage_begins`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [name for name in ("loss", "accuracy", "auc") if f"val_{name}" in table]
    figure = Figure(figsize=(4.5 * len(names), 3.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for column, text in ((name, "training"), (f"val_{name}", "validation")):
            if column in table:
                axes.plot(table.epoch, table[column], marker=".", label=text)
        for begin in stage_begins:
            axes.axvline(begin + 0.5, color="0.7", linewidth=1, linestyle="--")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def tensorboard(log_dir: str | Path) -> Callback:
    """Return Keras's TensorBoard callback, without the graph. Raises InputError where a package for it is missing."""
    missing = [name for name in ("tensorflow", "tensorboard") if find_spec(name) is None]
    if missing:
        raise InputError(f"--tensorboard: its logs are written by other packages: pip install {' '.join(missing)}")
    return keras.callbacks.TensorBoard(str(log_dir), write_graph=False)
