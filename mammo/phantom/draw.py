"""Draw synthetic mammograms with lesions. `mammo phantom` writes data sets of them.

The pictures are drawn, not acquired: they let one run the whole programme, and see that it learns, without
patient data. They are no substitute for patients, and a figure measured on them says nothing about patients.

The anatomical texture is power-law noise, whose power spectrum falls with the third power of the frequency
(Burgess, Jacobson and Judy 2001, "Human observer detection experiments with mammograms and power-law noise").
Benign masses are smooth ellipses, malignant ones irregular and spiculated; benign calcifications are round
and even, malignant ones linear, branching and uneven (the descriptors of BI-RADS).

Pictures come in two styles: as digitised film, and as a digital detector with its maker's processing gives them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mammo.base.files import InputError, write_text
from mammo.base.work import run_parallel


class Patient(NamedTuple):
    """Hold what all images of one patient share. findings: (type, pathology) of each, type calc or mass."""

    name: str
    index: int
    side: str
    findings: list[tuple[str, str]]

    @property
    def malignant(self) -> bool:
        return any(pathology == "MALIGNANT" for _, pathology in self.findings)


class Breast(NamedTuple):
    """Hold one breast at the left edge of a picture: arrays of shape (height, width)."""

    brightness: np.ndarray  # float32, 0..1
    thickness: np.ndarray  # float32, 1 inside, falling to 0 at the skin: lesions fade with it
    clearance: np.ndarray  # float32, pixels to the nearest of skin, muscle and image border; below 0 outside


def power_law_noise(shape: tuple[int, int], rng: np.random.Generator, exponent: float = 3.0) -> np.ndarray:
    """Return periodic isotropic Gaussian noise with power spectrum 1 / frequency^exponent: mean 0, variance 1."""
    from scipy import fft

    height, width = shape
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).astype("float32")
    frequency[0, 0] = np.inf  # no constant part
    spectrum = fft.rfft2(rng.standard_normal(shape, dtype="float32")) * frequency ** (-exponent / 2)
    noise = fft.irfft2(spectrum, s=shape)
    return noise / noise.std()


def draw_breast(height: int, width: int, view: str, rng: np.random.Generator) -> Breast:
    """Draw a left breast of the view CC or MLO, at the left edge: see `Breast`."""
    x = np.arange(width, dtype="float32") / width
    y = np.arange(height, dtype="float32")[:, None] / height
    outline, muscle_edge, nipple = _outline(y, view, rng)
    inside = (x < outline).astype("uint8")
    skin_distance = _distance(inside) / height
    muscle = 1 / (1 + np.exp(np.clip((x - muscle_edge) / 0.010, -50, 50)))

    texture = power_law_noise((height, width), rng)
    depth = x / max(outline.max(), 1e-6)
    gland_centre, gland_reach = rng.uniform(0.45, 0.6), rng.uniform(0.2, 0.3)
    gland = np.exp(-(((depth - gland_centre) / 0.33) ** 2) - ((y - nipple) / gland_reach) ** 2)
    dense = 1 / (1 + np.exp(-(1.4 * texture + 3.0 * gland + rng.uniform(-2.2, -1.0))))
    tissue = 0.20 + 0.24 * dense + 0.03 * texture
    tissue += muscle * (0.52 + 0.02 * texture - tissue)

    # The compressed breast has a round edge, about as thick as it is wide.
    to_full_thickness = np.clip(skin_distance / rng.uniform(0.06, 0.10), 0, 1)
    thickness = np.sqrt(1 - (1 - to_full_thickness) ** 2) * inside
    skin = 0.10 * np.exp(-((skin_distance / 0.005) ** 2)) * inside
    brightness = tissue * thickness + skin

    columns, rows = np.arange(width), np.arange(height)[:, None]
    clearance = np.minimum(skin_distance * height, np.minimum(columns, rows))
    clearance = np.minimum(clearance, np.minimum(width - 1 - columns, height - 1 - rows))
    clearance = np.minimum(clearance, _distance((muscle < 0.5).astype("uint8")))
    clearance[inside == 0] = -1
    return Breast(brightness.astype("float32"), thickness.astype("float32"), clearance.astype("float32"))


def _outline(y, view, rng):
    """Draw breast edge and muscle edge of each row (fractions of the width), and the height of the nipple."""
    reach = rng.uniform(0.48, 0.66)
    bend, fullness = rng.uniform(1.9, 2.4), rng.uniform(0.5, 0.62)
    if view == "CC":
        nipple, upper, lower = rng.uniform(0.46, 0.54), rng.uniform(0.36, 0.43), rng.uniform(0.36, 0.43)
        axilla = 0.0
    else:
        nipple, lower = rng.uniform(0.56, 0.64), rng.uniform(0.26, 0.34)
        upper, axilla = nipple, rng.uniform(0.42, 0.58)
    t = np.where(y < nipple, (nipple - y) / upper, (y - nipple) / lower)
    edge = np.clip(1 - t**bend, 0, 1) ** fullness
    edge = np.where(y < nipple, axilla + (1 - axilla) * edge, edge) * reach
    waves = sum(rng.normal(0, 0.01) * np.sin(2 * np.pi * (k * y + rng.random())) for k in (1, 2, 3))
    edge = edge * (1 + waves)
    edge = edge + 0.022 * np.exp(-(((y - nipple) / 0.018) ** 2))
    edge = np.where((axilla == 0) & (t >= 1), 0, edge)
    if view == "CC":
        return edge, np.full_like(y, -1), nipple
    muscle_width, muscle_height = reach * axilla * rng.uniform(0.7, 0.9), rng.uniform(0.45, 0.7)
    muscle_edge = muscle_width * (1 - y / muscle_height)
    return edge, muscle_edge + 0.03 * np.sin(np.pi * np.clip(y / muscle_height, 0, 1)) * muscle_width, nipple


def _distance(inside):
    """Return the pixels to the nearest zero of a uint8 mask; beyond the image its edge goes on."""
    pad = max(inside.shape) // 4
    padded = cv2.copyMakeBorder(inside, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    return cv2.distanceTransform(padded, cv2.DIST_L2, 5)[pad:-pad, pad:-pad]


def draw_mass(malignant: bool, radius: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a mass of about `radius` pixels: float32 (n, n) with n odd, peak 1, 0 outside the lesion."""
    half = int(np.ceil(1.5 * radius)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype("float32") / radius
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    if not malignant:
        turn, ratio = rng.uniform(0, np.pi), rng.uniform(0.7, 0.95)
        along = x * np.cos(turn) + y * np.sin(turn)
        across = (y * np.cos(turn) - x * np.sin(turn)) / ratio
        mass = np.sqrt(np.clip(1 - along**2 - across**2, 0, 1))
        return _finish(mass, 0.04 * radius)
    edge = 0.55 * np.ones_like(angle)
    for k in range(2, 8):
        edge += 0.55 * rng.normal(0, 0.22 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    mass = np.sqrt(np.clip(1 - distance / np.clip(edge, 0.2, None), 0, 1))
    spicules = np.zeros(mass.shape, np.uint8)
    for start in rng.uniform(0, 2 * np.pi, rng.integers(24, 40)):
        reach = np.linspace(0.2, rng.uniform(0.7, 1.45), 5)
        bent = start + rng.normal(0, 0.12) * (reach - 0.2) ** 2
        points = half + radius * reach[:, None] * np.stack([np.cos(bent), np.sin(bent)], axis=1)
        width = max(1, round(radius / 16))
        _polyline(spicules, points, 200, width)
        _polyline(spicules, points[:3], 255, width + 1)
    fading = np.clip(1.6 - distance, 0, 1) * 0.75 / 255
    return _finish(np.maximum(mass, spicules * fading), 0.025 * radius)


def draw_calcs(malignant: bool, radius: float, height: int, rng: np.random.Generator) -> np.ndarray:
    """Draw microcalcifications within about `radius` pixels, as `draw_mass`; each in scale with the image's height."""
    half = int(np.ceil(1.5 * radius)) + 2
    canvas = np.zeros((2 * half + 1, 2 * half + 1), np.uint8)
    grain = max(1.0, 0.0026 * height)  # radius of a round calcification
    turn = rng.uniform(0, np.pi)
    if not malignant:
        for _ in range(rng.integers(7, 14)):
            point = half + radius * 0.9 * np.sqrt(rng.random()) * _unit(rng.uniform(0, 2 * np.pi))
            centre = np.rint(point * 16).astype(int).tolist()
            size = round(grain * rng.uniform(0.95, 1.05) * 16)
            cv2.circle(canvas, centre, size, 235, cv2.FILLED, cv2.LINE_AA, 4)
        return _finish(canvas / np.float32(255), 0.3)
    for _ in range(rng.integers(16, 28)):  # pieces of ducts, most of them along the cluster's axis
        point = half + radius * (rng.uniform(-1, 1) * _unit(turn) + rng.normal(0, 0.25) * _unit(turn + 1.57))
        shade = int(rng.uniform(90, 255))
        direction = turn + rng.normal(0, 0.5)
        for branch in range(rng.integers(1, 3)):
            steps = np.cumsum(rng.uniform(1.0, 3.2, 3)) * grain
            bent = direction + branch * rng.choice([-0.8, 0.8]) + np.cumsum(rng.normal(0, 0.3, 3))
            path = np.vstack([point, point + steps[:, None] * _unit(bent)])
            _polyline(canvas, path[: rng.integers(2, 5)], shade, max(1, round(0.7 * grain)))
    return _finish(canvas / np.float32(255), 0.3)


def _unit(angle):
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _polyline(canvas, points, shade, width):
    """Draw a line through points (x, y) of sub-pixel coordinates."""
    points = np.rint(points * 16).astype(np.int32)
    cv2.polylines(canvas, [points[:, None]], False, shade, width, cv2.LINE_AA, 4)


def _finish(lesion, blur):
    """Blur by `blur` pixels, scale to peak 1, and cut the faint tail off, so that the extent is definite."""
    lesion = cv2.GaussianBlur(lesion.astype("float32"), (0, 0), max(blur, 0.3))
    lesion /= lesion.max()
    return np.where(lesion > 0.03, lesion, 0)


def draw_view(
    patient: Patient, view: str, seed: int, height: int, width: int, contrast: float = 1.0, style: str = "film"
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw one image of a patient.

    contrast: brightness of the lesions against the texture; 0 gives the same picture without them.
    style: "film" or "digital"; the same breasts and lesions in both. Film has grain, everywhere, labels and tape.
        A digital picture has 14 bits, the upper ones of the 16 (`image >> 2` is 0..16383), no label, and 0 around the
        breast; in the breast more contrast, sharper edges, and the noise of a detector.

    Returns (image (height, width) uint16, list of one mask (height, width) uint8 0/255 for each finding).
    """
    # Not 0 and 1: NumPy seeds with and without a trailing zero give the same draws, and [seed, index] is taken.
    rng = np.random.default_rng([seed, patient.index, {"CC": 1, "MLO": 2}[view]])
    breast = draw_breast(height, width, view, rng)
    picture, clearance = breast.brightness.copy(), breast.clearance.copy()
    masks = []
    for kind, pathology in patient.findings:
        radius = rng.uniform(0.032, 0.058) * height
        malignant = pathology == "MALIGNANT"
        if kind == "mass":
            lesion, strength = draw_mass(malignant, radius, rng), rng.uniform(0.12, 0.19)
        else:
            lesion, strength = draw_calcs(malignant, radius, height, rng), rng.uniform(0.22, 0.34)
        half = lesion.shape[0] // 2
        x, y = _place(clearance, half, rng)
        rows, columns = np.ogrid[:height, :width]
        clearance = np.minimum(clearance, np.hypot(columns - x, rows - y) - half)
        added = _paste(lesion, (height, width), x, y) * breast.thickness
        picture += contrast * strength * added
        masks.append(_roi(added > 0, margin=max(1, round(height / 288))))

    picture = STYLES[style](picture, breast.thickness, rng)
    if patient.side == "RIGHT":
        picture = np.ascontiguousarray(picture[:, ::-1])
        masks = [np.ascontiguousarray(mask[:, ::-1]) for mask in masks]
    if style == "digital":
        return np.rint(picture * 16383).astype("uint16") << 2, masks
    _draw_label(picture, patient.side, view, rng)
    return np.rint(np.clip(picture, 0, 1) * 65535).astype("uint16"), masks


def _film(picture, thickness, rng):
    """Return the picture as on film, exposed more or less, with its grain: float32, about 0..1."""
    picture = np.clip(picture * rng.uniform(0.85, 1.1), 0, 0.97)
    return picture + rng.normal(0, 0.006, picture.shape).astype("float32") * (0.3 + np.sqrt(picture))


def _digital(picture, thickness, rng):
    """Return the picture as a digital detector and the usual processing for display give it: float32, 0..1.

    In this order: the thin rim brought near to the brightness of the rest; quantum noise, which after the logarithm is
    one over the root of the photons, so that dense tissue has most; edges enhanced; and a sigmoid curve (the VOI LUT
    function SIGMOID of DICOM). Nothing is left around the breast.
    """
    equalised = picture / (0.4 + 0.6 * thickness)
    photons = 30000 * np.exp(-4 * equalised)
    noisy = equalised + rng.standard_normal(picture.shape, dtype="float32") / np.sqrt(photons)
    sharp = noisy + 0.7 * (noisy - cv2.GaussianBlur(noisy, (0, 0), max(1, picture.shape[0] / 400)))
    centre = rng.uniform(0.42, 0.48)
    return np.where(thickness > 0, 1 / (1 + np.exp((centre - sharp) / 0.11)), 0)


STYLES = {"film": _film, "digital": _digital}


def _place(clearance, radius, rng):
    """Draw a place (x, y) where a disc of this radius fits; where none does, take the one with most room."""
    fits = np.flatnonzero(clearance > radius)
    place = fits[rng.integers(len(fits))] if len(fits) else clearance.argmax()
    y, x = np.unravel_index(place, clearance.shape)
    return int(x), int(y)


def _paste(lesion, shape, x, y):
    """Return an image of zeros with the lesion centred at (x, y); what juts out is cut off."""
    half = lesion.shape[0] // 2
    canvas = np.zeros((shape[0] + 2 * half, shape[1] + 2 * half), "float32")
    canvas[y : y + 2 * half + 1, x : x + 2 * half + 1] = lesion
    return canvas[half : half + shape[0], half : half + shape[1]]


def _roi(lesion, margin):
    """Return the convex outline of a lesion and a margin, as a radiologist would draw it: uint8, 0/255."""
    points = cv2.findNonZero(lesion.astype("uint8"))
    mask = cv2.fillConvexPoly(np.zeros(lesion.shape, np.uint8), cv2.convexHull(points), 255)
    return cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * margin + 1,) * 2))


def _draw_label(picture, side, view, rng):
    """Draw a view label as on film, in the upper corner away from the chest wall, and now and then tape below."""
    height, width = picture.shape
    scale = height / 900
    text = f"{side[0]} {view}"
    (text_width, text_height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    pad = max(2, round(0.012 * height))
    x = round(width * rng.uniform(0.93, 0.97)) - text_width - pad
    y = round(height * rng.uniform(0.04, 0.08)) + text_height
    if side == "RIGHT":
        x = width - x - text_width
    shade = rng.uniform(0.85, 1.0)
    on_plate = rng.random() < 0.5
    if on_plate:
        corners = (x - pad, y - text_height - pad), (x + text_width + pad, y + pad)
        cv2.rectangle(picture, *corners, shade, cv2.FILLED)
    letters = np.zeros(picture.shape, np.uint8)  # OpenCV writes into 8-bit images only
    line = max(1, round(1.6 * scale))
    cv2.putText(letters, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, 255, line, cv2.LINE_AA)
    picture += letters / np.float32(255) * ((0.05 if on_plate else shade) - picture)
    if rng.random() < 0.3:
        top, tape = round(height * rng.uniform(0.9, 0.95)), round(width * rng.uniform(0.1, 0.2))
        columns = slice(-tape, None) if side == "LEFT" else slice(0, tape)
        picture[top : top + max(2, round(0.02 * height)), columns] = rng.uniform(0.3, 0.7)


def draw_patients(patients: int, prevalence: float, benign_rate: float, seed: int) -> list[Patient]:
    """Choose who has what: the shares of the patients, rounded, are malignant and benign; the others are normal."""
    malignant = round(prevalence * patients)
    benign = min(round(benign_rate * patients), patients - malignant)
    kinds = np.array(["malignant"] * malignant + ["benign"] * benign + [""] * (patients - malignant - benign))
    kinds = np.random.default_rng([seed]).permutation(kinds)
    return [_draw_patient(index, kind, seed) for index, kind in enumerate(kinds, start=1)]


def _draw_patient(index, kind, seed):
    rng = np.random.default_rng([seed, index])
    side = str(rng.choice(["LEFT", "RIGHT"]))
    findings = []
    if kind:
        for number in range(1 + (rng.random() < 0.2)):
            benign = str(rng.choice(["BENIGN", "BENIGN_WITHOUT_CALLBACK"], p=[0.7, 0.3]))
            malignant = kind == "malignant" and (number == 0 or rng.random() < 0.5)
            findings.append((str(rng.choice(["calc", "mass"])), "MALIGNANT" if malignant else benign))
    return Patient(f"P_{index:05d}", index, side, findings)


README = """SYNTHETIC IMAGES{like}. Made by mammo phantom; no patient was imaged.
They serve to try and to test software. They are no substitute for patients: figures measured on them say nothing about
how a classifier does on real mammograms.

{options}

{content}
"""


@dataclass(frozen=True)
class Drawing:
    """Hold the options that all layouts share, as on the command line."""

    patients: int = 100
    views: Sequence[str] = ("CC", "MLO")
    height: int = 1152
    width: int = 896
    prevalence: float = 0.4
    contrast: float = 1.0
    style: str = "film"
    seed: int = 0
    jobs: int = 1
    backend: str = "loky"

    def __str__(self) -> str:
        views = " ".join(self.views)
        return f"{self.patients} patients, views {views}, {self.height} x {self.width} pixels, seed {self.seed}"

    def check(self, out: Path) -> None:
        """Raise InputError unless `out` is new or empty and images of these views and size can be drawn."""
        if out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out}: Expected a new or empty folder. Received one with files in it.")
        if len(set(self.views)) < len(self.views):
            raise InputError(f"Expected each of --views once. Received {' '.join(self.views)}.")
        if min(self.height, self.width) < 128:
            raise InputError(f"Expected --height and --width of at least 128. Received {self.height} and {self.width}.")

    def write_readme(self, out: Path, like: str, options: str, content: str) -> None:
        """Write README.txt: what the images are like, the options, those of one layout last, and what is where."""
        options = f"{self}, style {self.style}, contrast {self.contrast}, {options}."
        write_text(out / "README.txt", README.format(like=like, options=options, content=content))

    def draw(self, patient: Patient, view: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Draw one image of a patient; see `draw_view`."""
        return draw_view(patient, view, self.seed, self.height, self.width, self.contrast, self.style)

    def run(self, function: Callable, items: Sequence, unit: str = "image", **arguments) -> list:
        """Return function(item, drawing=self, **arguments) for all items, computed by `jobs` at the same time."""
        work = functools.partial(function, drawing=self, **arguments)
        return list(run_parallel(work, items, self.jobs, self.backend, "drawing", unit))
