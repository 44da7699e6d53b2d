"""Files from strangers: refused with the reason, before memory is reserved, and without running anything in them."""

import json
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest

from mammo.base import guards
from mammo.base.files import InputError, is_file_name, one_line
from mammo.base.guards import check_h5, max_pixels, parse_json, read_bytes
from mammo.base.unpickle import load_plain
from mammo.base.work import check_kept_options, run_resumable
from mammo.images import pixels, reading
from mammo.maps.files import Grid, HeatmapRecord, load_heatmaps, save_heatmaps
from mammo.maps.trees import load_classifier
from mammo.train.checkpoint import load_model, load_weights
from tests.fuzz.seeds import SIZE, SYNTAXES, make_model, make_trees, mammogram, write_dicom
from tests.helpers import ROOT, read_members, write_members, write_picture

# ------------------------------------------------------------------------------------------------------- images


def png(rows: int, columns: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", columns, rows, 16, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(100)), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def patched(ending: str, form: str, *values: tuple[int, int]) -> bytes:
    """A whole image of this kind whose header has other numbers; values: (position, number)."""
    import cv2

    data = bytearray(cv2.imencode(ending, mammogram(dtype=np.uint8))[1])
    start = data.find(b"\xff\xc0") if ending == ".jpg" else 0
    for position, number in values:
        struct.pack_into(form, data, start + position, number)
    return bytes(data)


def tiff(rows: int, columns: int) -> bytes:
    entries = ((256, columns), (257, rows), (258, 8), (259, 1), (262, 1), (273, 8), (278, rows), (279, rows * columns))
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value % 2**32) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + tags + bytes(4)


GIANTS = {
    "a.png": png(100_000, 100_000),
    "a.jpg": patched(".jpg", ">H", (5, 65500), (7, 65500)),
    "a.bmp": patched(".bmp", "<I", (18, 100_000), (22, 100_000)),
    "a.tif": tiff(100_000, 100_000),
}


@pytest.mark.parametrize("name", GIANTS)
def test_images_that_claim_to_be_giants_are_refused_by_their_header(tmp_path, name):
    # In a process of its own, which has not imported OpenCV before.
    (tmp_path / name).write_bytes(GIANTS[name])
    code = (
        "import resource, sys; from mammo.commands import pixel_mean; import mammo.images.reading\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        f"sys.exit(pixel_mean.main([{str(tmp_path / name)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path / name}: refused: its header claims more pixels. Expected at most {2**27}" in done.stderr
    assert "DM_MAX_PIXELS" in done.stderr and len(done.stderr.splitlines()) == 1
    with pytest.raises(InputError, match=r"\d+ x \d+ pixels|not a readable image"):
        reading.read_size(tmp_path / name)


def test_the_limit_of_pixels_can_be_raised_and_lowered(tmp_path, monkeypatch):
    write_dicom(tmp_path / "a.dcm", mammogram(), "ExplicitVRLittleEndian")
    monkeypatch.setenv("DM_MAX_PIXELS", str(SIZE[0] * SIZE[1]))
    assert reading.read_img(tmp_path / "a.dcm").shape == SIZE
    monkeypatch.setenv("DM_MAX_PIXELS", str(SIZE[0] * SIZE[1] - 1))
    for read in (reading.read_img, reading.read_dicom_header):
        with pytest.raises(InputError, match=r"claims 64 x 48 pixels\. Expected at most 3071"):
            read(tmp_path / "a.dcm")
    monkeypatch.setenv("DM_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="DM_MAX_PIXELS: Expected a whole number"):
        max_pixels()


def test_a_line_of_pixels_does_not_become_a_giant(tmp_path, memory):
    write_picture(tmp_path / "a.png", np.zeros((1, 50_000), np.uint8))
    with pytest.raises(InputError, match=r"a\.png: cannot resize \(1, 50000\) to 4096 rows x 204800000 columns"):
        pixels.read_resize_img(tmp_path / "a.png", target_height=4096)


@pytest.mark.parametrize("syntax", SYNTAXES.values())
def test_dicom_files_that_claim_to_be_giants(tmp_path, memory, syntax):
    write_dicom(tmp_path / "a.dcm", mammogram(), syntax)
    assert reading.read_img(tmp_path / "a.dcm").shape == SIZE
    import pydicom

    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.Rows = dataset.Columns = 60_000
    dataset.save_as(tmp_path / "a.dcm")
    for read in (reading.read_img, reading.read_dicom_header, reading.read_size):
        with pytest.raises(InputError, match="claims 60000 x 60000 pixels"):
            read(tmp_path / "a.dcm")


def test_dicom_files_that_unpack_to_more_than_any_image(tmp_path, memory, monkeypatch):
    monkeypatch.setenv("DM_MAX_PIXELS", "100000")
    write_dicom(tmp_path / "a.dcm", mammogram(), "DeflatedExplicitVRLittleEndian", ImageComments="x" * 10)
    data = (tmp_path / "a.dcm").read_bytes()
    start = 132 + 12 + struct.unpack_from("<I", data, 140)[0]
    content = zlib.decompress(data[start:], -15)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = data[:start] + squeeze.compress(content + bytes(10**7)) + squeeze.flush()
    (tmp_path / "a.dcm").write_bytes(bomb)
    assert len(bomb) < 20_000
    for read in (reading.read_img, reading.read_dicom_header):
        with pytest.raises(InputError, match="unpacks to more than 800000 bytes"):
            read(tmp_path / "a.dcm")


def encapsulated(path: Path, syntax: str, frame: bytes) -> None:
    import pydicom

    write_dicom(path, mammogram(), "ExplicitVRLittleEndian")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.PixelData = pydicom.encaps.encapsulate([frame])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path)


JPEG = b"\xff\xd8\xff\xe0\0\4ab\xff" + b"\xff\xc3" + struct.pack(">HBHHB", 11, 16, 60_000, 50_000, 1) + bytes(30)
JPEG_2000 = b"\xff\x4f\xff\x51" + struct.pack(">HHIIII", 41, 0, 50_000, 60_000, 0, 0) + bytes(60)


@pytest.mark.parametrize(
    ("syntax", "frame"),
    [("JPEGLosslessSV1", JPEG), ("JPEG2000Lossless", JPEG_2000), ("JPEG2000", b"jP  \r\n" + JPEG_2000)],
)
def test_compressed_pixels_larger_than_their_dicom_header_says(tmp_path, memory, syntax, frame):
    encapsulated(tmp_path / "a.dcm", syntax, frame)
    with pytest.raises(InputError, match="claims 60000 x 50000 pixels"):
        reading.read_img(tmp_path / "a.dcm")


def test_rle_pixels_that_unpack_to_more_than_any_image(tmp_path, memory, monkeypatch):
    monkeypatch.setenv("DM_MAX_PIXELS", "10000")
    frame = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 10_000
    encapsulated(tmp_path / "a.dcm", "RLELossless", frame)
    with pytest.raises(InputError, match="unpacks to more than 80000 bytes"):
        reading.read_img(tmp_path / "a.dcm")


def test_the_unpacked_size_is_that_of_pydicom():
    from pydicom.pixels.decoders.rle import _rle_decode_segment

    rng = np.random.default_rng(0)
    for _ in range(50):
        packed = rng.integers(0, 256, 200, np.uint8).tobytes()
        whole = guards._unpacked_size(packed)
        decoded = len(_rle_decode_segment(packed))
        assert 0 <= whole - decoded < 129  # the last run may be cut


def test_other_kinds_of_pictures_are_not_decoded(tmp_path):
    import cv2

    for ending in (".webp", ".ppm", ".hdr"):
        img = np.zeros((8, 8, 3), np.float32 if ending == ".hdr" else np.uint8)
        (tmp_path / "a.png").write_bytes(cv2.imencode(ending, img)[1])
        with pytest.raises(InputError, match="Expected PNG, JPEG, BMP, TIFF or DICOM"):
            reading.read_img(tmp_path / "a.png")


def test_pipes_are_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="Received a pipe or device"):
        reading.read_img(tmp_path / "a.png")
    with pytest.raises(InputError, match="Received a pipe or device"):
        read_bytes("/dev/zero")


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for ending in (".h5", ".keras", ".weights.h5"):
        make_model(folder / ending, ending)
    return {ending: (folder / ending / f"model{ending}") for ending in (".h5", ".keras", ".weights.h5")}


def with_description(source: Path, path: Path, change) -> None:
    """A copy of a model file whose description `change` has changed, by its text."""
    path.write_bytes(source.read_bytes())
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as h5:
            text = h5.attrs["model_config"]
            h5.attrs["model_config"] = change(text.decode() if isinstance(text, bytes) else text)
        return
    members = read_members(source)
    write_members(path, members | {"config.json": change(members["config.json"].decode()).encode()})


def replaced(old: str, new: str):
    def change(text):
        assert old in text
        return text.replace(old, new)

    return change


def function(module: str, name: str) -> str:
    return json.dumps({"module": module, "class_name": "function", "config": name})


def constant(name: str, dtype: str) -> str:
    return json.dumps({"class_name": name, "config": {"value": ["a"] * 8, "dtype": dtype}})


@pytest.mark.parametrize("ending", [".h5", ".keras"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced('"filters": 2', '"filters": 999999999'), r"describes \d{11} weights\. Expected at most|batch_norm"),
        (replaced('"units": 2', '"units": 4000000000'), r"describes 12000000064 weights\. Expected at most the 70 "),
        (replaced(f"{SIZE[0]}, {SIZE[1]}, 3", "100000, 100000, 3"), "claims .* pixels"),
        (lambda text: "[" * 100_000, "nested too deeply"),
        (replaced('"softmax"', function("keras.utils", "get_file")), "keras.utils"),
        (replaced('"softmax"', function("keras", "utils.get_file")), "get_file"),
        (replaced('"softmax"', function("builtins", "eval")), "cannot rebuild"),
        (replaced('"softmax"', function("keras.applications", "VGG16")), "refused"),
        (replaced('"class_name": "Dropout"', '"class_name": "TFSMLayer"'), "TFSMLayer"),
        (replaced('"class_name": "Dropout"', '"class_name": "StringLookup"'), "StringLookup"),
        (replaced('"class_name": "Dropout"', '"class_name": ["Dropout"]'), "cannot rebuild"),
        (replaced('"softmax"', constant("__numpy__", "U10000000")), "__numpy__ other than numbers"),
        (replaced('"softmax"', constant("__tensor__", "string")), "__tensor__ other than numbers"),
        (replaced('"softmax"', constant("__typespec__", "float32")), "__typespec__ other than numbers"),
    ],
)  # fmt: skip
def test_descriptions_that_ask_for_too_much(tmp_path, memory, models, ending, change, message):
    path = tmp_path / f"bad{ending}"
    with_description(models[ending], path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with keras.StatelessScope():  # fills what a scope before it has left
        pass
    assert load_model(models[ending]).count_params() > 0


def test_networks_with_slices_and_constants_open(tmp_path):
    inputs = keras.Input((4, 4, 3))
    shifted = inputs * np.array([1.0, 2, 3], "float32") - keras.ops.convert_to_tensor([1.0, 2, 3])
    model = keras.Model(inputs, keras.layers.Flatten()(shifted[..., :2]))
    model.save(tmp_path / "a.keras")
    x = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    expected = (x * np.float32([1, 2, 3]) - np.float32([1, 2, 3]))[..., :2].reshape(2, -1)
    np.testing.assert_allclose(load_model(tmp_path / "a.keras")(x), expected, atol=1e-6)


def change_h5(path: Path, change) -> None:
    with h5py.File(path, "r+") as h5:
        change(h5)


def place(h5) -> str:
    """The name of a data set of some size, where the other weights lie."""
    names = []
    h5.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return max(names, key=lambda name: h5[name].size)


def displaced(h5) -> tuple[str, tuple[int, ...]]:
    """Remove that data set; return its name and shape."""
    name = place(h5)
    shape = h5[name].shape
    del h5[name]
    return name, shape


def link(h5):
    h5[displaced(h5)[0]] = h5py.ExternalLink("/etc/passwd", "/x")


def soft_link(h5):
    h5[displaced(h5)[0]] = h5py.SoftLink("/")


def external(h5):
    h5.create_dataset(*displaced(h5), "f4", external=[("/etc/passwd", 0, h5py.h5f.UNLIMITED)])


def virtual(h5):
    name, shape = displaced(h5)
    layout = h5py.VirtualLayout(shape, "f4")
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", shape)
    h5.create_virtual_dataset(name, layout)


def huge(h5):
    h5.create_dataset(displaced(h5)[0], (2**20, 2**20), "f4", chunks=(64, 64))


def deep(h5):
    h5.create_group("/".join("x" * 200))


def texts(h5):
    h5["text"] = "x" * 2**20
    h5.create_dataset("many", (2000,), h5py.string_dtype())


def within(h5):
    h5.create_dataset("many", (2000,), np.dtype([("a", h5py.string_dtype())]))


def remade(h5, chunks, content: bytes | None, *filters: int) -> None:
    """Put another data set in the place of one, whose first chunk holds `content`."""
    name, shape = displaced(h5)
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((chunks, *shape[1:]))
    for code in filters:
        settings.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (9,))
    space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED, *shape[1:]))
    made = h5py.h5d.create(h5.id, name.encode(), h5py.h5t.IEEE_F32LE, space, settings)
    if content is not None:
        made.write_direct_chunk((0,) * len(shape), content, 0)


def huge_chunk(h5):
    remade(h5, 2**31 // (4 * math.prod(h5[place(h5)].shape[1:])), None)


def packed(*filters: int, content: bytes | None):
    return lambda h5: remade(h5, 100, content, *filters)


GZIP, ZEROS = h5py.h5z.FILTER_DEFLATE, zlib.compress(bytes(10**6))
H5_TRICKS = {
    "link": (link, "link to another place"),
    "soft link": (soft_link, "link to another place"),
    "external": (external, "data in another file"),
    "virtual": (virtual, "data in another file"),
    "huge": (huge, "bytes that claim to hold"),
    "deep": (deep, "group within 64 others"),
    "texts": (texts, "bytes that claim to hold"),
    "within": (within, "has references"),
    "huge chunk": (huge_chunk, "bytes that claim to hold"),
    "longer chunk": (packed(GZIP, content=ZEROS), "unpacks to another size"),
    "shorter chunk": (packed(GZIP, content=zlib.compress(bytes(10))), "unpacks to another size"),
    "no stream": (packed(GZIP, content=bytes(10)), "unpacks to another size"),
    "twice packed": (packed(GZIP, GZIP, content=zlib.compress(ZEROS)), "unpacks to another size"),
    "other compression": (packed(h5py.h5z.FILTER_LZF, content=None), "other than gzip"),
}


@pytest.mark.parametrize(("policy", "size"), [("float32", 4), ("float64", 8)])
def test_weights_that_are_stored_in_less_than_they_take(tmp_path, memory, models, policy, size):
    units, path = 2**29 // size, tmp_path / "a.h5"  # of 2 inputs and a bias
    change = replaced('"units": 2', f'"units": {units}')
    with_description(models[".h5"], path, lambda text: change(text).replace('"name": "float32"', f'"name": "{policy}"'))
    change_h5(path, lambda h5: h5.create_dataset("never written", (2**29,), "i1"))
    claimed = 3 * units * size + 64 * size
    with pytest.raises(InputError, match=rf"a\.h5: refused: \d+ bytes that claim to hold {claimed}"):
        load_model(path)


@pytest.mark.parametrize("trick", H5_TRICKS)
@pytest.mark.parametrize("kind", [".h5", ".keras", ".weights.h5", "maps"])
def test_hdf5_files_that_lead_elsewhere_or_claim_too_much(tmp_path, memory, models, kind, trick):
    path, (change, message) = tmp_path / f"bad{'.h5' if kind == 'maps' else kind}", H5_TRICKS[trick]
    if kind == "maps":
        save_heatmaps(path, some_maps(), class_names=["a", "b"], strides=(8, 8))
    else:
        path.write_bytes(models[kind].read_bytes())
    if kind == ".keras":
        inner, members = tmp_path / "inner.h5", read_members(path)
        inner.write_bytes(members["model.weights.h5"])
        change_h5(inner, change)
        write_members(path, members | {"model.weights.h5": inner.read_bytes()})
    else:
        change_h5(path, change)
    read = {"maps": load_heatmaps, ".weights.h5": lambda path: load_weights(load_model(models[".h5"]), path)}
    with pytest.raises(InputError, match=message) as caught:
        read.get(kind, load_model)(path)
    assert str(path) in str(caught.value)


def test_many_short_texts_in_hdf5_files_are_no_claim(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        h5.attrs["layer_names"] = [f"layer_{i}" for i in range(1000)]
        h5["x"] = np.zeros(1000)
    with h5py.File(tmp_path / "a.h5") as h5:
        check_h5("a.h5", h5, (tmp_path / "a.h5").stat().st_size)


def test_whole_compressed_data_sets_are_read(tmp_path):
    content = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        for name, options in {
            "gzip": {"compression": "gzip"},
            "all": {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": (64, 5)},
            "plain": {"chunks": (64, 5)},
            "resizable": {"maxshape": (None, None), "compression": "gzip"},
        }.items():
            h5.create_dataset(name, data=content, **options)
        noise = np.frombuffer(np.random.default_rng(0).bytes(1000), np.uint8)
        h5.create_dataset("noise", data=noise, compression="gzip")
        h5.create_dataset("empty", (0,), maxshape=(None,), compression="gzip")
        h5.create_dataset("half", data=np.zeros(5, ml_dtypes.bfloat16))
    with h5py.File(tmp_path / "a.h5") as h5:
        check_h5("a.h5", h5, (tmp_path / "a.h5").stat().st_size)


def repack(path: Path, compression, extra=()) -> None:
    write_members(path, read_members(path) | dict(extra), compression)


def test_keras_archives_hold_what_keras_writes(tmp_path, memory, models):
    path = tmp_path / "a.keras"
    for compression, extra, message in (
        (zipfile.ZIP_DEFLATED, {}, "refused: compressed"),
        (zipfile.ZIP_STORED, {"assets/../../evil": b"x"}, "holds 'assets/../../evil'"),
    ):
        path.write_bytes(models[".keras"].read_bytes())
        repack(path, compression, extra)
        with pytest.raises(InputError, match=message):
            load_model(path)
    data = bytearray(models[".keras"].read_bytes())
    size = data.rfind(b"PK\x01\x02") + 24
    struct.pack_into("<I", data, size, 2**32 - 2)  # the central directory's
    path.write_bytes(data)
    with pytest.raises(InputError, match="bytes that claim to hold"):
        load_model(path)


# -------------------------------------------------------------------------------------------- maps, trees, pickles


def some_maps() -> list[HeatmapRecord]:
    heatmap = np.full((8, 6, 2), 0.5, np.float32)
    return [HeatmapRecord("P_1", "LEFT", 1, cc=heatmap, cc_file="a.png", cc_grid=Grid(SIZE, (4.0, 4.0), (8.0, 8.0)))]


def binget(place: int) -> bytes:
    return b"h" + bytes([place])


def remembered(code: bytes, place: int) -> bytes:
    return code + b"q" + bytes([place]) + b"0"


def text(size: int) -> bytes:
    return b"X" + struct.pack("<I", size) + b"x" * size


def copied_texts(size: int, times: int) -> bytes:
    """A pickle that encodes one text many times."""
    start = remembered(b"c_codecs\nencode\n", 0) + remembered(text(size) + b"N\x86", 1)
    return b"\x80\x02" + start + b"](" + (binget(0) + binget(1) + b"R") * times + b"e."


def copied_arrays(size: int, times: int) -> bytes:
    """A pickle that makes many arrays of one state."""
    array = remembered(b"cnumpy.core.multiarray\n_reconstruct\n", 0) + remembered(b")", 1)
    dtype = remembered(b"cnumpy\ndtype\nX\2\0\0\0u1K\0K\1\x87R", 2)
    state = remembered(b"(K\1J" + struct.pack("<i", size) + b"\x85" + binget(2) + b"\x89" + text(size) + b"t", 3)
    make = binget(0) + binget(1) + b"R" + binget(3) + b"b"
    return b"\x80\x02" + array + dtype + state + b"](" + make * times + b"e."


@pytest.mark.parametrize("make", [copied_texts, copied_arrays])
def test_pickles_that_copy_one_text_many_times(tmp_path, memory, make):
    (tmp_path / "a.pkl").write_bytes(make(10**6, 1))
    assert [len(content) for content in load_plain(tmp_path / "a.pkl")] == [10**6]
    (tmp_path / "a.pkl").write_bytes(make(10**6, 1000))
    with pytest.raises(InputError, match=r"a\.pkl: refused: copies the same bytes many times"):
        load_plain(tmp_path / "a.pkl")


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/dm_security_was_here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([Code()]), r"holds posix\.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"holds builtins\.eval"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "object number 2147483647"),  # remembered at a place that takes 16 GB
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "not a whole pickle"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.", "not a whole pickle"),
        (b"\x80\x02\x82\x01.", "not a whole pickle"),
        (b"Pid\n.", "not a whole pickle"),
        (b"", "not a whole pickle"),
    ],
)
def test_pickles_that_are_not_plain(tmp_path, memory, content, message):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_plain(tmp_path / "a.pkl")
    assert not Path("/tmp/dm_security_was_here").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_come_as_they_were(tmp_path, protocol):
    content = {
        "list": [1, 2.5, "a", None, True, b"\xff", (1, 2), {"a": 3}],
        "array": np.arange(6, dtype=">i4").reshape(2, 3).T,
        "texts": np.array(["a", "bc"]),
        "scalar": np.float32(0.5),
        "self": (shared := [1]),
        "other": shared,
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_plain(tmp_path / "a.pkl")
    assert found["list"] == content["list"] and found["self"] is found["other"]
    for name in ("array", "texts", "scalar"):
        np.testing.assert_array_equal(found[name], content[name])
        assert found[name].dtype.newbyteorder("=") == content[name].dtype.newbyteorder("=")


@pytest.fixture
def trees(tmp_path):
    make_trees(tmp_path, "rf")
    load_classifier(tmp_path / "trees.skops")  # the imports take long where memory is traced
    return tmp_path / "trees.skops"


def test_trees_hold_no_other_nodes(trees, memory):
    load_classifier(trees)
    with zipfile.ZipFile(trees) as archive:
        schema = archive.read("schema.json").decode()
    for change, message in (
        (schema.replace("NdArrayNode", "SparseMatrixNode", 1), "holds SparseMatrixNode"),
        (schema.replace("ObjectNode", "MethodNode", 1), "holds MethodNode"),
        ("[" * 100_000, "nested too deeply"),
    ):
        repack(trees, zipfile.ZIP_STORED, {"schema.json": change.encode()})
        with pytest.raises(InputError, match=message):
            load_classifier(trees)
    repack(trees, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="refused: compressed"):
        load_classifier(trees)


# ------------------------------------------------------------------------------------------------- tables, names


@pytest.mark.parametrize(
    "name", ["../a", "..", "a/b", "a\\b", "/a", "C:a", "a:b", "a\0", "a\nb", "", " ", ".", "\x1b[31m", "a..b"]
)
def test_names_that_lead_elsewhere(name):
    assert not is_file_name(name)
    assert is_file_name("P_00001") and is_file_name("Mühle 7.a")


@pytest.mark.parametrize("name", ["../evil.txt", "{}/evil.txt", "a/../../evil.txt", "a\0", "", 5, None])
def test_the_list_of_an_earlier_run_removes_nothing_elsewhere(tmp_path, name):
    out, name = tmp_path / "out", name.format(tmp_path) if isinstance(name, str) else name
    out.mkdir()
    (tmp_path / "evil.txt").write_text("whole")
    (out / "manifest.jsonl").write_bytes(b'\xa2"}\n7\n{"outputs": 7}\n' + json.dumps({"to_come": [name]}).encode())
    with pytest.raises(InputError, match="Expected files of its own folder alone"):
        run_resumable([], print, tmp_path, out, ["train"])
    assert (tmp_path / "evil.txt").read_text() == "whole"


@pytest.mark.parametrize("content", [b"7", b"{", b"[" * 100_000, b"\xa2"])
def test_options_of_an_earlier_run_that_are_damaged(tmp_path, content):
    (tmp_path / "options.json").write_bytes(content)
    with pytest.raises(InputError, match=r"options\.json: (not a JSON file|Expected a JSON object)"):
        check_kept_options(tmp_path, {})


def test_errors_are_printed_without_control_characters():
    assert one_line("a\x1b[31m\n b\udcff\u202e") == "a?[31m b??"
    assert len(one_line("x" * 10_000)) < 2100


def test_json_nested_too_deeply_is_an_error_of_its_value():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_one_cell_as_large_as_the_file(tmp_path):
    from mammo.base.tables import open_table
    from mammo.data.patches import read_lesions

    (tmp_path / "a.csv").write_text(
        "patient_id,side,view,abn_num,pathology,type\n" + "x" * 10**6 + ",LEFT,CC,1,BENIGN,mass\n"
    )
    with pytest.raises(InputError, match="field limit"):
        read_lesions(tmp_path / "a.csv")
    with pytest.raises(InputError, match="field limit"), open_table(tmp_path / "a.csv") as (_, rows):
        list(rows)


def excel(path: Path, sheet: bytes) -> None:
    """An Excel file with these rows, in XML, on its sheet."""
    openpyxl = pytest.importorskip("openpyxl")
    openpyxl.Workbook().save(path)
    start = b'<worksheet xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">'
    repack(path, zipfile.ZIP_DEFLATED, {"xl/worksheets/sheet1.xml": start + sheet + b"</sheetData></worksheet>"})
    assert path.stat().st_size < 50_000


ROW = b'<row r="1"><c r="A1"><v>1</v></c></row>'


def test_excel_tables_that_claim_to_be_giants(tmp_path, memory, monkeypatch):
    from mammo.base.tables import open_table

    monkeypatch.setattr("mammo.base.tables._MAX_CELLS", 2**15)
    monkeypatch.setattr("mammo.base.tables._MAX_TAGS", 2**13)
    path = tmp_path / "a.xlsx"
    excel(path, b'<dimension ref="A1:XFD1048576"/><sheetData>' + ROW + b'<row r="3"><c r="B3"><v>2</v></c></row>')
    with open_table(path) as (header, rows):
        assert header == ["1", ""] and list(rows) == [(f"{path}, row 3", ["", "2"])]
    for sheet, message in (
        (ROW + b'<row r="1000"><c r="GJH1000"><v>1</v></c></row>', "more than 32768 cells"),
        (ROW + b'<row r="99999999999"/>', "more than 32768 cells"),
        (b'<row r="1">' + b"<c/>" * 2**13 + b"</row>", r"\d+ XML tags"),
    ):
        excel(path, b"<sheetData>" + sheet)
        with pytest.raises(InputError, match=rf"a\.xlsx: refused: a table of {message}"), open_table(path):
            pass


def test_documents_with_entities_are_refused(tmp_path):
    from mammo.data.inbreast import read_annotation

    (tmp_path / "a.xml").write_text(
        '<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>'
        "<plist><string>&b;</string></plist>"
    )
    with pytest.raises(InputError, match="entity declarations"):
        read_annotation(tmp_path / "a.xml")


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(InputError, match=r"a\?b\.png: cannot be read"):
        reading.read_img(f"{tmp_path}/a\0b.png")


def test_pydicom_does_not_log_what_becomes_one_line(tmp_path, caplog):
    """It logs the whole stack trace of a decoder that fails."""
    encapsulated(tmp_path / "a.dcm", "RLELossless", struct.pack("<16I", 1, 64, *[0] * 14) + b"\x00")
    with pytest.raises(InputError, match=r"a\.dcm: "):
        reading.read_img(tmp_path / "a.dcm")
    assert caplog.records == []
