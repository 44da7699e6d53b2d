"""`mammo evaluate`: what it writes, against figures by hand, and every bad input in one line."""

import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mammo.base.files import InputError
from mammo.commands import evaluate
from mammo.evaluate import evaluation
from mammo.evaluate.inputs import read_images
from tests.helpers import prepared, write_list, write_png

FACTOR, MEAN = 0.003891, 40.0


def make_model(path, gain=0.05, centre=20.0, channels=1, mean=MEAN, classes=("neg", "pos")):
    """A logistic regression on the first pixel, with the options of its training beside it."""
    import keras

    from mammo.train.checkpoint import save_model

    image = keras.Input((8, 6, channels))
    output = keras.layers.Dense(len(classes), activation="softmax")(keras.layers.Flatten()(image))
    model = keras.Model(image, output)
    kernel, bias = (np.zeros(weight.shape, np.float32) for weight in model.weights)
    kernel[0, -1], bias[-1] = gain, -gain * centre
    model.set_weights([kernel, bias])
    save_model(model, path)
    options = {"img_size": [8, 6], "img_scale": None, "rescale_factor": FACTOR, "equalize_hist": False}
    options |= {"featurewise_center": True, "featurewise_mean": mean, "class_list": list(classes)}
    path.with_suffix("").mkdir()
    (path.with_suffix("") / "args.json").write_text(json.dumps(options))
    return path


def expected(files, gain=0.05, centre=20.0, mean=MEAN):
    """Probabilities of `make_model` by hand: single, and the mean over the corners that flips bring to the front."""
    corners = np.array([cv2.imread(str(file), cv2.IMREAD_UNCHANGED)[[0, 0, -1, -1], [0, -1, 0, -1]] for file in files])
    probability = 1 / (1 + np.exp(-gain * (corners * FACTOR - mean - centre)))
    return probability[:, 0], probability.mean(axis=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A prepared data set and three models, one of three channels and another mean."""
    folder = tmp_path_factory.mktemp("trained")
    prepared(folder / "data")
    make_model(folder / "one.h5")
    make_model(folder / "two.h5", gain=-0.02, centre=0)
    make_model(folder / "three.h5", gain=0.1, mean=10.0, channels=3)
    return folder


def load_strictly(path):
    def refuse(name):
        raise AssertionError(f"{path}: {name}")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.filterwarnings("ignore:In the future `np.object`")
def test_models_are_scored_singly_flipped_and_averaged(trained, tmp_path, capsys):
    models = [str(trained / f"{name}.h5") for name in ("one", "two", "three")]
    out, meta = tmp_path / "out", tmp_path / "meta.csv"
    command = [*models, str(trained / "data"), "--flips", "--average", "mean", "--batch-size", "5", "--bootstrap", "50"]
    assert evaluate.main([*command, "--out-dir", str(out), "--metarepository", str(meta)]) == 0
    table = pd.read_csv(out / "predictions.csv")
    names = ["one", "two", "three"]
    flipped = [f"{name}_flips" for name in names]
    assert table.columns.tolist() == [*evaluation.IMAGE_COLUMNS, *names, *flipped, "average", "average_flips"]
    assert len(table) == 12
    for name, options in (("one", {}), ("two", {"gain": -0.02, "centre": 0}), ("three", {"gain": 0.1, "mean": 10.0})):
        single, mean_of_flips = expected(table["file"], **options)
        np.testing.assert_allclose(table[name], single, atol=1e-5)
        np.testing.assert_allclose(table[f"{name}_flips"], mean_of_flips, atol=1e-5)
    np.testing.assert_allclose(table["average"], table[names].mean(axis=1))
    np.testing.assert_allclose(table["average_flips"], table[flipped].mean(axis=1))

    results = load_strictly(out / "evaluation.json")
    assert results["models"] == [*names, *flipped, "average", "average_flips"]
    assert len(results["levels"]["breast"]["comparisons"]) == 8 * 7 / 2
    assert results["data"]["average_weights"]["average"] == pytest.approx(dict.fromkeys(names, 1 / 3))
    assert results["data"]["pixel_options"]["three"]["featurewise_mean"] == 10
    assert {"python", "numpy", "keras"} <= set(results["versions"]) and results["command"]
    truth = table.groupby("patient")["label"].max()
    auc = roc_auc_score(truth, table.groupby("patient")["average"].mean())
    found = results["levels"]["patient"]["models"]["average"]["auc"]["value"]
    assert found == pytest.approx(auc) and 0.5 < auc < 1
    scores = pd.read_csv(out / "scores.csv").set_index(["level", "model"])
    assert scores.loc[("patient", "average"), "auc"] == found
    assert len(pd.read_csv(out / "points.csv")) == 3 * 8 * 4
    assert all(cv2.imread(str(out / f"{name}.png")) is not None for name in ("roc", "pr", "calibration"))
    printed = capsys.readouterr().out
    assert f"{auc:.3f}" in printed and "breast level: 6 breasts (3 with cancer) of 6 patients" in printed
    assert "22 more comparisons of AUCs are in comparisons.csv" in printed
    # What the metarepository's README asks for: these columns, names as in its exam lists, the row number first.
    assert meta.read_text().splitlines()[0] == ",image_index,malignant_pred,malignant_label"
    predictions = pd.read_csv(meta, index_col=0)
    assert predictions["image_index"].tolist() == [Path(file).stem for file in table["file"]]
    np.testing.assert_allclose(predictions["malignant_pred"], table["average_flips"])
    assert predictions["malignant_label"].tolist() == table["label"].tolist()

    # The same from the predictions, without models.
    again = tmp_path / "again"
    assert evaluate.main(["--predictions", f"{out}/predictions.csv", "--out-dir", str(again), "--bootstrap", "50"]) == 0
    assert load_strictly(again / "evaluation.json")["levels"] == results["levels"]


def test_thresholds_and_weights_come_from_validation_images(trained, tmp_path, capsys):
    models, data = [str(trained / f"{name}.h5") for name in ("one", "two")], trained / "data"
    evaluate.run(inputs=[*models, data], val=str(data), average="fitted", out_dir=tmp_path, bootstrap=10, threshold=[])
    results = load_strictly(tmp_path / "evaluation.json")
    val = read_images(data, part="val")
    val["one"], val["two"] = expected(val["file"])[0], expected(val["file"], -0.02, 0)[0]
    weights = evaluation.fit_weights(val, ["one", "two"])
    by_model = results["data"]["average_weights"]["average"]
    assert list(by_model.values()) == pytest.approx(weights, abs=1e-3)
    one, two = by_model.values()
    assert f"average: {one:.3f} x one + {two:.3f} x two\n" in capsys.readouterr().out
    points = results["levels"]["image"]["models"]["one"]["points"]
    chosen = evaluation.OperatingPoints(thresholds=()).choose(val["label"].to_numpy(), val["one"].to_numpy())
    assert {point["name"]: point["threshold"] for point in points} == pytest.approx(chosen, abs=1e-5)
    assert results["data"]["thresholds_from"] == "other images"


def test_unreadable_images_end_the_run_or_are_left_out(trained, tmp_path, capsys):
    prepared(tmp_path / "data", 4)
    bad = tmp_path / "data/test/neg/P_test2_LEFT_CC.png"
    bad.write_bytes(b"no image")
    command = [str(trained / "one.h5"), f"{tmp_path}/data", "--bootstrap", "10", "--out-dir", f"{tmp_path}/out"]
    assert evaluate.main(command) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{evaluate.make_parser().prog}: error: {bad}")
    assert not list((tmp_path / "out").iterdir())
    assert evaluate.main([*command, "--on-error", "skip"]) == 0
    assert f"skipped: {bad}" in (printed := capsys.readouterr().err) and "1 of 8 images skipped" in printed
    results = load_strictly(tmp_path / "out/evaluation.json")
    assert results["data"]["images"] == 7 and str(bad) in results["data"]["skipped"][0]


def test_predictions_are_there_before_they_are_scored(trained, tmp_path, capsys):
    """So that hours of them are not lost where scoring fails, and none beside the results of others."""
    data, out = trained / "data", tmp_path / "out"
    make_model(tmp_path / "diverged.h5", gain=np.nan)
    command = ["--val", str(data), "--bootstrap", "10", "--out-dir", str(out)]
    assert evaluate.main([str(trained / "one.h5"), str(data), *command]) == 0
    scored = load_strictly(out / "evaluation.json")["levels"]
    for name, part in (("predictions", "test"), ("val_predictions", "val")):
        table = pd.read_csv(out / f"{name}.csv")
        assert set(table["file"]) == set(read_images(data, part=part)["file"])
        np.testing.assert_allclose(table["one"], expected(table["file"])[0], atol=1e-5)
    again = ["--predictions", f"{out}/predictions.csv", "--val", f"{out}/val_predictions.csv", "--bootstrap", "10"]
    assert evaluate.main([*again, "--out-dir", f"{tmp_path}/again"]) == 0
    assert load_strictly(tmp_path / "again/evaluation.json")["levels"] == scored

    assert evaluate.main([str(tmp_path / "diverged.h5"), str(data), "--out-dir", str(out)]) == 1
    assert "diverged: Expected finite predictions. Received NaN or infinity for 12" in capsys.readouterr().err
    assert pd.read_csv(out / "predictions.csv")["diverged"].isna().sum() == 12
    assert not (out / "val_predictions.csv").exists() and not (out / "evaluation.json").exists()


def test_the_report_has_figures_and_mammograms(trained, tmp_path, capsys):
    path = tmp_path / "report.html"
    evaluate.run(inputs=[trained / "one.h5", trained / "data"], out_dir=tmp_path, report=path, bootstrap=10)
    assert capsys.readouterr().out.endswith(f"Results are in {tmp_path}, the report in {path}\n")
    page = path.read_text()
    auc = load_strictly(tmp_path / "evaluation.json")["levels"]["breast"]["models"]["one"]["auc"]["value"]
    assert f"{auc:.3f}" in page and page.count("data:image/svg") >= 9 and page.count("data:image/jpeg") >= 2


@pytest.mark.parametrize("option", ["report", "metarepository"])
def test_places_that_cannot_be_written_to_are_told_before_the_scoring(trained, tmp_path, option):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "out.html"
    with pytest.raises(InputError, match=rf"^{path}: cannot be written to \(Not a directory\)$"):
        evaluate.run(inputs=[trained / "one.h5", trained / "data"], out_dir=tmp_path / "out", **{option: path})
    assert not (tmp_path / "out").exists()


def test_classes_of_patch_models_are_added_up(tmp_path):
    classes = ("background", "mal", "ben", "pos")
    make_model(tmp_path / "patch.h5", classes=classes)
    rows = []
    for i, label in enumerate(["background", "mal", "pos", "ben"]):
        write_png(tmp_path / f"{i}.png", 10_000 * i)
        rows.append(f"{i}.png,{label}")
    listed = write_list(tmp_path / "list.csv", rows)
    inputs = [tmp_path / "patch.h5", listed]
    evaluate.run(inputs=inputs, positive=["mal", "pos"], out_dir=tmp_path / "out", bootstrap=10)
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    assert table["label"].tolist() == [0, 1, 1, 0]
    odds = np.exp(0.05 * (np.arange(4) * 10_000 * FACTOR - MEAN - 20))
    np.testing.assert_allclose(table["patch"], (1 + odds) / (3 + odds), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], "Expected MODEL... DATA, or --predictions FILE. Received neither"),
        (["{d}/data"], "Expected MODEL... DATA, or --predictions FILE. Received neither"),
        (["{d}/one.h5", "{d}/data", "--predictions", "a.csv"], "Received both, such as {d}/one.h5"),
        (["--predictions", "{d}/good.csv", "--flips"], "--flips: Expected MODEL... DATA"),
        (["--predictions", "{d}/good.csv", "--image-dir", "{d}"], "--image-dir: Expected MODEL... DATA"),
        (["--predictions", "{d}/good.csv", "--on-error", "skip"], "--on-error: Expected MODEL... DATA"),
        (["--predictions", "{d}/good.csv", "--batch-size", "2"], "--batch-size: Expected MODEL... DATA"),
        (["--predictions", "{d}/good.csv", "--featurewise-mean", "44"], "--featurewise-mean: Expected MODEL... DATA"),
        (["--predictions", "{d}/good.csv", "--no-img-scale"], "--img-scale: Expected MODEL... DATA"),
        (["{d}/unread.h5", "{d}/negative.csv"], "Expected images of both classes. Received 12 with the label 0"),
        (["{d}/one.h5", "{d}/nowhere"], "{d}/nowhere: not found"),
        (["{d}/nothing.h5", "{d}/data"], "{d}/nothing.h5: "),
        (["{d}/one.h5", "{d}/data", "--set", "train"], "no images of the set train"),
        (["{d}/one.h5", "{d}/one.h5", "{d}/data"], "Expected each model once"),
        (["{d}/label.h5", "{d}/data"], "{d}/label.h5: Expected a model file of another name"),
        (["{d}/one.h5", "{d}/average.h5", "{d}/data"], "since average means something else in the results"),
        (["{d}/one_flips.h5", "{d}/data"], "since one_flips means something else in the results"),
        (["{d}/one.h5", "{d}/data", "--average", "fitted"], "--average fitted: Expected --val"),
        (["{d}/one.h5", "{d}/data", "--average", "mean"], "--average: Expected several models. Received {d}/one.h5"),
        (["{d}/one.h5", "{d}/two.h5", "{d}/data", "--metarepository", "{t}/m.csv"], "--metarepository: Expected one"),
        (["{d}/one.h5", "{d}/data", "--positive", "malignant"], "one: no class malignant. Expected neg, pos"),
        (["{d}/one.h5", "{d}/data", "--img-size", "9", "9"], "--img-size 8 6, for which it is built. Received 9 9"),
        (["{d}/one.h5", "{d}/other.h5", "{d}/data"], "other: Expected the classes of one, neg pos. Received a b pos"),
        (["{d}/one.h5", "{d}/data/test", "--class-list", "neg", "maybe"], "maybe: no such class folder"),
        (["--predictions", "{d}/one_class.csv"], "Expected images of both classes. Received 2 with the label 1"),
        (["--predictions", "{d}/nan.csv"], "net: Expected finite predictions. Received NaN or infinity for 1 of 3"),
        (["--predictions", "{d}/good.csv", "--val", "{d}/nan.csv"], "net: Expected finite predictions"),
        (["--predictions", "{d}/good.csv", "--val", "{d}/one_class.csv"], "the image level has no thresholds"),
        (["--predictions", "{d}/good.csv", "--val", "{d}/others.csv"], "others.csv: Expected the models of"),
    ],
)
def test_what_cannot_be_scored_is_one_line(trained, tmp_path, capsys, options, text):
    if not (trained / "other.h5").exists():
        make_model(trained / "other.h5", classes=("a", "b", "pos"))
        for name, rows in {
            "one_class": ["x,1,0.3", "y,1,0.2"],
            "nan": ["x,1,nan", "y,0,0.2", "z,0,0.1"],
            "good": ["x,1,0.4", "y,0,0.2", "z,0,0.1"],
        }.items():
            write_list(trained / f"{name}.csv", rows, "file,label,net")
        files = [path.relative_to(trained) for path in sorted((trained / "data/test").rglob("*.png"))]
        write_list(trained / "negative.csv", [f"{file},0" for file in files])
        write_list(trained / "others.csv", ["x,1,0.4", "y,0,0.2"], "file,label,other")
    places = {"d": trained, "t": tmp_path}
    options = [option.format(**places) for option in options]
    assert evaluate.main([*options, "--out-dir", f"{tmp_path}/out"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"{evaluate.make_parser().prog}: error: ") and text.format(**places) in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "options", [["--sensitivity", "1.2"], ["--bootstrap", "0"], ["--average", "median"], ["--threshold", "nan"]]
)
def test_wrong_options_are_refused(options):
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*options])
    assert exit.value.code == 2


@pytest.mark.slow
def test_checkpoints_give_the_published_programs_predictions(golden, tmp_path):
    """From the command line, on its pixels as 16-bit files: single and mean over the flips."""
    name = "image_e_yaroslav_partfrozen_vgg64x1"
    data = np.load(golden / f"checkpoints/{name}.npz")
    model = tmp_path / "image_e.h5"
    model.write_bytes(gzip.decompress((golden / f"checkpoints/{name}.h5.gz").read_bytes()))
    rows = []
    for i, raw in enumerate(data["raw"]):
        assert cv2.imwrite(str(tmp_path / f"{i}.png"), raw)
        rows.append(f"{i}.png,{i}")
    listed = write_list(tmp_path / "list.csv", rows)
    assert evaluate.main([str(model), str(listed), "--flips", "--out-dir", f"{tmp_path}/out", "--bootstrap", "10"]) == 0
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    np.testing.assert_allclose(table["image_e"], data["predict"][:, 1], atol=1e-4)
    np.testing.assert_allclose(table["image_e_flips"], data["predict_flip_mean"][:, 1], atol=1e-4)
