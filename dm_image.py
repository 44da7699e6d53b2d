"""Augment mammograms, and iterate over them: the image generator, and the original's names of functions on images.

Images are (rows, columns), or (rows, columns, channels) with `data_format="channels_last"`; files hold 8- or
16-bit integers, networks get float32. What is done "as published" is what the program of 2017 did, and is tested
against its output.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mammo.base.files import InputError
from mammo.images.exams import DMCandidROIIterator, DMExamListIterator, clust_kpts, get_roi_patches
from mammo.images.file_iterators import DMDirectoryIterator, DMImgListIterator
from mammo.images.iterators import DMIterator, DMNumpyArrayIterator, index_balancer, to_sparse
from mammo.images.pixels import read_img_for_pred, read_resize_img
from mammo.images.warp import drop_equal_channels, shift_channels, transform_matrix, warp_nearest_edge
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
    """Augment images at random, standardise them, and make iterators over them (settings of Keras 2, as published).

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
        columns), channel_shift (float64, one a channel), flip_horizontal, flip_vertical. Draw order (as published):
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

        Nearest-neighbour warp, channel shift clipped to the warped image's range, flips (as published: same pixels as
        scipy.ndimage.affine_transform of order 0). Returns float32: `out`, contiguous and of the shape of `x`, or a
        new array. `x` is left as it is.
        """
        x = np.asarray(x, np.float32)
        if self.data_format == "channels_first":
            x = np.moveaxis(x, 0, -1)
        rows, columns, channels = x.shape
        x = drop_equal_channels(x)
        flips = params.get("flip_vertical", False), params.get("flip_horizontal", False)
        matrix = transform_matrix(params, rows, columns)
        if matrix is not None and self.fill_mode == "nearest":
            x = warp_nearest_edge(x, matrix, flips)
        else:
            if matrix is not None:
                x = self._warp_scipy(x, matrix)
            x = np.ascontiguousarray(x[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1])
        if self.data_format == "channels_last":
            return shift_channels(x, channels, params.get("channel_shift", 0.0), out)
        shifted = np.moveaxis(shift_channels(x, channels, params.get("channel_shift", 0.0)), -1, 0)
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
