"""Score the predictions of whole-image classifiers for images, breasts and patients, with intervals.

A *table* has a row for each image: the columns of `IMAGE_COLUMNS`, then one column for each model, its probability of
cancer. `evaluate_models` makes *results* from it, in types that JSON can hold; its docstring lists them.
`mammo.evaluate.inputs` makes tables, `mammo evaluate` is the command line.

Levels: the score of a breast is the mean over its images (both views), and its label whether any of them is positive.
The score of a patient is the score of the more suspicious breast (or the mean of both), and the label whether either
has cancer. All intervals hold 95% and are by patient: see `mammo.base.statistics`.
"""

import platform
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mammo.base import statistics as stats
from mammo.base.files import InputError, atomic_write, counted, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGE_COLUMNS = ("file", "patient", "side", "view", "label")
LEVELS = ("image", "breast", "patient")
FLIPS = "_flips"  # ends the name of a column that holds means over four flips of the image
AVERAGE = "average"
_RATES = ("sensitivity", "specificity")

NB_BIN, MIN_IN_BIN = 10, 10  # of the calibration curve: bins at most, and samples in each at least
_PRINTED = 6  # comparisons of AUCs: as many as four models have
_CHUNK = 4_000_000  # replicates times samples worked on at a time: bounds the memory
_PERFECT = (
    "an AUC of 1, or 0, has no DeLong interval and a bootstrap interval without width: where there are no errors, "
    "neither can tell; the intervals of sensitivity and specificity can"
)


@dataclass(frozen=True)
class OperatingPoints:
    """Thresholds at which sensitivity and specificity are given: a sample counts as positive from the threshold on."""

    youden: bool = True  # where the sum of both is largest
    sensitivities: Sequence[float] = (0.9,)  # the highest threshold with at least this sensitivity
    specificities: Sequence[float] = (0.9,)  # the lowest threshold with at least this specificity
    thresholds: Sequence[float] = (0.5,)  # as they are

    def choose(self, truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
        """Return thresholds by the names of their points, chosen on these samples, which hold both classes."""
        thresholds, true, false = stats.cumulative_counts(truth, score)
        # Above all scores nothing is positive.
        thresholds = np.append(np.nextafter(thresholds[0], np.inf), thresholds)
        sensitivity = np.append(0, true / true[-1])
        specificity = 1 - np.append(0, false / false[-1])
        chosen = {"Youden": np.argmax(sensitivity + specificity)} if self.youden else {}
        chosen |= {f"sensitivity {v:g}": np.flatnonzero(sensitivity >= v - 1e-12)[0] for v in self.sensitivities}
        chosen |= {f"specificity {v:g}": np.flatnonzero(specificity >= v - 1e-12)[-1] for v in self.specificities}
        by_name = {name: float(thresholds[i]) for name, i in chosen.items()}
        return by_name | {f"threshold {value:g}": float(value) for value in self.thresholds}


def at_levels(table: pd.DataFrame, models: Sequence[str], patient_score: str = "max") -> dict[str, pd.DataFrame]:
    """Return tables of patient, label and one column for each model, by level.

    Without patients there is only the image level. Where a side is missing there are no breasts, and the score of a
    patient is made from the images. patient_score: "max" or "mean" of a patient's breasts.
    """
    levels = {"image": table[["patient", "label", *models]]}
    if not has_patients(table):
        return levels
    parts, label = table, {"label": "max"}
    if (table["side"] != "").all():
        parts = table.groupby(["patient", "side"]).agg(label | dict.fromkeys(models, "mean")).reset_index()
        levels["breast"] = parts
    levels["patient"] = parts.groupby("patient").agg(label | dict.fromkeys(models, patient_score)).reset_index()
    return levels


def has_patients(table: pd.DataFrame) -> bool:
    """Return whether the patient of every image is known."""
    return bool((table["patient"] != "").all())


def evaluate_models(
    table: pd.DataFrame,
    models: Sequence[str],
    points: OperatingPoints | None = None,
    chosen_on: pd.DataFrame | None = None,
    patient_score: str = "max",
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the results of all models at all levels.

    Args:
        table: see the top of this module. Where patients are not known, all are "", and images count as independent.
        models: names of the prediction columns. points: where sensitivity and specificity are given.
        chosen_on: a table of other images, such as the validation set, on which the thresholds are chosen. By default
            they are chosen on `table` itself, which flatters the figures.
        patient_score: see `at_levels`. replicates, seed: draws of the bootstrap, shared by all models and levels.

    Returns:
        A dict; an interval is [low, high], and it or any figure is None where it is undefined::

            models: names
            data: {images, positive, patients (None if not known), patient_score, thresholds_from ("these images" or
                "other images"), confidence, replicates, seed, notes (sentences on what was left out, and the like)}
            levels: by "image", "breast", "patient" (where they exist):
                samples, positive, patients
                models: by name:
                    auc: {value, error (standard error), delong (interval), bootstrap (interval)}
                    average_precision: {value, bootstrap}
                    points: [{name, threshold, sensitivity: {value, interval, bootstrap}, specificity: likewise}]
                    calibration: {brier: {value, bootstrap}, intercept: {value, interval}, slope: {value, interval},
                        bins: [{predicted, observed, interval, count}]}
                    roc: {false_positive, true_positive, low, high}, lists of one length
                    pr: {recall, precision, low, high}, likewise
                comparisons: [{models: [a, b], difference (of AUC, a - b), interval, p, bootstrap}]

    Raises:
        InputError: the table, or a level of `chosen_on`, lacks one of the classes, or predictions are not finite.
    """
    check_classes(table)
    check_finite(table, models)
    points = points or OperatingPoints()
    levels = at_levels(table, models, patient_score)
    notes = _drop_levels(levels, table)
    others = levels
    if chosen_on is not None:
        check_finite(chosen_on, models)
        others = at_levels(chosen_on, models, patient_score)
        if shared := sorted(set(table["patient"]) & set(chosen_on["patient"]) - {""}):
            shared_text = f"{counted(len(shared), 'patient')}, such as {shared[0]}"
            notes.append(f"among the images of the thresholds too: {shared_text}")
    by_level = {}
    for name, level in levels.items():
        if name not in others or others[name]["label"].nunique() == 1:
            expected = f"Expected {name}s of both classes where they are chosen, as where they are judged"
            received = "one class" if name in others else "none"
            raise InputError(f"the {name} level has no thresholds: {expected}. Received {received}")
        by_level[name] = _evaluate_level(level, others[name], models, points, replicates, seed)
    if any(model["auc"]["value"] in (0, 1) for level in by_level.values() for model in level["models"].values()):
        notes.append(_PERFECT)
    patients = int(table["patient"].nunique()) if has_patients(table) else None
    data = {"images": len(table), "positive": int(table["label"].sum()), "patients": patients}
    data |= {"patient_score": patient_score, "replicates": replicates, "seed": seed, "confidence": stats.CONFIDENCE}
    data |= {"thresholds_from": "these images" if chosen_on is None else "other images", "notes": notes}
    return {"models": list(models), "data": data, "levels": by_level}


def _drop_levels(levels: dict[str, pd.DataFrame], table: pd.DataFrame) -> list[str]:
    """Drop the levels of one class alone, and say why these and others are missing."""
    why = "the side of some images is not known" if has_patients(table) else "patients are not known"
    notes = [f"{name} level left out: {why}" for name in LEVELS if name not in levels]
    for name in list(levels):
        if levels[name]["label"].nunique() == 1:
            notes.append(f"{name} level left out: all have the label {levels.pop(name)['label'].iloc[0]}")
    return notes


def check_classes(table: pd.DataFrame) -> None:
    """Raise InputError for a table without positive or without negative images."""
    if table["label"].nunique() < 2:
        label = "none" if table.empty else f"{len(table)} with the label {table['label'].iloc[0]}"
        raise InputError(f"the AUC is undefined: Expected images of both classes. Received {label}")


def check_finite(table: pd.DataFrame, models: Sequence[str]) -> None:
    """Raise InputError, which names a file, where a model's column holds NaN or infinity."""
    for name in models:
        wrong = table["file"][~np.isfinite(table[name].to_numpy(float))]
        if not wrong.empty:
            images = f"{len(wrong)} of {len(table)} images, such as {wrong.iloc[0]}"
            why = "the model has diverged, or the table has holes"
            raise InputError(f"{name}: Expected finite predictions. Received NaN or infinity for {images}: {why}")


def _evaluate_level(level, other, models, points, replicates, seed) -> dict[str, Any]:
    truth, scores = level["label"].to_numpy(), level[list(models)].to_numpy(float).T
    groups = level["patient"].to_numpy() if has_patients(level) else np.arange(len(level))
    counts = stats.bootstrap_counts(groups, np.random.default_rng(seed), replicates)
    auc, covariance = stats.delong(truth, scores, groups)
    by_model, drawn_auc = {}, []
    for name, score, variance in zip(models, scores, np.diag(covariance), strict=True):
        thresholds = points.choose(other["label"].to_numpy(), other[name].to_numpy(float))
        by_model[name], drawn = _evaluate_model(truth, score, variance, groups, counts, thresholds)
        drawn_auc.append(drawn)
    patients = len(np.unique(groups)) if has_patients(level) else None
    numbers = {"samples": len(truth), "positive": int(truth.sum()), "patients": patients}
    return numbers | {"models": by_model, "comparisons": _compare(models, auc, covariance, drawn_auc)}


def _compare(models, auc, covariance, drawn_auc) -> list[dict[str, Any]]:
    """Compare the AUCs of each two models. drawn_auc: of each model, the AUC of each replicate."""
    comparisons = []
    for a, b in combinations(range(len(models)), 2):
        difference = float(auc[a] - auc[b])
        variance = covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]
        *interval, p = stats.difference_test(difference, variance)
        compared = {"models": [models[a], models[b]], "difference": difference, "interval": _plain(interval)}
        comparisons.append(compared | {"p": _plain(p), "bootstrap": _percentiles(drawn_auc[a] - drawn_auc[b])})
    return comparisons


def _evaluate_model(truth, score, variance, groups, counts, thresholds) -> tuple[dict[str, Any], np.ndarray]:
    """Compute the results of one model, and the AUC of each replicate. variance: of its AUC."""
    roc, pr, drawn_auc, drawn_precision = _curves(truth, score, counts)
    _, true, false = stats.cumulative_counts(truth, score)
    auc, precision = float(stats.roc_area(true, false)), float(stats.average_precision(true, false))
    normal = {"error": _plain(np.sqrt(variance)), "delong": _plain(stats.auc_interval(auc, variance))}
    result = {
        "auc": {"value": auc, **normal, "bootstrap": _percentiles(drawn_auc)},
        "average_precision": {"value": precision, "bootstrap": _percentiles(drawn_precision)},
        "points": [_at_threshold(*point, truth, score, groups, counts) for point in thresholds.items()],
        "calibration": _calibration(truth, score, groups, counts),
    }
    return result | {"roc": roc, "pr": pr}, drawn_auc


def _at_threshold(name, threshold, truth, score, groups, counts) -> dict[str, Any]:
    """Compute sensitivity and specificity at an operating point."""
    result, called = {"name": name, "threshold": threshold}, score >= threshold
    for rate, side, right in zip(_RATES, (truth == 1, truth == 0), (called, ~called), strict=True):
        drawn = counts[:, side]
        with np.errstate(invalid="ignore"):  # replicates without samples of this side
            values = (drawn @ right[side]) / drawn.sum(axis=1)
        interval = _plain(stats.proportion_interval(right[side], groups[side]))
        result[rate] = {"value": float(right[side].mean()), "interval": interval, "bootstrap": _percentiles(values)}
    return result


def _calibration(truth, probability, groups, counts) -> dict[str, Any] | None:
    """Compute the Brier score, calibration in the large, the calibration slope and the calibration curve.

    Calibration in the large is the intercept of a logistic regression of the labels with the logit as its offset, the
    slope the coefficient of one on the logit (Cox 1958, Van Calster et al. 2019). None for scores that are no
    probabilities.
    """
    if probability.min() < 0 or probability.max() > 1:
        return None
    errors = (probability - truth) ** 2
    logits, ones = stats.logit(probability), np.ones((len(truth), 1))
    intercept, slope = stats.logistic_fit(ones, truth, logits, groups), (np.nan, np.nan)
    positive, negative = logits[truth == 1], logits[truth == 0]
    # Where the classes do not overlap the likelihood has no maximum.
    if positive.min() < negative.max() and negative.min() < positive.max():
        slope = (fit[1] for fit in stats.logistic_fit(np.column_stack([ones, logits]), truth, groups=groups))
    return {
        "brier": {"value": float(errors.mean()), "bootstrap": _percentiles((counts @ errors) / counts.sum(axis=1))},
        "intercept": _estimate(*(fit[0] for fit in intercept)),
        "slope": _estimate(*slope),
        "bins": _calibration_bins(truth, probability, groups),
    }


def _calibration_bins(truth, probability, groups) -> list[dict[str, Any]]:
    """Compute the share of positives in bins of about as many samples each; equal probabilities stay together."""
    nb_bin = min(NB_BIN, max(1, len(truth) // MIN_IN_BIN))
    edges = np.unique(np.quantile(probability, np.arange(1, nb_bin) / nb_bin))
    bin_of = np.searchsorted(edges, probability, side="right")
    bins = []
    for inside in (bin_of == number for number in np.unique(bin_of)):
        means = {"predicted": float(probability[inside].mean()), "observed": float(truth[inside].mean())}
        interval = _plain(stats.proportion_interval(truth[inside], groups[inside]))
        bins.append(means | {"interval": interval, "count": int(inside.sum())})
    return bins


def _curves(truth, score, counts) -> tuple[dict, dict, np.ndarray, np.ndarray]:
    """Compute the ROC and the precision-recall curve with their bands, and the areas below them of each replicate.

    Bands hold the middle 95% of the replicates' sensitivities at each false positive rate, and of their precisions
    where they first reach each recall.
    """
    _, true, false = stats.cumulative_counts(truth, score)
    false_positive, true_positive = _roc_points(true, false)
    found = np.diff(true, prepend=0) > 0
    recall, precision = true[found] / true[-1], (true / (true + false))[found]
    # Steps begin at no recall.
    recall, precision = np.append(0, recall), np.append(precision[0], precision)
    auc, area, sensitivities, precisions = [], [], [], []
    for part in np.array_split(counts, -(-counts.size // _CHUNK)):
        _, drawn_true, drawn_false = stats.cumulative_counts(truth, score, part)
        auc.append(stats.roc_area(drawn_true, drawn_false))
        area.append(stats.average_precision(drawn_true, drawn_false))
        both = (drawn_true[:, -1] > 0) & (drawn_false[:, -1] > 0)
        for row_true, row_false in zip(drawn_true[both], drawn_false[both], strict=True):
            row_recall = row_true / row_true[-1]
            row_false_positive = np.append(0, row_false / row_false[-1])
            sensitivities.append(np.interp(false_positive, row_false_positive, np.append(0, row_recall)))
            first = np.searchsorted(row_recall, np.maximum(recall, recall[1]) - 1e-12)
            precisions.append(row_true[first] / (row_true[first] + row_false[first]))
    if not sensitivities:
        received = "no draw holds samples of both classes"
        raise InputError(f"--bootstrap {len(counts)}: {received}. Expected more draws, or more patients")
    roc = {"false_positive": false_positive.tolist(), "true_positive": true_positive.tolist()} | _band(sensitivities)
    pr = {"recall": recall.tolist(), "precision": precision.tolist()} | _band(precisions)
    return roc, pr, np.concatenate(auc), np.concatenate(area)


def _roc_points(true, false) -> tuple[np.ndarray, np.ndarray]:
    """Return the corners of the ROC curve, and points every hundredth between them, where its band may bend."""
    corner = np.append((np.diff(true, 2, prepend=0) != 0) | (np.diff(false, 2, prepend=0) != 0), True)
    x, y = (np.append(0, part[corner] / part[-1]) for part in (false, true))
    between = np.setdiff1d(np.linspace(0, 1, 101), x)
    x, y = np.append(x, between), np.append(y, np.interp(between, x, y))
    order = np.lexsort((y, x))
    return x[order], y[order]


def _band(rows: list[np.ndarray]) -> dict[str, list[float]]:
    tail = (1 - stats.CONFIDENCE) / 2
    return dict(zip(("low", "high"), np.quantile(np.stack(rows), [tail, 1 - tail], axis=0).tolist(), strict=True))


def _plain(value: float | Sequence[float]) -> float | list[float] | None:
    """Return a number, or both ends of an interval, for JSON, which has no NaN and no infinity: None instead."""
    return np.asarray(value, float).tolist() if np.isfinite(value).all() else None


def _percentiles(drawn) -> list[float] | None:
    """Return the interval of a figure from its values of each replicate."""
    return _plain(stats.percentile_interval(drawn))


def _estimate(value, error) -> dict[str, Any]:
    """Return a coefficient and its normal interval."""
    half = stats.z_value() * error
    return {"value": _plain(value), "interval": _plain((value - half, value + half))}


# ---------------------------------------------------------------------------------------------------- averages


def fit_weights(table: pd.DataFrame, models: Sequence[str]) -> np.ndarray:
    """Fit the weights (M,) of a mean of models' probabilities to the labels of a table: not negative, of sum 1.

    They have the highest likelihood of the labels (a convex problem; van der Laan, Polley and Hubbard 2007). Fit them
    on images that are not judged, such as the validation set. Raises InputError for scores that are no probabilities.
    """
    from scipy.optimize import minimize

    check_finite(table, models)
    truth, scores = table["label"].to_numpy(), table[list(models)].to_numpy(float)
    low, high = scores.min(), scores.max()
    if low < 0 or high > 1:
        raise InputError(f"fitted weights: Expected probabilities, 0..1. Received {low:.9g}..{high:.9g}")
    # The probability of what the label says, by model.
    right = np.where(truth[:, None] == 1, scores, 1 - scores)

    def loss(weights):
        mean = np.maximum(right @ weights, 1e-7)
        return -np.log(mean).mean(), -(right / mean[:, None]).mean(axis=0)

    start = np.full(len(models), 1 / len(models))
    sum_is_one = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like}
    limits = {"bounds": [(0, 1)] * len(models), "constraints": sum_is_one}
    fit = minimize(loss, start, jac=True, method="SLSQP", options={"ftol": 1e-12, "maxiter": 1000}, **limits)
    weights = np.clip(fit.x, 0, None)
    return weights / weights.sum()


def add_averages(
    table: pd.DataFrame, models: Sequence[str], fitted_on: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, list[str], dict[str, dict[str, float]]]:
    """Add the mean of all models, and the mean of their flip-averaged predictions where there are any, as models.

    Means that were added before, as to a file of predictions, are made anew, and are no members. The weights are
    fitted on `fitted_on`, a table of other images with the same models; by default all weigh the same.

    Returns the table, the models with the new ones after them, and the weights by new model. Raises InputError where
    there are fewer than two models.
    """
    table, weights = table.copy(), {}
    models = [name for name in models if name.removesuffix(FLIPS) != AVERAGE]
    for way in ("", FLIPS):
        members = [name for name in models if name.endswith(FLIPS) == bool(way)]
        if len(members) > 1:
            values = np.full(len(members), 1 / len(members)) if fitted_on is None else fit_weights(fitted_on, members)
            table[AVERAGE + way] = table[members].to_numpy(float) @ values
            weights[AVERAGE + way] = dict(zip(members, values.tolist(), strict=True))
    if not weights:
        raise InputError(f"--average: Expected several models. Received {', '.join(models)}")
    return table, [*models, *weights], weights


def describe_weights(weights: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Describe each average of `add_averages` in a line."""
    terms = {name: [f"{weight:.3f} x {model}" for model, weight in of.items()] for name, of in weights.items()}
    return [f"{name}: {' + '.join(weighted)}" for name, weighted in terms.items()]


# ------------------------------------------------------------------------------------------------------ outputs


SCORE_TABLES = ("scores", "points", "comparisons")
# Tables of the images that are scored, and of the images that thresholds and weights come from.
PREDICTIONS = ("predictions.csv", "val_predictions.csv")


def score_tables(results: dict[str, Any]) -> dict[str, pd.DataFrame]:
    """Tabulate the results of `evaluate_models`: each of `SCORE_TABLES` that has rows, by name.

    "scores" has a row for each level and model, "points" also for each operating point, "comparisons" for each level
    and pair of models.
    """
    rows = {name: [] for name in SCORE_TABLES}
    for level, found in results["levels"].items():
        counts = {name: found[name] for name in ("samples", "positive", "patients")}
        for model, result in found["models"].items():
            where = {"level": level, "model": model}
            rows["scores"].append(where | counts | _score_row(result))
            for point in result["points"]:
                row = where | {"point": point["name"], "threshold": point["threshold"]}
                for rate in _RATES:
                    row |= {rate: point[rate]["value"]} | _ends(rate, point[rate]["interval"])
                rows["points"].append(row)
        for pair in found["comparisons"]:
            row = {"level": level, "model": pair["models"][0], "other": pair["models"][1]}
            row |= {name: pair[name] for name in ("difference", "p")}
            rows["comparisons"].append(row | _ends("difference", pair["interval"]))
    return {name: pd.DataFrame(table) for name, table in rows.items() if table}


def _score_row(result: dict[str, Any]) -> dict[str, float | None]:
    auc, precision, calibration = result["auc"], result["average_precision"], result["calibration"] or {}
    row = {"auc": auc["value"]} | _ends("auc_delong", auc["delong"]) | _ends("auc_bootstrap", auc["bootstrap"])
    row |= {"average_precision": precision["value"]} | _ends("average_precision", precision["bootstrap"])
    for name in ("brier", "intercept", "slope"):
        figure = calibration.get(name, {})
        row |= {name: figure.get("value")} | _ends(name, figure.get("bootstrap", figure.get("interval")))
    return row


def _ends(name: str, interval: Sequence[float] | None) -> dict[str, float | None]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def describe_results(results: dict[str, Any]) -> str:
    """Describe the main results of `evaluate_models` as text to read."""
    parts = []
    for level, found in results["levels"].items():
        parts.append(f"{level} level: {count_samples(found['samples'], level, found['positive'], found['patients'])}")
        parts.append(_aligned({model: _main_figures(result) for model, result in found["models"].items()}))
        points = {model: _points_text(result["points"]) for model, result in found["models"].items()}
        if any(points.values()):
            parts.append(f"  sensitivity / specificity, thresholds chosen on {results['data']['thresholds_from']}:")
            parts.append(_aligned(points))
        for pair in found["comparisons"][:_PRINTED]:
            difference = f"{figure_text(pair['difference'])} ({figure_text(pair['interval'])}), p {p_text(pair['p'])}"
            parts.append(f"  {' - '.join(pair['models'])}: {difference}")
        if len(found["comparisons"]) > _PRINTED:
            parts.append(f"  {len(found['comparisons']) - _PRINTED} more comparisons of AUCs are in comparisons.csv")
        parts.append("")
    return "\n".join(parts + results["data"]["notes"])


def count_samples(number: int, level: str, positive: int, patients: int | None) -> str:
    """Return how many images, breasts or patients there are, and how many with cancer: "8 images (4 with cancer) ..."

    patients: whose images or breasts they are, where known.
    """
    of_patients = "" if level == "patient" or patients is None else f" of {counted(patients, 'patient')}"
    return f"{counted(number, level)} ({positive:,} with cancer){of_patients}"


def _main_figures(result: dict[str, Any]) -> dict[str, str]:
    auc, precision, calibration = result["auc"], result["average_precision"], result["calibration"] or {}
    figures = {"AUC": auc["value"], "95% DeLong": auc["delong"], "95% bootstrap": auc["bootstrap"]}
    figures |= {"PR area": precision["value"], "95% bootstrap ": precision["bootstrap"]}
    figures |= {name: figure["value"] for name, figure in calibration.items() if name != "bins"}
    return {name: figure_text(value) for name, value in figures.items()}


def _points_text(points: list[dict[str, Any]]) -> dict[str, str]:
    return {point["name"]: " / ".join(figure_text(point[rate]["value"]) for rate in _RATES) for point in points}


def figure_text(value: float | Sequence[float] | None, sign: str = "") -> str:
    """Return a figure, or both ends of an interval, with three decimals. sign: "+" to show that of positive ones."""
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" if np.ndim(value) == 0 else f"{value[0]:.3f} to {value[1]:.3f}"


def p_text(p: float | None) -> str:
    """Return a p value with three decimals."""
    return "< 0.001" if p is not None and p < 0.001 else figure_text(p)


def _aligned(rows: dict[str, dict[str, str]]) -> str:
    text = pd.DataFrame.from_dict(rows, orient="index").fillna("-").to_string()
    return "\n".join(f"  {line}" for line in text.splitlines())


def write_predictions(out_dir: str | Path, name: str, table: pd.DataFrame) -> None:
    """Write a table as one of `PREDICTIONS`, before it is scored.

    With the first, what an earlier run left of others is removed: the second, and evaluation.json of whole results.
    """
    write_text(Path(out_dir, name), table.to_csv(index=False))
    if name == PREDICTIONS[0]:
        for other in (PREDICTIONS[1], "evaluation.json"):
            Path(out_dir, other).unlink(missing_ok=True)


def write_evaluation(out_dir: str | Path, table: pd.DataFrame, results: dict[str, Any]) -> None:
    """Write predictions.csv, evaluation.json, each of `score_tables` as CSV, roc.png, pr.png and calibration.png.

    Tables of an earlier run that these results do not have are removed.
    """
    out_dir = Path(out_dir)
    for name in SCORE_TABLES:
        Path(out_dir, f"{name}.csv").unlink(missing_ok=True)
    for name, content in {"predictions": table, **score_tables(results)}.items():
        write_text(out_dir / f"{name}.csv", content.to_csv(index=False))
    write_json(out_dir / "evaluation.json", results)
    for name, draw in (("roc", draw_roc), ("pr", draw_pr), ("calibration", draw_calibration)):
        figure = _draw_levels(results, draw)
        with atomic_write(out_dir / f"{name}.png") as temporary:
            figure.savefig(temporary, dpi=120)


def _draw_levels(results: dict[str, Any], draw: Callable):
    """Draw a panel for each level, by `draw(axes, result of a model, label, opacity of its band)` for each model."""
    from matplotlib.figure import Figure

    levels = results["levels"]
    figure = Figure(figsize=(4.5 * len(levels), 4.8), layout="constrained")
    for axes, (level, found) in zip(figure.subplots(1, len(levels), squeeze=False)[0], levels.items(), strict=True):
        for model, result in found["models"].items():
            draw(axes, result, model, band_opacity(found["models"]))
        axes.set(title=f"{level}s ({found['samples']}, {found['positive']} positive)", xlim=(0, 1), ylim=(0, 1.005))
        axes.set_aspect("equal")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    return figure


def band_opacity(models: Collection) -> float:
    """Return the opacity of the bands of these models in one picture: none for many, which would hide each other."""
    return 0.12 if len(models) <= 3 else 0.0


def draw_roc(axes: "Axes", result: dict[str, Any], label: str, opacity: float) -> None:
    """Draw the ROC curve of a model's results in the next style of the axes, its band and first operating point."""
    curve, auc = result["roc"], result["auc"]
    label = f"{label}: {figure_text(auc['value'])}" + (f" ({figure_text(auc['delong'])})" if auc["delong"] else "")
    (line,) = axes.plot(curve["false_positive"], curve["true_positive"], label=label)
    axes.fill_between(curve["false_positive"], curve["low"], curve["high"], color=line.get_color(), alpha=opacity, lw=0)
    for point in result["points"][:1]:
        place = 1 - point["specificity"]["value"], point["sensitivity"]["value"]
        axes.plot(*place, "o", color=line.get_color(), markersize=5)
    axes.axline((0, 0), slope=1, color="0.8", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")


def draw_pr(axes: "Axes", result: dict[str, Any], label: str, opacity: float) -> None:
    """Draw the precision-recall curve of a model's results in the next style of the axes, and its band."""
    curve, area = result["pr"], result["average_precision"]["value"]
    (line,) = axes.step(curve["recall"], curve["precision"], where="pre", label=f"{label}: {figure_text(area)}")
    style = {"color": line.get_color(), "alpha": opacity, "lw": 0}
    axes.fill_between(curve["recall"], curve["low"], curve["high"], step="pre", **style)
    axes.set(xlabel="sensitivity (recall)", ylabel="precision (positive predictive value)")


def draw_calibration(axes: "Axes", result: dict[str, Any], label: str, opacity: float) -> None:
    """Draw the observed share of positives of each bin of predictions, if these are probabilities."""
    axes.axline((0, 0), slope=1, color="0.8", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlabel="predicted probability", ylabel="observed share of positives")
    if (calibration := result["calibration"]) is None:
        return
    bins = calibration["bins"]
    predicted, observed = ([part[name] for part in bins] for name in ("predicted", "observed"))
    reach = np.abs([np.subtract(part["interval"], part["observed"]) for part in bins]).T
    axes.errorbar(predicted, observed, reach, marker="o", markersize=4, linewidth=1, elinewidth=0.7, label=label)


def write_metarepository(path: str | Path, table: pd.DataFrame, model: str) -> None:
    """Write the image-level predictions of one model as the NYU metarepository's scoring script reads them.

    The columns are the number of the row (without a name), image_index (the name of the file without ending, as in exam
    lists), malignant_pred and malignant_label. Raises InputError where two images have the same name.
    """
    names = table["file"].map(lambda file: Path(file).stem)
    if (repeated := names.duplicated()).any():
        raise InputError(f"{path}: Expected a name of its own for each image. Received {names[repeated].iloc[0]} twice")
    columns = {"image_index": names, "malignant_pred": table[model], "malignant_label": table["label"]}
    write_text(path, pd.DataFrame(columns).to_csv())


def loaded_versions() -> dict[str, str]:
    """Return the versions of Python and of those packages that made the results, as far as they are loaded."""
    names = ("numpy", "scipy", "pandas", "keras", "tensorflow", "jax", "torch", "cv2")
    loaded = {name: getattr(sys.modules[name], "__version__", "unknown") for name in names if name in sys.modules}
    return {"python": platform.python_version(), **loaded}
