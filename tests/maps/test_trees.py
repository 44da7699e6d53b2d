"""Trees on heatmap features: found signal, no signal, patients kept together, files, and every bad input."""

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import InconsistentVersionWarning

from ddsm_train import heatmap_clf_train
from mammo.base.files import InputError
from mammo.maps import trees as clf
from mammo.maps.files import HeatmapRecord, Heatmaps, save_heatmaps
from mammo.maps.trees import prob_heatmap_features
from tests.helpers import auc_of_pairs, read_members, write_members

CLASSES = ["background", "mass_mal", "mass_ben"]
OPTIONS = {"cutoffs": [0.3, 0.6], "top_k": 1, "trees": 20, "folds": 3, "bootstrap": 100}


def breasts(nb_patient, seed=0, first=0, missing=0.2):
    """Two breasts a patient; 70% of the cancers have a spot of the malignant class, others one of the benign."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:18, :14]
    records = []
    for patient in range(first, first + nb_patient):
        for side in ("LEFT", "RIGHT"):
            cancer = int(rng.random() < 0.4)
            shown = 1 if cancer and rng.random() < 0.9 else 2
            maps = []
            for _ in range(2):
                heatmap = 0.2 * rng.random((18, 14, 3))
                row, column = rng.integers(4, 14), rng.integers(4, 10)
                heatmap[..., shown] += 0.7 * np.exp(-((y - row) ** 2 + (x - column) ** 2) / 8)
                heatmap[..., 0] = 1 - heatmap[..., 1:].sum(axis=-1)
                maps.append(heatmap.astype("float32"))
            if rng.random() < missing:
                maps[rng.integers(2)] = None
            records.append(HeatmapRecord(f"P_{patient}", side, cancer, *maps))
    return records


def save(path, records, strides=(8, 8), **kwargs):
    save_heatmaps(path, records, class_names=CLASSES, strides=strides, **kwargs)
    return str(path)


def table_of(records, k=1):
    heatmaps = Heatmaps(records, CLASSES)
    cancer = np.array([record.cancer for record in records])
    return heatmaps, clf.feature_table(heatmaps, OPTIONS["cutoffs"], k), cancer


@pytest.fixture(scope="module")
def table():
    return table_of(breasts(40))


# ----------------------------------------------------------------------------------------------------- features


def test_features_are_those_of_both_views_in_the_order_of_their_names(table):
    heatmaps, features, _ = table
    names = clf.feature_names(CLASSES, OPTIONS["cutoffs"], 1)
    assert features.shape == (80, len(names)) and len(set(names)) == len(names) == 2 * 2 * 2 * 19
    for record, row in zip(heatmaps.records, features, strict=True):
        for view in ("cc", "mlo"):
            heatmap = getattr(record, view)
            found = {name: value for name, value in zip(names, row, strict=True) if name.startswith(view)}
            assert np.isnan(list(found.values())).all() == (heatmap is None)
            if heatmap is not None:
                expected = prob_heatmap_features(heatmap, 0.6, 1)[1]
                assert found[f"{view}_mass_ben_0.6_top1_area"] == expected["top1_area"]
                assert found[f"{view}_mass_ben_0.6_nb_regions"] == expected["nb_regions"]


# --------------------------------------------------------------------------------------------- cross-validation


@pytest.mark.parametrize("name", clf.CLASSIFIERS)
def test_a_known_signal_is_found_and_none_in_shuffled_labels(table, name):
    heatmaps, features, cancer = table
    patients = [record.patient_id for record in heatmaps.records]
    model = clf.make_model(name, 20, seed=0)
    # Importances permute one feature after the other: a few of each map do, and are faster.
    names = clf.feature_names(CLASSES, OPTIONS["cutoffs"], 1)
    features = features[:, [name.endswith(("nb_regions", "top1_area", "max_intensity")) for name in names]]

    def auc_of(labels):
        fold = clf.patient_folds(labels, patients, 4, seed=0)
        probability, _ = clf.cross_validate(model, features, labels, fold, seed=0)
        return clf.auc_by_class(labels, probability)[0]

    assert auc_of(cancer) > 0.85
    shuffled = [auc_of(np.random.default_rng(seed).permutation(cancer)) for seed in range(6)]
    # The AUC of 80 chance scores has a standard deviation of about 0.065, and the mean of six 0.027.
    assert abs(np.mean(shuffled) - 0.5) < 4 * 0.027


def test_patients_stay_together_and_each_is_predicted_without_itself(table):
    heatmaps, _, cancer = table
    patients = np.array([record.patient_id for record in heatmaps.records])
    fold = clf.patient_folds(cancer, patients, 4, seed=0)
    assert all(len(set(fold[patients == patient])) == 1 for patient in set(patients))
    shares = [cancer[fold == i].mean() for i in range(4)]
    assert max(shares) - min(shares) < 0.15

    # A feature that is the patient's own number predicts nothing when the patient is held out.
    fits = []

    class Remembers:
        def get_params(self, deep=False):
            return {}

        def fit(self, x, y):
            fits.append(set(x[:, 0]))
            self.feature_importances_ = np.ones(1)
            return self

        def predict_proba(self, x):
            seen = np.isin(x[:, 0], list(fits[-1])).astype(float)
            return np.stack([1 - seen, seen], axis=1)

    number = np.unique(patients, return_inverse=True)[1][:, None].astype(float)
    probability, _ = clf.cross_validate(Remembers(), number, cancer, fold, seed=0)
    assert len(fits) == 4 and (probability == 0).all()


@pytest.mark.parametrize("name", clf.CLASSIFIERS)
def test_the_features_that_decide_are_the_important_ones(name):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10))
    cancer = (features[:, 3] + 0.6 * features[:, 7] > 0.2 * rng.normal(size=120)).astype(int)
    fold = np.arange(120) % 4
    _, importances = clf.cross_validate(clf.make_model(name, 20, seed=0), features, cancer, fold, seed=0)
    assert importances.shape == (4, 10)
    assert np.argsort(importances.mean(axis=0))[:-3:-1].tolist() == [3, 7]
    if name == "gbt":  # of a fold without both classes no AUC is defined
        fold = np.where(cancer == 1, fold, fold % 3)
        _, importances = clf.cross_validate(clf.make_model(name, 20, seed=0), features, cancer, fold, seed=0)
        assert np.isnan(importances).all(axis=1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("name", clf.CLASSIFIERS)
def test_missing_views_are_taken_even_where_training_had_none(name):
    heatmaps, features, cancer = table_of(breasts(30, missing=0))
    model = clf.make_model(name, 30, seed=0)
    fitted = clf.HeatmapClassifier.fit(model, heatmaps, features, cancer, OPTIONS["cutoffs"], 1)
    other = breasts(30, seed=1, first=100, missing=1)
    assert all((record.cc is None) != (record.mlo is None) for record in other)
    probability = fitted.predict(Heatmaps(other, CLASSES))
    assert clf.auc_by_class([record.cancer for record in other], probability)[0] > 0.75
    np.testing.assert_array_equal(probability, fitted.predict_maps([(record.cc, record.mlo) for record in other]))
    with pytest.raises(InputError, match="none of either"):
        fitted.predict_maps([(None, None)])


# ------------------------------------------------------------------------------------------------ files of models


@pytest.fixture(scope="module", params=clf.CLASSIFIERS)
def fitted(request, table):
    heatmaps, features, cancer = table
    heatmaps = Heatmaps(heatmaps.records, CLASSES, (8.0, 8.0), "fprop", {"window": [96.0, 96.0], "img_scale": 255.0})
    model = clf.make_model(request.param, 15, seed=0)
    return clf.HeatmapClassifier.fit(model, heatmaps, features, cancer, OPTIONS["cutoffs"], 1)


def test_a_saved_classifier_predicts_the_same(fitted, table, tmp_path, monkeypatch):
    some = Heatmaps(table[0].records[:20], CLASSES)
    clf.save_classifier(tmp_path / "c.skops", fitted)
    loaded = clf.load_classifier(tmp_path / "c.skops")
    np.testing.assert_array_equal(loaded.predict(some), fitted.predict(some))
    assert (loaded.cutoffs, loaded.k, loaded.kind) == (fitted.cutoffs, fitted.k, fitted.kind)
    said = {"class_names": CLASSES, "strides": (8.0, 8.0), "mode": "fprop", "window": [96.0, 96.0]}
    assert loaded.kind == said | dict.fromkeys(("dl_state_crc32", "img_size", "img_height"))
    clf.save_classifier(tmp_path / "c.joblib", fitted)
    with pytest.warns(UserWarning, match=r"c\.joblib: loading a \.joblib file runs any code"):
        loaded = clf.load_classifier(tmp_path / "c.joblib")
    np.testing.assert_array_equal(loaded.predict(some), fitted.predict(some))
    monkeypatch.setattr("sklearn.base.__version__", "99.0")
    with pytest.warns(InconsistentVersionWarning, match="when using version 99"):
        clf.load_classifier(tmp_path / "c.skops")


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def test_files_that_could_run_code_or_are_damaged_are_refused(fitted, tmp_path):
    import skops.io

    whole, bad = tmp_path / "whole.skops", tmp_path / "bad.skops"
    clf.save_classifier(whole, fitted)
    other = skops.io.dumps({"format": 1, "model": 3})
    for content in (pickle.dumps(Evil()), whole.read_bytes()[:2000], other):
        bad.write_bytes(content)
        with pytest.raises(InputError, match="not a whole classifier"):
            clf.load_classifier(bad)
    assert not Evil.ran

    # A file in which another type stands for the trees.
    members = read_members(whole)
    schema = json.loads(members["schema.json"])
    schema["content"]["model"] |= {"__module__": "os", "__class__": "system"}
    write_members(bad, members | {"schema.json": json.dumps(schema).encode()})
    with pytest.raises(InputError, match=r"bad\.skops: refused: asks for os\.system"):
        clf.load_classifier(bad)

    with pytest.raises(InputError, match="Received none"):
        clf.load_classifier(tmp_path / "no.skops")
    with pytest.raises(InputError, match=r"ending in \.skops or \.joblib"):
        clf.load_classifier(tmp_path / "c.pkl")


@pytest.mark.parametrize(
    ("name", "value"), [("left", 10**6), ("right", 10**6), ("left", 0), ("feature", 10**6), ("feature", -7)]
)
def test_trees_that_lead_out_of_memory_or_in_a_circle_are_refused(fitted, tmp_path, name, value):
    crafted = copy.deepcopy(fitted)
    if hasattr(crafted.model, "estimators_"):
        tree = crafted.model.estimators_[0].tree_
        state = tree.__getstate__()
        state["nodes"][{"left": "left_child", "right": "right_child"}.get(name, name)][0] = value
        tree.__setstate__(state)
    else:
        nodes = crafted.model._predictors[0][0].nodes
        nodes[{"feature": "feature_idx"}.get(name, name)][0] = value
    clf.save_classifier(tmp_path / "crafted.skops", crafted)
    with pytest.raises(InputError, match=r"crafted\.skops: .*splits lead out"):
        clf.load_classifier(tmp_path / "crafted.skops")


# --------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    maps, test = save(folder / "a.npz", breasts(40)), save(folder / "b.npz", breasts(20, seed=1, first=100))
    heatmap_clf_train.run(maps=[maps], test=[test], out_dir=str(folder / "out"), **OPTIONS)
    return folder


def test_training_leaves_tables_scores_and_pictures(trained):
    out = trained / "out"
    written = "args.json heatmap_clf.skops importances.csv importances.png metrics.json predictions.csv roc.png"
    assert sorted(path.name for path in out.iterdir()) == written.split()
    table = pd.read_csv(out / "predictions.csv")
    assert table.columns.tolist() == ["patient_id", "side", "views", "cancer", "probability", "set", "fold"]
    records = breasts(40) + breasts(20, seed=1, first=100)
    assert table["patient_id"].tolist() == [record.patient_id for record in records]
    assert table["cancer"].tolist() == [record.cancer for record in records]
    assert (table["views"] == "cc+mlo").tolist() == [r.cc is not None and r.mlo is not None for r in records]
    metrics = json.loads((out / "metrics.json").read_text())
    for name, rows in table.groupby("set"):
        score, (negative, positive) = metrics[name], (rows.probability[rows.cancer == label] for label in (0, 1))
        assert score["auc"] == pytest.approx(auc_of_pairs(positive, negative))
        assert score["auc_low"] < score["auc"] < score["auc_high"]
        assert score["breasts"] == len(rows) and score["patients"] == len(rows) / 2
        assert score["breasts_of_one_view"] == (rows["views"] != "cc+mlo").sum() > 0
    assert len(metrics["cross_validation"]["auc_by_fold"]) == 3
    importances = pd.read_csv(out / "importances.csv")
    assert len(importances) == 2 * 2 * 2 * 19 and importances["importance"].is_monotonic_decreasing


def test_the_saved_classifier_scores_as_in_training_and_labels_are_not_needed(trained, tmp_path, capsys):
    records = breasts(20, seed=1, first=100)
    for record in records:
        record.cancer = None
    maps = save(tmp_path / "unlabelled.h5", records)
    model = trained / "out/heatmap_clf.skops"
    assert heatmap_clf_train.main([maps, "--model", str(model), "--out-dir", str(tmp_path / "out")]) == 0
    assert "AUC not defined, on 0 breasts" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "out/predictions.csv")
    before = pd.read_csv(trained / "out/predictions.csv").query("set == 'test'")
    np.testing.assert_array_equal(table["probability"], before["probability"])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["args.json", "metrics.json", "predictions.csv"]


def of_two_strides(folder):
    return [save(folder / "a.npz", breasts(9)), save(folder / "b.npz", breasts(9, first=9), strides=(4, 4))]


def relabel(records, cancer):
    for record in records:
        record.cancer = cancer
    return records


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda d: [save(d / "a.npz", breasts(2))], {}, "too few patients for 3 folds"),
        (lambda d: [save(d / "a.npz", relabel(breasts(20), 0))], {}, "Received 0 and 20"),
        (lambda d: [save(d / "a.npz", relabel(breasts(9), None))], {}, "Expected cancer 0 or 1"),
        (lambda d: [save(d / "a.npz", breasts(9))] * 2, {}, "P_0 LEFT stands there 2 times"),
        (of_two_strides, {}, r"b\.npz: maps of another kind than those of .*a\.npz: strides: Expected \(8.0, 8.0\)"),
        (lambda d: [save(d / "a.npz", breasts(20), mode="gradcam")], {}, r"a\.npz: .* Received Grad-CAM"),
        (lambda d: [str(d / "none.npz")], {}, "Expected a map file"),
        (lambda d: [save(d / "a.npz", breasts(9))], {"folds": 1}, "--folds: Expected at least 2"),
        (lambda d: [save(d / "a.npz", breasts(9))], {"save_model": "m.pkl"}, "unknown model format"),
        (lambda d: ["a.npz"], {"model": "m.skops", "test": ["b.npz"]}, "neither --test nor"),
    ],
)
def test_bad_input_is_one_line(make, options, text, tmp_path):
    with pytest.raises(InputError, match=text):
        heatmap_clf_train.run(**OPTIONS | {"maps": make(tmp_path), "out_dir": str(tmp_path / "out")} | options)
    assert not (tmp_path / "out").exists()


def test_a_patient_in_training_and_test_is_refused(tmp_path):
    maps, test = save(tmp_path / "a.npz", breasts(20)), save(tmp_path / "b.npz", breasts(3, first=19))
    with pytest.raises(InputError, match="1 patient in both MAPS and --test, such as P_19"):
        heatmap_clf_train.run(maps=[maps], test=[test], out_dir=str(tmp_path / "out"), **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_a_map_file_cut_short_is_refused(trained, tmp_path):
    short = tmp_path / "short.npz"
    short.write_bytes((trained / "a.npz").read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"short\.npz: not a whole map file"):
        heatmap_clf_train.run(maps=[str(short)], out_dir=str(tmp_path / "out"), **OPTIONS)


def test_maps_of_another_patch_classifier_or_geometry_are_refused(tmp_path):
    ours = {"dl_state_crc32": 1, "window": [64.0, 64.0], "img_size": [128, 96], "img_height": None}
    maps = save(tmp_path / "a.npz", breasts(20), options=ours)
    heatmap_clf_train.run(maps=[maps], out_dir=str(tmp_path / "out"), **OPTIONS)
    model = str(tmp_path / "out/heatmap_clf.skops")
    tests = breasts(9, seed=1, first=100)
    for options, mode, text in [
        ({"dl_state_crc32": 2}, "sweep", r"patch classifier \(CRC-32\): Expected 1. Received 2"),
        ({"window": [32.0, 32.0]}, "sweep", "window: Expected"),
        ({"img_size": [64, 48]}, "sweep", "img size: Expected"),
        ({}, "fprop", "mode: Expected sweep. Received fprop"),
    ]:
        other = save(tmp_path / "other.npz", tests, mode=mode, options=ours | options)
        for more in ({"maps": [other], "model": model}, {"maps": [maps], "test": [other]}):
            with pytest.raises(InputError, match=rf"other\.npz: maps of another kind than those of .*: {text}"):
                heatmap_clf_train.run(out_dir=str(tmp_path / "refused"), **OPTIONS | more)
    assert not (tmp_path / "refused").exists()
    # The scaling of pixels differs between scanners, and the published program's files say nothing.
    for name, options in (("scaled.npz", ours | {"rescale_factor": 0.02}), ("silent.npz", {})):
        silent = save(tmp_path / name, tests, options=options)
        heatmap_clf_train.run(maps=[silent], model=model, out_dir=str(tmp_path / "scored"))


def test_an_auc_may_have_no_interval(tmp_path, monkeypatch, capsys):
    # As where most draws of the patients lack one of the classes.
    monkeypatch.setattr(clf, "percentile_interval", lambda *_: (np.nan, np.nan))
    cancer, benign = (next(record for record in breasts(20) if record.cancer == label) for label in (1, 0))
    clf.write_classification(
        tmp_path, {"two": (Heatmaps([cancer, benign], CLASSES), np.array([0.9, 0.1]), None)}, 10, seed=0
    )
    assert "two: AUC 1.0000, on 2 breasts" in capsys.readouterr().out
    score = json.loads((tmp_path / "metrics.json").read_text())["two"]
    assert score["auc"] == 1 and score["auc_low"] is score["auc_high"] is None


def test_breasts_without_any_map_are_left_out_and_counted(tmp_path, capsys):
    records = [*breasts(3), HeatmapRecord("P_9", "LEFT", 1)]
    assert len(clf.load_breasts([save(tmp_path / "a.npz", records)]).records) == 6
    assert "1 of 7 breasts have no map of either view" in capsys.readouterr().out


def test_the_published_programs_files_take_class_names_from_the_option(golden, tmp_path):
    maps = np.load(golden / "heatmap/heatmaps.npz")
    record = {"patient_id": "P_00011", "side": "LEFT", "cancer": 1} | {
        view: maps[f"program_P_00011_LEFT_{view}"] for view in ("cc", "mlo")
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([record], protocol=2))
    assert clf.load_breasts([tmp_path / "a.pkl"]).class_names == [f"class_{i}" for i in range(5)]
    assert clf.load_breasts([tmp_path / "a.pkl"], list("abcde")).class_names == list("abcde")
    with pytest.raises(InputError, match="Received 5 classes"):
        clf.load_breasts([tmp_path / "a.pkl"], CLASSES)


@pytest.mark.parametrize("kind", clf.CLASSIFIERS)
def test_a_view_that_no_breast_has(kind):
    records = breasts(20, missing=0)
    for record in records:
        record.mlo = None
    heatmaps, features, cancer = table_of(records)
    fitted = clf.HeatmapClassifier.fit(clf.make_model(kind, 10, 0), heatmaps, features, cancer, OPTIONS["cutoffs"], 1)
    assert clf.auc_by_class(cancer, fitted.predict(heatmaps))[0] > 0.8
