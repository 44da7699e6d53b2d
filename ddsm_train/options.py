"""Declare the options that both trainers have."""

import argparse

from mammo.base import cli


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both trainers; defaults that differ between them are set with `parser.set_defaults`."""
    parser.add_argument("train_dir", help="folder of the training set, one sub-folder a class, searched recursively")
    parser.add_argument("val_dir", help="folder of the validation set, with the same sub-folders")
    parser.add_argument("test_dir", help="folder of the test set, with the same sub-folders")
    cli.add_pixel_options(parser)
    _add_data_options(parser.add_argument_group("data"))
    _add_optimization_options(parser.add_argument_group("optimization"))
    _add_speed_options(parser.add_argument_group("memory and speed"))
    _add_resuming_options(parser.add_argument_group("going on after a stop"))
    _add_model_options(parser.add_argument_group("models"))


def _add_data_options(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    add("--class-list", nargs="+", metavar="CLASS", help="class sub-folders, in the order of the outputs")
    add("--batch-size", "-bs", type=cli.positive_int, default=64, help="batch size of validation and test")
    text = "the training batch size is --batch-size times this: training takes about twice the memory"
    add("--train-bs-multiplier", type=cli.positive_float, default=0.5, help=text)
    cli.add_flag(group, "--augmentation", True, "augment training images: flips, rotation, shear, zoom, channel shift")
    cli.add_flag(group, "--load-train-ram", False, "keep resized training images in memory, in the files' integer type")
    cli.add_flag(group, "--load-val-ram", False, "the same for the validation images")
    text = (
        "an unreadable image ends the run, or is left out and listed; one lost only during training is replaced by "
        "another of its batch, without any weight"
    )
    add("--on-error", choices=["stop", "skip"], default="stop", help=text)
    text = (
        "first read all images, each file once, and list the unusable ones by cause; results are kept in "
        "data_check.csv of --out-dir"
    )
    cli.add_flag(group, "--check-data", True, text)


def _add_optimization_options(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    names = ["sgd", "rmsprop", "adagrad", "adadelta", "adam", "adamax", "nadam"]
    text = "sgd has Nesterov momentum 0.9 and halves its rate on a plateau of the validation loss"
    add("--optimizer", dest="optim", default="sgd", choices=names, help=text)
    add("--init-learningrate", "-ilr", dest="init_lr", type=cli.positive_float, default=0.01, help="rate of stage 1")
    add("--all-layer-multiplier", type=cli.positive_float, help="the last stage's rate is stage 1's times this")
    add("--nb-epoch", "-ne", type=cli.natural_int, default=5, help="epochs of stage 1; 0 skips it")
    text = "total epochs when the last stage ends: all layers"
    add("--all-layer-epochs", type=cli.natural_int, default=20, help=text)
    add("--weight-decay", "-wd", type=cli.natural_float, default=1e-4, help="L2 penalty of the new layers in stage 1")
    add("--weight-decay2", "-wd2", type=cli.natural_float, default=1e-4, help="the same from stage 2 on")
    add("--hidden-dropout", "-hd", type=cli.fraction, default=0.0, help="dropout rate of the new layers in stage 1")
    add("--hidden-dropout2", "-hd2", type=cli.fraction, default=0.0, help="the same from stage 2 on")
    add("--lr-patience", "-lrp", type=cli.natural_int, default=10, help="plateau epochs before sgd halves its rate")
    text = "epochs without a lower validation loss before a stage ends"
    add("--es-patience", "-esp", type=cli.natural_int, default=25, help=text)
    cli.add_flag(group, "--auto-batch-balance", True, "weigh samples by the inverse frequency of their class by batch")
    text = "loss weight of class 1, without --auto-batch-balance"
    add("--pos-cls-weight", type=cli.natural_float, default=1.0, help=text)
    add("--neg-cls-weight", type=cli.natural_float, default=1.0, help="loss weight of the negative class, likewise")
    text = "frozen batch normalization uses and tracks batch statistics (the original), or runs in inference mode"
    add("--frozen-bn", choices=["batch", "inference"], default="batch", help=text)


def _add_speed_options(group: argparse._ActionsContainer) -> None:
    text = "compute in 16 bits, weights and probabilities in 32: activations take down to half the memory"
    cli.add_flag(group, "--mixed-precision", False, text)
    text = "compute activations again in the backward pass: same steps, less memory, more time; for resnet50 and such"
    cli.add_flag(group, "--remat", False, text)
    text = "take one step for the mean gradient of N training batches; batch norm and balancing still see one at a time"
    group.add_argument("--accumulate", type=cli.positive_int, default=1, metavar="N", help=text)
    cli.add_flag(group, "--jit", False, "compile steps with XLA: slow to begin, faster on GPUs; JAX always does")


def _add_resuming_options(group: argparse._ActionsContainer) -> None:
    text = "go on where the same command was stopped, by the folder state of --out-dir; or start over and save no state"
    group.add_argument("--resume", choices=["auto", "off"], default="auto", help=text)
    group.add_argument("--fresh", action="store_true", help="start over, whatever was saved")
    text = "save every N training steps too; 0: as each epoch ends, and when stopped by SIGTERM or SIGINT"
    group.add_argument("--save-every", type=cli.natural_int, default=0, metavar="N", help=text)
    text = "keep to operations that repeat exactly, some of them slower: the same command gives the same weights"
    cli.add_flag(group, "--deterministic", False, text)


def _add_model_options(group: argparse._ActionsContainer) -> None:
    add = group.add_argument
    cli.add_optional(group, "--resume-from", metavar="FILE", help="start from this model (.h5 of any age, or .keras)")
    text = "index of the first layer that stage 2 of patch training, or stage 1 of image training, trains"
    cli.add_optional(group, "--top-layer-nb", type=cli.positive_int, help=text)
    add("--trust-checkpoint", action="store_true", help="open model files that hold Python code, too, which then runs")
    add("--best-model", "-bm", metavar="FILE", help="where the best model is saved, or NOSAVE")
    text = "where the model of the last epoch is saved, or NOSAVE"
    add("--final-model", "-fm", metavar="FILE", default="NOSAVE", help=text)
    cli.add_optional(group, "--tensorboard", metavar="DIR", help="also write logs for TensorBoard to this folder")
    text = (
        "folder for args.json, data_check.csv, history.csv, metrics.json and predictions.csv; default: the name of the "
        "best model without its ending"
    )
    add("--out-dir", metavar="DIR", help=text)
