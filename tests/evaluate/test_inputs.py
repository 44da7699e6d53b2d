"""Images in folders, lists and exam lists, and predictions of trainers and of others, as what is evaluated."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mammo.base.files import InputError
from mammo.evaluate.inputs import name_models, read_images, read_predictions
from tests.helpers import exam, prepared, write_exams, write_list, write_png


def test_prepared_folders_and_their_class_folders_take_patients_from_the_table(tmp_path):
    folder = prepared(tmp_path / "data")
    table = read_images(folder)
    assert len(table) == 12 and table["label"].sum() == 6
    assert set(table["patient"]) == {f"Q_test{number}" for number in range(6)}
    assert set(zip(table["side"], table["view"], strict=True)) == {("LEFT", "CC"), ("LEFT", "MLO")}
    assert all(Path(file).is_file() for file in table["file"])
    assert set(read_images(folder, part="val")["patient"]) == {f"Q_val{number}" for number in range(6)}
    by_folder = read_images(folder / "test")
    by_file = {"by": "file", "ignore_index": True}
    pd.testing.assert_frame_equal(by_folder.sort_values(**by_file), table.sort_values(**by_file))
    # Without the table, names tell; which classes count is a choice.
    (folder / "images.csv").unlink()
    assert set(read_images(folder / "test")["patient"]) == {f"P_test{number}" for number in range(6)}
    assert read_images(folder / "test", ["pos", "neg"], ["neg"])["label"].sum() == 6


def test_images_of_no_known_patient_are_patients_of_their_own(tmp_path, capsys):
    for name in ("neg/a.png", "neg/b.png", "pos/c.png"):
        write_png(tmp_path / name)
    assert read_images(tmp_path)["patient"].tolist() == ["", "", ""]
    assert f"warning: {tmp_path}: 3 of 3 images have no patient" in capsys.readouterr().err
    write_png(tmp_path / "pos/P_1_LEFT_CC.png")
    table = read_images(tmp_path)
    assert table["patient"].nunique() == 4 and "P_1" in set(table["patient"])
    assert "3 of 4 images have no patient" in capsys.readouterr().err


def test_lists_in_csv_files(tmp_path):
    for name in ("a.png", "b.png", "P_7_RIGHT_MLO.png"):
        write_png(tmp_path / "img" / name)
    header = "file,label,patient,side,view,age"
    rows = ["img/a.png,1,7,L,CC,50", "img/b.png,neg,7,right,,", f"{tmp_path}/img/P_7_RIGHT_MLO.png,pos,8,,MLO,"]
    table = read_images(write_list(tmp_path / "a.csv", rows, header))
    assert table["label"].tolist() == [1, 0, 1]
    assert table["patient"].tolist() == ["7", "7", "8"]
    assert table["side"].tolist() == ["LEFT", "RIGHT", ""]
    assert table["view"].tolist() == ["CC", "", "MLO"]
    rows = ["img/a.png,1,7,Left,cranio-caudal,", "img/b.png,0,7, R ,mlo ,"]
    table = read_images(write_list(tmp_path / "a.csv", rows, header))
    assert list(zip(table["side"], table["view"], strict=True)) == [("LEFT", "CC"), ("RIGHT", "MLO")]
    listed = write_list(tmp_path / "b.csv", ["P_7_RIGHT_MLO.png,0", "a.png,1"])
    table = read_images(listed, image_dir=tmp_path / "img")
    rows = ["img/a.png,pos,training", "img/b.png,pos,test"]
    sets = read_images(write_list(tmp_path / "c.csv", rows, "file,label,set"))
    assert [Path(file).name for file in sets["file"]] == ["b.png"]
    assert read_images(tmp_path / "c.csv", ["pos", "neg"], ["neg"])["label"].tolist() == [0]
    assert table[["patient", "side", "view"]].iloc[0].tolist() == ["P_7", "RIGHT", "MLO"]


def test_exam_lists_of_the_metarepository(tmp_path, capsys):
    mirrored = exam(2, left=1, views=("L-CC",)) | {"R-CC": [], "horizontal_flip": "YES"}
    exams = write_exams(tmp_path / "data.pkl", [exam(0), exam(1, right=1), mirrored])
    table = read_images(exams, image_dir=tmp_path / "images")
    assert len(table) == 9
    positive = table[table["label"] == 1]
    assert [Path(file).name for file in positive["file"]] == ["1_R_CC.png", "1_R_MLO.png", "2_L_CC.png"]
    assert positive["side"].tolist() == ["RIGHT", "RIGHT", "LEFT"]
    assert table.groupby("patient").size().tolist() == [4, 4, 1]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {exams}: names no patients: each exam counts as a patient of its own",
        f"warning: {exams}: 1 of 9 images are mirrored, and scored as they are",
    ]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda d: d / "missing", "missing: not found. Expected a folder of images, a table or an exam list"),
        (lambda d: write_list(d / "a.csv", ["a.png,1"], "path,lobe"), "a.csv, line 1: missing columns label"),
        (lambda d: write_list(d / "a.csv", ["a.png"]), "a.csv, line 2: Expected 2 cells. Received 1"),
        (lambda d: write_list(d / "a.csv", []), "a.csv: no images of the set test"),
        (lambda d: write_list(d / "a.csv", ["a.png,maybe"]), "a.csv, line 2: unknown label. Expected one of 0"),
        (lambda d: write_list(d / "a.csv", ["a.png,1,up"], "file,label,side"), "line 2: unknown side. Expected l, "),
        (lambda d: write_list(d / "a.csv", ["a.png,1,XCCL"], "file,label,view"), "line 2: unknown view. Expected cc, "),
        (lambda d: write_list(d / "a.csv", ["a.png,1,fold3"], "file,label,set"), "line 2: unknown set. Expected tr"),
        (lambda d: write_list(d / "a.csv", ["a.png,1", "b.png,0"]), "a.png: listed in .*a.csv, but not there (2 of 2"),
        (lambda d: write_list(d / "a.csv", ["a.png,1", "a.png,0"], "file,file"), "missing columns label"),
        (lambda d: write_png(d / "x" / "a.png").parent, "neg: no such class folder. Expected neg, pos"),
        (lambda d: write_png(d / "x/neg/a.png").parents[1].joinpath("pos").mkdir() or d / "x", "pos: no images here"),
        (lambda d: write_list(d / "a.pkl", ["x"]), "a.pkl: Expected --image-dir"),
    ],
)
def test_data_that_cannot_be_evaluated(tmp_path, make, text):
    with pytest.raises(InputError, match=text.replace("(", r"\(").replace(".csv", r"\.csv")):
        read_images(make(tmp_path))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"a": 1}, "a list of exams"),
        ([{"L-CC": ["a"]}], "exam 0: Expected a cancer_label with left_malignant 0 or 1"),
        ([{"cancer_label": {}}], "no images in these exams"),
        ([exam(0, left=None)], "exam 0: Expected a cancer_label with left_malignant"),
    ],
)
def test_exam_lists_that_are_none(tmp_path, content, text):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(InputError, match=text):
        read_images(tmp_path / "a.pkl", image_dir=tmp_path)


def test_predictions_of_trainers_and_of_others(tmp_path, capsys):
    header = "file,label,neg,pos,neg_flips,pos_flips"
    rows = ["test/neg/P_1_LEFT_CC.png,neg,0.8,0.2,0.7,0.3", "test/pos/P_2_LEFT_CC.png,pos,0.4,0.6,0.3,0.7"]
    table, models = read_predictions(write_list(tmp_path / "a.csv", rows, header))
    assert models == ["pos", "pos_flips"]
    assert table["patient"].tolist() == ["P_1", "P_2"] and table["label"].tolist() == [0, 1]
    assert table[models].to_numpy().tolist() == [[0.2, 0.3], [0.6, 0.7]]
    rows, header = ["x;malignant;0.5;;old", "y;benign;-3;2;new"], "Image path;Pathology;reader;net;scanner"
    table, models = read_predictions(write_list(tmp_path / "b.csv", rows, header))
    assert models == ["reader", "net"] and np.isnan(table["net"][0]) and table["reader"].tolist() == [0.5, -3]
    assert table["label"].tolist() == [1, 0]
    assert "columns without numbers are left out: scanner" in capsys.readouterr().err
    # The labels of other classes, and one of several sets.
    rows = ["x,mass_mal,0.5,val", "y,mass_ben,0.4,test", "z,mass_mal,0.7,test"]
    listed = write_list(tmp_path / "c.csv", rows, "file,label,net,set")
    table, models = read_predictions(listed, ["mass_ben", "mass_mal"], ["mass_mal"])
    assert (models, table["file"].tolist(), table["label"].tolist()) == (["net"], ["y", "z"], [0, 1])
    assert read_predictions(listed, ["mass_ben", "mass_mal"], ["mass_mal"], "val")[0]["file"].tolist() == ["x"]
    for rows, header, text in (
        (["x,1"], "file,label", "a column of predictions a model"),
        (["x,1,high", "y,0,0.1"], "file,label,net", "Expected numbers in the column net. Received 'high' for x"),
        (["x,1,high"], "file,label,net", "a column of predictions a model"),
        (["x,0.2"], "file,net", "missing columns label"),
        (["x,1,0.3", "x,0,0.2"], "file,label,net", "x stands there twice"),
    ):
        with pytest.raises(InputError, match=text):
            read_predictions(write_list(tmp_path / "c.csv", rows, header))


def test_model_names_tell_files_apart(tmp_path):
    assert name_models(["a/one.h5", "b/two.keras"]) == ["one", "two"]
    assert name_models([tmp_path / "a/m.h5", tmp_path / "b/m.h5"]) == ["a/m", "b/m"]
    assert name_models(["m.h5", "m.keras"]) == ["m.h5", "m.keras"]
