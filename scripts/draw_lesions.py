#!/usr/bin/env python
"""Draw a mammogram as an 8-bit picture with the outlines of its lesions.

  python scripts/draw_lesions.py full_img/P_00005_RIGHT_CC.png out.png roi_mask/Calc-Training_P_00005_RIGHT_CC_1.png

The darkest pixel becomes black and the brightest pixel of the breast white; a mask is resized to its image.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dm_args
from dm_files import atomic_write


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="mammogram, any format that the trainers read")
    parser.add_argument("out", help="PNG to write")
    parser.add_argument("masks", nargs="+", help="lesion masks, above zero inside the lesion")
    parser.add_argument("--height", type=dm_args.positive_int, help="height of the picture; default: that of the image")
    return parser


def run(**options) -> None:
    """Write the picture; keyword arguments are the option names of `make_parser`."""
    args = dm_args.complete(make_parser(), options)
    import cv2
    import numpy as np

    from dm_image import read_img, read_resize_img
    from dm_preprocess import DMImagePreprocessor

    img = read_resize_img(args.image, target_height=args.height) if args.height else read_img(args.image)
    breast, _ = DMImagePreprocessor.segment_breast(img)
    grey = np.clip(img * (255 / max(breast.max(), 1)), 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    for mask in args.masks:
        inside = (read_resize_img(mask, target_size=img.shape) > 0).astype(np.uint8)
        contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, (0, 215, 255), max(1, img.shape[0] // 400))
    with atomic_write(args.out) as temporary:
        cv2.imwrite(str(temporary), picture)


def main(argv=None) -> int:
    return dm_args.run_main(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
