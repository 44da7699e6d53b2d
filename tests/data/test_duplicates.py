"""Fingerprints of pictures: equal for copies in whatever form, different for different patients; and the pairs."""

import cv2
import numpy as np
import pytest

from mammo.data import duplicates
from mammo.data.duplicates import MAX_DIFFERENCE, find_near_duplicates, fingerprint
from mammo.data.prepare import make_whole
from mammo.images.reading import auto_levels
from mammo.phantom.draw import draw_patients, draw_view


def as_jpeg(img, quality):
    eight_bit = (img >> 8).astype(np.uint8)
    data = cv2.imencode(".jpg", eight_bit, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)


def map_grey(img, function):
    return np.rint(65535 * np.clip(function(img / 65535), 0, 1)).astype(np.uint16)


def halve(img):
    return cv2.resize(img, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)


COPIES = {
    "8 bits": lambda img: (img >> 8).astype(np.uint8),
    "half the size": halve,
    "another aspect": lambda img: cv2.resize(img, (224, 224), interpolation=cv2.INTER_CUBIC),
    "JPEG": lambda img: as_jpeg(img, 90),
    "poor JPEG": lambda img: as_jpeg(img, 20),
    "small JPEG": lambda img: as_jpeg(halve(img), 60),
    "darker": lambda img: map_grey(img, lambda x: 0.4 * x),
    "less contrast": lambda img: map_grey(img, lambda x: 0.2 + 0.5 * x),
    "auto levels": auto_levels,
    "gamma": lambda img: map_grey(img, lambda x: x**0.8),
    "inverse gamma": lambda img: map_grey(img, lambda x: x**1.25),
    "noise": lambda img: map_grey(img, lambda x: x + np.random.default_rng(0).normal(0, 0.02, x.shape)),
    "mirrored": lambda img: img[:, ::-1],
    "prepared": lambda img: make_whole(img, (144, 112), face="left", levels=True),
}


def difference(one, other):
    bits = [np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)) for text in (one, other)]
    return np.mean(bits[0] != bits[1])


@pytest.fixture(scope="session")
def drawn():
    """Mammograms of 100 patients, CC, by side: their likest neighbours have the same outline."""
    return [draw_view(patient, "CC", 3, 288, 224)[0] for patient in draw_patients(100, 0.4, 0.4, 3)]


def test_bits_are_those_of_the_definition():
    """By the sum that defines the cosine transform of a picture of 64 x 64 pixels that faces left."""
    img = np.random.default_rng(1).integers(0, 65535, (64, 64)).astype(np.uint16)
    img[:, 32:] |= 1 << 15
    cosines = np.cos(np.pi / 64 * np.outer(np.arange(32), np.arange(64) + 0.5))
    cosines[0] /= np.sqrt(2)
    strength = cosines @ img @ cosines.T
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(fingerprint(img)), np.uint8)).reshape(32, 32)
    np.testing.assert_array_equal(bits, strength > np.median(strength))


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_near_duplicates(drawn, name):
    assert max(difference(fingerprint(img), fingerprint(COPIES[name](img))) for img in drawn[:20]) <= MAX_DIFFERENCE


def test_different_patients_are_not(drawn):
    prints = [fingerprint(img) for img in drawn]
    differences = [difference(one, other) for n, one in enumerate(prints) for other in prints[:n]]
    assert min(differences) > 1.5 * MAX_DIFFERENCE


def test_real_mammograms_match_their_copies_alone(real_mammograms):
    images = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in real_mammograms]
    prints = [fingerprint(img) for img in images]
    for n, one in enumerate(prints):
        assert all(difference(one, other) > 4 * MAX_DIFFERENCE for other in prints[:n])
        for copy in COPIES.values():
            assert difference(one, fingerprint(copy(images[n]))) <= MAX_DIFFERENCE


def flip_bits(text, number, rng):
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    bits[rng.permutation(len(bits))[:number]] ^= 1
    return np.packbits(bits).tobytes().hex()


@pytest.mark.parametrize("block", [7, 2048])
def test_all_pairs_of_different_patients_are_found(monkeypatch, block):
    """Against a comparison of every pair, with as many bits flipped as just do, or do not."""
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    rng = np.random.default_rng(0)
    prints = [rng.bytes(128).hex() for _ in range(30)]
    limit = int(MAX_DIFFERENCE * 1024)
    prints += [flip_bits(prints[0], limit, rng), flip_bits(prints[1], limit + 1, rng), prints[2], prints[29], prints[3]]
    patients = [f"P_{n}" for n in range(len(prints))]
    patients[34] = patients[3]
    expected = [
        (n, m, difference(prints[n], prints[m]))
        for n in range(len(prints))
        for m in range(n + 1, len(prints))
        if patients[n] != patients[m] and difference(prints[n], prints[m]) <= MAX_DIFFERENCE
    ]
    assert [pair[:2] for pair in expected] == [(0, 30), (2, 32), (29, 33)]
    assert find_near_duplicates(prints, patients) == expected
    assert find_near_duplicates([], []) == []


def test_pairs_are_no_more_than_can_be_kept(monkeypatch):
    monkeypatch.setattr(duplicates, "MAX_PAIRS", 10)
    pairs = find_near_duplicates(["00" * 128] * 20, list(map(str, range(20))))
    assert [pair[:2] for pair in pairs] == [(0, other) for other in range(1, 11)]
