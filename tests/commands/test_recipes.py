"""Scripts and recipes: what they compose, that every published row runs, resumes, and stands beside its figure.

Scripts call `python` from PATH. Most tests put a stand-in there that records the command, and writes what a trainer
would; the slow ones run the real trainers on phantoms.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ddsm_train import reproduce as REPRODUCE
from mammo.base.files import InputError
from mammo.data import splits
from mammo.evaluate import published
from mammo.evaluate.published import FIGURES, read_published
from tests.commands.warm import warm_python
from tests.helpers import ROOT, auc_of_pairs, write_picture

CLEARED = (
    *("DATA", "TRAIN_DIR", "VAL_DIR", "TEST_DIR", "RESUME_FROM", "BEST_MODEL", "FINAL_MODEL", "RANDOM_SEED", "MEAN"),
    *("PATIENTS", "FAIL", "INBREAST"),
)
RECIPES = sorted(path for path in ROOT.glob("*/*.sh") if '/recipe.sh"' in path.read_text())
ROWS = read_published()
NAMES = [row.name for row in ROWS]
CELLS = {cells["row"]: cells for cells in csv.DictReader(published.PUBLISHED_TABLE.read_text().splitlines())}

STAND_IN = Path(__file__).with_name("stand_in.py")


class Shell:
    """Run scripts and recipes in a folder, with a stand-in for the `python` that scripts call; keep its commands."""

    def __init__(self, folder, monkeypatch, python=None):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.log, self.python = folder / "commands.jsonl", python or folder / "bin" / "python"
        if python is None:
            self.python.parent.mkdir(parents=True)
            self.python.write_text(f"#!{sys.executable}\n{STAND_IN.read_text()}")
            self.python.chmod(0o755)

    def __call__(self, recipe, *args, status=0, **env):
        """Run a script, or a module, with more environment variables: (commands, standard output, standard error)."""
        self.log.write_text("")
        words, run = list(map(str, args)), self.run_module if hasattr(recipe, "main") else self.run_script
        given = {"PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}", "PYTHON": self.python}
        given |= {"NUM_CPU_CORES": "1", "COMMANDS": self.log} | env
        with self.monkeypatch.context() as patch:
            for name in CLEARED:
                patch.delenv(name, raising=False)
            for name, value in given.items():
                patch.setenv(name, str(value))
            found, output, error = run(recipe, words, patch)
        assert found == status, error
        return [json.loads(line) for line in self.log.read_text().splitlines()], output, error

    def run_script(self, script, words, patch):
        done = subprocess.run([ROOT / script, *words], cwd=self.folder, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    def run_module(self, module, words, patch):
        output, error = io.StringIO(), io.StringIO()
        with chdir(self.folder), redirect_stdout(output), redirect_stderr(error):
            try:
                status = module.main(words)
            except SystemExit as end:
                status = end.code
        return status, output.getvalue(), error.getvalue()

    def options(self, recipe, *args, **env):
        """Return the options of the one command that a script gives, as that command's own parser reads them."""
        [(script, *argv)], *_ = self(recipe, *args, **env)
        return parse(script, argv)


def parse(script, argv):
    from ddsm_train import image_clf_train, patch_clf_train, sample_patches_combined

    modules = image_clf_train, patch_clf_train, sample_patches_combined
    [module] = [module for module in modules if script == Path(module.__file__).name]
    return module.make_parser().parse_args(argv)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    return Shell(tmp_path, monkeypatch)


@pytest.fixture
def prepared(tmp_path):
    """What looks like the folder of prepare_cbis_ddsm.py, without images; and an INbreast folder."""
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "roi_mask_path.csv").touch()
    for part in ("train", "val", "test"):
        (tmp_path / "prepared" / f"pat_{part}.txt").write_text(f"P_{part}\n")
    for i in range(70):
        label = "pos" if i % 3 == 0 else "neg"
        for view in ("CC", "ML"):
            path = tmp_path / "INbreast" / "train" / label / f"{i:08d}{view}_{i:016x}_MG_L_{view}_ANON.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for part in ("val", "test"):
        (tmp_path / "INbreast" / part).mkdir()
    return tmp_path / "prepared"


# ------------------------------------------------------------------------------------------- published figures


def test_figures_are_those_of_the_results_page(spec):
    """Line by line of the page, in its order; two lines of it are two rows each, the hybrid and its extension."""
    text = (spec / "results.md").read_text()
    tables = [
        [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
        for table in re.findall(r"((?:^\|.*\n)+)", text, flags=re.MULTILINE)
    ]
    figures = {row.name: row.figures for row in ROWS}
    for net, *values in tables[0]:
        for patch_set, value in zip(("s10", "s30"), values, strict=True):
            name = f"patch-{net.lower().removesuffix('net')}-{patch_set}"
            assert (figures[name] == {"accuracy": float(value)}) if value != "-" else name not in figures

    expected = []
    for *_, auc, flips, epoch in tables[1]:
        flips, epoch = ({} if flips == "-" else {"auc_flips": float(flips)}), (None if epoch == "-" else int(epoch))
        if "extended" in auc:
            first, extended = re.findall(r"0\.\d+", auc)
            expected += [({"auc": float(first)}, epoch), ({"auc": float(extended), **flips}, None)]
        else:
            expected.append((({} if auc == "-" else {"auc": float(auc)}) | flips, epoch))
    ours = [(row.figures, row.best_epoch) for row in ROWS if row.kind != "patch" and not CELLS[row.name]["patients"]]
    assert ours == expected

    few = re.search(r"20/79: .*", text)[0]
    for patients, *values in re.findall(r"(\d+)/\d+: (\.\d+) (\.\d+) (\.\d+)", few):
        for net, value in zip(("resnet50", "vgg16", "hybrid"), values, strict=True):
            assert figures[f"inbreast-{net}-{patients}-patients"] == {"auc": float(value)}
    assert sum(bool(cells["patients"]) for cells in CELLS.values()) == 15


def test_rows_stand_after_the_rows_they_start_from():
    assert len(set(NAMES)) == len(NAMES)
    for i, row in enumerate(ROWS):
        assert set(row.sources) <= set(NAMES[:i])
        assert row.figures


# ---------------------------------------------------------------------------------------- what recipes compose


@pytest.mark.parametrize(("patch_set", "number"), [("s", 1), ("s10", 10), ("s30", 30)])
def test_sampling_is_the_published_one(shell, prepared, patch_set, number):
    commands, *_ = shell("ddsm_train/sample_patches.sh", patch_set, prepared, "--seed-free-option-s-own", status=0)
    assert [command[-1] for command in commands] == ["--seed-free-option-s-own"] * 3
    for (script, *argv), part in zip(commands, ("train", "val", "test"), strict=True):
        args = parse(script, argv[:-1])
        assert (args.nb_abn, args.nb_bkg, args.nb_hns, args.pos_cutoff) == (number, number, 0, 0.9)
        assert (args.target_height, args.patch_size, args.val_size) == (1152, 224, 0)
        assert args.pat_train_list_file == str(prepared / f"pat_{part}.txt")
        assert args.train_out_dir == str(prepared / f"patches_{patch_set}" / part)


@pytest.mark.parametrize("net", ["resnet50", "vgg16", "vgg19", "yaroslav", "xception", "inception"])
@pytest.mark.parametrize("patch_set", ["s", "s10", "s30"])
def test_patch_training_is_the_published_one(shell, net, patch_set):
    args = shell.options("ddsm_train/train_patch_clf.sh", net, patch_set, "--pretrained-weights", "w/{net}.h5")
    assert [args.train_dir, args.test_dir] == [f"prepared/patches_{patch_set}/{part}" for part in ("train", "test")]
    assert (args.net, args.img_size, args.optim) == (net, [224, 224], "adam")
    assert args.pretrained_weights == f"w/{net}.h5"
    assert args.class_list == ["background", "calc_mal", "calc_ben", "mass_mal", "mass_ben"]
    rates = np.multiply(args.init_lr, [1, args.top_layer_multiplier, args.all_layer_multiplier])
    np.testing.assert_allclose(rates, [1e-3, 1e-4, 1e-5])
    assert (args.weight_decay, args.weight_decay2) == (1e-4, 1e-4)
    if net == "yaroslav":
        assert not args.use_pretrained
    else:
        total = 200 if patch_set == "s" else 50
        assert (args.nb_epoch, args.top_layer_epochs, args.all_layer_epochs) == (3, 13, total)
    check_pixels(args)


def check_pixels(args, mean=52.18):
    assert (args.rescale_factor, args.featurewise_center, args.featurewise_mean) == (0.003891, True, mean)
    assert (args.equalize_hist, args.augmentation, args.auto_batch_balance, args.img_scale) == (False, True, True, None)


TOPS = sorted({(cells["net"], cells["top"]) for cells in CELLS.values() if cells["kind"] == "image"})


@pytest.mark.parametrize(("net", "top"), TOPS)
def test_image_training_is_the_published_one(shell, net, top):
    (shell.folder / "patch.h5").touch()
    args = shell.options("ddsm_train/train_image_clf.sh", net, top, PATCH_MODEL="patch.h5", DATA="data")
    assert (args.train_dir, args.val_dir, args.test_dir) == ("data/train", "data/val", "data/test")
    assert (args.patch_model_state, args.patch_net, args.resume_from) == ("patch.h5", net, None)
    assert (args.img_size, args.class_list) == ([1152, 896], ["neg", "pos"])
    assert args.batch_size * args.train_bs_multiplier == 2
    assert (args.nb_epoch, args.all_layer_epochs, args.weight_decay) == (30, 50, 1e-3)
    np.testing.assert_allclose([args.init_lr, args.init_lr * args.all_layer_multiplier], [1e-4, 1e-5])
    check_pixels(args)

    assert args.add_heatmap == top.startswith("heatmap")
    if dense := re.search(r"fc(\d+)-(\d+)", top):
        assert not args.add_conv
        assert args.add_shortcut
        assert (args.fc_init_units, args.fc_layers) == (int(dense[1]), 2)
        assert int(dense[2]) * 2 == args.fc_init_units
        assert args.hm_pool_size == ([3, 3] if net == "yaroslav" else [5, 5])
        assert (args.avg_pool_size, args.hm_strides) == ([7, 7], [1, 1])
        return
    # The name says the blocks: 1x1, 3x3 and 1x1 widths and repetitions of each, or one width; one block counts twice.
    assert args.add_conv
    if residual := re.findall(r"(\d+)-(\d+)-(\d+)x(\d)", top):
        blocks = [[*map(int, block)] for block in residual]
        assert all(first == middle for first, middle, *_ in blocks)
        enlarged = [depth * args.bottleneck_enlarge_factor for depth in args.top_depths]
        assert enlarged == [last for *_, last, _ in blocks] * (3 - len(blocks))
    else:
        blocks = [[*map(int, block)] for block in re.findall(r"(\d+)x(\d)", top)]
    assert args.block_type == ("resnet" if residual else "vgg")
    assert args.top_depths == [block[0] for block in blocks] * (3 - len(blocks))
    assert args.top_repetitions == [block[-1] for block in blocks] * (3 - len(blocks))


def test_extended_training_takes_all_layers_on(shell):
    args = shell.options("ddsm_train/train_image_clf.sh", "vgg16", "512-512-1024x2", RESUME_FROM="image.h5")
    assert (args.resume_from, args.patch_model_state, args.nb_epoch, args.all_layer_epochs) == ("image.h5", None, 0, 50)


def test_original_names(shell):
    (shell.folder / "prepared" / "models").mkdir(parents=True)
    (shell.folder / "prepared" / "models" / "patch_resnet50_s10.h5").touch()
    args = shell.options("ddsm_train/train_patch_clf_im4096_256_3Cls.sh", "--batch-size", "32", FINAL_MODEL="last.h5")
    assert (args.img_size, args.class_list) == ([256, 256], ["background", "malignant", "benign"])
    assert (args.train_dir, args.net, args.batch_size) == ("prepared/patches_im4096/train", "resnet50", 32)
    assert args.final_model == "last.h5"
    given = {"TRAIN_DIR": "a", "VAL_DIR": "b", "TEST_DIR": "c", "BEST_MODEL": "d.h5"}
    args = shell.options("ddsm_train/train_image_clf_im1152.sh", **given)
    assert (args.train_dir, args.val_dir, args.test_dir, args.best_model) == ("a", "b", "c", "d.h5")
    assert (args.img_size, args.patch_model_state) == ([1152, 896], "prepared/models/patch_resnet50_s10.h5")
    assert (args.top_depths, args.top_repetitions, args.bottleneck_enlarge_factor) == ([512, 512], [2, 2], 2)


@pytest.mark.parametrize("recipe", ["ddsm_train/train_image_clf_inbreast.sh", "inbreast/finetune.sh"])
def test_inbreast_validates_on_val_and_tests_on_test(shell, recipe):
    args, left = [], {}
    if "finetune" in recipe:  # its arguments win over what is left over from another recipe
        args = ["model.h5", "INbreast", "best.h5"]
        left = dict.fromkeys(("TRAIN_DIR", "VAL_DIR", "TEST_DIR", "RESUME_FROM", "BEST_MODEL"), "x")
    args = shell.options(recipe, *args, "--class-list", "neg", "pos", **left)
    assert (args.train_dir, args.val_dir, args.test_dir) == ("INbreast/train", "INbreast/val", "INbreast/test")
    assert (args.nb_epoch, args.all_layer_epochs, args.weight_decay2) == (0, 50, 1e-2)
    assert args.init_lr * args.all_layer_multiplier == pytest.approx(1e-6)
    assert args.resume_from == ("model.h5" if left else "ddsm_vgg16_s10_[512-512-1024]x2_hybrid.h5")
    check_pixels(args, mean=44.33)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_help_and_wrong_arguments(shell, recipe):
    _, text, error = shell(recipe, "-h")
    assert f"{recipe.parent.name}/{recipe.name}" in text
    assert not error
    assert "#" not in text
    link = shell.folder / recipe.name
    link.symlink_to(recipe)
    assert shell(link, "-h")[1] == text
    named = recipe.name in ("sample_patches.sh", "train_patch_clf.sh", "train_image_clf.sh")
    for args in ([[]] if re.search(rf"{recipe.name} [A-Z]", text) else []) + [["resnet50"]] * named:
        _, out, error = shell(recipe, *args, status=2)
        assert (out, error) == ("", text)
    if named:
        _, out, error = shell(recipe, "nonsense", "nonsense", status=2)
        assert out == "" and error.startswith(f"{recipe.name}: error: nonsense: no such ")


def test_there_is_something_to_start_from(shell, prepared):
    *_, error = shell("ddsm_train/train_image_clf.sh", "vgg16", "512x1", status=1)
    assert "prepared/models/patch_vgg16_s10.h5: no such patch classifier" in error
    assert "train_patch_clf.sh vgg16 s10" in error
    *_, error = shell("ddsm_train/sample_patches.sh", "s10", "nowhere", status=1)
    assert error == "sample_patches.sh: error: nowhere: Expected the folder that mammo prepare cbis-ddsm wrote\n"


# ------------------------------------------------------------------------------------------- reproduce_table.sh


def table(out):
    return pd.read_csv(out / "table.csv").set_index(["row", "figure"])


def made(commands):
    """Rows trained, and sets sampled, by their folders."""
    return [
        Path(argv[argv.index("--out-dir") + 1]).name if "--out-dir" in argv else "/".join(Path(argv[4]).parts[-2:])
        for _, *argv in commands
    ]


def test_every_row_is_reproduced_from_shared_parts(shell, prepared):
    """Each training is done once for all rows, with options that the trainers know, and after what it starts from."""
    done = []
    for row in ROWS:
        commands, text, _ = shell(REPRODUCE, row.name, "prepared", "out", INBREAST="INbreast")
        for script, *argv in commands:
            args = parse(script, argv)
            if script == "image_clf_train.py" and row.kind in ("image", "extend", "finetune"):
                model = args.patch_model_state or args.resume_from
                assert model == str(shell.folder / "out" / row.sources[0] / "model.h5")
        done += made(commands)
        assert (shell.folder / "out" / row.name / "metrics.json").exists()
        assert row.name in text
    trained = [row.name for row in ROWS if row.kind != "mean"]
    assert [name for name in done if "/" not in name] == trained
    assert len(done) == len(set(done)) == len(trained) + 2 * 3
    out = table(shell.folder / "out")
    assert set(out.index.get_level_values("row")) == set(NAMES)
    # The figures of the stand-in, beside the published ones; the mean is that of its predictions: 3 pairs of 4 right.
    assert out.loc[("ddsm-vgg16-512x1", "AUC"), ["published", "ours", "difference"]].tolist() == [0.83, 0.8, -0.03]
    assert out.loc[("patch-vgg19-s30", "accuracy"), ["published", "ours", "difference"]].tolist() == [0.89, 0.75, -0.14]
    assert out.loc[("ddsm-mean-of-three", "AUC, four flips"), "difference"] == pytest.approx(0.75 - 0.91)
    assert out.loc[("inbreast-mean-of-two", "AUC"), ["published", "difference"]].isna().all()
    assert (out.test_samples == 4).all()


def test_few_patients_are_chosen_alike(shell, prepared):
    shell(REPRODUCE, "inbreast-vgg16-30-patients", "prepared", "out", INBREAST="INbreast")
    folder = shell.folder / "out" / "inbreast_30_patients"
    patients = (folder / "patients.txt").read_text().split()
    assert len(set(patients)) == 30
    images = {label: sorted((folder / "train" / label).iterdir()) for label in ("neg", "pos")}
    assert {path.name.split("_")[1] for paths in images.values() for path in paths} == set(patients)
    assert (len(images["neg"]), len(images["pos"])) == (40, 20)  # 24 of 70 have cancer, so 10 of 30; two images each
    assert (folder / "test").resolve() == (shell.folder / "INbreast" / "test").resolve()

    # What is no image counts as little as in the training.
    train = shell.folder / "INbreast" / "train"
    for name in (".DS_Store", "Thumbs.db", "._a.png"):
        (train / "neg" / name).touch()
    assert splits.choose_patients(train.parent, shell.folder / "again", 30) == patients
    # As a killed run left it.
    for link in list((shell.folder / "again/train/neg").iterdir())[::2]:
        link.unlink()
    assert splits.choose_patients(train.parent, shell.folder / "again", 30) == patients
    assert len(list((shell.folder / "again/train/neg").iterdir())) == len(images["neg"])
    with pytest.raises(InputError, match=r"again/train/.*: is of another choice"):  # its links would stay
        splits.choose_patients(train.parent, shell.folder / "again", 20)
    with pytest.raises(InputError, match="Expected at least 80 patients"):
        splits.choose_patients(train.parent, shell.folder / "more", 80)
    (train / "neg" / "a.png").touch()
    with pytest.raises(InputError, match=r"a\.png: the name tells no patient"):
        splits.choose_patients(train.parent, shell.folder / "more", 30)


def test_options_reach_their_trainings(shell, prepared):
    options = ["--trust-checkpoint", "--patch", "--pretrained-weights", "w {net}.h5", "--image", "--batch-size", "8"]
    options += ["--inbreast", "--on-error", "skip", "--sample", "--no-segment-breast"]
    commands, *_ = shell(REPRODUCE, "inbreast-vgg16-512x1", "prepared", *options, INBREAST="INbreast")
    *samplings, patch, image, inbreast = [parse(script, argv) for script, *argv in commands]
    assert [args.segment_breast for args in samplings] == [False] * 3
    assert (patch.trust_checkpoint, patch.pretrained_weights, patch.batch_size) == (True, "w vgg16.h5", 64)
    assert (image.trust_checkpoint, image.batch_size, image.on_error) == (True, 8, "stop")
    assert (inbreast.trust_checkpoint, inbreast.batch_size, inbreast.on_error) == (True, 4, "skip")
    assert Path(patch.out_dir) == prepared / "table" / "patch-vgg16-s10"


def test_resuming(shell, prepared):
    row, out = "ddsm-vgg16-512x1", shell.folder / "out"

    def again(*options, **how):
        commands, text, error = shell(REPRODUCE, row, "prepared", "out", *options, **how)
        return made(commands), text, error

    # A command that failed counts for nothing, though its last output is there.
    sampled, patch = [f"patches_s10/{part}" for part in ("train", "val", "test")], "patch-vgg16-s10"
    assert again(status=3, FAIL="patches_s10/test")[0] == sampled
    assert (out / "patches_s10" / "test" / "pat_lst.txt").exists()
    assert again(status=3, FAIL="image_clf_train.py")[0] == [*sampled, patch, row]
    assert (out / row / "metrics.json").exists()
    (out / row / "left over").touch()
    assert again()[0] == [row]
    assert (out / row / "left over").exists()  # what an interrupted training goes on from
    first = (out / "table.csv").read_bytes()
    names, text, _ = again()
    assert names == []
    assert text.count("finished before") == 3
    assert (out / "table.csv").read_bytes() == first

    for name, expected in {row: [row], patch: [patch], "patches_s10": sampled}.items():
        (out / name / "done").unlink()
        assert again()[0] == expected

    # With other options: refused when finished, though only a part of it is, or in training; begun anew when not.
    before = (out / row / "metrics.json").stat().st_mtime_ns
    names, _, error = again("--image", "--batch-size", "8", status=1)
    assert (names, error.count("\n")) == ([], 1)
    assert f"{out / row}: finished with other options" in error
    assert "--batch-size 8" in error
    names, _, error = again("--patch", "--trust-checkpoint", status=1)
    assert (names, f"{out}/patch-vgg16-s10: finished with other options" in error) == ([], True)
    assert (out / row / "metrics.json").stat().st_mtime_ns == before
    (out / row / "done").unlink()
    (out / row / "state").mkdir()
    names, _, error = again("--image", "--batch-size", "8", status=1)
    assert (names, f"{out / row}: begun to train with other options" in error) == ([], True)
    (out / row / "state").rmdir()
    assert again("--image", "--batch-size", "8")[0] == [row]
    assert not (out / row / "left over").exists()
    # Unless all begins anew.
    (out / patch / "left over").touch()
    assert again("--fresh")[0] == [*sampled, patch, row]
    assert not (out / patch / "left over").exists()
    assert again()[0] == []
    assert again("--image", "--fresh", "--batch-size", "8")[0] == [*sampled, patch, row]
    # A patch classifier trained anew with other options makes what stands on it out of date.
    (out / patch / "done").unlink()
    names, _, error = again("--patch", "--trust-checkpoint", "--image", "--batch-size", "8", status=1)
    assert (names, f"{out / row}: finished with other options" in error) == (["patch-vgg16-s10"], True)


def test_other_patients_and_seeds_are_refused(shell, prepared):
    row = "inbreast-vgg16-20-patients"

    def again(status=0, **env):
        commands, _, error = shell(REPRODUCE, row, "prepared", "out", status=status, INBREAST="INbreast", **env)
        return made(commands), error

    def refused(folder, **env):
        names, error = again(1, **env)
        assert (names, error.count("\n")) == ([], 1)
        assert f"{shell.folder / 'out' / folder}: finished with other options or data" in error

    again()
    assert again(RANDOM_SEED="12345") == ([], "")
    refused("patch-vgg16-s10", RANDOM_SEED="1")
    assert [*again(RANDOM_SEED="1", status=1)[0]] == []
    neg = shell.folder / "INbreast" / "train" / "neg"
    (neg / ".DS_Store").touch()
    assert again() == ([], "")
    moved = next(neg.glob("*.png"))
    moved.rename(shell.folder / "INbreast" / "test" / moved.name)
    refused("inbreast_20_patients")
    # Prepared again, on another split: its images and the patches of the first would share patients.
    (prepared / "pat_test.txt").write_text("P_train\n")
    refused("patches_s10")


def test_one_row_at_a_time(shell, prepared):
    hold = "import sys; from mammo.base.files import locked\nwith locked(sys.argv[1]): print(flush=True); input()"
    command = [sys.executable, "-c", hold, shell.folder / "out"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        commands, _, error = shell(REPRODUCE, NAMES[0], "prepared", "out", status=1)
        assert (commands, error.count("\n")) == ([], 1)
        assert f"{shell.folder / 'out'}: " in error and str(other.pid) in error
        other.communicate(b"\n")
    shell(REPRODUCE, NAMES[0], "prepared", "out")


def test_what_is_missing_is_said_before_anything_is_trained(shell, prepared):
    commands, _, error = shell(REPRODUCE, "ddsm-vgg16", "prepared", status=2)
    assert commands == []
    assert error.endswith("error: ddsm-vgg16: no such row. Expected one of mammo reproduce --list\n")
    assert shell(REPRODUCE, "row", "prepared", status=2)[0] == []
    commands, _, error = shell(REPRODUCE, NAMES[0], "nowhere", status=1)
    assert (commands, error.count("\n")) == ([], 1)
    assert f"{shell.folder / 'nowhere'}: no such folder" in error
    for inbreast in ("", "nowhere"):
        commands, _, error = shell(REPRODUCE, "inbreast-mean-of-two", "prepared", status=1, INBREAST=inbreast)
        assert (commands, error.count("\n")) == ([], 1)
        assert "inbreast-vgg16-512x1: Expected the environment variable INBREAST" in error
        assert f"Received '{inbreast}'" in error


@pytest.mark.parametrize(
    "words",
    [["--sample", "--mixed-precision"], ["--image", "--foo"], ["--from-scratch"], ["--patch", "--net", "a b", "c"]],
)
def test_options_are_checked_before_any_work(shell, prepared, words):
    """Also those of a step that would come days later; what one trainer alone takes is not for all."""
    commands, _, error = shell(REPRODUCE, "ddsm-vgg16-512x1", prepared, *words, status=2)
    assert commands == []
    assert "unrecognized arguments" in error


def test_the_list_has_every_row(shell):
    _, text, _ = shell(REPRODUCE, "--list")
    lines = text.splitlines()[2:]
    assert [line.split()[3] for line in lines] == NAMES
    assert "0.885" in lines[NAMES.index("ddsm-mean-of-three")]


# ------------------------------------------------------------------------------------------- made mammograms


def test_patch_or_scratch_goes_on_where_it_was(shell):
    def again(status=0, **env):
        commands, text, error = shell("scripts/patch_or_scratch.sh", shell.folder / "out", status=status, **env)
        return [name for name, *_ in commands if name.endswith(".py") or name.startswith("mammo ")], text, error

    env, made = {"VIRTUAL_ENV": str(shell.folder)}, "mammo phantom"
    prepared, sampling = "mammo prepare", ["sample_patches_combined.py"] * 3
    assert again(status=3, FAIL=made, **env)[0] == [made]
    assert again(status=3, FAIL=prepared, **env)[0] == [made, prepared]
    assert again(status=3, FAIL="patches/test", **env)[0] == [prepared, *sampling]
    trainings = ["patch_clf_train.py", *["image_clf_train.py"] * 3] * 3
    names, text, _ = again(**env)
    assert names == [prepared, *sampling, *trainings]
    assert "Test AUC" in text
    assert len(pd.read_csv(shell.folder / "out" / "results.csv")) == 9
    shutil.rmtree(shell.folder / "out" / "seed_2" / "scratch")
    assert again(**env)[0] == ["image_clf_train.py"]


def test_transfer_or_scratch_goes_on_where_it_was(shell):
    """It takes the film classifiers that are there, and gives the starts the same patients, epochs and pixels."""
    out = shell.folder / "out"
    for i in range(70):
        path = out / "digital" / "train" / ("pos" if i % 3 == 0 else "neg") / f"P_{i:05d}_LEFT_CC.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for part in ("val", "test"):
        (out / "digital" / part).mkdir()

    def again(status=0, **env):
        commands, text, _ = shell("scripts/transfer_or_scratch.sh", out, status=status, **env)
        return [command for command in commands if command[0].endswith(".py")], text

    (out / "sampled").touch()
    env = {"VIRTUAL_ENV": str(shell.folder)}
    failed = again(status=3, FAIL="image_clf_train.py", **env)[0]
    assert [name for name, *_ in failed] == ["patch_clf_train.py", "image_clf_train.py"]
    commands, text = again(**env)
    assert [name for name, *_ in commands].count("patch_clf_train.py") == 2
    args = [parse(name, argv) for name, *argv in commands if "few_patients" in " ".join(argv)]
    assert len(args) == 3 * (3 + 2 + 2)
    starts = {False: {0, 10}, True: {10, 20}}
    for from_scratch, epochs in starts.items():
        assert {a.all_layer_epochs for a in args if a.from_scratch == from_scratch} == epochs
    assert len({(a.featurewise_mean, a.weight_decay2, *a.img_size, a.batch_size, a.nb_epoch) for a in args}) == 1
    for a in args:
        runs = Path(a.resume_from).parent
        few = Path(a.best_model).parent.name.split("-")[1]
        data = out / "digital" if few == "0" else runs / "few_patients" / f"{few}-patients"
        assert (a.train_dir, a.resume_from) == (str(data / "train"), str(runs / "from_patch.h5"))
    assert {Path(a.resume_from).parent.name for a in args} == {"seed_1", "seed_2", "seed_3"}
    assert "on 4 images of 4 patients" in text
    table = pd.read_csv(out / "transfer.csv")
    assert table.groupby(["model", "patients"]).seed.agg(tuple).to_dict() == {
        (model, patients): (1, 2, 3)
        for model in ("finetuned", "scratch", "scratch_long")
        for patients in (0, 20, 60)[model != "finetuned" :]
    }


# ------------------------------------------------------------------------------------------- ours and the mean


def write_run(folder, files, labels, pos, flips=None):
    folder.mkdir(parents=True)
    frame = pd.DataFrame({"file": files, "label": labels, "neg": 1 - np.array(pos), "pos": pos})
    if flips is not None:
        frame["neg_flips"], frame["pos_flips"] = 1 - np.array(flips), flips
    frame.to_csv(folder / "predictions.csv", index=False)
    return folder


def test_the_mean_pairs_images_by_name(tmp_path):
    """Each alone ranks one of four pairs wrong; the mean, once images are paired by name, none."""
    labels, scores, flips = ["neg", "neg", "pos", "pos"], [0.1, 0.5, 0.4, 0.9], [0.1, 0.2, 0.3, 0.4]
    one = write_run(tmp_path / "one", list("abcd"), labels, scores, flips)
    two = write_run(tmp_path / "two", list("dcba"), labels[::-1], [0.5, 0.9, 0.1, 0.6], [0.8, 0.1, 0.6, 0.3])
    published.average_predictions([one, two], tmp_path / "mean")
    frame = pd.read_csv(tmp_path / "mean" / "predictions.csv")
    assert frame.file.tolist() == ["a", "b", "c", "d"]
    np.testing.assert_allclose(frame.pos, [0.35, 0.3, 0.65, 0.7])
    np.testing.assert_allclose(frame.neg, 1 - frame.pos)
    np.testing.assert_allclose(frame.pos_flips, [0.2, 0.4, 0.2, 0.6])
    figures, samples = published.measured(tmp_path / "mean")
    # Of four pairs the flips have (a, c) tied and (b, c) wrong: 2.5 of 4.
    assert (figures, samples) == ({"accuracy": 1.0, "auc": 1.0, "auc_flips": 0.625}, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.iloc[:-1], "Received 3 images instead of 4; d is in"),
        (lambda t: t.replace("d", "e"), "both must be scored on one test set"),
        (lambda t: t.assign(label=["neg", "pos", "pos", "pos"]), "b: Expected the label of .*, neg. Received pos"),
        (lambda t: t.assign(more=0.5), "Expected the columns of .*, label, neg, pos. Received"),
        (lambda t: t.replace("d", "c"), "c stands there twice"),
        (lambda t: t.assign(pos=[0.1, 0.2, 0.3, None]), "Expected a probability in each cell"),
        (lambda t: t.assign(label="none"), "a label has no column of its name"),
        (lambda t: t.drop(columns="file"), "Expected the columns file, label and one a class"),
    ],
)
def test_runs_that_do_not_fit_are_named(tmp_path, change, words):
    args = (["a", "b", "c", "d"], ["neg", "neg", "pos", "pos"], [0.1, 0.5, 0.4, 0.9])
    one, two = write_run(tmp_path / "one", *args), write_run(tmp_path / "two", *args)
    change(pd.read_csv(two / "predictions.csv")).to_csv(two / "predictions.csv", index=False)
    with pytest.raises(InputError, match=words) as caught:
        published.average_predictions([one, two], tmp_path / "mean")
    assert str(two) in str(caught.value)
    assert not (tmp_path / "mean").exists()


def test_runs_that_cannot_be_read_are_named(tmp_path):
    one = write_run(tmp_path / "one", ["a", "b"], ["neg", "pos"], [0.1, 0.5])
    with pytest.raises(InputError, match="at least two runs"):
        published.average_predictions([one], tmp_path / "mean")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "predictions.csv").touch()
    for run in ("none", "empty"):
        with pytest.raises(InputError, match=str(tmp_path / run)):
            published.average_predictions([one, tmp_path / run], tmp_path / "mean")
    row = tmp_path / NAMES[0]
    for text in ("", "[]", '{"single": {}}', '{"single": 1'):
        row.mkdir(exist_ok=True)
        (row / "metrics.json").write_text(text)
        with pytest.raises(InputError, match="not the metrics of a trainer"):
            published.compare(tmp_path, ROWS)


def test_ours_beside_the_published(tmp_path):
    def scores(accuracy, pos):
        return {"accuracy": accuracy, "auc": {"pos": pos} if pos else {"calc_mal": 0.9}, "samples": 376}

    runs = {
        "patch-resnet50-s10": {"single": scores(0.9, None)},
        "ddsm-vgg16-512x1": {"single": scores(0.5, 0.8123456), "flips": scores(0.5, 0.85)},
        "ddsm-vgg16-512x3": {"single": scores(0.5, None)},  # no positive image in the test set
    }
    for name, metrics in runs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    comparisons = published.compare(tmp_path, ROWS)
    published.write_comparison(tmp_path / "table.csv", comparisons)
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "row,figure,published,ours,difference,test_samples",
        "patch-resnet50-s10,accuracy,0.89,0.9,0.01,376",
        "ddsm-vgg16-512x1,AUC,0.83,0.812346,-0.017654,376",
        'ddsm-vgg16-512x1,"AUC, four flips",0.86,0.85,-0.01,376',
    ]
    text = published.comparison_table(comparisons)
    assert "| ddsm-vgg16-512x1   | AUC             | 0.83      | 0.812 | -0.018     | 376      |" in text


# ------------------------------------------------------------------------------------------- the real trainers


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """A folder with `prepared`, two tiny phantoms a set, of all classes of patches to train on, and `INbreast`."""
    from mammo.phantom.draw import draw_patients
    from mammo.phantom.prepared import assign_folders, make_phantom

    root = tmp_path_factory.mktemp("phantoms")
    shares = {"prevalence": 0.5, "benign_rate": 0.5, "test_size": 0.3, "val_size": 0.5}
    people = make_phantom(root / "prepared", patients=6, views=("CC",), height=192, width=160, seed=216, **shares)
    assert people == draw_patients(6, 0.5, 0.5, 216)
    folders = assign_folders(people, 0.3, 0.5, 216)
    for part in ("train", "val", "test"):
        names = sorted(name for name in folders if folders[name] == part)
        (root / "prepared" / f"pat_{part}.txt").write_text("".join(f"{name}\n" for name in names))

    rng = np.random.default_rng(0)
    for name, patients in (("INbreast", 2), ("INbreast20", 22)):
        for part, number in (("train", patients), ("val", 2), ("test", 2)):
            for i in range(number):
                folder = root / name / part / ("pos" if i % 2 else "neg")
                image = rng.integers(0, 2**16, (32, 32)).astype("uint16")
                write_picture(folder / f"{i:08d}{part}_{i:016x}_MG_L_CC_ANON.png", image)
    return root


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    with warm_python(tmp_path_factory.mktemp("python")) as python:
        yield python


# The least images that a top admits, since the feature map is a 32nd of them, of YaroslavNet a 64th, and the heatmap is
# made of 2x2 features, as many as a patch of 64 pixels has. Others: 64 pixels for residual and 128 for VGG blocks.
SIZES = {"heatmap-fc64-32": 192, "heatmap-512-512-1024x2": 64, "heatmap-fc16-8": 256}
# With the stand-in all rows have run. Those left out here differ by their data alone: more patches, other numbers of
# patients, other runs to average (which is no stand-in there), for which both tests would train ResNet50.
DRY = [name for name in NAMES if not re.search("s30|[3-6]0-patients|(vgg16|hybrid)-20-patients|mean-of-three", name)]
OTHERS = [name for name in DRY if "resnet50" not in name]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [[name for name in DRY if "resnet50" in name], OTHERS], ids=["resnet50", "others"])
def test_every_row_runs(phantoms, python, tmp_path, monkeypatch, rows):
    """One training step in each stage of each network, top and start, by the real scripts, at the published rates."""
    import keras

    nets = {"resnet50": "ResNet50", "vgg16": "VGG16", "vgg19": "VGG19"}
    for net in nets.keys() & {CELLS[row]["net"] for row in rows}:
        model = getattr(keras.applications, nets[net])(weights=None, include_top=False)
        model.save_weights(tmp_path / f"{net}.weights.h5")
    shell = Shell(tmp_path, monkeypatch, python)
    for row in rows:
        size = str(SIZES.get(CELLS[row]["top"], 64 if CELLS[row]["net"] == "resnet50" else 128))
        command = [
            row, phantoms / "prepared", tmp_path / "out", "--batch-size", "256",
            "--sample", "--target-height", "192", "--patch-size", "64", "--nb-abn", "1", "--nb-bkg", "1",
            "--patch", "--img-size", "64", "64", "--nb-epoch", "1", "--top-layer-epochs", "2",
            "--all-layer-epochs", "3", "--pretrained-weights", tmp_path / "{net}.weights.h5",
            "--image", "--img-size", size, size, "--avg-pool-size", "2", "2", "--nb-epoch", "1",
            "--all-layer-epochs", "2", "--inbreast", "--img-size", size, size, "--all-layer-epochs", "1",
        ]  # fmt: skip
        inbreast = phantoms / ("INbreast20" if CELLS[row]["patients"] else "INbreast")
        shell(REPRODUCE, *command, INBREAST=inbreast)

    out = table(tmp_path / "out")
    rates = {"patch": [1e-3, 1e-4, 1e-5], "image": [1e-4, 1e-5], "extend": [1e-5, 1e-5], "finetune": [1e-6]}
    for row in rows:
        kind, figure = CELLS[row]["kind"], "accuracy" if CELLS[row]["kind"] == "patch" else "AUC"
        folder = tmp_path / "out" / row
        predictions = pd.read_csv(folder / "predictions.csv")
        if kind == "patch":
            ours = (predictions.set_index(["file", "label"]).idxmax(axis=1) == predictions.label.to_numpy()).mean()
        else:
            ours = auc_of_pairs(*(predictions.pos[predictions.label == label] for label in ("pos", "neg")))
        assert out.loc[(row, figure), "ours"] == pytest.approx(ours, abs=1e-6)
        if kind != "mean":
            expected = [1e-3] if row == "patch-yaroslav-s10" else rates[kind]
            np.testing.assert_allclose(pd.read_csv(folder / "history.csv").learning_rate, expected, rtol=1e-5)
    assert set(FIGURES.values()) == set(out.index.get_level_values("figure"))
