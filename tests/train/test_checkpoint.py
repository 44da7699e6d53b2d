"""Checkpoints of every age: each weight by value, flags, refusals, whole files; golden outputs where present."""

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.train.checkpoint import leaf_layers, load_model, load_weights, save_model
from tests.conftest import SHARED
from tests.train.networks import outputs

# A small writer of Keras 2.0.8 files, after the layout of that program


def keras2_layer(class_name, name, after, **settings):
    """One entry of a Keras 2 functional configuration; `after` lists (layer, call number)."""
    nodes = [[[source, call, 0, {}] for source, call in after]] if after else []
    return {"class_name": class_name, "name": name, "config": {"name": name, **settings}, "inbound_nodes": nodes}


def keras2_input(shape):
    return keras2_layer("InputLayer", "input_1", [], batch_input_shape=[None, *shape], dtype="float32", sparse=False)


def keras2_conv(name, after, trainable=True, l2=0.0):
    draw = {"scale": 2.0, "mode": "fan_in", "distribution": "normal", "seed": None}
    return keras2_layer(
        *("Conv2D", name, after),
        **{"trainable": trainable, "filters": 3, "kernel_size": [3, 3], "strides": [1, 1], "padding": "same"},
        **{"data_format": "channels_last", "dilation_rate": [1, 1], "activation": "linear", "use_bias": True},
        kernel_initializer={"class_name": "VarianceScaling", "config": draw},
        bias_initializer={"class_name": "Zeros", "config": {}},
        kernel_regularizer={"class_name": "L1L2", "config": {"l1": 0.0, "l2": l2}},
        **dict.fromkeys(("bias_regularizer", "activity_regularizer", "kernel_constraint", "bias_constraint")),
    )


def keras2_batch_norm(name, after, trainable=True):
    ones = {key: {"class_name": "Ones", "config": {}} for key in ("gamma_initializer", "moving_variance_initializer")}
    settings = {"trainable": trainable, "axis": 3, "momentum": 0.99, "epsilon": 0.001}
    return keras2_layer("BatchNormalization", name, after, **settings, **ones)


def keras2_dense(name, after, units=2):
    return keras2_layer("Dense", name, after, trainable=True, units=units, activation="softmax")


def keras2_model(name, layers, outputs):
    ends = {"input_layers": [["input_1", 0, 0]], "output_layers": [[output, call, 0] for output, call in outputs]}
    return {"name": name, "layers": layers, **ends}


def keras2_nested(name, layers, output, *calls):
    """An entry for a nested model; `calls` are the (layer, call number) that it is called on, one after the other."""
    nodes = [[[source, call, 0, {}]] for source, call in calls]
    config = keras2_model(name, layers, [(output, 0)])
    return {"class_name": "Model", "name": name, "config": config, "inbound_nodes": nodes}


SHAPES = {
    "Conv2D": {"kernel": (3, 3, 3, 3), "bias": (3,)},
    "BatchNormalization": dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), (3,)),
    "Dense": {"kernel": (3, 2), "bias": (2,)},
}


def draw_weights(layers, rng):
    """Layer name -> weight name -> random values, no two alike."""
    return {
        layer["name"]: {weight: rng.random(shape, np.float32) for weight, shape in SHAPES[kind].items()}
        for layer in layers
        if (kind := layer["class_name"]) in SHAPES
    }


def keras2_order(layers, weights):
    """(layer, weight) in the order of Keras 2: what can be trained, then layer by layer all the rest."""
    flags = {layer["name"]: layer["config"].get("trainable") for layer in layers}
    every = [(layer, weight) for layer in weights for weight in weights[layer]]
    first = [(layer, weight) for layer, weight in every if flags[layer] and "moving" not in weight]
    return first + [pair for pair in every if pair not in first]


def write_keras2(path, config, groups, full=True):
    """`groups`: layer name -> list of (stored weight name, values)."""
    with h5py.File(path, "w") as h5:
        group = h5.create_group("model_weights") if full else h5
        if full:
            h5.attrs["model_config"] = json.dumps({"class_name": "Model", "config": config}).encode()
            h5.attrs["training_config"] = json.dumps({"optimizer_config": {"config": {"lr": 1e-3}}}).encode()
        group.attrs["keras_version"] = b"2.0.8"
        group.attrs["layer_names"] = [name.encode() for name in groups]
        for name, weights in groups.items():
            layer = group.create_group(name)
            layer.attrs["weight_names"] = np.array([stored.encode() for stored, _ in weights], dtype="S")
            for stored, values in weights:
                layer.create_dataset(stored, data=values)
    return path


def stored(weights, scope):
    return [(f"{scope}/{name}:0", values) for name, values in weights.items()]


def same_weights(model, weights):
    for name, values in weights.items():
        layer = model.get_layer(name)
        for weight, expected in values.items():
            np.testing.assert_array_equal(getattr(layer, weight), expected, err_msg=f"{name}/{weight}")


def write_flat(path, seed=0, l2=0.01, scope="dense_1_1"):
    rng = np.random.default_rng(seed)
    layers = [
        keras2_input((8, 8, 3)),
        keras2_conv("conv2d_1", [("input_1", 0)], l2=l2),
        keras2_batch_norm("batch_normalization_1", [("conv2d_1", 0)], trainable=False),
        keras2_layer("Add", "add_1", [("batch_normalization_1", 0), ("conv2d_1", 0)], trainable=True),
        keras2_layer("GlobalAveragePooling2D", "gap", [("add_1", 0)], data_format="channels_last"),
        keras2_layer("Dropout", "dropout_1", [("gap", 0)], rate=0.3),
        keras2_dense("dense_1", [("dropout_1", 0)]),
    ]
    weights = draw_weights(layers, rng)
    groups = {layer["name"]: stored(weights.get(layer["name"], {}), layer["name"]) for layer in layers}
    groups["dense_1"] = stored(weights["dense_1"], scope)
    write_keras2(path, keras2_model("model_1", layers, [("dense_1", 0)]), groups)
    return weights


def write_nested(path, frozen=(), order=None):
    """A patch net inside a whole-image net, batch norms of both called alike; returns (inner, outer) weights."""
    rng = np.random.default_rng(1)
    inner_layers = [
        keras2_input((None, None, 3)),
        keras2_conv("conv_a", [("input_1", 0)], trainable="conv_a" not in frozen),
        keras2_batch_norm("batch_normalization_1", [("conv_a", 0)], trainable="batch_normalization_1" not in frozen),
        keras2_conv("conv_b", [("batch_normalization_1", 0)], trainable="conv_b" not in frozen),
    ]
    outer_layers = [
        keras2_input((8, 8, 3)),
        keras2_nested("model_1", inner_layers, "conv_b", ("input_1", 0)),
        keras2_batch_norm("batch_normalization_1", [("model_1", 1)]),
        keras2_layer("GlobalAveragePooling2D", "gap", [("batch_normalization_1", 0)]),
        keras2_dense("dense_1", [("gap", 0)]),
    ]
    inner, outer = draw_weights(inner_layers, rng), draw_weights(outer_layers, rng)
    sequence = keras2_order(inner_layers, inner)
    if order is not None:
        sequence = [sequence[i] for i in order(len(sequence))]
    groups = {
        "input_1": [],
        "model_1": [(f"{layer}/{weight}:0", inner[layer][weight]) for layer, weight in sequence],
        "batch_normalization_1": stored(outer["batch_normalization_1"], "batch_normalization_1_1"),
        "gap": [],
        "dense_1": stored(outer["dense_1"], "dense_1_1"),
    }
    write_keras2(path, keras2_model("model_2", outer_layers, [("dense_1", 0), ("model_1", 1)]), groups)
    return inner, outer


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Opening old files


@pytest.mark.parametrize("l2", [0.01, [0.01], {"type": "ndarray", "value": 0.01}])
def test_flat_keras2_file(tmp_path, l2):
    path = tmp_path / "flat.h5"
    weights = write_flat(path, l2=l2)
    before = digest(path)
    model = load_model(path)
    assert digest(path) == before
    same_weights(model, weights)
    assert not model.compiled
    assert model.get_layer("conv2d_1").kernel_regularizer.l2 == 0.01
    assert model.get_layer("dropout_1").rate == 0.3
    assert model.get_layer("conv2d_1").trainable
    assert not model.get_layer("batch_normalization_1").trainable


@pytest.mark.parametrize(
    "frozen",
    [(), ("conv_a", "batch_normalization_1", "conv_b"), ("conv_a",), ("conv_b",), ("batch_normalization_1",)],
    ids=lambda frozen: "+".join(frozen) or "none",
)
@pytest.mark.parametrize("order", [None, lambda n: np.random.default_rng(2).permutation(n)], ids=["own", "any"])
def test_nested_keras2_file(tmp_path, frozen, order):
    path = tmp_path / "nested.h5"
    inner, outer = write_nested(path, frozen, order)
    model = load_model(path)
    same_weights(model, outer)
    same_weights(model.get_layer("model_1"), inner)
    for name in inner:
        assert model.get_layer("model_1").get_layer(name).trainable == (name not in frozen)
    # Second output: the nested model as it stands, whose reference in output_layers also counts from 1.
    x = np.random.default_rng(3).random((2, 8, 8, 3), np.float32)
    np.testing.assert_allclose(model.predict_on_batch(x)[1], model.get_layer("model_1").predict_on_batch(x), rtol=1e-6)


def test_scope_suffixes_inside_a_nested_model(tmp_path):
    """Layers d and d_1 in a session that had used both names: stored as d_1 and d_1_1, shapes alike."""
    inner_layers = [
        keras2_input((3,)),
        keras2_layer("Dense", "d", [("input_1", 0)], units=3),
        keras2_layer("Dense", "d_1", [("d", 0)], units=3),
    ]
    outer_layers = [keras2_input((3,)), keras2_nested("inner", inner_layers, "d_1", ("input_1", 0))]
    rng = np.random.default_rng(0)
    weights = {name: {"kernel": rng.random((3, 3)), "bias": rng.random(3)} for name in ("d", "d_1")}
    path = write_keras2(
        tmp_path / "suffix.h5",
        keras2_model("outer", outer_layers, [("inner", 1)]),
        {"inner": stored(weights["d"], "d_1") + stored(weights["d_1"], "d_1_1")},
    )
    inner = load_model(path).get_layer("inner")
    for name, values in weights.items():
        np.testing.assert_allclose(inner.get_layer(name).kernel, values["kernel"], rtol=1e-6)


def test_nested_model_called_twice(tmp_path):
    """Calls 1 and 2 of a shared patch net, as in a two-view model."""
    inner_layers = [keras2_input((3,)), keras2_layer("Dense", "dense_1", [("input_1", 0)], units=3)]
    outer_layers = [
        keras2_input((3,)),
        keras2_nested("inner", inner_layers, "dense_1", ("input_1", 0), ("relu", 0)),
        keras2_layer("Activation", "relu", [("inner", 1)], activation="relu"),
    ]
    kernel = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    path = write_keras2(
        tmp_path / "twice.h5",
        keras2_model("outer", outer_layers, [("inner", 2)]),
        {"inner": [("dense_1/kernel:0", kernel), ("dense_1/bias:0", np.zeros(3, np.float32))]},
    )
    x = np.random.default_rng(1).random((4, 3), np.float32)
    y_pred = load_model(path).predict_on_batch(x)
    np.testing.assert_allclose(np.squeeze(y_pred), np.maximum(x @ kernel, 0) @ kernel, atol=1e-5)


def test_separable_convolution_with_inherited_settings(tmp_path):
    settings = {"filters": 4, "kernel_size": [3, 3], "depth_multiplier": 1, "use_bias": False}
    inherited = {"kernel_initializer": {"class_name": "Zeros", "config": {}}}
    inherited |= dict.fromkeys(("kernel_regularizer", "kernel_constraint"))
    name = "block2_sepconv1"
    layers = [
        keras2_input((8, 8, 3)),
        keras2_layer("SeparableConv2D", name, [("input_1", 0)], **settings, **inherited),
    ]
    shapes = {"depthwise_kernel": (3, 3, 3, 1), "pointwise_kernel": (1, 1, 3, 4)}
    rng = np.random.default_rng(0)
    weights = {weight: rng.random(shape, np.float32) for weight, shape in shapes.items()}
    config = keras2_model("xception", layers, [(name, 0)])
    path = write_keras2(tmp_path / "separable.h5", config, {name: stored(weights, name)})
    same_weights(load_model(path), {name: weights})


# Writing and reading back


def nested_model(nb_class=2, seed=0):
    """A nested model with every kind of freezing: a layer, the variables of a trainable batch norm, nothing."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((None, None, 3), name="input_1")
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv_a")(inputs)
    x = keras.layers.BatchNormalization(name="batch_normalization_1")(x)
    x = keras.layers.Conv2D(3, 3, padding="same", name="conv_b")(x)
    x = keras.layers.BatchNormalization(name="batch_normalization_2")(x)
    inner = keras.Model(inputs, x, name="model_1")
    inputs = keras.Input((8, 8, 3), name="input_1")
    x = keras.layers.BatchNormalization(name="batch_normalization_1")(inner(inputs))
    x = keras.layers.GlobalAveragePooling2D(name="gap")(x)
    x = keras.layers.Dropout(0.5, name="dropout_1")(x)
    model = keras.Model(inputs, keras.layers.Dense(nb_class, name="dense_1")(x), name="model_2")
    rng = np.random.default_rng(seed)
    model.set_weights([rng.random(weight.shape) for weight in model.get_weights()])
    return model


def freeze(model, how):
    inner = model.get_layer("model_1")
    if how in ("layer", "mixed"):
        inner.get_layer("conv_a").trainable = False
    if how in ("variables", "mixed"):
        for layer in (inner.get_layer("batch_normalization_2"), model.get_layer("batch_normalization_1")):
            layer.gamma.trainable = layer.beta.trainable = False
    if how == "inner":
        inner.trainable = False
    if how == "whole":
        model.trainable = False
    return model


def plain_layers(model, prefix=""):
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from plain_layers(layer, f"{prefix}{layer.name}/")
        elif layer.weights:
            yield prefix + layer.name, layer


def assert_same_model(one, other, flags=True):
    ones, others = dict(plain_layers(one)), dict(plain_layers(other))
    assert ones.keys() == others.keys()
    for name, layer in ones.items():
        assert not flags or layer.trainable == others[name].trainable, name
        for mine, theirs in zip(layer.get_weights(), others[name].get_weights(), strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


FREEZING = ["nothing", "layer", "variables", "mixed", "inner", "whole"]


@pytest.mark.parametrize("how", FREEZING)
@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_full_model_round_trip(tmp_path, ending, how, caplog):
    model = freeze(nested_model(), how)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    flags = [variable.trainable for variable in model.variables]
    path = tmp_path / f"model{ending}"
    save_model(model, path)
    assert not caplog.records  # the notice on legacy files
    assert [variable.trainable for variable in model.variables] == flags
    assert model.compiled
    assert_same_model(model, load_model(path))
    stock = keras.saving.load_model(path, compile=False)
    assert_same_model(model, stock)
    if ending == ".h5":
        with h5py.File(path) as h5:
            assert list(h5) == ["model_weights"]
            assert "training_config" not in h5.attrs
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_sequential_models_are_saved_whole(tmp_path, ending):
    layers = [keras.layers.Conv2D(2, 3), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2, "softmax")]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    save_model(model, tmp_path / f"m{ending}")
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype("float32")
    for load in (load_model, keras.saving.load_model):
        loaded = load(tmp_path / f"m{ending}")
        np.testing.assert_allclose(loaded.predict_on_batch(x), model.predict_on_batch(x), atol=1e-6)
        assert [layer.name for layer in loaded.layers[1:]] == [layer.name for layer in model.layers]


def test_models_that_cannot_be_saved_are_refused(tmp_path):
    class Own(keras.Model):
        def call(self, x):
            return x

    for model in (keras.Sequential([keras.layers.Dense(2)]), Own()):
        with pytest.raises(InputError, match="Expected a model whose layers are connected"):
            save_model(model, tmp_path / "m.keras")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("how", FREEZING)
@pytest.mark.parametrize("ending", [".h5", ".keras", ".weights.h5"])
def test_weights_into_a_model_frozen_otherwise(tmp_path, ending, how):
    path = tmp_path / f"model{ending}"
    model = freeze(nested_model(), how)
    save_model(model, path)
    other = freeze(nested_model(seed=1), "mixed")
    flags = [variable.trainable for variable in other.variables]
    load_weights(other, path)
    assert_same_model(model, other, flags=False)
    assert [variable.trainable for variable in other.variables] == flags


def test_keras2_file_saved_again_and_read_by_stock_keras(tmp_path):
    inner, outer = write_nested(tmp_path / "old.h5", frozen=("conv_a",))
    save_model(load_model(tmp_path / "old.h5"), tmp_path / "new.h5")
    stock = keras.saving.load_model(tmp_path / "new.h5", compile=False)
    same_weights(stock, outer)
    same_weights(stock.get_layer("model_1"), inner)


def test_stock_file_of_a_compiled_model(tmp_path):
    """Today's own writer, optimizer included (which allows no two layers of one name, however deep)."""
    model = nested_model().get_layer("model_1")
    model.compile("nadam", "mse")
    model.optimizer.build(model.trainable_variables)
    for name in ("stock.keras", "stock.h5"):
        model.save(tmp_path / name)
        opened = load_model(tmp_path / name)
        assert_same_model(model, opened)
        assert not opened.compiled


def test_unknown_ending(tmp_path):
    with pytest.raises(InputError, match=r"\.h5, \.keras or \.weights\.h5"):
        save_model(nested_model(), tmp_path / "model.ckpt")
    assert not list(tmp_path.iterdir())


FULL_DISK = """
import resource, sys
import keras
from mammo.train.checkpoint import save_model
from mammo.base.files import InputError

inputs = x = keras.Input((40,))
for _ in range(8):
    x = keras.layers.Dense(40)(x)
model = keras.Model(inputs, x)
for path in sys.argv[1:]:
    for limit in (100, 2_000, 20_000, 50_000):  # the file has some 60 KB
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        try:
            save_model(model, path)
            print("written")
        except InputError as error:
            print(error)
"""


@pytest.mark.slow
def test_failed_write_keeps_the_old_file(tmp_path):
    """In a process of its own: HDF5 may crash Python long after a write that failed."""
    paths = [tmp_path / f"model{ending}" for ending in (".h5", ".keras", ".weights.h5")]
    for path in paths:
        path.write_bytes(b"the old file")
    command = [sys.executable, "-c", FULL_DISK, *paths]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Exception ignored" not in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    for i, line in enumerate(lines):
        assert f"{paths[i // 4]}: cannot be written" in line
    assert all(path.read_bytes() == b"the old file" for path in paths)
    assert sorted(tmp_path.iterdir()) == sorted(paths)


# Weights alone


def test_keras2_weights_file(tmp_path):
    weights = write_flat(tmp_path / "full.h5")
    model = load_model(tmp_path / "full.h5")
    fresh = {name: {key: values + 1 for key, values in layer.items()} for name, layer in weights.items()}
    path = tmp_path / "weights.h5"
    write_keras2(path, None, {name: stored(values, name) for name, values in fresh.items()}, full=False)
    load_weights(model, path)
    same_weights(model, fresh)
    load_weights(model, tmp_path / "full.h5")
    same_weights(model, weights)


def test_keras1_weight_names_of_a_net_without_top(tmp_path):
    """As the ImageNet files of keras.applications name them; the top stays as it was."""
    weights = write_flat(tmp_path / "full.h5")
    model = load_model(tmp_path / "full.h5")
    old_names = {"kernel": "W", "bias": "b", "moving_mean": "running_mean", "moving_variance": "running_std"}
    fresh = {name: {key: values + 1 for key, values in weights[name].items()} for name in list(weights)[:2]}
    groups = {
        name: [(f"{name}_{old_names.get(key, key)}_1:0", values) for key, values in layer.items()]
        for name, layer in fresh.items()
    }
    path = write_keras2(tmp_path / "notop.h5", None, groups, full=False)
    with pytest.raises(InputError, match="Only in the model: dense_1"):
        load_weights(model, path)
    same_weights(model, weights)
    load_weights(model, path, strict=False)
    same_weights(model, {**fresh, "dense_1": weights["dense_1"]})


@pytest.mark.parametrize("ending", [".h5", ".keras", ".weights.h5"])
def test_another_class_count(tmp_path, ending):
    path = tmp_path / f"five{ending}"
    save_model(nested_model(nb_class=5), path)
    model = nested_model(seed=1)
    with pytest.raises(InputError, match="dense") as caught:
        load_weights(model, path)
    assert "3, 2" in str(caught.value)
    assert "3, 5" in str(caught.value)  # backends print shapes in their own ways
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if ending == ".h5":
        assert_same_model(model, nested_model(seed=1))


def test_file_with_more_layers_than_the_model(tmp_path):
    """Keras itself reads such a file in silence."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4)(inputs)
    save_model(keras.Model(inputs, keras.layers.Dense(4)(hidden)), tmp_path / "two.weights.h5")
    with pytest.raises(InputError, match=r"Expected 2 weight tensors.* Received 4"):
        load_weights(keras.Model(inputs, hidden), tmp_path / "two.weights.h5")


@pytest.mark.parametrize("change", ["missing", "unknown", "twice", "shape"])
def test_weights_that_do_not_pair_up(tmp_path, change):
    weights = write_flat(tmp_path / "full.h5")
    model = load_model(tmp_path / "full.h5")
    groups = {name: stored(values, name) for name, values in weights.items()}
    conv = groups["conv2d_1"]
    expected = {
        "missing": (conv[:1], "no weights in the file for bias"),
        "unknown": ([*conv, ("conv2d_1/scale:0", conv[1][1])], "conv2d_1/scale:0 .* no place"),
        "twice": ([*conv, ("other/bias:0", conv[1][1])], "other/bias:0 .* no place"),
        "shape": ([conv[0], ("conv2d_1/bias:0", np.ones(4))], r"bias: Expected shape \(3,\). Received \(4,\)"),
    }
    groups["conv2d_1"], message = expected[change]
    with pytest.raises(InputError, match=f"layer conv2d_1.*{message}"):
        load_weights(model, write_keras2(tmp_path / "odd.h5", None, groups, full=False))
    same_weights(model, weights)


# Refusals


@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_names_that_tensorflow_cannot_run_are_refused(tmp_path, ending):
    inputs = keras.Input((3,))
    save_model(keras.Model(inputs, keras.layers.Dense(2)(inputs), name="٣;"), tmp_path / f"a{ending}")
    with pytest.raises(InputError, match=r"Expected a model's name of letters.*٣;"):
        load_model(tmp_path / f"a{ending}")


def lambda_model():
    inputs = keras.Input((3,))
    return keras.Model(inputs, keras.layers.Lambda(lambda x: x * 2, output_shape=(3,))(inputs))


@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_lambda_layers_need_trust(tmp_path, ending):
    path = tmp_path / f"lambda{ending}"
    save_model(lambda_model(), path)
    with pytest.raises(InputError, match=r"Lambda layer.*--trust-checkpoint"):
        load_model(path)
    x = np.ones((1, 3), np.float32)
    np.testing.assert_array_equal(load_model(path, trust_checkpoint=True)(x), 2 * x)
    with pytest.raises(InputError, match="Lambda layer"):  # the trust was for that one call
        load_model(path)


def test_keras2_lambda_and_outside_code_are_refused(tmp_path):
    layers = [
        keras2_input((3,)),
        keras2_layer("Lambda", "lambda_1", [("input_1", 0)], function=["code", None, None], function_type="lambda"),
    ]
    path = write_keras2(tmp_path / "lambda.h5", keras2_model("m", layers, [("lambda_1", 0)]), {})
    with pytest.raises(InputError, match="Lambda layer"):
        load_model(path)
    layers[1] = {**keras2_dense("dense_1", [("input_1", 0)]), "module": "os.path"}
    write_keras2(path, keras2_model("m", layers, [("dense_1", 0)]), {})
    with pytest.raises(InputError, match=r"module os\.path"):
        load_model(path)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_nested(folder / "good.h5")
    whole = (folder / "good.h5").read_bytes()
    (folder / "truncated.h5").write_bytes(whole[: len(whole) // 2])
    save_model(nested_model(), folder / "good.keras")
    archive = (folder / "good.keras").read_bytes()
    (folder / "truncated.keras").write_bytes(archive[: len(archive) // 2])
    shutil.copy(folder / "good.keras", folder / "good.zip")
    (folder / "text.h5").write_text("neg,pos\n")
    (folder / "empty.h5").touch()
    (folder / "packed.h5").write_bytes(gzip.compress(whole))
    with h5py.File(folder / "other.h5", "w") as h5:
        h5["data"] = np.zeros(3)
    with h5py.File(folder / "no_weights.h5", "w") as h5, h5py.File(folder / "good.h5") as good:
        h5.attrs["model_config"] = good.attrs["model_config"]
    with h5py.File(folder / "no_json.h5", "w") as h5:
        h5.attrs["model_config"] = "{"
    with h5py.File(folder / "sequential.h5", "w") as h5:
        h5.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": []})
    with h5py.File(folder / "odd_layer.h5", "w") as h5:
        config = keras2_model("m", [keras2_layer("Strange", "input_1", [])], [("input_1", 0)])
        h5.attrs["model_config"] = json.dumps({"class_name": "Model", "config": config})
    save_model(nested_model(), folder / "alone.weights.h5")
    return folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.h5", "Received no file"),
        (".", "Received a folder"),
        ("truncated.h5", "damaged"),
        ("truncated.keras", "damaged"),
        ("text.h5", "another kind of file"),
        ("empty.h5", "another kind of file"),
        ("packed.h5", "another kind of file"),
        ("other.h5", "no model architecture"),
        ("alone.weights.h5", r"load_weights\(model, path\)"),
        ("good.zip", "rename it"),
        ("no_weights.h5", r"describes \d+ weights"),
        ("no_json.h5", "damaged"),
        ("sequential.h5", "empty Sequential model"),
        ("odd_layer.h5", "cannot rebuild.*Strange"),
    ],
)
def test_files_that_are_no_model(bad_files, name, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(bad_files / name)
    assert str(caught.value).startswith(str(bad_files / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["truncated.h5", "text.h5", "other.h5", "none.h5", "truncated.keras"])
def test_files_that_hold_no_weights(bad_files, name):
    with pytest.raises(InputError, match=re.escape(name)):
        load_weights(nested_model(), bad_files / name)


# Golden files of the published program


def golden_checkpoints():
    """Names, the costly ones marked slow: ResNet50 and large images."""
    for path in sorted((SHARED / "golden" / "checkpoints").glob("*.h5.gz")):
        name = path.name.removesuffix(".h5.gz")
        images = path.with_name(f"{name}.npz")
        costly = path.stat().st_size > 900_000 or images.stat().st_size > 1_200_000
        yield pytest.param(name, marks=pytest.mark.slow if costly else ())


def assert_same_listing(layers, listing):
    assert [layer.name for layer in layers] == [entry["name"] for entry in listing]
    for layer, entry in zip(layers, listing, strict=True):
        if "layers" in entry:  # Keras 2 does not store the flag of a nested model
            assert_same_listing(layer.layers, entry["layers"])
            continue
        assert type(layer).__name__ == entry["cls"]
        if entry["cls"] != "InputLayer":
            assert layer.trainable == entry["trainable"], layer.name
        assert list(layer.output.shape) == entry["output_shape"], layer.name
        expected = {re.search(r"(\w+):0$", w["name"])[1]: tuple(w["shape"]) for w in entry["weights"]}
        assert {weight.name: tuple(weight.shape) for weight in layer.weights} == expected, layer.name
        for key in ("strides", "pool_size", "kernel_size"):
            if key in entry:
                assert list(getattr(layer, key)) == entry[key], layer.name
        for key in ("padding", "epsilon", "momentum"):
            if key in entry:
                assert getattr(layer, key) == entry[key], layer.name
        if "activation" in entry:
            assert layer.activation.__name__ == entry["activation"]
        if "dropout_rate" in entry:
            assert layer.rate == entry["dropout_rate"]
        if "kernel_l2" in entry:
            assert layer.kernel_regularizer.l2 == entry["kernel_l2"]


@pytest.mark.parametrize("name", list(golden_checkpoints()))
def test_golden_checkpoint(golden, tmp_path, name):
    path = tmp_path / f"{name}.h5"
    with gzip.open(golden / "checkpoints" / f"{name}.h5.gz") as packed, path.open("wb") as h5:
        shutil.copyfileobj(packed, h5)
    before = digest(path)
    model = load_model(path)
    assert digest(path) == before
    path.unlink()

    listing = json.loads((golden / "checkpoints" / f"{name}.json").read_text())
    assert_same_listing(model.layers, listing["layers"])
    assert model.count_params() == listing["nb_params"]

    values = np.load(golden / "checkpoints" / f"{name}.npz")
    x = values["raw"].astype(np.float32)
    x *= float(values["rescale_factor"])
    x -= float(values["mean"])
    x = np.repeat(x[..., None], listing["channels"], axis=-1)
    inner = [key.removeprefix("layer__") for key in values if key.startswith("layer__")]
    # What a layer gave within this model is what the next one received; a nested model has outputs of its own too.
    after = {name: entry["name"] for entry in listing["layers"] for name in entry["inbound"]}
    taps = [model.get_layer(after[name]).input for name in inner]
    probe = keras.Model(model.input, [model.output, *taps])

    predicted, *tensors = (keras.ops.convert_to_numpy(t) for t in keras.tree.flatten(probe(x, training=False)))
    np.testing.assert_allclose(predicted, values["predict"], rtol=0, atol=1e-4)
    for layer, tensor in zip(inner, tensors, strict=True):
        scale = np.abs(tensor).max()
        means = tensor.mean(axis=tuple(range(1, tensor.ndim - 1)))
        if tensor.ndim == 4:
            tensor = tensor[..., :: listing["channel_subsample"]]
        np.testing.assert_allclose(tensor, values[f"layer__{layer}"], rtol=0, atol=1e-4 * scale)
        np.testing.assert_allclose(means, values[f"chmean__{layer}"], rtol=0, atol=1e-4 * scale)

    if x.size < 1_000_000:  # larger images cost seconds each; their weights are proved above
        flips = [x, x[:, :, ::-1], x[:, ::-1], x[:, ::-1, ::-1]]
        predicted = np.stack([outputs(model, flip) for flip in flips])
        np.testing.assert_allclose(predicted, values["predict_flips"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(predicted.mean(axis=0), values["predict_flip_mean"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("ending", [".h5", ".keras"])
def test_layers_saved_frozen_learn_once_they_are_trained(tmp_path, ending):
    image = keras.Input((4, 4, 1))
    inner = keras.Model(image, keras.layers.BatchNormalization()(keras.layers.Conv2D(2, 3)(image)))
    outer_image = keras.Input((4, 4, 1))
    outer = keras.Model(outer_image, keras.layers.GlobalAveragePooling2D()(inner(outer_image)))
    inner.trainable = False
    save_model(outer, tmp_path / f"frozen{ending}")
    model = load_model(tmp_path / f"frozen{ending}")
    assert not model.trainable_variables
    for layer in leaf_layers(model):
        layer.trainable = True
    before = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    assert len(before) == 4
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
    rng = np.random.default_rng(0)
    model.fit(rng.random((4, 4, 4, 1), np.float32), 10 * rng.random((4, 2), np.float32), verbose=0)
    after = [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]
    moved = [not np.array_equal(old, new) for old, new in zip(before, after, strict=True)]
    assert moved[0] and moved[2] and moved[3]  # not the bias, which batch normalization takes away
