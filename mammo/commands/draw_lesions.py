"""Draw a mammogram as an 8-bit picture with the outlines of its lesions.

  mammo draw-lesions full_img/P_00005_RIGHT_CC.png out.png roi_mask/Calc-Training_P_00005_RIGHT_CC_1.png

The darkest pixel becomes black and the brightest pixel of the breast white; a mask is resized to its image.
"""

import argparse

import cv2
import numpy as np

from mammo.base import cli
from mammo.base.files import naming, write_img
from mammo.images.breast import DMImagePreprocessor
from mammo.images.pixels import read_resize_img
from mammo.images.reading import check_grey, read_img


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("image", help="mammogram, any format that the trainers read")
    parser.add_argument("out", help="picture to write, PNG or JPEG by its ending")
    parser.add_argument("masks", nargs="+", help="lesion masks, above zero inside the lesion")
    parser.add_argument("--height", type=cli.positive_int, help="height of the picture; default: that of the image")
    return parser


def run(**options) -> None:
    """Write the picture; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    img = read_resize_img(args.image, target_height=args.height) if args.height else read_img(args.image)
    check_grey(args.image, img)
    with naming(args.image):
        breast, _ = DMImagePreprocessor.segment_breast(img)
    grey = np.clip(img * (255 / max(breast.max(), 1)), 0, 255).astype(np.uint8)
    picture = cv2.cvtColor(grey, cv2.COLOR_GRAY2BGR)
    for mask in args.masks:
        inside = (check_grey(mask, read_img(mask)) > 0).astype(np.uint8)
        inside = cv2.resize(inside, img.shape[::-1], interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, (0, 215, 255), max(1, img.shape[0] // 400))
    write_img(args.out, picture)


main = cli.command(make_parser, run)
