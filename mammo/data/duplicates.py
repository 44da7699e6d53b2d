"""Find images of different patients that look the same, as one picture under two names does, by fingerprints."""

from collections.abc import Sequence

import cv2
import numpy as np
from tqdm import tqdm

from mammo.images.reading import faces_left

_SIDE = 32  # of the square of frequencies that a fingerprint is made of
_BITS = _SIDE * _SIDE
_BLOCK = 2048  # fingerprints that are compared at a time

# Pictures are near duplicates when at most this share of their bits differs. Of 4.5 million pairs of drawn mammograms
# of different patients the most alike differ in 0.16, the four real ones at hand in 0.48 or more; copies of the real
# ones differ in 0.01 after JPEG (quality 20), a sixth of the size or noise, in 0.06 after windowing, and in 0.08 after
# a gamma of 0.6 or 1.6.
MAX_DIFFERENCE = 0.09

MAX_PAIRS = 100_000  # no more are told: they grow as the square of the number of copies


def fingerprint(img: np.ndarray) -> str:
    """Return the perceptual hash of a picture (H, W) of integers: 1024 bits as hexadecimal digits.

    The picture is shrunk to 64 x 64 pixels, the breast pointing to the left, and transformed into cosines; a bit says
    whether one of the 32 x 32 lowest frequencies is stronger than the median of them (Zauner 2010, "Implementation
    and benchmarking of perceptual image hash functions", there with 8 x 8). Size, aspect ratio, brightness, contrast
    and mirror images make no difference.
    """
    small = cv2.resize(img, (2 * _SIDE, 2 * _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    if not faces_left(small):
        small = np.ascontiguousarray(small[:, ::-1])
    lowest = cv2.dct(small)[:_SIDE, :_SIDE]
    return np.packbits(lowest > np.median(lowest)).tobytes().hex()


def find_near_duplicates(fingerprints: Sequence[str], patients: Sequence[str]) -> list[tuple[int, int, float]]:
    """Find pictures of different patients whose fingerprints differ in at most `MAX_DIFFERENCE` of their bits.

    fingerprints, patients: of each picture. Returns (position of one, position of the other, share of bits that
    differ), in the order of the positions, the first `MAX_PAIRS` of them. 100,000 pictures take minutes and 200 MB.
    """
    packed = np.frombuffer(bytes.fromhex("".join(fingerprints)), np.uint8).reshape(-1, _BITS // 8)
    patients = np.unique(patients, return_inverse=True)[1]
    least_product = _BITS * (1 - 2 * MAX_DIFFERENCE)
    pairs = []
    for first in tqdm(range(0, len(packed), _BLOCK), "comparing", unit="block", disable=None):
        block, others = _signs(packed[first : first + _BLOCK]), []
        for second in range(first, len(packed), _BLOCK):
            # The product of two rows of signs is the number of equal bits less that of different ones.
            products = block @ _signs(packed[second : second + _BLOCK]).T
            one, other = np.nonzero(products >= least_product)
            differences = (_BITS - products[one, other]) / (2 * _BITS)
            one, other = one + first, other + second
            wanted = (one < other) & (patients[one] != patients[other])
            others += zip(one[wanted].tolist(), other[wanted].tolist(), differences[wanted].tolist(), strict=True)
        pairs += sorted(others)
        if len(pairs) >= MAX_PAIRS:
            break
    return pairs[:MAX_PAIRS]


def _signs(packed: np.ndarray) -> np.ndarray:
    """Return float32 (n, bits), 1 where a bit is set and -1 where not."""
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
