"""Fixtures shared by all tests: where the golden data lie, if they do."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

SHARED = Path(os.environ.get("DM_SHARED_DIR", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(scope="session")
def golden():
    """Folder with inputs and outputs of the published program; tests that need it are skipped without it."""
    path = SHARED / "golden"
    if not path.is_dir():
        pytest.skip(f"golden data not found at {path} (set DM_SHARED_DIR to the folder that holds golden/)")
    return path


@pytest.fixture(scope="session")
def real_mammograms():
    """Four real 16-bit mammograms, inputs only."""
    path = SHARED / "real_mammograms"
    if not path.is_dir():
        pytest.skip(f"real mammograms not found at {path} (set DM_SHARED_DIR)")
    return sorted(path.glob("*.png"))
