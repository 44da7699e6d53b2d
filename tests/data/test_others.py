"""Data of one's own, and public data sets, from their files to prepared folders: every format, bad input."""

import json
from dataclasses import astuple
from pickle import dumps

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.uid import RLELossless

from mammo.base.files import InputError
from mammo.commands.prepare import main, run
from mammo.data.inbreast import read_classes
from mammo.data.listing import Picture, name_pictures
from mammo.data.others import read_cmmd, read_exams, read_mias, read_nyu, read_vindr
from mammo.data.own import OWN_COLUMNS, read_folders, read_labels, read_own_table
from mammo.data.prepare import read_image_table
from mammo.phantom.cbis_ddsm import write_dicom
from tests.data.phantoms import OWN, WHOLE, images_of, to_eight_bits, write, write_rows
from tests.helpers import exam, png, read_csv, read_png, read_report

LABELS = read_labels()
CLASSES = read_classes(["1", "2"], ["4", "5", "6"])


@pytest.fixture(params=OWN)
def prepared(request, prepared_data):
    """(what was made, prepared folder, report) of each format."""
    return prepared_data(request.param)


def test_repairs_are_counted(prepared):
    made, _, report = prepared
    counted = {kind: repair["count"] for kind, repair in report["repairs"].items() if repair["count"]}
    left_out = {kind: listed["count"] for kind, listed in report["excluded"].items() if listed["count"]}
    eight_bit = sum(img.max() % 257 == 0 and not (img % 257).any() for img in made.values())
    expected = {
        "csv": {"8_bit_scaled_to_16_bit": eight_bit, "monochrome1_inverted": 4},
        "folders": {},
        "cmmd": {"8_bit_scaled_to_16_bit": 38, "rows_of_one_breast_merged": 1, "rows_without_image": 1},
        "vindr": {"monochrome1_inverted": 1},
        "mias": {"8_bit_scaled_to_16_bit": 20},
        "nyu": {"mirror_image_undone": 4},
    }
    assert counted == expected[made.name]
    assert left_out == {"cmmd": {"file_without_row": 2}, "vindr": {"label_of_no_class": 2}}.get(made.name, {})
    assert report["stored_bits"] == (16 if made.name in ("csv", "folders", "nyu") else None)


# ------------------------------------------------------------------------------------------------ sets, patients


@pytest.fixture
def table(drawn, tmp_path):
    """Ten images, CC views of the breasts with findings first; and a function that prepares them by rows of a table."""
    images, cancer = drawn
    breasts = sorted(cancer, key=lambda breast: not cancer[breast])[:10]
    for number, breast in enumerate(breasts):
        write(tmp_path / f"data/{number}.png", images[*breast, "CC"])

    def prepare(rows, header=("file", "label", "patient", "set"), **options):
        write_rows(tmp_path / "labels.csv", header, rows)
        options = WHOLE | {"table": str(tmp_path / "labels.csv")} | options
        run("csv", data=str(tmp_path / "data"), out=str(tmp_path / "out"), **options)
        return read_report(tmp_path / "out")

    prepare.out, prepare.data = tmp_path / "out", tmp_path / "data"
    return prepare


def rows_of(sets, patients="abcdefghij"):
    """Rows of the ten images, positive and negative in turns."""
    return [[f"{n}.png", n % 2, patients[n], name] for n, name in enumerate(sets)]


TWO_SETS = ["training"] * 6 + ["test"] * 4
THREE_SETS = ["train"] * 4 + ["validation"] * 3 + ["TEST"] * 3


def patients_of(out):
    return {name: "".join((out / f"pat_{name}.txt").read_text().split()) for name in ("train", "val", "test")}


def test_sets_that_the_table_names_are_kept(table):
    table(rows_of(THREE_SETS))
    assert patients_of(table.out) == {"train": "abcd", "val": "efg", "test": "hij"}


def test_validation_comes_from_training_where_there_is_none(table):
    table(rows_of(TWO_SETS), val_size=0.3)
    sets = patients_of(table.out)
    assert sets["test"] == "ghij" and len(sets["val"]) == 2
    assert sorted(sets["train"] + sets["val"]) == list("abcdef")


def test_sets_of_the_table_are_not_used_when_others_are_asked_for(table):
    table(rows_of(TWO_SETS), split="random", test_size=0.2)
    assert len(patients_of(table.out)["test"]) == 2


@pytest.mark.parametrize(
    ("sets", "options", "size"),
    [
        (TWO_SETS, {"test_size": 0.2}, "test"),
        (THREE_SETS, {"test_size": 0.2}, "test"),
        (THREE_SETS, {"val_size": 0.2}, "val"),
        (TWO_SETS, {"val_size": 0.2, "split": "lists"}, "val"),
    ],
)
def test_shares_that_a_split_does_not_use_are_refused(table, sets, options, size):
    lists = {f"pat_{name}": "list.txt" for name in ("train", "val", "test")} if "split" in options else {}
    split = options.get("split", "official")
    expected = rf"--{size}-size: Expected a --split that draws the {size} set\."
    with pytest.raises(InputError, match=f"{expected} Received --split {split}"):
        table(rows_of(sets), **options, **lists)
    assert not table.out.exists()


def test_sets_that_share_patients_are_refused(table):
    with pytest.raises(InputError, match="2 patients in both train and test, such as a, b: Expected all images"):
        table(rows_of(THREE_SETS, patients="abcdefgabh"))
    assert not list(table.out.rglob("*.png"))


def test_images_that_come_into_other_sets_than_before_are_said(table, capsys):
    """h, i and j were the test set: a, new there, was trained on. b and e change places between train and val."""
    seen = ": models trained on the earlier sets have seen some of today's test images"
    table(rows_of(THREE_SETS))
    table(rows_of(THREE_SETS))
    assert capsys.readouterr().err.count("warning") == 0
    table(rows_of(["test", *THREE_SETS[1:7], "train", "test", "test"]))
    expected = f"warning: {table.out}: 2 images now in another set than before (such as a.png){seen}\n"
    assert expected in capsys.readouterr().err
    table(rows_of(["test", "val", "train", "train", "train", *THREE_SETS[5:7], "train", "test", "test"]))
    expected = f"warning: {table.out}: 2 images now in another set than before (such as b.png)\n"
    assert expected in capsys.readouterr().err
    (table.out / "images.csv").write_text("file,set\n")
    table(rows_of(THREE_SETS))
    error = capsys.readouterr().err
    assert f"warning: {table.out / 'images.csv'}, line 1: missing columns label" in error
    assert len(read_image_table(table.out / "images.csv")) == 10


def test_unknown_patients_are_said(table, capsys):
    table([[f"{n}.png", n % 2] for n in range(10)], header=("file", "label"))
    out = capsys.readouterr().out
    assert "split random, random state 12345" in out
    assert "Warning: the patient of 10 images, such as 0.png, is not known" in out
    assert sorted(read_image_table(table.out / "images.csv")["patient"]) == [f"{n}.png" for n in range(10)]
    assert sorted(images_of(table.out)) == list("0123456789")


def test_near_duplicates_across_sets_are_told(table, capsys):
    """A training image stands in the test set too: mirrored, smaller, and as JPEG."""
    copy = cv2.resize(to_eight_bits(read_png(table.data / "0.png"))[:, ::-1], (100, 120), interpolation=cv2.INTER_AREA)
    write(table.data / "9.jpg", copy, [cv2.IMWRITE_JPEG_QUALITY, 85])
    report = table([*rows_of(THREE_SETS)[:9], ["9.jpg", 0, "j", "test"]])
    (pair,) = report["near_duplicates"]
    assert (pair["file"], pair["other_file"]) == ("train/neg/a.png", "test/neg/j.png")
    assert pair["difference"] < 0.09
    assert read_csv(table.out / "near_duplicates.csv") == [{name: str(value) for name, value in pair.items()}]
    printed = capsys.readouterr().out
    assert "1 pair of images of different patients that look the same, 1 of them across sets" in printed
    assert f"such as {pair['file']} and {pair['other_file']}" in printed


def test_same_picture_twice_of_one_patient_is_none(table):
    write(table.data / "copy.png", read_png(table.data / "0.png"))
    report = table([*rows_of(THREE_SETS), ["copy.png", 0, "a", "train"]])
    assert report["near_duplicates"] == []
    assert {"a", "a_2"} <= images_of(table.out).keys()


def test_dark_16_bit_files_are_said(table, capsys):
    for path in table.data.glob("*.png"):
        write(path, read_png(path) >> 4)
    report = table(rows_of(THREE_SETS))
    assert report["stored_bits"] == 12
    printed = capsys.readouterr().out
    assert "use 12 bits, so that the images are dark: after the rescale factor they reach 16 of 255" in printed
    table(rows_of(THREE_SETS), auto_levels=True, fresh=True)
    assert "are dark" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "patients, names",
    [
        (["a/b", "c d", "../e"], ["a-b_LEFT_CC", "c-d_LEFT_CC", "e_LEFT_CC"]),
        (["a", "a", "a_LEFT_CC_2"], ["a_LEFT_CC", "a_LEFT_CC_2", "a_LEFT_CC_2_LEFT_CC"]),
        (["Ä 1", "…", "-.-"], ["Ä-1_LEFT_CC", "patient_LEFT_CC", None]),
    ],
)
def test_names_of_images_are_safe_and_different(patients, names):
    pictures = [Picture(f"{n}.png", False, patient, "LEFT", "CC") for n, patient in enumerate(patients)]
    if None in names:
        with pytest.raises(InputError, match="would both be called patient in file names"):
            name_pictures(pictures)
    else:
        named, unknown = name_pictures(pictures)
        assert {name: picture.patient for name, picture in named.items()} == dict(zip(names, patients, strict=True))
        assert unknown == []


def test_names_without_side_and_view_never_clash():
    pictures = [Picture(file, False, patient, "", "") for file, patient in (("1", "a"), ("2", "a"), ("3", "a_2"))]
    named, _ = name_pictures(pictures)
    assert {name: picture.file for name, picture in named.items()} == {"a": "1", "a_2": "2", "a_2_2": "3"}


# ------------------------------------------------------------------------------------------- rules of the readers


def pictures_of(reading):
    """(file, positive, patient, side, view, set) of each."""
    return [astuple(picture)[:6] for picture in reading.pictures]


def read_rows(folder, header, rows, labels=LABELS, columns=(), pattern=None):
    write_rows(folder / "t.csv", header, rows)
    return read_own_table(folder, folder / "t.csv", labels, dict(columns), pattern)


@pytest.mark.parametrize(
    "value, positive",
    [(value, True) for value in ("1", "pos", "Malignant", "CANCER", "True", " positive ")]
    + [(value, False) for value in ("0", "NEG", "benign", "BENIGN_WITHOUT_CALLBACK", "Normal", "no")],
)
def test_usual_labels_are_known(tmp_path, value, positive):
    reading = read_rows(tmp_path, ["file", "label"], [["a.png", value]])
    assert [picture.positive for picture in reading.pictures] == [positive]


def test_labels_of_ones_own_leave_others_out(tmp_path):
    labels = read_labels(["BI-RADS 1", "2"], ["5"])
    rows = [["a.png", "bi-rads 1"], ["b.png", "3"], ["c.png", "5"], ["d.png", "0"]]
    reading = read_rows(tmp_path, ["file", "label"], rows, labels)
    assert [(picture.file, picture.positive) for picture in reading.pictures] == [("a.png", False), ("c.png", True)]
    assert reading.excluded["label_of_no_class"] == ["b.png", "d.png"]
    with pytest.raises(InputError, match="label 5: in both classes"):
        read_labels(["1", "5"], ["5"])


def test_columns_of_any_name(tmp_path):
    header, rows = ["x", "Outcome", "MRN", "Breast"], [["a.png", "1", "77", "R"]]
    columns = {"file": "X", "label": "outcome", "patient": "MRN", "side": "breast"}
    assert pictures_of(read_rows(tmp_path, header, rows, columns=columns)) == [("a.png", True, "77", "RIGHT", "", "")]
    with pytest.raises(InputError, match="line 1: missing columns side, view"):
        read_rows(tmp_path, header, rows, columns=columns | {"side": "Side", "view": "View"})


@pytest.mark.parametrize(
    "name, pattern, patient",
    [
        ("P_1_LEFT_CC.png", None, "P_1"),
        ("scan.png", None, ""),
        ("clinic-12_scan.png", r"^([a-z]+-\d+)_", "clinic-12"),
        ("clinic-12_LEFT_CC.png", r"\d+", "12"),
        ("a/b/scan.png", "[^/]+", "a"),
    ],
)
def test_patient_from_the_name_of_a_file(tmp_path, name, pattern, patient):
    for reading in (
        read_rows(tmp_path, ["file", "label"], [[name, "1"]], pattern=pattern),
        read_rows(tmp_path, ["file", "label", "patient"], [[name, "1", "column"]]),
    ):
        assert reading.pictures[0].patient in (patient, "column")
        patient = "column"


def test_empty_cells_are_filled_from_the_name_of_the_file(tmp_path):
    header, rows = ["file", "label", "patient", "side", "view"], [["P_1_LEFT_CC.png", 1, "", "", "MLO"]]
    assert pictures_of(read_rows(tmp_path, header, rows)) == [("P_1_LEFT_CC.png", True, "P_1", "LEFT", "MLO", "")]
    rows = [["a.png", 1, "7", " R ", "cc "], ["b.png", 0, "7", "Left", "Medio-lateral oblique"]]
    sides = [picture[3:5] for picture in pictures_of(read_rows(tmp_path, header, rows))]
    assert sides == [("RIGHT", "CC"), ("LEFT", "MLO")]


def test_files_are_found_by_absolute_names_below_the_folder(tmp_path):
    reading = read_rows(tmp_path, ["file", "label"], [[tmp_path / "a/b.png", 1]])
    assert reading.pictures[0].file == "a/b.png"


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_folders_with_sets_and_patients_of_sub_folders(tmp_path):
    make_files(tmp_path, "training/neg/anna/1.png", "training/pos/P_2_LEFT_CC.jpg", "valid/neg/deep/er/3.dcm")
    make_files(tmp_path, "test/Malignant/4.pgm", "test/neg/notes.txt")
    make_files(tmp_path, "out/train/neg/5.png", "full_img/6.png", "7.png")
    reading = read_folders(tmp_path, LABELS, skip=[tmp_path / "out"])
    assert reading.excluded["file_in_no_set"] == ["7.png", "full_img/6.png"]
    assert pictures_of(reading) == [
        ("test/Malignant/4.pgm", True, "", "", "", "test"),
        ("training/neg/anna/1.png", False, "anna", "", "", "train"),
        ("training/pos/P_2_LEFT_CC.jpg", True, "P_2", "LEFT", "CC", "train"),
        ("valid/neg/deep/er/3.dcm", False, "deep", "", "", "val"),
    ]


def test_folders_of_ones_own_names(tmp_path):
    make_files(tmp_path, "healthy/1.png", "ill/2.png", "unsure/3.png")
    reading = read_folders(tmp_path, read_labels(["healthy"], ["ill"]))
    labels = [(picture.file, picture.positive) for picture in reading.pictures]
    assert labels == [("healthy/1.png", False), ("ill/2.png", True)]
    assert reading.excluded["label_of_no_class"] == ["unsure/3.png"]


def test_mias_pairs_are_patients_left_even_and_right_odd(tmp_path):
    """As the data set's description has it; an image is positive when any of its findings is malignant."""
    lines = ["Text around the list", "mdb005 F CIRC B 477 133 30", "mdb005 F CIRC B 500 168 26", "mdb006 F NORM"]
    lines += ["mdb144 F MISC B 233 994 29", "mdb144 F MISC M 313 540 27", "mdb245 F CALC M *NOTE 3*"]
    (tmp_path / "Info.txt").write_text("\r\n".join(lines))
    make_files(tmp_path, "mdb005.pgm", "mdb006.pgm", "mdb144.png", "mdb322.pgm")
    reading = read_mias(tmp_path)
    assert pictures_of(reading) == [
        ("mdb005.pgm", False, "mdb005-006", "RIGHT", "MLO", ""),
        ("mdb006.pgm", False, "mdb005-006", "LEFT", "MLO", ""),
        ("mdb144.png", True, "mdb143-144", "LEFT", "MLO", ""),
        ("mdb245.pgm", True, "mdb245-246", "RIGHT", "MLO", ""),
    ]
    assert reading.excluded["file_without_row"] == ["mdb322.pgm"]
    make_files(tmp_path, "mdb005.png")
    with pytest.raises(InputError, match=r"Expected one file of mdb005\. Received mdb005\.pgm, mdb005\.png; remove"):
        read_mias(tmp_path)


def test_cmmd_breast_is_positive_when_any_of_its_rows_is(tmp_path):
    """Headers without side or readable at all are faults; without patient the folder tells it."""
    header, img = ["ID1", "LeftRight", "classification"], np.arange(64, dtype=np.uint8).reshape(8, 8)
    rows = [["D1-0001", "L", "Benign"], ["D1-0001", "L", "Malignant"], ["D1-0002", "R", "Benign"]]
    write_rows(tmp_path / "CMMD_clinicaldata_revision.csv", header, rows)
    write_dicom(tmp_path / "D1-0001/1-1.dcm", img, PatientID="D1-0001", ImageLaterality="L", ViewPosition="MLO")
    write_dicom(tmp_path / "D1-0001/1-2.dcm", img, PatientID="D1-0001", ViewPosition="CC")
    write_dicom(tmp_path / "D1-0002/1-1.dcm", img, ImageLaterality="R", ViewPosition="ML")
    make_files(tmp_path, "D1-0002/1-2.dcm")
    reading = read_cmmd(tmp_path, jobs=2)
    assert pictures_of(reading) == [
        ("D1-0001/1-1.dcm", True, "D1-0001", "LEFT", "MLO", ""),
        ("D1-0002/1-1.dcm", False, "D1-0002", "RIGHT", "", ""),
    ]
    faults = [fault for result in reading.faults for fault in result.faults]
    assert "D1-0001/1-2.dcm: header: unknown ImageLaterality" in faults[0]
    assert "D1-0002/1-2.dcm" in faults[1] and "cannot read the header" in faults[1]
    assert reading.repairs["rows_of_one_breast_merged"][0].startswith("D1-0001 LEFT: ")


def test_vindr_birads_make_the_classes(tmp_path):
    header = ["study_id", "image_id", "laterality", "view", "breast_birads", "split"]
    rows = [["s", f"i{n}", "L", "CC", f"BI-RADS {n}", "training"] for n in range(1, 6)]
    write_rows(tmp_path / "breast-level_annotations.csv", header, rows)
    reading = read_vindr(tmp_path, CLASSES)
    assert [(p.file, p.positive) for p in reading.pictures] == [(f"images/s/i{n}.dicom", n > 3) for n in (1, 2, 4, 5)]
    assert reading.excluded["label_of_no_class"] == ["images/s/i3.dicom"]
    reading = read_vindr(tmp_path, read_classes(["1"], ["3", "4", "5"]))
    assert [p.positive for p in reading.pictures] == [False, True, True, True]


EXAM = exam(0, right=1)


def test_exam_list_is_labelled_by_side(tmp_path):
    path = tmp_path / "exams.pkl"
    other = EXAM | {"L-CC": ["x", "y"], "R-CC": [], "L-MLO": [], "R-MLO": ["z"], "horizontal_flip": "YES"}
    path.write_bytes(dumps([EXAM, other]))
    assert list(read_exams(path)) == [
        ("0_L_CC", "0", "LEFT", "CC", False, False),
        ("0_R_CC", "0", "RIGHT", "CC", True, False),
        ("0_L_MLO", "0", "LEFT", "MLO", False, False),
        ("0_R_MLO", "0", "RIGHT", "MLO", True, False),
        ("x", "exam_1", "LEFT", "CC", False, True),
        ("y", "exam_1", "LEFT", "CC", False, True),
        ("z", "exam_1", "RIGHT", "MLO", True, True),
    ]
    assert read_nyu(tmp_path, path).pictures[-1] == Picture("z.png", True, "exam_1", "RIGHT", "MLO", mirrored=True)


# ------------------------------------------------------------------------------------------------------ bad input


INFO = "Info.txt"
VINDR = "breast-level_annotations.csv"
VINDR_HEADER = "study_id,image_id,laterality,view,breast_birads,split\n"
CMMD = "CMMD_clinicaldata_revision.csv"


@pytest.mark.parametrize(
    "form, name, content, message",
    [
        ("csv", "t.csv", "file,label\n", "no images of either class"),
        ("csv", "t.csv", "", "t.csv, line 1: missing columns file, label. Received nothing"),
        ("csv", "t.csv", "file,patient\na.png,1\n", "t.csv, line 1: missing columns label. Received file, patient\n"),
        ("csv", "t.csv", b"\x89PNG\r\n\xff", "t.csv: not a text file"),
        ("csv", "t.csv", "file,label\na.png\n", "t.csv, line 2: Expected 2 cells. Received 1"),
        ("csv", "t.csv", "file,label\na.png,1\nb.png,maybe\n", "t.csv, line 3: unknown label. Expected one of 0, neg"),
        ("csv", "t.csv", "file,label\na.png,1\n./a.png,1\n", "t.csv, line 3: a.png stands at"),
        ("csv", "t.csv", "file,label\n../a.png,1\n", "t.csv, line 2: Expected a file below the folder"),
        ("csv", "t.csv", "file,label\n/etc/a.png,1\n", "t.csv, line 2: Expected a file below the folder"),
        ("csv", "t.csv", "file,label\n,1\n", "t.csv, line 2: Expected a file below the folder"),
        ("csv", "t.csv", "file,label,side\na.png,1,both\n", "t.csv, line 2: unknown side. Expected l, left, r, right"),
        ("csv", "t.csv", "file,label,view\na.png,1,XCCL\n", "t.csv, line 2: unknown view. Expected cc, cranio"),
        ("csv", "t.csv", "file,label,set\na.png,1,\n", "t.csv, line 2: unknown set. Expected train"),
        ("csv", "t.csv", "file,label\na.png,1\nb.png,0\nc.png,0\n", "none of the 3 files is there. Expected the"),
        ("csv", "nowhere.csv", None, "No such file or directory"),
        ("folders", "neg/readme.txt", "x", "no images below it"),
        ("folders", "1.png", "x", "1.png: Expected images of"),
        ("folders", "train/a.png", "x", "train/a.png: Expected images of"),
        ("folders", "neg/a.png other/b.png", "x", "other: unknown label. Expected one of 0, neg"),
        ("cmmd", "1.dcm", "x", "Expected one table cmmd_clinicaldata*.csv or .xlsx or .xls below it. Received none"),
        ("cmmd", CMMD, "ID1,LeftRight,classification\nD1,X,Benign\n", "line 2: unknown side. Expected l, left, r"),
        ("cmmd", CMMD, "ID1,LeftRight,classification\nD1,L,Unsure\n", "line 2: unknown classification"),
        ("cmmd", CMMD, "ID1,LeftRight,classification\nD1,L,Benign\n", "no images below it. Expected files ending in"),
        ("vindr", VINDR, "study_id,image_id\n", "missing columns laterality, view position, breast birads, split"),
        ("vindr", VINDR, VINDR_HEADER + "s,i,L,CC,BI-RADS 7,test\n", "line 2: unknown breast_birads"),
        ("vindr", VINDR, VINDR_HEADER + "s,i,B,CC,BI-RADS 1,test\n", "line 2: unknown side"),
        ("vindr", VINDR, VINDR_HEADER + "s,i,L,CC,BI-RADS 1,dev\n", "line 2: unknown split"),
        ("vindr", VINDR, VINDR_HEADER + "../..,i,L,CC,BI-RADS 1,test\n", "line 2: Expected a file below the folder"),
        ("vindr", VINDR, VINDR_HEADER + "s,i,L,CC,BI-RADS 1,test\n" * 2, "line 3: images/s/i.dicom stands at"),
        ("mias", INFO, "nothing\n", "Info.txt: no images in it"),
        ("mias", INFO, "mdb001 G WHAT B\n", "Info.txt, line 1: unknown class"),
        ("mias", INFO, "mdb001 G CIRC X 1 2 3\n", "Info.txt, line 1: unknown severity. Expected B or M. Received 'X'"),
        ("mias", INFO, "mdb001 G CIRC\n", "Info.txt, line 1: unknown severity"),
        ("mias", INFO, b"\xff\xfe", "Info.txt: not a text file"),
        ("nyu", "t.pkl", dumps({"a": 1}), "t.pkl: Expected a list of exams"),
        ("nyu", "t.pkl", dumps([EXAM | {"cancer_label": None}]), "exam 0: Expected a cancer_label with left_malignant"),
        ("nyu", "t.pkl", dumps([EXAM | {"horizontal_flip": 1}]), "exam 0: Expected horizontal_flip YES or NO"),
        ("nyu", "t.pkl", dumps([EXAM | {"L-CC": ["a", "a"]}]), "exam 0: a stands there a second time"),
        ("nyu", "t.pkl", dumps([EXAM | {"L-CC": [["0_L_CC"]]}]), "exam 0: Expected a list of names under L-CC"),
        ("nyu", "t.pkl", dumps([EXAM | {"L-CC": "0_L_CC"}]), "exam 0: Expected a list of names under L-CC"),
        ("nyu", "t.pkl", dumps([EXAM | {"cancer_label": {"left_malignant": np.eye(2)}}]), "left_malignant 0 or 1"),
        ("nyu", "t.pkl", dumps([EXAM | {"L-CC": ["../../x"]}]), "Expected a file below the folder"),
        ("nyu", "t.pkl", dumps([EXAM, EXAM]), "exam 1: 0_L_CC stands there a second time"),
        ("nyu", "t.pkl", dumps([EXAM | {"L-CC": print}]), "opening anything else can run code"),
        ("nyu", "t.pkl", b"\x80\x04", "not a whole pickle"),
    ],
)  # fmt: skip
def test_bad_tables_and_folders_end_in_one_line(tmp_path, capsys, form, name, content, message):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    arguments = [form, str(data), str(out)]
    for file in (name or "").split() if content is not None else ():
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        (data / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if form in ("csv", "nyu") and name:
        arguments += ["--table", str(data / name)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare_dataset.py: error: ") or "error: " in error
    assert message in error and error.count("\n") == 1
    assert not list(out.rglob("*.png")) and not (out / "report.json").exists()


PGM_OF_16_BITS = b"P5 2 2 65535\n12345678"
FRAMES = np.arange(800, dtype=np.uint16).reshape(40, 20)
BAD_IMAGES = {
    "missing": ("png", lambda path: None, "No such file"),
    "empty": ("png", lambda path: path.write_bytes(b""), "empty (0 bytes)"),
    "no image": ("png", lambda path: path.write_text("hello"), "not a readable image"),
    "truncated": ("png", lambda path: path.write_bytes(png(np.eye(99, dtype=np.uint8))[:60]), "truncated"),
    "colour": ("png", lambda path: write(path, np.eye(60).reshape(20, 60, 3) * 255), "colour image"),
    "constant": ("png", lambda path: write(path, np.ones((20, 20))), "constant image"),
    "not a number": ("tif", lambda path: write(path, np.full((20, 20), np.nan, np.float32)), "NaN"),
    "floats": ("tif", lambda path: write(path, np.eye(20, dtype=np.float32)), "8- or 16-bit unsigned"),
    "no pixels": ("dcm", lambda path: path.write_bytes(bytes(128) + b"DICM"), "no pixels"),
    "several frames": ("dcm", lambda path: write_dicom(path, FRAMES, NumberOfFrames=2), "multi-frame DICOM"),
    "damaged pgm": ("pgm", lambda path: path.write_bytes(b"P5 100 100 255\n123"), "not a readable image"),
    "pgm of 16 bits": (
        "pgm",
        lambda path: path.write_bytes(b"P5 2 2 65535\n12345678"),
        "Expected a PGM file of 8 bits",
    ),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_every_fault_of_an_image_is_said(table, kind):
    suffix, make, message = BAD_IMAGES[kind]
    make(table.data / f"bad.{suffix}")
    rows = [*rows_of(THREE_SETS), [f"bad.{suffix}", 1, "z", "train"]]
    report = table(rows, on_error="skip")
    (skipped,) = report["skipped"]
    assert skipped["image"] == "z" and f"bad.{suffix}" in skipped["reason"] and message in skipped["reason"]
    assert sorted(images_of(table.out)) == list("abcdefghij")


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["mias", "--patient-regex", "x"], 2, "unrecognized arguments: --patient-regex"),
        (["csv", "--table", "x", "--neg-birads", "1"], 2, "unrecognized arguments: --neg-birads"),
        (["folders", "--table", "x"], 2, "unrecognized arguments: --table"),
        (["csv"], 2, "required: --table"),
        (["nyu"], 2, "required: --table"),
        (["folders", "--patient-regex", "("], 2, "Expected a regular expression"),
        (["vindr", "--neg-birads", "4a", "--pos-birads", "4"], 1, "in both classes"),
        (["folders", "--split", "lists"], 1, "--split lists: Expected a file for each set"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, capsys, options, status, message):
    write(tmp_path / "neg/1.png", np.eye(9, dtype=np.uint8))
    command = [options[0], str(tmp_path), str(tmp_path / "out"), *options[1:]]
    if status == 2:
        with pytest.raises(SystemExit) as error:
            main(command)
        assert error.value.code == 2
    else:
        assert main(command) == status
    assert message in capsys.readouterr().err


def test_options_of_all_formats_are_kept_with_the_folder(table):
    """As today's folders have them; one with other names of files is refused."""
    rows = [[file, label] for file, label, *_ in rows_of(THREE_SETS)]
    table(rows, header=("file", "label"), patient_regex="^([0-9])")
    assert json.loads((table.out / "options.json").read_text()) == {
        "format": "csv", "voi_lut": False, **dict.fromkeys(f"{name}_column" for name in OWN_COLUMNS),
        "neg_labels": None, "pos_labels": None, "patient_regex": "^([0-9])",
        "neg_birads": ["1", "2"], "pos_birads": ["4", "5", "6"],
        "split": "random", "test_size": 0.15, "val_size": 0.1, "random_state": 12345, "img_size": [72, 56],
        "resize": "stretch", "segment_breast": False, "auto_levels": False, "face": "as-is",
    }  # fmt: skip
    with pytest.raises(InputError, match=r"patient_regex \^\(\[0-9\]\) there, None now"):
        table(rows, header=("file", "label"))


def test_name_without_what_the_expression_finds(table):
    with pytest.raises(InputError, match=r"0\.png: no patient in this name\. Expected what --patient-regex"):
        table([["0.png", 1]], header=("file", "label"), patient_regex="P_([0-9]+)")


# -------------------------------------------------------------------------------------------------- kinds of DICOM


def test_dicom_of_any_bits_sign_and_compression_gives_one_scale(table):
    """The lowest and the highest value of the stored bits become 0 and 65535."""
    ramp = np.linspace(0, 4095, 400).astype(np.uint16).reshape(20, 20)
    write_dicom(table.data / "0.dcm", ramp, bits=12)
    write_dicom(table.data / "1.dcm", ramp, "MONOCHROME1", bits=12)
    write_dicom(table.data / "2.dcm", ramp * 4, bits=14)
    write_dicom(table.data / "3.dcm", ramp, bits=12)
    signed = pydicom.dcmread(table.data / "3.dcm")
    signed.PixelRepresentation, signed.PixelData = 1, (ramp.astype(np.int16) - 2048).tobytes()
    signed.save_as(table.data / "3.dcm")
    write_dicom(table.data / "4.dcm", ramp, bits=12)
    packed = pydicom.dcmread(table.data / "4.dcm")
    packed.compress(RLELossless)
    packed.save_as(table.data / "4.dcm")
    write_dicom(table.data / "5.dcm", ramp, bits=12, WindowCenter=2048, WindowWidth=1024)
    rows = [[f"{n}.dcm", n % 2, patient, "train"] for n, patient in enumerate("abcdef")]
    table(rows, img_size=[20, 20], voi_lut=True)
    found = {name: read_png(table.out / path) for name, path in images_of(table.out).items()}
    expected = np.rint(ramp * (65535 / 4095)).astype(np.uint16)
    for name in "abde":
        np.testing.assert_array_equal(found[name], expected)
    np.testing.assert_allclose(found["c"], expected, atol=13)  # 16380 of 16383
    # The middle quarter of the values fills the range (window function of DICOM, part 3, C.11.2.1.2.1).
    windowed = np.clip(((ramp - 2047.5) / 1023 + 0.5), 0, 1) * 65535
    np.testing.assert_allclose(found["f"], windowed, atol=20)
