"""Prediction over sets, flip averaging, scores and result files, by closed forms."""

import json
import time

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from dm_image import DMImageDataGenerator
from mammo.base.files import InputError, write_json
from mammo.train.scoring import (
    auc_by_class,
    auc_line,
    classification_scores,
    flip_all_img,
    pred_2view_img_list,
    predict,
    scores_table,
    write_test_results,
)


class TopLeft:
    """Stand-in model: the pixel at the top left as the score of class 1."""

    def predict_on_batch(self, x):
        score = x[:, 0, 0, 0]
        return np.stack([1 - score, score], axis=1)


class Numbered(keras.utils.PyDataset):
    """Ten images of 2 x 2 in batches of three; pixel values are image number + 0.1, 0.2, 0.3, 0.4."""

    x = np.arange(10)[:, None, None, None] + np.array([[0.1, 0.2], [0.3, 0.4]])[None, :, :, None]
    y = np.eye(2)[[0, 1] * 5]

    def __init__(self):
        super().__init__(workers=3)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.x[index * 3 : index * 3 + 3], self.y[index * 3 : index * 3 + 3]


def test_flips_are_as_it_is_left_right_up_down_both():
    x = np.array([[1, 2], [3, 4]]).reshape(1, 2, 2, 1)
    flat = [f.ravel().tolist() for f in flip_all_img(x)]
    assert flat == [[1, 2, 3, 4], [2, 1, 4, 3], [3, 4, 1, 2], [4, 3, 2, 1]]


@pytest.mark.parametrize("data", [Numbered(), (Numbered.x, Numbered.y)], ids=["dataset", "arrays"])
@pytest.mark.parametrize("samples", [None, 7])
def test_every_sample_once_in_order_with_the_mean_of_four_flips(data, samples):
    y_true, y_pred, weights, y_flips = predict(TopLeft(), data, batch_size=4, samples=samples, flips=True)
    n = samples or 10
    np.testing.assert_allclose(y_pred[:, 1], np.arange(n) + 0.1)
    np.testing.assert_allclose(y_flips[:, 1], np.arange(n) + 0.25)
    np.testing.assert_array_equal(y_true, Numbered.y[:n])
    assert weights is None


class Views(keras.utils.PyDataset):
    """Four samples of two inputs, in batches of three: the second input is ten times the first."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        x, y = Numbered.x[:4][index * 3 : index * 3 + 3], Numbered.y[:4][index * 3 : index * 3 + 3]
        return (x, 10 * x), y


class SumOfViews:
    def predict_on_batch(self, views):
        return TopLeft().predict_on_batch(views[0] + views[1])


@pytest.mark.parametrize(
    "data", [Views(), ((Numbered.x[:4], 10 * Numbered.x[:4]), Numbered.y[:4])], ids=["dataset", "arrays"]
)
@pytest.mark.parametrize("samples", [None, 2])
def test_models_of_several_inputs(data, samples):
    y_true, y_pred, _, y_flips = predict(SumOfViews(), data, batch_size=3, samples=samples, flips=True)
    n = samples or 4
    np.testing.assert_array_equal(y_true, Numbered.y[:n])
    np.testing.assert_allclose(y_pred[:, 1], 11 * (np.arange(n) + 0.1))
    np.testing.assert_allclose(y_flips[:, 1], 11 * (np.arange(n) + 0.25))


class Slow(keras.utils.PyDataset):
    predicted = loaded = most = 0

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.loaded += 1
        self.most = max(self.most, self.loaded - self.predicted)
        time.sleep(0.1)
        return Numbered.x[index : index + 1], Numbered.y[index : index + 1]


def test_the_next_batch_is_read_during_prediction():
    data = Slow()

    class SlowModel(TopLeft):
        def predict_on_batch(self, x):
            time.sleep(0.1)
            data.predicted += 1
            return super().predict_on_batch(x)

    start = time.perf_counter()
    _, y_pred, _, _ = predict(SlowModel(), data)
    assert time.perf_counter() - start < 1.3  # 0.9, and 1.6 one after the other
    np.testing.assert_allclose(y_pred[:, 1], np.arange(8) + 0.1)
    assert data.most <= 2  # batches are large: the one in use and the next


def test_sample_weights_come_along():
    weights = np.arange(10.0)
    assert predict(TopLeft(), (Numbered.x, Numbered.y, weights), samples=3)[2].tolist() == [0, 1, 2]


def test_an_empty_set_is_refused():
    with pytest.raises(InputError, match="empty set"):
        predict(TopLeft(), (Numbered.x[:0], Numbered.y[:0]))


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(3)
    truth, score = rng.integers(0, 2, 40), rng.integers(0, 5, 40)
    positive, negative = score[truth == 1][:, None], score[truth == 0][None, :]
    expected = np.mean((positive > negative) + 0.5 * (positive == negative))
    assert auc_by_class(truth, score) == pytest.approx([expected])


def test_auc_refuses_what_it_cannot_score():
    with pytest.raises(InputError, match="NaN"):
        auc_by_class(np.array([0, 1]), np.array([0.1, np.nan]))
    with pytest.raises(InputError, match="shape"):
        auc_by_class(np.eye(3), np.zeros((3, 2)))


def test_auc_line_names_classes_and_leaves_out_undefined_ones_from_the_mean():
    assert auc_line(np.array([0.5, np.nan, 1.0]), ["a", "b", "c"]) == "a: 0.5000, b: nan, c: 1.0000, mean: 0.7500"
    assert auc_line(np.array([np.nan]), ["a"]) == "a: nan, mean: nan"


def test_scores_of_a_small_table():
    truth = np.eye(3)[[0, 0, 1, 2]]
    guess = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    scores = classification_scores(truth, guess, ["a", "b", "c"])
    assert scores["accuracy"] == 0.75
    assert scores["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert scores["auc"] == {"a": 0.75, "b": 1.0, "c": 1.0}
    assert scores["auc_mean"] == pytest.approx(2.75 / 3)
    assert scores["precision"] == {"a": 1.0, "b": 0.5, "c": 1.0}
    assert scores["recall"] == {"a": 0.5, "b": 1.0, "c": 1.0}
    rows = [line.split() for line in scores_table(scores).splitlines()]
    assert rows[0] == ["precision", "recall", "auc", "as", "a", "as", "b", "as", "c"]
    assert rows[1] == ["a", "1.0000", "0.5000", "0.7500", "1", "1", "0"]


def test_scores_of_classes_that_never_occur_are_undefined():
    scores = classification_scores(np.eye(2)[[1, 1]], np.array([[0.1, 0.9], [0.2, 0.8]]), ["neg", "pos"])
    assert scores["precision"] == {"neg": None, "pos": 1.0}
    assert scores["recall"] == {"neg": None, "pos": 1.0}
    assert scores_table(scores).splitlines()[1].split() == ["neg", "-", "-", "-", "0", "0"]


def test_options_given_as_paths_are_written_as_text(tmp_path):
    write_json(tmp_path / "args.json", {"out_dir": tmp_path, "size": [1, 2]})
    assert json.loads((tmp_path / "args.json").read_text()) == {"out_dir": str(tmp_path), "size": [1, 2]}


def test_result_files_hold_the_predictions_and_undefined_scores_as_null(tmp_path):
    truth = np.eye(2)[[1, 1]]
    single = np.array([[0.25, 0.75], [0.5, 0.5]])
    write_test_results(
        tmp_path, ["pos/a.png", "pos/b.png"], truth, {"single": single, "flips": single[::-1]}, ["neg", "pos"]
    )
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert table.columns.tolist() == ["file", "label", "neg", "pos", "neg_flips", "pos_flips"]
    assert table.iloc[0].tolist() == ["pos/a.png", "pos", 0.25, 0.75, 0.5, 0.5]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["single"]["auc"] == {"neg": None, "pos": None}
    assert metrics["flips"]["samples"] == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "predictions.csv", "roc.png"]


# ----------------------------------------------------------------------------------------------------- two views


class Product:
    """Stand-in for a model of two views: their top left pixels multiplied."""

    def predict_on_batch(self, views):
        score = views[0][:, 0, 0, 0] * views[1][:, 0, 0, 0]
        return np.stack([1 - score, score], axis=1)


def images(*values):
    """An image of 2 x 2 for each value: value, and 1, 2, 3 more towards the other corners."""
    return [np.float32(value) + np.arange(4, dtype="float32").reshape(2, 2, 1) for value in values]


def test_a_breast_is_the_maximum_or_the_mean_over_all_pairs_of_views():
    cc, mlo = images(1, 2, 5), images(3, 4)
    pairs = np.multiply.outer([1, 2, 5], [3, 4])
    np.testing.assert_allclose(pred_2view_img_list(cc, mlo, Product()), [1 - pairs.min(), pairs.max()])
    found = pred_2view_img_list(cc, mlo, Product(), True, batch_size=4)
    np.testing.assert_allclose(found, [1 - pairs.mean(), pairs.mean()])
    flipped = np.mean([np.multiply.outer([1, 2, 5] + np.array(k), [3, 4] + np.array(k)).mean() for k in range(4)])
    np.testing.assert_allclose(pred_2view_img_list(cc, mlo, Product(), use_mean=True, flips=True)[1], flipped)


@pytest.mark.parametrize("missing", [None, []])
def test_a_missing_view_is_black_and_named(missing):
    class Difference:
        def predict_on_batch(self, views):
            return views[0][:, 0, 0] - views[1][:, 0, 0]

    with pytest.warns(UserWarning, match="no MLO image"):
        assert pred_2view_img_list(images(1, 3), missing, Difference(), use_mean=True) == [2]
    with pytest.warns(UserWarning, match="no CC image"):
        assert pred_2view_img_list(missing, images(4), Difference()) == [-4]
    with pytest.raises(InputError, match="none of either"):
        pred_2view_img_list(missing, None, Difference())
    with pytest.raises(InputError, match=r"one shape.*\(2, 2, 1\), \(3, 2, 1\)"):
        pred_2view_img_list(images(1), [np.zeros((3, 2, 1))], Difference())


def test_breasts_of_an_exam_list(tmp_path):
    for i in range(4):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((4, 4), 10 * (i + 1), "uint8"))
    file = [str(tmp_path / f"{i}.png") for i in range(4)]
    exam = {
        "subj": "s", "exam": 1,
        "L": {"CC": file[:2], "MLO": file[2:3], "cancer": 0},
        "R": {"CC": file[3:], "MLO": None, "cancer": 1},
    }  # fmt: skip
    exams = DMImageDataGenerator().flow_from_exam_list(
        [exam], target_size=(4, 4), target_scale=None, prediction_mode=True, class_mode=None
    )
    ((_, _, cc, mlo),) = exams
    scores = [pred_2view_img_list(*views, Product(), use_mean=True)[1] for views in zip(cc, mlo, strict=True)]
    np.testing.assert_allclose(scores, [(10 * 30 + 20 * 30) / 2, 0])
