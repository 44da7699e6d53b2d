"""Small networks, and a stand-in for Keras's compile and fit: what tests of networks and of stages share."""

import gzip
from contextlib import contextmanager

import keras
import pytest
from keras import layers

from dm_keras_ext import do_2stage_training
from mammo.train import callbacks, scoring
from mammo.train.checkpoint import leaf_layers

EAGER = {"run_eagerly": True} if keras.backend.backend() == "tensorflow" else {}


@contextmanager
def quick_training():
    """Train small networks quickly: steps are run, not traced and compiled first, and no picture is drawn."""
    compile_model = keras.Model.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "compile", lambda *args, **kwargs: compile_model(*args, **EAGER | kwargs))
        patch.setattr(callbacks, "plot_history", lambda *args: None)
        patch.setattr(scoring, "plot_roc", lambda *args: None)
        yield


def outputs(model, x):
    """Return what a model gives for a batch, without the time that `predict` takes to trace it first."""
    given = [x] if isinstance(model.input, list) and not isinstance(x, list) else x  # files of Keras 2 list one input
    return keras.tree.map_structure(keras.ops.convert_to_numpy, model(given, training=False))


class Batches(keras.utils.PyDataset):
    """Arrays of samples, in order, in batches of `size`."""

    def __init__(self, arrays, size):
        super().__init__()
        self.arrays = arrays
        self.size = size

    def __len__(self):
        return -(-len(self.arrays[0]) // self.size)

    def __getitem__(self, index):
        return tuple(array[index * self.size : (index + 1) * self.size].copy() for array in self.arrays)


class Script:
    """Stand-in for `Model.compile` and `Model.fit`: records what a stage asks for and plays back epochs run."""

    def __init__(self, monkeypatch, epochs_run):
        self.events = []
        self.epochs_run = iter(epochs_run)
        monkeypatch.setattr(keras.Model, "compile", lambda model, **kwargs: self.compile(model, **kwargs))
        monkeypatch.setattr(keras.Model, "fit", lambda model, *args, **kwargs: self.fit(model, *args, **kwargs))

    def compile(self, model, optimizer, loss, metrics, jit_compile):
        leaves = list(leaf_layers(model))
        self.events.append(
            {
                "optimizer": type(optimizer).__name__.removeprefix("_"),
                "lr": float(optimizer.learning_rate),
                "n_trainable_tensors": len(model.trainable_weights),
                "l2_attrs": sorted(
                    {leaf.kernel_regularizer.l2 for leaf in leaves if getattr(leaf, "kernel_regularizer", None)}
                ),
                "rates": sorted({leaf.rate for leaf in leaves if isinstance(leaf, layers.Dropout)}),
            }
        )

    def fit(self, model, *args, **kwargs):
        self.events.append(kwargs)
        run = next(self.epochs_run)
        state = kwargs["callbacks"][-1]
        keras.callbacks.CallbackList(kwargs["callbacks"], model=model).on_train_begin()
        for i in range(run):
            model.stop_training = i == run - 1  # early stopping, or the stage is over anyway
            state.on_epoch_begin(i)
            state.on_epoch_end(i, dict.fromkeys(("loss", "accuracy", "val_loss", "val_accuracy"), 0.5))


def assert_same_stages(events, recorded):
    """Compare with the published program's own compile and fit calls; it also calls fit for stages of no epochs."""
    fits = [i for i, event in enumerate(recorded) if event.get("epochs_run_in_script", 0) > 0]
    recorded = [event for i in fits for event in recorded[i - 1 : i + 1]]
    assert len(events) == len(recorded)
    for ours, theirs in zip(events, recorded, strict=True):
        if theirs["event"] == "compile":
            assert ours["optimizer"] == theirs["optimizer"]
            for name in ("lr", "n_trainable_tensors", "l2_attrs"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
            # Without a dropout layer the published program set the rate of the pooling layer, to no effect.
            assert ours["rates"] in ([], pytest.approx(theirs["rates"]))
        else:
            assert (ours["initial_epoch"], ours["epochs"]) == (theirs["initial_epoch"], theirs["epochs"])
            weights = theirs["class_weight"]
            assert ours["class_weight"] == (weights and {int(k): v for k, v in weights.items()})
            kinds = {c["cls"]: c for c in theirs["callbacks"]}
            early = next(c for c in ours["callbacks"] if isinstance(c, keras.callbacks.EarlyStopping))
            assert (early.monitor, early.patience) == ("val_loss", kinds["EarlyStopping"]["patience"])
            plateaus = [c for c in ours["callbacks"] if isinstance(c, keras.callbacks.ReduceLROnPlateau)]
            assert [(c.factor, c.patience) for c in plateaus] == [
                (c["factor"], c["patience"]) for c in theirs["callbacks"] if c["cls"] == "ReduceLROnPlateau"
            ]


def check_two_stages(model, top_layer_nb, recorded, monkeypatch):
    """Hold whole-image training, with the options of the recorded runs, to one of them; the validation losses."""
    script = Script(monkeypatch, [2, 4])
    options = {"nb_epoch": 3, "all_layer_epochs": 6, "optim": "adam", "init_lr": 0.001, "all_layer_multiplier": 0.1}
    options |= {"weight_decay": 0.005, "hidden_dropout": 0.3, "weight_decay2": 0.05, "hidden_dropout2": 0.15}
    _, losses, _ = do_2stage_training(
        model, model, None, None, None, "NOSAVE", None, top_layer_nb=top_layer_nb, **options
    )
    assert_same_stages(script.events, recorded)
    return losses


def load_patch_net(folder, name, tmp_path):
    """The patch files hold flat networks, which Keras opens as they are."""
    path = tmp_path / f"{name}.h5"
    path.write_bytes(gzip.decompress((folder / f"{name}.h5.gz").read_bytes()))
    return keras.models.load_model(path, compile=False)


def make_patch_net(channels=1, dropout=None, average_pool=False, size=(None, None), seed=0):
    """A small VGG-like classifier of three classes, down-sampling by four."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((*size, channels))
    x = image
    for i, filters in enumerate([4, 6], start=1):
        x = layers.Conv2D(filters, 3, padding="same", name=f"block{i}_conv1")(x)
        x = layers.BatchNormalization()(x)
        x = layers.Activation("relu")(x)
        x = layers.MaxPooling2D(name=f"block{i}_pool")(x)
    if average_pool:
        x = layers.AveragePooling2D((3, 3))(x)
    x = layers.GlobalAveragePooling2D()(x)
    if dropout is not None:
        x = layers.Dropout(dropout)(x)
    return keras.Model(image, layers.Dense(3, activation="softmax", bias_initializer="normal")(x))
