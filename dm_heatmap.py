"""Probability maps of mammograms: computing them, keeping them in files, drawing them.

A map is float32 (rows, columns, classes). Class 0 is the background, or the negative class; the others are *region
classes*. Positions are (row, column) in pixels of the *scored image*, which is the mammogram as resized for the
network, before any cutting; 0 is its upper or left edge, so that the middle of its first pixel is at 0.5.
"""

import dataclasses
import glob
import json
import math
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from dm_files import InputError, atomic_write, remove_partial
from dm_image import (
    add_img_margins,
    check_grey,
    cut_window,
    read_img_for_pred,
    read_resize_img,
    read_resized,
    window_grid,
)
from dm_parallel import read_ahead
from dm_patches import check_mask_fits, read_size, read_table
from dm_preprocess import DMImagePreprocessor

VIEWS = ("cc", "mlo")
MODES = ("sweep", "fprop", "gradcam")
_VERSION = 1


# --------------------------------------------------------------------------------------------------- the map file


class Grid(NamedTuple):
    """Where the cells of one map are in the scored image, in its pixels.

    image_size: (rows, columns) of the scored image. first: (row, column) of the centre of the map's first cell.
    strides: (rows, columns) from one cell's centre to the next.
    """

    image_size: tuple[int, int]
    first: tuple[float, float]
    strides: tuple[float, float]

    def centres(self, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows (map rows,) and columns (map columns,) of the centres of the cells of a map of this shape."""
        rows, columns = (f + s * np.arange(n) for f, s, n in zip(self.first, self.strides, shape[:2], strict=True))
        return rows, columns


@dataclass
class HeatmapRecord:
    """The maps of one breast. What is not there is None: a view without an image, or, in a `.pkl` of 2017, grids."""

    patient_id: str
    side: str  # LEFT or RIGHT
    cancer: int | None = None  # 1 for cancer
    cc: np.ndarray | None = None  # float32 (rows, columns, classes)
    mlo: np.ndarray | None = None
    cc_file: str | None = None  # the image that was scored
    mlo_file: str | None = None
    cc_grid: Grid | None = None
    mlo_grid: Grid | None = None

    def views(self) -> Iterator[tuple[str, np.ndarray, str | None, Grid | None]]:
        """("cc" or "mlo", map, file, grid) of each view that has a map."""
        for view in VIEWS:
            if (heatmap := getattr(self, view)) is not None:
                yield view, heatmap, getattr(self, f"{view}_file"), getattr(self, f"{view}_grid")


@dataclass
class Heatmaps:
    """The content of a map file.

    strides: (rows, columns) in pixels of the scored image between the cells of all maps.
    mode: how the maps were made: "sweep" (sliding window), "fprop" (the whole image at once) or "gradcam".
    options: the options that the maps depend on, by name.
    All but `records` may be empty in a `.pkl` of 2017, which holds none of it.
    """

    records: list[HeatmapRecord]
    class_names: list[str] = field(default_factory=list)
    strides: tuple[float, float] | None = None
    mode: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def save_heatmaps(
    path,
    records: Iterable[HeatmapRecord],
    *,
    class_names: Sequence[str],
    strides: tuple[float, float],
    mode: str = "sweep",
    options: dict[str, Any] | None = None,
) -> None:
    """Write a map file, whole or not at all; its ending chooses the format.

    `.npz` (compressed arrays and one JSON text) and `.h5` hold the same; `.pkl` is the published program's: a
    pickled list with a dict a breast, of patient_id, side, cancer, cc and mlo, and here also the rest.
    options: JSON values. Raises InputError for another ending, and for maps that do not have `class_names`.
    """
    check_map_name(path)
    records = list(records)
    for record in records:
        for view, heatmap, *_ in record.views():
            if heatmap.ndim != 3 or heatmap.shape[2] != len(class_names):
                raise InputError(
                    f"{path}: {record.patient_id} {record.side} {view}: Expected a map of {len(class_names)} classes. "
                    f"Received an array of shape {heatmap.shape}"
                )
    header = {
        "version": _VERSION,
        "class_names": list(class_names),
        "strides": [float(stride) for stride in strides],
        "mode": mode,
        "options": options or {},
    }
    suffix = Path(path).suffix
    with atomic_write(path) as temporary:
        if suffix == ".pkl":
            content = [_to_dict(record) | header for record in records]
            temporary.write_bytes(pickle.dumps(content, protocol=2))  # which Python 2 reads too
            return
        arrays = {
            f"{i}_{view}": np.asarray(heatmap, np.float32)
            for i, record in enumerate(records)
            for view, heatmap, *_ in record.views()
        }
        header["records"] = [{k: v for k, v in _to_dict(record).items() if k not in VIEWS} for record in records]
        text = json.dumps(header)
        if suffix == ".npz":
            np.savez_compressed(temporary, header=np.array(text), **arrays)
        else:
            import h5py

            with h5py.File(temporary, "w") as h5:
                h5["header"] = text
                for name, array in arrays.items():
                    h5.create_dataset(name, data=array, compression="gzip")


def load_heatmaps(path) -> Heatmaps:
    """Read a map file of any of the formats of `save_heatmaps`, or a `.pkl` of the published program.

    Nothing in a file is executed: a pickle of anything but NumPy arrays, numbers, texts, lists and dicts is refused.
    Raises InputError for a file that is missing, damaged, cut short or no map file.
    """
    check_map_name(path)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: Expected a map file. Received {'a folder' if path.is_dir() else 'no file'}")
    try:
        if path.suffix == ".pkl":
            return _from_dicts(_read_pickle(path))
        header, arrays = _read_arrays(path)
        if header["version"] > _VERSION:
            raise InputError(f"{path}: Expected a map file of version {_VERSION}. Received {header['version']}")
        dicts = [
            record | {view: arrays[name] for view in VIEWS if (name := f"{i}_{view}") in arrays}
            for i, record in enumerate(header.pop("records"))
        ]
        return _from_dicts([record | header for record in dicts] or [header])
    except InputError:
        raise
    # What damaged archives, HDF5 files and pickles, or other content than maps, end in.
    except (
        OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, RuntimeError,
        OverflowError, MemoryError, zipfile.BadZipFile, zlib.error, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: not a whole map file: Expected what heatmap_score.py writes. Received {path.stat().st_size} "
            f"bytes ({reason}); copy or compute it again"
        ) from error


def check_map_name(path) -> None:
    """Raise InputError unless `path` can be a map file, by its ending and by not being a folder."""
    if Path(path).suffix not in (".npz", ".h5", ".pkl"):
        raise InputError(f"{path}: unknown map format. Expected a name ending in .npz, .h5 or .pkl")
    if Path(path).is_dir():
        raise InputError(f"{path}: Expected the name of a map file. Received a folder")


def _to_dict(record: HeatmapRecord) -> dict:
    """The fields of a record; of grids what the strides, which all maps share, leave open."""
    fields = {item.name: getattr(record, item.name) for item in dataclasses.fields(record)}
    for view in VIEWS:
        grid = fields.pop(f"{view}_grid")
        fields[f"{view}_image_size"] = grid and [int(n) for n in grid.image_size]
        fields[f"{view}_first"] = grid and [float(x) for x in grid.first]
    return fields


def _from_dicts(content: list[dict]) -> Heatmaps:
    """The content of a file from one dict a breast, each with the header's entries, where there are some."""
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise TypeError("Expected a list of dicts, one a breast")
    header = content[0] if content else {}
    strides = header.get("strides")
    heatmaps = Heatmaps(
        records=[],
        class_names=list(header.get("class_names", ())),
        strides=strides and tuple(strides),
        mode=header.get("mode"),
        options=header.get("options", {}),
    )
    for entry in content:
        if "patient_id" not in entry:  # the header of a file without records
            continue
        cancer = entry.get("cancer")
        record = HeatmapRecord(str(entry["patient_id"]), str(entry["side"]), None if cancer is None else int(cancer))
        for view in VIEWS:
            heatmap = entry.get(view)
            if heatmap is None:
                continue
            heatmap = np.asarray(heatmap, np.float32)
            if heatmap.ndim != 3:
                raise TypeError(f"{record.patient_id} {view}: array of shape {heatmap.shape}")
            setattr(record, view, heatmap)
            setattr(record, f"{view}_file", entry.get(f"{view}_file"))
            if entry.get(f"{view}_image_size") and strides:
                grid = Grid(tuple(entry[f"{view}_image_size"]), tuple(entry[f"{view}_first"]), heatmaps.strides)
                setattr(record, f"{view}_grid", grid)
        heatmaps.records.append(record)
    return heatmaps


def _read_arrays(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle, and advise to trust it
            raise zipfile.BadZipFile("not an archive, or its end is missing")
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
        return json.loads(str(arrays.pop("header"))), arrays
    import h5py

    with h5py.File(path, "r") as h5:
        arrays = {name: dataset[()] for name, dataset in h5.items()}
    return json.loads(arrays.pop("header")), arrays


class _ArrayUnpickler(pickle.Unpickler):
    """Opens pickles of plain containers and NumPy arrays, of Python 2 too; calls nothing else."""

    def find_class(self, module, name):
        if module == "_codecs" and name == "encode":  # how Python 3 writes bytes for Python 2
            return lambda text, _: text.encode("latin1")
        if module.startswith(("numpy.core.", "numpy._core.")):
            kind = module.rsplit(".", 1)[1]
            if (kind, name) in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")):
                return super().find_class(f"numpy._core.{kind}" if hasattr(np, "_core") else module, name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise InputError(
            f"holds {module}.{name}. Expected lists, dicts and NumPy arrays alone: opening anything else can run code. "
            "Where you trust the file, convert it with Python: load it, and pickle a list of dicts of patient_id, "
            "side, cancer, cc and mlo with NumPy arrays"
        )


def _read_pickle(path: Path):
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------------------------- computing maps


class Scan(NamedTuple):
    """One mammogram as a network takes it, and where the cells of its map will be."""

    file: str
    pixels: np.ndarray  # float32 (rows, columns)
    grid: Grid


class Sweep:
    """Sliding windows: the patch classifier's probabilities at windows that sweep the breast (golden).

    The image is resized to `target_height`, the breast cut out and padded by patch_size // 2 zeros, and each window
    of `patch_size` scaled by its own maximum to `target_scale`, multiplied by `rescale_factor`, equalised if asked,
    given to `preprocess` in batches (n, patch_size, patch_size, channels), and less `mean`. A cell is the centre of
    its window.

    At most `batch_size` windows are in memory, whatever the image and the stride.
    """

    mode = "sweep"

    def __init__(
        self,
        model,
        target_height: int,
        patch_size: int,
        stride: int,
        batch_size: int,
        *,
        target_scale: float | None = None,
        rescale_factor: float | None = None,
        equalize_hist: bool = False,
        mean: float = 0.0,
        preprocess: Callable | None = None,
    ):
        self.model = model
        self.target_height = target_height
        self.patch_size = patch_size
        self.strides = (stride, stride)
        self.window = (patch_size, patch_size)
        self.batch_size = batch_size
        self.pixel_options = {
            "target_scale": target_scale,
            "rescale_factor": rescale_factor,
            "equalize_hist": equalize_hist,
        }
        self.mean = np.float32(mean)
        self.preprocess = preprocess
        built = model.input_shape[1:3]
        if any(size not in (None, patch_size) for size in built):
            raise InputError(
                f"--patch-size {patch_size}: Expected {built[0]}, for which the patch classifier is built. "
                f"Received {patch_size}"
            )

    def read(self, fname) -> Scan:
        """Read an image and cut out the breast. Raises InputError."""
        img = check_grey(fname, read_resize_img(fname, target_height=self.target_height))
        half = self.patch_size // 2
        try:
            breast, (left, top, _, _) = DMImagePreprocessor.segment_breast(img)
            breast = add_img_margins(breast, half)
            tops, lefts = window_grid(breast.shape, *self.window[:1], *self.strides[:1])
        except InputError as error:
            raise InputError(f"{fname}: {error}") from error
        corner = np.array([top + tops[0], left + lefts[0]]) - half
        first = tuple(float(x) for x in corner + self.patch_size / 2)
        return Scan(str(fname), breast, Grid(img.shape, first, self.strides))

    def score(self, scan: Scan) -> np.ndarray:
        """The map of an image: float32 (grid rows, grid columns, classes). Raises InputError."""
        tops, lefts = window_grid(scan.pixels.shape, self.patch_size, self.strides[0])
        count = len(tops) * len(lefts)
        batch = np.zeros((self.batch_size, *self.window, self.model.input_shape[-1]), np.float32)
        quarter = math.ceil(self.batch_size / 4)
        heatmap = None
        starts = range(0, count, self.batch_size)
        for start in tqdm(starts, desc="windows", unit="batch", leave=False, delay=10, disable=None):
            part = range(start, min(start + self.batch_size, count))
            # Four batch sizes, since a network is compiled anew for each: the last batch has idle windows instead.
            x = batch[: math.ceil(len(part) / quarter) * quarter]
            for window, i in zip(x, part, strict=False):
                top, left = tops[i // len(lefts)], lefts[i % len(lefts)]
                try:
                    cut = cut_window(scan.pixels, top, left, self.patch_size, **self.pixel_options)
                except InputError as error:
                    raise InputError(f"{scan.file}: {error}") from error
                window[...] = cut[..., np.newaxis]
            if self.preprocess is not None:
                x = self.preprocess(x)
            probabilities = np.asarray(self.model.predict_on_batch(x - self.mean))[: len(part)]
            if heatmap is None:
                heatmap = np.empty((count, probabilities.shape[-1]), np.float32)
            heatmap[start : start + len(part)] = probabilities
        return heatmap.reshape(len(tops), len(lefts), -1)


class _WholeImage:
    """What the ways that give the network the image at once share: it is read as the trainers read it.

    segment_breast: blank all but the breast, as the patches were that a patch classifier has seen.
    """

    def __init__(
        self,
        model,
        img_size: Sequence[int],
        *,
        target_scale: float | None = None,
        rescale_factor: float | None = None,
        equalize_hist: bool = False,
        mean: float = 0.0,
        segment_breast: bool = False,
    ):
        self.model = model
        self.segment_breast = segment_breast
        self.read_options = {
            "target_size": tuple(img_size),
            "target_scale": target_scale,
            "rescale_factor": rescale_factor,
            "equalize_hist": equalize_hist,
            "dup_3_channels": False,
        }
        self.mean = np.float32(mean)

    def read(self, fname) -> Scan:
        """Read an image. Raises InputError, for one without a breast too."""
        img = read_img_for_pred(fname, **self.read_options)[..., 0]
        if img.min() == img.max():
            raise InputError(f"{fname}: constant image. Expected a mammogram. Received {img.max():g} in all pixels")
        if self.segment_breast:
            try:
                img = DMImagePreprocessor.segment_breast(img, crop=False)[0]
            except InputError as error:
                raise InputError(f"{fname}: {error}") from error
        first = tuple(size / 2 for size in self.window)
        return Scan(str(fname), img - self.mean, Grid(img.shape, first, self.strides))

    def _input(self, scan: Scan) -> np.ndarray:
        """(1, rows, columns, channels)."""
        return np.repeat(scan.pixels[np.newaxis, ..., np.newaxis], self.model.input_shape[-1], axis=-1)


class ForwardPropagation(_WholeImage):
    """The patch classifier applied to the whole image at once, in one pass of its convolutions (golden).

    The feature map is average-pooled (`avg_pool_size` cells, with strides `hm_strides`), and the classifier's last
    layer applied at every position. A cell stands for the patch that gives `avg_pool_size` features, 224 pixels for
    7 of the usual stride 32, and lies at its centre.

    The map equals that of `Sweep` over the same windows for a network without padding. With zero padding, as in
    all usual ones, a window's border features see zeros where the whole image has pixels: then the map of a window
    equals the image's at the cells whose features the padding does not reach, those farther from the window's
    border, though not from the image's, than the network's receptive field does; and in a window that is the image.
    """

    mode = "fprop"

    def __init__(self, model, img_size, *, patch_net="vgg19", avg_pool_size=(7, 7), hm_strides=(1, 1), **pixel_options):
        from dm_resnet import add_top_layers

        heatmap_model = add_top_layers(
            model,
            img_size,
            patch_net=patch_net,
            avg_pool_size=avg_pool_size,
            hm_strides=hm_strides,
            return_heatmap=True,
        )
        super().__init__(heatmap_model, img_size, **pixel_options)
        stride, reach = _stride_and_reach(heatmap_model.layers[1])
        self.strides = tuple(float(stride * n) for n in hm_strides)
        self.window = tuple(stride * (n - 1) + max(stride, reach) for n in avg_pool_size)

    def score(self, scan: Scan) -> np.ndarray:
        """The map of an image: float32 (map rows, map columns, classes)."""
        return np.asarray(self.model.predict_on_batch(self._input(scan)))[0]


def _stride_and_reach(net) -> tuple[int, int]:
    """Pixels between the features of a convolutional network, and the size of the smallest image that gives one."""

    def features(size):
        return net.compute_output_shape((1, size, size, net.input_shape[-1]))[1]

    large = 2048
    count = features(large)
    stride = round(large / (features(2 * large) - count))
    low, high = large - 2 * stride, large  # the smallest image of as many features is between
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if features(middle) >= count else (middle, high)
    return stride, high - stride * (count - 1)


class GradCam(_WholeImage):
    """Grad-CAM of a whole-image classifier (Selvaraju et al. 2017): which features speak for a class.

    The map of a class is ReLU(sum_k a_k A_k) of the feature maps A_k, with a_k the mean over the map of the gradient
    of the class's score before the softmax; for a network that ends in global average pooling and a dense layer, the
    class activation map of Zhou et al. 2016 up to its scale. Values are 0 or more, without upper limit; a cell is
    the centre of the part of the image that its feature stands for.

    layer: "last" for the last feature map before pooling or flattening, "patch" for that of the nested patch net,
    which is finer; default: the finer one where there is one.
    """

    mode = "gradcam"

    def __init__(self, model, img_size, *, layer=None, **pixel_options):
        import keras

        super().__init__(model, img_size, **pixel_options)
        features = _feature_tensor(model, layer)
        self.trunk = keras.Model(model.inputs[0], features)
        self.head = keras.Model(features, _scores_before_softmax(model))
        self.window = self.strides = tuple(
            size / n for size, n in zip(img_size, self._shape_of_map(img_size), strict=True)
        )

    def _shape_of_map(self, img_size):
        return self.trunk.compute_output_shape((1, *img_size, self.model.input_shape[-1]))[1:3]

    def score(self, scan: Scan) -> np.ndarray:
        """The maps of an image: float32 (map rows, map columns, classes)."""
        import keras

        features = keras.ops.convert_to_tensor(self.trunk.predict_on_batch(self._input(scan)))
        maps = []
        for index in range(self.head.output_shape[-1]):
            gradient = keras.ops.convert_to_numpy(_gradient(self.head, features, index))
            weights = gradient.mean(axis=(0, 1, 2))
            maps.append(np.maximum(keras.ops.convert_to_numpy(features)[0] @ weights, 0))
        return np.stack(maps, axis=-1)


def _feature_tensor(model, layer: str | None):
    """The tensor inside `model` that Grad-CAM looks at; see `GradCam`."""
    import keras

    nested = [i for i, inner in enumerate(model.layers) if isinstance(inner, keras.Model)]
    if nested and layer != "last":
        return model.layers[nested[-1] + 1].input
    if layer == "patch":
        raise InputError("--grad-cam-layer patch: Expected a classifier on a nested patch net. Received another")
    ends = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D, keras.layers.Flatten)
    tensors = [inner.input for inner in model.layers if isinstance(inner, ends)]
    if not tensors:
        raise InputError(
            "Grad-CAM: Expected a network whose feature map is pooled globally or flattened. Received one of "
            + ", ".join(type(inner).__name__ for inner in model.layers[-3:])
        )
    return tensors[-1]


def _scores_before_softmax(model):
    """Output tensor of `model` without its last softmax."""
    import keras

    last = model.layers[-1]
    if isinstance(last, keras.layers.Activation):
        return last.input
    if not isinstance(last, keras.layers.Dense):
        return model.outputs[0]
    linear = keras.layers.Dense(last.units, use_bias=last.use_bias)
    scores = linear(last.input)
    linear.set_weights(last.get_weights())
    return scores


def _gradient(head, features, index: int):
    """Gradient of output `index` of a model with regard to its input, of any backend."""
    import keras

    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(features)
            score = head(features, training=False)[:, index]
        return tape.gradient(score, features)
    if backend == "jax":
        import jax

        variables = [[v.value for v in group] for group in (head.trainable_variables, head.non_trainable_variables)]
        return jax.grad(lambda x: head.stateless_call(*variables, x, training=False)[0][:, index].sum())(features)
    import torch

    features = features.detach().requires_grad_(True)
    return torch.autograd.grad(head(features, training=False)[:, index].sum(), features)[0]


# ------------------------------------------------------------------------------------------------ all the images


class Breast(NamedTuple):
    """One row of the breast table, with the image of each view that there is one of."""

    patient_id: str
    side: str
    cancer: int
    files: dict[str, Path]  # by "cc", "mlo"

    @property
    def name(self) -> str:
        return f"{self.patient_id}_{self.side}"


def read_breasts(table, img_folder, patients: Iterable[str] | None = None) -> tuple[list[Breast], list[str]]:
    """Breasts of a CSV table `patient_id,side,cancer`, in its order, and the faults met.

    Images are `<img_folder>/<patient_id>_<side>_<CC|MLO>.png`. patients: use these alone. Faults are patients
    without a row and breasts without any image. Raises InputError for a table that is wrong.
    """
    breasts, faults, rows = [], [], {}
    wanted = None if patients is None else set(patients)
    for number, cells in read_table(table, ("patient_id", "side", "cancer")):
        row = f"{table}, row {number}"
        patient, side, cancer = cells["patient_id"], cells["side"], cells["cancer"]
        if side not in ("LEFT", "RIGHT"):
            raise InputError(f"{row}: unknown side: Expected LEFT or RIGHT. Received {side!r}")
        if cancer not in ("0", "1"):
            raise InputError(f"{row}: cancer: Expected 0 or 1. Received {cancer!r}")
        if (patient, side) in rows:
            raise InputError(f"{row}: repeats row {rows[patient, side]} ({patient} {side}); remove one of them")
        rows[patient, side] = number
        if wanted is not None and patient not in wanted:
            continue
        paths = {view: Path(img_folder, f"{patient}_{side}_{view.upper()}.png") for view in VIEWS}
        breast = Breast(patient, side, int(cancer), {view: path for view, path in paths.items() if path.exists()})
        if breast.files:
            breasts.append(breast)
        else:
            faults.append(f"{row}: no image of {patient} {side}: Expected {paths['cc']} or {paths['mlo'].name}")
    known = {patient for patient, _ in rows}
    faults += [f"{table}: no row of patient {patient}" for patient in wanted or () if patient not in known]
    return breasts, faults


def score_breasts(
    breasts: Sequence[Breast],
    scorer,
    out,
    *,
    class_names: Sequence[str],
    options: dict[str, Any],
    jobs: int = 1,
    on_error: str = "stop",
) -> tuple[list[HeatmapRecord], list[str]]:
    """Compute the maps of all breasts and write the map file `out`.

    scorer: a `Sweep`, `ForwardPropagation` or `GradCam`. options: what the maps depend on, kept in the file.
    jobs: threads that read images while the network works; the maps are the same for any number.
    on_error: "stop" raises InputError at the first image at fault, "skip" leaves its breast out.

    Finished breasts are kept in the folder `<out>.parts` until all are; started again, the work goes on there.
    Raises InputError when that folder is of a run with other options.

    Returns the records, in the order of `breasts`, and the faults met.
    """
    parts = Path(f"{out}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    remove_partial(parts)
    header = {
        "class_names": list(class_names),
        "strides": scorer.strides,
        "mode": scorer.mode,
        "options": json.loads(json.dumps(options | {"window": [float(size) for size in scorer.window]})),
    }
    done = {}
    for breast in breasts:
        if (record := _finished_part(parts / f"{breast.name}.npz", breast, header)) is not None:
            done[breast.name] = record
    todo = [breast for breast in breasts if breast.name not in done]
    if done:
        print(f"{len(done)} of {len(breasts)} breasts are done already, in {parts}")

    def read(breast):
        try:
            return {view: scorer.read(path) for view, path in breast.files.items()}
        except InputError as error:
            return error

    faults = []
    scans = zip(todo, read_ahead(read, todo, jobs), strict=True)
    for breast, views in tqdm(scans, total=len(todo), desc="heatmaps", unit="breast", disable=None):
        record = HeatmapRecord(breast.patient_id, breast.side, breast.cancer)
        try:
            if isinstance(views, InputError):
                raise views
            for view, scan in views.items():
                heatmap = scorer.score(scan)
                if not np.isfinite(heatmap).all():
                    raise InputError(f"{scan.file}: the network gives NaN or infinity: it has diverged")
                setattr(record, view, heatmap)
                setattr(record, f"{view}_file", scan.file)
                setattr(record, f"{view}_grid", scan.grid)
        except InputError as error:
            if on_error == "stop":
                raise
            faults.append(str(error))
            continue
        save_heatmaps(parts / f"{breast.name}.npz", [record], **header)
        done[breast.name] = record
    if not done:
        raise InputError(f"{out}: no image could be scored; the first fault: {faults[0]}")
    records = [done[breast.name] for breast in breasts if breast.name in done]
    save_heatmaps(out, records, **header)
    shutil.rmtree(parts)
    return records, faults


def _finished_part(path: Path, breast: Breast, header: dict) -> HeatmapRecord | None:
    """What an earlier run kept of this breast; None where it kept nothing, or of images that have changed since."""
    if not path.exists():
        return None
    kept = load_heatmaps(path)
    theirs = {"class_names": kept.class_names, "mode": kept.mode} | kept.options
    ours = {"class_names": header["class_names"], "mode": header["mode"]} | header["options"]
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        changes = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} now" for name in different)
        raise InputError(
            f"{path.parent}: has finished maps of a run with other options ({changes}): Expected the same, to go on. "
            "Give these, or another --out, or remove the folder"
        )
    [record] = kept.records
    files = {view: file for view, _, file, _ in record.views()}
    if files != {view: str(file) for view, file in breast.files.items()}:
        return None
    return None if any(os.path.getmtime(file) > path.stat().st_mtime for file in files.values()) else record


# ----------------------------------------------------------------------------------------------- lesions, drawing


def lesion_map(heatmap: np.ndarray) -> np.ndarray:
    """Sum of the region classes of a map: float32 (rows, columns)."""
    return heatmap[..., 1:].sum(axis=-1)


def read_lesion_masks(roi_mask_dir, image_id: str, image_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Masks of the lesions of one image by file name without ending: bool (rows, columns) of `image_size`.

    Files are `<Calc|Mass>-<set>_<image_id>_<number>.png`, where `image_id` is `<patient>_<side>_<CC|MLO>`. Raises
    InputError for a mask that is unreadable, has not the shape of its image, or is empty.
    """
    masks = {}
    for path in sorted(Path(roi_mask_dir).glob(f"*-*_{glob.escape(image_id)}_*.png")):
        try:
            check_mask_fits(read_size(path), image_size)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        mask = check_grey(path, read_resized(path, target_size=image_size)) > 0  # as the patch samplers do
        if not mask.any():
            raise InputError(f"{path}: the mask marks no lesion: Expected pixels above 0. Received none")
        masks[path.stem] = mask
    return masks


def resample(heatmap: np.ndarray, grid: Grid) -> np.ndarray:
    """One class of a map (rows, columns) at every pixel of the scored image: float32 of `grid.image_size`.

    Linear between the centres of the cells, constant in the outer halves of the outermost cells; NaN beyond them,
    where nothing was scored.
    """

    def weights(length, first, stride, cells):
        position = (np.arange(length) + 0.5 - first) / stride
        inside = np.clip(position, 0, cells - 1)
        matrix = np.maximum(0, 1 - np.abs(inside[:, np.newaxis] - np.arange(cells)))
        matrix[(position < -0.5) | (position > cells - 0.5)] = np.nan
        return matrix.astype(np.float32)

    rows, columns = map(weights, grid.image_size, grid.first, grid.strides, heatmap.shape)
    return rows @ heatmap @ columns.T


def draw_overlays(record: HeatmapRecord, out_dir, *, class_names: Sequence[str], mode=None, roi_mask_dir=None) -> None:
    """Draw each class and the sum of the region classes on the mammogram: `<out_dir>/<image>.png`, one a view.

    Axes are in pixels of the scored image. With a folder of lesion masks (see `read_lesion_masks`) their outlines
    are drawn. The brightest pixel of the breast is white. Raises InputError for maps without files or grids.
    """
    for view, heatmap, file, grid in record.views():
        image_id = f"{record.patient_id}_{record.side}_{view.upper()}"
        if file is None or grid is None:
            raise InputError(f"{image_id}: the map file does not say which image was scored; compute the map again")
        img = check_grey(file, read_resized(file, target_size=grid.image_size))
        masks = {} if roi_mask_dir is None else read_lesion_masks(roi_mask_dir, image_id, grid.image_size)
        label = "" if record.cancer is None else ", cancer" if record.cancer else ", no cancer"
        title = f"{record.patient_id} {record.side} {view.upper()}{label}"
        figure = overlay_figure(img, heatmap, grid, class_names, title, masks.values(), probabilities=mode != "gradcam")
        with atomic_write(Path(out_dir, f"{image_id}.png")) as temporary:
            figure.savefig(temporary)


def overlay_figure(img, heatmap, grid: Grid, class_names, title="", masks=(), probabilities=True):
    """A matplotlib figure: the mammogram, the sum of the region classes on it where there are several, and each class.

    img: (rows, columns) of the scored image, any real dtype. heatmap: (map rows, map columns, classes). masks: bool
    (rows, columns) each, outlined. probabilities: colours go from 0 to 1, else to each panel's largest value.
    """
    from matplotlib.figure import Figure

    panels = [("lesion classes, sum", lesion_map(heatmap))] if heatmap.shape[-1] > 2 else []
    panels += [(name, heatmap[..., i]) for i, name in enumerate(class_names)]
    across = len(panels) + 1 if len(panels) < 4 else math.ceil((len(panels) + 1) / 2)
    down = math.ceil((len(panels) + 1) / across)
    width, height = 2.1, 2.1 * img.shape[0] / img.shape[1]
    size = (width * across + 1.2, (height + 0.3) * down + 0.4)
    figure = Figure(figsize=size, dpi=160, layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    outlines = [outline for mask in masks for outline in _outlines(mask)]
    try:
        white = DMImagePreprocessor.segment_breast(img)[0].max()
    except InputError:
        white = img.max()
    shown = None
    for ax, (name, values) in zip(axes.flat, [("mammogram", None), *panels], strict=False):
        extent = (0, img.shape[1], img.shape[0], 0)
        ax.imshow(img, cmap="gray", vmin=0, vmax=white, extent=extent, interpolation="antialiased")
        if values is not None:
            name = f"{name} (max {values.max():.2g})"
            shares = resample(values, grid) / (1 if probabilities else max(values.max(), np.finfo(np.float32).tiny))
            shown = ax.imshow(shares, cmap=_colours(), vmin=0, vmax=1, extent=extent, interpolation="nearest")
        for outline in outlines:
            ax.plot(outline[:, 0], outline[:, 1], color="cyan", linewidth=0.9)
        ax.set_title(name, fontsize=8)
        ax.tick_params(labelsize=6)
    for i, ax in enumerate(axes.flat):
        ax.xaxis.set_tick_params(labelbottom=i + across > len(panels))  # the lowest of its column
        ax.set_visible(i <= len(panels))
    bar = figure.colorbar(shown, ax=axes, fraction=0.03, aspect=30, pad=0.01)
    bar.set_label("probability" if probabilities else "Grad-CAM, share of the largest value", fontsize=8)
    bar.ax.set_facecolor("0.35")  # about the tissue below the colours
    bar.ax.tick_params(labelsize=6)
    figure.supxlabel(f"pixels of the image as scored, {img.shape[0]} x {img.shape[1]}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed outlines (n, 2) of x, y along the middles of a mask's border pixels."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return [np.concatenate([contour[:, 0], contour[:1, 0]]) + 0.5 for contour in contours]


def _colours():
    """From clear to opaque: low values leave the mammogram as it is."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colours = colormaps["inferno"](np.linspace(0.25, 1, 256))
    colours[:, 3] = np.minimum(1, np.linspace(0, 1.6, 256)) * 0.75
    return ListedColormap(colours)
