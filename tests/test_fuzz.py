"""A part of `python -m tests.fuzz`, and that it sees what it looks for."""

import sys

import pytest

from tests.fuzz import worker
from tests.fuzz.__main__ import fuzz
from tests.fuzz.seeds import targets

CASES = 60


def test_mutated_files_do_no_harm():
    whole = range(-len(targets()), 0)
    outcomes = fuzz([*whole, *range(CASES)], seed=1)
    assert [outcome for outcome in outcomes if outcome["finding"]] == []
    assert {outcome["target"]: outcome["status"] for outcome in outcomes if outcome["case"] < 0} == {
        target.name: 0 for target in targets()
    }
    assert sum(outcome["status"] == 1 for outcome in outcomes) > CASES / 4


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        ("raise KeyError('x')", "stack trace"),
        ("while True: pass", "hang"),
        ("return 3", "exit status 3"),
        ("return 1", "no line that says what is wrong"),
        ("os.write(2, b'a: error: out of memory'); return 1", "memory"),
        ("os.write(2, b'Traceback (most recent call last):'); return 0", "stack trace in the output"),
        ("Path('out/.partial.a.png').touch(); return 0", "partial output"),
        ("Path('../evil').touch(); return 0", "output outside its folder: evil"),
        ("Path('evil').touch(); return 0", "output outside its folder: case/evil"),
        ("Path('out/a.png').touch(); return 0", "is not whole: a.png: ValueError no whole picture"),
        ("Path('out/a.json').write_text('{'); return 0", "is not whole: a.json: JSONDecodeError"),
        ("Path('out/a.csv').write_text('a,b'); return 0", "is not whole: a.csv: no end of line"),
        ("Path('out/a.h5').touch(); return 0", "is not whole: a.h5: OSError"),
        ("Path('in.png').write_text('b'); return 0", "output outside its folder: case/in.png"),
        ("os.write(2, b'a: error: wrong'); return 1", ""),
        ("os.write(2, b'1 image at fault:\\n  in.png: wrong'); return 1", ""),
        ("sys.exit(2)", ""),
    ],
)
def test_harm_is_seen(tmp_path, monkeypatch, body, finding):
    monkeypatch.setattr(worker, "SECONDS", 0.2)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"command_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"import os, sys\nfrom pathlib import Path\ndef main(argv):\n    {body}\n")
    folder = tmp_path / "place" / "case"
    (folder / "out").mkdir(parents=True)
    (folder / "in.png").touch()
    before = worker._listing(folder.parent)
    found = worker.judge(folder, before, *worker.run_command(name, [], folder), error="at fault:")
    sys.modules.pop(name, None)
    assert finding in found
    assert bool(found) == bool(finding)
