"""Train on several devices, repeat exactly, differentiate: what each Keras backend needs for them.

TensorFlow mirrors a model on every device, JAX splits every batch over them; the batch size is that of all devices
together. A step is that of one device with the same batch, except where TensorFlow's batch normalization takes the
statistics of each device's share.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np


def training_scope(model: keras.Model) -> AbstractContextManager:
    """Return the context in which to change dropout rates of `model`, make its optimizer and compile it.

    TensorFlow refuses optimizer slots and random generators made outside the strategy that mirrors the model.
    """
    return model.distribute_strategy.scope() if keras.backend.backend() == "tensorflow" else nullcontext()


def even_batches(data: Any, model: keras.Model) -> Any:
    """Return the `PyDataset` `data` with batches that all devices of `model` can share equally.

    Batches that their number does not divide are filled up with their own first samples, labelled as of no class:
    `keras2.WeightedCrossentropy` and `Accuracy` leave these out. TensorFlow would fail on a device without a
    sample, and JAX refuses uneven batches. On a single device, and for arrays, returns `data` itself.
    """
    if keras.backend.backend() == "tensorflow":
        count = model.distribute_strategy.num_replicas_in_sync
    else:
        distribution = keras.distribution.distribution()
        count = 1 if distribution is None else distribution.device_mesh.devices.size
    return _EvenBatches(data, count) if count > 1 and isinstance(data, keras.utils.PyDataset) else data


def mean_over_devices(value: Any) -> Any:
    """Return the mean of a scalar that each device has computed for its share of a batch; on one device, `value`.

    JAX computes one value for all devices, so there is nothing to do.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            return replica.all_reduce(tf.distribute.ReduceOp.MEAN, value)
    return value


def set_determinism(seed: int) -> None:
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


def random_state() -> list[np.ndarray]:
    """Return the state of the backend's global random generators as arrays: PyTorch draws its dropout from them.

    TensorFlow and JAX draw from generators of Keras's, which a model holds among its variables: an empty list.
    """
    if keras.backend.backend() != "torch":
        return []
    import torch

    return [state.numpy() for state in (torch.get_rng_state(), *torch.cuda.get_rng_state_all())]


def set_random_state(arrays: Sequence[np.ndarray]) -> None:
    """Put the generators back into a `random_state`, of as many devices as there are now."""
    if keras.backend.backend() != "torch":
        return
    import torch

    states = [torch.from_numpy(state) for state in arrays]
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1 : 1 + torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def gradient_of_output(model: keras.Model, x: Any, index: int) -> np.ndarray:
    """Return the gradient of output `index` of a model, summed over the batch, with regard to its input tensor `x`."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(x)
            score = model(x, training=False)[:, index]
        gradient = tape.gradient(score, x)
    elif backend == "jax":
        import jax

        variables = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
        gradient = jax.grad(lambda x: model.stateless_call(*variables, x, training=False)[0][:, index].sum())(x)
    else:
        import torch

        x = x.detach().requires_grad_(True)
        gradient = torch.autograd.grad(model(x, training=False)[:, index].sum(), x)[0]
    return keras.ops.convert_to_numpy(gradient)


class _EvenBatches(keras.utils.PyDataset):
    def __init__(self, data: keras.utils.PyDataset, count: int):
        super().__init__(data.workers, data.use_multiprocessing, data.max_queue_size)
        self.data, self.count = data, count

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
