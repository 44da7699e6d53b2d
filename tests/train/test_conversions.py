"""All patch nets, old and new, through conversion and the stages of both trainings."""

import json

import keras
import numpy as np
import pytest
from keras import layers

import dm_resnet
from ddsm_train import patch_clf_train
from dm_keras_ext import Yaroslav, freeze_below, get_dl_model
from dm_resnet import PATCH_NETS, add_top_layers
from mammo.base.files import InputError
from mammo.train import checkpoint
from tests.helpers import write_images
from tests.train.networks import check_two_stages, load_patch_net, make_patch_net, outputs, quick_training

slow = pytest.mark.slow
SIZES = {"xception": 71, "inception": 75}  # the smallest that these take
RESIDUAL = {"depths": [3, 2], "repetitions": [1, 2]}
TOPS = {
    "residual": RESIDUAL,
    "vgg": {"block_type": "vgg", "depths": [3], "repetitions": [2]},
    "heatmap": {"add_heatmap": True, "avg_pool_size": (2, 2), "hm_pool_size": (2, 2), "add_conv": False}
    | {"add_shortcut": True, "fc_init_units": 4},
}


def make_net(net, nb_class=3, **options):
    """A patch net of today with random weights; YaroslavNet narrow."""
    keras.utils.set_random_seed(0)
    narrow = {"nb_init_filter": 2} if net == "yaroslav" else {}
    return get_dl_model(net, nb_class=nb_class, use_pretrained=False, **narrow, **options)


def noise(rows, columns, channels, count=2):
    return np.random.default_rng(0).normal(0, 50, (count, rows, columns, channels)).astype(np.float32)


def listing(model, first):
    """What defines the layers from index `first` on: class and settings, without names and numbers of their own."""
    skipped = ("name", "build_config", "batch_shape")
    return [
        (type(layer).__name__, {key: value for key, value in layer.get_config().items() if key not in skipped})
        for layer in model.layers[first:]
    ]


# --- The heatmap is the patch classifier -----------------------------------------------------------------------------


def assert_one_cell_is_the_patch_prediction(patch_net, net, size, pool):
    patches = noise(size, size, patch_net.input_shape[-1])
    expected = outputs(patch_net, patches)
    heatmap = add_top_layers(patch_net, (size, size), net, avg_pool_size=pool, return_heatmap=True)
    cells = outputs(heatmap, patches)
    assert cells.shape == (2, 1, 1, expected.shape[-1])
    np.testing.assert_allclose(cells[:, 0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("net", ["yaroslav", *(pytest.param(n, marks=slow) for n in PATCH_NETS if n != "yaroslav")])
def test_heatmap_cell_of_a_patch_is_the_prediction_of_todays_net(net):
    patch_net, _, _ = make_net(net, hidden_dropout=0.3)
    size = SIZES.get(net, 64)
    features = add_top_layers(patch_net, (size, size), net, **TOPS["vgg"] | {"depths": [], "repetitions": []})[0]
    assert_one_cell_is_the_patch_prediction(patch_net, net, size, features.layers[2].input.shape[1:3])


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        pytest.param("patch_vgg16", 7, marks=slow),
        ("patch_yaroslav", 3),
        ("patch_yaroslav_partfrozen", 3),
        pytest.param("patch_resnet50", 7, marks=slow),
        pytest.param("patch_resnet50_nodrop", 7, marks=slow),
    ],
)
def test_heatmap_cell_of_a_patch_is_the_prediction_of_the_published_file(golden, tmp_path, name, pool):
    patch_net = load_patch_net(golden / "checkpoints", name, tmp_path)
    assert_one_cell_is_the_patch_prediction(patch_net, name.split("_")[1], 224, (pool, pool))


# --- Old and new patch nets convert alike ----------------------------------------------------------------------------


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("net", ["yaroslav", pytest.param("vgg16", marks=slow), pytest.param("resnet50", marks=slow)])
def test_a_net_of_2017_and_one_of_today_convert_alike(golden, tmp_path, net, top):
    """The same layers above the net, and the same outputs of them for the same features."""
    files = {"old": load_patch_net(golden / "checkpoints", f"patch_{net}", tmp_path)}
    keras.utils.set_random_seed(1)
    files["new"] = get_dl_model(net, nb_class=5, use_pretrained=False, hidden_dropout=0.5)[0]
    files["new"].layers[-1].set_weights(files["old"].layers[-1].get_weights())
    size = (256, 256) if net == "yaroslav" else (160, 128)
    (old, top_of_old), (new, top_of_new) = (
        add_top_layers(files[age], size, net, dropout=0.2, **TOPS[top]) for age in ("old", "new")
    )
    assert top_of_old == top_of_new
    assert listing(old, 2) == listing(new, 2)
    assert [type(layer) for layer in old.layers[:2]] == [type(layer) for layer in new.layers[:2]]
    assert old.layers[2].input.shape == new.layers[2].input.shape
    if top == "heatmap":  # before training it holds the patch classifier's own weights
        for one, two in zip(old.layers[4].get_weights(), new.layers[4].get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)
    for one, two in zip(old.layers[2:], new.layers[2:], strict=True):
        two.set_weights(one.get_weights())
    features = np.abs(noise(*old.layers[2].input.shape[1:]))
    one, two = (outputs(keras.Model(model.layers[2].input, model.output), features) for model in (old, new))
    np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.parametrize("ending", ["h5", "keras"])
def test_a_saved_patch_net_converts_like_the_one_in_memory(tmp_path, ending):
    patch_net, _, _ = make_net("yaroslav")
    checkpoint.save_model(patch_net, tmp_path / f"patch.{ending}")
    y_preds = []
    for net in (patch_net, checkpoint.load_model(tmp_path / f"patch.{ending}")):
        keras.utils.set_random_seed(4)
        model, _ = add_top_layers(net, (256, 192), "yaroslav", **TOPS["heatmap"])
        y_preds.append(outputs(model, noise(256, 192, 1)))
    np.testing.assert_allclose(*y_preds, atol=1e-6)


# --- The option matrix -----------------------------------------------------------------------------------------------

UNITS = {
    dm_resnet.bottleneck_org: ([1, 3, 1], True),
    dm_resnet.bottleneck: ([1, 3, 1], False),
    dm_resnet.basic_block_org: ([3, 3], True),
    dm_resnet.basic_block: ([3, 3], False),
}


def expected_variables(options, width, nb_class):
    """Count the numbers in the top layers by arithmetic: convolutions with bias, batch norms of four vectors."""
    total = 0

    def conv(size, filters, norm_width):
        return size * size * width * filters + filters + 4 * norm_width

    for depth, repetitions in zip(options["depths"], options["repetitions"], strict=True):
        for i in range(repetitions):
            if options["block_type"] == "vgg":
                total += conv(3, depth, depth)
                width = depth
                continue
            sizes, norm_after = UNITS[options["block_fn"]]
            before = width
            out = depth * (options["bottleneck_enlarge_factor"] if len(sizes) == 3 else 1)
            for j, size in enumerate(sizes):
                filters = out if j == len(sizes) - 1 else depth
                total += conv(size, filters, filters if norm_after else width)
                width = filters
            if i == 0 or before != out:
                total += before * out + out + 4 * out * options["shortcut_with_bn"]
    return total + width * nb_class + nb_class


def draws(count):
    """Combinations drawn from the whole matrix, always the same ones."""
    rng = np.random.default_rng(2017)
    for _ in range(count):
        depths, repetitions = [([4], [1]), ([3, 5], [1, 2]), ([4], [3])][rng.integers(3)]
        yield {
            "depths": depths,
            "repetitions": repetitions,
            "block_type": str(rng.choice(["resnet", "resnet", "vgg"])),
            "block_fn": list(UNITS)[rng.integers(4)],
            "bottleneck_enlarge_factor": int(rng.integers(1, 5)),
            "shortcut_with_bn": bool(rng.integers(2)),
            "add_heatmap": bool(rng.integers(2)),
            "nb_class": int(rng.integers(2, 5)),
            "dropout": float(rng.choice([0.0, 0.4])),
            "weight_decay": float(rng.choice([1e-4, 0.02])),
        }


@pytest.mark.parametrize("options", list(draws(12)), ids=range(12))
def test_every_combination_of_options(options, tmp_path):
    patch_net = make_patch_net(channels=3)
    heatmap = {"avg_pool_size": (3, 2), "hm_strides": (1, 2), "hm_pool_size": (2, 1)}
    model, top = add_top_layers(patch_net, (40, 32), "vgg16", **heatmap, **options)
    new = model.layers[top:]
    width = 3 if options["add_heatmap"] else 6  # patch classes, or filters of the patch net
    assert sum(layer.count_params() for layer in new) == expected_variables(options, width, options["nb_class"])
    kernels = [layer for layer in new if isinstance(layer, layers.Conv2D | layers.Dense)]
    assert {round(float(layer.kernel_regularizer.l2), 6) for layer in kernels} == {options["weight_decay"]}
    assert {layer.rate for layer in new if isinstance(layer, layers.Dropout)} == {options["dropout"]}
    x = noise(40, 32, 3)
    y_pred = outputs(model, x)
    assert y_pred.shape == (2, options["nb_class"])
    assert y_pred.sum(axis=1) == pytest.approx(1, abs=1e-5)
    for ending in ("h5", "keras"):
        checkpoint.save_model(model, tmp_path / f"image.{ending}")
        opened = checkpoint.load_model(tmp_path / f"image.{ending}")
        np.testing.assert_allclose(outputs(opened, x), y_pred, atol=1e-5)


@pytest.mark.parametrize("depths, repetitions", [([8, 8], [1]), ([8], [1, 1]), ([], [1])])
def test_unequal_lists_of_depths_and_repetitions_are_named(depths, repetitions):
    with pytest.raises(InputError, match="one number of repetitions for each depth"):
        add_top_layers(make_patch_net(), (24, 20), "vgg16", depths=depths, repetitions=repetitions)


# --- Which layers train when -----------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(("net", "index_of_2017"), [("xception", 126), ("inception", 194)])
def test_stage_two_trains_the_variables_of_the_published_index(net, index_of_2017):
    """Between the published index and the layer that is named lie only layers without variables."""
    model, _, top_layer_nb = make_net(net)
    assert top_layer_nb >= index_of_2017
    assert not any(layer.weights for layer in model.layers[index_of_2017:top_layer_nb])
    freeze_below(model, top_layer_nb)
    trained = {v.path for layer in model.layers[index_of_2017:] for v in layer.weights if "moving_" not in v.path}
    assert {v.path for v in model.trainable_variables} == trained


HEATMAP = {"add_heatmap": True, "avg_pool_size": (2, 2), "hm_pool_size": (2, 2)}
TWO_STAGES = {  # options, and tensors that train beyond the published ones in stages 1 and 2, as decided
    "yaroslav_fc": (HEATMAP | {"add_conv": False, "add_shortcut": True}, 0, 0),
    "yaroslav_hm_resnet": (HEATMAP | {"depths": [2, 2], "repetitions": [1, 1]}, 4, 0),
    "yaroslav_hm_vgg": (HEATMAP | {"block_type": "vgg", "depths": [2], "repetitions": [1]}, 4, 0),
    "yaroslav_partfrozen": ({"depths": [2, 2], "repetitions": [1, 1]}, 0, 24),
}


@pytest.mark.parametrize("name", TWO_STAGES)
def test_stages_of_whole_image_training_are_the_published_ones(name, golden, monkeypatch):
    semantics = json.loads((golden / "training" / "semantics.json").read_text())
    recorded = semantics["do_2stage_training_scripted"][name]["steps"]
    options, *more = TWO_STAGES[name]
    for event, extra in zip((e for e in recorded if e["event"] == "compile"), more, strict=True):
        event["n_trainable_tensors"] += extra
    patch_net = Yaroslav(classes=5, nb_init_filter=1)
    if name.endswith("partfrozen"):
        for layer in patch_net.layers[: len(patch_net.layers) // 2]:
            layer.trainable = False
    model, top_layer_nb = add_top_layers(patch_net, (384, 384), "yaroslav", dropout=0.3, weight_decay=0.005, **options)
    check_two_stages(model, top_layer_nb, recorded, monkeypatch)


# --- All patch nets train --------------------------------------------------------------------------------------------


def train(folder, classes, size, **options):
    """One image a class and set; returns the history's rows and the model kept last."""
    import pandas as pd

    for part in ("train", "val", "test"):
        write_images(folder / part, classes, 1, len(part))
    folders = {f"{part}_dir": str(folder / part) for part in ("train", "val", "test")}
    with quick_training():
        patch_clf_train.run(
            **folders,
            **{"img_size": [size, size], "rescale_factor": 0.003891, "featurewise_mean": 44.0, "equalize_hist": False},
            **{"class_list": classes, "batch_size": len(classes), "train_bs_multiplier": 1.0, "optim": "adam"},
            **{"best_model": "NOSAVE", "out_dir": str(folder / "out"), "final_model": str(folder / "final.h5")},
            **options,
        )
    return pd.read_csv(folder / "out" / "history.csv"), checkpoint.load_model(folder / "final.h5")


@slow
@pytest.mark.parametrize("net", ["xception", "inception"])
def test_three_stages_from_a_weights_file(net, tmp_path):
    """Each stage trains what it should: the rates are the stages', and at a rate near zero the weights stay."""
    size = SIZES[net]
    patch_net, _, _ = make_net(net, nb_class=2)
    base = dm_resnet._cut_patch_net(patch_net)[0]
    checkpoint.save_model(base, tmp_path / "imagenet.h5")
    options = {"net": net, "pretrained_weights": str(tmp_path / "imagenet.h5"), "hidden_dropout2": 0.2}
    options |= {"init_lr": 1e-3, "top_layer_multiplier": 0.1, "all_layer_multiplier": 1e-9}
    epochs = {"nb_epoch": 1, "top_layer_epochs": 2, "all_layer_epochs": 3}
    history, final = train(tmp_path, ["neg", "pos"], size, **options, **epochs)
    assert list(history.learning_rate) == pytest.approx([1e-3, 1e-4, 1e-12], rel=1e-5)
    _, _, top_layer_nb = make_net(net, nb_class=2, hidden_dropout=0.2)
    for i, layer in enumerate(base.layers):
        kept = final.layers[i]
        assert type(kept) is type(layer)
        for old, new in zip(layer.weights, kept.weights, strict=True):
            if "moving" not in old.path:
                # batch norm's gamma and beta near the end may hardly move
                same = np.allclose(np.asarray(old), np.asarray(new), atol=1e-7)
                assert same if i < top_layer_nb else not (same and old.name == "kernel"), (layer.name, old.path)


@pytest.mark.parametrize(
    ("count", "weights"),
    [(2, {"pos_cls_weight": 2.0}), (3, {"neg_cls_weight": 0.0}), (4, {}), (5, {"auto_batch_balance": True})],
)
def test_class_lists_of_two_to_five(count, weights, tmp_path):
    classes = ["background", "malignant", "benign", "other", "more"][:count]
    options = {"net": "yaroslav", "nb_init_filter": 1, "use_pretrained": False, "nb_epoch": 1}
    history, final = train(tmp_path, classes, 64, **options, **weights)
    assert np.isfinite(history.loss).all()
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["single"]
    assert np.shape(metrics["confusion_matrix"]) == (count, count)
    assert set(metrics["auc"]) == set(metrics["precision"]) == set(metrics["recall"]) == set(classes)
    assert final.output_shape == (None, count)


@slow
@pytest.mark.parametrize("name", ["patch_yaroslav", "patch_vgg16"])
def test_training_resumes_from_published_files(name, golden, tmp_path):
    net = name.split("_")[1]
    old = load_patch_net(golden / "checkpoints", name, tmp_path)
    classes = ["background", "calc_mal", "calc_ben", "mass_mal", "mass_ben"]
    stages = {"nb_epoch": 1, "top_layer_epochs": 2, "all_layer_epochs": 3}
    history, final = train(tmp_path, classes, 64, net=net, resume_from=str(tmp_path / f"{name}.h5"), **stages)
    assert len(history) == (1 if net == "yaroslav" else 3)
    assert [layer.name for layer in final.layers] == [layer.name for layer in old.layers]
    assert any((one != two).any() for one, two in zip(old.get_weights(), final.get_weights(), strict=True))
