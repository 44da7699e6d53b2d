"""Map files: that they hold everything, and that what is no map, or would do harm, is refused in one line."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.maps.files import Grid, HeatmapRecord, load_heatmaps, save_heatmaps

rng = np.random.default_rng(3)


def some_records():
    grid = Grid((100, 80), (16.0, 8.5), (8.0, 4.0))
    cc, mlo = (rng.random(shape).astype(np.float32) for shape in ((4, 3, 2), (5, 3, 2)))
    return [
        HeatmapRecord("P_1", "LEFT", 1, cc, mlo, "a/P_1_LEFT_CC.png", "ä b.png", grid, grid),
        HeatmapRecord("P_2", "RIGHT", None, None, mlo, None, "c.png", None, grid),
    ]


def save_some(path):
    save_heatmaps(path, some_records(), class_names=["neg", "pos"], strides=(8, 4))


@pytest.mark.parametrize("ending", ["npz", "h5", "pkl"])
def test_map_files_hold_everything(tmp_path, ending):
    path, records = tmp_path / f"maps.{ending}", some_records()
    options = {"img_size": [100, 80], "img_scale": None, "net": "vgg16"}
    save_heatmaps(path, records, class_names=["neg", "pos"], strides=(8, 4), mode="gradcam", options=options)
    maps = load_heatmaps(path)
    assert (maps.class_names, maps.strides, maps.mode, maps.options) == (["neg", "pos"], (8, 4), "gradcam", options)
    for ours, theirs in zip(maps.records, records, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, np.ndarray):
                assert getattr(ours, name).dtype == np.float32
                np.testing.assert_array_equal(getattr(ours, name), value)
            else:
                assert getattr(ours, name) == value
    assert [view for view, *_ in maps.records[1].views()] == ["mlo"]


@pytest.mark.parametrize("ending", ["npz", "h5", "pkl"])
def test_cut_or_damaged_map_files_are_refused_in_one_line(tmp_path, ending):
    path = tmp_path / f"maps.{ending}"
    save_some(path)
    whole = path.read_bytes()
    for content in (b"", whole[:1], whole[:200], whole[: len(whole) // 2], whole[:-5], b"text\n", b"\x80\x04N."):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"not a whole (map file|pickle)") as caught:
            load_heatmaps(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="Received no file"):
        load_heatmaps(tmp_path / f"none.{ending}")


def change(path, **changes):
    """Change a .npz map file: array by name, entry of the header, or of the first record."""
    with np.load(path) as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays["header"]))
    for name, value in changes.items():
        if f"0_{name}" in arrays:
            arrays[f"0_{name}"] = value
        else:
            (header["records"][0] if name in header["records"][0] else header)[name] = value
    np.savez(path, **arrays | {"header": np.array(json.dumps(header))})


WRONG = {
    "class_names": [["neg"], ["neg", "pos", "more"], 5, "np", [1, 2]],
    "options": [[1], None, {"window": "ab"}, {"window": [0, 0]}, {"window": [8]}, {"window": [2**40, 2**40]}],
    "strides": [[0, 0], "ab", [8], [8, -1], [8, float("inf")]],
    "mode": ["guess", 1],
    "version": ["1", 99],
    "records": [[3], {"a": 1}],
    "cc_image_size": ["ab", [480.5, 384.2], [-3, 4], [10**7, 10**7], [4], [65535, 65535], [2**26, 1]],
    "cc_first": [None, "ab", [float("nan")] * 2, [1]],
    "cc_file": [5],
    "patient_id": ["../evil", "/tmp/evil", "C:evil", "evil\0", ["P_1"]],
    "side": [None, 3, "../LEFT"],
    "cancer": [7, -1, "yes", 0.5],
    "cc": [np.full((4, 3, 2), np.nan), np.zeros((0, 3, 2)), np.zeros((4, 3, 0)), np.zeros((4, 3)), np.array("a")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_is_no_map_or_would_do_harm_is_refused_in_one_line(tmp_path, name, value):
    path = tmp_path / "maps.npz"
    save_some(path)
    load_heatmaps(path)
    change(path, **{name: value})
    wrong = "wrong patient_id" if name == "patient_id" else ""
    message = f"(not a whole map file.*{wrong}|Expected a map file of version 1. Received 99)"
    with pytest.raises(InputError, match=f"^{path}: {message}") as caught:
        load_heatmaps(path)
    assert "\n" not in str(caught.value)


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/dm_heatmap_was_here",)


def test_pickles_cannot_run_code(tmp_path):
    import pandas as pd

    path = tmp_path / "maps.pkl"
    for content in ([{"patient_id": Code()}], [{"cc": np.array([Code()], object)}], pd.DataFrame({"a": [1]})):
        path.write_bytes(pickle.dumps(content))
        found = r"(posix\.system|nt\.system|an array of O8|pandas.*)"
        with pytest.raises(InputError, match=rf"holds {found}\. Expected lists"):
            load_heatmaps(path)
    assert not Path("/tmp/dm_heatmap_was_here").exists()
    path.write_bytes(b"cbuiltins\neval\n(S'1'\ntR.")
    with pytest.raises(InputError, match=r"holds builtins\.eval"):
        load_heatmaps(path)


class ObjectDtype:
    """dtype('O8') whose flags are taken back, after which NumPy takes given bytes for pointers to objects."""

    def __reduce__(self):
        return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


class ForgedArray:
    def __init__(self, dtype, data):
        self.state = 1, (1,), dtype, False, data

    def __reduce__(self):
        return np.array([1]).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    ("dtype", "data"), [(ObjectDtype(), b"A" * 8), (np.dtype("f8"), b"A" * 7), (None, b"A" * 8), (np.dtype("f8"), None)]
)
def test_pickles_cannot_reach_memory(tmp_path, dtype, data):
    # In a process of its own, which a forged pointer would crash.
    path = tmp_path / "maps.pkl"
    breast = {"patient_id": "a", "side": "LEFT", "cancer": 1, "cc": ForgedArray(dtype, data), "mlo": None}
    path.write_bytes(pickle.dumps([breast], 2))
    code = f"from mammo.maps.files import load_heatmaps as load\nprint(load({str(path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"InputError: {path}: " in done.stderr


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_pickles_of_the_published_program_open(tmp_path, protocol):
    array = rng.random((3, 2, 5))
    if protocol % 2:  # rows and bytes in another order
        array = np.asfortranarray(array).astype(">f8")
    breast = {"patient_id": np.str_("P_1"), "side": "LEFT", "cancer": np.int64(1), "cc": array, "mlo": None}
    content = pickle.dumps([breast], protocol)
    if protocol == 2:  # the modules' names of the time
        content = content.replace(b"numpy._core", b"numpy.core")
    (tmp_path / "maps.pkl").write_bytes(content)
    maps = load_heatmaps(tmp_path / "maps.pkl")
    [record] = maps.records
    assert (record.patient_id, record.side, record.cancer, record.mlo, record.cc_grid) == ("P_1", "LEFT", 1, None, None)
    np.testing.assert_allclose(record.cc, array, rtol=1e-6)
    assert maps.strides is None and maps.class_names == []


def test_a_map_file_must_have_its_classes(tmp_path):
    with pytest.raises(InputError, match=r"Expected a map of 3 classes. Received an array of shape \(4, 3, 2\)"):
        save_heatmaps(tmp_path / "a.npz", some_records(), class_names=list("abc"), strides=(8, 8))
    with pytest.raises(InputError, match=r"Expected a name ending in \.npz"):
        save_heatmaps(tmp_path / "a.json", some_records(), class_names=list("ab"), strides=(8, 8))
    assert list(tmp_path.iterdir()) == []


def test_zip_bombs_of_maps(tmp_path, memory, monkeypatch):
    monkeypatch.setattr("mammo.base.guards._MAX_BYTES", 2**20)
    path = tmp_path / "a.npz"
    save_some(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("1_cc.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**10, 2**11, 2)}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(16):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**15
    with pytest.raises(InputError, match="bytes that claim to hold"):
        load_heatmaps(path)


def laughs(depth: int) -> list:
    nested = [0.5] * 10
    for _ in range(depth):
        nested = [nested] * 10
    return nested


@pytest.mark.parametrize("place", ["cc", "patient_id", "cc_file"])
def test_lists_that_stand_in_each_other_many_times(tmp_path, memory, place):
    breast = {"patient_id": "P_1", "side": "LEFT", "cancer": 1, "cc": np.zeros((2, 2, 2)), "mlo": None}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([breast | {place: laughs(9)}]))
    assert (tmp_path / "a.pkl").stat().st_size < 2000
    with pytest.raises(InputError, match=f"wrong (type of )?{place}"):
        load_heatmaps(tmp_path / "a.pkl")


def test_what_many_breasts_share_is_kept_once(tmp_path, memory):
    breast = {"patient_id": "P_1", "side": "LEFT", "cancer": 1, "cc": np.zeros((100, 100, 100), np.uint8), "mlo": None}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([dict(breast) for _ in range(100)]))
    maps = [record.cc for record in load_heatmaps(tmp_path / "a.pkl").records]
    assert len(maps) == 100 and maps[-1] is maps[0] and maps[0].dtype == np.float32
    save_some(tmp_path / "a.npz")
    records = [{"patient_id": "P_1", "side": "LEFT"}] * 3000
    change(tmp_path / "a.npz", records=records, **{f"key {i}": 0 for i in range(3000)})
    assert len(load_heatmaps(tmp_path / "a.npz").records) == 3000
