"""Run the steps of a recipe, each of which makes one folder once and goes on where it was stopped.

A step is a script beside this file, or a function. Its folder holds `command.txt`, by which commands and inputs it was
made, those of the steps that it stands on included, and `done` when it ended well.
"""

import argparse
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
    """The steps of one run in the folder `out`; with `fresh`, each of them begins anew."""

    def __init__(self, out: Path, fresh: bool):
        self.out, self.fresh = out, fresh
        self._begun: set[str] = set()

    def step(
        self,
        name: str,
        script: str,
        words: Sequence[object],
        *,
        env: Mapping[str, object] | None = None,
        places: Mapping[str, object] | None = None,
        inputs: str = "",
        sources: Iterable[str] = (),
        make: Callable[[], object] | None = None,
        expect: str = "",
    ) -> None:
        """Make the folder `name` by a script, unless that is done.

        Args:
            script: file beside this one; with `make`, the words by which the work of that function is known.
            words: arguments of the script.
            env: environment variables that decide what is made.
            places: those that only say where things are, which are not compared with an earlier run's.
            inputs: checksum of the data that the step reads, other than of its sources.
            sources: names of the steps that it stands on.
            make: function that does the work in place of a script.
            expect: hours and score to expect, for the reader of the log.

        Raises InputError for a step that was finished, or is being trained, with other options or data.
        """
        folder, env = self.out / name, {key: str(value) for key, value in (env or {}).items()}
        command = [*(["env", *(f"{key}={value}" for key, value in env.items())] if env else []), script]
        line = shlex.join(word.replace(f"{self.out}/", "OUT/") for word in [*command, *map(str, words)])
        record = [text for source in sources for text in self._record(source)]
        record.append((f"[{inputs}] " if inputs else "") + line)
        if self.fresh and name not in self._begun:
            shutil.rmtree(folder, ignore_errors=True)
        self._begun.add(name)
        there = self._record(name)
        if _words(there) == _words(record):
            if (folder / "done").exists():
                print(f"=== {name}: finished before", flush=True)
                return
        else:
            kept = "finished" if (folder / "done").exists() else "begun to train" if (folder / "state").exists() else ""
            if kept:
                raise InputError(
                    f"{folder}: {kept} with other options or data (see command.txt there). Expected the same, another "
                    f"OUT, that you remove the folder, or --fresh. Received: {record[-1]}"
                )
            if there:
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / "command.txt", "".join(f"{text}\n" for text in record))
        print(f"=== {name}{f' ({expect})' if expect else ''}: {record[-1]}", flush=True)
        if make is not None:
            make()
        else:
            run_script(script, list(map(str, words)), env | {key: str(value) for key, value in (places or {}).items()})
        (folder / "done").touch()

    def _record(self, name: str) -> list[str]:
        file = self.out / name / "command.txt"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


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


def cksum(content: bytes) -> str:
    """Return the checksum and length that the command cksum prints, by which earlier runs know their inputs."""
    return subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout.decode().strip()


def names_of_images(folder: Path) -> str:
    """Return a checksum of the names of all files in the sub-folders train, val and test; hidden files do not count."""
    files = (file for part in ("train", "val", "test") for file in walk_files(folder / part))
    names = sorted(os.fsencode(file.relative_to(folder)) for file in files if not file.name.startswith("."))
    return cksum(b"".join(name + b"\n" for name in names))


def _words(record: Sequence[str]) -> list[list[str]]:
    """Return the lines of a record as words, since earlier versions quoted them in another way."""
    return [shlex.split(line) for line in record]
