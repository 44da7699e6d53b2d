#!/usr/bin/env python3
"""Turn a download of INbreast into the image folders that finetuning reads.

Reads the table (INbreast.csv, or .xls with the package xlrd), the DICOM files and, with --roi-masks, the XML
annotations. Writes below the output folder

    train|val|test/neg|pos/<patient>_<LEFT|RIGHT>_<CC|MLO>.png     16-bit whole images of --img-size
    images.csv             file, set, label, patient, side, view and source of each
    pat_train.txt pat_val.txt pat_test.txt      patients, none in two of them
    near_duplicates.csv    pairs of images of different patients that look the same
    report.json            counts, every image left out and why, every repair, and the --featurewise-mean to use

and with --roi-masks, for images of either class,

    full_img/<image>.png                        16-bit mammograms of full size
    roi_mask/<Kind>-INbreast_<image>_<n>.png    8-bit masks of the same size, 255 in the lesion
    roi_masks.csv          number and kind of each mask, names and number of the findings in it

BI-RADS 1 and 2 are negative, 4 to 6 positive, 3 is left out. A patient is known by the name of the DICOM file. Each
annotated region is a mask; the single calcifications of an image are one mask together, with points as discs of radius
3 pixels. An interrupted run goes on where it was. The folders of images are this script's own: it refuses to go on
where files of others lie among them, and deletes none but its own.

    python inbreast/prepare_inbreast.py "INbreast Release 1.0" INbreast --jobs 8
    python inbreast/prepare_inbreast.py "INbreast Release 1.0" --dry-run
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mammo.base.cli import HelpFormatter, complete, run_main
from mammo.base.files import InputError, counted, locked
from mammo.base.tables import write_csv
from mammo.data.inbreast import (
    EXCLUSIONS,
    REPAIRS,
    Classes,
    Selection,
    Table,
    add_class_options,
    count_rows,
    plan_images,
    prepare_image,
    read_classes,
    read_table,
    scan_download,
    select,
)
from mammo.data.prepare import (
    FOLDERS,
    add_preparation_options,
    finish,
    make_report,
    output_folders,
    prepare_items,
    print_exclusions,
    report_exclusions,
    split_patients,
    whole_options,
    write_lists,
)
from mammo.data.splits import print_split

MASK_COLUMNS = ("file", "number", "kind", "names", "findings")

# What the paper's models subtract after finetuning.
PUBLISHED_MEAN = 44.33


def print_table(table: Table, classes: Classes) -> None:
    """Say what the table holds, and what the classes make of it."""
    counts = count_rows(table.rows)
    print(f"{table.path.name}: {counts['rows']} rows")
    for title, values in (("BI-RADS", counts["birads"]), ("views", counts["views"])):
        print(f"  {title}: " + ", ".join(f"{value} {count}" for value, count in values.items()))
    for name, title in (("neg", "negative"), ("pos", "positive"), (None, "in neither class")):
        mine = {birads: count for birads, count in counts["birads"].items() if classes.label(birads) == name}
        print(f"  {title}: {sum(mine.values())} (BI-RADS {', '.join(mine) or 'none'})")


def print_selection(selection: Selection) -> None:
    """Say what is left out and why, and what is not."""
    print_exclusions(selection.excluded, EXCLUSIONS, selection.faults)
    patients = {image.patient for image in selection.images.values()}
    positive = sum(image.positive for image in selection.images.values())
    images = counted(len(selection.images), "image")
    print(f"used: {images} ({positive} positive) of {counted(len(patients), 'patient')}")


def prepare_dataset(table: Table, selection: Selection, sets: Mapping[str, Sequence[str]], args) -> dict:
    """Prepare all images and write the lists; returns the report."""
    folders = [*FOLDERS, *(["full_img", "roi_mask"] if args.roi_masks else [])]
    items = plan_images(selection, sets, args.download, whole_options(args), args.roi_masks)
    results = prepare_items(items, prepare_image, args.download, args, folders, selection.faults)
    lists = write_lists(args.out, sets, selection.images, results)

    repairs = dict.fromkeys(REPAIRS, ()) | selection.repairs
    report = make_report(args, selection.images, sets, lists, results, repairs)
    report["table"] = {"file": table.path.name} | count_rows(table.rows)
    report["excluded"] = report_exclusions(selection.excluded, EXCLUSIONS)
    mask_table = Path(args.out, "roi_masks.csv")
    if not args.roi_masks:
        mask_table.unlink(missing_ok=True)  # an earlier run's, whose masks are gone
    else:
        masks = [mask for result in results for mask in result.facts.get("lesions", ())]
        write_csv(mask_table, MASK_COLUMNS, masks)
        report["counts"] |= {
            "masks_prepared": len(masks),
            "images_without_annotations": sum(item.plan.annotation is None for item in items),
        }
    return report


def run(**options):
    """Prepare the data set with the command line's options as keyword arguments; see `--help` for them.

    Raises InputError for a bad table or options, and, once all other images are done, for images or masks at fault
    unless `on_error` is "skip".
    """
    parser = make_parser()
    args = complete(parser, options)
    outputs = output_folders(args)
    classes = read_classes(args.neg_birads, args.pos_birads)
    download = scan_download(args.download, outputs)
    table = read_table(args.table or download.find_table(args.download))
    print_table(table, classes)
    if not download.dicoms:
        if args.dry_run:
            print("no DICOM files here, whose names tell the patients: no split")
            return
        raise InputError(f"{args.download}: no DICOM files: Expected AllDICOMs there or below")
    selection = select(table, download, classes)
    print_selection(selection)
    if not selection.images:
        raise InputError(f"{args.download}: no images of either class: Expected some. What is wrong is said above")
    sets = split_patients(selection.images.values(), args, parser)
    print_split(sets, selection.images.values(), args)
    if args.dry_run:
        return
    with locked(args.out):
        report = prepare_dataset(table, selection, sets, args)
        if report["featurewise_mean"] is not None:
            print(
                f"pixel mean: {report['featurewise_mean']:.2f}; the paper's, {PUBLISHED_MEAN}, is of other patients "
                f"and another conversion: where they differ much, see --auto-levels, and give the trainer your own"
            )
        finish(report, args)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add(
        "download", help="folder of the download: DICOM files, annotations and, unless --table names another, the table"
    )
    add("out", nargs="?", help="folder to write; not needed with --dry-run")
    add("--table", metavar="FILE", help="INbreast.csv or .xls; default: below the download folder, a CSV first")
    add_class_options(parser)
    group = parser.add_argument_group("annotations")
    group.add_argument("--roi-masks", action="store_true", help="also write lesion masks, and full images with them")
    splits = {
        "random": "--test-size for the test, then --val-size of the others for validation, stratified by whether any "
        "image is positive (the paper's shares)"
    }
    add_preparation_options(parser, splits, test_size=0.3)
    return parser


def main(argv=None):
    return run_main(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
