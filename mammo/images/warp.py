"""Warp and shift images fast, for the augmentation of `dm_image`: the pixels are those of SciPy, the speed is OpenCV's.

Images are (H, W, C), float32. Those that are returned may lie in buffers of the thread, until its next call.
"""

import math
import threading

import cv2
import numpy as np

# Pixels worked on at a time, so that several steps find them in the cache.
_PIXELS_IN_CACHE = 2**16

# Numbers of channels for which OpenCV computes a warp's coordinates in float32; otherwise, to 10 bits of fraction.
_FLOAT32_WARPS = (1, 3, 4) if int(cv2.__version__.split(".")[0]) >= 5 else ()

# Buffers kept from image to image: fresh memory costs more, in page faults, than the work done in it.
_buffers = threading.local()


def transform_matrix(params: dict, rows: int, columns: int) -> np.ndarray | None:
    """Return the 3x3 matrix from output to input (row, column, 1) of a transform; None where nothing moves.

    Rotation . shift . shear . zoom about (rows/2 + 0.5, columns/2 + 0.5), the half as published.
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


def _buffer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return this thread's float32 array of that name; what it held before is lost."""
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.shape != shape:
        buffer = empty_aligned(shape)
        setattr(_buffers, name, buffer)
    return buffer


def drop_equal_channels(x: np.ndarray) -> np.ndarray:
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


def warp_nearest_edge(x: np.ndarray, matrix: np.ndarray, flips: tuple[bool, bool]) -> np.ndarray:
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


def shift_channels(
    x: np.ndarray, channels: int, shifts: np.ndarray | float, out: np.ndarray | None = None
) -> np.ndarray:
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


def empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Return an uninitialised float32 array that starts at a cache line.

    OpenCV then writes images into it past the cache, which keeps what it reads: twice as fast for large images.
    """
    size = math.prod(shape)
    memory = np.empty(size + 15, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size].reshape(shape)
