"""Model files of all kinds that Keras 2 wrote (see tests/reference/make_keras2_files.py) predict as they did there."""

import gzip
import json
import re
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.train.checkpoint import load_model, save_model
from tests.conftest import SHARED
from tests.helpers import ROOT

FILES = ROOT / "tests" / "reference" / "keras2"
NAMES = sorted(path.name.removesuffix(".h5.gz") for path in FILES.glob("*.h5.gz"))
CASES = ("17_sequential_h5", "18_slash_h5", "20_mixed_h5", "21_oplambda_h5", "p4_batchnorm_axis_shared")
# Half precision: Keras 2 itself gives other numbers on another processor (8e-5 for a file of the cases).
TOLERANCES = {"half_precision": 2e-3, "mixed": 5e-4}


def unpacked(name: str, folder: Path) -> Path:
    path = folder / f"{name}.h5"
    path.write_bytes(gzip.decompress((FILES / f"{name}.h5.gz").read_bytes()))
    return path


def assert_predicts(model, name):
    values = np.load(FILES / f"{name}.npz")
    xs = [values[key] for key in sorted(values) if key.startswith("x")]
    received = keras.tree.flatten(model(xs if len(xs) > 1 else xs[0], training=False))
    expected = [values[key] for key in sorted(values) if key.startswith("y")]
    for one, other in zip(received, expected, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(one), other, rtol=0, atol=TOLERANCES.get(name, 1e-5))


@pytest.mark.parametrize("name", NAMES)
def test_file_of_keras_2_predicts_as_it_did(tmp_path, name):
    path = unpacked(name, tmp_path)
    before = path.read_bytes()
    assert_predicts(load_model(path), name)
    assert path.read_bytes() == before


@pytest.mark.parametrize("ending", [".h5", ".keras"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_again_it_predicts_the_same_here_and_in_keras_itself(tmp_path, name, ending):
    path = tmp_path / f"again{ending}"
    save_model(load_model(unpacked(name, tmp_path)), path)
    assert_predicts(load_model(path), name)
    assert_predicts(keras.models.load_model(path, compile=False), name)


@pytest.mark.skipif(not (SHARED / "cases").is_dir(), reason="../shared is absent")
@pytest.mark.parametrize("case", CASES)
def test_files_that_others_could_not_open(case):
    files = sorted((SHARED / "cases" / case / "input").glob("*.h5"))
    assert files
    x = np.load(files[0].parent / "x.npy")
    for path in files:
        received = keras.ops.convert_to_numpy(load_model(path)(x, training=False))
        expected = np.load(path.with_suffix(".npy"))
        np.testing.assert_allclose(received, expected, rtol=0, atol=TOLERANCES.get(path.stem, 1e-5), err_msg=path.name)


def edited(name: str, folder: Path, kind: str, change) -> Path:
    """A file whose first layer of a kind has other settings."""
    path = unpacked(name, folder)
    with h5py.File(path, "r+") as h5:
        description = json.loads(h5.attrs["model_config"])
        change(next(layer for layer in description["config"]["layers"] if layer["class_name"] == kind))
        h5.attrs["model_config"] = json.dumps(description)
    return path


REFUSALS = {
    "function": (
        *("arithmetic", "TFOpLambda", lambda layer: layer["config"].update(function="signal.stft")),
        r"tf\.math\.\w+ \(TFOpLambda\): Keras 3 has not its operation tf\.signal\.stft; .*",
    ),
    "argument": (
        *("arithmetic", "TFOpLambda", lambda layer: layer["inbound_nodes"][0][3].update(odd=[1])),
        r"tf\.math\.\w+ \(TFOpLambda\): tf\.math\.\w+\(.*odd=\[1\]\) cannot be done by Keras 3: .*argument 'odd'",
    ),
    "node": (
        *("nodes_of_a_graph", "TensorFlowOpLayer", lambda layer: layer["config"]["node_def"].update(op="Lgamma")),
        r"tf_op_layer_\w+ \(TensorFlowOpLayer\): Keras 3 has not its operation Lgamma; .*",
    ),
    "setting": (
        *("convolutions", "DepthwiseConv2D", lambda layer: layer["config"].update(groups=2)),
        r"depthwise_conv2d \(DepthwiseConv2D\): Keras 3 has no setting groups for this layer. Received 2",
    ),
    "class": (
        *("convolutions", "LayerNormalization", lambda layer: layer.update(class_name="LocallyConnected2D")),
        r"layer_normalization \(LocallyConnected2D\): Keras 3 has no such layer; .*",
    ),
    "another function of this name": (
        *("recurrent", "GRU", lambda layer: layer["config"].update(recurrent_activation="hard_sigmoid")),
        r"gru\w* \(GRU\): recurrent_activation hard_sigmoid is another function in Keras 3.*",
    ),
    "wrong value": (
        *("convolutions", "UpSampling2D", lambda layer: layer["config"].update(size="a" * 3000)),
        r"up_sampling2d \(UpSampling2D\): .*",
    ),
    "no tensor": (
        *(
            "convolutions",
            "UpSampling2D",
            lambda layer: layer.update(inbound_nodes=[[["_CONSTANT_VALUE", -1, [1], {}]]]),
        ),
        r"up_sampling2d \(UpSampling2D\): Expected tensors of the model. Received numbers",
    ),
    "memory": (
        *("arithmetic", "TFOpLambda"),
        lambda layer: (
            layer["config"].update(function="tile"),
            layer.update(inbound_nodes=[["_CONSTANT_VALUE", -1, [1.0], {"multiples": [10**12]}]]),
        ),
        r".*Expected a tensor of the model. Received numbers",
    ),
    "no input": (
        *("sequential_head", "Conv2D", lambda layer: layer.update(inbound_nodes=[[["nowhere", 0, 0, {}]]])),
        r"trunk_\w+: its inputs come from no layer, or from itself",
    ),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_name_the_layer_and_give_the_whole_reason(tmp_path, reason):
    name, kind, change, message = REFUSALS[reason]
    path = edited(name, tmp_path, kind, change)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert re.fullmatch(
        rf"{re.escape(str(path))}: cannot rebuild the model that it describes: layer {message}", str(caught.value)
    )
    assert len(str(caught.value)) < 1000 + len(str(path))


def test_an_attack_within_a_model_of_keras_2_is_refused(tmp_path):
    """Code in a wrapper, in a nested model, or as a policy."""
    inner = {"class_name": "Lambda", "config": {"name": "f", "function": ["4wEAAAA=", None, None]}}
    for change in (
        lambda layer: layer["config"].update(activation=inner),
        lambda layer: layer["config"].update(dtype={"module": "os", "class_name": "system", "config": {"name": "x"}}),
        lambda layer: layer["config"].update(kernel_initializer={"type": "a", "value": inner}),
    ):
        with pytest.raises(InputError, match="refused, because opening it runs code"):
            load_model(edited("convolutions", tmp_path, "Conv2DTranspose", change))
