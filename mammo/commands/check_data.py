"""Read all images of a data set and list those that cannot be used, by cause; exit status 1 if there are any.

  mammo check-data data/train data/val data/test

The trainers do the same before they start (--check-data). Every image has a row in the table, with its size, its pixel
type and what is wrong with it; images that it has already are not read again, as long as they have not changed.
"""

import argparse
from collections import Counter
from pathlib import Path

from mammo.base import cli
from mammo.base.files import counted
from mammo.images.check import check_images, report_faults, warn_of_types
from mammo.images.reading import find_images


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="image, or folder searched for them")
    parser.add_argument("--table", metavar="FILE", default="data_check.csv", help="CSV to write, and to go on with")
    cli.add_flag(parser, "--allow-constant", False, "accept images whose pixels are all equal, as patches may be")
    text = "images read at the same time; default: the environment variable NUM_CPU_CORES, or 4"
    parser.add_argument("--jobs", type=cli.positive_int, help=text)
    return parser


def run(**options) -> None:
    """Write the table and print the faults; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    sources = [args.sources] if isinstance(args.sources, (str, Path)) else args.sources
    checks = check_images(find_images(sources), args.table, args.allow_constant, args.jobs)
    good = [check for check in checks if not check.cause]
    types, sizes = [check.type for check in good], [f"{check.rows} x {check.columns}" for check in good]
    for name, counts in (("pixel types", Counter(types)), ("sizes", Counter(sizes))):
        more = f" and {len(counts) - 5} others" if len(counts) > 5 else ""
        print(f"{name}: " + ", ".join(f"{value} ({count})" for value, count in counts.most_common(5)) + more)
    verdict = ": all of them can be used" if len(good) == len(checks) else ""
    print(f"{counted(len(checks), 'image')} listed in {args.table}{verdict}")
    warn_of_types(checks)
    report_faults(checks, args.table)


main = cli.command(make_parser, run)
