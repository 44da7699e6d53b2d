"""Predict image sets and score the predictions: flips, AUC, accuracy, result files and the ROC picture."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mammo.base.files import InputError, atomic_write, write_json
from mammo.base.work import prefetch


class NotFiniteError(InputError):
    """Predictions hold NaN or infinity: the model has diverged."""


def flip_all_img(X: np.ndarray) -> list[np.ndarray]:
    """Return the four flips of a batch (N, H, W, C): as it is, left-right, up-down, both."""
    return [X, X[:, :, ::-1], X[:, ::-1], X[:, ::-1, ::-1]]


def predict(
    model: Any,
    data: Any,
    batch_size: int | None = None,
    samples: int | None = None,
    flips: bool = False,
    progress: bool = False,
    on_batch: Callable[[], None] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Predict every sample of `data` once.

    Args:
        model: a Keras model, or anything with `predict_on_batch` or `predict`.
        data: a `PyDataset` of batches (x, y) or (x, y, w), or such a tuple of whole arrays. x may itself be a tuple
            or list, of a model's several inputs.
        batch_size: for arrays only; default 32.
        samples: stop after this many samples; default all.
        flips: also predict the mean of the four flips.
        progress: show a bar.
        on_batch: called after each batch.

    Returns (y_true, y_pred, weights, y_pred_flips): arrays over the samples in order; the last two are None where there
    are no weights or `flips` is off. See `drop_unreadable`.
    """
    from keras.tree import map_structure

    predict_batch = getattr(model, "predict_on_batch", None) or model.predict
    columns: tuple[list, ...] = ([], [], [], [])
    seen, total = 0, None if isinstance(data, (tuple, list)) else len(data)
    for x, y, *w in tqdm(_batches(data, batch_size), "predict", total, disable=None if progress else True):
        room = len(y) if samples is None else samples - seen
        if room <= 0:
            break
        x, y, w = map_structure(lambda v, room=room: v[:room], x), y[:room], [v[:room] for v in w]
        plain = np.asarray(predict_batch(x))
        columns[0].append(y)
        columns[1].append(plain)
        columns[2].extend(w)
        if flips:
            flipped = [map_structure(lambda v, k=k: np.ascontiguousarray(flip_all_img(v)[k]), x) for k in (1, 2, 3)]
            columns[3].append(np.mean([plain, *map(np.asarray, map(predict_batch, flipped))], axis=0))
        seen += len(y)
        if on_batch is not None:
            on_batch()
    if not seen:
        raise InputError("Expected at least one image to predict. Received an empty set")
    y_true, y_pred, weights, y_flips = (np.concatenate(c) if c else None for c in columns)
    return y_true, y_pred, weights, y_flips


def drop_unreadable(y_true: np.ndarray, *columns: np.ndarray | None) -> tuple[np.ndarray | None, ...]:
    """Return the rows of y_true (N, classes) and of columns (N, ...) without lost images, whose labels are zeros.

    Labels of a single column are taken as they are, since 0 is a class there. Columns may be None.
    """
    if y_true.ndim < 2 or y_true.shape[1] < 2:
        return y_true, *columns
    there = y_true.any(axis=1)
    return tuple(None if column is None else column[there] for column in (y_true, *columns))


def _batches(data: Any, batch_size: int | None) -> Iterator[tuple]:
    if not isinstance(data, (tuple, list)):
        # The next batch is read while the network works on this one; no more of them, since batches are large.
        yield from prefetch(data.__getitem__, range(len(data)))
        return
    x, y, *w = data
    # Several inputs, rather than a list of images.
    several = isinstance(x, (tuple, list)) and len(x) > 0 and np.ndim(x[0]) == 4
    size = batch_size or 32
    for part in (slice(start, start + size) for start in range(0, len(y), size)):
        batch = tuple(np.asarray(view[part]) for view in x) if several else np.asarray(x[part])
        yield batch, *(np.asarray(column[part]) for column in (y, *w) if column is not None)


def pred_2view_img_list(
    cc_img_list: Sequence[np.ndarray] | None,
    mlo_img_list: Sequence[np.ndarray] | None,
    model: Any,
    use_mean: bool = False,
    *,
    flips: bool = False,
    batch_size: int = 4,
) -> np.ndarray:
    """Predict one breast by a model of two inputs, [CC, MLO], from all pairs of a CC and an MLO image.

    Args:
        cc_img_list, mlo_img_list: the images of each view, (H, W, C) float32 as the model takes them: for one breast
            what `flow_from_exam_list(..., prediction_mode=True)` gives. A view without images, None or empty, is taken
            as one black image, as in training, with a warning that says which view.
        use_mean: average over the pairs; otherwise the highest probability of each class counts.
        flips: take the mean of the four flips of each pair first.
        batch_size: pairs predicted at a time.

    Returns (classes,) probabilities, which add up to 1 with `use_mean`. Raises InputError when neither view has an
    image, or images differ in size.
    """
    views = {"CC": [] if cc_img_list is None else cc_img_list, "MLO": [] if mlo_img_list is None else mlo_img_list}
    there = [image for images in views.values() for image in images]
    if not there:
        raise InputError("Expected images of CC or MLO. Received none of either")
    if len(shapes := {np.shape(image) for image in there}) > 1:
        raise InputError(f"Expected images of one shape. Received {', '.join(map(str, sorted(shapes)))}")
    for view, images in views.items():
        if len(images) == 0:
            warnings.warn(f"no {view} image: a black one stands for it", stacklevel=2)
            views[view] = [np.zeros_like(there[0])]
    cc, mlo = (np.stack(column) for column in zip(*product(*views.values()), strict=True))
    _, plain, _, flipped = predict(model, ((cc, mlo), np.zeros(len(cc))), batch_size, flips=flips)
    of_pairs = flipped if flips else plain
    return of_pairs.mean(axis=0) if use_mean else of_pairs.max(axis=0)


def auc_by_class(y_true: np.ndarray, y_pred: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return the area under the ROC curve of each class against the rest, NaN where the labels hold only one side.

    y_true: one-hot labels (N, C), or 0/1 labels (N,) or (N, 1). y_pred: scores of the same shape, any monotone scale.
    weights: (N,) sample weights. Returns (C,) float64.
    """
    from sklearn.metrics import roc_auc_score

    y_pred = np.asarray(y_pred, dtype=np.float64).reshape(len(y_pred), -1)
    y_true = np.asarray(y_true)
    if y_true.ndim == 1 and y_pred.shape[1] > 1:
        y_true = np.eye(y_pred.shape[1])[y_true.astype(int)]
    y_true = y_true.reshape(len(y_true), -1)
    if y_true.shape != y_pred.shape:
        raise InputError(f"Expected predictions of shape {y_true.shape}. Received {y_pred.shape}")
    if not np.isfinite(y_pred).all():
        raise NotFiniteError("Expected finite predictions. Received NaN or infinity: the model has diverged")
    auc = np.full(y_true.shape[1], np.nan)
    for i in np.flatnonzero(y_true.any(axis=0) & ~y_true.all(axis=0)):
        auc[i] = roc_auc_score(y_true[:, i], y_pred[:, i], sample_weight=weights)
    return auc


def auc_line(auc: np.ndarray, class_list: Sequence[str] | None = None) -> str:
    """Return the AUC by class and their mean as text; undefined ones are `nan`."""
    names = class_list or [str(i) for i in range(len(auc))]
    by_class = ", ".join(f"{name}: {value:.4f}" for name, value in zip(names, auc, strict=True))
    return f"{by_class}, mean: {np.nanmean(auc) if np.isfinite(auc).any() else np.nan:.4f}"


def classification_scores(y_true: np.ndarray, y_pred: np.ndarray, class_list: Sequence[str]) -> dict[str, Any]:
    """Return accuracy, AUC, precision and recall by class, and the confusion matrix.

    y_true, y_pred: (N, C) one-hot labels and probabilities; the most probable class is the predicted one. Returns
    `classes` (the names, in the order of the matrix), `confusion_matrix` (rows: truth), `auc`, `precision` and `recall`
    by class name with None where undefined, `auc_mean` over the defined ones, `accuracy`, `samples`.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    truth, guess = y_true.argmax(axis=1), y_pred.argmax(axis=1)
    labels = range(len(class_list))
    precision, recall, *_ = precision_recall_fscore_support(truth, guess, labels=labels, zero_division=np.nan)
    auc = auc_by_class(y_true, y_pred)

    def by_class(values):
        return {name: None if np.isnan(v) else float(v) for name, v in zip(class_list, values, strict=True)}

    scores = {"accuracy": float((truth == guess).mean()), "samples": len(truth), "classes": list(class_list)}
    scores |= {"auc": by_class(auc), "precision": by_class(precision), "recall": by_class(recall)}
    scores["auc_mean"] = None if np.isnan(auc).all() else float(np.nanmean(auc))
    return scores | {"confusion_matrix": confusion_matrix(truth, guess, labels=labels).tolist()}


def scores_table(scores: dict[str, Any]) -> str:
    """Return `classification_scores` as text: a row a class, and the confusion matrix beside it."""
    import pandas as pd

    names = scores["classes"]
    table = pd.DataFrame({name: scores[name] for name in ("precision", "recall", "auc")}, index=names, dtype=float)
    matrix = pd.DataFrame(scores["confusion_matrix"], index=names, columns=[f"as {name}" for name in names])
    return table.join(matrix).to_string(float_format="{:.4f}".format, na_rep="-")


def write_test_results(
    out_dir: Path,
    filenames: Sequence[str],
    y_true: np.ndarray,
    predictions: dict[str, np.ndarray],
    class_list: Sequence[str],
) -> None:
    """Write `predictions.csv` (one row an image), `metrics.json` and `roc.png`.

    filenames: (N,) file of each sample. y_true: (N, C) one-hot labels. predictions: (N, C) probabilities by name of the
    way they were made, such as `single` and `flips`. class_list: names of the C classes.
    """
    import pandas as pd

    table = pd.DataFrame({"file": list(filenames), "label": [class_list[i] for i in y_true.argmax(axis=1)]})
    for way, y_pred in predictions.items():
        for i, name in enumerate(class_list):
            table[name if way == "single" else f"{name}_{way}"] = y_pred[:, i]
    with atomic_write(out_dir / "predictions.csv") as temporary:
        table.to_csv(temporary, index=False)
    scores = {way: classification_scores(y_true, y_pred, class_list) for way, y_pred in predictions.items()}
    write_json(out_dir / "metrics.json", scores)
    # The positive class, or every class where there are more than two.
    columns = [1] if len(class_list) == 2 else range(len(class_list))
    ways = [(i, way, y_pred[:, i]) for way, y_pred in predictions.items() for i in columns]
    plot_roc(out_dir / "roc.png", {f"{class_list[i]}, {way}": (y_true[:, i], score) for i, way, score in ways})


def plot_roc(path: Path, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw ROC curves. curves: 0/1 labels and scores, (N,) each, by label; undefined ones are left out."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_curve

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle="--")
    for label, (truth, score) in curves.items():
        auc = auc_by_class(truth, score)[0]
        if np.isnan(auc):
            continue
        false_positive, true_positive, _ = roc_curve(truth, score)
        axes.plot(false_positive, true_positive, label=f"{label}: AUC {auc:.3f}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", aspect="equal", xlim=(0, 1), ylim=(0, 1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
