"""Read mammograms from files: pixels as stored, (rows, columns) of 8- or 16-bit integers, and what headers tell."""

import io
import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from mammo.base import guards
from mammo.base.files import InputError, walk_files

if TYPE_CHECKING:
    from pydicom import Dataset

_IMAGE_NAME = re.compile(r"(.+)_(LEFT|RIGHT)_(CC|MLO)(?:_([2-9]|[1-9]\d+))?", re.DOTALL)

# What a decoder has to say about a broken file goes into our one-line error.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)  # OpenCV 4, 5

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", *DICOM_SUFFIXES)
PIXEL_TYPES = ("uint8", "uint16", "int16", "float32", "float64")

# How the kinds of images begin that are given to OpenCV, which reads others too: each decoder is one more to trust.
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Complete files of these kinds hold an end mark; libpng and libjpeg report its absence in ways we cannot catch.
_END_MARKS = {_SIGNATURES[0]: b"IEND", _SIGNATURES[1]: b"\xff\xd9"}

# Codes of SNOMED (old and new style) in the View Code Sequence.
_VIEW_CODES = {"R-10242": "CC", "399162004": "CC", "R-10226": "MLO", "399368009": "MLO"}

# What may be wrong with an image file.
CAUSES = ("unreadable", "empty", "truncated", "damaged", "refused", "wrong type")
CAUSES += ("not finite", "colour", "constant", "changed")


class ImageError(InputError):
    """An image file that cannot be used; `cause` is one of CAUSES."""

    def __init__(self, message: str, cause: str = "damaged"):
        super().__init__(message)
        self.cause = cause


def to_uint16(img: np.ndarray) -> np.ndarray:
    """Return 8-bit pixels times 257, so that 0..255 become 0..65535; 16-bit ones as they are. InputError for others."""
    if img.dtype == np.uint8:
        return img.astype(np.uint16) * np.uint16(257)
    if img.dtype == np.uint16:
        return img
    raise InputError(f"pixel type not supported here: Expected uint8 or uint16. Received {img.dtype}")


def faces_left(img: np.ndarray) -> bool:
    """Return whether the breast points to the left: most of the brightness, at the chest wall, is on the right."""
    half = img.shape[1] // 2
    return bool(img[:, :half].sum(dtype=np.float64) < img[:, -half:].sum(dtype=np.float64))


def auto_levels(img: np.ndarray) -> np.ndarray:
    """Stretch 16-bit pixels linearly so that the darkest becomes 0 and the brightest 65535."""
    lowest, highest = int(img.min()), int(img.max())
    if highest == lowest:
        raise InputError(f"the image is constant: Expected a picture. Received the value {lowest} everywhere")
    return np.rint((img.astype(np.float32) - lowest) * np.float32(65535 / (highest - lowest))).astype(np.uint16)


def parse_image_name(stem: str) -> tuple[str, str, str] | None:
    """Return (patient, side, view) of a prepared image's name without ending, None for names of another form.

    The form is <patient>_<LEFT|RIGHT>_<CC|MLO>[_<n>], n from 2 for further images of one view.
    """
    match = _IMAGE_NAME.fullmatch(stem)
    return match and match.group(1, 2, 3)


def is_image(fname: str | os.PathLike) -> bool:
    """Return whether a file in a folder of images is one of them, by its name. Hidden files are not."""
    name = os.path.basename(fname)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def find_images(sources: Iterable[str | os.PathLike]) -> list[Path]:
    """List the files named, and the images in the folders named, sorted; InputError for a folder without any."""
    images = []
    for source in map(Path, sources):
        found = [path for path in walk_files(source) if is_image(path)] if source.is_dir() else [source]
        if not found:
            raise InputError(f"{source}: no images here. Expected files named {', '.join(IMAGE_SUFFIXES)}")
        images += found
    return images


def read_img(fname: str | os.PathLike, gs_255: bool = False, dicom_16_bit: bool = False) -> np.ndarray:
    """Return the pixels of a PNG, JPEG, BMP, TIFF or DICOM file in the type they are stored in.

    They are (H, W), or (H, W, C) in OpenCV's channel order for a colour image. `gs_255` asks for 8-bit grey instead
    (no effect on DICOM, as in the 2017 program). DICOM: as stored, see `read_dicom`; with `dicom_16_bit` as the 16-bit
    PNG file that data preparation makes of it, see `read_dicom_16_bit`, so that networks get the same pixels of either
    file: that is how trainings, predictions and maps read images.
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
        expected = f"Expected one of {PIXEL_TYPES}. Received {img.dtype}."
        raise ImageError(f"{fname}: pixel type not supported. {expected}", "wrong type")
    if img.dtype.kind == "f" and not np.isfinite(img).all():
        raise ImageError(f"{fname}: the image holds NaN or infinite pixels.", "not finite")
    return img


def read_dicom(fname: str | os.PathLike, voi_lut: bool = False) -> "tuple[np.ndarray, tuple[int, int], Dataset]":
    """Return a DICOM file's pixels (H, W) as integers, (lowest, highest) value that they can have, and the dataset.

    The pixels are the stored values, without rescale slope; `voi_lut` applies the file's first display window or
    lookup table, if it has one, whose output is brought to the range of the stored bits. MONOCHROME1 is inverted
    within that range. Raises InputError as `read_img` does.
    """
    return _decode_dicom(fname, _read_image_bytes(fname), voi_lut)


def read_size(fname: str | os.PathLike) -> tuple[int, int]:
    """Return (rows, columns) of an image file by its header. InputError where it has none, or claims too many."""
    if str(fname).lower().endswith(DICOM_SUFFIXES):
        header = read_dicom_header(fname)
        return int(header.Rows), int(header.Columns)
    with _opened(fname, "PNG", "JPEG", "BMP", "TIFF") as image:
        return image.height, image.width


@contextmanager
def _opened(fname, *formats: str) -> Iterator[Image.Image]:
    """Open an image of the formats with Pillow, whose readers raise many kinds of errors, of its own limit too."""
    with guards.readable(fname, "not a readable image ({})"), Image.open(fname, formats=formats) as image:
        guards.check_pixels(fname, image.height, image.width)
        yield image


def read_dicom_header(fname: str | os.PathLike) -> "Dataset":
    """Return pydicom's dataset of a DICOM file, without its pixels. InputError where it is none of an image."""
    with guards.readable(fname, "cannot read the header of this DICOM file: {}"), open(fname, "rb") as file:
        dataset = _parse_dicom(fname, file, stop_before_pixels=True)
        guards.check_pixels(fname, int(dataset.Rows), int(dataset.Columns))
        return dataset


def _read_image_bytes(fname) -> bytes:
    data = guards.read_bytes(fname)
    if not data:
        raise ImageError(f"{fname}: the image file is empty (0 bytes).", "empty")
    return data


def _decode_image(fname, data: bytes, gs_255: bool) -> np.ndarray:
    for signature, end_mark in _END_MARKS.items():
        if data.startswith(signature) and end_mark not in data:
            missing = "truncated (its end mark is missing); copy it again."
            raise ImageError(f"{fname}: the image file is {missing}", "truncated")
    try:
        flags = cv2.IMREAD_GRAYSCALE if gs_255 else cv2.IMREAD_UNCHANGED
        img = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data.startswith(_SIGNATURES) else None
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in error.err:
            raise guards.too_many_pixels(fname, "more") from error
        if error.code == cv2.Error.StsNoMem:  # no fault of the image: it must not be left out for that
            raise MemoryError(f"{fname}: {error.err}") from error
        raise ImageError(f"{fname}: cannot decode this image: {error.err}.") from error
    if img is None:
        cause = "damaged" if data.startswith(_SIGNATURES) else "wrong type"
        expected = f"PNG, JPEG, BMP, TIFF or DICOM. Received {len(data)} bytes starting with {data[:8]!r}."
        kinds = "damaged, truncated or of another kind"
        raise ImageError(f"{fname}: not a readable image ({kinds}). Expected {expected}", cause)
    return img


def _parse_dicom(fname, file, **options):
    """Read a binary file with pydicom; InputError for one whose compressed content is larger than any image."""
    import pydicom
    from pydicom.filereader import _read_file_meta_info, read_preamble

    # Of a broken file it logs whole stack traces, besides raising what goes into our one-line error.
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    read_preamble(file, force=True)
    if _read_file_meta_info(file).get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), guards.max_unpacked_size() + 1)
        guards.check_unpacked_size(fname, len(unpacked))
    file.seek(0)
    return pydicom.dcmread(file, force=True, **options)


def _decode_dicom(fname, data: bytes, voi_lut: bool):
    try:
        dataset = _parse_dicom(fname, io.BytesIO(data))
        if "PixelData" not in dataset:
            raise ImageError(f"{fname}: this DICOM file holds no pixels.", "wrong type")
        frames = int(dataset.get("NumberOfFrames") or 1)
        if frames > 1:
            expected = f"Expected a single frame. Received {frames} frames."
            raise ImageError(f"{fname}: multi-frame DICOM. {expected}", "wrong type")
        guards.check_frame(fname, dataset)
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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "missing dependencies" in reason:
            syntax = dataset.file_meta.TransferSyntaxUID.name
            packages = "pylibjpeg " + ("pylibjpeg-openjpeg" if "2000" in syntax else "pylibjpeg-libjpeg")
            reason = f"it is compressed as {syntax}, which needs a decoder: pip install {packages}"
        raise ImageError(f"{fname}: cannot decode this DICOM file: {reason}") from error
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        img = (highest + lowest - np.clip(img, lowest, highest).astype(np.int32)).astype(img.dtype)
    return img, (lowest, highest), dataset


def _apply_voi_lut(img: np.ndarray, lowest: int, highest: int, dataset) -> np.ndarray:
    """Return stored pixels as the file's first display window or lookup table shows them, within lowest..highest."""
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


def check_grey(fname: str | os.PathLike, img: np.ndarray) -> np.ndarray:
    """Return `img` if it has one channel (H, W), else raise InputError."""
    if img.ndim != 2:
        expected = f"Expected one grey channel. Received shape {img.shape}"
        remedy = "Convert it to greyscale (or read it with gs_255)."
        raise ImageError(f"{fname}: colour image. {expected}. {remedy}", "colour")
    return img


def read_dicom_16_bit(
    fname: str | os.PathLike, voi_lut: bool = False, auto_levels: bool = False
) -> "tuple[np.ndarray, Dataset]":
    """Return the pixels (H, W) of a DICOM mammogram as uint16 over 0..65535, and pydicom's dataset.

    The lowest and highest values that its stored bits allow become 0 and 65535, with `auto_levels` the lowest and
    highest that it has. `voi_lut`: see `read_dicom`. Raises InputError for whatever is no such image.
    """
    img, limits, dataset = read_dicom(fname, voi_lut)
    check_constant(fname, check_grey(fname, img))
    if auto_levels:
        limits = int(img.min()), int(img.max())
    return _to_16_bit(fname, img, limits, dataset), dataset


def _to_16_bit(fname, img: np.ndarray, limits: tuple[int, int], dataset) -> np.ndarray:
    """Return grey pixels of a DICOM file as uint16, the (lowest, highest) values of `limits` as 0 and 65535."""
    check_grey(fname, img)
    photometric = dataset.get("PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2"):
        expected = f"Expected MONOCHROME1 or MONOCHROME2. Received {photometric}"
        raise ImageError(f"{fname}: not a grey image. {expected}", "wrong type")
    (lowest, highest), darkest, brightest = limits, int(img.min()), int(img.max())
    if darkest < lowest or brightest > highest:
        expected = f"Expected {lowest}..{highest}. Received {darkest}..{brightest}"
        misfit = f"pixels do not fit the {dataset.BitsStored} bits that the file's header tells"
        raise ImageError(f"{fname}: {misfit}. {expected}; prepare it with --auto-levels, or leave it out")
    scaled = np.empty(img.shape, np.uint16)
    for row, target in zip(img, scaled, strict=True):  # by rows, since float64 takes eight bytes a pixel
        target[...] = np.rint((row - float(lowest)) * (65535 / (highest - lowest)))
    return scaled


def check_constant(fname: str | os.PathLike, img: np.ndarray) -> np.ndarray:
    """Return `img` (H, W) if not all of its pixels are equal, else raise InputError."""
    if img.min() == img.max():
        raise ImageError(f"{fname}: constant image: all pixels are {img[0, 0]}.", "constant")
    return img


def read_resized(
    fname: str | os.PathLike, target_size: Sequence[int] | None = None, target_height: int | None = None
) -> np.ndarray:
    """Read, DICOM as 16 bits, and resize (bicubic) in the stored type, where overshoots saturate."""
    return resize_as_asked(fname, read_img(fname, dicom_16_bit=True), target_size, target_height)


def resize_as_asked(
    fname: str | os.PathLike, img: np.ndarray, target_size: Sequence[int] | None, target_height: int | None
) -> np.ndarray:
    """Resize (bicubic) an image that was read from the file `fname`; see `pixels.read_resize_img`."""
    if target_size is None and target_height is None:
        raise InputError("One of [target_size, target_height] must not be None")
    if target_height is not None:
        target_size = target_height, int(float(target_height) / img.shape[0] * img.shape[1])
    try:
        return resize(img, *map(int, target_size))
    except InputError as error:
        raise InputError(f"{fname}: {error}") from None


def resize(img: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (bicubic) in the stored integer type, to the same pixels as the published program.

    Intel's library, which OpenCV uses where it is built in, rounds some pixels otherwise; it is no faster here.
    Raises InputError for no pixels, or more than `guards.max_pixels`, as of a line that shall be an image high.
    """
    if height < 1 or width < 1 or height * width > guards.max_pixels():
        asked = f"{img.shape[:2]} to {height} rows x {width} columns"
        raise InputError(f"cannot resize {asked}: Expected 1 to {guards.max_pixels()} pixels.")
    use_ipp = cv2.ipp.useIPP()  # a setting of this thread
    cv2.ipp.setUseIPP(False)
    try:
        return cv2.resize(img, (width, height), interpolation=cv2.INTER_CUBIC)
    finally:
        cv2.ipp.setUseIPP(use_ipp)


def dicom_view(dataset: "Dataset") -> str:
    """Return the view that a DICOM header tells, CC, MLO or as it stands in ViewPosition; "" for none."""
    codes = dataset.get("ViewCodeSequence") or []
    views = [_VIEW_CODES.get(code.get("CodeValue")) for code in codes] + [dataset.get("ViewPosition")]
    if dataset.get("PatientOrientation") in ("CC", "MLO"):  # as in CBIS-DDSM
        views.append(dataset.PatientOrientation)
    return str(next(filter(None, views), ""))


def dicom_side(dataset: "Dataset") -> str:
    """Return L or R as the header tells; "" for neither."""
    return str(dataset.get("ImageLaterality") or dataset.get("Laterality") or "")


def read_mammogram(
    fname: str | os.PathLike, voi_lut: bool = False, auto_levels: bool = False
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the pixels (H, W) of an image file as uint8 or uint16, and facts about them.

    Facts: `bits` stored, `brightest` pixel, `photometric` interpretation of a DICOM file, else "". DICOM: see
    `reading.read_dicom_16_bit`. Grey pictures in three equal channels are taken as grey. Raises InputError for
    whatever is no picture of one channel of unsigned integers.
    """
    photometric = ""
    if is_dicom(fname):
        img, dataset = read_dicom_16_bit(fname, voi_lut, auto_levels)
        bits, photometric = int(dataset.BitsStored), str(dataset.PhotometricInterpretation)
    else:
        img = _read_pgm(fname) if str(fname).lower().endswith(".pgm") else read_img(fname)
        if img.ndim == 3 and all(np.array_equal(img[..., 0], img[..., channel]) for channel in (1, 2)):
            img = img[..., 0]
        check_constant(fname, check_grey(fname, img))
        if img.dtype.name not in ("uint8", "uint16"):
            raise InputError(f"{fname}: Expected 8- or 16-bit unsigned pixels. Received {img.dtype}")
        bits = 8 * img.dtype.itemsize
    return img, {"bits": bits, "brightest": int(img.max()), "photometric": photometric}


def _read_pgm(fname) -> np.ndarray:
    """Return the pixels (H, W) of a PGM file of 8 bits, as MIAS has them."""
    with _opened(fname, "PPM") as image:
        if image.mode != "L":
            raise InputError(f"{fname}: Expected a PGM file of 8 bits. Received one of the kind {image.mode}")
        return np.array(image)


def is_dicom(path: str | os.PathLike) -> bool:
    """Return whether a file is DICOM, by its name or its first bytes."""
    if str(path).lower().endswith(DICOM_SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:  # its reader says why
        return False
