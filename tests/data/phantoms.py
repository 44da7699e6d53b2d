"""Phantoms of every data set, small, and the images that must come of them."""

import csv
import json
import pickle
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pydicom

from mammo.commands.prepare import run
from mammo.images.reading import read_img
from mammo.phantom.cbis_ddsm import make_download, write_dicom
from mammo.phantom.draw import draw_patients, draw_view
from mammo.phantom.inbreast import make_inbreast
from tests.helpers import exam, read_report, write_picture

SIZE = 144, 128
WHOLE = {"img_size": [72, 56]}


def prepare(name, data, out, **options):
    """Prepare a data set as from the command line; returns its report."""
    run(name, data=str(data), out=str(out), **WHOLE | options)
    return read_report(out)


def images_of(out):
    """Paths below the output folder by the name of the image."""
    return {path.stem: path.relative_to(out).as_posix() for path in out.glob("*/*/*.png")}


def draw_breasts():
    """Pixels of both views of both breasts of ten patients, by (patient, side, view), and who has cancer where."""
    images, cancer = {}, {}
    for patient in draw_patients(10, 0.4, 0.3, 4):
        other = patient._replace(index=patient.index + 100, side="LEFT" if patient.side == "RIGHT" else "RIGHT")
        for breast in (patient, other._replace(findings=[])):
            cancer[patient.name, breast.side] = breast.malignant
            for view in ("CC", "MLO"):
                images[patient.name, breast.side, view] = draw_view(breast, view, 4, *SIZE)[0]
    return images, cancer


def write(path, img, *options):
    write_picture(path, img, *options)
    return img


def write_rows(path, header, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])


def to_eight_bits(img):
    return (img >> 8).astype(np.uint8)


class Made(dict):
    """The images to come of a data set in a folder, 16-bit pixels by name; its number of faults; options to give."""

    def __init__(self, name, folder, faults=0, **options):
        self.name, self.folder, self.faults, self.options = name, folder, faults, options
        self.positive, self.sources = set(), {}

    def expect(self, name, img, positive, source=None):
        self[name] = img if img.dtype == np.uint16 else img.astype(np.uint16) * np.uint16(257)
        self.sources[name] = source
        if positive:
            self.positive.add(name)


def make_csv(folder, drawn):
    """A table with semicolons; files of all kinds."""
    images, cancer = drawn
    made, rows = Made("csv", folder, table=str(folder / "labels.csv")), []
    for index, ((patient, side, view), img) in enumerate(images.items()):
        kind = ["png", "tif", "jpg", "png", "dcm"][index % 5]
        file = f"scans/{index:03}.{kind}"
        if kind == "dcm":
            photometric = "MONOCHROME1" if index % 2 else "MONOCHROME2"
            write_dicom(folder / file, img >> 4, photometric, bits=12, PatientID="x")
            img = np.rint((img >> 4) * (65535 / 4095)).astype(np.uint16)
        elif kind == "jpg":
            write(folder / file, to_eight_bits(img))
            img = read_img(folder / file)
        elif index % 5 == 3:
            img = to_eight_bits(img)
            write(folder / file, np.stack([img] * 3, axis=-1))
        else:
            write(folder / file, img)
        label = "Malignant" if cancer[patient, side] else "benign"
        rows.append([patient, file.replace("/", "\\") if index == 7 else file, side[0], view.lower(), label])
        made.expect(f"{patient}_{side}_{view}", img, cancer[patient, side], file)
    write_rows(folder / "labels.csv", ["Patient ID", "image path", "Laterality", "View", "Class"], rows, ";")
    return made


def make_folders(folder, drawn):
    images, cancer = drawn
    made = Made("folders", folder)
    for (patient, side, view), img in images.items():
        name = f"{patient}_{side}_{view}"
        file = f"{'malignant' if cancer[patient, side] else 'benign'}/{name}.png"
        made.expect(name, write(folder / file, img), cancer[patient, side], file)
    write(folder / "benign/.thumbnail.png", images["P_00001", "LEFT", "CC"])
    return made


def make_cmmd(folder, drawn):
    """Table and DICOM files; a breast without row, one with two, and a row without images."""
    images, cancer = drawn
    made, rows, numbers = Made("cmmd", folder), [], {}
    codes = {"CC": ("R-10242", "cranio-caudal"), "MLO": ("R-10226", "medio-lateral oblique")}
    for (patient, side, view), img in images.items():
        patient_id = patient.replace("P_0", "D1-")
        number = numbers[patient] = numbers.get(patient, 0) + 1
        file = f"CMMD/{patient_id}/07-18-2010-NA-79377/1.000000-NA-70244/1-{number}.dcm"
        img, code = to_eight_bits(img), pydicom.Dataset()
        code.CodeValue, code.CodeMeaning = codes[view]
        tags = {"PatientID": patient_id, "ImageLaterality": side[0], "ViewCodeSequence": [code]}
        write_dicom(folder / file, img, **tags)
        if (patient, side) == ("P_00001", "LEFT"):
            continue
        made.expect(f"{patient_id}_{side}_{view}", img, cancer[patient, side], file)
        if view == "CC":
            label = "Malignant" if cancer[patient, side] else "Benign"
            rows.append([patient_id, side[0], 44, 2, "calcification", label, ""])
    rows += [rows[3], ["D2-0001", "L", 50, 2, "mass", "Malignant", "Luminal A"]]
    header = ["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]
    write_rows(folder / "CMMD_clinicaldata_revision.csv", header, rows)
    return made


def make_vindr(folder, drawn):
    """Patients 1 to 7 for training, the others for the test; breasts of BI-RADS 3 are in neither class."""
    images, cancer = drawn
    made, rows = Made("vindr", folder), []
    for index, ((patient, side, view), img) in enumerate(images.items()):
        study, image = f"{int(patient[2:]):032x}", f"{index:032x}"
        file = f"images/{study}/{image}.dicom"
        left_out = (patient, side) == ("P_00003", "LEFT")
        birads = 3 if left_out else 4 + index % 2 if cancer[patient, side] else 1 + index % 2
        photometric = "MONOCHROME1" if index == 6 else "MONOCHROME2"
        write_dicom(folder / file, img >> 2, photometric, bits=14, PatientID=study)
        division = "training" if patient <= "P_00007" else "test"
        # The columns of the real file, of which those of no use here are left empty.
        row = [study, image, image, side[0], view, 3518, 2800, f"BI-RADS {birads}", "DENSITY C", division]
        rows.append(row)
        if not left_out:
            img = np.rint((img >> 2) * (65535 / 16383)).astype(np.uint16)
            made.expect(f"{study}_{side}_{view}", img, cancer[patient, side], file)
    header = ["study_id", "series_id", "image_id", "laterality", "view_position", "height", "width"]
    header += ["breast_birads", "breast_density", "split"]
    write_rows(folder / "breast-level_annotations.csv", header, rows)
    return made


def make_mias(folder, drawn):
    images, cancer = drawn
    made, lines = Made("mias", folder), ["REFNUM BG CLASS SEVERITY X Y RADIUS"]
    for (patient, side, view), img in images.items():
        number = 2 * int(patient[2:]) - (side == "RIGHT")  # the right breast is the odd one, and comes first
        if view != "MLO":
            continue
        img = to_eight_bits(img)
        write(folder / f"all-mias/mdb{number:03}.pgm", img)
        start = f"mdb{number:03} G"
        if cancer[patient, side]:  # findings of either severity, in both orders
            findings = [f"{start} CIRC B 535 425 197", f"{start} SPIC M 522 280 69"]
            lines += findings[:: 1 if number % 4 < 2 else -1]
        else:
            lines.append(f"{start} NORM" if number % 3 else f"{start} CALC B")
        right = number - 1 + number % 2
        name = f"mdb{right:03}-{right + 1:03}_{side}_MLO"
        made.expect(name, img, cancer[patient, side], f"all-mias/mdb{number:03}.pgm")
    (folder / "Info.txt").write_text("\n".join(lines) + "\n")
    return made


def make_nyu(folder, drawn):
    """An exam list as the metarepository's; the images of one exam are mirrored, another has two of one view."""
    images, cancer = drawn
    made, exams = Made("nyu", folder / "images", table=str(folder / "exams.pkl")), []
    for number in range(10):
        patient = f"P_{number + 1:05}"
        left, right = (int(cancer[patient, side]) for side in ("LEFT", "RIGHT"))
        exams.append(exam(number, left, right) | {"horizontal_flip": "YES" if number == 4 else "NO"})
        exams[-1]["cancer_label"] |= {"left_benign": 0, "right_benign": 0}
        for side in ("LEFT", "RIGHT"):
            for view in ("CC", "MLO"):
                img, name = images[patient, side, view], f"{number}_{side[0]}_{view}"
                write(folder / f"images/{name}.png", img[:, ::-1] if number == 4 else img)
                made.expect(f"{number}_{side}_{view}", img, cancer[patient, side], f"{name}.png")
    exams[2]["L-CC"].append("2_L_CC_2")
    img = write(folder / "images/2_L_CC_2.png", images["P_00003", "LEFT", "CC"] // 2)
    made.expect("2_LEFT_CC_2", img, cancer["P_00003", "LEFT"], "2_L_CC_2.png")
    (folder / "exams.pkl").write_bytes(pickle.dumps(exams))
    return made


def by_key(rows):
    """Rows of CBIS-DDSM by the name of their image."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.key].append(row)
    return groups


_DRAWN = {}  # drawing takes most of the time


def draw_once(breast, view, seed, style="film"):
    """What `draw_view` draws, to be changed by nobody."""
    key = repr(breast), view, seed, style
    if key not in _DRAWN:
        _DRAWN[key] = draw_view(breast, view, seed, *SIZE, style=style)
    return _DRAWN[key]


def draw_row(row):
    """Picture and masks of a row of CBIS-DDSM."""
    return draw_once(row.patient, row.view, 5)


def download_cbis(out, tree, **options):
    """The rows of a download of CBIS-DDSM, and its oddities.json."""
    options = {"patients": 12, "height": SIZE[0], "width": SIZE[1], "seed": 5} | options
    return make_download(out, tree=tree, **options), json.loads((out / "oddities.json").read_text())


def make_cbis(folder, tree):
    rows, odd = download_cbis(folder, tree, old_header=tree == "descriptive")
    truncated = odd["oddities"]["truncated"]
    made = Made("cbis-ddsm", folder, len(truncated), on_error="skip")
    made.rows, made.odd = rows, odd
    for key, group in by_key(rows).items():
        if key not in truncated:
            made.expect(key, draw_row(group[0])[0], any(row.pathology == "MALIGNANT" for row in group))
    return made


def draw_inbreast(view, seed=9):
    """The picture as stored in 14 bits and scaled to 16, and the masks."""
    img, masks = draw_once(view.breast, view.view, seed, "digital")
    return np.rint((img >> 2) * (65535 / 16383)).astype(np.uint16), masks


def make_odd_inbreast(folder):
    """INbreast with all oddities."""
    views = make_inbreast(folder, patients=16, height=SIZE[0], width=SIZE[1], seed=9)
    made = Made("inbreast", folder, 4, on_error="skip", roi_masks=True)
    made.views, made.odd = views, json.loads((folder / "oddities.json").read_text())
    made.by_name = usable(views, made.odd)
    for name, view in made.by_name.items():
        made.expect(name, draw_inbreast(view)[0], view.birads not in "12", view.dicom)
    return made


def usable(views, odd):
    """The views that must become images, by the names that these must have."""
    left = {odd[name][0] for name in ("fb_view", "truncated", "row_without_dicom", "dicom_without_row")}
    left |= set(odd["other_laterality"])
    names, images = Counter(), {}
    for view in sorted(views, key=lambda view: view.number):
        if {"fb_view", "row_without_dicom", "dicom_without_row", "other_laterality"} & view.oddities:
            continue
        name = f"{view.patient}_{view.breast.side}_{view.view}"
        names[name] += 1
        if view.birads != "3" and view.number not in left:
            images[name + (f"_{names[name]}" if names[name] > 1 else "")] = view
    return images


OWN = {
    "csv": make_csv,
    "folders": make_folders,
    "cmmd": make_cmmd,
    "vindr": make_vindr,
    "mias": make_mias,
    "nyu": make_nyu,
}


class Plain(NamedTuple):
    """A small data set without oddities: its files and patients by the name of the image, and its rows or views."""

    name: str
    folder: Path
    files: dict[str, str]
    patients: dict[str, str]
    content: list
    ready: Path  # prepared

    @property
    def owners(self):
        return sorted(set(self.patients.values()))

    def prepare(self, out, folder=None, **options):
        """Prepare it, or the changed copy `folder` of it, with masks where there are any; returns the report."""
        masks = {"roi_masks": True} if self.name == "inbreast" else {}
        return prepare(self.name, folder or self.folder, out, **masks | options)

    def command(self, folder, out, *options):
        """The command line that does so."""
        masks = ["--roi-masks"] if self.name == "inbreast" else []
        return [self.name, str(folder), str(out), "--img-size", "72", "56", *masks, *map(str, options)]


def make_plain(name, folder):
    data, out = folder / "data", folder / "ready"
    if name == "cbis-ddsm":
        content = download_cbis(data, "uid", patients=6, views=("CC",), oddities="none")[0]
        files = {row.key: next((data / "CBIS-DDSM" / row.image_folder).rglob("*.dcm")) for row in content}
        patients = {row.key: row.patient.name for row in content}
    elif name == "inbreast":
        options = {"patients": 8, "views": ("CC",), "oddities": "none", "prevalence": 0.5, "seed": 17}
        content = make_inbreast(data, height=SIZE[0], width=SIZE[1], **options)
        views = {f"{view.patient}_{view.breast.side}_CC": view for view in content if view.birads != "3"}
        files = {name: data / view.dicom for name, view in views.items()}
        patients = {name: view.patient for name, view in views.items()}
    else:
        content, files, patients = list(draw_patients(8, 0.5, 0.3, 4)), {}, {}
        for patient in content:
            image = f"{patient.name}_{patient.side}_CC"
            files[image] = data / ("pos" if patient.malignant else "neg") / f"{image}.png"
            write(files[image], draw_view(patient, "CC", 4, *SIZE)[0])
            patients[image] = patient.name
    files = {image: path.relative_to(data).as_posix() for image, path in files.items()}
    plain = Plain(name, data, files, patients, content, out)
    plain.prepare(out)
    return plain
