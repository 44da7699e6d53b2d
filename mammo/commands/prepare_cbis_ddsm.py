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
    near_duplicates.csv    pairs of images of different patients that look the same
    report.json            counts, every repair, every image left out and why, and the --featurewise-mean to use

An image is positive when any of its findings is malignant. An interrupted run goes on where it was. The folders of
images are this script's own: it refuses to go on where files of others lie among them, and deletes none but its own.

    python -m mammo prepare cbis-ddsm CBIS-DDSM prepared --split author --jobs 8
    python -m mammo prepare cbis-ddsm folder_of_the_description_files --dry-run
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from mammo.base.cli import HelpFormatter, complete, run_main
from mammo.base.files import locked
from mammo.base.tables import write_csv
from mammo.base.work import Job, Outcome
from mammo.data.cbis_ddsm import (
    REPAIRS,
    Download,
    Tables,
    find_tables,
    is_positive,
    list_outputs,
    plan_image,
    prepare_image,
    read_tables,
    scan_download,
)
from mammo.data.patches import COLUMNS
from mammo.data.prepare import (
    CLASSES,
    FOLDERS,
    add_preparation_options,
    finish,
    finished,
    make_report,
    output_folders,
    prepare_items,
    split_patients,
    whole_options,
    write_lists,
)
from mammo.data.splits import Image, print_split, sets_of_patients

OUTPUT_FOLDERS = ("full_img", "roi_mask", *FOLDERS)

# ------------------------------------------------------------------------------------------------------ tables


def list_images(tables: Tables) -> dict[str, Image]:
    return {
        key: Image(findings[0].patient, findings[0].side, findings[0].view, is_positive(findings))
        for key, findings in tables.images.items()
    }


def official_test(tables: Tables) -> set[str]:
    """Patients of the data set's own test set, those who are in both of its sets included."""
    findings = (finding for findings in tables.images.values() for finding in findings)
    return {finding.patient for finding in findings if finding.official == "test"}


def print_tables(tables: Tables, args) -> None:
    """Say what the tables hold."""
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


# -------------------------------------------------------------------------------------------------- the whole


def plan_images(tables: Tables, sets: Mapping[str, Sequence[str]], download: Download, whole: dict) -> list[Job]:
    """One item an image. Those of patients in no set become full images and masks alone."""
    set_of = sets_of_patients(sets)
    items = []
    for key, findings in tables.images.items():
        name = set_of.get(findings[0].patient)
        folder = f"{name}/{CLASSES[is_positive(findings)]}" if name else None
        plan = plan_image(findings, download, folder, whole)
        items.append(Job(key, plan.sources, list_outputs(key, plan), plan))
    return items


def write_tables(out, tables: Tables, results: Sequence[Outcome]) -> None:
    """Write roi_mask_path.csv and pat_side_cancer.csv, of what is there."""
    lesions = [
        (*result.name.rsplit("_", 2), number, pathology, kind)
        for result in results
        for kind, number, pathology in result.facts.get("lesions", ())
    ]
    write_csv(Path(out, "roi_mask_path.csv"), COLUMNS, lesions)
    breasts = defaultdict(bool)
    for findings in tables.images.values():
        breasts[findings[0].patient, findings[0].side] |= is_positive(findings)
    seen = {tuple(result.name.rsplit("_", 2)[:2]) for result in finished(results)}
    cancers = [(*breast, int(cancer)) for breast, cancer in sorted(breasts.items()) if breast in seen]
    write_csv(Path(out, "pat_side_cancer.csv"), ["patient_id", "side", "cancer"], cancers)


def prepare_dataset(
    tables: Tables, images: Mapping[str, Image], sets: Mapping[str, Sequence[str]], outputs: Sequence[Path], args
) -> dict:
    """Prepare all images and write the lists; returns the report. outputs: see `output_folders`."""
    download = scan_download(args.download, outputs)
    items = plan_images(tables, sets, download, whole_options(args))
    results = prepare_items(items, prepare_image, args.download, args, OUTPUT_FOLDERS)
    lists = write_lists(args.out, sets, images, results)
    write_tables(args.out, tables, results)

    report = make_report(args, images, sets, lists, results, dict.fromkeys(REPAIRS, ()) | tables.repairs)
    masks = sum(len(result.facts.get("lesions", ())) for result in results)
    found = {path for paths in download.by_series.values() for path in paths}
    report["tables"] = tables.counts["tables"]
    report["counts"] |= tables.counts["all"] | {
        "masks_prepared": masks,
        "masks_skipped": tables.counts["all"]["lesions"] - masks,
        "files_found": len(found),
        "files_of_no_row": len(found.difference(*(item.sources for item in items))),
    }
    return report


def run(**options):
    """Prepare the data set with the command line's options as keyword arguments; see `--help` for them.

    Raises InputError for bad tables or options, and, once all other images are done, for images or masks at fault
    unless `on_error` is "skip".
    """
    parser = make_parser()
    args = complete(parser, options)
    outputs = output_folders(args, OUTPUT_FOLDERS)
    tables = read_tables(find_tables(args.csv_dir or args.download))
    images = list_images(tables)
    sets = split_patients(images.values(), args, parser, {"test": official_test(tables)})
    print_tables(tables, args)
    print_split(sets, images.values(), args)
    if not args.dry_run:
        with locked(args.out):
            finish(prepare_dataset(tables, images, sets, outputs, args), args)


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
