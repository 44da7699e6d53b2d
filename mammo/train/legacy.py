"""Models as Keras 2 described them, built again with the layers and operations of Keras 3.

`plain` brings a description to one form without building anything; `build` then makes the layers and calls them in
the order of the graph, as Keras 2 did.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from mammo.base.files import InputError, one_line
from mammo.train.tf_nodes import node_of
from mammo.train.tf_operations import operation_of

_MODELS = ("Functional", "Model", "Network", "Sequential")
_POLICIES = ("Policy", "PolicyV1", "DTypePolicy")
_OPERATIONS = ("TFOpLambda", "SlicingOpLambda", "TensorFlowOpLayer")
_CLASSES = {
    **{"BatchNormalizationV1": "BatchNormalization", "BatchNormalizationV2": "BatchNormalization"},
    **{"Convolution2D": "Conv2D", "SyncBatchNormalization": "BatchNormalization"},
}

# Settings of Keras 2 that say how to compute, not what, or are of use before the weights are known.
_WITHOUT_EFFECT = (
    "_initializer",
    "_regularizer",
    "_constraint",
    "_shape",
    "implementation",
    "rng_type",
    "input_length",
    "_type",
    "module",
)

_RENAMED = {
    ("InputLayer", "batch_input_shape"): "batch_shape",
    **{("LeakyReLU", "alpha"): "negative_slope"},
}

_CONSTANT = "_CONSTANT_VALUE"  # what stands for a layer's name where an operation begins with a number


# A description without what only names it otherwise


def plain(description: dict) -> dict:
    """Return the description of a Keras 2 model with Sequential models as functional ones, and names as Keras 3 has.

    Only data change: no name in it is looked up. Raises KeyError, TypeError or the like for a damaged description.
    """
    return {"class_name": "Functional", "config": _plain_model(description["class_name"], description["config"])}


def legal_name(name: str) -> str:
    """Return a layer's name without `/`, which Keras 3 forbids; keras.applications of Keras 3 have `_` there."""
    return name.replace("/", "_")


def _plain_model(kind: str, config: dict | list, name: str = "sequential") -> dict:
    config = {"name": name, "layers": config} if isinstance(config, list) else config
    if kind == "Sequential":
        config = _chain(config)
    layers = [_plain_layer(layer) for layer in config["layers"]]
    ends = {key: _plain_value(config[key]) for key in ("input_layers", "output_layers")}
    return {"name": legal_name(config["name"]), "trainable": config.get("trainable"), "layers": layers, **ends}


def _plain_layer(layer: dict) -> dict:
    kind, name = layer["class_name"], layer.get("name")
    if kind in _MODELS:
        config = _plain_model(kind, layer["config"], name)
    else:
        config = _plain_value(layer["config"])
    own = {key: layer[key] for key in ("module", "registered_name") if layer.get(key)}
    nodes = _plain_value(layer.get("inbound_nodes", []))
    return {
        **own,
        "class_name": kind,
        "name": legal_name(name or config["name"]),
        "config": config,
        "inbound_nodes": nodes,
    }


def _plain_value(value: Any) -> Any:
    """A value with numbers for arrays of one, names for policies, and plain layers and models within it."""
    if isinstance(value, list):
        return [_plain_value(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"type", "value"}:  # how Keras 2.0 wrote NumPy's numbers
        return value["value"]
    kind, config = value.get("class_name"), value.get("config")
    if kind in _POLICIES and isinstance(config, dict) and isinstance(config.get("name"), str):
        # Half precision is a matter of the training, and of the machine: what it was saved with holds float32.
        return "float32" if config["name"].startswith(("mixed_", "infer", "_infer")) else config["name"]
    if kind in _MODELS:
        return {"class_name": kind, "config": _plain_model(kind, config)}
    if kind == "L1L2":
        factors = {key: _plain_value(factor) for key, factor in config.items()}
        return {**value, "config": {key: float(f[0] if isinstance(f, list) else f) for key, f in factors.items()}}
    return {key: _plain_value(each) for key, each in value.items() if key not in ("build_config", "shared_object_id")}


def _chain(config: dict) -> dict:
    """The configuration of a Sequential model as a functional one, whose layers follow each other."""
    layers = [{**layer, "name": layer.get("name") or _name_of(layer)} for layer in config["layers"]]
    if not layers:
        raise InputError("Expected layers. Received an empty Sequential model")
    if layers[0]["class_name"] != "InputLayer":
        shape, dtype = config.get("build_input_shape") or _input_shape(layers[0]), _dtype(layers[0]["config"])
        if not shape:
            raise InputError(f"Sequential model {config['name']}: holds no input shape: it was never built")
        settings = {"batch_input_shape": shape, "dtype": dtype, "name": f"{layers[0]['name']}_input"}
        layers.insert(0, {"class_name": "InputLayer", "name": settings["name"], "config": settings})
    for before, layer in itertools.pairwise(layers):
        layer["inbound_nodes"] = [[[before["name"], 0, 0, {}]]]
    layers[0]["inbound_nodes"] = []
    first, last = layers[0]["name"], layers[-1]["name"]
    return {**config, "layers": layers, "input_layers": [[first, 0, 0]], "output_layers": [[last, 0, 0]]}


def _name_of(layer: dict) -> str:
    return layer["config"]["name"] if isinstance(layer["config"], dict) else layer["class_name"].lower()


def _input_shape(layer: dict) -> list | None:
    """The input shape that the first layer of a Sequential model, or the first layer of that, was given."""
    config = layer["config"]
    if isinstance(config, dict) and "layers" not in config:
        return config.get("batch_input_shape")
    return _input_shape((config if isinstance(config, list) else config["layers"])[0])


def _dtype(config: dict | list) -> str:
    dtype = config.get("dtype") if isinstance(config, dict) else None
    return dtype if isinstance(dtype, str) else "float32"


# The model


def build(description: dict, trust_checkpoint: bool = False) -> keras.Model:
    """Return the model of a description by `plain`, with arbitrary weights.

    trust_checkpoint: run the Python code of Lambda layers.
    Raises InputError for a layer, a setting or an operation that Keras 3 does not have, by its name.
    """
    return _build_model(description["config"], not trust_checkpoint)


def _build_model(config: dict, safe_mode: bool) -> keras.Model:
    layers = {layer["name"]: layer for layer in config["layers"]}
    first_calls = _first_calls(config)
    made = {name: _make(layer, safe_mode) for name, layer in layers.items()}
    results: dict[str, list] = {name: [] for name in layers}  # of each call, its tensors

    def tensor(reference: list) -> Any:
        name = legal_name(reference[0])
        return results[name][reference[1] - first_calls.get(name, 0)][reference[2]]

    waiting = {}
    for name, layer in layers.items():
        if layer["class_name"] == "InputLayer":
            results[name].append([made[name].output])
        else:
            waiting[name] = list(layer["inbound_nodes"])
    while waiting:
        before = sum(map(len, waiting.values()))
        for name, nodes in list(waiting.items()):
            while nodes and all(_is_there(each, results, first_calls) for each in _references(nodes[0])):
                results[name].append(_call(layers[name], made[name], nodes.pop(0), tensor))
            if not nodes:
                del waiting[name]
        if waiting and sum(map(len, waiting.values())) == before:
            raise InputError(f"layer {next(iter(waiting))}: its inputs come from no layer, or from itself")
    inputs, outputs = ([tensor(each) for each in _references(config[key])] for key in ("input_layers", "output_layers"))
    # Keras 2 lists inputs and outputs even when there is one; Keras 3 would then warn at each call with a tensor.
    ends = [each[0] if len(each) == 1 else each for each in (inputs, outputs)]
    # Only a frozen model says more than its layers do.
    frozen = {"trainable": False} if config["trainable"] is False else {}
    return keras.Model(*ends, name=config["name"], **frozen)


def _is_reference(value: Any) -> bool:
    """Tell whether a value leads to a tensor: [layer, number of its call, number of its output, perhaps arguments]."""
    is_one = isinstance(value, list) and len(value) in (3, 4) and isinstance(value[0], str)
    return is_one and isinstance(value[1], int) and (isinstance(value[2], int) or value[0] == _CONSTANT)


def _references(value: Any) -> list[list]:
    """The references within a value, at any depth, constants left out."""
    if _is_reference(value):
        own = [] if value[0] == _CONSTANT else [value[:3]]
        return own + (_references(value[3]) if len(value) == 4 else [])
    if isinstance(value, (list, dict)):
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in _references(part)]
    return []


def _first_calls(config: dict) -> dict[str, int]:
    """The number that the first call of each layer has: 0, or where Keras 2 counted a model's own graph, 1."""
    numbers: dict[str, int] = {}
    for name, call, _ in _references([[layer["inbound_nodes"] for layer in config["layers"]], config["output_layers"]]):
        name = legal_name(name)
        numbers[name] = min(call, numbers.get(name, call))
    models = {layer["name"] for layer in config["layers"] if layer["class_name"] in _MODELS}
    return {name: number for name, number in numbers.items() if name in models}


def _is_there(reference: list, results: dict[str, list], first_calls: dict[str, int]) -> bool:
    name = legal_name(reference[0])
    return reference[1] - first_calls.get(name, 0) < len(results.get(name, ()))


def _make(layer: dict, safe_mode: bool) -> Callable:
    """What an entry calls: a layer, a model, or a function of tensors."""
    kind, name, config = layer["class_name"], layer["name"], layer["config"]
    if kind in _MODELS:
        return _build_model(config, safe_mode)
    where = f"layer {name} ({kind})"
    if kind in _OPERATIONS:
        return (node_of if kind == "TensorFlowOpLayer" else operation_of)(layer, where)
    if kind in _FUNCTIONS:
        return _FUNCTIONS[kind](config)
    try:
        settings, after = _activation(config, name)
        described = _describe({**layer, "config": {**settings, "name": name}}, where, safe_mode)
        made = keras.saving.deserialize_keras_object(described, safe_mode=safe_mode)
    except InputError:
        raise
    except Exception as error:  # whatever a wrong description makes Keras stumble over
        raise InputError(f"{where}: {reason(error)}") from error
    return made if after is None else _Followed(made, after)


class _Followed:
    """A layer with an activation that Keras 3 has not as a setting of layers."""

    def __init__(self, layer: keras.Layer, after: Callable):
        self.layer, self.after = layer, after

    def __call__(self, *args, **settings):
        return self.after(self.layer(*args, **settings))


def _activation(config: dict, name: str) -> tuple[dict, Callable | None]:
    """The settings with the activation as Keras 3 names it, and what else is to be done after the layer."""
    activation = config.get("activation")
    if isinstance(activation, dict) and activation.get("class_name") == "function":
        activation = activation["config"]
    if isinstance(activation, dict):  # a layer
        described = {**activation, "config": {**activation["config"], "name": f"{name}_activation"}}
        return {**config, "activation": "linear"}, keras.layers.deserialize(_describe(described, f"layer {name}", True))
    if not isinstance(activation, str):
        return config, None
    if activation == "hard_sigmoid" and "recurrent_activation" not in config:
        return {**config, "activation": "linear"}, _hard_sigmoid
    return {**config, "activation": activation.removesuffix("_v2")}, None


# Layers without weights that Keras 3 no longer has, or not as layers.
_FUNCTIONS: dict[str, Callable] = {
    "ThresholdedReLU": lambda config: lambda inputs: inputs * ops.cast(inputs > config["theta"], inputs.dtype),
    # of InceptionResNetV2
    "Custom>CustomScaleLayer": lambda config: lambda inputs: inputs[0] + inputs[1] * config["scale"],
}


def _hard_sigmoid(inputs: Any) -> Any:
    """Compute hard_sigmoid of Keras 2; that of Keras 3 has a slope of 1/6."""
    return ops.clip(0.2 * inputs + 0.5, 0, 1)


def _describe(layer: dict, where: str, safe_mode: bool) -> dict:
    """The description of a layer of Keras 2 for Keras 3: what has no place there is left out where that says nothing.

    Raises InputError for a layer or a setting that Keras 3 does not have.
    """
    kind = _CLASSES.get(layer["class_name"], layer["class_name"])
    if keras.saving.get_registered_object(kind):
        return {"module": "keras", "registered_name": kind, **layer}
    if layer.get("registered_name") or not inspect.isclass(found := getattr(keras.layers, kind, None)):
        raise InputError(
            f"{where}: Keras 3 has no such layer; give its class as a custom object, or build the model anew"
        )
    settings = {_RENAMED.get((kind, key), key): value for key, value in layer["config"].items()}
    if kind.startswith("GRU"):
        settings.setdefault("reset_after", False)
    if kind == "Lambda" and isinstance(settings["function"], list):
        code = dict(zip(("code", "defaults", "closure"), settings["function"], strict=True))
        settings["function"] = {"class_name": "__lambda__", "config": code}
    if isinstance(settings.get("axis"), list) and len(settings["axis"]) == 1:
        settings["axis"] = settings["axis"][0]
    taken = _settings_of(found)
    for key in settings.keys() - taken:
        value = settings.pop(key)
        if not (value in (None, False, 1) or key.endswith(_WITHOUT_EFFECT)):
            raise InputError(
                f"{where}: Keras 3 has no setting {key} for this layer. Received {one_line(repr(value), 100)}"
            )
    for key, value in settings.items():
        if key in ("activation", "recurrent_activation") and value == "hard_sigmoid":
            raise InputError(
                f"{where}: {key} hard_sigmoid is another function in Keras 3, which has not that of Keras 2"
            )
        settings[key] = _describe_inner(value, where, safe_mode)
    return {"module": "keras.layers", "class_name": kind, "config": settings, "registered_name": None}


def _describe_inner(value: Any, where: str, safe_mode: bool) -> Any:
    """A setting, with the layers and models in it (of wrappers and recurrent layers) described for Keras 3."""
    if isinstance(value, list):
        return [_describe_inner(each, where, safe_mode) for each in value]
    kind = value.get("class_name") if isinstance(value, dict) else None
    if kind in _MODELS:
        return keras.saving.serialize_keras_object(_build_model(value["config"], safe_mode))
    if isinstance(kind, str) and inspect.isclass(getattr(keras.layers, _CLASSES.get(kind, kind), None)):
        return _describe(value, f"{where}, {kind} in it", safe_mode)
    if isinstance(kind, str) and isinstance(value.get("config"), dict):  # an initializer, a regularizer, a constraint
        found = [getattr(room, kind, None) for room in (keras.initializers, keras.regularizers, keras.constraints)]
        taken = next((_settings_of(each) for each in found if inspect.isclass(each)), value["config"].keys())
        return {"class_name": kind, "config": {key: each for key, each in value["config"].items() if key in taken}}
    return value


def _settings_of(kind: type) -> set[str]:
    """The names of all settings that a class takes, with those of the classes that it hands the others on to."""
    names: set[str] = set()
    for each in kind.__mro__:
        if "__init__" in each.__dict__:
            parameters = inspect.signature(each.__init__).parameters.values()
            names |= {one.name for one in parameters}
            if not any(one.kind is one.VAR_KEYWORD for one in parameters):
                break
    return names


def _call(layer: dict, made: Callable, node: Any, tensor: Callable) -> list:
    """The tensors that a call of a layer gives. node: what Keras 2 stored of its arguments."""

    def resolve(value: Any) -> Any:
        if _is_reference(value):
            return value[2] if value[0] == _CONSTANT else tensor(value)
        if isinstance(value, list):
            return [resolve(each) for each in value]
        return {key: resolve(each) for key, each in value.items()} if isinstance(value, dict) else value

    where = f"layer {layer['name']} ({layer['class_name']})"
    references = [node] if _is_reference(node) else _flat(node)
    settings = next((resolve(each[3]) for each in references if len(each) == 4 and each[3]), {})
    inputs = resolve(node)
    try:
        if isinstance(inputs, list) and len(inputs) == 1 and layer["class_name"] not in _OPERATIONS:
            inputs = inputs[0]
        if layer["class_name"] not in _OPERATIONS and not _has_tensor(inputs):
            raise InputError(f"{where}: Expected tensors of the model. Received numbers")
        if inspect.isfunction(made):
            return _named(made(inputs, **settings), layer["name"], [inputs, settings])
        called = made.layer if isinstance(made, _Followed) else made
        taken = inspect.signature(called.call).parameters
        # Keras 2 gave these to any layer.
        settings = {key: value for key, value in settings.items() if key in taken or value is not None}
        if "training" not in taken:
            settings.pop("training", None)
        if isinstance(inputs, list) and isinstance(called, (keras.layers.RNN, keras.layers.Bidirectional)):
            inputs, settings["initial_state"] = inputs[0], inputs[1:]
        result = made(inputs, **settings)
        if called is not made:
            return _named(result, f"{layer['name']}_activation", [])
        return keras.tree.flatten(result)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where}: {reason(error)}") from error


def _has_tensor(value: Any) -> bool:
    return any(isinstance(each, keras.KerasTensor) for each in keras.tree.flatten(value))


def _flat(node: Any) -> list[list]:
    """The references of a node's own inputs, with their arguments, in order."""
    if _is_reference(node):
        return [node]
    return [each for part in (node.values() if isinstance(node, dict) else node) for each in _flat(part)]


def _named(result: Any, name: str, before: list) -> list:
    """The tensors of operations just done, which get the name of their layer in the file: no other layer has it.

    before: the tensors that the operations began with.
    """
    tensors = result if isinstance(result, list) else [result]
    known = {
        each._keras_history.operation for each in keras.tree.flatten(before) if isinstance(each, keras.KerasTensor)
    }
    waiting = [each for each in tensors if isinstance(each, keras.KerasTensor)]
    number = 0
    while waiting:
        operation = waiting.pop(0)._keras_history.operation
        if isinstance(operation, keras.Layer) or operation in known:
            continue
        known.add(operation)
        operation.name = f"{name}.{number}" if number else name
        number += 1
        waiting += operation._inbound_nodes[-1].input_tensors
    return tensors


def reason(error: Exception) -> str:
    """Return why Keras failed, in one line, without the configurations that it puts before it."""
    text = one_line(str(error).rpartition("Exception encountered: ")[2], 10_000) or type(error).__name__
    return text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
