"""Training on several devices, and training that repeats exactly: what each Keras backend needs for them.

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
import numpy as np

from dm_files import InputError


def make_parallel(model, gpu_count):
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


def training_scope(model):
    """Return the context in which to change dropout rates of `model`, make its optimizer and compile it.

    TensorFlow refuses optimizer slots and random generators made outside the strategy that mirrors the model.
    """
    return model.distribute_strategy.scope() if keras.backend.backend() == "tensorflow" else nullcontext()


def even_batches(data, model):
    """Return the `PyDataset` `data` with batches that all devices of `model` can share equally.

    Batches that their number does not divide are filled up with their own first samples, labelled as of no class:
    `dm_keras_ext.WeightedCrossentropy` and `Accuracy` leave these out. TensorFlow would fail on a device without a
    sample, and JAX refuses uneven batches. On a single device, and for arrays, returns `data` itself.
    """
    count = _device_count(model)
    return _EvenBatches(data, count) if count > 1 and isinstance(data, keras.utils.PyDataset) else data


def mean_over_devices(value):
    """Return the mean of a scalar that each device has computed for its share of a batch; on one device, `value`.

    JAX computes one value for all devices, so there is nothing to do.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            return replica.all_reduce(tf.distribute.ReduceOp.MEAN, value)
    return value


def set_determinism(seed):
    """Seed Python, NumPy and Keras; keep to operations that repeat exactly, some of them slower.

    On a CPU those of JAX do anyway; on a GPU it needs `XLA_FLAGS=--xla_gpu_deterministic_ops=true`.
    """
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    elif keras.backend.backend() == "torch":
        import torch

        torch.use_deterministic_algorithms(True)


def random_state():
    """Return the state of the backend's global random generators as arrays: PyTorch draws its dropout from them.

    TensorFlow and JAX draw from generators of Keras's, which a model holds among its variables: an empty list.
    """
    if keras.backend.backend() != "torch":
        return []
    import torch

    return [state.numpy() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]


def set_random_state(arrays):
    """Put the generators back into a `random_state`, of as many devices as there are now."""
    if keras.backend.backend() != "torch":
        return
    import torch

    states = [torch.from_numpy(state) for state in arrays]
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def _same_input(tensor):
    return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor._keras_history.operation.name)


class _EvenBatches(keras.utils.PyDataset):
    def __init__(self, data, count):
        super().__init__(data.workers, data.use_multiprocessing, data.max_queue_size)
        self.data = data
        self.count = count

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y, *weights = self.data[index]
        size = len(y)
        rows = np.arange(-(-size // self.count) * self.count) % size
        if len(rows) == size:
            return x, y, *weights
        x, y, *weights = keras.tree.map_structure(lambda values: np.asarray(values)[rows], (x, y, *weights))
        y[size:] = 0
        return x, y, *weights

    def on_epoch_begin(self):
        self.data.on_epoch_begin()

    def on_epoch_end(self):
        self.data.on_epoch_end()


class _DataParallel(keras.distribution.DataParallel):
    """Splits batches, except a batch of a size that does not divide, as in prediction: each device computes it all."""

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
    """TensorFlow's strategy for `count` devices: the messages of two strategies for the same ones would mix."""
    import tensorflow as tf

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    _require(count, devices)
    return tf.distribute.MirroredStrategy([device.name for device in devices[:count]])


def _device_count(model):
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.num_replicas_in_sync
    distribution = keras.distribution.distribution()
    return distribution.device_mesh.devices.size if distribution is not None else 1


def _require(count, devices):
    if len(devices) < count:
        raise InputError(
            f"Expected {count} devices to train on. Received: {len(devices)}. "
            "Lower NUM_GPU_DEVICES, or make more of them visible (CUDA_VISIBLE_DEVICES)."
        )
