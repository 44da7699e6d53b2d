"""What the README tells a researcher to type, typed: finetuning a model of 2017 and scoring it in a notebook."""

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def block(language, containing):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)
    return next(b for b in blocks if containing in b)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


def test_the_inbreast_recipe_is_the_published_command():
    def options(text):
        return re.findall(r"^    (--\S+(?: [^$\"\\\n]*[^$\"\\\s])?)", text, flags=re.MULTILINE)

    published = options(block("shell", "RESUME_FROM"))
    assert len(published) == 27
    assert options((ROOT / "ddsm_train" / "train_image_clf_inbreast.sh").read_text()) == published


@pytest.mark.slow
def test_finetuning_and_scoring_as_written(golden, real_mammograms, tmp_path):
    """The whole path at full size, on one image a class and set; nothing is claimed about the figures."""
    for part in ("train", "val", "test"):
        for name, image in zip(
            ("neg", "pos"), real_mammograms[:2] if part == "train" else real_mammograms[2:4], strict=True
        ):
            folder = tmp_path / "INbreast" / part / name
            folder.mkdir(parents=True)
            (folder / image.name).symlink_to(image)
    checkpoint = tmp_path / "vgg16_512x1.h5"
    with (
        gzip.open(golden / "checkpoints" / "image_b_vgg16_512x1_1152x896.h5.gz") as packed,
        checkpoint.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    before = checkpoint.read_bytes()

    command = block("shell", "RESUME_FROM")
    command = re.sub(r'RESUME_FROM=".*"', f'RESUME_FROM="{checkpoint}"', command)
    command = command.replace("--all-layer-epochs 50", "--all-layer-epochs 1")
    command = command.replace("python image", f"{sys.executable} {ROOT}/ddsm_train/image")
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^AUROC on test set: neg: \S+, pos: \S+, mean: \S+$", done.stdout, flags=re.MULTILINE)
    assert checkpoint.read_bytes() == before

    best = "INbreast/transferred_inbreast_best_model"
    table = pd.read_csv(tmp_path / best / "predictions.csv")
    notebook = block("python", "calc_test_auc")
    notebook = re.sub(r'robust_load_model\(".*"\)', f'robust_load_model("{best}.h5")', notebook)
    notebook = notebook.replace("test_imgen.mean = 52.18", "test_imgen.mean = 44.33").replace("DDSM/", "INbreast/")
    names = {}
    folder = Path.cwd()
    try:
        os.chdir(tmp_path)
        exec(notebook, names)
    finally:
        os.chdir(folder)
    assert names["test_generator"].filenames == table.file.tolist()
    np.testing.assert_allclose(names["y_pred"], table[["neg_flips", "pos_flips"]], atol=1e-5)
    assert names["auc"].shape == (2,)
