"""Run a training of either trainer: from its options and a model to weights, history and test scores.

`run_training` is the whole run; the sections below it are its steps, in order: options, lock and state, model, images,
training, scores.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import keras
import numpy as np

from dm_image import DMImageDataGenerator
from dm_keras_ext import Stage, class_weights, train_stages
from dm_multi_gpu import make_parallel
from mammo.base.files import InputError, counted, env_int, locked, remove_partial, write_json
from mammo.evaluate.preflight import pixel_statistics
from mammo.images import check
from mammo.images.check import ImageCheck
from mammo.images.file_iterators import DMDirectoryIterator, find_classes
from mammo.images.iterators import sample_images
from mammo.images.pixels import Pixels, pixel_warnings
from mammo.train import checkpoint, memory, scoring
from mammo.train.callbacks import BestModel, HistoryFile, tensorboard
from mammo.train.resume import TrainingState

# Options that do not decide the course of a training, so that a resumed one may have others.
_FREE_TO_CHANGE = ("train_dir", "val_dir", "test_dir", "best_model", "final_model", "out_dir", "tensorboard")
_FREE_TO_CHANGE += ("resume", "fresh", "save_every", "check_data", "load_train_ram", "load_val_ram", "test_augment")
_FREE_TO_CHANGE += ("trust_checkpoint", "on_error")

# Options that `train_stages` has by the same names.
_STAGE_OPTIONS = ("optim", "es_patience", "lr_patience", "frozen_bn", "accumulate", "jit")

_FILES_READ = ("resume_from", "patch_model_state", "pretrained_weights")
_ENVIRONMENT = {"RANDOM_SEED": 12345, "NUM_GPU_DEVICES": 1}  # with their defaults

# Degrees, radians, factors, grey levels of 0..255.
AUGMENTATION = {"rotation_range": 25.0, "shear_range": 0.2, "zoom_range": (0.8, 1.2), "channel_shift_range": 20.0}
AUGMENTATION |= {"horizontal_flip": True, "vertical_flip": True}


@dataclass
class Run:
    """Hold a model and its image sets, ready to train."""

    args: argparse.Namespace
    out_dir: Path | None  # where results are written, or None
    state: TrainingState
    model: keras.Model
    org_model: keras.Model  # the same on a single device: the one that is saved
    fitted: keras.Model  # shares the layers of `model`, and may keep fewer activations: the one that is fitted
    train_set: DMDirectoryIterator
    val_set: DMDirectoryIterator
    test_set: DMDirectoryIterator


def run_training(
    args: argparse.Namespace,
    model: keras.Model,
    make_stages: Callable[[keras.Model], list[Stage]],
    make_keeper: Callable[[Run], BestModel],
    *,
    allow_constant: bool = True,
    flips: bool = False,
) -> None:
    """Train a classifier in stages, keep its best weights and score them on the test set.

    args: the options of a trainer. model: a classifier of one image. make_stages: returns the stages of the model that
    is trained, a copy of `model` on several devices. make_keeper: returns the callback that keeps the best weights.
    allow_constant: constant images are legal among patches; otherwise they count as unreadable. flips: score the mean
    of four flips too.

    Raises InputError for data or a model that do not fit the options, and where the output folder holds the state of a
    training with other options. While it runs, no other training can write to the output folder, or the same models.
    """
    check_training_options(args, model)
    # Where results are written: None with --best-model NOSAVE alone.
    saved = None if args.best_model == "NOSAVE" else Path(args.best_model).with_suffix("")
    out_dir = saved if args.out_dir is None else Path(args.out_dir)
    with ExitStack() as stack:
        _lock_outputs(args, out_dir, stack)
        state = _open_state(args, out_dir)
        trained, org_model, fitted = _place_model(args, model)
        sets = _open_sets(args, out_dir, state, channels=model.input_shape[-1], allow_constant=allow_constant)
        for image_set in sets:
            stack.callback(image_set.close)
        run = Run(args, out_dir, state, trained, org_model, fitted, *sets)
        stages, keeper = make_stages(trained), make_keeper(run)
        history = train_run(run, stages, keeper)
        score_run(run, keeper, history, flips)


# ---------------------------------------------------------------------------------------------------- options


def check_training_options(args: argparse.Namespace, model: keras.Model) -> None:
    """Raise InputError where model, options and places to write do not fit, before any image is read."""
    source = args.resume_from or getattr(args, "patch_model_state", None) or "model"
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or len(model.outputs) != 1:
        raise InputError(f"{source}: Expected a model of one image. Received inputs {_shapes(model.inputs)}")
    if len(model.outputs[0].shape) != 2:
        raise InputError(f"{source}: Expected a classifier. Received a model with outputs {_shapes(model.outputs)}")
    checkpoint.check_outputs(model, len(args.class_list), source)
    size, channels = tuple(args.img_size), model.inputs[0].shape[-1]
    if any(built not in (None, asked) for built, asked in zip(model.inputs[0].shape[1:3], size, strict=True)):
        expected = f"Expected a model for images of the size --img-size {size[0]} {size[1]}"
        raise InputError(f"{source}: {expected}. Received one for {' x '.join(map(str, model.inputs[0].shape[1:3]))}")
    if channels not in (1, 3):
        raise InputError(f"{source}: Expected a model of 1 or 3 input channels. Received one of {channels}")
    try:
        image = keras.Input((*size, channels))
        keras.models.clone_model(model, input_tensors=image, clone_function=lambda layer: layer)
    except ValueError as error:
        raise InputError(f"--img-size {size[0]} {size[1]}: too small for this network; use larger images") from error
    if not args.auto_batch_balance:
        class_weights(len(args.class_list), args.pos_cls_weight, args.neg_cls_weight)
    backend, devices = keras.backend.backend(), env_int("NUM_GPU_DEVICES", 1)
    for option, given in (("--accumulate", args.accumulate > 1), ("--jit", args.jit)):
        if given and devices > 1 and backend == "tensorflow":
            raise InputError(f"{option}: not with TensorFlow on several devices; set NUM_GPU_DEVICES to 1")
    if args.jit and backend == "torch":
        raise InputError("--jit: Expected the backend tensorflow or jax. Received torch, which compiles every step")
    if args.best_model == (name := args.final_model) != "NOSAVE":
        raise InputError(f"--final-model: Expected another name than --best-model. Received {name} for both")
    for option, name in (("--best-model", args.best_model), ("--final-model", args.final_model)):
        if name == "NOSAVE":
            continue
        checkpoint.check_model_name(name)
        if name.endswith(".weights.h5"):
            raise InputError(f"{option} {name}: Expected a full model, .h5 or .keras. Received bare weights")
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if not os.access(Path(name).parent, os.W_OK):
            raise InputError(f"{option} {name}: the folder cannot be written to")


def _shapes(tensors: Sequence[keras.KerasTensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


# ---------------------------------------------------------------------------------------------- lock and state


def _lock_outputs(args: argparse.Namespace, out_dir: Path | None, stack: ExitStack) -> None:
    """Lock the output folder and the models until `stack` closes; remove what a killed run left half written."""
    models = [Path(name) for name in (args.best_model, args.final_model) if name != "NOSAVE"]
    for place in ([] if out_dir is None else [(out_dir,)]) + [(file.parent, file.name) for file in models]:
        stack.enter_context(locked(*place))
        remove_partial(Path(*place))


def _open_state(args: argparse.Namespace, out_dir: Path | None) -> TrainingState:
    epochs = max(args.nb_epoch, args.all_layer_epochs, getattr(args, "top_layer_epochs", 0))
    trains = out_dir is not None and epochs > 0  # without epochs, models are only scored
    state = TrainingState(out_dir / "state" if trains else None, args.save_every)
    fresh = args.fresh or args.resume == "off"
    if trains and not fresh:
        _check_best_model(args, state.folder)
    # Without resuming, too, what was saved goes: the models that it belongs to are about to be replaced.
    state.open(fresh)
    if args.resume == "off":
        state = TrainingState()
    options = {name: value for name, value in vars(args).items() if name not in _FREE_TO_CHANGE}
    options["best_model_in_memory"] = args.best_model == "NOSAVE"
    outputs = [Path(name).resolve() for name in (args.best_model, args.final_model)]
    for name in _FILES_READ:
        if options.get(name) is not None:
            options[name] = _describe_file(Path(options[name]), outputs)
    environment = {name: env_int(name, default) for name, default in _ENVIRONMENT.items()}
    state.check(**options, **environment, KERAS_BACKEND=keras.backend.backend())
    return state


def _check_best_model(args: argparse.Namespace, state_folder: Path) -> None:
    """Raise InputError where the best model was not written by the training whose state is in `state_folder`."""
    best, read = Path(args.best_model), [getattr(args, name, None) for name in _FILES_READ]
    going_on = any(name is not None and Path(name).resolve() == best.resolve() for name in read)
    if best.exists() and not state_folder.exists() and not going_on:
        remedy = "Give the --out-dir of that training to go on with it, another --best-model, or --fresh to replace it"
        there = f"is there already, of a training whose state is not in {state_folder}"
        raise InputError(f"--best-model {best}: {there}. {remedy}")


def _describe_file(path: Path, outputs: Sequence[Path]) -> str:
    """Return the name and digest of a file that a training begins with.

    The same file may lie elsewhere on another machine, and another file of its name in its place. One of the `outputs`,
    which the training replaces, goes by its name alone.
    """
    if path.resolve() in outputs or not path.is_file():
        return path.name
    with open(path, "rb") as file:
        return f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


# ------------------------------------------------------------------------------------------------------ model


def _place_model(args: argparse.Namespace, model: keras.Model) -> tuple[keras.Model, keras.Model, keras.Model]:
    """Return (model to train, model to save, model to fit), on the devices and in the precision that are asked for."""
    model, org_model = make_parallel(model, env_int("NUM_GPU_DEVICES", _ENVIRONMENT["NUM_GPU_DEVICES"]))
    if args.mixed_precision:
        memory.mixed_precision(model)
    return model, org_model, memory.rematerialize(model, tuple(args.img_size)) if args.remat else model


# ----------------------------------------------------------------------------------------------------- images


def _open_sets(
    args: argparse.Namespace, out_dir: Path | None, state: TrainingState, channels: int, allow_constant: bool
) -> list[DMDirectoryIterator]:
    """Check the images, return the training, validation and test set, and say what is in them and looks wrong."""
    checked = _check_data(args, out_dir, allow_constant, state.is_resumed)
    train_set, val_set, test_set = sets = make_sets(args, channels, allow_constant, checked)
    _describe_sets(train=train_set, validation=val_set, test=test_set)
    images = sample_images(train_set)
    for message in pixel_warnings(images, args.featurewise_mean if args.featurewise_center else None):
        print(f"warning: {message}", file=sys.stderr)
    for folder in (*val_set.empty_classes, *test_set.empty_classes):
        print(f"warning: {folder}: no images in this class folder", file=sys.stderr)
    _report_skipped(training=train_set, validation=val_set, test=test_set)
    state.check(training_images=_fingerprint(train_set), validation_images=_fingerprint(val_set))
    if out_dir is not None:
        write_json(out_dir / "pixel_stats.json", pixel_statistics(images))
    return sets


def make_sets(
    args: argparse.Namespace, channels: int, allow_constant: bool, checked: dict[str, ImageCheck] | None = None
) -> list[DMDirectoryIterator]:
    """Return the training, validation and test set; the first is augmented as in the paper, by `AUGMENTATION`."""
    plain = DMImageDataGenerator(featurewise_center=args.featurewise_center)
    ranges = AUGMENTATION if args.augmentation else {}
    augmented = DMImageDataGenerator(featurewise_center=args.featurewise_center, **ranges)
    if args.featurewise_center:
        plain.mean = augmented.mean = args.featurewise_mean
    common = {"pixels": Pixels.of(args, channels), "classes": args.class_list, "class_mode": "categorical"}
    common |= {"on_error": args.on_error, "allow_constant": allow_constant, "checked": checked}
    training = {"batch_size": max(1, int(args.batch_size * args.train_bs_multiplier)), "shuffle": True}
    training |= {"seed": env_int("RANDOM_SEED", _ENVIRONMENT["RANDOM_SEED"]), "load_to_ram": args.load_train_ram}
    training |= {"auto_batch_balance": args.auto_batch_balance}
    train_set = augmented.flow_from_directory(args.train_dir, **training, **common)
    # A class may be absent where nothing is learned: its scores are then undefined, which is said.
    common |= {"batch_size": args.batch_size, "shuffle": False, "allow_empty": True}
    val_set = plain.flow_from_directory(args.val_dir, load_to_ram=args.load_val_ram, **common)
    return [train_set, val_set, plain.flow_from_directory(args.test_dir, **common)]


def _check_data(args, out_dir: Path | None, allow_constant: bool, resumed: bool) -> dict[str, ImageCheck] | None:
    """Return what is known of the images of all sets, by file, or None where they are not checked.

    Raises InputError for images that cannot be used, unless they are skipped. A resumed training that skips takes them
    for what they were when it began: one lost since does not change the order of the others.
    """
    if not args.check_data:
        return None
    folders = [Path(folder).absolute() for folder in (args.train_dir, args.val_dir, args.test_dir)]
    table = None if out_dir is None else out_dir / check.TABLE
    known = check.read_checks(table) if resumed and args.on_error == "skip" else {}
    if all(any(Path(file).is_relative_to(folder) for file in known) for folder in folders):
        return {file: check.accept_constant(each) if allow_constant else each for file, each in known.items()}
    classes = [(folder, names) for folder in folders for names in find_classes(folder, args.class_list).values()]
    checks = check.check_images([folder / name for folder, names in classes for name in names], table, allow_constant)
    if args.img_scale is None:
        check.warn_of_types(checks)
    check.report_faults(checks, table, args.on_error)
    return {each.file: each for each in checks}


def _fingerprint(image_set: DMDirectoryIterator) -> str:
    """Return the number of files of a set, and a digest of their names and sizes, in order."""
    listed = "".join(f"{name}\0{size}\0" for name, size in zip(image_set.filenames, image_set.file_sizes, strict=True))
    return f"{image_set.nb_sample} files {hashlib.sha256(listed.encode()).hexdigest()[:12]}"


def _describe_sets(**sets: DMDirectoryIterator) -> None:
    """Print what is in each set, and warn of images that seem to be in two: such a leak makes any score too good."""
    for name, image_set in sets.items():
        counts = np.bincount(image_set.classes, minlength=image_set.nb_class)
        by_class = ", ".join(f"{label} {count}" for label, count in zip(image_set.class_indices, counts, strict=True))
        print(f"{name} set: {counted(image_set.nb_sample, 'image')} ({by_class})")
    for (name, one), (other, two) in combinations(sets.items(), 2):
        shared = {Path(file).name for file in one.filenames} & {Path(file).name for file in two.filenames}
        if shared:
            text = f"warning: {counted(len(shared), 'file name')} in both the {name} and the {other} set"
            print(f"{text}, such as {min(shared)}: no image or patient should be", file=sys.stderr)


def _report_skipped(**sets: DMDirectoryIterator) -> None:
    for name, image_set in sets.items():
        for message in image_set.skipped:
            print(f"skipped: {message}", file=sys.stderr)
        if count := len(image_set.skipped):
            print(f"warning: {count} of {image_set.nb_file} {name} images skipped", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ training


def train_run(run: Run, stages: Sequence[Stage], keeper: BestModel) -> list[dict]:
    """Run the stages and return the logs of every epoch; write `args.json`, `history.csv` and its picture."""
    args = run.args
    callbacks: list[keras.callbacks.Callback] = [keeper]
    if run.out_dir is not None:
        write_json(run.out_dir / "args.json", vars(args))
        callbacks.append(history_file := HistoryFile(run.out_dir / "history.csv"))
    if args.tensorboard is not None:
        callbacks.append(tensorboard(args.tensorboard))
    options = {name: getattr(args, name) for name in _STAGE_OPTIONS}
    if not args.auto_batch_balance:
        options["class_weight"] = class_weights(len(args.class_list), args.pos_cls_weight, args.neg_cls_weight)
    options |= {"callbacks": callbacks, "fitted": run.fitted, "state": run.state}
    history = train_stages(run.model, stages, run.train_set, run.val_set, **options)
    if run.out_dir is not None and run.state.is_resumed:
        history_file.on_train_end()  # draws the picture, which a stop at the end of the last stage left undone
    return history


# -------------------------------------------------------------------------------------------------------------- scores


def score_run(run: Run, keeper: BestModel, history: Sequence[dict], flips: bool = False) -> None:
    """Save the final model, print the training summary, and score the test set with the best weights."""
    args, model = run.args, run.org_model
    if history:
        losses = [row["val_loss"] for row in history]
        # A diverged epoch has a NaN loss; it must not win.
        epoch = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
        print("\n==== Training summary ====")
        print(f"Minimum val loss achieved at epoch: {epoch + 1}")
        print(f"Best val loss: {losses[epoch]}")
        print(f"Best val accuracy: {history[epoch]['val_accuracy']}")
    if keeper.best_epoch is not None:
        kept = "kept in memory" if args.best_model == "NOSAVE" else f"saved in {args.best_model}"
        print(f"Best model: epoch {keeper.best_epoch + 1}, {kept}")
    diverged = bool(history) and not np.isfinite(history[-1]["loss"])
    if args.final_model == "NOSAVE":
        pass
    elif diverged:
        print("the final model is not saved: its loss is not finite", file=sys.stderr)
    elif not run.state.finished:  # the weights of the end are gone by then
        checkpoint.save_model(model, args.final_model)
        print(f"Final model saved in {args.final_model}")
    elif not Path(args.final_model).exists():
        print("the final model is not saved: the training had ended without one; --fresh trains anew", file=sys.stderr)
    keeper.restore(model)
    memory.full_precision(model)  # as the saved file predicts

    print("\n==== Evaluating the best model on the test set ====", flush=True)
    y_true, y_pred, _, y_flips = scoring.predict(model, run.test_set, flips=flips, progress=True)
    y_true, y_pred, y_flips, files = scoring.drop_unreadable(y_true, y_pred, y_flips, np.array(run.test_set.filenames))
    predictions = {"single": y_pred} | ({"flips": y_flips} if flips else {})
    scores = scoring.classification_scores(y_true, y_pred, args.class_list)
    print(f"Test accuracy: {scores['accuracy']:.4f}")
    print(scoring.scores_table(scores))
    auc = scoring.auc_by_class(y_true, y_pred)
    print(f"AUROC on test set: {scoring.auc_line(auc, args.class_list)}")
    if np.isnan(auc).any():
        print("test set: the AUC is undefined for classes that hold all samples or none", file=sys.stderr)
    if flips:
        auc = scoring.auc_by_class(y_true, y_flips)
        print(f"AUROC on test set, mean of 4 flips: {scoring.auc_line(auc, args.class_list)}")
    if run.out_dir is not None:
        scoring.write_test_results(run.out_dir, files, y_true, predictions, args.class_list)
        print(f"Results are in {run.out_dir}", flush=True)
    run.state.discard() if diverged else run.state.finish()
    _report_skipped(training=run.train_set, validation=run.val_set, test=run.test_set)
