"""The small scripts: DICOM files to PNG, the pixel mean, lesions drawn; by closed forms and on every bad input."""

import json
import os

import cv2
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.commands import dicom_to_png, draw_lesions, pixel_mean
from mammo.images.reading import read_dicom_16_bit, read_img
from tests.helpers import png, read_csv, write_dicom, write_picture

pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom")


# ----------------------------------------------------------------------------------------------- dicom_to_png


@pytest.mark.parametrize(
    ("dtype", "bits"), [("uint8", 8), ("uint16", 10), ("uint16", 12), ("uint16", 14), ("uint16", 16), ("int16", 12)]
)
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_the_range_of_the_stored_bits_becomes_16_bit(tmp_path, dtype, bits, photometric):
    lowest = -(2 ** (bits - 1)) if dtype == "int16" else 0
    highest = lowest + 2**bits - 1
    pixels = np.arange(lowest, highest + 1).reshape(16, -1).astype(dtype)
    path = write_dicom(tmp_path / "a.dcm", pixels, bits, PhotometricInterpretation=photometric)
    img, _ = read_dicom_16_bit(path)
    share = (pixels.astype(float) - lowest) / (highest - lowest)
    if photometric == "MONOCHROME1":
        share = 1 - share
    assert img.dtype == np.uint16
    np.testing.assert_array_equal(img, np.rint(share * 65535))
    assert 0.003891 * img.max() == pytest.approx(255, abs=0.01)


def test_auto_levels_stretch_each_image(tmp_path):
    """By this formula to the bit, where values are in the middle of two, too: images made earlier keep their pixels."""
    pixels = np.arange(300, 1301, dtype=np.int16).reshape(7, -1)
    img, _ = read_dicom_16_bit(write_dicom(tmp_path / "a.dcm", pixels), auto_levels=True)
    np.testing.assert_array_equal(img, np.rint((pixels - 300.0) * (65535 / 1000)))


def test_windows_are_applied_on_request(tmp_path):
    """A window as wide as the values 1000..2000, of width - 1 by the standard's definition."""
    pixels = np.array([[0, 1000, 1250], [1500, 2000, 4095]], np.uint16)
    tags = {"WindowCenter": 1500.5, "WindowWidth": 1001}
    path = write_dicom(tmp_path / "a.dcm", pixels, 12, **tags, PhotometricInterpretation="MONOCHROME1")
    write_dicom(tmp_path / "b.dcm", pixels, 12)
    assert dicom_to_png.main([str(tmp_path), f"{tmp_path}/out", "--voi-lut"]) == 0
    stored = np.rint(np.clip((pixels.astype(float) - 1000) / 1000, 0, 1) * 4095)
    np.testing.assert_array_equal(read_img(tmp_path / "out/images/a.png"), np.rint((4095 - stored) * (65535 / 4095)))
    np.testing.assert_array_equal(read_img(tmp_path / "out/images/b.png"), np.rint(pixels * (65535 / 4095)))
    assert [row["window"] for row in read_csv(tmp_path / "out" / "images.csv")] == ["1", "0"]
    assert json.loads((tmp_path / "out/report.json").read_text())["without_window"] == ["images/b.png"]
    plain, _ = read_dicom_16_bit(path)
    np.testing.assert_array_equal(plain, np.rint((4095 - pixels) * (65535 / 4095)))


@pytest.fixture
def downloads(tmp_path):
    """DICOM files as several sources name and describe them, in folders, among other files."""
    folder = tmp_path / "downloads"
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 30), dtype=np.uint16)
    view = pydicom.Dataset()
    view.CodeValue, view.CodeMeaning = "R-10226", "medio-lateral oblique"
    tags = {"PatientID": "D1-0001", "ImageLaterality": "R", "ViewCodeSequence": [view]}
    write_dicom(folder / "cmmd" / "1-1.dcm", (pixels >> 4).astype(np.uint8), **tags)
    tags = {"PatientID": "abc", "Laterality": "L", "ViewPosition": "CC"}
    write_dicom(folder / "vindr" / "study" / "image.dicom", pixels, 12, **tags)
    write_dicom(folder / "1.2.840.77", pixels, 14, syntax=pydicom.uid.RLELossless, PatientOrientation="MLO")
    write_dicom(folder / "vindr" / "._image.dicom", pixels)
    write_dicom(folder / "DICOMDIR", pixels)
    (folder / "notes.csv").write_text("a,b\n")
    return folder, pixels


def test_folders_are_kept_and_the_table_has_a_row_for_each_image(downloads, tmp_path):
    folder, pixels = downloads
    out = tmp_path / "out"
    assert dicom_to_png.main([str(folder), str(out), "--jobs", "2"]) == 0
    names = ["images/1.2.840.77.png", "images/cmmd/1-1.png", "images/vindr/study/image.png"]
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == names
    columns = "file patient_id laterality view rows columns bits photometric_interpretation window"
    expected = [
        [names[0], "", "", "MLO", "40", "30", "14", "MONOCHROME2", "0"],
        [names[1], "D1-0001", "R", "MLO", "40", "30", "8", "MONOCHROME2", "0"],
        [names[2], "abc", "L", "CC", "40", "30", "12", "MONOCHROME2", "0"],
    ]
    rows = read_csv(out / "images.csv")
    assert list(rows[0]) == columns.split()
    assert [list(row.values()) for row in rows] == expected
    for name, img, highest in zip(names, (pixels, pixels >> 4, pixels), (16383, 255, 4095), strict=True):
        found = cv2.imread(str(out / name), cv2.IMREAD_UNCHANGED)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, np.rint(img * (65535 / highest)))


def test_a_run_goes_on_where_it_was(downloads, tmp_path, capsys):
    folder, _ = downloads
    out, plain = tmp_path / "out", tmp_path / "plain"
    dicom_to_png.run(sources=[folder], out=out)
    dicom_to_png.run(sources=folder, out=plain)
    whole, partial = (out / "images" / name for name in ("cmmd/1-1.png", "vindr/study/image.png"))
    partial.write_bytes(partial.read_bytes()[:100])
    os.utime(whole, (1, 1))
    dicom_to_png.run(sources=[folder], out=out)
    assert whole.stat().st_mtime == 1
    assert "2 of 3 images are there" in capsys.readouterr().out
    for path in [*(out / "images").rglob("*.png"), out / "images.csv"]:
        assert path.read_bytes() == (plain / path.relative_to(out)).read_bytes()
    with pytest.raises(InputError, match=r"other options \(auto_levels False there, True now\).*--fresh"):
        dicom_to_png.run(sources=[folder], out=out, auto_levels=True)
    assert whole.stat().st_mtime == 1
    dicom_to_png.run(sources=[folder], out=out, auto_levels=True, fresh=True)
    assert read_img(whole).min() == 0
    assert read_img(whole).max() == 65535


RAMP = np.arange(64, dtype=np.uint16).reshape(8, 8)
FRAMES = {"pixels": np.zeros((4, 8), np.uint16), "Rows": 2, "NumberOfFrames": 2}
COLOUR = {"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PhotometricInterpretation": "RGB"}
BAD_DICOM = {
    "truncated": (lambda path: path.write_bytes(write_dicom(path, RAMP).read_bytes()[:-60]), "less than expected"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "text": (lambda path: path.write_text("not a DICOM file at all"), "no pixels"),
    "no_pixels": (lambda path: write_dicom(path, RAMP, PixelData=None), "no pixels"),
    "multi_frame": (lambda path: write_dicom(path, **FRAMES), "2 frames"),
    "colour": (lambda path: write_dicom(path, np.zeros((8, 8, 3), np.uint8), **COLOUR), "colour"),
    "palette": (lambda path: write_dicom(path, RAMP, PhotometricInterpretation="PALETTE COLOR"), "PALETTE COLOR"),
    "constant": (lambda path: write_dicom(path, 7 + 0 * RAMP), "constant"),
    "bits": (lambda path: write_dicom(path, RAMP + 4080, bits=12), "12 bits"),
    "no_rows": (lambda path: write_dicom(path, RAMP, Rows=None), "Rows"),
}


@pytest.mark.parametrize(("make", "cause"), BAD_DICOM.values(), ids=BAD_DICOM)
def test_unusable_dicom_files_are_named(tmp_path, capsys, make, cause):
    path, good, out = tmp_path / "bad.dcm", write_dicom(tmp_path / "good.dcm", RAMP), tmp_path / "out"
    make(path)
    assert dicom_to_png.main([str(path), str(good), str(out)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert cause in error
    assert dicom_to_png.main([str(path), str(good), str(out), "--on-error", "skip"]) == 0
    assert [row["file"] for row in read_csv(out / "images.csv")] == ["images/good.png"]
    report = json.loads((out / "report.json").read_text())
    assert (report["images"], len(report["skipped"])) == (1, 1)
    assert str(path) in capsys.readouterr().out
    assert dicom_to_png.main([str(path), f"{tmp_path}/none", "--on-error", "skip"]) == 1


def test_sources_without_images_and_with_one_name_are_refused(tmp_path, capsys):
    files = [str(write_dicom(tmp_path / name / "1-1.dcm", RAMP)) for name in "ab"]
    (tmp_path / "empty").mkdir()
    for sources, words in (
        (files, "both would be written as 1-1.png"),
        ([f"{tmp_path}/empty"], "no DICOM files"),
        ([f"{tmp_path}/missing.dcm"], "No such file"),
    ):
        assert dicom_to_png.main([*sources, f"{tmp_path}/out"]) == 1
        assert words in capsys.readouterr().err
    (tmp_path / "mine" / "images").mkdir(parents=True)
    (tmp_path / "mine" / "images" / "photo.png").write_bytes(b"precious")
    assert dicom_to_png.main([files[0], f"{tmp_path}/mine"]) == 1
    assert (tmp_path / "mine" / "images" / "photo.png").exists()


# ------------------------------------------------------------------------------------------------- pixel_mean


@pytest.mark.parametrize(
    ("dtype", "highest", "factor"),
    [
        ("uint8", 200, 1),
        ("uint16", 255, 1),
        ("uint16", 4095, 0.06227),
        ("uint16", 4096, 0.01556),
        ("uint16", 16384, 0.003891),
        ("uint16", 65535, 0.003891),
    ],
)
def test_mean_and_factor_of_known_pixels(tmp_path, capsys, dtype, highest, factor):
    """Images of different sizes: every pixel counts once."""
    write_picture(tmp_path / "neg" / "a.png", np.full((10, 20), highest, dtype))
    write_picture(tmp_path / "pos" / "deep" / "b.png", np.full((10, 30), 100, dtype))
    (tmp_path / "pos" / "notes.txt").write_text("no image")
    mean = (200 * highest + 300 * 100) / 500
    assert pixel_mean.main([str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures.pop("mean") == mean
    assert figures.pop("featurewise_mean") == pytest.approx(mean * factor, rel=1e-12)
    counts = {"images": 2, "pixels": 500, "sum": 200 * highest + 30000, "types": {dtype: 2}}
    assert figures == counts | {"min": 100, "max": highest, "rescale_factor": factor}
    assert pixel_mean.main([str(tmp_path)]) == 0
    options = f"--rescale-factor {factor:g} --featurewise-mean {mean * factor:.2f}"
    assert capsys.readouterr().out.splitlines()[-1] == options


def test_mean_of_resized_images_is_that_of_the_trainers(tmp_path):
    from mammo.images.pixels import read_resize_img

    rng = np.random.default_rng(1)
    files = [
        write_picture(tmp_path / f"{k}.png", rng.integers(0, 65536, (60 + k, 41), dtype=np.uint16)) for k in range(5)
    ]
    expected = np.mean([read_resize_img(path, (32, 24), rescale_factor=0.003891).mean(dtype=float) for path in files])
    one = pixel_mean.measure_files(files, (32, 24))
    assert one["featurewise_mean"] == pytest.approx(expected, rel=1e-6)
    assert one["pixels"] == 5 * 32 * 24
    # To the last unit: the 2017 program's resizing, which OpenCV's own differs from where it uses Intel's library.
    assert one["sum"] == sum(int(read_resize_img(path, (32, 24)).sum(dtype=float)) for path in files)
    assert pixel_mean.measure_files(files[::-1], (32, 24), jobs=2) == one
    assert pixel_mean.measure_files(files, (32, 24), rescale_factor=0.5)["featurewise_mean"] == one["mean"] * 0.5


def test_sums_do_not_overflow(monkeypatch):
    """The sum of a training set of 16-bit mammograms takes more than 32 bits, and is exact beyond 53."""
    results = iter([(2**62 + 1, 2**47, "uint16", 0, 65535)] * 3)
    monkeypatch.setattr(pixel_mean, "measure_file", lambda path, img_size: next(results))
    assert pixel_mean.measure_files(["a", "b", "c"])["sum"] == 3 * (2**62 + 1)


def test_warnings(tmp_path, capsys):
    write_picture(tmp_path / "a.png", np.full((4, 4), 60000, np.uint16))
    assert pixel_mean.main([str(tmp_path), "--rescale-factor", "1"]) == 0
    assert "far from the range 0..255" in capsys.readouterr().err
    write_picture(tmp_path / "b.png", np.full((4, 4), 200, np.uint8))
    assert pixel_mean.main([str(tmp_path)]) == 0
    assert "several types. Received 1 of uint16, 1 of uint8" in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "bits"), [("uint16", 14), ("int16", 12)])
def test_the_mean_of_dicom_files_is_that_of_their_16_bit_images(tmp_path, dtype, bits):
    lowest = -(2 ** (bits - 1)) if dtype == "int16" else 0
    pixels = np.linspace(lowest, lowest + 2**bits - 1, 64).astype(dtype).reshape(8, 8)
    write_picture(tmp_path / "png" / "a.png", read_dicom_16_bit(write_dicom(tmp_path / "a.dcm", pixels, bits))[0])
    assert pixel_mean.measure_files([tmp_path / "a.dcm"]) == pixel_mean.measure_files([tmp_path / "png" / "a.png"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", png(np.zeros((4, 4, 3), np.uint8)), "colour"),
        ("a.png", png(np.zeros((40, 40), np.uint8))[:-20], "truncated"),
        ("a.png", b"", "empty"),
        ("a.tif", cv2.imencode(".tif", np.ones((4, 4), np.float32))[1].tobytes(), "--rescale-factor"),
        ("notes.txt", b"", "no images here"),
    ],
    ids=["colour", "truncated", "empty", "float", "nothing"],
)
def test_images_without_a_mean_are_named(tmp_path, capsys, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert pixel_mean.main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert str(tmp_path) in error or name == "a.tif"
    assert error.count("\n") == 1
    with pytest.raises(InputError):
        pixel_mean.run(sources=str(tmp_path))


def test_usage_errors_end_with_status_2(tmp_path):
    for main, options in ((pixel_mean.main, ["--img-size", "5"]), (dicom_to_png.main, ["--on-error", "stop"])):
        with pytest.raises(SystemExit) as caught:
            main([str(tmp_path), *options])
        assert caught.value.code == 2


# ----------------------------------------------------------------------------------------------- draw_lesions


@pytest.fixture
def mammogram(tmp_path):
    """A bright breast on black, 16-bit, and the mask of a square lesion at half the size."""
    img, mask = np.zeros((80, 60), np.uint16), np.zeros((40, 30), np.uint8)
    img[8:72, :40] = 30_000
    mask[10:20, 5:15] = 255
    return write_picture(tmp_path / "img.png", img), write_picture(tmp_path / "mask.png", mask)


def test_lesions_are_outlined_on_the_grey_picture(mammogram, tmp_path):
    img, mask = mammogram
    out = tmp_path / "new folder" / "out.png"
    assert draw_lesions.main([str(img), str(out), str(mask)]) == 0
    picture = cv2.imread(str(out))
    assert picture.shape == (80, 60, 3)
    drawn = (picture == (0, 215, 255)).all(axis=2)
    rows, columns = np.nonzero(drawn)
    np.testing.assert_allclose([rows.min(), rows.max(), columns.min(), columns.max()], [20, 39, 10, 29], atol=2)
    assert not drawn[25:35, 15:25].any()
    grey = np.where(read_img(img) > 0, 255, 0)[..., None]
    np.testing.assert_array_equal(picture[~drawn], np.broadcast_to(grey, picture.shape)[~drawn])


@pytest.mark.parametrize(
    ("fault", "named"),
    [("colour image", "bad.png"), ("colour mask", "bad.png"), ("black image", "bad.png"), ("no mask", "none.png"),
     ("no ending", "out"), ("folder is a file", "mask.png"), ("out is a folder", "folder.png")],
)  # fmt: skip
def test_lesions_that_cannot_be_drawn_are_one_line(mammogram, tmp_path, capfd, fault, named):
    img, mask = mammogram
    bad = write_picture(tmp_path / "bad.png", np.full((80, 60, 3) if "colour" in fault else (80, 60), 0, np.uint8))
    (tmp_path / "folder.png").mkdir()
    out = {"no ending": "out", "folder is a file": "mask.png/out.png", "out is a folder": "folder.png"}
    image = bad if fault.endswith(" image") else img
    lesion = {"colour mask": bad, "no mask": tmp_path / "none.png"}.get(fault, mask)
    before = sorted(tmp_path.iterdir())
    assert draw_lesions.main([str(image), str(tmp_path / out.get(fault, "out.png")), str(lesion)]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert str(tmp_path / named) in error
    assert sorted(tmp_path.iterdir()) == before
