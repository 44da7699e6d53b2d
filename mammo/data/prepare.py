"""Prepare any data set around `work.run_resumable`: options, whole images, lists and the report.

A data set's reader gives a `Picture` for each image, by the name of its file without ending; its plan gives a `Job`.
"""

import argparse
import functools
import itertools
import json
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mammo.base.cli import add_flag, add_parallel_options, fraction, natural_int, positive_int
from mammo.base.files import InputError, counted, write_img, write_text
from mammo.base.tables import is_below, missing_columns, open_csv, write_csv
from mammo.base.work import REPORT, Job, Outcome, keep_options, run_resumable
from mammo.data.duplicates import MAX_PAIRS, find_near_duplicates, fingerprint
from mammo.data.listing import CLASSES, SETS, DataSet, Listing, Picture
from mammo.data.splits import count_left_patients, count_sets, sets_of_patients
from mammo.images.breast import DMImagePreprocessor
from mammo.images.reading import auto_levels, faces_left, to_uint16
from mammo.images.reading import resize as resize_image

if TYPE_CHECKING:
    import pandas as pd

# Options that decide what the outputs are, where a data set has them, in the order of options.json.
DECIDING = (
    *("format", "voi_lut"),
    *("file_column", "label_column", "patient_column", "side_column", "view_column", "set_column"),
    *("neg_labels", "pos_labels", "patient_regex", "neg_birads", "pos_birads", "roi_masks"),
    *("split", "test_size", "val_size", "random_state"),
    *("img_size", "resize", "segment_breast", "auto_levels", "face"),
)

# Brings 16-bit pixels to 0..255: the published value of 255/65535.
RESCALE_FACTOR = 0.003891

IMAGE_TABLE, NEAR_DUPLICATES = "images.csv", "near_duplicates.csv"
_COMPARED = ("file", "set", "label", "patient")
_PAIR_COLUMNS = (*_COMPARED, *(f"other_{name}" for name in _COMPARED), "difference")


# ------------------------------------------------------------------------------------------------------ options


def add_work_options(parser: argparse._ActionsContainer) -> None:
    """Add the options of resumable work."""
    text = (
        "what a bad image or mask does: end the run, or be left out and listed; default: be left out and listed, with "
        "exit status 1 when all others are done"
    )
    parser.add_argument("--on-error", choices=["stop", "skip"], help=text)
    parser.add_argument("--fresh", action="store_true", help="start over, and replace the work of an earlier run")
    add_parallel_options(parser)


def add_preparation_options(parser: argparse.ArgumentParser, splits: Mapping[str, str], test_size: float) -> None:
    """Add the options of all data sets: how they are divided, what whole images become, how the work is done.

    splits: the values of `--split` and what each does, the default first; "lists" is added. test_size: the default.
    """
    splits = {**splits, "lists": "from files"}
    parser.add_argument("--dry-run", action="store_true", help="read the tables alone and print the split")
    add = parser.add_argument_group("split by patient").add_argument
    text = "; ".join(f"{name}: {meaning}" for name, meaning in splits.items())
    add("--split", choices=list(splits), default=next(iter(splits)), help=text)
    add("--test-size", type=fraction, default=test_size, help="share of the patients for the test")
    add("--val-size", type=fraction, default=0.1, help="share of the other patients for validation")
    add("--random-state", type=natural_int, default=12345, help="seed of the split")
    for name in SETS:
        add(f"--pat-{name}", metavar="FILE", help=f"with --split lists: {name} patients, one id a line")
    group = parser.add_argument_group("whole images")
    add = group.add_argument
    size = {"nargs": 2, "type": positive_int, "metavar": ("HEIGHT", "WIDTH"), "default": [1152, 896]}
    add("--img-size", "-is", help="size of the whole images", **size)
    text = "stretch to the size (the original), or keep the aspect ratio, fill the height and pad the width with zeros"
    add("--resize", choices=["stretch", "pad"], default="stretch", help=text)
    add_flag(group, "--segment-breast", False, "blank all but the breast, and cut the image to it")
    add_flag(group, "--auto-levels", False, "stretch the pixels of each image to the full range, 0..65535")
    text = "mirror whole images so that the breasts point this way"
    add("--face", choices=["left", "right", "as-is"], default="as-is", help=text)
    add_work_options(parser.add_argument_group("work"))


def deciding_options(args: argparse.Namespace) -> dict:
    """Return the options that decide what the outputs are."""
    return {name: getattr(args, name) for name in DECIDING if hasattr(args, name)}


def whole_options(args: argparse.Namespace) -> dict:
    """Return the options of `make_whole`, in types that JSON can hold."""
    size = {"img_size": args.img_size, "resize": args.resize}
    return {**size, "segment_breast": args.segment_breast, "levels": args.auto_levels, "face": args.face}


# ------------------------------------------------------------------------------------------------- whole images


def whole_img_path(name: str, folder: str) -> str:
    """Return the path of a whole image below the output folder. folder: one of `FOLDERS`."""
    return f"{folder}/{name}.png"


def full_img_path(name: str) -> str:
    """Return the path of an image of full size below the output folder."""
    return f"full_img/{name}.png"


def make_whole(
    img: np.ndarray,
    img_size: tuple[int, int],
    resize: str = "stretch",
    segment_breast: bool = False,
    levels: bool = False,
    face: str = "as-is",
) -> np.ndarray:
    """Return a mammogram (H, W) as the whole-image classifier gets it: (*img_size), of the same 16-bit type.

    Args:
        resize: "stretch" to `img_size` (height, width), bicubic as the trainers do it, or "pad": keep the aspect, fill
            the height (the width, where that is reached first) and pad with zeros on the side away from the chest
            wall, and below.
        segment_breast: blank all but the breast and cut the image to it. Raises InputError where there is none.
        levels: see `auto_levels`.
        face: "left" or "right" mirrors breasts that point the other way.
    """
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


def write_output(img: np.ndarray, out: str | Path, path: str, result: Outcome) -> None:
    """Write an image file at `path` below the folder `out`, and note it in `result`."""
    write_img(Path(out, path), img)
    result.outputs.append(path)


def write_whole(img: np.ndarray, out: str | Path, folder: str, whole: Mapping, source: str, result: Outcome) -> None:
    """Write a mammogram (H, W), uint8 or uint16, as whole image of `result`, and note its facts there.

    folder: one of `FOLDERS`. whole: what `whole_options` returned. source: see `ImageRow`.
    """
    img = to_uint16(img)
    small = make_whole(img, **whole)
    write_output(small, out, whole_img_path(result.name, folder), result)
    pixel_sum = int(small.sum(dtype="int64"))
    result.facts |= {"folder": folder, "source": source, "pixel_sum": pixel_sum, "fingerprint": fingerprint(img)}


# ----------------------------------------------------------------------------------------------------- the work


def place_pictures(pictures: Mapping[str, Picture], sets: Mapping[str, Sequence[str]]) -> dict[str, str | None]:
    """Return the folder of each whole image, one of `FOLDERS`; None where its patient is in no set."""
    set_of = sets_of_patients(sets)
    return {
        name: f"{set_of[picture.patient]}/{CLASSES[picture.positive]}" if picture.patient in set_of else None
        for name, picture in pictures.items()
    }


def run_jobs(data_set: DataSet, jobs: Sequence[Job], faults: Sequence[Outcome] = ()) -> list[Outcome]:
    """Prepare all images of a data set; return the `faults` of its listing, and a result a job."""
    args = data_set.args
    if faults and args.on_error == "stop":
        raise InputError(faults[0].faults[0])
    # The workers of a cluster start in folders of their own.
    work = functools.partial(data_set.prepare, download=Path(args.data).resolve(), out=Path(args.out).resolve())
    keep_options(args.out, deciding_options(args), args.fresh)
    how = {name: getattr(args, name) for name in ("jobs", "backend", "on_error", "fresh")}
    return [*faults, *run_resumable(jobs, work, args.data, args.out, data_set.folders, **how)]


def finished(results: Iterable[Outcome]) -> list[Outcome]:
    """Return the results whose image was made, whatever else of theirs was not."""
    return [result for result in results if result.outputs]


def whole_images(results: Iterable[Outcome]) -> list[Outcome]:
    """Return the results that have a whole image, since their patient is in a set."""
    return [result for result in results if "folder" in result.facts]


# --------------------------------------------------------------------------------------------- table of images


class ImageRow(NamedTuple):
    """Hold one row of images.csv.

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


def to_row(result: Outcome, picture: Picture) -> ImageRow:
    """Return the row of a whole image."""
    folder = result.facts["folder"]
    who = picture.patient, picture.side, picture.view
    return ImageRow(whole_img_path(result.name, folder), *folder.split("/"), *who, result.facts["source"])


def write_image_table(path: str | Path, rows: Iterable[ImageRow]) -> None:
    """Write images.csv."""
    write_csv(path, ImageRow._fields, rows)


def read_image_table(path: str | Path) -> "pd.DataFrame":
    """Read the rows of images.csv as a pandas DataFrame of strings: the columns of `ImageRow`, and others if there are.

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


def write_lists(
    out: str | Path, sets: Mapping[str, Sequence[str]], pictures: Mapping[str, Picture], results: Iterable[Outcome]
) -> dict[str, list[str]]:
    """Write pat_train.txt, pat_val.txt, pat_test.txt and images.csv, of the images that were made.

    Warns where the images.csv of an earlier run has images in other sets. Returns the patient lists.
    """
    done = finished(results)
    kept = {pictures[result.name].patient for result in done}
    lists = {name: [patient for patient in patients if patient in kept] for name, patients in sets.items()}
    for name, patients in lists.items():
        write_text(Path(out, f"pat_{name}.txt"), "".join(f"{patient}\n" for patient in patients))
    rows = [to_row(result, pictures[result.name]) for result in whole_images(done)]
    _warn_of_moved(out, rows)
    write_image_table(Path(out, IMAGE_TABLE), rows)
    return lists


def _warn_of_moved(out: str | Path, rows: Iterable[ImageRow]) -> None:
    """Print how many images of the earlier images.csv in `out`, if there is one, are in another set now."""
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
        text = f"warning: {out}: {counted(len(moved), 'image')} now in another set than before (such as {moved[0]})"
        seen = ": models trained on the earlier sets have seen some of today's test images"
        print(text + seen * (names[moved[0]] == "test"), file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- report


def print_exclusions(listing: Listing, reasons: Mapping[str, str]) -> None:
    """Print what is left out and why. reasons: `DataSet.exclusions`."""
    for kind, listed in listing.excluded.items():
        if listed:
            print(f"left out: {counted(len(listed), 'image')} such as {listed[0]}, since {reasons[kind]}")
    if listing.faults:
        print(f"at fault: {counted(len(listing.faults), 'image')}, such as {listing.faults[0].faults[0]}")


def list_near_duplicates(pictures: Mapping[str, Picture], results: Iterable[Outcome]) -> list[dict]:
    """Return pairs of whole images of different patients that look the same: a row of near_duplicates.csv each.

    Columns: file, set, label and patient of both images, as in `ImageRow`, and `difference`, the share of the bits of
    their fingerprints that differ. Pairs across sets come first.
    """
    whole = whole_images(results)
    rows = [to_row(result, pictures[result.name]) for result in whole]
    found = find_near_duplicates([result.facts["fingerprint"] for result in whole], [row.patient for row in rows])
    compared = [operator.attrgetter(*_COMPARED)(row) for row in rows]
    pairs = [(*compared[one], *compared[other], round(difference, 4)) for one, other, difference in found]
    pairs = [dict(zip(_PAIR_COLUMNS, pair, strict=True)) for pair in pairs]
    return sorted(pairs, key=lambda pair: pair["set"] == pair["other_set"])


def training_mean(results: Sequence[Outcome], img_size: tuple[int, int]) -> float | None:
    """Return the mean of the training images after rescaling, None if there are none."""
    whole = whole_images(results)
    sums = [result.facts["pixel_sum"] for result in whole if result.facts["folder"].startswith("train/")]
    return round(RESCALE_FACTOR * sum(sums) / (len(sums) * img_size[0] * img_size[1]), 4) if sums else None


def make_report(
    data_set: DataSet,
    listing: Listing,
    pictures: Mapping[str, Picture],
    sets: Mapping[str, Sequence[str]],
    lists: Mapping[str, Sequence[str]],
    results: Sequence[Outcome],
) -> dict:
    """Return what report.json says of any data set. sets: patients as planned. lists: what `write_lists` returned."""
    done = finished(results)
    repairs = {kind: list(listing.repairs.get(kind, ())) for kind in {*data_set.repairs, *listing.repairs}}
    for kind, what in itertools.chain.from_iterable(result.repairs for result in results):
        repairs.setdefault(kind, []).append(what)
    counts = {"images_prepared": len(done), "images_skipped": len(results) - len(done)}
    counts |= {"patients_in_no_set": count_left_patients(sets, pictures.values())}
    report = {
        "options": deciding_options(data_set.args),
        "rescale_factor": RESCALE_FACTOR,
        "featurewise_mean": training_mean(results, data_set.args.img_size),
        "counts": counts | listing.counts,
        "planned_sets": count_sets(sets, pictures.values()),
        "sets": count_sets(lists, [pictures[result.name] for result in done]),
        "repairs": {kind: {"count": len(listed), "items": listed} for kind, listed in sorted(repairs.items())},
        "near_duplicates": list_near_duplicates(pictures, results),
        "skipped": [{"image": result.name, "reason": fault} for result in results for fault in result.faults],
    }
    report |= listing.report
    if data_set.exclusions:
        report["excluded"] = {
            kind: {"count": len(listed), "why": data_set.exclusions[kind], "items": listed}
            for kind, listed in listing.excluded.items()
        }
    return report


def write_preparation_report(report: dict, args: argparse.Namespace) -> None:
    """Write report.json and near_duplicates.csv, and print them; InputError for faults but with `--on-error skip`."""
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
        found = f"{at_least}{counted(len(pairs), 'pair')} of images of different patients that look the same"
        such = f"{at_least}{across} of them across sets, such as {pairs[0]['file']} and {pairs[0]['other_file']}"
        print(f"Warning: {found}, {such}; figures on the test set may be too good: see {NEAR_DUPLICATES}")
    if skipped:
        print(f"{len(skipped)} left out:", *(fault["reason"] for fault in skipped), sep="\n  ")
    if (mean := report["featurewise_mean"]) is not None:
        print(f"for the trainer: --rescale-factor {RESCALE_FACTOR} --featurewise-mean {mean:.2f}")
    print(f"details: {Path(args.out, REPORT)}")
    if skipped and args.on_error != "skip":
        remedy = "mend them and run this again, or leave them out with --on-error skip"
        first = skipped[0]["reason"]
        raise InputError(f"images or masks at fault: {len(skipped)}, all others done; {remedy}. The first: {first}")
