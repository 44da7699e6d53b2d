# Sourced by the other scripts from the root of the project: enter the active virtual environment, or else make one
# in .venv, and install the project with its requirements where they are missing or have changed.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    [ -d .venv ] || python3 -m venv .venv
    source .venv/bin/activate
fi
stamp="$(python -c 'import sys; print(sys.prefix)')/.end2end-mammography-installed"
wanted="$(pwd) $(cat requirements.txt setup.py | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing the requirements ..."
    # Silences a note that setuptools gives for any editable installation.
    PYTHONWARNINGS=ignore python -m pip install --quiet --disable-pip-version-check -e ".[test]"
    echo "$wanted" > "$stamp"
fi
