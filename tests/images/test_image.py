"""dm_image: reading, cutting and augmentation, against the published program's numbers and closed forms."""

import json

import cv2
import numpy as np
import pytest
from scipy import ndimage

from dm_image import DMImageDataGenerator
from mammo.base.files import InputError
from mammo.images import exams, iterators, pixels, reading, warp
from mammo.maps import compute

ALL_ON = {
    "rotation_range": 25.0,
    "shear_range": 0.2,
    "zoom_range": [0.8, 1.2],
    "channel_shift_range": 20.0,
    "horizontal_flip": True,
    "vertical_flip": True,
}


def load(path):
    return json.loads(path.read_text())


def write_image(path, pixels):
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def noise16(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (40, 30), dtype=np.uint16)
    return write_image(tmp_path / "noise.png", pixels), pixels


# ---------------------------------------------------------------------------------------------------- reading


def test_golden_read_resize_img(golden):
    folder = golden / "read_resize"
    expected = np.load(folder / "read_resize_img.npz")
    for case in load(folder / "read_resize_img.json"):
        path, kwargs = folder / "input" / case["file"], case.get("kwargs", {})
        if "exception" in case:
            with pytest.raises(InputError):
                pixels.read_resize_img(path, **kwargs)
            continue
        got, reference = pixels.read_resize_img(path, **kwargs), expected[case["key"]]
        assert got.dtype == np.float32
        assert got.shape == reference.shape
        # Libraries decode JPEG within a grey level of each other; all else is the same to the bit.
        scale = kwargs.get("target_scale", 0) / 255 or 1
        tolerance = 1.01 * max(scale, 1.0) if path.suffix == ".jpg" else 0
        np.testing.assert_allclose(got, reference, rtol=0, atol=tolerance, err_msg=str(case))


def test_golden_read_img_for_pred(golden):
    folder = golden / "read_resize"
    expected = np.load(folder / "read_img_for_pred.npz")
    refused = 0
    for case in load(folder / "read_img_for_pred.json"):
        kwargs, reference = case["kwargs"], expected[case["key"]]
        try:
            got = pixels.read_img_for_pred(folder / "input" / case["file"], **kwargs)
        except InputError as error:
            assert "0..255" in str(error)  # the program wrapped these around
            refused += 1
            continue
        assert got.dtype == np.float32
        assert got.shape == reference.shape
        jpeg = case["file"].endswith(".jpg")  # equalisation turns a difference of one grey level into several
        tolerance = (16 if kwargs.get("equalize_hist") else 1.01) if jpeg else 0
        np.testing.assert_allclose(got, reference, rtol=0, atol=tolerance, err_msg=str(case))
    assert 0 < refused < 10


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".tif"])
def test_reads_8_bit_files_in_their_own_type(tmp_path, suffix):
    pixels = np.full((6, 5), 77, np.uint8)
    np.testing.assert_array_equal(reading.read_img(write_image(tmp_path / f"a{suffix}", pixels)), pixels)


def test_target_height_wins_and_truncates_the_width(noise16):
    assert pixels.read_resize_img(noise16[0], target_size=(7, 7), target_height=33).shape == (33, 24)
    np.testing.assert_array_equal(pixels.read_resize_img(noise16[0], target_size=(40, 30)), noise16[1])


def write_dicom(path, pixels, **tags):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 12, 11
    dataset.PixelRepresentation = int(pixels is not None and pixels.dtype.kind == "i")
    if pixels is not None:
        dataset.Rows, dataset.Columns = pixels.shape[-2:]
        dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_monochrome1_is_inverted_within_its_bits(tmp_path):
    pixels = np.array([[0, 1], [4094, 4095]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(reading.read_img(path), 4095 - pixels)
    renamed = path.rename(tmp_path / "no_suffix")
    np.testing.assert_array_equal(reading.read_img(renamed), 4095 - pixels)


def test_dicom_reader_tells_the_range_of_the_stored_bits(tmp_path):
    pixels = np.array([[-2048, -1], [0, 2047]], np.int16)
    path = write_dicom(tmp_path / "a.dcm", pixels, PhotometricInterpretation="MONOCHROME1")
    img, limits, dataset = reading.read_dicom(path)
    np.testing.assert_array_equal(img, -1 - pixels)
    assert img.dtype == np.int16
    assert limits == (-2048, 2047)
    assert dataset.BitsStored == 12


@pytest.mark.parametrize(
    ("dtype", "overlay", "first"),
    [("uint16", None, 0xF001), ("uint16", 0, 0xF001), ("uint16", 12, 1), ("int16", None, 1)],
)
def test_dicom_bits_beyond_those_stored(tmp_path, dtype, overlay, first):
    """12 bits stored, and more in the first pixel: an overlay there, no sign there, or a header that is wrong."""
    pydicom = pytest.importorskip("pydicom")
    path = write_dicom(tmp_path / "a.dcm", np.array([[0xF001, 2]], np.uint16).view(dtype))
    if overlay is not None:
        dataset = pydicom.dcmread(path)
        dataset.add_new((0x6000, 0x0102), "US", overlay)
        dataset.save_as(path)
    np.testing.assert_array_equal(reading.read_img(path), [[first, 2]])


@pytest.mark.parametrize(("dtype", "slope", "intercept"), [("uint16", 1, 0), ("uint16", 2, -1000), ("int16", 1, 0)])
def test_dicom_window_is_applied_when_asked(tmp_path, dtype, slope, intercept):
    """The linear function of the standard (PS3.3 C.11.2.1.2.1), on rescaled values, stretched to the stored bits."""
    pixels = np.array([[0, 1100, 1500], [1501, 2000, 2047]], dtype)
    tags = {"WindowCenter": 1500 * slope + intercept, "WindowWidth": 1000 * slope}
    path = write_dicom(tmp_path / "a.dcm", pixels, **tags, RescaleSlope=slope, RescaleIntercept=intercept)
    windowed = reading.read_dicom(path, voi_lut=True)[0]
    assert windowed.dtype == dtype
    values = pixels * float(slope) + intercept
    share = np.clip((values - (tags["WindowCenter"] - 0.5)) / (tags["WindowWidth"] - 1) + 0.5, 0, 1)
    lowest = -2048 if dtype == "int16" else 0
    np.testing.assert_array_equal(windowed, np.rint(share * 4095 + lowest))
    np.testing.assert_array_equal(reading.read_img(path), pixels)


@pytest.mark.parametrize("bits", [8, 12])
def test_dicom_lookup_table_is_applied_when_asked(tmp_path, bits):
    from pydicom import Dataset

    entries = np.rint(np.sqrt(np.arange(300) / 299) * (2**bits - 1)).astype(int)
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [300, 100, bits])
    table.add_new("LUTData", "US", entries.tolist())
    pixels = np.array([[0, 100, 101], [250, 399, 4000]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, VOILUTSequence=[table], PhotometricInterpretation="MONOCHROME1")
    expected = entries[[[0, 0, 1], [150, 299, 299]]] / (2**bits - 1) * 4095
    np.testing.assert_array_equal(reading.read_dicom(path, voi_lut=True)[0], 4095 - np.rint(expected))


def test_an_absent_decoder_is_named(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels.decoders import JPEGLosslessSV1Decoder

    if JPEGLosslessSV1Decoder.is_available:
        pytest.skip("the decoder is installed")
    path = write_dicom(tmp_path / "a.dcm", np.zeros((4, 4), np.uint16))
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLosslessSV1
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(path)
    with pytest.raises(InputError, match=r"JPEG Lossless.*pip install pylibjpeg pylibjpeg-libjpeg"):
        reading.read_img(path)


def test_compressed_dicom_is_decoded(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    pixels = np.random.default_rng(0).integers(0, 4096, (30, 20), dtype=np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels)
    dataset = pydicom.dcmread(path)
    dataset.compress(pydicom.uid.RLELossless)
    dataset.save_as(path)
    np.testing.assert_array_equal(reading.read_img(path), pixels)


def bad_image(kind, folder):
    """Write a file that is no usable image and return it."""
    path = folder / f"{kind}.png"
    noise = np.random.default_rng(0).integers(0, 65536, (50, 40), dtype=np.uint16)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "folder":
        path.mkdir()
    elif kind == "truncated":
        write_image(path, noise)
        path.write_bytes(path.read_bytes()[:-40])
    elif kind == "truncated_jpg":
        path = write_image(folder / "a.jpg", (noise >> 8).astype(np.uint8))
        path.write_bytes(path.read_bytes()[:-300])
    elif kind == "colour":
        write_image(path, np.zeros((5, 5, 3), np.uint8))
    elif kind == "nan":
        path = write_image(folder / "a.tif", np.array([[0, np.nan], [1, 2]], np.float32))
    elif kind == "dicom_without_pixels":
        path = write_dicom(folder / "a.dcm", None)
    elif kind == "dicom_multi_frame":
        path = write_dicom(folder / "a.dcm", np.zeros((3, 4, 4), np.uint16), NumberOfFrames=3)
    elif kind == "dicom_truncated":
        path = write_dicom(folder / "a.dcm", noise)
        path.write_bytes(path.read_bytes()[:-600])
    elif kind == "dicom_text":
        path = folder / "a.dcm"
        path.write_text("not a DICOM file at all")
    return path


@pytest.mark.parametrize(
    ("kind", "cause"),
    {
        "missing": "No such file",
        "empty": "empty",
        "text": "not a readable image",
        "folder": "directory",
        "truncated": "truncated",
        "truncated_jpg": "truncated",
        "colour": "colour",
        "nan": "NaN",
        "dicom_without_pixels": "no pixels",
        "dicom_multi_frame": "3 frames",
        "dicom_truncated": "cannot decode",
        "dicom_text": "no pixels",
    }.items(),
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_bad_images_are_named_with_their_cause(tmp_path, kind, cause):
    path = bad_image(kind, tmp_path)
    with pytest.raises(InputError, match=cause) as caught:
        pixels.read_img_for_pred(path, target_size=(8, 8))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_histogram_equalisation_needs_0_to_255(noise16):
    with pytest.raises(InputError, match=r"0\.\.255"):
        pixels.read_img_for_pred(noise16[0], equalize_hist=True, target_size=(40, 30))
    got = pixels.read_img_for_pred(noise16[0], equalize_hist=True, target_size=(40, 30), rescale_factor=0.003891)
    expected = cv2.equalizeHist((noise16[1].astype(np.float32) * np.float32(0.003891)).astype(np.uint8))
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, axis=2))


# ------------------------------------------------------------------------------------------ cutting and labels


def test_golden_helpers(golden):
    data = np.load(golden / "read_resize" / "helpers.npz")
    img = data["img"]
    np.testing.assert_array_equal(compute.crop_img(img, (3, 5, 10, 12)), data["crop_3_5_10_12"])
    np.testing.assert_array_equal(compute.add_img_margins(img, 7), data["margin_7"])
    np.testing.assert_array_equal(exams.get_roi_patches(img, data["kp"], (8, 6)), data["roi_patches_8x6"])
    for name in ("8_4", "16_5", "8_8", "12_6_scale255", "12_6_scale255_eq"):
        patch_size, stride = map(int, name.split("_")[:2])
        scale = 255.0 if "scale255" in name else None
        windows, *grid = compute.sweep_img_patches(img, patch_size, stride, scale, name.endswith("_eq"))
        np.testing.assert_array_equal(windows, data[f"sweep_{name}"])
        if "scale" not in name:
            assert grid == list(data[f"sweep_{name}_grid"])


def test_a_sweep_that_fits_exactly_gives_the_full_grid():
    img = np.arange(36, dtype=np.float32).reshape(6, 6)
    windows, rows, columns = compute.sweep_img_patches(img, 2, 2)
    assert (rows, columns) == (3, 3)
    np.testing.assert_array_equal(windows[-1], img[4:, 4:])
    assert compute.sweep_img_patches(img, 6, 4)[1:] == (1, 1)
    with pytest.raises(InputError, match="patch_size 7"):
        compute.sweep_img_patches(img, 7, 1)


def test_golden_labels_and_balance(golden):
    units = load(golden / "iterators" / "units.json")
    for case in units["index_balancer"]:
        rng = np.random.RandomState(case["seed"])
        got = iterators.index_balancer(case["index_array"], case["classes"], case["ratio"], rng)
        assert got.tolist() == case["result"]
    for case in units["to_sparse"]:
        if isinstance(case["result"], str):
            with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[case["result"].split()[-1]]):
                iterators.to_sparse(case["y"])
        else:
            assert iterators.to_sparse(case["y"]).tolist() == case["result"]


def test_index_balancer_reaches_its_ratio():
    classes = np.array([1] * 10 + [0] * 190)
    drawn = iterators.index_balancer(np.arange(200), classes, 3.0, np.random.RandomState(0))
    assert abs(classes[drawn].mean() - 0.25) < 0.1


def test_key_points_cluster_to_their_groups():
    points = np.array([[0, 0], [0, 2], [50, 50], [52, 50], [0, 90]], float)
    centres = exams.clust_kpts(points, 3)
    np.testing.assert_allclose(sorted(centres.tolist()), [[0, 1], [0, 90], [51, 50]], atol=1e-4)


class MeanModel:
    """Stands in for a patch classifier: probabilities from the window's mean and maximum."""

    input_shape = (None, 4, 4, 3)

    def predict_on_batch(self, x):
        assert len(x) <= 5
        return np.stack([x.mean(axis=(1, 2, 3)), x.max(axis=(1, 2, 3))], axis=1)


def test_heatmap_places_each_window(tmp_path):
    img = np.zeros((20, 20), np.uint8)
    img[4:16, 6:14] = 200
    path = write_image(tmp_path / "a.png", img)
    kwargs = {"featurewise_center": True, "featurewise_mean": 10.0}
    [heatmap] = compute.get_prob_heatmap(str(path), 20, None, 4, 4, MeanModel(), 5, **kwargs)
    # The breast is 12 x 8, padded by 2: windows at 0, 4, .. of 16 x 12.
    padded = np.pad(np.full((12, 8), 200.0), 2)
    means = padded.reshape(4, 4, 3, 4).mean(axis=(1, 3))
    np.testing.assert_allclose(heatmap[..., 0], means - 10, rtol=1e-6)
    np.testing.assert_allclose(heatmap[..., 1], 190)
    assert compute.get_prob_heatmap(None, 20, None, 4, 4, None, 5) == [None]


@pytest.mark.slow
def test_golden_heatmap_sweeps(golden, tmp_path):
    import gzip

    from keras.applications.vgg16 import preprocess_input

    from mammo.train import checkpoint

    folder = golden / "heatmap"
    expected = np.load(folder / "heatmaps.npz")
    models = {}
    for case in load(folder / "heatmap.json")["cases"]:
        if case["model"] not in models:
            packed = golden / "checkpoints" / f"{case['model']}.h5.gz"
            unpacked = tmp_path / f"{case['model']}.h5"
            unpacked.write_bytes(gzip.decompress(packed.read_bytes()))
            models[case["model"]] = checkpoint.load_model(unpacked)
        kwargs = dict(case["kwargs"])
        if "preprocess" in kwargs:
            kwargs["preprocess"] = preprocess_input
        [heatmap] = compute.get_prob_heatmap(
            str(folder / "input" / case["file"]),
            case["target_height"],
            case["target_scale"],
            case["patch_size"],
            case["stride"],
            models[case["model"]],
            16,
            **kwargs,
        )
        np.testing.assert_allclose(heatmap, expected[case["key"]], atol=1e-4, err_msg=case["key"])


# ----------------------------------------------------------------------------------------------- augmentation


def assert_params(params, case):
    for name in ("theta", "shear", "tx", "ty", "zx", "zy"):
        assert params[name] == case[name], name
    assert params["channel_shift"].tolist() == case["channel_shifts"]
    assert (params["flip_horizontal"], params["flip_vertical"]) == (case["hflip"], case["vflip"])


@pytest.mark.parametrize("channels", [1, 3])
def test_golden_random_transform(golden, channels):
    folder = golden / "augmentation"
    data = np.load(folder / f"random_transform_{channels}ch.npz")
    record = load(folder / f"random_transform_{channels}ch.json")
    settings = {k: v for k, v in record["settings"].items() if k != "order"}
    generator = DMImageDataGenerator(**settings)
    kept = data["kept_cases"].tolist() if "kept_cases" in data else list(range(len(data["seeds"])))
    for i, case in enumerate(record["cases"]):
        raw = data["raw"][case["image_index"]].astype(np.float32)
        raw *= record["rescale"]
        x = np.repeat(raw[..., None], channels, axis=2) * np.asarray(case["channel_scale"], np.float32)
        params = generator.get_random_transform(x.shape, np.random.RandomState(case["seed"]))
        assert_params(params, case)
        np.testing.assert_allclose(warp.transform_matrix(params, *x.shape[:2]), case["matrix_full"], atol=1e-10)
        y = generator.apply_transform(x, params)
        np.testing.assert_array_equal(y[::37], data["y_sample_rows"][i])
        assert y.sum(dtype=np.float64) == pytest.approx(data["y_sum"][i], rel=1e-9)
        if i in kept:
            np.testing.assert_array_equal(y, data["y_float32"][kept.index(i)])


def test_golden_augmentation_variants(golden):
    data = np.load(golden / "augmentation" / "variants.npz")
    for case in load(golden / "augmentation" / "variants.json"):
        generator = DMImageDataGenerator(**(ALL_ON | case["settings"]))
        x = data[case.get("input_key", "ramp")]
        params = generator.get_random_transform(x.shape, np.random.RandomState(case["seed"]))
        assert_params(params, case)
        np.testing.assert_array_equal(generator.apply_transform(x, params), data[case["key"]], err_msg=case["key"])


def restated(x, params, rows, columns):
    """The rule in SciPy, channel by channel, with the matrix as the product that defines it. x: (H, W, C)."""
    theta, shear, tx, ty, zx, zy = (
        params.get(k, k in ("zx", "zy")) for k in ("theta", "shear", "tx", "ty", "zx", "zy")
    )
    rotation = np.array([[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]])
    shearing = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])

    def shift(x, y):
        return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]])

    matrix = rotation @ shift(tx, ty) @ shearing @ np.diag([zx, zy, 1])
    matrix = shift(rows / 2 + 0.5, columns / 2 + 0.5) @ matrix @ shift(-rows / 2 - 0.5, -columns / 2 - 0.5)
    if not np.array_equal(matrix, np.eye(3)):
        x = np.stack(
            [
                ndimage.affine_transform(plane, matrix[:2, :2], matrix[:2, 2], order=0, mode="nearest")
                for plane in np.moveaxis(x, 2, 0)
            ],
            axis=2,
        )
    x = np.clip(x + params["channel_shift"].astype(np.float32), x.min(), x.max())
    x = x[:, ::-1] if params["flip_horizontal"] else x
    return x[::-1] if params["flip_vertical"] else x


@pytest.mark.parametrize(("size", "cases"), [((97, 61), 40), ((64, 128), 40), ((300, 200), 40), ((1152, 896), 3)])
@pytest.mark.parametrize("kind", ["one", "repeated", "copies", "different", "two"])
def test_pixels_are_scipys(size, cases, kind):
    """Random cases, every pixel a different value, wide ranges and shifts on."""
    generator = DMImageDataGenerator(**ALL_ON, width_shift_range=0.3, height_shift_range=0.3)
    generator.rotation_range, generator.zoom_range = 180, (0.4, 2.0)
    img = np.random.default_rng(1).permutation(np.prod(size)).astype(np.float32).reshape(*size, 1)
    x = {
        "one": img,
        "repeated": np.broadcast_to(img, (*size, 3)),
        "copies": np.repeat(img - 100, 3, axis=2),
        "different": np.concatenate([img, img[::-1], img * 2], axis=2) + 100,
        "two": np.concatenate([img, img[::-1]], axis=2),
    }[kind]
    for seed in range(cases):
        params = generator.get_random_transform(x.shape, np.random.default_rng(seed))
        np.testing.assert_array_equal(generator.apply_transform(x, params), restated(x, params, *size), str(params))


@pytest.mark.parametrize(
    "params",
    [
        {"tx": 0.5, "ty": -2.5},
        {"zx": 0.5, "zy": 2.0},
        {"zx": 2.0, "zy": 1.0, "flip_horizontal": True},
        {"tx": 3.0, "flip_vertical": True},
        {"zx": 1.0, "zy": 1.25, "ty": 0.125},
    ],
)
@pytest.mark.parametrize("size", [(20, 31), (33, 16)])
def test_coordinates_just_between_two_pixels_round_as_scipys(size, params):
    defaults = {"channel_shift": np.zeros(1), "flip_horizontal": False, "flip_vertical": False}
    x = np.arange(np.prod(size), dtype=np.float32).reshape(*size, 1)
    got = DMImageDataGenerator().apply_transform(x, params)
    np.testing.assert_array_equal(got, restated(x, defaults | params, *size))


def test_draw_order_and_skipped_draws():
    generator = DMImageDataGenerator(shear_range=0.3, channel_shift_range=5.0, vertical_flip=True)
    rng = np.random.RandomState(8)
    shear = rng.uniform(-0.3, 0.3)
    shifts = [rng.uniform(-5, 5) for _ in range(3)]
    flip = rng.random_sample() < 0.5
    params = generator.get_random_transform((9, 7, 3), np.random.RandomState(8))
    assert params["shear"] == shear
    assert params["channel_shift"].tolist() == shifts
    assert params["flip_vertical"] == flip
    assert not params["flip_horizontal"]
    assert (params["theta"], params["tx"], params["ty"], params["zx"], params["zy"]) == (0, 0, 0, 1, 1)


def test_flips_identity_and_purity():
    generator = DMImageDataGenerator()
    x = np.random.default_rng(0).random((8, 6, 3), dtype=np.float32)
    before = x.copy()
    np.testing.assert_array_equal(generator.apply_transform(x, {}), x)
    np.testing.assert_array_equal(generator.apply_transform(x, {"flip_horizontal": True}), x[:, ::-1])
    np.testing.assert_array_equal(generator.apply_transform(x, {"flip_vertical": True}), x[::-1])
    out = np.empty_like(x)
    assert generator.apply_transform(x, {"channel_shift": np.array([0.1, 0, 0])}, out=out) is out
    np.testing.assert_array_equal(out[..., 1:], x[..., 1:])
    np.testing.assert_array_equal(out[..., 0], np.minimum(x[..., 0] + np.float32(0.1), x.max()))
    np.testing.assert_array_equal(x, before)


def test_channels_first_is_channels_last_moved():
    x = np.random.default_rng(0).random((12, 10, 3), dtype=np.float32) * 255
    last = DMImageDataGenerator(**ALL_ON).random_transform(x, 5)
    first = DMImageDataGenerator(**ALL_ON, data_format="channels_first").random_transform(np.moveaxis(x, 2, 0), 5)
    np.testing.assert_array_equal(first, np.moveaxis(last, 2, 0))


def test_other_fill_modes_are_scipys():
    x = np.random.default_rng(0).random((12, 10, 1), dtype=np.float32)
    generator = DMImageDataGenerator(fill_mode="constant", cval=-1.0)
    moved = generator.apply_transform(x, {"tx": 4.0})
    np.testing.assert_array_equal(moved[:8], x[4:])
    np.testing.assert_array_equal(moved[8:], -1)


def test_standardize():
    x = np.full((4, 4, 1), 100, np.float32)
    generator = DMImageDataGenerator(featurewise_center=True)
    with pytest.raises(InputError, match="mean"):
        generator.standardize(x)
    generator.mean = 52.18
    np.testing.assert_array_equal(generator.standardize(x), x - np.float32(52.18))
    assert x[0, 0, 0] == 100
    generator.rescale = 0.5
    np.testing.assert_allclose(generator.standardize(x), -2.18, rtol=1e-6)
