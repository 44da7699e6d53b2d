"""Classify breasts by the regions of their heatmaps: trees on the features of both views.

The paper compares its networks with such trees, "at four probability cut-offs"; it does not say which, nor how many
trees. The features of a map are `prob_heatmap_features` at several cut-offs. A view that is missing has NaN in all its
features, and the trees learn on which side of each split such breasts go.
"""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mammo.base.files import InputError, atomic_write, naming, write_json, write_text
from mammo.base.guards import check_trees, load_trees, readable
from mammo.base.statistics import bootstrap_auc, bootstrap_counts, percentile_interval
from mammo.base.work import run_parallel
from mammo.maps.files import MAP_VIEWS, HeatmapRecord, Heatmaps, load_heatmaps
from mammo.train.scoring import auc_by_class, plot_roc

if TYPE_CHECKING:
    import pandas as pd
    from skimage.measure._regionprops import RegionProperties
    from sklearn.base import ClassifierMixin

Maps = tuple[np.ndarray | None, np.ndarray | None]  # of CC and MLO, each (rows, columns, classes)
CLASSIFIERS = ("rf", "gbt")
_FORMAT = 1
# What maps must share, beside class names, strides and mode, for one classifier to take them: the patch classifier and
# the geometry, since areas are in cells. The scaling of pixels may differ, as it does between scanners.
_SHARED_OPTIONS = ("dl_state_crc32", "window", "img_size", "img_height")


# ----------------------------------------------------------------------------------------------------- the maps


def load_breasts(paths: Sequence[str | os.PathLike], class_names: Sequence[str] | None = None) -> Heatmaps:
    """Read several map files as one; breasts without a map are left out, and their number printed.

    class_names: of the maps' classes, background first, for files that hold none (the published program's). Raises
    InputError where a file is damaged or holds Grad-CAM maps, which are no probabilities; where the maps of the files
    cannot be compared; or a breast stands there twice.
    """
    files = []
    for path in paths:
        files.append(_load_probabilities(path, class_names))
        check_comparable(kind_of(files[-1]), kind_of(files[0]), path, paths[0])
    records = [record for heatmaps in files for record in heatmaps.records]
    [((patient, side), count)] = Counter((record.patient_id, record.side) for record in records).most_common(1)
    if count > 1:
        raise InputError(f"{', '.join(map(str, paths))}: {patient} {side} stands there {count} times")
    mapped = [record for record in records if any(record.views())]
    if len(mapped) < len(records):
        print(f"{len(records) - len(mapped)} of {len(records)} breasts have no map of either view and are left out")
    return replace(files[0], records=mapped)


def _load_probabilities(path, class_names: Sequence[str] | None) -> Heatmaps:
    heatmaps = load_heatmaps(path)
    nb_class = {heatmap.shape[2] for record in heatmaps.records for _, heatmap, *_ in record.views()}
    if not nb_class:
        raise InputError(f"{path}: Expected maps. Received none")
    if heatmaps.mode == "gradcam":
        received = "Received Grad-CAM of a whole-image one, whose values have no scale for cut-offs"
        raise InputError(f"{path}: Expected probabilities, maps of a patch classifier. {received}")
    if not heatmaps.class_names:
        heatmaps.class_names = list(class_names or [f"class_{i}" for i in range(max(nb_class))])
    if nb_class != {len(heatmaps.class_names)}:
        received = ", ".join(map(str, sorted(nb_class)))
        expected = f"Expected maps of the classes {', '.join(heatmaps.class_names)}"
        raise InputError(f"{path}: {expected}. Received {received} classes")
    return heatmaps


def kind_of(heatmaps: Heatmaps) -> dict[str, Any]:
    """Return what the maps of one classifier have in common, by name; None for what a file does not say."""
    kind = {"class_names": heatmaps.class_names, "mode": heatmaps.mode, "strides": heatmaps.strides}
    return kind | {name: heatmaps.options.get(name) for name in _SHARED_OPTIONS}


def check_comparable(kind: dict[str, Any], other: dict[str, Any], name: str, other_name: str) -> None:
    """Raise InputError if two results of `kind_of` differ in what both say. name, other_name: files, for the error."""
    for what, value in kind.items():
        if value != other[what] and value is not None and other[what] is not None:
            what_is = "patch classifier (CRC-32)" if what == "dl_state_crc32" else what.replace("_", " ")
            differ = f"{what_is}: Expected {other[what]}. Received {value}"
            raise InputError(f"{name}: maps of another kind than those of {other_name}: {differ}")


# ------------------------------------------------------------------------------------------------- the features


def feature_names(class_names: Sequence[str], cutoffs: Sequence[float], k: int) -> list[str]:
    """Return the names of the `breast_features` of a breast in their order, such as `cc_mass_mal_0.5_top1_area`."""
    names = _class_features([], k)
    each = product(MAP_VIEWS, cutoffs, class_names[1:], names)
    return [f"{view}_{class_name}_{cutoff:g}_{name}" for view, cutoff, class_name, name in each]


def breast_features(
    maps: Maps, cutoffs: Sequence[float], k: int, nb_cls: int, names: Sequence[str] | None = None
) -> np.ndarray:
    """Compute features (n,) float64 of the maps (cc, mlo) of a breast, those of `names` or all.

    Of several pairs of images call it for each.
    """
    each = (prob_heatmap_features(heatmap, cutoff, k, nb_cls) for heatmap, cutoff in product(maps, cutoffs))
    by_class = chain.from_iterable(each)
    return np.array([features[name] for features in by_class for name in names or features], np.float64)


def feature_table(heatmaps: Heatmaps, cutoffs: Sequence[float], k: int, jobs: int = 1) -> np.ndarray:
    """Compute the features (breasts, n) of all breasts, `jobs` at a time. Raises InputError that names the breast."""
    describe = functools.partial(_describe, cutoffs=tuple(cutoffs), k=k, nb_cls=len(heatmaps.class_names))
    return np.stack(list(run_parallel(describe, heatmaps.records, jobs, desc="features", unit="breast")))


def _describe(record: HeatmapRecord, **options) -> np.ndarray:
    with naming(f"{record.patient_id} {record.side}"):
        return breast_features((record.cc, record.mlo), **options)


# ----------------------------------------------------------------------------------------------- the classifier


@dataclass
class HeatmapClassifier:
    """A fitted classifier of breasts, and the features that it takes."""

    model: Any  # of scikit-learn
    cutoffs: list[float]  # see `prob_heatmap_features`, as for k
    k: int
    kind: dict[str, Any]  # `kind_of` the maps that it was trained on

    @classmethod
    def fit(
        cls, model: Any, heatmaps: Heatmaps, features: np.ndarray, cancer: np.ndarray, cutoffs: Sequence[float], k: int
    ) -> "HeatmapClassifier":
        """Fit a model of `make_model` to the `feature_table` of heatmaps and cancer (n,) 0 or 1."""
        return cls(_fit(model, features, cancer), list(cutoffs), k, kind_of(heatmaps))

    def predict_maps(self, breasts: Sequence[Maps]) -> np.ndarray:
        """Predict the probability of cancer (n,) of n breasts, each the maps (cc, mlo); one of the two may be None.

        Raises InputError for maps of other classes, and where both are None.
        """
        if any(cc is None and mlo is None for cc, mlo in breasts):
            raise InputError("Expected a map of CC or MLO. Received none of either")
        features = [breast_features(maps, self.cutoffs, self.k, len(self.kind["class_names"])) for maps in breasts]
        return self.model.predict_proba(np.array(features))[:, 1]

    def predict(self, heatmaps: Heatmaps, jobs: int = 1) -> np.ndarray:
        """Predict the probability of cancer (n,) of the breasts of `load_breasts`, described `jobs` at a time."""
        return self.model.predict_proba(feature_table(heatmaps, self.cutoffs, self.k, jobs))[:, 1]


def _fit(model, features: np.ndarray, cancer: np.ndarray):
    """Fit a model. Boosting fails on features that no breast has, such as of a missing view: zeros split nothing."""
    empty = np.isnan(features).all(axis=0)
    return model.fit(np.where(empty, 0.0, features), cancer)


def make_model(name: str, trees: int, seed: int, jobs: int = 1) -> "ClassifierMixin":
    """Make an unfitted random forest ("rf") or gradient-boosted trees ("gbt"); the classes weigh the same in both.

    seed: of the draws of the trees. jobs: trees of the forest fitted at a time. Boosting takes all cores, unless
    threadpoolctl limits it.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    shared = {"class_weight": "balanced", "random_state": seed}
    if name == "rf":
        return RandomForestClassifier(trees, n_jobs=jobs, **shared)
    if name == "gbt":
        # Shallow trees and a low rate, since breasts are few and features many.
        shallow = {"learning_rate": 0.05, "max_leaf_nodes": 8, "min_samples_leaf": 5, "max_features": 0.2}
        return HistGradientBoostingClassifier(max_iter=trees, early_stopping=False, **shallow, **shared)
    raise InputError(f"unknown classifier: Expected {' or '.join(CLASSIFIERS)}. Received {name!r}")


def patient_folds(cancer: np.ndarray, patients: Sequence[str], nb_fold: int, seed: int) -> np.ndarray:
    """Draw the fold (n,) of each breast, 0..nb_fold - 1: all breasts of a patient in one, the share of cancers alike.

    Raises InputError where fewer than nb_fold patients have a breast with cancer, or a breast without.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    cancer, patients = np.asarray(cancer), np.asarray(patients)
    with_cancer, without = (len(set(patients[cancer == label])) for label in (1, 0))
    if min(with_cancer, without) < nb_fold:
        expected = f"Expected at least {nb_fold} with a breast with cancer and {nb_fold} with one without"
        received = f"Received {with_cancer} and {without}; use fewer folds or more patients"
        raise InputError(f"too few patients for {nb_fold} folds: {expected}. {received}")
    fold = np.empty(len(cancer), int)
    splitter = StratifiedGroupKFold(nb_fold, shuffle=True, random_state=seed)
    for i, (_, held_out) in enumerate(splitter.split(cancer, cancer, patients)):
        fold[held_out] = i
    return fold


def cross_validate(
    model: "ClassifierMixin", features: np.ndarray, cancer: np.ndarray, fold: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Predict each breast by a model fitted without its fold, and measure how much each feature mattered.

    Takes a model of `make_model`, left unfitted, features (n, features), cancer (n,) 0 or 1, the fold of
    `patient_folds`, and the seed of the permutations. Returns probabilities of cancer (n,) and importances (folds,
    features): for a forest the decrease of impurity at the splits, for boosting the fall of the held-out AUC when the
    feature is permuted (NaN where it is undefined).
    """
    from sklearn.base import clone
    from sklearn.inspection import permutation_importance
    from tqdm import tqdm

    probability, importances = np.empty(len(cancer)), []
    for i in tqdm(np.unique(fold), desc="folds", unit="fold", disable=None):
        held_out = fold == i
        if len(set(cancer[~held_out])) < 2:
            raise InputError("a training part without both classes: Expected more patients, or fewer folds")
        fitted = _fit(clone(model), features[~held_out], cancer[~held_out])
        probability[held_out] = fitted.predict_proba(features[held_out])[:, 1]
        if hasattr(fitted, "feature_importances_"):
            importances.append(fitted.feature_importances_)
        elif len(set(cancer[held_out])) == 2:
            how = {"scoring": "roc_auc", "n_repeats": 1, "random_state": seed}
            fall = permutation_importance(fitted, features[held_out], cancer[held_out], **how)
            importances.append(fall.importances_mean)
        else:
            importances.append(np.full(features.shape[1], np.nan))
    return probability, np.array(importances)


# ------------------------------------------------------------------------------------------------ on the disk


def check_classifier_name(path: str | os.PathLike) -> None:
    """Raise InputError unless `path` can be a classifier's file, by its ending."""
    if Path(path).suffix not in (".skops", ".joblib"):
        raise InputError(f"{path}: unknown model format. Expected a name ending in .skops or .joblib")


def save_classifier(path: str | os.PathLike, classifier: HeatmapClassifier) -> None:
    """Write a classifier as `.skops`, which holds no code, or `.joblib`, a pickle."""
    import joblib
    import skops.io

    check_classifier_name(path)
    content = {field.name: getattr(classifier, field.name) for field in fields(classifier)} | {"format": _FORMAT}
    with atomic_write(path) as temporary:
        if Path(path).suffix == ".joblib":
            joblib.dump(content, temporary)
        else:
            temporary.write_bytes(skops.io.dumps(content))


def load_classifier(path: str | os.PathLike) -> HeatmapClassifier:
    """Read a classifier; raise InputError where the file is missing, damaged, refused, or holds something else.

    A `.skops` file runs no code: one that asks for any type but scikit-learn's trees is refused. Loading a `.joblib`
    file runs whatever code it holds, which is warned of. scikit-learn warns of trees that another version of it fitted.
    """
    import joblib
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier

    check_classifier_name(path)
    if not Path(path).is_file():
        received = "a folder" if Path(path).is_dir() else "none"
        raise InputError(f"{path}: Expected a classifier's file. Received {received}")
    with readable(path, "not a whole classifier: Expected what heatmap_clf_train.py saves ({})"):
        if Path(path).suffix == ".joblib":
            warnings.warn(f"{path}: loading a .joblib file runs any code in it; prefer .skops", stacklevel=2)
            content = joblib.load(path)
        else:
            content = load_trees(path)
        if content.pop("format") != _FORMAT:
            raise InputError(f"{path}: a classifier of a later version of this program")
        classifier = HeatmapClassifier(**content)
        nb_feature = 0
        if isinstance(classifier.model, RandomForestClassifier | HistGradientBoostingClassifier):
            nb_feature = classifier.model.n_features_in_
            check_trees(classifier.model)
        expected = len(feature_names(classifier.kind["class_names"], classifier.cutoffs, classifier.k))
    if nb_feature != expected:
        raise InputError(f"{path}: Expected a forest or boosted trees on {expected} features. Received {nb_feature}")
    return classifier


# ------------------------------------------------------------------------------------------------- the results


def write_classification(
    out_dir: Path, results: dict[str, tuple[Heatmaps, np.ndarray, np.ndarray | None]], replicates: int, seed: int
) -> None:
    """Write `predictions.csv` (one row a breast), `metrics.json` and, where a curve is defined, `roc.png`.

    results: the breasts, their probabilities of cancer (n,) and, if cross-validated, their folds (n,), by name of the
    set. replicates: draws of patients, by `seed`, for the 95% interval of the AUC.
    """
    import pandas as pd

    tables = {}
    for name, (heatmaps, probability, fold) in results.items():
        rows = [(r.patient_id, r.side, "+".join(view for view, *_ in r.views()), r.cancer) for r in heatmaps.records]
        table = pd.DataFrame(rows, columns=["patient_id", "side", "views", "cancer"]).astype({"cancer": "Int64"})
        tables[name] = table.assign(probability=probability, set=name)
        if fold is not None:
            tables[name]["fold"] = pd.array(fold, "Int64")
    write_text(out_dir / "predictions.csv", pd.concat(tables.values()).to_csv(index=False))
    known = {name: table.dropna(subset="cancer").astype({"cancer": int}) for name, table in tables.items()}
    scores = {name: breast_scores(table, replicates, np.random.default_rng(seed)) for name, table in known.items()}
    write_json(out_dir / "metrics.json", scores)
    for name, score in scores.items():
        auc, low, high = (score[key] for key in ("auc", "auc_low", "auc_high"))
        found = "not defined" if auc is None else f"{auc:.4f}"
        found += "" if low is None else f", 95% interval {low:.4f} to {high:.4f}"
        breasts = f"{score['breasts']} breasts ({score['cancers']} with cancer) of {score['patients']} patients"
        print(f"{name}: AUC {found}, on {breasts}")
    if any(score["auc"] is not None for score in scores.values()):
        curves = {name: (table["cancer"].to_numpy(), table["probability"].to_numpy()) for name, table in known.items()}
        plot_roc(out_dir / "roc.png", curves)


def breast_scores(table: "pd.DataFrame", replicates: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return counts, the AUC and its 95% interval by bootstrap of the patients; None where undefined.

    table: patient_id, views, cancer (0 or 1), probability, and perhaps fold.
    """

    def auc_of(rows):
        return auc_by_class(cancer[rows], probability[rows])[0]

    cancer, probability = table["cancer"].to_numpy(), table["probability"].to_numpy()
    auc = auc_of(slice(None)) if len(table) else np.nan
    low, high = np.nan, np.nan
    if not np.isnan(auc):
        counts = bootstrap_counts(table["patient_id"], rng, replicates)
        low, high = percentile_interval(bootstrap_auc(cancer, probability, counts))
    scores = {"auc": _none_for_nan(auc), "auc_low": _none_for_nan(low), "auc_high": _none_for_nan(high)}
    scores |= {"breasts": len(table), "cancers": int(cancer.sum()), "patients": int(table["patient_id"].nunique())}
    scores["breasts_of_one_view"] = int((~table["views"].str.contains("+", regex=False)).sum())
    if "fold" in table:
        fold = table["fold"].to_numpy()
        scores["auc_by_fold"] = [_none_for_nan(auc_of(fold == i)) for i in np.unique(fold)]
    return scores


def _none_for_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def write_importances(out_dir: Path, names: Sequence[str], importances: np.ndarray, title: str) -> None:
    """Write `importances.csv` (feature, mean, deviation over folds; the highest first) and a picture of the first 20.

    importances: (folds, features) of `cross_validate`. title: what they are.
    """
    import pandas as pd
    from matplotlib.figure import Figure

    defined = importances[~np.isnan(importances).any(axis=1)]
    if len(defined) == 0:
        defined = np.zeros((1, len(names)))
    table = pd.DataFrame({"feature": names, "importance": defined.mean(axis=0), "sd": defined.std(axis=0)})
    table = table.sort_values("importance", ascending=False, kind="stable")
    write_text(out_dir / "importances.csv", table.to_csv(index=False))
    head = table.head(20)[::-1]
    figure = Figure(figsize=(7, 1 + 0.25 * len(head)), layout="constrained")
    axes = figure.subplots()
    axes.barh(head["feature"], head["importance"], xerr=head["sd"], color="0.6")
    axes.set(xlabel=title)
    with atomic_write(out_dir / "importances.png") as temporary:
        figure.savefig(temporary, dpi=120)


# --------------------------------------------------------------------------------------------- the regions of a map


def prob_heatmap_features(phm: np.ndarray | None, cutoff: float, k: int = 1, nb_cls: int = 3) -> list[dict[str, float]]:
    """Describe the regions of a heatmap where a class is at least as probable as `cutoff`, in a dict for each class.

    A region is a set of cells of at least this probability that touch at an edge or a corner. Of the classes except the
    background: "nb_regions", "total_area" and "global_max_intensity" of all regions, and "top1_area" ..
    "topK_solidity", the `region_features` of the k largest. Areas and lengths are in cells. Regions that a map does not
    have are described as `region_features(None)`, a missing map as NaN throughout.

    phm: (rows, columns, nb_cls) probabilities, class 0 being background; None for a view without an image. Raises
    InputError for a map that is empty, of another shape, or not finite.
    """
    from skimage.measure import label, regionprops

    if phm is None:
        return [dict.fromkeys(_class_features([], k), np.nan) for _ in range(nb_cls - 1)]
    phm = np.asarray(phm)
    if phm.ndim != 3 or phm.size == 0 or phm.shape[2] != nb_cls:
        expected = f"Expected a heatmap (rows, columns, {nb_cls}), nb_cls being its classes"
        raise InputError(f"{expected}. Received shape {phm.shape}")
    if not np.isfinite(phm).all():
        raise InputError("Expected a heatmap of finite probabilities. Received NaN or infinity")
    maps = np.moveaxis(phm[..., 1:], -1, 0)
    return [_class_features(regionprops(label(map_ >= cutoff), map_), k) for map_ in maps]


def _class_features(regions: "list[RegionProperties]", k: int) -> dict[str, float]:
    features = {"nb_regions": len(regions), "total_area": total_area(regions)}
    features["global_max_intensity"] = global_max_intensity(regions)
    largest = [regions[i] for i in topK_region_idx(regions, k)]
    for rank, region in enumerate(largest + [None] * (k - len(largest)), 1):
        features |= {f"top{rank}_{name}": value for name, value in region_features(region).items()}
    return features


def total_area(regions: "Sequence[RegionProperties]" = ()) -> int:
    """Count the cells in all of the regions (of `skimage.measure.regionprops`)."""
    return sum(int(region.area) for region in regions)


def global_max_intensity(regions: "Sequence[RegionProperties]" = ()) -> float:
    """Return the highest value in any of the regions; 0 where there are none."""
    return max((float(region.intensity_max) for region in regions), default=0.0)


def topK_region_idx(regions: "Sequence[RegionProperties]", k: int = 1) -> list[int]:
    """Return the indices of at most k regions of largest area, the largest first; of equal ones the later first."""
    areas = [region.area for region in regions]
    return [int(index) for index in np.argsort(areas, kind="stable")[::-1][:k]]


def region_features(region: "RegionProperties | None" = None) -> dict[str, float]:
    """Return area, shape and intensity of a region, by name.

    "area_ratio" and "solidity" are both the share of the convex hull that the region covers, "area_ratio2" the share
    of the region with its holes filled. "eig1" and "eig2" are the eigenvalues of the inertia tensor, the larger first.
    "orientation" is the angle from the direction of the rows to the major axis, counter-clockwise as seen, -pi/2 to
    pi/2 (pi/4 for regions of no direction): today's value of scikit-image, which starts from the direction of the
    columns, turned by a right angle.

    region: one of `skimage.measure.regionprops(labels, intensities)`, or None where a map has no such region.
    """
    if region is None:
        return dict(_NO_REGION)
    solidity = int(region.area) / _convex_area(region.image)
    eigenvalues = region.inertia_tensor_eigvals
    return {
        "area": int(region.area),
        "area_ratio": solidity,
        "area_ratio2": float(region.area / region.area_filled),
        "eccentricity": float(region.eccentricity),
        "eig1": float(eigenvalues[0]),
        "eig2": float(eigenvalues[1]),
        "equivalent_diameter": float(region.equivalent_diameter_area),
        "euler_number": int(region.euler_number),
        "extent": float(region.extent),
        "major_axis_length": float(region.axis_major_length),
        "max_intensity": float(region.intensity_max),
        "mean_intensity": float(region.intensity_mean),
        "minor_axis_length": float(region.axis_minor_length),
        "orientation": float(region.orientation + (np.pi / 2 if region.orientation < 0 else -np.pi / 2)),
        "perimeter": float(region.perimeter),
        "solidity": solidity,
    }


# The Euler number of nothing is 2 in the published program.
_NO_REGION = {
    **{"area": 0, "area_ratio": 0.0, "area_ratio2": 0.0, "eccentricity": 0.0, "eig1": 0.0, "eig2": 0.0},
    **{"equivalent_diameter": 0.0, "euler_number": 2, "extent": 0.0, "major_axis_length": 0.0, "max_intensity": 0.0},
    **{"mean_intensity": 0.0, "minor_axis_length": 0.0, "orientation": 0.0, "perimeter": 0.0, "solidity": 0.0},
}


def make_pred_case(
    cc_phms: Sequence[np.ndarray] | None,
    mlo_phms: Sequence[np.ndarray] | None,
    feature_name: Sequence[str] | str,
    cutoff_list: Sequence[float],
    clf_list: "Sequence[ClassifierMixin]",
    k: int = 2,
    nb_phm: int | None = None,
    use_mean: bool = False,
) -> float:
    """Return the probability of cancer in one breast, from the heatmaps of its images.

    Raises InputError where neither view has a map, or their classes differ.

    Args:
        cc_phms, mlo_phms: (rows, columns, classes) maps of the images of each view; None or empty for a view without.
        feature_name: which features of `prob_heatmap_features` the classifiers take, one name or several.
        cutoff_list, k: as there; all cut-offs' features are taken together, by view, cut-off, class and name.
        clf_list: fitted classifiers of scikit-learn; their probabilities of the second class are averaged.
        nb_phm: take at most so many maps of each view. use_mean: average over all pairs of maps; else their highest.
    """
    views = [[] if maps is None else list(maps)[:nb_phm] for maps in (cc_phms, mlo_phms)]
    there = [*views[0], *views[1]]
    if not there:
        raise InputError("Expected a map of CC or MLO. Received none of either")
    nb_cls, names = np.shape(there[0])[-1], [feature_name] if isinstance(feature_name, str) else feature_name
    pairs = product(*(maps or [None] for maps in views))
    features = [breast_features(pair, cutoff_list, k, nb_cls, names) for pair in pairs]
    of_pairs = np.mean([classifier.predict_proba(features)[:, 1] for classifier in clf_list], axis=0)
    return float(of_pairs.mean() if use_mean else of_pairs.max())


def _convex_area(image: np.ndarray) -> int:
    """Count the pixels in the convex hull of the 2-D mask of a region that fills its bounding box.

    The hull surrounds the middles of all pixel edges. As in scikit-image 0.14 a pixel centre on its outline counts only
    where the hull lies below or to the right of it (the usual crossing rule); later versions count them all.
    """
    from scipy.spatial import ConvexHull

    height, width = image.shape
    columns = np.arange(width)
    # The outermost pixels of each column suffice.
    outermost = image.argmax(axis=0), height - 1 - image[::-1].argmax(axis=0)
    pixels = np.concatenate([np.stack([rows, columns], axis=1) for rows in outermost])
    middles = np.concatenate([pixels + shift for shift in ([-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5])])
    ends = middles[ConvexHull(middles).vertices]
    starts = np.roll(ends, 1, axis=0)
    slanted = ends[:, 1] != starts[:, 1]
    (row, column), (start_row, start_column) = ends[slanted].T, starts[slanted].T
    # Every column crosses the outline twice; the pixels from one crossing up to, not including, the other are inside.
    column_at = columns[:, None]
    crossed = (column <= column_at) != (start_column <= column_at)
    crossing = np.ceil((start_row - row) * (column_at - column) / (start_column - column) + row)
    first, last = np.where(crossed, crossing, np.inf).min(axis=1), np.where(crossed, crossing, -np.inf).max(axis=1)
    return int((last - first).sum())
