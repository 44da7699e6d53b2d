"""Data sets of the user's own, and four public ones, as they come: who is on which file, with what label.

Each reader gives a `Reading`. Its pictures become whole images by `prepare_picture`. The data sets are CMMD (Chinese
Mammography Database), VinDr-Mammo, MIAS (the small version) and exam lists of the NYU metarepository.
"""

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import NamedTuple

from mammo.base.files import InputError, walk_files
from mammo.base.guards import read_bytes
from mammo.base.tables import TABLE_SUFFIXES, find_columns, is_below, open_table, plain_header
from mammo.base.work import Job, Outcome, run_parallel
from mammo.data.inbreast import Classes, parse_dicom_name
from mammo.data.prepare import CLASSES, SETS, whole_img_path, write_whole
from mammo.data.splits import Image, sets_of_patients
from mammo.images.reading import dicom_side, dicom_view, is_dicom, parse_image_name, read_mammogram

# Columns of a table of one's own, by the spellings that `tables.find_columns` takes; all but two may be missing.
COLUMNS = {
    "file": ("file", "filename", "file name", "file path", "path", "image", "image path", "image file path"),
    "label": ("label", "class", "cancer", "target", "pathology"),
    "patient": ("patient", "patient id", "patientid"),
    "side": ("side", "laterality", "imagelaterality", "left or right breast"),
    "view": ("view", "view position", "viewposition", "image view"),
    "set": ("set", "split"),
}

REQUIRED = ("file", "label")

NEGATIVE = ("0", "neg", "negative", "normal", "benign", "benign_without_callback", "false", "no")

POSITIVE = ("1", "pos", "positive", "malignant", "cancer", "true", "yes")

CMMD_COLUMNS = {"patient": ("id1",), "side": ("leftright",), "label": ("classification",)}

VINDR_COLUMNS = {
    "study": ("study id",),
    "image": ("image id",),
    "side": ("laterality",),
    "view": ("view position", "view"),
    "birads": ("breast birads",),
    "set": ("split",),
}

SIDES = {"l": "LEFT", "left": "LEFT", "r": "RIGHT", "right": "RIGHT"}

# Short, and as the DICOM standard calls them.
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

NYU_VIEWS = {"L-CC": "left", "R-CC": "right", "L-MLO": "left", "R-MLO": "right"}

MIAS_SEVERITIES = ("B", "M")

MIAS_CLASSES = ("CALC", "CIRC", "SPIC", "MISC", "ARCH", "ASYM", "NORM")

# Why a picture is no part of the data set, though nothing is wrong with it.
EXCLUSIONS = {
    "label_of_no_class": "their labels are in neither class",
    "file_without_row": "nothing in the table is about them, so there is no label",
    "file_in_no_set": "they lie beside the folders train, val and test",
}

REPAIRS = (
    *("monochrome1_inverted", "8_bit_scaled_to_16_bit", "mirror_image_undone"),
    *("rows_of_one_breast_merged", "rows_without_image"),
)


class Picture(NamedTuple):
    """What is known of one file. file: below the data folder. patient: "" where not known. set: "" where not named."""

    file: str
    positive: bool
    patient: str
    side: str
    view: str
    set: str = ""
    mirrored: bool = False


class Reading(NamedTuple):
    """What a reader found. excluded: files by the keys of `EXCLUSIONS`. faults: files without a label, and why not."""

    pictures: list[Picture]
    excluded: dict[str, list[str]]
    repairs: dict[str, list[str]]
    faults: list[Outcome]


def _start() -> Reading:
    return Reading([], {kind: [] for kind in EXCLUSIONS}, defaultdict(list), [])


class Labels(NamedTuple):
    """Which values mean negative, and which positive, in small letters. strict: others are errors."""

    neg: frozenset[str]
    pos: frozenset[str]
    strict: bool

    def is_positive(self, value: str, where: str) -> bool | None:
        """None for a value of neither class; InputError, which says `where`, when labels are strict."""
        value = value.strip().lower()
        if value in self.neg | self.pos:
            return value in self.pos
        if self.strict:
            raise InputError(
                f"{where}: unknown label. Expected one of {', '.join((*NEGATIVE, *POSITIVE))}, or others that "
                f"--neg-labels and --pos-labels name. Received {value!r}"
            )
        return None


def read_labels(neg: Iterable[str] | None = None, pos: Iterable[str] | None = None) -> Labels:
    """Labels by their values; where either is given, values of neither are left out. InputError for one in both."""
    strict = neg is None and pos is None
    classes = [frozenset(map(str.lower, values)) for values in (neg or NEGATIVE, pos or POSITIVE)]
    if both := sorted(classes[0] & classes[1]):
        raise InputError(f"label {', '.join(both)}: in both classes. Expected each in --neg-labels or --pos-labels")
    return Labels(*classes, strict)


def known_value(value: str, allowed: Mapping[str, str], name: str, where: str) -> str:
    """What a cell of a table means, such as a side by `SIDES`; InputError, which says `where`, for an unknown one."""
    if value.strip().lower() not in allowed:
        raise InputError(f"{where}: unknown {name}. Expected {', '.join(allowed)}. Received {value!r}")
    return allowed[value.strip().lower()]


def _once(places: dict[str, str], file: str, where: str) -> None:
    """InputError for a file that was seen before. places: where each was seen."""
    if (other := places.setdefault(file, where)) != where:
        raise InputError(f"{where}: {file} stands at {other} too; remove one of them")


# -------------------------------------------------------------------------------------- tables and folders of one's own


def find_patient(name: str, pattern: re.Pattern | None) -> str:
    """The patient in a file's name by `pattern`: its first group, or all that it matches. InputError for none."""
    match = pattern.search(name)
    if not (match and match[min(1, pattern.groups)]):
        raise InputError(f"{name}: no patient in this name. Expected what --patient-regex {pattern.pattern!r} finds")
    return match[min(1, pattern.groups)]


def _from_name(name: str, pattern: re.Pattern | None) -> dict[str, str]:
    """Patient, side and view by the name of a file, "" where they are not in it."""
    found = parse_image_name(Path(name).stem) or ("", "", "")
    known = dict(zip(("patient", "side", "view"), found, strict=True))
    return known if pattern is None else known | {"patient": find_patient(name, pattern)}


def read_table(root, path, labels: Labels, columns: Mapping[str, str], pattern: re.Pattern | None = None) -> Reading:
    """Pictures by a table with a row a file, whose names start from the folder `root`.

    columns: headers of the table where they differ from `COLUMNS`. pattern: what finds the patient in a file's name;
    without it and without such columns, patient, side and view are those of names of the usual form.
    InputError names the line of an unknown value, a file outside `root`, or one that stands there twice.
    """
    reading, lines = _start(), {}
    spellings = COLUMNS | {name: (plain_header(header),) for name, header in columns.items()}
    with open_table(path) as (header, rows):
        places = find_columns(path, header, spellings, COLUMNS.keys() - {*REQUIRED, *columns})
        for where, cells in rows:
            row = {name: cells[place].strip() for name, place in places.items()}
            file = _relative(root, row.pop("file"), where)
            _once(lines, file, where)
            positive = labels.is_positive(row.pop("label"), where)
            if positive is None:
                reading.excluded["label_of_no_class"].append(file)
                continue
            known = _from_name(file, pattern) | {name: cell for name, cell in row.items() if cell or name == "set"}
            for name, allowed in (("side", SIDES), ("view", VIEWS)):
                known[name] = known[name] and known_value(known[name], allowed, name, where)
            if "set" in known:
                known["set"] = known_value(known["set"], SET_NAMES, "set", where)
            reading.pictures.append(Picture(file, positive, **known))
    return reading


def _relative(root, cell: str, where: str) -> str:
    """The path of a cell below `root`; InputError for one that leads elsewhere."""
    path = cell.replace("\\", "/")
    if Path(path).is_absolute() and Path(path).is_relative_to(Path(root).absolute()):
        path = Path(path).relative_to(Path(root).absolute()).as_posix()
    if not is_below(path):
        raise InputError(f"{where}: Expected a file below the folder {root}. Received {cell!r}")
    return Path(path).as_posix()


def read_folders(root, labels: Labels, pattern: re.Pattern | None = None, skip: Iterable = ()) -> Reading:
    """Pictures in class folders, such as neg and pos, which may stand in train, val and test; then others are left out.

    The patient is what `pattern` finds in the path below the class folder, else that of names of the usual form, else
    the sub-folder of the class folder that the file is in. skip: folders that are not read.
    """
    reading, files = _start(), _list_files(root, skip)
    in_sets = any(file.split("/")[0].lower() in SET_NAMES for file in files)
    place = 1 if in_sets else 0
    for file in files:
        *folders, _ = parts = file.split("/")
        name = SET_NAMES.get(folders[0].lower(), "") if in_sets and folders else ""
        if in_sets and not name:
            reading.excluded["file_in_no_set"].append(file)
            continue
        if len(folders) == place:
            raise InputError(f"{file}: Expected images of {root} in class folders, such as neg/ or train/neg/")
        positive = labels.is_positive(folders[place], f"{Path(root, *folders[: place + 1])}")
        if positive is None:
            reading.excluded["label_of_no_class"].append(file)
            continue
        known = _from_name("/".join(parts[place + 1 :]), pattern)
        if not known["patient"] and len(folders) > place + 1:
            known["patient"] = folders[place + 1]
        reading.pictures.append(Picture(file, positive, **known, set=name))
    return reading


def _list_files(root, skip: Iterable = (), suffixes: Sequence[str] | None = None) -> list[str]:
    """Paths of the images below `root`; InputError where there are none. suffixes: of their names."""
    from mammo.images.reading import IMAGE_SUFFIXES

    suffixes = tuple(suffixes or (*IMAGE_SUFFIXES, ".pgm"))
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder. Expected that of the images")
    files = [path for path in walk_files(root, skip) if path.name.lower().endswith(suffixes)]
    files = [path.relative_to(root).as_posix() for path in files if not path.name.startswith(".")]
    if not files:
        raise InputError(f"{root}: no images below it. Expected files ending in {', '.join(suffixes)}")
    return files


def _find_table(root, start: str, suffixes: Sequence[str] = TABLE_SUFFIXES) -> Path:
    """The one file below `root` whose name starts with `start`, in small letters, and ends in one of `suffixes`."""
    if not Path(root).is_dir():
        raise InputError(f"{root}: no such folder. Expected that of the data set")
    found = [path for path in walk_files(root) if path.name.lower().startswith(start)]
    found = [path for path in found if path.suffix.lower() in suffixes]
    if len(found) != 1:
        received = ", ".join(map(str, found[:3])) or "none"
        raise InputError(
            f"{root}: Expected one table {start}*{' or '.join(suffixes)} below it. Received {received}; "
            f"name the right one with --table"
        )
    return found[0]


def find_view(path) -> str | None:
    """CC or MLO as the header of a DICOM image tells, else the name of the file: a prepared image's, INbreast's, or one
    with L_CC, RIGHT-MLO or the like in it. None where neither tells."""
    from mammo.images.reading import read_dicom_header

    if is_dicom(path):
        try:
            view = VIEWS.get(dicom_view(read_dicom_header(path)).lower())
        except Exception:  # pydicom raises many kinds on damaged headers, which the reader of the pixels judges
            view = None
        if view:
            return view
    stem = Path(path).stem
    if known := parse_image_name(stem) or parse_dicom_name(stem):
        return known[2]
    match = _VIEW_IN_NAME.search(stem)
    return match and VIEWS[match[1].lower()]


def read_cmmd(root, table=None, jobs: int = 1, skip: Iterable = ()) -> Reading:
    """CMMD: a row a breast in the table, Benign or Malignant; side and view of each file by its header.

    table: default: CMMD_clinicaldata_revision.csv or .xlsx below `root`. jobs: headers read at the same time.
    """
    reading, breasts, rows_of = _start(), {}, defaultdict(list)
    path = table or _find_table(root, "cmmd_clinicaldata")
    with open_table(path) as (header, rows):
        places = find_columns(path, header, CMMD_COLUMNS)
        for where, cells in rows:
            row = {name: cells[place].strip() for name, place in places.items()}
            breast = row["patient"], known_value(row["side"], SIDES, "side", where)
            if row["label"].lower() not in ("benign", "malignant"):
                raise InputError(
                    f"{where}: unknown classification. Expected Benign or Malignant. Received {row['label']!r}"
                )
            breasts[breast] = breasts.get(breast, False) or row["label"].lower() == "malignant"
            rows_of[breast].append(where)
    merged = [f"{' '.join(breast)}: {', '.join(wheres)}" for breast, wheres in rows_of.items() if len(wheres) > 1]
    reading.repairs["rows_of_one_breast_merged"] += merged
    files = _list_files(root, skip, (".dcm", ".dicom"))
    ids = {patient for patient, _ in breasts}
    read = functools.partial(_read_cmmd_header, root, ids)
    for file, (patient, side, view, fault) in zip(
        files, run_parallel(read, files, jobs, "threading", "reading headers"), strict=True
    ):
        if fault:
            reading.faults.append(Outcome(file, faults=[f"{file}: {fault}; left out"]))
        elif (patient, side) in breasts:
            reading.pictures.append(Picture(file, breasts[patient, side], patient, side, view))
        else:
            reading.excluded["file_without_row"].append(file)
    seen = {(picture.patient, picture.side) for picture in reading.pictures}
    reading.repairs["rows_without_image"] += [" ".join(breast) for breast in sorted(breasts.keys() - seen)]
    return reading


def _read_cmmd_header(root, ids: set[str], file: str) -> tuple[str, str, str, str]:
    """Patient, side, view and what is wrong with the header of a file."""
    from mammo.images.reading import read_dicom_header

    try:
        header = read_dicom_header(Path(root, file))
        side = known_value(dicom_side(header), SIDES, "ImageLaterality", "header")
    except InputError as error:
        return "", "", "", str(error)
    folders = (part for part in file.split("/") if part in ids)
    view = dicom_view(header)
    return str(header.get("PatientID") or next(folders, "")), side, view if view in VIEWS.values() else "", ""


def read_vindr(root, classes: Classes, table=None) -> Reading:
    """VinDr-Mammo: images/<study>/<image>.dicom; a study counts as a patient. classes: which BI-RADS mean what.

    table: default: breast-level_annotations.csv below `root`.
    """
    reading, lines = _start(), {}
    path = table or _find_table(root, "breast-level_annotations")
    with open_table(path) as (header, rows):
        places = find_columns(path, header, VINDR_COLUMNS)
        for where, cells in rows:
            row = {name: cells[place].strip() for name, place in places.items()}
            file = _relative(root, f"images/{row['study']}/{row['image']}.dicom", where)
            _once(lines, file, where)
            birads = re.fullmatch(r"BI-RADS ([0-6])", row["birads"])
            if not birads:
                raise InputError(
                    f"{where}: unknown breast_birads. Expected as in BI-RADS 4. Received {row['birads']!r}"
                )
            side, view = (
                known_value(row[name], known, name, where) for name, known in (("side", SIDES), ("view", VIEWS))
            )
            name = known_value(row["set"], SET_NAMES, "split", where)
            if label := classes.label(birads[1]):
                reading.pictures.append(Picture(file, label == "pos", row["study"], side, view, name))
            else:
                reading.excluded["label_of_no_class"].append(file)
    return reading


def read_mias(root, table=None, skip: Iterable = ()) -> Reading:
    """MIAS: rows of one finding each, "M" for malignant, several of one image or none; all views are MLO.

    Films are in pairs of one patient, by the data set's description: the left breast has the even number, the right one
    the odd number before it. table: default: Info.txt below `root`.
    """
    reading, images = _start(), {}
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
        if finding != "NORM" and severity not in MIAS_SEVERITIES:
            raise InputError(f"{where}: unknown severity. Expected B or M. Received {severity!r}")
        images[words[0]] = images.get(words[0], False) or severity == "M"
    if not images:
        raise InputError(f"{path}: no images in it. Expected lines such as mdb003 D NORM")
    files = defaultdict(list)
    for file in _list_files(root, skip, (".pgm", ".png", ".jpg", ".jpeg", ".tif")):
        files[Path(file).stem].append(file)
    for name, positive in sorted(images.items()):
        index = int(name.removeprefix("mdb"))
        right = index - 1 + index % 2
        patient, side = f"mdb{right:03}-{right + 1:03}", "RIGHT" if index == right else "LEFT"
        found = files.pop(name, [f"{name}.pgm"])
        if len(found) > 1:
            raise InputError(f"{root}: Expected one file of {name}. Received {', '.join(found)}; remove the others")
        reading.pictures.append(Picture(found[0], positive, patient, side, "MLO"))
    reading.excluded["file_without_row"] += sorted(itertools.chain(*files.values()))
    return reading


def read_exams(path) -> Iterator[tuple[str, str, str, bool, bool]]:
    """Images of an exam list of the NYU metarepository: (id, exam, side, view, malignant, whether it is mirrored).

    exam: the part that the ids of its images share, as in 0_L_CC, else its number in the list. Ids are those of files
    without ending. InputError for another pickle, a breast without a label, or an image that is there twice.
    """
    from mammo.base.unpickle import load_plain

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
        patient = stems.pop() if len(stems) == 1 else f"exam_{number}"
        if patient in names:
            patient = f"exam_{number}"
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


def read_nyu(root, path) -> Reading:
    """An exam list and its images, `<root>/<id>.png`. The list names no patients: each exam counts as one."""
    reading = _start()
    for name, patient, side, view, malignant, mirrored in read_exams(path):
        file = _relative(root, f"{name}.png", str(path))
        reading.pictures.append(Picture(file, malignant, patient, side, view, mirrored=mirrored))
    return reading


# ---------------------------------------------------------------------------------------------------- preparation


def name_pictures(pictures: Iterable[Picture]) -> tuple[dict[str, Picture], list[str]]:
    """Pictures by the name of their image, `<patient>_<side>_<view>` with _2, _3 ... where there are several.

    Signs that do not belong into a file's name become "-". Pictures of no known patient get one of their own, called
    as their file. Returns also the files of these. InputError for two patients that would have one name.
    """
    named, patients, unknown = {}, {}, []
    for picture in sorted(pictures, key=lambda picture: (picture.patient, picture.side, picture.view, picture.file)):
        if not picture.patient:
            unknown.append(picture.file)
            picture = picture._replace(patient=picture.file)
            start = Path(picture.file).with_suffix("").as_posix()
        else:
            start = picture.patient
        safe = re.sub(r"[^\w.-]+", "-", start).strip(".-") or "patient"
        if patients.setdefault(safe, picture.patient) != picture.patient:
            raise InputError(
                f"patients {patients[safe]!r} and {picture.patient!r} would both be called {safe} in file names; "
                f"rename one of them"
            )
        first = "_".join(filter(None, (safe, picture.side, picture.view)))
        name, number = first, 1
        while name in named:
            number += 1
            name = f"{first}_{number}"
        named[name] = picture
    return named, unknown


def describe_dataset(pictures: Mapping[str, Picture]) -> dict[str, Image]:
    return {
        name: Image(picture.patient, picture.side, picture.view, picture.positive) for name, picture in pictures.items()
    }


def named_sets(pictures: Iterable[Picture]) -> dict[str, set[str]] | None:
    """Patients of the sets that the data name, or None where they name none."""
    sets = {name: {picture.patient for picture in pictures if picture.set == name} for name in SETS}
    return sets if any(sets.values()) else None


def plan_pictures(
    pictures: Mapping[str, Picture], root, sets: Mapping[str, Sequence[str]], whole: dict, voi_lut: bool
) -> list[Job]:
    """An item for each picture whose patient is in a set. whole: options of `make_whole`; voi_lut: see `read_dicom`.

    A file that is not there is a fault of its own; InputError where none is there.
    """
    set_of, items = sets_of_patients(sets), []
    for name, picture in pictures.items():
        if picture.patient not in set_of:
            continue
        folder = f"{set_of[picture.patient]}/{CLASSES[picture.positive]}"
        plan = {"file": picture.file, "folder": folder, "whole": whole, "voi_lut": voi_lut}
        plan |= {"mirrored": picture.mirrored}
        sources = (picture.file,) if Path(root, picture.file).is_file() else ()
        items.append(Job(name, sources, (whole_img_path(name, folder),), plan))
    if items and not any(item.sources for item in items):
        raise InputError(
            f"{root}: none of the {len(items)} files is there. Expected the folder that their names start from, in "
            f"which {items[0].plan['file']} is"
        )
    return items


def prepare_picture(item: Job, download, out) -> Outcome:
    """Write the whole image of one item; see `mammo.base.work.prepare`."""
    plan, result = item.plan, Outcome(item.name)
    try:
        img, stored = read_mammogram(Path(download, plan["file"]), plan["voi_lut"], plan["whole"]["levels"])
        write_whole(img[:, ::-1] if plan["mirrored"] else img, out, plan["folder"], plan["whole"], plan["file"], result)
    except InputError as error:
        result.faults.append(f"{item.name}: {error}; left out")
        return result
    result.facts |= stored
    kinds = {
        "monochrome1_inverted": stored["photometric"] == "MONOCHROME1",
        "8_bit_scaled_to_16_bit": stored["bits"] == 8,
        "mirror_image_undone": plan["mirrored"],
    }
    result.repairs += [(kind, f"{item.name}: {plan['file']}") for kind, present in kinds.items() if present]
    return result


def stored_bits(results: Iterable[Outcome]) -> int | None:
    """Bits that the pixels of the 16-bit files use that are not DICOM, whose header would tell; None without any."""
    files = [result.facts for result in results if result.facts.get("bits") == 16]
    brightest = [facts["brightest"] for facts in files if not facts["photometric"]]
    return max(brightest).bit_length() if brightest else None
