"""What files from strangers may claim: limits that readers check before they reserve memory, and what they refuse.

Images, archives and HDF5 files say in their headers how large they will be, and few bytes can claim more than any
memory holds; HDF5 files can also say that their content is in another file. Only the standard library is imported at
the start, since every command line imports this.
"""

import errno
import json
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

from dm_files import InputError, env_int, one_line

# More than any mammogram has (films at 42 micrometres have 40 million), and so few that copies in float32 fit.
_MAX_PIXELS = 2**27
_PIXELS_OPTION = "DM_MAX_PIXELS"
# What content may take in memory: this, or so many times its file, where that is more.
_MAX_BYTES = 2**30
_MAX_EXPANSION = 64
_SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
# Groups within groups: Keras makes few, and HDF5 itself has no limit but its stack.
_MAX_DEPTH = 64

# OpenCV makes the same check of images before it decodes them. It takes its limit from the environment when it is
# imported, and ends the process where that is no number.
_given = os.environ.get(_PIXELS_OPTION, "")
os.environ.setdefault(
    "OPENCV_IO_MAX_IMAGE_PIXELS", _given if re.fullmatch(r"[1-9]\d{0,17}", _given) else str(_MAX_PIXELS)
)


def max_pixels() -> int:
    """The most pixels an image may have: DM_MAX_PIXELS, or 2**27. Raises InputError where that is no such number."""
    return env_int(_PIXELS_OPTION, _MAX_PIXELS, 1)


def too_many_pixels(where, claim: str) -> InputError:
    """The error for an image whose header claims too many pixels. where: its file. claim: how many, such as "more"."""
    return InputError(
        f"{where}: refused: its header claims {claim} pixels. Expected at most {max_pixels()}; where it is a whole "
        f"mammogram, set the environment variable {_PIXELS_OPTION}"
    )


def check_pixels(where, rows: int, columns: int) -> None:
    """Raise InputError for an image that claims more pixels than `max_pixels`. where: its file."""
    if rows * columns > max_pixels():
        raise too_many_pixels(where, f"{rows} x {columns}")


def max_bytes(file_size: int) -> int:
    """The most bytes of memory that the content of a file of so many bytes may take."""
    return max(_MAX_BYTES, _MAX_EXPANSION * file_size)


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file that is read as a whole. Raises InputError, for pipes and devices, which never end, too.

    Raises OSError where the machine lacks memory or open files: no file is left out for that.
    """
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise InputError(f"{path}: cannot be read: Expected a file. Received a pipe or device")
        return Path(path).read_bytes()
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a name that tables or maps give, with characters that no name has
        raise InputError(f"{one_line(str(path))}: cannot be read: {error}") from error


def parse_json(text: str | bytes):
    """json.loads, with a ValueError also for values that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_json(path: str | os.PathLike) -> dict | None:
    """The object in a JSON file that may be missing: None. Raises InputError for a damaged file, or another content."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file: {error}; remove it to do without") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: Expected a JSON object. Received {type(content).__name__}; remove it to do without")
    return content


def check_archive(path: str | os.PathLike, compressed: bool = False) -> None:
    """Raise InputError for a zip archive that claims too much memory, or whose members are compressed.

    compressed: whether they may be, for readers that unpack in small parts. Others unpack 2 GiB of a member at once,
    whatever size the archive claims; what they read, Keras and skops, is stored uncompressed.
    Raises zipfile.BadZipFile for damaged archives.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if not compressed and any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise InputError(f"{path}: refused: compressed. Expected an archive as it was saved; unpack it, and zip -0")
    check_bytes(path, sum(member.file_size for member in members), os.path.getsize(path))


def check_bytes(path, claimed: int, file_size: int) -> None:
    """Raise InputError where a file of `file_size` bytes claims to hold more bytes than `max_bytes`."""
    if claimed > max_bytes(file_size):
        raise InputError(
            f"{path}: refused: {file_size} bytes that claim to hold {claimed}. Expected at most {max_bytes(file_size)}"
        )


def check_h5(path: str | os.PathLike, h5, file_size: int) -> None:
    """Raise InputError for an open HDF5 file whose content is elsewhere, or claims too much memory.

    path: its name, for the error. h5: h5py.File. file_size: bytes of the file.
    Refused are links but those that any object has in its group, data of other files, groups within more groups than
    Keras makes, references, so many texts that the file would be far larger if each were another one, and chunks that
    unpack to more than they should.
    """
    import h5py

    def refuse(name, what):
        raise InputError(f"{path}: refused: {name[:200]!r} {what}. Expected numbers and names in the file itself")

    claimed, stored, texts, seen, waiting = 0, 0, 0, set(), [(h5, "/", 0)]
    while waiting:
        group, name, depth = waiting.pop()
        if name != "/" and not isinstance(group.get(name, getlink=True), h5py.HardLink):
            refuse(name, "is a link to another place")
        item = group[name]
        address = h5py.h5o.get_info(item.id).addr
        if address in seen:
            continue
        seen.add(address)
        holders = [item.attrs.get_id(attribute) for attribute in item.attrs]
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                refuse(name, "has its data in another file")
            claimed += item.nbytes
            stored += item.id.get_storage_size()
            if stored > file_size:
                refuse(name, "claims bytes beyond the end of the file")
            if item.chunks:
                chunk = math.prod(item.chunks) * item.dtype.itemsize
                check_bytes(path, chunk, file_size)  # which HDF5 reads as a whole
                if not _are_chunks(item, chunk):
                    refuse(name, "is compressed by other than gzip, or unpacks to another size than it claims")
            holders.append(item)
        elif isinstance(item, h5py.Group):
            if depth == _MAX_DEPTH:
                refuse(name, f"is a group within {depth} others")
            waiting += [(item, child, depth + 1) for child in item]
        for holder in holders:
            if holder.dtype.hasobject and h5py.check_string_dtype(holder.dtype) is None:
                refuse(name, "has references")
            if holder.dtype.hasobject:  # texts of any length, which may all be at one place of the file
                texts = max(texts, math.prod(holder.shape))
    check_bytes(path, claimed, file_size)
    check_bytes(path, texts * (file_size - stored), file_size)


def _are_chunks(dataset, size: int) -> bool:
    """Whether all chunks of an HDF5 data set unpack to `size` bytes, and are compressed by gzip, once, or not at all.

    HDF5 itself reserves memory for whatever the stream in a chunk makes, a thousand times its bytes.
    """
    from h5py import h5z

    settings = dataset.id.get_create_plist()
    filters = [settings.get_filter(i)[0] for i in range(settings.get_nfilters())]
    gzip = h5z.FILTER_DEFLATE
    if not {gzip, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}.issuperset(filters) or filters.count(gzip) > 1:
        return False
    chunks = []
    if gzip in filters:
        dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        if not chunk.filter_mask >> filters.index(gzip) & 1:  # else left as it is, since it would have grown
            _, data = dataset.id.read_direct_chunk(chunk.chunk_offset)
            try:
                if len(zlib.decompressobj().decompress(data, size + 1)) != size:
                    return False
            except zlib.error:
                return False
    return True
