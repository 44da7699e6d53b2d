"""Options shared by the command lines, and how a command line ends.

Only the standard library is imported here, so that `--help` and option errors answer at once.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import dm_limits  # noqa: F401  first of all, since it sets a limit for OpenCV
from dm_files import InputError, env_int, one_line
from dm_parallel import BACKENDS

# What the backends' own out-of-memory errors are called, or say: no backend is imported here.
_OUT_OF_MEMORY = ("ResourceExhaustedError", "OutOfMemoryError", "RESOURCE_EXHAUSTED", "DefaultCPUAllocator")
# Options that decide how much memory a command line takes, where it has them.
_SMALLER = ("--batch-size", "--train-bs-multiplier", "--img-size", "--target-height", "--patch-size", "--jobs")
_LEFT_OUT = ("--load-train-ram", "--load-val-ram")
_ADDED = ("--mixed-precision", "--remat")


class Terminated(BaseException):
    """SIGTERM was received: the machine is wanted by others, or shuts down."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the description, and adds the default to each option that has one."""

    def _get_help_string(self, action):
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"Expected a whole number of at least 1. Received {text}")
    return value


def natural_int(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"Expected a whole number of at least 0. Received {text}")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"Expected a number above 0. Received {text}")
    return value


def natural_float(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"Expected a number of at least 0. Received {text}")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"Expected a number from 0 up to, not including, 1. Received {text}")
    return value


def add_flag(parser: argparse._ActionsContainer, name: str, default: bool, help: str) -> None:
    """Add `--name` and `--no-name`."""
    parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_optional(
    parser: argparse._ActionsContainer, *flags: str, help: str, no_flags: Sequence[str] = (), **kwargs
) -> None:
    """Add an option that takes a value and defaults to None, and `--no-...`, which sets it back to None."""
    action = parser.add_argument(*flags, help=help, **kwargs)
    no_flags = ["--no-" + flags[0].removeprefix("--"), *no_flags]
    parser.add_argument(*no_flags, dest=action.dest, action="store_const", const=None, help=argparse.SUPPRESS)


def add_pixel_options(parser: argparse.ArgumentParser) -> None:
    """How pixels become network input: 0..255 floats with the mean of the training set subtracted."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--img-size",
        "-is",
        nargs=2,
        type=positive_int,
        metavar=("HEIGHT", "WIDTH"),
        help="images are resized to this",
    )
    add_optional(
        group, "--img-scale", "-ic", type=positive_float, no_flags=["-nic"],
        help="scale each image so that its own maximum becomes this; default: no such scaling",
    )  # fmt: skip
    add_optional(
        group, "--rescale-factor", type=positive_float,
        help="multiply pixels by this to bring them to 0..255 (0.003891 for 16-bit images); default: 1",
    )  # fmt: skip
    add_flag(group, "--featurewise-center", True, "subtract --featurewise-mean from every pixel after rescaling")
    group.add_argument("--featurewise-mean", type=float, help="mean pixel of the training set after rescaling")
    add_flag(group, "--equalize-hist", False, "equalize the histogram of each image (needs pixels within 0..255)")


def add_parallel_options(parser: argparse._ActionsContainer, jobs: int = 1) -> None:
    """How `dm_parallel.run_parallel` works. jobs: the default of `--jobs`."""
    parser.add_argument(
        "--jobs", type=positive_int, default=jobs, help=f"images worked on at the same time; default: {jobs}"
    )
    parser.add_argument(
        "--backend", choices=list(BACKENDS), default="loky",
        help="what works on them: processes (loky) or threads of this machine, or a cluster: Dask's at "
        "DASK_SCHEDULER_ADDRESS, Ray's at RAY_ADDRESS, or without these a local one of --jobs processes",
    )  # fmt: skip


def add_prepare_options(parser: argparse._ActionsContainer) -> None:
    """How `dm_dataset.prepare` works."""
    parser.add_argument(
        "--on-error", choices=["stop", "skip"],
        help="what a bad image or mask does: end the run, or be left out and listed; "
        "default: be left out and listed, with exit status 1 when all others are done",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start over, and replace the work of an earlier run")
    add_parallel_options(parser)


def add_preparation_options(parser: argparse.ArgumentParser, splits: Mapping[str, str], test_size: float) -> None:
    """How a data set is divided by patient, what its whole images become, and how the work is done.

    splits: the values of `--split` and what each does, the default first; "lists" is among them always.
    test_size: the default of `--test-size`. What reads these options: `dm_dataset`.
    """
    splits = {**splits, "lists": "from files"}
    default = next(iter(splits))
    parser.add_argument("--dry-run", action="store_true", help="read the tables alone and print the split")
    group = parser.add_argument_group("split by patient")
    add = group.add_argument
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in splits.items())
    add("--split", choices=list(splits), default=default, help=f"{meanings} (default: {default})")
    add("--test-size", type=fraction, default=test_size, help=f"share of the patients for the test ({test_size})")
    add("--val-size", type=fraction, default=0.1, help="share of the other patients for validation (0.1)")
    add("--random-state", type=natural_int, default=12345, help="seed of the split (12345)")
    for name in ("train", "val", "test"):
        add(f"--pat-{name}", metavar="FILE", help=f"with --split lists: {name} patients, one id a line")
    group = parser.add_argument_group("whole images")
    add = group.add_argument
    add(
        "--img-size", "-is", nargs=2, type=positive_int, default=[1152, 896], metavar=("HEIGHT", "WIDTH"),
        help="size of the whole images (1152 896)",
    )  # fmt: skip
    add(
        "--resize", choices=["stretch", "pad"], default="stretch",
        help="stretch to the size (the original), or keep the aspect ratio, fill the height and pad the width with "
        "zeros (default: stretch)",
    )  # fmt: skip
    add_flag(group, "--segment-breast", False, "blank all but the breast, and cut the image to it")
    add_flag(group, "--auto-levels", False, "stretch the pixels of each image to the full range, 0..65535")
    add(
        "--face", choices=["left", "right", "as-is"], default="as-is",
        help="mirror whole images so that the breasts point this way (default: as-is)",
    )  # fmt: skip
    add_prepare_options(parser.add_argument_group("work"))


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


def complete(parser: argparse.ArgumentParser, given: dict, positional: Sequence = ()) -> argparse.Namespace:
    """Fill in the defaults of `parser` for a call of a script's `run(...)` from Python.

    positional: the values of the first positional arguments, in the order of the command line.
    Raises TypeError, as a function call would, for a name that is no option, a missing required one, one given
    twice, or too many positional arguments.
    """
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    names = [name for name, action in actions.items() if not action.option_strings]
    if len(positional) > len(names):
        raise TypeError(f"too many positional arguments: Expected {', '.join(names)}. Received {len(positional)}")
    given = dict(**dict(zip(names, positional, strict=False)), **given)
    if unknown := sorted(set(given) - set(actions)):
        raise TypeError(f"unknown options: {', '.join(unknown)}")
    if missing := [name for name, action in actions.items() if action.required and name not in given]:
        raise TypeError(f"missing options: {', '.join(missing)}")
    return argparse.Namespace(**{name: given.get(name, parser.get_default(name)) for name in actions})


def check_same_options(folder: str | os.PathLike, theirs: Mapping, ours: Mapping, instead: str) -> None:
    """Raise InputError, naming them, for options other than those of the run that began its work in `folder`.

    instead: what to do without the same options.
    """
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        changes = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} now" for name in different)
        raise InputError(
            f"{folder}: has the work of a run with other options ({changes}): Expected the same, to go on. "
            f"Give these, or {instead}"
        )


def start_backend(deterministic: bool = False) -> None:
    """Import Keras, start its backend and seed it with RANDOM_SEED (12345); call before a model is built.

    deterministic: keep to operations that repeat exactly.

    TensorFlow's native code writes notices to standard error, where errors of one line belong, before its logging
    can be configured: they are dropped, unless TF_CPP_MIN_LOG_LEVEL is 0.
    """
    seed = env_int("RANDOM_SEED", 12345)
    if not 0 <= seed < 2**32:
        raise InputError(f"environment variable RANDOM_SEED: Expected 0 to 2**32 - 1. Received {seed}")
    with _dropped_standard_error(os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") != "0"):
        try:
            import keras
        except (ImportError, ValueError) as error:
            backend = os.environ.get("KERAS_BACKEND", "tensorflow")
            raise InputError(f"Keras cannot start with the backend {backend} (KERAS_BACKEND): {error}") from error
        if deterministic:
            from dm_multi_gpu import set_determinism

            set_determinism(seed)
        else:
            keras.utils.set_random_seed(seed)
        keras.ops.zeros(1)


@contextmanager
def _dropped_standard_error(drop: bool) -> Iterator[None]:
    if not drop:
        yield
        return
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def run_main(parser: argparse.ArgumentParser, run: Callable, argv: Sequence[str] | None = None) -> int:
    """Parse `argv`, call `run` with the options as keyword arguments, and return the exit status.

    0 when all went well, 1 for bad data or a full disk, 2 (argparse's own exit) for bad options, 130 when
    interrupted, 143 when terminated. Every failure is one line on standard error.
    """
    options = vars(parser.parse_args(argv))
    try:
        with _terminated_by_exception():
            return run(**options) or 0
    except InputError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except UnicodeEncodeError as error:
        if error.reason != "surrogates not allowed":  # by which Python stands for bytes of names that are no text
            raise
        name = error.object[max(0, error.start - 80) : error.end + 80]
        message = f"{name}: Expected file names in UTF-8. Received other bytes in one; rename it"
    except MemoryError as error:
        message = "out of memory" + (f" ({error})" if str(error) else "") + _less_memory(parser)
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except Terminated as error:
        print(f"{parser.prog}: {str(error) or 'terminated'}", file=sys.stderr)
        return 143
    except Exception as error:
        if not any(name in f"{type(error).__name__} {error}" for name in _OUT_OF_MEMORY):
            raise
        message = "out of memory" + _less_memory(parser)
    print(f"{parser.prog}: error: {one_line(message)}", file=sys.stderr)
    return 1


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """Within the block SIGTERM raises Terminated, so that nothing half written stays. Signals are the main thread's."""

    def stop(number, frame):
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _less_memory(parser: argparse.ArgumentParser) -> str:
    """What to do when memory is short, with the options that `parser` has."""
    smaller, left_out, added = (
        [name for name in names if name in parser._option_string_actions] for names in (_SMALLER, _LEFT_OUT, _ADDED)
    )
    advice = [f"use a smaller {' or '.join(smaller)}"] if smaller else []
    advice += [f"leave out {' and '.join(left_out)}"] if left_out else []
    advice += [f"add {' and '.join(added)}"] if added else []
    return "; " + ", or ".join(advice) if advice else ""
