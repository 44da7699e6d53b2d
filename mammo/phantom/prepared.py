"""Make synthetic mammograms with lesions: prepared for the sampler and the trainers, or like a download.

The pictures are drawn, not acquired (`draw` says how): they let one run the whole programme, and see that it
learns, without patient data. They are no substitute for patients, and a figure measured on them says nothing about
patients.

Layout `prepared` (the default) holds what the patch sampler and the whole-image trainer read. Layout `cbis-ddsm`
is the download before `mammo prepare cbis-ddsm`: DICOM files (or the JPEG files of the re-release) in one of the
folder trees in circulation, the four description files, and the oddities of the real thing, which
oddities.json lists. Layout `inbreast` is the download before `mammo prepare inbreast`: its table, DICOM files of 14
bits, annotations, and oddities.

    mammo phantom phantom --patients 200 --height 576 --width 448
    mammo phantom download --layout cbis-ddsm --tree descriptive --patients 50
    mammo phantom download --layout inbreast --patients 50
"""

import argparse
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2

from mammo.base import cli
from mammo.base.files import InputError, atomic_write, write_img, write_text
from mammo.base.tables import write_csv
from mammo.data.patches import LESION_COLUMNS
from mammo.data.splits import stratified_split
from mammo.phantom.cbis_ddsm import TREES, make_download
from mammo.phantom.draw import STYLES, Drawing, Patient, draw_patients
from mammo.phantom.inbreast import make_inbreast

CONTENT = """\
full_img/            16-bit images, <patient>_<SIDE>_<VIEW>.png
roi_mask/            8-bit masks, one a finding, 255 inside
roi_mask_path.csv    one row a finding
pat_train.txt        patients for training and validation; pat_test.txt: for the test
pat_side_cancer.csv  1 where the breast has a malignant finding
train/ val/ test/    whole images, in pos where any finding is malignant, else in neg"""


def assign_folders(people: Sequence[Patient], test_size: float, val_size: float, seed: int) -> dict[str, str]:
    """Map patient names to train, val or test, with the same share of cancer patients in each.

    Of the patients with findings, those go to val whom the patch sampler puts there, given pat_train.txt: so
    no validation patient of one stage is a training patient of the other. Normal patients are divided alike.
    """
    folders = {}
    for has_findings in (True, False):
        cancer = {p.name: p.malignant for p in people if bool(p.findings) == has_findings}
        if not cancer:
            continue
        try:
            remaining, test = stratified_split(list(cancer), cancer.values(), test_size, seed, "--test-size")
            remaining.sort()
            train, val = stratified_split(remaining, [cancer[name] for name in remaining], val_size)
        except InputError as error:
            raise InputError(f"{error}, or more --patients than {len(people)}") from None
        for folder, names in (("train", train), ("val", val), ("test", test)):
            folders |= dict.fromkeys(names, folder)
    return folders


def make_patient(
    patient: Patient, drawing: Drawing, out: Path, folders: Mapping[str, str], img_size: tuple[int, int] | None
) -> None:
    """Draw and write all images and masks of one patient."""
    for view in drawing.views:
        img, masks = drawing.draw(patient, view)
        name = f"{patient.name}_{patient.side}_{view}"
        full_img = out / "full_img" / f"{name}.png"
        write_img(full_img, img)
        for number, ((kind, _), mask) in enumerate(zip(patient.findings, masks, strict=True), start=1):
            write_img(out / "roi_mask" / f"{kind.capitalize()}-Training_{name}_{number}.png", mask)
        whole = out / folders[patient.name] / ("pos" if patient.malignant else "neg") / f"{name}.png"
        if img_size:
            write_img(whole, cv2.resize(img, (img_size[1], img_size[0]), interpolation=cv2.INTER_AREA))
        else:
            _link(full_img, whole)


def _link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def make_phantom(
    out: str | Path,
    *,
    img_size: tuple[int, int] | None = None,
    benign_rate: float = 0.4,
    test_size: float = 0.2,
    val_size: float = 0.1,
    **drawing,
) -> list[Patient]:
    """Write a phantom data set into the new or empty folder `out`: the README.txt there lists what.

    Options as on the command line; drawing: those of `Drawing`. The same options give the same bytes for any number of
    jobs. Returns the list of patients. Raises InputError for a folder with content and for shares that cannot be had.
    """
    out, drawing = Path(out), Drawing(**drawing)
    drawing.check(out)
    if (prevalence := drawing.prevalence) + benign_rate > 1:
        text = "Expected --prevalence and --benign-rate of at most 1 together"
        raise InputError(f"{text}. Received {prevalence} and {benign_rate}.")
    people = draw_patients(drawing.patients, prevalence, benign_rate, drawing.seed)
    folders = assign_folders(people, test_size, val_size, drawing.seed)
    drawing.run(make_patient, people, "patient", out=out, folders=folders, img_size=img_size)
    findings = [
        (p.name, p.side, view, number, pathology, kind)
        for p, view in itertools.product(people, drawing.views)
        for number, (kind, pathology) in enumerate(p.findings, start=1)
    ]
    write_csv(out / "roi_mask_path.csv", LESION_COLUMNS, findings)
    for name, is_test in (("pat_train.txt", False), ("pat_test.txt", True)):
        names = [p.name for p in people if (folders[p.name] == "test") == is_test]
        write_text(out / name, "".join(f"{name}\n" for name in names))
    cancers = [(p.name, p.side, int(p.malignant)) for p in people]
    write_csv(out / "pat_side_cancer.csv", ["patient_id", "side", "cancer"], cancers)
    shares = f"malignant {prevalence}, benign {benign_rate}, test {test_size}, validation {val_size}"
    drawing.write_readme(out, "", f"\nshares: {shares}", CONTENT)
    return people


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
