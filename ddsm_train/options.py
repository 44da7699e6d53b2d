"""Declare the options that both trainers have."""

import argparse

from mammo.base.cli import (
    add_flag,
    add_optional,
    add_pixel_options,
    fraction,
    natural_float,
    natural_int,
    positive_float,
    positive_int,
)


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Options of both trainers. Defaults that differ between them are given with `parser.set_defaults`."""
    parser.add_argument("train_dir", help="folder of the training set, one sub-folder a class, searched recursively")
    parser.add_argument("val_dir", help="folder of the validation set, with the same sub-folders")
    parser.add_argument("test_dir", help="folder of the test set, with the same sub-folders")
    add_pixel_options(parser)

    group = parser.add_argument_group("data")
    group.add_argument(
        "--class-list", nargs="+", metavar="CLASS", help="class sub-folders, in the order of the outputs"
    )
    group.add_argument("--batch-size", "-bs", type=positive_int, default=64, help="batch size of validation and test")
    group.add_argument(
        "--train-bs-multiplier", type=positive_float, default=0.5,
        help="the training batch size is --batch-size times this: training takes about twice the memory",
    )  # fmt: skip
    add_flag(
        group,
        "--augmentation",
        True,
        "augment training images by flips, rotation, shear, zoom and channel shift",
    )
    add_flag(
        group,
        "--load-train-ram",
        False,
        "keep the resized training images in memory, in their file's integer type",
    )
    add_flag(group, "--load-val-ram", False, "the same for the validation images")
    group.add_argument(
        "--on-error", choices=["stop", "skip"], default="stop",
        help="what an unreadable image does: end the run, or be left out and listed. Of one that is lost only during "
        "training, another image of its batch takes the place, without any weight",
    )  # fmt: skip
    add_flag(
        group, "--check-data", True,
        "read all images before training and list those that cannot be used, by cause; what is known of a file is "
        "kept in data_check.csv of --out-dir, so that it is read once",
    )  # fmt: skip

    group = parser.add_argument_group("optimization")
    group.add_argument(
        "--optimizer", dest="optim", default="sgd",
        choices=["sgd", "rmsprop", "adagrad", "adadelta", "adam", "adamax", "nadam"],
        help="sgd has Nesterov momentum 0.9 and halves its rate on a plateau of the validation loss",
    )  # fmt: skip
    group.add_argument(
        "--init-learningrate",
        "-ilr",
        dest="init_lr",
        type=positive_float,
        default=0.01,
        help="learning rate of stage 1",
    )
    group.add_argument(
        "--all-layer-multiplier", type=positive_float, help="the last stage's rate is stage 1's times this"
    )
    group.add_argument("--nb-epoch", "-ne", type=natural_int, default=5, help="epochs of stage 1; 0 skips it")
    group.add_argument(
        "--all-layer-epochs",
        type=natural_int,
        default=20,
        help="total epochs when the last stage (all layers) ends",
    )
    group.add_argument(
        "--weight-decay",
        "-wd",
        type=natural_float,
        default=1e-4,
        help="L2 penalty of the new layers in stage 1",
    )
    group.add_argument("--weight-decay2", "-wd2", type=natural_float, default=1e-4, help="the same from stage 2 on")
    group.add_argument(
        "--hidden-dropout",
        "-hd",
        type=fraction,
        default=0.0,
        help="dropout rate of the new layers in stage 1",
    )
    group.add_argument("--hidden-dropout2", "-hd2", type=fraction, default=0.0, help="the same from stage 2 on")
    group.add_argument(
        "--lr-patience",
        "-lrp",
        type=natural_int,
        default=10,
        help="epochs on a plateau before sgd halves its rate",
    )
    group.add_argument(
        "--es-patience",
        "-esp",
        type=natural_int,
        default=25,
        help="epochs without a lower validation loss before a stage ends",
    )
    add_flag(
        group,
        "--auto-batch-balance",
        True,
        "weigh samples by the inverse frequency of their class in the batch",
    )
    group.add_argument(
        "--pos-cls-weight",
        type=natural_float,
        default=1.0,
        help="loss weight of class 1, without --auto-batch-balance",
    )
    group.add_argument(
        "--neg-cls-weight",
        type=natural_float,
        default=1.0,
        help="loss weight of the negative class, likewise",
    )
    group.add_argument(
        "--frozen-bn", choices=["batch", "inference"], default="batch",
        help="batch normalization of frozen layers: go on using and tracking batch statistics (the original), "
        "or run in inference mode",
    )  # fmt: skip

    group = parser.add_argument_group("memory and speed")
    add_flag(
        group, "--mixed-precision", False,
        "compute in 16 bits, keeping weights and probabilities in 32: activations take less memory, down to half",
    )  # fmt: skip
    add_flag(
        group, "--remat", False,
        "compute activations again in the backward pass instead of keeping them: the same steps in less memory and "
        "more time; for networks with many layers, such as resnet50",
    )  # fmt: skip
    group.add_argument(
        "--accumulate", type=positive_int, default=1, metavar="N",
        help="take one step for the mean gradient of N training batches; batch normalization and --auto-batch-balance "
        "still see one batch at a time",
    )  # fmt: skip
    add_flag(group, "--jit", False, "compile training steps with XLA: slow to begin, faster on GPUs; JAX always does")

    group = parser.add_argument_group("going on after a stop")
    group.add_argument(
        "--resume", choices=["auto", "off"], default="auto",
        help="go on where the same command was stopped, from what it saved in the folder state of --out-dir, or "
        "start over and save nothing to go on from",
    )  # fmt: skip
    group.add_argument("--fresh", action="store_true", help="start over, whatever was saved")
    group.add_argument(
        "--save-every", type=natural_int, default=0, metavar="N",
        help="save every N training steps too; 0: as each epoch ends, and when stopped by SIGTERM or SIGINT",
    )  # fmt: skip
    add_flag(
        group, "--deterministic", False,
        "keep to operations that repeat exactly, some of them slower: the same command gives the same weights",
    )  # fmt: skip

    group = parser.add_argument_group("models")
    add_optional(group, "--resume-from", metavar="FILE", help="start from this saved model (.h5 of any age, or .keras)")
    add_optional(
        group,
        "--top-layer-nb",
        type=positive_int,
        help="index of the first layer that stage 2 of patch training, or stage 1 of image training, trains",
    )
    group.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="open model files even where they hold Python code, which then runs",
    )
    group.add_argument("--best-model", "-bm", metavar="FILE", help="where the best model is saved, or NOSAVE")
    group.add_argument(
        "--final-model",
        "-fm",
        metavar="FILE",
        default="NOSAVE",
        help="where the model of the last epoch is saved, or NOSAVE",
    )
    add_optional(group, "--tensorboard", metavar="DIR", help="also write logs for TensorBoard to this folder")
    group.add_argument(
        "--out-dir", metavar="DIR",
        help="folder for args.json, data_check.csv, history.csv, metrics.json and predictions.csv; "
        "default: the name of the best model without its ending",
    )  # fmt: skip
