"""Features of heatmap regions: against the published program's, closed forms, and a second implementation."""

import json

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import ConvexHull
from skimage.measure import label, regionprops

from dm_inference import make_pred_case
from mammo.base.files import InputError
from mammo.maps.trees import global_max_intensity, prob_heatmap_features, region_features, topK_region_idx, total_area


def regions_of(map_, cutoff=0.5):
    return regionprops(label(map_ >= cutoff), map_)


def test_features_match_golden(golden):
    maps = np.load(golden / "heatmap/heatmaps.npz")
    for case in json.loads((golden / "heatmap/region_features.json").read_text()):
        name = case["map"]
        map_ = None if name == "none" else maps[name if name in maps else f"map_{name}"]
        features = prob_heatmap_features(map_, case["cutoff"], case["k"], case["nb_cls"])
        assert len(features) == len(case["features"]) == case["nb_cls"] - 1
        for ours, theirs in zip(features, case["features"], strict=True):
            assert set(ours) == set(theirs)
            for key, value in theirs.items():
                np.testing.assert_allclose(ours[key], value, rtol=1e-9, atol=1e-12, err_msg=f"{case['map']} {key}")


# ------------------------------------------------------------------------------------------------- closed forms


def ellipse(semi_major, semi_minor, degrees):
    """Mask of an ellipse; degrees: its major axis from the rows' direction, counter-clockwise as seen."""
    y, x = np.mgrid[-90:91, -90:91]
    angle = np.deg2rad(degrees)
    along, across = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    return (along / semi_major) ** 2 + (across / semi_minor) ** 2 <= 1


@pytest.mark.parametrize("degrees", [-80, -45, -20, 10, 45, 70])
@pytest.mark.parametrize(("semi_major", "semi_minor"), [(80, 40), (60, 50), (70, 20)])
def test_ellipses(semi_major, semi_minor, degrees):
    mask = ellipse(semi_major, semi_minor, degrees)
    (region,) = regions_of(np.where(mask, 0.8, 0.1))
    found = region_features(region)
    close = {
        "area": np.pi * semi_major * semi_minor,
        "major_axis_length": 2 * semi_major,
        "minor_axis_length": 2 * semi_minor,
        "eig1": semi_major**2 / 4,
        "eig2": semi_minor**2 / 4,
        "eccentricity": np.sqrt(1 - (semi_minor / semi_major) ** 2),
        "equivalent_diameter": 2 * np.sqrt(semi_major * semi_minor),
    }
    for name, value in close.items():
        assert found[name] == pytest.approx(value, rel=0.01), name
    # Ramanujan's circumference; the sum over pixel steps is within a few percent of it.
    h = ((semi_major - semi_minor) / (semi_major + semi_minor)) ** 2
    circumference = np.pi * (semi_major + semi_minor) * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h)))
    assert found["perimeter"] == pytest.approx(circumference, rel=0.06)
    assert found["orientation"] == pytest.approx(np.deg2rad(degrees), abs=0.01)
    assert found["solidity"] == found["area_ratio"] > 0.97
    assert found["area_ratio2"] == 1
    assert found["euler_number"] == 1
    assert found["max_intensity"] == 0.8
    assert found["mean_intensity"] == pytest.approx(0.8)


def test_a_rectangle_with_a_hole():
    map_ = np.zeros((20, 30))
    map_[4:10, 5:25] = 0.5  # 6 x 20, at the cut-off
    map_[6:8, 10:15] = 0.2
    map_[5, 6] = 1.0
    (region,) = regions_of(map_)
    found = region_features(region)
    assert found["area"] == 110
    assert found["extent"] == pytest.approx(110 / 120)
    assert found["solidity"] == pytest.approx(110 / 120)
    assert found["area_ratio2"] == pytest.approx(110 / 120)
    assert found["euler_number"] == 0
    assert found["max_intensity"] == 1.0
    assert found["mean_intensity"] == pytest.approx((109 * 0.5 + 1) / 110)
    assert found["orientation"] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("turned", [False, True])
def test_lines_along_rows_and_columns(turned):
    map_ = np.zeros((9, 9))
    map_[3, 2:7] = 0.7
    (region,) = regions_of(map_.T if turned else map_)
    found = region_features(region)
    assert found["eig1"] == 2  # the variance of five cells in a row
    assert found["eig2"] == 0
    assert found["eccentricity"] == 1
    assert abs(found["orientation"]) == pytest.approx(np.pi / 2 if turned else 0)


# -------------------------------------------------------------------------------------- a second implementation


def second_implementation(map_, cutoff):
    """Features of all regions by scipy.ndimage and plain sums, largest first."""
    labels, count = ndimage.label(map_ >= cutoff, structure=np.ones((3, 3)))
    found = []
    for i in range(1, count + 1):
        rows, columns = np.nonzero(labels == i)
        image = labels[ndimage.find_objects(labels)[i - 1]] == i
        covariance = np.cov(np.stack([columns, -rows]), bias=True)
        values, vectors = np.linalg.eigh(covariance)
        x, y = vectors[:, 1]
        found.append(
            {
                "area": len(rows),
                "area_ratio2": len(rows) / ndimage.binary_fill_holes(image).sum(),
                "eig1": values[1],
                "eig2": max(values[0], 0),
                "extent": len(rows) / image.size,
                "max_intensity": map_[rows, columns].max(),
                "mean_intensity": map_[rows, columns].mean(),
                "major_axis_length": 4 * np.sqrt(values[1]),
                "minor_axis_length": 4 * np.sqrt(max(values[0], 0)),
                "equivalent_diameter": np.sqrt(4 * len(rows) / np.pi),
                "direction": (x, y) if values[1] > values[0] + 1e-9 else None,
                "image": image,
            }
        )
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_second_implementation_agrees_on_random_maps(seed):
    rng = np.random.default_rng(seed)
    map_ = ndimage.gaussian_filter(rng.random((40, 31)), 1.5)
    map_ = (map_ - map_.min()) / np.ptp(map_)
    expected = second_implementation(map_, 0.6)
    phm = np.stack([1 - map_, map_], axis=-1)
    (found,) = prob_heatmap_features(phm, 0.6, len(expected) + 2, nb_cls=2)
    assert found["nb_regions"] == len(expected) > 2
    assert found["total_area"] == (map_ >= 0.6).sum()
    assert found["global_max_intensity"] == 1
    areas = [found[f"top{i + 1}_area"] for i in range(len(expected) + 2)]
    assert areas == sorted((r["area"] for r in expected), reverse=True) + [0, 0]
    ours = [
        {k.split("_", 1)[1]: v for k, v in found.items() if k.startswith(f"top{i + 1}_")} for i in range(len(areas))
    ]
    # Regions of equal area may stand in either order: pair them by what distinguishes them.
    ours = sorted(ours[: len(expected)], key=lambda r: (r["area"], r["mean_intensity"]))
    for mine, theirs in zip(ours, sorted(expected, key=lambda r: (r["area"], r["mean_intensity"])), strict=True):
        image, direction = theirs.pop("image"), theirs.pop("direction")
        for name, value in theirs.items():
            assert mine[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
        if direction:
            along = np.array([np.cos(mine["orientation"]), np.sin(mine["orientation"])])
            assert abs(along @ direction) == pytest.approx(1)
        # The hull's pixels, without and with those whose centre lies on its outline.
        pixels = np.argwhere(image)
        corners = np.concatenate([pixels + s for s in ([-0.5, 0], [0.5, 0], [0, -0.5], [0, 0.5])])
        sides, centres = ConvexHull(corners).equations, np.argwhere(np.ones_like(image))
        outside = (centres @ sides[:, :2].T + sides[:, 2]).max(axis=1)
        inner, outer = ((outside < tolerance).sum() for tolerance in (-1e-6, 1e-6))
        assert mine["area"] / outer <= mine["solidity"] <= mine["area"] / max(inner, len(pixels))


# -------------------------------------------------------------------------------------------------------- parts


def test_parts_of_several_regions():
    map_ = np.zeros((10, 12))
    map_[0:2, 0:2] = 0.6
    map_[4:6, 4:6] = 0.9
    map_[8, 8:11] = 0.7
    map_[4:9, 0] = 0.8
    regions = regions_of(map_)
    assert [int(r.area) for r in regions] == [4, 4, 5, 3] or [int(r.area) for r in regions] == [4, 5, 4, 3]
    assert total_area(regions) == 16
    assert global_max_intensity(regions) == 0.9
    top = topK_region_idx(regions, 3)
    assert [int(regions[i].area) for i in top] == [5, 4, 4]
    assert top[1] > top[2]  # of equal ones the later first
    assert topK_region_idx(regions) == top[:1]
    assert len(topK_region_idx(regions, 9)) == 4
    assert (total_area([]), global_max_intensity([]), topK_region_idx([], 2)) == (0, 0.0, [])


def test_classes_of_any_number_and_missing_maps():
    phm = np.zeros((5, 4, 3))
    phm[2, 2, 2] = 0.9
    none, one = prob_heatmap_features(phm, 0.5, 1)
    assert (none["nb_regions"], one["nb_regions"]) == (0, 1)
    assert {k[5:]: v for k, v in none.items() if k.startswith("top1_")} == region_features(None)
    missing = prob_heatmap_features(None, 0.5, 1, nb_cls=3)
    assert [list(features) for features in missing] == [list(none), list(one)]
    assert all(np.isnan(value) for features in missing for value in features.values())


@pytest.mark.parametrize(
    ("phm", "nb_cls", "text"),
    [
        (np.zeros((0, 4, 5)), 5, r"Received shape \(0, 4, 5\)"),
        (np.zeros((4, 4)), 3, r"Expected a heatmap \(rows, columns, 3\).*\(4, 4\)"),
        (np.zeros((4, 4, 3)), 5, r"columns, 5\).*\(4, 4, 3\)"),
        (np.full((4, 4, 3), np.nan), 3, "finite"),
    ],
)
def test_other_maps_are_refused(phm, nb_cls, text):
    with pytest.raises(InputError, match=text):
        prob_heatmap_features(phm, 0.5, 1, nb_cls)


# -------------------------------------------------------------------------------------------------------- breasts


class OfColumn:
    """Stand-in for a fitted classifier: the probability is one of the features, or 0 where that is missing."""

    def __init__(self, column):
        self.column = column

    def predict_proba(self, features):
        score = np.nan_to_num(np.asarray(features)[:, self.column])
        return np.stack([1 - score, score], axis=1)


def test_a_breast_is_the_highest_or_the_mean_of_its_pairs_of_maps():
    """Features in the order view, cut-off, class, name; the classifiers are averaged."""
    values = np.array([[0.2, 0.6], [0.3, 0.9], [0.4, 0.5]])  # of the two classes that are not background
    maps = [np.broadcast_to([0, *value], (4, 4, 3)) for value in values]
    cc, mlo, name = maps[:2], maps[1:], "global_max_intensity"
    classifiers = [OfColumn(0), OfColumn(5)]  # cc, 0.1, first class; mlo, 0.1, second class; two cut-offs, two classes
    pairs = np.add.outer(values[:2, 0], values[1:, 1]) / 2
    assert make_pred_case(cc, mlo, name, [0.1, 0.95], classifiers) == pytest.approx(pairs.max())
    assert make_pred_case(cc, mlo, [name], [0.1, 0.95], classifiers, 2, None, True) == pytest.approx(pairs.mean())
    assert make_pred_case(cc, mlo, name, [0.1, 0.95], classifiers, nb_phm=1) == pytest.approx(pairs[0, 0])
    assert make_pred_case(cc, mlo, name, [0.95, 0.1], classifiers) == 0
    assert make_pred_case(cc, None, ["nb_regions", name], [0.1], [OfColumn(1)]) == pytest.approx(0.3)
    assert make_pred_case([], mlo, name, [0.1], [OfColumn(3)]) == pytest.approx(0.9)
    with pytest.raises(InputError, match="none of either"):
        make_pred_case(None, [], name, [0.1], classifiers)
