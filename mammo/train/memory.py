"""Training within the memory of a device: half precision, recomputation of activations, and what a step takes.

Both change how a model computes, neither what it is: layers, variables and files stay those of the plain model.
"""

import itertools
import math
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers

from mammo.base.files import InputError
from mammo.train.checkpoint import leaf_layers
from mammo.train.devices import training_scope


def half_type() -> str:
    """Return the 16-bit type to compute in: `float16` on a GPU, which every GPU has, and `bfloat16` on anything else.

    On a processor a convolution in float16 took 2 to 10 times as long as in float32; in bfloat16 two thirds with
    TensorFlow and PyTorch, though 2.4 times with JAX.
    """
    if keras.backend.backend() == "torch":
        import torch

        return "float16" if torch.cuda.is_available() else "bfloat16"
    try:
        return "float16" if keras.distribution.list_devices("gpu") else "bfloat16"
    except RuntimeError:  # JAX without a GPU
        return "bfloat16"


def mixed_precision(model: keras.Model, half: str | None = None) -> None:
    """Let `model` compute in `half` (default: `half_type()`) and keep its variables in float32, in place.

    Layers whose output is a vector per image and softmax layers stay in float32: they take next to no memory, and the
    probabilities and the loss need the digits. Batch normalization computes its statistics in float32 of itself.
    Takes effect when the model is compiled next; `compile` then also scales the loss of a float16 model, so that small
    gradients do not vanish: the first steps may be skipped while the scale is too large.
    """
    policy = f"mixed_{half or half_type()}"
    for layer in leaf_layers(model):
        if not isinstance(layer, layers.InputLayer):
            vector = len(keras.tree.flatten(layer.output)[0].shape) < 4
            softmax = getattr(layer, "activation", None) is keras.activations.softmax
            layer.dtype_policy = "float32" if vector or softmax else policy
    _set_model_policy(model, policy)


def full_precision(model: keras.Model) -> None:
    """Undo `mixed_precision`: every layer computes in float32 once the model is compiled next."""
    for layer in leaf_layers(model):
        layer.dtype_policy = "float32"
    _set_model_policy(model, "float32")


def _set_model_policy(model: keras.Model, policy: str) -> None:
    """Set the policy of a model and of those nested in it, whose own it is that makes `compile` scale the loss."""
    model.dtype_policy = policy
    # Functions traced before would go on in the old precision.
    model.train_function = model.test_function = model.predict_function = None
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            _set_model_policy(layer, policy)


class Recomputed(keras.Layer):
    """A part of a network that keeps only its input for the backward pass, and computes itself again there."""

    def __init__(self, segment: keras.Model):
        super().__init__(autocast=False)
        self.segment = segment
        self.built = True

    def call(self, x, training=None):
        if not training:
            return self.segment(x, training=training)
        state = self.segment.non_trainable_variables
        # Copies: TensorFlow would read the variables anew when it computes again, and draw another dropout.
        values = [keras.ops.copy(variable) for variable in state]

        def forward(x, *weights):  # without side effects: when computed again, it updates nothing a second time
            return self.segment.stateless_call(list(weights), values, x, training=True)

        y, new_values = keras.remat(forward)(x, *[variable.value for variable in self.segment.trainable_variables])
        for variable, value in zip(state, new_values, strict=True):
            variable.assign(value)
        return y

    def compute_output_spec(self, x, training=None):
        return self.segment.compute_output_spec(x)


def rematerialize(model: keras.Model, image_size: tuple[int, int] | None = None) -> keras.Model:
    """Return a model that computes what `model` does and recomputes most activations in the backward pass.

    It shares all layers and variables with `model`, which is the one to freeze and unfreeze layers of, to set dropout
    and weight decay of, and to save; compile and fit the returned one. Loss, gradients and updates of batch
    normalization are the same; a step takes longer by computing those parts again. The network is cut where a single
    tensor leads on, so that what is kept at the cuts and the largest part between two of them take the least memory
    together (Chen et al. 2016, "Training deep nets with sublinear memory cost", with sizes in place of a count).

    Call it after `mixed_precision`, within any strategy; `model` has one image and one output.
    image_size: (rows, columns) that the cuts are chosen for where `model` takes any size; default 224x224.
    """
    ends = _best_ends(_unfold(model, _known_size(model, image_size)))
    with training_scope(model):
        graph = _unfold(model)
        x = image = keras.Input(batch_shape=graph.image.shape, dtype=graph.image.dtype)
        start = graph.image
        for end in ends:
            x = Recomputed(keras.Model(start, graph.steps[end].output))(x)
            start = graph.steps[end].output
        # The backward pass begins in the last part: recomputing it would save nothing.
        recomputing = keras.Model(image, keras.Model(start, graph.steps[-1].output)(x))
    recomputing.dtype_policy = model.dtype_policy  # `compile` scales the loss by it
    return recomputing


def _best_ends(graph: "_Graph") -> list[int]:
    """Choose the calls at whose outputs to cut the graph, for the lowest peak of memory."""
    kept, cuts = np.cumsum(_kept_bytes(graph)), _cuts(graph)
    best = []  # no part recomputed
    for limit in np.geomspace(1, max(kept[-1], 2), 100):
        ends, start = [], 0
        for cut, following in itertools.pairwise(cuts):
            if kept[following] - start > limit:
                ends.append(cut)
                start = kept[cut]
        if _peak(graph, ends)[0] < _peak(graph, best)[0]:
            best = ends
    return best


def _cuts(graph: "_Graph") -> list[int]:
    """List the indices of the calls whose output every path from the image to the model's output passes through."""
    last_use = {id(tensor): index for index, step in enumerate(graph.steps) for tensor in step.inputs}
    cuts = []
    busy_until = last_use[id(graph.image)]  # the last call that uses a tensor made before the present call
    for index, step in enumerate(graph.steps):
        if busy_until <= index:
            cuts.append(index)
        busy_until = max(busy_until, last_use.get(id(step.output), index))
    return cuts


@dataclass(frozen=True)
class TrainingMemory:
    """Estimated bytes at the peak of a training step."""

    weights: int  # all variables, and the 16-bit copies of those that a half-precision layer trains
    gradients: int
    optimizer: int
    activations: int  # kept from the forward pass, and at hand when the peak is reached
    transient: int  # what the layer then computed needs besides

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient


def training_memory(
    model: keras.Model, batch_size: int, image_size: tuple[int, int] | None = None, optimizer_slots: int = 1
) -> TrainingMemory:
    """Estimate the peak memory of a training step of `model` as it is: with its precision, recomputation and flags.

    An estimate from the graph, the same for every device. It counts what a backward pass needs: the inputs of
    convolutions and dense layers that train, outputs of ReLU and softmax, inputs of batch normalization in float32,
    both ends of max pooling, dropout masks; and while a layer computes its gradients, those of its inputs and output.
    It leaves out the work space of convolutions, the runtime itself, and what a compiler saves by fusing.

    image_size: (rows, columns); needed where the model takes any size.
    optimizer_slots: numbers that the optimizer keeps for each weight: 1 for sgd, rmsprop and adagrad, 2 for the
        others, and one more with gradient accumulation.
    """
    graph = _unfold(model, _known_size(model, image_size))
    trained = {id(v): (math.prod(v.shape), step.layer) for step in graph.steps for v in step.layer.trainable_variables}
    numbers = sum(size for size, _ in trained.values())
    halves = sum(size for size, layer in trained.values() if _working_type(layer) != "float32")
    weights, optimizer = 4 * model.count_params() + 2 * halves, 4 * numbers * optimizer_slots
    _, activations, transient = _peak(graph, graph.ends)
    return TrainingMemory(weights, 4 * numbers, optimizer, activations * batch_size, transient * batch_size)


@dataclass(frozen=True)
class _Step:
    """The call of one layer: symbolic tensors in and out, in the dtypes of the layers' present policies."""

    layer: keras.Operation
    inputs: list[keras.KerasTensor]
    output: keras.KerasTensor


@dataclass(frozen=True)
class _Graph:
    """The calls that a model consists of, in order, nested models opened."""

    image: keras.KerasTensor
    steps: list[_Step]
    ends: list[int]  # the last calls of the parts that are recomputed


def _unfold(model: keras.Model, image_size: tuple[int, int] | None = None) -> _Graph:
    """Call the layers of `model` on a new input, of `image_size` where given, and note each call."""
    steps, ends = [], []

    def call(layer, *args, **kwargs):
        if isinstance(layer, Recomputed):
            output = run(layer.segment, args)
            ends.append(len(steps) - 1)
            return output
        if isinstance(layer, keras.Model):
            return run(layer, args)
        output = layer(*args, **kwargs)
        steps.append(_Step(layer, keras.tree.flatten(args), output))
        return output

    def run(graph, inputs):
        (output,) = keras.tree.flatten(graph._run_through_graph(inputs, call_fn=call))
        return output

    if len(model.inputs) != 1 or len(model.outputs) != 1:
        received = f"Received: {len(model.inputs)} inputs and {len(model.outputs)} outputs."
        raise InputError(f"Expected a model of one image and one output. {received}")
    shape = list(model.inputs[0].shape)
    if image_size is not None:
        shape[1:3] = image_size
    image = keras.Input(batch_shape=shape, dtype=model.inputs[0].dtype)
    run(model, [image])
    return _Graph(image, steps, ends)


def _known_size(model: keras.Model, image_size: tuple[int, int] | None) -> tuple[int, int] | None:
    """Return `image_size` for a model that takes any size, and None for one of a fixed size."""
    return (image_size or (224, 224)) if None in model.inputs[0].shape[1:3] else None


_ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4}


def _bytes(tensor: keras.KerasTensor, dtype: str | None = None) -> int:
    """Return the bytes of the tensor of one image, in `dtype` instead of its own."""
    return math.prod(tensor.shape[1:]) * _ITEM_SIZE[dtype or tensor.dtype]


def _working_type(layer: keras.Operation) -> str:
    """Return the dtype that a layer computes in."""
    return "float32" if isinstance(layer, layers.BatchNormalization) else layer.compute_dtype


def _kept_bytes(graph: _Graph) -> list[int]:
    """Count for each call the bytes of an image that the backward pass needs of its output, and of its own besides."""
    kept = [0] * len(graph.steps)
    producer = {id(step.output): index for index, step in enumerate(graph.steps)}
    with_gradient, counted = set(), {(id(graph.image), graph.image.dtype)}  # the batch itself is there anyway

    def keep(index, tensor, dtype):
        """Tensors are kept once for all that need them, and again in another dtype."""
        if (id(tensor), dtype) not in counted:
            counted.add((id(tensor), dtype))
            own = dtype == tensor.dtype and id(tensor) in producer
            kept[producer[id(tensor)] if own else index] += _bytes(tensor, dtype)

    for index, step in enumerate(graph.steps):
        layer, trains = step.layer, bool(step.layer.trainable_variables)
        if not trains and not any(id(tensor) in with_gradient for tensor in step.inputs):
            continue
        with_gradient.add(id(step.output))
        dtype = _working_type(layer)
        if isinstance(layer, layers.BatchNormalization):
            inputs = trains or layer.trainable  # in inference mode it is linear
        elif hasattr(layer, "kernel") or hasattr(layer, "depthwise_kernel"):
            inputs = trains
        else:
            inputs = not isinstance(layer, _LINEAR)
        if inputs:
            for tensor in step.inputs:
                keep(index, tensor, dtype)
        nonlinear = getattr(layer, "activation", keras.activations.linear) is not keras.activations.linear
        if nonlinear or isinstance(layer, layers.MaxPooling2D):
            keep(index, step.output, step.output.dtype)
        if isinstance(layer, layers.Dropout) and layer.rate > 0:
            kept[index] += _bytes(step.output)
        if isinstance(layer, layers.SeparableConv2D) and trains:  # the maps between its two convolutions
            before, after = (math.prod(tensor.shape[1:3]) for tensor in (step.inputs[0], step.output))
            kept[index] += _bytes(step.inputs[0]) * after // before
    return kept


# Layers whose gradient needs neither input nor output.
_LINEAR = (layers.Add, layers.AveragePooling2D, layers.Concatenate, layers.Dropout, layers.Flatten)
_LINEAR += (layers.GlobalAveragePooling2D, layers.ReLU, layers.ZeroPadding2D)
_LINEAR += (layers.Activation,)  # needs its output, as above


def _peak(graph: _Graph, ends: list[int]) -> tuple[int, int, int]:
    """Return (peak, activations then held, transient then) in bytes of an image, when cut after the calls `ends`."""
    kept = _kept_bytes(graph)
    best, start = (0, 0, 0), 0
    boundaries = given = _bytes(graph.image)
    for end in [*ends, len(graph.steps) - 1]:
        inside = given if end in ends else 0  # TensorFlow computes a part again from a copy of its input
        for index in range(start, end + 1):
            inside += kept[index]
            step = graph.steps[index]
            dtype = _working_type(step.layer)
            transient = sum(_bytes(tensor, dtype) for tensor in (step.output, *step.inputs))
            best = max(best, (boundaries + inside + transient, boundaries + inside, transient))
        given = _bytes(graph.steps[end].output)
        boundaries += given
        start = end + 1
    return best
