"""Finetuning with few patients: nested and stratified subsets, the table, the curve, going on; by a stand-in trainer,
as in `test_recipes`, and once by the real one."""

import shutil

import numpy as np
import pandas as pd
import pytest

from inbreast import subset_experiment
from mammo.base.files import InputError
from mammo.data import splits
from mammo.evaluate import published
from tests.commands.test_recipes import Shell, parse, python, shell, write_run  # noqa: F401  (fixtures)
from tests.helpers import auc_of_pairs, write_picture

MODEL = "ddsm_vgg16_s10_[512-512-1024]x2_hybrid.h5"


@pytest.fixture
def data(tmp_path):
    """Folders as of INbreast: 70 patients to train on, of two or four images; 24 have cancer, in one breast."""
    train = tmp_path / "INbreast" / "train"
    for i in range(70):
        for side in ("L", "R")[: 1 + i % 2]:
            label = "pos" if i % 3 == 0 and side == "L" else "neg"
            for view in ("CC", "ML"):
                path = train / label / f"{i:05d}{side}{view}_{i:016x}_MG_{side}_{view}_ANON.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    for part in ("val", "test"):
        for label in ("neg", "pos"):
            (tmp_path / "INbreast" / part / label).mkdir(parents=True)
    (tmp_path / MODEL).write_text("weights")
    return tmp_path / "INbreast"


def run_again(shell, *options, models=(f"hybrid={MODEL}",), **how):  # noqa: F811
    """(options of the trainings, as their own parser reads them; standard output; standard error)"""
    commands, text, error = shell(subset_experiment, "INbreast", *models, "few", *options, **how)
    return [parse(script, argv) for script, *argv in commands], text, error


def patients_in(folder):
    """Patients of the training images, by label, of a folder of links."""
    names = {label: [path.name for path in (folder / "train" / label).iterdir()] for label in ("neg", "pos")}
    return {label: {name.split("_")[1] for name in names[label]} for label in names}


def test_subsets_are_nested_stratified_and_tested_alike(shell, data):  # noqa: F811
    trained, *_ = run_again(shell)
    assert [args.train_dir for args in trained] == [
        str(shell.folder / "few" / f"{number}-patients" / "train") for number in (20, 30, 40, 50, 60)
    ]
    everyone, smaller = patients_in(data), set()
    for number in (20, 30, 40, 50, 60):
        folder = shell.folder / "few" / f"{number}-patients"
        found = patients_in(folder)
        patients = set().union(*found.values())
        assert patients == set((folder / "patients.txt").read_text().split())
        assert smaller < patients
        assert len(patients) == number
        assert len(found["pos"]) == round(number * 24 / 70)
        # All images of a patient, and no other's.
        for label in ("neg", "pos"):
            assert found[label] == patients & everyone[label]
        for part in ("val", "test"):
            assert (folder / part).resolve() == data / part
        smaller = patients


def test_the_seed_draws_the_patients(shell, data):  # noqa: F811
    drawn = [splits.choose_patients(data, shell.folder / str(seed), 20, seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1]
    trained, *_ = run_again(shell, PATIENTS="20", RANDOM_SEED="2")
    assert (shell.folder / "few" / "20-patients" / "patients.txt").read_text().split() == drawn[1]
    assert len(trained) == 1
    # Other seeds are refused where they would mix.
    _, _, error = run_again(shell, PATIENTS="20", RANDOM_SEED="1", status=1)
    assert "few/20-patients: finished with other options" in error
    few = shell.folder / "few"
    shutil.copytree(few / "hybrid-20-patients", few / "other-20-patients")
    [_], _, error = run_again(shell, "--fresh", PATIENTS="20", RANDOM_SEED="1")
    assert (few / "20-patients" / "patients.txt").read_text().split() == drawn[0]
    assert "few/other-20-patients: left out: trained on others than " in error and error.count("left out") == 1


def test_the_training_is_the_published_one_with_the_options_given(shell, data):  # noqa: F811
    [args], *_ = run_again(shell, "--img-size", "480", "384", "--all-layer-epochs", "3", PATIENTS="30")
    assert (args.img_size, args.nb_epoch, args.all_layer_epochs) == ([480, 384], 0, 3)
    assert args.resume_from == str(shell.folder / MODEL)
    assert (args.init_lr * args.all_layer_multiplier, args.featurewise_mean) == (pytest.approx(1e-6), 44.33)
    assert args.best_model == str(shell.folder / "few" / "hybrid-30-patients" / "model.h5")
    # No patient: the model as it is, on the same test set.
    [args], *_ = run_again(shell, "--all-layer-epochs", "3", PATIENTS="0")
    assert (args.nb_epoch, args.all_layer_epochs, args.test_dir) == (0, 0, str(data / "test"))


def test_one_mean_for_all_subsets(shell, data):  # noqa: F811
    """That measured on all images: a subset has no report of its own."""
    assert "INbreast/report.json: no such file" in run_again(shell, PATIENTS="20", MEAN="report", status=1)[2]
    (data / "report.json").write_text('{\n  "featurewise_mean": 41.25\n}\n')
    trained, *_ = run_again(shell, PATIENTS="0 20", MEAN="report")
    assert [args.featurewise_mean for args in trained] == [41.25, 41.25]
    assert "hybrid-0-patients: finished with other options" in run_again(shell, PATIENTS="0", status=1)[2]


def test_table_and_curve(shell, data, monkeypatch):  # noqa: F811
    """Published figures beside ours, a baseline of another name; the AUC by hand: 3 of 4 pairs are right."""
    run_again(shell, PATIENTS="20 60")
    _, text, _ = run_again(shell, "--from-scratch", models=[f"scratch={MODEL}"], PATIENTS="20")
    table = pd.read_csv(shell.folder / "few" / "subset_auc.csv")
    assert table.model.tolist() == ["hybrid", "hybrid", "scratch"]
    assert table.patients.tolist() == [20, 60, 20]
    assert table.published.tolist()[:2] == [0.89, 0.91]
    assert table.published.isna().tolist() == [False, False, True]
    assert (table[["auc", "auc_flips"]] == 0.75).all(axis=None)
    assert (table[["test_images", "test_patients"]] == 4).all(axis=None)
    for number, images in table.groupby("patients").images:
        folder = shell.folder / "few" / f"{number}-patients" / "train"
        assert set(images) == {len(list(folder.glob("*/*.png")))}
    assert "hybrid" in text
    assert (shell.folder / "few" / "subset_auc.png").read_bytes().startswith(b"\x89PNG")


def write_scored(folder, *predictions):
    (write_run(folder, *predictions) / "metrics.json").write_text("{}")


def test_intervals_are_by_patient(tmp_path):
    """Each image twice, under one patient: the interval must be that of the single images, of which there are as many
    patients; counted as independent images it would be narrower."""
    rng = np.random.default_rng(0)
    labels = ["neg", "pos"] * 20
    pos = np.where(np.array(labels) == "pos", 0.6, 0.4) + rng.normal(0, 0.2, 40)
    names = [f"{label}/P_{i:05d}_LEFT_{{}}.png" for i, label in enumerate(labels)]
    write_scored(tmp_path / "once-20-patients", [name.format("CC") for name in names], labels, pos)
    twice = [name.format(view) for view in ("CC", "MLO") for name in names]
    write_scored(tmp_path / "twice-20-patients", twice, labels * 2, [*pos, *pos])
    alone = [f"{label}/P_{i:05d}_LEFT_CC.png" for i, label in enumerate(labels * 2)]
    write_scored(tmp_path / "independent-20-patients", alone, labels * 2, [*pos, *pos])
    table = published.subset_table(tmp_path).set_index("model")
    assert table.test_patients.to_dict() == {"independent": 80, "once": 40, "twice": 40}
    np.testing.assert_allclose(table.auc, table.auc["once"], rtol=1e-12)
    np.testing.assert_allclose(table.low["twice"], table.low["once"], rtol=1e-6)
    np.testing.assert_allclose(table.high["twice"], table.high["once"], rtol=1e-6)
    assert table.low["independent"] > table.low["once"] + 0.02
    assert "auc_flips" not in table
    assert table.published.isna().all()
    assert "None" not in table.to_string()


def test_it_goes_on_where_it_was(shell, data):  # noqa: F811
    def trained(**how):
        return [args.train_dir.split("/")[-2] for args in run_again(shell, PATIENTS="20 30 40", **how)[0]]

    names = ["20-patients", "30-patients", "40-patients"]
    assert trained(FAIL="hybrid-30-patients/model", status=3) == names[:2]
    assert not (shell.folder / "few" / "subset_auc.csv").exists()
    before = (shell.folder / "few" / "20-patients" / "patients.txt").stat().st_mtime_ns
    assert trained() == names[1:]
    first = (shell.folder / "few" / "subset_auc.csv").read_bytes()
    assert trained() == []
    assert (shell.folder / "few" / "subset_auc.csv").read_bytes() == first
    assert (shell.folder / "few" / "20-patients" / "patients.txt").stat().st_mtime_ns == before
    # Finished with other options, another model or other images: refused in a line.
    assert "--batch-size 8" in run_again(shell, "--batch-size", "8", PATIENTS="20", status=1)[2]
    (shell.folder / MODEL).write_text("other weights")
    assert "few/hybrid-20-patients: finished with other" in run_again(shell, PATIENTS="20", status=1)[2]
    next((data / "train" / "neg").iterdir()).unlink()
    trainings, _, error = run_again(shell, PATIENTS="20", status=1)
    assert (trainings, error.count("\n")) == ([], 1)
    assert "few/20-patients: finished with other" in error


@pytest.mark.parametrize(
    ("words", "env", "status", "says"),
    [
        (["nowhere", MODEL, "few"], {}, 1, "nowhere/train: no such folder. Expected train, val and test"),
        (["INbreast", "none.h5", "few"], {}, 1, "none.h5: no such model"),
        (["INbreast", "a=none.h5", "few"], {}, 1, "none.h5: no such model"),
        (["INbreast", f"={MODEL}", "few"], {}, 2, "Expected FILE or NAME=FILE"),
        (["INbreast", f"a={MODEL}", f"a={MODEL}", "few"], {}, 2, "a: two models of this name"),
        (["INbreast", MODEL, "few"], {"PATIENTS": "20 -1"}, 2, "PATIENTS: Expected whole numbers. Received -1"),
        (["INbreast", MODEL, "few"], {"PATIENTS": "20 80"}, 1, "Expected at least 80 patients. Received 70"),
        (["INbreast", MODEL, "few"], {"PATIENTS": "1"}, 1, "24 of 70 patients have cancer. Expected a number of pat"),
        (["INbreast", MODEL, "few", "--foo"], {}, 2, "unrecognized arguments: --foo"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(shell, data, words, env, status, says):  # noqa: F811
    commands, _, error = shell(subset_experiment, *words, status=status, **env)
    assert commands == []
    assert says in error.splitlines()[-1]


def test_patients_are_told_by_both_forms_of_names():
    for name, patient in {
        "a/20588072_024ee3569b2605dc_MG_L_ML_ANON.png": "024ee3569b2605dc",
        "P_00001_LEFT_CC.png": "P_00001",
        "pos/024ee3569b2605dc_RIGHT_MLO_2.png": "024ee3569b2605dc",
    }.items():
        assert splits.patient_of(name) == patient
    with pytest.raises(InputError, match=r"x\.png: the name tells no patient"):
        splits.patient_of("x.png")


def test_a_folder_without_trainings_is_named(tmp_path):
    with pytest.raises(InputError, match="Expected the output folder of mammo subset"):
        published.subset_table(tmp_path)


@pytest.mark.slow
def test_by_the_real_trainer(python, tmp_path, monkeypatch):  # noqa: F811
    """One epoch of a tiny network on tiny images, in a run of the script as a user gives it: finetuned and as it is."""
    import keras

    rng = np.random.default_rng(0)
    for part, patients in (("train", 4), ("val", 2), ("test", 4)):
        for i in range(patients):
            for view in ("CC", "MLO"):
                path = tmp_path / "data" / part / ("pos" if i % 2 else "neg") / f"P_{part}{i}_LEFT_{view}.png"
                write_picture(path, rng.integers(0, 2**16, (32, 32)).astype("uint16"))
    image = keras.Input((32, 32, 3))
    hidden = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(image))
    keras.Model(image, keras.layers.Dense(2, activation="softmax")(hidden)).save(tmp_path / "tiny.keras")
    words = [tmp_path / "data", tmp_path / "tiny.keras", tmp_path / "few", "--img-size", "32", "32"]
    Shell(tmp_path, monkeypatch, python)(subset_experiment, *words, "--all-layer-epochs", "1", PATIENTS="0 2")
    table = pd.read_csv(tmp_path / "few" / "subset_auc.csv")
    columns = ["model", "patients", "images", "test_images", "test_patients"]
    assert table[columns].to_numpy().tolist() == [["tiny", 0, 0, 8, 4], ["tiny", 2, 4, 8, 4]]
    for patients in (0, 2):
        predictions = pd.read_csv(tmp_path / "few" / f"tiny-{patients}-patients" / "predictions.csv")
        auc = auc_of_pairs(*(predictions.pos[predictions.label == label] for label in ("pos", "neg")))
        assert table.auc[table.patients == patients].item() == pytest.approx(auc, abs=1e-6)
