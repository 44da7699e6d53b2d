"""One case after another in one process: a command on a mutated file, and what it leaves behind.

What counts as a finding is in `judge`.
"""

import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from tests.fuzz.mutate import mutate
from tests.fuzz.seeds import Target, targets

MEMORY = 4 * 2**30  # beyond what the process has at the start
SECONDS = 10  # of processor time, since a busy machine is no fault; a command that waits is stopped after SECONDS_AWAY
SECONDS_AWAY = 120


class Hang(BaseException):
    """A command took too long."""


class Outcome(NamedTuple):
    """What a case showed. finding: what is wrong, or "". status: the exit status, None where there was none."""

    case: int
    target: str
    mutation: str
    finding: str
    status: int | None
    seconds: float
    message: str


def prepare(folder: Path) -> dict[str, Path]:
    """The inputs of all targets, below `folder`, by the name of the target."""
    made = {}
    for number, target in enumerate(targets()):
        made[target.name] = folder / str(number)
        if not made[target.name].exists():
            target.make(made[target.name])
    return made


def draw(case: int, seed: int) -> tuple[Target, random.Random]:
    """The target of a case, and the random numbers of its mutations; the same for any number of workers.

    Cases below zero are the targets in their order, whose files stay whole.
    """
    rng = random.Random(f"{seed} {case}")
    everything = targets()
    if case < 0:
        return everything[-1 - case], rng
    [target] = rng.choices(everything, [target.weight for target in everything])
    return target, rng


def run_case(case: int, seed: int, inputs: Path) -> Outcome:
    """Run a case in a folder of its own. inputs: of its target."""
    target, rng = draw(case, seed)
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        folder = Path(place, "case")
        shutil.copytree(inputs, folder)
        files = sorted(path for pattern in target.files for path in folder.glob(pattern))
        file = rng.choice(files)
        mutation = f"{file.relative_to(folder)}: {mutate(file, rng) if case >= 0 else 'none'}"
        before = _listing(folder.parent)
        start = time.monotonic()
        status, output, trace = run_command(target.module, target.args, folder)
        seconds = time.monotonic() - start
        finding = judge(folder, before, status, output, trace)
    return Outcome(case, target.name, mutation, finding, status, seconds, output[-2000:])


def run_command(module: str, args, folder: Path) -> tuple[int | None, str, str]:
    """Exit status, standard error, and what escaped from a command that runs in `folder`, within the limits."""

    def stop(number, frame):
        raise Hang

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)}
    home = os.getcwd()
    status, trace = None, ""
    with tempfile.TemporaryFile("w+") as stream, _redirected(stream):
        os.chdir(folder)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.alarm(SECONDS_AWAY)
        try:
            status = importlib.import_module(module).main(list(args))
        except SystemExit as end:
            status = end.code
        except Hang:
            trace = "hang: " + traceback.format_exc()
        except BaseException:
            trace = "stack trace: " + traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            os.chdir(home)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        stream.flush()
        stream.seek(0)
        output = stream.read()
    return status, output, trace


@contextlib.contextmanager
def _redirected(stream):
    """Standard output and error go to `stream`, what libraries in C write too."""
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)


def judge(folder: Path, before: set[str], status, output: str, trace: str) -> str:
    """What is wrong with the end of a command, or ""."""
    if trace:
        return trace
    lines = [line for line in output.splitlines() if line.strip()]
    if status not in (0, 1, 2):
        return f"exit status {status}"
    if "Traceback" in output:
        return "stack trace in the output"
    if status == 1 and not any(": error: " in line for line in lines[-1:]):
        return "no line that says what is wrong"
    if status == 1 and "out of memory" in lines[-1]:
        return "memory: " + lines[-1]
    if partial := [path for path in folder.rglob(".partial.*")]:
        return f"partial output {partial[0].name}"
    if outside := sorted(name for name in _listing(folder.parent) - before if not name.startswith("case/out")):
        return f"output outside its folder: {outside[0]}"
    for path in folder.joinpath("out").rglob("*"):
        if path.is_file() and (fault := _damage(path)):
            return f"output {path.relative_to(folder)} is not whole: {fault}"
    return ""


def _listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.name.startswith(".lock")}


def _damage(path: Path) -> str:
    """Why an output cannot be read, or ""."""
    import cv2

    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".npz":
            from dm_heatmap import load_heatmaps

            load_heatmaps(path)
        elif path.suffix == ".png" and cv2.imread(str(path), cv2.IMREAD_UNCHANGED) is None:
            return "no image"
        elif path.suffix in (".csv", ".txt") and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            return "no end of line"
    except Exception as error:
        return repr(error)
    return ""


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def load_modules() -> None:
    """Import what commands import, so that cases are fast, and memory that libraries take does not count."""
    for target in targets():
        importlib.import_module(target.module)
    for name in ("cv2", "pydicom", "pandas", "sklearn.ensemble", "skops.io", "matplotlib.figure", "scipy.ndimage"):
        importlib.import_module(name)
    import dm_args

    dm_args.start_backend()
    importlib.import_module("dm_predict")


def main(folder: str, seed: str) -> None:
    """Run the cases whose numbers come on standard input, and answer each with a line of JSON.

    folder: of `prepare`. A limit of memory holds from the first case on.
    """
    import warnings

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    load_modules()
    inputs = {target.name: Path(folder, str(number)) for number, target in enumerate(targets())}
    limit_memory()
    for number, line in enumerate(sys.stdin):
        case = int(line)
        outcome = run_case(case, int(seed), inputs[draw(case, int(seed))[0].name])
        answers.write(json.dumps(outcome._asdict()) + "\n")
        answers.flush()
        if number % 50 == 49:
            import keras

            keras.utils.clear_session()


if __name__ == "__main__":
    main(*sys.argv[1:])
