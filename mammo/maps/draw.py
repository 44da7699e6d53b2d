"""Draw probability maps on their mammograms."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from mammo.base.files import InputError, atomic_write
from mammo.data.patches import read_lesion_masks
from mammo.images.breast import DMImagePreprocessor
from mammo.images.reading import check_grey, read_resized
from mammo.maps.files import Grid, HeatmapRecord, resample

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_overlays(
    record: HeatmapRecord,
    out_dir: str | Path,
    *,
    class_names: Sequence[str],
    mode: str | None = None,
    roi_mask_dir: str | Path | None = None,
) -> None:
    """Draw each class and the sum of the region classes on the mammogram: `<out_dir>/<image>.png`, one a view.

    Axes are in pixels of the scored image. With a folder of lesion masks (see `read_lesion_masks`) their outlines
    are drawn. The brightest pixel of the breast is white. Raises InputError for maps without files or grids.
    """
    for view, heatmap, file, grid in record.scored_views():
        image_id = record.image_id(view)
        img = check_grey(file, read_resized(file, target_size=grid.image_size))
        masks = [] if roi_mask_dir is None else read_lesion_masks(roi_mask_dir, image_id, file, grid.image_size)
        label = "" if record.cancer is None else ", cancer" if record.cancer else ", no cancer"
        title = f"{record.patient_id} {record.side} {view.upper()}{label}"
        outlined = [mask.pixels for mask in masks]
        figure = overlay_figure(img, heatmap, grid, class_names, title, outlined, probabilities=mode != "gradcam")
        with atomic_write(Path(out_dir, f"{image_id}.png")) as temporary:
            figure.savefig(temporary)


def overlay_figure(
    img: np.ndarray,
    heatmap: np.ndarray,
    grid: Grid,
    class_names: Sequence[str],
    title: str = "",
    masks: Sequence[np.ndarray] = (),
    probabilities: bool = True,
) -> "Figure":
    """Draw the mammogram, the sum of the region classes on it where there are several, and each class, background last.

    img: (rows, columns) of the scored image, any real dtype. heatmap: (map rows, map columns, classes). masks: bool
    (rows, columns) each, outlined. probabilities: colours go from 0 to 1, else to the largest value of each panel.
    """
    from matplotlib.figure import Figure

    by_class = [(name, heatmap[..., i]) for i, name in enumerate(class_names)]
    panels = [("lesion classes, sum", heatmap[..., 1:].sum(axis=-1))] if heatmap.shape[-1] > 2 else []
    panels = [("mammogram", None), *panels, *by_class[1:], by_class[0]]
    down = 1 if len(panels) < 5 else 2
    across = math.ceil(len(panels) / down)
    size = (2.1 * across + 1.2, (2.1 * img.shape[0] / img.shape[1] + 0.3) * down + 0.4)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    outlines = [outline for mask in masks for outline in _outlines(mask)]
    place = {"extent": (0, img.shape[1], img.shape[0], 0), "vmin": 0}
    white, shown = _white(img), None
    for ax, (name, values) in zip(axes.flat, panels, strict=False):
        ax.imshow(img, cmap="gray", vmax=white, interpolation="antialiased", **place)
        if values is not None:
            name = f"{name} (max {values.max():.2g})"
            colours = resample(values, grid) if probabilities else share_of_largest(values, grid)
            shown = ax.imshow(colours, cmap=_colours(), vmax=1, interpolation="nearest", **place)
        for outline in outlines:
            ax.plot(*outline.T, color="cyan", linewidth=0.9)
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=6)
    for i, ax in enumerate(axes.flat):
        ax.xaxis.set_tick_params(labelbottom=i + across >= len(panels))  # the lowest of its column
        ax.set_visible(i < len(panels))
    bar = figure.colorbar(shown, ax=axes, fraction=0.03, aspect=30, pad=0.01)
    bar.set_label("probability" if probabilities else "Grad-CAM, share of the largest value", fontsize=8)
    bar.ax.set_facecolor("0.35")  # about the tissue below the colours
    bar.ax.tick_params(labelsize=6)
    figure.supxlabel(f"pixels of the image as scored, {img.shape[0]} x {img.shape[1]}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def share_of_largest(heatmap: np.ndarray, grid: Grid) -> np.ndarray:
    """Interpolate one class of a Grad-CAM map (rows, columns) at every pixel of the image, 0..1 of its largest value.

    Features see more than the pixels nearest to them: features at the border see all pixels beyond them, except the
    last one to three, which some networks never read.
    """
    return resample(heatmap, grid, to_edges=True) / max(heatmap.max(), np.finfo(np.float32).tiny)


def blend(img: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
    """Colour the mammogram (rows, columns), with `values` (rows, columns) in 0..1 over it if given.

    Returns uint8 (rows, columns, 3) in OpenCV's channel order, in the colours of `overlay_figure`.
    """
    grey = np.clip(img.astype(np.float32) * (255 / max(_white(img), np.finfo(np.float32).tiny)), 0, 255)
    picture = grey[..., np.newaxis].repeat(3, axis=-1)
    if values is not None:
        colours = _colours()(values).astype(np.float32)
        opacity = colours[..., 3:]
        picture = picture * (1 - opacity) + 255 * colours[..., 2::-1] * opacity
    return np.rint(picture).astype(np.uint8)


def _white(img: np.ndarray) -> float:
    """Return the brightest pixel of the breast; labels beside it may be brighter."""
    try:
        return float(DMImagePreprocessor.segment_breast(img)[0].max())
    except InputError:
        return float(img.max())


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Return closed outlines (n, 2) of x, y along the middles of a mask's border pixels."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([contour[:, 0], contour[:1, 0]]) + 0.5 for contour in contours]


def _colours():
    """Make a colour map from clear to opaque, so that low values leave the mammogram as it is."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = colormaps["inferno"](np.linspace(0.25, 1, 256))
    colours[:, 3] = np.minimum(1, np.linspace(0, 1.6, 256)) * 0.75
    return ListedColormap(colours)
