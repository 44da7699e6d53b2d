"""From a data set as downloaded to image folders: splits by patient, whole images, and runs that can be resumed.

Nothing here knows one data set from another; the readers of their tables are in `scripts/`. What they hand over is
the name, patient and label of each image, and a function that writes the files of one image.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from dm_files import InputError, atomic_write, remove_partial
from dm_parallel import run_parallel

SETS = ("train", "val", "test")
CLASSES = ("neg", "pos")
# Brings 16-bit pixels to 0..255: the published value of 255/65535.
RESCALE_FACTOR = 0.003891
MANIFEST = "manifest.jsonl"
REPORT = "report.json"
# To be raised when the same files and options shall give other outputs, so that older ones are made again.
RULES = 1


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
        print(f"{len(patients)} patients ({sum(cancer.values())} with cancer) are few: divided class by class")
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
                f"{len(shared)} patients are in both {name} and {other_name}, such as {shared[0]}: "
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


def write_text(path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_csv(path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------- resumable runs


@dataclass(frozen=True)
class Item:
    """One image to prepare.

    sources: paths of all files it may be made from, below the download folder. settings: whatever else decides how
    its outputs look. plan: what `prepare`'s function needs to know.
    """

    name: str
    sources: tuple[str, ...]
    settings: dict
    plan: object


@dataclass
class Prepared:
    """What became of one item, in plain types that JSON can hold.

    outputs: paths below the output folder. repairs: (kind, what was mended). faults: what could not be used, and
    why, one line each. facts: whatever the caller wants to know later.
    """

    name: str
    outputs: list[str] = field(default_factory=list)
    repairs: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)


def prepare(
    items: Sequence[Item],
    function: Callable[[Item], Prepared],
    download,
    out,
    folders: Sequence[str],
    jobs: int = 1,
    backend: str = "loky",
    on_error: str | None = None,
) -> list[Prepared]:
    """Prepare all items, keeping what an earlier run has made of the same files with the same settings.

    function: writes the files of one item below `out`; see `run_parallel`. folders: the folders below `out` that it
    writes to; they are this function's own, and what else lies there at the end is removed, so that no image
    stays in the set where an earlier split had put it. on_error: "stop" raises InputError at the first fault.

    The manifest in `out` gets a line as each item is done. An item is kept when it had no fault, its sources have
    the size and time of change they had, and its outputs the size they had. The same items give the same files,
    whether or not the run was interrupted. `report.json`, which the caller writes in the end, is removed at the
    start: while it is there, the outputs are whole.

    Returns one result an item, in their order. Raises InputError when `folders` hold files of someone else.
    """
    download, out = Path(download), Path(out)
    manifest = out / MANIFEST
    present = [path for folder in folders for path in Path(out, folder).rglob("*") if path.is_file()]
    if present and not manifest.exists():
        raise InputError(
            f"{present[0]}: not made by this script, which removes what does not belong to the data set from this "
            f"folder: Expected a new folder, or one that it has made"
        )
    (out / REPORT).unlink(missing_ok=True)
    remove_partial(out)
    for folder in folders:
        (out / folder).mkdir(parents=True, exist_ok=True)
    earlier = _read_manifest(manifest)
    stamps = {item.name: _stamp(download, item) for item in items}
    results = {
        item.name: earlier[item.name][1]
        for item in items
        if item.name in earlier and earlier[item.name][0] == stamps[item.name]
    }
    pending = [item for item in items if item.name not in results]
    if results:
        print(f"{len(results)} of {len(items)} images are there from an earlier run")
    with open(manifest, "a", encoding="utf-8") as file:
        file.write("\n")  # ends the line that a killed run may have left half written
        for result in run_parallel(function, pending, jobs, backend, "preparing"):
            if result.faults and on_error == "stop":
                raise InputError(result.faults[0])
            results[result.name] = result
            file.write(_manifest_line(out, stamps[result.name], result))
            file.flush()
    ordered = [results[item.name] for item in items]
    _remove_others(out, folders, {path for result in ordered for path in result.outputs})
    write_text(manifest, "".join(_manifest_line(out, stamps[result.name], result) for result in ordered))
    return ordered


def _stamp(download: Path, item: Item) -> str:
    """Changes with the item's sources and settings."""
    sources = []
    for source in item.sources:
        status = (download / source).stat()
        sources.append([source, status.st_size, status.st_mtime_ns])
    text = json.dumps([RULES, sources, item.settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _manifest_line(out: Path, stamp: str, result: Prepared) -> str:
    sizes = [(out / path).stat().st_size for path in result.outputs]
    return json.dumps({"stamp": stamp, "sizes": sizes, **asdict(result)}) + "\n"


def _read_manifest(path: Path) -> dict[str, tuple[str, Prepared]]:
    """Stamp and result by name, of the items without faults whose outputs are still there as written."""
    kept = {}
    if not path.exists():
        return kept
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            stamp, sizes = record.pop("stamp"), record.pop("sizes")
            result = Prepared(**record)
        except (ValueError, KeyError, TypeError, AttributeError):  # a line cut off when the run was killed
            continue
        result.repairs = [tuple(repair) for repair in result.repairs]
        kept.pop(result.name, None)
        outputs = [path.parent / output for output in result.outputs]
        if not result.faults and all(
            output.is_file() and output.stat().st_size == size for output, size in zip(outputs, sizes, strict=True)
        ):
            kept[result.name] = stamp, result
    return kept


def _remove_others(out: Path, folders: Sequence[str], expected: set[str]) -> None:
    """Remove what earlier runs with other images or splits, or a killed one, have left in `folders`."""
    for folder in folders:
        for path in sorted(Path(out, folder).rglob("*")):
            if path.is_file() and path.relative_to(out).as_posix() not in expected:
                path.unlink(missing_ok=True)
