"""Measure the mean pixel of a training set after rescaling, and the rescale factor that its pixels suggest.

  mammo pixel-mean data/train --img-size 1152 896

The options that it prints are those of both trainers and of the other scripts: paste them.
"""

import argparse
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mammo.base import cli
from mammo.base.files import InputError, counted
from mammo.base.work import run_parallel
from mammo.images.reading import check_grey, find_images, read_img, resize

DEPTHS = (8, 12, 14, 16)  # bits a pixel of the detectors and scanners in use


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="image, or folder searched for them")
    size_help = "resize to this first, as the trainers do, so that all images count alike (default: as stored)"
    parser.add_argument("--img-size", nargs=2, type=cli.positive_int, metavar=("HEIGHT", "WIDTH"), help=size_help)
    factor_help = "multiply pixels by this (default: what brings the bits that they use to 0..255)"
    parser.add_argument("--rescale-factor", type=cli.positive_float, help=factor_help)
    parser.add_argument("--json", action="store_true", help="print all figures as JSON instead")
    cli.add_parallel_options(parser)
    return parser


def measure_file(path: Path, img_size: Sequence[int] | None = None) -> tuple[float, int, str, float, float]:
    """Return sum and number of pixels after resizing, and type, lowest and highest pixel as stored, of a grey image."""
    img = check_grey(path, read_img(path, dicom_16_bit=True))
    as_stored = img.dtype.name, img.min().item(), img.max().item()
    if img_size:
        img = resize(img, *img_size)
    return img.sum(dtype=np.int64 if img.dtype.kind in "iu" else np.float64).item(), img.size, *as_stored


def suggest_factor(pixel_types: Iterable[str], low: float, high: float) -> float:
    """Return what brings pixels of these types and this range to 0..255: 255 over the largest value of their bits.

    Four digits, as published for 16 bits (0.003891). Raises InputError for pixels that no bits are known for.
    """
    if low < 0 or any(name.startswith("float") for name in pixel_types):
        received = f"Received {', '.join(pixel_types)} pixels of {low:g}..{high:g}; give --rescale-factor"
        raise InputError(f"cannot tell a rescale factor: Expected whole numbers from 0. {received}")
    bits = next(bits for bits in DEPTHS if high < 2**bits)
    return float(f"{255 / (2**bits - 1):.4g}")


def measure_files(
    files: Sequence[Path],
    img_size: Sequence[int] | None = None,
    rescale_factor: float | None = None,
    jobs: int = 1,
    backend: str = "loky",
) -> dict[str, Any]:
    """Measure grey images. Sums of integer pixels are exact, so the result is the same for any number of jobs.

    img_size: (height, width) to resize to (bicubic) before the mean is taken. rescale_factor: None for the one
    suggested by the largest pixel of all. jobs, backend: see `mammo.base.work.run_parallel`.

    Returns images, pixels, sum, types {name: number of images}, min, max (as stored), mean, rescale_factor, and
    featurewise_mean, which is the mean times the factor. Raises InputError for an unreadable image.
    """
    measure = functools.partial(measure_file, img_size=img_size)
    sums, sizes, names, lows, highs = zip(*run_parallel(measure, files, jobs, backend, "measuring"), strict=True)
    types, low, high, mean = dict(sorted(Counter(names).items())), min(lows), max(highs), sum(sums) / sum(sizes)
    factor = rescale_factor or suggest_factor(types, low, high)
    figures = {"images": len(files), "pixels": sum(sizes), "sum": sum(sums), "types": types, "min": low, "max": high}
    return figures | {"mean": mean, "rescale_factor": factor, "featurewise_mean": mean * factor}


def run(**options) -> None:
    """Print the figures; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    sources = [args.sources] if isinstance(args.sources, (str, Path)) else args.sources
    figures = measure_files(find_images(sources), args.img_size, args.rescale_factor, args.jobs, args.backend)
    types, factor, high = figures["types"], figures["rescale_factor"], figures["max"]
    if len(types) > 1:
        counts = ", ".join(f"{count} of {name}" for name, count in types.items())
        print(f"warning: no one factor fits images of several types. Received {counts}", file=sys.stderr)
    if not 32 <= high * factor <= 320:
        received = f"Received a maximum of {high:g} x {factor:g} = {high * factor:.4g}"
        far = "rescaled pixels are far from the range 0..255 that networks expect"
        print(f"warning: {far}. {received}", file=sys.stderr)
    if args.json:
        print(json.dumps(figures, indent=2))
        return
    stored = f"pixels {figures['min']:g}..{high:g}, mean {figures['mean']:.6g}"
    print(f"{counted(figures['images'], 'image')} ({', '.join(types)}), {stored}")
    print(f"--rescale-factor {factor:g} --featurewise-mean {figures['featurewise_mean']:.2f}")


main = cli.command(make_parser, run)
