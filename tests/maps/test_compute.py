"""Probability maps: golden runs, where cells are, map files, resuming, pictures, bad input."""

import gzip
import inspect
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
from keras import layers

from ddsm_train import heatmap_score
from dm_resnet import add_top_layers
from mammo.base.files import InputError
from mammo.data.patches import read_lesion_masks
from mammo.images.pixels import OF_MODEL, Pixels
from mammo.maps import compute, draw, files
from mammo.maps.compute import ForwardPropagation, GradCam, Scan, Sweep
from mammo.maps.draw import share_of_largest
from mammo.maps.files import Grid, load_heatmaps
from mammo.train.checkpoint import save_model
from mammo.train.devices import gradient_of_output
from tests.helpers import ROOT, check_options, make_python, write_picture

rng = np.random.default_rng(3)


def small_net(padding, channels=1, nb_class=3, seed=7):
    """A patch classifier of stride 4, for images of any size."""
    keras.utils.set_random_seed(seed)
    x = image = keras.Input((None, None, channels))
    for _ in range(2):
        x = layers.Conv2D(6, 3, padding=padding, activation="relu", bias_initializer="random_normal")(x)
        x = layers.MaxPooling2D(2)(x)
    output = layers.Dense(nb_class, activation="softmax", name="classes")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, output)


def pooling_net(stride, nb_class=2):
    """A patch classifier of max pooling alone: a feature sees `stride` x `stride` pixels."""
    image = keras.Input((None, None, 1))
    x = layers.GlobalAveragePooling2D()(layers.MaxPooling2D(stride)(image))
    net = keras.Model(image, layers.Dense(nb_class, activation="softmax")(x))
    net.layers[-1].set_weights([np.eye(1, nb_class, 1, dtype=np.float32), np.zeros(nb_class, np.float32)])
    return net


def write_breasts(folder, breasts, shape=(64, 48)):
    """16-bit phantoms `<patient>_<side>_<view>.png` and their pat.csv; breasts: (patient, side, cancer, views)."""
    folder.mkdir(exist_ok=True)
    lines = ["patient_id,side,cancer"]
    for patient, side, cancer, views in breasts:
        lines.append(f"{patient},{side},{cancer}")
        for view in views.split():
            img = np.zeros(shape, np.uint16)
            img[4:-4, 6:-10] = rng.integers(20000, 60000, (shape[0] - 8, shape[1] - 16))
            cv2.imwrite(str(folder / f"{patient}_{side}_{view}.png"), img)
    (folder / "pat.csv").write_text("\n".join(lines) + "\n")
    return folder


class Bright:
    """Stands in for a patch classifier: the mean of a window's four middle pixels."""

    input_shape = (None, None, None, 1)

    def __init__(self):
        self.batches = []

    def predict_on_batch(self, x):
        self.batches.append(len(x))
        middle = x.shape[1] // 2
        spot = x[:, middle - 1 : middle + 1, middle - 1 : middle + 1].mean(axis=(1, 2, 3)) / 60000
        return np.stack([1 - spot, spot], axis=1)


class Means:
    """Stands in for a scorer: the mean pixel of an image, as a map of one cell."""

    mode, strides, window = "sweep", (8.0, 8.0), (16, 16)

    def __init__(self):
        self.read_files = []

    def read(self, fname):
        self.read_files.append(Path(fname).name)
        img = cv2.imread(str(fname), cv2.IMREAD_UNCHANGED)
        if img is None:
            raise InputError(f"{fname}: unreadable")
        return Scan(str(fname), img.astype(np.float32), Grid(img.shape, (8.0, 8.0), self.strides))

    def score(self, scan):
        return np.full((1, 1, 2), scan.pixels.mean(), np.float32)


def score(folder, scorer, out, **kwargs):
    breasts, _ = compute.read_breasts(folder / "pat.csv", folder)
    options = {"class_names": ["background", "lesion"], "options": {"mean": 1.0}} | kwargs
    return compute.score_breasts(breasts, scorer, out, **options)


# --------------------------------------------------------------------------------------------------------- golden


@pytest.fixture(scope="module")
def golden_models(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    def unpacked(name):
        path = folder / f"{name}.h5"
        if not path.exists():
            path.write_bytes(gzip.decompress((golden / "checkpoints" / f"{name}.h5.gz").read_bytes()))
        return str(path)

    return unpacked


@pytest.mark.slow
@pytest.mark.parametrize(("run", "ending"), [("program_nolist", "pkl"), ("program_list", "npz")])
def test_golden_runs_of_the_program(golden, golden_models, tmp_path, run, ending):
    folder = golden / "heatmap"
    case = json.loads((folder / "heatmap.json").read_text())[run]
    args = [str(folder / "input" / arg) if arg in ("pat.csv", "pat_list.txt") else arg for arg in case["args"]]
    out = tmp_path / f"maps.{ending}"
    assert heatmap_score.main([str(folder / "input"), golden_models("patch_vgg16"), *args, "--out", str(out)]) == 0
    with np.load(folder / "heatmaps.npz") as arrays:
        expected = {key.removeprefix("program_"): arrays[key] for key in arrays if key.startswith("program_")}
    maps = load_heatmaps(out)
    ours = {f"{r.patient_id}_{r.side}_{view}": array for r in maps.records for view, array, *_ in r.views()}
    # With a list, the published program loses the first patient; here none is lost.
    assert ours.keys() == expected.keys()
    for key, array in ours.items():
        np.testing.assert_allclose(array, expected[key], atol=1e-4, err_msg=key)
    wanted = json.loads((folder / "heatmap.json").read_text())["program_nolist"]["records"]
    for found, record in zip(maps.records, wanted, strict=True):
        assert (found.patient_id, found.side, found.cancer) == tuple(
            record[name] for name in ("patient_id", "side", "cancer")
        )
    if ending == "pkl":  # as old scripts open it
        dicts = pickle.loads(out.read_bytes())
        assert [d["mlo"] is None for d in dicts] == [r["mlo"] is None for r in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["vgg16", "yaroslav", "resnet50"])
def test_golden_forward_propagation(golden, golden_models, tmp_path, net):
    folder = golden / "heatmap"
    cases = [c for c in json.loads((folder / "heatmap.json").read_text())["fprop_intended"] if c["net"] == net]
    (tmp_path / "list.txt").write_text("P_00011\n")
    arrays = np.load(folder / "heatmaps.npz")
    assert cases
    for case in cases:
        options = {name: case[name] for name in ("avg_pool_size", "hm_strides", "rescale_factor")}
        options |= {"img_size": case["image_size"], "featurewise_center": True, "featurewise_mean": case["mean"]}
        options |= {"pat_csv": str(folder / "input" / "pat.csv"), "pat_list": str(tmp_path / "list.txt")}
        places = str(folder / "input"), golden_models(case["model"])
        heatmap_score.run(*places, fprop_mode=True, net=net, out=str(tmp_path / "m.h5"), fresh=True, **options)
        [record] = load_heatmaps(tmp_path / "m.h5").records
        for view, array, *_ in record.views():
            key = case["key"].rsplit("_", 1)[0] + f"_{view.upper()}"
            np.testing.assert_allclose(array, arrays[key], atol=1e-4, err_msg=key)


def test_options_are_those_of_the_original(spec):
    parser = heatmap_score.make_parser()
    # What the model's training may tell defaults to the published value where it does not.
    of_model = {name for name in heatmap_score.PUBLISHED if parser.get_default(name) is OF_MODEL}
    parser.set_defaults(**{name: heatmap_score.PUBLISHED[name] for name in of_model})
    check_options(parser, json.loads((spec / "cli_flags.json").read_text())["heatmap_score"])


# ---------------------------------------------------------------------------------------------- where cells are


@pytest.mark.parametrize("enlarged", [1, 2])
@pytest.mark.parametrize(("row", "column"), [(30, 20), (61, 33), (10, 9)])
def test_a_bright_spot_is_where_the_sweep_says(tmp_path, enlarged, row, column):
    # Around it a breast that neither starts at a corner nor fills the image; the file may be larger than the map's.
    img = np.zeros((80, 64), np.uint16)
    img[7:74, 5:50] = 10000
    img[row : row + 2, column : column + 2] = 60000
    img = np.kron(img, np.ones((enlarged, enlarged), np.uint16))
    cv2.imwrite(str(tmp_path / "a.png"), img)
    sweep = Sweep(Bright(), 80, 8, 1, 64)
    scan = sweep.read(tmp_path / "a.png")
    heatmap = sweep.score(scan)[..., 1]
    rows, columns = scan.grid.centres(heatmap.shape)
    i, j = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert (rows[i], columns[j]) == (row + 1, column + 1)
    drawn = files.resample(heatmap, scan.grid)
    assert drawn.shape == scan.grid.image_size == (80, 64)
    peaks = np.argwhere(drawn == np.nanmax(drawn))
    assert tuple(peaks.mean(axis=0) + 0.5) == (row + 1, column + 1)


def forward_propagation(net, size, pooling):
    heatmap_model = add_top_layers(net, size, patch_net="vgg16", avg_pool_size=pooling, return_heatmap=True)
    return ForwardPropagation(heatmap_model, Pixels(size), pooling)


@pytest.mark.parametrize("pooling", [(1, 1), (3, 3), (3, 2)])
def test_a_bright_spot_is_where_the_forward_propagation_says(pooling):
    net = pooling_net(4)
    kernel, bias = net.layers[-1].get_weights()
    net.layers[-1].set_weights([kernel / 100, bias])  # so small that the softmax is linear
    forward = forward_propagation(net, (80, 64), pooling)
    assert forward.strides == (4, 4) and forward.window == (4 * pooling[0], 4 * pooling[1])
    assert forward.first == (2 * pooling[0], 2 * pooling[1])
    pixels = np.zeros((80, 64), np.float32)
    pixels[40:44, 20:24] = 1
    grid = Grid((80, 64), forward.first, forward.strides)
    heatmap = forward.score(Scan("", pixels, grid))[..., 1]
    heatmap -= heatmap[0, 0]  # 0.5, but for the rounding of the processor's softmax
    rows, columns = grid.centres(heatmap.shape)
    centroid = (heatmap.sum(1) @ rows / heatmap.sum(), heatmap.sum(0) @ columns / heatmap.sum())
    assert centroid == pytest.approx((42, 22), abs=0.02)


def test_a_bright_spot_is_where_grad_cam_says():
    # Images need not be a multiple of the stride: what is left over below and on the right gives no feature.
    cam = GradCam(pooling_net(8), Pixels((63, 50)))
    pixels = np.zeros((63, 50), np.float32)
    pixels[48:56, 16:24] = 1
    heatmap = cam.score(Scan("", pixels, None))[..., 1]
    rows, columns = Grid((63, 50), cam.first, cam.strides).centres(heatmap.shape)
    i, j = np.unravel_index(heatmap.argmax(), heatmap.shape)
    assert heatmap.shape == (7, 6) and (rows[i], columns[j]) == (52, 20)


def test_a_bright_spot_is_where_grad_cam_of_the_last_layer_says():
    # The published top: 7 x 7 features averaged, then the maximum of 5 x 5, without padding, then dense layers.
    size = (1152, 896)
    pools = {"avg_pool_size": (7, 7), "hm_pool_size": (5, 5)}
    model, _ = add_top_layers(pooling_net(32), size, "vgg16", add_heatmap=True, add_conv=False, **pools)
    cam = GradCam(model, Pixels(size), layer="last")
    centres = Grid(size, cam.first, cam.strides).centres(cam.trunk.output_shape[1:3])
    assert [list(axis) for axis in centres] == [[176, 336, 496, 656, 816, 976], [176, 336, 496, 656]]
    # The first cell sees the first 7 + 4 features, the second begins 5 features on.
    for row, cells in ((16, [0]), (5 * 32 - 16, [0]), (5 * 32 + 16, [0, 1]), (11 * 32 - 16, [0, 1, 2]), (400, [1, 2])):
        pixels = np.zeros(size, np.float32)
        pixels[row, 16] = 1
        features = cam.trunk.predict(pixels[None, ..., None], verbose=0)[0, :, 0, 1]
        assert [i for i, value in enumerate(features) if value > 0] == cells
        assert all(abs(centres[0][i] - row) < 11 * 32 / 2 for i in cells)


def averaging(model):
    """The network with convolutions and poolings that take the mean of what they see: then all of it counts alike."""

    def clone(layer):
        if isinstance(layer, layers.MaxPooling2D):
            return layers.AveragePooling2D(layer.pool_size, layer.strides, layer.padding)
        return layer.__class__.from_config(layer.get_config())

    model = keras.models.clone_model(model, clone_function=clone)
    for layer in model.layers:
        if not isinstance(layer, layers.BatchNormalization):
            # The last axis but one is summed too, except in depthwise kernels, whose last has one entry.
            weights = layer.get_weights()
            seen = [np.prod(w.shape[: 2 if w.shape[-1] == 1 else -1]) for w in weights]
            layer.set_weights([np.full(w.shape, w.ndim > 1) / n for w, n in zip(weights, seen, strict=True)])
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "size"),
    [("yaroslav", (480, 384)), ("resnet50", (480, 500)), ("xception", (500, 480)), ("inception", (480, 501))],
)
def test_cells_of_grad_cam_are_the_middles_of_what_features_see(net, size):
    """Second implementation: the centre of gravity of a feature's derivatives by the pixels."""
    from dm_keras_ext import get_dl_model

    model = averaging(get_dl_model(net, nb_class=3, use_pretrained=False)[0])
    cam = GradCam(model, Pixels(size))
    *_, channels = model.input_shape
    x = keras.ops.convert_to_tensor(100 + rng.random((1, *size, channels)).astype(np.float32))
    shape = cam.trunk(x).shape[1:3]
    rows, columns = Grid(size, cam.first, cam.strides).centres(shape)
    i, j = shape[0] // 2, shape[1] // 2
    feature = keras.Model(cam.trunk.inputs, cam.trunk.outputs[0][:, i, j, :])
    sees = np.abs(gradient_of_output(feature, x, 0))[0].sum(axis=-1)
    middle = (sees.sum(1) @ (np.arange(size[0]) + 0.5), sees.sum(0) @ (np.arange(size[1]) + 0.5)) / sees.sum()
    # Exact but for the branches of Inception, of which some reach the image's border.
    assert (rows[i], columns[j]) == pytest.approx(tuple(middle), abs=1)
    # Pictures show the outermost cells up to the edges: the last feature sees all but what convolutions without padding
    # leave over.
    feature = keras.Model(cam.trunk.inputs, cam.trunk.outputs[0][:, -1, -1, :])
    sees = np.abs(gradient_of_output(feature, x, 0))[0].sum(axis=-1)
    assert sees[-4, -4] > 0


def test_grad_cam_refuses_layers_whose_features_it_cannot_place():
    image = keras.Input((32, 32, 1))
    x = layers.GlobalAveragePooling2D()(layers.UpSampling2D(2)(layers.Conv2D(2, 3)(image)))
    with pytest.raises(InputError, match=r"Expected convolutions and poolings that give 30 x 30 .* Received 60 x 60"):
        GradCam(keras.Model(image, layers.Dense(2, activation="softmax")(x)), Pixels((32, 32)))


def test_networks_whose_features_lie_otherwise():
    # A 3x3 average "same" net in three forms: cells are as large as the patch that gives them.
    for padding, windows in (("same", 4 * 3), ("valid", 4 * 2 + 10)):
        forward = forward_propagation(small_net(padding), (64, 64), (3, 3))
        assert forward.strides == (4, 4)
        assert forward.window == (windows, windows)
        pixels = np.zeros((windows, windows), np.float32)
        single = forward_propagation(small_net(padding), (windows, windows), (3, 3))
        assert single.score(Scan("", pixels, None)).shape == (1, 1, 3)


def test_resampling_is_linear_between_cells_and_nowhere_else():
    grid = Grid((20, 16), (6.0, 4.0), (4.0, 2.0))
    rows, columns = grid.centres((3, 5))
    drawn = files.resample(2 * rows[:, None] + 3 * columns, grid)
    row, column = np.arange(20) + 0.5, np.arange(16) + 0.5
    inside = np.ix_((row >= 6) & (row <= 14), (column >= 4) & (column <= 12))
    np.testing.assert_allclose(drawn[inside], (2 * row[:, None] + 3 * column)[inside], rtol=1e-6)
    shown = np.ix_((row >= 4) & (row <= 16), (column >= 3) & (column <= 13))
    assert np.isfinite(drawn[shown]).all() and np.isfinite(drawn).sum() == drawn[shown].size


def test_grad_cam_is_drawn_to_the_edges_of_the_image():
    """Second implementation: NumPy's interpolation, which is constant beyond the first and the last point. The grid is
    that of ResNet50, of stride 32 from the first pixel on."""
    grid, heatmap = Grid((96, 70), (0.5, 0.5), (32.0, 32.0)), np.outer([1, 5, 2], [4, 0, 2.0])
    rows, columns = grid.centres(heatmap.shape)
    drawn = share_of_largest(heatmap, grid)
    along = [np.interp(np.arange(n) + 0.5, *axis) for n, axis in ((96, (rows, [1, 5, 2])), (70, (columns, [4, 0, 2])))]
    np.testing.assert_allclose(drawn, np.outer(*along) / 20, rtol=1e-6)
    assert np.isnan(files.resample(heatmap, grid)).mean() == 15 / 96


# --------------------------------------------------------------------------------- one pass against the windows


def test_one_pass_equals_the_windows_of_a_network_without_padding():
    net, pixels = small_net("valid"), rng.random((58, 46)).astype(np.float32)
    forward = forward_propagation(net, pixels.shape, (4, 4))
    patch = forward.window[0]
    assert patch == 22
    windows = Sweep(net, 58, patch, 4, 7).score(Scan("", pixels, None))
    once = forward.score(Scan("", pixels, None))
    assert windows.shape == once.shape == (10, 7, 3)
    np.testing.assert_allclose(once, windows, atol=1e-6)
    assert np.ptp(once[..., 0]) > 1e-3


def test_one_pass_equals_the_windows_that_padding_does_not_reach():
    net, pixels = small_net("same"), rng.random((64, 48)).astype(np.float32)

    def forward(img):
        scorer = forward_propagation(net, img.shape, (2, 2))
        return scorer.score(Scan("", img, None))

    # A feature of 4 x 4 pixels sees 3 pixels around them: the outer features of a window see its padding.
    whole, window = forward(pixels), forward(pixels[16:48, 8:40])
    inside = whole[4 : 4 + 7, 2 : 2 + 7]
    np.testing.assert_allclose(window[1:-1, 1:-1], inside[1:-1, 1:-1], atol=1e-6)
    assert np.abs(window - inside)[0].max() > 1e-4
    # And a window that is the image.
    [[alone]] = Sweep(net, 8, 8, 4, 1).score(Scan("", pixels[:8, :8], None))
    np.testing.assert_allclose(forward(pixels[:8, :8])[0, 0], alone, atol=1e-6)


def test_few_windows_are_held_whatever_the_image_and_the_stride():
    class Counting(Bright):
        def predict_on_batch(self, x):
            assert x.nbytes == len(x) * 32 * 32 * 4 and len(x) <= 100
            return np.zeros((len(x), 2), np.float32)

    pixels = np.zeros((4096, 1024), np.float32)
    sweep = Sweep(Counting(), 4096, 32, 8, 100)
    tracemalloc.start()
    try:
        heatmap = sweep.score(Scan("", pixels, None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert heatmap.shape == (509, 125, 2)
    batch = 100 * 32 * 32 * 4
    assert peak < heatmap.nbytes + 3 * batch + 2**20 < pixels.nbytes


def test_last_batch_adds_few_sizes():
    model = Bright()
    heatmap = Sweep(model, 20, 4, 4, 16).score(Scan("", np.zeros((20, 40), np.float32), None))
    assert heatmap.shape == (5, 10, 2)
    assert model.batches == [16, 16, 16, 4]


# ------------------------------------------------------------------------------------------------------ Grad-CAM


def test_grad_cam_of_average_pooling_is_the_class_activation_map():
    net = small_net("same")
    kernel, bias = net.get_layer("classes").get_weights()
    net.get_layer("classes").set_weights([kernel + [0.5, 0, -0.5], bias])  # of one class at least, some is positive
    pixels = rng.random((32, 24)).astype(np.float32)
    cam = GradCam(net, Pixels((32, 24)))
    heatmap = cam.score(Scan("", pixels, None))
    features = cam.trunk.predict(pixels[None, ..., None], verbose=0)[0]
    kernel = net.get_layer("classes").get_weights()[0]
    np.testing.assert_allclose(heatmap, np.maximum(features @ kernel, 0) / features[..., 0].size, atol=1e-6)
    assert cam.strides == (4, 4) and heatmap.max() > 0


@pytest.mark.parametrize("add_conv", [True, False])
def test_grad_cam_of_whole_image_classifiers(add_conv):
    net = small_net("same")
    kernel, bias = net.get_layer("classes").get_weights()
    net.get_layer("classes").set_weights([np.abs(kernel), bias + 0.1])  # the heatmap's ReLU lets all through
    top = {"add_heatmap": not add_conv, "add_conv": add_conv, "avg_pool_size": (2, 2), "hm_pool_size": (3, 3)}
    top |= {"depths": [5], "repetitions": [1], "fc_init_units": 8, "add_shortcut": True}
    model, _ = add_top_layers(net, (64, 48), "vgg16", "vgg", **top)
    pixels = rng.random((64, 48)).astype(np.float32) * 50
    cam, last = GradCam(model, Pixels((64, 48))), GradCam(model, Pixels((64, 48)), layer="last")
    assert cam.trunk.output_shape[1:] == (16, 12, 6)
    assert last.score(Scan("", pixels, None)).shape == ((8, 6, 2) if add_conv else (5, 3, 2))
    # The scores before the softmax, and their gradient by differences.
    x = pixels[None, ..., None]
    features = cam.trunk.predict(x, verbose=0)
    scores = cam.head.predict(features, verbose=0)
    np.testing.assert_allclose(keras.ops.softmax(scores), model.predict(x, verbose=0), atol=1e-5)
    gradient = gradient_of_output(cam.head, keras.ops.convert_to_tensor(features), 1)
    step = 1e-2 * gradient / np.abs(gradient).max()
    ahead, behind = (cam.head.predict(features + sign * step, verbose=0)[0, 1] for sign in (1, -1))
    assert ahead - behind == pytest.approx(2 * (gradient * step).sum(), rel=0.02)


def test_grad_cam_layer_errors():
    with pytest.raises(InputError, match="nested patch net"):
        GradCam(small_net("same"), Pixels((32, 32)), layer="patch")
    image = keras.Input((4, 4, 1))
    with pytest.raises(InputError, match="pooled globally or flattened"):
        GradCam(keras.Model(image, layers.Reshape((16,))(image)), Pixels((4, 4)))


# ---------------------------------------------------------------------------------------------- tables, resuming

BREASTS = [
    ("P_1", "LEFT", 1, "CC MLO"),
    ("P_1", "RIGHT", 0, "CC"),
    ("P_2", "LEFT", 0, "MLO"),
    ("P_3", "RIGHT", 1, "CC"),
]


def test_results_do_not_depend_on_the_number_of_jobs(tmp_path):
    folder = write_breasts(tmp_path / "img", BREASTS)
    for jobs in (1, 4):
        records, faults = score(folder, Means(), tmp_path / f"{jobs}.npz", jobs=jobs)
        assert [f"{r.patient_id} {r.side}" for r in records] == [f"{b[0]} {b[1]}" for b in BREASTS]
        assert faults == [] and records[1].mlo is None
    one, four = (load_heatmaps(tmp_path / f"{jobs}.npz").records for jobs in (1, 4))
    assert all(np.array_equal(a.cc, b.cc) for a, b in zip(one, four, strict=True) if a.cc is not None)


def test_a_killed_run_goes_on(tmp_path):
    folder = write_breasts(tmp_path / "img", BREASTS)
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import cv2, numpy as np
from mammo.maps import compute
from mammo.base.files import InputError
from mammo.maps.files import Grid
from mammo.maps.compute import Scan

{inspect.getsource(Means)}

{inspect.getsource(score)}

class Killed(Means):
    def score(self, scan):
        if "P_2" in scan.file:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().score(scan)

score(Path({str(folder)!r}), Killed(), {str(tmp_path / "maps.npz")!r})
"""
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "maps.npz").exists()
    parts = tmp_path / "maps.npz.parts"
    assert sorted(path.name for path in parts.glob("P_*")) == ["P_1_LEFT.npz", "P_1_RIGHT.npz"]

    with pytest.raises(InputError, match=r"other options \(mean 1.0 there, 2.0 now\)"):
        score(folder, Means(), tmp_path / "maps.npz", options={"mean": 2.0})
    # An image written anew is scored anew.
    os.utime(folder / "P_1_RIGHT_CC.png", (2e9, 2e9))
    scorer = Means()
    score(folder, scorer, tmp_path / "maps.npz")
    assert sorted(scorer.read_files) == ["P_1_RIGHT_CC.png", "P_2_LEFT_MLO.png", "P_3_RIGHT_CC.png"]
    assert not parts.exists()
    score(folder, Means(), tmp_path / "fresh.npz")
    resumed, fresh = (load_heatmaps(tmp_path / name).records for name in ("maps.npz", "fresh.npz"))
    for one, two in zip(resumed, fresh, strict=True):
        np.testing.assert_equal(vars(one), vars(two))


def test_what_is_finished_takes_todays_labels_and_is_done(tmp_path):
    folder, out = write_breasts(tmp_path / "img", BREASTS), tmp_path / "maps.npz"
    broken = folder / "P_3_RIGHT_CC.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(InputError, match="unreadable"):
        score(folder, Means(), out)
    broken.write_bytes(whole)
    table = folder / "pat.csv"
    table.write_text(table.read_text().replace("P_1,RIGHT,0", "P_1,RIGHT,1"))
    scorer = Means()
    records, _ = score(folder, scorer, out)
    assert scorer.read_files == [broken.name]
    assert [record.cancer for record in records] == [1, 1, 0, 1]
    assert [record.cancer for record in load_heatmaps(out).records] == [1, 1, 0, 1]
    # A finished file is done, too: with other breasts, of them those that it has. Other options are refused.
    table.write_text(table.read_text().replace("P_2,LEFT,0", "P_2,LEFT,1"))
    scorer = Means()
    records, _ = score(folder, scorer, out)
    assert scorer.read_files == [] and [record.cancer for record in records] == [1, 1, 1, 1]
    with pytest.raises(InputError, match=r"maps\.npz: has the work .* \(mean 1.0 there, 2.0 now\).*--fresh"):
        score(folder, scorer, out, options={"mean": 2.0})
    assert scorer.read_files == [] and load_heatmaps(out).options == {"mean": 1.0, "window": [16.0, 16.0]}
    # The earlier maps stay until the new ones are whole; a stopped run goes on without being told to begin anew.
    broken.write_bytes(b"")
    with pytest.raises(InputError, match="unreadable"):
        score(folder, Means(), out, options={"mean": 2.0}, fresh=True)
    assert load_heatmaps(out).options["mean"] == 1.0
    broken.write_bytes(whole)
    score(folder, scorer, out, options={"mean": 2.0})
    assert scorer.read_files == [broken.name] and load_heatmaps(out).options["mean"] == 2.0
    out.write_bytes(b"what is no map")
    with pytest.raises(InputError, match=r"maps\.npz"):
        score(folder, scorer, out)
    assert out.read_bytes() == b"what is no map" and not list(tmp_path.glob("*.parts"))


def test_breasts_of_a_table(tmp_path):
    folder = write_breasts(tmp_path / "img", [*BREASTS, ("P_4", "LEFT", 0, "")])
    breasts, faults = compute.read_breasts(folder / "pat.csv", folder, ["P_2", "P_1", "P_9"])
    expected = [("P_1_LEFT", 1, ["cc", "mlo"]), ("P_1_RIGHT", 0, ["cc"]), ("P_2_LEFT", 0, ["mlo"])]
    assert [(breast.name, breast.cancer, sorted(breast.files)) for breast in breasts] == expected
    assert faults == [f"{folder / 'pat.csv'}: no row of patient P_9"]
    [fault] = compute.read_breasts(folder / "pat.csv", folder)[1]
    assert "line 6: no image of P_4 LEFT" in fault


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("P_1,UP,1", "line 3: unknown side"),
        ("P_1,LEFT,2", "line 3: cancer: Expected 0 or 1. Received '2'"),
        ("P_0,LEFT,1", "line 3: repeats line 2"),
        ("../img/P_1,LEFT,1", "line 3: patient_id is part of file names. Received '../img/P_1'"),
        ("P:1,LEFT,1", "line 3: patient_id is part of file names"),
        ("..,LEFT,1", "line 3: patient_id is part of file names"),
        ("P_1,LEFT", "line 3: Expected 3 cells. Received 2"),
    ],
)
def test_wrong_tables_name_the_row(tmp_path, row, message):
    (tmp_path / "pat.csv").write_text(f"patient_id,side,cancer\nP_0,LEFT,0\n{row}\n")
    with pytest.raises(InputError, match=message):
        compute.read_breasts(tmp_path / "pat.csv", tmp_path)


# ----------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    patch = small_net("same", channels=3, nb_class=5)
    save_model(patch, folder / "patch.h5")
    image, _ = add_top_layers(patch, (64, 48), "vgg16", "vgg", depths=[4], repetitions=[1])
    save_model(image, folder / "image.h5")
    return folder


def command(folder, model, out, *args):
    base = ["--jobs", 1, "--rescale-factor", 0.003891, "--img-size", 64, 48, "--net", "vgg16"]
    words = [folder, model, *base, "--pat-csv", folder / "pat.csv", "--out", out, *args]
    return heatmap_score.main([*map(str, words)])


@pytest.mark.parametrize(
    ("model", "args", "mode", "classes", "shape"),
    [
        ("patch.h5", ["--fprop-mode", "--avg-pool-size", 4, 4, "--segment-breast"], "fprop", 5, (13, 9)),
        ("patch.h5", ["--patch-size", 16, "--stride", 12, "--img-height", 32], "sweep", 5, None),
        ("patch.h5", ["--grad-cam"], "gradcam", 5, (16, 12)),
        ("image.h5", ["--featurewise-center", "--equalize-hist"], "gradcam", 2, (16, 12)),
        ("image.h5", ["--grad-cam-layer", "last"], "gradcam", 2, (8, 6)),
    ],
)
def test_every_mode_and_its_pictures(tmp_path, models, model, args, mode, classes, shape):
    folder = write_breasts(tmp_path / "img", BREASTS[1:3])
    masks, mask = tmp_path / "masks", np.zeros((64, 48), np.uint8)
    mask[20:40, 15:30] = 255
    write_picture(masks / "Mass-Training_P_1_RIGHT_CC_1.png", mask)
    (tmp_path / "list.txt").write_text("patient_id\nP_1\n")
    pictures = ["--overlay", tmp_path / "pictures", "--roi-mask-dir", masks, "--pat-list", tmp_path / "list.txt"]
    assert command(folder, models / model, tmp_path / "maps", *args, *pictures) == 0
    maps = load_heatmaps(tmp_path / "maps.npz")
    assert maps.mode == mode and len(maps.class_names) == classes and "featurewise_mean" in maps.options
    for record in maps.records:
        for _, heatmap, file, grid in record.views():
            assert Path(file).exists() and heatmap.shape[2] == classes and np.isfinite(heatmap).all()
            if shape is not None:
                assert heatmap.shape[:2] == shape and grid.image_size == (64, 48)
            else:
                assert grid.image_size == (32, 24)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["P_1_RIGHT_CC.png"]
    assert all(min(cv2.imread(str(tmp_path / "pictures" / name)).shape[:2]) > 300 for name in names)


TRAINED = {
    **{"img_size": [16, 16], "img_scale": None, "rescale_factor": 0.002, "equalize_hist": False},
    **{"featurewise_center": True, "featurewise_mean": 40.5, "class_list": ["background", *"abcd"]},
}


@pytest.mark.parametrize("told", [True, False])
def test_options_are_taken_from_the_models_training_and_else_are_the_published_ones(tmp_path, models, capsys, told):
    folder, out = write_breasts(tmp_path / "img", BREASTS[:1]), tmp_path / "maps.npz"
    model = Path(shutil.copy(models / "patch.h5", tmp_path))
    if told:
        (tmp_path / "patch").mkdir()
        (tmp_path / "patch" / "args.json").write_text(json.dumps(TRAINED))
    args = ["--img-height", "288", "--stride", "128", "--featurewise-mean", "30"]
    assert (
        heatmap_score.main([str(folder), str(model), "--pat-csv", f"{folder}/pat.csv", "--out", str(out), *args]) == 0
    )
    maps, expected = load_heatmaps(out), TRAINED if told else heatmap_score.PUBLISHED
    expected = {name: expected[name] for name in heatmap_score.SHARED_OPTIONS} | {"featurewise_mean": 30}
    assert {name: maps.options[name] for name in expected} == expected
    assert maps.options["patch_size"] == (16 if told else 256) and maps.class_names[0] == "background"
    assert "args.json" in capsys.readouterr().out and (maps.class_names[1] == "a") == told
    # Whole images are as large as the published ones: patches were resized to another size.
    args, _ = heatmap_score.with_options_of_model(heatmap_score.make_parser().parse_args([str(folder), str(model)]))
    assert args.img_size == [1152, 896]


def test_a_whole_image_classifier_without_a_network_inside_is_refused_where_a_patch_classifier_is_meant(
    tmp_path, models, capsys
):
    folder = write_breasts(tmp_path / "img", BREASTS[:1])
    image = keras.Input((64, 48, 3))
    features = layers.Conv2D(4, 3, activation="relu")(image)
    scores = layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(features))
    save_model(keras.Model(image, scores), tmp_path / "flat.h5")
    for args in ([], ["--fprop-mode"]):
        assert command(folder, tmp_path / "flat.h5", tmp_path / "a", *args) == 1
        assert "Received a whole-image classifier, of images of 64 x 48; give --grad-cam" in capsys.readouterr().err
    assert command(folder, tmp_path / "flat.h5", tmp_path / "a", "--grad-cam") == 0
    assert load_heatmaps(tmp_path / "a.npz").mode == "gradcam"
    # The model is of any size, but its training says how large its images were.
    shutil.copy(models / "patch.h5", tmp_path)
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "args.json").write_text(json.dumps(TRAINED | {"img_size": [1152, 896]}))
    assert command(folder, tmp_path / "patch.h5", tmp_path / "b", "--fprop-mode") == 1
    assert "whole-image classifier, of images of 1152 x 896" in capsys.readouterr().err


def test_pixels_unlike_those_of_training_are_warned_of(tmp_path, models, capsys):
    folder = write_breasts(tmp_path / "img", BREASTS[:2])
    args = ["--fprop-mode", "--avg-pool-size", 4, 4]
    assert command(folder, models / "patch.h5", tmp_path / "a", *args, "--rescale-factor", "1") == 0
    assert "warning: pixels are far from the range 0..255" in capsys.readouterr().err
    assert command(folder, models / "patch.h5", tmp_path / "b", *args, "--featurewise-center") == 0
    own = np.mean([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in folder.glob("*.png")]) * 0.003891
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: the mean")]
    assert len(warnings) == (abs(71.8 - own) > 16 and not own / 2 <= 71.8 <= own * 2)
    assert command(folder, models / "patch.h5", tmp_path / "c", *args) == 0
    assert "warning: the mean" not in capsys.readouterr().err


def test_a_picture_lays_map_and_outline_on_the_pixels():
    img = rng.integers(1000, 2000, (40, 30))
    mask = np.zeros((40, 30), bool)
    mask[10:14, 20:26] = True
    grid = Grid((40, 30), (2.0, 2.0), (4.0, 4.0))
    heatmap = np.zeros((10, 8, 3), np.float32)
    heatmap[2, 5, 1:] = 0.3, 0.4  # rows 8..12, columns 20..24
    figure = draw.overlay_figure(img, heatmap, grid, ["none", "a", "b"], masks=[mask])
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles == ["mammogram", "lesion classes, sum (max 0.7)", "a (max 0.3)", "b (max 0.4)", "none (max 0)"]
    mammogram, total = figure.axes[0].images[0], figure.axes[1].images[1]
    assert mammogram.get_extent() == total.get_extent() == [0, 30, 40, 0]
    shown = total.get_array()
    assert np.argwhere(shown > 0.5).mean(axis=0).tolist() == [9.5, 21.5]  # the middle, 10 and 22, is a pixel's edge
    [outline] = figure.axes[1].lines
    assert (outline.get_xdata().min(), outline.get_xdata().max()) == (20.5, 25.5)
    assert (outline.get_ydata().min(), outline.get_ydata().max()) == (10.5, 13.5)


def test_a_bad_mask_ends_the_run_before_the_work_or_leaves_out_its_picture(tmp_path, models, capsys):
    folder, masks = write_breasts(tmp_path / "img", BREASTS[:2]), tmp_path / "masks"
    masks.mkdir()
    bad = masks / "Calc-Test_P_1_RIGHT_CC_1.png"
    args = ["--fprop-mode", "--avg-pool-size", 4, 4, "--overlay", tmp_path / "pictures", "--roi-mask-dir", masks]
    empty, other = np.zeros((64, 48), np.uint8), np.ones((64, 64), np.uint8)
    for mask, message in ((None, "not a readable image"), (empty, "marks no lesion"), (other, "does not fit")):
        bad.write_bytes(b"") if mask is None else cv2.imwrite(str(bad), mask)
        assert command(folder, models / "patch.h5", tmp_path / "maps.npz", *args) == 1
        error = capsys.readouterr().err
        assert bad.name in error and message in error and error.count("\n") == 1
        assert not (tmp_path / "maps.npz").exists() and not (tmp_path / "pictures").exists()
    assert command(folder, models / "patch.h5", tmp_path / "maps.npz", *args, "--on-error", "skip") == 0
    said = capsys.readouterr().out
    assert "1 left out:" in said and bad.name in said and "Pictures of 1 breast" in said
    assert len(load_heatmaps(tmp_path / "maps.npz").records) == 2
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["P_1_LEFT_CC.png", "P_1_LEFT_MLO.png"]
    # Once mended, nothing is computed again.
    cv2.imwrite(str(bad), np.ones((64, 48), np.uint8))
    assert command(folder, models / "patch.h5", tmp_path / "maps.npz", *args) == 0
    assert "2 of 2 breasts are done already" in capsys.readouterr().out
    assert len(list((tmp_path / "pictures").iterdir())) == 3


def test_masks_fit_the_image_file_whatever_the_scored_size(tmp_path):
    # Scored at another shape than the file's, as --img-size allows: the mask goes the image's way.
    cv2.imwrite(str(tmp_path / "a.png"), np.ones((80, 40), np.uint8))
    mask = np.zeros((160, 80), np.uint8)
    mask[80:120, 20:40] = 255
    cv2.imwrite(str(tmp_path / "Mass-Training_7_LEFT_CC_1.png"), mask)
    [read] = read_lesion_masks(tmp_path, "7_LEFT_CC", tmp_path / "a.png", (16, 16))
    expected = np.zeros((16, 16), bool)
    expected[8:12, 4:8] = True
    assert (read.type, read.number) == ("mass", "1") and np.array_equal(read.pixels, expected)
    cv2.imwrite(str(tmp_path / "Mass-Training_7_LEFT_CC_1.png"), mask[:100])
    with pytest.raises(InputError, match="does not fit its image"):
        read_lesion_masks(tmp_path, "7_LEFT_CC", tmp_path / "a.png", (16, 16))


def test_masks_of_patients_whose_names_end_alike_are_not_mixed(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.ones((8, 8), np.uint8))
    for name in ("Mass-Training_A_7_LEFT_CC_1", "Mass-Training_7_LEFT_CC_1", "Calc-Test_7_LEFT_CC_2", "7_LEFT_CC_3"):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.ones((8, 8), np.uint8))
    found = [read_lesion_masks(tmp_path, name, tmp_path / "a.png") for name in ("7_LEFT_CC", "A_7_LEFT_CC")]
    assert [[mask[:2] for mask in masks] for masks in found] == [[("calc", "2"), ("mass", "1")], [("mass", "1")]]


def test_a_patch_classifier_may_hold_a_network(tmp_path, models):
    """As those of Keras's guide to transfer learning do: a base, global pooling, a dense layer."""
    image = keras.Input((16, 16, 3))
    base = keras.Sequential([keras.Input((16, 16, 3)), layers.Conv2D(4, 3, padding="same"), layers.MaxPooling2D(4)])
    output = layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling2D()(base(image)))
    save_model(keras.Model(image, output), tmp_path / "nested.h5")
    folder, out = write_breasts(tmp_path / "img", BREASTS[1:2]), tmp_path / "maps.npz"
    windows = ["--patch-size", 16, "--stride", 12]
    assert command(folder, tmp_path / "nested.h5", out, "--no-grad-cam", *windows) == 0
    assert load_heatmaps(out).mode == "sweep"


def test_what_is_at_fault_ends_the_run_or_is_left_out(tmp_path, models, capsys):
    folder = write_breasts(tmp_path / "img", [*BREASTS, ("P_4", "LEFT", 0, "")])
    broken = folder / "P_2_LEFT_MLO.png"
    broken.write_bytes(broken.read_bytes()[:100])
    (tmp_path / "list.txt").write_text("P_1\nP_2\nP_4\nP_9\n")
    args = ["--fprop-mode", "--avg-pool-size", 4, 4, "--pat-list", tmp_path / "list.txt"]
    out = tmp_path / "maps.npz"
    assert command(folder, models / "patch.h5", out, *args) == 1
    error = capsys.readouterr().err
    assert "no image of P_4 LEFT" in error and "--on-error skip" in error and error.count("\n") == 1
    assert command(folder, models / "patch.h5", out, *args, "--on-error", "skip") == 0
    said = capsys.readouterr().out
    assert "3 left out:" in said and "no row of patient P_9" in said and "P_2_LEFT_MLO.png: the image file is" in said
    assert [r.patient_id for r in load_heatmaps(out).records] == ["P_1", "P_1"]
    args = args[:-2]
    shutil.rmtree(folder)
    folder = write_breasts(folder, BREASTS)
    broken.write_bytes(b"")
    assert command(folder, models / "patch.h5", out, *args) == 1
    assert "P_2_LEFT_MLO.png: the image file is empty" in capsys.readouterr().err
    assert len(load_heatmaps(out).records) == 2  # the earlier file is untouched
    shutil.copy(folder / "P_1_LEFT_MLO.png", broken)
    assert command(folder, models / "patch.h5", out, *args) == 0
    assert "2 of 4 breasts are done already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        ("patch.h5", ["--class-list", "a", "b"], "--class-list: Expected 5 names"),
        ("image.h5", ["--img-size", "32", "32"], "Expected --img-size 64 48, for which it is built"),
        ("image.h5", ["--fprop-mode"], "image.h5: This is a whole-image classifier already"),
        ("image.h5", ["--fprop-mode", "--grad-cam"], "--fprop-mode and --grad-cam: Expected one of them"),
        ("patch.h5", ["--fprop-mode", "--grad-cam-layer", "last"], "--grad-cam-layer: Expected Grad-CAM"),
        ("patch.h5", ["--grad-cam-layer", "last"], "--grad-cam-layer: Expected a whole-image classifier"),
        ("patch.h5", ["--class-list", "a", "b", "c", "d", "a"], "--class-list: Expected different names"),
        ("patch.h5", ["--roi-mask-dir", "."], "Expected --overlay with it"),
        ("patch.h5", ["--roi-mask-dir", "nowhere", "--overlay", "o"], "--roi-mask-dir nowhere: no such folder"),
        ("patch.h5", ["--fprop-mode", "--avg-pool-size", "30", "30"], "too small"),
        ("patch.h5", ["--out", "a.txt"], "Expected a name ending in .npz"),
        ("patch.h5", ["--pat-csv", "none.csv"], "none.csv"),
        ("none.h5", [], "Expected a checkpoint file"),
        ("patch.h5", ["--patch-size", "500", "--stride", "600"], "P_1_LEFT_CC.png"),
    ],
)
def test_wrong_options_end_in_one_line(tmp_path, models, capsys, model, args, message):
    folder = write_breasts(tmp_path / "img", BREASTS[:1])
    if "--patch-size" in args:
        cv2.imwrite(str(folder / "P_1_LEFT_CC.png"), np.full((64, 48), 7, np.uint16) * 0)
    assert command(folder, models / model, tmp_path / "maps.npz", *args) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "maps.npz").exists()


def test_pictures_never_replace_mammograms(tmp_path, models, capsys):
    folder = write_breasts(tmp_path / "img", BREASTS[:1])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert command(folder, models / "patch.h5", tmp_path / "m.npz", "--overlay", f"{tmp_path}/x/../img") == 1
    assert "Expected another folder than that of the mammograms" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_recipes_map_all_sets_of_patients(tmp_path, models):
    """Each set's map file, with the options of the recipe, then with others given after it."""
    folder = write_breasts(tmp_path / "full_img", BREASTS)
    shutil.copy(folder / "pat.csv", tmp_path / "pat_side_cancer.csv")
    (tmp_path / "pat_train.txt").write_text("P_1\n")
    (tmp_path / "pat_test.txt").write_text("P_2\nP_3\n")
    make_python(tmp_path / "bin")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "DATA": str(tmp_path), "SETS": "train test"}
    recipe = [ROOT / "ddsm_train" / "fprop_heatmap_all.sh", models / "patch.h5", "vgg16"]
    subprocess.run([*recipe, "--img-size", "128", "96"], env=environment, check=True, capture_output=True)
    train, test = (load_heatmaps(tmp_path / "heatmaps" / "fprop" / f"{name}.npz") for name in ("train", "test"))
    assert [record.patient_id for record in train.records + test.records] == ["P_1", "P_1", "P_2", "P_3"]
    assert (train.mode, train.options["avg_pool_size"], train.options["img_size"]) == ("fprop", [7, 7], [128, 96])
    assert train.options["featurewise_mean"] == 52.18 and train.options["featurewise_center"]
    environment["FORMAT"] = "h5"
    recipe = [ROOT / "ddsm_train" / "score_heatmap_all.sh", models / "patch.h5"]
    options = ["--img-height", "48", "--patch-size", "16"]
    subprocess.run([*recipe, *options], env=environment | {"SETS": "test"}, check=True, capture_output=True)
    maps = load_heatmaps(tmp_path / "heatmaps" / "sweep" / "test.h5")
    assert (maps.mode, maps.strides, maps.options["patch_size"]) == ("sweep", (32, 32), 16)
    failed = subprocess.run(recipe, env=environment | {"SETS": "val"}, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "pat_val.txt" in failed.stderr
