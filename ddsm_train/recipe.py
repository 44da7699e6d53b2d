"""Run the steps of a recipe, each of which makes one folder once and goes on where it was stopped.

A step is a script beside this file, or a function. Its folder holds `command.txt`, by which commands and inputs it was
made, those of the steps that it stands on included, and `done` when it ended well.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mammo.base.files import InputError, walk_files, write_text

HERE = Path(__file__).resolve().parent


class Recipe:
    """Make the steps of one run in the folder `out`; with `fresh`, each of them begins anew."""

    def __init__(self, out: Path, fresh: bool) -> None:
        self.out, self.fresh = out, fresh
        self._begun: set[str] = set()

    def step(
        self,
        name: str,
        command: Sequence[object],
        make: Callable[[], object] | None = None,
        *,
        env: Mapping[str, object] | None = None,
        places: Mapping[str, object] | None = None,
        inputs: str = "",
        sources: Iterable[str] = (),
        expect: str = "",
    ) -> None:
        """Make the folder `name` by a command, unless that is done.

        Args:
            command: a script beside this file, and its arguments; with `make`, words by which that work is known.
            make: function that does the work in place of a script.
            env: environment variables that decide what is made.
            places: those that only say where things are, which are not compared with an earlier run's.
            inputs: checksum of the data that the step reads, other than of its sources.
            sources: names of the steps that it stands on.
            expect: hours and score to expect, for the reader of the log.

        Raises InputError for a step that was finished, or is being trained, with other options or data.
        """
        folder, env = self.out / name, {key: str(value) for key, value in (env or {}).items()}
        script, *words = map(str, command)
        shown = [*(f"{key}={value}" for key, value in env.items()), script, *words]
        line = f"[{inputs}] " * bool(inputs) + shlex.join(word.replace(f"{self.out}/", "OUT/") for word in shown)
        record = "".join(map(self._record, sources)) + line + "\n"
        if self.fresh and name not in self._begun:
            shutil.rmtree(folder, ignore_errors=True)
        self._begun.add(name)
        there, finished = self._record(name), (folder / "done").exists()
        if there == record and finished:
            print(f"=== {name}: finished before", flush=True)
            return
        if there != record:
            if finished or (folder / "state").exists():
                done = (
                    f"{'finished' if finished else 'begun to train'} with other options or data (see command.txt there)"
                )
                expected = "Expected the same, another OUT, that you remove the folder, or --fresh"
                raise InputError(f"{folder}: {done}. {expected}. Received: {line}")
            if there:
                shutil.rmtree(folder)
            write_text(folder / "command.txt", record)
        print(f"=== {name}{f' ({expect})' if expect else ''}: {line}", flush=True)
        if make is not None:
            make()
        else:
            run_script(script, words, env | {key: str(value) for key, value in (places or {}).items()})
        (folder / "done").touch()

    def _record(self, name: str) -> str:
        file = self.out / name / "command.txt"
        return file.read_text(encoding="utf-8") if file.exists() else ""


def run_script(script: str, words: Sequence[str], env: Mapping[str, str]) -> None:
    """Run a script beside this file; end with its exit status where it fails.

    Scripts run Python by the environment variable PYTHON: here the one that runs this. What stops this ends the script
    first, whose training then saves where it is.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("RESUME_FROM", "FINAL_MODEL")}
    process = subprocess.Popen(["bash", HERE / script, *words], env={"PYTHON": sys.executable, **kept, **env})
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        raise SystemExit(status if status > 0 else 128 - status)


def check_options(make_parser: Callable[[], argparse.ArgumentParser], prog: str, words: Sequence[str]) -> None:
    """End with status 2, as its command line would, where a script does not take these options."""
    parser = make_parser()
    parser.prog = prog
    paths = ["-" for action in parser._actions if not action.option_strings]
    parser.parse_args([*paths, *words])


def take_fresh(words: Sequence[str]) -> tuple[bool, list[str]]:
    """Return (whether --fresh is among the words, the others)."""
    return "--fresh" in words, [word for word in words if word != "--fresh"]


def checksum(content: bytes) -> str:
    """Return what stands for the content of a file in the record of a step."""
    return hashlib.sha256(content).hexdigest()[:16]


def names_of_images(folder: Path) -> str:
    """Return a checksum of the names of all files in the sub-folders train, val and test; hidden files do not count."""
    files = (file for part in ("train", "val", "test") for file in walk_files(folder / part))
    names = sorted(os.fsencode(file.relative_to(folder)) for file in files if not file.name.startswith("."))
    return checksum(b"\0".join(names))
