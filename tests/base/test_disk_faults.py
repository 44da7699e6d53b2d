"""Full disks, files that may not grow, folders that may not be written to: one line, and the old file whole."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from ddsm_train import image_clf_train, sample_patches_combined
from dm_keras_ext import Yaroslav
from mammo.commands import phantom
from mammo.commands.prepare import main as prepare_main
from mammo.train import checkpoint
from tests.faults.commands import ENVIRONMENT, ROOT, damaged, differences
from tests.faults.writers import WRITERS, limited

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def file_system(tmp_path):
    """A file system of 4 MB, where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system can be mounted by the superuser alone")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("faults", [["limit"], ["full", "read-only"]])
def test_no_writer_harms_what_is_there(faults, tmp_path, request):
    folder = tmp_path if faults == ["limit"] else request.getfixturevalue("file_system")
    words = [sys.executable, "-m", "tests.faults.writers", folder, *faults]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert {outcome["writer"] for outcome in outcomes} == set(WRITERS)
    assert {outcome["fault"] for outcome in outcomes} == set(faults)
    reasons = {"limit": "File too large", "full": "No space left on device", "read-only": "Read-only file system"}
    for outcome in outcomes:
        assert outcome["status"] == 1 and outcome["named"], outcome
        assert outcome["error"].count("\n") == 1 and reasons[outcome["fault"]] in outcome["error"], outcome
        assert not outcome["torn"] and not outcome["left"], outcome


# --------------------------------------------------------------------------------------- commands, from start to end


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A phantom data set, and a phantom download, of few patients."""
    folder = tmp_path_factory.mktemp("inputs")
    small = {"patients": 8, "height": 128, "width": 128, "jobs": 1}
    phantom.run(out=str(folder / "phantom"), val_size=0.0, **small)
    phantom.run(out=str(folder / "cbis-ddsm"), layout="cbis-ddsm", oddities="none", **small)
    return folder


def sample(inputs, out):
    phantom = inputs / "phantom"
    paths = (phantom / "roi_mask_path.csv", phantom / "roi_mask", phantom / "pat_train.txt", phantom / "full_img")
    options = "--target-height 128 --patch-size 32 --nb-abn 2 --nb-bkg 2 --val-size 0 --no-verbose"
    return sample_patches_combined.main([*map(str, (*paths, out / "train", out / "val")), *options.split()])


def prepare(inputs, out):
    return prepare_main(["cbis-ddsm", *map(str, (inputs / "cbis-ddsm", out, "--img-size", 48, 40))])


@pytest.mark.parametrize("command", [sample, prepare])
def test_a_command_goes_on_when_there_is_room_again(command, inputs, tmp_path, capsys):
    """The limit grows until it lets the command end: each time another of its files is the first one to be refused."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert command(inputs, whole) == 0
    sizes = sorted({path.stat().st_size for path in whole.rglob("*") if path.is_file()})
    refused = set()
    for room in [size - 1 for size in sizes[:: max(1, len(sizes) // 12)]] + [sizes[-1] - 1]:
        capsys.readouterr()
        with limited(out, room):
            status = command(inputs, out)
        error = capsys.readouterr().err
        assert status == 1 and error.count("\n") == 1 and "File too large" in error, (room, error)
        named = Path(error.strip().rpartition(": ")[2])
        assert (whole / named.relative_to(out)).exists(), error
        refused.add(named.suffix)
        assert not damaged(out) and not list(out.rglob(".partial.*")), room
    assert len(refused) > 1
    assert command(inputs, out) == 0
    assert not differences(whole, out)


@pytest.fixture
def train(inputs, tmp_path):
    """Trains an image classifier on the phantoms for two epochs, in either stage one."""
    patch_model = tmp_path / "patch.h5"
    keras.utils.set_random_seed(1)
    checkpoint.save_model(Yaroslav(classes=5, nb_init_filter=4), patch_model)
    options = {
        "--img-size": (128, 128), "--rescale-factor": 0.003891, "--featurewise-mean": 44, "--optimizer": "adam",
        "--patch-model-state": patch_model, "--patch-net": "yaroslav", "--block-type": "vgg", "--top-depths": 4,
        "--top-repetitions": 1, "--batch-size": 8, "--nb-epoch": 1, "--all-layer-epochs": 2,
    }  # fmt: skip
    words = [word for name, values in options.items() for word in (name, *np.atleast_1d(values))]
    parts = [inputs / "phantom" / part for part in ("train", "test", "test")]

    def run(out):
        keras.utils.clear_session()  # which numbers the names of layers
        models = ("--best-model", out / "best.h5", "--final-model", out / "final.keras")
        return image_clf_train.main([*map(str, (*words, "--deterministic", *models, *parts))])

    return run


@pytest.mark.slow
def test_a_training_goes_on_when_there_is_room_again(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out) == 0
    out.rename(tmp_path / "whole")
    best = (tmp_path / "whole" / "best.h5").stat().st_size
    # Of an epoch the best model is saved before the state, which has the optimizer's variables too.
    for room, refused in ((100, "best/"), (best - 1, "best.h5"), (best + best // 5, "best/state/")):
        capsys.readouterr()
        with limited(out, room):
            status = train(out)
        error = capsys.readouterr().err.splitlines()[-1]
        assert status == 1 and f"{out}/{refused}" in error and "File too large" in error, error
        assert not damaged(out) and not list(out.rglob(".partial.*")), room
    assert train(out) == 0
    assert not differences(tmp_path / "whole", out)


@pytest.mark.parametrize("command", [sample, prepare])
def test_folders_that_may_not_be_written_to_are_named(command, inputs, tmp_path, request, capsys):
    if os.geteuid() == 0:  # who is stopped by no mode
        out = request.getfixturevalue("file_system")
        subprocess.run(["mount", "-o", "remount,ro", out], check=True)
    else:
        out = tmp_path / "closed"
        out.mkdir(mode=0o555)
    assert command(inputs, out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(out) in error, error


def test_the_limit_is_of_the_process(tmp_path):
    """Else the tests above would see no fault."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with limited(tmp_path, 10), pytest.raises(OSError, match="File too large"):
        (tmp_path / "file").write_bytes(bytes(11))
    assert resource.getrlimit(resource.RLIMIT_FSIZE) == before
