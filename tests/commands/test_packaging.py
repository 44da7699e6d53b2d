"""The built wheel, installed into a folder of its own: commands, tables and scripts work without the checkout."""

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from tests.helpers import ROOT, read_csv, write_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the wheel's content in `site`, and a foreign package named as a folder of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = folder / "source"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, source], check=True)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    [built] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", built], check=True, capture_output=True)
    (folder / "foreign/scripts").mkdir(parents=True)
    (folder / "foreign/scripts/__init__.py").touch()
    return folder


@pytest.fixture
def mammo(wheel, tmp_path, monkeypatch):
    """Run the console command in an empty folder, with nothing of the checkout on the path; standard output."""
    monkeypatch.chdir(tmp_path)
    path = f"{wheel / 'foreign'}{os.pathsep}{wheel / 'site'}"
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PATIENTS", "MEAN")}

    def run(*words, **more):
        command = [sys.executable, wheel / "site/bin/mammo", *map(str, words)]
        done = subprocess.run(command, env={**env, "PYTHONPATH": path, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole-image classifier of a few weights."""
    import keras

    image = keras.Input((64, 64, 3))
    hidden = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(image))
    path = tmp_path_factory.mktemp("tiny") / "tiny.keras"
    keras.Model(image, keras.layers.Dense(2, activation="softmax")(hidden)).save(path)
    return path


def test_one_version_for_command_wheel_and_citation(mammo, wheel):
    version = mammo("--version").removeprefix("mammo ").strip()
    assert list(wheel.glob(f"end2end_mammography-{version}-*.whl"))
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_packages_tables_and_scripts_alone(wheel):
    top = {path.name for path in (wheel / "site").iterdir() if not path.name.endswith((".dist-info", "__pycache__"))}
    modules = {path.name for path in ROOT.glob("dm_*.py")}
    assert top == {"bin", "mammo", "ddsm_train", "inbreast"} | modules
    made = {path.relative_to(ROOT) for name in ("ddsm_train", "inbreast") for path in (ROOT / name).glob("*.sh")}
    made |= {path.relative_to(ROOT) for path in (ROOT / "mammo").rglob("*") if path.suffix in (".csv", ".j2")}
    assert made and all((wheel / "site" / path).is_file() for path in made)


def test_its_commands_are_listed_and_find_their_tables(mammo):
    assert "download-models" in mammo("--help")
    assert "drive.google.com/open?id=" in mammo("download-models", "--list")
    assert "mammo reproduce ddsm-vgg16-512x1 DATA" in mammo("reproduce", "--list")


def test_it_predicts(mammo, tiny, tmp_path):
    image = np.random.default_rng(0).integers(0, 2**16, (80, 60)).astype("uint16")
    assert cv2.imwrite(str(tmp_path / "a.png"), image)
    mammo("predict", tiny, tmp_path / "a.png", "--out", "p.csv")
    [row] = read_csv(tmp_path / "p.csv")
    assert row["file"].endswith("a.png")


def test_it_runs_a_recipe(mammo, tiny, tmp_path):
    for seed, part in enumerate(("train", "val", "test")):
        write_images(tmp_path / "data" / part, ("neg", "pos"), 2, seed)
        for label in ("neg", "pos"):
            for i in range(2):
                image = tmp_path / "data" / part / label / f"{i}.png"
                image.rename(image.with_name(f"P_{part}{label}{i}_LEFT_CC.png"))
    text = mammo("subset", "data", tiny, "few", "--img-size", 64, 64, PATIENTS="0")
    assert "tiny" in text
    [row] = read_csv(tmp_path / "few/subset_auc.csv")
    assert (row["model"], row["test_images"]) == ("tiny", "4")


def test_a_reader_that_ends_early_is_no_error(wheel):
    env = {**os.environ, "PYTHONPATH": str(wheel / "site")}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, wheel / "site/bin/mammo", "--help"]
    done = subprocess.run(command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""
