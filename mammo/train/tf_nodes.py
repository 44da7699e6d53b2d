"""Nodes of TensorFlow's graph as layers (TensorFlowOpLayer of Keras 2.2 to 2.3), done by the operations of Keras 3."""

from collections.abc import Callable
from typing import Any

from mammo.base.files import InputError
from mammo.train.tf_operations import apply

# By the name of the node's operation: that of the function which does the same, given the same inputs.
_SAME = {
    **{name: name.lower() for name in ("Maximum", "Minimum", "Pow", "Greater", "Less", "Equal")},
    **{name: name.lower() for name in ("Relu", "Relu6", "Elu", "Selu", "Softplus", "Softsign", "Sigmoid", "Tanh")},
    **{
        name: name.lower() for name in ("Exp", "Log", "Log1p", "Sqrt", "Rsqrt", "Square", "Neg", "Abs", "Sign", "Floor")
    },
    **{name: name.lower() for name in ("Ceil", "Round", "Erf", "Softmax", "Identity", "Reshape", "Transpose", "Tile")},
    **{"Add": "add", "AddV2": "add", "RealDiv": "divide", "Div": "divide", "FloorDiv": "floordiv", "FloorMod": "mod"},
    **{"Sub": "subtract", "Mul": "multiply", "SquaredDifference": "squared_difference", "DivNoNan": "divide_no_nan"},
    **{"GreaterEqual": "greater_equal", "LessEqual": "less_equal", "NotEqual": "not_equal", "BiasAdd": "bias_add"},
    **{"LogSoftmax": "log_softmax", "Reciprocal": "reciprocal", "ExpandDims": "expand_dims", "Pad": "pad"},
    **{"Select": "where", "SelectV2": "where", "ClipByValue": "clip_by_value", "ArgMax": "argmax", "Shape": "shape"},
    **{
        "StopGradient": "stop_gradient",
        "BroadcastTo": "broadcast_to",
        "ZerosLike": "zeros_like",
        "ReverseV2": "reverse",
    },
}
_REDUCTIONS = {"Mean": "mean", "Sum": "sum", "Max": "max", "Min": "min", "Prod": "prod", "All": "all", "Any": "any"}
_TYPES = {"DT_FLOAT": "float32", "DT_HALF": "float16", "DT_DOUBLE": "float64", "DT_BFLOAT16": "bfloat16"}
_TYPES |= {"DT_INT32": "int32", "DT_INT64": "int64", "DT_UINT8": "uint8", "DT_BOOL": "bool"}


def _strided_slice(attributes: dict, value: Any, begin: list, end: list, strides: list) -> Any:
    """Take a part of a tensor, or of its shape. Bits i of the masks say more of part i."""
    masks = ("begin_mask", "end_mask", "shrink_axis_mask", "new_axis_mask", "ellipsis_mask")
    spec: list[Any] = []
    for i, (first, last, step) in enumerate(zip(begin, end, strides, strict=True)):
        from_begin, to_end, dropped, new, others = (attributes.get(mask, 0) >> i & 1 for mask in masks)
        part = {"start": None if from_begin else first, "stop": None if to_end else last, "step": step}
        spec.append({"class_name": "__ellipsis__"} if others else None if new else first if dropped else part)
    return apply("getitem", value, spec)


def _matmul(attributes: dict, a: Any, b: Any) -> Any:
    transposed = (attributes.get(f"transpose_{x}", attributes.get(f"adj_{y}")) for x, y in (("a", "x"), ("b", "y")))
    return apply("matmul", a, b, *transposed)


def _resize(attributes: dict, images: Any, size: Any) -> Any:
    if not attributes.get("half_pixel_centers"):
        raise ValueError("corners of pixels as in TensorFlow 1")
    return apply("image.resize", images, size)


_OTHERS: dict[str, Callable] = {
    "StridedSlice": _strided_slice,
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2"), _matmul),
    "ResizeBilinear": _resize,
    "ConcatV2": lambda attributes, *values: apply("concat", list(values[:-1]), values[-1]),
    "Pack": lambda attributes, *values: apply("stack", list(values), attributes.get("axis", 0)),
    "Unpack": lambda attributes, value: apply("unstack", value, attributes["num"], attributes.get("axis", 0)),
    "Split": lambda attributes, axis, value: apply("split", value, attributes["num_split"], axis),
    "SplitV": lambda attributes, value, sizes, axis: apply("split", value, sizes, axis),
    "Squeeze": lambda attributes, value: apply("squeeze", value, attributes.get("squeeze_dims") or None),
    "Cast": lambda attributes, value: apply("cast", value, _TYPES[attributes["DstT"]]),
    "LeakyRelu": lambda attributes, value: apply("leaky_relu", value, attributes.get("alpha", 0.2)),
    "GatherV2": lambda attributes, values, indices, axis: apply("gather", values, indices, axis),
    "PadV2": lambda attributes, value, paddings, constant: apply("pad", value, paddings, "CONSTANT", constant),
}


def _reduce(name: str) -> Callable:
    return lambda attributes, value, axis: apply(f"reduce_{name}", value, axis, attributes.get("keep_dims", False))


def _same(name: str) -> Callable:
    return lambda attributes, *inputs: apply(name, *inputs)


_NODES = {node: _same(name) for node, name in _SAME.items()}
_NODES |= {node: _reduce(name) for node, name in _REDUCTIONS.items()} | _OTHERS


def node_of(layer: dict, where: str) -> Callable:
    """Return the function of tensors that such a layer is. where: its name, for errors.

    Raises InputError, then or when it is called, for an operation that Keras 3 does not have.
    """
    node = layer["config"]["node_def"]
    if not isinstance(node, dict):
        raise InputError(
            f"{where}: Expected its operation as JSON. Received bytes of TensorFlow 2.0; build the model anew"
        )
    function = _NODES.get(node["op"])
    if function is None:
        raise InputError(f"{where}: Keras 3 has not its operation {node['op']}; build the model anew, and load_weights")
    attributes = {key: _value(each) for key, each in node.get("attr", {}).items()}
    constants = sorted((int(place), each) for place, each in layer["config"].get("constants", {}).items())

    def run(inputs: Any) -> Any:
        given = list(inputs) if isinstance(inputs, list) else [inputs]
        for place, each in constants:
            given.insert(place, each)
        try:
            return function(attributes, *given)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: its operation {node['op']} cannot be done by Keras 3: {error}") from error

    return run


def _value(attribute: dict) -> Any:
    """An attribute of a node as a value: a number, which JSON may have as a text, a list, or a text."""
    kind, value = next(iter(attribute.items()), (None, None))
    if kind == "list":
        return [int(each) for each in value.get("i", ())] if isinstance(value, dict) else None
    return int(value) if kind == "i" else value
