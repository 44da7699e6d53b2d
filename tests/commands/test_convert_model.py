"""mammo convert-model: files that Keras itself opens, with the same predictions, or none."""

import gzip
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.commands import convert_model
from mammo.train.checkpoint import load_model
from tests.conftest import SHARED
from tests.train.test_keras2_files import assert_predicts, unpacked

GOLDEN = SHARED / "golden" / "checkpoints"
RELEASED = ("image_d_yaroslav_heatmap_fc16_8_shortcut_stage1", "patch_yaroslav_partfrozen")


@pytest.mark.parametrize("ending", [".h5", ".keras"])
@pytest.mark.parametrize("name", ["sequential_of_base", "names_with_slashes", "arithmetic", "half_precision"])
def test_converted_file_opens_in_keras_itself(tmp_path, capsys, name, ending):
    new = tmp_path / f"new{ending}"
    convert_model.run(source=unpacked(name, tmp_path), target=new)
    assert f"{new}: predicts as" in capsys.readouterr().out
    assert_predicts(keras.models.load_model(new), name)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared is absent")
@pytest.mark.parametrize("name", RELEASED)
def test_released_kinds_predict_as_before(tmp_path, name):
    old, new = tmp_path / "old.h5", tmp_path / "new.keras"
    with gzip.open(GOLDEN / f"{name}.h5.gz") as packed, old.open("wb") as h5:
        shutil.copyfileobj(packed, h5)
    if name.startswith("image"):
        with pytest.raises(ValueError, match="Invalid Functional model configuration"):
            keras.models.load_model(old)
    convert_model.run(source=old, target=new)
    model, written = load_model(old), keras.models.load_model(new)
    x = np.random.default_rng(0).normal(0, 50, (1, *(size or 64 for size in model.input_shape[1:]))).astype(np.float32)
    expected, received = (keras.ops.convert_to_numpy(one(x, training=False)) for one in (model, written))
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


def test_what_would_predict_otherwise_is_not_written(tmp_path, monkeypatch):
    old, new = unpacked("sequential", tmp_path), tmp_path / "new.h5"
    new.write_bytes(b"before")
    opened = keras.models.load_model

    def open_otherwise(*args, **options):
        model = opened(*args, **options)
        model.set_weights([weight + 0.01 for weight in model.get_weights()])
        return model

    monkeypatch.setattr(keras.models, "load_model", open_otherwise)
    with pytest.raises(InputError, match=r"new\.h5: cannot be converted: its predictions would differ by"):
        convert_model.run(source=old, target=new)
    assert new.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == [new, old]


def test_names_that_it_refuses(tmp_path):
    old = unpacked("sequential", tmp_path)
    with pytest.raises(InputError, match="weights alone"):
        convert_model.run(source=old, target=tmp_path / "new.weights.h5")
    with pytest.raises(InputError, match="another file than the one to convert"):
        convert_model.run(source=old, target=old)
    with pytest.raises(InputError, match="unknown model format"):
        convert_model.run(source=old, target=tmp_path / "new.pb")
    with pytest.raises(InputError, match="no file"):
        convert_model.run(source=tmp_path / "none.h5", target=tmp_path / "new.keras")
    assert sorted(tmp_path.iterdir()) == [old]


def test_help_comes_without_keras():
    code = (
        "import sys; from mammo.commands import convert_model as c; c.make_parser(); sys.exit('keras' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
