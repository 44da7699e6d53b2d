"""From a data set as downloaded to image folders: splits by patient, whole images, and runs that can be resumed.

Nothing here knows one data set from another: what one downloads is read by a module of its own, such as
`dm_cbis_ddsm`. It hands over the label of each patient, the `Item`s, and a function that writes the files of one.
"""

import csv
import functools
import hashlib
import importlib.util
import io
import json
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dm_args import check_same_options
from dm_files import InputError, append_text, atomic_write, counted, locked, one_line, remove_partial, write_text
from dm_limits import check_archive, parse_json, read_bytes, read_json
from dm_parallel import run_parallel

SETS = ("train", "val", "test")
CLASSES = ("neg", "pos")
# Brings 16-bit pixels to 0..255: the published value of 255/65535.
RESCALE_FACTOR = 0.003891
MANIFEST = "manifest.jsonl"
OPTIONS = "options.json"
REPORT = "report.json"
IMAGE_TABLE = "images.csv"
TABLE_SUFFIXES = (".csv", ".xlsx", ".xls")
# What an Excel table may have: cells, also empty ones, and tags in its XML, of which a cell takes four.
_MAX_CELLS = 2**24
_MAX_TAGS = 2**22
# To be raised when the same files and options shall give other outputs, so that older ones are made again.
RULES = 4
_IMAGE_NAME = re.compile(r"(.+)_(LEFT|RIGHT)_(CC|MLO)(?:_([2-9]|[1-9]\d+))?", re.DOTALL)


# ------------------------------------------------------------------------------------------- splits by patient


def split_by_patient(cancer: Mapping[str, bool], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Divide patients in two, both parts with the same share of cancer patients.

    cancer: for each patient, whether any finding is malignant. share: of the patients in the second part, 0..1.
    Patients are taken in sorted order, so that the split depends on nothing but the patients and the seed. Few
    patients are divided class by class, at least one of each class of two or more going to the second part.

    Returns (first part, second part), both sorted.
    """
    from dm_region import split_patients

    patients = sorted(cancer)
    try:
        first, second = split_patients(patients, [cancer[patient] for patient in patients], share, seed)
    except InputError:
        print(f"only {counted(len(patients), 'patient')} ({sum(cancer.values())} with cancer): divided class by class")
        rng = np.random.RandomState(seed)
        second = []
        for label in (False, True):
            group = [patient for patient in patients if bool(cancer[patient]) == label]
            wanted = max(1, round(share * len(group))) if len(group) > 1 else 0
            second += [group[index] for index in rng.permutation(len(group))[:wanted]]
        first = set(patients) - set(second)
    return sorted(first), sorted(second)


def split_in_three(cancer: Mapping[str, bool], test_size: float, val_size: float, seed: int) -> dict[str, list[str]]:
    """Patients of train, val and test: first `test_size` of all for the test, then `val_size` of the others."""
    rest, test = split_by_patient(cancer, test_size, seed)
    train, val = split_by_patient({patient: cancer[patient] for patient in rest}, val_size, seed)
    return {"train": train, "val": val, "test": test}


def read_patient_list(path) -> list[str]:
    """Patient ids, one a line; a header line `patient_id` may come first. InputError for repeated ids or none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: Expected one patient id a line") from None
    patients = [line.strip() for line in lines if line.strip()]
    if patients and patients[0].lower() == "patient_id":
        del patients[0]
    if not patients:
        raise InputError(f"{path}: no patients: Expected one patient id a line")
    patient, count = Counter(patients).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: patient {patient} stands there {count} times; remove the others")
    return patients


def check_disjoint(sets: Mapping[str, Iterable[str]]) -> None:
    """InputError when a patient is in two sets. sets: patient ids by the name of the set."""
    for (name, patients), (other_name, others) in combinations(sets.items(), 2):
        if shared := sorted(set(patients) & set(others)):
            raise InputError(
                f"{counted(len(shared), 'patient')} in both {name} and {other_name}, such as {', '.join(shared[:10])}: "
                f"Expected all images of a patient in one set"
            )


# ------------------------------------------------------------------------------------------------ whole images


def to_uint16(img: np.ndarray) -> np.ndarray:
    """8-bit pixels times 257, which maps 0..255 onto 0..65535; 16-bit ones as they are. InputError for others."""
    if img.dtype == np.uint8:
        return img.astype(np.uint16) * np.uint16(257)
    if img.dtype == np.uint16:
        return img
    raise InputError(f"pixel type not supported here: Expected uint8 or uint16. Received {img.dtype}")


def faces_left(img: np.ndarray) -> bool:
    """Whether the breast points to the left: the chest wall, where most of the brightness is, is on the right."""
    half = img.shape[1] // 2
    return bool(img[:, :half].sum(dtype=np.float64) < img[:, -half:].sum(dtype=np.float64))


def auto_levels(img: np.ndarray) -> np.ndarray:
    """Stretch 16-bit pixels linearly so that the darkest becomes 0 and the brightest 65535."""
    lowest, highest = int(img.min()), int(img.max())
    if highest == lowest:
        raise InputError(f"the image is constant: Expected a picture. Received the value {lowest} everywhere")
    return np.rint((img.astype(np.float32) - lowest) * np.float32(65535 / (highest - lowest))).astype(np.uint16)


def make_whole(
    img: np.ndarray,
    img_size: tuple[int, int],
    resize: str = "stretch",
    segment_breast: bool = False,
    levels: bool = False,
    face: str = "as-is",
) -> np.ndarray:
    """A mammogram (H, W) as the whole-image classifier gets it: (*img_size), of the same 16-bit type.

    resize: "stretch" to `img_size` (height, width), bicubic as the trainers do it, or "pad": keep the aspect, fill
    the height (the width, where that is reached first) and pad with zeros on the side away from the chest wall,
    and below. segment_breast: blank all but the breast and cut the image to it. levels: see `auto_levels`.
    face: "left" or "right" mirrors breasts that point the other way. Raises InputError where there is no breast.
    """
    from dm_image import resize as resize_image
    from dm_preprocess import DMImagePreprocessor

    if segment_breast:
        img, _ = DMImagePreprocessor.segment_breast(img)
    if face != "as-is" and faces_left(img) != (face == "left"):
        img = np.ascontiguousarray(img[:, ::-1])
    if levels:
        img = auto_levels(img)
    height, width = img_size
    if resize == "stretch":
        return resize_image(img, height, width)
    scale = min(height / img.shape[0], width / img.shape[1])
    rows, columns = (max(1, int(length * scale + 1e-9)) for length in img.shape)
    small = resize_image(img, rows, columns)
    left = width - columns if faces_left(img) else 0
    return np.pad(small, ((0, height - rows), (left, width - columns - left)))


# ------------------------------------------------------------------------------------------------- text files


def write_csv(path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def open_csv(path, delimiters: str = ",") -> Iterator[tuple[list[str], Iterator[tuple[str, list[str]]]]]:
    """The header of a CSV file, and its rows: where each stands ("path, line n") and its cells; empty ones left out.

    delimiters: what may divide cells; the one that the header has most of does.
    InputError for what is no UTF-8 text or no CSV, or for a row of more or fewer cells than the header; it names the
    line.
    """
    reader = csv.reader((), strict=True)

    def read_rows():
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if len(cells) != len(header) and any(cells):
                raise InputError(f"{where}: Expected {len(header)} cells. Received {len(cells)}; is the file whole?")
            if any(cells):
                yield where, cells

    try:
        text = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        first = text.readline()
        text.seek(0)
        reader = csv.reader(text, delimiter=max(delimiters, key=first.count), strict=True)
        header = next(reader, [])
        yield header, read_rows()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: Expected UTF-8 text") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from None


@contextmanager
def open_table(path) -> Iterator[tuple[list[str], Iterable[tuple[str, list[str]]]]]:
    """The header of a table and its rows, as `open_csv` gives them: of a CSV file or the first sheet of an Excel file.

    Cells of a CSV file are divided by what divides its header: commas, semicolons or tabs.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        with open_csv(path, delimiters=",;\t") as opened:
            yield opened
    elif suffix in TABLE_SUFFIXES:
        header, *lines = _read_excel(path) or [[]]
        yield header, [(f"{path}, row {number}", cells) for number, cells in enumerate(lines, 2) if any(cells)]
    else:
        raise InputError(f"{path}: Expected a table ending in {', '.join(TABLE_SUFFIXES)}")


def _read_excel(path) -> list[list[str]]:
    """Cells of the first sheet as text; whole numbers have no point."""
    package = {".xls": "xlrd", ".xlsx": "openpyxl"}[Path(path).suffix.lower()]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{path}: reading it needs a package: pip install {package}, or save it as .csv")
    try:
        if package == "openpyxl":
            return _read_xlsx(path)
        import xlrd

        # The first sheet alone: each can claim all cells that the format has.
        rows = xlrd.open_workbook(path, logfile=io.StringIO(), on_demand=True).sheet_by_index(0).get_rows()
        number = xlrd.XL_CELL_NUMBER
        return [[f"{cell.value:.15g}" if cell.ctype == number else str(cell.value) for cell in row] for row in rows]
    except (OSError, InputError):
        raise
    except Exception as error:  # the packages raise many kinds
        raise InputError(f"{path}: not a readable table ({type(error).__name__}: {error})") from None


def _read_xlsx(path) -> list[list[str]]:
    """Cells of the first sheet as text, in rows of one length, or none.

    Raises InputError where they would fill the memory: one cell far below and to the right makes all those before it,
    and each XML tag an object, of which an archive holds thousands in a few bytes.
    """
    import openpyxl

    check_archive(path, compressed=True)
    with zipfile.ZipFile(path) as archive:
        tags = 0
        for name in archive.namelist():
            with archive.open(name) as member:
                tags += sum(part.count(b"<") for part in iter(functools.partial(member.read, 2**20), b""))
    if tags > _MAX_TAGS:
        raise InputError(f"{path}: refused: a table of {tags} XML tags. Expected at most {_MAX_TAGS}; save it as .csv")
    rows, width, empty = [], 1, []  # of which there may be millions
    with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # the file's own claim
        for row in sheet.iter_rows(values_only=True):
            cells = list(map(_cell_text, row))
            while cells and not cells[-1]:
                cells.pop()
            width = max(width, len(cells))
            rows.append(cells or empty)
            if len(rows) * max(width, 16) > _MAX_CELLS:  # the format itself has 2**20 rows
                raise InputError(
                    f"{path}: refused: a table of more than {_MAX_CELLS} cells. Expected the table alone on the first "
                    "sheet, from its first row and column on; save it as .csv"
                )
    return [cells + [""] * (width - len(cells)) if cells else cells for cells in rows]


def _cell_text(value) -> str:
    if value is None:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def plain_header(name: str) -> str:
    """The header of a column in small letters, with a space for each "_" or run of spaces."""
    return " ".join(name.replace("_", " ").lower().split())


def find_columns(
    path, header: Sequence[str], columns: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> dict[str, int]:
    """Where in `header` each column is. columns: spellings of each, of which one must be there.

    Spellings are in small letters with spaces; in the header "_" and " " are the same, and so is case. InputError
    names what is missing, by the first spelling, but for the `optional` columns, which are left out.
    """
    names = [plain_header(name) for name in header]
    places, missing = {}, []
    for name, spellings in columns.items():
        found = [names.index(spelling) for spelling in spellings if spelling in names]
        if found:
            places[name] = found[0]
        elif name not in optional:
            missing.append(spellings[0])
    if missing:
        raise missing_columns(path, missing, header)
    return places


def missing_columns(path, missing: Iterable[str], header: Sequence[str]) -> InputError:
    """The error of a table that lacks columns: which, and what there is, cut where it is long."""
    received = one_line(", ".join(header), 100) or "nothing"
    return InputError(f"{path}, line 1: missing columns {', '.join(missing)}. Received {received}")


def is_below(name: str) -> bool:
    """Whether a relative path, of this or another system, can only mean something below the folder it starts from."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    anchored = posix.anchor or windows.anchor or ".." in posix.parts + windows.parts
    return bool(posix.parts) and not anchored and name.isprintable()


# ---------------------------------------------------------------------------------------------- table of images


class ImageRow(NamedTuple):
    """One row of images.csv.

    file: path of the image below the table's folder, such as train/neg/P_00001_LEFT_CC.png. set: one of `SETS`.
    label: one of `CLASSES`. side: LEFT, RIGHT or "". view: CC, MLO or "". source: path of the file that the image was
    made from, below the folder of the download.
    """

    file: str
    set: str
    label: str
    patient: str
    side: str
    view: str
    source: str


# What the columns of images.csv may hold.
_ALLOWED = {"set": SETS, "label": CLASSES, "side": ("LEFT", "RIGHT", ""), "view": ("CC", "MLO", "")}


def write_image_table(path, rows: Iterable[ImageRow]) -> None:
    write_csv(path, ImageRow._fields, rows)


def read_image_table(path):
    """The rows of images.csv as a pandas DataFrame of strings: the columns of `ImageRow`, and others if there are.

    Raises InputError, which names the line, for missing columns, no rows, unknown values, an image without patient,
    a repeated file, or one that is not below the table's folder. Whether the files are there is not looked at.
    """
    import pandas as pd

    rows, lines = [], {}
    with open_csv(path) as (header, cells_of):
        if missing := [name for name in ImageRow._fields if name not in header]:
            raise missing_columns(path, missing, header)
        for where, cells in cells_of:
            row = dict(zip(header, cells, strict=True))
            for name, allowed in _ALLOWED.items():
                if row[name] not in allowed:
                    expected = " or ".join(value or "nothing" for value in allowed)
                    raise InputError(f"{where}: unknown {name}. Expected {expected}. Received {row[name]!r}")
            if not row["patient"]:
                raise InputError(f"{where}: no patient. Expected an id")
            if not is_below(row["file"]):
                raise InputError(f"{where}: Expected a file below the table's folder. Received {row['file']!r}")
            if other := lines.get(row["file"]):
                raise InputError(f"{where}: {row['file']} stands in line {other} too; remove one of them")
            lines[row["file"]] = where.rpartition(" ")[2]
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: no images below the header")
    return pd.DataFrame(rows, columns=header, dtype=str)


def parse_image_name(stem: str) -> tuple[str, str, str] | None:
    """(patient, side, view) of a prepared image's name without ending, None for names of another form.

    The form is <patient>_<LEFT|RIGHT>_<CC|MLO>[_<n>], n from 2 for further images of one view.
    """
    match = _IMAGE_NAME.fullmatch(stem)
    return match and match.group(1, 2, 3)


# ---------------------------------------------------------------------------------------------- resumable runs


@dataclass(frozen=True)
class Item:
    """One image to prepare.

    sources: paths of all files it may be made from, below the download folder. outputs: paths of all files it may
    become, below the output folder. plan: what `prepare`'s function needs to know, in types that JSON can hold;
    these and the sources decide how the outputs look.
    """

    name: str
    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    plan: object


@dataclass
class Prepared:
    """What became of one item, in plain types that JSON can hold.

    outputs: paths below the output folder. repairs: (kind, what was mended). faults: what could not be used, and
    why, one line each. facts: whatever the caller wants to know later. log: lines for who watches, which are printed
    with the faults as soon as the item is done, and not kept.
    """

    name: str
    outputs: list[str] = field(default_factory=list)
    repairs: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def prepare(
    items: Sequence[Item],
    function: Callable[[Item], Prepared],
    download,
    out,
    folders: Sequence[str],
    jobs: int = 1,
    backend: str = "loky",
    on_error: str | None = None,
    fresh: bool = False,
    desc: str = "preparing",
) -> list[Prepared]:
    """Prepare all items, keeping what an earlier run has made of the same files with the same plans.

    function: writes the files of one item below `out`; see `run_parallel`. folders: the folders below `out` that it
    writes to. Nobody else's files may be there, since a trainer would take them for the data set's; hidden files may.
    on_error: "stop" raises InputError at the first fault. fresh: keep nothing. desc: title of the progress bar.

    The manifest in `out` gets a line with all outputs to come, and one as each item is done. What it lists and the
    items no longer have is removed, so that no image stays in the set where an earlier split had put it. An item is
    kept when it had no fault, its sources have the size and time of change they had, and its outputs the checksums.
    The same items give the same files, whether or not the run was interrupted. `report.json`, which the caller
    writes in the end, is removed at the start: while it is there, the outputs are whole.

    Returns one result an item, in their order. Raises InputError when `folders` hold files of someone else, or another
    run writes to `out`.
    """
    with locked(out):
        return _prepare(items, function, Path(download), Path(out), folders, jobs, backend, on_error, fresh, desc)


def keep_options(out, options: Mapping, fresh: bool = False) -> None:
    """Note what decides the files in the folder `out`, for another run to compare with.

    Raises InputError, naming them, where those of an earlier run are other ones, unless it is to begin `fresh`.
    """
    if not fresh:
        check_kept_options(out, options)
    write_text(Path(out, OPTIONS), json.dumps(options, indent=1) + "\n")


def check_kept_options(out, options: Mapping) -> None:
    """The check of `keep_options` alone: a run that writes to several folders makes it before it notes any."""
    if (earlier := read_json(Path(out, OPTIONS))) is not None:
        ours = json.loads(json.dumps(options))
        check_same_options(out, earlier, ours, "another folder, or --fresh to replace the work")


def _prepare(items, function, download, out, folders, jobs, backend, on_error, fresh, desc):
    manifest = out / MANIFEST
    records, ours = _read_manifest(manifest)
    present = [path for folder in folders for path in Path(out, folder).rglob("*") if path.is_file()]
    for path in sorted(present):
        if path.relative_to(out).as_posix() not in ours and not path.name.startswith("."):
            raise InputError(
                f"{path}: not made by this script, so it is no part of the data set: Expected none but its own files "
                f"in this folder; move it elsewhere, or name another output folder"
            )
    (out / REPORT).unlink(missing_ok=True)
    for folder in {out, *(path.parent for path in present)}:
        remove_partial(folder)
    for folder in folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    stamps = {item.name: _stamp(download, item) for item in items}
    if fresh:
        records = {}
    earlier = [records[name] for name, stamp in stamps.items() if name in records and records[name]["stamp"] == stamp]
    whole = run_parallel(functools.partial(_is_whole, out), earlier, jobs, "threading", "checking")
    records = {record["name"]: record for record, kept in zip(earlier, whole, strict=True) if kept}
    pending = [item for item in items if item.name not in records]
    if records:
        print(f"{len(records)} of {len(items)} images are there from an earlier run")
    # Starts with the end of the line that a killed run may have left half written.
    append_text(manifest, "\n" + json.dumps({"to_come": [path for item in pending for path in item.outputs]}) + "\n")
    for item, result in zip(pending, run_parallel(function, pending, jobs, backend, desc), strict=True):
        if result.faults and on_error == "stop":
            raise InputError(result.faults[0])
        checksums = [_checksum(out / path) for path in result.outputs]
        if result.log:
            tqdm.write("\n".join([*result.log, *result.faults]))
        records[item.name] = {"stamp": stamps[item.name], "checksums": checksums, **asdict(result)}
        del records[item.name]["log"]
        append_text(manifest, _to_line(records[item.name]))
    ordered = [records[item.name] for item in items]
    ours.update(path for item in items for path in item.outputs)
    for path in ours.difference(*(record["outputs"] for record in ordered)):
        Path(out, path).unlink(missing_ok=True)
    write_text(manifest, "".join(map(_to_line, ordered)))
    return [_to_prepared(record) for record in ordered]


def _stamp(download: Path, item: Item) -> str:
    """Changes with the item's sources and settings."""
    sources = []
    for source in item.sources:
        try:
            status = (download / source).stat()
        except FileNotFoundError:  # a fault that the function will find
            sources.append([source])
        else:
            sources.append([source, status.st_size, status.st_mtime_ns])
    text = json.dumps([RULES, sources, item.plan], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _is_whole(out: Path, record: dict) -> bool:
    """Whether an earlier result had no fault and its outputs are still there as written."""
    if record["faults"]:
        return False
    try:
        return [_checksum(out / path) for path in record["outputs"]] == record["checksums"]
    except FileNotFoundError:
        return False


def _to_prepared(record: dict) -> Prepared:
    fields = {name: record[name] for name in ("name", "outputs", "repairs", "faults", "facts")}
    return Prepared(**fields | {"repairs": [tuple(repair) for repair in record["repairs"]]})


def _to_line(record: dict) -> str:
    """A record as a line of the manifest, with a checksum of itself: damaged ones are made anew."""
    return json.dumps(record | {"checksum": _checksum_of_record(record)}) + "\n"


def _checksum_of_record(record: dict) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _is_own_file(name: object) -> bool:
    """Whether an output that the manifest lists is below its folder. Names of images may hold any character."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _read_manifest(path: Path) -> tuple[dict[str, dict], set[str]]:
    """The last record of each item by its name, and all outputs that were ever announced or made."""
    records, outputs = {}, set()
    lines = path.read_bytes().splitlines() if path.exists() else ()
    for line in lines:
        try:
            record = parse_json(line)
        except ValueError:  # a line cut off when the run was killed, or damaged
            continue
        if not isinstance(record, dict):
            continue
        listed = [record.get(name) for name in ("to_come", "outputs")]
        paths = [name for names in listed if isinstance(names, list) for name in names]
        # What is listed and no longer wanted is removed.
        if others := [name for name in paths if not _is_own_file(name)]:
            raise InputError(f"{path}: lists {others[0]!r}. Expected files of its own folder alone; remove the list")
        outputs.update(paths)
        if record.pop("checksum", None) == _checksum_of_record(record):
            records[record["name"]] = record
    return records, outputs
