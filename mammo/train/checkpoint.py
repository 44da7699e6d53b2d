"""Checkpoints: opening Keras files of any age, always by name (`mammo.train.named_weights`), and saving them whole."""

import inspect
import io
import json
import logging
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import keras
import numpy as np

from mammo.base import guards
from mammo.base.files import InputError, atomic_write, one_line
from mammo.train import legacy
from mammo.train.named_weights import assign_by_name, leaf_layers, names_in, stored_weights, text_of


def load_model(path: str | os.PathLike, trust_checkpoint: bool = False) -> keras.Model:
    """Open a full model, uncompiled: `.h5` of Keras 2.0 and later, flat or nested, or `.keras`; the file is only read.

    Layer names, `trainable` flags, L2 factors and dropout rates are those of the file; every weight in it is used and
    every weight of the model is found there. Raises InputError for a file that is missing, damaged, without an
    architecture, or refused: for Python code (Lambda layers), unless `trust_checkpoint`, and in any case for describing
    more weights than it holds, or leading to other files.
    """
    path = _existing_file(path)
    if zipfile.is_zipfile(path):
        model = _build(*_read_archive(path), path, trust_checkpoint)
        _load_by_structure(model, path)
        return model
    with _open_h5(path) as h5:
        if "model_config" not in h5.attrs:
            remedy = "Received weights only: build the model first, then load_weights(model, path)"
            raise InputError(f"{path}: holds no model architecture. Expected a full model (.h5 or .keras). {remedy}")
        model = _build(_read_legacy(h5, path), _count(h5), path, trust_checkpoint)
        assign_by_name(model, stored_weights(h5["model_weights"]), path, strict=True)
    return model


def load_weights(model: keras.Model, path: str | os.PathLike, strict: bool = True) -> None:
    """Give `model` the weights of a file: legacy `.h5` weights or full model, `.weights.h5`, or `.keras`.

    Legacy files are read by layer name. With `strict` file and model must hold the same layers; without it the layers
    present in both are set and the others left alone (ImageNet weights without top). `.weights.h5` and `.keras`
    address layers by their order within each class, so they only fit the architecture that they were written from.

    Raises InputError naming the layer, the shape expected and the shape received; a legacy file then has changed
    nothing in the model.
    """
    path = _existing_file(path)
    if zipfile.is_zipfile(path):
        _read_archive(path)
    else:
        with _open_h5(path) as h5:
            group = h5.get("model_weights", h5)
            if names_in(group, "layer_names"):
                assign_by_name(model, stored_weights(group), path, strict)
                return
            if "layers" not in h5:
                raise InputError(f"{path}: holds no Keras weights. Expected .h5, .weights.h5 or .keras")
            _check_weight_count(model, h5, path)
    if not strict:
        raise InputError(f"{path}: layers can be matched by name only from a legacy .h5 file")
    _load_by_structure(model, path)


def save_model(model: keras.Model, path: str | os.PathLike) -> None:
    """Save a functional or Sequential model without optimizer state; the name ending chooses the format.

    `.weights.h5`: weights alone; `.h5`: a full model in the legacy format; `.keras`: one in today's. Whatever the
    `trainable` flags, the stock `keras.saving.load_model` reads the file correctly, as a model that computes in
    float32. On any failure an old file of this name stays whole.

    Raises InputError for an unknown ending, another kind of model or a file that cannot be written.
    """
    path = Path(path)
    check_model_name(path)
    try:
        # What the caller called a Sequential model is read again as a functional one.
        ends = (model.inputs, model.outputs) if isinstance(model, keras.Sequential) else (model.input, model.output)
    except (AttributeError, ValueError):
        raise InputError(
            f"{path}: cannot be written: Expected a model whose layers are connected from its inputs to its outputs. "
            f"Received {type(model).__name__} {model.name}"
        ) from None
    # The same layers in a model that was never compiled: no optimizer to save, and the caller's model is untouched.
    bare = keras.Model(*ends, name=model.name, trainable=model.trainable)
    try:
        whole = atomic_write(path, durable=True)
        with whole as temporary, _flags_of_layers(bare), _in_float32(bare), _without_legacy_notice():
            if path.name.endswith(".weights.h5"):
                _save_weights(bare, temporary)
            elif path.suffix == ".keras":
                keras.saving.save_model(bare, temporary)
            else:
                _save_legacy(bare, temporary)
    except (OSError, RuntimeError) as error:  # h5py reports a full disk as either
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else _one_line(error)
        raise InputError(f"{path}: cannot be written: {reason}") from error


def check_model_name(path: str | os.PathLike) -> None:
    """Raise InputError unless `path` can become a model file: by its ending, and by not being a folder."""
    path = Path(path)
    if path.suffix not in (".h5", ".hdf5", ".keras"):
        raise InputError(f"{path}: unknown model format. Expected a name ending in .h5, .keras or .weights.h5")
    if path.is_dir():
        raise InputError(f"{path}: Expected the name of a model file. Received a folder")


# Reading


def _existing_file(path: str | os.PathLike) -> Path:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: Expected a checkpoint file. Received {'a folder' if path.is_dir() else 'no file'}")
    return path


@contextmanager
def _open_h5(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "r") as h5:
            guards.check_h5(path, h5, path.stat().st_size)
            yield h5
    except InputError:
        raise
    # By what is damaged; not MemoryError, and not what a backend raises that is short of memory.
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path}: Expected a Keras checkpoint (.h5 or .keras). Received another kind of file or a damaged one: "
            f"{_one_line(error)}"
        ) from error


def _read_archive(path: Path) -> tuple[dict, int]:
    """The description of the model in a `.keras` file, and the number of values that it holds."""
    if path.suffix != ".keras":  # Keras chooses its reader by the name
        raise InputError(f"{path}: is a zip archive. If it is a Keras model, rename it to end in .keras")
    with guards.readable(path, "cannot be opened as a Keras model: {}"):
        guards.check_archive(path)
        with zipfile.ZipFile(path) as archive:
            if others := set(archive.namelist()) - guards.MODEL_MEMBERS:
                expected = ", ".join(sorted(guards.MODEL_MEMBERS))
                raise InputError(f"{path}: refused: holds {min(others)!r}. Expected {expected} alone")
            description = guards.parse_json(archive.read("config.json"))
            description.pop("compile_config", None)  # never used here
            with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as h5:
                guards.check_h5(path, h5, path.stat().st_size)
                return description, _count(h5)


def _count(group: h5py.Group) -> int:
    """The number of values in a group, each data set counted once."""
    sizes = []
    group.visititems(lambda _, item: sizes.append(item.size) if isinstance(item, h5py.Dataset) else None)
    return sum(sizes)


def _read_legacy(h5: h5py.File, path: Path) -> dict:
    """The description of the model in a legacy file: as `legacy.build` takes it where Keras 2 wrote it."""
    description = guards.parse_json(h5.attrs["model_config"])
    if text_of(h5.attrs.get("keras_version", "2")).startswith("2"):
        try:
            return legacy.plain(description)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
    kind, config = description["class_name"], description["config"]
    return {"module": "keras", "class_name": "Model" if kind == "Functional" else kind, "config": config}


def _build(description: dict, stored: int, path: Path, trust_checkpoint: bool) -> keras.Model:
    """The model of a description, with arbitrary weights. stored: the number of values that its file holds.

    Raises InputError, before any memory is reserved for the weights, where they would be more than these.
    """
    with keras.StatelessScope() as scope:  # the variables made in it get their memory as it ends
        try:
            if not trust_checkpoint:
                guards.refuse_code(description, path)
            model = _make(description, trust_checkpoint)
            _check_size(model, stored, path)
            _check_name(model, path)
            # TensorFlow never gives gradients to a variable that is frozen as it gets its memory.
            frozen = [layer for layer in leaf_layers(model) if not layer.trainable]
            for layer in frozen:
                layer.trainable = True
        except Exception as error:  # whatever a wrong description makes Keras stumble over
            scope.initialize_variables = False
            keras.utils.clear_session()  # forgets the variables, which the next such scope would fill
            if isinstance(error, InputError) and str(error).startswith(str(path)):
                raise
            raise InputError(f"{path}: cannot rebuild the model that it describes: {legacy.reason(error)}") from error
    for layer in frozen:
        layer.trainable = False
    return model


def _make(description: dict, trust_checkpoint: bool) -> keras.Model:
    if "module" not in description:
        return legacy.build(description, trust_checkpoint)
    # deserialize_keras_object, unlike Model.from_config, lets us say whether stored code may run.
    return keras.saving.deserialize_keras_object(description, safe_mode=not trust_checkpoint)


def _check_name(model, path: Path) -> None:
    """TensorFlow takes no others, and says so only when the model is run."""
    if not re.fullmatch(r"[A-Za-z0-9.][\w.\\/>-]*", model.name, re.ASCII):
        received = repr(one_line(model.name, 100))
        raise InputError(f"{path}: Expected a model's name of letters, digits, '_', '.', '-'. Received {received}")


def _check_size(model, stored: int, path: Path) -> None:
    if not isinstance(model, keras.Model):
        raise InputError(f"{path}: Expected a model. Received a {type(model).__name__}")
    described = sum(math.prod(weight.shape) for weight in model.weights)
    if described > stored:
        raise InputError(f"{path}: refused: describes {described} weights. Expected at most the {stored} that it holds")
    # Their values can be stored in less than they take here, or not at all.
    described = sum(math.prod(weight.shape) * np.dtype(weight.dtype).itemsize for weight in model.weights)
    guards.check_bytes(path, described, path.stat().st_size)
    for shape in (tensor.shape for tensor in model.inputs):
        guards.check_pixels(path, 1, math.prod(size or 1 for size in shape[1:]))


def _one_line(error: Exception) -> str:
    return one_line(str(error), 400) or type(error).__name__


def _load_by_structure(model: keras.Model, path: Path) -> None:
    # Keras raises many types here, all for a file that does not fit, and warns of what then fails.
    with guards.readable(path, "weights do not fit the model: {}"), warnings.catch_warnings(action="ignore"):
        model.load_weights(path)


def _check_weight_count(model: keras.Model, h5: h5py.File, path: Path) -> None:
    """Keras reads a `.weights.h5` file of a larger model without a word, leaving out what does not fit."""
    names: list[str] = []
    h5["layers"].visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    if (count := sum("seed_generator" not in name for name in names)) != len(model.weights):
        raise InputError(
            f"{path}: Expected {len(model.weights)} weight tensors, as the model has. Received {count}: "
            "a checkpoint of another architecture?"
        )


# Writing


@contextmanager
def _flags_of_layers(model: keras.Model) -> Iterator[None]:
    """Within the block every variable is as trainable as its layer, as in a model just loaded.

    Stock Keras writes and reads legacy files in an order that depends on the flags of variables, while only those of
    layers are stored: with a frozen gamma in a trainable batch normalization the two orders would differ.
    """
    before = [(variable, variable.trainable) for variable in model.variables]
    for layer in leaf_layers(model):
        flag = layer.trainable
        layer.trainable = not flag  # TensorFlow's object tracking ignores an assignment that changes nothing
        layer.trainable = flag
    try:
        yield
    finally:
        for variable, flag in before:
            variable.trainable = flag


@contextmanager
def _in_float32(model: keras.Model) -> Iterator[None]:
    """Within the block all layers compute in float32: half precision is a matter of the training, not of the file."""
    before = [(layer, layer.dtype_policy) for layer in leaf_layers(model)]
    for layer, _ in before:
        layer.dtype_policy = "float32"
    try:
        yield
    finally:
        for layer, policy in before:
            layer.dtype_policy = policy


@contextmanager
def _without_legacy_notice() -> Iterator[None]:
    """Keras logs a notice each time a legacy file is written; here that format is chosen knowingly."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return "as an HDF5 file" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class _MemoryFile(h5py.File):
    """HDF5 in memory. When a disk is full, HDF5 leaves its file open, which crashes Python later on."""

    def __str__(self):
        return "memory.h5"  # Keras chooses the format by this ending


def _save_legacy(model: keras.Model, path: Path) -> None:
    content = io.BytesIO()
    with _MemoryFile(content, "w") as h5:
        keras.saving.save_model(model, h5)
        description = guards.parse_json(h5.attrs["model_config"])
        _complete_operations(model, description["config"])
        h5.attrs["model_config"] = json.dumps(description).encode()
    path.write_bytes(content.getbuffer())


def _complete_operations(model: keras.Model, config: dict) -> None:
    """Describe operations such as `x / 2` in full: Keras itself leaves out where it finds them again."""
    entries = {entry["name"]: entry for entry in config["layers"]}
    for operation in model.operations:
        entry = entries[operation.name]
        if not isinstance(operation, keras.Layer) or _is_misread(entry["config"]):
            entry |= keras.saving.serialize_keras_object(operation)
        elif isinstance(operation, keras.Model) and not isinstance(operation, keras.Sequential):
            _complete_operations(operation, entry["config"])


def _is_misread(config: dict) -> bool:
    """Tell whether Keras takes a setting of a layer for one of its functions, such as attention's score_mode "dot"."""
    values = (value for key, value in config.items() if key != "name" and isinstance(value, str))
    return any(inspect.isfunction(getattr(keras.layers, value, None)) for value in values)


def _save_weights(model: keras.Model, path: Path) -> None:
    """Take the `.weights.h5` file out of a `.keras` archive, which Keras puts together in memory."""
    archive = path.with_suffix(".keras")
    try:
        keras.saving.save_model(model, archive)
        with zipfile.ZipFile(archive) as members, members.open("model.weights.h5") as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    finally:
        archive.unlink(missing_ok=True)


def check_one_image(model: keras.Model, source) -> None:
    """Raise InputError unless `model` gives probabilities of classes for one image; `source` names its file."""
    if len(model.inputs) != 1 or len(model.inputs[0].shape) != 4 or len(model.output_shape) != 2:
        raise InputError(f"{source}: Expected a classifier of one image. Received inputs {model.input_shape}")


def check_outputs(model: keras.Model, nb_class: int, source) -> None:
    """Raise InputError unless `model` has `nb_class` outputs; `source` names its file."""
    if model.output_shape[-1] != nb_class:
        expected = f"Expected a model of {nb_class} classes, the length of --class-list"
        raise InputError(f"{source}: {expected}. Received one of {model.output_shape[-1]}")
