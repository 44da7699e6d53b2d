"""Warn of images unlike those that a model was trained on.

All pixel values are after rescaling and before the mean is subtracted, about 0..255.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mammo.base.files import InputError
from mammo.base.guards import read_json
from mammo.images.pixels import is_number, pixel_warnings

# Quantiles over the training images that are kept of each figure.
_QUANTILES = (0, 0.05, 0.5, 0.95, 1)

# Shares of an image's range: darker is background, brighter is no tissue along a whole border.
_DARK, _BRIGHT = 0.2, 0.8


def read_pixel_stats(model_path: str | Path) -> dict[str, Any] | None:
    """Return what `pixel_statistics` gave for a model's training images, or None where it is not known.

    It is in `<model without ending>/pixel_stats.json`, which the trainers write. Raises InputError for a damaged file.
    """
    path = Path(model_path).with_suffix("") / "pixel_stats.json"
    content = read_json(path)
    if content is None:
        return None
    ranges = content.get("of_images")
    names = ("mean", "sd", "p99", "bright_border", "edge_line", "top_heavy")
    fits = isinstance(ranges, dict) and all(isinstance(ranges.get(name), list) for name in names)
    fits = fits and all(len(ranges[name]) == len(_QUANTILES) and all(map(is_number, ranges[name])) for name in names)
    if not (fits and is_number(content.get("faces_left")) and isinstance(content.get("images"), int)):
        raise InputError(f"{path}: Expected statistics of training images. Received something else; remove the file")
    return content


# ------------------------------------------------------------------------------------------- measuring images


def measure_image(image: np.ndarray) -> dict[str, float]:
    """Return figures of one image, float (H, W[, C]), of which the first channel counts.

    mean, sd, and p99, the 99th percentile; dark_border and bright_border, shares of its outermost pixels in the
    darkest and the brightest fifth of its range; bright_excess, -1..1, share of all pixels in the brightest fifth less
    that in the darkest; edge_line, the largest share of a line along the border that is in the brightest fifth;
    to_left, -1..1, how much of the brightness is in the right half, as in a breast that points to the left;
    top_heavy, -1..1, how much brighter the upper corner at the chest wall is than the lower one.
    """
    image = np.asarray(image, np.float32)
    image = image[..., 0] if image.ndim == 3 else image
    rows, columns = image.shape
    low, p99, high = np.quantile(image, [0, 0.99, 0.999]).tolist()
    scaled = (image - low) / max(high - low, np.finfo(np.float32).tiny)
    width = max(1, round(0.02 * min(rows, columns)))
    strips = [scaled[:width], scaled[-width:], scaled[:, :width].T, scaled[:, -width:].T]
    border = np.concatenate([strip.ravel() for strip in strips])
    half, quarter = columns // 2, max(1, rows // 4)
    to_left = _balance(scaled[:, columns - half :].sum(), scaled[:, :half].sum())
    wall = scaled[:, half + half // 2 :] if to_left > 0 else scaled[:, : columns - half - half // 2]
    return {
        "mean": float(image.mean(dtype=np.float64)),
        "sd": float(image.std(dtype=np.float64)),
        "p99": p99,
        "dark_border": float((border < _DARK).mean()),
        "bright_border": float((border > _BRIGHT).mean()),
        "bright_excess": float((scaled > _BRIGHT).mean() - (scaled < _DARK).mean()),
        "edge_line": max(float((strip > _BRIGHT).mean(axis=1).max()) for strip in strips),
        "to_left": to_left,
        "top_heavy": _balance(wall[:quarter].sum(), wall[-quarter:].sum()),
    }


def _balance(one, other) -> float:
    """Return -1..1: 1 where all is in `one`, 0 where both are equal."""
    return float((one - other) / (one + other)) if one + other > 0 else 0.0


def pixel_statistics(images: Iterable) -> dict[str, Any]:
    """Return what training images look like, for `pixel_stats.json`: plain types that JSON can hold.

    images: float (H, W[, C]) each, at least one, after rescaling and before mean subtraction. Returns images, size
    ([H, W] of the first), mean and sd of all pixels, dark_border (mean share), faces_left (share of the images), and
    of_images: for each figure of `measure_image` its quantiles 0, 0.05, 0.5, 0.95 and 1 over the images.
    """
    measured = [(list(image.shape[:2]), measure_image(image)) for image in images]
    if not measured:
        raise InputError("pixel statistics: Expected at least one image. Received none")
    size, first = measured[0]
    columns = {name: np.array([figures[name] for _, figures in measured]) for name in first}
    return {
        "images": len(measured),
        "size": size,
        "mean": float(columns["mean"].mean()),
        # Of all pixels together: the variance within images and that between them.
        "sd": float(np.sqrt((columns["sd"] ** 2).mean() + columns["mean"].var())),
        "dark_border": float(columns["dark_border"].mean()),
        "faces_left": float((columns["to_left"] > 0).mean()),
        "of_images": {name: np.quantile(values, _QUANTILES).tolist() for name, values in columns.items()},
    }


# ------------------------------------------------------------------------------------------------ before predicting


def warnings_for(
    image: np.ndarray,
    trained: Mapping[str, Any] | None = None,
    *,
    mean: float | None = None,
    stored_size: tuple[int, int] | None = None,
    view: str | None = None,
) -> list[str]:
    """Return in what an image differs from what a model was trained on, one sentence each; [] when all seems well.

    image: as the network gets it, float (H, W[, C]), before mean subtraction. trained: `pixel_statistics` of the
    training images; without them general rules apply, with `mean`, which is subtracted. stored_size: (rows, columns)
    before resizing. view: "CC", "MLO" or None, if not known.

    Limits are wide, since they are those of a mistake and not of an unusual breast: mean, deviation and 99th
    percentile below half or above twice what nine in ten training images have.
    """
    figures, messages = measure_image(image), []
    usual = trained["of_images"] if trained else {"bright_border": [0.0], "edge_line": [0.0], "top_heavy": [0.0]}
    if figures["sd"] < 0.02 * max(abs(image.min()), abs(image.max())) or image.max() == image.min():
        return [f"nearly constant image: Expected a mammogram. Received pixels of {image.min():.4g}..{image.max():.4g}"]
    if stored_size is not None:
        (rows, columns), (height, width) = stored_size, image.shape[:2]
        if rows < height / 2 or columns < width / 2:
            enlarged = f"enlarged to {height} x {width}"
            messages.append(f"tiny image: {rows} x {columns} pixels, {enlarged}, show no calcifications")
        if columns > rows and height > width:
            messages.append(f"wider than high ({rows} x {columns}): turned by 90 degrees, or two breasts in one image?")
    messages += _scale_warnings(figures, usual) if trained else pixel_warnings([image], mean)
    if figures["bright_border"] > max(0.4, usual["bright_border"][-1] + 0.2) and figures["bright_excess"] > 0:
        exchanged = "black and white may be exchanged (MONOCHROME1, or a film digitised as a negative)"
        messages.append(f"bright background ({figures['bright_border']:.0%} of the border): {exchanged}")
        return messages  # the rest takes bright for tissue
    if figures["edge_line"] >= 0.9 > usual["edge_line"][-1]:
        messages.append("white line along the border: a frame, a film's edge or a ruler burned into the image?")
    if trained and trained["images"] >= 20 and abs(figures["to_left"]) > 0.2:
        left, right = ("left", trained["faces_left"]), ("right", 1 - trained["faces_left"])
        (side, share), (other, others) = (left, right) if figures["to_left"] > 0 else (right, left)
        if share <= 0.05:
            most = f"in {others:.0%} of the training images to the {other}"
            messages.append(f"the breast points to the {side}, and {most}")
    lowest = min(-0.6, usual["top_heavy"][0])
    if view != "CC" and figures["top_heavy"] < (-0.2 if view == "MLO" else lowest - 0.1):
        messages.append("upside down? The lower corner at the chest wall is the brighter one, by far")
    return messages


def _scale_warnings(figures, usual) -> list[str]:
    """Return, as one warning, in what mean and scale are far from the training images'."""
    far = []
    for name, text in (("mean", "mean pixel"), ("sd", "standard deviation"), ("p99", "99th percentile")):
        _, low, _, high, _ = usual[name]
        if not low / 2 <= figures[name] <= high * 2:
            far.append(f"{text} {figures[name]:.3g} (training images: {low:.3g} to {high:.3g})")
    advice = "check the rescale factor or scale, and that it was prepared as the training images were"
    return [f"{', '.join(far)}; {advice}"] if far else []
