"""Write inputs of tests, and read back what scripts left: what tests of several rooms share."""

import csv
import json
import pickle
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pydicom

from mammo.data.prepare import ImageRow, write_image_table

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "img_size": [96, 72],
    "img_scale": None,
    "rescale_factor": 0.003891,
    "featurewise_center": True,
    "featurewise_mean": 30.0,
    "equalize_hist": False,
    "class_list": ["neg", "pos"],
}


def write_picture(path, pixels, *options):
    """Write a picture of the kind that the name's ending says, also such as the package refuses to write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels, *options)
    return path


def png(pixels):
    """Return the bytes of a PNG file."""
    return cv2.imencode(".png", pixels)[1].tobytes()


def write_png(path, value=0, shape=(8, 6)):
    """Write an image of 16 bits whose first pixel is `value`."""
    pixels = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    pixels[0, 0] = value
    return write_picture(path, pixels)


def prepared(folder, patients=6):
    """Write a prepared data set, val and test: a breast in both views of each patient, the odd ones with cancer."""
    rows = []
    for part in ("val", "test"):
        for number in range(patients):
            label = ("neg", "pos")[number % 2]
            for view in ("CC", "MLO"):
                name = f"{part}/{label}/P_{part}{number}_LEFT_{view}.png"
                value = (20_000 if label == "pos" else 8_000) + 3_000 * number + 500 * (view == "CC")
                write_png(folder / name, value - 17_000 * (number == 5))
                rows.append(ImageRow(name, part, label, f"Q_{part}{number}", "LEFT", view, "source.dcm"))
    write_image_table(folder / "images.csv", rows)
    return folder


def write_list(path, rows, header="file,label"):
    """Write a CSV file of these lines."""
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def exam(number, left=0, right=0, views=("L-CC", "R-CC", "L-MLO", "R-MLO")):
    """Make an exam of a list of the NYU metarepository, as its README shows it."""
    names = {view: [f"{number}_{view.replace('-', '_')}"] for view in views}
    return names | {"cancer_label": {"left_malignant": left, "right_malignant": right}, "horizontal_flip": "NO"}


def write_exams(path, exams):
    """Write an exam list, and images for it into the folder `images` beside it."""
    path.write_bytes(pickle.dumps(exams, protocol=4))
    for one in exams:
        for name in [name for view in ("L-CC", "R-CC", "L-MLO", "R-MLO") for name in one.get(view, ())]:
            write_png(path.parent / "images" / f"{name}.png")
    return path


def varied(shape):
    """Make an image of two values."""
    img = np.zeros(shape, np.uint16)
    img[1:] = 7
    return img


def write_dicom(path, pixels, bits=None, syntax=None, **tags):
    """Write a DICOM file of integer pixels, 8 or 16 bits each. syntax: a UID. Tags of None are left out."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.2", "1.2.3"
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, int(pixels.dtype.kind == "i")
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    if syntax and syntax.is_encapsulated:
        dataset.compress(syntax, generate_instance_uid=False)
    elif syntax:
        dataset.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def mammogram(seed=0, view="CC", left=False):
    """float32 (96, 72): a breast on the right side, so that it points to the left if `left`; MLO with a muscle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:96, 0:72]
    middle, reach = 50 + rng.uniform(-4, 4), rng.uniform(32, 42)
    img = np.where(((y - middle) / 38) ** 2 + (x / reach) ** 2 < 1, 90 + 8 * rng.standard_normal(x.shape), 3)
    if view == "MLO":
        img[x + 0.6 * y < 30] = 150
    return np.ascontiguousarray(img[:, ::-1] if left else img).astype(np.float32)


def write_images(folder, names, count, seed, size=64):
    """Classes differ in brightness, so that a network can tell them apart."""
    rng = np.random.default_rng(seed)
    for level, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(0, 16000, (size, size)) + 16000 * level
            cv2.imwrite(str(folder / name / f"{i}.png"), image.astype(np.uint16))


def make_python(folder, python=sys.executable):
    """Write a `python` for scripts to find, which is this one or another command."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    (folder / "python").chmod(0o755)


def check_options(parser, options):
    """Assert that a parser has the options that the published program had, with their names and defaults."""
    by_flag = {flag: action for action in parser._actions for flag in action.option_strings}
    positional = [action.dest for action in parser._actions if not action.option_strings]
    assert positional == [option["dest"] for option in options if not option["flags"]]
    for option in options:
        assert {by_flag[flag].dest for flag in option["flags"]} <= {option["dest"]}, option["dest"]
        assert parser.get_default(option["dest"]) == option["default"], option["dest"]


def auc_of_pairs(positive, negative):
    """Return the share of pairs of a positive and a negative score that are ranked right; ties count as a half."""
    differences = np.subtract.outer(np.asarray(positive), np.asarray(negative))
    return np.mean((differences > 0) + 0.5 * (differences == 0))


def read_members(path):
    """Return the files of a ZIP archive, bytes by name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def read_report(out):
    return json.loads((out / "report.json").read_text())


def read_png(path):
    return cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_folder(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def files_of(out):
    """What the trainers and the sampler read of a prepared folder, without what names sources."""
    others = ("report.json", "manifest.jsonl", "images.csv")
    return {name: data for name, data in read_folder(out).items() if name not in others}
