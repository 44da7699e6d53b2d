"""Prepare four public data sets: who is on which file, with what label.

They are CMMD (Chinese Mammography Database), VinDr-Mammo, MIAS (the small version) and exam lists of the NYU
metarepository.
"""

import functools
import itertools
import re
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from pathlib import Path

from mammo.base.files import InputError, walk_files
from mammo.base.guards import read_bytes
from mammo.base.tables import TABLE_SUFFIXES, read_columns
from mammo.base.unpickle import load_plain
from mammo.base.work import Outcome, run_parallel
from mammo.data.inbreast import Classes, add_class_options, read_classes
from mammo.data.listing import Listing, Picture
from mammo.data.own import (
    SET_NAMES,
    SIDES,
    VIEWS,
    OwnData,
    check_once,
    known_value,
    list_images_below,
    relative_path,
    start_listing,
)
from mammo.images import reading
from mammo.images.reading import read_dicom_header

CMMD_COLUMNS = {"patient": ("id1",), "side": ("leftright",), "label": ("classification",)}
VINDR_COLUMNS = {
    **{"study": ("study id",), "image": ("image id",), "side": ("laterality",), "view": ("view position", "view")},
    **{"birads": ("breast birads",), "set": ("split",)},
}

NYU_VIEWS = {"L-CC": "left", "R-CC": "right", "L-MLO": "left", "R-MLO": "right"}
MIAS_CLASSES = ("CALC", "CIRC", "SPIC", "MISC", "ARCH", "ASYM", "NORM")


def _find_table(root, start: str, suffixes: Sequence[str] = TABLE_SUFFIXES) -> Path:
    """Return the one file below `root` whose name, in small letters, has this start and one of the `suffixes`."""
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder. Expected that of the data set")
    found = [path for path in walk_files(root) if path.name.lower().startswith(start)]
    found = [path for path in found if path.suffix.lower() in suffixes]
    if len(found) != 1:
        received = ", ".join(map(str, found[:3])) or "none"
        expected = f"Expected one table {start}*{' or '.join(suffixes)} below it"
        raise InputError(f"{root}: {expected}. Received {received}; name the right one with --table")
    return found[0]


def read_cmmd(root: str | Path, table: str | Path | None = None, jobs: int = 1, skip: Iterable = ()) -> Listing:
    """List the images of CMMD: a row a breast in the table, Benign or Malignant; side and view by each file's header.

    table: default: CMMD_clinicaldata_revision.csv or .xlsx below `root`. jobs: headers read at the same time.
    """
    listing, breasts, rows_of = start_listing(), {}, defaultdict(list)
    for where, row in read_columns(table or _find_table(root, "cmmd_clinicaldata"), CMMD_COLUMNS):
        breast, label = (row["patient"], known_value(row["side"], SIDES, "side", where)), row["label"]
        if label.lower() not in ("benign", "malignant"):
            raise InputError(f"{where}: unknown classification. Expected Benign or Malignant. Received {label!r}")
        breasts[breast] = breasts.get(breast, False) or label.lower() == "malignant"
        rows_of[breast].append(where)
    merged = [f"{' '.join(breast)}: {', '.join(wheres)}" for breast, wheres in rows_of.items() if len(wheres) > 1]
    listing.repairs["rows_of_one_breast_merged"] += merged
    files = list_images_below(root, skip, (".dcm", ".dicom"))
    read = functools.partial(_read_cmmd_header, root, {patient for patient, _ in breasts})
    headers = run_parallel(read, files, jobs, "threading", "reading headers")
    for file, (patient, side, view, fault) in zip(files, headers, strict=True):
        if fault:
            listing.faults.append(Outcome(file, faults=[f"{file}: {fault}; left out"]))
        elif (patient, side) in breasts:
            listing.pictures.append(Picture(file, breasts[patient, side], patient, side, view))
        else:
            listing.excluded["file_without_row"].append(file)
    seen = {(picture.patient, picture.side) for picture in listing.pictures}
    listing.repairs["rows_without_image"] += [" ".join(breast) for breast in sorted(breasts.keys() - seen)]
    return listing


def _read_cmmd_header(root, ids: set[str], file: str) -> tuple[str, str, str, str]:
    """Return patient, side, view and what is wrong with the header of a file."""
    try:
        header = read_dicom_header(Path(root, file))
        side = known_value(reading.dicom_side(header), SIDES, "ImageLaterality", "header")
    except InputError as error:
        return "", "", "", str(error)
    folders = (part for part in file.split("/") if part in ids)
    view = reading.dicom_view(header)
    return str(header.get("PatientID") or next(folders, "")), side, view if view in VIEWS.values() else "", ""


def read_vindr(root: str | Path, classes: Classes, table: str | Path | None = None) -> Listing:
    """List the images of VinDr-Mammo, images/<study>/<image>.dicom; a study counts as a patient.

    classes: which BI-RADS mean what. table: default: breast-level_annotations.csv below `root`.
    """
    listing, lines = start_listing(), {}
    for where, row in read_columns(table or _find_table(root, "breast-level_annotations"), VINDR_COLUMNS):
        file = relative_path(root, f"images/{row['study']}/{row['image']}.dicom", where)
        check_once(lines, file, where)
        birads = row["birads"]
        if not re.fullmatch(r"BI-RADS [0-6]", birads):
            raise InputError(f"{where}: unknown breast_birads. Expected as in BI-RADS 4. Received {birads!r}")
        side, view = known_value(row["side"], SIDES, "side", where), known_value(row["view"], VIEWS, "view", where)
        name = known_value(row["set"], SET_NAMES, "split", where)
        if label := classes.label(birads[-1]):
            listing.pictures.append(Picture(file, label == "pos", row["study"], side, view, name))
        else:
            listing.excluded["label_of_no_class"].append(file)
    return listing


def read_mias(root: str | Path, table: str | Path | None = None, skip: Iterable = ()) -> Listing:
    """List the images of MIAS, whose table has rows of one finding each, "M" for malignant; all views are MLO.

    Films are in pairs of one patient, by the data set's description: the left breast has the even number, the right one
    the odd number before it. table: default: Info.txt below `root`.
    """
    listing, images = start_listing(), {}
    path = table or _find_table(root, "info", (".txt",))
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file. Expected lines such as mdb003 D NORM") from None
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or not re.fullmatch(r"mdb\d+", words[0]):  # the header, or text around the list
            continue
        where, finding = f"{path}, line {number}", words[2] if len(words) > 2 else ""
        if finding not in MIAS_CLASSES:
            raise InputError(f"{where}: unknown class. Expected {', '.join(MIAS_CLASSES)}. Received {finding!r}")
        severity = words[3] if len(words) > 3 else ""
        if finding != "NORM" and severity not in ("B", "M"):
            raise InputError(f"{where}: unknown severity. Expected B or M. Received {severity!r}")
        images[words[0]] = images.get(words[0], False) or severity == "M"
    if not images:
        raise InputError(f"{path}: no images in it. Expected lines such as mdb003 D NORM")
    files = defaultdict(list)
    for file in list_images_below(root, skip, (".pgm", ".png", ".jpg", ".jpeg", ".tif")):
        files[Path(file).stem].append(file)
    for name, positive in sorted(images.items()):
        index = int(name.removeprefix("mdb"))
        right = index - 1 + index % 2
        patient, side = f"mdb{right:03}-{right + 1:03}", "RIGHT" if index == right else "LEFT"
        found = files.pop(name, [f"{name}.pgm"])
        if len(found) > 1:
            raise InputError(f"{root}: Expected one file of {name}. Received {', '.join(found)}; remove the others")
        listing.pictures.append(Picture(found[0], positive, patient, side, "MLO"))
    listing.excluded["file_without_row"] += sorted(itertools.chain(*files.values()))
    return listing


def read_exams(path: str | Path) -> Iterator[tuple[str, str, str, str, bool, bool]]:
    """Read the images of an exam list of the NYU metarepository: (id, exam, side, view, malignant, whether mirrored).

    exam: the part that the ids of its images share, as in 0_L_CC, else its number in the list. Ids are the names of
    files without ending. Raises InputError for another pickle, a breast without a label, or an image that is there
    twice.
    """
    exams = load_plain(path)
    if not isinstance(exams, list) or not all(isinstance(exam, dict) for exam in exams):
        raise InputError(f"{path}: Expected a list of exams, a dict each. Received something else")
    names, seen = set(), set()
    for number, exam in enumerate(exams):
        where, images = f"{path}, exam {number}", []
        for key in NYU_VIEWS:
            names_of_view = exam.get(key) or []
            if not isinstance(names_of_view, list) or not all(isinstance(name, str) for name in names_of_view):
                raise InputError(f"{where}: Expected a list of names under {key}. Received something else")
            images += [(name, key) for name in names_of_view]
        stems = {re.sub(r"_[LR]_(CC|MLO)(_\d+)?$", "", name) for name, _ in images}
        patient = f"exam_{number}" if len(stems) != 1 or stems & names else stems.pop()
        names.add(patient)
        flip = exam.get("horizontal_flip", "NO")
        if flip not in ("YES", "NO"):
            raise InputError(f"{where}: Expected horizontal_flip YES or NO. Received something else")
        for name, key in images:
            if name in seen:
                raise InputError(f"{where}: {name} stands there a second time. Expected each image once")
            seen.add(name)
            label = f"{NYU_VIEWS[key]}_malignant"
            labels = exam.get("cancer_label")
            malignant = labels.get(label) if isinstance(labels, dict) else None
            if not isinstance(malignant, Real) or malignant not in (0, 1):
                raise InputError(f"{where}: Expected a cancer_label with {label} 0 or 1. Received something else")
            yield name, patient, NYU_VIEWS[key].upper(), key[2:], bool(malignant), flip == "YES"


def read_nyu(root: str | Path, path: str | Path) -> Listing:
    """List the images of an exam list, `<root>/<id>.png`. The list names no patients: each exam counts as one."""
    listing = start_listing()
    for name, patient, side, view, malignant, mirrored in read_exams(path):
        file = relative_path(root, f"{name}.png", str(path))
        listing.pictures.append(Picture(file, malignant, patient, side, view, mirrored=mirrored))
    return listing


class Cmmd(OwnData):
    """Prepare CMMD as downloaded: a table of its breasts, and DICOM files."""

    name = "cmmd"
    table = "default: CMMD_clinicaldata_revision.csv or .xlsx below the data folder"

    def list_pictures(self) -> Listing:
        return read_cmmd(self.args.data, self.args.table, self.args.jobs, self.skip)


class VindrMammo(OwnData):
    """Prepare VinDr-Mammo as downloaded: a table, and images/<study>/<image>.dicom. Each study counts as a patient."""

    name = "vindr"
    table = "default: breast-level_annotations.csv below the data folder"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        super().add_options(parser)
        add_class_options(parser)

    def list_pictures(self) -> Listing:
        classes = read_classes(self.args.neg_birads, self.args.pos_birads)
        return read_vindr(self.args.data, classes, self.args.table)


class Mias(OwnData):
    """Prepare MIAS, the small version: Info.txt, and mdb001.pgm ... Each pair of films counts as a patient."""

    name = "mias"
    table = "default: Info.txt below the data folder"

    def list_pictures(self) -> Listing:
        return read_mias(self.args.data, self.args.table, self.skip)


class Nyu(OwnData):
    """Prepare exams in the form of the NYU classifier: an exam list (.pkl), and <image>.png. Each exam is a patient."""

    name = "nyu"
    table = "exam list (.pkl)"

    def list_pictures(self) -> Listing:
        return read_nyu(self.args.data, self.args.table)

    def read(self) -> Listing:
        listing = super().read()
        text = "each exam counts as one, and images of a patient with several exams may come into several sets"
        print(f"Warning: {self.args.table} names no patients: {text}")
        return listing
