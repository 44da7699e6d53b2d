#!/usr/bin/env python3
"""Turn a download of CBIS-DDSM into what the patch sampler and the whole-image trainer read.

Reads the DICOM files of the archive, in any of its folder layouts, or the JPEG files of the re-release, and the four
description files. Writes below the output folder

    full_img/<patient>_<side>_<view>.png                                    16-bit mammograms, as they are
    roi_mask/<Calc|Mass>-Training_<patient>_<side>_<view>_<number>.png      8-bit masks, 255 in the lesion
    roi_mask_path.csv      the lesions (the sampler's names: also test patients have "Training" in them)
    pat_train.txt pat_val.txt pat_test.txt      patients, none in two of them
    pat_side_cancer.csv    1 where a breast has a malignant finding
    train|val|test/neg|pos/<patient>_<side>_<view>.png      16-bit whole images of --img-size
    images.csv             file, set, label, patient, side, view and source of the whole images
    report.json            counts, every repair, every image left out and why, and the --featurewise-mean to use

An image is positive when any of its findings is malignant. An interrupted run goes on where it was. The folders of
images are this script's own: it refuses to go on where files of others lie among them, and deletes none but its own.

    python scripts/prepare_cbis_ddsm.py CBIS-DDSM prepared --split author --jobs 8
    python scripts/prepare_cbis_ddsm.py folder_of_the_description_files --dry-run
"""

import argparse
import functools
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any folder
from dm_args import HelpFormatter, add_preparation_options, complete, run_main
from dm_cbis_ddsm import (
    REPAIRS,
    Download,
    Finding,
    Tables,
    find_tables,
    is_positive,
    list_outputs,
    plan_image,
    prepare_image,
    read_tables,
    scan_download,
    whole_img_path,
)
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
    prepare,
    read_patient_list,
    split_by_patient,
    split_in_three,
    write_csv,
    write_image_table,
)
from dm_files import InputError, write_text
from dm_patches import COLUMNS

# Options that decide what the outputs are.
OPTIONS = (
    "split",
    "test_size",
    "val_size",
    "random_state",
    "img_size",
    "resize",
    "segment_breast",
    "auto_levels",
    "face",
)


# ------------------------------------------------------------------------------------------------------ splits


def split_patients(tables: Tables, args) -> dict[str, list[str]]:
    """Patients of train, val and test by `args.split`; see `--help`. InputError when one is in two of them."""
    cancer = tables.cancer()
    if args.split == "author":
        sets = split_in_three(cancer, args.test_size, args.val_size, args.random_state)
    elif args.split == "official":
        test = {
            finding.patient for findings in tables.images.values() for finding in findings if finding.official == "test"
        }
        rest = {patient: label for patient, label in cancer.items() if patient not in test}
        if not rest:
            raise InputError("--split official: no training patients: Expected the description files of both sets")
        train, val = split_by_patient(rest, args.val_size, args.random_state)
        sets = {"train": train, "val": val, "test": sorted(test)}
    else:
        files = dict(zip(SETS, (args.pat_train, args.pat_val, args.pat_test), strict=True))
        if missing := [f"--pat-{name}" for name, path in files.items() if path is None]:
            raise InputError(f"--split lists: Expected a file for each set. Missing {', '.join(missing)}")
        sets = {name: sorted(read_patient_list(path)) for name, path in files.items()}
        for name, path in files.items():
            if unknown := [patient for patient in sets[name] if patient not in cancer]:
                raise InputError(
                    f"{path}: {len(unknown)} patients have no findings in the tables, such as {unknown[0]}"
                )
    check_disjoint(sets)
    return sets


def count_sets(sets: Mapping[str, Sequence[str]], images: Mapping[str, Sequence[Finding]]) -> dict[str, dict]:
    """Patients, images and positive images of each set."""
    counts = {}
    for name, patients in sets.items():
        wanted = set(patients)
        mine = [findings for findings in images.values() if findings[0].patient in wanted]
        positive = [findings for findings in mine if is_positive(findings)]
        counts[name] = {
            "patients": len(patients),
            "cancer_patients": len({findings[0].patient for findings in positive}),
            "images": len(mine),
            "positive_images": len(positive),
        }
    return counts


def print_tables(tables: Tables, sets: Mapping[str, Sequence[str]], args) -> None:
    """Say what the tables hold and what the split makes of it."""
    for name, counts in tables.counts["tables"].items():
        print(f"{name}: {counts['rows']} rows, {counts['images']} images, {counts['patients']} patients")
    counts, repairs = tables.counts["all"], {kind: len(items) for kind, items in tables.repairs.items()}
    print(
        f"together: {counts['rows']} rows, {counts['lesions']} lesions, {counts['image_folders']} image folders, "
        f"{counts['images']} images ({counts['positive_images']} positive), {counts['patients']} patients"
    )
    print(
        f"in both official sets: {repairs['patients_in_both_official_sets']} patients, "
        f"{repairs['images_in_both_official_sets']} images"
        + ("; they are for the test only" if args.split == "official" else "")
    )
    print(
        f"in the calc and the mass table: {repairs['images_in_calc_and_mass']} images "
        f"({repairs['images_in_calc_and_mass_of_one_set']} within one official set); each is taken once"
    )
    print(f"both malignant and other findings: {repairs['mixed_pathologies']} images, which are positive")
    seed = f", random state {args.random_state}" if args.split != "lists" else ""
    print(f"split {args.split}{seed}:")
    for name, counts in count_sets(sets, tables.images).items():
        print(
            f"  {name:5} {counts['patients']:5} patients ({counts['cancer_patients']} with cancer), "
            f"{counts['images']:5} images ({counts['positive_images']} positive)"
        )
    placed = [patient for patients in sets.values() for patient in patients]
    print(f"no patient is in two sets: {len(placed)} places, {len(set(placed))} patients")
    if left := patients_left(tables, sets):
        print(f"in no set: {left} patients")


def patients_left(tables: Tables, sets: Mapping[str, Sequence[str]]) -> int:
    return len(tables.cancer().keys() - {patient for patients in sets.values() for patient in patients})


# -------------------------------------------------------------------------------------------------- the whole


def plan_images(tables: Tables, sets: Mapping[str, Sequence[str]], download: Download, whole: dict) -> list[Item]:
    """One item an image. Those of patients in no set become full images and masks alone."""
    set_of = {patient: name for name, patients in sets.items() for patient in patients}
    items = []
    for key, findings in tables.images.items():
        name = set_of.get(findings[0].patient)
        folder = f"{name}/{CLASSES[is_positive(findings)]}" if name else None
        plan = plan_image(findings, download, folder, whole)
        items.append(Item(key, plan.sources, list_outputs(key, plan), plan))
    return items


def write_lists(out, tables: Tables, lists: Mapping[str, Sequence[str]], results: Sequence[Prepared]) -> None:
    """Write images.csv, the patient lists, roi_mask_path.csv and pat_side_cancer.csv, of what is there."""
    whole = [result for result in results if "folder" in result.facts]
    write_image_table(Path(out, IMAGE_TABLE), map(to_image_row, whole))
    for name, patients in lists.items():
        write_text(Path(out, f"pat_{name}.txt"), "".join(f"{patient}\n" for patient in patients))
    lesions = [
        (*result.name.rsplit("_", 2), number, pathology, kind)
        for result in results
        for kind, number, pathology in result.facts.get("lesions", ())
    ]
    write_csv(Path(out, "roi_mask_path.csv"), COLUMNS, lesions)
    breasts = defaultdict(bool)
    for findings in tables.images.values():
        breasts[findings[0].patient, findings[0].side] |= is_positive(findings)
    seen = {tuple(result.name.rsplit("_", 2)[:2]) for result in results if "lesions" in result.facts}
    cancers = [(*breast, int(cancer)) for breast, cancer in sorted(breasts.items()) if breast in seen]
    write_csv(Path(out, "pat_side_cancer.csv"), ["patient_id", "side", "cancer"], cancers)


def to_image_row(result: Prepared) -> ImageRow:
    folder = result.facts["folder"]
    path = whole_img_path(result.name, folder)
    return ImageRow(path, *folder.split("/"), *result.name.rsplit("_", 2), result.facts["source"])


def pixel_mean(results: Sequence[Prepared], img_size: tuple[int, int]) -> float | None:
    """Mean of the training images after rescaling, None if there are none."""
    sums = [result.facts["pixel_sum"] for result in results if result.facts.get("folder", "").startswith("train/")]
    return round(RESCALE_FACTOR * sum(sums) / (len(sums) * img_size[0] * img_size[1]), 4) if sums else None


def prepare_dataset(tables: Tables, sets: Mapping[str, Sequence[str]], args) -> dict:
    """Prepare all images and write the lists; returns the report."""
    folders = ["full_img", "roi_mask", *(f"{name}/{label}" for name in SETS for label in CLASSES)]
    download = scan_download(args.download, skip=[args.out, *(Path(args.out, folder) for folder in folders)])
    whole = {
        "img_size": args.img_size,
        "resize": args.resize,
        "segment_breast": args.segment_breast,
        "levels": args.auto_levels,
        "face": args.face,
    }
    items = plan_images(tables, sets, download, whole)
    # The workers of a cluster start in folders of their own.
    folders_at = {"download": Path(args.download).resolve(), "out": Path(args.out).resolve()}
    work = functools.partial(prepare_image, **folders_at)
    results = prepare(items, work, args.download, args.out, folders, args.jobs, args.backend, args.on_error)

    done = {result.name: tables.images[result.name] for result in results if "lesions" in result.facts}
    kept = {findings[0].patient for findings in done.values()}
    lists = {name: [patient for patient in patients if patient in kept] for name, patients in sets.items()}
    write_lists(args.out, tables, lists, results)

    masks = sum(len(result.facts.get("lesions", ())) for result in results)
    found = {path for paths in download.by_series.values() for path in paths}
    repairs = {kind: [] for kind in REPAIRS} | {kind: list(listed) for kind, listed in tables.repairs.items()}
    for result in results:
        for kind, what in result.repairs:
            repairs[kind].append(what)
    counts = {
        "images_prepared": len(done),
        "images_skipped": len(results) - len(done),
        "masks_prepared": masks,
        "masks_skipped": tables.counts["all"]["lesions"] - masks,
        "patients_in_no_set": patients_left(tables, sets),
        "files_found": len(found),
        "files_of_no_row": len(found.difference(*(item.sources for item in items))),
    }
    return {
        "options": {name: getattr(args, name) for name in OPTIONS},
        "rescale_factor": RESCALE_FACTOR,
        "featurewise_mean": pixel_mean(results, args.img_size),
        "tables": tables.counts["tables"],
        "counts": tables.counts["all"] | counts,
        "planned_sets": count_sets(sets, tables.images),
        "sets": count_sets(lists, done),
        "repairs": {kind: {"count": len(listed), "items": listed} for kind, listed in sorted(repairs.items())},
        "skipped": [{"image": result.name, "reason": fault} for result in results for fault in result.faults],
    }


def run(**options):
    """Prepare the data set with the command line's options as keyword arguments; see `--help` for them.

    Raises InputError for bad tables or options, and, once all other images are done, for images or masks at fault
    unless `on_error` is "skip".
    """
    args = complete(make_parser(), options)
    if args.out is None and not args.dry_run:
        raise InputError("no output folder given: Expected one after the download folder, or --dry-run")
    tables = read_tables(find_tables(args.csv_dir or args.download))
    sets = split_patients(tables, args)
    print_tables(tables, sets, args)
    if args.dry_run:
        return
    report = prepare_dataset(tables, sets, args)
    write_text(Path(args.out, REPORT), json.dumps(report, indent=2) + "\n")
    print_report(report, args)
    if report["skipped"] and args.on_error != "skip":
        raise InputError(
            f"{len(report['skipped'])} images or masks at fault, all others done; mend them and run this again, or "
            f"leave them out with --on-error skip. The first: {report['skipped'][0]['reason']}"
        )


def print_report(report: dict, args) -> None:
    counts = report["counts"]
    print(f"prepared {counts['images_prepared']} images and {counts['masks_prepared']} masks")
    for name, numbers in report["sets"].items():
        images, positive = numbers["images"], numbers["positive_images"]
        print(f"  {name:5} {numbers['patients']} patients, {images} images ({positive} positive)")
        if not images:
            print(f"Warning: {name} has no images")
        elif positive in (0, images):
            print(f"Warning: {name} has images of one class only: no AUC can be computed on it")
    for kind, repairs in report["repairs"].items():
        if repairs["count"]:
            print(f"  {kind}: {repairs['count']}")
    for text in report["repairs"]["mask_resized"]["items"]:
        print(f"Warning: mask resized: {text}")
    if report["skipped"]:
        print(f"{len(report['skipped'])} left out:")
        for skipped in report["skipped"]:
            print(f"  {skipped['reason']}")
    if (mean := report["featurewise_mean"]) is not None:
        print(f"for the trainer: --rescale-factor {RESCALE_FACTOR} --featurewise-mean {mean:.2f}")
    print(f"details: {Path(args.out, 'report.json')}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("download", help="folder of the download: the images and, unless --csv-dir names another, description files")
    add("out", nargs="?", help="folder to write; not needed with --dry-run")
    add("--csv-dir", metavar="DIR", help="folder of the four description files; default: below the download folder")
    splits = {
        "author": "--test-size for the test, then --val-size of the others for validation, stratified by any "
        "malignancy (the paper's)",
        "official": "the data set's own test patients, with those who are in both of its sets, then --val-size of the "
        "others",
    }
    add_preparation_options(parser, splits, test_size=0.15)
    return parser


def main(argv=None):
    return run_main(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
