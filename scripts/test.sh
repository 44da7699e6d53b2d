#!/usr/bin/env bash
# Run lint and all tests. Without an active virtual environment, make one in .venv and install into it first.
#   scripts/test.sh               everything
#   scripts/test.sh -m "not slow" quick ones only; further arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/activate.sh
ruff format --check .
ruff check .
# One process a core, one thread each: more threads than cores would slow each other down.
export OMP_NUM_THREADS=1 TF_NUM_INTRAOP_THREADS=1 TF_NUM_INTEROP_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2
python -m pytest -n auto --dist worksteal "$@"
