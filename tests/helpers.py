"""Inputs that the tests of several rooms share."""

import pickle

import cv2
import numpy as np

from mammo.data.prepare import ImageRow, write_image_table


def write_png(path, value=0, shape=(8, 6)):
    """Write an image of 16 bits whose first pixel is `value`."""
    pixels = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    pixels[0, 0] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)
    return path


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
