"""Bring the pixels of mammograms to the form that networks get, and tell what form a trained model was given.

Files hold 8- or 16-bit integers (rows, columns); networks get float32, about 0..255 before the mean is subtracted.
The way is one object, `Pixels`; `read_resize_img` and `read_img_for_pred` are the original's functions for it.
"""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mammo.base import cli
from mammo.base.files import InputError, counted
from mammo.base.guards import read_json
from mammo.images.reading import check_grey, read_img, resize_as_asked

# The original's names of fields of `Pixels`, beside dup_3_channels and data_format.
_KEYWORDS = {"target_size": "size", "target_height": "height", "target_scale": "scale"}
_KEYWORDS |= {"rescale_factor": "factor", "equalize_hist": "equalize", "gs_255": "gs_255"}


@dataclass(frozen=True)
class Pixels:
    """Hold how the pixels of a file become the input of a network, in the order of the fields."""

    size: tuple[int, int] | None = None  # (rows, columns) to resize to, bicubic, in the stored integer type
    scale: float | None = None  # value that the image's own maximum becomes; None for no such scaling
    factor: float | None = None  # number that pixels are multiplied by; None for none
    equalize: bool = False  # whether to equalise the histogram, which needs pixels within 0..255
    mean: float | None = None  # number to subtract, which `centered` does and `read` does not; None for none
    channels: int = 0  # equal channels of the result; 0 for (rows, columns) alone
    height: int | None = None  # rows to resize to, the aspect ratio kept, whatever `size` is
    gs_255: bool = False  # whether to read 8-bit grey; see `reading.read_img`
    data_format: str = "channels_last"  # or "channels_first"

    @classmethod
    def of(cls, options: argparse.Namespace | Mapping[str, Any], channels: int = 0) -> "Pixels":
        """Return what the options of `cli.add_pixel_options` ask for, parsed or by name."""
        of = options if isinstance(options, Mapping) else vars(options)
        mean = of["featurewise_mean"] if of["featurewise_center"] else None
        return cls(tuple(of["img_size"]), of["img_scale"], of["rescale_factor"], of["equalize_hist"], mean, channels)

    @classmethod
    def of_model(cls, model_path: str | Path, channels: int = 0) -> "Pixels":
        """Return what a trained model was given, by `args.json` in its folder; what the published ones were without it.

        Raises InputError as `read_settings` does.
        """
        return cls.of(choose_pixel_options({}, model_path)[0], channels)

    @classmethod
    def of_keywords(cls, dup_3_channels: bool = False, data_format: str = "channels_last", **keywords) -> "Pixels":
        """Return what the original's keywords ask for: `target_size` and others of `read_img_for_pred`."""
        if unknown := sorted(set(keywords) - set(_KEYWORDS)):
            raise TypeError(f"unknown keywords: {', '.join(unknown)}")
        fields = {_KEYWORDS[name]: value for name, value in keywords.items()}
        return cls(channels=3 if dup_3_channels else 1, data_format=data_format, **fields)

    def read(self, file: str | Path) -> np.ndarray:
        """Return an image file as float32 network input, before mean subtraction; DICOM as `read_stored` reads it.

        The shape is (rows, columns[, channels]), or with the channels first. Raises InputError.
        """
        return self.to_input(file, self.resize(file, self.read_stored(file)))

    def read_stored(self, file: str | Path) -> np.ndarray:
        """Return the grey pixels of a file as stored, DICOM as the 16-bit PNG that data preparation makes of it."""
        return check_grey(file, read_img(file, self.gs_255, dicom_16_bit=True))

    def resize(self, file: str | Path, stored: np.ndarray) -> np.ndarray:
        """Return the pixels that were read from `file` in the size asked for, overshoots saturating."""
        return resize_as_asked(file, stored, self.size, self.height)

    def rescale(self, img: np.ndarray, name: str | Path = "image") -> np.ndarray:
        """Return a float32 copy of stored pixels, scaled, and equalised if asked: 0..255, truncated to 8 bits.

        Raises InputError, naming `name`, for pixels outside 0..255 that are to be equalised.
        """
        img = img.astype(np.float32)
        maximum = float(img.max())
        if self.scale is not None and maximum != 0:
            img *= float(self.scale) / maximum
        if self.factor is not None:
            img *= float(self.factor)
        if not self.equalize:
            return img
        low, high = float(img.min()), float(img.max())
        if low <= -1 or high >= 256:  # what truncation to 8 bits would wrap around, as the 2017 program did
            needs = "histogram equalisation needs an image within 0..255 after rescaling"
            raise InputError(f"{name}: {needs}. Received {low:g}..{high:g}; set a rescale factor or target scale.")
        return cv2.equalizeHist(img.astype(np.uint8)).astype(np.float32)

    def to_input(self, file: str | Path, resized: np.ndarray) -> np.ndarray:
        """Return resized pixels as `read` does. The channels are views of one: the augmentation warps it only once."""
        img = self.rescale(resized, file)
        if not self.channels:
            return img
        if self.data_format == "channels_first":
            return np.broadcast_to(img, (self.channels, *img.shape))
        return np.broadcast_to(img[..., np.newaxis], (*img.shape, self.channels))

    def centered(self, x: np.ndarray) -> np.ndarray:
        """Return network input less the mean."""
        return x if self.mean is None else x - np.float32(self.mean)


def pixels_of(arguments: Mapping[str, Any], data_format: str) -> Pixels:
    """Return how a function's arguments, its `locals()`, have images read: `pixels`, or the original's names."""
    named = {name: arguments[name] for name in (*_KEYWORDS, "dup_3_channels") if name in arguments}
    return replace(arguments["pixels"] or Pixels.of_keywords(**named), data_format=data_format)


def read_resize_img(
    fname: str | Path,
    target_size: tuple[int, int] | None = None,
    target_height: int | None = None,
    target_scale: float | None = None,
    gs_255: bool = False,
    rescale_factor: float | None = None,
    *,
    dicom_16_bit: bool = False,
) -> np.ndarray:
    """Read an image, resize it (bicubic), and return it as float32 (H, W) (as published).

    `target_size` is (rows, columns); `target_height` wins over it and keeps the aspect ratio, the width truncated.
    Resizing happens in the stored integer type. `target_scale` maps this image's maximum to that value,
    `rescale_factor` multiplies; `gs_255`, `dicom_16_bit`: see `read_img`. A colour file gives (H, W, C). Raises
    InputError.
    """
    pixels = Pixels(target_size, target_scale, rescale_factor, height=target_height)
    return pixels.rescale(pixels.resize(fname, read_img(fname, gs_255, dicom_16_bit)))


def read_img_for_pred(
    fname: str | Path,
    equalize_hist: bool = False,
    data_format: str = "channels_last",
    dup_3_channels: bool = True,
    transformer: Callable | None = None,
    standardizer: Callable | None = None,
    *,
    dicom_16_bit: bool = False,
    **kwargs,
) -> np.ndarray:
    """Read one image as network input: float32 (H, W, 3), (H, W, 1), or channels first.

    `dicom_16_bit` and `kwargs` are those of `read_resize_img`. `transformer` and `standardizer` (a generator's
    `random_transform` and `standardize`) are applied last, in this order. Raises InputError, for colour images too.
    """
    pixels = Pixels.of_keywords(dup_3_channels, data_format, equalize_hist=equalize_hist, **kwargs)
    stored = check_grey(fname, read_img(fname, pixels.gs_255, dicom_16_bit))
    x = pixels.to_input(fname, pixels.resize(fname, stored))
    for function in (transformer, standardizer):
        x = x if function is None else function(x)
    return np.ascontiguousarray(x)


def pixel_warnings(images: Sequence[np.ndarray], mean: float | None = None) -> list[str]:
    """Return what is wrong with float images before mean subtraction, of any shapes, or the `mean` to subtract, if any.

    Told are pixels far outside 0..255 or within a small part of it, else a mean that is less than half, or more than
    twice, the images' own, and by more than 16 another.
    """
    low, high = min(float(x.min()) for x in images), max(float(x.max()) for x in images)
    own = float(np.mean([x.mean(dtype=np.float64) for x in images]))
    number = counted(len(images), "image")
    if low < -64 or high > 320 or high < 32:
        wrong = f"pixels are far from the range 0..255 that networks expect. Received {low:.4g}..{high:.4g}"
        check = "check the rescale factor (0.003891 for 16-bit images, 1 for 8-bit ones) or the target scale."
        return [f"{wrong}, mean {own:.4g}, in {number}; {check}"]
    if mean is None or abs(mean - own) <= 16 or own / 2 <= mean <= own * 2:
        return []
    wrong = f"the mean that is subtracted, {mean:.4g} (featurewise mean), is far from the mean of {number}, {own:.4g}"
    return [f"{wrong}; check it, the rescale factor or scale, and that images were prepared as those of the training."]


def pixel_warnings_of_files(files: Sequence[str | Path], pixels: Pixels, nb_images: int = 32) -> list[str]:
    """Return the `pixel_warnings` of up to `nb_images` of the files, evenly spread, without those at fault."""
    images = []
    for index in np.linspace(0, len(files) - 1, min(nb_images, len(files))).astype(int):
        with contextlib.suppress(InputError):  # told when its turn comes
            images.append(pixels.read(files[index]))
    return pixel_warnings(images, pixels.mean) if images else []


# What the released models were trained with; their mean is that of the DDSM ones.
PUBLISHED_PIXELS = {"img_size": [1152, 896], "img_scale": None, "rescale_factor": 0.003891}
PUBLISHED_PIXELS |= {"featurewise_center": True, "featurewise_mean": 52.18, "equalize_hist": False}
PUBLISHED_PIXELS |= {"class_list": ["neg", "pos"]}


class _OfModel:
    """Stand as the default of options that the model's own training decides; None would be a choice of the user's."""

    def __repr__(self):
        return "the model's"


OF_MODEL = _OfModel()


def add_pixel_options_of_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cli.add_pixel_options` for a command that is given trained models."""
    cli.add_pixel_options(parser)
    for action in parser._actions:
        if action.dest in PUBLISHED_PIXELS and action.dest != "class_list" and action.help != argparse.SUPPRESS:
            action.default = OF_MODEL
            action.help = action.help.partition("; default")[0]


def choose_pixel_options(
    given: Mapping[str, Any],
    model_path: str | Path,
    built: Sequence[int | None] = (),
    published: Mapping[str, Any] = PUBLISHED_PIXELS,
) -> tuple[dict[str, Any], str]:
    """Return the pixel options, and `class_list`, to use with a model, and a sentence on where they come from.

    given: values by name, which win over what the model was trained with; those that are absent or OF_MODEL, or None
    for `class_list`, are not given. built: (rows, columns) that the model is built for, if known. published: what is
    used of models that tell nothing. Raises InputError as `read_settings` does, and where there is no mean to subtract.
    """
    chosen = {name: given[name] for name in published if given.get(name, OF_MODEL) is not OF_MODEL}
    if given.get("class_list") is None:
        chosen.pop("class_list", None)
    settings, file = read_settings(model_path), _settings_file(model_path)
    source = f"pixel options of the model's training, from {file}"
    if settings is None:
        settings = published | ({"img_size": list(built)} if built and None not in built else {})
        source = f"the published pixel options, since there is no {file}"
    if set(settings) - set(chosen) <= {"class_list"}:
        source = "pixel options as given"
    chosen = settings | chosen
    if chosen["featurewise_center"] and chosen["featurewise_mean"] is None:
        raise InputError(f"--featurewise-mean: Expected the mean that {model_path} was trained with. Received none")
    return chosen, source


def size_of_model(model_path: str | Path, built: Sequence[int | None] = ()) -> list[int] | None:
    """Return the size, [rows, columns], of a model's training images, else the one that it is built for; None if any.

    Raises InputError as `read_settings` does.
    """
    settings = read_settings(model_path)
    return settings["img_size"] if settings else list(built) if built and None not in built else None


def is_patch_size(size: Sequence[int | None]) -> bool:
    """Tell whether images of this size, (rows, columns), can be patches: square, and too small for a mammogram.

    The paper's patches have 224 rows; whole mammograms as small as 512 show no lesion.
    """
    return None not in size and size[0] == size[1] <= 512


def read_settings(model_path: str | Path) -> dict[str, Any] | None:
    """Return pixel options, and `class_list`, that a model was trained with, or None where they are not known.

    They are in `<model without ending>/args.json`, which the trainers write. Raises InputError for a damaged file.
    """
    path = _settings_file(model_path)
    content = read_json(path)
    if content is None:
        return None
    settings = {name: content[name] for name in PUBLISHED_PIXELS if name in content}
    if not _are_settings(settings):
        raise InputError(f"{path}: Expected the options of a training. Received others; remove the file to do without")
    return settings


def _settings_file(model_path) -> Path:
    return Path(model_path).with_suffix("") / "args.json"


def _are_settings(settings: dict[str, Any]) -> bool:
    """Return whether JSON values are pixel options, and a list of classes, of the right types."""
    if set(settings) != set(PUBLISHED_PIXELS):
        return False
    scale, factor, mean = (settings[name] for name in ("img_scale", "rescale_factor", "featurewise_mean"))
    size, classes = settings["img_size"], settings["class_list"]
    numbers = all(number is None or is_number(number) for number in (scale, factor, mean))
    sizes = isinstance(size, list) and len(size) == 2 and all(isinstance(length, int) and length > 0 for length in size)
    flags = all(isinstance(settings[name], bool) for name in ("featurewise_center", "equalize_hist"))
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    return numbers and sizes and flags and names and not (settings["featurewise_center"] and mean is None)


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number, whole ones included, and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
