"""Computing probability maps: sliding windows, forward propagation and Grad-CAM, on all breasts of a table."""

import json
import math
import os
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mammo.base.files import InputError, naming, remove_partial
from mammo.base.tables import read_rows
from mammo.base.work import check_same_options, prefetch
from mammo.data.patches import is_file_name, read_lesion_masks
from mammo.images.breast import DMImagePreprocessor
from mammo.images.pixels import Pixels
from mammo.maps.files import MAP_VIEWS, Grid, HeatmapRecord, load_heatmaps, save_heatmaps

if TYPE_CHECKING:
    import keras

# ------------------------------------------------------------------------------------------------- one image


class Scan(NamedTuple):
    """One mammogram as a network takes it but for the mean, and where the cells of its map will be."""

    file: str
    pixels: np.ndarray  # float32 (rows, columns)
    grid: Grid


@dataclass
class Sweep:
    """Sliding windows: the patch classifier's probabilities at windows that sweep the breast (golden).

    The image is resized to `target_height`, the breast cut out and padded by patch_size // 2 zeros, and each window
    of `patch_size` becomes input as `pixels` say, its scale by its own maximum; before the mean is subtracted,
    `preprocess` is given batches (n, patch_size, patch_size, channels). A cell is the centre of its window.

    At most `batch_size` windows are in memory, whatever the image and the stride.
    """

    model: "keras.Model"
    target_height: int
    patch_size: int
    stride: int
    batch_size: int
    pixels: Pixels = field(default_factory=Pixels)
    preprocess: Callable | None = None
    mode = "sweep"

    def __post_init__(self):
        self.strides, self.window = (self.stride, self.stride), (self.patch_size, self.patch_size)
        built, size = self.model.input_shape[1], self.patch_size
        if any(length not in (None, size) for length in self.model.input_shape[1:3]):
            expected = f"Expected {built}, for which the patch classifier is built"
            raise InputError(f"--patch-size {size}: {expected}. Received {size}")

    def read(self, fname: str | Path) -> Scan:
        """Read an image and cut out the breast. Raises InputError."""
        img = Pixels(height=self.target_height).read(fname)
        half = self.patch_size // 2
        with naming(fname):
            breast, (left, top, _, _) = DMImagePreprocessor.segment_breast(img)
            breast = add_img_margins(breast, half)
            tops, lefts = window_grid(breast.shape, self.patch_size, self.stride)
        first = np.array([top + tops[0], left + lefts[0]]) - half + self.patch_size / 2
        return Scan(str(fname), breast, Grid(img.shape, tuple(first.tolist()), self.strides))

    def score(self, scan: Scan) -> np.ndarray:
        """Return the map of an image: float32 (grid rows, grid columns, classes). Raises InputError."""
        tops, lefts = window_grid(scan.pixels.shape, self.patch_size, self.stride)
        count = len(tops) * len(lefts)
        batch = np.zeros((self.batch_size, *self.window, self.model.input_shape[-1]), np.float32)
        quarter = math.ceil(self.batch_size / 4)
        probabilities = []
        starts = range(0, count, self.batch_size)
        for start in tqdm(starts, desc="windows", unit="batch", leave=False, delay=10, disable=None):
            part = range(start, min(start + self.batch_size, count))
            # Four batch sizes, since a network is compiled anew for each: the last batch has idle windows instead.
            x = batch[: math.ceil(len(part) / quarter) * quarter]
            with naming(scan.file):
                for window, i in zip(x, part, strict=False):
                    top, left = tops[i // len(lefts)], lefts[i % len(lefts)]
                    window[...] = cut_window(scan.pixels, top, left, self.patch_size, self.pixels)[..., np.newaxis]
            if self.preprocess is not None:
                x = self.preprocess(x)
            probabilities.append(np.asarray(self.model.predict_on_batch(self.pixels.centered(x)))[: len(part)])
        return np.concatenate(probabilities, dtype=np.float32).reshape(len(tops), len(lefts), -1)


@dataclass
class _WholeImage:
    """Base of the ways that give the network the image at once, read as the trainers read it; `first` is as in `Grid`.

    segment_breast: blank all but the breast, as the patches were that a patch classifier has seen.
    """

    model: "keras.Model"
    pixels: Pixels
    segment_breast: bool = field(default=False, kw_only=True)

    def read(self, fname: str | Path) -> Scan:
        """Read an image. Raises InputError, for one without a breast too."""
        img = self.pixels.read(fname)
        if img.min() == img.max():
            raise InputError(f"{fname}: constant image. Expected a mammogram. Received {img.max():g} in all pixels")
        if self.segment_breast:
            with naming(fname):
                img = DMImagePreprocessor.segment_breast(img, crop=False)[0]
        return Scan(str(fname), img, Grid(img.shape, self.first, self.strides))

    def _input(self, scan: Scan) -> np.ndarray:
        """Return a batch of one, (1, rows, columns, channels), less the mean."""
        img = self.pixels.centered(scan.pixels)
        return np.repeat(img[np.newaxis, ..., np.newaxis], self.model.input_shape[-1], axis=-1)


@dataclass
class ForwardPropagation(_WholeImage):
    """The patch classifier applied to the whole image at once, in one pass of its convolutions (golden).

    `model` is what `dm_resnet.add_top_layers(..., return_heatmap=True)` makes of the classifier: the feature
    map is average-pooled (`avg_pool_size` cells, with strides `hm_strides`), and its last layer applied everywhere.
    A cell stands for the patch that gives `avg_pool_size` features, 224 pixels for 7 of the usual stride 32, and lies
    at its centre.

    The map equals that of `Sweep` over the same windows for a network without padding. With zero padding, as in
    all usual ones, a window's border features see zeros where the whole image has pixels: then the map of a window
    equals the image's at the cells whose features the padding does not reach, those farther from the window's
    border, though not from the image's, than the network's receptive field does; and in a window that is the image.
    """

    avg_pool_size: Sequence[int] = (7, 7)
    hm_strides: Sequence[int] = (1, 1)
    mode = "fprop"

    def __post_init__(self):
        stride, reach = _stride_and_reach(self.model.layers[1])
        self.strides = tuple(float(stride * n) for n in self.hm_strides)
        self.window = tuple(stride * (n - 1) + max(stride, reach) for n in self.avg_pool_size)
        self.first = tuple(size / 2 for size in self.window)

    def score(self, scan: Scan) -> np.ndarray:
        """Return the map of an image: float32 (map rows, map columns, classes)."""
        return np.asarray(self.model.predict_on_batch(self._input(scan)))[0]


def _stride_and_reach(net) -> tuple[int, int]:
    """Return the pixels between the features of a convolutional network, and the size of the smallest image for one."""

    def features(size):
        return net.compute_output_shape((1, size, size, net.input_shape[-1]))[1]

    large = 2048
    count = features(large)
    stride = round(large / (features(2 * large) - count))
    smallest = bisect_left(range(large), count, lo=large - 2 * stride, key=features)  # that gives as many
    return stride, smallest - stride * (count - 1)


@dataclass
class GradCam(_WholeImage):
    """Grad-CAM of a whole-image classifier (Selvaraju et al. 2017): which features speak for a class.

    The map of a class is ReLU(sum_k a_k A_k) of the feature maps A_k, with a_k the mean over the map of the gradient
    of the class's score before the softmax; for a network that ends in global average pooling and a dense layer, the
    class activation map of Zhou et al. 2016 up to its scale. Values are 0 or more, without upper limit; a cell is
    the centre of its feature's receptive field.

    layer: "last" for the last feature map before pooling or flattening, "patch" for that of the nested patch net,
    which is finer; default: the finer one where there is one.
    """

    layer: str | None = None
    mode = "gradcam"

    def __post_init__(self):
        import keras

        image, features = self.model.inputs[0], _feature_tensor(self.model, self.layer)
        self.trunk = keras.Model(image, features)
        self.head = keras.Model(features, _scores_before_softmax(self.model))
        cells = _cells(features, {id(image): _Cells(np.full(2, 0.5), np.ones(2), np.array(self.pixels.size))})
        rows, columns = self.trunk.compute_output_shape((1, *self.pixels.size, image.shape[-1]))[1:3]
        if tuple(cells.count) != (rows, columns):
            expected = f"Expected convolutions and poolings that give {cells.count[0]} x {cells.count[1]} of them"
            raise InputError(f"Grad-CAM: cannot tell where the features are: {expected}. Received {rows} x {columns}")
        self.first, self.strides = tuple(cells.first.tolist()), tuple(cells.strides.tolist())
        self.window = self.strides

    def score(self, scan: Scan) -> np.ndarray:
        """Return the maps of an image: float32 (map rows, map columns, classes)."""
        import keras

        from mammo.train.devices import gradient_of_output

        features = keras.ops.convert_to_tensor(self.trunk.predict_on_batch(self._input(scan)))
        gradients = [gradient_of_output(self.head, features, i) for i in range(self.head.output_shape[-1])]
        weights = np.stack([gradient.mean(axis=(0, 1, 2)) for gradient in gradients], axis=-1)
        return np.maximum(keras.ops.convert_to_numpy(features)[0] @ weights, 0)


# A way to compute maps. Each has a `mode`; `strides`, (rows, columns) of pixels from cell to cell; and `window`, those
# that a cell stands for. `read` gives the Scan of a file, and `score` its map.
Scorer = Sweep | ForwardPropagation | GradCam


class _Cells(NamedTuple):
    """Where the cells of a feature map are in the image: arrays (2,), for rows and columns.

    first: centre of the first cell's receptive field. strides: pixels from cell to cell. count: number of cells.
    """

    first: np.ndarray
    strides: np.ndarray
    count: np.ndarray


def _cells(tensor, known: dict[int, _Cells]) -> _Cells:
    """Return the cells of a tensor inside a network, by the sizes, strides and paddings of the layers before it.

    known: cells by id of tensor, with those of the network's input; others are added. Of branches whose cells differ,
    the middle is taken.
    """
    import keras

    if id(tensor) in known:
        return known[id(tensor)]
    layer, node, _ = tensor._keras_history
    branches = [_cells(before, known) for before in layer._inbound_nodes[node].input_tensors]
    first = np.mean([branch.first for branch in branches], axis=0)
    _, strides, count = branches[0]
    if isinstance(layer, keras.Model):
        first, strides, count = _cells(layer.outputs[0], {id(layer.inputs[0]): branches[0]})
    elif isinstance(layer, keras.layers.ZeroPadding2D):
        first = first - strides * [before for before, _ in layer.padding]
        count = count + np.sum(layer.padding, axis=1)
    elif isinstance(layer, keras.layers.Cropping2D):
        first = first + strides * [before for before, _ in layer.cropping]
        count = count - np.sum(layer.cropping, axis=1)
    elif (kernel := getattr(layer, "kernel_size", getattr(layer, "pool_size", None))) is not None:
        kernel = 1 + (np.array(kernel) - 1) * getattr(layer, "dilation_rate", 1)
        steps = np.array(layer.strides)
        valid = layer.padding == "valid"
        cells = (count - kernel) // steps + 1 if valid else -(-count // steps)
        zeros = 0 if valid else np.maximum((cells - 1) * steps + kernel - count, 0) // 2  # before the first pixel
        first = first + strides * ((kernel - 1) / 2 - zeros)
        strides, count = strides * steps, cells
    known[id(tensor)] = _Cells(first, strides, count)
    return known[id(tensor)]


def _feature_tensor(model, layer: str | None):
    """Return the tensor inside `model` that Grad-CAM looks at; see `GradCam`."""
    import keras

    nested = [i for i, inner in enumerate(model.layers) if isinstance(inner, keras.Model)]
    if nested and layer != "last":
        return model.layers[nested[-1] + 1].input
    if layer == "patch":
        raise InputError("--grad-cam-layer patch: Expected a classifier on a nested patch net. Received another")
    ends = (keras.layers.GlobalAveragePooling2D, keras.layers.GlobalMaxPooling2D, keras.layers.Flatten)
    tensors = [inner.input for inner in model.layers if isinstance(inner, ends)]
    if not tensors:
        expected = "Expected a network whose feature map is pooled globally or flattened"
        last = ", ".join(type(inner).__name__ for inner in model.layers[-3:])
        raise InputError(f"Grad-CAM: {expected}. Received one of {last}")
    return tensors[-1]


def _scores_before_softmax(model):
    """Return the output tensor of `model` without its last softmax."""
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


def read_breasts(
    table: str | Path, img_folder: str | Path, patients: Iterable[str] | None = None
) -> tuple[list[Breast], list[str]]:
    """Read the breasts of a CSV table `patient_id,side,cancer`, in its order, and return the faults met, too.

    Images are `<img_folder>/<patient_id>_<side>_<CC|MLO>.png`. patients: use these alone. Faults are patients
    without a row and breasts without any image. Raises InputError for a table that is wrong.
    """
    breasts, faults, rows = [], [], {}
    wanted = None if patients is None else set(patients)
    for row, cells in read_rows(table, ("patient_id", "side", "cancer")):
        patient, side, cancer = cells["patient_id"], cells["side"], cells["cancer"]
        if not is_file_name(patient):
            raise InputError(f"{row}: patient_id is part of file names. Received {patient!r}")
        if side not in ("LEFT", "RIGHT"):
            raise InputError(f"{row}: unknown side: Expected LEFT or RIGHT. Received {side!r}")
        if cancer not in ("0", "1"):
            raise InputError(f"{row}: cancer: Expected 0 or 1. Received {cancer!r}")
        if (patient, side) in rows:
            line = rows[patient, side].rpartition(", ")[2]
            raise InputError(f"{row}: repeats {line} ({patient} {side}); remove one of them")
        rows[patient, side] = row
        if wanted is not None and patient not in wanted:
            continue
        paths = {view: Path(img_folder, f"{patient}_{side}_{view.upper()}.png") for view in MAP_VIEWS}
        breast = Breast(patient, side, int(cancer), {view: path for view, path in paths.items() if path.exists()})
        if breast.files:
            breasts.append(breast)
        else:
            faults.append(f"{row}: no image of {patient} {side}: Expected {paths['cc']} or {paths['mlo'].name}")
    known = {patient for patient, _ in rows}
    faults += [f"{table}: no row of patient {patient}" for patient in wanted or () if patient not in known]
    return breasts, faults


def check_masks(breast: Breast, roi_mask_dir: str | Path) -> None:
    """Raise InputError for a lesion mask of a breast's images that cannot be used."""
    for view, path in breast.files.items():
        read_lesion_masks(roi_mask_dir, f"{breast.name}_{view.upper()}", path)


def score_breasts(
    breasts: Sequence[Breast],
    scorer: Scorer,
    out: str | os.PathLike,
    *,
    class_names: Sequence[str],
    options: dict[str, Any],
    jobs: int = 1,
    on_error: str = "stop",
    fresh: bool = False,
) -> tuple[list[HeatmapRecord], list[str]]:
    """Compute the maps of all breasts, write the map file `out`, and return the records in order, and the faults met.

    Finished breasts are kept in the folder `<out>.parts` until all are; started again, the work goes on there. Those
    that `out` has are done, too. Images that are newer than their maps are scored again. Raises InputError where maps
    are there of a run with other options, or `out` is no map file.

    options: what the maps depend on, kept in the file. jobs: threads that read images while the network works; the maps
    are the same for any number. on_error: "stop" raises InputError at the first image at fault, "skip" leaves its
    breast out. fresh: begin anew, whatever is there.
    """
    parts, faults = Path(f"{out}.parts"), []
    if fresh:
        shutil.rmtree(parts, ignore_errors=True)
    remove_partial(parts)
    remove_partial(out)
    options = json.loads(json.dumps(options | {"window": [float(size) for size in scorer.window]}))
    header = {"class_names": list(class_names), "strides": scorer.strides, "mode": scorer.mode, "options": options}
    done = _take_up(breasts, header, None if fresh else Path(out), parts)
    todo = [breast for breast in breasts if breast.name not in done]
    parts.mkdir(parents=True, exist_ok=True)
    if done:
        print(f"{len(done)} of {len(breasts)} breasts are done already")
    for breast, result in zip(todo, _score_all(todo, scorer, jobs), strict=True):
        if isinstance(result, InputError):
            if on_error == "stop":
                raise result
            faults.append(str(result))
        else:
            save_heatmaps(parts / f"{breast.name}.npz", [result], **header)
            done[breast.name] = result
    if not done:
        raise InputError(f"{out}: no image could be scored; the first fault: {faults[0]}")
    records = [done[breast.name] for breast in breasts if breast.name in done]
    save_heatmaps(out, records, **header)
    shutil.rmtree(parts)
    return records, faults


def _score_all(breasts: Sequence[Breast], scorer: Scorer, jobs: int) -> Iterator[HeatmapRecord | InputError]:
    """Yield the maps of each breast, or what is at fault with one of its images."""

    def read(breast):
        try:
            return {view: scorer.read(path) for view, path in breast.files.items()}
        except InputError as error:
            return error

    scans = zip(breasts, prefetch(read, breasts, jobs), strict=True)
    for breast, views in tqdm(scans, total=len(breasts), desc="heatmaps", unit="breast", disable=None):
        try:
            yield views if isinstance(views, InputError) else _score_breast(breast, views, scorer)
        except InputError as error:
            yield error


def _score_breast(breast: Breast, views: dict[str, Scan], scorer: Scorer) -> HeatmapRecord:
    record = HeatmapRecord(breast.patient_id, breast.side, breast.cancer)
    for view, scan in views.items():
        heatmap = scorer.score(scan)
        if not np.isfinite(heatmap).all():
            raise InputError(f"{scan.file}: the network gives NaN or infinity: it has diverged")
        record.set_view(view, heatmap, scan.file, scan.grid)
    return record


def _take_up(breasts: Sequence[Breast], header: dict, out: Path | None, parts: Path) -> dict[str, HeatmapRecord]:
    """Return the records, by name, that earlier runs left in the map file `out`, if given, and in `parts`."""
    done = {}
    if out is not None:
        try:
            done = _finished(out, breasts, header)
        except InputError:
            if not any(parts.glob("*.npz")):  # else these are to replace it
                raise
    for breast in breasts:
        done |= _finished(parts / f"{breast.name}.npz", [breast], header)
    return done


def _finished(path: Path, breasts: Sequence[Breast], header: dict) -> dict[str, HeatmapRecord]:
    """Return the records of `breasts`, by name, that an earlier run kept in the map file `path`, with today's labels.

    Records of images that have changed since are left out. Raises InputError for maps of other options, or no maps.
    """
    if not path.exists():
        return {}
    kept = load_heatmaps(path)
    theirs, ours = (
        {"class_names": of["class_names"], "mode": of["mode"]} | of["options"] for of in (vars(kept), header)
    )
    check_same_options(path, theirs, ours, "another --out, or --fresh to replace them")
    written, records = path.stat().st_mtime, {f"{record.patient_id}_{record.side}": record for record in kept.records}
    finished = {}
    for breast in breasts:
        record = records.get(breast.name)
        files = {view: str(file) for view, file in breast.files.items()}
        if record is None or files != {view: file for view, _, file, _ in record.views()}:
            continue
        if all(os.path.getmtime(file) <= written for file in files.values()):
            record.cancer = breast.cancer
            finished[breast.name] = record
    return finished


# ---------------------------------------------------------------------------------------- cutting and windows


def crop_img(img: np.ndarray, bbox: tuple[int, int, int, int]) -> np.ndarray:
    """Return a view of the box (x, y, width, height) of an image (H, W)."""
    x, y, width, height = bbox
    return img[y : y + height, x : x + width]


def add_img_margins(img: np.ndarray, margin_size: int) -> np.ndarray:
    """Return a copy of an image (H, W) with a zero margin of `margin_size` pixels on each side."""
    return np.pad(img, margin_size)


def window_grid(img_shape: tuple[int, int], patch_size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first rows and columns of the windows that sweep an image, the leftover split to both sides (golden)."""

    if min(img_shape) < patch_size or stride < 1:
        received = f"patch_size {patch_size}, stride {stride} for an image of {img_shape}"
        raise InputError(f"Expected windows within the image and a stride of at least 1. Received {received}.")
    rows, columns = (np.arange(last % stride // 2, last + 1, stride) for last in np.subtract(img_shape, patch_size))
    return rows, columns


def cut_window(img: np.ndarray, top: int, left: int, patch_size: int, pixels: Pixels) -> np.ndarray:
    """Return one window of a sweep, float32 (patch_size, patch_size), scaled and equalised as `pixels` say."""
    return pixels.rescale(img[top : top + patch_size, left : left + patch_size])


def sweep_img_patches(
    img: np.ndarray, patch_size: int, stride: int, target_scale: float | None = None, equalize_hist: bool = False
) -> tuple[np.ndarray, int, int]:
    """Return all windows of an image (H, W), float32 (n, patch_size, patch_size), and the rows and columns of the grid.

    Each window is scaled by its own maximum to `target_scale`, then equalised if asked (golden).
    """
    tops, lefts = window_grid(img.shape, patch_size, stride)
    pixels = Pixels(scale=target_scale, equalize=equalize_hist)
    windows = [cut_window(img, top, left, patch_size, pixels) for top in tops for left in lefts]
    return np.stack(windows), len(tops), len(lefts)


def get_prob_heatmap(
    img_list: str | Path | Sequence[str | Path] | None,
    target_height: int,
    target_scale: float | None,
    patch_size: int,
    stride: int,
    model: "keras.Model",
    batch_size: int,
    featurewise_center: bool = False,
    featurewise_mean: float = 91.6,
    preprocess: Callable | None = None,
    parallelized: bool = False,
    equalize_hist: bool = False,
) -> list[np.ndarray | None]:
    """Return the maps of `Sweep`, float32 (grid rows, grid columns, classes), of each image (golden); [None] for None.

    img_list: a file name, a list of them, or None. target_scale: each window's own maximum becomes this. model: a Keras
    model of patches (patch_size, patch_size, channels). parallelized: ignored; kept for old scripts.
    """
    if img_list is None:
        return [None]
    if isinstance(img_list, (str, os.PathLike)):
        img_list = [img_list]
    pixels = Pixels(None, target_scale, None, equalize_hist, featurewise_mean if featurewise_center else None)
    sweep = Sweep(model, target_height, patch_size, stride, batch_size, pixels, preprocess)
    return [sweep.score(sweep.read(fname)) for fname in img_list]
