"""Splits by patient, whole images, and preparation that goes on where it was."""

import datetime
import functools
import json
import os
import struct
import zipfile

import numpy as np
import pandas
import pytest

from mammo.base import work as base_work
from mammo.base.files import InputError, atomic_write, walk_files, write_img, write_text
from mammo.base.tables import find_columns, open_table
from mammo.base.work import Job, Outcome, run_resumable
from mammo.data.prepare import ImageRow, make_whole, read_image_table, write_image_table
from mammo.data.splits import check_disjoint, read_patient_list, split_by_patient, split_in_three
from mammo.images.pixels import read_resize_img
from mammo.images.reading import auto_levels, faces_left, parse_image_name, read_img, to_uint16
from tests.helpers import read_folder

# ------------------------------------------------------------------------------------------- splits by patient


def make_patients(number, cancer_share=0.4):
    return {f"P_{index:05d}": index % 10 < 10 * cancer_share for index in range(number)}


def test_split_in_three_keeps_the_shares():
    cancer = make_patients(1000)
    sets = split_in_three(cancer, 0.15, 0.1, 3)
    assert {name: len(patients) for name, patients in sets.items()} == {"train": 765, "val": 85, "test": 150}
    for patients in sets.values():
        assert sum(cancer[patient] for patient in patients) / len(patients) == pytest.approx(0.4, abs=0.01)
    assert sorted(patient for patients in sets.values() for patient in patients) == sorted(cancer)


def test_split_is_that_of_scikit_learn():
    from sklearn.model_selection import train_test_split

    cancer = make_patients(200)
    labels = list(cancer.values())
    first, second = train_test_split(list(cancer), test_size=0.15, stratify=labels, random_state=7)
    assert split_by_patient(cancer, 0.15, 7) == (sorted(first), sorted(second))


def test_split_depends_on_patients_and_seed_alone():
    cancer = make_patients(100)
    shuffled = dict(reversed(cancer.items()))
    assert split_in_three(cancer, 0.15, 0.1, 1) == split_in_three(shuffled, 0.15, 0.1, 1)
    assert split_in_three(cancer, 0.15, 0.1, 1) != split_in_three(cancer, 0.15, 0.1, 2)


@pytest.mark.parametrize("number, cancer_share", [(4, 0.5), (6, 0.2), (10, 0.4), (10, 0)])
def test_few_patients_are_divided_with_both_classes_where_there_are_two_of_each(number, cancer_share):
    cancer = make_patients(number, cancer_share)
    first, second = split_by_patient(cancer, 0.1, 0)
    assert sorted(first + second) == sorted(cancer)
    for label in (False, True):
        group = {patient for patient in cancer if cancer[patient] == label}
        if len(group) > 1:
            assert group & set(first) and group & set(second)


def test_patients_too_few_for_equal_shares_are_said(capsys):
    split_by_patient({"a": True, "b": False, "c": False}, 0.3, 0)
    assert capsys.readouterr().out.startswith("3 patients (1 with cancer) are too few for a split with equal shares")


def test_disjoint_check_names_patient_and_sets():
    check_disjoint({"train": ["a"], "val": ["b"], "test": ["c"]})
    with pytest.raises(InputError, match="2 patients in both val and test, such as b, d:"):
        check_disjoint({"train": ["a"], "val": ["d", "b"], "test": ["c", "b", "d"]})


@pytest.mark.parametrize("header", ["", "patient_id\n", "\ufeffpatient_id\r\n"])
def test_patient_list_with_and_without_header(tmp_path, header):
    path = tmp_path / "list.txt"
    path.write_text(header + "P_1\n\n P_2 \n", encoding="utf-8")
    assert read_patient_list(path) == ["P_1", "P_2"]


@pytest.mark.parametrize(
    "content, message",
    [(b"", "no patients"), (b"P_1\nP_1\n", "P_1 stands there 2 times"), (b"\xff\xfe\x00", "not a text")],
)
def test_bad_patient_list_is_named(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_patient_list(path)
    assert str(path) in str(error.value)


# ------------------------------------------------------------------------------------------------ whole images


def make_breast(height=60, width=40, chest_wall="left"):
    """A 16-bit breast: bright at the chest wall, on a black background."""
    x = np.arange(width)
    row = np.where(x < 0.6 * width, 50000 - 1000 * x, 0)
    img = np.tile(row, (height, 1)).astype(np.uint16)
    img[: height // 6] = 0
    return img if chest_wall == "left" else np.ascontiguousarray(img[:, ::-1])


def test_16_bit_range():
    img = np.array([[0, 1, 255]], np.uint8)
    assert to_uint16(img).tolist() == [[0, 257, 65535]]
    assert to_uint16(to_uint16(img)).tolist() == [[0, 257, 65535]]
    with pytest.raises(InputError, match="int16"):
        to_uint16(img.astype(np.int16))


def test_auto_levels_reach_both_ends_and_are_linear():
    img = np.array([[1000, 2000, 3000]], np.uint16)
    assert auto_levels(img).tolist() == [[0, 32768, 65535]]
    with pytest.raises(InputError, match="constant"):
        auto_levels(np.full((2, 2), 7, np.uint16))


def test_stretch_is_what_the_trainer_makes_of_the_full_image(tmp_path):
    img = make_breast()
    write_img(tmp_path / "full.png", img)
    assert read_img(tmp_path / "full.png").dtype == np.uint16
    by_trainer = read_resize_img(tmp_path / "full.png", target_size=(24, 20))
    np.testing.assert_array_equal(make_whole(img, (24, 20)), by_trainer)


@pytest.mark.parametrize("chest_wall", ["left", "right"])
def test_pad_keeps_the_aspect_and_the_chest_wall_at_the_edge(chest_wall):
    img = make_breast(60, 40, chest_wall)
    whole = make_whole(img, (30, 35), resize="pad")
    assert whole.shape == (30, 35)
    inside, padding = (whole[:, :20], whole[:, 20:]) if chest_wall == "left" else (whole[:, 15:], whole[:, :15])
    np.testing.assert_array_equal(inside, make_whole(img, (30, 20)))
    assert not padding.any()


def test_pad_below_where_the_width_is_reached_first():
    img = make_breast(30, 60)
    whole = make_whole(img, (40, 40), resize="pad")
    np.testing.assert_array_equal(whole[:20], make_whole(img, (20, 40)))
    assert not whole[20:].any()


@pytest.mark.parametrize("face", ["left", "right"])
@pytest.mark.parametrize("chest_wall", ["left", "right"])
def test_face_points_all_breasts_one_way(face, chest_wall):
    img = make_breast(chest_wall=chest_wall)
    assert faces_left(img) == (chest_wall == "right")
    whole = make_whole(img, img.shape, face=face)
    np.testing.assert_array_equal(whole, make_breast(chest_wall="right" if face == "left" else "left"))
    np.testing.assert_array_equal(make_whole(img, img.shape, face="as-is"), img)


def test_segmentation_cuts_to_the_breast_and_blanks_labels():
    img = make_breast()
    labelled = img.copy()
    labelled[1:5, 34:39] = 65535
    whole = make_whole(labelled, (50, 24), segment_breast=True)
    np.testing.assert_array_equal(whole, img[10:, :24])


# --------------------------------------------------------------------------------------------------- any tables


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_table_is_read_whatever_divides_its_cells(tmp_path, sign):
    path = tmp_path / "table.csv"
    path.write_bytes(f'\ufeffa{sign}b{sign}c d\r\n1{sign}"x{sign}y;,"{sign}3\r\n\r\n4{sign}{sign}6\r\n'.encode())
    with open_table(path) as (header, rows):
        assert header == ["a", "b", "c d"]
        assert list(rows) == [(f"{path}, line 2", ["1", f"x{sign}y;,", "3"]), (f"{path}, line 4", ["4", "", "6"])]


def test_excel_table_is_read_as_text(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book, path = openpyxl.Workbook(), tmp_path / "table.xlsx"
    for row in (["file", "number", "note"], ["001", 2, None], [None, None, None], ["NA", 4, "x"]):
        book.active.append(row)
    book.save(path)
    with open_table(path) as (header, rows):
        assert header == ["file", "number", "note"]
        assert list(rows) == [(f"{path}, row 2", ["001", "2", ""]), (f"{path}, row 4", ["NA", "4", "x"])]


def test_excel_cells_of_all_kinds_become_the_text_that_pandas_makes(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book, path = openpyxl.Workbook(), tmp_path / "table.xlsx"
    day = datetime.datetime(2020, 1, 2)
    for row in (
        ["a", "b"],
        [1, 2.0, 2.5, True, 1e20, " x ", None],
        [None, day, day.date(), day.time()],
        [],
        ["=1+1", -3],
    ):
        book.active.append(row)
    book.active["J2"].font = openpyxl.styles.Font(bold=True)  # a cell without a value
    book.save(path)
    header, *lines = pandas.read_excel(path, header=None, dtype=str, keep_default_na=False).values.tolist()
    with open_table(path) as (found, rows):
        assert found == header == ["a", "b", "", "", "", ""]
        assert [cells for _, cells in rows] == [line for line in lines if any(line)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("table.xlsx", b"PK nonsense", "(pip install openpyxl|not a readable table)"),
        ("table.txt", b"a,b", "Expected a table ending in .csv, .xlsx, .xls"),
        ("table.csv", b"a,b\n1\n", "line 2: Expected 2 cells. Received 1"),
    ],
)
def test_bad_table_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error, open_table(path) as (_, rows):
        list(rows)
    assert str(error.value).startswith(str(path))


def test_excel_table_that_would_fill_the_memory_is_refused(tmp_path):
    """Its directory claims 3 GiB for one sheet."""
    pytest.importorskip("openpyxl")
    path = tmp_path / "table.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/worksheets/sheet1.xml", b"1234")
    data = bytearray(path.read_bytes())
    struct.pack_into("<L", data, data.index(b"PK\x01\x02") + 24, 3 * 2**30)  # the size once unpacked
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"refused: \d+ bytes that claim to hold 3221225472"), open_table(path):
        pass


def test_columns_are_found_by_any_spelling():
    columns = {"patient": ("patient id", "id"), "label": ("label",), "side": ("side",)}
    header = ["ID", "Patient_ID", "x", " LABEL "]
    assert find_columns("t.csv", header, columns, optional=["side"]) == {"patient": 1, "label": 3}
    with pytest.raises(InputError, match="line 1: missing columns side"):
        find_columns("t.csv", header, columns)


# ---------------------------------------------------------------------------------------------- table of images

ROWS = [
    ImageRow("train/neg/P_1_LEFT_CC.png", "train", "neg", "P_1", "LEFT", "CC", "a/1.dcm"),
    ImageRow("train/pos/P_2_RIGHT_MLO_2.png", "train", "pos", "P_2", "RIGHT", "MLO", "a, b/2.dcm"),
    ImageRow("test/pos/Ä 3.png", "test", "pos", "Ä 3", "", "", "c.png"),
]


def test_image_table_is_read_as_written(tmp_path):
    write_image_table(tmp_path / "images.csv", ROWS)
    text = (tmp_path / "images.csv").read_bytes().decode()
    assert text.startswith("file,set,label,patient,side,view,source\ntrain/neg/P_1_LEFT_CC.png,train,neg,P_1,LEFT,CC,")
    table = read_image_table(tmp_path / "images.csv")
    assert list(table.columns) == list(ImageRow._fields)
    assert [ImageRow(*row) for row in table.itertuples(index=False)] == ROWS


def test_image_table_may_have_further_columns_and_another_order(tmp_path):
    path = tmp_path / "images.csv"
    path.write_text("score,source,view,side,patient,label,set,file\r\n0.5,s,CC,LEFT,007,neg,val,val/neg/x.png\r\n")
    table = read_image_table(path)
    assert table.to_dict("records") == [
        {"score": "0.5", "source": "s", "view": "CC", "side": "LEFT", "patient": "007"}
        | {"label": "neg", "set": "val", "file": "val/neg/x.png"}
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"file": "../../.bashrc"}, "line 3: Expected a file below the table's folder. Received '../../.bashrc'"),
        ({"file": "train/../../x.png"}, "line 3: Expected a file below"),
        ({"file": "/etc/passwd"}, "line 3: Expected a file below"),
        ({"file": "..\\x.png"}, "line 3: Expected a file below"),
        ({"file": "C:x.png"}, "line 3: Expected a file below"),
        ({"file": "\\\\host\\share\\x.png"}, "line 3: Expected a file below"),
        ({"file": "a\nb.png"}, "line 3: Expected a file below"),
        ({"file": ""}, "line 3: Expected a file below"),
        ({"file": ROWS[0].file}, "line 3: train/neg/P_1_LEFT_CC.png stands in line 2 too"),
        ({"set": "training"}, "line 3: unknown set. Expected train or val or test. Received 'training'"),
        ({"label": "1"}, "line 3: unknown label. Expected neg or pos. Received '1'"),
        ({"side": "L"}, "line 3: unknown side. Expected LEFT or RIGHT or nothing. Received 'L'"),
        ({"view": "ML"}, "line 3: unknown view"),
        ({"patient": ""}, "line 3: no patient"),
    ],
)
def test_bad_row_of_an_image_table_is_named(tmp_path, change, message):
    path = tmp_path / "images.csv"
    write_image_table(path, [ROWS[0], ROWS[1]._replace(**change), ROWS[2]])
    with pytest.raises(InputError) as error:
        read_image_table(path)
    assert message in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "line 1: missing columns file, set, label, patient, side, view, source. Received nothing"),
        (b",".join([b"age"] * 999), "view, source. Received " + 20 * "age, " + " ..."),
        (b"file,set,label,patient,side,view\n", "line 1: missing columns source. Received file, set"),
        (b"file,set,label,patient,side,view,source\n", "no images below the header"),
        (b"file,set,label,patient,side,view,source\n\na,train\n", "line 3: Expected 7 cells. Received 2"),
        (b'file,set,label,patient,side,view,source\n"a,train\n', "not a CSV file"),
        (b"\x89PNG\r\n\x1a\n\xff", "not a text file"),
    ],
)
def test_bad_image_table_is_named(tmp_path, content, message):
    path = tmp_path / "images.csv"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_image_table(path)
    assert message in str(error.value) and str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "stem, parts",
    [
        ("P_00001_LEFT_CC", ("P_00001", "LEFT", "CC")),
        ("P_00001_RIGHT_MLO_2", ("P_00001", "RIGHT", "MLO")),
        ("a_LEFT_CC_12", ("a", "LEFT", "CC")),
        ("D1-0001_LEFT_CC_RIGHT_CC", ("D1-0001_LEFT_CC", "RIGHT", "CC")),
        ("P_00001_LEFT_CC_1", None),
        ("P_00001_LEFT_CC_02", None),
        ("P_00001_LEFT_ML", None),
        ("P_00001_left_CC", None),
        ("_LEFT_CC", None),
        ("P_00001", None),
    ],
)
def test_image_names(stem, parts):
    assert parse_image_name(stem) == parts


# ---------------------------------------------------------------------------------------------- resumable runs


def work(item, download, out, log):
    """Copies the sources; one that says bad is a fault."""
    with open(log, "a") as file:
        file.write(f"{item.name}\n")
    result = Outcome(item.name, facts={"bytes": 0})
    for source in item.sources:
        data = (download / source).read_bytes()
        if data == b"bad":
            result.faults.append(f"{source}: bad")
            continue
        path = f"{item.plan['folder']}/{item.name}.txt"
        with atomic_write(out / path) as temporary:
            temporary.write_bytes(data)
        result.outputs.append(path)
        result.repairs.append(("copied", source))
        result.facts["bytes"] += len(data)
    return result


class Run:
    """A download of five files, and runs over it."""

    def __init__(self, tmp_path):
        self.download, self.log = tmp_path / "download", tmp_path / "log"
        self.download.mkdir()
        for name in "abcde":
            (self.download / name).write_text(f"content of {name}")

    def __call__(self, out, folder="one", only=None, names="abcde", **options):
        self.log.write_text("")
        items = [Job(name, (name,), (f"{folder}/{name}.txt",), {"folder": folder}) for name in names]
        function = functools.partial(only or work, download=self.download, out=out, log=self.log)
        results = run_resumable(items, function, self.download, out, ["one", "two"], **options)
        write_text(out / base_work.REPORT, json.dumps([result.facts for result in results]))
        return results

    def worked_on(self):
        return self.log.read_text().split()


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_second_run_keeps_everything(run, tmp_path):
    out = tmp_path / "out"
    first = run(out)
    content = read_folder(out)
    assert len(content) == 7
    assert run(out) == first
    assert run.worked_on() == []
    assert read_folder(out) == content


@pytest.mark.parametrize("name", ["a\u00a0b", "e\u200b"])
def test_images_of_any_name_are_kept(run, tmp_path, name):
    """Such as with a space that does not break, of which a terminal would show nothing."""
    (run.download / name).write_text("content")
    first = run(tmp_path / "out", names=[name])
    assert run(tmp_path / "out", names=[name]) == first
    assert run.log.read_text() == ""


@pytest.mark.parametrize(
    "disturb",
    [
        lambda download, out: (out / "one/b.txt").unlink(),
        lambda download, out: (out / "one/b.txt").write_text("content"),
        lambda download, out: (out / "one/b.txt").write_text("content of B"),
        lambda download, out: os.utime(download / "b", ns=(1, 1)),
        lambda download, out: (download / "b").write_text("another size"),
        lambda download, out: replace(out / base_work.MANIFEST, '["copied", "b"]', "7"),
        lambda download, out: replace(out / base_work.MANIFEST, '"name": "b"', '"nome": "b"'),
    ],
)
def test_only_what_is_not_whole_and_current_is_made_again(run, tmp_path, disturb):
    out = tmp_path / "out"
    run(out)
    disturb(run.download, out)
    run(out)
    assert run.worked_on() == ["b"]
    content = read_folder(out)
    assert content["one/b.txt"] == (run.download / "b").read_bytes()
    run(tmp_path / "fresh")
    assert content == read_folder(tmp_path / "fresh")


@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_run_goes_on_and_ends_with_the_same_files(run, tmp_path, jobs):
    run(tmp_path / "whole")
    out = tmp_path / "out"

    def until_d(item, **options):
        if item.name == "d":
            with atomic_write(out / "one/d.txt") as temporary:
                temporary.write_text("half")
                os.link(temporary, out / "one/.partial.d.x.txt")  # what a kill would leave
                raise KeyboardInterrupt
        return work(item, **options)

    with pytest.raises(KeyboardInterrupt):
        run(out, only=until_d)
    assert not (out / base_work.REPORT).exists()
    with open(out / base_work.MANIFEST, "a") as file:
        file.write('{"stamp": "0123", "na')
    run(out, jobs=jobs)
    assert sorted(run.worked_on()) == ["d", "e"]
    assert read_folder(out) == read_folder(tmp_path / "whole")


def test_outputs_of_another_split_are_removed(run, tmp_path):
    out = tmp_path / "out"
    run(out)
    run(out, folder="two", names="abc")
    run(tmp_path / "fresh", folder="two", names="abc")
    assert read_folder(out) == read_folder(tmp_path / "fresh")


def test_faults_are_returned_or_end_the_run(run, tmp_path):
    out = tmp_path / "out"
    run(out)
    (run.download / "c").write_text("bad")
    results = run(out)
    assert [result.faults for result in results if result.faults] == [["c: bad"]]
    assert not (out / "one/c.txt").exists()
    run(out)
    assert run.worked_on() == ["c"]  # what was at fault is tried again
    with pytest.raises(InputError, match="c: bad"):
        run(out, on_error="stop")
    assert not (out / base_work.REPORT).exists()


@pytest.mark.parametrize("after_a_run", [False, True])
@pytest.mark.parametrize("name", ["two/mine.txt", "one/a.png", "one/deeper/b.txt"])
def test_files_of_others_are_refused_and_kept(run, tmp_path, name, after_a_run):
    out = tmp_path / "out"
    if after_a_run:
        run(out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("precious")
    content = read_folder(out)
    with pytest.raises(InputError, match="not made by this script") as error:
        run(out)
    assert str(out / name) in str(error.value)
    assert read_folder(out) == content


def test_hidden_files_of_others_are_left_alone(run, tmp_path):
    out = tmp_path / "out"
    run(out)
    (out / "one/.DS_Store").write_text("left by a file system")
    run(out, folder="two", names="abc")
    assert sorted(path.name for path in (out / "one").iterdir()) == [".DS_Store"]


def test_what_a_killed_run_made_with_other_plans_is_removed(run, tmp_path):
    """It had not listed its last output as made."""
    out = tmp_path / "out"

    def until_d(item, **options):
        result = work(item, **options)
        if item.name == "d":
            raise KeyboardInterrupt
        return result

    with pytest.raises(KeyboardInterrupt):
        run(out, only=until_d)
    assert (out / "one/d.txt").exists()
    run(out, folder="two", names="abc")
    run(tmp_path / "fresh", folder="two", names="abc")
    assert read_folder(out) == read_folder(tmp_path / "fresh")


# -------------------------------------------------------------------------------------------------- many files


def test_folders_are_entered_once_and_by_their_own_name(tmp_path):
    (tmp_path / "root/z/deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("root/one", "root/z/two", "root/z/deep/three", "elsewhere/four"):
        (tmp_path / name).write_text("x")
    (tmp_path / "root/z/deep/above").symlink_to(tmp_path / "root")
    (tmp_path / "root/a").symlink_to(tmp_path / "root/z")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/itself").symlink_to("itself")
    found = [path.relative_to(tmp_path / "root").as_posix() for path in walk_files(tmp_path / "root")]
    assert found == ["b/four", "itself", "one", "z/deep/three", "z/two"]
    found = walk_files(tmp_path / "root", skip=[tmp_path / "root", tmp_path / "root/z/../z", tmp_path / "elsewhere"])
    assert found == [tmp_path / "root/itself", tmp_path / "root/one"]
