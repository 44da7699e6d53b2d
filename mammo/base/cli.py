"""Options shared by the command lines, and how a command line ends.

Only the standard library is imported here, so that `--help` and option errors answer at once.
"""

import argparse
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mammo.base.files import InputError, one_line
from mammo.base.work import BACKENDS

# What the backends' own out-of-memory errors are called, or say: no backend is imported here.
_OUT_OF_MEMORY = ("ResourceExhaustedError", "OutOfMemoryError", "RESOURCE_EXHAUSTED", "DefaultCPUAllocator")

# Options that decide how much memory a command line takes, where it has them.
_SMALLER = ("--batch-size", "--train-bs-multiplier", "--img-size", "--target-height", "--patch-size", "--jobs")
_LEFT_OUT = ("--load-train-ram", "--load-val-ram")
_ADDED = ("--mixed-precision", "--remat")


class Terminated(BaseException):
    """Stop the command, since SIGTERM was received: the machine is wanted by others, or shuts down."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the line breaks of the description, and add the default to each option that has one."""

    def _get_help_string(self, action):
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def number_type(name: str, kind: type, fits: Callable, expected: str) -> Callable:
    """Return a function that reads an option's text as a number of this `kind`, refusing those that do not fit.

    name: what argparse calls the type in its error for texts that are no number. expected: what the error for others
    says, such as "number above 0".
    """

    def read(text: str) -> float:
        if not fits(value := kind(text)):
            raise argparse.ArgumentTypeError(f"Expected a {expected}. Received {text}")
        return value

    read.__name__ = name
    return read


positive_int = number_type("positive_int", int, lambda value: value >= 1, "whole number of at least 1")
natural_int = number_type("natural_int", int, lambda value: value >= 0, "whole number of at least 0")
positive_float = number_type("positive_float", float, lambda value: 0 < value < math.inf, "number above 0")
natural_float = number_type("natural_float", float, lambda value: 0 <= value < math.inf, "number of at least 0")
fraction = number_type("fraction", float, lambda value: 0 <= value < 1, "number from 0 up to, not including, 1")


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
    """Add the options on how pixels become network input: 0..255 floats less the mean of the training set."""
    group = parser.add_argument_group("images")
    size = {"nargs": 2, "type": positive_int, "metavar": ("HEIGHT", "WIDTH")}
    group.add_argument("--img-size", "-is", **size, help="images are resized to this")
    text = "scale each image so that its own maximum becomes this; default: no such scaling"
    add_optional(group, "--img-scale", "-ic", type=positive_float, no_flags=["-nic"], help=text)
    text = "multiply pixels by this to bring them to 0..255 (0.003891 for 16-bit images); default: 1"
    add_optional(group, "--rescale-factor", type=positive_float, help=text)
    add_flag(group, "--featurewise-center", True, "subtract --featurewise-mean from every pixel after rescaling")
    group.add_argument("--featurewise-mean", type=float, help="mean pixel of the training set after rescaling")
    add_flag(group, "--equalize-hist", False, "equalize the histogram of each image (needs pixels within 0..255)")


def add_parallel_options(parser: argparse._ActionsContainer, jobs: int = 1) -> None:
    """Add the options of `mammo.base.work.run_parallel`. jobs: the default of `--jobs`."""
    text = f"images worked on at the same time; default: {jobs}"
    parser.add_argument("--jobs", type=positive_int, default=jobs, help=text)
    text = (
        "what works on them: processes (loky) or threads of this machine, or a cluster: Dask's at "
        "DASK_SCHEDULER_ADDRESS, Ray's at RAY_ADDRESS, or without these a local one of --jobs processes"
    )
    parser.add_argument("--backend", choices=list(BACKENDS), default="loky", help=text)


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


def command(make_parser: Callable[[], argparse.ArgumentParser], run: Callable) -> Callable[..., int]:
    """Return the `main(argv=None)` of a command, which returns the exit status of `run_main`."""
    return lambda argv=None: run_main(make_parser(), run, argv)


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
    except (KeyboardInterrupt, Terminated) as error:
        what, status = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        print(f"{parser.prog}: {str(error) or what}", file=sys.stderr)
        return status
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
    """Return what to do when memory is short, with the options that `parser` has."""
    kinds = (("use a smaller", " or ", _SMALLER), ("leave out", " and ", _LEFT_OUT), ("add", " and ", _ADDED))
    known = [(do, link.join(filter(parser._option_string_actions.get, names))) for do, link, names in kinds]
    advice = ", or ".join(f"{do} {names}" for do, names in known if names)
    return advice and f"; {advice}"
