"""Define what all data sets have in common: pictures with label, patient, side, view and set, and how they are made.

To add a data set, write a subclass of `DataSet` and name it in `mammo.commands.prepare.DATA_SETS`.
"""

import itertools
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

from mammo.base.files import InputError, counted
from mammo.base.work import Job, Outcome

CLASSES = ("neg", "pos")
SETS = ("train", "val", "test")
FOLDERS = tuple(f"{name}/{label}" for name in SETS for label in CLASSES)  # of whole images, below the output folder


@dataclass(frozen=True)
class Picture:
    """Hold what is known of one image before its pixels are read.

    file: path below the data folder, "" where the plan finds it. patient: "" where not known. side: LEFT, RIGHT or "".
    view: CC, MLO or "". set: one of `SETS`, or "" where the data name none. name: of the image to be, without ending;
    "" where `name_pictures` is to make it. mirrored: whether the file has the picture mirrored.
    """

    file: str
    positive: bool
    patient: str
    side: str
    view: str
    set: str = ""
    name: str = ""
    mirrored: bool = False


@dataclass
class Listing:
    """Hold what the tables of a data set, and the names of its files, tell.

    excluded: what is left out though nothing is wrong with it, by the kinds that the data set explains. repairs: what
    was mended, by kind. faults: rows and files that should be images and cannot be, and why. counts, report: what
    report.json counts besides, and its further sections.
    """

    pictures: list[Picture] = field(default_factory=list)
    excluded: dict[str, list[str]] = field(default_factory=dict)
    repairs: dict[str, list[str]] = field(default_factory=dict)
    faults: list[Outcome] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    report: dict = field(default_factory=dict)

    def count(self) -> str:
        """Return the number of pictures, and of the positive ones among them, as text."""
        positive = sum(picture.positive for picture in self.pictures)
        return f"{counted(len(self.pictures), 'image')} ({positive} positive)"


RANDOM_SPLIT = (
    "--test-size for the test, then --val-size of the others for validation, stratified by any positive image"
)


class DataSet:
    """Prepare one data set: its options, its reader, its plan for each image. Each run makes an object.

    The docstring of a subclass is the text of its `--help`, and the first line its entry in the list of data sets.
    """

    name: ClassVar[str]  # as `mammo prepare` calls it
    data_help: ClassVar[str] = "folder of the images; names in tables start from it"
    files: ClassVar[str] = ""  # lines of `--help` on the files that no other data set has
    splits: ClassVar[Mapping[str, str]] = {"random": RANDOM_SPLIT}  # values of --split, the default first
    test_size: ClassVar[float] = 0.15
    repairs: ClassVar[Sequence[str]] = ()  # kinds that report.json counts even where there are none
    exclusions: ClassVar[Mapping[str, str]] = {}  # why pictures are left out, by kind
    prepare: Callable[..., Outcome]  # makes the files of a job; takes the folders `download` and `out` by name

    def __init__(self, args: Namespace) -> None:
        self.args = args

    @property
    def folders(self) -> tuple[str, ...]:
        """Return the folders of images that the run writes, below the output folder."""
        return FOLDERS

    @property
    def skip(self) -> list[Path]:
        """Return the output folder and its folders of images: their files are no part of data that lie around them."""
        out = self.args.out
        return [] if out is None else [Path(out, folder) for folder in ("", *self.folders)]

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        """Add the options that no other data set has."""

    def read(self) -> Listing | None:
        """Return the pictures, and print what there is; None where a dry run has no more to show."""
        raise NotImplementedError

    def plan(self, pictures: Mapping[str, Picture], places: Mapping[str, str | None]) -> list[Job]:
        """Return a job for each image to be made. pictures: by the name of the image to be.

        places: the folder of each whole image, one of `FOLDERS`; None where its patient is in no set.
        """
        raise NotImplementedError

    def complete(self, report: dict, listing: Listing, jobs: Sequence[Job], results: Sequence[Outcome]) -> None:
        """Write the tables that no other data set has, and add to `report` what they hold."""


def name_pictures(pictures: Iterable[Picture]) -> tuple[dict[str, Picture], list[str]]:
    """Return pictures by the name of their image, and the files whose patient is not known.

    Pictures without a name get `<patient>_<side>_<view>`, with _2, _3 ... where there are several of one. Signs that do
    not belong into a file's name become "-". Those of no known patient get one of their own, called as their file.
    Raises InputError for two patients that would have one name.
    """
    pictures = list(pictures)
    named, patients, unknown = {picture.name: picture for picture in pictures if picture.name}, {}, []
    unnamed = (picture for picture in pictures if not picture.name)
    for picture in sorted(unnamed, key=attrgetter("patient", "side", "view", "file")):
        start = picture.patient
        if not start:
            unknown.append(picture.file)
            picture = replace(picture, patient=picture.file)
            start = Path(picture.file).with_suffix("").as_posix()
        safe = re.sub(r"[^\w.-]+", "-", start).strip(".-") or "patient"
        if patients.setdefault(safe, picture.patient) != picture.patient:
            both = f"patients {patients[safe]!r} and {picture.patient!r}"
            raise InputError(f"{both} would both be called {safe} in file names; rename one of them")
        first = "_".join(filter(None, (safe, picture.side, picture.view)))
        names = itertools.chain([first], (f"{first}_{number}" for number in itertools.count(2)))
        named[next(name for name in names if name not in named)] = picture
    return named, unknown
