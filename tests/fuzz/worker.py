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
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from tests.faults.commands import damaged
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


def prepare(folder: Path, only: Collection[str] = ()) -> None:
    """Make the inputs of all targets, or `only` those of these names, in folders of `folder` called as the targets."""
    for target in chosen(only):
        target.make(folder / target.name)


def chosen(only: Collection[str]) -> list[Target]:
    return [target for target in targets() if not only or target.name in only]


def draw(case: int, seed: int, only: Collection[str] = ()) -> tuple[Target, random.Random]:
    """The target of a case, and the random numbers of its mutations; the same for any number of workers.

    Cases below zero are the targets in their order, whose files stay whole. only: names of those to draw from.
    """
    rng = random.Random(f"{seed} {case}")
    everything = chosen(only)
    if case < 0:
        return everything[-1 - case], rng
    [target] = rng.choices(everything, [target.weight for target in everything])
    return target, rng


def run_case(case: int, seed: int, inputs: Path, only: Collection[str] = ()) -> Outcome:
    """Run a case in a folder of its own. inputs: of `prepare`."""
    target, rng = draw(case, seed, only)
    with tempfile.TemporaryDirectory(prefix="fuzz") as place:
        folder = Path(place, "case")
        shutil.copytree(inputs / target.name, folder)
        files = sorted(path for pattern in target.files for path in folder.glob(pattern))
        file = rng.choice(files)
        mutation = f"{file.relative_to(folder)}: {mutate(file, rng) if case >= 0 else 'none'}"
        before = _listing(folder.parent)
        start = time.monotonic()
        status, output, trace = run_command(target.module, target.args, folder)
        seconds = time.monotonic() - start
        finding = judge(folder, before, status, output, trace, target.error)
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


def judge(folder: Path, before: dict[str, int], status, output: str, trace: str, error: str = "") -> str:
    """What is wrong with the end of a command, or "". error: see `Target`."""
    if trace:
        return trace
    lines = [line for line in output.splitlines() if line.strip()]
    if status not in (0, 1, 2):
        return f"exit status {status}"
    if "Traceback" in output:
        return "stack trace in the output"
    if status == 1 and not any(": error: " in line for line in lines[-1:]) and not (error and error in output):
        return "no line that says what is wrong"
    if status == 1 and "out of memory" in lines[-1]:
        return "memory: " + lines[-1]
    if partial := [path for path in folder.rglob(".partial.*")]:
        return f"partial output {partial[0].name}"
    written = {name for name, time in _listing(folder.parent).items() if before.get(name) != time}
    if outside := sorted(name for name in written if not name.startswith("case/out")):
        return f"output outside its folder: {outside[0]}"
    for fault in (*damaged(folder / "out"), *_cut(folder / "out")):
        if f"case/out/{fault.partition(': ')[0]}" in written:
            return f"output is not whole: {fault}"
    return ""


def _listing(folder: Path) -> dict[str, int]:
    """When each file below a folder was changed, in nanoseconds; 0 for folders."""
    return {
        path.relative_to(folder).as_posix(): 0 if path.is_dir() else path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if not path.name.startswith(".lock")
    }


def _cut(folder: Path) -> list[str]:
    """Tables and lists without their last end of line."""
    texts = [path for path in folder.rglob("*") if path.suffix in (".csv", ".txt")]
    return [f"{path.relative_to(folder)}: no end of line" for path in texts if path.read_bytes()[-1:] not in b"\n"]


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
    from mammo.train import backend

    backend.start_backend()
    for name in ("mammo.evaluate.predict", "ddsm_train.training"):
        importlib.import_module(name)


def main(folder: str, seed: str, *only: str) -> None:
    """Run the cases whose numbers come on standard input, and answer each with a line of JSON.

    folder: of `prepare`. only: names of the targets to draw from. A limit of memory holds from the first case on.
    """
    import warnings

    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    load_modules()
    limit_memory()
    for number, line in enumerate(sys.stdin):
        outcome = run_case(int(line), int(seed), Path(folder), only)
        answers.write(json.dumps(outcome._asdict()) + "\n")
        answers.flush()
        if number % 50 == 49:
            import keras

            keras.utils.clear_session()


if __name__ == "__main__":
    main(*sys.argv[1:])
