"""Trees on heatmap features: found signal, no signal, patients kept together, files, and every bad input."""

import json
import pickle
import zipfile

import numpy as np
import pandas as pd
import pytest

import dm_heatmap_clf as clf
from ddsm_train import heatmap_clf_train
from dm_files import InputError
from dm_heatmap import HeatmapRecord, Heatmaps, save_heatmaps
from dm_region import prob_heatmap_features

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

    def auc_of(labels):
        fold = clf.patient_folds(labels, patients, 4, seed=0)
        probability, importances = clf.cross_validate(model, features, labels, fold, seed=0)
        return clf.auc_by_class(labels, probability)[0], importances

    auc, importances = auc_of(cancer)
    assert auc > 0.85
    assert importances.shape == (4, features.shape[1])
    names = clf.feature_names(CLASSES, OPTIONS["cutoffs"], 1)
    assert "mass" in names[importances.mean(axis=0).argmax()]
    shuffled = [auc_of(np.random.default_rng(seed).permutation(cancer))[0] for seed in range(6)]
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


def test_permutation_importance_agrees_with_scikit_learn():
    from sklearn.inspection import permutation_importance

    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 10))
    cancer = (features[:, 3] + 0.6 * features[:, 7] > 0.2 * rng.normal(size=120)).astype(int)
    model = clf.make_model("gbt", 20, seed=0).fit(features[:50], cancer[:50])
    ours = np.mean(
        [clf.permutation_importance(model, features[50:], cancer[50:], np.random.default_rng(i), 7) for i in range(15)],
        axis=0,
    )
    theirs = permutation_importance(
        model, features[50:], cancer[50:], scoring="roc_auc", n_repeats=15, random_state=0
    ).importances_mean
    np.testing.assert_allclose(ours, theirs, atol=0.04)
    assert theirs.max() > 0.1 and ours.argmax() == theirs.argmax()


@pytest.mark.parametrize("name", clf.CLASSIFIERS)
def test_missing_views_are_taken_even_where_training_had_none(name):
    heatmaps, features, cancer = table_of(breasts(30, missing=0))
    fitted = clf.HeatmapClassifier.fit(
        clf.make_model(name, 30, seed=0), heatmaps, features, cancer, OPTIONS["cutoffs"], 1
    )
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
    heatmaps = Heatmaps(heatmaps.records, CLASSES, (8.0, 8.0), "fprop")
    model = clf.make_model(request.param, 15, seed=0)
    return clf.HeatmapClassifier.fit(model, heatmaps, features, cancer, OPTIONS["cutoffs"], 1)


def test_a_saved_classifier_predicts_the_same(fitted, table, tmp_path):
    clf.save_classifier(tmp_path / "c.skops", fitted)
    loaded = clf.load_classifier(tmp_path / "c.skops")
    np.testing.assert_array_equal(loaded.predict(table[0]), fitted.predict(table[0]))
    for name in ("cutoffs", "k", "class_names", "strides", "mode", "sklearn"):
        assert getattr(loaded, name) == getattr(fitted, name)
    clf.save_classifier(tmp_path / "c.joblib", fitted)
    with pytest.warns(UserWarning, match=r"c\.joblib: loading a \.joblib file runs any code"):
        loaded = clf.load_classifier(tmp_path / "c.joblib")
    np.testing.assert_array_equal(loaded.predict(table[0]), fitted.predict(table[0]))


class Evil:
    ran = False

    def __reduce__(self):
        return setattr, (Evil, "ran", True)


def test_files_that_could_run_code_or_are_damaged_are_refused(fitted, tmp_path):
    whole = tmp_path / "whole.skops"
    clf.save_classifier(whole, fitted)
    bad = tmp_path / "bad.skops"

    bad.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match="not a whole classifier"):
        clf.load_classifier(bad)
    assert not Evil.ran

    # A file in which another type stands for the trees.
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name == "schema.json":
                schema = json.loads(content)
                schema["content"]["model"] |= {"__module__": "os", "__class__": "system"}
                content = json.dumps(schema).encode()
            target.writestr(name, content)
    with pytest.raises(InputError, match=r"bad\.skops: refused: asks for os\.system"):
        clf.load_classifier(bad)

    bad.write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(InputError, match="not a whole classifier"):
        clf.load_classifier(bad)
    import skops.io

    skops.io.dump({"format": 1, "model": 3}, bad)
    with pytest.raises(InputError, match="not a whole classifier"):
        clf.load_classifier(bad)
    with pytest.raises(InputError, match="Received none"):
        clf.load_classifier(tmp_path / "no.skops")
    with pytest.raises(InputError, match=r"ending in \.skops or \.joblib"):
        clf.load_classifier(tmp_path / "c.pkl")


# --------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    maps, test = save(folder / "a.npz", breasts(40)), save(folder / "b.npz", breasts(20, seed=1, first=100))
    heatmap_clf_train.run(maps=[maps], test=[test], out_dir=str(folder / "out"), **OPTIONS)
    return folder


def test_training_leaves_tables_scores_and_pictures(trained):
    out = trained / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "args.json", "heatmap_clf.skops", "importances.csv", "importances.png", "metrics.json", "predictions.csv",
        "roc.png",
    ]  # fmt: skip
    table = pd.read_csv(out / "predictions.csv")
    assert table.columns.tolist() == ["patient_id", "side", "views", "cancer", "probability", "set", "fold"]
    records = breasts(40) + breasts(20, seed=1, first=100)
    assert table["patient_id"].tolist() == [record.patient_id for record in records]
    assert table["cancer"].tolist() == [record.cancer for record in records]
    assert (table["views"] == "cc+mlo").tolist() == [r.cc is not None and r.mlo is not None for r in records]
    metrics = json.loads((out / "metrics.json").read_text())
    for name, rows in table.groupby("set"):
        score = metrics[name]
        wins = np.subtract.outer(
            rows.loc[rows["cancer"] == 1, "probability"].to_numpy(),
            rows.loc[rows["cancer"] == 0, "probability"].to_numpy(),
        )
        assert score["auc"] == pytest.approx(np.mean((wins > 0) + 0.5 * (wins == 0)))
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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.csv"]


def relabel(records, cancer):
    for record in records:
        record.cancer = cancer
    return records


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda d: {"maps": [save(d / "a.npz", breasts(2))]}, {}, "too few patients for 3 folds"),
        (lambda d: {"maps": [save(d / "a.npz", relabel(breasts(20), 0))]}, {}, "Received 0 and 20"),
        (lambda d: {"maps": [save(d / "a.npz", relabel(breasts(9), None))]}, {}, "Expected cancer 0 or 1"),
        (
            lambda d: {"maps": [save(d / "a.npz", breasts(20))], "test": [save(d / "b.npz", breasts(3, first=19))]},
            {},
            "1 patients are in both MAPS and --test, such as P_19",
        ),
        (lambda d: {"maps": [save(d / "a.npz", breasts(9))] * 2}, {}, "P_0 LEFT stands there 2 times"),
        (
            lambda d: {"maps": [save(d / "a.npz", breasts(9)), save(d / "b.npz", breasts(9, first=9), strides=(4, 4))]},
            {},
            r"b\.npz: strides other than of .*a\.npz",
        ),
        (lambda d: {"maps": [str(d / "none.npz")]}, {}, "Expected a map file"),
        (lambda d: {"maps": [save(d / "a.npz", breasts(9))]}, {"folds": 1}, "--folds: Expected at least 2"),
        (lambda d: {"maps": [save(d / "a.npz", breasts(9))]}, {"save_model": "m.pkl"}, "unknown model format"),
        (lambda d: {"maps": ["a.npz"]}, {"model": "m.skops", "test": ["b.npz"]}, "neither --test nor"),
    ],
)
def test_bad_input_is_one_line(make, options, text, tmp_path):
    with pytest.raises(InputError, match=text):
        heatmap_clf_train.run(**OPTIONS | make(tmp_path) | {"out_dir": str(tmp_path / "out")} | options)
    assert not (tmp_path / "out").exists()


def test_a_map_file_cut_short_and_maps_of_other_strides_are_refused(trained, tmp_path):
    short = tmp_path / "short.npz"
    short.write_bytes((trained / "a.npz").read_bytes()[:-3000])
    with pytest.raises(InputError, match=r"short\.npz: not a whole map file"):
        heatmap_clf_train.run(maps=[str(short)], out_dir=str(tmp_path / "out"), **OPTIONS)
    model = str(trained / "out/heatmap_clf.skops")
    other = save(tmp_path / "other.npz", breasts(3), strides=(16, 16))
    with pytest.raises(InputError, match=r"other\.npz: strides other than of .*heatmap_clf\.skops"):
        heatmap_clf_train.run(maps=[other], model=model, out_dir=str(tmp_path / "out"))


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
