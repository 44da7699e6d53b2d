"""Several devices give the steps of one. Two CPU devices are simulated, which only a fresh process can do."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from dm_multi_gpu import make_parallel, set_determinism, training_scope

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
    return x, np.eye(2, dtype=np.float32)[rng.integers(0, 2, 8)], rng.random(8).astype(np.float32)


def train(model):
    x, y, w = data()
    with training_scope(model):
        model.compile(keras.optimizers.SGD(0.5, momentum=0.9), "categorical_crossentropy")
        model.fit(x, y, sample_weight=w, batch_size=4, epochs=2, shuffle=False, verbose=0)
    return model.get_weights()


def check_two_devices(folder):
    """What the tests below say, in a process with two devices."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    from dm_files import InputError
    from dm_resnet import set_dropout_rate

    set_determinism(1)
    with pytest.raises(InputError, match=r"Expected 3 devices to train on\. Received: 2\."):
        make_parallel(make_net(), 3)
    one_device = train(make_net())

    net = make_net()
    net.layers[2].trainable = False
    net.layers[1].layers[1].bias.trainable = False
    parallel, to_save = make_parallel(net, 2)
    assert [weight.trainable for weight in parallel.weights] == [weight.trainable for weight in net.weights]
    parallel.trainable = False  # TensorFlow ignores an assignment that does not change the value
    parallel.trainable = True
    two_devices = train(parallel)
    for one, two in zip(one_device, two_devices, strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5)

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


@pytest.mark.slow
@pytest.mark.parametrize("backend", list(SIMULATE))
def test_two_devices_take_the_steps_of_one_and_save_ordinary_files(tmp_path, backend):
    pytest.importorskip(backend)
    environment = os.environ | {"KERAS_BACKEND": backend} | SIMULATE[backend]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "weights.npz") as arrays:
        expected = [arrays[name] for name in arrays.files]
    for suffix in ("keras", "h5"):
        opened = keras.models.load_model(tmp_path / f"net.{suffix}", compile=False)
        assert all(np.array_equal(one, two) for one, two in zip(opened.get_weights(), expected, strict=True))


def test_one_device_trains_the_model_itself():
    model = make_net()
    assert make_parallel(model, 1) == (model, model)
    assert any((old != new).any() for old, new in zip(make_net().get_weights(), train(model), strict=True))


if __name__ == "__main__":
    check_two_devices(sys.argv[1])
