"""iterators: order, labels and weights against the published program's runs; every image once; memory and disk."""

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest

from dm_image import DMImageDataGenerator
from dm_keras_ext import DMAucModelCheckpoint
from dm_resnet import MultiViewResNetBuilder
from mammo.base.files import InputError
from mammo.images.check import check_images
from mammo.images.iterators import batch_weights, sample_images
from mammo.images.pixels import pixel_warnings, read_resize_img
from mammo.images.reading import read_img
from mammo.train.keras2 import Accuracy, WeightedCrossentropy
from tests.helpers import write_dicom

AUGMENT = {"rotation_range": 25.0, "zoom_range": [0.8, 1.2], "channel_shift_range": 20.0, "horizontal_flip": True}


def load(path):
    return json.loads(path.read_text())


def sums(x):
    return x.sum(axis=(1, 2, 3), dtype=np.float64)


def assert_batch(batch, case, err_msg):
    """Labels and weights of a batch exactly as recorded; y or w absent where the record has none."""
    _, *rest = batch if isinstance(batch, tuple) else (batch,)
    for name in ("y", "w"):
        if case.get(name) is not None:
            np.testing.assert_array_equal(rest.pop(0), np.array(case[name], np.float32), err_msg=err_msg)
    assert not rest


@pytest.fixture
def folders(tmp_path):
    """13 images in two class folders, one of them nested; 16-bit, each of its own grey level."""
    for k in range(13):
        folder = tmp_path / "data" / ("neg" if k < 8 else "pos") / ("deep" if k == 3 else "")
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{k:02d}.png"), np.full((20, 16), 1000 * (k + 1), np.uint16))
    (tmp_path / "data" / "neg" / "notes.txt").write_text("no image")
    return tmp_path / "data"


# ------------------------------------------------------------------------------- runs of the published program


DIRECTORY_RUNS = ("binary2", "noshuf", "noshuf_default_classes_sorted", "shuf_bal", "shuf_nobal", "sparse")


@pytest.mark.parametrize("run", DIRECTORY_RUNS)
def test_golden_directory(golden, run):
    folder = golden / "iterators"
    record, pixels = load(folder / "directory.json")[run], np.load(folder / "batches.npz")
    generator = DMImageDataGenerator(featurewise_center=True)
    generator.mean = 52.18
    found = generator.flow_from_directory(folder / "dir", **record["args"])
    assert found.filenames == sorted(found.filenames, key=lambda f: (found.class_indices[f.split("/")[0]], f))
    assert sorted(found.filenames) == sorted(record["filenames"])
    assert found.class_indices == record["class_indices"]
    assert (found.nb_sample, found.nb_class) == (record["nb_sample"], len(record["class_indices"]))
    assert len(found) == record["batches_per_epoch"]

    # The program listed files in the operating system's order: the same rule over its list.
    args = {k: v for k, v in record["args"].items() if k != "classes"}
    paths = [folder / "dir" / name for name in record["filenames"]]
    iterator = generator.flow_from_img_list(paths, record["labels"], target_scale=None, **args)
    for case in record["batches"]:
        batch = iterator.next()
        assert iterator.total_batches_seen == case["total_batches_seen"]
        assert_batch(batch, case, str(case["batch"]))
        key = f"{run}_x_b{case['batch']}"
        if case["epoch"] == 0 and key in pixels:
            np.testing.assert_allclose(batch[0], pixels[key], rtol=1e-6)


def test_golden_reset_midway(golden):
    folder = golden / "iterators"
    runs = load(folder / "directory.json")
    record, listing = runs["reset_midway"], runs["shuf_bal"]
    paths = [folder / "dir" / name for name in listing["filenames"]]
    iterator = DMImageDataGenerator().flow_from_img_list(
        paths,
        listing["labels"],
        class_mode="sparse",
        target_size=(4, 4),
        batch_size=record["batch_size"],
        seed=record["seed"],
    )
    assert [iterator.next()[1].tolist() for _ in range(2)] == record["first_two_batches_labels"]
    iterator.reset()
    assert [iterator.next()[1].tolist() for _ in range(6)] == record["after_reset_labels"]


def test_golden_flow(golden):
    folder = golden / "iterators"
    y = np.load(folder / "batches.npz")["flow_y"]
    x = np.broadcast_to(np.arange(float(len(y)))[:, None, None, None], (len(y), 2, 2, 1))
    for run, record in load(folder / "flow.json").items():
        labels = {"no_labels": None, "sparse_y": y.argmax(axis=1)}.get(run, y)
        iterator = DMImageDataGenerator().flow(x, labels, **record["args"])
        for case in record["batches"]:
            batch = iterator.next()
            if labels is None:
                assert batch[:, 0, 0, 0].tolist() == case
                continue
            assert batch[0][:, 0, 0, 0].tolist() == case["index"], run
            assert_batch(batch, case, run)
            assert iterator.total_batches_seen == case["total_batches_seen"]


def test_golden_image_lists(golden):
    folder = golden / "iterators"
    record, pixels = load(folder / "img_list.json"), np.load(folder / "batches.npz")
    paths = [folder / "list_imgs" / name for name in record["files"]]
    for run, content in record.items():
        if not isinstance(content, dict):
            continue
        iterator = DMImageDataGenerator().flow_from_img_list(
            paths, record["labels"], target_size=(20, 16), target_scale=4095, **content["args"]
        )
        for i, case in enumerate(content["batches"]):
            batch = iterator.next()
            assert_batch(batch, case, run)
            np.testing.assert_allclose(sums(batch[0]), case["x_sums"], rtol=1e-6)
            if f"list_{run}_x{i}" in pixels:
                np.testing.assert_allclose(batch[0], pixels[f"list_{run}_x{i}"], rtol=1e-6)


def test_golden_exam_lists(golden):
    folder = golden / "iterators"
    record = load(folder / "exam_list.json")
    for exam in record["exams"]:
        for side in "LR":
            for view in ("CC", "MLO"):
                files = exam[side][view]
                exam[side][view] = files and [folder / "list_imgs" / name for name in files]
    for run, content in record["runs"].items():
        exams = [exam for exam in record["exams"] if content.get("exams_used") != "all but s3" or exam["subj"] != "s3"]
        iterator = DMImageDataGenerator().flow_from_exam_list(
            exams, target_size=(20, 16), target_scale=4095, **content["args"]
        )
        for case in content["batches"]:
            batch = iterator.next()
            if "subj" in case:
                subj, exam, cc, mlo, *y = batch
                assert (subj, exam) == (case["subj"], case["exam"])
                for views, expected in ((cc, case["cc"]), (mlo, case["mlo"])):
                    for images, values in zip(views, expected, strict=True):
                        np.testing.assert_allclose(
                            [i.sum(dtype=np.float64) for i in images], [v[0] for v in values], 1e-3
                        )
            else:
                (cc, mlo), *y = (batch,) if case["y"] is None else batch
                np.testing.assert_allclose(sums(cc), case["cc_sums"], rtol=1e-6, err_msg=run)
                np.testing.assert_allclose(sums(mlo), case["mlo_sums"], rtol=1e-6, err_msg=run)
            np.testing.assert_array_equal(y, [] if case["y"] is None else [case["y"]], err_msg=run)


class StandInClassifier:
    def predict(self, x, batch_size):
        return 2 * x.mean(axis=(1, 2, 3)) / 4095 % 1


def test_golden_candidate_rois(golden):
    """k-means may number its clusters otherwise than in 2017: patches of an image are compared as a set."""
    folder = golden / "iterators"
    record = load(folder / "candid_roi.json")
    paths = [folder / "list_imgs" / name for name in record["files"]]
    for run, content in record["runs"].items():
        args = record["common"] | content["args"]
        labels = None if args.pop("_nolab", False) else record["labels"]
        args["roi_per_img"] = args.pop("_roi", args["roi_per_img"])
        if "roi_clf" in args:
            args["roi_clf"] = StandInClassifier()
        iterator = DMImageDataGenerator().flow_from_candid_roi(paths, labels, **args)
        for case in content["batches"]:
            batch = iterator.next()
            x, *rest = batch if isinstance(batch, tuple) else (batch,)
            per_image = 1 if args.get("one_patch_mode") else args["roi_per_img"]
            order, expected = np.argsort(sums(x)), np.argsort(case["x_sums"])
            order, expected = (i[np.argsort(i // per_image, kind="stable")] for i in (order, expected))
            assert list(x.shape) == case["shape"]
            np.testing.assert_allclose(sums(x)[order], np.array(case["x_sums"])[expected], rtol=1e-6, err_msg=run)
            for name in ("y", "w"):
                if case[name] is not None:
                    recorded = np.array(case[name], np.float32)[expected]
                    np.testing.assert_array_equal(rest.pop(0)[order], recorded, err_msg=run)


# ------------------------------------------------------------------------------------------- every image once


class Recorder(keras.Model):
    """Notes, in `seen`, the first pixels of every batch it is trained on."""

    def train_step(self, data):
        self.seen.append(keras.ops.convert_to_numpy(data[0])[:, 0, 0, 0].tolist())
        return {"loss": 0.0}


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX passes other arguments to train_step")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_fit_sees_every_image_once_an_epoch_in_the_same_batches(workers):
    x = np.broadcast_to(np.arange(11.0)[:, None, None, None], (11, 2, 2, 1))
    generator = DMImageDataGenerator()
    iterator = generator.flow(x, np.arange(11) % 2, batch_size=4, seed=3, auto_batch_balance=False, workers=workers)
    pixels = keras.Input((2, 2, 1))
    model = Recorder(pixels, keras.layers.Dense(1)(pixels))
    model.compile(optimizer="sgd", loss="mse", run_eagerly=True)
    model.seen = []
    model.fit(iterator, epochs=3, shuffle=False, verbose=0)  # as in training: the iterators shuffle by themselves
    reference = generator.flow(x, batch_size=4, seed=3)
    batches = [reference.next()[:, 0, 0, 0].tolist() for _ in range(12)]
    assert model.seen[-9:] in (batches[:9], batches[3:])  # Keras may end an epoch before it begins one
    for k in range(0, 12, 3):
        assert sorted(np.concatenate(batches[k : k + 3])) == list(range(11))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="distribution strategies are TensorFlow's")
def test_fit_under_a_strategy_sees_every_image_once_an_epoch():
    """Where Keras's own queue, with several workers, delivers 55 of 74 images."""
    import tensorflow as tf

    seen = []

    class Note(keras.layers.Layer):
        def call(self, x):
            noted = tf.numpy_function(lambda x: (seen.append(x[:, 0, 0, 0]), x)[1], [x], tf.float32)
            return tf.ensure_shape(noted, (None, 2, 2, 1))

        def compute_output_shape(self, shape):
            return shape

    with tf.distribute.MirroredStrategy(["cpu:0"]).scope():
        pixels = keras.Input((2, 2, 1))
        model = keras.Model(pixels, keras.layers.Dense(1)(Note()(pixels)))
        model.compile(optimizer="sgd", loss="mse")
    x = np.broadcast_to(np.arange(74.0)[:, None, None, None], (74, 2, 2, 1))
    iterator = DMImageDataGenerator().flow(x, np.zeros(74), batch_size=2, seed=3, auto_batch_balance=False, workers=4)
    model.fit(iterator, epochs=2, shuffle=False, verbose=0)
    for epoch in (seen[-74:-37], seen[-37:]):
        assert sorted(np.concatenate(epoch)) == list(range(74))


def test_batches_are_pure_functions_of_their_position(folders):
    def batches(order):
        iterator = DMImageDataGenerator(**AUGMENT).flow_from_directory(
            folders, target_size=(20, 16), batch_size=4, seed=9, dup_3_channels=True
        )
        iterator.on_epoch_end()
        return {i: iterator[i] for i in order}

    forward, backward = batches([0, 1, 2, 3]), batches([3, 1, 1, 0, 2])
    for i in forward:
        np.testing.assert_array_equal(forward[i][0], backward[i][0])
        np.testing.assert_array_equal(forward[i][1], backward[i][1])
    assert sum(len(y) for _, y in forward.values()) == 13


# Batches of two epochs, by the options of generator and iterator.
RECORDED = {
    "plain": ({}, {"shuffle": False, "target_scale": 255.0}),
    "training": (
        AUGMENT | {"vertical_flip": True, "shear_range": 0.2, "featurewise_center": True},
        {"auto_batch_balance": True, "dup_3_channels": True, "rescale_factor": 0.003891},
    ),
    "balanced": (AUGMENT, {"balance_classes": 1.0, "no_pos_skip": 0.5, "class_mode": "binary"}),
}


def write_noise(folder):
    """13 images of 16-bit noise in two class folders."""
    for k in range(13):
        path = folder / ("neg" if k < 8 else "pos") / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.random.RandomState(k).randint(0, 65536, (20, 16)).astype(np.uint16))
    return folder


def test_a_closed_iterator_has_no_threads_and_the_same_batches():
    before = set(threading.enumerate())
    x = np.random.default_rng(0).random((9, 4, 4, 1))
    iterator = DMImageDataGenerator().flow(x, np.zeros(9), batch_size=2, seed=3, auto_batch_balance=False, workers=3)
    first = [iterator[i][0] for i in range(2)]  # and the third is being read
    assert set(threading.enumerate()) - before
    iterator.close()
    assert not set(threading.enumerate()) - before
    for one, two in zip(first, (iterator[i][0] for i in range(2)), strict=True):
        np.testing.assert_array_equal(one, two)


def digests(folder, case, workers):
    """SHA-256 of the bytes of each batch."""
    generator_args, args = RECORDED[case]
    generator = DMImageDataGenerator(**generator_args)
    generator.mean = 52.18
    iterator = generator.flow_from_directory(
        folder, target_size=(20, 16), batch_size=4, seed=9, workers=workers, **args
    )
    found = []
    for _ in range(2):
        batches = [iterator[i] for i in range(len(iterator))]
        found += [hashlib.sha256(b"".join(array.tobytes() for array in batch)).hexdigest() for batch in batches]
        iterator.on_epoch_end()
    return found


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("case", RECORDED)
def test_batches_are_those_recorded_for_any_number_of_workers(tmp_path, case, workers):
    """The record holds for every backend."""
    recorded = load(Path(__file__).parents[1] / "reference/batches.json")
    assert digests(write_noise(tmp_path), case, workers) == recorded[case]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_another_process_of_any_backend_makes_the_same_batches(tmp_path, backend):
    pytest.importorskip(backend)
    write_noise(tmp_path)
    code = f"from tests.images.test_iterators import *; print(*digests(Path({str(tmp_path)!r}), 'training', 2))"
    environment = os.environ | {"KERAS_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == digests(tmp_path, "training", 1)


def test_the_next_batch_is_loaded_during_the_present_one():
    """While nobody asks, the images of the next batch are read, and of no later one."""
    images = DMImageDataGenerator().flow(np.zeros((9, 4, 4, 1)), batch_size=3, shuffle=False, workers=2)
    loaded, load, last = [], images.load, threading.Event()

    def noted(index):
        loaded.append(int(index))
        if index == 5:
            last.set()
        return load(index)

    images.load = noted
    images[0]
    assert last.wait(timeout=60)
    assert sorted(loaded) == list(range(6))
    assert images.batch_names(1) == ["sample 3", "sample 4", "sample 5"]


def test_augmentation_differs_between_epochs_images_and_repeats():
    img = np.random.default_rng(0).random((1, 16, 16, 1)) * 255
    iterator = DMImageDataGenerator(**AUGMENT).flow(np.repeat(img, 2, axis=0), shuffle=False, seed=1)
    first, second = iterator.next(), iterator.next()
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], second[0])
    balanced = DMImageDataGenerator(**AUGMENT).flow(
        np.repeat(img, 8, axis=0), [1] + [0] * 7, balance_classes=1.0, auto_batch_balance=False, seed=1
    )
    x, y = balanced.next()
    assert y.sum() > 1
    assert len(np.unique(x[y == 1].reshape(y.sum(), -1), axis=0)) == y.sum()


def test_iteration_next_and_reset(folders):
    iterator = DMImageDataGenerator().flow_from_directory(folders, batch_size=5, seed=1, target_size=(4, 4))
    epoch = [len(x) for x, _ in iterator]
    assert epoch == [5, 5, 3]
    iterator.next()
    assert sum(len(x) for x, _ in iterator) == 8  # what was left of the second epoch
    iterator.next()
    iterator.reset()
    assert iterator.total_batches_seen == 7
    assert sum(len(x) for x, _ in iterator) == 13
    assert isinstance(iterator, keras.utils.PyDataset)


def test_no_seed_draws_one():
    x = np.zeros((100, 2, 2, 1)) + np.arange(100)[:, None, None, None]
    first, second = (DMImageDataGenerator().flow(x, batch_size=100).next() for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("class_mode", "dtype", "shape"),
    [("categorical", np.float32, (4, 2)), ("binary", np.float32, (4,)), ("sparse", np.int64, (4,))],
)
def test_class_modes(folders, class_mode, dtype, shape):
    iterator = DMImageDataGenerator().flow_from_directory(
        folders, batch_size=4, target_size=(4, 4), class_mode=class_mode, classes=["pos", "neg"], seed=0
    )
    _, y = iterator.next()
    assert (y.dtype, y.shape) == (dtype, shape)
    assert iterator.class_indices == {"pos": 0, "neg": 1}
    without = DMImageDataGenerator().flow_from_directory(folders, class_mode=None, target_size=(4, 4))
    assert isinstance(without.next(), np.ndarray)


def test_batch_weights_even_the_classes_out():
    classes = np.array([0, 0, 0, 2, 2, 1])
    weights = batch_weights(classes)
    np.testing.assert_allclose([weights[classes == k].sum() for k in range(3)], 6)


# -------------------------------------------------------------------------------------- memory, files at fault


def test_images_in_memory_give_the_batches_from_disk(folders):
    args = {"target_size": (10, 12), "batch_size": 5, "seed": 2, "auto_batch_balance": True, "dup_3_channels": True}
    args |= {"target_scale": 255.0}
    disk, memory = (
        DMImageDataGenerator(**AUGMENT).flow_from_directory(folders, load_to_ram=ram, **args) for ram in (False, True)
    )
    for _ in range(6):
        for a, b in zip(disk.next(), memory.next(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("size", [(1152, 896), (2000, 1500)])
def test_memory_peak_is_that_of_the_stored_pixels(tmp_path, size):
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 2**16, size, np.uint16)
    cv2.imwrite(str(path), noise, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    flow = {"target_size": (1152, 896), "load_to_ram": True, "workers": 8, "shuffle": False, "batch_size": 1}
    generator = DMImageDataGenerator()
    generator.flow_from_img_list([path], None, **flow)  # imports and the like
    tracemalloc.start()
    iterator = generator.flow_from_img_list([path] * 100, None, **flow)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 1.1 * 100 * 1152 * 896 * 2
    np.testing.assert_array_equal(iterator[99][0, ..., 0], read_resize_img(path, (1152, 896), target_scale=4095))


def test_mixed_pixel_types_are_not_kept_in_memory(folders):
    cv2.imwrite(str(folders / "pos" / "99.png"), np.zeros((20, 16), np.uint8))
    with pytest.raises(InputError, match=r"99\.png.*uint16.*uint8"):
        DMImageDataGenerator().flow_from_directory(folders, target_size=(4, 4), load_to_ram=True)


@pytest.mark.parametrize("load_to_ram", [False, True])
def test_images_at_fault(folders, load_to_ram):
    (folders / "pos" / "bad.png").write_text("no image")
    args = {"target_size": (4, 4), "load_to_ram": load_to_ram, "batch_size": 3, "seed": 0}
    generator = DMImageDataGenerator()
    iterator = generator.flow_from_directory(folders, on_error="skip", **args)
    assert iterator.nb_sample == 13
    assert len(iterator.skipped) == 1
    assert "bad.png" in iterator.skipped[0]
    with pytest.raises(InputError, match=r"bad\.png"):
        iterator = generator.flow_from_directory(folders, **args)
        for _ in iterator:
            pass
    if not load_to_ram:
        assert "bad.png" in str(iterator.input_error)


# Two of the first batch, whose order is 6 5 2 9, and one of the second.
LOST = {"neg/06.png": None, "neg/02.png": b"no image", "neg/01.png": "changed"}


def lose(folder):
    """Remove, damage and replace images of a set that is in use."""
    for name, content in LOST.items():
        path = folder / name
        if content is None:
            path.unlink()
        elif content == "changed":
            cv2.imwrite(str(path), np.zeros((20, 16), np.uint8))
        else:
            path.write_bytes(content)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_images_lost_during_training_are_replaced_and_do_not_count(tmp_path, workers):
    folder = write_noise(tmp_path)
    args = {"target_size": (20, 16), "batch_size": 4, "seed": 3, "auto_batch_balance": True, "workers": workers}
    generator = DMImageDataGenerator(**AUGMENT)
    whole = generator.flow_from_directory(folder, **args)
    expected = [(whole.batch_names(i), *whole[i]) for i in range(len(whole))]
    iterator = generator.flow_from_directory(folder, on_error="skip", **args)
    assert iterator.skipped == []
    lose(folder)
    lost_before = 0
    for i, (names, x, y, w) in enumerate(expected):
        new_x, new_y, new_w = iterator[i]
        lost = np.array([Path(name).relative_to(folder).as_posix() in LOST for name in names])
        lost_before += lost.sum()
        np.testing.assert_array_equal(new_x[~lost], x[~lost])
        np.testing.assert_array_equal(new_y[~lost], y[~lost])
        assert (new_y[lost] == 0).all() and (new_w[lost] == 0).all()
        np.testing.assert_array_equal(new_w[~lost], batch_weights(y[~lost].argmax(axis=1)))
        for image in new_x[lost]:
            assert any(np.array_equal(image, other) for other in x[~lost])
        assert new_y.dtype == y.dtype and new_w.dtype == w.dtype
    assert lost_before == len(LOST) and iterator.nb_sample == iterator.nb_file == 13
    assert [message.split(": ")[0] for message in iterator.skipped] == sorted(str(folder / name) for name in LOST)
    assert "the image has changed. Expected 20 x 16 pixels of uint16" in iterator.skipped[0]
    assert "Received 20 x 16 of uint8" in iterator.skipped[0]

    again = generator.flow_from_directory(folder, on_error="skip", **args)
    assert again.nb_sample == 11 and again.nb_file == 12  # one of them is readable, if not what it was


def test_lost_images_do_not_change_a_training_step(tmp_path):
    """A step on a batch with lost images is one on the others alone."""
    folder = write_noise(tmp_path)
    args = {"target_size": (20, 16), "batch_size": 13, "shuffle": False, "auto_batch_balance": True}
    iterator = DMImageDataGenerator(rescale=1e-5).flow_from_directory(folder, on_error="skip", **args)
    lose(folder)
    kept = [place for place, name in enumerate(iterator.filenames) if name not in LOST]
    batch = iterator[0]
    results = []
    for x, y, w in (batch, [array[kept] for array in batch]):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((20, 16, 1)), keras.layers.Flatten(), keras.layers.Dense(2, "softmax")])
        model.compile(keras.optimizers.SGD(1.0), loss=WeightedCrossentropy(), metrics=[Accuracy(name="accuracy")])
        scores = model.train_on_batch(x, y, sample_weight=w, return_dict=True)
        results.append((scores, model.get_weights()))
    (scores, weights), (expected_scores, expected_weights) = results
    assert scores == pytest.approx(expected_scores, rel=1e-5)
    for weight, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-7)


def test_where_no_label_can_say_it_a_lost_image_ends_the_run(tmp_path):
    folder = write_noise(tmp_path)
    args = {"target_size": (20, 16), "batch_size": 13}
    for class_mode in ("binary", "sparse", None):
        iterator = DMImageDataGenerator().flow_from_directory(folder, on_error="skip", class_mode=class_mode, **args)
        (folder / "neg/00.png").rename(tmp_path / "away")
        with pytest.raises(InputError, match=r"neg/00\.png: "):
            iterator[0]
        (tmp_path / "away").rename(folder / "neg/00.png")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_others_take_the_place_of_a_lost_batch_until_all_are_gone(tmp_path, batch_size):
    folder = write_noise(tmp_path)
    args = {"target_size": (20, 16), "batch_size": batch_size, "shuffle": False, "auto_batch_balance": True}
    iterator = DMImageDataGenerator().flow_from_directory(folder, on_error="skip", **args)
    iterator._reader = None
    after = iterator[2][0]
    for name in iterator.filenames[batch_size : 2 * batch_size]:
        (folder / name).unlink()
    x, y, w = iterator[1]
    np.testing.assert_array_equal(x, after)
    assert not y.any() and not w.any() and y.shape == (batch_size, 2) and w.shape == (batch_size,)
    assert len(iterator.skipped) == batch_size

    shutil.rmtree(folder)
    with pytest.raises(InputError, match=rf"^none of {5 * batch_size} images can be read, such as .*\.png$"):
        iterator[0]
    assert "images can be read" in str(iterator.input_error)


def test_checked_images_are_not_read_before_they_are_used(tmp_path, monkeypatch):
    """What is known stands for the folder: an image that vanished since is lost, and not forgotten."""
    folder = write_noise(tmp_path)
    (folder / "pos/bad.png").write_text("no image")
    checked = {check.file: check for check in check_images(folder.rglob("*.png"))}
    args = {"target_size": (20, 16), "batch_size": 4, "seed": 3, "checked": checked}
    generator = DMImageDataGenerator()
    with pytest.raises(InputError, match=r"pos/bad\.png: not a readable image"):
        generator.flow_from_directory(folder, **args)
    lose(folder)
    cv2.imwrite(str(folder / "pos/new.png"), np.ones((20, 16), np.uint16))
    with monkeypatch.context() as context:
        context.setattr("mammo.images.reading.read_img", None)
        iterator = generator.flow_from_directory(folder, on_error="skip", **args)
        assert iterator.filenames == [f"{'neg' if k < 8 else 'pos'}/{k:02d}.png" for k in range(13)]
        assert [message.split(": ")[0] for message in iterator.skipped] == [str(folder / "pos/bad.png")]
        assert iterator.nb_file == 14
    for batch in iterator:
        assert len(batch[0])
    assert len(iterator.skipped) == 1 + len(LOST)

    good = {file: check for file, check in checked.items() if not check.cause}
    for name in LOST:
        strict = generator.flow_from_directory(folder, **args | {"checked": good, "batch_size": 1, "shuffle": False})
        with pytest.raises(InputError, match=name):
            strict[strict.filenames.index(name)]


def test_folders_at_fault(folders):
    generator = DMImageDataGenerator()
    with pytest.raises(InputError, match="no such folder"):
        generator.flow_from_directory(folders / "nowhere")
    with pytest.raises(InputError, match="benign"):
        generator.flow_from_directory(folders, classes=["neg", "benign"])
    (folders / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty.*no images"):
        generator.flow_from_directory(folders)
    with pytest.raises(InputError, match="sub-folder"):
        generator.flow_from_directory(folders / "empty")
    with pytest.raises(InputError, match=r"once.*neg neg"):
        generator.flow_from_directory(folders, classes=["neg", "neg"])
    iterator = generator.flow_from_directory(folders, allow_empty=True)
    assert iterator.empty_classes == [str(folders / "empty")]
    assert iterator.class_indices == {"empty": 0, "neg": 1, "pos": 2}
    assert generator.flow_from_directory(folders, classes=["neg"]).empty_classes == []


@pytest.mark.parametrize("load_to_ram", [False, True])
def test_constant_images_are_refused_on_request(folders, load_to_ram):
    """All images of `folders` are constant, which patches may be; of two whole images one is not."""
    varied = np.full((20, 16), 7, np.uint16)
    varied[3:] = 8
    for name in ("neg", "pos"):
        cv2.imwrite(str(folders / name / "99.png"), varied)
    args = {"target_size": (20, 16), "load_to_ram": load_to_ram, "allow_constant": False, "shuffle": False}
    generator = DMImageDataGenerator()
    with pytest.raises(InputError, match=r"neg/00\.png: constant image: all pixels are 1000\."):
        generator.flow_from_directory(folders, **args).next()
    iterator = generator.flow_from_directory(folders, on_error="skip", **args)
    assert iterator.filenames == ["neg/99.png", "pos/99.png"]
    assert len(iterator.skipped) == 13
    np.testing.assert_array_equal(iterator.next()[0][:, :, :, 0], [varied, varied])


def test_first_arguments_can_be_given_by_position(folders):
    generator = DMImageDataGenerator()
    assert generator.flow_from_directory(folders, (10, 12)).next()[0].shape[1:3] == (10, 12)
    assert len(generator.flow(np.zeros((7, 2, 2, 1)), np.zeros(7), 4)) == 2


@pytest.mark.parametrize("cores", ["0", "four"])
def test_number_of_workers_from_the_environment(folders, monkeypatch, cores):
    monkeypatch.setenv("NUM_CPU_CORES", cores)
    with pytest.raises(InputError, match=f"NUM_CPU_CORES.*{cores}"):
        DMImageDataGenerator().flow_from_directory(folders)


# ------------------------------------------------------------------------------------------------------ exams


@pytest.fixture
def exams(tmp_path):
    """Three exams with images of 32 x 24, one of them without MLO of the right."""
    rng = np.random.default_rng(0)
    for k in range(12):
        cv2.imwrite(str(tmp_path / f"{k}.png"), rng.integers(0, 2**16, (32, 24), np.uint16))
    views = [{"CC": [tmp_path / f"{k}.png"], "MLO": [tmp_path / f"{k + 1}.png"], "cancer": k % 4 // 2}
             for k in range(0, 12, 2)]  # fmt: skip
    views[5]["MLO"] = None
    return [{"subj": f"s{k}", "exam": 1, "L": views[2 * k], "R": views[2 * k + 1]} for k in range(3)]


def test_exams_train_and_score_a_model_of_two_views(exams):
    generator = DMImageDataGenerator(horizontal_flip=True, rotation_range=25.0)
    iterator = generator.flow_from_exam_list(
        exams, target_size=(32, 24), target_scale=2, batch_size=2, class_mode="categorical", seed=0
    )
    keras.utils.set_random_seed(0)
    model = MultiViewResNetBuilder.build_dm_resnet_14((1, 32, 24), 2, nb_init_filter=2)
    model.compile(optimizer=keras.optimizers.SGD(1e-4), loss="categorical_crossentropy")
    fit = model.fit(iterator, epochs=2, shuffle=False, verbose=0)
    assert np.isfinite(fit.history["loss"]).all()

    last = model.layers[-1].kernel
    last.assign(last * 0.01)  # far from certain of any, so that all predictions differ
    iterator = DMImageDataGenerator().flow_from_exam_list(
        exams, target_size=(32, 24), target_scale=2, batch_size=2, class_mode="categorical", validation_mode=True
    )
    views, labels = zip(*iterator, strict=True)
    cc, mlo, y = (np.concatenate(batches) for batches in (*zip(*views, strict=True), labels))
    expected = np.zeros((6, 2))
    for rows in (slice(None), slice(None, None, -1)):
        for columns in (slice(None), slice(None, None, -1)):
            flipped = [np.ascontiguousarray(view[:, rows, columns]) for view in (cc, mlo)]
            expected += model.predict_on_batch(flipped) / 4
    assert len(np.unique(expected[:, 1])) == 6  # no two alike, so that a wrong order would show
    for data in (iterator, ((cc, mlo), y), ([cc, mlo], y)):
        auc, y_true, y_pred = DMAucModelCheckpoint.calc_test_auc(data, model, return_y_res=True, test_augment=True)
        np.testing.assert_array_equal(y_true, np.eye(2)[[0, 1] * 3])
        np.testing.assert_allclose(y_pred, expected, rtol=1e-4)
        assert auc[1] == pytest.approx(np.mean(np.greater.outer(y_pred[1::2, 1], y_pred[::2, 1])))
    _, y_true, y_pred = DMAucModelCheckpoint.calc_test_auc(iterator, model, test_samples=5, return_y_res=True)
    np.testing.assert_allclose(y_pred, model.predict_on_batch([cc, mlo])[:5], rtol=1e-4)
    assert len(y_true) == 5


def test_exams_whose_views_cannot_make_a_batch(exams):
    generator = DMImageDataGenerator()
    sizes = {"target_height": 16, "target_size": None}
    with pytest.raises(InputError, match=r"exam 1 of s2: no image of R MLO.*target_size"):
        generator.flow_from_exam_list(exams, **sizes)
    (cc, _), _ = generator.flow_from_exam_list(exams[:2], **sizes).next()
    assert cc.shape == (4, 16, 12, 1)
    with pytest.raises(InputError, match="exam 1 of s2, R MLO: images of a batch differ in size"):
        generator.flow_from_exam_list(exams, target_height=16, target_size=(16, 10), validation_mode=True).next()


def test_files_are_found_whatever_the_case_of_their_suffix(folders):
    (folders / "neg" / "00.png").rename(folders / "neg" / "00.PNG")
    (folders / "neg" / "._01.png").write_bytes(b"what macOS leaves")
    iterator = DMImageDataGenerator().flow_from_directory(folders)
    assert iterator.filenames[:2] == ["neg/00.PNG", "neg/01.png"]
    assert "neg/deep/03.png" in iterator.filenames
    assert iterator.nb_sample == 13


def test_augmented_images_can_be_saved(folders, tmp_path):
    iterator = DMImageDataGenerator().flow_from_directory(
        folders, target_size=(20, 16), save_to_dir=tmp_path / "saved", save_prefix="aug", shuffle=False, batch_size=4
    )
    iterator.next()
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [f"aug_0_{k}.jpeg" for k in range(4)]
    assert cv2.imread(str(tmp_path / "saved" / "aug_0_0.jpeg"), -1).shape == (20, 16)


def test_images_of_different_sizes_do_not_make_a_batch(folders):
    cv2.imwrite(str(folders / "neg" / "99.png"), np.zeros((20, 30), np.uint16))
    with pytest.raises(InputError, match="differ in size"):
        for _ in DMImageDataGenerator().flow_from_directory(folders, target_height=10, target_size=None):
            pass


def test_pixel_range_and_mean_are_checked(folders):
    def messages(mean=None, **args):
        iterator = DMImageDataGenerator().flow_from_directory(folders, target_size=(4, 4), **args)
        return pixel_warnings(sample_images(iterator), mean)

    own_mean = np.mean([read_resize_img(p, (4, 4), rescale_factor=0.01).mean() for p in folders.rglob("*.png")])
    assert messages(own_mean, rescale_factor=0.01) == []
    [message] = messages()
    assert "1.3e+04" in message
    assert "rescale" in message
    # Far is less than half or more than twice the images' own, and by more than 16 another.
    assert own_mean > 40
    for near in (own_mean / 2 + 0.1, own_mean * 2 - 0.1):
        assert messages(near, rescale_factor=0.01) == []
    for far in (own_mean / 2 - 0.1, own_mean * 2 + 0.1):
        [message] = messages(far, rescale_factor=0.01)
        assert f"{far:.4g}" in message and f"{own_mean:.4g}" in message


def test_dicom_files_are_read_as_the_16_bit_images_of_data_preparation(tmp_path):
    pixels = np.arange(2048, 14336, dtype=np.uint16).reshape(128, 96)
    write_dicom(tmp_path / "a.dcm", pixels, 14)
    assert cv2.imwrite(str(tmp_path / "a.png"), read_img(tmp_path / "a.dcm", dicom_16_bit=True))
    generator, size = DMImageDataGenerator(), {"target_size": (64, 48), "target_scale": None}
    files = [tmp_path / "a.dcm", tmp_path / "a.png"]

    def exams(file):
        views = {"CC": [file], "MLO": [file], "cancer": 0}
        return generator.flow_from_exam_list([("s", "e", {"L": views, "R": views})], **size)

    def read(file):
        lists = [generator.flow_from_img_list([file], [0], load_to_ram=ram, **size) for ram in (False, True)]
        return [batches[0][0] for batches in lists] + [exams(file)[0][0][0][:1]]

    dicom, png = map(read, files)
    for ours, theirs in zip(dicom, png, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert dicom[0].max() == pytest.approx(14335 / 16383 * 65535, rel=0.01)


# ---------------------------------------------------------------------------------- the published keywords

FLOWS = ("flow", "flow_from_directory", "flow_from_img_list", "flow_from_exam_list", "flow_from_candid_roi")


@pytest.mark.parametrize("name", FLOWS)
def test_flows_show_their_keywords_and_refuse_others_by_name(name):
    flow = getattr(DMImageDataGenerator(), name)
    parameters = inspect.signature(flow).parameters
    assert {"seed", "save_to_dir", "save_prefix", "save_format"} < set(parameters)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())
    assert flow.__name__ == name and flow.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        flow(np.zeros((2, 4, 4, 1)), None, batchsize=4)


def test_preprocess_is_given_each_batch_after_augmentation(folders):
    """As `preprocess_input` of a network does, it may change the batch in place, and its shape."""
    shapes = []

    def preprocess(batch):
        shapes.append(batch.shape)
        batch /= 100
        return batch[..., :1]

    generator = DMImageDataGenerator(featurewise_center=True, horizontal_flip=True)
    generator.mean = 7
    args = {"target_size": (20, 16), "batch_size": 4, "seed": 3, "dup_3_channels": True}
    plain = generator.flow_from_directory(folders, **args)
    preprocessed = generator.flow_from_directory(folders, preprocess=preprocess, **args)
    for (x, y), (expected, labels) in zip(preprocessed, plain, strict=True):
        np.testing.assert_array_equal(x, expected[..., :1] / np.float32(100))
        np.testing.assert_array_equal(y, labels)
    assert {shape[1:] for shape in shapes} == {(20, 16, 3)}

    of_network = keras.applications.vgg16.preprocess_input
    x = generator.flow_from_directory(folders, preprocess=of_network, **args)[0][0]
    expected = plain[0][0][..., ::-1] - np.float32([103.939, 116.779, 123.68])
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-4)
    assert x.flags.c_contiguous
    x = np.arange(8, dtype="float32").reshape(2, 2, 2, 1)
    assert DMImageDataGenerator().flow(x, [0, 1], 2, True, 0.0, 0.0, np.negative, False)[0][0].min() == -7


def test_data_format_is_that_of_the_generator(folders):
    generator = DMImageDataGenerator(data_format="channels_first")
    args = {"target_size": (20, 16), "dup_3_channels": True}
    for data_format in ("default", "channels_first", None):
        iterator = generator.flow_from_directory(folders, data_format=data_format, **args)
        assert iterator.next()[0].shape[1:] == (3, 20, 16)
    with pytest.raises(InputError, match=r"generator, channels_first\. Received channels_last"):
        generator.flow_from_directory(folders, data_format="channels_last", **args)


def test_lists_say_what_they_hold(folders, exams, capsys):
    files = sorted(folders.rglob("*.png"))[:3]
    generator = DMImageDataGenerator()
    generator.flow_from_img_list(files, [0, 1, 1])
    generator.flow_from_candid_roi(files[:1])
    generator.flow_from_exam_list(exams)
    generator.flow_from_exam_list(exams, verbose=False)
    told = "3 images: 1 of class 0, 2 of class 1\n1 image\n3 exams: 3 of class 1\n"
    assert capsys.readouterr().out == told


def test_exams_and_patches_can_be_saved_and_weigh_the_same_if_asked(exams, tmp_path):
    generator = DMImageDataGenerator()
    args = {"batch_size": 1, "shuffle": False, "save_to_dir": tmp_path / "exams", "save_format": "png"}
    generator.flow_from_exam_list(exams, target_size=(32, 24), **args).next()
    assert sorted(path.name for path in (tmp_path / "exams").iterdir()) == [
        "_0_0.png", "_0_0_1.png", "_0_0_2.png", "_0_0_3.png"
    ]  # fmt: skip
    patches = generator.flow_from_candid_roi(
        [tmp_path / f"{k}.png" for k in range(3)],
        [0, 1, 1],
        target_height=32,
        img_per_batch=3,
        roi_per_img=2,
        roi_size=(8, 8),
        auto_batch_balance=False,
        save_to_dir=tmp_path / "patches",
    )
    assert patches.next()[2].tolist() == [1] * 6
    assert len(list((tmp_path / "patches").glob("*.jpeg"))) == 6
