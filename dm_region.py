"""Regions: where patches are cut around, away from and beside annotated lesions, and what heatmaps show as lesions.

For patches, coordinates are pixels (x to the right, y down) of one *padded image*: the resized, usually segmented
mammogram with `patch_size // 2` zero rows and columns added on each side, so that a patch centred on any pixel
of the mammogram lies within it. A patch covers `2 * (patch_size // 2)` pixels each way: an odd size is rounded
down.

The rules and their order of random draws are those of the published program, so that the same seed gives the
same patches. The features of heatmap regions are those of scikit-image 0.14, which it used; the two that later versions
define in another way, the orientation and the area of the convex hull, are restated here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from dm_files import InputError

SEED = 12345
# Random centres tried before the overlap asked of a lesion patch is lowered by OVERLAP_STEP.
TRIES_PER_CUTOFF = 1000
OVERLAP_STEP = 0.05
# The published program tries for ever where a lesion leaves no room for background.
MAX_BACKGROUND_TRIES = 100_000


class Patch(NamedTuple):
    """A patch centre: `kind` is "abn" (lesion), or background: "bkg" (anywhere), "blob" (on a bright spot) or
    "hard" (beside a lesion).

    overlap: see `Roi.overlap`; for background the largest over the lesions it had to avoid.
    """

    kind: str
    x: int
    y: int
    overlap: float


@dataclass(frozen=True)
class Roi:
    """The outline of one lesion, kept as what sampling asks of it rather than as a whole-image mask.

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
    def from_mask(cls, mask, margin, image_shape):
        """Read a lesion mask: 2-D array, above zero inside the lesion.

        margin: zero pixels that the padded image has on each side and `mask` lacks.
        image_shape: (height, width) of the padded image.
        Raises InputError when no pixel is above zero.
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
        area = moments["m00"]
        if area > 0:
            centroid = (int(moments["m10"] / area), int(moments["m01"] / area))
        else:
            centroid = (x + width // 2, y + height // 2)
        return cls(centroid, (x, y, width, height), image_shape, cv2.integral(inside), origin)

    def overlap(self, x, y, patch_size):
        """How much the patch centred at (x, y) and the lesion share, 0..1.

        The larger of two fractions: of the patch (the part of it inside the image) that is lesion, and of the
        lesion that is in the patch. Constant time, by the integral image of the mask.
        """
        height, width = self.image_shape
        left, top, right, bottom = patch_box(x, y, patch_size)
        left, right = max(left, 0), min(right, width)
        top, bottom = max(top, 0), min(bottom, height)
        if left >= right or top >= bottom:
            return 0.0
        rows, columns = self._sums.shape
        x0, y0 = self._origin
        x1, x2 = (min(max(value - x0, 0), columns - 1) for value in (left, right))
        y1, y2 = (min(max(value - y0, 0), rows - 1) for value in (top, bottom))
        sums = self._sums
        shared = int(sums[y2, x2]) - int(sums[y1, x2]) - int(sums[y2, x1]) + int(sums[y1, x1])
        return max(shared / ((right - left) * (bottom - top)), shared / int(sums[-1, -1]))


def patch_box(x, y, patch_size):
    """(left, top, right, bottom) of the patch centred at (x, y); right and bottom are exclusive."""
    half = patch_size // 2
    return x - half, y - half, x + half, y + half


def cut_patch(img, x, y, patch_size):
    """View of the patch centred at (x, y) in the padded image `img`."""
    left, top, right, bottom = patch_box(x, y, patch_size)
    return img[top:bottom, left:right]


def sample_patches(
    img, roi, avoid, *, nb_abn, nb_bkg, nb_hns, nb_hard_neg=0, patch_size=256, pos_cutoff=0.75, neg_cutoff=0.35
):
    """Choose the patch centres of one lesion and of the background of its image.

    img: padded image, 2-D array. roi: the lesion. avoid: list of `Roi`s that background keeps off.
    nb_abn: lesion patches; 1 gives the centroid, more give random centres that overlap at least `pos_cutoff`.
    nb_bkg: background patches that overlap less than `neg_cutoff`; the first `nb_hns` of them are bright
    blobs, where the image has so many. nb_hard_neg: further ones that lie beside the lesion.

    Returns (list of Patch in the order blob, abn, bkg, hard; the overlap cutoff in the end, which is lower than
    `pos_cutoff` when the lesion allowed no other way). Raises InputError when the lesion or its surroundings
    leave no room.
    """
    rng = np.random.RandomState(SEED)
    blobs = sample_blobs(img, avoid, nb_hns, patch_size, neg_cutoff)
    lesions, cutoff = sample_lesion(roi, nb_abn, patch_size, pos_cutoff, rng)
    background = sample_background(avoid, nb_bkg - len(blobs), patch_size, neg_cutoff, img.shape, rng)
    beside = sample_hard_negatives(roi, avoid, nb_hard_neg, patch_size, neg_cutoff)
    return blobs + lesions + background + beside, cutoff


def sample_lesion(roi, nb_abn, patch_size, pos_cutoff, rng):
    """Patches on a lesion, and the lowest overlap cutoff used; see `sample_patches`.

    Every try draws x, then y, within the box of the lesion from `rng` (a RandomState). After every
    TRIES_PER_CUTOFF tries the cutoff falls by OVERLAP_STEP, at last to any overlap at all.
    """
    if nb_abn == 1:
        x, y = roi.centroid
        return [Patch("abn", x, y, roi.overlap(x, y, patch_size))], pos_cutoff
    left, top, width, height = roi.box
    patches, tries = [], 0
    while len(patches) < nb_abn:
        x = int(rng.randint(left, left + width))
        y = int(rng.randint(top, top + height))
        tries += 1
        if tries == TRIES_PER_CUTOFF:
            tries = 0
            pos_cutoff = max(pos_cutoff - OVERLAP_STEP, 0)
        overlap = roi.overlap(x, y, patch_size)
        # Ends: a patch centred on any pixel of the outline has some of the lesion.
        if overlap > 0 and overlap >= pos_cutoff:
            patches.append(Patch("abn", x, y, overlap))
    return patches, pos_cutoff


def sample_background(avoid, nb_bkg, patch_size, neg_cutoff, image_shape, rng):
    """Patches anywhere in the image, margins excepted, that overlap all of `avoid` less than `neg_cutoff`.

    rng: a RandomState. Raises InputError after MAX_BACKGROUND_TRIES.
    """
    half = patch_size // 2
    height, width = image_shape
    return _sample_apart("bkg", avoid, nb_bkg, patch_size, neg_cutoff, (half, half, width - half, height - half), rng)


def sample_hard_negatives(roi, avoid, nb_hard_neg, patch_size, neg_cutoff):
    """Patches beside a lesion: centres within half a patch of its box, that overlap `avoid` less than `neg_cutoff`.

    The box is cut at the margins of the image. The draws are from a generator of their own. (The published program
    has this sampler, without a call of it.) Raises InputError after MAX_BACKGROUND_TRIES.
    """
    half = patch_size // 2
    left, top, width, height = roi.box
    image_height, image_width = roi.image_shape
    limits = (
        max(left - half, half),
        max(top - half, half),
        min(left + width + half, image_width - half),
        min(top + height + half, image_height - half),
    )
    return _sample_apart("hard", avoid, nb_hard_neg, patch_size, neg_cutoff, limits, np.random.RandomState(SEED))


def _sample_apart(kind, avoid, count, patch_size, neg_cutoff, limits, rng):
    """`count` patches with centres within `limits` (left, top, right, bottom); every try draws x, then y."""
    left, top, right, bottom = limits
    patches, tries = [], 0
    while len(patches) < count:
        if tries == MAX_BACKGROUND_TRIES:
            raise InputError(
                f"only {len(patches)} of {count} background patches ({kind}) found in {tries} tries: "
                f"use a smaller --patch-size, fewer of them, or a larger --neg-cutoff"
            )
        x = int(rng.randint(left, right))
        y = int(rng.randint(top, bottom))
        tries += 1
        overlap = max(roi.overlap(x, y, patch_size) for roi in avoid)
        if overlap < neg_cutoff:
            patches.append(Patch(kind, x, y, overlap))
    return patches


def sample_blobs(img, avoid, nb_hns, patch_size, neg_cutoff):
    """Up to `nb_hns` patches on bright blobs (hard negatives) that overlap `avoid` less than `neg_cutoff`.

    Blobs are taken in the order of a permutation from a generator of their own.
    """
    if nb_hns < 1:
        return []
    centres = detect_blobs(img, patch_size)[:, :2].astype(int)
    patches = []
    for index in np.random.RandomState(SEED).permutation(len(centres)):
        x, y = (int(value) for value in centres[index])
        overlap = max(roi.overlap(x, y, patch_size) for roi in avoid)
        if overlap < neg_cutoff:
            patches.append(Patch("blob", x, y, overlap))
            if len(patches) == nb_hns:
                break
    return patches


def detect_blobs(img, patch_size, *, min_area=3, min_int=0.5, max_int=0.95, th_step=10):
    """Bright spots of any shape, no larger than a patch.

    img: 2-D array of any real dtype, not negative. min_area: pixels. min_int, max_int: range of thresholds as
    fractions of the image's maximum. th_step: threshold step on the 0..255 scale. Returns an (n, 3) float array
    of x, y and diameter in pixels, in OpenCV's order.
    """
    highest = img.max()
    lowest_threshold, highest_threshold = int(min_int * 255), int(max_int * 255)
    # A spot must show at two thresholds; newer OpenCV raises when there is only one.
    if highest <= 0 or highest_threshold - lowest_threshold <= th_step:
        return np.zeros((0, 3))
    params = cv2.SimpleBlobDetector_Params()
    params.minThreshold = lowest_threshold
    params.maxThreshold = highest_threshold
    params.thresholdStep = th_step
    params.filterByArea = True
    params.minArea = min_area
    params.maxArea = patch_size**2
    params.filterByCircularity = False
    params.filterByColor = False
    params.filterByConvexity = False
    params.filterByInertia = False
    blobs = cv2.SimpleBlobDetector_create(params).detect((img / highest * 255).astype("uint8"))
    return np.array([(*blob.pt, blob.size) for blob in blobs]).reshape(-1, 3)


def split_patients(patients, malignant, val_size, seed=SEED, option="--val-size"):
    """Split patients into training and validation (or any two parts), each with the same share of cancer patients.

    patients: list of ids. malignant: for each, whether any of their findings is malignant.
    val_size: fraction of the patients to validate on; 0 gives an empty validation list.
    option: where the user has `val_size` from, for the error.

    Returns (training ids, validation ids). The same ids in the same order give the same split: fed with the
    patient list and the labels of the patch sampler, it splits whole images as the patches were split.
    Raises InputError when a part would lack one of the classes.
    """
    if val_size == 0:
        return list(patients), []
    from sklearn.model_selection import train_test_split

    malignant = [bool(label) for label in malignant]
    try:
        train, val = train_test_split(list(patients), test_size=val_size, stratify=malignant, random_state=seed)
    except ValueError as error:
        raise InputError(
            f"cannot split {len(malignant)} patients ({sum(malignant)} with cancer) at {option} {val_size:g} "
            f"so that both parts have both classes: {error}; give another {option}, or 0 for no split"
        ) from None
    return train, val


# What stands for a region that a map does not have. The Euler number of nothing is 2 in the published program.
_NO_REGION = {
    "area": 0,
    "area_ratio": 0.0,
    "area_ratio2": 0.0,
    "eccentricity": 0.0,
    "eig1": 0.0,
    "eig2": 0.0,
    "equivalent_diameter": 0.0,
    "euler_number": 2,
    "extent": 0.0,
    "major_axis_length": 0.0,
    "max_intensity": 0.0,
    "mean_intensity": 0.0,
    "minor_axis_length": 0.0,
    "orientation": 0.0,
    "perimeter": 0.0,
    "solidity": 0.0,
}


def prob_heatmap_features(phm, cutoff, k, nb_cls=None):
    """Describe the regions of a heatmap where a class is at least as probable as `cutoff`.

    phm: (rows, columns, classes) probabilities, class 0 being background; None for a view without an image.
    cutoff: a region is a set of cells of at least this probability that touch at an edge or a corner.
    k: how many regions to describe, the largest first.
    nb_cls: classes, background included; default those of `phm`.

    Returns a list of one dict a class, background excepted: "nb_regions", "total_area" and "global_max_intensity" of
    all its regions, and "top1_area" .. "topK_solidity", the `region_features` of the k largest. Areas are in cells,
    lengths in cells. A map without (so many) regions has the values of `region_features(None)`, a missing map NaN
    throughout. Raises InputError for a map that is empty, of another shape, or not finite.
    """
    from skimage.measure import label, regionprops

    if phm is None:
        if nb_cls is None:
            raise InputError("a missing heatmap: Expected the number of its classes, nb_cls. Received None")
        return [dict.fromkeys(_class_features([], k), np.nan) for _ in range(nb_cls - 1)]
    phm = np.asarray(phm)
    if phm.ndim != 3 or phm.size == 0 or phm.shape[2] != (nb_cls or phm.shape[2]):
        raise InputError(f"Expected a heatmap (rows, columns, {nb_cls or 'classes'}). Received shape {phm.shape}")
    if not np.isfinite(phm).all():
        raise InputError("Expected a heatmap of finite probabilities. Received NaN or infinity")
    maps = np.moveaxis(phm[..., 1:], -1, 0)
    return [_class_features(regionprops(label(map_ >= cutoff), map_), k) for map_ in maps]


def _class_features(regions, k):
    features = {
        "nb_regions": len(regions),
        "total_area": total_area(regions),
        "global_max_intensity": global_max_intensity(regions),
    }
    largest = [regions[i] for i in topK_region_idx(regions, k)]
    for rank, region in enumerate(largest + [None] * (k - len(largest)), 1):
        features |= {f"top{rank}_{name}": value for name, value in region_features(region).items()}
    return features


def total_area(regions):
    """Cells in all of the regions (of `skimage.measure.regionprops`)."""
    return sum(int(region.area) for region in regions)


def global_max_intensity(regions):
    """Highest value in any of the regions; 0 where there are none."""
    return max((float(region.intensity_max) for region in regions), default=0.0)


def topK_region_idx(regions, k=1):
    """Indices of the (at most) k regions of largest area, the largest first; of equal ones the later first."""
    areas = [region.area for region in regions]
    return [int(index) for index in np.argsort(areas, kind="stable")[::-1][:k]]


def region_features(region):
    """Area, shape and intensity of a region, by name.

    region: one of `skimage.measure.regionprops(labels, intensities)`, or None for none.

    "area_ratio" and "solidity" are both the share of the convex hull that the region covers, "area_ratio2" that of
    the region with its holes filled. "eig1" and "eig2" are the eigenvalues of the inertia tensor, the larger first.
    "orientation" is the angle from the rows' direction to the major axis, counter-clockwise as seen, -pi/2 to pi/2
    (pi/4 for regions of no direction): today's value of scikit-image, which starts from the columns' direction,
    turned by a right angle.
    """
    if region is None:
        return dict(_NO_REGION)
    solidity = int(region.area) / _convex_area(region.image)
    eigenvalues = region.inertia_tensor_eigvals
    return {
        "area": int(region.area),
        "area_ratio": solidity,
        "area_ratio2": float(region.area / region.area_filled),
        "eccentricity": float(region.eccentricity),
        "eig1": float(eigenvalues[0]),
        "eig2": float(eigenvalues[1]),
        "equivalent_diameter": float(region.equivalent_diameter_area),
        "euler_number": int(region.euler_number),
        "extent": float(region.extent),
        "major_axis_length": float(region.axis_major_length),
        "max_intensity": float(region.intensity_max),
        "mean_intensity": float(region.intensity_mean),
        "minor_axis_length": float(region.axis_minor_length),
        "orientation": float(region.orientation + (np.pi / 2 if region.orientation < 0 else -np.pi / 2)),
        "perimeter": float(region.perimeter),
        "solidity": solidity,
    }


def _convex_area(image):
    """Pixels in the convex hull of the 2-D mask of a region that fills its bounding box.

    The hull is that of the middles of all pixel edges. As in scikit-image 0.14 a pixel centre on its outline counts
    only where the hull lies below or to the right of it (the usual crossing rule); later versions count them all.
    """
    from scipy.spatial import ConvexHull

    height, width = image.shape
    columns = np.arange(width)
    # The outermost pixels of each column suffice.
    pixels = np.concatenate(
        [[image.argmax(axis=0), columns], [height - 1 - image[::-1].argmax(axis=0), columns]], axis=1
    )
    middles = np.concatenate([pixels.T + shift for shift in ([-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5])])
    ends = middles[ConvexHull(middles).vertices]
    starts = np.roll(ends, 1, axis=0)
    slanted = ends[:, 1] != starts[:, 1]
    (row, column), (start_row, start_column) = ends[slanted].T, starts[slanted].T
    # Every column crosses the outline twice; the pixels from one crossing up to, not including, the other are inside.
    column_at = columns[:, None]
    crossed = (column <= column_at) != (start_column <= column_at)
    crossing = np.ceil((start_row - row) * (column_at - column) / (start_column - column) + row)
    first, last = np.where(crossed, crossing, np.inf).min(axis=1), np.where(crossed, crossing, -np.inf).max(axis=1)
    return int((last - first).sum())
