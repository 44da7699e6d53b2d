"""Preprocessing: equality with the published program on its golden images, and closed forms."""

import json

import cv2
import numpy as np
import pytest

from dm_files import InputError
from dm_preprocess import DMImagePreprocessor


def breast_and_label(dtype, breast_value=0.6, label_value=1.0):
    """A half ellipse at the left edge with a brighter label beside it, and the breast's mask and box."""
    highest = 1.0 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    mask = cv2.ellipse(np.zeros((120, 100), np.uint8), (0, 60), (50, 45), 0, -90, 90, 1, cv2.FILLED)
    img = (mask * breast_value * highest).astype(dtype)
    img[5:15, 70:95] = label_value * highest
    return img, mask > 0, (0, 15, 51, 91)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_segment_breast_keeps_the_breast_and_drops_the_label(dtype):
    img, mask, box = breast_and_label(dtype)
    breast, found = DMImagePreprocessor.segment_breast(img)
    x, y, w, h = box
    assert found == box
    assert breast.dtype == img.dtype
    np.testing.assert_array_equal(breast, (img * mask)[y : y + h, x : x + w])
    whole, found = DMImagePreprocessor.segment_breast(img, crop=False)
    assert found == box
    np.testing.assert_array_equal(whole, img * mask)


def test_segment_breast_fills_dark_holes_of_the_breast_mask():
    img = np.full((20, 20), 200, np.uint8)
    img[8:12, 8:12] = 5  # below the threshold, but inside: kept as it is
    np.testing.assert_array_equal(DMImagePreprocessor.segment_breast(img)[0], img)


def test_a_constant_image_is_all_breast():
    img = np.full((20, 30), 7, np.uint8)
    breast, box = DMImagePreprocessor.segment_breast(img)
    assert box == (0, 0, 30, 20)
    np.testing.assert_array_equal(breast, img)


@pytest.mark.parametrize(
    ("img", "words"),
    [
        (np.zeros((20, 20), np.uint16), "none above zero"),
        (np.full((20, 20), np.nan, np.float32), "NaN"),
        (np.zeros((20, 20, 3), np.uint8), r"\(20, 20, 3\)"),
        (np.zeros((0, 20), np.uint8), r"\(0, 20\)"),
    ],
)
def test_segment_breast_names_what_is_wrong(img, words):
    with pytest.raises(InputError, match=words):
        DMImagePreprocessor.segment_breast(img)


def test_segment_breast_with_a_threshold_above_all_pixels():
    with pytest.raises(InputError, match="low_int_threshold"):
        DMImagePreprocessor.segment_breast(np.full((9, 9), 3, np.uint8), low_int_threshold=255)


def test_segment_breast_matches_the_published_program(golden):
    folder = golden / "segment_breast"
    inputs = np.load(folder / "inputs.npz")
    expected = np.load(folder / "segment_breast.npz")
    for case in json.loads((folder / "segment_breast.json").read_text())["cases"]:
        img = inputs[case["image"]].astype(case["dtype_in"])
        breast, box = DMImagePreprocessor.segment_breast(img, **case["kwargs"])
        assert list(box) == case["bbox"], case["key"]
        assert breast.dtype == case["dtype"], case["key"]
        np.testing.assert_array_equal(breast, expected[case["key"]], err_msg=case["key"])
