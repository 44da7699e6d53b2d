"""Mammograms from files to network input: reading, resizing, cutting, labelling, augmenting.

The iterators that `DMImageDataGenerator` makes are in `dm_iterators`, since they need Keras and this does not.

Images are (rows, columns), or (rows, columns, channels) with `data_format="channels_last"`; files hold 8- or
16-bit integers, networks get float32. Rules marked "golden" are those of the published 2017 program.
"""

import io
import logging
import math
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

# First, since it sets a limit for OpenCV.
from dm_limits import check_pixels, max_pixels, read_bytes, too_many_pixels

# isort: split
import cv2
import numpy as np

from dm_files import InputError, counted, walk_files

# What a decoder has to say about a broken file goes into our one-line error.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, 5

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", *DICOM_SUFFIXES)
PIXEL_TYPES = ("uint8", "uint16", "int16", "float32", "float64")
# How the kinds of images begin that are given to OpenCV, which reads others too: each decoder is one more to trust.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Complete files of these kinds hold an end mark; libpng and libjpeg report its absence in ways we cannot catch.
_END_MARKS = {_SIGNATURES[0]: b"IEND", _SIGNATURES[1]: b"\xff\xd9"}
# Of a pixel of three 16-bit colours, with room for a header.
_MAX_PIXEL_BYTES = 8
# What may be wrong with an image file.
CAUSES = (
    *("unreadable", "empty", "truncated", "damaged", "refused", "wrong type"),
    *("not finite", "colour", "constant", "changed"),
)


class ImageError(InputError):
    """An image file that cannot be used; `cause` is one of CAUSES."""

    def __init__(self, message: str, cause: str = "damaged"):
        super().__init__(message)
        self.cause = cause


# ---------------------------------------------------------------------------------------------------- reading


def is_image(fname: str | os.PathLike) -> bool:
    """Is a file in a folder of images one of them, by its name? Hidden files are not."""
    name = os.path.basename(fname)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def find_images(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """The files named, and the images in the folders named, sorted; InputError for a folder without any."""
    images = []
    for source in map(Path, sources):
        found = [path for path in walk_files(source) if is_image(path)] if source.is_dir() else [source]
        if not found:
            raise InputError(f"{source}: no images here. Expected files named {', '.join(IMAGE_SUFFIXES)}")
        images += found
    return images


def read_img(fname: str | os.PathLike, gs_255: bool = False, dicom_16_bit: bool = False) -> np.ndarray:
    """Pixels of a PNG, JPEG, BMP, TIFF or DICOM file in the type they are stored in.

    Returns (H, W), or (H, W, C) in OpenCV's channel order for a colour image. `gs_255` asks for 8-bit grey
    instead (no effect on DICOM, as in the 2017 program). DICOM: as stored, see `read_dicom`; with `dicom_16_bit` as
    the 16-bit PNG file that data preparation makes of it, see `read_dicom_16_bit`, so that networks get the same
    pixels of either file: that is how trainings, predictions and maps read images.
    Raises InputError for whatever is not one readable image of finite numbers.
    """
    data = _read_image_bytes(fname)
    if data[128:132] == b"DICM" or str(fname).lower().endswith(DICOM_SUFFIXES):
        img, limits, dataset = _decode_dicom(fname, data, voi_lut=False)
        if dicom_16_bit:
            img = _to_16_bit(fname, img, limits, dataset)
    else:
        img = _decode_image(fname, data, gs_255)
    if img.dtype.name not in PIXEL_TYPES:
        raise ImageError(
            f"{fname}: pixel type not supported. Expected one of {PIXEL_TYPES}. Received {img.dtype}.", "wrong type"
        )
    if img.dtype.kind == "f" and not np.isfinite(img).all():
        raise ImageError(f"{fname}: the image holds NaN or infinite pixels.", "not finite")
    return img


def read_dicom(fname: str | os.PathLike, voi_lut: bool = False):
    """Pixels (H, W) of a DICOM file as integers, (lowest, highest) value that they can have, and pydicom's dataset.

    The pixels are the stored values, without rescale slope; `voi_lut` applies the file's first display window or
    lookup table, if it has one, whose output is brought to the range of the stored bits. MONOCHROME1 is inverted
    within that range. Raises InputError as `read_img` does.
    """
    return _decode_dicom(fname, _read_image_bytes(fname), voi_lut)


def read_size(fname: str | os.PathLike) -> tuple[int, int]:
    """(rows, columns) of an image file, from its header. Raises InputError where it has none, or claims too many."""
    if str(fname).lower().endswith(DICOM_SUFFIXES):
        header = read_dicom_header(fname)
        return int(header.Rows), int(header.Columns)
    from PIL import Image

    try:
        with Image.open(fname, formats=["PNG", "JPEG", "BMP", "TIFF"]) as image:
            rows, columns = image.height, image.width
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds, of its own limit of pixels too
        raise InputError(f"{fname}: not a readable image ({error})") from None
    check_pixels(fname, rows, columns)
    return rows, columns


def read_dicom_header(fname: str | os.PathLike):
    """pydicom's dataset of a DICOM file, without its pixels. Raises InputError where it is none of an image."""
    try:
        with open(fname, "rb") as file:
            dataset = _parse_dicom(fname, file, stop_before_pixels=True)
            rows, columns = int(dataset.Rows), int(dataset.Columns)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pydicom raises many kinds on damaged files
        raise InputError(f"{fname}: cannot read the header of this DICOM file: {_first_line(error)}") from error
    check_pixels(fname, rows, columns)
    return dataset


def _read_image_bytes(fname) -> bytes:
    data = read_bytes(fname)
    if not data:
        raise ImageError(f"{fname}: the image file is empty (0 bytes).", "empty")
    return data


def _decode_image(fname, data: bytes, gs_255: bool) -> np.ndarray:
    for signature, end_mark in _END_MARKS.items():
        if data.startswith(signature) and end_mark not in data:
            raise ImageError(
                f"{fname}: the image file is truncated (its end mark is missing); copy it again.", "truncated"
            )
    try:
        flags = cv2.IMREAD_GRAYSCALE if gs_255 else cv2.IMREAD_UNCHANGED
        img = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data.startswith(_SIGNATURES) else None
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            raise too_many_pixels(fname, "more") from error
        if error.code == cv2.Error.StsNoMem:  # no fault of the image: it must not be left out for that
            raise MemoryError(f"{fname}: {error.err}") from error
        raise ImageError(f"{fname}: cannot decode this image: {error.err}.") from error
    if img is None:
        raise ImageError(
            f"{fname}: not a readable image (damaged, truncated or of another kind). "
            f"Expected PNG, JPEG, BMP, TIFF or DICOM. Received {len(data)} bytes starting with {data[:8]!r}.",
            "damaged" if data.startswith(_SIGNATURES) else "wrong type",
        )
    return img


def _parse_dicom(fname, file, **options):
    """pydicom.dcmread of a binary file; InputError for one whose compressed content is larger than any image."""
    import pydicom
    from pydicom.filereader import _read_file_meta_info, read_preamble

    # Of a broken file it logs whole stack traces, besides raising what goes into our one-line error.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    read_preamble(file, force=True)
    if _read_file_meta_info(file).get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
        _check_size(fname, len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), _max_size() + 1)))
    file.seek(0)
    return pydicom.dcmread(file, force=True, **options)


def _max_size() -> int:
    return _MAX_PIXEL_BYTES * max_pixels()


def _check_size(fname, size: int) -> None:
    if size > _max_size():
        raise InputError(f"{fname}: refused: it unpacks to more than {_max_size()} bytes, which no image has")


def _check_frame(fname, dataset) -> None:
    """InputError for a DICOM image that claims, in its header or in compressed pixels, to be larger than any."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    check_pixels(fname, int(dataset.Rows), int(dataset.Columns))
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_encapsulated:
        return
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax != RLELossless:
        check_pixels(fname, *_codestream_size(frame))
    elif 64 * len(frame) > _max_size():  # what PackBits unpacks two bytes to
        _check_size(fname, _unpacked_size(frame[64:]))


def _codestream_size(frame: bytes) -> tuple[int, int]:
    """(rows, columns) in the header of a JPEG, JPEG-LS or JPEG 2000 codestream, (0, 0) for others.

    Decoders reserve memory by it, not by the header of the DICOM file.
    """
    if (start := frame.find(b"\xff\x4f\xff\x51", 0, 256)) >= 0:  # JPEG 2000, perhaps in a box
        width, height, left, top = struct.unpack_from(">4I", frame, start + 8)
        return height - top, width - left
    position = 2
    while frame[position : position + 1] == b"\xff" and position + 9 <= len(frame):
        marker, length = struct.unpack_from(">BH", frame, position + 1)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return struct.unpack_from(">HH", frame, position + 5)
        position += 1 if marker == 0xFF else 2 + length  # markers may have such bytes before them
    return 0, 0


def _unpacked_size(packed: bytes) -> int:
    """Bytes that PackBits data unpack to."""
    size = position = 0
    while position < len(packed):
        header = packed[position]
        size += header + 1 if header < 128 else (257 - header) % 129
        position += header + 2 if header < 128 else 2 - (header == 128)
    return size


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _decode_dicom(fname, data: bytes, voi_lut: bool):
    try:
        dataset = _parse_dicom(fname, io.BytesIO(data))
        if "PixelData" not in dataset:
            raise ImageError(f"{fname}: this DICOM file holds no pixels.", "wrong type")
        frames = int(dataset.get("NumberOfFrames") or 1)
        if frames > 1:
            raise ImageError(
                f"{fname}: multi-frame DICOM. Expected a single frame. Received {frames} frames.", "wrong type"
            )
        _check_frame(fname, dataset)
        bits = dataset.BitsStored
        # Bits above those stored are dropped where they may be overlays or lack the sign; in other files they show
        # that the header is wrong, and dropping them would wrap bright pixels around to dark ones.
        positions = [dataset.get((group, 0x0102)) for group in range(0x6000, 0x6020, 2)]
        overlays = any(position is not None and position.value for position in positions)
        dataset.pixel_array_options(correct_unused_bits=overlays or dataset.PixelRepresentation == 1)
        img = dataset.pixel_array
        lowest = -(2 ** (bits - 1)) if dataset.PixelRepresentation else 0
        highest = lowest + 2**bits - 1
        if voi_lut:
            img = _apply_voi_lut(img, lowest, highest, dataset)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # pydicom and its decoder plug-ins raise many kinds
        reason = _first_line(error)
        if "missing dependencies" in reason:
            syntax = dataset.file_meta.TransferSyntaxUID.name
            packages = "pylibjpeg " + ("pylibjpeg-openjpeg" if "2000" in syntax else "pylibjpeg-libjpeg")
            reason = f"it is compressed as {syntax}, which needs a decoder: pip install {packages}"
        raise ImageError(f"{fname}: cannot decode this DICOM file: {reason}") from error
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        img = (highest + lowest - np.clip(img, lowest, highest).astype(np.int32)).astype(img.dtype)
    return img, (lowest, highest), dataset


def _apply_voi_lut(img: np.ndarray, lowest: int, highest: int, dataset) -> np.ndarray:
    """What the file's first display window or lookup table makes of stored pixels, within lowest..highest."""
    from pydicom.pixels import apply_modality_lut, apply_windowing

    values = apply_modality_lut(img, dataset)
    if tables := dataset.get("VOILUTSequence"):
        # Not pydicom's apply_voi, which wraps the index of a table with more than 256 entries of 8 bits.
        _, first, bits = tables[0].LUTDescriptor
        entries = tables[0].LUTData
        entries = np.frombuffer(entries, "<u2") if isinstance(entries, bytes) else np.array(entries)
        shown = entries[np.clip(np.rint(values - float(first)), 0, len(entries) - 1).astype(int)]
        low, high = 0, 2**bits - 1
    elif dataset.get("WindowCenter") is not None:
        shown = apply_windowing(values, dataset)
        if modality := dataset.get("ModalityLUTSequence"):
            low, high = 0, 2 ** modality[0].LUTDescriptor[2] - 1
        else:
            slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
            low, high = lowest * slope + intercept, highest * slope + intercept
    else:
        return img
    return np.rint((shown - low) * ((highest - lowest) / (high - low)) + lowest).astype(img.dtype)


def check_grey(fname, img: np.ndarray) -> np.ndarray:
    """`img` if it has one channel (H, W), else InputError."""
    if img.ndim != 2:
        raise ImageError(
            f"{fname}: colour image. Expected one grey channel. Received shape {img.shape}. "
            "Convert it to greyscale (or read it with gs_255).",
            "colour",
        )
    return img


def read_dicom_16_bit(fname: str | os.PathLike, voi_lut: bool = False, auto_levels: bool = False):
    """Pixels (H, W) of a DICOM mammogram as uint16 over 0..65535, and pydicom's dataset.

    The lowest and highest values that its stored bits allow become 0 and 65535, with `auto_levels` the lowest and
    highest that it has. `voi_lut`: see `read_dicom`. Raises InputError for whatever is no such image.
    """
    img, limits, dataset = read_dicom(fname, voi_lut)
    check_constant(fname, check_grey(fname, img))
    if auto_levels:
        limits = int(img.min()), int(img.max())
    return _to_16_bit(fname, img, limits, dataset), dataset


def _to_16_bit(fname, img: np.ndarray, limits: tuple[int, int], dataset) -> np.ndarray:
    """Grey pixels of a DICOM file as uint16, the (lowest, highest) values of `limits` as 0 and 65535."""
    check_grey(fname, img)
    photometric = dataset.get("PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError(
            f"{fname}: not a grey image. Expected MONOCHROME1 or MONOCHROME2. Received {photometric}", "wrong type"
        )
    (lowest, highest), darkest, brightest = limits, int(img.min()), int(img.max())
    if darkest < lowest or brightest > highest:
        raise ImageError(
            f"{fname}: pixels do not fit the {dataset.BitsStored} bits that the file's header tells. Expected "
            f"{lowest}..{highest}. Received {darkest}..{brightest}; prepare it with --auto-levels, or leave it out",
            "damaged",
        )
    scaled = np.empty(img.shape, np.uint16)
    for row, target in zip(img, scaled, strict=True):  # by rows, since float64 takes eight bytes a pixel
        target[...] = np.rint((row - float(lowest)) * (65535 / (highest - lowest)))
    return scaled


def check_constant(fname, img: np.ndarray) -> np.ndarray:
    """`img` (H, W) if not all of its pixels are equal, else InputError."""
    if img.min() == img.max():
        raise ImageError(f"{fname}: constant image: all pixels are {img[0, 0]}.", "constant")
    return img


def read_resized(fname, target_size=None, target_height=None) -> np.ndarray:
    """Read, DICOM as 16 bits, and resize (bicubic) in the stored type, where overshoots saturate."""
    return resize_as_asked(fname, read_img(fname, dicom_16_bit=True), target_size, target_height)


def resize_as_asked(fname, img: np.ndarray, target_size=None, target_height=None) -> np.ndarray:
    """Resize (bicubic) an image that was read from the file `fname`; see `read_resize_img`."""
    if target_size is None and target_height is None:
        raise InputError("One of [target_size, target_height] must not be None")
    if target_height is not None:
        target_size = target_height, int(float(target_height) / img.shape[0] * img.shape[1])
    try:
        return resize(img, *map(int, target_size))
    except InputError as error:
        raise InputError(f"{fname}: {error}") from None


def resize(img: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic resizing in the stored integer type, to the same pixels as the published program.

    Intel's library, which OpenCV uses where it is built in, rounds some pixels otherwise; it is no faster here.
    Raises InputError for no pixels, or more than `dm_limits.max_pixels`, as of a line that shall be an image high.
    """
    if height < 1 or width < 1 or height * width > max_pixels():
        raise InputError(
            f"cannot resize {img.shape[:2]} to {height} rows x {width} columns: Expected 1 to {max_pixels()} pixels."
        )
    use_ipp = cv2.ipp.useIPP()  # a setting of this thread
    cv2.ipp.setUseIPP(False)
    try:
        return cv2.resize(img, (width, height), interpolation=cv2.INTER_CUBIC)
    finally:
        cv2.ipp.setUseIPP(use_ipp)


def scale_pixels(img: np.ndarray, target_scale=None, rescale_factor=None) -> np.ndarray:
    """float32 copy of stored pixels, scaled so that this image's maximum is target_scale, then by rescale_factor."""
    img = img.astype(np.float32)
    maximum = float(img.max())
    if target_scale is not None and maximum != 0:
        img *= float(target_scale) / maximum
    if rescale_factor is not None:
        img *= float(rescale_factor)
    return img


def read_resize_img(
    fname: str | os.PathLike,
    target_size: tuple[int, int] | None = None,
    target_height: int | None = None,
    target_scale: float | None = None,
    gs_255: bool = False,
    rescale_factor: float | None = None,
    dicom_16_bit: bool = False,
) -> np.ndarray:
    """Read an image, resize it (bicubic), and return it as float32 (H, W) (golden).

    `target_size` is (rows, columns); `target_height` wins over it and keeps the aspect ratio, the width truncated.
    Resizing happens in the stored integer type. `target_scale` maps this image's maximum to that value,
    `rescale_factor` multiplies; `gs_255`, `dicom_16_bit`: see `read_img`. A colour file gives (H, W, C). Raises
    InputError.
    """
    img = resize_as_asked(fname, read_img(fname, gs_255, dicom_16_bit), target_size, target_height)
    return scale_pixels(img, target_scale, rescale_factor)


def equalize_histogram(img: np.ndarray, name="image") -> np.ndarray:
    """Histogram equalisation of a float (H, W) image within 0..255, truncated to 8 bits; float32 0..255.

    The 2017 program wrapped values outside around; here they raise InputError naming `name`.
    """
    low, high = float(img.min()), float(img.max())
    if low <= -1 or high >= 256:  # just what truncation to 8 bits keeps within range
        raise InputError(
            f"{name}: histogram equalisation needs an image within 0..255 after rescaling. "
            f"Received {low:g}..{high:g}; set a rescale factor or target scale."
        )
    return cv2.equalizeHist(img.astype(np.uint8)).astype(np.float32)


def to_network_input(
    fname, img, equalize_hist, data_format, dup_3_channels, transformer=None, standardizer=None
) -> np.ndarray:
    """(H, W) float32 to the (possibly augmented) tensor of one sample."""
    img = check_grey(fname, img)
    if equalize_hist:
        img = equalize_histogram(img, fname)
    axis = 0 if data_format == "channels_first" else 2
    x = np.expand_dims(img, axis)
    if dup_3_channels:
        # A view that repeats the channel: the augmentation then warps it only once.
        x = np.broadcast_to(x, tuple(3 if i == axis else n for i, n in enumerate(x.shape)))
    if transformer is not None:
        x = transformer(x)
    if standardizer is not None:
        x = standardizer(x)
    return x


def read_img_for_pred(
    fname: str | os.PathLike,
    equalize_hist: bool = False,
    data_format: str = "channels_last",
    dup_3_channels: bool = True,
    transformer: Callable | None = None,
    standardizer: Callable | None = None,
    **kwargs,
) -> np.ndarray:
    """Read one image as network input: float32 (H, W, 3), (H, W, 1), or channels first.

    `kwargs` go to `read_resize_img`. `transformer` and `standardizer` (a generator's `random_transform` and
    `standardize`) are applied last, in this order. Raises InputError, for colour images too.
    """
    img = read_resize_img(fname, **kwargs)
    return np.ascontiguousarray(
        to_network_input(fname, img, equalize_hist, data_format, dup_3_channels, transformer, standardizer)
    )


# ---------------------------------------------------------------------------------------- cutting and windows


def crop_img(img: np.ndarray, bbox: tuple[int, int, int, int]) -> np.ndarray:
    """View of the box (x, y, width, height) of an image (H, W)."""
    x, y, width, height = bbox
    return img[y : y + height, x : x + width]


def add_img_margins(img: np.ndarray, margin_size: int) -> np.ndarray:
    """Copy of an image (H, W) with a zero margin of `margin_size` pixels on each side."""
    return np.pad(img, margin_size)


def get_roi_patches(img: np.ndarray, key_pts, roi_size: tuple[int, int] = (256, 256)) -> np.ndarray:
    """Patches (n, rows, columns) around the points (n, 2) of x, y, in the type of `img` (golden).

    A patch that would start before the image is moved to start with it; beyond its end it is zero.
    """
    rows, columns = roi_size
    patches = np.zeros((len(key_pts), rows, columns), img.dtype)
    for patch, (x, y) in zip(patches, key_pts, strict=True):
        top, left = max(int(y - rows // 2), 0), max(int(x - columns // 2), 0)
        inside = img[top : top + rows, left : left + columns]
        patch[: inside.shape[0], : inside.shape[1]] = inside
    return patches


def clust_kpts(key_pts, nb_clust: int, seed: int = 12345) -> np.ndarray:
    """Centres (nb_clust, 2) of a k-means clustering of the points (n, 2) of x, y."""
    from sklearn.cluster import KMeans

    return KMeans(nb_clust, n_init=10, random_state=seed).fit(np.asarray(key_pts, np.float32)).cluster_centers_


def window_grid(img_shape: tuple[int, int], patch_size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """First rows and first columns of the windows that sweep an image, the leftover split to both sides (golden)."""

    def starts(length):
        if length < patch_size or stride < 1:
            raise InputError(
                f"Expected windows within the image and a stride of at least 1. "
                f"Received patch_size {patch_size}, stride {stride} for an image of {img_shape}."
            )
        leftover = (length - patch_size) % stride
        return np.arange(leftover // 2, length - patch_size + 1, stride)

    return starts(img_shape[0]), starts(img_shape[1])


def cut_window(img, top, left, patch_size, target_scale=None, equalize_hist=False, rescale_factor=None) -> np.ndarray:
    """float32 (patch_size, patch_size): one window of a sweep; see `sweep_img_patches`, `scale_pixels`."""
    window = scale_pixels(img[top : top + patch_size, left : left + patch_size], target_scale, rescale_factor)
    return equalize_histogram(window) if equalize_hist else window


def sweep_img_patches(
    img: np.ndarray,
    patch_size: int,
    stride: int,
    target_scale: float | None = None,
    equalize_hist: bool = False,
) -> tuple[np.ndarray, int, int]:
    """All windows of an image (H, W): float32 (n, patch_size, patch_size) row by row, rows and columns of the grid.

    Each window is scaled by its own maximum to `target_scale`, then equalised if asked (golden).
    """
    tops, lefts = window_grid(img.shape, patch_size, stride)
    windows = [cut_window(img, top, left, patch_size, target_scale, equalize_hist) for top in tops for left in lefts]
    return np.stack(windows), len(tops), len(lefts)


def get_prob_heatmap(
    img_list,
    target_height: int,
    target_scale: float | None,
    patch_size: int,
    stride: int,
    model,
    batch_size: int,
    featurewise_center: bool = False,
    featurewise_mean: float = 91.6,
    preprocess: Callable | None = None,
    parallelized: bool = False,
    equalize_hist: bool = False,
) -> list[np.ndarray | None]:
    """Class probabilities of a patch classifier at the windows sweeping each image (golden).

    The image is read at `target_height`, the breast cut out and padded by patch_size // 2 zeros, and each window
    scaled by its own maximum to `target_scale`. At most `batch_size` windows are held at a time.

    Args:
        img_list: a file name, a list of them, or None.
        model: Keras model of patches (patch_size, patch_size, channels) to class probabilities.
        preprocess: applied to a batch of windows (n, patch_size, patch_size, channels) before the mean.
        parallelized: ignored; kept for old scripts.

    Returns a list of float32 arrays (grid rows, grid columns, classes), [None] for None.
    """
    from dm_heatmap_score import Sweep  # which stands on this module

    if img_list is None:
        return [None]
    if isinstance(img_list, (str, os.PathLike)):
        img_list = [img_list]
    sweep = Sweep(
        model,
        target_height,
        patch_size,
        stride,
        batch_size,
        target_scale=target_scale,
        equalize_hist=equalize_hist,
        mean=featurewise_mean if featurewise_center else 0.0,
        preprocess=preprocess,
    )
    return [sweep.score(sweep.read(fname)) for fname in img_list]


# ------------------------------------------------------------------------------------- labels and class balance


def to_sparse(y) -> np.ndarray:
    """Class numbers of labels that are one-hot rows (n, classes) or class numbers (n,) already.

    Raises ValueError when a row is not one-hot, TypeError for arrays of more than two dimensions.
    """
    y = np.asarray(y)
    if y.ndim == 1:
        return y
    if y.ndim != 2:
        raise TypeError(f"Labels: Expected shape (n,) or (n, classes). Received {y.shape}.")
    if not (np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all()):
        raise InputError("Labels: Expected one-hot rows (a single 1, else 0). Received rows that are not.")
    return y.argmax(axis=1)


def index_balancer(index_array, classes, ratio: float, rng) -> np.ndarray:
    """Draw len(index_array) of its elements with replacement, sorted, negatives to positives as `ratio` to 1 (golden).

    classes: (n,) class numbers, 1 being positive and all others negative. With a single kind, all are equally likely.
    rng: NumPy RandomState (or Generator).
    """
    index_array, positive = np.asarray(index_array), np.asarray(classes) == 1
    nb_positive = positive.sum()
    probability = np.ones(len(index_array))
    if 0 < nb_positive < len(positive):
        probability = np.where(positive, 1 / nb_positive, ratio / (len(positive) - nb_positive))
    return np.sort(rng.choice(index_array, len(index_array), p=probability / probability.sum()))


# ----------------------------------------------------------------------------------------------- augmentation


class DMImageDataGenerator:
    """Random augmentation, standardisation, and iterators over images (Keras 2 settings, golden numbers).

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
        data_format: "channels_last" (default) or "channels_first".

    All are attributes of the same names and may be changed after construction.
    """

    def __init__(
        self,
        featurewise_center=False,
        samplewise_center=False,
        featurewise_std_normalization=False,
        samplewise_std_normalization=False,
        rotation_range=0.0,
        width_shift_range=0.0,
        height_shift_range=0.0,
        shear_range=0.0,
        zoom_range=0.0,
        channel_shift_range=0.0,
        fill_mode="nearest",
        cval=0.0,
        horizontal_flip=False,
        vertical_flip=False,
        rescale=None,
        preprocessing_function=None,
        data_format=None,
    ):
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
        self.data_format = data_format or "channels_last"
        if self.data_format not in ("channels_last", "channels_first"):
            raise InputError(f"data_format: Expected channels_last or channels_first. Received {data_format!r}.")
        self.mean = None
        self.std = None

    def get_random_transform(self, img_shape, rng) -> dict:
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

    def random_transform(self, x: np.ndarray, seed=None) -> np.ndarray:
        """Draw a transform and apply it. `seed`: an integer, a NumPy Generator or RandomState, or None for fresh
        entropy; an integer seeds a RandomState, as the 2017 program did."""
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

    # -- iterators: `keras.utils.PyDataset`s, see dm_iterators

    def flow(self, X, y=None, batch_size=32, **kwargs):
        """Iterate over arrays; see `dm_iterators.ArrayIterator`."""
        from dm_iterators import ArrayIterator

        return ArrayIterator(self, X, y, batch_size, **kwargs)

    def flow_from_directory(self, directory, target_size=(256, 256), **kwargs):
        """Iterate over image files in one folder a class; see `dm_iterators.DirectoryIterator`."""
        from dm_iterators import DirectoryIterator

        return DirectoryIterator(self, directory, target_size, **kwargs)

    def flow_from_img_list(self, img_list, lab_list=None, **kwargs):
        """Iterate over a list of image files; see `dm_iterators.ImageListIterator`."""
        from dm_iterators import ImageListIterator

        return ImageListIterator(self, img_list, lab_list, **kwargs)

    def flow_from_exam_list(self, exam_list, **kwargs):
        """Iterate over exams, two breasts of two views each; see `dm_iterators.ExamIterator`."""
        from dm_iterators import ExamIterator

        return ExamIterator(self, exam_list, **kwargs)

    def flow_from_candid_roi(self, img_list, lab_list=None, **kwargs):
        """Iterate over patches around bright spots; see `dm_iterators.CandidateRoiIterator`."""
        from dm_iterators import CandidateRoiIterator

        return CandidateRoiIterator(self, img_list, lab_list, **kwargs)


def transform_matrix(params: dict, rows: int, columns: int) -> np.ndarray | None:
    """3x3 matrix from output to input (row, column, 1) of a drawn transform; None when it moves nothing (golden).

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


def empty_aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised float32 array that starts at a cache line.

    OpenCV then writes images into it past the cache, which keeps what it reads: twice as fast for large images.
    """
    size = math.prod(shape)
    memory = np.empty(size + 15, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + size].reshape(shape)


def _buffer(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """This thread's float32 array of that name; what it held before is lost."""
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.shape != shape:
        buffer = empty_aligned(shape)
        setattr(_buffers, name, buffer)
    return buffer


def _drop_equal_channels(x: np.ndarray) -> np.ndarray:
    """(H, W, 1) when all channels of (H, W, C) are equal, so that one is warped; free for a broadcast view."""
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
    """Pixels (i, j) where a coordinate by_row[k, i] + by_column[k, j], k = 0 or 1, is within `tolerance` of n + 1/2.

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


# --------------------------------------------------------------------------------------------------- checking


def check_pixel_stats(iterator, nb_images: int = 32) -> list[str]:
    """Warnings about the pixel values that a network will see, with the values measured on up to `nb_images` images.

    Told are: images before mean subtraction far outside 0..255 or within a small part of it (a wrong rescale factor
    or target scale), and a generator's mean far from the images' mean. Batches of file and array iterators only.
    """
    generator = iterator.generator
    return pixel_warnings(sample_images(iterator, nb_images), generator.mean if generator.featurewise_center else None)


def sample_images(iterator, nb_images: int = 32) -> list[np.ndarray]:
    """Up to `nb_images` images of a file or array iterator, evenly spread, before augmentation and mean subtraction."""
    chosen = np.linspace(0, iterator.nb_sample - 1, min(nb_images, iterator.nb_sample)).astype(int)
    images = [image for image in map(iterator.load_or_lose, chosen) if image is not None]
    return [image * iterator.generator.rescale for image in images] if iterator.generator.rescale else images


def pixel_warnings(images, mean=None) -> list[str]:
    """Warnings about float images before mean subtraction, of any shapes, and the `mean` to subtract, or None."""
    low = min(float(x.min()) for x in images)
    high = max(float(x.max()) for x in images)
    own = float(np.mean([x.mean() for x in images], dtype=np.float64))
    measured = f"Received {low:.4g}..{high:.4g}, mean {own:.4g}, in {counted(len(images), 'image')}"
    messages = []
    if low < -64 or high > 320 or high < 32:
        messages.append(
            f"pixels are far from the range 0..255 that networks expect. {measured}; check the rescale factor "
            "(0.003891 for 16-bit images, 1 for 8-bit ones) or the target scale."
        )
    if mean is not None:
        asked = float(np.mean(mean))
        if abs(asked - own) > max(16.0, 0.5 * abs(own)):
            messages.append(
                f"the mean that is subtracted, {asked:.4g} (featurewise mean), is far from the images' own, "
                f"{own:.4g} in {len(images)} of them."
            )
    return messages
