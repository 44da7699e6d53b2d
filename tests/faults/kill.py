"""Commands killed at random moments and given again until they end, against the same ones left alone."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tests.faults.commands import ENVIRONMENT, Command, damaged, differences

# What a command may answer to a signal: nothing, while Python still starts or to SIGKILL, else as a shell reports it.
STATUSES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
_PATIENCE = 600  # seconds until a command counts as hanging


class FaultError(AssertionError):
    """A command did after a signal what it must not do."""


@dataclass
class Tally:
    """What came of one command. trials: runs, from new folders to the end. kills: signals that met it at work.

    restarts: commands given again. equal: trials whose files were those of the run left alone. seconds: of that one.
    different: names of the files that were not, by trial.
    """

    command: str
    trials: int = 0
    kills: int = 0
    restarts: int = 0
    equal: int = 0
    seconds: float = 0.0
    different: list[list[str]] = field(default_factory=list)


def kill_and_compare(
    command: Command,
    data: Path,
    work: Path,
    kills: int,
    seed: int = 0,
    signals: Sequence[signal.Signals] = (signal.SIGKILL,),
) -> Tally:
    """Send `kills` signals to a command, at moments spread over its whole duration, and give it again until it ends.

    Each trial begins with new folders and a signal within its own share of the duration; what is given again is,
    half of the times, met by another one at any moment. The command's process alone gets the signal, so that its
    workers outlive it, as they do when memory is short. data: of `make_inputs`. work: a folder for all runs, all of
    which write to the same path, since outputs may name it.

    Raises FaultError where a file is not whole after a signal, a command given again fails, or hidden files stay.
    """
    rng, tally = random.Random(seed), Tally(command.name)
    out, reference = work / "out", work / "reference"
    words = command.words(data, out)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.monotonic()
    _run_to_end(words, work)
    tally.seconds = duration = time.monotonic() - started
    _check(out, finished=True)
    out.rename(reference)

    bar = tqdm(total=kills, desc=command.name, unit="kill")
    while tally.kills < kills:
        tally.trials += 1
        moment = (tally.kills + rng.random()) / kills * duration
        while moment is not None:
            sent = rng.choice(signals)
            if not _run_until(words, work, moment, sent):
                duration = min(duration, moment)  # another load of the machine than at first
                break
            tally.kills += 1
            bar.update()
            _check(out)
            tally.restarts += 1
            moment = rng.random() * duration if tally.kills < kills and rng.random() < 0.5 else None
        else:
            _run_to_end(words, work)
        _check(out, finished=True)
        if different := differences(reference, out):
            tally.different.append(different)
            out.rename(work / f"different_{tally.trials}")
        else:
            tally.equal += 1
            shutil.rmtree(out)
    bar.close()
    return tally


def _start(words: list[str], work: Path) -> subprocess.Popen:
    with open(work / "log.txt", "w") as log:
        return subprocess.Popen(words, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _run_until(words: list[str], work: Path, moment: float, sent: signal.Signals) -> bool:
    """Start the command and send it a signal after `moment` seconds; whether it was at work then."""
    process = _start(words, work)
    try:
        status = process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(sent)
        status = _wait(process, work)
        if status in STATUSES[sent]:
            return True
    if status != 0:  # 0: it ended before, or had nothing left to do
        raise FaultError(f"{words[1]}: exit status {status} after {sent.name}: {_last_lines(work)}")
    return False


def _run_to_end(words: list[str], work: Path) -> None:
    process = _start(words, work)
    if (status := _wait(process, work)) != 0:
        raise FaultError(f"{words[1]}: exit status {status} when given again: {_last_lines(work)}")


def _wait(process: subprocess.Popen, work: Path) -> int:
    try:
        return process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise FaultError(f"{process.args[1]}: hangs: {_last_lines(work)}") from None


def _last_lines(work: Path) -> str:
    return " | ".join((work / "log.txt").read_text(errors="replace").splitlines()[-8:])


def _check(out: Path, finished: bool = False) -> None:
    if faults := damaged(out):
        raise FaultError(f"not whole: {'; '.join(faults)}")
    if finished and (left := [str(path) for path in out.rglob(".*")]):
        raise FaultError(f"left behind: {', '.join(left)}")
