#!/usr/bin/env python3
"""Turn a data set as downloaded, or mammograms of your own, into the folders that the trainers read."""

import argparse
import functools
import inspect
import sys
from collections.abc import Sequence

from mammo.base.cli import HelpFormatter, complete, run_main
from mammo.base.files import InputError, counted, locked
from mammo.data import prepare
from mammo.data.cbis_ddsm import CbisDdsm
from mammo.data.inbreast import Inbreast
from mammo.data.listing import DataSet, name_pictures
from mammo.data.others import Cmmd, Mias, Nyu, VindrMammo
from mammo.data.own import OwnFolders, OwnTable
from mammo.data.splits import named_sets, print_split, split_by_options

DATA_SETS: dict[str, type[DataSet]] = {
    data_set.name: data_set for data_set in (CbisDdsm, Inbreast, OwnTable, OwnFolders, Cmmd, VindrMammo, Mias, Nyu)
}

OUTPUTS = """\
    train|val|test/neg|pos/<patient>_<LEFT|RIGHT>_<CC|MLO>.png     16-bit whole images of --img-size
    images.csv             file, set, label, patient, side, view and source of each
    pat_train.txt pat_val.txt pat_test.txt      patients, none in two of them
    near_duplicates.csv    pairs of images of different patients that look the same
    report.json            counts, every image left out and why, every repair, and the --featurewise-mean to use

An interrupted run goes on where it was. The folders of images are this command's own: it refuses to go on where files
of others lie among them, and deletes none but its own.
"""


def run(name: str, **options) -> None:
    """Prepare the data set of this name, with the command line's options as keyword arguments; see `--help` for them.

    Raises InputError for bad tables or options, and, once all other images are done, for images or masks at fault
    unless `on_error` is "skip".
    """
    parser = make_parser(name)
    data_set = DATA_SETS[name](complete(parser, options))
    args = data_set.args
    if args.out is None and not args.dry_run:
        raise InputError("no output folder given: Expected one after the folder of the data, or --dry-run")
    listing = data_set.read()
    if listing is None:
        return
    pictures, unknown = name_pictures(listing.pictures)
    if unknown:
        text = "each counts as a patient of its own, and images of one patient may come into several sets"
        print(f"Warning: the patient of {counted(len(unknown), 'image')}, such as {unknown[0]}, is not known: {text}")
    if not pictures:
        raise InputError(f"{args.data}: no images of either class: Expected some. What is wrong is said above")
    if args.split == "official" and named_sets(pictures.values()) is None:
        args.split = "random"
    sets = split_by_options(pictures.values(), args, parser)
    print_split(sets, pictures.values(), args)
    if args.dry_run:
        return
    with locked(args.out):
        jobs = data_set.plan(pictures, prepare.place_pictures(pictures, sets))
        results = prepare.run_jobs(data_set, jobs, listing.faults)
        lists = prepare.write_lists(args.out, sets, pictures, results)
        report = prepare.make_report(data_set, listing, pictures, sets, lists, results)
        data_set.complete(report, listing, jobs, results)
        prepare.write_preparation_report(report, args)


def make_parser(name: str, prog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the data set of this name. prog: what errors call the program."""
    kind = DATA_SETS[name]
    description = f"{inspect.getdoc(kind)}\n\nWrites below the output folder\n\n{kind.files}{OUTPUTS}"
    parser = argparse.ArgumentParser(prog, description=description, formatter_class=HelpFormatter)
    parser.add_argument("data", help=kind.data_help)
    parser.add_argument("out", nargs="?", help="folder to write; not needed with --dry-run")
    kind.add_options(parser)
    prepare.add_preparation_options(parser, kind.splits, kind.test_size)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the data set that `argv` begins with, and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    rows = "\n".join(f"  {name:<10} {inspect.getdoc(kind).splitlines()[0]}" for name, kind in DATA_SETS.items())
    usage, description = "%(prog)s DATA_SET DATA [OUT] ...", f"{__doc__}\n\ndata sets:\n{rows}"
    description += "\n\nDATA_SET --help lists its options"
    names = argparse.ArgumentParser(usage=usage, description=description, formatter_class=HelpFormatter)
    names.add_argument("name", metavar="DATA_SET", choices=list(DATA_SETS), help=argparse.SUPPRESS)
    name = names.parse_args(argv[:1]).name
    parser = make_parser(name, f"{names.prog} {name}")
    return run_main(parser, functools.partial(run, name), argv[1:])


if __name__ == "__main__":
    sys.exit(main())
