"""What scripts left in a folder, read back, and a run that is killed: what tests of several scripts share."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import cv2


def read_report(out):
    return json.loads((out / "report.json").read_text())


def read_png(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_folder(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def files_of(out):
    """What the trainers and the sampler read of a prepared folder, without what names sources."""
    others = ("report.json", "manifest.jsonl", "images.csv")
    return {name: data for name, data in read_folder(out).items() if name not in others}


def check_going_on(script, download, options, prepare, folder):
    """Kill a preparation script that writes full images when two are there: given again, it keeps them, and ends with
    the files of a run left alone. options: of its command line. prepare(out): the same in this process."""
    out, fresh = folder / "out", folder / "fresh"
    command = [sys.executable, script.__file__, download, out, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(made := list(out.glob("full_img/[!.]*.png"))) < 2:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists()
    kept = {path: os.stat(path).st_mtime_ns for path in made}
    prepare(out)
    assert any(os.stat(path).st_mtime_ns == changed for path, changed in kept.items())
    prepare(fresh)
    assert read_folder(out) == read_folder(fresh)
