"""Scores of images, breasts and patients: by hand, by other libraries, and from the command line on every bad input."""

import gzip
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, rankdata
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from mammo.base.files import InputError
from mammo.base.statistics import average_precision, cumulative_counts
from mammo.commands import evaluate
from mammo.data.prepare import ImageRow, write_image_table
from mammo.evaluate import evaluation
from mammo.evaluate.inputs import name_models, read_images, read_predictions

REFERENCE = Path(__file__).parents[1] / "reference"
NO_POINTS = evaluation.OperatingPoints(False, (), (), ())


def study(patients=40, models=("a", "b"), seed=0, effect=1.2):
    """A table of both breasts of each patient in both views: cancers in a fifth of the breasts, related scores."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(patients):
        shared = rng.normal(0, 0.6)
        for side in ("LEFT", "RIGHT"):
            cancer = int(rng.random() < 0.2)
            for view in ("CC", "MLO"):
                logits = effect * cancer - 0.8 + shared + rng.normal(0, 1, len(models))
                name = f"P_{number:03}_{side}_{view}.png"
                rows.append((name, f"P_{number:03}", side, view, cancer, *(1 / (1 + np.exp(-logits)))))
    return pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, *models])


def auc_of(truth, score):
    positive = rankdata(score)[truth == 1]
    return (positive.sum() - len(positive) * (len(positive) + 1) / 2) / len(positive) / (truth == 0).sum()


def precision_of(truth, score):
    """Average precision, the same as scikit-learn's (see test_statistics), which takes long for thousands of draws."""
    return average_precision(*cumulative_counts(truth, score)[1:])


def image_level(table, models, replicates):
    return evaluation.evaluate_models(table, models, NO_POINTS, replicates=replicates)["levels"]["image"]


# -------------------------------------------------------------------------------------------------------- levels


def test_breasts_and_patients_by_hand():
    rows = [
        ("1.png", "B", "LEFT", "CC", 0, 0.1),
        ("2.png", "B", "LEFT", "MLO", 0, 0.3),
        ("3.png", "A", "LEFT", "CC", 0, 0.9),
        ("4.png", "A", "RIGHT", "CC", 0, 0.2),
        ("5.png", "A", "RIGHT", "MLO", 1, 0.4),
        ("6.png", "A", "RIGHT", "CC", 0, 0.6),
    ]
    table = pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, "m"])
    levels = evaluation.at_levels(table, ["m"])
    assert levels["image"]["m"].tolist() == table["m"].tolist()
    breasts = levels["breast"].set_index(["patient", "side"])
    assert breasts["m"].to_dict() == pytest.approx({("A", "LEFT"): 0.9, ("A", "RIGHT"): 0.4, ("B", "LEFT"): 0.2})
    assert breasts["label"].to_dict() == {("A", "LEFT"): 0, ("A", "RIGHT"): 1, ("B", "LEFT"): 0}
    assert levels["patient"].set_index("patient")["m"].to_dict() == pytest.approx({"A": 0.9, "B": 0.2})
    assert levels["patient"]["label"].tolist() == [1, 0]
    mean = evaluation.at_levels(table, ["m"], "mean")["patient"].set_index("patient")["m"]
    assert mean.to_dict() == pytest.approx({"A": 0.65, "B": 0.2})


def test_levels_that_are_not_known_are_left_out_and_said():
    table = study()
    results = evaluation.evaluate_models(table.assign(patient="", side=""), ["a"], replicates=20)
    assert list(results["levels"]) == ["image"] and results["data"]["patients"] is None
    assert results["data"]["notes"] == [
        f"{name} level left out: patients are not known" for name in ("breast", "patient")
    ]
    results = evaluation.evaluate_models(table.assign(side=""), ["a"], replicates=20)
    assert list(results["levels"]) == ["image", "patient"]
    assert results["data"]["notes"] == ["breast level left out: the side of some images is not known"]
    scores = table.groupby("patient")["a"].max()
    truth = table.groupby("patient")["label"].max()
    assert results["levels"]["patient"]["models"]["a"]["auc"]["value"] == pytest.approx(roc_auc_score(truth, scores))
    # One breast of every patient has cancer.
    table["label"] = (table["side"] == "LEFT").astype(int)
    results = evaluation.evaluate_models(table, ["a"], replicates=20)
    assert results["data"]["notes"] == ["patient level left out: all have the label 1"]


# ------------------------------------------------------------------------------------------------------- figures


@pytest.fixture(scope="module")
def results():
    return evaluation.evaluate_models(study(), ["a", "b"], replicates=400)


def test_areas_are_scikit_learns_at_each_level(results):
    for name, level in evaluation.at_levels(study(), ["a", "b"]).items():
        found = results["levels"][name]
        assert (found["samples"], found["patients"]) == ({"image": 160, "breast": 80, "patient": 40}[name], 40)
        assert found["positive"] == level["label"].sum()
        for model in "ab":
            result = found["models"][model]
            assert result["auc"]["value"] == pytest.approx(roc_auc_score(level["label"], level[model]))
            expected = average_precision_score(level["label"], level[model])
            assert result["average_precision"]["value"] == pytest.approx(expected)
            assert result["calibration"]["brier"]["value"] == pytest.approx(
                brier_score_loss(level["label"], level[model])
            )


def test_curves_enclose_their_areas_and_lie_in_their_bands(results):
    for level in results["levels"].values():
        for result in level["models"].values():
            roc, pr = (pd.DataFrame(result[name]) for name in ("roc", "pr"))
            assert np.trapezoid(roc["true_positive"], roc["false_positive"]) == pytest.approx(result["auc"]["value"])
            assert roc[["false_positive", "true_positive"]].agg(["min", "max"]).to_numpy().tolist() == [[0, 0], [1, 1]]
            steps = np.diff(pr["recall"]) * pr["precision"][1:]
            assert steps.sum() == pytest.approx(result["average_precision"]["value"])
            assert (pr["low"] <= pr["precision"]).all() and (pr["precision"] <= pr["high"]).all()
            inner = roc[(roc["false_positive"] > 0) & (roc["false_positive"] < 1)]
            assert (inner["low"] - 1e-9 <= inner["true_positive"]).mean() > 0.97
            assert (inner["true_positive"] <= inner["high"] + 1e-9).all()
            assert (inner["high"] - inner["low"]).mean() > 0.1


def test_points_by_hand():
    truth = np.array([1, 1, 1, 0, 1, 0, 0, 0, 0, 1])
    score = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.3, 0.2, 0.1])
    points = evaluation.OperatingPoints(True, (0.7, 1), (0.8, 1), (0.45,))
    assert points.choose(truth, score) == {
        "Youden": 0.7,  # 3/5 and 5/5, as much as at 0.5 with 4/5 and 4/5: the higher one
        "sensitivity 0.7": 0.5,
        "sensitivity 1": 0.1,
        "specificity 0.8": 0.5,
        "specificity 1": 0.7,
        "threshold 0.45": 0.45,
    }
    # Where the highest score is a negative's, nothing reaches full specificity but a threshold above all.
    assert points.choose(1 - truth, score)["specificity 1"] == np.nextafter(0.9, 1)


def test_sensitivity_and_specificity_at_thresholds_of_other_images(results):
    table, others = study(), study(seed=1)
    points = evaluation.OperatingPoints(True, (0.9,), (), ())
    found = evaluation.evaluate_models(table, ["a"], points, others, replicates=200)
    assert found["data"]["thresholds_from"] == "other images"
    # By their names these are the same patients.
    assert found["data"]["notes"] == ["among the images of the thresholds too: 40 patients, such as P_000"]
    for name, level in evaluation.at_levels(table, ["a"]).items():
        other = evaluation.at_levels(others, ["a"])[name]
        expected = points.choose(other["label"].to_numpy(), other["a"].to_numpy())
        for point in found["levels"][name]["models"]["a"]["points"]:
            assert point["threshold"] == expected[point["name"]]
            called = level["a"] >= point["threshold"]
            for figure, side in (("sensitivity", 1), ("specificity", 0)):
                right = called[level["label"] == side] == side
                assert point[figure]["value"] == pytest.approx(right.mean())
                low, high = point[figure]["interval"]
                assert low < point[figure]["value"] < high
                # The two kinds of intervals agree where there are samples enough.
                if len(right) >= 60:
                    assert point[figure]["bootstrap"] == pytest.approx([low, high], abs=0.04)


def test_calibration_has_its_closed_forms():
    table = study(150)
    logits = np.log(table["a"] / (1 - table["a"]))
    table["twice"], table["shifted"] = 1 / (1 + np.exp(-2 * logits)), 1 / (1 + np.exp(-logits - 0.7))
    found = image_level(table, ["a", "twice", "shifted"], 50)["models"]
    slope, intercept = (
        {name: found[name]["calibration"][kind]["value"] for name in found} for kind in ("slope", "intercept")
    )
    assert slope["twice"] == pytest.approx(slope["a"] / 2, rel=1e-4)
    assert slope["shifted"] == pytest.approx(slope["a"], rel=1e-4)
    assert intercept["shifted"] == pytest.approx(intercept["a"] - 0.7, abs=1e-4)


def test_labels_drawn_from_the_probabilities_are_calibrated():
    table = study(300)
    table["label"] = (np.random.default_rng(1).random(len(table)) < table["a"]).astype(int)
    calibration = image_level(table, ["a"], 50)["models"]["a"]["calibration"]
    for name, truth in (("slope", 1), ("intercept", 0)):
        low, high = calibration[name]["interval"]
        assert low < truth < high and high - low < 0.5
    bins = calibration["bins"]
    assert len(bins) == 10 and sum(part["count"] for part in bins) == 1200
    assert sum(part["interval"][0] <= part["predicted"] <= part["interval"][1] for part in bins) >= 8
    assert sum(part["observed"] * part["count"] for part in bins) == pytest.approx(table["label"].sum())


def test_what_is_undefined_is_none():
    table = study(30)
    table["perfect"], table["constant"] = table["label"] * 0.5 + 0.25, 0.3
    table["no probability"] = table["a"] * 4 - 2
    found = evaluation.evaluate_models(table, ["perfect", "constant", "no probability"], replicates=50)
    image = found["levels"]["image"]["models"]
    assert image["perfect"]["auc"] == {"value": 1, "error": 0, "delong": None, "bootstrap": [1, 1]}
    assert found["data"]["notes"][0].startswith("an AUC of 1, or 0, has no DeLong interval")
    assert image["perfect"]["calibration"]["slope"] == {"value": None, "interval": None}
    assert image["constant"]["calibration"]["slope"]["value"] is None
    assert image["constant"]["auc"]["value"] == 0.5
    assert len(image["constant"]["calibration"]["bins"]) == 1
    assert image["no probability"]["calibration"] is None
    json.dumps(found, allow_nan=False)
    assert evaluation.describe_results(found)


def test_draws_of_one_class_alone_are_not_enough():
    table = pd.DataFrame(
        [("x", "", "", "", 1, 0.4), ("y", "", "", "", 0, 0.2)], columns=[*evaluation.IMAGE_COLUMNS, "m"]
    )
    one_class = (rng for rng in range(99) if np.ptp(np.random.default_rng(rng).integers(2, size=2)) == 0)
    with pytest.raises(InputError, match="--bootstrap 1: no draw holds samples of both classes"):
        evaluation.evaluate_models(table, ["m"], replicates=1, seed=next(one_class))


# ----------------------------------------------------------------------------------------------------- intervals


def test_the_bootstrap_of_independent_images_is_scipys():
    table = study(150).assign(patient="", side="")
    found = image_level(table, ["a"], 4000)["models"]["a"]
    truth, score = table["label"].to_numpy(), table["a"].to_numpy()
    for figure, statistic in (("auc", auc_of), ("average_precision", precision_of)):
        expected = bootstrap(
            (truth, score), statistic, paired=True, vectorized=False, method="percentile", n_resamples=1500, rng=1
        ).confidence_interval
        width = expected.high - expected.low
        # The standard error of such a quantile of 1500 draws is 4% of the interval's width.
        assert found[figure]["bootstrap"] == pytest.approx([expected.low, expected.high], abs=0.12 * width)
    low, high = found["auc"]["delong"]
    assert found["auc"]["bootstrap"] == pytest.approx([low, high], abs=0.1 * (high - low))


def test_intervals_by_patient_are_those_of_drawing_patients():
    table = study(60)
    found = evaluation.evaluate_models(table, ["a", "b"], NO_POINTS, replicates=2000)
    rng = np.random.default_rng(7)
    levels = evaluation.at_levels(table, ["a", "b"])
    rows_of = {name: [part.index for _, part in level.groupby("patient")] for name, level in levels.items()}
    arrays = {name: level[["label", "a", "b"]].to_numpy() for name, level in levels.items()}
    drawn = {name: [] for name in levels}
    for _ in range(1000):
        patients = rng.integers(60, size=60)
        for name, rows in rows_of.items():
            truth, *scores = arrays[name][np.concatenate([rows[i] for i in patients])].T
            drawn[name].append([auc_of(truth, score) for score in scores])
    for name, level in found["levels"].items():
        aucs = np.transpose(drawn[name])
        for expected, intervals in (
            (aucs[0], level["models"]["a"]["auc"]),
            (aucs[0] - aucs[1], {"delong": level["comparisons"][0]["interval"]} | level["comparisons"][0]),
        ):
            low, high = np.quantile(expected, [0.025, 0.975])
            assert intervals["bootstrap"] == pytest.approx([low, high], abs=0.15 * (high - low))
            assert intervals["delong"] == pytest.approx([low, high], abs=0.25 * (high - low))


def test_tables_of_an_earlier_run_do_not_stay(results, tmp_path):
    evaluation.write_evaluation(tmp_path, study(), results)
    assert len(pd.read_csv(tmp_path / "comparisons.csv")) == 3
    alone = evaluation.evaluate_models(study().assign(patient="", side=""), ["a"], NO_POINTS, replicates=20)
    evaluation.write_evaluation(tmp_path, study(), alone)
    assert sorted(path.name for path in tmp_path.glob("*.csv")) == ["predictions.csv", "scores.csv"]


def test_models_are_compared_in_pairs():
    table = study(80)
    table["c"], table["better"] = table["a"], table["a"] + table["label"] / 2
    (same, better, _) = image_level(table, ["a", "c", "better"], 200)["comparisons"]
    assert same == {
        "models": ["a", "c"],
        "difference": 0,
        "interval": [0, 0],
        "p": 1,
        "bootstrap": [0, 0],
    }
    assert better["models"] == ["a", "better"] and better["difference"] < 0
    assert better["p"] < 0.001 and better["interval"][1] < 0 and better["bootstrap"][1] < 0


# ------------------------------------------------------------------------------------------------------ averages


def test_the_average_of_three_is_their_mean_flips_apart():
    table = study(20, ("a", "b", "c", "a_flips", "b_flips", "c_flips"))
    models = list(table.columns[5:])
    averaged, names, weights = evaluation.add_averages(table, models)
    assert names == [*models, "average", "average_flips"]
    np.testing.assert_allclose(averaged["average"], (table["a"] + table["b"] + table["c"]) / 3)
    np.testing.assert_allclose(averaged["average_flips"], table[models[3:]].mean(axis=1))
    assert weights["average_flips"] == pytest.approx({"a_flips": 1 / 3, "b_flips": 1 / 3, "c_flips": 1 / 3})
    again, names_again, _ = evaluation.add_averages(averaged.assign(average=9.0), names)
    assert names_again == names
    pd.testing.assert_frame_equal(again, averaged)
    with pytest.raises(InputError, match=r"Expected several models\. Received a, a_flips"):
        evaluation.add_averages(table, ["a", "a_flips"])


def test_fitted_weights_have_the_highest_likelihood():
    rng = np.random.default_rng(0)
    a, b, c = rng.uniform(0.02, 0.98, (3, 4000))
    table = pd.DataFrame(
        {"file": "x", "a": a, "b": b, "c": c, "label": (rng.random(4000) < 0.7 * a + 0.3 * b).astype(int)}
    )
    weights = evaluation.fit_weights(table, ["a", "b", "c"])
    assert weights == pytest.approx([0.7, 0.3, 0], abs=0.04) and weights.sum() == pytest.approx(1)
    # Of two, all weights in steps of a thousandth.
    share = np.linspace(0, 1, 1001)
    mean = share[:, None] * a + (1 - share[:, None]) * b
    likelihood = np.log(np.where(table["label"] == 1, mean, 1 - mean)).sum(axis=1)
    assert evaluation.fit_weights(table, ["a", "b"])[0] == pytest.approx(share[likelihood.argmax()], abs=0.001)
    averaged, _, by_model = evaluation.add_averages(table.iloc[:9], ["a", "b", "c"], table)
    np.testing.assert_allclose(averaged["average"], table.iloc[:9][["a", "b", "c"]] @ weights)
    assert by_model["average"] == dict(zip("abc", weights, strict=True))
    with pytest.raises(InputError, match=r"Expected probabilities, 0\.\.1"):
        evaluation.fit_weights(table.assign(a=a * 3), ["a", "b"])


# ---------------------------------------------------------------------------------------------- what is evaluated


def write_png(path, value=0, shape=(8, 6)):
    """An image of 16 bits whose first pixel is `value`."""
    pixels = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    pixels[0, 0] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


def prepared(folder, patients=6):
    """A prepared data set: a breast in both views of each patient, the odd ones with cancer, all in test and val."""
    rows = []
    for part in ("val", "test"):
        for number in range(patients):
            label = ("neg", "pos")[number % 2]
            for view in ("CC", "MLO"):
                name = f"{part}/{label}/P_{part}{number}_LEFT_{view}.png"
                value = (
                    (20_000 if label == "pos" else 8_000)
                    + 3_000 * number
                    + 500 * (view == "CC")
                    - 17_000 * (number == 5)
                )
                write_png(folder / name, value)
                rows.append(ImageRow(name, part, label, f"Q_{part}{number}", "LEFT", view, "source.dcm"))
    write_image_table(folder / "images.csv", rows)
    return folder


def write_list(path, rows, header="file,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_prepared_folders_and_their_class_folders_take_patients_from_the_table(tmp_path):
    folder = prepared(tmp_path / "data")
    table = read_images(folder)
    assert len(table) == 12 and table["label"].sum() == 6
    assert set(table["patient"]) == {f"Q_test{number}" for number in range(6)}
    assert set(zip(table["side"], table["view"], strict=True)) == {("LEFT", "CC"), ("LEFT", "MLO")}
    assert all(Path(file).is_file() for file in table["file"])
    assert set(read_images(folder, part="val")["patient"]) == {f"Q_val{number}" for number in range(6)}
    by_folder = read_images(folder / "test")
    by_file = {"by": "file", "ignore_index": True}
    pd.testing.assert_frame_equal(by_folder.sort_values(**by_file), table.sort_values(**by_file))
    # Without the table, names tell; which classes count is a choice.
    (folder / "images.csv").unlink()
    assert set(read_images(folder / "test")["patient"]) == {f"P_test{number}" for number in range(6)}
    assert read_images(folder / "test", ["pos", "neg"], ["neg"])["label"].sum() == 6


def test_images_of_no_known_patient_are_patients_of_their_own(tmp_path, capsys):
    for name in ("neg/a.png", "neg/b.png", "pos/c.png"):
        write_png(tmp_path / name)
    assert read_images(tmp_path)["patient"].tolist() == ["", "", ""]
    assert f"warning: {tmp_path}: 3 of 3 images have no patient" in capsys.readouterr().err
    write_png(tmp_path / "pos/P_1_LEFT_CC.png")
    table = read_images(tmp_path)
    assert table["patient"].nunique() == 4 and "P_1" in set(table["patient"])
    assert "3 of 4 images have no patient" in capsys.readouterr().err


def test_lists_in_csv_files(tmp_path):
    for name in ("a.png", "b.png", "P_7_RIGHT_MLO.png"):
        write_png(tmp_path / "img" / name)
    header = "file,label,patient,side,view,age"
    rows = ["img/a.png,1,7,L,CC,50", "img/b.png,neg,7,right,,", f"{tmp_path}/img/P_7_RIGHT_MLO.png,pos,8,,MLO,"]
    table = read_images(write_list(tmp_path / "a.csv", rows, header))
    assert table["label"].tolist() == [1, 0, 1]
    assert table["patient"].tolist() == ["7", "7", "8"]
    assert table["side"].tolist() == ["LEFT", "RIGHT", ""]
    assert table["view"].tolist() == ["CC", "", "MLO"]
    rows = ["img/a.png,1,7,Left,cranio-caudal,", "img/b.png,0,7, R ,mlo ,"]
    table = read_images(write_list(tmp_path / "a.csv", rows, header))
    assert list(zip(table["side"], table["view"], strict=True)) == [("LEFT", "CC"), ("RIGHT", "MLO")]
    listed = write_list(tmp_path / "b.csv", ["P_7_RIGHT_MLO.png,0", "a.png,1"])
    table = read_images(listed, image_dir=tmp_path / "img")
    rows = ["img/a.png,pos,training", "img/b.png,pos,test"]
    sets = read_images(write_list(tmp_path / "c.csv", rows, "file,label,set"))
    assert [Path(file).name for file in sets["file"]] == ["b.png"]
    assert read_images(tmp_path / "c.csv", ["pos", "neg"], ["neg"])["label"].tolist() == [0]
    assert table[["patient", "side", "view"]].iloc[0].tolist() == ["P_7", "RIGHT", "MLO"]


def exam(number, left=0, right=0, views=("L-CC", "R-CC", "L-MLO", "R-MLO")):
    """As in the README of the metarepository."""
    names = {view: [f"{number}_{view.replace('-', '_')}"] for view in views}
    return names | {"cancer_label": {"left_malignant": left, "right_malignant": right}, "horizontal_flip": "NO"}


def write_exams(path, exams):
    path.write_bytes(pickle.dumps(exams, protocol=4))
    for one in exams:
        for name in [name for view in ("L-CC", "R-CC", "L-MLO", "R-MLO") for name in one.get(view, ())]:
            write_png(path.parent / "images" / f"{name}.png")
    return path


def test_exam_lists_of_the_metarepository(tmp_path, capsys):
    mirrored = exam(2, left=1, views=("L-CC",)) | {"R-CC": [], "horizontal_flip": "YES"}
    exams = write_exams(tmp_path / "data.pkl", [exam(0), exam(1, right=1), mirrored])
    table = read_images(exams, image_dir=tmp_path / "images")
    assert len(table) == 9
    positive = table[table["label"] == 1]
    assert [Path(file).name for file in positive["file"]] == ["1_R_CC.png", "1_R_MLO.png", "2_L_CC.png"]
    assert positive["side"].tolist() == ["RIGHT", "RIGHT", "LEFT"]
    assert table.groupby("patient").size().tolist() == [4, 4, 1]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {exams}: names no patients: each exam counts as a patient of its own",
        f"warning: {exams}: 1 of 9 images are mirrored, and scored as they are",
    ]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda d: d / "missing", "missing: not found. Expected a folder of images, a table or an exam list"),
        (lambda d: write_list(d / "a.csv", ["a.png,1"], "path,lobe"), "a.csv, line 1: missing columns label"),
        (lambda d: write_list(d / "a.csv", ["a.png"]), "a.csv, line 2: Expected 2 cells. Received 1"),
        (lambda d: write_list(d / "a.csv", []), "a.csv: no images of the set test"),
        (lambda d: write_list(d / "a.csv", ["a.png,maybe"]), "a.csv, line 2: unknown label. Expected one of 0"),
        (lambda d: write_list(d / "a.csv", ["a.png,1,up"], "file,label,side"), "line 2: unknown side. Expected l, "),
        (lambda d: write_list(d / "a.csv", ["a.png,1,XCCL"], "file,label,view"), "line 2: unknown view. Expected cc, "),
        (lambda d: write_list(d / "a.csv", ["a.png,1,fold3"], "file,label,set"), "line 2: unknown set. Expected tr"),
        (lambda d: write_list(d / "a.csv", ["a.png,1", "b.png,0"]), "a.png: listed in .*a.csv, but not there (2 of 2"),
        (lambda d: write_list(d / "a.csv", ["a.png,1", "a.png,0"], "file,file"), "missing columns label"),
        (lambda d: write_png(d / "x" / "a.png").parent, "neg: no such class folder. Expected neg, pos"),
        (lambda d: write_png(d / "x/neg/a.png").parents[1].joinpath("pos").mkdir() or d / "x", "pos: no images here"),
        (lambda d: write_list(d / "a.pkl", ["x"]), "a.pkl: Expected --image-dir"),
    ],
)
def test_data_that_cannot_be_evaluated(tmp_path, make, text):
    with pytest.raises(InputError, match=text.replace("(", r"\(").replace(".csv", r"\.csv")):
        read_images(make(tmp_path))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": 1}, "a list of exams"),
        ([{"L-CC": ["a"]}], "exam 0: Expected a cancer_label with left_malignant 0 or 1"),
        ([{"cancer_label": {}}], "no images in these exams"),
        ([exam(0, left=None)], "exam 0: Expected a cancer_label with left_malignant"),
    ],
)
def test_exam_lists_that_are_none(tmp_path, content, text):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(InputError, match=text):
        read_images(tmp_path / "a.pkl", image_dir=tmp_path)


def test_predictions_of_trainers_and_of_others(tmp_path, capsys):
    header = "file,label,neg,pos,neg_flips,pos_flips"
    rows = ["test/neg/P_1_LEFT_CC.png,neg,0.8,0.2,0.7,0.3", "test/pos/P_2_LEFT_CC.png,pos,0.4,0.6,0.3,0.7"]
    table, models = read_predictions(write_list(tmp_path / "a.csv", rows, header))
    assert models == ["pos", "pos_flips"]
    assert table["patient"].tolist() == ["P_1", "P_2"] and table["label"].tolist() == [0, 1]
    assert table[models].to_numpy().tolist() == [[0.2, 0.3], [0.6, 0.7]]
    rows, header = ["x;malignant;0.5;;old", "y;benign;-3;2;new"], "Image path;Pathology;reader;net;scanner"
    table, models = read_predictions(write_list(tmp_path / "b.csv", rows, header))
    assert models == ["reader", "net"] and np.isnan(table["net"][0]) and table["reader"].tolist() == [0.5, -3]
    assert table["label"].tolist() == [1, 0]
    assert "columns without numbers are left out: scanner" in capsys.readouterr().err
    # The labels of other classes, and one of several sets.
    rows = ["x,mass_mal,0.5,val", "y,mass_ben,0.4,test", "z,mass_mal,0.7,test"]
    listed = write_list(tmp_path / "c.csv", rows, "file,label,net,set")
    table, models = read_predictions(listed, ["mass_ben", "mass_mal"], ["mass_mal"])
    assert (models, table["file"].tolist(), table["label"].tolist()) == (["net"], ["y", "z"], [0, 1])
    assert read_predictions(listed, ["mass_ben", "mass_mal"], ["mass_mal"], "val")[0]["file"].tolist() == ["x"]
    for rows, header, text in (
        (["x,1"], "file,label", "a column of predictions a model"),
        (["x,1,high", "y,0,0.1"], "file,label,net", "Expected numbers in the column net. Received 'high' for x"),
        (["x,1,high"], "file,label,net", "a column of predictions a model"),
        (["x,0.2"], "file,net", "missing columns label"),
        (["x,1,0.3", "x,0,0.2"], "file,label,net", "x stands there twice"),
    ):
        with pytest.raises(InputError, match=text):
            read_predictions(write_list(tmp_path / "c.csv", rows, header))


# ------------------------------------------------------------------------------------------------- golden figures


class FirstValues:
    """Stand-in model: the first k values of the flattened image."""

    def __init__(self, k):
        self.k = k

    def predict_on_batch(self, x):
        return x.reshape(len(x), -1)[:, : self.k]


def test_flips_and_areas_are_those_of_the_published_program():
    from mammo.train.scoring import predict

    cases = {case["key"]: case for case in json.loads((REFERENCE / "auc.json").read_text())}
    with np.load(REFERENCE / "auc.npz") as data:
        arrays = {name: data[name] for name in data.files}
    for key, case in cases.items():
        if case["kind"] not in ("plain", "ties", "aug") or case["k"] != 2:
            continue
        truth, guess = arrays[f"{key}_y_true"], arrays[f"{key}_y_pred"]
        if case["kind"] == "aug":
            guess = predict(FirstValues(2), (arrays[f"{key}_x"], truth), flips=True)[3]
        table = pd.DataFrame({"file": np.arange(len(truth)).astype(str), "patient": "", "side": "", "view": ""})
        table["label"], table["m"] = truth[:, 1].astype(int), guess[:, 1]
        found = image_level(table, ["m"], 10)["models"]["m"]["auc"]
        assert found["value"] == pytest.approx(case["auc"][1], abs=1e-9)


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


# ----------------------------------------------------------------------------------------------- the command line

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
    assert f"{auc:.3f}" in printed and "breast level: 6 samples of 6 patients, 3 positive" in printed
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


def test_the_metarepositorys_breast_scores_are_ours(tmp_path):
    """Its scoring script's rule, on its own form of list: mean of the views, from the names of an exam's images."""
    exams = [exam(0), exam(1, right=1), exam(2, left=1), exam(3, left=1, right=1), exam(4)]
    table = read_images(write_exams(tmp_path / "data.pkl", exams), image_dir=tmp_path / "images")
    table["m"] = np.random.default_rng(3).random(len(table))
    evaluation.write_metarepository(tmp_path / "meta.csv", table, "m")
    predictions = pd.read_csv(tmp_path / "meta.csv", header=0)
    truth, score = [], []
    for one in exams:
        for side in ("left", "right"):
            views = [one[f"{side[0].upper()}-{view}"][0] for view in ("CC", "MLO")]
            score.append(predictions.set_index("image_index")["malignant_pred"][views].mean())
            truth.append(one["cancer_label"][f"{side}_malignant"])
    levels = evaluation.evaluate_models(table, ["m"], NO_POINTS, replicates=10)["levels"]
    assert levels["breast"]["models"]["m"]["auc"]["value"] == pytest.approx(roc_auc_score(truth, score))
    image = roc_auc_score(predictions["malignant_label"], predictions["malignant_pred"])
    assert levels["image"]["models"]["m"]["auc"]["value"] == pytest.approx(image)
    with pytest.raises(InputError, match="a name of its own for each image"):
        evaluation.write_metarepository(tmp_path / "b.csv", table.assign(file="x/a.png"), "m")


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
    evaluate.run(
        inputs=[tmp_path / "patch.h5", listed], positive=["mal", "pos"], out_dir=tmp_path / "out", bootstrap=10
    )
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


def test_model_names_tell_files_apart(tmp_path):
    assert name_models(["a/one.h5", "b/two.keras"]) == ["one", "two"]
    assert name_models([tmp_path / "a/m.h5", tmp_path / "b/m.h5"]) == ["a/m", "b/m"]
    assert name_models(["m.h5", "m.keras"]) == ["m.h5", "m.keras"]
