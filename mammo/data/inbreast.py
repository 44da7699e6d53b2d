"""INbreast as downloaded: its table, the names of its DICOM files, its annotations, and the files of one image.

The table says "removed" for every patient: who an image is of stands in the name of its DICOM file alone,
`<File Name>_<patient>_MG_<L|R>_<CC|ML>_ANON.dcm`, where ML means MLO. Annotations are Apple property lists as the
viewer OsiriX exports them, `<File Name>.xml`, with the outlines of findings in pixels of the DICOM image.
"""

import plistlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mammo.base.files import InputError, walk_files, write_img
from mammo.base.guards import read_bytes
from mammo.base.tables import TABLE_SUFFIXES, find_columns, open_table
from mammo.base.work import Job, Outcome
from mammo.data.prepare import CLASSES, whole_img_path, write_whole
from mammo.data.splits import Image, sets_of_patients

COLUMNS = {"file": ("file name",), "side": ("laterality",), "view": ("view",), "birads": ("bi-rads", "birads")}

SIDES = {"L": "LEFT", "R": "RIGHT"}

VIEWS = {"CC": "CC", "MLO": "MLO", "ML": "MLO"}

# Views that are no part of screening: one image is FB, from below.
OTHER_VIEWS = ("FB",)

BIRADS = ("0", "1", "2", "3", "4", "4a", "4b", "4c", "5", "6")

# Why a picture is no part of the data set, though nothing is wrong with it.
EXCLUSIONS = {
    "no_screening_view": "views other than CC and MLO are no part of screening",
    "birads_of_no_class": "their BI-RADS category is in neither class (--neg-birads, --pos-birads)",
    "dicom_without_row": "their File Name is not in the table, so there is no label",
}

REPAIRS = (
    *("duplicate_rows_merged", "rows_without_file_name", "several_files_for_one_image", "monochrome1_inverted"),
    *("points_drawn_as_discs", "points_without_extent_left_out", "findings_of_unknown_name"),
)

# Kinds of findings by the names that annotations give them, in small letters and with their misspellings.
KINDS = {
    "mass": "Mass",
    "calcification": "Calc",
    "calcifications": "Calc",
    "cluster": "Cluster",
    "asymmetry": "Asymmetry",
    "assymetry": "Asymmetry",
    "distortion": "Distortion",
    "spiculated region": "Spiculated",
    "espiculated region": "Spiculated",
}

OTHER_KIND = "Other"

# Of the disc that stands for a single calcification marked by a point: 0.2 mm at the 70 micrometres of the detector.
POINT_RADIUS = 3

# Coordinates beyond any detector are damage; OpenCV would wrap them around.
MAX_COORDINATE = 100_000

_DICOM_NAME = re.compile(r"(\d+)_([0-9a-z]+)_MG_([LR])_([A-Z]+)_ANON", re.IGNORECASE)


# ------------------------------------------------------------------------------------------------------- table


class Row(NamedTuple):
    """One image in the table. file: the number that it calls File Name. birads: one of `BIRADS`."""

    file: str
    side: str
    view: str
    birads: str


class Table(NamedTuple):
    """Rows sorted by file, each once, with the place it stands at; and what was mended."""

    path: Path
    rows: dict[Row, str]
    repairs: dict[str, list[str]]


def read_table(path) -> Table:
    """Rows of INbreast.csv or .xls.

    InputError names the line of an unknown value, and of a file with two rows that differ: the label depends on them.
    """
    rows, lines, repairs = {}, {}, defaultdict(list)
    with open_table(path) as (header, cells_of):
        places = find_columns(path, header, COLUMNS)
        for where, cells in cells_of:
            cells = {name: cells[place].strip() for name, place in places.items()}
            if not cells["file"]:  # the .xls ends with rows of sums
                repairs["rows_without_file_name"].append(where)
                continue
            row = _read_row(cells, where)
            if row in rows:
                repairs["duplicate_rows_merged"].append(f"{where}: as in {rows[row]}")
            elif other := lines.get(row.file):
                raise InputError(f"{where}: another row of File Name {row.file} is at {other}; remove the wrong one")
            lines.setdefault(row.file, where)
            rows.setdefault(row, where)
    if not rows:
        raise InputError(f"{path}: no rows below the header")
    return Table(Path(path), dict(sorted(rows.items(), key=lambda item: int(item[0].file))), dict(repairs))


def _read_row(cells: Mapping[str, str], where: str) -> Row:
    file = re.fullmatch(r"([0-9]{1,20})(\.0|\.dcm)?", cells["file"])
    if not file:
        raise InputError(
            f"{where}: unknown File Name: Expected a number as in 20588072. Received {cells['file'][:100]!r}"
        )
    side, view, birads = cells["side"].upper(), cells["view"].upper(), cells["birads"].lower().removesuffix(".0")
    for name, value, allowed in (
        ("Laterality", side, SIDES),
        ("View", view, (*VIEWS, *OTHER_VIEWS)),
        ("Bi-Rads", birads, BIRADS),
    ):
        if value not in allowed:
            raise InputError(f"{where}: unknown {name}: Expected {', '.join(allowed)}. Received {value!r}")
    return Row(file[1], SIDES[side], VIEWS.get(view, view), birads)


def count_rows(rows: Iterable[Row]) -> dict:
    """Rows by BI-RADS category and by view, sorted."""
    rows = list(rows)
    birads, views = (Counter(getattr(row, name) for row in rows) for name in ("birads", "view"))
    return {"rows": len(rows), "birads": dict(sorted(birads.items())), "views": dict(sorted(views.items()))}


class Classes(NamedTuple):
    """BI-RADS categories of the negative and of the positive class."""

    neg: frozenset[str]
    pos: frozenset[str]

    def label(self, birads: str) -> str | None:
        """One of `CLASSES`, or None for neither."""
        return next((name for name in CLASSES if birads in getattr(self, name)), None)


def add_class_options(parser, title: str = "classes") -> None:
    """Add the options whose values `read_classes` takes."""
    group = parser.add_argument_group(f"{title} (other categories are left out; 4 stands for 4a, 4b and 4c too)")
    group.add_argument("--neg-birads", nargs="+", choices=BIRADS, default=["1", "2"], help="negative (1 2)")
    group.add_argument("--pos-birads", nargs="+", choices=BIRADS, default=["4", "5", "6"], help="positive (4 5 6)")


def read_classes(neg: Iterable[str], pos: Iterable[str]) -> Classes:
    """Classes of these categories; 4 stands for 4a, 4b and 4c too. InputError for one in both."""

    def expand(names):
        return frozenset(birads for birads in BIRADS for name in names if birads == name or birads[:-1] == name)

    classes = Classes(expand(neg), expand(pos))
    if both := sorted(classes.neg & classes.pos):
        raise InputError(f"BI-RADS {', '.join(both)}: in both classes: Expected each in --neg-birads or --pos-birads")
    return classes


# ---------------------------------------------------------------------------------------------- download folder


class Download(NamedTuple):
    """Where the files lie, as paths below the download folder. dicoms, annotations: by File Name."""

    tables: list[str]
    dicoms: dict[str, list[str]]
    annotations: dict[str, list[str]]

    def find_table(self, root) -> Path:
        """INbreast.csv or, where there is none, .xlsx or .xls. InputError for neither, or two of one kind."""
        for suffix in TABLE_SUFFIXES:
            found = [path for path in self.tables if path.lower().endswith(suffix)]
            if len(found) > 1:
                raise InputError(f"{root}: two tables, {found[0]} and {found[1]}: name the right one with --table")
            if found:
                return Path(root, found[0])
        raise InputError(f"{root}: no table: Expected INbreast.csv or .xls there or below; or name it with --table")


def scan_download(root, skip: Iterable = ()) -> Download:
    """Find the tables, DICOM files and annotations below `root`, but not in the folders `skip`."""
    from mammo.images.reading import DICOM_SUFFIXES

    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: Expected that of the download")
    tables, dicoms, annotations = [], defaultdict(list), defaultdict(list)
    for file in walk_files(root, skip):
        path, suffix = file.relative_to(root).as_posix(), file.suffix.lower()
        if file.name.startswith("."):
            continue
        if suffix in DICOM_SUFFIXES:
            dicoms[file.stem.split("_")[0]].append(path)
        elif suffix == ".xml" and file.stem.isdecimal() and "muscle" not in path.lower():  # those of pectoral muscles
            annotations[file.stem].append(path)
        elif suffix in TABLE_SUFFIXES and file.stem.lower() == "inbreast":
            tables.append(path)
    return Download(tables, dict(dicoms), dict(annotations))


class Picture(NamedTuple):
    """An image of the data set: its row, its DICOM file and its annotations (None: there are none)."""

    row: Row
    dicom: str
    annotation: str | None


class Selection(NamedTuple):
    """What the table and the names of files make of the data set.

    images, pictures: by the name of the image to be, `<patient>_<side>_<view>`, with _2, _3 ... for further images of
    one view. excluded: pictures by the keys of `EXCLUSIONS`. faults: why rows that should be images are none.
    """

    images: dict[str, Image]
    pictures: dict[str, Picture]
    excluded: dict[str, list[str]]
    faults: list[Outcome]
    repairs: dict[str, list[str]]


def select(table: Table, download: Download, classes: Classes) -> Selection:
    """Find the patient and the class of each row."""
    selection = Selection({}, {}, {kind: [] for kind in EXCLUSIONS}, [], defaultdict(list, table.repairs))
    views = Counter()
    for row, where in table.rows.items():
        label = classes.label(row.birads)
        if row.view in OTHER_VIEWS:
            selection.excluded["no_screening_view"].append(f"{row.file}: {row.view}")
            continue
        if label is None:
            selection.excluded["birads_of_no_class"].append(f"{row.file}: BI-RADS {row.birads}")
        try:
            patient, paths = identify(row, where, download)
        except InputError as error:
            if label is not None:
                selection.faults.append(Outcome(row.file, faults=[f"{error}; left out"]))
            continue
        # Counted over rows of no class too, so that other classes do not change the names.
        name = f"{patient}_{row.side}_{row.view}"
        views[name] += 1
        if label is None:
            continue
        name += f"_{views[name]}" if views[name] > 1 else ""
        annotations = download.annotations.get(row.file, [])
        for several in (paths, annotations):
            if len(several) > 1:
                text = f"{name}: {several[0]} of {', '.join(several)}"
                selection.repairs["several_files_for_one_image"].append(text)
        selection.images[name] = Image(patient, row.side, row.view, label == "pos")
        selection.pictures[name] = Picture(row, paths[0], annotations[0] if annotations else None)
    known = {row.file for row in table.rows}
    without = sorted(path for file, paths in download.dicoms.items() if file not in known for path in paths)
    selection.excluded["dicom_without_row"].extend(without)
    return selection


def parse_dicom_name(stem: str) -> tuple[str, str, str | None] | None:
    """(patient, side, view) of a DICOM file's name without ending, None for names of another form. view: None where it
    is neither CC nor MLO."""
    match = _DICOM_NAME.fullmatch(stem)
    return match and (match[2].lower(), SIDES[match[3].upper()], VIEWS.get(match[4].upper()))


def identify(row: Row, where: str, download: Download) -> tuple[str, list[str]]:
    """Patient and DICOM files of a row, by the names of these. InputError for none, or others than the row tells."""
    form = f"{row.file}_<patient>_MG_{row.side[0]}_{'ML' if row.view == 'MLO' else row.view}_ANON.dcm"
    paths = download.dicoms.get(row.file, [])
    if not paths:
        raise InputError(f"{where}: no DICOM file: Expected {form} below the download folder")
    patients = set()
    for path in paths:
        known = parse_dicom_name(Path(path).stem)
        if known is None:
            raise InputError(f"{path}: the name tells no patient: Expected {form}")
        patient, side, view = known
        if (side, view) != (row.side, row.view):
            raise InputError(
                f"{where}: says {row.side} {row.view}, but its DICOM file is called {path}: Expected {form}"
            )
        patients.add(patient)
    if len(patients) > 1:
        raise InputError(f"{where}: DICOM files of {len(patients)} patients: Expected one. Received {', '.join(paths)}")
    return patients.pop(), paths


# ------------------------------------------------------------------------------------------------- annotations


class Finding(NamedTuple):
    """A region as annotated. points: (x, y) in pixels, from the upper left corner."""

    name: str
    points: list[tuple[float, float]]

    @property
    def kind(self) -> str:
        return KINDS.get(self.name.lower(), OTHER_KIND)


class Lesion(NamedTuple):
    """What becomes one mask. kind: a value of `KINDS`, or `OTHER_KIND`. number: from 1, over all of an image."""

    kind: str
    number: int
    findings: list[Finding]


def read_annotation(path) -> list[Finding]:
    """Findings of an annotation file, in its order. InputError for a damaged file."""
    data = read_bytes(path)
    try:
        images = plistlib.loads(data, fmt=plistlib.FMT_XML)["Images"]
        return [
            Finding(" ".join(str(roi["Name"]).split()), [_read_point(text) for text in roi["Point_px"]])
            for image in images
            for roi in image["ROIs"]
        ]
    except Exception as error:  # plistlib and what it reads with raise many kinds
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise InputError(f"{path}: not an annotation file ({reason}). Expected a property list of ROIs") from None


def _read_point(text: str) -> tuple[float, float]:
    x, y = (float(number) for number in text.strip("() ").split(","))
    if not (abs(x) < MAX_COORDINATE and abs(y) < MAX_COORDINATE):
        raise ValueError(f"no point of an image: {text}")
    return x, y


def group_findings(findings: Iterable[Finding]) -> tuple[list[Lesion], list[tuple[str, str]]]:
    """The lesions that findings make, and the repairs that this takes.

    A region is a lesion. Single calcifications, outlined or marked by a point each, are one lesion together: there
    are dozens in some images. Points of other kinds have no extent and are left out.
    """
    lesions, repairs, calcs = [], [], None
    for finding in findings:
        if finding.kind == OTHER_KIND:
            repairs.append(("findings_of_unknown_name", finding.name))
        if len(finding.points) < (1 if finding.kind == "Calc" else 2):
            repairs.append(("points_without_extent_left_out", finding.name))
        elif finding.kind == "Calc" and calcs:
            calcs.findings.append(finding)
        else:
            lesions.append(Lesion(finding.kind, len(lesions) + 1, [finding]))
            calcs = lesions[-1] if finding.kind == "Calc" else calcs
    points = sum(len(finding.points) == 1 for lesion in lesions for finding in lesion.findings)
    if points:
        repairs.append(("points_drawn_as_discs", f"{points} of Calc"))
    return lesions, repairs


def draw_mask(lesion: Lesion, shape: tuple[int, int]):
    """uint8 mask (*shape), 255 in the lesion: regions filled, points as discs of `POINT_RADIUS` pixels.

    Raises InputError for a lesion beside the image.
    """
    import cv2
    import numpy as np

    mask = np.zeros(shape, np.uint8)
    for finding in lesion.findings:
        points = np.rint(finding.points).astype(np.int32)
        if len(points) == 1:
            cv2.circle(mask, points[0].tolist(), POINT_RADIUS, 255, cv2.FILLED)
        else:
            cv2.fillPoly(mask, [points], 255)
    if not mask.any():
        raise InputError(f"it lies beside the image of {shape[0]} x {shape[1]} pixels: is the file of another image?")
    return mask


# -------------------------------------------------------------------------------------------------- one image


class Plan(NamedTuple):
    """What is to be made of one image, in types that JSON can hold.

    annotation: None to write no masks. folder: of the whole image, such as train/pos. whole: options of `make_whole`.
    """

    dicom: str
    annotation: str | None
    folder: str
    whole: dict
    full: bool


def full_img_path(name: str) -> str:
    return f"full_img/{name}.png"


def mask_path(name: str, lesion: Lesion) -> str:
    """As the readers of masks want it, which take Mass and Calc."""
    return f"roi_mask/{lesion.kind}-INbreast_{name}_{lesion.number}.png"


def plan_images(selection: Selection, sets: Mapping[str, Sequence[str]], root, whole: dict, masks: bool) -> list[Job]:
    """One item an image of the patients in a set. masks: whether to write lesion masks, and full images with them."""
    set_of, items = sets_of_patients(sets), []
    for name, image in selection.images.items():
        if image.patient not in set_of:
            continue
        picture = selection.pictures[name]
        folder = f"{set_of[image.patient]}/{CLASSES[image.positive]}"
        annotation = picture.annotation if masks else None
        plan = Plan(picture.dicom, annotation, folder, whole, masks)
        outputs = [whole_img_path(name, folder)]
        if masks:
            outputs += [full_img_path(name), *(mask_path(name, lesion) for lesion in _list_lesions(root, annotation))]
        items.append(Job(name, (picture.dicom, *([annotation] if annotation else ())), tuple(outputs), plan))
    return items


def _list_lesions(root, annotation: str | None) -> list[Lesion]:
    try:
        return group_findings(read_annotation(Path(root, annotation)))[0] if annotation else []
    except InputError:  # told when the masks are to be made
        return []


def prepare_image(item: Job, download, out) -> Outcome:
    """Write the whole image of one item, and if asked its full image and its masks; see `mammo.base.work.prepare`."""
    from mammo.images.reading import read_dicom_16_bit

    plan, result = item.plan, Outcome(item.name)
    try:
        img, header = read_dicom_16_bit(Path(download, plan.dicom), auto_levels=plan.whole["levels"])
        write_whole(img, out, plan.folder, plan.whole, plan.dicom, result)
    except InputError as error:
        result.faults.append(f"{item.name}: {error}; left out")
        return result
    if header.PhotometricInterpretation == "MONOCHROME1":
        result.repairs.append(("monochrome1_inverted", f"{item.name}: {plan.dicom}"))
    if plan.full:
        write_img(Path(out, full_img_path(item.name)), img)
        result.outputs.append(full_img_path(item.name))
    if plan.annotation:
        write_masks(item, download, out, img.shape, result)
    return result


def write_masks(item: Job, download, out, shape: tuple[int, int], result: Outcome) -> None:
    """Write the masks of one image of `shape` (rows, columns), and note them in the facts of `result`."""
    try:
        lesions, repairs = group_findings(read_annotation(Path(download, item.plan.annotation)))
    except InputError as error:
        result.faults.append(f"{item.name}: {error}; left without masks")
        return
    result.repairs += [(kind, f"{item.name}: {what}") for kind, what in repairs]
    result.facts["lesions"] = []
    for lesion in lesions:
        path = mask_path(item.name, lesion)
        try:
            write_img(Path(out, path), draw_mask(lesion, shape))
        except InputError as error:
            result.faults.append(f"{item.name}: {item.plan.annotation}: {lesion.kind} {lesion.number}: {error}")
            continue
        result.outputs.append(path)
        names = sorted({finding.name for finding in lesion.findings})
        result.facts["lesions"].append([path, lesion.number, lesion.kind, "; ".join(names), len(lesion.findings)])
