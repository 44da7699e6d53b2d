"""Several devices give the steps of one. Two CPU devices are simulated, which only a fresh process can do."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from dm_multi_gpu import make_parallel
from mammo.train.devices import even_batches, set_determinism, training_scope
from tests.train.networks import EAGER, Batches, quick_training

SIMULATE = {"tensorflow": {}, "jax": {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}}


def make_net():
    """Nested, as whole-image models are, and without batch norm, whose statistics each device keeps to itself."""
    keras.utils.set_random_seed(3)
    image = keras.Input((8, 8, 1))
    nested = keras.Model(image, layers.Conv2D(3, 3, activation="relu")(image))
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, kernel_regularizer="l2")(nested(image))
    x = layers.Dropout(0.0)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(image, layers.Dense(2, activation="softmax")(x))


def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 8, 8, 1)).astype(np.float32)
    w = np.array([0, 0, 0.3, 1, 2, 1, 0, 1], np.float32)  # the first device's share of the first batch has no weight
    return x, np.eye(2, dtype=np.float32)[rng.integers(0, 2, 8)], w


def batches(size=8):
    return Batches([array[:size] for array in data()], 4)


def train(model, size=8, **options):
    """Weights after two epochs, and the accuracy logged in the second."""
    from mammo.train.keras2 import Accuracy, WeightedCrossentropy

    with training_scope(model):
        optimizer = keras.optimizers.SGD(0.5, momentum=0.9)
        model.compile(optimizer, WeightedCrossentropy(), metrics=[Accuracy(name="accuracy")], **options)
    fit = model.fit(even_batches(batches(size), model), epochs=2, shuffle=False, verbose=0)
    return model.get_weights(), fit.history["accuracy"][-1]


def check_two_devices(folder):
    """One step after the other, saving, and repeating exactly."""
    from dm_resnet import set_dropout_rate
    from mammo.base.files import InputError

    set_determinism(1)
    with pytest.raises(InputError, match=r"Expected 3 devices to train on\. Received: 2\."):
        make_parallel(make_net(), 3)
    sizes = (8, 7, 5)  # batches of 4 and 4, 4 and 3, 4 and 1: two, two and one device with samples of the last batch
    one_device = [train(make_net(), size, **EAGER) for size in sizes]

    net = make_net()
    net.layers[2].trainable = False
    net.layers[1].layers[1].bias.trainable = False
    parallel, to_save = make_parallel(net, 2)
    assert [weight.trainable for weight in parallel.weights] == [weight.trainable for weight in net.weights]
    parallel.trainable = False  # TensorFlow ignores an assignment that does not change the value
    parallel.trainable = True
    start = parallel.get_weights()
    for size, (expected, accuracy) in reversed(list(zip(sizes, one_device, strict=True))):
        parallel.set_weights(start)
        two_devices, accuracy_of_two = train(parallel, size)
        assert accuracy_of_two == pytest.approx(accuracy)
        for one, two in zip(expected, two_devices, strict=True):
            np.testing.assert_allclose(two, one, atol=1e-5)
    assert [layer.name for layer in to_save.layers] == [layer.name for layer in net.layers]
    x = data()[0]
    for size in (4, 3):
        np.testing.assert_allclose(to_save.predict_on_batch(x[:size]), to_save.predict(x, verbose=0)[:size], atol=1e-5)

    for suffix in ("keras", "h5"):
        to_save.save(f"{folder}/net.{suffix}")
    runs = []
    for _ in range(2):
        parallel.set_weights(two_devices)
        with training_scope(parallel):
            keras.utils.set_random_seed(5)
            set_dropout_rate(parallel.layers[-2], 0.5)
            parallel.compile("adam", "categorical_crossentropy")
            parallel.layers[-2].seed_generator.state.assign([1, 0])
        parallel.fit(*data()[:2], batch_size=4, epochs=2, verbose=0)
        runs.append(parallel.get_weights())
    assert all(np.array_equal(first, second) for first, second in zip(*runs, strict=True))
    assert not all(np.array_equal(run, start) for run, start in zip(runs[0], two_devices, strict=True))
    np.savez(f"{folder}/weights.npz", *two_devices)


def check_trainers(folder):
    """Both trainers on sets whose last batches are uneven, on one device and on two."""
    import pandas as pd

    from ddsm_train import image_clf_train, patch_clf_train
    from dm_image import DMImageDataGenerator
    from mammo.train import checkpoint
    from mammo.train.scoring import predict
    from tests.helpers import write_images

    os.environ["NUM_CPU_CORES"] = "1"
    for seed, (part, count) in enumerate({"train": 5, "val": 3, "test": 3}.items()):
        write_images(folder / part, ("neg", "pos"), count, seed)
    for part in ("train", "val"):
        (folder / part / "neg" / "0.png").unlink()  # 9 = 4 + 4 + 1 and 5 = 4 + 1 images
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 1))
    x = layers.Conv2D(3, 5, strides=8, activation="relu")(image)
    x = layers.Conv2D(4, 3, activation="relu", padding="same", kernel_regularizer="l2", name="top")(x)
    x = layers.Dropout(0.0)(layers.GlobalAveragePooling2D()(x))
    net = keras.Model(image, layers.Dense(2, activation="softmax", kernel_regularizer="l2")(x))
    checkpoint.save_model(net, folder / "net.keras")

    options = {f"{part}_dir": str(folder / part) for part in ("train", "val", "test")}
    options |= {"img_size": [64, 64], "rescale_factor": 0.003891, "featurewise_mean": 44.0, "equalize_hist": False}
    options |= {"batch_size": 4, "train_bs_multiplier": 1.0, "class_list": ["neg", "pos"], "init_lr": 0.01}
    stages = {"nb_epoch": 1, "top_layer_epochs": 2, "all_layer_epochs": 3, "top_layer_nb": 2, "neg_cls_weight": 0.0}
    for devices in ("1", "2"):
        os.environ["NUM_GPU_DEVICES"] = devices
        files = {"best_model": str(folder / f"patch{devices}.keras"), "final_model": str(folder / f"final{devices}.h5")}
        with quick_training() if devices == "1" else nullcontext():
            patch_clf_train.run(**options, **stages, **files, net="vgg16", resume_from=str(folder / "net.keras"))
    one, two = (checkpoint.load_model(folder / f"final{devices}.h5") for devices in "12")
    assert [layer.name for layer in one.layers] == [layer.name for layer in two.layers]
    for expected, weight in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-5)
    one, two = (pd.read_csv(folder / f"patch{devices}" / "history.csv") for devices in "12")
    assert list(one.val_accuracy) == pytest.approx(list(two.val_accuracy))

    # Batch norm, a heatmap and dropout; then resumed, with nothing kept.
    top = {"add_heatmap": True, "avg_pool_size": [2, 2], "hm_pool_size": [2, 2], "top_depths": [2]}
    top |= {"top_repetitions": [1], "hidden_dropout": 0.3, "nb_epoch": 1, "all_layer_epochs": 2, "patch_net": "vgg16"}
    image_clf_train.run(
        **options, **top, patch_model_state=str(folder / "net.keras"), best_model=str(folder / "image.h5")
    )
    files = {file for file in folder.rglob("*") if file.is_file()}
    resumed = {"resume_from": str(folder / "image.h5"), "nb_epoch": 0, "all_layer_epochs": 1, "best_model": "NOSAVE"}
    image_clf_train.run(**options, **resumed)
    assert {file for file in folder.rglob("*") if file.is_file()} == files
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(None)
    generator = DMImageDataGenerator(featurewise_center=True)
    generator.mean = 44.0
    pixels = {"target_size": (64, 64), "rescale_factor": 0.003891, "dup_3_channels": False}
    labels = {"classes": ["neg", "pos"], "class_mode": "categorical", "batch_size": 5, "shuffle": False}
    test_set = generator.flow_from_directory(str(folder / "test"), **pixels, **labels)
    _, y_pred, *_ = predict(checkpoint.load_model(folder / "image.h5"), test_set)
    written = pd.read_csv(folder / "image" / "predictions.csv")
    np.testing.assert_allclose(written[["neg", "pos"]], y_pred, atol=1e-4)
    assert len(json.loads((folder / "image" / "args.json").read_text())["class_list"]) == 2


@pytest.fixture(scope="module", params=list(SIMULATE))
def two_devices(request, tmp_path_factory):
    """The folder in which a process with two simulated devices ran both checks."""
    backend, folder = request.param, tmp_path_factory.mktemp(request.param)
    pytest.importorskip(backend)
    environment = os.environ | {"KERAS_BACKEND": backend} | SIMULATE[backend]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, __file__, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return folder, done


@pytest.mark.slow
def test_two_devices_take_the_steps_of_one_and_save_ordinary_files(two_devices):
    folder, done = two_devices
    assert "check_two_devices: done" in done.stdout, done.stderr[-3000:]
    with np.load(folder / "check_two_devices" / "weights.npz") as arrays:
        expected = [arrays[name] for name in arrays.files]
    for suffix in ("keras", "h5"):
        opened = keras.models.load_model(folder / "check_two_devices" / f"net.{suffix}", compile=False)
        assert all(np.array_equal(one, two) for one, two in zip(opened.get_weights(), expected, strict=True))


@pytest.mark.slow
def test_trainers_do_on_two_devices_what_they_do_on_one(two_devices):
    _, done = two_devices
    assert "check_trainers: done" in done.stdout and done.returncode == 0, done.stderr[-3000:]


def test_one_device_trains_the_model_itself():
    model = make_net()
    assert make_parallel(model, 1) == (model, model)
    whole = batches()
    assert even_batches(whole, model) is whole
    assert any((old != new).any() for old, new in zip(make_net().get_weights(), train(model)[0], strict=True))


if __name__ == "__main__":
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    for check in (check_trainers, check_two_devices):
        (folder := Path(sys.argv[1], check.__name__)).mkdir()
        check(folder)
        print(f"{check.__name__}: done", flush=True)
