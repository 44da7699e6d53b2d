#!/usr/bin/env python3
"""Cut the training and validation patches of one type of lesion, mass or calcification, out of mammograms.

As `sample_patches_combined.py`, with three classes, and images that carry the type in their file names:
`<Calc|Mass>-Training_<patient_id>_<side>_<view>.png`. Lesions of the other type are not used.
"""

import argparse
import sys

from ddsm_train.sample_patches_combined import add_sampling_options
from mammo.base.cli import HelpFormatter, command, complete
from mammo.data.patches import sample_dataset


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_sampling_options(parser)
    parser.add_argument("--itype", choices=["Calc", "Mass"], default="Mass", help="type of lesion")
    parser.add_argument("--pos-dir", default="malignant", help="class folder of malignant lesions")
    parser.add_argument("--neg-dir", default="benign", help="class folder of benign lesions")
    return parser


def run(*paths, **options) -> None:
    """Sample patches by the command line's arguments, in its order or by name; InputError as of `sample_dataset`."""
    args = complete(make_parser(), options, paths)
    lesion_type = args.itype.lower()
    class_dirs = {(lesion_type, True): args.pos_dir, (lesion_type, False): args.neg_dir}
    sample_dataset(args, class_dirs, prefix=f"{args.itype}-Training_")


main = command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
