"""mammo predict as its users run it, against the network's own arithmetic in NumPy."""

import csv
import io
import json

import cv2
import keras
import numpy as np
import pytest
from pydicom import Dataset

from mammo.base.files import InputError
from mammo.commands import predict
from mammo.data.own import find_view
from mammo.data.prepare import make_whole
from mammo.evaluate import preflight
from mammo.evaluate.predict import Predictor
from mammo.images import pixels
from mammo.images.reading import read_mammogram
from mammo.train import checkpoint
from tests.helpers import SETTINGS, mammogram, write_dicom

FACTOR, MEAN = SETTINGS["rescale_factor"], SETTINGS["featurewise_mean"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model of images 96 x 72, what its trainer wrote, and a folder of its images."""
    work = tmp_path_factory.mktemp("work")
    inputs = keras.Input((96, 72, 3))
    x = keras.layers.AveragePooling2D(12)(inputs)
    x = keras.layers.Conv2D(4, 1, activation="relu", kernel_initializer=keras.initializers.GlorotUniform(1))(x)
    x = keras.layers.Conv2D(3, (8, 6), kernel_initializer=keras.initializers.GlorotUniform(2))(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(2, activation="softmax", kernel_initializer=keras.initializers.Constant(0.02))(x)
    model = keras.Model(inputs, outputs)
    kernel, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([kernel * [[1, -1], [-2, 1], [1, 2]], bias])
    checkpoint.save_model(model, work / "model.h5")
    (work / "model").mkdir()
    (work / "model" / "args.json").write_text(json.dumps(SETTINGS))
    stats = preflight.pixel_statistics(mammogram(i, ("CC", "MLO")[i % 2]) for i in range(24))
    (work / "model" / "pixel_stats.json").write_text(json.dumps(stats))
    for name, view, left in [("P_1_RIGHT_CC", "CC", False), ("P_1_RIGHT_MLO", "MLO", False), ("odd", "CC", True)]:
        write(work / "images" / f"{name}.png", mammogram(7, view, left))
    return work


def write(path, img):
    """A 16-bit picture of float pixels in 0..255, twice as large."""
    path.parent.mkdir(exist_ok=True)
    assert cv2.imwrite(str(path), np.rint(img / FACTOR).astype(np.uint16).repeat(2, 0).repeat(2, 1))
    return path


def run(capsys, *words):
    """(exit status, rows of the CSV on standard output, standard error)"""
    status = predict.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return status, list(csv.DictReader(io.StringIO(out))), err


def by_hand(work, file, flips=((1, 1),)):
    """The probability of pos by the network's formula, the mean over flips."""
    layers = checkpoint.load_model(work / "model.h5").layers
    first, second, last = (layer.get_weights() for layer in layers if layer.get_weights())
    stored = cv2.resize(cv2.imread(str(file), -1), (72, 96), interpolation=cv2.INTER_CUBIC)
    values = []
    for up, left in flips:
        x = stored[::up, ::left].astype(float) * FACTOR - MEAN
        x = x.reshape(8, 12, 6, 12).mean((1, 3))[..., None].repeat(3, -1)
        x = np.maximum(x @ first[0][0, 0] + first[1], 0)
        x = np.einsum("rcf,rcfo->o", x, second[0]) + second[1]
        logits = x @ last[0] + last[1]
        values.append(np.exp(logits[1]) / np.exp(logits).sum())
    return np.mean(values)


def test_probabilities_are_those_of_the_training_options(work, capsys):
    status, rows, err = run(capsys, work / "model.h5", work / "images", "--batch-size", "2")
    assert status == 0
    assert [row["file"] for row in rows] == [str(path) for path in sorted((work / "images").iterdir())]
    for row in rows:
        assert float(row["pos"]) == pytest.approx(by_hand(work, row["file"]), abs=1e-5)
        assert float(row["neg"]) + float(row["pos"]) == pytest.approx(1, abs=1e-6)
    assert len({row["pos"] for row in rows}) == 3
    assert "args.json" in err
    told = [row["warnings"] for row in rows]
    assert told[:2] == ["", ""]
    assert "points to the left" in told[2]
    assert f"warning: {rows[2]['file']}: {told[2]}" in err


def test_flips_are_averaged(work, capsys):
    _, [row], _ = run(capsys, work / "model.h5", work / "images" / "odd.png", "--flips")
    flips = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    assert float(row["pos"]) == pytest.approx(by_hand(work, row["file"], flips), abs=1e-5)
    assert abs(float(row["pos"]) - by_hand(work, row["file"])) > 1e-3


def test_options_given_win(work, capsys):
    image = work / "images" / "odd.png"
    _, [row], err = run(capsys, work / "model.h5", image, "--featurewise-mean", "10", "--class-list", "no", "yes")
    assert set(row) == {"file", "no", "yes", "warnings"}
    assert abs(float(row["yes"]) - by_hand(work, image)) > 1e-4
    assert "args.json" in err


def test_every_kind_of_file_gives_the_same_pixels(work, capsys, tmp_path):
    stored = cv2.imread(str(work / "images" / "P_1_RIGHT_CC.png"), -1)
    files = [work / "images" / "P_1_RIGHT_CC.png", write_dicom(tmp_path / "a.dcm", stored), tmp_path / "a.tif"]
    cv2.imwrite(str(files[2]), stored)
    named = tmp_path / "dicom_without_ending"
    named.write_bytes(files[1].read_bytes())
    write_dicom(tmp_path / "inverted.dcm", 65535 - stored, PhotometricInterpretation="MONOCHROME1")
    status, rows, _ = run(capsys, work / "model.h5", *files, named, tmp_path / "inverted.dcm")
    assert status == 0
    assert np.ptp([float(row["pos"]) for row in rows]) < 1e-6
    assert all(row["warnings"] == "" for row in rows)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_dicom_files_give_what_the_prepared_image_gives(work, capsys, tmp_path, photometric):
    """Of 14 bits, which the rescale factor of 16-bit images would leave dark."""
    stored = cv2.imread(str(work / "images" / "P_1_RIGHT_CC.png"), -1) >> 2
    dicom = write_dicom(tmp_path / "a.dcm", stored, 14, PhotometricInterpretation=photometric)
    png = tmp_path / "prepared.png"
    assert cv2.imwrite(str(png), make_whole(read_mammogram(dicom)[0], (96, 72)))
    status, rows, _ = run(capsys, work / "model.h5", dicom, png)
    assert status == 0
    assert rows[0]["pos"] == rows[1]["pos"]
    assert abs(float(rows[0]["pos"]) - by_hand(work, png)) < 1e-5
    predictor = Predictor(work / "model.h5")
    for ours, theirs in zip(predictor.explain(dicom)[:2], predictor.explain(png)[:2], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("P_1_LEFT_MLO_2.png", "MLO"),
        ("20586908_6c613a14b80a8591_MG_R_CC_ANON.dcm", "CC"),
        ("20586908_6c613a14b80a8591_MG_L_ML_ANON.png", "MLO"),
        ("20586908_6c613a14b80a8591_MG_L_FB_ANON.png", None),
        ("L_MLO.png", "MLO"),
        ("L_MLO.dcm", "MLO"),  # no DICOM file in truth
        ("7-R-CC-1.png", "CC"),
        ("Mass-Training_P_00001_RIGHT_MLO_1.png", "MLO"),
        ("RightCC.png", "CC"),
        ("all_mlo.png", None),  # the l of another word
        ("L_CCX.png", None),
        ("7.png", None),
    ],
)
def test_views_are_found_in_names(tmp_path, name, view):
    (tmp_path / name).write_text("text")
    assert find_view(tmp_path / name) == view


def test_upside_down_is_told_by_the_view_in_foreign_names_and_headers(work, capsys, tmp_path):
    """The muscle at the bottom: a mistake in an MLO view, within the wide limits for one that is not known."""
    img = mammogram(7, "MLO")[::-1]
    names = ["22580192_5530d5782fc89dd7_MG_R_ML_ANON", "patient7-R_MLO", "x", "7_left_cc"]
    files = [write(tmp_path / f"{name}.png", img) for name in names]
    stored = cv2.imread(str(files[0]), -1)
    codes = [Dataset()]
    codes[0].CodeValue = "R-10226"
    headers = {"a": {"ViewPosition": "MLO"}, "b": {"ViewCodeSequence": codes}, "R_MLO": {"ViewPosition": "CC"}}
    files += [write_dicom(tmp_path / f"{name}.dcm", stored, **tags) for name, tags in headers.items()]
    _, rows, _ = run(capsys, work / "model.h5", *files)
    told = ["upside down" in row["warnings"] for row in rows]
    assert told == [True, True, False, False, True, True, False]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_bad_images_do_not_stop_the_others(work, capsys, tmp_path):
    good = work / "images" / "odd.png"
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:500])
    cv2.imwrite(str(tmp_path / "colour.jpg"), np.random.default_rng(0).integers(0, 255, (96, 72, 3)))
    (tmp_path / "text.dcm").write_text("text")
    bad = [tmp_path / name for name in ("colour.jpg", "cut.png", "empty.png", "text.dcm", "absent.png")]
    status, rows, err = run(capsys, work / "model.h5", bad[0], good, *bad[1:], good, "--batch-size", "1")
    assert status == 1
    assert [row["file"] for row in rows] == [str(good)] * 2
    assert "5 of 7 images at fault" in err
    for path in bad:
        assert err.count(f"  {path}: ") == 1
    status, rows, _ = run(capsys, work / "model.h5", bad[0])
    assert (status, rows) == (1, [])


def test_json_says_how_the_predictions_were_made(work, capsys, tmp_path):
    bad, out = tmp_path / "absent.png", tmp_path / "new" / "out.json"
    files = [work / "images" / "odd.png", bad]
    status, rows, _ = run(capsys, work / "model.h5", *files, "--out", out, "--rescale-factor", "0.0005")
    assert (status, rows) == (1, [])
    content = json.loads(out.read_text())
    assert content["options"] == SETTINGS | {"rescale_factor": 0.0005}
    assert (content["model"], content["flips"]) == (str(work / "model.h5"), False)
    first, second = content["predictions"]
    assert first["file"] == str(files[0])
    assert sum(first["probabilities"].values()) == pytest.approx(1)
    assert ["99th" in first["warnings"][0], "points to" in first["warnings"][1]] == [True, True]
    assert second["file"] == str(bad)
    assert "No such file" in second["fault"]


def test_csv_file_is_that_of_standard_output(work, capsys, tmp_path):
    words = [work / "model.h5", work / "images"]
    _, rows, _ = run(capsys, *words)
    assert run(capsys, *words, "--out", tmp_path / "out.csv")[:2] == (0, [])
    with open(tmp_path / "out.csv", newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_pictures_hold_the_mammogram_and_its_maps(work, capsys, tmp_path):
    other = write(tmp_path / "more" / "odd.png", mammogram(8))
    status, rows, _ = run(capsys, work / "model.h5", work / "images", other, "--overlay", tmp_path / "maps")
    assert (status, len(rows)) == (0, 4)
    names = ["P_1_RIGHT_CC.png", "P_1_RIGHT_MLO.png", "odd.png", "odd_2.png"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == names
    pictures = [cv2.imread(str(tmp_path / "maps" / name)) for name in names]
    assert all(picture.shape[2] == 3 and picture.std() > 20 for picture in pictures)
    assert (pictures[2] != pictures[3]).any()


def test_pictures_never_replace_mammograms(work, capsys):
    before = {path: path.read_bytes() for path in (work / "images").iterdir()}
    status, rows, err = run(capsys, work / "model.h5", work / "images", "--overlay", work / "images")
    assert (status, rows) == (1, [])
    assert "--overlay" in err
    assert {path: path.read_bytes() for path in (work / "images").iterdir()} == before


def test_networks_without_a_feature_map_predict_without_pictures(work, capsys, tmp_path):
    inputs = keras.Input((96, 72, 1))
    x = keras.layers.Reshape((96 * 72,))(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax")(x))
    checkpoint.save_model(model, tmp_path / "flat.keras")
    words = [tmp_path / "flat.keras", work / "images" / "odd.png"]
    status, rows, err = run(capsys, *words, "--overlay", tmp_path / "maps")
    assert (status, len(rows)) == (1, 1)
    assert "no picture" in err
    assert "Grad-CAM" in err
    assert not (tmp_path / "maps").exists()


def test_released_models_get_the_published_options(work, capsys, tmp_path):
    (tmp_path / "released.h5").write_bytes((work / "model.h5").read_bytes())
    image = work / "images" / "P_1_RIGHT_CC.png"
    _, [row], err = run(capsys, tmp_path / "released.h5", image)
    assert "published" in err
    assert "general rules" in err
    predictor = Predictor(tmp_path / "released.h5")
    assert predictor.options == pixels.PUBLISHED_PIXELS | {"img_size": [96, 72]}
    assert predictor.pixels.mean == 52.18
    assert float(row["pos"]) != pytest.approx(by_hand(work, image), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": [96, 80]}, "Expected --img-size 96 72"),
        ({"class_list": ["a", "b", "c"]}, "3 classes"),
        ({"featurewise_mean": None}, "--featurewise-mean"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(work, options, message):
    with pytest.raises(InputError, match=message):
        Predictor(work / "model.h5", options)


@pytest.mark.parametrize(
    ("classes", "input_size", "img_size", "told"),
    [
        (["background", "calc_mal", "mass_mal"], (None, None), [96, 72], True),
        (["neg", "pos", "other"], (96, 72), [96, 72], True),
        (["background", "pos"], (64, 64), [64, 64], True),
        (["neg", "pos"], (None, None), [64, 64], True),
        (["neg", "pos"], (64, 64), [64, 64], False),
        (["neg", "pos"], (None, None), [96, 72], False),
    ],
)
def test_patch_classifiers_are_told(work, capsys, tmp_path, classes, input_size, img_size, told):
    inputs = keras.Input((*input_size, 1))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(len(classes), activation="softmax")(x))
    checkpoint.save_model(model, tmp_path / "net.keras")
    (tmp_path / "net").mkdir()
    settings = SETTINGS | {"class_list": classes, "img_size": img_size}
    (tmp_path / "net" / "args.json").write_text(json.dumps(settings))
    status, rows, err = run(capsys, tmp_path / "net.keras", work / "images" / "odd.png")
    assert (status, len(rows)) == (0, 1)
    lines = [line for line in err.splitlines() if "patch classifier" in line and "ddsm_train/heatmap_score.py" in line]
    assert len(lines) == told


def test_models_of_two_images_are_refused(tmp_path):
    inputs = [keras.Input((8, 8, 1)), keras.Input((8, 8, 1))]
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Concatenate()(inputs))
    checkpoint.save_model(keras.Model(inputs, keras.layers.Dense(2)(x)), tmp_path / "two.keras")
    with pytest.raises(InputError, match="classifier of one image"):
        Predictor(tmp_path / "two.keras")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.h5", "{images}"], "absent.h5"),
        (["{model}", "{empty}"], "no images here"),
        (["{model}", "{images}", "--out", "out.txt"], ".csv or .json"),
        (["{model}", "{images}", "--out", "{model}/out.csv"], "out.csv: cannot be written to (Not a directory)"),
        (["{model}", "{images}", "--overlay", "{model}"], "P_1_RIGHT_CC.png: cannot be written to (Not a directory)"),
    ],
)
def test_mistakes_are_one_line(work, tmp_path, capsys, words, message):
    places = {"model": work / "model.h5", "images": work / "images", "empty": tmp_path}
    status, rows, err = run(capsys, *(word.format(**places) for word in words))
    assert (status, rows) == (1, [])
    assert message in err
    assert err.count("\n") == 1
