"""Compare scores with 0/1 labels, with intervals by patient: areas, proportions, calibration.

The images of a patient are not independent, and neither are the sides. Functions with an argument `groups` treat the
samples of a group (a patient) as one draw: the bootstrap draws whole groups, and variances are for clustered data.
Where each group has one sample these are the familiar variances of independent samples.
"""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
# Probabilities are kept this far from 0 and 1 where their logit is taken: the resolution of 32-bit floats.
_EPSILON = 1e-7


# --------------------------------------------------------------------------------------------------------- areas


def cumulative_counts(
    truth: np.ndarray, score: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count positives and negatives at or above each distinct score; all curves are made from these counts.

    truth: (N,) 0/1 labels. score: (N,), the higher the more likely 1. weights: (N,) or (R, N), such as how often each
    sample is in each of R replicates; default: each once. Returns thresholds (T,), falling; weights of the true and of
    the false positives, (T,) or (R, T), rising.
    """
    order = np.argsort(-score, kind="stable")
    last_of_ties = np.flatnonzero(np.append(np.diff(score[order]) != 0, True))
    positive = truth[order].astype(bool)
    weights = np.ones(len(score)) if weights is None else weights[..., order]
    true, false = (np.cumsum(weights * side, axis=-1)[..., last_of_ties] for side in (positive, ~positive))
    return score[order][last_of_ties], true, false


def roc_area(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Compute the area under the ROC curve by trapezoids of (..., T) `cumulative_counts`; NaN without both classes."""
    before = np.concatenate([np.zeros_like(true[..., :1]), true[..., :-1]], axis=-1)
    area = (np.diff(false, axis=-1, prepend=0) * (true + before) / 2).sum(axis=-1)
    return _divide(area, true[..., -1].astype(float) * false[..., -1])


def average_precision(true: np.ndarray, false: np.ndarray) -> np.ndarray:
    """Compute the mean precision over the positives from (..., T) `cumulative_counts`.

    It is the area under the precision-recall curve in steps, since straight lines between its points would be too
    optimistic (Davis and Goadrich 2006).
    """
    hits = np.diff(true, axis=-1, prepend=0) * _divide(true, true + false, 0.0)
    return _divide(hits.sum(axis=-1), true[..., -1])


def _divide(a, b, otherwise: float = np.nan) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(a), np.shape(b))
    return np.divide(a, b, out=np.full(shape, otherwise), where=np.broadcast_to(np.asarray(b) != 0, shape))


def delong(truth: np.ndarray, scores: np.ndarray, groups: Sequence | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the AUCs of M scores of the same samples and the covariance matrix of these AUCs.

    By structural components (DeLong, DeLong and Clarke-Pearson 1988), computed from midranks (Sun and Xu 2014), and
    summed by group (Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data").

    truth: (N,) 0/1 labels. scores: (M, N). groups: (N,) of each sample; default: each is its own. Returns (M,), (M, M).
    Covariances are NaN where only one group has positives, or negatives; all is NaN without both classes.
    """
    from scipy.stats import rankdata

    truth, scores = np.asarray(truth).astype(bool), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    positives, negatives = truth.sum(), (~truth).sum()
    if not positives or not negatives:
        return np.full(len(scores), np.nan), np.full((len(scores), len(scores)), np.nan)
    ranks = rankdata(scores, axis=1)
    # The share of the other class that each sample is ranked rightly against.
    above = (ranks[:, truth] - rankdata(scores[:, truth], axis=1)) / negatives
    below = 1 - (ranks[:, ~truth] - rankdata(scores[:, ~truth], axis=1)) / positives
    auc = above.mean(axis=1)
    group_of = _group_numbers(groups, len(truth))
    nb_group = group_of.max() + 1
    sums, variance = [], 0.0
    for side, parts in ((truth, above), (~truth, below)):
        deviations = [np.bincount(group_of[side], part, nb_group) for part in parts - auc[:, None]]
        sums.append(np.stack(deviations) / side.sum())
        variance = variance + _unbiased(len(np.unique(group_of[side]))) * sums[-1] @ sums[-1].T
    both = sums[0] @ sums[1].T
    # Exactly zero where no group has samples of both classes.
    if both.any():
        variance = variance + _unbiased(nb_group) * (both + both.T)
    return auc, variance


def _group_numbers(groups, n: int) -> np.ndarray:
    """Return the number 0, 1, ... of the group of each of n samples, groups being numbered in sorted order."""
    return np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].ravel()


def _unbiased(n: int) -> float:
    return n / (n - 1) if n > 1 else np.nan


def z_value(confidence: float = CONFIDENCE) -> float:
    """Return how many standard errors an interval of this confidence reaches to each side."""
    from scipy.stats import norm

    return float(norm.ppf((1 + confidence) / 2))


def auc_interval(auc: float, variance: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the interval of an AUC, normal on the logit scale; NaN for an AUC of 0 or 1, whose variance is not known.

    It stays within 0..1 and, near these, covers the truth more often than one on the plain scale (Pepe 2003, section
    5.2).
    """
    if not 0 < auc < 1 or np.isnan(variance):
        return np.nan, np.nan
    centre, half = np.log(auc / (1 - auc)), z_value(confidence) * np.sqrt(variance) / (auc * (1 - auc))
    low, high = 1 / (1 + np.exp(-centre + half)), 1 / (1 + np.exp(-centre - half))
    return float(low), float(high)


def difference_test(difference: float, variance: float, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Return (low, high, two-sided p) of a difference, normal on its own scale.

    Without variance, as of the same scores twice, p is 1 for no difference, and unknown (NaN) for any other.
    """
    from scipy.stats import norm

    if variance < 1e-15:
        return (0.0, 0.0, 1.0) if abs(difference) < 1e-12 else (np.nan, np.nan, np.nan)
    error = np.sqrt(variance)
    half = z_value(confidence) * error
    return difference - half, difference + half, float(2 * norm.sf(abs(difference) / error))


# ----------------------------------------------------------------------------------------------------- bootstrap


def bootstrap_counts(groups: Sequence, rng: np.random.Generator, replicates: int = 2000) -> np.ndarray:
    """Count how often each sample is in each replicate of a bootstrap that draws whole groups.

    groups: (N,) of each sample, such as its patient: its samples are not independent, so they are drawn together.
    rng: makes `replicates` draws of as many groups as there are, with replacement. The same generator and number of
    groups give the same draws, so that differences between scores, and levels of them, pair up.
    Returns (replicates, N) int32, weights for `cumulative_counts` or a matrix product.
    """
    group_of = _group_numbers(groups, len(groups))
    nb_group = group_of.max() + 1
    draws = [np.bincount(rng.integers(nb_group, size=nb_group), minlength=nb_group) for _ in range(replicates)]
    return np.array(draws, dtype=np.int32)[:, group_of]


def percentile_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Compute the percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13) of a statistic.

    values: (replicates,) of the statistic, NaN where it is undefined. NaN are left out, and the interval is NaN where
    they are more than half. For an AUC of 1 it has no width, since there is no error to draw: that says little where
    samples are few.
    """
    defined = values[~np.isnan(values)]
    if 2 * len(defined) < len(values):
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_auc(truth: np.ndarray, score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute the AUC (R,) of each replicate, NaN where it holds one class. counts: (R, N) of `bootstrap_counts`."""
    return roc_area(*cumulative_counts(truth, score, counts)[1:])


# ----------------------------------------------------------------------------------- proportions and calibration


def proportion_interval(
    hits: np.ndarray, groups: Sequence | None = None, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Compute Wilson's score interval of a proportion of samples in groups, such as a sensitivity; NaN without any.

    hits: (N,) 0/1. The number of samples is divided by the design effect: the ratio, 1 at least, of the variance by
    groups to the variance of independent samples (Rao and Scott 1992; Saha, Miller and Wang 2016). Where all samples
    agree that ratio is not known, and the groups count instead of the samples.
    """
    hits = np.asarray(hits, dtype=np.float64)
    n = len(hits)
    if n == 0:
        return np.nan, np.nan
    group_of = _group_numbers(groups, n)
    nb_group = group_of.max() + 1
    p = hits.mean()
    independent = p * (1 - p) / max(n - 1, 1)
    if independent == 0:
        effective = nb_group
    else:
        by_group = np.bincount(group_of, hits - p) / n
        # One group says nothing about how groups differ.
        clustered = _unbiased(nb_group) * (by_group**2).sum() if nb_group > 1 else np.inf
        effective = n / max(1.0, clustered / independent) if np.isfinite(clustered) else 1.0
    z = z_value(confidence)
    centre = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * np.sqrt(p * (1 - p) / effective + z**2 / (4 * effective**2))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def logit(probability: np.ndarray) -> np.ndarray:
    """Return the log odds of probabilities, finite for 0 and 1 too."""
    probability = np.clip(np.asarray(probability, dtype=np.float64), _EPSILON, 1 - _EPSILON)
    return np.log(probability / (1 - probability))


def logistic_fit(
    design: np.ndarray, truth: np.ndarray, offset: np.ndarray | float = 0.0, groups: Sequence | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Fit a logistic regression by maximum likelihood: coefficients (K,), and their errors (K,) by groups (sandwich).

    design: (N, K), with a column of ones for an intercept. truth: (N,) 0/1. offset: added to the linear predictor.
    groups: (N,) of each sample; default: each is its own.
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    n = len(truth)

    def loss(beta):
        linear = design @ beta + offset
        return (np.logaddexp(0, linear) - truth * linear).mean()

    def gradient(beta):
        return design.T @ (expit(design @ beta + offset) - truth) / n

    def hessian(beta):
        p = expit(design @ beta + offset)
        return (design.T * (p * (1 - p))) @ design / n

    start = np.zeros(design.shape[1])
    beta = minimize(loss, start, jac=gradient, hess=hessian, method="trust-exact", options={"gtol": 1e-9}).x
    group_of = _group_numbers(groups, n)
    residual = truth - expit(design @ beta + offset)
    scores = np.stack([np.bincount(group_of, column * residual) for column in design.T])
    bread = np.linalg.inv(n * hessian(beta))
    covariance = _unbiased(scores.shape[1]) * bread @ scores @ scores.T @ bread
    return beta, np.sqrt(np.diag(covariance))
