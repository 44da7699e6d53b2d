"""What scripts left in a folder, read back, and a run that is killed: what tests of several scripts share."""

import csv
import json

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
