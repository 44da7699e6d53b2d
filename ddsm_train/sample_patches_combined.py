#!/usr/bin/env python3
"""Cut the training and validation patches of five classes out of mammograms with outlined lesions.

Reads a table of lesions, a list of patients, whole images and lesion masks; writes one folder of 16-bit PNG
patches a class, `pat_lst.txt` (the patients of the set) and `patches.csv` (where each patch was cut) into the
training and into the validation folder. A run that was killed and is started again ends with the same files.
The rules of sampling are in `mammo.data.patch_rules`.
"""

import argparse
import sys

from mammo.base import cli
from mammo.data.patches import LESION_COLUMNS, sample_dataset
from mammo.data.prepare import add_work_options


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of both patch samplers."""
    add = parser.add_argument
    add("roi_mask_path_file", help=f"CSV table of lesions with the columns {','.join(LESION_COLUMNS)}")
    add("roi_mask_dir", help="folder of masks: <Calc|Mass>-Training_<image>_<abn_num>.png")
    text = "text file of the patients to use, one id a line; a header line patient_id may come first"
    add("pat_train_list_file", help=text)
    add("full_img_dir", help="folder of whole images: <patient_id>_<side>_<view>.png")
    add("train_out_dir", help="folder for the training patches")
    add("val_out_dir", help="folder for the validation patches")
    add("--target-height", type=cli.positive_int, default=4096, help="resize images to this height before cutting")
    text = "resize to this width; default: keep the aspect ratio"
    cli.add_optional(parser, "--target-width", type=cli.positive_int, help=text)
    cli.add_flag(parser, "--segment-breast", True, "cut the image to the breast and blank the rest before sampling")
    add("--patch-size", type=cli.positive_int, default=256, help="height and width of a patch; odd ones lose a pixel")
    add("--nb-bkg", type=cli.natural_int, default=30, help="background patches an image, those of --nb-hns included")
    text = "patches a lesion; 1 cuts one around its centroid, more cut at random"
    add("--nb-abn", type=cli.natural_int, default=30, help=text)
    add("--nb-hns", type=cli.natural_int, default=15, help="hard negatives an image: background on bright blobs")
    text = (
        "hard negatives a lesion, besides --nb-bkg: background around it, with centres within half a patch of its "
        "bounding box"
    )
    add("--nb-hard-neg", type=cli.natural_int, default=0, help=text)
    text = "least fraction of the patch that is lesion, or of the lesion that is in the patch, in lesion patches"
    add("--pos-cutoff", type=cli.natural_float, default=0.75, help=text)
    text = "background patches have less of that fraction; 0: no overlap at all"
    add("--neg-cutoff", type=cli.natural_float, default=0.35, help=text)
    add("--val-size", type=cli.fraction, default=0.1, help="fraction of the patients to validate on; 0 for none")
    add("--bkg-dir", default="background", help="class folder of background patches")
    text = "background keeps off all lesions of an image, not only its first"
    cli.add_flag(parser, "--avoid-all-rois", False, text)
    add_work_options(parser)
    cli.add_flag(parser, "--verbose", True, "print what was sampled from each image")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add_sampling_options(parser)
    parser.add_argument("--calc-pos-dir", default="calc_mal", help="class folder of malignant calcifications")
    parser.add_argument("--calc-neg-dir", default="calc_ben", help="class folder of benign calcifications")
    parser.add_argument("--mass-pos-dir", default="mass_mal", help="class folder of malignant masses")
    parser.add_argument("--mass-neg-dir", default="mass_ben", help="class folder of benign masses")
    return parser


def run(*paths, **options) -> None:
    """Sample patches by the command line's arguments, in its order or by name; InputError as of `sample_dataset`."""
    args = cli.complete(make_parser(), options, paths)
    class_dirs = {("calc", True): args.calc_pos_dir, ("calc", False): args.calc_neg_dir}
    class_dirs |= {("mass", True): args.mass_pos_dir, ("mass", False): args.mass_neg_dir}
    sample_dataset(args, class_dirs)


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
