"""The released models: their list, and downloads with a stand-in for gdown that copies files, fails or cheats."""

import gzip
import hashlib
import shutil
import subprocess
import sys
from types import ModuleType

import keras
import pytest

from mammo.base.files import InputError
from mammo.commands import download_models
from mammo.evaluate import published
from mammo.evaluate.published import read_published
from mammo.images.pixels import read_settings
from mammo.train import checkpoint
from tests.helpers import ROOT

IMAGE, PATCH = "ddsm-vgg16-512x1", "patch-vgg16-s10"


# Convolutions of the whole-image networks: those of the patch network and of the top layers.
CONVOLUTIONS = {
    **{"patch-resnet50": 53, "patch-vgg16": 13, "patch-vgg19": 16, "patch-yaroslav": 12},
    **{"resnet50-512-512-1024x2": 67, "vgg16-512x1": 15, "vgg16-512-512-1024x2": 27, "yaroslav-heatmap": 12},
}


def stand_in(path, classes, size, convolutions):
    """A network of that kind, one filter wide."""
    x = inputs = keras.Input((*size, 3))
    for _ in range(convolutions):
        x = keras.layers.Conv2D(1, 1)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    checkpoint.save_model(keras.Model(inputs, keras.layers.Dense(classes)(x)), path)
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """The file of each model, by its name."""
    folder, files = tmp_path_factory.mktemp("drive"), {}
    for kind, count in CONVOLUTIONS.items():
        of_patches = kind.startswith("patch")
        size = (None, None) if of_patches else (1152, 896)
        file = stand_in(folder / f"{kind}.h5", 5 if of_patches else 2, size, count)
        files |= {model.name: file for model in published.read_released() if kind in model.name}
    return files


@pytest.fixture
def drive(originals, monkeypatch):
    """What the stand-in does with the output of a model's name: by default, copy the right file. Keeps the calls."""
    models = {model.drive_id: model for model in published.read_released()}
    calls, behaviour = [], {}

    def download(id, output, quiet):
        model = models[id]
        calls.append(model.name)
        return behaviour.get(model.name, lambda out: shutil.copy(originals[model.name], out))(output)

    gdown = ModuleType("gdown")
    gdown.download = download
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    return calls, behaviour


def fetch(capsys, folder, *names):
    """(exit status, standard output, standard error)"""
    status = download_models.main([*names, "--out-dir", str(folder)])
    return status, *capsys.readouterr()


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.exists() else []


def test_list_names_every_released_model_with_its_figures(capsys):
    assert download_models.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 13
    published = {row.name: row.figures for row in read_published()}
    for line in lines:
        name, role, figures, link = (cell.strip() for cell in line.strip("|").split("|"))
        assert link.startswith("https://drive.google.com/open?id=0B1PVLadG_dCK")
        assert role.startswith("patch" if name.startswith("patch") else "whole-image")
        for value in published[name].values():
            assert f" {value:.2f}" in figures
    assert len({line.rpartition("id=")[2] for line in lines}) == 13
    assert any("four flips 0.96" in line and "INbreast" in line for line in lines)


def test_help_and_list_load_nothing_heavy():
    code = "import sys; from mammo.commands import download_models as d; d.main(['--list']);"
    code += "assert not {'keras', 'tensorflow', 'numpy', 'gdown'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_downloads_are_checked_and_their_checksums_kept(drive, originals, capsys, tmp_path):
    calls, _ = drive
    folder = tmp_path / "new" / "models"
    status, out, err = fetch(capsys, folder, IMAGE, PATCH)
    assert (status, sorted(calls), err) == (0, [IMAGE, PATCH], "")
    assert visible(folder) == ["SHA256SUMS", f"{IMAGE}.h5", f"{PATCH}.h5"]
    assert (folder / f"{IMAGE}.h5").read_bytes() == originals[IMAGE].read_bytes()
    assert f"{IMAGE}.h5: downloaded and checked, 2 classes" in out
    digest = hashlib.sha256(originals[PATCH].read_bytes()).hexdigest()
    assert f"{digest}  {PATCH}.h5\n" in (folder / "SHA256SUMS").read_text()
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    status, out, _ = fetch(capsys, folder, IMAGE, PATCH)
    assert (status, len(calls)) == (0, 2)
    assert f"{IMAGE}.h5: is there, 2 classes" in out


def test_pixel_options_are_those_published_for_each_model(drive, capsys, tmp_path):
    inbreast = "inbreast-vgg16-512x1"
    assert fetch(capsys, tmp_path, IMAGE, PATCH, inbreast)[0] == 0
    read = {name: read_settings(tmp_path / f"{name}.h5") for name in (IMAGE, PATCH, inbreast)}
    assert [read[name]["featurewise_mean"] for name in read] == [52.18, 52.18, 44.33]
    assert [read[name]["img_size"] for name in read] == [[1152, 896], [224, 224], [1152, 896]]
    assert [len(read[name]["class_list"]) for name in read] == [2, 5, 2]
    assert {read[name]["rescale_factor"] for name in read} == {0.003891}
    (tmp_path / "SHA256SUMS").unlink()
    (tmp_path / IMAGE / "args.json").write_text("mine")
    assert fetch(capsys, tmp_path, IMAGE)[0] == 0
    assert (tmp_path / IMAGE / "args.json").read_text() == "mine"


def test_all_are_thirteen(drive, capsys, tmp_path):
    assert fetch(capsys, tmp_path, "--all")[0] == 0
    assert len(drive[0]) == 13
    assert len(visible(tmp_path)) == 14


def test_files_put_there_by_hand_are_checked_and_kept(drive, originals, capsys, tmp_path):
    shutil.copy(originals[IMAGE], tmp_path / f"{IMAGE}.h5")
    shutil.copy(originals[IMAGE], tmp_path / f"{PATCH}.h5")
    status, out, err = fetch(capsys, tmp_path, IMAGE, PATCH)
    assert (status, drive[0]) == (1, [])
    assert f"{IMAGE}.h5: is there" in out
    assert f"{PATCH}.h5: Expected a model of 5 classes" in err
    assert "remove the file" in err
    assert (tmp_path / f"{PATCH}.h5").read_bytes() == originals[IMAGE].read_bytes()
    assert f"{PATCH}.h5" not in (tmp_path / "SHA256SUMS").read_text()


def test_changed_files_are_told_and_kept(drive, originals, capsys, tmp_path):
    fetch(capsys, tmp_path, IMAGE)
    (tmp_path / f"{IMAGE}.h5").write_bytes(originals[PATCH].read_bytes())
    status, _, err = fetch(capsys, tmp_path, IMAGE)
    assert (status, len(drive[0])) == (1, 1)
    assert "not the file that was checked" in err
    assert "if this is the right file, delete its line in SHA256SUMS" in err
    assert hashlib.sha256(originals[PATCH].read_bytes()).hexdigest() in err
    (tmp_path / f"{IMAGE}.h5").unlink()
    assert fetch(capsys, tmp_path, IMAGE)[0] == 0
    assert (tmp_path / f"{IMAGE}.h5").read_bytes() == originals[IMAGE].read_bytes()


@pytest.mark.parametrize(
    ("name", "classes", "size", "convolutions", "message"),
    [
        (IMAGE, 2, (64, 64), 15, "Expected a model of images 1152 x 896. Received one of (64, 64)"),
        (IMAGE, 2, (1152, 896), 4, "Expected a network of vgg16, with its 13 convolutions and those of the top layers"),
        (IMAGE, 2, (1152, 896), 67, "Received one of 67"),
        ("ddsm-resnet50-512-512-1024x2", 2, (1152, 896), 27, "Expected a network of resnet50, with its 53"),
        (PATCH, 5, (None, None), 16, "Expected a network of vgg16, with its 13 convolutions. Received one of 16"),
        (PATCH, 5, (64, 64), 13, None),
        (IMAGE, 2, (None, None), 15, None),
    ],
)
def test_other_networks_put_there_by_hand_are_refused(capsys, tmp_path, name, classes, size, convolutions, message):
    stand_in(tmp_path / f"{name}.h5", classes, size, convolutions)
    status, _, err = fetch(capsys, tmp_path, name)
    assert status == (message is not None)
    assert (tmp_path / "SHA256SUMS").exists() == (message is None)
    assert message is None or message in err.splitlines()[0]


def test_models_of_anything_but_an_image_are_refused(capsys, tmp_path):
    inputs = keras.Input((10,))
    checkpoint.save_model(keras.Model(inputs, keras.layers.Dense(2)(inputs)), tmp_path / f"{IMAGE}.h5")
    status, _, err = fetch(capsys, tmp_path, IMAGE)
    assert status == 1
    assert "Expected a model of one image. Received inputs of shape (None, 10)" in err


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("patch_resnet50", "patch-resnet50-s10"),
        ("patch_vgg16", PATCH),
        ("patch_yaroslav", "patch-yaroslav-s10"),
        ("image_b_vgg16_512x1_1152x896", IMAGE),
    ],
)
def test_networks_of_the_published_program_are_those_expected(golden, tmp_path, source, name):
    path, [model] = tmp_path / "model.h5", [model for model in published.read_released() if model.name == name]
    path.write_bytes(gzip.decompress((golden / "checkpoints" / f"{source}.h5.gz").read_bytes()))
    published.check(path, model)
    other = next(other for other in published.read_released() if role_but_not_net(model, other))
    with pytest.raises(InputError, match="Expected a network of"):
        published.check(path, other)


def role_but_not_net(model, other):
    """Whether two models are for the same use, and one of them alone is built on ResNet50."""
    return model.classes == other.classes and ("resnet50" in model.name) != ("resnet50" in other.name)


QUOTA = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"


def failure(name, message, bases=(Exception,)):
    """What raises an error as one of requests or gdown, after half of a file."""

    def fail(out):
        with open(f"{out}abc.part", "wb") as file:  # gdown's name for what it has so far
            file.write(b"\x89HDF")
        raise type(name, bases, {})(message)

    return fail


def write(content):
    def write_it(out):
        with open(out, "wb") as file:
            file.write(content)
        return out

    return write_it


@pytest.mark.parametrize("kind", ["page", "empty", "truncated", "text", "classes", "refused", "none"])
def test_bad_downloads_leave_nothing_and_do_not_stop_the_others(drive, originals, capsys, tmp_path, kind):
    calls, behaviour = drive
    whole = originals[IMAGE].read_bytes()
    behaviour[IMAGE], message = {
        "page": (write(QUOTA), "a web page instead of the file, which says 'Google Drive - Quota exceeded'"),
        "empty": (write(b""), "empty"),
        "truncated": (write(whole[: len(whole) // 2]), "not kept: the download: "),
        "text": (write(b"Sorry"), "not kept: the download: "),
        "classes": (write(originals[PATCH].read_bytes()), "Expected a model of 2 classes"),
        "refused": (failure("FileURLRetrievalError", "Cannot retrieve\n the link"), "Cannot retrieve the link"),
        "none": (lambda out: None, "asked for too often"),
    }[kind]
    status, _, err = fetch(capsys, tmp_path, IMAGE, PATCH)
    assert (status, sorted(calls)) == (1, [IMAGE, PATCH])
    assert visible(tmp_path) == ["SHA256SUMS", f"{PATCH}.h5"]
    lines = err.splitlines()
    assert lines[0].startswith(f"{IMAGE}: ")
    assert message in lines[0]
    [line] = [line for line in lines if " as " in line]
    link = next(model.link for model in published.read_released() if model.name == IMAGE)
    assert link in line
    assert line.endswith(str(tmp_path / f"{IMAGE}.h5"))


def test_without_internet_the_links_are_said_at_once(drive, originals, capsys, tmp_path):
    calls, behaviour = drive
    shutil.copy(originals[PATCH], tmp_path / f"{PATCH}.h5")
    for model in published.read_released():
        behaviour[model.name] = failure("ConnectionError", "Name or service not known", (OSError,))
    status, out, err = fetch(capsys, tmp_path, "--all")
    assert (status, len(calls)) == (1, 1)
    assert "no connection to Google Drive: Name or service not known" in err
    assert err.count("https://drive.google.com/open?id=") == 12 + 1  # and the folder
    assert len(err.splitlines()) == 12 + 3
    assert f"{PATCH}.h5: is there" in out
    assert visible(tmp_path) == ["SHA256SUMS", f"{PATCH}.h5"]


def test_without_gdown_the_way_to_get_it_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gdown", None)  # importing it fails
    status, _, err = fetch(capsys, tmp_path, IMAGE)
    assert status == 1
    assert "pip install gdown" in err
    assert str(tmp_path / f"{IMAGE}.h5") in err


def test_full_disk_is_no_matter_of_the_model(drive, capsys, tmp_path):
    def full(out):
        raise OSError(28, "No space left on device")

    drive[1][IMAGE] = full
    status, _, err = fetch(capsys, tmp_path, IMAGE, PATCH)
    assert (status, drive[0]) == (1, [IMAGE])
    assert err == f"{sys.argv[0].rpartition('/')[2]}: error: No space left on device: {tmp_path / IMAGE}.h5\n"
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, [], "Expected names of models, or --all"),
        (None, [IMAGE, "--all"], "Expected names of models, or --all"),
        (None, ["resnet"], "resnet: no released model"),
        ("abc\n", [IMAGE], "SHA256SUMS, line 1"),
        ("\ud800", [IMAGE], "SHA256SUMS, line 1"),
    ],
)
def test_mistakes_are_one_line(drive, capsys, tmp_path, content, words, message):
    if content is not None:
        (tmp_path / "SHA256SUMS").write_bytes(content.encode("utf-8", "surrogatepass"))
    status, _, err = fetch(capsys, tmp_path, *words)
    assert (status, drive[0]) == (1, [])
    assert message in err.splitlines()[0]
