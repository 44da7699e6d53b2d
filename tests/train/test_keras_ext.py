"""Networks, optimizers, stages and the keeping of the best model, against the published program's numbers."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import dm_keras_ext
from dm_keras_ext import (
    DMAucModelCheckpoint,
    Stage,
    Yaroslav,
    do_2stage_training,
    do_3stage_training,
    freeze_below,
    get_dl_model,
    set_regularization,
    train_stages,
)
from dm_resnet import add_top_layers
from mammo.base.files import InputError
from mammo.train import checkpoint
from mammo.train.callbacks import BestModel
from mammo.train.checkpoint import leaf_layers
from mammo.train.keras2 import DMMetrics, WeightedCrossentropy, create_optimizer
from tests.train.networks import EAGER, Batches, Script, assert_same_stages, check_two_stages

REFERENCE = Path(__file__).parents[1] / "reference"
STEP_CASES = json.loads((REFERENCE / "train_steps.json").read_text())


@pytest.fixture(scope="module")
def steps():
    with np.load(REFERENCE / "train_steps.npz") as data:
        return dict(data)


def small_net(l2=0.01):
    inputs = layers.Input((10, 10, 2))
    penalty = {"kernel_regularizer": keras.regularizers.L1L2(l2=l2)}
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv", **penalty)(inputs)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.MaxPooling2D(2)(layers.Activation("relu")(x))
    x = layers.Conv2D(5, 3, strides=2, padding="same", name="conv2")(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(3, activation="softmax", kernel_regularizer=keras.regularizers.L1L2(l2=2 * l2), name="out")
    return keras.Model(inputs, outputs(x))


def variable(model, name):
    layer, kind = name.split(":")[0].split("/")
    return next(v for v in model.get_layer(layer).variables if v.name == kind)


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda c: f"{c['key']}-{c['optimizer']}")
def test_three_steps_equal_the_published_ones(case, steps):
    options = case["options"]
    model = small_net(options.get("l2", 0.01))
    for name in case["weight_names"]:
        variable(model, name).assign(steps["init__" + name.split(":")[0].replace("/", "__")])
    frozen_penalty = 0.0
    for name in options.get("freeze", []):
        layer = model.get_layer(name)
        if name == "bn":  # as freeze_below does it: batch statistics go on
            layer.gamma.trainable = layer.beta.trainable = False
        else:
            layer.trainable = False
            frozen_penalty += float(layer.kernel_regularizer(layer.kernel))
    optimizer = create_optimizer(case["optimizer"], case["lr"])
    model.compile(optimizer, WeightedCrossentropy(), metrics=["accuracy"], jit_compile=False, **EAGER)
    class_weight = options.get("class_weight")
    for step in range(3):
        weight = steps["w"][step].copy() if options.get("use_w") else None
        if options.get("zero_w"):
            weight[1::3] = 0
        loss, _ = model.train_on_batch(
            steps["x"][step],
            steps["y"][step],
            sample_weight=weight,
            class_weight=class_weight and {int(k): v for k, v in class_weight.items()},
        )
        model.reset_metrics()
        # Keras 3 leaves the penalty of frozen layers, a constant, out of the loss.
        assert loss + frozen_penalty == pytest.approx(case["train_loss"][step], abs=1e-4)
        for name in case["weight_names"]:
            expected = steps[f"{case['key']}__step{step + 1}__" + name.split(":")[0].replace("/", "__")]
            np.testing.assert_allclose(keras.ops.convert_to_numpy(variable(model, name)), expected, atol=2e-5, rtol=0)


def test_batches_are_collected_in_order():
    from dm_image import DMImageDataGenerator

    images, labels = np.arange(7.0, dtype="float32")[:, None, None, None], np.arange(7) % 2
    flow = DMImageDataGenerator().flow(images, labels, batch_size=3, shuffle=False)
    for samples in (None, 5):
        x, y = dm_keras_ext.load_dat_ram(flow, samples)
        assert x.ravel().tolist() == list(range(samples or 7))
        assert y.tolist() == labels[:samples].tolist()


def test_unknown_optimizer_is_named():
    with pytest.raises(InputError, match="sdg"):
        create_optimizer("sdg", 0.1)


# --- AUC ---------------------------------------------------------------------------------------------------------


class FirstValues:
    """Stand-in model: the first k values of the flattened image."""

    def __init__(self, k):
        self.k = k

    def predict_on_batch(self, x):
        return x.reshape(len(x), -1)[:, : self.k]


@pytest.mark.parametrize("case", json.loads((REFERENCE / "auc.json").read_text()), ids=lambda c: c["kind"])
def test_auc_equals_the_published_one(case):
    with np.load(REFERENCE / "auc.npz") as data:
        arrays = {name.split("_", 1)[1]: data[name] for name in data.files if name.startswith(case["key"])}
    x = arrays.get("x", arrays["y_pred"])
    test_set = (x, arrays["y_true"], *([arrays["w"]] if "w" in arrays else []))
    auc, y_true, y_pred = DMAucModelCheckpoint.calc_test_auc(
        test_set, FirstValues(case["k"]), batch_size=7, return_y_res=True, test_augment=case["kind"] == "aug"
    )
    np.testing.assert_array_equal(y_true, arrays["y_true"])
    np.testing.assert_allclose(y_pred, arrays["y_pred"], atol=1e-6)
    if case["kind"] in ("one_class", "missing_class"):
        absent = (arrays["y_true"].sum(0) == 0) | (arrays["y_true"].sum(0) == len(y_true))
        np.testing.assert_array_equal(np.isnan(auc), absent)
    else:
        np.testing.assert_allclose(np.atleast_1d(auc), case["auc"], atol=1e-9)
        assert np.isscalar(auc) == (case["k"] == 1)


def test_auc_of_some_samples_and_of_integer_labels():
    y = np.array([0, 1, 1, 0, 1])
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.0, 1.0]])
    auc = DMAucModelCheckpoint.calc_test_auc((scores, y), FirstValues(2), test_samples=4)
    np.testing.assert_allclose(auc, [0.75, 0.75])  # of the four (neg, pos) pairs only (0.5, 0.4) is misordered


def test_sensitivity_and_specificity():
    truth = np.eye(3)[[0, 1, 1, 1, 2]]
    guess = np.eye(3)[[1, 1, 0, 1, 2]]
    assert float(DMMetrics.sensitivity(truth, guess)) == pytest.approx(2 / 3, abs=1e-6)
    assert float(DMMetrics.specificity(truth, guess)) == pytest.approx(1 / 2, abs=1e-6)
    assert float(DMMetrics.sensitivity(np.array([1.0, 0.0]), np.array([0.7, 0.9]))) == pytest.approx(1, abs=1e-6)


# --- Networks ----------------------------------------------------------------------------------------------------


def test_yaroslav_is_the_published_network(golden):
    listing = json.loads((golden / "checkpoints" / "patch_yaroslav.json").read_text())["layers"]
    model = Yaroslav()
    assert len(model.layers) == len(listing)
    for layer, row in zip(model.layers, listing, strict=True):
        assert type(layer).__name__ == row["cls"]
        assert [list(w.shape) for w in layer.weights] == [w["shape"] for w in row["weights"]]
        if row["name"].startswith(("block", "predictions")):
            assert layer.name == row["name"]
        if "epsilon" in row:
            assert (layer.epsilon, layer.momentum) == pytest.approx((row["epsilon"], row["momentum"]))


@pytest.mark.parametrize(
    "net, top, listing",
    [("vgg16", "block5_conv1", "patch_vgg16"), ("resnet50", "conv5_block3_1_conv", "patch_resnet50")],
)
def test_patch_nets_have_the_published_parameters_and_top_layers(net, top, listing, golden):
    model, preprocess, top_layer_nb = get_dl_model(
        net, nb_class=5, use_pretrained=False, weight_decay=0.01, hidden_dropout=0.5
    )
    published = json.loads((golden / "checkpoints" / f"{listing}.json").read_text())
    assert model.count_params() == published["nb_params"]
    assert model.layers[top_layer_nb].name == top
    assert model.layers[-1].kernel_regularizer.l2 == pytest.approx(0.01)
    assert model.layers[-2].rate == 0.5
    assert model.input_shape == (None, None, None, 3)
    assert callable(preprocess)


def test_missing_imagenet_weights_name_both_ways(monkeypatch):
    build = keras.applications.VGG16

    def offline(weights, **kwargs):
        if weights == "imagenet":
            raise Exception("URL fetch failure on ...: None -- no route")
        return build(weights=weights, **kwargs)

    monkeypatch.setattr(keras.applications, "VGG16", offline)
    with pytest.raises(InputError, match=r"(?s)--pretrained-weights FILE.*--no-use-pretrained"):
        get_dl_model("vgg16", use_pretrained=True)


def test_local_imagenet_weights_are_used(tmp_path):
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(None, None, 3))
    base.save_weights(tmp_path / "vgg.weights.h5")
    model, _, _ = get_dl_model("vgg16", nb_class=2, pretrained_weights=tmp_path / "vgg.weights.h5")
    np.testing.assert_array_equal(
        model.get_layer("block5_conv3").get_weights()[0], base.get_layer("block5_conv3").get_weights()[0]
    )


def test_resuming_checks_the_class_count(tmp_path):
    path = tmp_path / "net.keras"
    checkpoint.save_model(Yaroslav(classes=5, nb_init_filter=1), path)
    with pytest.raises(InputError, match=r"net\.keras.*3 classes.*5"):
        get_dl_model("yaroslav", nb_class=3, resume_from=path)


def test_options_of_other_networks_are_not_swallowed():
    with pytest.raises(TypeError, match="hidden_droput"):
        get_dl_model("vgg16", use_pretrained=False, hidden_droput=0.5)


def test_one_class_is_no_classification():
    with pytest.raises(InputError, match=r"--class-list: Expected at least two classes\. Received 1"):
        get_dl_model("yaroslav", nb_class=1)


def test_unknown_net_is_named():
    with pytest.raises(InputError, match=r"resnet50.*dm_resnet_14.*resnet51"):
        get_dl_model("resnet51")


# --- Freezing and regularising -----------------------------------------------------------------------------------


def whole_image_model():
    patch_net = Yaroslav(classes=5, nb_init_filter=2)
    return add_top_layers(patch_net, (128, 128), "yaroslav", "vgg", [4], [1], weight_decay=0.01)


@pytest.mark.parametrize("frozen_bn", ["batch", "inference"])
def test_frozen_layers_keep_their_weights_and_batch_norm_its_habit(frozen_bn):
    model, top = whole_image_model()
    freeze_below(model, top, frozen_bn)
    model.compile("sgd", WeightedCrossentropy(), jit_compile=False)
    nested = model.layers[1]
    before = {v.path: np.array(v.value) for v in nested.variables}
    rng = np.random.default_rng(0)
    model.train_on_batch(rng.normal(5, 3, (2, 128, 128, 1)).astype("float32"), np.eye(2, dtype="float32"))
    changed = {v.path.rsplit("/", 1)[-1] for v in nested.variables if np.any(before[v.path] != np.array(v.value))}
    assert changed == ({"moving_mean", "moving_variance"} if frozen_bn == "batch" else set())
    assert {v.path for v in model.trainable_variables} == {
        v.path for layer in model.layers[top:] for v in layer.trainable_variables
    }


def test_last_stage_trains_layers_that_a_file_had_frozen():
    model, _ = whole_image_model()
    for layer in list(leaf_layers(model.layers[1]))[:10]:
        layer.trainable = False
    model.layers[1].trainable = False
    freeze_below(model, 0)
    statistics = ("moving_mean", "moving_variance")
    assert len(model.trainable_variables) == 50 - 2 + 4 + 2  # patch net without its dense, convolution and norm, dense
    assert all(v.trainable or v.name in statistics for v in model.variables if "seed" not in v.path)
    assert not any(v.trainable for v in model.variables if v.name in statistics)


def test_weight_decay_takes_effect_when_it_is_set():
    model = small_net(0.01)
    x, y = np.zeros((2, 10, 10, 2), "float32"), np.eye(3, dtype="float32")[:2]

    def penalty(weight_decay):
        set_regularization(model, weight_decay, None)
        model.compile("sgd", WeightedCrossentropy(), jit_compile=False)
        crossentropy = -np.log(np.sum(model.predict_on_batch(x) * y, axis=1)).mean()
        return model.test_on_batch(x, y) - crossentropy

    squares = sum(float(np.sum(np.square(model.get_layer(n).get_weights()[0]))) for n in ("conv", "out"))
    assert penalty(0.1) == pytest.approx(0.1 * squares, rel=1e-4)
    assert penalty(0.5) == pytest.approx(0.5 * squares, rel=1e-4)


@pytest.mark.parametrize("built_with", [0.0, 0.5])
def test_dropout_takes_effect_when_it_is_set(built_with):
    inputs = layers.Input((1000,))
    model = keras.Model(inputs, layers.Dropout(built_with)(inputs))
    set_regularization(model, None, 0.25)
    out = np.asarray(model(np.ones((10, 1000), "float32"), training=True))
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.02)


# --- Stages ------------------------------------------------------------------------------------------------------


SECOND = {"weight_decay2": 0.01, "hidden_dropout2": 0.0}
EARLY_STOP = {"optim": "sgd", "init_lr": 0.01, "nb_epoch": 5, "top_layer_epochs": 9, "all_layer_epochs": 12}
WEIGHTS = {"auto_batch_balance": False, "nb_class": 3, "pos_cls_weight": 2.0, "neg_cls_weight": 0.5}
RATES = {"optim": "nadam", "init_lr": 0.01, "top_layer_multiplier": 0.01, "all_layer_multiplier": 0.0001}
THREE_STAGES = {f"{net}_dropout{rate}": {} for net in ("resnet50", "vgg16", "vgg19") for rate in (0.0, 0.5)} | {
    "vgg16_early_stop": EARLY_STOP | WEIGHTS | SECOND,
    "vgg16_not_pretrained": {"init_lr": 0.01, "use_pretrained": False},
    "vgg16_stage_totals_not_cumulative": RATES | SECOND | {"top_layer_epochs": 2, "all_layer_epochs": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", THREE_STAGES)
def test_three_stages_are_the_published_ones(name, golden, monkeypatch):
    semantics = json.loads((golden / "training" / "semantics.json").read_text())
    recorded = semantics["do_3stage_training_scripted"][name]
    recorded = recorded["steps"] if isinstance(recorded, dict) else recorded
    net, dropout = name.split("_")[0], 0.0 if name.endswith("dropout0.0") else 0.5
    model, _, top_layer_nb = get_dl_model(
        net, nb_class=3, use_pretrained=False, weight_decay=0.01, hidden_dropout=dropout
    )
    script = Script(monkeypatch, [e["epochs_run_in_script"] for e in recorded if e.get("epochs_run_in_script")])
    options = {"optim": "adam", "init_lr": 0.001, "top_layer_multiplier": 0.1, "all_layer_multiplier": 0.01}
    options |= {"nb_epoch": 3, "top_layer_epochs": 9, "all_layer_epochs": 19}
    options |= {"weight_decay2": 0.02, "hidden_dropout2": 0.25, **THREE_STAGES[name]}
    _, losses, _ = do_3stage_training(
        model, model, None, None, None, "NOSAVE", None, top_layer_nb=top_layer_nb, net=net, **options
    )
    assert_same_stages(script.events, recorded)
    assert len(losses) == next(e["len_loss"] for e in recorded if e["event"] == "return")


@pytest.mark.slow
def test_two_stages_are_the_published_ones(golden, monkeypatch):
    semantics = json.loads((golden / "training" / "semantics.json").read_text())
    recorded = semantics["do_2stage_training_scripted"]["resnet50"]["steps"]
    patch_model, _, _ = get_dl_model("resnet50", nb_class=5, use_pretrained=False)
    model, top_layer_nb = add_top_layers(
        patch_model, (224, 224), "resnet50", depths=[8, 8], repetitions=[1, 1], dropout=0.3, weight_decay=0.005
    )
    losses = check_two_stages(model, top_layer_nb, recorded, monkeypatch)
    assert len(losses) == 6


def test_finetuning_needs_no_top_layer_but_stage_one_does(monkeypatch):
    model, _ = whole_image_model()
    script = Script(monkeypatch, [4])
    do_2stage_training(model, model, None, None, None, "NOSAVE", None, nb_epoch=0, all_layer_epochs=4)
    assert [e["epochs"] for e in script.events if "epochs" in e] == [4]
    with pytest.raises(InputError, match="--top-layer-nb"):
        do_2stage_training(model, model, None, None, None, "NOSAVE", None, nb_epoch=3, all_layer_epochs=4)


def test_yaroslav_trains_in_one_stage_and_says_so(monkeypatch, capsys):
    model = Yaroslav(nb_init_filter=1)
    script = Script(monkeypatch, [3])
    do_3stage_training(
        model, model, None, None, None, "NOSAVE", None, net="yaroslav", nb_epoch=3, all_layer_epochs=9, init_lr=0.1
    )
    assert script.events[0]["lr"] == pytest.approx(0.1)
    assert script.events[0]["n_trainable_tensors"] == len(model.trainable_weights) == 50
    assert "no ImageNet weights" in capsys.readouterr().out


# --- Keeping the best model --------------------------------------------------------------------------------------


def offer(keeper, model, scores, monitor="val_accuracy"):
    """Play epochs whose weights are all equal to their number."""
    keeper.set_model(model)
    for epoch, score in enumerate(scores):
        model.set_weights([np.full_like(w, epoch) for w in model.get_weights()])
        keeper.on_epoch_end(epoch, {monitor: score})


@pytest.mark.parametrize("ending", ["NOSAVE", "best.h5", "best.keras"])
def test_best_weights_are_restored(ending, tmp_path):
    model = small_net()
    keeper = BestModel(ending if ending == "NOSAVE" else tmp_path / ending, "val_accuracy")
    offer(keeper, model, [0.5, 0.9, 0.9, 0.7])
    assert keeper.best_epoch == 1  # the first of equals
    keeper.restore(model)
    assert all(np.all(w == 1) for w in model.get_weights())
    assert [p.name for p in tmp_path.iterdir()] == ([] if ending == "NOSAVE" else [ending])


def test_another_network_in_place_of_the_best_model_is_refused(tmp_path):
    model = small_net()
    keeper = BestModel(tmp_path / "best.h5")
    offer(keeper, model, [0.5])
    inputs = keras.Input((2,))
    checkpoint.save_model(keras.Model(inputs, layers.Dense(7)(inputs)), tmp_path / "best.h5")
    with pytest.raises(InputError, match=r"best\.h5: "):
        keeper.restore(model)


def test_undefined_auc_keeps_the_lowest_loss_and_says_so(capsys):
    model = small_net()
    x = np.zeros((4, 10, 10, 2), "float32")
    keeper = DMAucModelCheckpoint("NOSAVE", (x, np.eye(3)[[1, 1, 1, 1]]))
    offer(keeper, model, [3.0, 2.0, 2.5], "val_loss")
    assert keeper.best_epoch == 1
    captured = capsys.readouterr()
    assert captured.err.count("AUC is undefined") == 1
    assert "nan" in captured.out


def test_a_missing_metric_is_named():
    with pytest.raises(InputError, match=r"val_accuracy.*val_acc"):
        offer(BestModel("NOSAVE", "val_accuracy"), small_net(), [1.0], "val_acc")


@pytest.mark.slow
def test_stages_learn_and_stop_early():
    """A separable task: the staged trainer reaches it, and a stage cut short leaves its epochs to the next."""
    rng = np.random.default_rng(1)
    y = np.eye(3, dtype="float32")[rng.integers(0, 3, 48)]
    x = rng.normal(size=(48, 10, 10, 2)).astype("float32") + 3 * y[:, None, None, :2]
    keras.utils.set_random_seed(1)

    # A rate that cannot move the loss: early stopping ends this stage after 1 + patience epochs.
    stages = [Stage(10, 1e-12, 0), Stage(14, 0.2, 0)]
    inputs = layers.Input((10, 10, 2))
    outputs = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(inputs))
    history = train_stages(
        keras.Model(inputs, outputs), stages, Batches((x, y), 12), (x, y), optim="adam", es_patience=2
    )
    assert len(history) == 14
    assert history[2]["val_accuracy"] < 0.9 <= history[-1]["val_accuracy"]


def test_a_stage_accumulates_batches_and_compiles():
    """Four batches two by two give the steps of two batches twice as large; more than an epoch has are refused."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(48, 10, 10, 2)).astype("float32"), np.eye(3, dtype="float32")[rng.integers(0, 3, 48)]

    def trained(size, accumulate, **options):
        keras.utils.set_random_seed(2)
        inputs = layers.Input((10, 10, 2))
        features = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(inputs))
        model = keras.Model(inputs, layers.Dense(3, activation="softmax")(features))
        train_stages(
            model, [Stage(2, 0.1, 0)], Batches((x, y), size), (x, y), optim="sgd", accumulate=accumulate, **options
        )
        return model.get_weights()

    expected = trained(24, 1)
    for weights in (trained(12, 2), *([] if keras.backend.backend() == "torch" else [trained(24, 1, jit=True)])):
        for one, two in zip(weights, expected, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)
    with pytest.raises(InputError, match=r"--accumulate: Expected at most 4, .* Received 5"):
        trained(12, 5)


def test_class_weights_follow_the_class_count():
    assert dm_keras_ext.class_weights(2, 2.0, 0.5) == {0: 0.5, 1: 2.0}
    assert dm_keras_ext.class_weights(3, 2.0, 0.5) == {0: 1.0, 1: 2.0, 2: 0.5}
    assert dm_keras_ext.class_weights(5, 1.0, 1.0) is None
    with pytest.raises(InputError, match="2 or 3 classes"):
        dm_keras_ext.class_weights(5, 2.0, 1.0)
