"""TensorFlow's operations that Keras 2 models hold as layers, done by the operations of Keras 3.

Keras 2 made a layer of each call of TensorFlow on the tensors of a model, such as `x / 127.5`: TFOpLambda and
SlicingOpLambda, which store the name of a function with its arguments, and TensorFlowOpLayer before, which stores a
node of TensorFlow's graph.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from mammo.base.files import InputError

# Functions of the same name in these rooms of TensorFlow are the same function.
_ROOMS = re.compile(r"(compat\.v1\.)?((math|nn|linalg|__operators__)\.)?")
_NAMES = {"truediv": "divide", "sub": "subtract", "mul": "multiply", "div": "divide", "matmul": "matmul"}


def _reduce(function: Callable) -> Callable:
    return lambda x, axis=None, keepdims=False: function(x, axis=_axis(axis), keepdims=bool(keepdims))


def _axis(axis: Any) -> Any:
    return tuple(axis) if isinstance(axis, list) else axis


def _binary(function: Callable) -> Callable:
    return lambda x, y: function(*_alike(x, y))


def _alike(*values: Any) -> list:
    """The values with constants as arrays of the tensors' type."""
    dtype = next((value.dtype for value in values if isinstance(value, keras.KerasTensor)), "float32")
    return [np.asarray(value, _numpy_type(dtype)) if isinstance(value, list) else value for value in values]


def _numpy_type(dtype: str) -> str:
    return "float32" if "float16" in dtype else dtype


def _shape(sizes: Sequence) -> tuple:
    """A shape whose size that is only known when the model runs is -1."""
    return tuple(-1 if size is None else int(size) for size in sizes)


def _concat(values: list, axis: int) -> Any:
    # Sizes of tensors, of which a shape is made.
    if not any(isinstance(value, keras.KerasTensor) for value in values):
        return [size for value in values for size in value]
    return ops.concatenate(_alike(*values), axis=axis)


def _stack(values: list, axis: int = 0) -> Any:
    if not any(isinstance(value, keras.KerasTensor) for value in values):
        return list(values)
    return ops.stack(_alike(*values), axis=axis)


def _getitem(tensor: Any, slice_spec: Any) -> Any:
    """Take a part of a tensor, or of its shape."""

    def one(part: Any) -> Any:
        if isinstance(part, dict) and part.keys() == {"start", "stop", "step"}:
            return slice(part["start"], part["stop"], part["step"])
        if isinstance(part, dict) and part.get("class_name") == "__ellipsis__":
            return Ellipsis
        return part

    parts = [one(part) for part in slice_spec] if isinstance(slice_spec, list) else [one(slice_spec)]
    return tensor[tuple(parts) if isinstance(tensor, keras.KerasTensor) else parts[0]]


def _split(value: Any, num_or_size_splits: Any, axis: int = 0) -> list:
    if isinstance(num_or_size_splits, list):
        num_or_size_splits = [sum(num_or_size_splits[: i + 1]) for i in range(len(num_or_size_splits) - 1)]
    return list(ops.split(value, num_or_size_splits, axis=axis))


def _unstack(value: Any, num: int | None = None, axis: int = 0) -> list:
    return list(ops.unstack(value, num=num, axis=axis))


def _matmul(a: Any, b: Any, transpose_a: bool = False, transpose_b: bool = False) -> Any:
    a, b = _alike(a, b)
    return ops.matmul(ops.swapaxes(a, -1, -2) if transpose_a else a, ops.swapaxes(b, -1, -2) if transpose_b else b)


def _pool(function: Callable) -> Callable:
    def pool(value: Any, ksize: Any, strides: Any, padding: str, data_format: str = "NHWC") -> Any:
        order = "channels_first" if data_format == "NCHW" else "channels_last"
        inner = slice(2, 4) if data_format == "NCHW" else slice(1, 3)

        def sizes(size: Any) -> tuple:
            size = [size] if isinstance(size, int) else list(size)
            return tuple(size[inner]) if len(size) == 4 else tuple(size * (2 // len(size)))

        return function(value, sizes(ksize), sizes(strides), padding=padding.lower(), data_format=order)

    return pool


def _resize(
    images: Any, size: Any, method: str = "bilinear", preserve_aspect_ratio: bool = False, antialias: bool = False
) -> Any:
    if preserve_aspect_ratio:
        raise ValueError("preserve_aspect_ratio")
    return ops.image.resize(images, tuple(size), interpolation=method, antialias=antialias, data_format="channels_last")


def _pad(tensor: Any, paddings: Any, mode: str = "CONSTANT", constant_values: float = 0) -> Any:
    mode = mode.lower()
    return ops.pad(tensor, paddings, mode=mode, **({"constant_values": constant_values} if mode == "constant" else {}))


def _where(condition: Any, x: Any, y: Any) -> Any:
    return ops.where(condition, *_alike(x, y))


# By the name of TensorFlow's function: what does it here, with TensorFlow's names of its arguments.
_FUNCTIONS: dict[str, Callable] = {
    **{name: _binary(getattr(ops, name)) for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")},
    **{name: _binary(getattr(ops, name)) for name in ("greater", "greater_equal", "less", "less_equal", "not_equal")},
    **{name: _binary(getattr(ops, name)) for name in ("equal", "logical_and", "logical_or")},
    "floordiv": _binary(ops.floor_divide),
    "mod": _binary(ops.mod),
    "floormod": _binary(ops.mod),
    "pow": _binary(ops.power),
    "divide_no_nan": _binary(ops.divide_no_nan),
    "squared_difference": _binary(lambda x, y: ops.square(ops.subtract(x, y))),
    **{name: getattr(ops, name) for name in ("abs", "exp", "log", "sqrt", "rsqrt", "square", "sign", "floor", "ceil")},
    **{name: getattr(ops, name) for name in ("sin", "cos", "tan", "tanh", "sigmoid", "log1p", "expm1", "erf", "round")},
    **{name: getattr(ops, name) for name in ("negative", "reciprocal", "logical_not", "zeros_like", "ones_like")},
    "relu": lambda features: ops.relu(features),
    "relu6": lambda features: ops.relu6(features),
    "elu": lambda features: ops.elu(features),
    "selu": lambda features: ops.selu(features),
    "softplus": lambda features: ops.softplus(features),
    "softsign": lambda features: ops.softsign(features),
    "neg": ops.negative,
    "identity": lambda input: ops.multiply(input, 1),
    "stop_gradient": lambda input: ops.stop_gradient(input),
    "softmax": lambda logits, axis=-1, dim=None: ops.softmax(logits, axis=-1 if axis is None else axis),
    "log_softmax": lambda logits, axis=-1, dim=None: ops.log_softmax(logits, axis=-1 if axis is None else axis),
    "leaky_relu": lambda features, alpha=0.2: ops.leaky_relu(features, negative_slope=alpha),
    "gelu": lambda features, approximate=False: ops.gelu(features, approximate=approximate),
    "silu": lambda features, beta=1.0: ops.multiply(features, ops.sigmoid(ops.multiply(features, beta))),
    "swish": lambda features, beta=1.0: ops.multiply(features, ops.sigmoid(ops.multiply(features, beta))),
    "bias_add": lambda value, bias, data_format=None: ops.add(*_alike(value, bias)),
    "clip_by_value": lambda t, clip_value_min, clip_value_max: ops.clip(t, clip_value_min, clip_value_max),
    "l2_normalize": lambda x, axis=None, epsilon=1e-12: ops.multiply(
        x, ops.rsqrt(ops.maximum(ops.sum(ops.square(x), axis=_axis(axis), keepdims=True), epsilon))
    ),
    **{f"reduce_{name}": _reduce(getattr(ops, name)) for name in ("mean", "sum", "max", "min", "prod", "std", "all")},
    "reduce_any": _reduce(ops.any),
    "reduce_variance": _reduce(ops.var),
    "reduce_logsumexp": _reduce(ops.logsumexp),
    "argmax": lambda input, axis=None, output_type="int64": ops.cast(ops.argmax(input, axis or 0), output_type),
    "argmin": lambda input, axis=None, output_type="int64": ops.cast(ops.argmin(input, axis or 0), output_type),
    "cumsum": lambda x, axis=0: ops.cumsum(x, axis=axis),
    "cast": lambda x, dtype: ops.cast(x, dtype),
    "reshape": lambda tensor, shape: ops.reshape(tensor, _shape(shape)),
    "expand_dims": lambda input, axis: ops.expand_dims(input, axis),
    "squeeze": lambda input, axis=None: ops.squeeze(input, axis=_axis(axis)),
    "transpose": lambda a, perm=None: ops.transpose(a, axes=perm),
    "tile": lambda input, multiples: ops.tile(input, multiples),
    "repeat": lambda input, repeats, axis=None: ops.repeat(input, repeats, axis=axis),
    "reverse": lambda tensor, axis: ops.flip(tensor, axis=_axis(axis)),
    "broadcast_to": lambda input, shape: ops.broadcast_to(input, shape),
    "gather": lambda params, indices, axis=None, batch_dims=0: ops.take(params, indices, axis=axis or 0),
    "concat": _concat,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "shape": lambda input: input.shape,
    "getitem": _getitem,
    "pad": _pad,
    "where": _where,
    "matmul": _matmul,
    "add_n": lambda inputs: sum(inputs[1:], inputs[0]),
    "avg_pool": _pool(ops.average_pool),
    "max_pool": _pool(ops.max_pool),
    "image.resize": _resize,
    "image.flip_left_right": lambda image: ops.flip(image, axis=-2),
    "image.flip_up_down": lambda image: ops.flip(image, axis=-3),
    "image.rgb_to_grayscale": lambda images: ops.image.rgb_to_grayscale(images, data_format="channels_last"),
}


def operation_of(layer: dict, where: str) -> Callable:
    """Return the function of tensors that such a layer is. where: its name, for errors.

    Raises InputError, then or when it is called, for a function or an argument that Keras 3 does not have.
    """
    config = layer["config"]
    name = str(config.get("function", "__operators__.getitem"))
    short = _ROOMS.sub("", name, count=1)
    function = _FUNCTIONS.get(_NAMES.get(short, short))
    if function is None:
        raise InputError(f"{where}: Keras 3 has not its operation tf.{name}; build the model anew, and load_weights")

    def run(inputs: Any, **arguments: Any) -> Any:
        given = {key: value for key, value in arguments.items() if key != "name"}
        try:
            return function(inputs, **given)
        except (TypeError, ValueError) as error:
            shown = ", ".join(f"{key}={value!r}"[:60] for key, value in given.items())
            raise InputError(f"{where}: tf.{name}({shown}) cannot be done by Keras 3: {error}") from error

    return run
