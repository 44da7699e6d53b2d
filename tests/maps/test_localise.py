"""Pointing game and free-response ROC on cases worked out by hand."""

import cv2
import numpy as np
import pytest

from ddsm_train import localise
from mammo.base.files import InputError
from mammo.maps.files import Grid, HeatmapRecord, load_heatmaps, save_heatmaps
from mammo.maps.localise import MapHits, find_marks, froc, mark_image, summarise
from tests.helpers import read_csv

GRID = Grid((40, 60), (5.0, 5.0), (10.0, 10.0))  # 4 x 6 cells of 10 pixels


def square(top, left, size=6):
    mask = np.zeros((40, 60), bool)
    mask[top : top + size, left : left + size] = True
    return mask


def marked(scores, hits, pointed=None, chance=0.1):
    hits = np.array(hits, bool)
    return MapHits("image", np.array(scores, float), hits, pointed, chance)


def test_marks_are_the_largest_values_within_the_radius():
    values = np.zeros((4, 6))
    values[0, 0], values[0, 1], values[0, 3], values[3, 5] = 0.9, 0.8, 0.5, 0.7
    positions, scores = find_marks(values, GRID, radius=10)
    assert scores.tolist() == [0.9, 0.7, 0.5]
    assert positions.tolist() == [[5, 5], [35, 55], [5, 35]]
    positions, scores = find_marks(values, GRID, radius=30)
    assert scores.tolist() == [0.9, 0.7]
    assert find_marks(np.zeros((4, 6)), GRID, 10)[1].size == 0
    # Of a plateau, one mark.
    assert find_marks(np.ones((1, 1)), GRID, 10)[0].tolist() == [[5, 5]]
    assert len(find_marks(np.full((4, 6), 0.5), GRID, 10)[1]) == 1


def test_radius_is_in_pixels_whatever_the_strides():
    values = np.array([[3.0, 0, 2, 0, 1]])
    wide, narrow = (Grid((40, 60), (5.0, 5.0), (10.0, stride)) for stride in (10.0, 2.0))
    assert find_marks(values, wide, 10)[1].tolist() == [3, 2, 1]
    assert find_marks(values, narrow, 10)[1].tolist() == [3]


def test_hits_reach_half_a_cell_beside_the_lesion():
    values = np.zeros((4, 6))
    values[1, 1], values[3, 4] = 0.9, 0.8  # at (15, 15) and (35, 45): pixels 15, 15 and 35, 45
    breast = np.ones((40, 60), bool)
    # The first lesion ends 5 pixels above the first mark; the second 6 pixels beside the second.
    masks = [square(5, 13), square(32, 34)]
    image = mark_image("a", values, GRID, masks, breast, (10, 10), smooth=0)
    assert image.scores.tolist() == [0.9, 0.8]
    assert image.hits.tolist() == [[True, False], [False, False]]
    assert image.pointed is True
    # Chance: all pixels at most 5 away from a lesion, counted one by one.
    y, x = np.mgrid[:40, :60]
    near = np.zeros((40, 60), bool)
    for row, column in np.argwhere(masks[0] | masks[1]):
        near |= (y - row) ** 2 + (x - column) ** 2 <= 25
    assert image.chance == pytest.approx(near.mean())
    breast[:, 30:] = False
    assert mark_image("a", values, GRID, masks, breast, (10, 10), 0).chance == pytest.approx(near[:, :30].mean())


def test_pointing_without_lesions_or_values():
    breast = np.ones((40, 60), bool)
    image = mark_image("a", np.ones((4, 6)), GRID, [], breast, (10, 10))
    assert image.pointed is None and image.chance == 0 and image.hits.shape == (1, 0)
    assert mark_image("a", np.zeros((4, 6)), GRID, [square(5, 5)], breast, (10, 10)).pointed is False


def test_smoothing_brings_a_plateau_to_its_middle():
    values = np.zeros((4, 60))
    values[1, 20:31] = 1  # its lesion is in the middle
    values[1, 20] += 1e-6
    grid = Grid((40, 60), (5.0, 0.5), (1.0, 1.0))
    breast = np.ones((40, 60), bool)
    lesion = [square(4, 24, 3)]
    assert mark_image("a", values, grid, lesion, breast, (1, 10), smooth=0).pointed is False
    assert mark_image("a", values, grid, lesion, breast, (1, 10)).pointed is True


def test_free_response_roc_by_hand():
    images = [
        # Two lesions: the first is hit twice, the second never; one false positive.
        marked([0.9, 0.6, 0.4], [[1, 0], [0, 0], [1, 0]], True),
        # One lesion, hit at 0.5, and a false positive above it.
        marked([0.8, 0.5], [[0], [1]], False),
        # None; a mark is a false positive.
        marked([0.6], np.zeros((1, 0))),
        marked([], np.zeros((0, 0))),
    ]
    thresholds, false_positives, sensitivity = froc(images)
    assert thresholds.tolist() == [np.inf, 0.9, 0.8, 0.6, 0.5]
    assert (false_positives * 4).tolist() == [0, 0, 1, 3, 3]
    assert sensitivity * 3 == pytest.approx([0, 1, 1, 1, 2])
    summary = summarise(images)
    assert (summary["images"], summary["images_with_lesions"], summary["lesions"]) == (4, 2, 3)
    assert (summary["pointing_hits"], summary["pointing_accuracy"], summary["chance"]) == (1, 0.5, pytest.approx(0.1))
    assert [summary[f"sensitivity_at_{rate}"] * 3 for rate in ("0.25", "0.5", "1", "8")] == pytest.approx([1, 1, 2, 2])
    assert summary["sensitivity_mean"] == pytest.approx((1 + 1 + 2 * 4) / 18)


def test_without_lesions_nothing_can_be_judged():
    with pytest.raises(InputError, match="Expected lesion masks of at least one image"):
        froc([marked([0.5], np.zeros((1, 0)))])


# ----------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def study(tmp_path):
    """Two images of 40 x 60, a malignant and a benign lesion, maps that find the malignant one."""
    records, lines = [], ["patient_id,side,view,abn_num,pathology,type"]
    (tmp_path / "masks").mkdir()
    for number, (name, pathology) in enumerate((("P_1", "MALIGNANT"), ("P_2", "BENIGN"))):
        img = np.zeros((80, 120), np.uint8)  # twice as large as scored
        img[4:70, 6:110] = 200
        cv2.imwrite(str(tmp_path / f"{name}.png"), img)
        mask = np.kron(square(12, 32), np.ones((2, 2), bool))
        cv2.imwrite(str(tmp_path / "masks" / f"Mass-Training_{name}_LEFT_CC_1.png"), mask.astype(np.uint8) * 255)
        lines.append(f"{name},LEFT,CC,1,{pathology},mass")
        heatmap = np.zeros((4, 6, 3), np.float32)
        heatmap[1, 3 - 2 * number, 1], heatmap[3, 5, 2] = 0.8, 0.1
        heatmap[..., 0] = 1 - heatmap.sum(-1)
        records.append(
            HeatmapRecord(name, "LEFT", 1 - number, heatmap, None, str(tmp_path / f"{name}.png"), None, GRID)
        )
    (tmp_path / "rois.csv").write_text("\n".join(lines) + "\n")
    for ending in ("npz", "pkl"):
        save_heatmaps(tmp_path / f"maps.{ending}", records, class_names=["none", "a", "b"], strides=(10, 10))
    return tmp_path


def judge(study, *args):
    """The exit status for the maps and masks of the study."""
    args = ["--roi-mask-dir", study / "masks", "--out-dir", study / "out", study / "maps.npz", *args]
    return localise.main([*map(str, args)])


def test_results_of_map_files(study, capsys):
    assert judge(study, study / "maps.pkl") == 0
    said = capsys.readouterr().out
    assert "points at a lesion in 1 of 2 images (0.500; chance 0.1" in said
    npz, pkl = read_csv(study / "out" / "localisation.csv")
    assert npz.pop("maps") == str(study / "maps.npz") and pkl.pop("maps") == str(study / "maps.pkl")
    assert npz == pkl and float(npz["sensitivity_at_8"]) == 0.5 and npz["lesions"] == "2"
    curve = [row for row in read_csv(study / "out" / "froc.csv") if row["maps"].endswith("npz")]
    assert [float(row["sensitivity"]) for row in curve] == [0, 0.5, 0.5]
    assert [float(row["fp_per_image"]) for row in curve] == [0, 0.5, 1.5]
    assert cv2.imread(str(study / "out" / "froc.png")) is not None

    assert judge(study, study / "maps.pkl", "--malignant", study / "rois.csv", "--classes", "a") == 0
    row = read_csv(study / "out" / "localisation.csv")[0]
    assert (row["lesions"], row["images"], row["pointing_accuracy"]) == ("1", "2", "1.0")


def test_lesions_are_found_by_type_image_and_number_whatever_the_set(study, capsys):
    for path in (study / "masks").iterdir():
        path.rename(path.with_name(path.name.replace("Training", "Test")))
    assert judge(study, "--malignant", study / "rois.csv") == 0
    assert "Warning" not in capsys.readouterr().out
    assert read_csv(study / "out" / "localisation.csv")[0]["lesions"] == "1"


def test_lesions_without_masks_are_counted(study, capsys):
    table = study / "rois.csv"
    more = "P_1,LEFT,CC,2,MALIGNANT,calc\nP_9,LEFT,CC,1,MALIGNANT,calc\n"  # P_9 is not in the map file
    table.write_text(table.read_text() + more)
    assert judge(study, "--malignant", table) == 0
    assert "1 of 2 malignant lesions of its images have no mask" in capsys.readouterr().out
    (study / "masks" / "Mass-Training_P_1_LEFT_CC_1.png").unlink()
    assert judge(study) == 0
    said = capsys.readouterr().out
    assert "1 of 1 breasts with cancer have no mask, and count as free of it" in said and "malignant" not in said


def test_a_map_of_nan_is_refused(study, capsys):
    maps = load_heatmaps(study / "maps.npz")
    maps.records[0].cc[:] = np.nan
    save_heatmaps(study / "nan.npz", maps.records, class_names=maps.class_names, strides=(10, 10))
    assert localise.main(["--roi-mask-dir", str(study / "masks"), str(study / "nan.npz")]) == 1
    assert "nan.npz: not a whole map file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["maps.npz", "--roi-mask-dir", "none"], "no such folder"),
        (["none.npz"], "Expected a map file. Received no file"),
        (["maps.npz", "--classes", "x"], "no class x: Expected none, a, b"),
        (["old.pkl"], "holds no class names"),
        (["maps.npz", "--roi-mask-dir", "empty"], "Expected lesion masks of at least one image"),
    ],
)
def test_wrong_input_ends_in_one_line(study, monkeypatch, capsys, args, message):
    import pickle

    monkeypatch.chdir(study)
    (study / "empty").mkdir()
    old = [{"patient_id": "P_1", "side": "LEFT", "cancer": 1, "cc": np.ones((2, 2, 3)), "mlo": None}]
    (study / "old.pkl").write_bytes(pickle.dumps(old))
    assert localise.main(["--roi-mask-dir", "masks", *args]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (study / "localisation").exists()


def test_a_mask_of_another_image_is_refused(study, capsys):
    cv2.imwrite(str(study / "masks" / "Mass-Training_P_1_LEFT_CC_1.png"), np.full((50, 50), 255, np.uint8))
    assert judge(study) == 1
    error = capsys.readouterr().err
    assert "Mass-Training_P_1_LEFT_CC_1.png: the mask" in error and "does not fit" in error
    assert error.count("\n") == 1
