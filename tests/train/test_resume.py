"""Trainings that are stopped anywhere and go on as if they had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import chain, count

import cv2
import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from keras import layers

from ddsm_train import image_clf_train, training
from mammo.base.cli import Terminated
from mammo.base.files import InputError
from mammo.train import callbacks, checkpoint, resume
from mammo.train.resume import TrainingState
from tests.helpers import ROOT
from tests.train.networks import quick_training

SIZE = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Image sets of 10, 6 and 4, and a small network with batch normalization."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, images in (("train", 5), ("val", 3), ("test", 2)):
        for level, name in enumerate(("neg", "pos")):
            (folder / part / name).mkdir(parents=True)
            for i in range(images):
                image = rng.integers(0, 30000, (SIZE, SIZE)) + 15000 * level
                cv2.imwrite(str(folder / part / name / f"{part}{i}.png"), image.astype(np.uint16))
    keras.utils.set_random_seed(1)
    image = keras.Input((SIZE, SIZE, 3))
    x = layers.Activation("relu")(layers.BatchNormalization()(layers.Conv2D(4, 3)(image)))
    x = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(x))
    network = keras.Model(image, layers.Dense(2, "softmax", kernel_regularizer=keras.regularizers.L2(0.1))(x))
    checkpoint.save_model(network, folder / "network.h5")
    return folder


def train(data, out, *options, quick=True):
    """Two stages of 2 and 3 epochs, of three steps each, with dropout; the exit status."""
    names = {"--best-model": out / "best.h5", "--final-model": out / "final.h5", "--resume-from": data / "network.h5"}
    given = [
        *("--top-layer-nb", "4", "--img-size", str(SIZE), str(SIZE), "--rescale-factor", "0.003891"),
        *("--featurewise-mean", "90", "--batch-size", "4", "--train-bs-multiplier", "1", "--optimizer", "sgd"),
        *("--hidden-dropout", "0.3", "--hidden-dropout2", "0.3", "--lr-patience", "1", "--init-learningrate", "0.01"),
        *("--nb-epoch", "2", "--all-layer-epochs", "5", "--deterministic", *map(str, chain(*names.items()))),
        *options,
        *(str(data / part) for part in ("train", "val", "test")),
    ]
    with quick_training() if quick else nullcontext():
        return image_clf_train.main(given)


def results(out):
    """What a training leaves: all weights by name, and its tables as text."""
    weights = {}
    for name in ("best", "final"):
        with h5py.File(out / f"{name}.h5") as h5:
            keys = []
            h5.visit(keys.append)
            weights |= {f"{name} {key}": h5[key][()].tobytes() for key in keys if isinstance(h5[key], h5py.Dataset)}
    assert weights
    tables = {name: (out / "best" / name).read_text() for name in ("history.csv", "predictions.csv", "metrics.json")}
    return weights | tables


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert train(data, out) == 0
    return out


class Killed(BaseException):
    """Nothing catches this, so what it leaves is what a kill leaves."""


def at_batch(monkeypatch, number, action):
    """Do `action` as batch `number`, counted over training and validation of this process, begins."""
    batches = count(1)

    def before(proceed):
        def begin(self, batch, logs=None):
            if next(batches) == number:
                action()
            proceed(self, batch, logs)

        return begin

    for name in ("on_train_batch_begin", "on_test_batch_begin"):
        monkeypatch.setattr(TrainingState, name, before(getattr(TrainingState, name)))


def kill(*args, **kwargs):
    raise Killed


def train_until(number, data, out, *options, quick=True, action=kill):
    """Train until batch `number`, and what `action` does then."""
    with pytest.MonkeyPatch.context() as patch:
        at_batch(patch, number, action)
        if action is not kill:
            return train(data, out, *options, quick=quick)
        with pytest.raises(Killed):
            return train(data, out, *options, quick=quick)


@pytest.mark.parametrize(
    ("number", "options"),
    [
        (2, []),  # nothing was saved yet
        (9, []),  # in the second epoch: the first is over
        (5, ["--save-every", "3"]),  # in the validation of the first epoch, its steps being done
        (13, ["--save-every", "2"]),  # in the second stage
    ],
)
def test_killed_training_ends_as_if_it_had_not_been(number, options, data, uninterrupted, tmp_path):
    train_until(number, data, tmp_path, *options)
    assert train(data, tmp_path, *options) == 0
    assert results(tmp_path) == results(uninterrupted)


def test_killed_training_of_compiled_steps_ends_as_if_it_had_not_been(data, tmp_path):
    """In the middle of an epoch."""
    options = ("--save-every", "1")
    train_until(9, data, tmp_path / "killed", *options, quick=False)
    for name in ("killed", "whole"):
        assert train(data, tmp_path / name, *options, quick=False) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "signal_number", "status"),
    [
        (8, signal.SIGTERM, 143),  # in a training step
        (4, signal.SIGINT, 130),  # in validation
    ],
)
def test_signals_save_and_say_how_to_go_on(number, signal_number, status, data, uninterrupted, tmp_path, capfd):
    assert train_until(number, data, tmp_path, action=lambda: os.kill(os.getpid(), signal_number)) == status
    assert "the same command goes on from there" in capfd.readouterr().err.splitlines()[-1]
    assert train(data, tmp_path) == 0
    assert "going on after step 3 of epoch" in capfd.readouterr().out
    assert results(tmp_path) == results(uninterrupted)


def test_a_signal_while_the_auc_is_computed_saves_too(data, uninterrupted, tmp_path, monkeypatch, capfd):
    predict, calls = callbacks.predict, count(1)

    def interrupted(model, data, *args, on_batch, **kwargs):
        if next(calls) == 4:  # in the second epoch of the second stage

            def on_batch(proceed=on_batch):
                os.kill(os.getpid(), signal.SIGTERM)
                proceed()
                pytest.fail("the other batches were predicted")

        return predict(model, data, *args, on_batch=on_batch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "predict", interrupted)
        assert train(data, tmp_path) == 143
    assert "stopped after step 3 of epoch 4" in capfd.readouterr().err
    assert train(data, tmp_path) == 0
    assert results(tmp_path) == results(uninterrupted)


@pytest.mark.parametrize(
    ("fresh", "again"), [(False, "the same command goes on"), (True, "command without --fresh goes")]
)
def test_a_signal_after_the_last_step_is_obeyed(fresh, again, tmp_path, monkeypatch):
    """Also where standard error is a pipe whose other side the same Ctrl-C has ended."""

    def broken(*args):
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    state = TrainingState(tmp_path)
    state.open(fresh)
    with pytest.raises(Terminated, match=again), state.watching_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        state.history.append({})  # a raise by the signal would leave it out
    assert len(state.history) == 1


def test_a_training_killed_after_its_last_epoch_saves_the_final_model_of_its_last_stage(data, tmp_path, monkeypatch):
    """Its dropout and weight decay are in the file, though no stage is left to set them."""
    options = ("--hidden-dropout2", "0.5", "--weight-decay2", "0.02", "--nb-epoch", "1", "--all-layer-epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(training, "score_run", kill)
        with pytest.raises(Killed):
            train(data, tmp_path / "killed", *options)
    files = {}
    for name in ("killed", "whole"):
        assert train(data, tmp_path / name, *options) == 0
        with h5py.File(tmp_path / name / "final.h5") as h5:
            files[name] = json.loads(h5.attrs["model_config"])
    assert files["killed"] == files["whole"]
    settings = [layer["config"] for layer in files["whole"]["config"]["layers"]]
    assert [each["rate"] for each in settings if "rate" in each] == [0.5]


def test_the_picture_of_the_last_stage_is_drawn_too(data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "plot_history", kill)  # as the first stage ends
        with pytest.raises(Killed):
            train(data, tmp_path, "--all-layer-epochs", "2", quick=False)
    assert train(data, tmp_path, "--all-layer-epochs", "2", quick=False) == 0
    assert (tmp_path / "best" / "history.png").exists()


def test_the_generation_before_serves_when_the_newest_is_damaged(data, uninterrupted, tmp_path, capfd):
    train_until(13, data, tmp_path, "--save-every", "1")
    newest = max((tmp_path / "best" / "state").glob("*.npz"), key=lambda path: path.stat().st_mtime_ns)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert train(data, tmp_path, "--save-every", "1") == 0
    assert f"{newest}: damaged" in capfd.readouterr().err
    assert results(tmp_path) == results(uninterrupted)


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    """The folder of a training that was stopped in its second epoch."""
    out = tmp_path_factory.mktemp("killed")
    train_until(9, data, out)
    return out


@pytest.fixture
def stopped(killed, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(killed, tmp_path, dirs_exist_ok=True)


def test_other_options_are_refused_by_name(data, stopped, capfd):
    before = (stopped / "best.h5").read_bytes()
    assert train(data, stopped, "--init-learningrate", "0.02", "--batch-size", "5") == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "init_lr 0.01 there, 0.02 now" in error and "batch_size 4 there, 5 now" in error and "--fresh" in error
    assert "weight_decay" not in error
    assert (stopped / "best.h5").read_bytes() == before
    assert train(data, stopped, "--init-learningrate", "0.02", "--fresh", "--all-layer-epochs", "2") == 0
    assert len(pd.read_csv(stopped / "best" / "history.csv")) == 2


def test_other_images_are_refused(data, stopped, capfd):
    extra, before = data / "train" / "neg" / "more.png", (stopped / "best" / "pixel_stats.json").read_bytes()
    extra.write_bytes((data / "train" / "neg" / "train0.png").read_bytes())
    try:
        assert train(data, stopped) == 1
    finally:
        extra.unlink()
    assert "training_images 10 files" in capfd.readouterr().err
    assert (stopped / "best" / "pixel_stats.json").read_bytes() == before


def test_another_start_model_of_the_same_name_is_refused(data, stopped, capfd):
    before = (data / "network.h5").read_bytes()
    network = checkpoint.load_model(data / "network.h5")
    network.layers[-1].bias.assign([1, 2])
    checkpoint.save_model(network, data / "network.h5")
    try:
        assert train(data, stopped) == 1
    finally:
        (data / "network.h5").write_bytes(before)
    assert "resume_from network.h5 " in capfd.readouterr().err


def test_a_training_is_not_begun_anew_because_its_best_model_is_elsewhere(data, stopped, uninterrupted, capfd):
    (stopped / "best.h5").rename(stopped / "else.h5")
    assert train(data, stopped) == 1
    assert "best.h5: is gone, the best model of the training" in capfd.readouterr().err.splitlines()[-1]
    (stopped / "best.h5").write_bytes((stopped / "else.h5").read_bytes()[:2000])
    assert train(data, stopped) == 1
    assert "best.h5: " in capfd.readouterr().err.splitlines()[-1]
    (stopped / "else.h5").rename(stopped / "best.h5")
    moved = stopped.with_name("moved")
    stopped.rename(moved)
    assert train(data, moved, "--on-error", "skip") == 0  # which may be asked for from now on
    assert results(moved) == results(uninterrupted)


def test_a_best_model_of_another_training_is_not_replaced(data, stopped, uninterrupted, capfd):
    """Another output folder for the same best model: the first training would go on with, and score, that of this."""
    before = (stopped / "best.h5").read_bytes()
    other = ("--out-dir", str(stopped / "other"), "--init-learningrate", "0.02")
    assert train(data, stopped, *other) == 1
    assert f"{stopped / 'best.h5'}: is there already" in capfd.readouterr().err.splitlines()[-1]
    assert (stopped / "best.h5").read_bytes() == before
    assert train(data, stopped) == 0
    assert results(stopped) == results(uninterrupted)
    assert train(data, stopped, *other, "--fresh", "--nb-epoch", "1", "--all-layer-epochs", "1") == 0
    assert (stopped / "best.h5").read_bytes() != before


def test_a_state_of_another_version_of_keras_is_refused(data, stopped, capfd):
    for path in (stopped / "best" / "state").iterdir():
        description, arrays = resume._read(path)
        del arrays[max(name for name in arrays if name.startswith("optimizer_"))]
        resume._write(path, description, arrays)
    assert train(data, stopped) == 1
    assert "the optimizer was saved with other variables" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("damage", ["empty", "compression", "unreadable", "description", "weights"])
def test_a_training_is_not_begun_anew_because_its_states_are_damaged(damage, tmp_path, monkeypatch):
    def write(number):
        description = {"number": number, "options": {"kind": number}}
        resume._write(tmp_path / f"state-{number}.npz", description, {"model_0": np.ones(3)})

    def break_it(path):
        content = path.read_bytes()
        if damage in ("description", "weights"):  # an archive that is whole
            with np.load(path) as archive:
                arrays = dict(archive)
            other = {"description": np.array('{"number": 1}'), "weights": np.zeros(3)}[damage]
            np.savez(path, **arrays | {"description" if damage == "description" else "model_0": other})
            return
        if damage == "compression":  # zipfile says that it is not implemented
            method = content.rindex(b"PK\x01\x02") + 10
            content = content[:method] + b"\x63" + content[method + 1 :]
        path.write_bytes(content if damage == "compression" else b"")
        if damage == "unreadable":
            path.unlink()
            path.mkdir()

    write(0)
    write(1)
    break_it(tmp_path / "state-1.npz")
    state = TrainingState(tmp_path)
    state.open()
    state.check(kind=0)
    assert state.is_resumed
    break_it(tmp_path / "state-0.npz")
    with pytest.raises(InputError, match=r"none of its saved states can be read.*--fresh"):
        TrainingState(tmp_path).open()


def test_a_folder_that_takes_no_state_is_said_before_the_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/state\.npz: cannot be written to"):
        TrainingState(tmp_path / "file").open()


def test_a_finished_training_is_scored_again_but_not_repeated(data, uninterrupted, tmp_path, capfd):
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    models = [(tmp_path / name).stat().st_mtime_ns for name in ("best.h5", "final.h5")]
    (tmp_path / "best" / "predictions.csv").unlink()
    assert train(data, tmp_path, "--final-model", str(tmp_path / "other.h5")) == 0
    shown = capfd.readouterr()
    assert "finished (5 epochs)" in shown.out
    assert "the final model is not saved" in shown.err and not (tmp_path / "other.h5").exists()
    assert [(tmp_path / name).stat().st_mtime_ns for name in ("best.h5", "final.h5")] == models
    assert results(tmp_path) == results(uninterrupted)
    assert sum(path.stat().st_size for path in (tmp_path / "best" / "state").iterdir()) < 20_000  # no weights


def test_best_weights_in_memory_survive_too(data, uninterrupted, tmp_path):
    options = ("--best-model", "NOSAVE", "--out-dir", str(tmp_path / "best"))
    train_until(21, data, tmp_path, *options)
    for _ in range(2):  # to the end, and again after it
        assert train(data, tmp_path, *options) == 0
        predictions = (tmp_path / "best" / "predictions.csv").read_text()
        assert predictions == (uninterrupted / "best" / "predictions.csv").read_text()


def test_without_a_folder_there_is_nothing_to_remove():
    state = TrainingState()
    state.open(fresh=True)
    state.discard()  # of a training that diverged
    assert not state.is_resumed


def test_without_resume_nothing_is_saved_or_left_of_the_models_that_are_replaced(data, stopped, capfd):
    assert train(data, stopped, "--resume", "off", "--init-learningrate", "0.02", "--all-layer-epochs", "2") == 0
    assert "going on" not in capfd.readouterr().out
    assert len(pd.read_csv(stopped / "best" / "history.csv")) == 2
    assert not list((stopped / "best").rglob("*.npz"))


@pytest.mark.parametrize("place", ["best", "best.h5"])
def test_a_second_training_of_the_same_name_is_refused(place, data, tmp_path, capfd):
    """Also one of another output folder that would write the same models."""
    code = """
import sys
from mammo.base.files import locked
with locked(*sys.argv[1:]): print("locked", flush=True); sys.stdin.read()
"""
    locked = [tmp_path / place] if place == "best" else [tmp_path, place]
    other = [sys.executable, "-c", code, *map(str, locked)]
    with subprocess.Popen(other, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        assert train(data, tmp_path) == 1
        process.stdin.close()
    assert f"process {process.pid}" in capfd.readouterr().err
    assert not (tmp_path / "best.h5").exists()
