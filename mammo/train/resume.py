"""Exact resumption of a training: what is saved while it runs, and how it goes on after any stop.

The state holds the weights, the optimizer, the random generators of dropout, the metrics of an epoch in progress, the
counters of the callbacks, and the position in the data. Order and augmentation of the data are functions of the seed
and that position, so a resumed training takes the very steps of one that was never stopped; where operations repeat
exactly (`--deterministic`), its weights are equal bit for bit.
"""

import copy
import json
import os
import signal
import sys
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from keras import Model, Variable, ops
from keras.callbacks import Callback, CallbackList
from keras.utils import PyDataset

from mammo.base.cli import Terminated
from mammo.base.files import InputError, atomic_write, check_writable, remove_partial
from mammo.base.guards import check_archive
from mammo.base.work import check_same_options
from mammo.train.devices import even_batches, random_state, set_random_state, training_scope

# What decides how a callback goes on. Callbacks of ours say it themselves.
_KEPT = {"EarlyStopping": ("wait", "stopped_epoch", "best", "best_epoch")}
_KEPT |= {"ReduceLROnPlateau": ("wait", "cooldown_counter", "best")}

# Written in turn, so that one is whole whatever a disk does to the other.
_GENERATIONS = ("state-0.npz", "state-1.npz")

# Where a training is, as the description of its state names it; attributes of the same names.
_PROGRESS = ("stage", "stage_ended", "step", "position", "counters")


class TrainingState(Callback):
    """The state of a training in stages: the last of its callbacks, which all stages share.

    folder: where the state is saved, as each epoch ends, every `save_every` training steps (0: not within an epoch),
    and when SIGINT or SIGTERM ask the training to stop. None: nowhere; the training cannot be resumed.

    `history` holds the logs of all epochs that ended, `finished` whether nothing is left to do.
    """

    def __init__(self, folder: str | os.PathLike | None = None, save_every: int = 0):
        super().__init__()
        self.folder = None if folder is None else Path(folder)
        self.save_every = save_every
        self.history: list[dict] = []
        self.finished = False
        self._options: dict = {}
        self._saved: list[tuple[dict, Path]] = []  # what the folder holds, the newest first
        self._number = 0  # of the next generation
        self._stage, self._stage_ended, self._step = 0, False, 0
        self._random: list[np.ndarray] = []
        self._signal: int | None = None
        self._again = "the same command"

    # -- before the training

    def open(self, fresh: bool = False) -> None:
        """Look for a state in the folder; `fresh` removes it. InputError where one cannot be read, or written."""
        if self.folder is None:
            return
        check_writable(self.folder / "state.npz")
        self.folder.mkdir(parents=True, exist_ok=True)  # says whose the best model is, as soon as there is one
        if fresh:
            self._remove(_GENERATIONS)
            self._again = "the same command without --fresh"
        remove_partial(self.folder)
        paths = [self.folder / name for name in _GENERATIONS if (self.folder / name).exists()]
        found = [(read[0], path) for path in paths if (read := _read(path)) is not None]
        if paths and not found:
            raise self._unreadable()
        self._saved = sorted(found, key=lambda saved: -saved[0]["number"])

    @property
    def is_resumed(self) -> bool:
        """Return whether `open` found a state."""
        return bool(self._saved)

    def check(self, **options: Any) -> None:
        """Note what decides the course of the training; InputError where the state was begun with other values."""
        options = json.loads(json.dumps(options))
        self._options |= options
        if self._saved:
            theirs = {name: self._saved[0][0]["options"].get(name) for name in options}
            check_same_options(self.folder, theirs, options, "another --best-model, or --fresh to replace it")

    def restore(self, model: Model, callbacks: Sequence[Callback], train_set: PyDataset) -> None:
        """Bring model, callbacks and data to where the saved training was; without one, nothing changes."""
        self._model, self._train_set, self._watched, self._loaded = model, train_set, callbacks, None
        if not self._saved:
            return
        if (read := _read(self._saved[0][1])) is None:
            raise self._unreadable()
        description, self._loaded = read
        self._number = description["number"] + 1
        self.history, self.finished = description["history"], description["finished"]
        for name in _PROGRESS:
            setattr(self, f"_{name}", description[name])
        _set_counters(callbacks, self._counters)
        best = f"the best model of the training that {self.folder} holds"
        for callback in callbacks:
            if hasattr(callback, "weights"):
                callback.weights = self._arrays("best") or None
            for file in getattr(callback, "files", ()):
                if not Path(file).exists():
                    remedy = "Put it back to go on with it, or start over with --fresh"
                    raise InputError(f"{file}: is gone, {best}. {remedy}")
        if self.finished:
            print(f"this training is finished ({len(self.history)} epochs); --fresh trains anew", flush=True)
            return
        if description["variables"] != _kinds(model.variables):
            raise InputError(f"{self.folder}: holds a training of another network. Start over with --fresh")
        for callback in callbacks:
            if hasattr(callback, "restore"):  # better known now than after days
                try:
                    callback.restore(model)
                except InputError as error:
                    remedy = "put that back to go on, or start over with --fresh"
                    raise InputError(f"{error}. It should be {best}: {remedy}") from error
        self._assign(model.variables, "model")
        self._random = self._arrays("random")
        train_set.go_to(*self._position, self._step)
        print(f"going on after {self._place()}", flush=True)

    def _unreadable(self) -> InputError:
        return InputError(f"{self.folder}: none of its saved states can be read. Mend that, or start over with --fresh")

    # -- the course of a stage

    def has_ended(self, stage: int, end_epoch: int) -> bool:
        """Return whether stage number `stage`, which lasts until `end_epoch` epochs have run in all, is over."""
        return stage < self._stage or (stage == self._stage and self._stage_ended) or end_epoch <= len(self.history)

    def begin_stage(self, stage: int, fitted: Model, callbacks: Sequence[Callback]) -> None:
        """Take up a stage whose model is compiled; `callbacks` are all those of the stage."""
        self._fitted, self._watched = fitted, callbacks
        for callback in callbacks:
            if hasattr(callback, "on_batch"):
                callback.on_batch = self.stop_between_batches
        if self._loaded is not None and stage == self._stage and not self._stage_ended:
            with training_scope(self._model):
                fitted.optimizer.build(fitted.trainable_variables)
                self._assign(fitted.optimizer.variables, "optimizer")
            self._metrics = self._arrays("metrics")
        else:
            self._counters, self._step, self._loaded = None, 0, None
        self._stage, self._stage_ended = stage, False

    @property
    def awaits_validation(self) -> bool:
        """Return whether the next epoch is one whose training steps were all done when it was interrupted."""
        return self._step > 0 and len(self._train_set) == 0

    def validate(self, validation_set: PyDataset) -> None:
        """End an epoch that `awaits_validation`, as `fit` would have."""
        callbacks = CallbackList(self._watched, model=self._fitted)
        callbacks.on_train_begin()
        scores = self._fitted.evaluate(validation_set, callbacks=callbacks, return_dict=True)
        self._assign(self._fitted.metrics_variables, "metrics")
        logs = self._fitted.get_metrics_result() | {f"val_{name}": value for name, value in scores.items()}
        self._train_set.on_epoch_end()
        self._loaded, self._is_rest = None, False
        callbacks.on_epoch_end(len(self.history), logs)
        callbacks.on_train_end()

    def on_train_begin(self, logs=None):
        self._rejoins = self._counters is not None  # a stage in progress
        if self._rejoins:
            _set_counters(self._watched, self._counters)  # which Keras's callbacks have just begun anew

    def on_epoch_begin(self, epoch, logs=None):
        self._is_rest = self._rejoins and self._step > 0
        if self._rejoins:
            if self._step:
                if len(self._fitted.metrics_variables) != len(self._arrays("metrics")):
                    # TensorFlow makes them with the first batch.
                    self._fitted.test_on_batch(*even_batches(self._train_set, self._model)[0])
                self._assign(self._fitted.metrics_variables, "metrics")
            self._train_set.go_to(*self._position, self._step)  # `fit` began by going on to another epoch
            self._rejoins, self._loaded = False, None
        else:
            self._step, self._position = 0, getattr(self._train_set, "position", None)
        self._random = self._random or random_state()
        set_random_state(self._random)  # whatever building and compiling drew
        self._counters = _get_counters(self._watched)

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0 and self._step:
            set_random_state(self._random)  # PyTorch's loader draws as it begins, which it did before these steps

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        is_due = self._signal is not None or (self.save_every and self._step % self.save_every == 0)
        if is_due or batch + 1 == self.params["steps"]:
            self._synchronize()
            # Validation will begin the metrics anew, and draw more or less by where it is resumed.
            self._metrics, self._random = _values(self.model.metrics_variables), random_state()
            if is_due:
                self._save()
        self._stop_if_asked()

    def on_test_batch_end(self, batch, logs=None):
        self.stop_between_batches()

    def stop_between_batches(self) -> None:
        """Once the steps of an epoch are done: obey a signal, and let validation begin anew when resumed.

        For callbacks that predict as an epoch ends, in their `on_batch`.
        """
        if self._signal is not None:
            self._synchronize()
            self._save()
        self._stop_if_asked()

    def on_epoch_end(self, epoch, logs=None):
        self.history.append({name: float(value) for name, value in (logs or {}).items()})
        self._stage_ended = self.model.stop_training
        # Keras counts the batches of an epoch once: the rest of an interrupted one is fitted by itself.
        self.model.stop_training = self._stage_ended or self._is_rest
        self._step, self._position = 0, getattr(self._train_set, "position", None)
        self._counters, self._metrics = _get_counters(self._watched), []
        if all(np.isfinite([logs.get("loss", 0.0), logs.get("val_loss", 0.0)])):
            self._save()
        self._stop_if_asked()

    # -- stopping and saving

    @contextmanager
    def watching_signals(self) -> Iterator[None]:
        """Within the block SIGINT and SIGTERM let the step in progress end and be saved; a second one does not wait.

        The block then ends with KeyboardInterrupt or Terminated. Without a folder, and outside the main thread,
        signals do what they did.
        """
        if self.folder is None or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def put_back():
            for number, handler in before.items():
                signal.signal(number, handler)

        def remember(number, frame):
            self._signal = number
            with suppress(OSError):  # Ctrl-C ends the other side of a pipe too
                os.write(2, b"\nstopping as soon as this step has ended\n")  # print is not for signal handlers
            put_back()

        try:
            for number in before:
                signal.signal(number, remember)
            yield
            self._stop_if_asked()  # after the last epoch
        finally:
            put_back()

    def finish(self) -> None:
        """Note that nothing is left to do, and free the disk of what was for going on."""
        if self.folder is None or self.finished or not self.history:
            return
        self.finished = True
        newest = self._save()
        self._remove(name for name in _GENERATIONS if name != newest)

    def discard(self) -> None:
        """Remove the state of a training that cannot go on."""
        self._remove(_GENERATIONS)

    def _stop_if_asked(self) -> None:
        if self._signal is not None:
            number, self._signal = self._signal, None
            text = f"stopped after {self._place()}; {self._again} goes on from there"
            raise Terminated(text) if number == signal.SIGTERM else KeyboardInterrupt(text)

    def _place(self) -> str:
        epoch = len(self.history)
        return f"step {self._step} of epoch {epoch + 1}" if self._step else f"epoch {epoch}"

    def _synchronize(self) -> None:
        """Fetch the values of variables, which JAX keeps to itself within an epoch."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()

    def _save(self) -> str | None:
        """Write the next generation and return its name."""
        if self.folder is None:
            return None
        # A callback holds weights in memory where no file does.
        held = (callback.weights for callback in self._watched if getattr(callback, "weights", None))
        arrays = {"best": next(held, [])}
        if not self.finished:
            optimizer = _values(self._fitted.optimizer.variables)
            arrays |= {"model": _values(self._model.variables), "optimizer": optimizer}
            arrays |= {"metrics": self._metrics, "random": self._random}
        description = {"number": self._number, "finished": self.finished, "options": self._options}
        description |= {"variables": _kinds(self._model.variables), "history": self.history}
        description |= {name: getattr(self, f"_{name}") for name in _PROGRESS}
        named = {f"{group}_{i}": value for group, values in arrays.items() for i, value in enumerate(values)}
        name = _GENERATIONS[self._number % len(_GENERATIONS)]
        _write(self.folder / name, description, named)
        self._number += 1
        return name

    def _arrays(self, group: str) -> list[np.ndarray]:
        """Return what was loaded of a group, in order."""
        number = sum(name.startswith(f"{group}_") for name in self._loaded)
        return [self._loaded[f"{group}_{i}"] for i in range(number)]

    def _assign(self, variables: Sequence[Variable], group: str) -> None:
        """Give the variables the values that were loaded of a group."""
        values = self._arrays(group)
        if [tuple(variable.shape) for variable in variables] != [value.shape for value in values]:
            expected = (
                f"{self.folder}: the {group} was saved with other variables. Expected those of this version of Keras"
            )
            remedy = "go on with the version that began the training, or start over with --fresh"
            raise InputError(f"{expected}: {remedy}")
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names if self.folder is not None else ():
            (self.folder / name).unlink(missing_ok=True)


def _write(path: Path, description: dict, arrays: dict[str, np.ndarray]) -> None:
    """Write a generation: what it says about itself, and its arrays."""
    arrays = {"description": np.array(json.dumps(description)), **arrays}
    with atomic_write(path, durable=True) as temporary:
        np.savez(temporary, checksum=_checksum(arrays), **arrays)


def _read(path: Path) -> tuple[dict, dict[str, np.ndarray]] | None:
    """Return what `_write` wrote; None where it is damaged, which is said."""
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        if arrays.pop("checksum") != _checksum(arrays):
            raise ValueError("its content has another checksum")
        return json.loads(str(arrays.pop("description"))), arrays
    except MemoryError:
        raise
    except Exception as error:  # whatever a damaged archive makes its readers stumble over
        print(f"warning: {path}: damaged, and not used ({error})", file=sys.stderr)
        return None


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    """Sum names, shapes and bytes: an archive can be whole and hold what no training saved."""
    checksum = 0
    for name, values in sorted(arrays.items()):
        checksum = zlib.crc32(f"{name} {values.shape}".encode() + values.tobytes(), checksum)
    return checksum


def _kinds(variables: Sequence[Variable]) -> list[list]:
    """Return name and shape of each; paths hold numbers that Keras gives by what else was built."""
    return [[variable.name, list(variable.shape)] for variable in variables]


def _values(variables: Sequence[Variable]) -> list[np.ndarray]:
    return [ops.convert_to_numpy(variable) for variable in variables]


def _get_counters(callbacks: Sequence[Callback]) -> dict[str, dict]:
    """Copy what decides how the callbacks go on, by the name of their class, in types that JSON can hold."""
    counters = {}
    for callback in callbacks:
        kept = getattr(callback, "kept", _KEPT.get(type(callback).__name__, ()))
        counters[type(callback).__name__] = {name: getattr(callback, name) for name in kept}
    return json.loads(json.dumps(counters))


def _set_counters(callbacks: Sequence[Callback], counters: dict[str, dict]) -> None:
    for callback in callbacks:
        for name, value in counters.get(type(callback).__name__, {}).items():
            setattr(callback, name, copy.deepcopy(value))  # which the callback may change in place
