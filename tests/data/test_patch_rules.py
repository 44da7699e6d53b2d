"""Patch geometry and sampling rules, against golden data and by closed forms."""

import json

import cv2
import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.data import patch_rules, splits
from mammo.data.patch_rules import (
    Patch,
    Roi,
    cut_patch,
    sample_background,
    sample_blobs,
    sample_hard_negatives,
    sample_lesion,
    sample_patches,
)
from mammo.data.splits import stratified_split
from mammo.images.breast import DMImagePreprocessor, detect_blobs
from mammo.images.pixels import read_resize_img


def rectangle(shape, left, top, width, height):
    mask = np.zeros(shape, "uint8")
    mask[top : top + height, left : left + width] = 255
    return mask


def roi_of(mask):
    return Roi.from_mask(mask, 0, mask.shape)


# ------------------------------------------------------------------------------------------------------- golden


def test_overlap_decisions_match_golden(golden):
    cases = json.loads((golden / "patches/unit_overlap.json").read_text())["cases"]
    masks = np.load(golden / "patches/unit_overlap_masks.npz")
    rois = {name: roi_of(masks[name]) for name in masks if name != "empty"}
    for index, x, y, patch_size, cutoff, result in cases:
        assert (rois[f"mask{index}"].overlap(x, y, patch_size) >= cutoff) == result, (index, x, y, patch_size)


def test_blobs_match_golden(golden):
    for name, expected in np.load(golden / "patches/unit_blob_keypoints.npz").items():
        image = read_resize_img(golden / f"patches/input/full_img/{name}.png", target_height=576)
        breast, _ = DMImagePreprocessor.segment_breast(image)
        np.testing.assert_array_equal(detect_blobs(np.pad(breast, 56), 112), expected)


def test_hard_negatives_match_golden(golden):
    folder = golden / "patches"
    case = json.loads((folder / "unit_hard_negatives.json").read_text())
    height, size = case["target_height"], case["patch_size"]
    image = read_resize_img(folder / "input/full_img" / case["image"], target_height=height)
    mask = read_resize_img(folder / "input/roi_mask" / case["mask"], target_height=height)
    left, top, width, height = case["bbox"]
    padded = np.pad(DMImagePreprocessor.segment_breast(image)[0], size // 2)
    roi = Roi.from_mask(mask[top : top + height, left : left + width], size // 2, padded.shape)
    assert [list(map(str, roi.centroid))] == case["centroid"]

    patches = sample_hard_negatives(roi, [roi], case["nb"], size, case["neg_cutoff"])
    assert [[str(patch.x), str(patch.y)] for patch in patches] == case["centres"]
    pixels = np.load(folder / "unit_hard_negatives.npz")
    for number, patch in enumerate(patches):
        expected = pixels[f"{case['image'].removesuffix('.png')}_1_{number:04d}"]
        np.testing.assert_array_equal(cut_patch(padded, patch.x, patch.y, size), expected)


def test_split_matches_golden(golden):
    """P_00257 and P_00582 have malignant lesions."""
    patients = (golden / "patches/input/pat_train.txt").read_text().split()
    train, val = stratified_split(patients, [name in ("P_00257", "P_00582") for name in patients], 0.34)
    assert {"train": train, "val": val} == json.loads((golden / "patches/cfg_s5.json").read_text())["pat_lst"]


# -------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("margin", [0, 7])
@pytest.mark.parametrize("patch_size", [2, 9, 16, 40])
def test_overlap_equals_counting_pixels(patch_size, margin):
    rng = np.random.default_rng(patch_size)
    mask = cv2.blur(rng.integers(0, 256, (30, 24), "uint8"), (5, 5)) > 127
    padded = np.pad(mask, margin)
    roi = Roi.from_mask(mask, margin, padded.shape)
    half = patch_size // 2
    for x, y in rng.integers(-10, 60, (200, 2)):
        inside = padded[max(y - half, 0) : max(y + half, 0), max(x - half, 0) : max(x + half, 0)]
        expected = max(inside.mean(), inside.sum() / mask.sum()) if inside.size else 0
        assert roi.overlap(x, y, patch_size) == pytest.approx(expected, abs=1e-12)


def test_roi_is_the_largest_contour_in_padded_coordinates():
    mask = rectangle((50, 60), 20, 10, 11, 21)
    mask[45, 50] = 1  # a speck: part of the lesion's area, not of its contour
    roi = Roi.from_mask(mask, 8, (66, 76))
    assert roi.centroid == (25 + 8, 20 + 8)
    assert roi.box == (20 + 8, 10 + 8, 11, 21)
    assert roi.overlap(28 + 5, 18 + 10, 100) == 1.0


def test_lesion_without_area_is_centred_on_its_box():
    roi = roi_of(rectangle((40, 40), 10, 20, 15, 1))
    assert roi.centroid == (10 + 15 // 2, 20)
    patches, _ = sample_lesion(roi, 1, 8, 0.75, np.random.RandomState(0))
    assert [(patch.x, patch.y) for patch in patches] == [roi.centroid]


def test_empty_mask_is_refused():
    with pytest.raises(InputError, match="marks no lesion"):
        roi_of(np.zeros((5, 5)))


def test_draws_are_x_then_y_and_background_continues_the_stream():
    """A lesion that fills its box and is far from the rest of the image: every try succeeds."""
    image = np.ones((400, 300), "float32")
    roi = roi_of(rectangle(image.shape, 40, 50, 100, 100))
    rng = np.random.RandomState(splits.SEED)
    lesion = [(rng.randint(40, 140), rng.randint(50, 150)) for _ in range(6)]
    anywhere = [(rng.randint(4, 296), rng.randint(4, 396)) for _ in range(40)]
    apart = [centre for centre in anywhere if roi.overlap(*centre, 8) < 0.35]
    assert len(apart) > 4 and len(apart) < len(anywhere)

    patches, cutoff = sample_patches(image, roi, [roi], nb_abn=6, nb_bkg=4, nb_hns=0, patch_size=8, pos_cutoff=0.1)
    assert [(patch.kind, patch.x, patch.y) for patch in patches] == [
        *(("abn", *centre) for centre in lesion),
        *(("bkg", *centre) for centre in apart[:4]),
    ]
    assert cutoff == 0.1


def test_a_cutoff_of_zero_keeps_background_off_the_lesion_altogether():
    image = np.zeros((300, 200), "float32")
    cv2.circle(image, (60, 150), 6, 1.0, cv2.FILLED)  # blobs for the hard negatives, on the lesion and off it
    cv2.circle(image, (150, 150), 6, 1.0, cv2.FILLED)
    roi = roi_of(rectangle(image.shape, 30, 40, 80, 200))
    patches, _ = sample_patches(
        image, roi, [roi], nb_abn=1, nb_bkg=30, nb_hns=5, nb_hard_neg=5, patch_size=16, neg_cutoff=0
    )
    assert [patch.kind for patch in patches].count("bkg") == 29
    assert [(patch.x, patch.y) for patch in patches if patch.kind == "blob"] == [(150, 150)]
    assert {patch.overlap for patch in patches if patch.kind != "abn"} == {0}


def test_cutoff_falls_until_the_lesion_allows_it():
    """A checkerboard larger than a patch: no patch can be more than half lesion."""
    mask = np.indices((80, 80)).sum(0) % 2
    mask = np.pad(mask, 20)
    patches, cutoff = sample_lesion(roi_of(mask), 3, 10, 0.75, np.random.RandomState(0))
    assert cutoff == pytest.approx(0.5)
    assert all(patch.overlap == pytest.approx(0.5) for patch in patches)


def test_thin_lesions_are_met_in_the_end():
    """A frame as wide as one pixel, far larger than a patch: most centres within its box have no lesion at all."""
    mask = rectangle((140, 140), 20, 20, 100, 100)
    mask[21:119, 21:119] = 0
    patches, cutoff = sample_lesion(roi_of(mask), 5, 6, 0.75, np.random.RandomState(0))
    assert cutoff < 0.4 and all(patch.overlap >= cutoff and patch.overlap > 0 for patch in patches)


def test_background_without_room_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(patch_rules, "MAX_BACKGROUND_TRIES", 50)
    mask = np.ones((40, 40))
    with pytest.raises(InputError, match="only 0 of 2 background patches"):
        sample_background([roi_of(mask)], 2, 10, 0.35, mask.shape, np.random.RandomState(0))


@pytest.mark.parametrize("corner", [(8, 8), (30, 40), (72, 92)])
def test_hard_negatives_touch_the_lesion_within_the_image(corner):
    """A lesion of 20 x 20 pixels, at a border or not: patches of 16 within 8 pixels of it, margins of 8."""
    roi = roi_of(rectangle((120, 100), *corner, 20, 20))
    patches = sample_hard_negatives(roi, [roi], 300, 16, 0.2)
    (left, top), centres = corner, np.array([patch[1:3] for patch in patches])
    lows = [max(left - 8, 8), max(top - 8, 8)]
    highs = [min(left + 28, 92) - 1, min(top + 28, 112) - 1]
    np.testing.assert_array_equal([centres.min(0), centres.max(0)], [lows, highs])
    assert all(patch.overlap == roi.overlap(patch.x, patch.y, 16) < 0.2 for patch in patches)


def test_blobs_keep_off_all_lesions_and_background_fills_up():
    image = np.full((200, 200), 20, "float32")
    spots = [(40, 40), (150, 60), (100, 150)]
    for spot in spots:
        cv2.circle(image, spot, 5, 250, -1)
    first, second = (roi_of(rectangle(image.shape, x - 20, y - 20, 40, 40)) for x, y in spots[:2])

    assert {patch[1:3] for patch in sample_blobs(image, [first], 9, 20, 0.35)} == set(spots[1:])
    assert [patch[1:3] for patch in sample_blobs(image, [first, second], 9, 20, 0.35)] == [spots[2]]
    patches, _ = sample_patches(image, first, [first, second], nb_abn=0, nb_bkg=5, nb_hns=3, patch_size=20)
    assert [patch.kind for patch in patches] == ["blob"] + ["bkg"] * 4
    assert all(max(roi.overlap(*patch[1:3], 20) for roi in (first, second)) < 0.35 for patch in patches)


def test_image_without_signal_has_no_blobs():
    assert detect_blobs(np.zeros((30, 30), "float32"), 10).shape == (0, 3)


def test_odd_patches_lose_a_pixel():
    image = np.arange(100.0).reshape(10, 10)
    patch = Patch("abn", 4, 5, 0.0)
    np.testing.assert_array_equal(cut_patch(image, patch.x, patch.y, 5), image[3:7, 2:6])


def test_split_keeps_the_share_of_cancer_and_says_when_it_cannot():
    patients = [f"P_{number:05d}" for number in range(40)]
    malignant = [number % 4 == 0 for number in range(40)]
    train, val = stratified_split(patients, malignant, 0.2)
    assert sorted(train + val) == patients
    assert sum(malignant[patients.index(name)] for name in val) == 2 and len(val) == 8
    assert stratified_split(patients, malignant, 0.2) == (train, val)
    assert stratified_split(patients, malignant, 0.0) == (patients, [])
    with pytest.raises(InputError, match=r"cannot split 4 patients \(1 with cancer\) at --val-size 0\.1"):
        stratified_split(patients[:4], malignant[:4], 0.1)
    with pytest.raises(InputError, match=r"at --test-size 0\.1 .* give another --test-size, or 0"):
        stratified_split(patients[:4], malignant[:4], 0.1, option="--test-size")
