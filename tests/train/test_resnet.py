"""Residual networks and whole-image tops: against the published program's listings and outputs, and closed forms."""

import gzip
import io
import json

import keras
import numpy as np
import pytest
from keras import layers

import dm_resnet
from dm_resnet import MultiViewResNetBuilder, ResNetBuilder, add_top_layers
from mammo.base.files import InputError
from tests.conftest import SHARED
from tests.train.networks import load_patch_net, make_patch_net, outputs

MEAN = 52.18
RESCALE = 0.003891
HEATMAP_LAYERS = 6  # input, patch net, average pooling, dropout, dense, max pooling

GOLDEN_IMAGE_NETS = [
    "image_c_vgg16_512_512_1024_x2_hybrid",
    "image_d_yaroslav_heatmap_fc16_8_shortcut",
    "image_e_yaroslav_partfrozen_vgg64x1",
    pytest.param("image_b_vgg16_512x1_1152x896", marks=pytest.mark.slow),
    pytest.param("image_a_resnet50_512_512_1024_x2", marks=pytest.mark.slow),
    pytest.param("image_g_resnet50_nodrop_heatmap_conv", marks=pytest.mark.slow),
]


def copy_golden_weights(model, folder, name, listing):
    """Fill `model`, layer by layer, with the weights of a golden whole-image file, found by name."""
    import h5py

    content = io.BytesIO(gzip.decompress((folder / f"{name}.h5.gz").read_bytes()))
    with h5py.File(content, "r") as file:
        for layer, entry in zip(model.layers, listing, strict=True):
            group = file["model_weights"][entry["name"]]
            inner = zip(layer.layers, entry["layers"], strict=True) if "layers" in entry else [(layer, entry)]
            for target, source in inner:
                names = [weight["name"] for weight in source["weights"]]
                target.set_weights([group[weight][()] for weight in names])


def describe(layer, keys):
    """The entry of a golden listing for a layer of ours, for the given keys."""
    read = {
        "cls": lambda: "Model" if isinstance(layer, keras.Model) else type(layer).__name__,
        "kernel_l1": lambda: float(getattr(layer.kernel_regularizer, "l1", 0.0)),
        "kernel_l2": lambda: pytest.approx(float(layer.kernel_regularizer.l2), rel=1e-6),
        "dropout_rate": lambda: layer.rate,
        "activation": lambda: layer.activation.__name__,
        "kernel_size": lambda: list(layer.kernel_size),
        "strides": lambda: list(layer.strides),
        "pool_size": lambda: list(layer.pool_size),
        "padding": lambda: layer.padding,
        "epsilon": lambda: layer.epsilon,
        "momentum": lambda: layer.momentum,
    }
    return {key: read[key]() for key in keys if key in read}


def sources(layer):
    return [tensor._keras_history.operation.name for tensor in layer._inbound_nodes[-1].input_tensors]


@pytest.mark.parametrize("name", GOLDEN_IMAGE_NETS)
def test_whole_image_net_equals_the_published_one(golden, tmp_path, name):
    folder = golden / "checkpoints"
    info = json.loads((folder / f"{name}.json").read_text())
    patch_net = load_patch_net(folder, info["patch_checkpoint"], tmp_path)
    model, top_layer_nb = add_top_layers(
        patch_net, info["image_size"], info["patch_net"], **info["add_top_layers_args"]
    )

    golden_name = {layer.name: entry["name"] for layer, entry in zip(model.layers, info["layers"], strict=True)}
    for layer, entry in zip(model.layers, info["layers"], strict=True):
        assert describe(layer, entry) == {key: entry[key] for key in describe(layer, entry)}
        if entry["cls"] == "Model":
            continue
        assert list(layer.output.shape) == entry["output_shape"]
        if entry["cls"] != "InputLayer":
            assert [golden_name[source] for source in sources(layer)] == entry["inbound"]
    assert model.count_params() == info["nb_params"]
    assert top_layer_nb == (HEATMAP_LAYERS if info["add_top_layers_args"].get("add_heatmap") else 2)

    if "nodrop" in info["patch_checkpoint"]:
        # The published program cut nets without dropout before the last ReLU; we always cut after it.
        assert isinstance(model.layers[1].layers[-1], layers.Activation)
        return
    assert model.layers[1].layers[-1].name == info["nested_last_layer"]
    copy_golden_weights(model, folder, name, info["layers"])
    with np.load(folder / f"{name}.npz") as arrays:
        x = as_input(arrays["raw"], info["channels"])
        assert model.predict(x, batch_size=1, verbose=0) == pytest.approx(arrays["predict"], abs=1e-4)


def as_input(raw, channels):
    x = raw.astype(np.float32)
    x *= RESCALE
    x -= MEAN
    return np.repeat(x[..., None], channels, axis=-1)


@pytest.mark.parametrize(
    "net", ["patch_vgg16", "patch_yaroslav", pytest.param("patch_resnet50", marks=pytest.mark.slow)]
)
def test_heatmap_equals_the_published_intention(golden, tmp_path, net):
    import cv2

    folder = golden / "heatmap"
    cases = json.loads((folder / "heatmap.json").read_text())["fprop_intended"]
    patch_net = load_patch_net(golden / "checkpoints", net, tmp_path)
    for case in (case for case in cases if case["model"] == net):
        rows, columns = case["image_size"]
        image = cv2.imread(str(folder / "input" / case["file"]), cv2.IMREAD_UNCHANGED)
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_CUBIC)
        options = {name: case[name] for name in ("avg_pool_size", "hm_strides")}
        model = add_top_layers(patch_net, case["image_size"], case["net"], return_heatmap=True, **options)
        heatmap = model.predict(as_input(image[None], patch_net.inputs[0].shape[-1]), verbose=0)[0]
        with np.load(folder / "heatmaps.npz") as arrays:
            assert heatmap == pytest.approx(arrays[case["key"]], abs=1e-4)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(0, 50, (2, 24, 20, 1)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.5}, {"dropout": 0.5, "average_pool": True}, {"size": (16, 16)}],
    ids=["plain", "dropout", "average pooling", "fixed size"],
)
def test_patch_net_is_cut_after_its_last_pooling_and_left_as_it_was(options, images):
    patch_net = make_patch_net(**options)
    names = [layer.name for layer in patch_net.layers]
    weights = patch_net.get_weights()
    patches = images[:, :16, :16]
    before = outputs(patch_net, patches)

    model, _ = add_top_layers(patch_net, (24, 20), "vgg16", "vgg", depths=[4], repetitions=[1])

    net = model.layers[1]
    assert net.layers[-1].name == "block2_pool"
    assert net.get_layer("block2_conv1") is patch_net.get_layer("block2_conv1")
    features = outputs(net, images)
    assert features.shape == (2, 6, 5, 6)
    dense = patch_net.layers[-1]
    if "size" not in options and "average_pool" not in options:
        logits = features.mean((1, 2)) @ np.asarray(dense.kernel) + np.asarray(dense.bias)
        assert outputs(patch_net, images) == pytest.approx(softmax(logits), abs=1e-5)
    assert [layer.name for layer in patch_net.layers] == names
    assert all(np.array_equal(old, new) for old, new in zip(weights, patch_net.get_weights(), strict=True))
    assert np.array_equal(outputs(patch_net, patches), before)


def test_patch_net_with_a_nested_base(images):
    base = make_patch_net()
    base = keras.Model(base.input, base.get_layer("block2_pool").output)
    image = keras.Input((None, None, 1))
    x = layers.GlobalAveragePooling2D()(base(image))
    patch_net = keras.Model(image, layers.Dense(3, activation="softmax")(x))
    model, _ = add_top_layers(patch_net, (24, 20), "vgg16", "vgg", depths=[4], repetitions=[1])
    assert outputs(model.layers[1], images) == pytest.approx(outputs(base, images))


@pytest.mark.parametrize(
    ("application", "patch_net", "last"),
    [
        ("ResNet50", "resnet50", "conv5_block3_out"),
        ("VGG19", "vgg19", "block5_pool"),
        ("Xception", "xception", "block14_sepconv2_act"),
        ("InceptionV3", "inception", "mixed10"),
    ],
)
def test_cut_of_networks_of_today(application, patch_net, last):
    build = getattr(keras.applications, application)
    base = build(weights=None, include_top=False, pooling="avg", input_shape=(None, None, 3))
    model = keras.Model(base.input, layers.Dense(5, activation="softmax")(base.output))
    whole, _ = add_top_layers(model, (160, 128), patch_net, "vgg", depths=[8], repetitions=[1])
    assert whole.layers[1].layers[-1].name == last


def test_heatmap_over_the_whole_map_is_the_patch_prediction(images):
    patch_net = make_patch_net(dropout=0.5)
    heatmap = add_top_layers(patch_net, (24, 20), "vgg16", avg_pool_size=(6, 5), return_heatmap=True)
    assert outputs(heatmap, images)[:, 0, 0] == pytest.approx(outputs(patch_net, images), abs=1e-5)


def test_heatmap_inside_a_whole_image_net_is_the_classifiers_dense_layer_with_relu(images):
    patch_net = make_patch_net()
    model, _ = add_top_layers(patch_net, (24, 20), "vgg16", add_heatmap=True, avg_pool_size=(3, 2), hm_pool_size=(2, 2))
    pooled, relu_map = (model.layers[i].output for i in (2, 4))
    pooled, relu_map = outputs(keras.Model(model.input, [pooled, relu_map]), images)
    dense = patch_net.layers[-1]
    expected = np.maximum(pooled @ np.asarray(dense.kernel) + np.asarray(dense.bias), 0)
    assert relu_map == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "nb_frozen"),
    [
        ({"block_type": "vgg", "depths": [4], "repetitions": [1]}, 2),
        ({"depths": [2, 2], "repetitions": [1, 2]}, 2),
        ({"add_heatmap": True, "depths": [2], "repetitions": [1]}, HEATMAP_LAYERS),
        ({"add_heatmap": True, "add_conv": False, "add_shortcut": True}, HEATMAP_LAYERS),
    ],
    ids=["vgg", "resnet", "heatmap conv", "heatmap dense"],
)
def test_layers_before_top_layer_nb_are_exactly_patch_net_and_heatmap(options, nb_frozen):
    patch_net = make_patch_net()
    heatmap = {"avg_pool_size": (2, 2), "hm_pool_size": (2, 2)}
    model, top_layer_nb = add_top_layers(patch_net, (32, 32), "vgg16", **heatmap, **options)
    assert top_layer_nb == nb_frozen
    old = {id(weight) for weight in patch_net.weights} | {
        id(w) for layer in model.layers[:nb_frozen] for w in layer.weights
    }
    new = [weight for layer in model.layers[nb_frozen:] for weight in layer.weights]
    assert new and not any(id(weight) in old for weight in new)
    assert any(layer.weights for layer in model.layers[nb_frozen : nb_frozen + 3])


@pytest.mark.parametrize("add_shortcut", [False, True])
def test_dense_top_halves_its_units_and_gives_probabilities(images, add_shortcut):
    heatmap = {"add_heatmap": True, "avg_pool_size": (3, 2), "hm_pool_size": (2, 2)}
    top = {"add_conv": False, "add_shortcut": add_shortcut, "fc_init_units": 16, "fc_layers": 3, "nb_class": 4}
    model, _ = add_top_layers(make_patch_net(), (24, 20), "vgg16", **heatmap, **top, weight_decay=0.01)
    dense = [layer for layer in model.layers[HEATMAP_LAYERS:] if isinstance(layer, layers.Dense)]
    assert [layer.units for layer in dense] == [16, 8, 4, 4] + [4] * add_shortcut
    assert all(float(layer.kernel_regularizer.l2) == pytest.approx(0.01) for layer in dense)
    assert outputs(model, images).sum(-1) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("size", [(None, None), (16, 16)], ids=["any size", "fixed size"])
def test_whole_image_net_saves_and_opens(tmp_path, images, suffix, size):
    model, _ = add_top_layers(make_patch_net(size=size), (24, 20), "vgg16", depths=[2, 2], repetitions=[1, 2])
    model.save(tmp_path / f"image.{suffix}")
    opened = keras.models.load_model(tmp_path / f"image.{suffix}", compile=False)
    assert outputs(opened, images) == pytest.approx(outputs(model, images), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_net": "resnet18"}, "resnet50, vgg16.*Received: 'resnet18'"),
        ({"block_type": "dense"}, "resnet, vgg. Received: 'dense'"),
        ({"depths": [8, 8], "repetitions": [1]}, r"depths \[8, 8\] and repetitions \[1\]"),
        ({"nb_class": 1}, "at least 2 classes.*Received: 1"),
        ({"image_size": (2, 2)}, "Images of 2x2 are too small for the patch net vgg16"),
        ({"add_heatmap": True}, "at least 7x7 to pool. Received: 6x5"),
        ({"add_heatmap": True, "avg_pool_size": (3, 3)}, "at least 5x5 to pool. Received: 4x3"),
        ({"add_conv": False, "fc_init_units": 4, "fc_layers": 4}, "at least 8 units.*Received: 4"),
        ({"block_type": "vgg", "depths": [2] * 4, "repetitions": [1] * 4}, "at least 2x2 to pool"),
    ],
)
def test_wrong_options_are_named(options, message):
    options = {"image_size": (24, 20), "patch_net": "vgg16"} | options
    with pytest.raises(InputError, match=message):
        add_top_layers(make_patch_net(), **options)


def test_a_network_without_global_pooling_is_refused():
    image = keras.Input((8, 8, 1))
    model = keras.Model(image, layers.Dense(2)(layers.Flatten()(image)))
    with pytest.raises(InputError, match="ends in InputLayer, Flatten, Dense"):
        add_top_layers(model, (8, 8))


def test_dropout_rate_can_be_raised_from_zero(tmp_path):
    image = keras.Input((1000,))
    keras.Model(image, layers.Dense(2)(layers.Dropout(0.0)(image))).save(tmp_path / "net.keras")
    model = keras.models.load_model(tmp_path / "net.keras")
    layer = model.layers[1]
    dm_resnet.set_dropout_rate(layer, 0.3)
    model.compile("sgd", "mse")
    ones = np.ones((20, 1000), np.float32)
    model.fit(ones, ones[:, :2], verbose=0)
    assert np.mean(np.asarray(layer(ones, training=True)) == 0) == pytest.approx(0.3, abs=0.02)
    model.save(tmp_path / "net.keras")
    assert keras.models.load_model(tmp_path / "net.keras").layers[1].rate == 0.3


@pytest.mark.parametrize(
    ("block", "first", "last", "filters"),
    [
        (dm_resnet.basic_block, layers.BatchNormalization, layers.Add, 4),
        (dm_resnet.basic_block_org, layers.Conv2D, layers.Dropout, 4),
        (dm_resnet.bottleneck, layers.BatchNormalization, layers.Add, 12),
        (dm_resnet.bottleneck_org, layers.Conv2D, layers.Dropout, 12),
    ],
)
def test_block_functions(block, first, last, filters):
    image = keras.Input((9, 7, filters))
    strided = keras.Model(image, block(4, init_strides=(2, 2), enlarge_factor=3, shortcut_with_bn=True)(image))
    same = keras.Model(image, block(4, enlarge_factor=3, dropout=0.2, weight_decay=0.01)(image))
    assert strided.output_shape == (None, 5, 4, filters)
    assert same.output_shape == (None, 9, 7, filters)
    assert isinstance(same.layers[1], first)
    assert isinstance(same.layers[-1], last)
    convs = [layer for layer in same.layers if isinstance(layer, layers.Conv2D)]
    strided_convs = [layer for layer in strided.layers if isinstance(layer, layers.Conv2D)]
    assert len(strided_convs) == len(convs) + 1, "an identity shortcut where the shape stays"
    assert all(float(conv.kernel_regularizer.l2) == pytest.approx(0.01) for conv in convs)
    assert {layer.rate for layer in same.layers if isinstance(layer, layers.Dropout)} == {0.2}


BUILDERS = [(f"resnet_{depth}", depth, 3 if depth == 38 else 4) for depth in (18, 34, 38, 50)] + [
    ("resnet_50_org", 50, 4),
    ("dm_resnet_14", 14, 4),
]
BUILDERS += [(f"dm_resnet_{depth}rb{groups}", depth, groups) for depth, groups in ((47, 5), (56, 6), (65, 7))]
BUILDERS += [pytest.param(f"resnet_{depth}", depth, 4, marks=pytest.mark.slow) for depth in (101, 152)]


@pytest.mark.parametrize(("name", "depth", "groups"), BUILDERS)
def test_named_networks_have_their_depth(name, depth, groups):
    size = 2 ** (groups + 1)  # halved by the first convolution, the pooling, and every group but the first
    model = getattr(ResNetBuilder, f"build_{name}")((1, size, size), 5, nb_init_filter=2)
    convs = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    shortcuts = [conv for conv in convs if conv.padding == "valid"]
    assert len(convs) - len(shortcuts) + 1 == depth
    assert [conv.strides for conv in shortcuts] == [(1, 1)] + [(2, 2)] * (groups - 1)
    widths = {conv.filters for conv in convs if conv.padding == "same" and conv.kernel_size == (3, 3)}
    assert widths == {2 * 2**group for group in range(groups)}
    assert convs[-1].output.shape[1:3] == (1, 1)
    assert model.output_shape == (None, 5)


def test_builder_options_reach_their_layers():
    first = {"nb_init_filter": 6, "init_filter_size": 7, "init_conv_stride": 1, "pool_size": 3, "pool_stride": 4}
    rates = {"weight_decay": 0.02, "alpha": 0.1, "l1_ratio": 0.2, "inp_dropout": 0.1, "hidden_dropout": 0.4}
    model = ResNetBuilder.build((3, 64, 48), 1, dm_resnet.bottleneck_org, [1], **first, **rates)
    conv = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D))
    assert (conv.filters, conv.kernel_size, conv.output.shape[1:3]) == (6, (7, 7), (64, 48))
    assert float(conv.kernel_regularizer.l2) == pytest.approx(0.02)
    pool = next(layer for layer in model.layers if isinstance(layer, layers.MaxPooling2D))
    assert (pool.pool_size, pool.output.shape[1:3]) == ((3, 3), (16, 12))
    rates = [layer.rate for layer in model.layers if isinstance(layer, layers.Dropout)]
    assert rates[0] == 0.1 and set(rates[1:]) == {0.4}
    assert model.layers[-1].activation is keras.activations.sigmoid
    assert model.layers[-1].kernel_regularizer.get_config() == pytest.approx({"l1": 0.02, "l2": 0.04})


def published_builders():
    path = SHARED / "golden" / "builders" / "builders.json"
    return json.loads(path.read_text()) if path.exists() else {"absent": None}


def described(model):
    """Return each layer as the published tables have it: settings, what feeds it, and the shape it gives."""
    position = {layer.name: i for i, layer in enumerate(model.layers)}
    names = ("filters", "kernel_size", "strides", "padding", "pool_size", "use_bias", "units", "rate", "epsilon")
    for layer in model.layers:
        row = {name: getattr(layer, name) for name in (*names, "momentum") if hasattr(layer, name)}
        row["class"], row["output_shape"] = type(layer).__name__, list(layer.output.shape)
        row["from"] = [
            position[tensor._keras_history[0].name] for node in layer._inbound_nodes for tensor in node.input_tensors
        ]
        if hasattr(layer, "activation"):
            row["activation"] = keras.activations.serialize(layer.activation)
        if getattr(layer, "kernel_regularizer", None):
            penalty = layer.kernel_regularizer.get_config()
            row["kernel_regularizer"] = {name: pytest.approx(value) for name, value in penalty.items() if value}
            row["kernel_initializer"] = type(layer.kernel_initializer).__name__
        if hasattr(layer, "axis"):
            row["axis"] = layer.axis % len(layer.output.shape)
        yield {name: list(value) if isinstance(value, tuple) else value for name, value in row.items()}


def draw_weights(model):
    """Draw all variables in order, as the tables' predictions had them."""
    rng = np.random.RandomState(7)
    for weight in model.weights:
        kind = weight.path.rsplit("/", 1)[1]
        if kind == "moving_variance":
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif kind == "gamma":
            weight.assign(rng.uniform(0.1, 0.3, weight.shape))
        elif kind == "kernel":
            drawn = rng.normal(0, np.sqrt(2 / np.prod(weight.shape[:-1])), weight.shape)
            weight.assign(drawn * (0.1 if len(weight.shape) == 2 else 1))
        else:
            weight.assign(rng.normal(0, 0.1, weight.shape))


@pytest.mark.parametrize("case", published_builders())
def test_builders_make_the_published_networks(case, golden):
    published = published_builders()[case]
    model = getattr(ResNetBuilder, published["builder"])(*published["args"], **published["kwargs"])
    assert model.count_params() == published["parameters"]
    for ours, theirs in zip(described(model), published["layers"], strict=True):
        assert {name: ours.get(name) for name in theirs} == theirs
    draw_weights(model)
    image = np.random.RandomState(3).uniform(-1, 1, (2, 96, 64, 1)).astype(np.float32)
    np.testing.assert_allclose(outputs(model, image), published["prediction"], atol=1e-5)


def test_named_networks_are_built_by_position_and_refuse_what_they_do_not_take():
    named = ResNetBuilder.build_resnet_50((1, 32, 32), 2, 2, 5, 1, 2, 2, 0.01, 1.0, 0.5, 0.1, 0.2, True)
    same = ResNetBuilder.build((1, 32, 32), 2, dm_resnet.bottleneck, (3, 4, 6, 3), 2, 5, 1, 2, 2, 0.01, 1.0, 0.5, 0.1,
                               0.2, True)  # fmt: skip
    assert list(described(named)) == list(described(same))
    with pytest.raises(TypeError, match="shortcut_with_bn"):
        ResNetBuilder.build_resnet_18((1, 32, 32), 2, shortcut_with_bn=True)
    for shape in ((96, 64, 1), (None, None, 1), (224, 224, 3)):
        with pytest.raises(InputError, match=r"Expected an input shape \(channels, rows, columns\)"):
            ResNetBuilder.build_resnet_18(shape, 2)


def test_elastic_net_penalty():
    weights = np.array([[1.0, -2.0], [0.5, 0.0]], np.float32)
    penalty = ResNetBuilder.l1l2_penalty_reg(alpha=0.4, l1_ratio=0.25)
    expected = 0.4 * (0.25 * np.abs(weights).sum() + 0.75 / 2 * (weights**2).sum())
    assert float(penalty(weights)) == pytest.approx(expected)


def test_two_view_network_concatenates_one_towers_features():
    model = MultiViewResNetBuilder.build_dm_resnet_14((1, 32, 32), 2, nb_init_filter=2)
    assert model.input_shape == [(None, 32, 32, 1), (None, 32, 32, 1)]
    rng = np.random.default_rng(0)
    cc, mlo = rng.normal(0, 50, (2, 3, 32, 32, 1)).astype(np.float32)
    tower = next(layer for layer in model.layers if isinstance(layer, keras.Model))
    features = np.concatenate([outputs(tower, view) for view in (cc, mlo)], axis=1)
    dense = model.layers[-1]
    logits = features @ np.asarray(dense.kernel) + np.asarray(dense.bias)
    assert outputs(model, [cc, mlo]) == pytest.approx(softmax(logits), abs=1e-5)
