"""Training on several devices, and training that repeats exactly: what each Keras backend needs for them.

TensorFlow mirrors a model on every device, JAX splits every batch over them. The batch size that `fit` is given is
that of all devices together, and should be a multiple of their number: TensorFlow averages the devices' means, so
an uneven batch weighs its samples unequally, and JAX refuses one.
"""

from contextlib import nullcontext

import keras

from dm_files import InputError


def make_parallel(model, gpu_count):
    """Return (model to train, model to save): a copy of `model`, with its weights, that trains on several devices.

    With `gpu_count` below 2 both are `model` itself. Otherwise both are the copy: what it saves is an ordinary file
    that opens on one device. Compile and fit the copy within `training_scope(copy)`; with JAX, `model` itself can no
    longer be trained. The devices are the GPUs or, where there are none, CPU devices that TensorFlow or JAX was told
    to simulate. Raises InputError when there are too few of them, and for a backend without this.
    """
    if gpu_count < 2:
        return model, model
    with _placed_on(gpu_count):
        parallel = keras.models.clone_model(model)
    for old, new in zip(model.weights, parallel.weights, strict=True):
        new.assign(old)
        new.trainable = old.trainable  # a copy keeps the flags of layers, not of variables
    return parallel, parallel


def training_scope(model):
    """Return the context in which to change dropout rates of `model`, make its optimizer, compile it and fit it.

    TensorFlow refuses optimizer slots and random generators made outside the strategy that mirrors the model.
    """
    return model.distribute_strategy.scope() if keras.backend.backend() == "tensorflow" else nullcontext()


def set_determinism(seed):
    """Seed Python, NumPy and Keras; keep TensorFlow to operations that repeat exactly, some of them slower."""
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()


def _placed_on(count):
    """Return a context in which models are built on `count` devices."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        _require(count, devices)
        return tf.distribute.MirroredStrategy([device.name for device in devices[:count]]).scope()
    if keras.backend.backend() == "jax":
        # Several machines: call keras.distribution.initialize() first, and feed each process its own samples.
        devices = keras.distribution.list_devices()
        _require(count, devices)
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(devices=devices[:count], auto_shard_dataset=False)
        )
        return nullcontext()
    raise InputError(
        "Expected the backend tensorflow or jax to train on several devices. "
        f"Received: {keras.backend.backend()}. Set KERAS_BACKEND, or NUM_GPU_DEVICES to 1."
    )


def _require(count, devices):
    if len(devices) < count:
        raise InputError(
            f"Expected {count} devices to train on. Received: {len(devices)}. "
            "Lower NUM_GPU_DEVICES, or make more of them visible (CUDA_VISIBLE_DEVICES)."
        )
