"""Half precision, recomputation and accumulation: the steps of the plain model, in less memory."""

import gzip

import keras
import numpy as np
import pytest
from keras import layers, ops

from dm_keras_ext import freeze_below
from dm_resnet import add_top_layers
from mammo.base.files import InputError
from mammo.train import memory
from mammo.train.checkpoint import leaf_layers, load_model, save_model
from mammo.train.keras2 import create_optimizer
from mammo.train.memory import Recomputed, full_precision, mixed_precision, rematerialize, training_memory
from tests.train.networks import outputs


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
        if isinstance(layer, layers.Dropout) and dropout > 0:
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
    """Every array within `tolerance` times its largest value, or 1e-5: biases before batch norms hold but rounding."""
    for one, two in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerance * max(np.abs(two).max(), 1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("first_layer", [0, 2])
def test_a_recomputing_model_takes_the_step_of_the_plain_one(first_layer, monkeypatch):
    # Many parts, so that every kind of layer is in one: dropout, batch norm, residual units, nested and new layers.
    monkeypatch.setattr(memory, "_best_ends", lambda graph: memory._cuts(graph)[3:-1:4])
    plain, _ = make_image_model()
    freeze_below(plain, first_layer)
    loss, changes = step(plain, plain)

    model, _ = make_image_model()
    recomputing = rematerialize(model)
    freeze_below(model, first_layer)
    assert sum(isinstance(layer, Recomputed) for layer in recomputing.layers) > 3
    assert {id(variable) for variable in recomputing.variables} == {id(variable) for variable in model.variables}
    ours, our_changes = step(model, recomputing)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert_close(our_changes, changes, 1e-3)
    moving = [i for i, variable in enumerate(model.variables) if "moving" in variable.path]
    assert all(np.abs(our_changes[i]).max() > 0 for i in moving)  # batch norm follows, also where it is frozen
    x, _ = make_data(model)
    np.testing.assert_array_equal(outputs(recomputing, x), outputs(model, x))


def test_half_precision_computes_in_16_bits_and_answers_in_32():
    model, _ = make_image_model()
    x = make_data(model)[0] / 50  # or the probabilities are 0 and 1 in any precision
    expected = outputs(model, x)
    mixed_precision(model, "bfloat16")
    features = model.layers[1]  # the patch net
    assert {variable.dtype for variable in model.weights} == {"float32"}
    ours = model(x)
    assert keras.backend.standardize_dtype(ours.dtype) == "float32"
    assert keras.backend.standardize_dtype(features(x).dtype) == "bfloat16"
    difference = np.abs(ops.convert_to_numpy(ours) - expected).max()
    assert 0 < difference < 0.02
    full_precision(model)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), expected)


@pytest.mark.parametrize("suffix", ["h5", "keras"])
def test_a_file_of_a_half_precision_model_is_an_ordinary_one(tmp_path, suffix):
    model, _ = make_image_model()
    x, _ = make_data(model)
    expected = outputs(model, x)
    mixed_precision(model, "float16")
    save_model(model, tmp_path / f"net.{suffix}")
    assert model.layers[1].layers[1].compute_dtype == "float16"  # as before
    for opened in (
        load_model(tmp_path / f"net.{suffix}"),
        keras.saving.load_model(tmp_path / f"net.{suffix}", compile=False),
    ):
        assert {layer.compute_dtype for layer in leaf_layers(opened)} == {"float32"}
        np.testing.assert_allclose(outputs(opened, x), expected, atol=1e-6)


@pytest.mark.slow
def test_a_recomputing_model_in_half_precision_takes_the_same_step(monkeypatch):
    monkeypatch.setattr(memory, "_best_ends", lambda graph: memory._cuts(graph)[3:-1:4])
    plain, _ = make_image_model()
    mixed_precision(plain, "bfloat16")
    loss, changes = step(plain, plain)
    model, _ = make_image_model()
    mixed_precision(model, "bfloat16")
    recomputing = rematerialize(model)
    maps = [layer.output for layer in recomputing.layers if isinstance(layer, Recomputed) and layer.output.ndim == 4]
    assert {features.dtype for features in maps} == {"bfloat16"}
    ours, our_changes = step(model, recomputing)
    assert ours == pytest.approx(loss, rel=1e-2)  # a compiler may round elsewhere
    assert_close(our_changes, changes, 0.1)


def test_batch_norm_in_half_precision_takes_its_statistics_in_32_bits():
    image = keras.Input((8, 8, 2))
    norm = layers.BatchNormalization(momentum=0.0)
    model = keras.Model(image, norm(layers.Activation("linear")(image)))
    x = (np.random.default_rng(0).integers(0, 8, (64, 8, 8, 2)) + 500).astype(np.float32)  # its square exceeds float16
    model(x, training=True)
    expected = values(norm.non_trainable_variables)
    np.testing.assert_allclose(expected, [x.mean((0, 1, 2)), x.var((0, 1, 2))], rtol=0.02)
    mixed_precision(model, "float16")
    model(x, training=True)
    np.testing.assert_allclose(values(norm.non_trainable_variables), expected, rtol=1e-6)


def test_float16_scales_the_loss_of_plain_and_recomputing_models():
    model, _ = make_image_model()
    mixed_precision(model, "float16")
    for trained in (model, rematerialize(model)):
        trained.compile(create_optimizer("sgd", 0.1), "categorical_crossentropy")
        assert isinstance(trained.optimizer, keras.optimizers.LossScaleOptimizer)
    full_precision(model)
    model.compile(create_optimizer("sgd", 0.1), "categorical_crossentropy")
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)


def train_small(optimizer, batch_size):
    """Weights after six epochs of 16 samples, at half the rate after three of them; no batch norm."""
    keras.utils.set_random_seed(3)
    image = keras.Input((6, 6, 1))
    x = layers.Conv2D(3, 3, activation="relu", kernel_regularizer=keras.regularizers.L2(0.01))(image)
    model = keras.Model(image, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    model.compile(optimizer, "categorical_crossentropy")
    x, y = make_data(model, 16)
    for rate in (0.01, 0.005):
        optimizer.learning_rate = rate
        model.fit(x, y, batch_size=batch_size, epochs=3, shuffle=False, verbose=0)
    return values(model.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "rmsprop", "adagrad", "adadelta", "adam", "adamax", "nadam"])
def test_small_batches_accumulate_to_the_step_of_a_large_one(name):
    expected = train_small(create_optimizer(name, 0.01), 8)
    plain = train_small(create_optimizer(name, 0.01, accumulate=2), 4)
    # In float16 models the optimizer is wrapped so.
    scaled = keras.optimizers.LossScaleOptimizer(create_optimizer(name, 0.01, accumulate=2), initial_scale=8.0)
    for ours in (plain, train_small(scaled, 4)):
        for one, two in zip(ours, expected, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)


def test_the_estimate_is_the_sum_of_what_backpropagation_keeps():
    image = keras.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="first")(image)
    x = layers.Conv2D(2, 3, padding="same", name="second")(layers.BatchNormalization()(x))
    model = keras.Model(image, layers.Dense(2, activation="softmax")(layers.GlobalAveragePooling2D()(x)))
    weights = 9 * 4 + 4 + 4 * 4 + 9 * 4 * 2 + 2 + 2 * 2 + 2
    # The image, the output of `first` (for its ReLU and the batch norm), that of the batch norm (for `second`), the
    # pooled vector and the probabilities; the peak is at the convolution `second`, where the vector is gone.
    one = training_memory(model, 1, optimizer_slots=2)
    assert (one.weights, one.gradients, one.optimizer) == (4 * weights, 4 * (weights - 8), 8 * (weights - 8))
    assert (one.activations, one.transient) == (4 * 64 * (1 + 4 + 4), 4 * 64 * (4 + 4))
    assert training_memory(model, 3, optimizer_slots=2).activations == 3 * one.activations
    model.get_layer("first").trainable = False
    freeze = training_memory(model, 1)
    assert (freeze.activations, freeze.gradients) == (one.activations, one.gradients - 4 * 40)
    mixed_precision(model, "float16")
    half = training_memory(model, 1)
    assert half.total < freeze.total and half.gradients == freeze.gradients


def test_recomputing_and_half_precision_take_less():
    model, _ = make_image_model(repetitions=(4,))
    totals = [training_memory(model, 8).activations, training_memory(rematerialize(model), 8).activations]
    mixed_precision(model)
    totals += [training_memory(model, 8).activations, training_memory(rematerialize(model), 8).activations]
    plain, recomputing, half, both = totals
    assert both < recomputing < plain and both < half < plain


def test_models_of_two_images_are_refused():
    first, second = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    with pytest.raises(InputError, match="Received: 2 inputs and 1 outputs"):
        rematerialize(keras.Model([first, second], layers.Add()([first, second])))


@pytest.mark.parametrize("name", ["patch_yaroslav", "image_d_yaroslav_heatmap_fc16_8_shortcut"])
def test_published_files_predict_nearly_the_same_in_half_precision(name, golden, tmp_path):
    """And exactly the same again in full precision; the heatmap's dense layer with ReLU at every position included."""
    folder = golden / "checkpoints"
    (tmp_path / "model.h5").write_bytes(gzip.decompress((folder / f"{name}.h5.gz").read_bytes()))
    with np.load(folder / f"{name}.npz") as arrays:
        x, expected = arrays["x"], arrays["predict"]
    model = load_model(tmp_path / "model.h5")
    mixed_precision(model)
    half = model.predict_on_batch(x)
    assert half.dtype == np.float32
    difference = np.abs(half - expected).max()
    assert 1e-6 < difference < 0.05
    full_precision(model)
    np.testing.assert_allclose(model.predict_on_batch(x), expected, atol=1e-4)
