"""How good are the predictions of whole-image classifiers: images, breasts and patients scored with intervals.

A *table* has a row an image and the columns of `COLUMNS`, then one column a model: its probability of cancer.
`evaluate` makes *results* from it, in types that JSON can hold; its docstring lists them. What to read and write for
it is here too; `scripts/evaluate.py` is the command line.

Levels: a breast's score is the mean of its images' (both views), its label whether any of them is positive; a
patient's score is that of the more suspicious breast (or the mean of both), the label whether either has cancer.
All intervals are 95% ones by patient: see `dm_statistics`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

import dm_statistics as stats
from dm_files import InputError

COLUMNS = ("file", "patient", "side", "view", "label")
LEVELS = ("image", "breast", "patient")
NB_BIN = 10  # of the calibration curve
# Replicates times samples worked on at a time: bounds the memory.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Points:
    """At which thresholds sensitivity and specificity are given: a sample counts as positive from the threshold on.

    youden: where their sum is largest. sensitivities, specificities: the highest threshold with at least this
    sensitivity, the lowest with at least this specificity. thresholds: as they are.
    """

    youden: bool = True
    sensitivities: Sequence[float] = (0.9,)
    specificities: Sequence[float] = (0.9,)
    thresholds: Sequence[float] = (0.5,)

    def choose(self, truth: np.ndarray, score: np.ndarray) -> dict[str, float]:
        """Thresholds by the names of their points, chosen on these samples, which hold both classes."""
        thresholds, true, false = stats.cumulative_counts(truth, score)
        # Above all scores nothing is positive.
        thresholds = np.append(np.nextafter(thresholds[0], np.inf), thresholds)
        sensitivity = np.append(0, true / true[-1])
        specificity = 1 - np.append(0, false / false[-1])
        chosen = {"Youden": np.argmax(sensitivity + specificity)} if self.youden else {}
        for value in self.sensitivities:
            chosen[f"sensitivity {value:g}"] = np.flatnonzero(sensitivity >= value - 1e-12)[0]
        for value in self.specificities:
            chosen[f"specificity {value:g}"] = np.flatnonzero(specificity >= value - 1e-12)[-1]
        by_name = {name: float(thresholds[i]) for name, i in chosen.items()}
        return by_name | {f"threshold {value:g}": float(value) for value in self.thresholds}


def at_levels(table: pd.DataFrame, models: Sequence[str], patient_score: str = "max") -> dict[str, pd.DataFrame]:
    """Tables of patient, label and one column a model, by level.

    patient_score: "max" or "mean" of a patient's breasts. Without patients there is only the image level; where a
    side is missing there are no breasts, and a patient's score is made from the images.
    """
    columns = ["label", *models]
    levels = {"image": table[["patient", *columns]]}
    if not has_patients(table):
        return levels
    parts = table
    if (table["side"] != "").all():
        how = {"label": "max"} | dict.fromkeys(models, "mean")
        levels["breast"] = parts = table.groupby(["patient", "side"])[columns].agg(how).reset_index()
    how = {"label": "max"} | dict.fromkeys(models, patient_score)
    levels["patient"] = parts.groupby("patient")[columns].agg(how).reset_index()
    return levels


def has_patients(table: pd.DataFrame) -> bool:
    return bool((table["patient"] != "").all())


def evaluate(
    table: pd.DataFrame,
    models: Sequence[str],
    points: Points | None = None,
    chosen_on: pd.DataFrame | None = None,
    patient_score: str = "max",
    replicates: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Results of all models at all levels.

    Args:
        table: see the module's text; every patient "" when they are not known, and images are then taken as
            independent. models: names of its prediction columns.
        points: see `Points`. chosen_on: a table of other images, such as the validation set's, on which their
            thresholds are chosen; default: `table` itself, which flatters what they give.
        patient_score: see `at_levels`. replicates, seed: of the bootstrap, whose draws all models and levels share.

    Returns:
        A dict; an interval is [low, high], and it or any figure is None where it is undefined::

            models: names
            data: {images, positive, patients (None if not known), patient_score, thresholds_from ("these images" or
                "other images"), confidence, replicates, seed}
            levels: by "image", "breast", "patient" (where they exist):
                samples, positive, patients
                models: by name:
                    auc: {value, error (standard error), delong (interval), bootstrap (interval)}
                    average_precision: {value, bootstrap}
                    points: [{name, threshold, sensitivity: {value, interval, bootstrap}, specificity: likewise}]
                    calibration: {brier: {value, bootstrap}, intercept: {value, interval}, slope: {value, interval},
                        bins: [{predicted, observed, interval, count}]}
                    roc: {false_positive, true_positive, low, high}, lists of one length, as are those of
                    pr: {recall, precision, low, high}
                comparisons: [{models: [a, b], difference (of AUC, a - b), interval, p, bootstrap}]

        Raises InputError for a table without both classes, or predictions that are no probabilities.
    """
    check_table(table, models)
    points = points or Points()
    levels = at_levels(table, models, patient_score)
    notes = [f"{name} level left out: {_why_missing(table)}" for name in LEVELS if name not in levels]
    for name in [name for name, level in levels.items() if level["label"].nunique() == 1]:
        notes.append(f"{name} level left out: all have the label {levels.pop(name)['label'].iloc[0]}")
    others = levels if chosen_on is None else at_levels(chosen_on, models, patient_score)
    for name in levels:
        if name not in others or others[name]["label"].nunique() == 1:
            raise InputError(
                f"the {name} level has no thresholds: Expected {name}s of both classes where they are chosen, as where "
                f"they are judged. Received {'none' if name not in others else 'one class'}"
            )
    data = {
        "images": len(table),
        "positive": int(table["label"].sum()),
        "patients": int(table["patient"].nunique()) if has_patients(table) else None,
        "patient_score": patient_score,
        "thresholds_from": "these images" if chosen_on is None else "other images",
        "confidence": stats.CONFIDENCE,
        "replicates": replicates,
        "seed": seed,
        "notes": notes,
    }
    return {
        "models": list(models),
        "data": data,
        "levels": {
            name: _evaluate_level(level, others[name], models, points, replicates, seed)
            for name, level in levels.items()
        },
    }


def check_table(table: pd.DataFrame, models: Sequence[str]) -> None:
    """InputError for a table that cannot be scored: without both labels, or with predictions that are not finite."""
    if table["label"].nunique() < 2:
        label = "none" if table.empty else f"{len(table)} with the label {table['label'].iloc[0]}"
        raise InputError(f"the AUC is undefined: Expected images of both classes. Received {label}")
    for name in models:
        if bad := (~np.isfinite(table[name].to_numpy(float))).sum():
            first = table["file"][~np.isfinite(table[name])].iloc[0]
            raise InputError(
                f"{name}: Expected finite predictions. Received NaN or infinity for {bad} of {len(table)} images, such "
                f"as {first}: the model has diverged, or the table has holes"
            )


def _why_missing(table: pd.DataFrame) -> str:
    return "the side of some images is not known" if has_patients(table) else "patients are not known"


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
    comparisons = []
    for a, b in combinations(range(len(models)), 2):
        difference = float(auc[a] - auc[b])
        variance = covariance[a, a] + covariance[b, b] - 2 * covariance[a, b]
        *interval, p = stats.difference_test(difference, variance)
        comparisons.append(
            {
                "models": [models[a], models[b]],
                "difference": difference,
                "interval": _interval(interval),
                "p": _number(p),
                "bootstrap": _interval(stats.percentile_interval(drawn_auc[a] - drawn_auc[b])),
            }
        )
    return {
        "samples": len(truth),
        "positive": int(truth.sum()),
        "patients": len(np.unique(groups)) if has_patients(level) else None,
        "models": by_model,
        "comparisons": comparisons,
    }


def _evaluate_model(truth, score, variance, groups, counts, thresholds) -> tuple[dict[str, Any], np.ndarray]:
    """Results of one model, and the AUC of each replicate. variance: of its AUC."""
    roc, pr, drawn_auc, drawn_precision = _curves(truth, score, counts)
    _, true, false = stats.cumulative_counts(truth, score)
    auc = float(stats.roc_area(true, false))
    result = {
        "auc": {
            "value": auc,
            "error": _number(np.sqrt(variance)),
            "delong": _interval(stats.auc_interval(auc, variance)),
            "bootstrap": _interval(stats.percentile_interval(drawn_auc)),
        },
        "average_precision": {
            "value": float(stats.average_precision(true, false)),
            "bootstrap": _interval(stats.percentile_interval(drawn_precision)),
        },
        "points": [
            {"name": name, "threshold": threshold} | _at_threshold(truth, score >= threshold, groups, counts)
            for name, threshold in thresholds.items()
        ],
        "calibration": _calibration(truth, score, groups, counts),
        "roc": roc,
        "pr": pr,
    }
    return result, drawn_auc


def _at_threshold(truth, called, groups, counts) -> dict[str, Any]:
    """Sensitivity and specificity of calling these samples positive."""
    result = {}
    for name, side, right in (("sensitivity", truth == 1, called), ("specificity", truth == 0, ~called)):
        drawn = counts[:, side]
        with np.errstate(invalid="ignore"):  # replicates without samples of this side
            values = (drawn @ right[side]) / drawn.sum(axis=1)
        result[name] = {
            "value": float(right[side].mean()),
            "interval": _interval(stats.proportion_interval(right[side], groups[side])),
            "bootstrap": _interval(stats.percentile_interval(values)),
        }
    return result


def _calibration(truth, probability, groups, counts) -> dict[str, Any] | None:
    """Brier score, calibration in the large (the intercept of a logistic regression of the labels with the logit as
    its offset), calibration slope (of one on the logit; Cox 1958, Van Calster et al. 2019), and the observed share in
    bins of about as many samples each. None for scores that are no probabilities."""
    if probability.min() < 0 or probability.max() > 1:
        return None
    errors = (probability - truth) ** 2
    logits, ones = stats.logit(probability), np.ones((len(truth), 1))
    intercept, slope = stats.logistic_fit(ones, truth, logits, groups), (np.nan, np.nan)
    positive, negative = logits[truth == 1], logits[truth == 0]
    # Where the classes do not overlap the likelihood has no maximum.
    if positive.min() < negative.max() and negative.min() < positive.max():
        slope = (fit[1] for fit in stats.logistic_fit(np.column_stack([ones, logits]), truth, groups=groups))
    # Equal probabilities stay together.
    edges = np.unique(np.quantile(probability, np.arange(1, NB_BIN) / NB_BIN))
    bin_of = np.searchsorted(edges, probability, side="right")
    bins = []
    for index in (np.flatnonzero(bin_of == i) for i in np.unique(bin_of)):
        bins.append(
            {
                "predicted": float(probability[index].mean()),
                "observed": float(truth[index].mean()),
                "interval": _interval(stats.proportion_interval(truth[index], groups[index])),
                "count": len(index),
            }
        )
    return {
        "brier": {
            "value": float(errors.mean()),
            "bootstrap": _interval(stats.percentile_interval((counts @ errors) / counts.sum(axis=1))),
        },
        "intercept": _estimate(*(fit[0] for fit in intercept)),
        "slope": _estimate(*slope),
        "bins": bins,
    }


def _curves(truth, score, counts) -> tuple[dict, dict, np.ndarray, np.ndarray]:
    """The ROC and the precision-recall curve with their bands, and of each replicate the areas below them.

    Bands hold the middle 95% of the replicates' sensitivities at each false positive rate, and of their precisions
    where they first reach each recall.
    """
    _, true, false = stats.cumulative_counts(truth, score)
    # Of points on one straight line the first and the last are enough.
    corner = np.append((np.diff(true, 2, prepend=0) != 0) | (np.diff(false, 2, prepend=0) != 0), True)
    false_positive, true_positive = (np.append(0, part[corner] / part[-1]) for part in (false, true))
    found = np.diff(true, prepend=0) > 0
    recall, precision = true[found] / true[-1], (true / (true + false))[found]
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
            first = np.searchsorted(row_recall, recall - 1e-12)
            precisions.append(row_true[first] / (row_true[first] + row_false[first]))
    roc = {"false_positive": false_positive, "true_positive": true_positive} | _band(sensitivities)
    pr = {"recall": recall, "precision": precision} | _band(precisions)
    as_lists = ({name: values.tolist() for name, values in curve.items()} for curve in (roc, pr))
    return *as_lists, np.concatenate(auc), np.concatenate(area)


def _band(rows: list[np.ndarray]) -> dict[str, np.ndarray]:
    tail = (1 - stats.CONFIDENCE) / 2
    low, high = np.quantile(np.stack(rows), [tail, 1 - tail], axis=0)
    return {"low": low, "high": high}


def _number(value) -> float | None:
    """For JSON, which has no NaN."""
    return float(value) if np.isfinite(value) else None


def _interval(pair) -> list[float] | None:
    return [float(end) for end in pair] if np.isfinite(pair).all() else None


def _estimate(value, error) -> dict[str, Any]:
    """A coefficient and its normal interval."""
    half = stats.z_value() * error
    return {"value": _number(value), "interval": _interval((value - half, value + half))}
