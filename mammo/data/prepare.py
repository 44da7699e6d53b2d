"""What the preparation scripts do alike around `work.prepare`: splits by option, lists, counts and the report.

A script reads its data set's tables into one `Image` a picture, by the name of its file without ending, and plans an
`Item` for each. The options are those of `mammo.data.prepare.add_preparation_options`.
"""

import argparse
import functools
import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mammo.base.cli import add_flag, add_parallel_options, fraction, natural_int, positive_int
from mammo.base.files import InputError, counted, locked, write_img, write_text
from mammo.base.tables import is_below, missing_columns, open_csv, write_csv
from mammo.base.work import REPORT, Job, Outcome, keep_options, run_resumable
from mammo.data.splits import (
    Image,
    _check_drawn,
    cancer_patients,
    check_disjoint,
    count_left_patients,
    count_sets,
    read_patient_list,
    split_by_patient,
    split_in_three,
)
from mammo.images.reading import auto_levels, faces_left, to_uint16

# Options that decide what the outputs are, where a preparation script has them.
DECIDING = (
    *("split", "test_size", "val_size", "random_state"),
    *("img_size", "resize", "segment_breast", "auto_levels", "face"),
    *("format", "voi_lut", "neg_labels", "pos_labels", "neg_birads", "pos_birads", "patient_regex", "roi_masks"),
)


NEAR_DUPLICATES = "near_duplicates.csv"

_COMPARED = ("file", "set", "label", "patient")

CLASSES = ("neg", "pos")

SETS = ("train", "val", "test")

# Where the whole images lie below the output folder.
FOLDERS = tuple(f"{name}/{label}" for name in SETS for label in CLASSES)

_PAIR_COLUMNS = (*_COMPARED, *(f"other_{name}" for name in _COMPARED), "difference")


def whole_img_path(name: str, folder: str) -> str:
    """Path of a whole image below the output folder. folder: one of `FOLDERS`."""
    return f"{folder}/{name}.png"


def whole_options(args) -> dict:
    """Options of `mammo.data.prepare.make_whole`, in types that JSON can hold."""
    return {
        "img_size": args.img_size,
        "resize": args.resize,
        "segment_breast": args.segment_breast,
        "levels": args.auto_levels,
        "face": args.face,
    }


def write_whole(img, out, folder: str, whole: Mapping, source: str, result: Outcome) -> None:
    """Write a mammogram (H, W), uint8 or uint16, as whole image of `result`, and note its facts there.

    folder: one of `FOLDERS`. whole: `whole_options`. source: see `ImageRow`.
    """
    img = to_uint16(img)
    small = make_whole(img, **whole)
    path = whole_img_path(result.name, folder)
    write_img(Path(out, path), small)
    result.outputs.append(path)
    pixel_sum = int(small.sum(dtype="int64"))
    result.facts |= {"folder": folder, "source": source, "pixel_sum": pixel_sum, "fingerprint": fingerprint(img)}


def output_folders(args, folders: Sequence[str] = FOLDERS) -> list[Path]:
    """The output folder and those of images below it, whose files are none of a data set that lies around them.

    InputError when there should be an output folder and is none.
    """
    if args.out is not None:
        return [Path(args.out), *(Path(args.out, folder) for folder in folders)]
    if args.dry_run:
        return []
    raise InputError("no output folder given: Expected one after the folder of the data, or --dry-run")


def prepare_items(
    items: Sequence[Job],
    function: Callable[..., Outcome],
    source,
    args,
    folders: Sequence[str] = FOLDERS,
    faults: Sequence[Outcome] = (),
) -> list[Outcome]:
    """Run `mammo.base.work.prepare` with these options. Returns `faults`, found before, and a result an item.

    function: takes the item, and the folders `download` and `out` by name. source: the folder of the data.
    """
    if faults and args.on_error == "stop":
        raise InputError(faults[0].faults[0])
    # The workers of a cluster start in folders of their own.
    work = functools.partial(function, download=Path(source).resolve(), out=Path(args.out).resolve())
    with locked(args.out):
        keep_options(args.out, deciding_options(args), args.fresh)
        done = run_resumable(items, work, source, args.out, folders, args.jobs, args.backend, args.on_error, args.fresh)
    return [*faults, *done]


def deciding_options(args) -> dict:
    return {name: value for name, value in vars(args).items() if name in DECIDING or name.endswith("_column")}


def split_patients(
    images: Iterable[Image], args, parser: ArgumentParser, official: Mapping[str, Iterable[str]] | None = None
) -> dict[str, list[str]]:
    """Patients of train, val and test by `args.split`: "lists", "official", or any other name for a random one.

    parser: that of `args`, which knows the defaults. official: patients of the data set's own test set, and of its
    validation set where it has one; all others are for training, part of them for validation where it has none.
    InputError when a patient is in two sets, and for lists of patients, or shares, that this split does not use.
    """
    cancer = cancer_patients(images)
    files = dict(zip(SETS, (args.pat_train, args.pat_val, args.pat_test), strict=True))
    if args.split != "lists" and (given := [f"--pat-{name}" for name, path in files.items() if path is not None]):
        raise InputError(f"{', '.join(given)}: Expected --split lists. Received --split {args.split}")
    if args.split == "lists":
        for name in ("test", "val"):
            _check_drawn(name, args, parser)
        if missing := [f"--pat-{name}" for name, path in files.items() if path is None]:
            raise InputError(f"--split lists: Expected a file for each set. Missing {', '.join(missing)}")
        sets = {name: sorted(read_patient_list(path)) for name, path in files.items()}
        for name, path in files.items():
            if unknown := [patient for patient in sets[name] if patient not in cancer]:
                raise InputError(f"{path}: {counted(len(unknown), 'patient')} not in the tables, such as {unknown[0]}")
    elif args.split == "official":
        check_disjoint(official)
        named = {name: sorted(official.get(name, ())) for name in ("val", "test")}
        for name in ("test", *(["val"] if named["val"] else [])):
            _check_drawn(name, args, parser)
        rest = {patient: label for patient, label in cancer.items() if patient not in {*named["val"], *named["test"]}}
        if not rest:
            raise InputError("--split official: no training patients: Expected the tables of both sets")
        train = sorted(rest)
        if not named["val"]:
            train, named["val"] = split_by_patient(rest, args.val_size, args.random_state)
        sets = {"train": train} | named
    else:
        sets = split_in_three(cancer, args.test_size, args.val_size, args.random_state)
    check_disjoint(sets)
    return sets


# ---------------------------------------------------------------------------------------- lists and the report


def print_exclusions(excluded: Mapping[str, Sequence[str]], reasons: Mapping[str, str], faults: Sequence[Outcome]):
    """Say what is left out and why. excluded: what is, by kind. reasons: why, by kind. faults: see `prepare_items`."""
    for kind, listed in excluded.items():
        if listed:
            print(f"left out: {counted(len(listed), 'image')} such as {listed[0]}, since {reasons[kind]}")
    if faults:
        print(f"at fault: {counted(len(faults), 'image')}, such as {faults[0].faults[0]}")


def report_exclusions(excluded: Mapping[str, Sequence[str]], reasons: Mapping[str, str]) -> dict[str, dict]:
    """What report.json says of what is left out."""
    return {kind: {"count": len(listed), "why": reasons[kind], "items": listed} for kind, listed in excluded.items()}


def finished(results: Iterable[Outcome]) -> list[Outcome]:
    """Those whose image was made, whatever else of theirs was not."""
    return [result for result in results if result.outputs]


def write_lists(
    out, sets: Mapping[str, Sequence[str]], images: Mapping[str, Image], results: Iterable[Outcome]
) -> dict[str, list[str]]:
    """Write pat_train.txt, pat_val.txt, pat_test.txt and images.csv, of the images that were made.

    Warns where the images.csv of an earlier run has images in other sets. Returns the patient lists.
    """
    done = finished(results)
    kept = {images[result.name].patient for result in done}
    lists = {name: [patient for patient in patients if patient in kept] for name, patients in sets.items()}
    for name, patients in lists.items():
        write_text(Path(out, f"pat_{name}.txt"), "".join(f"{patient}\n" for patient in patients))
    rows = [to_row(result, images[result.name]) for result in whole_images(done)]
    _warn_of_moved(out, rows)
    write_image_table(Path(out, IMAGE_TABLE), rows)
    return lists


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


def _warn_of_moved(out, rows: Iterable[ImageRow]) -> None:
    """Say how many images of the earlier images.csv in `out`, if there is one, are in another set now."""
    path = Path(out, IMAGE_TABLE)
    if not path.exists():
        return
    try:
        table = read_image_table(path)
    except InputError as error:  # to be replaced by a good one
        print(f"warning: {error}; not compared with the new sets", file=sys.stderr)
        return
    earlier = {PurePosixPath(file).name: name for file, name in zip(table["file"], table["set"], strict=True)}
    names = {PurePosixPath(row.file).name: row.set for row in rows}
    moved = [file for file, name in names.items() if earlier.get(file, name) != name]
    if moved := sorted(moved, key=lambda file: names[file] != "test"):
        seen = ": models trained on the earlier sets have seen some of today's test images"
        print(
            f"warning: {out}: {counted(len(moved), 'image')} now in another set than before (such as {moved[0]})"
            f"{seen if names[moved[0]] == 'test' else ''}",
            file=sys.stderr,
        )


def whole_images(results: Iterable[Outcome]) -> list[Outcome]:
    """Those with a whole image, since their patient is in a set."""
    return [result for result in results if "folder" in result.facts]


def to_row(result: Outcome, image: Image) -> ImageRow:
    folder = result.facts["folder"]
    name, label = folder.split("/")
    file = whole_img_path(result.name, folder)
    return ImageRow(file, name, label, image.patient, image.side, image.view, result.facts["source"])


def list_near_duplicates(images: Mapping[str, Image], results: Iterable[Outcome]) -> list[dict]:
    """Pairs of whole images of different patients that look the same: a row of near_duplicates.csv each.

    Columns: those of `ImageRow` but side, view and source, of the one and of the other image, and `difference`, the
    share of their fingerprints' bits; those in different sets come first.
    """
    whole = whole_images(results)
    rows = [to_row(result, images[result.name]) for result in whole]
    found = find_near_duplicates([result.facts["fingerprint"] for result in whole], [row.patient for row in rows])
    pairs = []
    for one, other, difference in found:
        pair = {name: getattr(rows[one], name) for name in _COMPARED}
        pair |= {f"other_{name}": getattr(rows[other], name) for name in _COMPARED}
        pairs.append(pair | {"difference": round(difference, 4)})
    return sorted(pairs, key=lambda pair: pair["set"] == pair["other_set"])


def pixel_mean(results: Sequence[Outcome], img_size: tuple[int, int]) -> float | None:
    """Mean of the training images after rescaling, None if there are none."""
    whole = whole_images(results)
    sums = [result.facts["pixel_sum"] for result in whole if result.facts["folder"].startswith("train/")]
    return round(RESCALE_FACTOR * sum(sums) / (len(sums) * img_size[0] * img_size[1]), 4) if sums else None


def make_report(
    args,
    images: Mapping[str, Image],
    sets: Mapping[str, Sequence[str]],
    lists: Mapping[str, Sequence[str]],
    results: Sequence[Outcome],
    repairs: Mapping[str, Sequence[str]],
) -> dict:
    """What report.json says of any data set; the caller adds what is its own, to `counts` and beside them.

    sets: as planned. lists: what `write_lists` returned. repairs: kinds of repairs to be named even where
    there are none, with those found in the tables.
    """
    done = finished(results)
    repairs = {kind: list(listed) for kind, listed in repairs.items()}
    for result in results:
        for kind, what in result.repairs:
            repairs.setdefault(kind, []).append(what)
    return {
        "options": deciding_options(args),
        "rescale_factor": RESCALE_FACTOR,
        "featurewise_mean": pixel_mean(results, args.img_size),
        "counts": {
            "images_prepared": len(done),
            "images_skipped": len(results) - len(done),
            "patients_in_no_set": count_left_patients(sets, images.values()),
        },
        "planned_sets": count_sets(sets, images.values()),
        "sets": count_sets(lists, [images[result.name] for result in done]),
        "repairs": {kind: {"count": len(listed), "items": listed} for kind, listed in sorted(repairs.items())},
        "near_duplicates": list_near_duplicates(images, results),
        "skipped": [{"image": result.name, "reason": fault} for result in results for fault in result.faults],
    }


def finish(report: dict, args) -> None:
    """Write report.json and near_duplicates.csv, and print what matters of them.

    Raises InputError for faults, unless `args.on_error` is "skip".
    """
    pairs = report["near_duplicates"]
    write_csv(Path(args.out, NEAR_DUPLICATES), _PAIR_COLUMNS, [pair.values() for pair in pairs])
    write_text(Path(args.out, REPORT), json.dumps(report, indent=2) + "\n")
    counts, repairs, skipped = report["counts"], report["repairs"], report["skipped"]
    masks = f" and {counted(counts['masks_prepared'], 'mask')}" if "masks_prepared" in counts else ""
    print(f"prepared {counted(counts['images_prepared'], 'image')}{masks}")
    for name, numbers in report["sets"].items():
        images, positive = numbers["images"], numbers["positive_images"]
        print(f"  {name:5} {counted(numbers['patients'], 'patient')}, {counted(images, 'image')} ({positive} positive)")
        if not images:
            print(f"Warning: {name} has no images")
        elif positive in (0, images):
            print(f"Warning: {name} has images of one class only: no AUC can be computed on it")
    for kind, listed in repairs.items():
        if listed["count"]:
            print(f"  {kind}: {listed['count']}")
    for text in repairs.get("mask_resized", {}).get("items", ()):
        print(f"Warning: mask resized: {text}")
    if pairs:
        across = sum(pair["set"] != pair["other_set"] for pair in pairs)
        at_least = "at least " if len(pairs) == MAX_PAIRS else ""
        print(
            f"Warning: {at_least}{counted(len(pairs), 'pair')} of images of different patients that look the same, "
            f"{at_least}{across} of them across sets, such as {pairs[0]['file']} and {pairs[0]['other_file']}; figures "
            f"on the test set may be too good: see {NEAR_DUPLICATES}"
        )
    if skipped:
        print(f"{len(skipped)} left out:", *(fault["reason"] for fault in skipped), sep="\n  ")
    if (mean := report["featurewise_mean"]) is not None:
        print(f"for the trainer: --rescale-factor {RESCALE_FACTOR} --featurewise-mean {mean:.2f}")
    print(f"details: {Path(args.out, REPORT)}")
    if skipped and args.on_error != "skip":
        raise InputError(
            f"images or masks at fault: {len(skipped)}, all others done; mend them and run this again, or "
            f"leave them out with --on-error skip. The first: {skipped[0]['reason']}"
        )


def add_prepare_options(parser: argparse._ActionsContainer) -> None:
    """How `mammo.base.work.prepare` works."""
    parser.add_argument(
        "--on-error", choices=["stop", "skip"],
        help="what a bad image or mask does: end the run, or be left out and listed; "
        "default: be left out and listed, with exit status 1 when all others are done",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="start over, and replace the work of an earlier run")
    add_parallel_options(parser)


def add_preparation_options(parser: argparse.ArgumentParser, splits: Mapping[str, str], test_size: float) -> None:
    """How a data set is divided by patient, what its whole images become, and how the work is done.

    splits: the values of `--split` and what each does, the default first; "lists" is among them always.
    test_size: the default of `--test-size`. What reads these options: `mammo.data.prepare`.
    """
    splits = {**splits, "lists": "from files"}
    default = next(iter(splits))
    parser.add_argument("--dry-run", action="store_true", help="read the tables alone and print the split")
    group = parser.add_argument_group("split by patient")
    add = group.add_argument
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in splits.items())
    add("--split", choices=list(splits), default=default, help=f"{meanings} (default: {default})")
    add("--test-size", type=fraction, default=test_size, help=f"share of the patients for the test ({test_size})")
    add("--val-size", type=fraction, default=0.1, help="share of the other patients for validation (0.1)")
    add("--random-state", type=natural_int, default=12345, help="seed of the split (12345)")
    for name in ("train", "val", "test"):
        add(f"--pat-{name}", metavar="FILE", help=f"with --split lists: {name} patients, one id a line")
    group = parser.add_argument_group("whole images")
    add = group.add_argument
    add(
        "--img-size", "-is", nargs=2, type=positive_int, default=[1152, 896], metavar=("HEIGHT", "WIDTH"),
        help="size of the whole images (1152 896)",
    )  # fmt: skip
    add(
        "--resize", choices=["stretch", "pad"], default="stretch",
        help="stretch to the size (the original), or keep the aspect ratio, fill the height and pad the width with "
        "zeros (default: stretch)",
    )  # fmt: skip
    add_flag(group, "--segment-breast", False, "blank all but the breast, and cut the image to it")
    add_flag(group, "--auto-levels", False, "stretch the pixels of each image to the full range, 0..65535")
    add(
        "--face", choices=["left", "right", "as-is"], default="as-is",
        help="mirror whole images so that the breasts point this way (default: as-is)",
    )  # fmt: skip
    add_prepare_options(parser.add_argument_group("work"))


# Brings 16-bit pixels to 0..255: the published value of 255/65535.
RESCALE_FACTOR = 0.003891

IMAGE_TABLE = "images.csv"


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
    from mammo.images.breast import DMImagePreprocessor
    from mammo.images.reading import resize as resize_image

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


_SIDE = 32  # of the square of frequencies that a fingerprint is made of

_BITS = _SIDE * _SIDE

# Pictures are near duplicates when at most this share of their bits differs. Of 4.5 million pairs of drawn mammograms
# of different patients the most alike differ in 0.16, the four real ones at hand in 0.48 or more; copies of the real
# ones differ in 0.01 after JPEG (quality 20), a sixth of the size or noise, in 0.06 after windowing, and in 0.08 after
# a gamma of 0.6 or 1.6.
MAX_DIFFERENCE = 0.09

# No more pairs are told: they grow as the square of the number of copies.
MAX_PAIRS = 100_000

_BLOCK = 2048


def fingerprint(img: np.ndarray) -> str:
    """Perceptual hash of a picture (H, W) of integers: 1024 bits as hexadecimal digits.

    The picture is shrunk to 64 x 64 pixels, the breast pointing to the left, and transformed into cosines; a bit says
    whether one of the 32 x 32 lowest frequencies is stronger than the median of them (Zauner 2010, "Implementation
    and benchmarking of perceptual image hash functions", there with 8 x 8). Size, aspect ratio, brightness, contrast
    and mirror images make no difference.
    """
    import cv2

    small = cv2.resize(img, (2 * _SIDE, 2 * _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if not faces_left(small):
        small = np.ascontiguousarray(small[:, ::-1])
    lowest = cv2.dct(small)[:_SIDE, :_SIDE]
    return np.packbits(lowest > np.median(lowest)).tobytes().hex()


def find_near_duplicates(fingerprints: Sequence[str], patients: Sequence[str]) -> list[tuple[int, int, float]]:
    """Pairs of pictures of different patients whose fingerprints differ in at most `MAX_DIFFERENCE` of their bits.

    fingerprints, patients: of each picture. Returns (position of one, position of the other, share of bits that
    differ), in the order of the positions, the first `MAX_PAIRS` of them. 100,000 pictures take minutes and 200 MB.
    """
    packed = np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint8).reshape(-1, _BITS // 8)
    patients = np.unique(patients, return_inverse=True)[1]
    least_product = _BITS * (1 - 2 * MAX_DIFFERENCE)
    pairs = []
    for first in tqdm(range(0, len(packed), _BLOCK), "comparing", unit="block", disable=None):
        block, others = _signs(packed[first : first + _BLOCK]), []
        for second in range(first, len(packed), _BLOCK):
            # The product of two rows of signs is the number of equal bits less that of different ones.
            products = block @ _signs(packed[second : second + _BLOCK]).T
            one, other = np.nonzero(products >= least_product)
            differences = (_BITS - products[one, other]) / (2 * _BITS)
            one, other = one + first, other + second
            wanted = (one < other) & (patients[one] != patients[other])
            others += zip(one[wanted].tolist(), other[wanted].tolist(), differences[wanted].tolist(), strict=True)
        pairs += sorted(others)
        if len(pairs) >= MAX_PAIRS:
            break
    return pairs[:MAX_PAIRS]


def _signs(packed: np.ndarray) -> np.ndarray:
    """float32 (n, bits), 1 where a bit is set and -1 where not."""
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
