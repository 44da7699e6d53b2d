"""What the two trainers' command lines share: the image sets before training, the summary and scores after it."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np

import dm_args
import dm_checkpoint
from dm_files import InputError
from dm_image import DMImageDataGenerator, check_pixel_stats
from dm_inference import auc_by_class, auc_line, predict, write_json, write_test_results
from dm_keras_ext import BestModel, HistoryFile, check_outputs
from dm_multi_gpu import make_parallel


@dataclass
class Training:
    """A model and its image sets, ready to train."""

    args: argparse.Namespace
    model: keras.Model
    org_model: keras.Model  # the same on a single device: the one that is saved
    top_layer_nb: int | None
    train_set: keras.utils.PyDataset
    val_set: keras.utils.PyDataset
    test_set: keras.utils.PyDataset
    out_dir: Path | None  # where results are written, or None
    callbacks: list[keras.callbacks.Callback] = field(default_factory=list)


def prepare(args: argparse.Namespace, model: keras.Model, top_layer_nb: int | None) -> Training:
    """Check the model against the options and make the training, validation and test sets of a trainer.

    Augmentation is the paper's: both flips, rotation within 25 degrees, shear within 0.2 rad, zoom 0.8..1.2 and
    channel shift within 20. Raises InputError for data or a model that do not fit the options.
    """
    seed = dm_args.env_int("RANDOM_SEED", 12345)
    _check_model(model, args)
    model, org_model = make_parallel(model, dm_args.env_int("NUM_GPU_DEVICES", 1))

    plain = DMImageDataGenerator(featurewise_center=args.featurewise_center)
    augmented = DMImageDataGenerator(featurewise_center=args.featurewise_center)
    if args.featurewise_center:
        plain.mean = augmented.mean = args.featurewise_mean
    if args.augmentation:
        augmented.horizontal_flip = augmented.vertical_flip = True
        augmented.rotation_range = 25.0
        augmented.shear_range = 0.2
        augmented.zoom_range = [0.8, 1.2]
        augmented.channel_shift_range = 20.0

    pixels = {
        "target_size": tuple(args.img_size),
        "target_scale": args.img_scale,
        "rescale_factor": args.rescale_factor,
        "equalize_hist": args.equalize_hist,
        "dup_3_channels": model.input_shape[-1] == 3,
        "classes": args.class_list,
        "class_mode": "categorical",
        "on_error": args.on_error,
        "workers": max(1, dm_args.env_int("NUM_CPU_CORES", 4)),
    }
    train_set = augmented.flow_from_directory(
        args.train_dir,
        batch_size=max(1, int(args.batch_size * args.train_bs_multiplier)),
        shuffle=True,
        seed=seed,
        auto_batch_balance=args.auto_batch_balance,
        load_to_ram=args.load_train_ram,
        **pixels,
    )
    # A class may be absent where nothing is learned: its scores are then undefined, which is said.
    scoring = {"batch_size": args.batch_size, "shuffle": False, "allow_empty": True, **pixels}
    val_set = plain.flow_from_directory(args.val_dir, load_to_ram=args.load_val_ram, **scoring)
    test_set = plain.flow_from_directory(args.test_dir, **scoring)
    for message in check_pixel_stats(train_set):
        print(f"warning: {message}", file=sys.stderr)

    _report_skipped(training=train_set, validation=val_set, test=test_set)

    training = Training(args, model, org_model, top_layer_nb, train_set, val_set, test_set, _out_dir(args))
    if training.out_dir is not None:
        write_json(training.out_dir / "args.json", vars(args))
        training.callbacks.append(HistoryFile(training.out_dir / "history.csv"))
    return training


def _report_skipped(**sets) -> None:
    for name, image_set in sets.items():
        for message in image_set.skipped:
            print(f"skipped: {message}", file=sys.stderr)
        if image_set.skipped:
            total = len(image_set.skipped) + image_set.nb_sample
            print(f"warning: {len(image_set.skipped)} of {total} {name} images skipped", file=sys.stderr)


def _check_model(model: keras.Model, args: argparse.Namespace) -> None:
    source = args.resume_from or "model"
    check_outputs(model, len(args.class_list), source)
    height, width, channels = model.input_shape[1:]
    if any(built not in (None, asked) for built, asked in zip((height, width), args.img_size, strict=True)):
        raise InputError(
            f"{source}: Expected a model for images of the size --img-size {args.img_size[0]} {args.img_size[1]}. "
            f"Received one for {height} x {width}"
        )
    if channels not in (1, 3):
        raise InputError(f"{source}: Expected a model of 1 or 3 input channels. Received one of {channels}")


def _out_dir(args: argparse.Namespace) -> Path | None:
    if args.out_dir is not None:
        return Path(args.out_dir)
    return None if args.best_model == "NOSAVE" else Path(args.best_model).with_suffix("")


def finish(training: Training, best: BestModel, losses: list, accuracies: list, flips: bool = False) -> None:
    """Save the final model, print the training summary, and score the test set with the best weights."""
    args, model = training.args, training.org_model
    if losses:
        # The lowest loss may be NaN-free while others are not.
        epoch = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
        print("\n==== Training summary ====")
        print(f"Minimum val loss achieved at epoch: {epoch + 1}")
        print(f"Best val loss: {losses[epoch]}")
        print(f"Best val accuracy: {accuracies[epoch]}")
    if args.final_model != "NOSAVE":
        dm_checkpoint.save_model(model, args.final_model)
    best.restore(model)

    print("\n==== Evaluating the best model on the test set ====", flush=True)
    y_true, y_pred, _, y_flips = predict(model, training.test_set, flips=flips, progress=True)
    predictions = {"single": y_pred} | ({"flips": y_flips} if flips else {})
    print(f"Test accuracy: {(y_true.argmax(1) == y_pred.argmax(1)).mean():.4f}")
    print(f"AUROC on test set: {auc_line(auc_by_class(y_true, y_pred), args.class_list)}")
    if flips:
        print(f"AUROC on test set, mean of 4 flips: {auc_line(auc_by_class(y_true, y_flips), args.class_list)}")
    if training.out_dir is not None:
        write_test_results(training.out_dir, training.test_set.filenames, y_true, predictions, args.class_list)
        print(f"Results are in {training.out_dir}", flush=True)
