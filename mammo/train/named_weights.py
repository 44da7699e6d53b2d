"""Weights of legacy `.h5` files, paired with the variables of a model by the names of layers and weights.

Such a file stores the weights of each top-level layer as one list. Inside a nested model the order of that list depends
on which layers were frozen when the file was written, so reading by position can swap weights of equal shape without a
word.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import keras

from mammo.base.files import InputError
from mammo.train import legacy

# Weight names of Keras 1, which the ImageNet files of keras.applications still carry. `running_std` holds variances.
_KERAS1_WEIGHTS = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}


# What Keras 2 stored with weights, and is none: the state of random numbers.
_NO_WEIGHTS = {"StateVar:0"}


def text_of(attribute: bytes | str) -> str:
    """Return an attribute of HDF5 as text."""
    return attribute.decode() if isinstance(attribute, bytes) else attribute


def names_in(group: h5py.Group, attribute: str) -> list[str]:
    """Return a list of names, which Keras splits over several attributes when it exceeds the HDF5 limit of 64 KiB."""
    keys = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(keys)}" in group.attrs:
        keys.append(f"{attribute}{len(keys)}")
    return [text_of(name) for key in keys for name in group.attrs[key]]


def stored_weights(group: h5py.Group) -> dict[str, dict[str, h5py.Dataset]]:
    """Return layer name, as Keras 3 allows it -> weight name -> data, for the layers of a file that hold weights."""
    layers = names_in(group, "layer_names")
    stored = {layer: {name: group[layer][name] for name in names_in(group[layer], "weight_names")} for layer in layers}
    return {legacy.legal_name(layer): weights for layer, weights in stored.items() if weights}


def assign_by_name(model: keras.Model, stored: dict[str, dict[str, h5py.Dataset]], path: Path, strict: bool) -> None:
    """Give the layers of a model the stored weights of their names; see `mammo.train.checkpoint.load_weights`.

    stored: of `stored_weights`. Raises InputError before anything is changed.
    """
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    if strict and layers.keys() != stored.keys():
        stored = _renumber(stored, layers.keys())
    if strict and layers.keys() != stored.keys():
        raise InputError(
            f"{path}: layers with weights differ. Only in the model: {_listing(layers.keys() - stored.keys())}. "
            f"Only in the file: {_listing(stored.keys() - layers.keys())}"
        )
    pairs = []
    for name, weights in stored.items():
        if name in layers:
            pairs += _pair_weights(layers[name], weights, f"{path}: layer {name}")
    if not pairs and not strict:
        raise InputError(f"{path}: no layer of the file has the name of a layer of the model")
    for variable, data in pairs:
        variable.assign(data[()])
    for layer in leaf_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # takes the mean and variance that it computes with from its weights


def _renumber(stored: dict[str, dict], names: Iterable[str]) -> dict[str, dict]:
    """Name stored layers as the model does where Keras chose the names, such as `conv2d_7`, by counting.

    The count depends on what else was built before, so that Inception's `conv2d_1` of the ImageNet file is `conv2d` or
    `conv2d_94` here. Within a kind, layers are matched in the order of their numbers, which is that of their making.
    """

    def by_kind(names):
        kinds = {}
        for name in names:
            kind, _, number = re.fullmatch(r"(.*?)(_(\d+))?", name).groups(default="0")
            kinds.setdefault(kind, []).append((int(number), name))
        return {kind: [name for _, name in sorted(numbered)] for kind, numbered in kinds.items()}

    ours, theirs = by_kind(names), by_kind(stored)
    new_names = {}
    for kind, old in theirs.items():
        new = ours.get(kind, [])
        new_names |= dict(zip(old, new if len(new) == len(old) else old, strict=True))
    return {new_names[name]: weights for name, weights in stored.items()}


def _listing(names: set[str]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"


def _pair_weights(layer: keras.Layer, weights: dict[str, h5py.Dataset], where: str) -> list[tuple]:
    """(variable, data) for every variable of `layer` and every weight of its group, or InputError.

    Weight names read `scope/kernel:0`. In the group of a plain layer the scope says nothing new (and may carry a
    suffix, as in `dense_1_1`); in that of a nested model it names the inner layer.
    """
    if not isinstance(layer, keras.Model):
        return _pair_variables(layer, weights, where)
    layers = _inner_layers(layer, where)
    scopes: dict[str, dict] = {}
    for name, data in weights.items():
        scope, weight = _cut_scope(name, layers)
        scopes.setdefault(scope, {})[weight] = data
    pairs = []
    for inner, scope in _match_scopes(layers, scopes.keys(), where):
        pairs += _pair_variables(inner, scopes[scope], f"{where}, inner layer {inner.name}")
    return pairs


def _cut_scope(name: str, layers: dict[str, keras.Layer]) -> tuple[str, str]:
    """(scope, weight) of a stored name, which has the scopes of models before them, and those of parts after them.

    A scope reads `conv1_conv` where the file has the layer `conv1/conv`.
    """
    parts = name.split("/")
    runs = [(i, j) for i in range(len(parts) - 1) for j in range(len(parts) - 1, i, -1)]
    for begin, end in runs:
        scope = "_".join(parts[begin:end])
        if scope in layers or _without_number(scope) in layers:
            return scope, "/".join(parts[end:])
    return "/".join(parts[:-1]), parts[-1]


def _without_number(name: str) -> str:
    return re.sub(r"_\d+$", "", name)


def _inner_layers(model: keras.Model, where: str) -> dict[str, keras.Layer]:
    """Name -> layer, for all layers with weights at any depth inside a nested model."""
    found = {}
    for layer in leaf_layers(model):
        if layer.weights and found.setdefault(layer.name, layer) is not layer:
            raise InputError(f"{where}: two inner layers are called {layer.name}: cannot tell their weights apart")
    return found


def _match_scopes(layers: dict[str, keras.Layer], scopes: set[str], where: str) -> list[tuple]:
    """(layer, scope) for each scope of a file, which is the layer's name with or without a suffix `_1`.

    Keras 2 made a scope unique within its session: layers `dense` and `dense_1` may be stored as `dense_1` and
    `dense_1_1`. Longest scopes first, so that `dense_1_1` takes `dense_1` before `dense_1` can.
    """
    free = dict(layers)
    matched = []
    for scope in sorted(scopes, key=len, reverse=True):
        name = scope if scope in free else _without_number(scope)
        if name not in free:
            raise InputError(f"{where}: weights stored as {scope} belong to no inner layer of the model")
        matched.append((free.pop(name), scope))
    if free:
        raise InputError(f"{where}: no weights in the file for inner layers {_listing(free.keys())}")
    return matched


def _pair_variables(layer: keras.Layer, weights: dict[str, h5py.Dataset], where: str) -> list[tuple]:
    free = list(layer.weights)
    pairs = []
    for stored_name, data in weights.items():
        variable = _variable_of(stored_name, free)
        if variable is None:
            if stored_name.rpartition("/")[2] in _NO_WEIGHTS:
                continue
            raise InputError(f"{where}: weight {stored_name} of the file has no place in the model")
        if tuple(variable.shape) != data.shape:
            raise InputError(
                f"{where}, weight {variable.name}: Expected shape {tuple(variable.shape)}. Received {data.shape}: "
                "a checkpoint for another class count, image size or channel count?"
            )
        free = [each for each in free if each is not variable]
        pairs.append((variable, data))
    if free:
        raise InputError(f"{where}: no weights in the file for {_listing({variable.name for variable in free})}")
    return pairs


def _variable_of(stored_name: str, variables: list) -> keras.Variable | None:
    """The variable of a layer that a stored weight is for, by its name, and where the layer has parts, by their names.

    Names read kernel:0 (Keras 2), kernel (Keras 3), conv1_W_1:0 (Keras 1), query/kernel:0 (a part of attention).
    """
    endings = "|".join(map(re.escape, [*(variable.name for variable in variables), *_KERAS1_WEIGHTS]))
    ending = re.search(rf"(?:^|[/_])({endings})(?:_\d+)?(?::\d+)?$", stored_name)
    if ending is None:
        return None
    name = _KERAS1_WEIGHTS.get(ending[1], ending[1])
    parts = stored_name.split("/")[:-1]

    def likeness(variable: keras.Variable) -> tuple[int, int]:
        path = variable.path.split("/")[:-1]
        same = [one == other for one, other in zip(path[::-1], parts[::-1], strict=False)]
        kin = [
            _without_number(one) == _without_number(other) for one, other in zip(path[::-1], parts[::-1], strict=False)
        ]
        return sum(kin), sum(same)

    return max((variable for variable in variables if variable.name == name), key=likeness, default=None)


def leaf_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """Yield the layers of `model`, those of nested models in place of the nested models, at any depth."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from leaf_layers(layer)
        else:
            yield layer
