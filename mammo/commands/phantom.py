"""Make synthetic mammograms with lesions: prepared for the sampler and the trainers, or like a download.

  mammo phantom phantom --patients 200 --height 576 --width 448
  mammo phantom download --layout cbis-ddsm --tree descriptive --patients 50
  mammo phantom download --layout inbreast --patients 50

The pictures are drawn, not acquired (`mammo.phantom.draw` says how): they let one run the whole programme, and see that
it learns, without patient data. They are no substitute for patients, and a figure measured on them says nothing about
patients.

Layout `prepared` (the default) holds what the patch sampler and the whole-image trainer read. Layout `cbis-ddsm`
is the download before `mammo prepare cbis-ddsm`: DICOM files (or the JPEG files of the re-release) in one of the
folder trees in circulation, the four description files, and the oddities of the real thing, which
oddities.json lists. Layout `inbreast` is the download before `mammo prepare inbreast`: its table, DICOM files of 14
bits, annotations, and oddities.
"""

import argparse
import os

from mammo.base import cli
from mammo.base.files import InputError
from mammo.phantom.cbis_ddsm import TREES, make_download
from mammo.phantom.draw import STYLES
from mammo.phantom.inbreast import make_inbreast
from mammo.phantom.prepared import make_phantom

# What makes each layout, and those of its options that not all have.
LAYOUTS = {
    "prepared": (make_phantom, {"benign_rate", "test_size", "val_size", "img_size"}),
    "cbis-ddsm": (make_download, {"test_size", "tree", "oddities", "old_header"}),
    "inbreast": (make_inbreast, {"benign_rate", "oddities"}),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("out", help="folder to write, new or empty")
    add("--layout", choices=LAYOUTS, default="prepared", help="how the images are laid out")
    text = "number of patients, one breast each; inbreast: both"
    add("--patients", type=cli.positive_int, default=100, help=text)
    add("--views", nargs="+", choices=["CC", "MLO"], default=["CC", "MLO"], help="views of each")
    add("--height", type=cli.positive_int, default=1152, help="of the full images, in pixels")
    add("--width", type=cli.positive_int, default=896, help="of the full images, in pixels")
    add("--prevalence", type=cli.fraction, default=0.4, help="share of patients with cancer")
    add("--contrast", type=cli.natural_float, default=1.0, help="conspicuity of the lesions; 0: invisible")
    text = (
        "pictures as of digitised film, or of a digital detector: more contrast, sharper, black around the breast, "
        "14 bits; default: as the layout's originals, film, and digital for inbreast"
    )
    add("--style", choices=STYLES, help=text)
    text = "share of patients for the (official) test set; not inbreast"
    add("--test-size", type=cli.fraction, default=0.2, help=text)
    text = "share with benign findings only; not cbis-ddsm, where all others have them"
    add("--benign-rate", type=cli.fraction, default=0.4, help=text)
    text = "those of the real data: truncated files, repeated rows, swapped masks; not prepared"
    add("--oddities", choices=["all", "none"], default="all", help=text)
    add("--seed", type=cli.natural_int, default=0, help="other seeds make other patients")
    cli.add_parallel_options(parser, jobs=os.cpu_count())
    add = parser.add_argument_group("layout prepared").add_argument
    text = "size of the whole images in train, val and test; default: links to the full images"
    add("--img-size", nargs=2, type=cli.positive_int, metavar=("HEIGHT", "WIDTH"), help=text)
    text = "share of the others for validation; give the patch sampler the same"
    add("--val-size", type=cli.fraction, default=0.1, help=text)
    add = parser.add_argument_group("layout cbis-ddsm (every patient has findings)").add_argument
    text = "folders named by UIDs, by dates and descriptions (two styles), or the JPEG re-release"
    add("--tree", choices=TREES, default="uid", help=text)
    add("--old-header", action="store_true", help="description files with older column names and backslashes")
    return parser


def run(**options) -> None:
    """Write the data set; keyword arguments are the option names of `make_parser`."""
    parser = make_parser()
    args = vars(cli.complete(parser, options))
    layout = args.pop("layout")
    if args["style"] is None:
        del args["style"]
    make, own = LAYOUTS[layout]
    for name in sorted(set().union(*(names for _, names in LAYOUTS.values())) - own):
        if args.pop(name) != parser.get_default(name):
            others = " or ".join(other for other, (_, names) in LAYOUTS.items() if name in names)
            raise InputError(f"--{name.replace('_', '-')} is for --layout {others}. Received --layout {layout}.")
    make(**args)


main = cli.command(make_parser, run)
