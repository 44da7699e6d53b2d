#!/usr/bin/env python3
"""Turn mammograms of your own, or a public data set, into the image folders that the whole-image trainer reads.

    --format csv       a table (CSV or Excel) with a row an image: file and label, and perhaps patient, side, view, set
    --format folders   images in folders neg and pos, which may lie in train, val and test
    --format cmmd      CMMD: CMMD_clinicaldata_revision.csv or .xlsx, and DICOM files
    --format vindr     VinDr-Mammo: breast-level_annotations.csv, and images/<study>/<image>.dicom
    --format mias      MIAS: Info.txt, and mdb001.pgm ...
    --format nyu       exam list of the NYU metarepository (.pkl, by --table), and <image>.png

Images are PNG, JPEG, TIFF, BMP or DICOM. Writes below the output folder

    train|val|test/neg|pos/<patient>_<LEFT|RIGHT>_<CC|MLO>.png     16-bit whole images of --img-size
    images.csv             file, set, label, patient, side, view and source of each
    pat_train.txt pat_val.txt pat_test.txt      patients, none in two of them
    near_duplicates.csv    pairs of images of different patients that look the same
    report.json            counts, every image left out and why, every repair, and the --featurewise-mean to use

Patients whose images the data put into two sets are refused. An interrupted run goes on where it was. The folders of
images are this script's own: it refuses to go on where files of others lie among them, and deletes none but its own.

    python -m mammo prepare scans prepared --format csv --table labels.csv
    python -m mammo prepare scans prepared --format folders --patient-regex '^([^_]+)_'
    python -m mammo prepare vindr-mammo prepared --format vindr --jobs 8
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mammo.base.cli import HelpFormatter, complete, run_main
from mammo.base.files import InputError, counted, locked
from mammo.data.inbreast import add_class_options, read_classes
from mammo.data.others import (
    COLUMNS,
    EXCLUSIONS,
    REPAIRS,
    Picture,
    Reading,
    describe_dataset,
    name_pictures,
    named_sets,
    plan_pictures,
    prepare_picture,
    read_cmmd,
    read_folders,
    read_labels,
    read_mias,
    read_nyu,
    read_table,
    read_vindr,
    stored_bits,
)
from mammo.data.prepare import (
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

COLUMN_OPTIONS = {f"{name}_column": name for name in COLUMNS}

# Which formats have which options; the others are for all.
OPTIONS_OF = {
    "table": ("csv", "cmmd", "vindr", "mias", "nyu"),
    "patient_regex": ("csv", "folders"),
    **dict.fromkeys(COLUMN_OPTIONS, ("csv",)),
    **dict.fromkeys(("neg_labels", "pos_labels"), ("csv", "folders")),
    **dict.fromkeys(("neg_birads", "pos_birads"), ("vindr",)),
}


def read_data(args, skip: Sequence[Path]) -> Reading:
    """What `args.format` makes of the data folder, but for the folders `skip`."""
    if args.format in ("csv", "nyu") and args.table is None:
        raise InputError(
            f"--format {args.format}: Expected the {'table' if args.format == 'csv' else 'list'} as --table"
        )
    if args.format == "csv":
        columns = {name: getattr(args, option) for option, name in COLUMN_OPTIONS.items() if getattr(args, option)}
        labels = read_labels(args.neg_labels, args.pos_labels)
        return read_table(args.data, args.table, labels, columns, args.patient_regex)
    if args.format == "folders":
        return read_folders(args.data, read_labels(args.neg_labels, args.pos_labels), args.patient_regex, skip)
    if args.format == "cmmd":
        return read_cmmd(args.data, args.table, args.jobs, skip)
    if args.format == "vindr":
        return read_vindr(args.data, read_classes(args.neg_birads, args.pos_birads), args.table)
    if args.format == "mias":
        return read_mias(args.data, args.table, skip)
    return read_nyu(args.data, args.table)


def print_reading(reading: Reading, unknown: Sequence[str]) -> None:
    """Say what there is, what is left out and why, and of how many images the patient is not known."""
    positive = sum(picture.positive for picture in reading.pictures)
    print(f"found: {counted(len(reading.pictures), 'image')} ({positive} positive)")
    print_exclusions(reading.excluded, EXCLUSIONS, reading.faults)
    for kind, listed in reading.repairs.items():
        if listed:
            print(f"{kind.replace('_', ' ')}: {len(listed)}, such as {listed[0]}")
    if unknown:
        print(
            f"Warning: the patient of {counted(len(unknown), 'image')}, such as {unknown[0]}, is not known: each "
            f"counts as a patient of its own, and images of one patient may come into several sets"
        )


def prepare_dataset(reading: Reading, pictures: Mapping[str, Picture], sets: Mapping[str, Sequence[str]], args) -> dict:
    """Prepare all images and write the lists; returns the report."""
    items = plan_pictures(pictures, args.data, sets, whole_options(args), args.voi_lut)
    results = prepare_items(items, prepare_picture, args.data, args, faults=reading.faults)
    images = describe_dataset(pictures)
    lists = write_lists(args.out, sets, images, results)
    repairs = dict.fromkeys(REPAIRS, ()) | reading.repairs
    report = make_report(args, images, sets, lists, results, repairs)
    report["excluded"] = report_exclusions(reading.excluded, EXCLUSIONS)
    report["stored_bits"] = stored_bits(results)
    return report


def run(**options):
    """Prepare the data set with the command line's options as keyword arguments; see `--help` for them.

    Raises InputError for a bad table or options, and, once all other images are done, for images at fault unless
    `on_error` is "skip".
    """
    parser = make_parser()
    args = complete(parser, options)
    for name, formats in OPTIONS_OF.items():
        if args.format not in formats and getattr(args, name) != parser.get_default(name):
            raise InputError(
                f"--{name.replace('_', '-')}: Expected --format {' or '.join(formats)}. Received {args.format}"
            )
    reading = read_data(args, output_folders(args))
    pictures, unknown = name_pictures(reading.pictures)
    print_reading(reading, unknown)
    if args.format == "nyu":
        print(
            f"Warning: {args.table} names no patients: each exam counts as one, and images of a patient with several "
            f"exams may come into several sets"
        )
    if not pictures:
        raise InputError(f"{args.data}: no images of either class. Expected both, by --format {args.format}")
    images, official = describe_dataset(pictures).values(), named_sets(pictures.values())
    if args.split == "official" and official is None:
        args.split = "random"
    sets = split_patients(images, args, parser, official)
    print_split(sets, images, args)
    if args.dry_run:
        return
    with locked(args.out):
        report = prepare_dataset(reading, pictures, sets, args)
        bits = report["stored_bits"]
        if bits is not None and bits < 15 and not args.auto_levels:
            print(
                f"Warning: the pixels of all 16-bit files use {bits} bits, so that the images are dark: after the "
                f"rescale factor they reach {255 * 2**bits / 2**16:.0f} of 255; --auto-levels stretches them"
            )
        finish(report, args)


def pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"Expected a regular expression ({error}). Received {text!r}") from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("data", help="folder of the images; names in tables start from it")
    add("out", nargs="?", help="folder to write; not needed with --dry-run")
    add("--format", required=True, choices=["csv", "folders", "cmmd", "vindr", "mias", "nyu"], help="see above")
    add("--table", metavar="FILE", help="table or exam list; default: that of the data set, below the data folder")
    add(
        "--voi-lut",
        action="store_true",
        help="apply the display window or lookup table of each DICOM file that has one",
    )
    group = parser.add_argument_group("format csv: names of columns; default: the usual spellings")
    for option, name in COLUMN_OPTIONS.items():
        group.add_argument(f"--{option.replace('_', '-')}", metavar="NAME", help=f"column of the {name}")
    group = parser.add_argument_group("formats csv and folders")
    add = group.add_argument
    add(
        "--neg-labels",
        nargs="+",
        metavar="LABEL",
        help="values or folders that mean negative (0 neg benign normal ...)",
    )
    add("--pos-labels", nargs="+", metavar="LABEL", help="that mean positive (1 pos malignant cancer ...); "
        "where either is given, images of other labels are left out")  # fmt: skip
    add("--patient-regex", type=pattern, metavar="REGEX", help="finds the patient in a file's name, below the class "
        "folder if there is one: the first group, or all; default: by the form of names above, then by the sub-folder "
        "of the class folder")  # fmt: skip
    add_class_options(parser, "format vindr: classes")
    splits = {
        "official": "the sets that the data name, --val-size of the training patients being for validation where they "
        "name none; where they name no sets, as random",
        "random": "--test-size for the test, then --val-size of the others for validation, stratified by whether any "
        "image is positive",
    }
    add_preparation_options(parser, splits, test_size=0.15)
    return parser


def main(argv=None):
    return run_main(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
