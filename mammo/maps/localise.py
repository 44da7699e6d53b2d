"""Judge whether maps point at the lesions: pointing game and free-response ROC of map files, against lesion masks.

A map is first smoothed by a Gaussian, since a window-sized plateau surrounds each lesion in a map of windows. *Marks*
are its local maxima that are the largest within half a window each way (non-maximum suppression, as in Liu et al.
2017, "Detecting cancer metastases on gigapixel pathology images"), at the centres of their cells. A mark *hits* a
lesion when it lies in its mask or at most half a cell's stride beside it, which is as exact as a map can be.

Pointing game (Zhang et al. 2018, "Top-down neural attention by excitation backprop"): in what share of the images with
lesions does the largest value of the map hit one? Chance is the share of the breast's area that would be a hit.

Free-response ROC (Bunch et al. 1977; counted as in CAMELYON16, Ehteshami Bejnordi et al. 2017, but with the false
positives of all images): over all thresholds, the share of lesions that a mark hits, against marks that hit none, per
image. Several marks on one lesion count once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

from mammo.base.files import InputError, atomic_write, naming, write_text
from mammo.data.patches import read_lesion_masks
from mammo.images.breast import DMImagePreprocessor
from mammo.images.reading import check_grey, read_resized
from mammo.maps.files import Grid, HeatmapRecord

# False positives per image at which the sensitivity is reported (CAMELYON16).
FP_RATES = (0.25, 0.5, 1, 2, 4, 8)


@dataclass
class MapHits:
    """The marks of the map of one image and the lesions that they hit."""

    image_id: str
    scores: np.ndarray  # (marks,) values of the smoothed map, the highest first
    hits: np.ndarray  # bool (marks, lesions)
    pointed: bool | None  # whether the largest value hits a lesion; None without lesions
    chance: float  # share of the breast's area that hits a lesion


def find_marks(values: np.ndarray, grid: Grid, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Find the marks of a map (map rows, map columns) of values of 0 or more. A cell of value 0 is no mark.

    radius: pixels within which a mark is the largest value. Returns positions (marks, 2), row and column in pixels of
    the scored image, and scores (marks,), the highest first.
    """
    size = [2 * max(1, round(radius / stride)) + 1 for stride in grid.strides]
    tops = (values == ndimage.maximum_filter(values, size, mode="constant")) & (values > 0)
    labels, _ = ndimage.label(tops, np.ones((3, 3)))
    _, first = np.unique(labels[tops], return_index=True)  # of equal neighbours, the first
    cells = np.argwhere(tops)[first]
    scores = values[tuple(cells.T)]
    order = np.argsort(-scores, kind="stable")
    rows, columns = grid.centres(values.shape)
    return np.stack([rows[cells[order, 0]], columns[cells[order, 1]]], axis=1), scores[order]


def mark_image(
    image_id: str,
    values: np.ndarray,
    grid: Grid,
    masks: Sequence[np.ndarray],
    breast: np.ndarray,
    window: Sequence[float],
    smooth: float | None = None,
) -> MapHits:
    """Find the marks of one map and the lesions that they hit, as the top of this module says.

    values: (map rows, map columns), the larger the more suspicious. masks: of the lesions, bool of `grid.image_size`.
    breast: bool of the same size. window: (rows, columns) in pixels of the part of the image that a cell stands for.
    smooth: standard deviation of the Gaussian in pixels; default: a quarter of the window.
    """
    sigma = (np.divide(window, 4) if smooth is None else smooth) / np.array(grid.strides)
    values = ndimage.gaussian_filter(values.astype(np.float64), sigma, mode="nearest")
    positions, scores = find_marks(values, grid, max(window) / 2)
    # Of each lesion, all pixels at most half a stride from it.
    reached = np.zeros((len(masks), *breast.shape), bool)
    for mask, area in zip(masks, reached, strict=True):
        distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        area[...] = distance <= max(grid.strides) / 2
    # Windows may be centred beside the image.
    rows, columns = np.clip(np.floor(positions).astype(int), 0, np.array(grid.image_size) - 1).T
    hits = reached[:, rows, columns].T
    pointed = bool(hits[:1].any()) if masks else None
    return MapHits(image_id, scores, hits, pointed, float(reached.any(axis=0)[breast].mean()))


def froc(images: Sequence[MapHits]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the free-response ROC of images; raise InputError if none has lesions.

    Returns thresholds in falling order, false positives per image, and sensitivity (lesions hit / lesions) at each. The
    first threshold is infinity, where nothing is marked.
    """
    nb_lesion = sum(image.hits.shape[1] for image in images)
    if not nb_lesion:
        raise InputError("Expected lesion masks of at least one image. Received none: the maps cannot be judged")
    false = np.concatenate([image.scores[~image.hits.any(axis=1)] for image in images])
    # A lesion is found at the score of its highest mark.
    found = np.array([image.scores[hit].max() for image in images for hit in image.hits.T if hit.any()])
    thresholds = np.unique(np.concatenate([false, found, [np.inf]]))[::-1]
    nb_false, nb_found = (len(some) - np.searchsorted(np.sort(some), thresholds) for some in (false, found))
    return thresholds, nb_false / len(images), nb_found / nb_lesion


def summarise(images: Sequence[MapHits]) -> dict[str, float]:
    """Return counts, pointing accuracy and its chance level, and the sensitivity at each of FP_RATES and its mean."""
    pointed = [image.pointed for image in images if image.pointed is not None]
    _, false_positives, sensitivity = froc(images)
    at_rates = {f"sensitivity_at_{rate:g}": float(sensitivity[false_positives <= rate].max()) for rate in FP_RATES}
    return {
        "images": len(images),
        "images_with_lesions": len(pointed),
        "lesions": sum(image.hits.shape[1] for image in images),
        "pointing_hits": sum(pointed),
        "pointing_accuracy": sum(pointed) / len(pointed),
        "chance": float(np.mean([image.chance for image in images if image.pointed is not None])),
        **at_rates,
        "sensitivity_mean": float(np.mean(list(at_rates.values()))),
    }


def mark_breast(
    record: HeatmapRecord,
    columns: Sequence[int],
    window: Sequence[float] | None,
    roi_mask_dir: str | Path,
    wanted: Collection[tuple[str, str, str]] | None = None,
    smooth: float | None = None,
) -> list[MapHits]:
    """Find the marks of each view of a breast and the lesions that they hit, by `mark_image`.

    columns: the classes whose sum is judged. window: default: the strides of the map. roi_mask_dir: see
    `read_lesion_masks`. wanted: (type, image id, number) of the lesions to look for; default: all that have a mask.
    """
    marked = []
    for view, heatmap, file, grid in record.scored_views():
        image_id = record.image_id(view)
        masks = read_lesion_masks(roi_mask_dir, image_id, file, grid.image_size)
        if wanted is not None:
            masks = [mask for mask in masks if (mask.type, image_id, mask.number) in wanted]
        pixels = [mask.pixels for mask in masks]
        img = check_grey(file, read_resized(file, target_size=grid.image_size))
        with naming(file):
            breast = DMImagePreprocessor.segment_breast(img, crop=False)[0] > 0
        values = heatmap[..., columns].sum(axis=-1)
        marked.append(mark_image(image_id, values, grid, pixels, breast, window or grid.strides, smooth))
    return marked


def write_localisation(out_dir: str | Path, results: dict[str, Sequence[MapHits]]) -> None:
    """Write localisation.csv (a row for each map file), froc.csv and froc.png. results: of all images, by map file."""
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    rows, curves, furthest = [], [], 0.1
    for name, images in results.items():
        summary = summarise(images)
        rows.append({"maps": name} | summary)
        curve = dict(zip(("threshold", "fp_per_image", "sensitivity"), froc(images), strict=True))
        curves.append(pd.DataFrame({"maps": name} | curve))
        label = f"{Path(name).name}: pointing {summary['pointing_accuracy']:.2f} (chance {summary['chance']:.2f})"
        furthest = max(furthest, curve["fp_per_image"][-1])
        axes.step(curve["fp_per_image"], curve["sensitivity"], where="post", label=label)
    axes.set(xlabel="false positives per image", xlim=(0, min(FP_RATES[-1], 1.05 * furthest)))
    axes.set(ylabel="lesions found", ylim=(0, 1.02))
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", fontsize=8)
    for name, table in (("localisation.csv", pd.DataFrame(rows)), ("froc.csv", pd.concat(curves))):
        write_text(Path(out_dir, name), table.to_csv(index=False))
    with atomic_write(Path(out_dir, "froc.png")) as temporary:
        figure.savefig(temporary, dpi=160)
