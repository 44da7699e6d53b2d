"""What the preparation scripts do alike around `dm_dataset.prepare`: splits by option, lists, counts and the report.

A script reads its data set's tables into one `Image` a picture, by the name of its file without ending, and plans an
`Item` for each. The options are those of `dm_args.add_preparation_options`.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dm_dataset import (
    CLASSES,
    IMAGE_TABLE,
    REPORT,
    RESCALE_FACTOR,
    SETS,
    ImageRow,
    Prepared,
    check_disjoint,
    read_patient_list,
    split_by_patient,
    split_in_three,
    write_image_table,
)
from dm_files import InputError, write_text

# Options of all preparation scripts that decide what the outputs are.
OPTIONS = (
    *("split", "test_size", "val_size", "random_state"),
    *("img_size", "resize", "segment_breast", "auto_levels", "face"),
)


class Image(NamedTuple):
    """What the tables tell of one picture. side: LEFT, RIGHT or "". view: CC, MLO or ""."""

    patient: str
    side: str
    view: str
    positive: bool


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


# ------------------------------------------------------------------------------------------------------ splits


def cancer_patients(images: Iterable[Image]) -> dict[str, bool]:
    """For each patient, whether any image is positive."""
    cancer = defaultdict(bool)
    for image in images:
        cancer[image.patient] |= image.positive
    return dict(cancer)


def split_patients(images: Iterable[Image], args, official_test: Iterable[str] = ()) -> dict[str, list[str]]:
    """Patients of train, val and test by `args.split`: "lists", "official", or any other name for a random one.

    official_test: patients of the data set's own test set. InputError when a patient is in two sets.
    """
    cancer = cancer_patients(images)
    if args.split == "lists":
        files = dict(zip(SETS, (args.pat_train, args.pat_val, args.pat_test), strict=True))
        if missing := [f"--pat-{name}" for name, path in files.items() if path is None]:
            raise InputError(f"--split lists: Expected a file for each set. Missing {', '.join(missing)}")
        sets = {name: sorted(read_patient_list(path)) for name, path in files.items()}
        for name, path in files.items():
            if unknown := [patient for patient in sets[name] if patient not in cancer]:
                raise InputError(f"{path}: {len(unknown)} patients are not in the tables, such as {unknown[0]}")
    elif args.split == "official":
        test = set(official_test)
        rest = {patient: label for patient, label in cancer.items() if patient not in test}
        if not rest:
            raise InputError("--split official: no training patients: Expected the tables of both sets")
        train, val = split_by_patient(rest, args.val_size, args.random_state)
        sets = {"train": train, "val": val, "test": sorted(test)}
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
        print(f"in no set: {left} patients")


# ---------------------------------------------------------------------------------------- lists and the report


def finished(results: Iterable[Prepared]) -> list[Prepared]:
    """Those whose image was made, whatever else of theirs was not."""
    return [result for result in results if result.outputs]


def write_lists(
    out, sets: Mapping[str, Sequence[str]], images: Mapping[str, Image], results: Iterable[Prepared]
) -> dict[str, list[str]]:
    """Write pat_train.txt, pat_val.txt, pat_test.txt and images.csv, of the images that were made.

    The facts of a result hold, where its patient is in a set, the whole image's `folder`, such as train/pos, and
    `source`: see `ImageRow`. Returns the patient lists.
    """
    done = finished(results)
    kept = {images[result.name].patient for result in done}
    lists = {name: [patient for patient in patients if patient in kept] for name, patients in sets.items()}
    for name, patients in lists.items():
        write_text(Path(out, f"pat_{name}.txt"), "".join(f"{patient}\n" for patient in patients))
    rows = []
    for result in done:
        if folder := result.facts.get("folder"):
            image, file = images[result.name], whole_img_path(result.name, folder)
            rows.append(
                ImageRow(file, *folder.split("/"), image.patient, image.side, image.view, result.facts["source"])
            )
    write_image_table(Path(out, IMAGE_TABLE), rows)
    return lists


def pixel_mean(results: Sequence[Prepared], img_size: tuple[int, int]) -> float | None:
    """Mean of the training images after rescaling, None if there are none.

    Their facts hold `folder` and, of the whole image, `pixel_sum`.
    """
    sums = [result.facts["pixel_sum"] for result in results if result.facts.get("folder", "").startswith("train/")]
    return round(RESCALE_FACTOR * sum(sums) / (len(sums) * img_size[0] * img_size[1]), 4) if sums else None


def make_report(
    args,
    images: Mapping[str, Image],
    sets: Mapping[str, Sequence[str]],
    lists: Mapping[str, Sequence[str]],
    results: Sequence[Prepared],
    repairs: Mapping[str, Sequence[str]],
    options: Iterable[str] = (),
) -> dict:
    """What report.json says of any data set; the caller adds what is its own, to `counts` and beside them.

    sets: as planned. lists: what `write_lists` returned. repairs: kinds of repairs to be named even where
    there are none, with those found in the tables. options: names of the script's own that decide on the outputs.
    """
    done = finished(results)
    repairs = {kind: list(listed) for kind, listed in repairs.items()}
    for result in results:
        for kind, what in result.repairs:
            repairs.setdefault(kind, []).append(what)
    return {
        "options": {name: getattr(args, name) for name in (*OPTIONS, *options)},
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
        "skipped": [{"image": result.name, "reason": fault} for result in results for fault in result.faults],
    }


def finish(report: dict, args) -> None:
    """Write report.json and print what matters of it; InputError for faults, unless `args.on_error` is "skip"."""
    write_text(Path(args.out, REPORT), json.dumps(report, indent=2) + "\n")
    counts, repairs, skipped = report["counts"], report["repairs"], report["skipped"]
    masks = f" and {counts['masks_prepared']} masks" if "masks_prepared" in counts else ""
    print(f"prepared {counts['images_prepared']} images{masks}")
    for name, numbers in report["sets"].items():
        images, positive = numbers["images"], numbers["positive_images"]
        print(f"  {name:5} {numbers['patients']} patients, {images} images ({positive} positive)")
        if not images:
            print(f"Warning: {name} has no images")
        elif positive in (0, images):
            print(f"Warning: {name} has images of one class only: no AUC can be computed on it")
    for kind, listed in repairs.items():
        if listed["count"]:
            print(f"  {kind}: {listed['count']}")
    for text in repairs.get("mask_resized", {}).get("items", ()):
        print(f"Warning: mask resized: {text}")
    if skipped:
        print(f"{len(skipped)} left out:", *(fault["reason"] for fault in skipped), sep="\n  ")
    if (mean := report["featurewise_mean"]) is not None:
        print(f"for the trainer: --rescale-factor {RESCALE_FACTOR} --featurewise-mean {mean:.2f}")
    print(f"details: {Path(args.out, REPORT)}")
    if skipped and args.on_error != "skip":
        raise InputError(
            f"{len(skipped)} images or masks at fault, all others done; mend them and run this again, or "
            f"leave them out with --on-error skip. The first: {skipped[0]['reason']}"
        )
