"""Decide where patches are cut: on a lesion, on bright blobs, anywhere, or beside a lesion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from mammo.base.files import InputError
from mammo.data.splits import SEED
from mammo.images.breast import detect_blobs

# Random centres tried before the overlap asked of a lesion patch is lowered by OVERLAP_STEP.
TRIES_PER_CUTOFF = 1000
OVERLAP_STEP = 0.05

# The published program tries for ever where a lesion leaves no room for background.
MAX_BACKGROUND_TRIES = 100_000


class Patch(NamedTuple):
    """Hold a patch centre.

    kind: "abn" (lesion), or background: "bkg" (anywhere), "blob" (on a bright spot) or "hard" (beside a lesion).
    overlap: see `Roi.overlap`; for background the largest over the lesions it had to avoid.
    """

    kind: str
    x: int
    y: int
    overlap: float


@dataclass(frozen=True)
class Roi:
    """Hold the outline of one lesion, as far as sampling needs it, without a mask of the whole image.

    centroid: (x, y) of the largest contour, truncated; the centre of `box` where that contour has no area.
    box: (x, y, width, height) of the largest contour.
    image_shape: (height, width) of the padded image.
    """

    centroid: tuple[int, int]
    box: tuple[int, int, int, int]
    image_shape: tuple[int, int]
    _sums: np.ndarray
    _origin: tuple[int, int]

    @classmethod
    def from_mask(cls, mask: np.ndarray, margin: int, image_shape: tuple[int, int]) -> "Roi":
        """Read a lesion mask: 2-D array, above zero inside the lesion. Raises InputError when no pixel is.

        margin: zero pixels that the padded image has on each side and `mask` lacks. image_shape: (height, width) of the
        padded image.
        """
        inside = (mask > 0).astype("uint8")
        left, top, width, height = cv2.boundingRect(inside)
        if width == 0:
            raise InputError("the mask marks no lesion in the image: Expected pixels above 0. Received none")
        inside = np.ascontiguousarray(inside[top : top + height, left : left + width])
        origin = (left + margin, top + margin)
        contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=origin)
        largest = max(contours, key=cv2.contourArea)
        x, y, width, height = cv2.boundingRect(largest)
        moments = cv2.moments(largest)
        centroid = x + width // 2, y + height // 2
        if (area := moments["m00"]) > 0:
            centroid = int(moments["m10"] / area), int(moments["m01"] / area)
        return cls(centroid, (x, y, width, height), image_shape, cv2.integral(inside), origin)

    def overlap(self, x: int, y: int, patch_size: int) -> float:
        """Return how much the patch centred at (x, y) and the lesion share, 0..1.

        It is the larger of two fractions: how much of the patch (of its part inside the image) is lesion, and how much
        of the lesion is in the patch. Constant time, by the integral image of the mask.
        """
        height, width = self.image_shape
        left, top, right, bottom = patch_box(x, y, patch_size)
        left, right = max(left, 0), min(right, width)
        top, bottom = max(top, 0), min(bottom, height)
        if left >= right or top >= bottom:
            return 0.0
        sums, (x0, y0) = self._sums, self._origin
        x1, x2 = (min(max(value - x0, 0), sums.shape[1] - 1) for value in (left, right))
        y1, y2 = (min(max(value - y0, 0), sums.shape[0] - 1) for value in (top, bottom))
        shared = int(sums[y2, x2]) - int(sums[y1, x2]) - int(sums[y2, x1]) + int(sums[y1, x1])
        return max(shared / ((right - left) * (bottom - top)), shared / int(sums[-1, -1]))


def patch_box(x: int, y: int, patch_size: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the patch centred at (x, y); right and bottom are exclusive."""
    half = patch_size // 2
    return x - half, y - half, x + half, y + half


def cut_patch(img: np.ndarray, x: int, y: int, patch_size: int) -> np.ndarray:
    """Return a view of the patch centred at (x, y) in the padded image `img`."""
    left, top, right, bottom = patch_box(x, y, patch_size)
    return img[top:bottom, left:right]


def sample_patches(
    img: np.ndarray,
    roi: Roi,
    avoid: Sequence[Roi],
    *,
    nb_abn: int,
    nb_bkg: int,
    nb_hns: int,
    nb_hard_neg: int = 0,
    patch_size: int = 256,
    pos_cutoff: float = 0.75,
    neg_cutoff: float = 0.35,
) -> tuple[list[Patch], float]:
    """Choose the patch centres of one lesion and of the background of its image.

    Args:
        img: padded image, 2-D array.
        avoid: lesions that background keeps off.
        nb_abn: lesion patches; 1 gives the centroid, more give random centres that overlap at least `pos_cutoff`.
        nb_bkg: background patches that overlap less than `neg_cutoff`; the first `nb_hns` of them are bright blobs,
            where the image has so many.
        nb_hard_neg: further ones that lie beside the lesion.

    Returns the patches in the order blob, abn, bkg, hard; and the overlap cutoff in the end, which is lower than
    `pos_cutoff` when the lesion allowed no other way. Raises InputError when lesion or surroundings leave no room.
    """
    rng = np.random.RandomState(SEED)
    blobs = sample_blobs(img, avoid, nb_hns, patch_size, neg_cutoff)
    lesions, cutoff = sample_lesion(roi, nb_abn, patch_size, pos_cutoff, rng)
    background = sample_background(avoid, nb_bkg - len(blobs), patch_size, neg_cutoff, img.shape, rng)
    beside = sample_hard_negatives(roi, avoid, nb_hard_neg, patch_size, neg_cutoff)
    return blobs + lesions + background + beside, cutoff


def sample_lesion(
    roi: Roi, nb_abn: int, patch_size: int, pos_cutoff: float, rng: np.random.RandomState
) -> tuple[list[Patch], float]:
    """Return patches on a lesion, and the lowest overlap cutoff used; see `sample_patches`.

    Every try draws x, then y, within the box of the lesion from `rng`. After every
    TRIES_PER_CUTOFF tries the cutoff falls by OVERLAP_STEP, at last to any overlap at all.
    """
    if nb_abn == 1:
        x, y = roi.centroid
        return [Patch("abn", x, y, roi.overlap(x, y, patch_size))], pos_cutoff
    left, top, width, height = roi.box
    patches, tries = [], 0
    while len(patches) < nb_abn:
        x, y = int(rng.randint(left, left + width)), int(rng.randint(top, top + height))
        tries += 1
        if tries == TRIES_PER_CUTOFF:
            tries = 0
            pos_cutoff = max(pos_cutoff - OVERLAP_STEP, 0)
        overlap = roi.overlap(x, y, patch_size)
        # Ends: a patch centred on any pixel of the outline has some of the lesion.
        if overlap > 0 and overlap >= pos_cutoff:
            patches.append(Patch("abn", x, y, overlap))
    return patches, pos_cutoff


def sample_background(
    avoid: Sequence[Roi],
    nb_bkg: int,
    patch_size: int,
    neg_cutoff: float,
    image_shape: tuple[int, int],
    rng: np.random.RandomState,
) -> list[Patch]:
    """Return patches in the image, margins excepted, overlapping all of `avoid` < `neg_cutoff`; see `_sample_apart`."""
    half, (height, width) = patch_size // 2, image_shape
    return _sample_apart("bkg", avoid, nb_bkg, patch_size, neg_cutoff, (half, half, width - half, height - half), rng)


def sample_hard_negatives(
    roi: Roi, avoid: Sequence[Roi], nb_hard_neg: int, patch_size: int, neg_cutoff: float
) -> list[Patch]:
    """Return patches beside a lesion, centred within half a patch of its box, that overlap `avoid` < `neg_cutoff`.

    The box is cut at the margins of the image. The draws are from a generator of their own. (The published program
    has this sampler, without a call of it.) See `_sample_apart`.
    """
    half = patch_size // 2
    left, top, width, height = roi.box
    image_height, image_width = roi.image_shape
    limits = max(left - half, half), max(top - half, half)
    limits += min(left + width + half, image_width - half), min(top + height + half, image_height - half)
    return _sample_apart("hard", avoid, nb_hard_neg, patch_size, neg_cutoff, limits, np.random.RandomState(SEED))


def _sample_apart(kind, avoid, count, patch_size, neg_cutoff, limits, rng):
    """Return `count` patches with centres within `limits` (left, top, right, bottom); every try draws x, then y.

    Raises InputError after MAX_BACKGROUND_TRIES.
    """
    left, top, right, bottom = limits
    patches, tries = [], 0
    while len(patches) < count:
        if tries == MAX_BACKGROUND_TRIES:
            remedy = "use a smaller --patch-size, fewer of them, or a larger --neg-cutoff"
            raise InputError(
                f"only {len(patches)} of {count} background patches ({kind}) found in {tries} tries: {remedy}"
            )
        x, y = int(rng.randint(left, right)), int(rng.randint(top, bottom))
        tries += 1
        overlap = max(roi.overlap(x, y, patch_size) for roi in avoid)
        if _is_apart(overlap, neg_cutoff):
            patches.append(Patch(kind, x, y, overlap))
    return patches


def _is_apart(overlap: float, neg_cutoff: float) -> bool:
    return overlap < neg_cutoff or overlap == 0  # a cutoff of 0 allows no overlap at all


def sample_blobs(img: np.ndarray, avoid: Sequence[Roi], nb_hns: int, patch_size: int, neg_cutoff: float) -> list[Patch]:
    """Return up to `nb_hns` patches on bright blobs (hard negatives) that overlap `avoid` less than `neg_cutoff`.

    Blobs are taken in the order of a permutation from a generator of their own.
    """
    if nb_hns < 1:
        return []
    centres = detect_blobs(img, patch_size)[:, :2].astype(int)
    patches = []
    for index in np.random.RandomState(SEED).permutation(len(centres)):
        x, y = (int(value) for value in centres[index])
        overlap = max(roi.overlap(x, y, patch_size) for roi in avoid)
        if _is_apart(overlap, neg_cutoff):
            patches.append(Patch("blob", x, y, overlap))
            if len(patches) == nb_hns:
                break
    return patches
