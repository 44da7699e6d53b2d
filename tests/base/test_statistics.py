"""Areas, intervals and calibration: published worked values, closed forms, and second implementations."""

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from mammo.base import statistics as stats

# The 49 ovarian cancer patients of DeLong, DeLong and Clarke-Pearson (1988): albumin, total protein, 10 - K-G score and
# outcome, "-" where not measured.
OVARIAN = """
3.0 5.8 0 0  3.2 6.3 5 1  3.9 6.8 7 1  2.8 4.8 4 0  3.2 5.8 7 1  0.9 4.0 5 0  2.5 5.7 2 0  1.6 5.6 5 1  3.8 5.7 5 1
3.7 6.7 4 1  -   -   4 1  3.2 5.4 6 1  3.8 6.6 4 1  4.1 6.6 5 1  3.6 5.7 5 1  4.3 7.0 6 1  3.6 6.7 6 0  2.3 4.4 4 1
4.2 7.6 6 0  4.0 6.6 4 0  3.5 5.8 4 1  3.8 6.8 3 1  3.0 4.7 2 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 4 1  4.1 8.2 4 1
4.3 7.0 5 1  4.3 6.5 6 1  3.2 5.1 5 1  2.6 4.7 4 1  3.3 6.8 4 0  1.7 4.0 3 0  -   -   4 1  3.7 6.1 5 1  3.3 6.3 3 1
4.2 7.7 4 1  3.5 6.2 5 1  2.9 5.7 1 0  2.1 4.8 3 1  -   -   2 1  2.8 6.2 2 0  -   -   3 1  -   -   3 1  4.0 7.0 3 1
3.3 5.7 4 1  3.7 6.9 5 1  2.0 -   3 1  3.6 6.6 5 1
"""


def clustered(seed=0, patients=60, images=4, scores=1, effect=1.0):
    """Labels, `scores` scores (M, N) and patients, where the sides of a patient differ in label and share an error."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(patients), images)
    truth = np.repeat(rng.random(patients * images // 2) < 0.3, 2).astype(int)
    shared = rng.normal(size=patients)[patient]
    return truth, effect * truth + shared + rng.normal(size=(scores, len(truth))), patient


# --------------------------------------------------------------------------------------------------------- areas


@pytest.mark.parametrize("decimals", [1, 9])
def test_areas_are_scikit_learns_with_weights_and_ties(decimals):
    rng = np.random.default_rng(0)
    truth, score = rng.integers(0, 2, 80), rng.normal(size=80).round(decimals)
    weights = rng.integers(0, 4, (5, 80))
    _, true, false = stats.cumulative_counts(truth, score, weights)
    for row in range(5):
        expected = roc_auc_score(truth, score, sample_weight=weights[row])
        assert stats.roc_area(true, false)[row] == pytest.approx(expected, abs=1e-12)
        expected = average_precision_score(truth, score, sample_weight=weights[row])
        assert stats.average_precision(true, false)[row] == pytest.approx(expected, abs=1e-12)
    _, true, false = stats.cumulative_counts(truth, score)
    assert stats.roc_area(true, false) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)


def test_areas_of_one_class_are_undefined():
    truth, score = np.array([0, 0, 1]), np.array([0.1, 0.2, 0.3])
    counts = np.array([[1, 2, 0], [0, 0, 3], [1, 1, 1]])
    _, true, false = stats.cumulative_counts(truth, score, counts)
    np.testing.assert_array_equal(stats.roc_area(true, false), [np.nan, np.nan, 1])
    np.testing.assert_array_equal(stats.average_precision(true, false), [np.nan, 1, 1])


def test_delong_gives_the_published_figures():
    """The areas of the paper, and p of the test of all three as the package pyroc gives it, which fills in medians."""
    cells = [np.nan if cell == "-" else float(cell) for cell in OVARIAN.split()]
    *tests, outcome = np.reshape(cells, (-1, 4)).T
    auc, covariance = stats.delong(outcome, [np.where(np.isnan(x), np.nanmedian(x), x) for x in tests])
    assert auc == pytest.approx([0.72, 0.65, 0.69], abs=0.005)
    contrast = np.array([[1, -1, 0], [1, 0, -1]])
    difference = contrast @ auc
    chi_square = difference @ np.linalg.solve(contrast @ covariance @ contrast.T, difference)
    assert chi2.sf(chi_square, 2) == pytest.approx(0.42291256338064165, abs=1e-12)


def slow_delong(truth, scores, groups):
    """Obuchowski's sums written out: kernel of all pairs, then loops over the groups."""
    positive, negative = scores[:, truth == 1], scores[:, truth == 0]
    kernel = (positive[:, :, None] > negative[:, None]) + 0.5 * (positive[:, :, None] == negative[:, None])
    auc = kernel.mean(axis=(1, 2))
    by_positive, by_negative = kernel.mean(axis=2) - auc[:, None], kernel.mean(axis=1) - auc[:, None]
    m, n = positive.shape[1], negative.shape[1]
    s10, s01, s11 = (np.zeros((len(scores), len(scores))) for _ in range(3))
    for group in set(groups):
        x = by_positive[:, groups[truth == 1] == group].sum(axis=1)
        y = by_negative[:, groups[truth == 0] == group].sum(axis=1)
        s10, s01, s11 = s10 + np.outer(x, x), s01 + np.outer(y, y), s11 + np.outer(x, y)
    nb_10, nb_01, nb = len(set(groups[truth == 1])), len(set(groups[truth == 0])), len(set(groups))
    s10, s01, s11 = s10 * nb_10 / ((nb_10 - 1) * m), s01 * nb_01 / ((nb_01 - 1) * n), s11 * nb / (nb - 1)
    return auc, s10 / m + s01 / n + (s11 + s11.T) / (m * n)


@pytest.mark.parametrize("images", [1, 2, 4])
@pytest.mark.parametrize("decimals", [0, 9])
def test_delong_by_patient_is_obuchowskis(images, decimals):
    truth, scores, patient = clustered(1, 40 // images * 2, images, 3)
    scores = scores.round(decimals)
    auc, covariance = stats.delong(truth, scores, patient)
    expected_auc, expected = slow_delong(truth, scores, patient)
    np.testing.assert_allclose(auc, expected_auc, rtol=1e-12)
    np.testing.assert_allclose(covariance, expected, rtol=1e-10)
    if images == 1:
        np.testing.assert_array_equal(covariance, stats.delong(truth, scores)[1])


def test_delong_by_hand():
    # 0.8 beats both negatives, 0.4 beats one of them: components 1 and 1/2; the negatives' are 1/2 and 1.
    truth, score = np.array([1, 1, 0, 0]), np.array([0.8, 0.4, 0.5, 0.1])
    auc, covariance = stats.delong(truth, score)
    assert auc[0] == 0.75
    assert covariance[0, 0] == pytest.approx(0.125 / 2 + 0.125 / 2)
    # In two groups of both classes the sums of a group are 1/4 - 1/4 (0.8 and 0.5) and their opposite.
    assert stats.delong(truth, score, ["a", "b", "a", "b"])[1][0, 0] == pytest.approx(0)


def test_delong_where_something_is_undefined():
    score = np.arange(4.0)
    assert np.isnan(stats.delong(np.zeros(4), score)[0]).all()
    auc, covariance = stats.delong(np.array([0, 0, 1, 1]), score, ["a", "b", "c", "c"])
    assert auc[0] == 1 and np.isnan(covariance[0, 0])  # one patient with cancer


def test_delong_by_patient_has_the_variance_of_the_bootstrap():
    truth, scores, patient = clustered(2, 150, scores=2)
    _, covariance = stats.delong(truth, scores, patient)
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(patient == i) for i in range(150)]
    drawn = []
    for _ in range(1500):
        rows = np.concatenate([members[i] for i in rng.integers(150, size=150)])
        positive, negative = (scores[:, rows][:, truth[rows] == label] for label in (1, 0))
        drawn.append((positive[:, :, None] > negative[:, None]).mean(axis=(1, 2)))
    # The standard error of 1500 draws' standard deviation is 2%; the correlation's is at most 0.026.
    assert np.std(drawn, axis=0) == pytest.approx(np.sqrt(np.diag(covariance)), rel=0.08)
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert np.corrcoef(np.transpose(drawn))[0, 1] == pytest.approx(correlation, abs=0.08)
    # And without patients it is another.
    assert np.sqrt(stats.delong(truth, scores)[1][0, 0]) < 0.9 * np.sqrt(covariance[0, 0])


def test_the_interval_of_an_auc_is_symmetric_in_its_odds():
    low, high = stats.auc_interval(0.9, 0.02**2)
    odds = [p / (1 - p) for p in (low, 0.9, high)]
    assert odds[1] / odds[0] == pytest.approx(odds[2] / odds[1])
    assert np.log(odds[2] / odds[1]) == pytest.approx(1.959964 * 0.02 / 0.09, rel=1e-6)
    for auc, variance in ((1.0, 0.0), (0.0, 0.0), (0.7, np.nan), (np.nan, np.nan)):
        assert np.isnan(stats.auc_interval(auc, variance)).all()


def test_differences():
    low, high, p = stats.difference_test(0.0196, 0.01**2)
    assert (low, high) == pytest.approx((0, 0.0392), abs=1e-6)
    assert p == pytest.approx(0.05, abs=1e-4)
    assert stats.difference_test(0.0, 0.0) == (0, 0, 1)
    assert np.isnan(stats.difference_test(0.5, 0.0)).all()


# ----------------------------------------------------------------------------------------------------- bootstrap


def test_the_bootstrap_interval_of_a_mean_has_its_closed_form():
    values = np.random.default_rng(0).normal(3, 2, 500)
    counts = stats.bootstrap_counts(range(500), np.random.default_rng(1), replicates=4000)
    low, high = stats.percentile_interval(counts @ values / 500)
    half = 1.96 * values.std() / np.sqrt(500)
    assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.06 * half)


def test_samples_of_a_group_are_drawn_together():
    groups = [f"P_{i}" for i in range(60)]
    alone = stats.bootstrap_counts(groups, np.random.default_rng(1), 300)
    assert (alone.sum(axis=1) == 60).all()
    # The same draws for any number of samples a group, in any order.
    np.testing.assert_array_equal(stats.bootstrap_counts(groups * 5, np.random.default_rng(1), 300), np.tile(alone, 5))
    np.testing.assert_array_equal(stats.bootstrap_counts(groups[::-1], np.random.default_rng(1), 300), alone[:, ::-1])


def test_the_interval_over_three_groups_is_that_of_all_their_draws():
    truth, score = np.array([0, 1, 1, 0, 1]), np.array([0.1, 0.7, 0.3, 0.5, 0.9])
    groups, members = ["a", "a", "b", "b", "c"], ([0, 1], [2, 3], [4])

    def auc_of(rows):
        wins = np.subtract.outer(score[rows][truth[rows] == 1], score[rows][truth[rows] == 0])
        return np.mean(wins > 0) if wins.size else np.nan

    exact = [auc_of(np.concatenate([members[i] for i in draw])) for draw in itertools.product(range(3), repeat=3)]
    assert np.isnan(exact).sum() == 1  # c three times
    counts = stats.bootstrap_counts(groups, np.random.default_rng(0), replicates=3000)
    drawn = stats.bootstrap_auc(truth, score, counts)
    assert np.isnan(drawn).mean() == pytest.approx(1 / 27, abs=0.015)
    found = stats.percentile_interval(drawn, confidence=0.6)
    np.testing.assert_allclose(found, np.nanquantile(exact, [0.2, 0.8], method="inverted_cdf"), atol=1e-9)
    assert np.isnan(stats.percentile_interval(np.array([0.5, np.nan, np.nan]))).all()


# ----------------------------------------------------------------------------------- proportions and calibration


@pytest.mark.parametrize("hits, n", [(0, 7), (3, 7), (27, 30), (30, 30)])
def test_a_proportion_of_independent_samples_has_wilsons_interval(hits, n):
    interval = binomtest(hits, n).proportion_ci(method="wilson")
    found = stats.proportion_interval(np.arange(n) < hits)
    assert found == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_copies_do_not_narrow_the_interval_of_a_proportion():
    hits = np.arange(40) < 27
    expected = stats.proportion_interval(hits)
    patients = np.tile(np.arange(40), 3)
    # A 40th off the variance, which the published design effect takes from 3 x 40 independent samples.
    assert stats.proportion_interval(np.tile(hits, 3), patients) == pytest.approx(expected, abs=0.004)
    assert stats.proportion_interval(np.ones(120), patients) == stats.proportion_interval(np.ones(40))
    # One patient alone counts as one sample; samples that differ within patients count as they are.
    assert np.ptp(stats.proportion_interval([1, 0, 1], ["a"] * 3)) > 0.85
    pairs = np.tile([0, 1], 20)
    assert stats.proportion_interval(pairs, np.repeat(np.arange(20), 2)) == stats.proportion_interval(pairs)
    assert np.isnan(stats.proportion_interval([])).all()


def test_a_logistic_fit_is_scikit_learns():
    truth, (score,), _ = clustered(3)
    fitted = LogisticRegression(C=np.inf, tol=1e-10).fit(score[:, None], truth)
    beta, error = stats.logistic_fit(np.column_stack([np.ones_like(score), score]), truth)
    assert beta == pytest.approx([fitted.intercept_[0], fitted.coef_[0, 0]], abs=1e-5)
    # Where the model holds, the sandwich is near the inverse information (here within a fifth).
    p = fitted.predict_proba(score[:, None])[:, 1]
    design = np.column_stack([np.ones_like(score), score])
    information = np.linalg.inv((design.T * (p * (1 - p))) @ design)
    assert error == pytest.approx(np.sqrt(np.diag(information)), rel=0.2)


def test_an_offset_leaves_the_intercept_that_makes_means_agree():
    truth, (score,), _ = clustered(4)
    (intercept,), _ = stats.logistic_fit(np.ones((len(truth), 1)), truth, offset=score)
    assert np.mean(1 / (1 + np.exp(-intercept - score))) == pytest.approx(truth.mean(), abs=1e-8)


def test_copies_do_not_narrow_the_errors_of_a_fit():
    truth, (score,), _ = clustered(5)
    design = np.column_stack([np.ones_like(score), score])
    beta, error = stats.logistic_fit(design, truth)
    copied = stats.logistic_fit(np.tile(design, (3, 1)), np.tile(truth, 3), groups=np.tile(np.arange(len(truth)), 3))
    np.testing.assert_allclose(copied[0], beta, atol=1e-6)
    np.testing.assert_allclose(copied[1], error, rtol=1e-5)


def test_logits_of_zero_and_one_are_finite():
    assert stats.logit([0.5, 0, 1]) == pytest.approx([0, -np.log(1e7), np.log(1e7)], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ coverage


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 sets of 60 patients with four images each: by patient, and not otherwise. Monte Carlo error is 1.1%."""
    truth, scores, _ = clustered(0, 50_000, effect=1.5)
    expected = roc_auc_score(truth, scores[0])
    covered = {"delong": [], "bootstrap": [], "as if independent": []}
    for seed in range(400):
        truth, (score,), patient = clustered(seed + 1, effect=1.5)
        auc, covariance = stats.delong(truth, score, patient)
        counts = stats.bootstrap_counts(patient, np.random.default_rng(seed), 500)
        intervals = {
            "delong": stats.auc_interval(auc[0], covariance[0, 0]),
            "bootstrap": stats.percentile_interval(stats.bootstrap_auc(truth, score, counts)),
            "as if independent": stats.auc_interval(auc[0], stats.delong(truth, score)[1][0, 0]),
        }
        for name, (low, high) in intervals.items():
            covered[name].append(low <= expected <= high)
    share = {name: np.mean(values) for name, values in covered.items()}
    assert share["delong"] == pytest.approx(0.95, abs=0.03)
    assert share["bootstrap"] == pytest.approx(0.94, abs=0.03)
    assert share["as if independent"] < 0.9
