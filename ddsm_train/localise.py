#!/usr/bin/env python
"""Judge how well maps point at the lesions: pointing-game accuracy and free-response ROC, where masks are known.

  mammo localise --roi-mask-dir roi_mask --out-dir figures fprop.npz gradcam.npz

Reads map files of `mammo heatmaps`; writes localisation.csv (a row a map file), froc.csv and froc.png. The rules are
in `mammo.maps.localise`. The images must be where they were scored.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from mammo.base import cli
from mammo.base.files import InputError
from mammo.base.work import run_parallel


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("maps", nargs="+", help="map files of `mammo heatmaps`: .npz, .h5 or .pkl")
    add("--roi-mask-dir", required=True, help="folder of masks: <Calc|Mass>-<set>_<image>_<abn_num>.png")
    add("--out-dir", default="localisation", metavar="DIR", help="folder for the results")
    add("--classes", nargs="+", metavar="CLASS", help="judge the sum of these classes; default: all but the first")
    text = "look for malignant lesions alone, by this table of lesions (roi_mask_path.csv); default: all lesions"
    add("--malignant", metavar="CSV", help=text)
    text = "smooth maps by a Gaussian of this many pixels; default: a quarter of the window that a cell stands for"
    add("--smooth", type=cli.natural_float, help=text)
    cli.add_parallel_options(parser)
    return parser


def run(**options) -> None:
    """Write the results; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    from mammo.data.patches import read_lesions
    from mammo.maps import localise
    from mammo.maps.files import load_heatmaps

    if not Path(args.roi_mask_dir).is_dir():
        raise InputError(f"--roi-mask-dir {args.roi_mask_dir}: no such folder")
    wanted = None
    if args.malignant is not None:
        lesions = [lesion for lesion in read_lesions(args.malignant) if lesion.malignant]
        wanted = {(lesion.type, lesion.image_id, lesion.number) for lesion in lesions}
    results = {}
    for path in args.maps:
        maps = load_heatmaps(path)
        names = args.classes or maps.class_names[1:]
        if unknown := [name for name in names if name not in maps.class_names]:
            raise InputError(f"{path}: no class {unknown[0]}: Expected {', '.join(maps.class_names)}")
        if not names:
            raise InputError(f"{path}: holds no class names, as files of 2017; compute the maps again")
        columns = [maps.class_names.index(name) for name in names]
        settings = {"roi_mask_dir": args.roi_mask_dir, "wanted": wanted, "smooth": args.smooth}
        mark = partial(localise.mark_breast, columns=columns, window=maps.options.get("window"), **settings)
        marked = list(run_parallel(mark, maps.records, args.jobs, args.backend, desc=Path(path).name, unit="breast"))
        results[str(path)] = [image for images in marked for image in images]
        warn_of_missing_masks(path, maps.records, marked, wanted)
        figures = localise.summarise(results[str(path)])
        line = (
            "points at a lesion in {pointing_hits} of {images_with_lesions} images ({pointing_accuracy:.3f}; chance "
            "{chance:.3f}); finds {sensitivity_at_1:.3f} of {lesions} lesions at 1 false positive an image"
        )
        print(f"{path}: {line.format(**figures)}")
    localise.write_localisation(args.out_dir, results)
    print(f"localisation.csv, froc.csv and froc.png are in {args.out_dir}")


def warn_of_missing_masks(path: str | Path, records: list, marked: list, wanted: set | None) -> None:
    """Say how many lesions count as absent because they have no mask. marked: lists of `MapHits`, one a record."""
    lesions = [sum(image.hits.shape[1] for image in images) for images in marked]
    cancers = [count for record, count in zip(records, lesions, strict=True) if record.cancer == 1]
    if without := cancers.count(0):
        print(f"Warning: {path}: {without} of {len(cancers)} breasts with cancer have no mask, and count as free of it")
    if wanted is not None:
        scored = {image.image_id for images in marked for image in images}
        expected = sum(image_id in scored for _, image_id, _ in wanted)
        if (missing := expected - sum(lesions)) > 0:
            print(f"Warning: {path}: {missing} of {expected} malignant lesions of its images have no mask")


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
