"""The notebooks in docs/ run from top to bottom, with smaller settings; their figures are not looked at."""

import json
import re
from contextlib import chdir

import matplotlib
import pytest

from tests.helpers import ROOT
from tests.train.networks import quick_training

NOTEBOOKS = ("train", "score", "finetune_and_explain")  # each uses what the one before leaves
SMALL = {"PATIENTS": 24, "HEIGHT": 160, "WIDTH": 128, "PATCH": 64}
SMALL |= {"PATCH_EPOCHS": 1, "TOP_EPOCHS": 1, "ALL_EPOCHS": 2, "EPOCHS": 1}


def cells(name):
    """Return the code cells of a notebook."""
    content = json.loads((ROOT / f"docs/notebooks/{name}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_all_notebooks_are_tested_and_hold_their_output():
    assert {path.stem for path in (ROOT / "docs/notebooks").glob("*.ipynb")} == set(NOTEBOOKS)
    for name in NOTEBOOKS:
        content = (ROOT / f"docs/notebooks/{name}.ipynb").read_text()
        outputs = [cell["outputs"] for cell in json.loads(content)["cells"] if cell["cell_type"] == "code"]
        assert sum(map(bool, outputs)) >= len(outputs) / 2
        assert "Traceback" not in content and not re.search(r"/(home|tmp|work|root)/\w", content)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of pictures without a window
def test_notebooks_run(tmp_path, monkeypatch):
    monkeypatch.setenv("NUM_CPU_CORES", "1")
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    with chdir(tmp_path), quick_training():
        for name in NOTEBOOKS:
            values = {}
            for cell in cells(name):
                exec(compile(cell, f"{name}.ipynb", "exec"), values)
                values |= {key: small for key, small in SMALL.items() if key in values}
    matplotlib.use(before)
    results = tmp_path / "work/notebooks"
    assert {path.stem for path in results.glob("*.h5")} == {"patch", "image", "finetuned"}
    assert values["auc"].keys() == {"as it is", "finetuned"} and len(values["results"]) > 3
