"""The fault harness, shortened, and that it would see what it looks for."""

import json
import shutil
import signal
import sys

import numpy as np
import pytest

from mammo.base.files import write_img, write_text
from mammo.commands import phantom
from tests.faults.commands import COMMANDS, ROOT, Command, damaged, differences
from tests.faults.endure import Memory, growth, read_while_written
from tests.faults.kill import FaultError, kill_and_compare


@pytest.mark.slow
def test_a_killed_command_ends_with_the_same_files(tmp_path):
    phantom.run(out=str(tmp_path / "phantom"), patients=16, height=192, width=160, val_size=0.2, jobs=1)
    [sampling] = (command for command in COMMANDS if command.name == "sampling")
    tally = kill_and_compare(sampling, tmp_path, tmp_path / "work", kills=2)
    assert (tally.kills, tally.different) == (2, [])


@pytest.mark.slow
def test_the_best_model_opens_while_it_is_written(tmp_path):
    reading = read_while_written(tmp_path / "best.h5", epochs=12)
    assert reading.opens >= reading.versions > 2


# ------------------------------------------------------------------------------------------------ the harness itself

STEPS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from mammo.base.cli import run_main
from mammo.base.files import append_text, write_text
import argparse

def run(out):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for step in range(8):
        if {body}:
            time.sleep(0.1)

parser = argparse.ArgumentParser()
parser.add_argument("out")
sys.exit(run_main(parser, run))
"""
BODIES = {
    "goes on": "not (out / f'{step}.txt').exists() and (write_text(out / f'{step}.txt', 'x') or True)",
    "appends again": "append_text(out / '0.txt', 'x') or True",
    "leaves a half": "(out / 'a.json').write_text('[') and not time.sleep(0.4) and (out / 'a.json').write_text('[1]')",
    "leaves a hidden file": "(out / f'.partial.{step}.txt').write_text('x') and step",
    "refuses": "next(iter(() if list(out.iterdir()) else [True])) and write_text(out / '0.txt', 'x') or True",
}


def steps(body):
    code = STEPS.format(root=str(ROOT), body=BODIES[body])
    return Command(body, lambda data, out: [sys.executable, "-c", code, str(out)])


def test_a_command_that_goes_on_passes(tmp_path):
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    tally = kill_and_compare(steps("goes on"), tmp_path, tmp_path / "work", kills=4, seed=1, signals=signals)
    assert tally.kills == tally.restarts == 4
    assert tally.equal == tally.trials - len(tally.different) == tally.trials


def test_a_command_that_ends_with_other_files_is_seen(tmp_path):
    tally = kill_and_compare(steps("appends again"), tmp_path, tmp_path / "work", kills=2)
    assert tally.different and set(map(tuple, tally.different)) == {("0.txt",)}


@pytest.mark.parametrize(
    ("body", "seen"),
    [("leaves a half", "not whole: a.json"), ("leaves a hidden file", "left behind"), ("refuses", "exit status 1")],
)
def test_what_a_command_must_not_leave_or_do_is_seen(body, seen, tmp_path):
    with pytest.raises(FaultError, match=seen):  # by the first of the kills that meets it
        kill_and_compare(steps(body), tmp_path, tmp_path / "work", kills=20)


def test_growth_compares_the_second_stage_alone():
    memory = [Memory(epochs, 100 if epochs < 50 else 300 + epochs, 0.0) for epochs in range(101)]
    assert growth(memory, 100) == (357, 397)


def test_differences_and_damages_are_named(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write_img(one / "a" / "image.png", np.arange(900, dtype=np.uint16).reshape(30, 30))
    write_text(one / "table.csv", "a,b\n1,2\n")
    write_text(one / "scores.json", json.dumps({"auc": 0.5}))
    np.savez(one / "maps.npz", maps=np.zeros(3))
    shutil.copytree(one, two)
    assert differences(one, two) == damaged(one) == []
    for name, text in (("a/.partial.image.png", b"half"), ("more.txt", b"")):
        (two / name).write_bytes(text)
    assert damaged(two) == []
    assert differences(one, two) == ["a/.partial.image.png", "more.txt"]
    for path in (two / "a/image.png", two / "scores.json", two / "maps.npz"):
        path.write_bytes(path.read_bytes()[:-2])
    (two / "table.csv").write_text('a,b\n"1,2\n')
    assert [fault.split(":")[0] for fault in damaged(two)] == ["a/image.png", "maps.npz", "scores.json", "table.csv"]
