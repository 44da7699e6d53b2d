"""Guard against files from strangers: limits checked before memory is reserved, and refusals of what could run code.

Images, archives and HDF5 files say in their headers how large they will be, and few bytes can claim more than any
memory holds; HDF5 files can also say that their content is in another file; models, classifiers and pickles can name
code. SECURITY.md says what is promised. The guard of pickles is `mammo.base.unpickle`. Only the standard library is
imported at the start, since every command line imports this.
"""

import errno
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mammo.base.files import InputError, env_int, one_line

if TYPE_CHECKING:
    import h5py
    import pydicom

# --------------------------------------------------------------------------------------------------------------- sizes

# More than any mammogram has (films at 42 micrometres have 40 million), and so few that copies in float32 fit.
_MAX_PIXELS = 2**27
_PIXELS_OPTION = "DM_MAX_PIXELS"

# What content may take in memory: this, or so many times its file, where that is more.
_MAX_BYTES = 2**30
_MAX_EXPANSION = 64
_SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)

# OpenCV makes the same check of images before it decodes them. It takes its limit from the environment when it is
# imported, and ends the process where that is no number.
_given = os.environ.get(_PIXELS_OPTION, "")
os.environ.setdefault(
    "OPENCV_IO_MAX_IMAGE_PIXELS", _given if re.fullmatch(r"[1-9]\d{0,17}", _given) else str(_MAX_PIXELS)
)


def max_pixels() -> int:
    """Return the most pixels an image may have: DM_MAX_PIXELS, or 2**27. Raises InputError where it is no number."""
    return env_int(_PIXELS_OPTION, _MAX_PIXELS, 1)


def too_many_pixels(where: str | os.PathLike, claim: str) -> InputError:
    """Return the error for an image of too many pixels. where: its file. claim: how many it has, such as "more"."""
    remedy = f"where it is a whole mammogram, set the environment variable {_PIXELS_OPTION}"
    return InputError(f"{where}: refused: its header claims {claim} pixels. Expected at most {max_pixels()}; {remedy}")


def check_pixels(where: str | os.PathLike, rows: int, columns: int) -> None:
    """Raise InputError for an image that claims more pixels than `max_pixels`. where: its file."""
    if rows * columns > max_pixels():
        raise too_many_pixels(where, f"{rows} x {columns}")


def max_bytes(file_size: int) -> int:
    """Return the most bytes of memory that the content of a file of so many bytes may take."""
    return max(_MAX_BYTES, _MAX_EXPANSION * file_size)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Return the content of a file that is read as a whole.

    Raises InputError where it cannot be read, and for pipes and devices, which never end; OSError where the machine
    lacks memory or open files: no file is left out for that.
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


# ------------------------------------------------------------------------------------------------------- damaged files


@contextmanager
def readable(path: str | os.PathLike, complaint: str, kind: type[InputError] = InputError) -> Iterator[None]:
    """Raise one line for whatever a library raises in the block on a damaged file: its `path` and the complaint.

    complaint: what is wrong and what to do, with {} for the library's own words. InputError passes as it is, since it
    says enough; so do MemoryError and OSError for want of memory or open files, which are no fault of the file.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _SHORTAGES:
            raise
        reason = one_line(str(error), 400) or type(error).__name__
        raise kind(f"{path}: {complaint.format(reason)}") from error


def parse_json(text: str | bytes) -> Any:
    """Read JSON as json.loads does, with a ValueError also for values that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def read_json(path: str | os.PathLike) -> dict | None:
    """Return the object in a JSON file, None where it is missing. Raises InputError for any other content."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file: {error}; remove it to do without") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: Expected a JSON object. Received {type(content).__name__}; remove it to do without")
    return content


# --------------------------------------------------------------------------------------------------- archives and HDF5


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


def check_bytes(path: str | os.PathLike, claimed: int, file_size: int) -> None:
    """Raise InputError where a file of `file_size` bytes claims to hold more bytes than `max_bytes`."""
    if claimed > (most := max_bytes(file_size)):
        raise InputError(f"{path}: refused: {file_size} bytes that claim to hold {claimed}. Expected at most {most}")


# Groups within groups: Keras makes few, and HDF5 itself has no limit but its stack.
_MAX_DEPTH = 64


def check_h5(path: str | os.PathLike, h5: "h5py.File", file_size: int) -> None:
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
    """Tell whether all chunks of an HDF5 data set unpack to `size` bytes, by gzip once or not at all.

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


# ------------------------------------------------------------------------------------------------------- image headers

# A pixel of three 16-bit colours, with room for a header.
_MAX_PIXEL_BYTES = 8


def max_unpacked_size() -> int:
    """Return the most bytes that the pixels of an image may unpack to."""
    return _MAX_PIXEL_BYTES * max_pixels()


def check_unpacked_size(fname: str | os.PathLike, size: int) -> None:
    """Raise InputError for pixels that unpack to more bytes than any image has."""
    if size > max_unpacked_size():
        raise InputError(f"{fname}: refused: it unpacks to more than {max_unpacked_size()} bytes, which no image has")


def check_frame(fname: str | os.PathLike, dataset: "pydicom.Dataset") -> None:
    """Raise InputError for a DICOM image larger than any, by its header or by its compressed pixels."""
    from pydicom.encaps import get_frame
    from pydicom.uid import RLELossless

    check_pixels(fname, int(dataset.Rows), int(dataset.Columns))
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_encapsulated:
        return
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if syntax != RLELossless:
        check_pixels(fname, *_codestream_size(frame))
    elif 64 * len(frame) > max_unpacked_size():  # what PackBits unpacks two bytes to
        check_unpacked_size(fname, _unpacked_size(frame[64:]))


def _codestream_size(frame: bytes) -> tuple[int, int]:
    """Return (rows, columns) in the header of a JPEG, JPEG-LS or JPEG 2000 codestream, (0, 0) for others.

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
    """Return the number of bytes that PackBits data unpack to."""
    size = position = 0
    while position < len(packed):
        header = packed[position]
        size += header + 1 if header < 128 else (257 - header) % 129
        position += header + 2 if header < 128 else 2 - (header == 128)
    return size


# -------------------------------------------------------------------------------------------------------- Keras models

# What a .keras archive holds. Others are for layers that this refuses, such as vocabularies.
MODEL_MEMBERS = {"metadata.json", "config.json", "model.weights.h5"}

# Modules of Keras whose names in a file may be looked up: others download, read and write files.
_MODULES = re.compile(
    r"keras|builtins|keras\.src\..+|keras\.(layers|models|ops|activations|initializers|regularizers|constraints|"
    r"dtype_policies|losses|metrics|optimizers(\.\w+)*)"
)

# Layers that hold code of another library, or read a file that their configuration names.
_UNSAFE_LAYERS = {
    *("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer"),
    *("StringLookup", "IntegerLookup", "TextVectorization"),
}

# What Keras writes for the slices in a network's arithmetic, and for its constants: these with the dtype of numbers,
# since texts can be of any length.
_SPECIAL = {"__keras_tensor__", "__ellipsis__", "__slice__"}
_CONSTANTS = {"__numpy__", "__tensor__"}
_NUMBERS = re.compile(r"bool|b?float\d+|u?int\d+")


def refuse_code(node: object, path: Path) -> None:
    """Raise InputError where building the model described would run code, read files, or make texts of any length."""
    if isinstance(node, dict):
        name = node.get("class_name")
        module = node.get("module") or "keras"
        names = [name, node.get("config") if name == "function" else None, node.get("registered_name")]
        if name in ("Lambda", "__lambda__"):
            code = "Lambda layer, whose Python code is stored in the file"
        elif name in _UNSAFE_LAYERS:
            code = f"{name} layer"
        elif isinstance(name, str) and name.startswith("__") and name not in _SPECIAL and not _is_constant(node):
            code = f"{name} other than numbers"
        elif name and not (isinstance(module, str) and _MODULES.fullmatch(module)):
            code = f"object from the Python module {module}"
        elif any(isinstance(text, str) and "." in text for text in names):
            code = f"object {'.'.join(filter(None, names))}"
        else:
            code = None
        if code:
            refused = "refused, because opening it runs code from outside Keras, or takes any memory"
            remedy = "If you trust where the file comes from, open it with --trust-checkpoint"
            raise InputError(f"{path}: {refused} ({code}). {remedy}")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            refuse_code(child, path)


def _is_constant(node: dict) -> bool:
    """Tell whether a node is a constant of numbers."""
    config = node.get("config")
    is_number = isinstance(config, dict) and _NUMBERS.fullmatch(str(config.get("dtype"))) is not None
    return node["class_name"] in _CONSTANTS and is_number


# ----------------------------------------------------------------------------------------------- trees of scikit-learn

# Trees, which skops does not trust by itself: they hold no code, but indices that scikit-learn follows unseen, so that
# `check_trees` looks at them.
_TREE_TYPES = {"sklearn.tree._tree.Tree", "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor"}

# The kinds of skops's nodes that such a classifier consists of; others call functions, or unpack arrays of any size.
_TREE_NODES = {
    *("DictNode", "ListNode", "TupleNode", "JsonNode", "TypeNode", "CachedNode", "ObjectNode", "NdArrayNode"),
    *("TreeNode", "LossNode", "RandomGeneratorNode", "RandomStateNode"),
}


def load_trees(path: str | os.PathLike) -> Any:
    """Read a `.skops` file without running code: raise InputError for one that asks for more than scikit-learn's trees.

    Its archive, or its indices (see `check_trees`), may still be damaged: skops then raises errors of many types.
    """
    import skops.io

    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        others = set(_node_kinds(parse_json(archive.read("schema.json")))) - _TREE_NODES
    if others:
        raise InputError(f"{path}: refused: holds {min(others)}. Expected scikit-learn's trees alone")
    if unknown := sorted(set(skops.io.get_untrusted_types(file=path)) - _TREE_TYPES):
        code = f"{', '.join(unknown)}, which could run code"
        raise InputError(f"{path}: refused: asks for {code}. Expected scikit-learn's trees alone")
    return skops.io.load(path, trusted=sorted(_TREE_TYPES))


def check_trees(model: Any) -> None:
    """Raise ValueError unless all splits lead to later nodes of their tree by features that there are.

    scikit-learn follows these indices as they are: it would read beyond its memory, or go round for ever.
    """
    import numpy as np
    from sklearn.tree import DecisionTreeClassifier

    if hasattr(model, "estimators_"):
        trees = [estimator.tree_ for estimator in model.estimators_ if isinstance(estimator, DecisionTreeClassifier)]
        if len(trees) < len(model.estimators_) or any(tree.node_count != tree.capacity for tree in trees):
            raise ValueError("a forest of something else than whole trees")
        nodes = [(tree.children_left == -1, tree.children_left, tree.children_right, tree.feature) for tree in trees]
    else:
        arrays = [predictor.nodes for predictors in model._predictors for predictor in predictors]
        if any(array["is_categorical"].any() for array in arrays):
            raise ValueError("trees of categories")
        nodes = [(array["is_leaf"] != 0, array["left"], array["right"], array["feature_idx"]) for array in arrays]
    for is_leaf, left, right, feature in nodes:
        split = np.flatnonzero(~is_leaf)
        children = np.stack([left, right]).astype(np.int64)[:, split]
        inside = (children > split) & (children < len(is_leaf))
        inside &= (feature[split] >= 0) & (feature[split] < model.n_features_in_)
        if len(is_leaf) == 0 or not inside.all():
            raise ValueError("trees whose splits lead out of them")


def _node_kinds(schema) -> Iterator[str]:
    """Yield the kinds of all nodes in the schema of a `.skops` file."""
    if isinstance(schema, dict):
        if "__loader__" in schema:
            yield str(schema["__loader__"])
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _node_kinds(part)
