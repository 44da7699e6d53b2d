"""Draw phantoms laid out like a download of INbreast: its table, DICOM files, annotations and oddities.

`mammo prepare inbreast` and its tests take the same path with these as with the real data.
"""

import hashlib
import json
import plistlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mammo.phantom.cbis_ddsm import write_bytes, write_dicom, write_rows
from mammo.phantom.draw import Drawing, Patient, draw_patients

HEADER = ["Patient ID", "Patient age", "Laterality", "View", "Acquisition date", "File Name", "ACR", "Bi-Rads"]

# One image has each of these, in this order while there are patients. The word "removed", the semicolons, CRLF, ML
# for MLO in file names, points for single calcifications and misspelt names of findings are always there.
ODDITIES = {
    "fb_view": "a view FB, from below, of a breast that has CC and MLO too",
    "blank_acr": "an ACR cell of 190 spaces",
    "second_cc": "a second CC view of one breast",
    "repeated_row": "a row that stands twice in the table",
    "monochrome1": "a DICOM file stored inverted",
    "truncated": "a DICOM file that is cut off",
    "row_without_dicom": "a row whose DICOM file is not there",
    "dicom_without_row": "a DICOM file that is not in the table",
    "damaged_xml": "an annotation file that is cut off",
    "other_laterality": "a row that says the other breast than the name of its DICOM file",
}

POSITIVE_BIRADS = {"4a": 13, "4b": 8, "4c": 22, "5": 49, "6": 8}  # of breasts with cancer, as often as in INbreast
BITS = 14

CONTENT = """\
INbreast.csv, the images in AllDICOMs, annotations of those with findings in AllXML, and oddities.json: what is out of
the ordinary, where."""


class View(NamedTuple):
    """Hold one image. breast: a `Patient` of one breast; both of a patient have one name."""

    breast: Patient
    view: str  # CC or MLO, as drawn
    number: int  # the table's File Name
    patient: str  # in the name of the DICOM file
    birads: str
    oddities: frozenset

    @property
    def listed(self) -> str:
        """Return what the table calls the view."""
        return "FB" if "fb_view" in self.oddities else self.view

    @property
    def dicom(self) -> str:
        view = "ML" if self.listed == "MLO" else self.listed
        return f"AllDICOMs/{self.number}_{self.patient}_MG_{self.breast.side[0]}_{view}_ANON.dcm"

    @property
    def annotation(self) -> str:
        return f"AllXML/{self.number}.xml"

    def row(self) -> list:
        """Return the cells of its row in the table."""
        side = {"LEFT": "R", "RIGHT": "L"}[self.breast.side] if "other_laterality" in self.oddities else None
        acr = " " * 190 if "blank_acr" in self.oddities else 1 + self.breast.index % 4
        words = "removed", "removed", side or self.breast.side[0], self.listed, 200801 + self.breast.index % 12
        return [*words, self.number, acr, self.birads]


def make_views(people: Sequence[Patient], views: Sequence[str], odd: Mapping[str, str], seed: int) -> list[View]:
    """Return the images of both breasts of all patients, the second without findings. odd: oddity by patient name."""
    made = []
    for patient in people:
        rng = np.random.default_rng([seed, patient.index, 5])
        hashed = hashlib.sha256(f"{seed} {patient.name}".encode()).hexdigest()[:16]
        names = list(POSITIVE_BIRADS)
        positive = str(rng.choice(names, p=np.array(list(POSITIVE_BIRADS.values())) / sum(POSITIVE_BIRADS.values())))
        benign = str(rng.choice(["2", "3"], p=[0.9, 0.1]))
        other_side = {"LEFT": "RIGHT", "RIGHT": "LEFT"}[patient.side]
        other = patient._replace(index=patient.index + len(people), side=other_side, findings=[])
        for breast in (patient, other):
            birads = positive if breast.malignant else benign if breast.findings else "1"
            shown = list(views)
            oddity = odd.get(patient.name) if breast is patient else None
            if oddity in ("fb_view", "second_cc"):
                shown.append("CC")
            odd_place = len(shown) - 1 if len(shown) > len(views) else 0  # the view that was added, else the first
            for place, view in enumerate(shown):
                # Another picture than the first of this view.
                drawn = breast if place < len(views) else breast._replace(index=breast.index + 2 * len(people))
                here = frozenset({oddity} if oddity and place == odd_place else ())
                made.append(View(drawn, view, 20586900 + len(made), hashed, birads, here))
    return made


def annotate(findings: Sequence[tuple], masks: Sequence[np.ndarray], rng: np.random.Generator) -> list[dict]:
    """Return ROIs: outlines of all masks, and points within calcifications; names vary, as misspelt as in INbreast."""
    rois = []

    def add(name, points):
        texts = [f"({x:.6f}, {y:.6f})" for x, y in points]
        rois.append({"IndexInImage": len(rois), "Name": name, "NumberOfPoints": len(texts), "Point_px": texts})

    for (kind, pathology), mask in zip(findings, masks, strict=True):
        (outline,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        outline = outline.reshape(-1, 2).tolist()
        if kind == "mass":
            add("Espiculated Region" if pathology == "MALIGNANT" and rng.random() < 0.3 else "Mass", outline)
            continue
        add("Cluster", outline)
        inside = np.argwhere(mask)[:, ::-1]
        for x, y in inside[rng.integers(len(inside), size=3)].tolist():
            add("Calcification", [(x, y)])
        x, y = inside[rng.integers(len(inside))].tolist()
        add("Calcifications", [(x, y), (x + 2, y), (x + 2, y + 2), (x, y + 2)])
    return rois


def write_view(view: View, drawing: Drawing, out: Path) -> None:
    """Draw one image and write its DICOM file and, where there are findings, its annotations."""
    findings = view.breast.findings
    img, masks = drawing.draw(view.breast, view.view)
    if "row_without_dicom" not in view.oddities:
        photometric = "MONOCHROME1" if "monochrome1" in view.oddities else "MONOCHROME2"
        keep = 0.6 if "truncated" in view.oddities else 1
        tags = {"PatientID": "removed", "PatientName": "removed", "InstanceNumber": view.number}
        write_dicom(out / view.dicom, img >> (16 - BITS), photometric, keep, BITS, **tags)
    if findings:
        rois = annotate(findings, masks, np.random.default_rng([drawing.seed, view.number, 6]))
        images = {"Images": [{"ImageIndex": 0, "NumberOfROIs": len(rois), "ROIs": rois}]}
        write_bytes(out / view.annotation, plistlib.dumps(images), 0.6 if "damaged_xml" in view.oddities else 1)


def make_inbreast(out: str | Path, *, benign_rate: float = 0.4, oddities: str = "all", **drawing) -> list[View]:
    """Write a folder like a download of INbreast into the new or empty folder `out`.

    Below it are INbreast.csv, AllDICOMs/, AllXML/, README.txt and oddities.json. Both breasts of each patient are
    imaged; one of them has the findings, of the shares `prevalence` (malignant) and `benign_rate` of the patients.
    oddities: "all", see ODDITIES (as many as there are patients with findings for), or "none". drawing: options of
    `Drawing`, in the style "digital" by default. The same options give the same bytes for any number of jobs.
    Returns the list of `View`s; with the breast and view of each, `draw_view` gives the true pixels and masks.
    Raises InputError for a folder with content.
    """
    out, drawing = Path(out), Drawing(**{"style": "digital"} | drawing)
    drawing.check(out)
    benign_rate = min(benign_rate, 1 - drawing.prevalence)
    people, odd = draw_patients(drawing.patients, drawing.prevalence, benign_rate, drawing.seed), {}
    if oddities == "all":
        with_findings = [patient.name for patient in people if patient.findings]
        chosen = np.random.default_rng([drawing.seed, 7]).permutation(with_findings).tolist()
        odd = dict(zip(chosen, ODDITIES, strict=False))
    made = make_views(people, drawing.views, odd, drawing.seed)
    drawing.run(write_view, made, out=out)
    rows = []
    for view in made:
        if "dicom_without_row" not in view.oddities:
            rows += [view.row()] * (2 if "repeated_row" in view.oddities else 1)
    write_rows(out / "INbreast.csv", HEADER, rows, delimiter=";")
    found = {name: [view.number for view in made if name in view.oddities] for name in ODDITIES}
    write_bytes(out / "oddities.json", json.dumps(found, indent=2).encode())
    like = ", laid out like a download of INbreast, for mammo prepare inbreast"
    drawing.write_readme(out, like, f"oddities: {oddities}", CONTENT)
    return made
