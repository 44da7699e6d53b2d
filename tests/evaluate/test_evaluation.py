"""Scores of images, breasts and patients: by hand, by other libraries, and of the published program."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, rankdata
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from mammo.base.files import InputError
from mammo.base.statistics import average_precision, cumulative_counts
from mammo.evaluate import evaluation
from mammo.evaluate.inputs import read_images
from tests.helpers import exam, write_exams

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
    notes = [f"{name} level left out: patients are not known" for name in ("breast", "patient")]
    assert results["data"]["notes"] == notes
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
            expected = brier_score_loss(level["label"], level[model])
            assert result["calibration"]["brier"]["value"] == pytest.approx(expected)


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
    slope = {name: found[name]["calibration"]["slope"]["value"] for name in found}
    intercept = {name: found[name]["calibration"]["intercept"]["value"] for name in found}
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
    rows = [("x", "", "", "", 1, 0.4), ("y", "", "", "", 0, 0.2)]
    table = pd.DataFrame(rows, columns=[*evaluation.IMAGE_COLUMNS, "m"])
    one_class = (rng for rng in range(99) if np.ptp(np.random.default_rng(rng).integers(2, size=2)) == 0)
    with pytest.raises(InputError, match="--bootstrap 1: no draw holds samples of both classes"):
        evaluation.evaluate_models(table, ["m"], replicates=1, seed=next(one_class))


# ----------------------------------------------------------------------------------------------------- intervals


def test_the_bootstrap_of_independent_images_is_scipys():
    table = study(150).assign(patient="", side="")
    found = image_level(table, ["a"], 4000)["models"]["a"]
    truth, score = table["label"].to_numpy(), table["a"].to_numpy()
    for figure, statistic in (("auc", auc_of), ("average_precision", precision_of)):
        how = {"paired": True, "vectorized": False, "method": "percentile", "n_resamples": 1500, "rng": 1}
        expected = bootstrap((truth, score), statistic, **how).confidence_interval
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
    assert same == {"models": ["a", "c"], "difference": 0, "interval": [0, 0], "p": 1, "bootstrap": [0, 0]}
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
    label = (rng.random(4000) < 0.7 * a + 0.3 * b).astype(int)
    table = pd.DataFrame({"file": "x", "a": a, "b": b, "c": c, "label": label})
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
