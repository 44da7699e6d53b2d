"""What the preparation scripts do alike around `dm_dataset.prepare`: splits by option, lists, counts and the report.

A script reads its data set's tables into one `Image` a picture, by the name of its file without ending, and plans an
`Item` for each. The options are those of `dm_args.add_preparation_options`.
"""

import functools
import json
import sys
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dm_dataset import (
    CLASSES,
    IMAGE_TABLE,
    REPORT,
    RESCALE_FACTOR,
    SETS,
    ImageRow,
    Item,
    Prepared,
    check_disjoint,
    keep_options,
    make_whole,
    prepare,
    read_image_table,
    read_patient_list,
    split_by_patient,
    split_in_three,
    to_uint16,
    write_csv,
    write_image_table,
)
from dm_duplicates import MAX_PAIRS, find_near_duplicates, fingerprint
from dm_files import InputError, counted, locked, write_img, write_text

# Options that decide what the outputs are, where a preparation script has them.
DECIDING = (
    *("split", "test_size", "val_size", "random_state"),
    *("img_size", "resize", "segment_breast", "auto_levels", "face"),
    *("format", "voi_lut", "neg_labels", "pos_labels", "neg_birads", "pos_birads", "patient_regex", "roi_masks"),
)


class Image(NamedTuple):
    """What the tables tell of one picture. side: LEFT, RIGHT or "". view: CC, MLO or ""."""

    patient: str
    side: str
    view: str
    positive: bool


NEAR_DUPLICATES = "near_duplicates.csv"
_COMPARED = ("file", "set", "label", "patient")
_PAIR_COLUMNS = (*_COMPARED, *(f"other_{name}" for name in _COMPARED), "difference")
# Where the whole images lie below the output folder.
FOLDERS = tuple(f"{name}/{label}" for name in SETS for label in CLASSES)


def whole_img_path(name: str, folder: str) -> str:
    """Path of a whole image below the output folder. folder: one of `FOLDERS`."""
    return f"{folder}/{name}.png"


def whole_options(args) -> dict:
    """Options of `dm_dataset.make_whole`, in types that JSON can hold."""
    return {
        "img_size": args.img_size,
        "resize": args.resize,
        "segment_breast": args.segment_breast,
        "levels": args.auto_levels,
        "face": args.face,
    }


def write_whole(img, out, folder: str, whole: Mapping, source: str, result: Prepared) -> None:
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
    items: Sequence[Item],
    function: Callable[..., Prepared],
    source,
    args,
    folders: Sequence[str] = FOLDERS,
    faults: Sequence[Prepared] = (),
) -> list[Prepared]:
    """Run `dm_dataset.prepare` with these options. Returns `faults`, found before, and a result an item.

    function: takes the item, and the folders `download` and `out` by name. source: the folder of the data.
    """
    if faults and args.on_error == "stop":
        raise InputError(faults[0].faults[0])
    # The workers of a cluster start in folders of their own.
    work = functools.partial(function, download=Path(source).resolve(), out=Path(args.out).resolve())
    with locked(args.out):
        keep_options(args.out, deciding_options(args), args.fresh)
        done = prepare(items, work, source, args.out, folders, args.jobs, args.backend, args.on_error, args.fresh)
    return [*faults, *done]


def deciding_options(args) -> dict:
    return {name: value for name, value in vars(args).items() if name in DECIDING or name.endswith("_column")}


# ------------------------------------------------------------------------------------------------------ splits


def cancer_patients(images: Iterable[Image]) -> dict[str, bool]:
    """For each patient, whether any image is positive."""
    cancer = defaultdict(bool)
    for image in images:
        cancer[image.patient] |= image.positive
    return dict(cancer)


def _check_drawn(name: str, args, parser: ArgumentParser) -> None:
    """InputError where a share of patients was given for a set that `args.split` does not draw."""
    if getattr(args, f"{name}_size") != parser.get_default(f"{name}_size"):
        raise InputError(
            f"--{name}-size: Expected a --split that draws the {name} set. Received --split {args.split}, by which its "
            f"patients are given"
        )


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


def sets_of_patients(sets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {patient: name for name, patients in sets.items() for patient in patients}


def count_sets(sets: Mapping[str, Sequence[str]], images: Iterable[Image]) -> dict[str, dict[str, int]]:
    """Patients, cancer patients, images and positive images of each set."""
    images, counts = list(images), {}
    for name, patients in sets.items():
        wanted = set(patients)
        mine = [image for image in images if image.patient in wanted]
        counts[name] = {
            "patients": len(patients),
            "cancer_patients": sum(cancer_patients(mine).values()),
            "images": len(mine),
            "positive_images": sum(image.positive for image in mine),
        }
    return counts


def count_left_patients(sets: Mapping[str, Sequence[str]], images: Iterable[Image]) -> int:
    """Patients in no set."""
    return len({image.patient for image in images} - sets_of_patients(sets).keys())


def print_split(sets: Mapping[str, Sequence[str]], images: Iterable[Image], args) -> None:
    images = list(images)
    seed = f", random state {args.random_state}" if args.split != "lists" else ""
    print(f"split {args.split}{seed}:")
    for name, counts in count_sets(sets, images).items():
        print(
            f"  {name:5} {counts['patients']:5} patients ({counts['cancer_patients']} with cancer), "
            f"{counts['images']:5} images ({counts['positive_images']} positive)"
        )
    placed = [patient for patients in sets.values() for patient in patients]
    print(f"no patient is in two sets: {len(placed)} places, {len(set(placed))} patients")
    if left := count_left_patients(sets, images):
        print(f"in no set: {counted(left, 'patient')}")


# ---------------------------------------------------------------------------------------- lists and the report


def print_exclusions(excluded: Mapping[str, Sequence[str]], reasons: Mapping[str, str], faults: Sequence[Prepared]):
    """Say what is left out and why. excluded: what is, by kind. reasons: why, by kind. faults: see `prepare_items`."""
    for kind, listed in excluded.items():
        if listed:
            print(f"left out: {counted(len(listed), 'image')} such as {listed[0]}, since {reasons[kind]}")
    if faults:
        print(f"at fault: {counted(len(faults), 'image')}, such as {faults[0].faults[0]}")


def report_exclusions(excluded: Mapping[str, Sequence[str]], reasons: Mapping[str, str]) -> dict[str, dict]:
    """What report.json says of what is left out."""
    return {kind: {"count": len(listed), "why": reasons[kind], "items": listed} for kind, listed in excluded.items()}


def finished(results: Iterable[Prepared]) -> list[Prepared]:
    """Those whose image was made, whatever else of theirs was not."""
    return [result for result in results if result.outputs]


def write_lists(
    out, sets: Mapping[str, Sequence[str]], images: Mapping[str, Image], results: Iterable[Prepared]
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


def whole_images(results: Iterable[Prepared]) -> list[Prepared]:
    """Those with a whole image, since their patient is in a set."""
    return [result for result in results if "folder" in result.facts]


def to_row(result: Prepared, image: Image) -> ImageRow:
    folder = result.facts["folder"]
    name, label = folder.split("/")
    file = whole_img_path(result.name, folder)
    return ImageRow(file, name, label, image.patient, image.side, image.view, result.facts["source"])


def list_near_duplicates(images: Mapping[str, Image], results: Iterable[Prepared]) -> list[dict]:
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


def pixel_mean(results: Sequence[Prepared], img_size: tuple[int, int]) -> float | None:
    """Mean of the training images after rescaling, None if there are none."""
    whole = whole_images(results)
    sums = [result.facts["pixel_sum"] for result in whole if result.facts["folder"].startswith("train/")]
    return round(RESCALE_FACTOR * sum(sums) / (len(sums) * img_size[0] * img_size[1]), 4) if sums else None


def make_report(
    args,
    images: Mapping[str, Image],
    sets: Mapping[str, Sequence[str]],
    lists: Mapping[str, Sequence[str]],
    results: Sequence[Prepared],
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
