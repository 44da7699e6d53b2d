"""Half precision, recomputation and accumulation: the steps of the plain model, in less memory."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from dm_checkpoint import leaf_layers, load_model, save_model
from dm_keras_ext import freeze_below
from dm_memory import Recomputed, full_precision, mixed_precision, rematerialize
from dm_resnet import add_top_layers


def make_image_model(dropout=0.3, **options):
    """A patch net nested in a whole-image net, with batch norms in both; all weights by seed."""
    keras.utils.set_random_seed(7)
    image = x = keras.Input((None, None, 1))
    for width in (4, 6):
        x = layers.Conv2D(width, 3, padding="same")(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    patch = keras.Model(image, x)
    options = {"depths": (4,), "repetitions": (2,), **options}
    model, top = add_top_layers(patch, (32, 24), patch_net="yaroslav", dropout=dropout, weight_decay=0.01, **options)
    for layer in leaf_layers(model):
        if isinstance(layer, layers.Dropout):
            layer.seed_generator.state.assign([5, 0])
    return model, top


def make_data(model, samples=4):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 50, (samples, *model.input_shape[1:])).astype(np.float32)
    return x, np.eye(2, dtype=np.float32)[rng.integers(0, 2, samples)]


def values(variables):
    return [ops.convert_to_numpy(variable).copy() for variable in variables]


def step(model, trained, optimizer=None):
    """Loss of the first training step of `trained`, and the change of every variable of `model`, in its order."""
    before = values(model.variables)
    trained.compile(optimizer or keras.optimizers.SGD(1e-3), "categorical_crossentropy")
    loss = trained.train_on_batch(*make_data(model))
    return float(loss), [new - old for new, old in zip(values(model.variables), before, strict=True)]


def assert_close(ours, expected, tolerance):
    """Every array within `tolerance` times the largest value expected in it."""
    for one, two in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * max(np.abs(two).max(), 1e-7))


@pytest.mark.slow
@pytest.mark.parametrize("first_layer", [0, 2])
def test_a_recomputing_model_takes_the_step_of_the_plain_one(first_layer):
    plain, _ = make_image_model()
    freeze_below(plain, first_layer)
    loss, changes = step(plain, plain)

    model, _ = make_image_model()
    recomputing = rematerialize(model)
    freeze_below(model, first_layer)
    assert sum(isinstance(layer, Recomputed) for layer in recomputing.layers) > 2
    assert {id(variable) for variable in recomputing.variables} == {id(variable) for variable in model.variables}
    ours, our_changes = step(model, recomputing)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_close(our_changes, changes, 1e-3)
    moving = [i for i, variable in enumerate(model.variables) if "moving" in variable.path]
    assert all(np.abs(our_changes[i]).max() > 0 for i in moving)  # batch norm follows, also where it is frozen
    x, _ = make_data(model)
    np.testing.assert_array_equal(recomputing.predict(x, verbose=0), model.predict(x, verbose=0))


def test_half_precision_computes_in_16_bits_and_answers_in_32():
    model, _ = make_image_model()
    x, _ = make_data(model)
    expected = model.predict(x, verbose=0)
    mixed_precision(model, "bfloat16")
    features = model.layers[1]  # the patch net
    assert {variable.dtype for variable in model.weights} == {"float32"}
    ours = model(x)
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    assert keras.backend.standardize_dtype(features(x).dtype) == "bfloat16"
    difference = np.abs(ops.convert_to_numpy(ours) - expected).max()
    assert 0 < difference < 0.02
    full_precision(model)
    np.testing.assert_array_equal(model.predict(x, verbose=0), expected)


@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_a_file_of_a_half_precision_model_is_an_ordinary_one(tmp_path, suffix):
    model, _ = make_image_model()
    x, _ = make_data(model)
    expected = model.predict(x, verbose=0)
    mixed_precision(model, "float16")
    save_model(model, tmp_path / f"net.{suffix}")
    assert model.layers[1].layers[1].compute_dtype == "float16"  # as before
    for opened in (
        load_model(tmp_path / f"net.{suffix}"),
        keras.saving.load_model(tmp_path / f"net.{suffix}", compile=False),
    ):
        assert {layer.compute_dtype for layer in leaf_layers(opened)} == {"float32"}
        np.testing.assert_allclose(opened.predict(x, verbose=0), expected, atol=1e-6)
