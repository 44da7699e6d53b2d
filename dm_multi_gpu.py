"""Train on several devices: what each Keras backend needs for that.

TensorFlow mirrors a model on every device, JAX splits every batch over them; the batch size is that of all devices
together. A step is that of one device with the same batch, except where TensorFlow's batch normalization takes the
statistics of each device's share. `NUM_GPU_DEVICES` chooses how many devices the trainers use, `CUDA_VISIBLE_DEVICES`
which. Where there is no GPU, CPU devices serve, which JAX can be told to simulate by
`XLA_FLAGS=--xla_force_host_platform_device_count=2` and TensorFlow by `tf.config.set_logical_device_configuration`.

Several machines, with JAX alone: each process calls `keras.distribution.initialize()` before anything else and reads
its own samples, as many batches of one size as the others. The devices below are then those of all machines, and
nothing here divides data between processes. Files are for the first process to write.
"""

from contextlib import nullcontext
from functools import cache

import keras

from mammo.base.files import InputError


def make_parallel(model: keras.Model, gpu_count: int) -> tuple[keras.Model, keras.Model]:
    """Return (model to train, model to save): a copy of `model`, with its weights, that trains on several devices.

    With `gpu_count` below 2 both are `model` itself. Otherwise the model to save has the layers of the copy, and
    predicts and saves as one of a single device does. Compile the copy within `training_scope(copy)`, fit it outside,
    on sets given to `even_batches`. With TensorFlow do not predict batches by the copy, where every device would
    predict them all; with JAX do not train `model` itself any more. The devices are the GPUs or, where there are none,
    CPU devices. Raises InputError when there are too few of them, and for a backend without this.
    """
    if gpu_count < 2:
        return model, model
    inputs = keras.tree.map_structure(_same_input, model.input)  # left to itself, a copy names its inputs anew
    with _placed_on(gpu_count):
        parallel = keras.models.clone_model(model, inputs)
    for old, new in zip(model.weights, parallel.weights, strict=True):
        new.assign(old)
        new.trainable = old.trainable  # a copy keeps the flags of layers, not of variables
    if keras.backend.backend() == "jax":
        return parallel, parallel
    return parallel, keras.Model(parallel.input, parallel.output, name=model.name)


def _same_input(tensor):
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor._keras_history.operation.name)


class _DataParallel(keras.distribution.DataParallel):
    """Split batches, except one of a size that does not divide, as in prediction: each device computes all of it."""

    def get_data_layout(self, data_shape):
        if data_shape[0] % self.device_mesh.devices.size:
            return keras.distribution.TensorLayout([None] * len(data_shape), self.device_mesh)
        return super().get_data_layout(data_shape)


def _placed_on(count):
    """Return a context in which models are built on `count` devices."""
    if keras.backend.backend() == "tensorflow":
        return _mirrors(count).scope()
    if keras.backend.backend() == "jax":
        devices = keras.distribution.list_devices()
        _require(count, devices)
        keras.distribution.set_distribution(_DataParallel(devices=devices[:count], auto_shard_dataset=False))
        return nullcontext()
    raise InputError(
        "Expected the backend tensorflow or jax to train on several devices. "
        f"Received: {keras.backend.backend()}. Set KERAS_BACKEND, or NUM_GPU_DEVICES to 1."
    )


@cache
def _mirrors(count):
    """Return TensorFlow's one strategy for `count` devices: messages of two for the same ones would mix."""
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    _require(count, devices)
    return tf.distribute.MirroredStrategy([device.name for device in devices[:count]])


def _require(count, devices):
    if len(devices) < count:
        raise InputError(
            f"Expected {count} devices to train on. Received: {len(devices)}. "
            "Lower NUM_GPU_DEVICES, or make more of them visible (CUDA_VISIBLE_DEVICES)."
        )
