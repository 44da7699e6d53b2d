"""Augment mammograms, and iterate over them: the image generator, and the original's names of functions on images.

Images are (rows, columns), or (rows, columns, channels) with `data_format="channels_last"`; files hold 8- or
16-bit integers, networks get float32. Rules marked "golden" are those of the published 2017 program.
"""

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mammo.base.files import InputError
from mammo.images.exams import DMCandidROIIterator, DMExamListIterator, clust_kpts, get_roi_patches
from mammo.images.file_iterators import DMDirectoryIterator, DMImgListIterator
from mammo.images.iterators import DMIterator, DMNumpyArrayIterator, empty_aligned, index_balancer, to_sparse
from mammo.images.pixels import read_img_for_pred, read_resize_img
from mammo.maps.compute import add_img_margins, crop_img, get_prob_heatmap, sweep_img_patches

__all__ = [
    "DMCandidROIIterator",
    "DMDirectoryIterator",
    "DMExamListIterator",
    "DMImageDataGenerator",
    "DMImgListIterator",
    "DMNumpyArrayIterator",
    "add_img_margins",
    "clust_kpts",
    "crop_img",
    "get_prob_heatmap",
    "get_roi_patches",
    "index_balancer",
    "read_img_for_pred",
    "read_resize_img",
    "sweep_img_patches",
    "to_sparse",
]


# ----------------------------------------------------------------------------------------------- augmentation


def _flow(name: str, iterator: type[DMIterator], without: tuple[str, ...] = ()) -> Callable[..., DMIterator]:
    """Make a method that gives the generator to an iterator, with that one's arguments and description."""
    parameters = inspect.signature(iterator).parameters
    left = [p for argument, p in parameters.items() if argument not in ("image_data_generator", *without)]
    signature = inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *left])

    def flow(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        return iterator(image_data_generator=arguments.pop("self"), **arguments)

    flow.__name__, flow.__doc__, flow.__signature__ = name, iterator.__doc__, signature
    return flow


class DMImageDataGenerator:
    """Augment images at random, standardise them, and make iterators over them (Keras 2 settings, golden numbers).

    Args:
        featurewise_center, featurewise_std_normalization: subtract `.mean`, divide by `.std`; callers set these.
        samplewise_center, samplewise_std_normalization: the same with each image's own mean and deviation.
        rotation_range: degrees; angles are uniform in +-rotation_range.
        width_shift_range, height_shift_range: fractions of the columns and rows.
        shear_range: radians. zoom_range: (low, high), or z for (1 - z, 1 + z).
        channel_shift_range: grey levels added to each channel, uniform in +-range, clipped to the image's range.
        fill_mode, cval: what lies outside the image, as in scipy.ndimage ("nearest" is the fast one).
        horizontal_flip, vertical_flip: flip half of the images.
        rescale, preprocessing_function: applied by `standardize` first.
        data_format: "channels_last" (also by "default" and None) or "channels_first".
        zca_whitening: must be off; see docs/differences.md.

    All are attributes of the same names and may be changed after construction.
    """

    def __init__(
        self,
        featurewise_center: bool = False,
        samplewise_center: bool = False,
        featurewise_std_normalization: bool = False,
        samplewise_std_normalization: bool = False,
        zca_whitening: bool = False,
        rotation_range: float = 0.0,
        width_shift_range: float = 0.0,
        height_shift_range: float = 0.0,
        shear_range: float = 0.0,
        zoom_range: float | Sequence[float] = 0.0,
        channel_shift_range: float = 0.0,
        fill_mode: str = "nearest",
        cval: float = 0.0,
        horizontal_flip: bool = False,
        vertical_flip: bool = False,
        rescale: float | None = None,
        data_format: str | None = "default",
        *,
        preprocessing_function: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if zca_whitening:
            raise InputError("zca_whitening: Expected False. Received True, which no network here was trained with.")
        self.featurewise_center = featurewise_center
        self.samplewise_center = samplewise_center
        self.featurewise_std_normalization = featurewise_std_normalization
        self.samplewise_std_normalization = samplewise_std_normalization
        self.rotation_range = rotation_range
        self.width_shift_range = width_shift_range
        self.height_shift_range = height_shift_range
        self.shear_range = shear_range
        self.zoom_range = zoom_range
        self.channel_shift_range = channel_shift_range
        self.fill_mode = fill_mode
        self.cval = cval
        self.horizontal_flip = horizontal_flip
        self.vertical_flip = vertical_flip
        self.rescale = rescale
        self.preprocessing_function = preprocessing_function
        self.data_format = "channels_last" if data_format in (None, "default") else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise InputError(f"data_format: Expected channels_last or channels_first. Received {data_format!r}.")
        self.mean = None
        self.std = None

    def get_random_transform(
        self, img_shape: tuple[int, ...], rng: np.random.Generator | np.random.RandomState
    ) -> dict[str, Any]:
        """Draw one transform for images of `img_shape` (with channels) from a NumPy Generator or RandomState.

        Returns theta and shear (radians), tx and ty (pixels, rows and columns), zx and zy (scale of rows and
        columns), channel_shift (float64, one a channel), flip_horizontal, flip_vertical. Draw order (golden):
        rotation, row shift, column shift, shear, the two zooms, channels, left-right, up-down; a setting that
        is off draws nothing.
        """
        if self.data_format == "channels_first":
            channels, rows, columns = img_shape
        else:
            rows, columns, channels = img_shape

        def uniform(low, high):
            return low + (high - low) * rng.random()

        def symmetric(limit):
            return uniform(-limit, limit) if limit else 0.0

        theta = np.pi / 180 * symmetric(self.rotation_range)
        tx = symmetric(self.height_shift_range) * rows
        ty = symmetric(self.width_shift_range) * columns
        shear = symmetric(self.shear_range)
        zoom_low, zoom_high = self._zoom_limits()
        zx = zy = 1.0
        if (zoom_low, zoom_high) != (1, 1):
            zx, zy = uniform(zoom_low, zoom_high), uniform(zoom_low, zoom_high)
        channel_shift = np.array([symmetric(self.channel_shift_range) for _ in range(channels)])
        return {
            "theta": theta,
            "shear": shear,
            "tx": tx,
            "ty": ty,
            "zx": zx,
            "zy": zy,
            "channel_shift": channel_shift,
            "flip_horizontal": bool(self.horizontal_flip) and rng.random() < 0.5,
            "flip_vertical": bool(self.vertical_flip) and rng.random() < 0.5,
        }

    def _zoom_limits(self):
        if np.isscalar(self.zoom_range):
            return 1 - self.zoom_range, 1 + self.zoom_range
        if len(self.zoom_range) != 2:
            raise InputError(f"zoom_range: Expected a number or (low, high). Received {self.zoom_range}.")
        return tuple(self.zoom_range)

    def apply_transform(self, x: np.ndarray, params: dict, out: np.ndarray | None = None) -> np.ndarray:
        """Apply a transform of `get_random_transform` to one image (with channels); missing entries do nothing.

        Nearest-neighbour warp, channel shift clipped to the warped image's range, flips (golden, same pixels as
        scipy.ndimage.affine_transform of order 0). Returns float32: `out`, contiguous and of the shape of `x`, or a
        new array. `x` is left as it is.
        """
        x = np.asarray(x, np.float32)
        if self.data_format == "channels_first":
            x = np.moveaxis(x, 0, -1)
        rows, columns, channels = x.shape
        x = _drop_equal_channels(x)
        flips = params.get("flip_vertical", False), params.get("flip_horizontal", False)
        matrix = transform_matrix(params, rows, columns)
        if matrix is not None and self.fill_mode == "nearest":
            x = _warp_nearest_edge(x, matrix, flips)
        else:
            if matrix is not None:
                x = self._warp_scipy(x, matrix)
            x = np.ascontiguousarray(x[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1])
        if self.data_format == "channels_last":
            return _shift_channels(x, channels, params.get("channel_shift", 0.0), out)
        shifted = np.moveaxis(_shift_channels(x, channels, params.get("channel_shift", 0.0)), -1, 0)
        if out is None:
            return np.ascontiguousarray(shifted)
        out[...] = shifted
        return out

    def _warp_scipy(self, x, matrix):
        from scipy import ndimage

        warped = [
            ndimage.affine_transform(
                x[..., k], matrix[:2, :2], matrix[:2, 2], order=0, mode=self.fill_mode, cval=self.cval
            )
            for k in range(x.shape[-1])
        ]
        return np.stack(warped, axis=-1)

    def random_transform(
        self, x: np.ndarray, seed: int | np.random.Generator | np.random.RandomState | None = None
    ) -> np.ndarray:
        """Draw a transform and apply it. An integer seeds a RandomState, as in 2017; None is fresh entropy."""
        rng = seed if hasattr(seed, "random") else np.random.RandomState(seed)
        return self.apply_transform(x, self.get_random_transform(np.shape(x), rng))

    def standardize(self, x: np.ndarray, copy: bool = True) -> np.ndarray:
        """Preprocess, rescale, and subtract and divide as set up; in place (float arrays) if `copy` is off."""
        if copy:
            x = np.array(x, dtype=np.result_type(x, np.float32))
        if self.preprocessing_function is not None:
            x = self.preprocessing_function(x)
        if self.rescale:
            x *= self.rescale
        if self.samplewise_center:
            x -= np.mean(x)
        if self.samplewise_std_normalization:
            x /= np.std(x) + 1e-7
        if self.featurewise_center:
            if self.mean is None:
                raise InputError("featurewise_center is on, but the generator's mean is not set: set `.mean`.")
            x -= self.mean
        if self.featurewise_std_normalization:
            if self.std is None:
                raise InputError("featurewise_std_normalization is on, but `.std` of the generator is not set.")
            x /= self.std + 1e-7
        return x

    # -- iterators: `keras.utils.PyDataset`s, see mammo.images: iterators, file_iterators and exams

    def flow(
        self,
        X: np.ndarray,
        y: np.ndarray | None = None,
        batch_size: int = 32,
        auto_batch_balance: bool = True,
        no_pos_skip: float = 0.0,
        balance_classes: float = 0.0,
        preprocess: Callable | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        save_to_dir: str | Path | None = None,
        save_prefix: str = "",
        save_format: str = "jpeg",
        *,
        workers: int | None = None,
    ) -> DMNumpyArrayIterator:
        """Iterate over images X (N, H, W, C) and their labels; see `mammo.images.iterators.DMNumpyArrayIterator`."""
        arguments = {name: value for name, value in locals().items() if name not in ("self", "X")}
        return DMNumpyArrayIterator(X, image_data_generator=self, **arguments)

    flow_from_directory = _flow("flow_from_directory", DMDirectoryIterator)
    flow_from_img_list = _flow("flow_from_img_list", DMImgListIterator, without=("data_format",))
    flow_from_exam_list = _flow("flow_from_exam_list", DMExamListIterator, without=("data_format",))
    flow_from_candid_roi = _flow("flow_from_candid_roi", DMCandidROIIterator)


def transform_matrix(params: dict, rows: int, columns: int) -> np.ndarray | None:
    """Return the 3x3 matrix from output to input (row, column, 1) of a transform; None where nothing moves (golden).

    Rotation . shift . shear . zoom about (rows/2 + 0.5, columns/2 + 0.5), the half being the 2017 program's.
    """
    theta, shear = params.get("theta", 0.0), params.get("shear", 0.0)
    tx, ty = params.get("tx", 0.0), params.get("ty", 0.0)
    zx, zy = params.get("zx", 1.0), params.get("zy", 1.0)
    if theta == shear == tx == ty == 0 and zx == zy == 1:
        return None
    # The product, written out: multiplying such small matrices takes longer than warping a patch does.
    cos, sin = math.cos(theta), math.sin(theta)
    a, b = cos * zx, -math.sin(theta + shear) * zy
    c, d = sin * zx, math.cos(theta + shear) * zy
    x, y = rows / 2 + 0.5, columns / 2 + 0.5
    shift_x, shift_y = cos * tx - sin * ty, sin * tx + cos * ty
    return np.array([[a, b, shift_x + x - (a * x + b * y)], [c, d, shift_y + y - (c * x + d * y)], [0.0, 0.0, 1.0]])


# Pixels worked on at a time, so that several steps find them in the cache.
_PIXELS_IN_CACHE = 2**16

# Numbers of channels for which OpenCV computes a warp's coordinates in float32; otherwise, to 10 bits of fraction.
_FLOAT32_WARPS = (1, 3, 4) if int(cv2.__version__.split(".")[0]) >= 5 else ()

# Buffers kept from image to image: fresh memory costs more, in page faults, than the work done in it.
_buffers = threading.local()


def _buffer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return this thread's float32 array of that name; what it held before is lost."""
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.shape != shape:
        buffer = empty_aligned(shape)
        setattr(_buffers, name, buffer)
    return buffer


def _drop_equal_channels(x: np.ndarray) -> np.ndarray:
    """Return (H, W, 1) of (H, W, C) whose channels are all equal, so that one is warped; free for a broadcast view."""
    rows, columns, channels = x.shape
    if channels == 1 or x.strides[-1] == 0:
        return x[..., :1]
    plane = _buffer("plane", (rows, columns))
    step = max(1, _PIXELS_IN_CACHE // columns)
    others = _buffer("others", (channels - 1, step, columns))
    for top in range(0, rows, step):
        part = np.ascontiguousarray(x[top : top + step])
        first, others = plane[top : top + step], others[:, : len(part)]
        cv2.split(part, [first, *others])
        if any(cv2.norm(first, other, cv2.NORM_INF) != 0 for other in others):
            return x
    return plane[..., np.newaxis]


def _warp_nearest_edge(x: np.ndarray, matrix: np.ndarray, flips: tuple[bool, bool]) -> np.ndarray:
    """Warp (H, W, C) by nearest neighbour with replicated edges, then flip (up-down, left-right); into a buffer.

    The pixels are those of scipy.ndimage.affine_transform(order=0, mode="nearest"), which rounds float64
    coordinates. OpenCV is far faster, but its coordinates are coarser: the few pixels whose coordinate is so
    near a rounding boundary that it may fall on the other side are computed again in float64.
    """
    rows, columns, channels = x.shape
    row_index, column_index = np.arange(float(rows)), np.arange(float(columns))
    (a, b, p), (c, d, q), _ = matrix.tolist()
    if flips[0]:
        row_index = row_index[::-1]
        a, c, p, q = -a, -c, p + a * (rows - 1), q + c * (rows - 1)
    if flips[1]:
        column_index = column_index[::-1]
        b, d, p, q = -b, -d, p + b * (columns - 1), q + d * (columns - 1)
    x = np.ascontiguousarray(x)
    warped = _buffer("warped", x.shape)
    cv2.warpAffine(
        x,
        np.array([[d, c, q], [b, a, p]]),  # OpenCV puts x first
        (columns, rows),
        dst=warped,
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )

    # Input coordinates of output pixel (i, j) are by_row[:, i] + by_column[:, j], summed in SciPy's order.
    by_row = matrix[:2, 2:] + matrix[:2, :1] * row_index
    by_column = matrix[:2, 1:2] * column_index
    if channels in _FLOAT32_WARPS:  # four roundings to float32, of numbers no larger than this sum
        error = 2.0**-22 * max(abs(a) * rows + abs(b) * columns + abs(p), abs(c) * rows + abs(d) * columns + abs(q))
    else:
        error = 2e-3
    i, j = _near_rounding_boundary(by_row, by_column, error)
    source = by_row.take(i, axis=1) + by_column.take(j, axis=1) + 0.5
    source_row, source_column = source.clip(0, [[rows - 1], [columns - 1]]).astype(np.intp)
    warped.reshape(-1, channels)[i * columns + j] = x.reshape(-1, channels)[source_row * columns + source_column]
    return warped


def _near_rounding_boundary(by_row, by_column, tolerance):
    """Return pixels (i, j) whose by_row[k, i] + by_column[k, j], k = 0 or 1, is within `tolerance` of an n + 1/2.

    Columns are put into bins by the fraction of their part; only those in the bins that belong to a row's boundary
    are taken, without evaluating all H x W. Pixels up to a bin farther from the boundary come along.
    """
    bins = 2048
    of_both = np.array([[0], [bins]])  # each coordinate has its own bins
    column_bin = (np.floor(by_column * bins).astype(np.intp) & (bins - 1)) + of_both
    first_bin = np.floor(((0.5 - tolerance) - by_row) * bins).astype(np.intp)
    nb_bins = math.ceil(2 * tolerance * bins) + 1
    row_bin = (((first_bin + np.arange(nb_bins)[:, np.newaxis, np.newaxis]) & (bins - 1)) + of_both).ravel()
    column_bin = column_bin.ravel()
    order = column_bin.astype(np.uint16).argsort(kind="stable")  # NumPy sorts 16 bits in linear time
    count = np.bincount(column_bin, minlength=2 * bins)
    nb_hits = count.take(row_bin)
    query = nb_hits.nonzero()[0]
    nb_hits = nb_hits[query]
    end = count.cumsum().take(row_bin[query])  # in order, of the columns in the bin
    hit = np.arange(nb_hits.sum()) + (end - nb_hits.cumsum()).repeat(nb_hits)
    return query.repeat(nb_hits) % by_row.shape[1], order[hit] % by_column.shape[1]


def _shift_channels(x: np.ndarray, channels: int, shifts, out: np.ndarray | None = None) -> np.ndarray:
    """Add one value a channel and clip to the range of `x`, a single channel being repeated; in `out` or new."""
    if out is None:
        out = empty_aligned((*x.shape[:2], channels))
    shifts = np.asarray(shifts, np.float32)
    if not shifts.any():
        if x.shape[2] == channels:
            out[...] = x
        else:
            cv2.merge([x] * channels, dst=out)
        return out
    low, high, _, _ = cv2.minMaxLoc(x.reshape(len(x), -1))
    step = max(1, _PIXELS_IN_CACHE // x.shape[1])
    planes = _buffer("planes", (channels, step, x.shape[1]))
    for top in range(0, len(x), step):
        part = x[top : top + step]
        planes = planes[:, : len(part)]
        if x.shape[2] == 1:
            np.add(part[..., 0], shifts[:, np.newaxis, np.newaxis], out=planes)
        else:
            cv2.split(part, list(planes))
            planes += shifts[:, np.newaxis, np.newaxis]
        for plane, shift in zip(planes, shifts, strict=True):
            if shift > 0:  # nothing falls below the lowest value
                cv2.threshold(plane, high, 0, cv2.THRESH_TRUNC, dst=plane)
            elif low == 0:  # the usual case, and twice as fast as a maximum
                cv2.threshold(plane, 0, 0, cv2.THRESH_TOZERO, dst=plane)
            else:
                cv2.max(plane, low, dst=plane)
        cv2.merge(list(planes), dst=out[top : top + step])
    return out
