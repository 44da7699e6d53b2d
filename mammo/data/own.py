"""Prepare images of the user's own, by a table or by folders: what files and cells say, and the work on each image.

`others` prepares public data sets in the same way.
"""

import argparse
import re
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple

from mammo.base.files import InputError, walk_files
from mammo.base.tables import is_below, plain_header, read_columns
from mammo.base.work import Job, Outcome
from mammo.data.listing import RANDOM_SPLIT, DataSet, Listing, Picture
from mammo.data.prepare import print_exclusions, whole_img_path, whole_options, write_whole
from mammo.data.splits import parse_inbreast_name
from mammo.images import reading
from mammo.images.reading import is_dicom, parse_image_name, read_dicom_header

# Columns of a table of one's own, by the spellings that `tables.find_columns` takes; all but two may be missing.
OWN_COLUMNS = {
    "file": ("file", "filename", "file name", "file path", "path", "image", "image path", "image file path"),
    "label": ("label", "class", "cancer", "target", "pathology"),
    "patient": ("patient", "patient id", "patientid"),
    "side": ("side", "laterality", "imagelaterality", "left or right breast"),
    "view": ("view", "view position", "viewposition", "image view"),
    "set": ("set", "split"),
}
REQUIRED = ("file", "label")
COLUMN_OPTIONS = {f"{name}_column": name for name in OWN_COLUMNS}

# What cells mean, in small letters; of views short, and as the DICOM standard calls them.
NEGATIVE = ("0", "neg", "negative", "normal", "benign", "benign_without_callback", "false", "no")
POSITIVE = ("1", "pos", "positive", "malignant", "cancer", "true", "yes")
SIDES = {"l": "LEFT", "left": "LEFT", "r": "RIGHT", "right": "RIGHT"}
VIEWS = {
    **{"cc": "CC", "craniocaudal": "CC", "cranio-caudal": "CC"},
    **{"mlo": "MLO", "mediolateral oblique": "MLO", "medio-lateral oblique": "MLO"},
}
SET_NAMES = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"},
    **{"test": "test", "testing": "test"},
}

# As in L_MLO, R-CC or LeftCC, with no other letters around it.
_VIEW_IN_NAME = re.compile(r"(?<![a-z])(?:l|left|r|right)[ _-]?(cc|mlo)(?![a-z])", re.IGNORECASE)

# Why an image is no part of the data set, though nothing is wrong with it.
OWN_EXCLUSIONS = {
    "label_of_no_class": "their labels are in neither class",
    "file_without_row": "nothing in the table is about them, so there is no label",
    "file_in_no_set": "they lie beside the folders train, val and test",
}


def start_listing() -> Listing:
    """Return a listing without pictures yet."""
    return Listing(excluded={kind: [] for kind in OWN_EXCLUSIONS}, repairs=defaultdict(list))


class Labels(NamedTuple):
    """Hold the values that mean negative, and positive, in small letters. strict: others are errors."""

    neg: frozenset[str]
    pos: frozenset[str]
    strict: bool

    def is_positive(self, value: str, where: str) -> bool | None:
        """Return None for a value of neither class. Raises InputError, which says `where`, when labels are strict."""
        value = value.strip().lower()
        if value in self.neg | self.pos:
            return value in self.pos
        if self.strict:
            expected = f"one of {', '.join((*NEGATIVE, *POSITIVE))}, or others that --neg-labels and --pos-labels name"
            raise InputError(f"{where}: unknown label. Expected {expected}. Received {value!r}")
        return None


def read_labels(neg: Iterable[str] | None = None, pos: Iterable[str] | None = None) -> Labels:
    """Return labels by their values, none of them in both; where either is given, values of neither are left out."""
    strict = neg is None and pos is None
    classes = [frozenset(map(str.lower, values)) for values in (neg or NEGATIVE, pos or POSITIVE)]
    if both := sorted(classes[0] & classes[1]):
        raise InputError(f"label {', '.join(both)}: in both classes. Expected each in --neg-labels or --pos-labels")
    return Labels(*classes, strict)


def known_value(value: str, allowed: Mapping[str, str], name: str, where: str) -> str:
    """Return what a cell means, such as a side by `SIDES`; InputError, which says `where`, for an unknown value."""
    if value.strip().lower() not in allowed:
        raise InputError(f"{where}: unknown {name}. Expected {', '.join(allowed)}. Received {value!r}")
    return allowed[value.strip().lower()]


def check_once(places: dict[str, str], file: str, where: str) -> None:
    """Raise InputError for a file that was seen before. places: where each was seen."""
    if (other := places.setdefault(file, where)) != where:
        raise InputError(f"{where}: {file} stands at {other} too; remove one of them")


def _from_name(name: str, pattern: str | None) -> dict[str, str]:
    """Return patient, side and view by the name of a file, "" where they are not in it.

    pattern: finds the patient: its first group, or all that it matches. Raises InputError where it finds none.
    """
    found = parse_image_name(Path(name).stem) or ("", "", "")
    known = dict(zip(("patient", "side", "view"), found, strict=True))
    if pattern is not None:
        match = re.search(pattern, name)
        known["patient"] = match and match[min(1, match.re.groups)]
        if not known["patient"]:
            raise InputError(f"{name}: no patient in this name. Expected what --patient-regex {pattern!r} finds")
    return known


def read_own_table(
    root: str | Path, path: str | Path, labels: Labels, columns: Mapping[str, str], pattern: str | None = None
) -> Listing:
    """List images by a table with a row a file, whose names start from the folder `root`.

    columns: headers of the table where they differ from `OWN_COLUMNS`. pattern: finds the patient in a file's name;
    without it and without such columns, patient, side and view are read from names as prepared images have them.
    Raises InputError, which names the line of an unknown value, a file outside `root`, or one that stands there twice.
    """
    listing, lines = start_listing(), {}
    spellings = OWN_COLUMNS | {name: (plain_header(header),) for name, header in columns.items()}
    for where, row in read_columns(path, spellings, OWN_COLUMNS.keys() - {*REQUIRED, *columns}):
        file = relative_path(root, row.pop("file"), where)
        check_once(lines, file, where)
        positive = labels.is_positive(row.pop("label"), where)
        if positive is None:
            listing.excluded["label_of_no_class"].append(file)
            continue
        known = _from_name(file, pattern) | {name: cell for name, cell in row.items() if cell or name == "set"}
        for name, allowed in (("side", SIDES), ("view", VIEWS), ("set", SET_NAMES)):
            if known.get(name) or (name == "set" and "set" in row):  # whose cell may not be empty
                known[name] = known_value(known[name], allowed, name, where)
        listing.pictures.append(Picture(file, positive, **known))
    return listing


def relative_path(root: str | Path, cell: str, where: str) -> str:
    """Return the path of a cell below `root`. Raises InputError for one that leads elsewhere."""
    path = cell.replace("\\", "/")
    if Path(path).is_absolute() and Path(path).is_relative_to(Path(root).absolute()):
        path = Path(path).relative_to(Path(root).absolute()).as_posix()
    if not is_below(path):
        raise InputError(f"{where}: Expected a file below the folder {root}. Received {cell!r}")
    return Path(path).as_posix()


def read_folders(root: str | Path, labels: Labels, pattern: str | None = None, skip: Iterable = ()) -> Listing:
    """List images in class folders, such as neg and pos, which may stand in train, val and test.

    Images beside train, val and test are left out then.
    The patient is what `pattern` finds in the path below the class folder, else the patient in a name of the form that
    prepared images have, else the sub-folder of the class folder. skip: folders that are not read.
    """
    listing, files = start_listing(), list_images_below(root, skip)
    in_sets = any(file.split("/")[0].lower() in SET_NAMES for file in files)
    for file in files:
        *folders, _ = parts = file.split("/")
        name = SET_NAMES.get(folders[0].lower(), "") if in_sets and folders else ""
        if in_sets and not name:
            listing.excluded["file_in_no_set"].append(file)
            continue
        depth = 2 if in_sets else 1  # of class folders
        if len(folders) < depth:
            raise InputError(f"{file}: Expected images of {root} in class folders, such as neg/ or train/neg/")
        positive = labels.is_positive(folders[depth - 1], f"{Path(root, *folders[:depth])}")
        if positive is None:
            listing.excluded["label_of_no_class"].append(file)
            continue
        known = _from_name("/".join(parts[depth:]), pattern)
        if not known["patient"] and len(folders) > depth:
            known["patient"] = folders[depth]
        listing.pictures.append(Picture(file, positive, **known, set=name))
    return listing


def list_images_below(root: str | Path, skip: Iterable = (), suffixes: Sequence[str] | None = None) -> list[str]:
    """Return the paths of the images below `root`. suffixes: of their names. Raises InputError where there are none."""
    suffixes = tuple(suffixes or (*reading.IMAGE_SUFFIXES, ".pgm"))
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder. Expected that of the images")
    files = [path for path in walk_files(root, skip) if path.name.lower().endswith(suffixes)]
    files = [path.relative_to(root).as_posix() for path in files if not path.name.startswith(".")]
    if not files:
        raise InputError(f"{root}: no images below it. Expected files ending in {', '.join(suffixes)}")
    return files


def find_view(path: str | Path) -> str | None:
    """Return CC or MLO by the header of a DICOM image, else by the name of the file; None where neither tells.

    Names that tell are a prepared image's, INbreast's, or one with L_CC, RIGHT-MLO or the like in it.
    """
    if is_dicom(path):
        with suppress(Exception):  # of many kinds, on damaged headers, which the reader of the pixels judges
            if view := VIEWS.get(reading.dicom_view(read_dicom_header(path)).lower()):
                return view
    stem = Path(path).stem
    if known := parse_image_name(stem) or parse_inbreast_name(stem):
        return known[2]
    match = _VIEW_IN_NAME.search(stem)
    return match and VIEWS[match[1].lower()]


def prepare_own_image(job: Job, download: Path, out: Path) -> Outcome:
    """Write the whole image of one job; see `work.run_resumable`."""
    plan, result = job.plan, Outcome(job.name)
    try:
        img, stored = reading.read_mammogram(Path(download, plan["file"]), plan["voi_lut"], plan["whole"]["levels"])
        write_whole(img[:, ::-1] if plan["mirrored"] else img, out, plan["folder"], plan["whole"], plan["file"], result)
    except InputError as error:
        result.faults.append(f"{job.name}: {error}; left out")
        return result
    result.facts |= stored
    kinds = {"monochrome1_inverted": stored["photometric"] == "MONOCHROME1", "mirror_image_undone": plan["mirrored"]}
    kinds |= {"8_bit_scaled_to_16_bit": stored["bits"] == 8}
    result.repairs += [(kind, f"{job.name}: {plan['file']}") for kind, present in kinds.items() if present]
    return result


def stored_bits(results: Iterable[Outcome]) -> int | None:
    """Return the bits that pixels of 16-bit files use, None without any. DICOM does not count: its header tells."""
    files = [result.facts for result in results if result.facts.get("bits") == 16]
    return max((facts["brightest"].bit_length() for facts in files if not facts["photometric"]), default=None)


class OwnData(DataSet):
    """Prepare images whose label is known, and perhaps patient, side, view and set, and nothing else.

    `list_pictures` returns them; the work on each is the same for all formats.
    """

    splits = {  # noqa: RUF012
        "official": "the sets that the data name, --val-size of the training patients being for validation where they "
        "name none; where they name no sets, as random",
        "random": RANDOM_SPLIT,
    }
    repairs = (
        *("monochrome1_inverted", "8_bit_scaled_to_16_bit", "mirror_image_undone"),
        *("rows_of_one_breast_merged", "rows_without_image"),
    )
    exclusions = OWN_EXCLUSIONS
    prepare = staticmethod(prepare_own_image)
    table: ClassVar[str | None] = None  # what --table is, if there is one; required unless that is a default

    def __init__(self, args: Namespace) -> None:
        # One command had the options of all formats once: folders that it began go on.
        options = dict.fromkeys((*COLUMN_OPTIONS, "neg_labels", "pos_labels", "patient_regex"))
        options |= {"format": self.name, "neg_birads": ["1", "2"], "pos_birads": ["4", "5", "6"]}
        super().__init__(Namespace(**options | vars(args)))

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        if cls.table:
            parser.add_argument("--table", metavar="FILE", help=cls.table, required="default" not in cls.table)
        text = "apply the display window or lookup table of each DICOM file that has one"
        parser.add_argument("--voi-lut", action="store_true", help=text)

    def list_pictures(self) -> Listing:
        """Return the pictures of the data."""
        raise NotImplementedError

    def read(self) -> Listing:
        listing = self.list_pictures()
        print(f"found: {listing.count()}")
        print_exclusions(listing, self.exclusions)
        for kind, listed in listing.repairs.items():
            if listed:
                print(f"{kind.replace('_', ' ')}: {len(listed)}, such as {listed[0]}")
        return listing

    def plan(self, pictures: Mapping[str, Picture], places: Mapping[str, str | None]) -> list[Job]:
        """Return a job for each picture whose patient is in a set.

        A file that is not there is a fault of its own. Raises InputError where none is there.
        """
        args, jobs = self.args, []
        options = {"whole": whole_options(args), "voi_lut": args.voi_lut}
        for name, picture in pictures.items():
            if (folder := places[name]) is None:
                continue
            plan = {"file": picture.file, "folder": folder, **options, "mirrored": picture.mirrored}
            sources = (picture.file,) if Path(args.data, picture.file).is_file() else ()
            jobs.append(Job(name, sources, (whole_img_path(name, folder),), plan))
        if jobs and not any(job.sources for job in jobs):
            expected = f"Expected the folder that their names start from, in which {jobs[0].plan['file']} is"
            raise InputError(f"{args.data}: none of the {len(jobs)} files is there. {expected}")
        return jobs

    def complete(self, report: dict, listing: Listing, jobs: Sequence[Job], results: Sequence[Outcome]) -> None:
        """Report how many bits 16-bit files use, and warn of dark images."""
        bits = report["stored_bits"] = stored_bits(results)
        if bits is not None and bits < 15 and not self.args.auto_levels:
            reach = (
                f"after the rescale factor they reach {255 * 2**bits / 2**16:.0f} of 255; --auto-levels stretches them"
            )
            print(f"Warning: the pixels of all 16-bit files use {bits} bits, so that the images are dark: {reach}")


def _add_labels(parser: ArgumentParser) -> None:
    """Add the options that say which labels mean what, and how patients stand in the names of files."""
    add = parser.add_argument_group("labels and patients").add_argument
    text = "values or folders that mean negative (0 neg benign normal ...)"
    add("--neg-labels", nargs="+", metavar="LABEL", help=text)
    text = "the same for positive (1 pos malignant cancer ...); where either is given, images of others are left out"
    add("--pos-labels", nargs="+", metavar="LABEL", help=text)
    text = (
        "finds the patient in a file's name, below the class folder if there is one: the first group, or all; default: "
        "by names such as <patient>_LEFT_CC, then by the sub-folder of the class folder"
    )
    add("--patient-regex", type=_pattern, metavar="REGEX", help=text)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"Expected a regular expression ({error}). Received {text!r}") from None
    return text


class OwnTable(OwnData):
    """Prepare images listed in a table of your own.

    The table is CSV or Excel and has a row an image, with file and label, and perhaps patient, side, view and set.
    Images are PNG, JPEG, TIFF, BMP, PGM or DICOM. Patients whom the table puts into two sets are refused.
    """

    name = "csv"
    table = "table of the images"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        super().add_options(parser)
        group = parser.add_argument_group("names of columns; default: the usual spellings")
        for option, name in COLUMN_OPTIONS.items():
            group.add_argument(f"--{option.replace('_', '-')}", metavar="NAME", help=f"column of the {name}")
        _add_labels(parser)

    def list_pictures(self) -> Listing:
        args = self.args
        columns = {name: getattr(args, option) for option, name in COLUMN_OPTIONS.items() if getattr(args, option)}
        labels = read_labels(args.neg_labels, args.pos_labels)
        return read_own_table(args.data, args.table, labels, columns, args.patient_regex)


class OwnFolders(OwnData):
    """Prepare images in a folder a class.

    The folders are neg and pos, which may lie in train, val and test. Images are PNG, JPEG, TIFF, BMP, PGM or DICOM.
    Patients who are in two sets are refused.
    """

    name = "folders"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        super().add_options(parser)
        _add_labels(parser)

    def list_pictures(self) -> Listing:
        labels = read_labels(self.args.neg_labels, self.args.pos_labels)
        return read_folders(self.args.data, labels, self.args.patient_regex, self.skip)
