#!/usr/bin/env python
"""Train trees that classify breasts by the regions of their heatmaps, cross-validated by patient; or score by them.

  mammo train-heatmaps maps.npz --test test_maps.npz --out-dir heatmap_clf
  mammo train-heatmaps other_maps.npz --model heatmap_clf/heatmap_clf.skops --out-dir scored

The map files are those of `mammo heatmaps`. The features are shape, size and probability of the largest regions of
each class at several probability cut-offs, in both views; a missing view has none, which the trees learn to take.
Each breast is predicted by trees that were fitted without its patient. Where the patch classifier has learnt from the
patients of MAPS, their maps are too good, and only --test says what the trees are worth.
Environment: RANDOM_SEED (12345).
"""

import argparse
import sys
from pathlib import Path

from mammo.base import cli
from mammo.base.files import InputError, env_int, write_json

IMPORTANCE = {"rf": "mean decrease in impurity", "gbt": "fall of the held-out AUC when permuted"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("maps", nargs="+", metavar="MAPS", help="map files of the breasts to train on, or with --model to score")
    add("--test", nargs="+", metavar="MAPS", help="map files of other patients, scored by trees fitted on all of MAPS")
    add("--model", metavar="FILE", help="train nothing: score MAPS by this classifier (.skops; .joblib runs its code)")
    text = "names of the maps' classes, background first, for files that hold none (.pkl of the published program)"
    add("--class-list", nargs="+", metavar="CLASS", help=text)

    add = parser.add_argument_group("features").add_argument
    text = "probabilities from which on cells of a map are a region; the paper had four and does not say which"
    add("--cutoffs", nargs="+", type=cli.fraction, default=[0.3, 0.5, 0.7, 0.9], metavar="P", help=text)
    add("--top-k", type=cli.positive_int, default=2, help="regions described, the largest first")

    add = parser.add_argument_group("classifier").add_argument
    add("--clf", choices=["rf", "gbt"], default="rf", help="random forest or gradient-boosted trees")
    add("--trees", type=cli.positive_int, default=500, help="number of trees")
    add("--folds", type=cli.positive_int, default=5, help="parts of the cross-validation, at least 2")
    add("--bootstrap", type=cli.positive_int, default=2000, help="draws of patients for the interval of the AUC")

    add = parser.add_argument_group("output").add_argument
    add("--out-dir", default="./heatmap_clf", metavar="DIR", help="folder for tables, scores and pictures")
    text = "where the trees fitted on all of MAPS are saved: .skops, which holds no code, or .joblib"
    add("--save-model", metavar="FILE", help=f"{text}; default: <DIR>/heatmap_clf.skops")
    add("--jobs", type=cli.positive_int, default=1, help="breasts described, and trees fitted, at the same time")
    return parser


def run(**options) -> None:
    """Train or score; keyword arguments are the option names of `make_parser`, `maps` among them."""
    args = cli.complete(make_parser(), options)
    if args.model is not None and (args.test is not None or args.save_model is not None):
        raise InputError("--model scores MAPS: Expected neither --test nor --save-model with it")
    if args.folds < 2:
        raise InputError(f"--folds: Expected at least 2. Received {args.folds}")
    if len(set(args.cutoffs)) < len(args.cutoffs):
        raise InputError(f"--cutoffs: Expected different ones. Received {args.cutoffs}")
    import sklearn.ensemble  # noqa: F401 (only libraries that are loaded are limited)
    from threadpoolctl import threadpool_limits

    # Boosting would take all cores, and wait long for those that are busy.
    out_dir, seed = Path(args.out_dir), env_int("RANDOM_SEED", 12345, 0)
    with threadpool_limits(args.jobs):
        (train if args.model is None else score)(args, out_dir, seed)
    write_json(out_dir / "args.json", vars(args) | {"random_seed": seed})


def train(args: argparse.Namespace, out_dir: Path, seed: int) -> None:
    """Cross-validate, fit to all breasts, score those of `--test`, and write everything."""
    import numpy as np

    from mammo.data.splits import check_disjoint
    from mammo.maps import trees as clf

    save_as = args.save_model or out_dir / "heatmap_clf.skops"
    clf.check_classifier_name(save_as)
    heatmaps = clf.load_breasts(args.maps, args.class_list)
    if unknown := [f"{record.patient_id} {record.side}" for record in heatmaps.records if record.cancer is None]:
        raise InputError(f"{unknown[0]}: Expected cancer 0 or 1. Received none ({len(unknown)} such breasts)")
    patients = [record.patient_id for record in heatmaps.records]
    test = None
    if args.test is not None:
        test = clf.load_breasts(args.test, args.class_list)
        clf.check_comparable(clf.kind_of(test), clf.kind_of(heatmaps), args.test[0], args.maps[0])
        check_disjoint({"MAPS": patients, "--test": [record.patient_id for record in test.records]})
    cancer = np.array([record.cancer for record in heatmaps.records])
    fold = clf.patient_folds(cancer, patients, args.folds, seed)
    features = clf.feature_table(heatmaps, args.cutoffs, args.top_k, args.jobs)
    model = clf.make_model(args.clf, args.trees, seed, args.jobs)
    probability, importances = clf.cross_validate(model, features, cancer, fold, seed)
    results = {"cross_validation": (heatmaps, probability, fold)}
    classifier = clf.HeatmapClassifier.fit(model, heatmaps, features, cancer, args.cutoffs, args.top_k)
    if test is not None:
        results["test"] = (test, classifier.predict(test, args.jobs), None)
    clf.save_classifier(save_as, classifier)
    names = clf.feature_names(heatmaps.class_names, args.cutoffs, args.top_k)
    clf.write_importances(out_dir, names, importances, IMPORTANCE[args.clf])
    clf.write_classification(out_dir, results, args.bootstrap, seed)
    print(f"The trees are saved in {save_as}")


def score(args: argparse.Namespace, out_dir: Path, seed: int) -> None:
    """Predict the breasts of `maps` by the classifier `--model`; scores where their cancers are known."""
    from mammo.maps import trees as clf

    classifier = clf.load_classifier(args.model)
    heatmaps = clf.load_breasts(args.maps, args.class_list or classifier.kind["class_names"])
    clf.check_comparable(clf.kind_of(heatmaps), classifier.kind, args.maps[0], args.model)
    results = {"scored": (heatmaps, classifier.predict(heatmaps, args.jobs), None)}
    clf.write_classification(out_dir, results, args.bootstrap, seed)


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
