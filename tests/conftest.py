"""Fixtures shared by all tests: where the golden data lie, if they do."""

import os
import sys
import tracemalloc
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SHARED = Path(os.environ.get("DM_SHARED_DIR", Path(__file__).resolve().parents[2] / "shared"))


def _shared(name):
    path = SHARED / name
    if not path.is_dir():
        pytest.skip(f"{path} not found (set DM_SHARED_DIR to the folder that holds {name}/)")
    return path


@pytest.fixture(scope="session")
def golden():
    """Folder with inputs and outputs of the published program; tests that need it are skipped without it."""
    return _shared("golden")


@pytest.fixture(scope="session")
def spec():
    """Folder with the published program's options."""
    return _shared("spec")


@pytest.fixture(scope="session")
def real_mammograms():
    """Four real 16-bit mammograms, inputs only."""
    return sorted(_shared("real_mammograms").glob("*.png"))


@pytest.fixture(autouse=True)
def determinism_ends():
    """`--deterministic` holds for the rest of a process: in tests, for that of the test."""
    yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework import config

        if config.is_op_determinism_enabled():
            config.disable_op_determinism()
    if "torch" in sys.modules:
        import torch

        torch.use_deterministic_algorithms(False)


@pytest.fixture
def memory():
    """Fails a test that reserves more than 256 MB through Python or NumPy at any time."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28
