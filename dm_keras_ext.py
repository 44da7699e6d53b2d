"""Networks, optimizers and the staged training of patch and whole-image classifiers.

Patch training has three stages (last layer, top layers, all layers) and whole-image training two (new layers,
all layers); both are lists of `Stage`s run by `train_stages`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from dm_resnet import RESNETS, ResNetBuilder, set_dropout_rate
from mammo.base.files import InputError
from mammo.train import checkpoint
from mammo.train.callbacks import BestModel, DMAucModelCheckpoint, DMFlush, FiniteLoss
from mammo.train.checkpoint import check_outputs, leaf_layers
from mammo.train.devices import even_batches, training_scope
from mammo.train.keras2 import Accuracy, DMMetrics, WeightedCrossentropy, create_optimizer
from mammo.train.resume import TrainingState
from mammo.train.scoring import flip_all_img

__all__ = [
    "DMAucModelCheckpoint",
    "DMFlush",
    "DMMetrics",
    "Yaroslav",
    "create_optimizer",
    "do_2stage_training",
    "do_3stage_training",
    "flip_all_img",
    "get_dl_model",
    "load_dat_ram",
    "robust_load_model",
]


def robust_load_model(
    filepath: str | Path, custom_objects: dict | None = None, *, trust_checkpoint: bool = False
) -> keras.Model:
    """Open a model file of any age; see `mammo.train.checkpoint.load_model`. The file is never changed."""
    with keras.saving.custom_object_scope(custom_objects or {}):
        return checkpoint.load_model(filepath, trust_checkpoint=trust_checkpoint)


def load_dat_ram(generator: keras.utils.PyDataset, nb_samples: int | None) -> tuple:
    """Collect the batches of one epoch as arrays (x, y): float32 images (N, H, W, C) and their labels.

    nb_samples: stop after so many; None for all.

    For old notebooks: training takes a sixth to a twelfth of the memory (`flow_from_directory(..., load_to_ram=True)`).
    """
    batches, seen = [], 0
    for i in range(len(generator)):
        batches.append(generator[i][:2])
        seen += len(batches[-1][1])
        if nb_samples is not None and seen >= nb_samples:
            break
    return keras.tree.map_structure(lambda *parts: np.concatenate(parts)[:nb_samples], *batches)


# --- Patch networks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PatchNet:
    application: str  # class of keras.applications
    module: str  # module of keras.applications that holds its preprocess_input
    top_layers: tuple[str, ...]  # stage 2 trains from the first layer with one of these name prefixes


# The top layers are the last residual unit or convolution block; the second name for ResNet50 is that of 2017's files.
_PATCH_NETS = {
    "resnet50": _PatchNet("ResNet50", "resnet50", ("conv5_block3", "res5c")),
    "vgg16": _PatchNet("VGG16", "vgg16", ("block5_conv1",)),
    "vgg19": _PatchNet("VGG19", "vgg19", ("block5_conv1",)),
    "xception": _PatchNet("Xception", "xception", ("block14_sepconv1",)),
    "inception": _PatchNet("InceptionV3", "inception_v3", ("mixed6",)),
}


# Options of the command line that only the networks of ResNetBuilder have.
BUILDER_OPTIONS = frozenset(
    ["init_filter_size", "init_conv_stride", "pool_size", "pool_stride", "alpha", "l1_ratio", "inp_dropout"]
)


def Yaroslav(
    input_shape: tuple[int | None, ...] | None = None, classes: int = 5, *, nb_init_filter: int = 32
) -> keras.Model:
    """Build the patch classifier of the challenge's top-performing team, fully convolutional.

    Six blocks of two 3x3 same convolutions, with batch normalization and ReLU, and a 2x2 max pooling; then global
    average pooling and a softmax. The widths are 1, 2, 4, 8, 8, 16 times `nb_init_filter`. Without an input shape it
    takes one channel of any size.
    """
    inputs = x = layers.Input(input_shape or (None, None, 1))
    for block, factor in enumerate((1, 2, 4, 8, 8, 16), start=1):
        for conv in (1, 2):
            x = layers.Conv2D(nb_init_filter * factor, 3, padding="same", name=f"block{block}_conv{conv}")(x)
            x = layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=f"block{block}_bn{conv}")(x)
            x = layers.Activation("relu", name=f"block{block}_relu{conv}")(x)
        x = layers.MaxPooling2D(2, name=f"block{block}_pool")(x)
    x = layers.GlobalAveragePooling2D()(x)
    outputs = layers.Dense(classes, activation="softmax", name="predictions")(x)
    return keras.Model(inputs, outputs, name="yaroslav")


def get_dl_model(
    net: str,
    nb_class: int = 3,
    use_pretrained: bool = True,
    resume_from: str | Path | None = None,
    top_layer_nb: int | None = None,
    weight_decay: float = 0.01,
    hidden_dropout: float = 0.0,
    *,
    pretrained_weights: str | Path | None = None,
    trust_checkpoint: bool = False,
    nb_init_filter: int = 32,
    **builder_options,
) -> tuple[keras.Model, Callable | None, int | None]:
    """Build a patch classifier, or open a saved one.

    Args:
        net: `resnet50`, `vgg16`, `vgg19`, `xception`, `inception`, `yaroslav`, or a network of
            `dm_resnet.ResNetBuilder` by the name of its method without `build_`, such as `dm_resnet_14`.
        nb_class: number of softmax outputs.
        use_pretrained: start from ImageNet weights, where they exist.
        resume_from: model file to open instead of building; its class count must be `nb_class`.
        top_layer_nb: index of the first layer that stage 2 trains; default: by name, that of the net's last
            residual unit or convolution block, and None for nets that train in one stage.
        weight_decay: L2 penalty of the last layer's kernel (YaroslavNet has none).
        hidden_dropout: dropout rate before the last layer; 0 leaves the layer out.
        pretrained_weights: local file of the ImageNet weights without top, for machines without internet.
        nb_init_filter: width of the first block of `yaroslav` and of the ResNetBuilder networks.
        builder_options: further options of the ResNetBuilder networks.

    Returns:
        (model, preprocess_input, top_layer_nb). `preprocess_input` is the ImageNet scaling of the net, for
        callers that do not subtract the training mean themselves; None where there is none.

    Raises:
        InputError: unknown net, fewer than two classes, weights that cannot be had, or a file for another class count.
    """
    if nb_class < 2:
        raise InputError(f"--class-list: Expected at least two classes. Received {nb_class}")
    if resume_from is not None:
        model = robust_load_model(resume_from, trust_checkpoint=trust_checkpoint)
        check_outputs(model, nb_class, resume_from)
    elif net in _PATCH_NETS and builder_options.keys() - BUILDER_OPTIONS:
        raise TypeError(f"unknown options: {', '.join(sorted(builder_options.keys() - BUILDER_OPTIONS))}")
    elif net in _PATCH_NETS:
        model = _build_application(net, nb_class, use_pretrained, pretrained_weights, weight_decay, hidden_dropout)
    elif net == "yaroslav":
        model = Yaroslav(classes=nb_class, nb_init_filter=nb_init_filter)
    else:
        model = _build_resnet(net, nb_class, nb_init_filter, weight_decay, hidden_dropout, builder_options)
    if net not in _PATCH_NETS:
        return model, None, top_layer_nb
    spec = _PATCH_NETS[net]
    if top_layer_nb is None:
        matches = (i for i, layer in enumerate(model.layers) if layer.name.startswith(spec.top_layers))
        if (top_layer_nb := next(matches, None)) is None:
            raise InputError(
                f"{resume_from}: Expected a {net} with a layer called {' or '.join(spec.top_layers)}. "
                f"Received none; check --net, or give --top-layer-nb"
            )
    return model, getattr(keras.applications, spec.module).preprocess_input, top_layer_nb


def _build_application(net, nb_class, use_pretrained, pretrained_weights, weight_decay, hidden_dropout):
    build = getattr(keras.applications, _PATCH_NETS[net].application)
    # Built without weights first, so that what fails below is the download and not, say, the memory.
    base = build(include_top=False, weights=None, input_shape=(None, None, 3))
    if use_pretrained and pretrained_weights is None:
        try:
            base = build(include_top=False, weights="imagenet", input_shape=(None, None, 3))
        except Exception as error:  # Keras reports a failed download as a bare Exception
            raise InputError(
                f"ImageNet weights of {net} could not be downloaded ({' '.join(str(error).split())[:200]}). Connect to "
                f"the internet, or give a local file with --pretrained-weights FILE, or start from random weights with "
                f"--no-use-pretrained"
            ) from error
    if use_pretrained and pretrained_weights is not None:
        checkpoint.load_weights(base, pretrained_weights)
    x = layers.GlobalAveragePooling2D()(base.output)
    if hidden_dropout > 0:
        x = layers.Dropout(hidden_dropout)(x)
    penalty = keras.regularizers.L1L2(l2=weight_decay)
    return keras.Model(base.input, layers.Dense(nb_class, activation="softmax", kernel_regularizer=penalty)(x))


def _build_resnet(net, nb_class, nb_init_filter, weight_decay, hidden_dropout, options):
    if net not in RESNETS:
        raise InputError(f"--net: Expected one of {', '.join([*_PATCH_NETS, 'yaroslav', *RESNETS])}. Received {net}")
    options |= {"nb_init_filter": nb_init_filter, "weight_decay": weight_decay, "hidden_dropout": hidden_dropout}
    return ResNetBuilder.build((1, None, None), nb_class, *RESNETS[net], **options)


# --- Training in stages ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Train the layers from index `first_layer` on at the rate `lr` until `end_epoch` epochs have run in all.

    `weight_decay` and `dropout` are set on every layer that has an L2 penalty or is a dropout; None leaves them.
    """

    end_epoch: int
    lr: float
    first_layer: int
    weight_decay: float | None = None
    dropout: float | None = None


@dataclass(frozen=True)
class Schedule:
    """Hold what stages are made of, by the names of the options; None leaves what the model was built with.

    Epochs are totals that are reached when a stage ends. The rate of a later stage is `init_lr` times its multiplier.
    """

    nb_epoch: int
    all_layer_epochs: int
    init_lr: float
    all_layer_multiplier: float
    top_layer_epochs: int = 0
    top_layer_multiplier: float = 1.0
    weight_decay: float | None = None
    hidden_dropout: float | None = None
    weight_decay2: float | None = None
    hidden_dropout2: float | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "Schedule":
        """Take the options of a schedule from among others, such as `vars(args)`."""
        return cls(**{field.name: options[field.name] for field in fields(cls) if field.name in options})

    def first_stage(self, first_layer: int) -> Stage:
        """Return the stage that trains the layers from index `first_layer` on until `nb_epoch`."""
        return Stage(self.nb_epoch, self.init_lr, first_layer, self.weight_decay, self.hidden_dropout)

    def later_stage(self, end_epoch: int, multiplier: float, first_layer: int) -> Stage:
        """Return a stage that trains the layers from index `first_layer` on until `end_epoch`."""
        return Stage(end_epoch, self.init_lr * multiplier, first_layer, self.weight_decay2, self.hidden_dropout2)


def freeze_below(model: keras.Model, first_layer: int, frozen_bn: str = "batch") -> None:
    """Train the layers of `model` from index `first_layer` on; freeze those below, nested models whole.

    With `frozen_bn="batch"` a frozen batch normalization keeps gamma and beta but goes on normalising by the
    batch and tracking its moving averages, as in the original; `"inference"` uses the stored averages.
    """
    model.trainable = True
    for index, layer in enumerate(model.layers):
        train = index >= first_layer
        if isinstance(layer, keras.Model):
            freeze_below(layer, 0 if train else len(layer.layers), frozen_bn)
            continue
        is_norm = isinstance(layer, layers.BatchNormalization)
        # Keras runs a frozen batch normalization in inference mode; freezing only its variables does not.
        layer.trainable = train or (is_norm and frozen_bn == "batch")
        for variable in (layer.gamma, layer.beta) if is_norm else ():
            if variable is not None:
                variable.trainable = train


def set_regularization(model: keras.Model, weight_decay: float | None, dropout: float | None) -> None:
    """Set the L2 penalty of all layers that have one, and the rate of all dropout layers; None leaves them.

    Takes effect when the model is compiled next.
    """
    for layer in leaf_layers(model):
        penalty = getattr(layer, "kernel_regularizer", None)
        if weight_decay is not None and hasattr(penalty, "l2"):
            penalty.l2 = weight_decay
        if dropout is not None and isinstance(layer, layers.Dropout):
            set_dropout_rate(layer, dropout)


def train_stages(
    model: keras.Model,
    stages: Sequence[Stage],
    train_set: keras.utils.PyDataset,
    validation_set: keras.utils.PyDataset | tuple,
    *,
    optim: str,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    es_patience: int = 5,
    lr_patience: int = 2,
    class_weight: dict[int, float] | None = None,
    frozen_bn: str = "batch",
    accumulate: int = 1,
    jit: bool = False,
    fitted: keras.Model | None = None,
    state: TrainingState | None = None,
) -> list[dict]:
    """Run the stages one after the other and return the logs of every epoch.

    Each stage has a fresh optimizer and early stopping; one that is cut short leaves its epochs to the next, since
    `end_epoch` is a total. A loss that is not finite ends the training.

    Args:
        train_set: `PyDataset` of (x, y) or (x, y, w).
        validation_set: the same, or arrays.
        class_weight: weight of each class index, for sets without sample weights.
        accumulate: batches to a step of the optimizer; those left over when a stage ends are not used.
        jit: compile the steps with XLA. JAX always does.
        fitted: a model that shares the layers of `model` and is fitted in its place; callbacks see it as theirs, so a
            `BestModel` needs `model_to_save`.
        state: opened; the training goes on from it and saves it. Without one the training cannot be resumed.
    """
    fitted = fitted or model
    state = state or TrainingState()
    if accumulate > 1 and accumulate > len(train_set):
        raise InputError(
            f"--accumulate: Expected at most {len(train_set)}, the training batches of an epoch. Received {accumulate}"
        )
    with training_scope(model):
        for layer in leaf_layers(model):
            if isinstance(layer, layers.Dropout):
                set_dropout_rate(layer, layer.rate)  # makes its random generator, which the state holds
    state.restore(model, callbacks, train_set)
    if state.finished:
        return state.history
    for number, stage in enumerate(stages):
        freeze_below(model, stage.first_layer, frozen_bn)
        with training_scope(model):
            set_regularization(model, stage.weight_decay, stage.dropout)
        if state.has_ended(number, stage.end_epoch):
            continue
        early = keras.callbacks.EarlyStopping(monitor="val_loss", patience=es_patience)
        plateau = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=lr_patience)
        finite = FiniteLoss(train_set)
        watchers = [finite, early, *callbacks, DMFlush(), *([plateau] if optim == "sgd" else []), state]
        with training_scope(model):
            fitted.compile(
                optimizer=create_optimizer(optim, stage.lr, accumulate=accumulate),
                loss=WeightedCrossentropy(),
                metrics=[Accuracy(name="accuracy")],
                jit_compile=jit or keras.backend.backend() == "jax",
            )
        state.begin_stage(number, fitted, watchers)
        with unreadable_images_named(train_set, validation_set), state.watching_signals():
            while not state.has_ended(number, stage.end_epoch):
                if state.awaits_validation:
                    state.validate(even_batches(validation_set, model))
                    continue
                fitted.fit(
                    even_batches(train_set, model),
                    validation_data=even_batches(validation_set, model),
                    initial_epoch=len(state.history),
                    epochs=stage.end_epoch,
                    class_weight=class_weight,
                    shuffle=False,  # the iterators shuffle by their own seed
                    callbacks=watchers,
                    verbose=1 if sys.stdout.isatty() else 2,
                )
        if finite.failed:
            break
    return state.history


@contextmanager
def unreadable_images_named(*sets) -> Iterator[None]:
    """Raise the InputError of a set that could not read an image, where the backend wrapped it in its own error."""
    try:
        yield
    except Exception as error:
        for image_set in sets:
            cause = getattr(image_set, "input_error", None)
            if cause is not None:
                raise cause from error
        raise


def check_top_layer(model: keras.Model, top_layer_nb: int | None) -> None:
    """Raise InputError unless `top_layer_nb` is the index of a layer that a stage can begin to train at."""
    if top_layer_nb is None:
        raise InputError(
            "--top-layer-nb: Expected the index of the first layer to train, since --nb-epoch is above 0. Received "
            "none; give it (2 for whole-image models without a heatmap), or --nb-epoch 0 to train all layers at once"
        )
    if not 0 < top_layer_nb < len(model.layers):
        raise InputError(f"--top-layer-nb: Expected an index of 1 to {len(model.layers) - 1}. Received {top_layer_nb}")


def class_weights(nb_class: int, pos_cls_weight: float, neg_cls_weight: float) -> dict[int, float] | None:
    """Return loss weights by class index: (neg, pos), or (background, malignant, benign)."""
    if pos_cls_weight == neg_cls_weight == 1:
        return None
    if nb_class == 2:
        return {0: neg_cls_weight, 1: pos_cls_weight}
    if nb_class == 3:
        return {0: 1.0, 1: pos_cls_weight, 2: neg_cls_weight}
    raise InputError(
        f"--pos-cls-weight, --neg-cls-weight: Expected 2 or 3 classes. Received {nb_class}; use --auto-batch-balance"
    )


def patch_stages(
    model: keras.Model, schedule: Schedule, *, net: str | None, use_pretrained: bool, top_layer_nb: int | None
) -> list[Stage]:
    """Return the stages of patch training: last layer, top layers, all layers (paper, section on patch training).

    Without pretrained weights (YaroslavNet and ResNetBuilder have none) one stage of `nb_epoch` epochs trains them all.
    """
    if use_pretrained and net not in _PATCH_NETS and top_layer_nb is None:
        print(f"{net or 'the network'} has no ImageNet weights: all layers train from the start", flush=True)
        use_pretrained = False
    if not use_pretrained:
        if max(schedule.top_layer_epochs, schedule.all_layer_epochs) > schedule.nb_epoch:
            print(f"Without ImageNet weights there is one stage, of --nb-epoch {schedule.nb_epoch} epochs", flush=True)
        return [schedule.first_stage(0)]
    check_top_layer(model, top_layer_nb)
    return [
        schedule.first_stage(len(model.layers) - 1),
        schedule.later_stage(schedule.top_layer_epochs, schedule.top_layer_multiplier, top_layer_nb),
        schedule.later_stage(schedule.all_layer_epochs, schedule.all_layer_multiplier, 0),
    ]


def image_stages(model: keras.Model, schedule: Schedule, *, top_layer_nb: int | None) -> list[Stage]:
    """Return the stages of whole-image training: new layers, all layers (paper, section on whole-image training).

    `nb_epoch` 0 leaves out the first, which is finetuning; otherwise `top_layer_nb`, the first new layer, is needed.
    """
    stages = [schedule.later_stage(schedule.all_layer_epochs, schedule.all_layer_multiplier, 0)]
    if schedule.nb_epoch > 0:
        check_top_layer(model, top_layer_nb)
        stages.insert(0, schedule.first_stage(top_layer_nb))
    return stages


# The drivers of the original, for callers in Python. `validation_steps`, `steps_per_epoch` and `nb_worker` are accepted
# and not needed: sets know their own length and workers.


def do_3stage_training(
    model: keras.Model,
    org_model: keras.Model,
    train_generator: keras.utils.PyDataset,
    validation_set: keras.utils.PyDataset | tuple,
    validation_steps: int | None,
    best_model_out: str | Path,
    steps_per_epoch: int | None,
    top_layer_nb: int | None = None,
    net: str | None = None,
    nb_epoch: int = 10,
    top_layer_epochs: int = 0,
    all_layer_epochs: int = 0,
    use_pretrained: bool = True,
    optim: str = "sgd",
    init_lr: float = 0.01,
    top_layer_multiplier: float = 0.01,
    all_layer_multiplier: float = 0.0001,
    es_patience: int = 5,
    lr_patience: int = 2,
    auto_batch_balance: bool = True,
    nb_class: int = 3,
    pos_cls_weight: float = 1.0,
    neg_cls_weight: float = 1.0,
    nb_worker: int = 1,
    weight_decay2: float = 0.01,
    hidden_dropout2: float = 0.0,
    *,
    frozen_bn: str = "batch",
) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Train a patch classifier by `patch_stages`, keeping the model of best validation accuracy in `best_model_out`.

    Stage 1 keeps the weight decay and dropout that the model was built with. "NOSAVE" keeps nothing. Returns (model,
    validation losses, validation accuracies), float64 arrays of one value an epoch.
    """
    options = locals()
    stages = patch_stages(
        model, Schedule.of(options), net=net, use_pretrained=use_pretrained, top_layer_nb=top_layer_nb
    )
    return _train_published(stages, BestModel(best_model_out, "val_accuracy", model_to_save=org_model), options)


def do_2stage_training(
    model: keras.Model,
    org_model: keras.Model,
    train_generator: keras.utils.PyDataset,
    validation_set: keras.utils.PyDataset | tuple,
    validation_steps: int | None,
    best_model_out: str | Path,
    steps_per_epoch: int | None,
    top_layer_nb: int | None = None,
    nb_epoch: int = 10,
    all_layer_epochs: int = 0,
    optim: str = "sgd",
    init_lr: float = 0.01,
    all_layer_multiplier: float = 0.1,
    es_patience: int = 5,
    lr_patience: int = 2,
    auto_batch_balance: bool = True,
    nb_class: int = 2,
    pos_cls_weight: float = 1.0,
    neg_cls_weight: float = 1.0,
    nb_worker: int = 1,
    auc_checkpointer: DMAucModelCheckpoint | None = None,
    weight_decay: float = 0.0001,
    hidden_dropout: float = 0.0,
    weight_decay2: float = 0.0001,
    hidden_dropout2: float = 0.0,
    *,
    frozen_bn: str = "batch",
) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Train a whole-image classifier by `image_stages`, keeping the best model with `auc_checkpointer`.

    Without one, the model of best validation accuracy is kept in `best_model_out`. Returns (model, validation losses,
    validation accuracies), float64 arrays of one value an epoch.
    """
    options = locals()
    stages = image_stages(model, Schedule.of(options), top_layer_nb=top_layer_nb)
    keeper = auc_checkpointer or BestModel(best_model_out, "val_accuracy", model_to_save=org_model)
    return _train_published(stages, keeper, options)


def _train_published(stages, keeper, options) -> tuple[keras.Model, np.ndarray, np.ndarray]:
    """Run the stages by the arguments of a driver; return what it does."""
    weights = [options[name] for name in ("nb_class", "pos_cls_weight", "neg_cls_weight")]
    history = train_stages(
        options["model"],
        stages,
        options["train_generator"],
        options["validation_set"],
        callbacks=[keeper],
        class_weight=None if options["auto_batch_balance"] else class_weights(*weights),
        **{name: options[name] for name in ("optim", "es_patience", "lr_patience", "frozen_bn")},
    )
    losses, accuracies = (np.array([row[name] for row in history]) for name in ("val_loss", "val_accuracy"))
    return options["model"], losses, accuracies
