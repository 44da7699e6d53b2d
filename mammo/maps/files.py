"""Describe probability maps of mammograms, and read and write the files that keep them.

A map is float32 (rows, columns, classes). Class 0 is the background, or the negative class; the others are *region
classes*. Positions are (row, column) in pixels of the *scored image*, which is the mammogram as resized for the
network, before any cutting; 0 is its upper or left edge, so that the middle of its first pixel is at 0.5.
"""

import dataclasses
import io
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mammo.base.files import InputError, atomic_write, is_file_name
from mammo.base.guards import check_archive, check_h5, max_pixels, parse_json, readable
from mammo.base.unpickle import load_plain

MAP_VIEWS = ("cc", "mlo")
MODES = ("sweep", "fprop", "gradcam")

_VERSION = 1
_MAX_SIDE = 65535  # rows or columns; no mammogram has more


class Grid(NamedTuple):
    """Where the cells of one map are in the scored image, in its pixels: (row, column) or (rows, columns)."""

    image_size: tuple[int, int]  # of the scored image
    first: tuple[float, float]  # the centre of the map's first cell
    strides: tuple[float, float]  # from one cell's centre to the next

    def centres(self, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return rows (map rows,) and columns (map columns,) of the centres of the cells of a map of this shape."""
        rows, columns = (f + s * np.arange(n) for f, s, n in zip(self.first, self.strides, shape[:2], strict=True))
        return rows, columns


@dataclass
class HeatmapRecord:
    """The maps of one breast; None where a view has no image, and, in a `.pkl` of 2017, for grids."""

    patient_id: str
    side: str  # LEFT or RIGHT
    cancer: int | None = None  # 1 for cancer
    cc: np.ndarray | None = None  # float32 (rows, columns, classes)
    mlo: np.ndarray | None = None
    cc_file: str | None = None  # the image that was scored
    mlo_file: str | None = None
    cc_grid: Grid | None = None
    mlo_grid: Grid | None = None

    def image_id(self, view: str) -> str:
        """Return the name of a view's image, such as "P_00001_LEFT_CC"."""
        return f"{self.patient_id}_{self.side}_{view.upper()}"

    def set_view(self, view: str, heatmap: np.ndarray, file: str | None, grid: Grid | None) -> None:
        """Keep the map of a view, "cc" or "mlo", with the image that was scored and the map's place in it."""
        for name, value in ((view, heatmap), (f"{view}_file", file), (f"{view}_grid", grid)):
            setattr(self, name, value)

    def views(self) -> Iterator[tuple[str, np.ndarray, str | None, Grid | None]]:
        """Yield ("cc" or "mlo", map, file, grid) of each view that has a map."""
        for view in MAP_VIEWS:
            if (heatmap := getattr(self, view)) is not None:
                yield view, heatmap, getattr(self, f"{view}_file"), getattr(self, f"{view}_grid")

    def scored_views(self) -> Iterator[tuple[str, np.ndarray, str, Grid]]:
        """Yield the same as `views`. Raises InputError for a map without the file or the grid of its image."""
        for view, heatmap, file, grid in self.views():
            if file is None or grid is None:
                missing = "the map file does not say which image was scored; compute the map again"
                raise InputError(f"{self.image_id(view)}: {missing}")
            yield view, heatmap, file, grid


@dataclass
class Heatmaps:
    """The content of a map file. A `.pkl` of 2017 holds the records alone."""

    records: list[HeatmapRecord]
    class_names: list[str] = field(default_factory=list)
    strides: tuple[float, float] | None = None  # (rows, columns) in pixels of the scored image between all maps' cells
    mode: str | None = None  # "sweep" (sliding window), "fprop" (the whole image at once) or "gradcam"
    options: dict[str, Any] = field(default_factory=dict)  # the options that the maps depend on


def resample(heatmap: np.ndarray, grid: Grid, to_edges: bool = False) -> np.ndarray:
    """Interpolate one class of a map (rows, columns) at every pixel of the scored image: float32 of `grid.image_size`.

    Linear between the centres of the cells, constant in the outer halves of the outermost cells. Beyond them the
    values are NaN, since nothing was scored there, or with `to_edges` constant too, since the outermost cells see it.
    """

    def weights(length, first, stride, cells):
        position = (np.arange(length) + 0.5 - first) / stride
        inside = np.clip(position, 0, cells - 1)
        matrix = np.maximum(0, 1 - np.abs(inside[:, np.newaxis] - np.arange(cells)))
        if not to_edges:
            matrix[(position < -0.5) | (position > cells - 0.5)] = np.nan
        return matrix.astype(np.float32)

    rows, columns = map(weights, grid.image_size, grid.first, grid.strides, heatmap.shape)
    return rows @ heatmap @ columns.T


# --------------------------------------------------------------------------------------------------- the map file


def save_heatmaps(
    path: str | os.PathLike,
    records: Iterable[HeatmapRecord],
    *,
    class_names: Sequence[str],
    strides: tuple[float, float],
    mode: str = "sweep",
    options: dict[str, Any] | None = None,
) -> None:
    """Write a map file, whole or not at all; its ending chooses the format.

    `.npz` (compressed arrays and one JSON text) and `.h5` hold the same. `.pkl` is the format of the published program:
    a pickled list with a dict for each breast, of patient_id, side, cancer, cc and mlo, and here also the rest.

    records, class_names, strides, mode, options: see `Heatmaps`. Options are JSON values. Raises InputError where the
    ending is another, or a map has other than len(class_names) classes.
    """
    check_map_name(path)
    records = list(records)
    for record in records:
        for view, heatmap, *_ in record.views():
            if heatmap.ndim != 3 or heatmap.shape[2] != len(class_names):
                expected = f"Expected a map of {len(class_names)} classes. Received an array of shape {heatmap.shape}"
                raise InputError(f"{path}: {record.patient_id} {record.side} {view}: {expected}")
    header = {"version": _VERSION, "class_names": list(class_names), "strides": [float(stride) for stride in strides]}
    header |= {"mode": mode, "options": options or {}}
    dicts = [_to_dict(record) for record in records]
    with atomic_write(path, durable=True) as temporary:
        if Path(path).suffix == ".pkl":
            temporary.write_bytes(pickle.dumps([entry | header for entry in dicts], protocol=2))  # as Python 2 reads
        else:
            _write_arrays(temporary, Path(path).suffix, header, dicts)


def _write_arrays(path: Path, suffix: str, header: dict[str, Any], dicts: list[dict]) -> None:
    arrays = {}
    for i, entry in enumerate(dicts):
        for view in MAP_VIEWS:
            if (heatmap := entry.pop(view)) is not None:
                arrays[f"{i}_{view}"] = np.asarray(heatmap, np.float32)
    text = json.dumps(header | {"records": dicts})
    if suffix == ".npz":
        np.savez_compressed(path, header=np.array(text), **arrays)
        return
    import h5py

    buffer = io.BytesIO()  # a failed write to a disk would crash HDF5 later
    with h5py.File(buffer, "w") as h5:
        h5["header"] = text
        for name, array in arrays.items():
            h5.create_dataset(name, data=array, compression="gzip")
    path.write_bytes(buffer.getbuffer())


def load_heatmaps(path: str | os.PathLike) -> Heatmaps:
    """Read a map file of any of the formats of `save_heatmaps`, or a `.pkl` of the published program.

    Nothing in a file is executed: a pickle of anything but NumPy arrays, numbers, texts, lists and dicts is refused,
    and its arrays are made from their bytes here. Raises InputError where the file is missing, damaged, cut short or no
    map file, which includes maps with NaN or without cells.
    """
    check_map_name(path)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: Expected a map file. Received {'a folder' if path.is_dir() else 'no file'}")
    received = f"Received {path.stat().st_size} bytes ({{}}); copy or compute it again"
    with readable(path, f"not a whole map file: Expected what heatmap_score.py writes. {received}"):
        if path.suffix == ".pkl":
            return _from_dicts(load_plain(path))
        header, arrays = _read_arrays(path)
        if header["version"] > _VERSION:
            raise InputError(f"{path}: Expected a map file of version {_VERSION}. Received {header['version']}")
        dicts = [
            record | {view: arrays[name] for view in MAP_VIEWS if (name := f"{i}_{view}") in arrays}
            for i, record in enumerate(header.pop("records"))
        ]
        first, *others = dicts or [{}]  # not into each: both can be many
        return _from_dicts([first | header, *others])


def check_map_name(path: str | os.PathLike) -> None:
    """Raise InputError unless `path` can be a map file, by its ending and by not being a folder."""
    if Path(path).suffix not in (".npz", ".h5", ".pkl"):
        raise InputError(f"{path}: unknown map format. Expected a name ending in .npz, .h5 or .pkl")
    if Path(path).is_dir():
        raise InputError(f"{path}: Expected the name of a map file. Received a folder")


def _to_dict(record: HeatmapRecord) -> dict:
    """Return the fields of a record, with the parts of grids that maps do not share."""
    fields = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    for view in MAP_VIEWS:
        grid = fields.pop(f"{view}_grid")
        fields[f"{view}_image_size"] = grid and [int(n) for n in grid.image_size]
        fields[f"{view}_first"] = grid and [float(x) for x in grid.first]
    return fields


def _from_dicts(content: list[dict]) -> Heatmaps:
    """Make the content of a file from a dict for each breast, the first with the header's entries, where it has some.

    Raises ValueError or TypeError, or what NumPy raises, for anything else.
    """
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise TypeError("Expected a list of dicts, one a breast")
    header = content[0] if content else {}
    names, options = header.get("class_names", []), header.get("options", {})
    strides, mode = header.get("strides"), header.get("mode")
    _check(isinstance(names, list) and all(isinstance(name, str) for name in names), "class names")
    _check(mode in (None, *MODES), "mode")
    _check(strides is None or _is_pair(strides, 0), "strides")
    _check(isinstance(options, dict), "options")
    # Maps are smoothed by a part of the window.
    _check("window" not in options or _is_pair(options["window"], 0, _MAX_SIDE + 1), "window")
    heatmaps = Heatmaps([], names, strides and tuple(strides), mode, options)
    maps: dict[int, np.ndarray] = {}
    # Without patient_id an entry is the header of a file without records.
    heatmaps.records = [_to_record(entry, heatmaps, maps) for entry in content if "patient_id" in entry]
    return heatmaps


def _to_record(entry: dict, heatmaps: Heatmaps, maps: dict[int, np.ndarray]) -> HeatmapRecord:
    """Make a record. maps: in float32, by the id of the array in the file, which a pickle can name for many breasts."""
    patient, side, cancer = entry["patient_id"], entry["side"], entry.get("cancer")
    is_name = isinstance(patient, (str, int, np.integer)) and is_file_name(str(patient))
    _check(is_name, "patient_id: it is part of file names")
    _check(isinstance(side, str) and is_file_name(side), "side: it is part of file names")
    _check(cancer in (None, 0, 1), "cancer")
    record = HeatmapRecord(str(patient), str(side), None if cancer is None else int(cancer))
    for view in MAP_VIEWS:
        if (array := entry.get(view)) is None:
            continue
        # Lists, too, would do; but a few can make arrays of any size, each standing in others many times.
        _check(isinstance(array, np.ndarray) and array.dtype.kind in "fiub", f"type of {view}")
        if id(array) not in maps:
            maps[id(array)] = array.astype(np.float32)
        heatmap = maps[id(array)]
        names = heatmaps.class_names
        if heatmap.ndim != 3 or heatmap.size == 0 or len(names or heatmap[0, 0]) != heatmap.shape[2]:
            raise ValueError(f"{record.patient_id} {view}: map of shape {heatmap.shape}, {len(names)} class names")
        _check(np.isfinite(heatmap).all(), f"values of {record.patient_id} {view}: NaN or infinity")
        file = entry.get(f"{view}_file")
        _check(file is None or isinstance(file, str), f"{view}_file")
        record.set_view(view, heatmap, file, _to_grid(entry, view, heatmap.shape, heatmaps.strides))
    return record


def _to_grid(entry: dict, view: str, shape: Sequence[int], strides: tuple[float, float] | None) -> Grid | None:
    size = entry.get(f"{view}_image_size")
    if size is None or strides is None:
        return None
    whole = _is_pair(size, 0, _MAX_SIDE + 1) and all(length == int(length) for length in size)
    _check(whole and size[0] * size[1] <= max_pixels(), "image size")
    # `resample` has a matrix of as many rows or columns by cells.
    _check(max(size[0] * shape[0], size[1] * shape[1]) <= max_pixels(), "cells")
    first = entry[f"{view}_first"]
    _check(_is_pair(first), "first cell")
    return Grid((int(size[0]), int(size[1])), tuple(first), strides)


def _check(holds, what: str) -> None:
    if not holds:
        raise ValueError(f"wrong {what}")


def _is_pair(values, above: float = -math.inf, below: float = math.inf) -> bool:
    """Return whether these are two numbers between limits."""
    is_pair = isinstance(values, Sequence) and len(values) == 2
    return is_pair and all(isinstance(value, Real) and above < value < below for value in values)


def _read_arrays(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle, and advise to trust it
            raise zipfile.BadZipFile("not an archive, or its end is missing")
        check_archive(path, compressed=True)
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        return parse_json(str(arrays.pop("header"))), arrays
    import h5py

    with h5py.File(path, "r") as h5:
        check_h5(path, h5, path.stat().st_size)
        arrays = {name: dataset[()] for name, dataset in h5.items()}
    return parse_json(arrays.pop("header")), arrays
