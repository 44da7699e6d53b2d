"""The check before predicting: figures by closed forms, and each warning on the image that earns it alone."""

import json

import numpy as np
import pytest

from mammo.base.files import InputError
from mammo.evaluate import preflight
from mammo.images import pixels
from tests.helpers import SETTINGS, mammogram


@pytest.fixture(scope="module")
def trained():
    return preflight.pixel_statistics(mammogram(i, ("CC", "MLO")[i % 2]) for i in range(24))


def save(folder, settings=SETTINGS, stats=None):
    """A model's name, with its training's files beside it."""
    (folder / "model").mkdir()
    if settings is not None:
        (folder / "model" / "args.json").write_text(json.dumps(settings | {"batch_size": 4}))
    if stats is not None:
        (folder / "model" / "pixel_stats.json").write_text(json.dumps(stats))
    return folder / "model.h5"


# ------------------------------------------------------------------------------------------------- settings


def test_settings_are_the_pixel_options_of_the_training(tmp_path):
    assert pixels.read_settings(save(tmp_path)) == SETTINGS
    assert pixels.read_settings(tmp_path / "other.h5") is None


@pytest.mark.parametrize(
    "change",
    [
        {"img_size": [96]},
        {"img_size": [96, -1]},
        {"img_size": "96 72"},
        {"rescale_factor": "0.1"},
        {"featurewise_mean": None},
        {"featurewise_mean": True},
        {"equalize_hist": None},
        {"class_list": None},
        {"class_list": [1, 2]},
    ],
)
def test_settings_that_are_none_are_refused(change, tmp_path):
    model = save(tmp_path, SETTINGS | change)
    with pytest.raises(InputError, match=r"args\.json: Expected the options of a training"):
        pixels.read_settings(model)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100000, '{"img_size": [1, 2]}'])
def test_damaged_settings_and_statistics_are_refused(text, tmp_path):
    model = save(tmp_path)
    for name, read in [("args", pixels.read_settings), ("pixel_stats", preflight.read_pixel_stats)]:
        (tmp_path / "model" / f"{name}.json").write_text(text)
        with pytest.raises(InputError, match=rf"{name}\.json") as caught:
            read(model)
        assert "\n" not in str(caught.value)


def test_what_the_user_gives_wins_over_the_training_and_this_over_the_published_values(tmp_path):
    model = save(tmp_path)
    of_model = pixels.OF_MODEL
    options, source = pixels.choose_pixel_options({"img_size": of_model, "rescale_factor": None}, model)
    assert options == SETTINGS | {"rescale_factor": None}
    assert str(tmp_path / "model" / "args.json") in source
    options, source = pixels.choose_pixel_options({"featurewise_mean": 44.33, "other": 1}, tmp_path / "new.h5")
    assert options == pixels.PUBLISHED_PIXELS | {"featurewise_mean": 44.33}
    assert "published" in source
    _, source = pixels.choose_pixel_options(SETTINGS, model)
    assert source == "pixel options as given"
    for built, size in [((480, 384), [480, 384]), ((None, None), [1152, 896])]:
        assert pixels.choose_pixel_options({}, tmp_path / "new.h5", built)[0]["img_size"] == size
    assert pixels.choose_pixel_options({}, model, (480, 384))[0]["img_size"] == [96, 72]


# ------------------------------------------------------------------------------------------------ statistics


def test_figures_of_an_image_by_hand():
    image = np.zeros((100, 100), np.float32)
    image[:50, 60:] = 100  # the brightest corner: above, at the right
    figures = preflight.measure_image(image)
    assert figures["mean"] == pytest.approx(20)
    assert figures["sd"] == pytest.approx(40)  # 100 * sqrt(0.2 * 0.8)
    assert figures["p99"] == 100
    assert figures["to_left"] == figures["top_heavy"] == 1
    # Of the strips of 2 x 100 pixels the upper one is bright for 40%, the right one for 50%.
    assert figures["bright_border"] == pytest.approx((0.4 + 0.5) / 4)
    assert figures["dark_border"] == pytest.approx(1 - 0.9 / 4)
    assert figures["edge_line"] == pytest.approx(0.5)
    mirrored = preflight.measure_image(image[::-1, ::-1, np.newaxis])
    assert mirrored["to_left"] == mirrored["top_heavy"] == -1


def test_statistics_are_those_of_all_pixels_together():
    images = [mammogram(i, left=i < 3) for i in range(12)]
    stats = preflight.pixel_statistics(iter(images))
    assert stats["mean"] == pytest.approx(np.mean(images), rel=1e-5)
    assert stats["sd"] == pytest.approx(np.std(images), rel=1e-5)
    assert (stats["images"], stats["size"], stats["faces_left"]) == (12, [96, 72], 0.25)
    means = [float(image.mean(dtype=np.float64)) for image in images]
    assert stats["of_images"]["mean"] == pytest.approx(np.quantile(means, [0, 0.05, 0.5, 0.95, 1]))
    assert json.loads(json.dumps(stats)) == stats
    with pytest.raises(InputError, match="at least one"):
        preflight.pixel_statistics([])


def test_statistics_are_read_as_they_were_written(trained, tmp_path):
    model = save(tmp_path, stats=trained)
    assert preflight.read_pixel_stats(model) == trained
    assert preflight.read_pixel_stats(tmp_path / "other.h5") is None
    (tmp_path / "model" / "pixel_stats.json").write_text(json.dumps(trained | {"of_images": {"mean": [1, 2]}}))
    with pytest.raises(InputError, match="Expected statistics"):
        preflight.read_pixel_stats(model)


# -------------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_images_like_those_of_the_training_pass(trained, view):
    for seed in range(100, 120):
        image = mammogram(seed, view)
        assert preflight.warnings_for(image, trained, stored_size=(96, 72), view=view) == []
        assert preflight.warnings_for(image[..., np.newaxis], mean=30.0, view=view) == []


FAULTS = {
    "16 bits taken for 14": (lambda x: x * 4, "99th percentile"),
    "12 bits taken for 16": (lambda x: x / 16, "99th percentile"),
    "8 bits taken for 16": (lambda x: x / 257, "99th percentile"),
    "photometric interpretation": (lambda x: 160 - x, "black and white may be exchanged"),
    "upside down": (lambda x: x[::-1], "upside down"),
    "mirrored": (lambda x: x[:, ::-1], "the breast points to the left"),
    "constant": (lambda x: np.full_like(x, 7), "nearly constant"),
    "nearly constant": (lambda x: 100 + x / 100, "nearly constant"),
    "frame": (lambda x: np.pad(x[:, :-1], ((0, 0), (0, 1)), constant_values=180), "white line along the border"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_alone(trained, name):
    spoil, expected = FAULTS[name]
    for seed in range(100, 105):
        messages = preflight.warnings_for(spoil(mammogram(seed, "MLO")), trained, view="MLO")
        others = [text for text in messages if "mean pixel" not in text]  # inverted pixels are brighter, too
        told = messages if "percentile" in expected else others
        assert len(told) == 1
        assert expected in told[0]


@pytest.mark.parametrize(
    ("factor", "mean", "expected"),
    [
        (257, 30, "0..255"),
        (1 / 257, 30, "0..255"),
        (1, 150, "mean that is subtracted, 150"),
        (1, 9, "is subtracted, 9 "),
    ],
)
def test_scale_and_mean_are_checked_without_statistics_too(factor, mean, expected):
    [message] = preflight.warnings_for(mammogram() * factor, mean=mean)
    assert expected in message


def test_tiny_and_turned_images_are_told_by_their_stored_size(trained):
    [message] = preflight.warnings_for(mammogram(), trained, stored_size=(40, 40))
    assert "tiny image: 40 x 40" in message
    [message] = preflight.warnings_for(mammogram(), trained, stored_size=(96, 128))
    assert "wider than high (96 x 128)" in message


def test_what_is_usual_in_training_is_no_warning():
    framed = [np.pad(mammogram(i)[:, :-1], ((0, 0), (0, 1)), constant_values=100) for i in range(24)]
    both = [mammogram(i, left=i % 2 == 0) for i in range(24)]
    assert preflight.warnings_for(framed[0], preflight.pixel_statistics(framed)) == []
    assert preflight.warnings_for(mammogram(30, left=True), preflight.pixel_statistics(both)) == []
    inverted = [110 - mammogram(i) for i in range(24)]
    assert preflight.warnings_for(inverted[3], preflight.pixel_statistics(inverted)) == []


def test_few_training_images_say_nothing_of_orientation():
    few = preflight.pixel_statistics(mammogram(i) for i in range(5))
    assert preflight.warnings_for(mammogram(30, left=True), few) == []


def test_real_mammograms_pass_as_they_are_and_not_inverted(real_mammograms):
    for path in real_mammograms:
        image = pixels.read_resize_img(path, (288, 224), rescale_factor=0.003891)
        assert preflight.warnings_for(image, mean=20.0, stored_size=(3328, 2560)) == []
        [message] = preflight.warnings_for(255 - image, mean=200.0)
        assert "black and white" in message
