"""Residual networks, and the top layers that turn a patch classifier into a whole-image classifier.

Tensors are channels last: (batch, rows, columns, channels), float32 images of 0..255 less the data's mean.
Residual units: He et al. 2016, "Deep residual learning" (post-activation), "Identity mappings" (pre-activation).
"""

import inspect
from collections.abc import Callable, Sequence

import keras
from keras import layers

from mammo.base.files import InputError

PATCH_NETS = ("resnet50", "vgg16", "vgg19", "xception", "inception", "yaroslav")

BLOCK_TYPES = ("resnet", "vgg")


def set_dropout_rate(layer: layers.Dropout, rate: float) -> None:
    """Change the rate of a Dropout layer in place, 0..1, in a model built or loaded. Compile the model again after.

    Keras gives a layer made with rate 0 no random generator; raising its rate alone would fail in training.
    """
    if not hasattr(layer, "seed_generator"):
        # A built layer refuses new state, and Keras has no public way to lift that. The layer must track the
        # generator all the same: compiled training steps, above all those of JAX, look for its state there.
        layer._tracker.unlock()
        layer.seed_generator = keras.random.SeedGenerator(layer.seed)
        layer._tracker.lock()
    layer.rate = rate


def _conv(filters, kernel_size, strides=(1, 1), padding="same", weight_decay=0.0001):
    kernel = {"kernel_initializer": "he_normal", "kernel_regularizer": keras.regularizers.L2(weight_decay)}
    return layers.Conv2D(filters, kernel_size, strides=strides, padding=padding, **kernel)


def _dense(units, activation=None, weight_decay=0.0001):
    kernel = {"kernel_initializer": "he_normal", "kernel_regularizer": keras.regularizers.L2(weight_decay)}
    return layers.Dense(units, activation=activation, **kernel)


def _relu(x, dropout):
    return layers.Dropout(dropout)(layers.Activation("relu")(x))


def _bn_relu(x, dropout):
    return _relu(layers.BatchNormalization()(x), dropout)


def _pool(layer, x):
    """Apply a pooling layer; a feature map smaller than its window means that the image was too small."""
    if any(size < window for size, window in zip(x.shape[1:3], layer.pool_size, strict=True)):
        raise InputError(
            "The image is too small for the top layers. "
            f"Expected a feature map of at least {layer.pool_size[0]}x{layer.pool_size[1]} to pool. "
            f"Received: {x.shape[1]}x{x.shape[2]}. Use larger images or fewer or smaller poolings."
        )
    return layer(x)


def _residual_unit(
    convs, init_strides, identity, shortcut_with_bn, preactivation, dropout=0.0, weight_decay=0.0001
) -> Callable:
    """Return a function that adds one unit of `convs`, pairs (filters, kernel size), to a tensor."""

    def unit(x):
        residual = x
        for i, (filters, kernel_size) in enumerate(convs):
            conv = _conv(filters, kernel_size, init_strides if i == 0 else (1, 1), weight_decay=weight_decay)
            if preactivation:
                residual = conv(_bn_relu(residual, dropout))
            else:
                residual = layers.BatchNormalization()(conv(residual))
                if i < len(convs) - 1:
                    residual = _relu(residual, dropout)
        shortcut = x
        filters = convs[-1][0]
        if not identity or tuple(init_strides) != (1, 1) or x.shape[-1] != filters:
            shortcut = _conv(filters, 1, init_strides, padding="valid", weight_decay=weight_decay)(x)
            if shortcut_with_bn:
                shortcut = layers.BatchNormalization()(shortcut)
        added = layers.Add()([shortcut, residual])
        return added if preactivation else _relu(added, dropout)

    return unit


def basic_block(
    nb_filters: int,
    init_strides: tuple[int, int] = (1, 1),
    identity: bool = True,
    shortcut_with_bn: bool = False,
    enlarge_factor: int | None = None,
    **kw_args,
) -> Callable:
    """Return a function from tensor to tensor: a pre-activation unit of two 3x3 convolutions.

    All four block functions take the same arguments.

    Args:
        nb_filters: width of the convolutions.
        init_strides: strides of the first convolution.
        identity: add the input itself where the unit keeps its shape. Otherwise, and where it does not, the
            shortcut is a 1x1 convolution of the input.
        shortcut_with_bn: normalize that convolution.
        enlarge_factor: of bottlenecks: the last convolution is this many times wider.
        kw_args: `dropout` (rate after every ReLU, 0) and `weight_decay` (L2 of every kernel, 0.0001).
    """
    convs = [(nb_filters, 3), (nb_filters, 3)]
    return _residual_unit(convs, init_strides, identity, shortcut_with_bn, preactivation=True, **kw_args)


def basic_block_org(
    nb_filters: int,
    init_strides: tuple[int, int] = (1, 1),
    identity: bool = True,
    shortcut_with_bn: bool = False,
    enlarge_factor: int | None = None,
    **kw_args,
) -> Callable:
    """Return the post-activation form of `basic_block`: convolution, batch norm, ReLU, and ReLU after the addition."""
    convs = [(nb_filters, 3), (nb_filters, 3)]
    return _residual_unit(convs, init_strides, identity, shortcut_with_bn, preactivation=False, **kw_args)


def bottleneck(
    nb_filters: int,
    init_strides: tuple[int, int] = (1, 1),
    identity: bool = True,
    shortcut_with_bn: bool = False,
    enlarge_factor: int = 4,
    **kw_args,
) -> Callable:
    """Return a pre-activation unit of 1x1, 3x3, 1x1 convolutions, as `basic_block` otherwise."""
    convs = [(nb_filters, 1), (nb_filters, 3), (nb_filters * enlarge_factor, 1)]
    return _residual_unit(convs, init_strides, identity, shortcut_with_bn, preactivation=True, **kw_args)


def bottleneck_org(
    nb_filters: int,
    init_strides: tuple[int, int] = (1, 1),
    identity: bool = True,
    shortcut_with_bn: bool = False,
    enlarge_factor: int = 4,
    **kw_args,
) -> Callable:
    """Return the post-activation form of `bottleneck`, with the stride in its first 1x1 convolution."""
    convs = [(nb_filters, 1), (nb_filters, 3), (nb_filters * enlarge_factor, 1)]
    return _residual_unit(convs, init_strides, identity, shortcut_with_bn, preactivation=False, **kw_args)


def _vgg_block(filters, repetitions, dropout, weight_decay):
    """Return a function that adds `repetitions` of 3x3 convolution, batch norm, ReLU; then 2x2 max pooling."""

    def block(x):
        for _ in range(repetitions):
            x = _bn_relu(_conv(filters, 3, weight_decay=weight_decay)(x), dropout)
        return _pool(layers.MaxPooling2D((2, 2)), x)

    return block


def _chain(tensor):
    """Yield (layer, its output) backwards from a tensor, up to the first layer without exactly one input."""
    while True:
        layer, node_index, _ = tensor._keras_history
        yield layer, tensor
        inputs = layer._inbound_nodes[node_index].input_tensors
        if len(inputs) != 1:
            return
        tensor = inputs[0]


def _cut_patch_net(model):
    """Split a patch classifier into the net up to its last feature map before pooling, and its dense layer.

    The cut is found by walking back from the output to the global average pooling, and on past the 7x7
    average pooling that ResNet50 had in 2017. The returned model takes images of any size; it shares the
    layers of `model`, which stays as it is.
    """
    chain = list(_chain(model.outputs[0]))
    kinds = [type(layer) for layer, _ in chain]
    if layers.GlobalAveragePooling2D not in kinds or layers.Dense not in kinds:
        raise InputError(
            "This is not a patch classifier. Expected a network that ends in a global average pooling and "
            f"a dense layer. Received: one that ends in {', '.join(kind.__name__ for kind in kinds[4::-1])}."
        )
    classifier = chain[kinds.index(layers.Dense)][0]
    before_pooling = chain[kinds.index(layers.GlobalAveragePooling2D) + 1 :]
    features = next(
        tensor for layer, tensor in before_pooling if not isinstance(layer, layers.Dropout | layers.AveragePooling2D)
    )
    if any(isinstance(layer, keras.Model) for layer in model.layers) and not isinstance(
        features._keras_history.operation, keras.Model
    ):
        raise InputError(
            "This is a whole-image classifier already: it has layers on top of a patch net. "
            "Expected a patch classifier; finetune a whole-image classifier with --resume-from."
        )
    net = keras.Model(model.inputs[0], features)
    if None not in net.input_shape[1:3]:
        any_size = keras.Input((None, None, net.input_shape[-1]))
        net = keras.models.clone_model(net, input_tensors=any_size, clone_function=lambda layer: layer)
    return net, classifier


def add_top_layers(
    model: keras.Model,
    image_size: Sequence[int],
    patch_net: str = "resnet50",
    block_type: str = "resnet",
    depths: Sequence[int] = (512, 512),
    repetitions: Sequence[int] = (1, 1),
    block_fn: Callable = bottleneck_org,
    nb_class: int = 2,
    shortcut_with_bn: bool = True,
    bottleneck_enlarge_factor: int = 4,
    dropout: float = 0.0,
    weight_decay: float = 0.0001,
    add_heatmap: bool = False,
    avg_pool_size: Sequence[int] = (7, 7),
    return_heatmap: bool = False,
    add_conv: bool = True,
    add_shortcut: bool = False,
    hm_strides: Sequence[int] = (1, 1),
    hm_pool_size: Sequence[int] = (5, 5),
    fc_init_units: int = 64,
    fc_layers: int = 2,
) -> tuple[keras.Model, int] | keras.Model:
    """Build a whole-image classifier on the feature map of a patch classifier (the method of Shen 2017).

    Args:
        model: a patch classifier, any of `PATCH_NETS`; its layers are shared with, and trained by, the result.
        image_size: (rows, columns) of the whole images; they have the channels of the patches.
        patch_net: the name of the patch net; the place to cut it is found from its layers.
        block_type: for each i, "resnet" adds `repetitions[i]` units `block_fn` of `depths[i]` filters, the first
            with stride 2, and "vgg" `repetitions[i]` convolutions of `depths[i]` filters and a 2x2 max pooling.
            Pre-activation units end in their addition, as published: no batch norm follows the last.
        shortcut_with_bn, bottleneck_enlarge_factor: of the units, see `basic_block`.
        dropout, weight_decay: rate and L2 of all layers added.
        add_heatmap: between net and top comes average pooling `avg_pool_size` with strides `hm_strides`, the patch
            classifier's own dense layer at every position, with ReLU, and max pooling `hm_pool_size`.
        return_heatmap: build the heatmap model alone, with softmax over the patch classes at every position.
        add_conv: False for dense layers in place of convolutions: `fc_layers` of them on the flattened map, from
            `fc_init_units` units halving each time; `add_shortcut` adds one from the map to the output.

    Returns the model, (batch, rows, columns, channels) -> (batch, `nb_class`) probabilities, and the index of
    its first new layer: before it are the input, the patch net and the heatmap, frozen in the first stage.
    With `return_heatmap`, returns one model, (batch, rows, columns, channels) ->
    (batch, map rows, map columns, patch classes).
    Raises InputError for unknown names, lists of unequal length, fewer than two classes, no patch classifier, images
    too small.
    """
    if patch_net not in PATCH_NETS:
        raise InputError(f"Unknown patch net. Expected one of {', '.join(PATCH_NETS)}. Received: {patch_net!r}.")
    if block_type not in BLOCK_TYPES:
        raise InputError(f"Unknown block type. Expected one of {', '.join(BLOCK_TYPES)}. Received: {block_type!r}.")
    if nb_class < 2:
        raise InputError(f"Expected at least 2 classes, of which the softmax chooses. Received: {nb_class}.")
    if add_conv and len(depths) != len(repetitions):
        raise InputError(
            "Expected one number of repetitions for each depth of the top layers. "
            f"Received: depths {list(depths)} and repetitions {list(repetitions)}."
        )
    if not add_conv and fc_init_units < 2 ** (fc_layers - 1):
        raise InputError(
            f"Expected at least {2 ** (fc_layers - 1)} units in the first of {fc_layers} dense layers, since each "
            f"has half the units of the one before. Received: {fc_init_units}."
        )

    net, classifier = _cut_patch_net(model)
    image = keras.Input((*image_size, net.input_shape[-1]))
    try:
        x = net(image)
    except ValueError as error:  # the channels are the net's own, so only the size can be at fault
        raise InputError(
            f"Images of {image_size[0]}x{image_size[1]} are too small for the patch net {patch_net}. Use larger images."
        ) from error
    common = {"dropout": dropout, "weight_decay": weight_decay}
    if add_heatmap or return_heatmap:
        x = _pool(layers.AveragePooling2D(tuple(avg_pool_size), strides=tuple(hm_strides)), x)
        x = _heatmap(x, classifier, "softmax" if return_heatmap else "relu", **common)
        if return_heatmap:
            return keras.Model(image, x)
        x = _pool(layers.MaxPooling2D(tuple(hm_pool_size)), x)
    top_layer_nb = len(keras.Model(image, x).layers)
    if not add_conv:
        output = _dense_top(x, nb_class, fc_init_units, fc_layers, add_shortcut, **common)
    elif block_type == "vgg":
        blocks = [_vgg_block(*block, **common) for block in zip(depths, repetitions, strict=True)]
        output = _convolutional_top(x, nb_class, blocks, **common)
    else:
        options = {"enlarge_factor": bottleneck_enlarge_factor, "shortcut_with_bn": shortcut_with_bn, **common}
        blocks = [
            block_fn(filters, init_strides=(2, 2) if i == 0 else (1, 1), **options)
            for filters, nb_units in zip(depths, repetitions, strict=True)
            for i in range(nb_units)
        ]
        output = _convolutional_top(x, nb_class, blocks, **common)
    return keras.Model(image, output), top_layer_nb


def _heatmap(x, classifier, activation, dropout, weight_decay):
    """Apply the dense layer of a patch classifier, with its weights, at every position of a feature map."""
    x = layers.Dropout(dropout)(x)
    dense = _dense(classifier.units, activation, weight_decay)
    x = dense(x)
    dense.set_weights(classifier.get_weights())
    return x


def _convolutional_top(x, nb_class, blocks, dropout, weight_decay):
    """Apply blocks, global average pooling and a softmax."""
    for block in blocks:
        x = block(x)
    x = layers.Dropout(dropout)(layers.GlobalAveragePooling2D()(x))
    return _dense(nb_class, "softmax", weight_decay)(x)


def _dense_top(x, nb_class, init_units, nb_layers, add_shortcut, dropout, weight_decay):
    """Apply dense layers, each of half the units of the one before, and a softmax; see `add_top_layers`."""
    flat = layers.Flatten()(x)
    x = layers.Dropout(dropout)(flat)
    for i in range(nb_layers):
        x = _bn_relu(_dense(init_units // 2**i, weight_decay=weight_decay)(x), dropout)
    x = _dense(nb_class, weight_decay=weight_decay)(x)
    if add_shortcut:
        x = layers.Add()([x, _dense(nb_class, weight_decay=weight_decay)(flat)])
    return layers.Activation("softmax")(x)


# What makes the networks of ResNetBuilder, by the name of its method without `build_`: block function, and number of
# units in each group. A number in a name counts the convolutions on the main path and the dense layer.
RESNETS = {
    "resnet_18": (basic_block, (2, 2, 2, 2)),
    "resnet_34": (basic_block, (3, 4, 6, 3)),
    "resnet_38": (bottleneck, (3, 6, 3)),
    "resnet_50": (bottleneck, (3, 4, 6, 3)),
    "resnet_50_org": (bottleneck_org, (3, 4, 6, 3)),
    "resnet_101": (bottleneck, (3, 4, 23, 3)),
    "resnet_152": (bottleneck, (3, 8, 36, 3)),
    "dm_resnet_14": (bottleneck, (1, 1, 1, 1)),
    "dm_resnet_47rb5": (bottleneck, (3,) * 5),
    "dm_resnet_56rb6": (bottleneck, (3,) * 6),
    "dm_resnet_65rb7": (bottleneck, (3,) * 7),
}


def _named(name: str, *, shortcut_with_bn: bool = False) -> classmethod:
    """Return the method that builds the network `name`, with the arguments of `build` that the published one has."""
    block_fn, repetitions = RESNETS[name]
    left_out = {"block_fn", "repetitions"} | (set() if shortcut_with_bn else {"shortcut_with_bn"})
    parameters = [p for p in inspect.signature(_build).parameters.values() if p.name not in left_out]
    signature = inspect.Signature(parameters, return_annotation=keras.Model)

    def build_named(cls, *args, **kwargs):
        options = signature.bind(cls, *args, **kwargs).arguments
        for ignored in ("cls", "alpha", "l1_ratio"):
            options.pop(ignored, None)
        return cls.build(options.pop("input_shape"), options.pop("num_outputs"), block_fn, repetitions, **options)

    build_named.__name__ = f"build_{name}"
    build_named.__doc__ = f"""Build a network of groups of {repetitions} units `{block_fn.__name__}`.

        See `build` for the arguments. As in the published program, `alpha` and `l1_ratio` have no effect: the penalty
        of the last layer is that of their defaults.
        """
    build_named.__signature__ = signature
    return classmethod(build_named)


def _build(
    cls,
    input_shape: tuple[int, int | None, int | None],
    num_outputs: int,
    block_fn: Callable,
    repetitions: Sequence[int],
    nb_init_filter: int = 64,
    init_filter_size: int = 7,
    init_conv_stride: int = 2,
    pool_size: int = 3,
    pool_stride: int = 2,
    weight_decay: float = 0.0001,
    alpha: float = 1.0,
    l1_ratio: float = 0.5,
    inp_dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    shortcut_with_bn: bool = False,
) -> keras.Model:
    """Build a residual network of float32 (batch, rows, columns, channels), softmax output (sigmoid for one).

    Args:
        input_shape: (channels, rows, columns), as published, though the tensors are channels last.
        num_outputs: number of outputs.
        block_fn: makes the units: `basic_block`, `bottleneck`, or their `_org` forms.
        repetitions: number of units in each group. The first unit of a group has a convolution as its shortcut.
        nb_init_filter: filters of the first convolution, doubled with every group; each but the first halves the map.
        init_filter_size, init_conv_stride: of the first convolution.
        pool_size, pool_stride: of the max pooling after it.
        weight_decay: L2 of the convolutions.
        alpha, l1_ratio: penalty of the dense layer, see `l1l2_penalty_reg`.
        inp_dropout, hidden_dropout: rates of the image, and after every ReLU.
        shortcut_with_bn: normalize the convolutions of shortcuts.

    Raises InputError for an input shape whose channels stand last.
    """
    channels, *size = input_shape
    if channels is None or (channels > 4 and size[-1] in (1, 2, 3, 4)):
        raise InputError(f"Expected an input shape (channels, rows, columns). Received: {tuple(input_shape)}.")
    image = keras.Input((*size, channels))
    x = layers.Dropout(inp_dropout)(image)
    x = _conv(nb_init_filter, init_filter_size, init_conv_stride, weight_decay=weight_decay)(x)
    x = _bn_relu(x, hidden_dropout)
    x = layers.MaxPooling2D(pool_size, strides=pool_stride, padding="same")(x)
    options = {"shortcut_with_bn": shortcut_with_bn, "dropout": hidden_dropout, "weight_decay": weight_decay}
    for group, nb_units in enumerate(repetitions):
        for i in range(nb_units):
            strides = (2, 2) if i == 0 and group > 0 else (1, 1)
            x = block_fn(nb_init_filter * 2**group, strides, identity=i > 0, **options)(x)
    inputs, features = cls._views(keras.Model(image, layers.GlobalAveragePooling2D()(x)))
    kernel = {"kernel_initializer": "he_normal", "kernel_regularizer": cls.l1l2_penalty_reg(alpha, l1_ratio)}
    dense = layers.Dense(num_outputs, activation="sigmoid" if num_outputs == 1 else "softmax", **kernel)
    return keras.Model(inputs, dense(features))


class ResNetBuilder:
    """Build residual networks for patches or whole images, to be trained from scratch (`RESNETS`)."""

    @staticmethod
    def l1l2_penalty_reg(alpha: float = 1.0, l1_ratio: float = 0.5) -> keras.Regularizer:
        """Return the elastic net of glmnet and scikit-learn: alpha (l1_ratio |w| + (1 - l1_ratio) / 2 w^2)."""
        return keras.regularizers.L1L2(l1=alpha * l1_ratio, l2=alpha * (1 - l1_ratio) / 2)

    @staticmethod
    def _views(tower):
        """Return the inputs of the network and the features that its last layer sees, of the convolutional part."""
        return tower.input, tower.output

    build = classmethod(_build)
    build_resnet_18 = _named("resnet_18")
    build_resnet_34 = _named("resnet_34")
    build_resnet_38 = _named("resnet_38")
    build_resnet_50 = _named("resnet_50", shortcut_with_bn=True)
    build_resnet_50_org = _named("resnet_50_org", shortcut_with_bn=True)
    build_resnet_101 = _named("resnet_101")
    build_resnet_152 = _named("resnet_152")
    build_dm_resnet_14 = _named("dm_resnet_14")
    build_dm_resnet_47rb5 = _named("dm_resnet_47rb5")
    build_dm_resnet_56rb6 = _named("dm_resnet_56rb6")
    build_dm_resnet_65rb7 = _named("dm_resnet_65rb7")


class MultiViewResNetBuilder(ResNetBuilder):
    """Build the same networks with two inputs, [CC, MLO]: one tower sees both, its features are concatenated."""

    @staticmethod
    def _views(tower):
        views = [keras.Input(tower.input_shape[1:], name=name) for name in ("cc", "mlo")]
        return views, layers.Concatenate()([tower(view) for view in views])
