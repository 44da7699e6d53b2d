"""Draw phantoms laid out like a download of CBIS-DDSM, in any of its folder trees and with its oddities.

`mammo prepare cbis-ddsm` and its tests take the same path with these as with the real data.
"""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mammo.base.files import InputError, atomic_write
from mammo.data.splits import stratified_split
from mammo.phantom.draw import Drawing, Patient, draw_patients

TREES = ("uid", "descriptive", "descriptive2", "jpeg")

# One patient has each of these, in this order while there are patients; half of all ROI folders are "swapped" too.
ODDITIES = {
    "key_in_both_sets": "an image with a calcification in the official training set and a mass in the test set",
    "truncated": "a full image whose file is cut off",
    "monochrome1": "a full image stored inverted (DICOM only)",
    "mask_size": "a mask of another size and aspect than its image",
    "mask_without_description": "a mask without SeriesDescription",
    "separate_folders": "mask and crop in different folders",
    "mixed_pathologies": "an image with a malignant and a benign finding",
    "several_abnormalities": "an image with three findings of one type",
    "several_masks": "two rows, each with its mask, of one image and abnormality number",
    "repeated_row": "a row that stands twice in its file",
    "patient_in_both_sets": "a patient with one view in the official training set, the other in the test set",
    "key_in_both_types": "an image that stands in the calc and in the mass file of one set",
}

# What a patient with an oddity has on each view, where that is not one mass.
FINDINGS = {
    **dict.fromkeys(("key_in_both_sets", "patient_in_both_sets", "key_in_both_types"), ("calc", "mass")),
    **dict.fromkeys(("mixed_pathologies", "several_masks"), ("mass", "mass")),
    "several_abnormalities": ("calc",) * 3,
}

HEADERS = {
    False: "patient_id,{density},left or right breast,image view,abnormality id,abnormality type,{kind} {first},"
    "{kind} {second},assessment,pathology,subtlety,image file path,cropped image file path,ROI mask file path",
    True: "patient_id,breast_density,side,view,abn_num,abnormality_type,{kind}_{first},{kind}_{second},"
    "assessment,pathology,subtlety,od_img_path,od_crop_path,mask_path",
}

DESCRIPTORS = {  # column names and some values of the two descriptive columns
    "calc": ("type", ["AMORPHOUS", "PLEOMORPHIC", "PUNCTATE"], "distribution", ["CLUSTERED", "LINEAR", "NA"]),
    "mass": ("shape", ["IRREGULAR", "LOBULATED", "OVAL"], "margins", ["CIRCUMSCRIBED", "ILL_DEFINED", "SPICULATED"]),
}
DESCRIPTIONS = {"image": "full mammogram images", "mask": "ROI mask images", "crop": "cropped images"}
UID_PREFIX = "1.3.6.1.4.1.9590.100.1.2."
JPEG_INFO = [
    *("file_path", "image_path", "BitsAllocated", "BitsStored", "Columns", "Laterality", "Modality", "PatientID"),
    *("PatientOrientation", "PhotometricInterpretation", "Rows", "SeriesDescription", "SeriesInstanceUID"),
    "StudyInstanceUID",
]

CONTENT = """\
The four description files, the images in the tree "{tree}", and oddities.json: what is out of the ordinary, where."""


class Row(NamedTuple):
    """Hold one row of a description file: a finding in one view."""

    patient: Patient
    view: str
    index: int  # of patient.findings, and of the masks that `draw_view` returns
    number: int  # abnormality id
    division: str  # Training or Test
    oddities: frozenset  # the names in ODDITIES that its image or mask has, and "swapped"

    @property
    def kind(self) -> str:
        return self.patient.findings[self.index][0]

    @property
    def pathology(self) -> str:
        return self.patient.findings[self.index][1]

    @property
    def key(self) -> str:
        return f"{self.patient.name}_{self.patient.side}_{self.view}"

    @property
    def image_folder(self) -> str:
        return f"{self.kind.capitalize()}-{self.division}_{self.key}"

    @property
    def roi_folder(self) -> str:
        return f"{self.image_folder}_{self.number}"


class Place(NamedTuple):
    """Hold where one picture of a download lies."""

    content: str  # a key of DESCRIPTIONS
    folder: str  # of the view or the ROI; also the DICOM PatientID
    study: str
    series: str
    position: int  # 0 for the first file of its folder
    described_as: str  # how the descriptive trees call the folder

    def listed(self) -> str:
        """Return the path that the description files give, whatever the tree."""
        return f"{self.folder}/{self.study}/{self.series}/{self.position:06d}.dcm"

    def path(self, tree: str) -> str:
        """Return the path below the download folder."""
        if tree == "uid":
            return f"CBIS-DDSM/{self.listed()}"
        if tree == "descriptive":
            middle = f"07-20-2016-DDSM-{self.study[-5:]}/1-{self.described_as}-{self.series[-5:]}"
            return f"CBIS-DDSM/{self.folder}/{middle}/{self.position:06d}.dcm"
        if tree == "descriptive2":
            middle = f"07-20-2016-DDSM-NA-{self.study[-5:]}/1.000000-{self.described_as}-{self.series[-5:]}"
            return f"CBIS-DDSM/{self.folder}/{middle}/1-{self.position + 1}.dcm"
        return f"jpeg/{self.series}/{self.position + 1}-{int(self.study[-3:]):03d}.jpg"


def make_uid(*words) -> str:
    """Return a DICOM UID that is a function of the words."""
    from pydicom.uid import generate_uid

    # The first digit after the prefix is fixed: leading zeros are not allowed, and all UIDs get one length.
    digits = generate_uid(prefix="1.2.", entropy_srcs=[str(word) for word in words])[4:]
    return UID_PREFIX + ("1" + digits)[:39].ljust(39, "1")


def add_oddities(people: Iterable[Patient], seed: int) -> tuple[list[Patient], dict[str, str]]:
    """Give one patient each the oddities, with the findings they need. Returns (people, {patient name: oddity})."""
    people, odd = list(people), {}
    # Fewer patients than oddities get the first ones.
    order = np.random.default_rng([seed, 2]).permutation(len(people))
    for position, oddity in zip(order.tolist(), ODDITIES, strict=False):
        patient = people[position]
        kinds = FINDINGS.get(oddity, ("mass",))
        first = patient.findings[0][1]
        pathologies = ["MALIGNANT", "BENIGN"] if oddity == "mixed_pathologies" else [first] * len(kinds)
        people[position] = patient._replace(findings=list(zip(kinds, pathologies, strict=True)))
        odd[patient.name] = oddity
    return people, odd


def make_rows(
    people: Iterable[Patient], views: Sequence[str], divisions: Mapping[str, str], odd: Mapping[str, str], seed: int
) -> list[Row]:
    """Return the rows of all four description files, patient by patient."""
    rows = []
    for patient in people:
        rng = np.random.default_rng([seed, patient.index, 3])
        oddity = odd.get(patient.name)
        for view in views:
            for index, (kind, _) in enumerate(patient.findings):
                # As in the real files, calcifications and masses of one image are numbered together.
                number = 1 if oddity == "several_masks" and view == views[0] else index + 1
                division = divisions[patient.name]
                if oddity == "key_in_both_sets":
                    division = "Training" if kind == "calc" else "Test"
                elif oddity == "patient_in_both_sets":
                    division = "Training" if view == views[0] else "Test"
                names = {oddity} if oddity and view == views[0] else set()
                if odd and rng.random() < 0.5:
                    names.add("swapped")
                rows.append(Row(patient, view, index, number, division, frozenset(names)))
    return rows


def place_files(row: Row, seed: int) -> tuple[Place, Place, Place, str, str]:
    """Return the places of a row's image, mask and crop, and of its mask and crop according to the description file."""
    study, series = (make_uid(seed, row.image_folder, word) for word in ("study", "series"))
    image = Place("image", row.image_folder, study, series, 0, DESCRIPTIONS["image"])
    separate = "separate_folders" in row.oddities
    # The description files name the mask first for calcifications and second for masses; alone, each is the first.
    slots = []
    for slot in range(2):
        words = (seed, row.roi_folder, row.index, slot if separate else 0)
        slots.append((make_uid(*words, "study"), make_uid(*words, "series"), 0 if separate else slot))
    listed = {"mask": 0, "crop": 1} if row.kind == "calc" else {"mask": 1, "crop": 0}
    actual = {"mask": listed["crop"], "crop": listed["mask"]} if "swapped" in row.oddities else listed

    def place(content, slot):
        inside = content if separate else min(actual, key=actual.get)  # a folder is called after its first file
        unknown = inside == "mask" and "mask_without_description" in row.oddities
        return Place(content, row.roi_folder, *slots[slot], "NA" if unknown else DESCRIPTIONS[inside])

    places = [place(content, actual[content]) for content in ("mask", "crop")]
    return image, *places, *(place(content, listed[content]).listed() for content in ("mask", "crop"))


def write_dicom(
    path: Path, pixels: np.ndarray, photometric: str = "MONOCHROME2", keep: float = 1.0, bits: int | None = None, **tags
) -> None:
    """Write unsigned pixels (rows, columns) as an explicit VR little endian DICOM file with these tags.

    MONOCHROME1 stores them inverted, so that the file shows the same picture. keep: share of the bytes to write.
    bits: those stored, which hold all pixels; default: all of the type.
    """
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = make_uid(*tags.values())
    dataset.Modality = "MG"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PhotometricInterpretation = photometric
    brightest = pixels.dtype.type(2**dataset.BitsStored - 1)
    stored = brightest - pixels if photometric == "MONOCHROME1" else pixels
    dataset.PixelData = stored.tobytes() + b"\0" * (stored.nbytes % 2)
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    write_bytes(path, buffer.getvalue(), keep)


def write_bytes(path: Path, data: bytes, keep: float = 1.0) -> None:
    """Write the first bytes of `data`. keep: the share of them."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data[: round(keep * len(data))])


def write_view(rows: Sequence[Row], drawing: Drawing, out: Path, tree: str) -> list[dict]:
    """Draw one view of a patient and write the files of all its rows. Returns their rows of dicom_info.csv."""
    patient, view = rows[0].patient, rows[0].view
    img, masks = drawing.draw(patient, view)
    info, done = [], set()
    for row in rows:
        mask = masks[row.index]
        x, y, w, h = cv2.boundingRect(mask)
        margin = max(1, max(w, h) // 10)
        crop = img[max(y - margin, 0) : y + h + margin, max(x - margin, 0) : x + w + margin]
        if "mask_size" in row.oddities:
            size = round(0.83 * drawing.width), round(0.87 * drawing.height)
            mask = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        for place, pixels in zip(place_files(row, drawing.seed)[:3], (img, mask, crop), strict=True):
            path = place.path(tree)
            if path in done:  # the image of several findings
                continue
            done.add(path)
            keep = 0.6 if place.content == "image" and "truncated" in row.oddities else 1
            tags = {"PatientID": place.folder, "Laterality": patient.side[0], "PatientOrientation": view}
            tags |= {"StudyInstanceUID": place.study, "SeriesInstanceUID": place.series}
            if not (place.content == "mask" and "mask_without_description" in row.oddities):
                tags["SeriesDescription"] = DESCRIPTIONS[place.content]
            if tree == "jpeg":
                grey = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
                write_bytes(out / path, cv2.imencode(".jpg", grey)[1].tobytes(), keep)
            else:
                inverted = place.content == "image" and "monochrome1" in row.oddities
                tags["InstanceNumber"] = place.position + 1
                write_dicom(out / path, pixels, "MONOCHROME1" if inverted else "MONOCHROME2", keep, **tags)
            tags |= {"file_path": f"CBIS-DDSM/dicom/{place.series}/1-{place.position + 1}.dcm"}
            tags |= {"image_path": f"CBIS-DDSM/{path}", "Rows": pixels.shape[0], "Columns": pixels.shape[1]}
            tags |= {"BitsAllocated": 8 * pixels.itemsize, "BitsStored": 8 * pixels.itemsize, "Modality": "MG"}
            info.append(tags | {"PhotometricInterpretation": "MONOCHROME2"})
    return info


def describe_download(row: Row, old_header: bool, seed: int) -> list:
    """Return a row of a description file as a list of its cells."""
    rng = np.random.default_rng([seed, row.patient.index, 4, row.index])
    _, first, _, second = DESCRIPTORS[row.kind]
    words = [row.patient.side, row.view, row.number, "calcification" if row.kind == "calc" else "mass"]
    descriptors = [str(rng.choice(first)), str(rng.choice(second))]
    assessment = 5 if row.pathology == "MALIGNANT" else int(rng.choice([0, 2, 3, 4]))
    image, _, _, mask, crop = place_files(row, seed)
    # As in the real files, the last path but one of calcifications and the last of masses ends with a newline.
    paths = [image.listed(), crop, mask]
    paths[1 if row.kind == "calc" else 2] += "\n"
    if old_header:
        paths = [path.replace("/", "\\") for path in paths]
    density = 1 + row.patient.index % 4
    subtlety = int(rng.integers(1, 6))
    return [row.patient.name, density, *words, *descriptors, assessment, row.pathology, subtlety, *paths]


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence], delimiter: str = ",") -> None:
    """Write a table with CRLF at the ends of lines."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([header, *rows])
    write_bytes(path, text.getvalue().encode())


def count_oddities(rows: Sequence[Row]) -> dict:
    """Return what oddities.json holds: for each oddity the keys, rows or patients that have it, and counts of all."""
    found = {name: sorted({row.key for row in rows if name in row.oddities}) for name in ODDITIES}
    found["swapped"] = sorted(row.roi_folder for row in rows if "swapped" in row.oddities)
    by_key, divisions = defaultdict(list), defaultdict(set)
    for row in rows:
        by_key[row.key].append(row)
        divisions[row.patient.name].add(row.division)
    found["patient_in_both_sets"] = sorted(name for name, sets in divisions.items() if len(sets) == 2)
    found["key_in_both_sets"] = sorted(k for k, group in by_key.items() if len({r.division for r in group}) == 2)
    found["key_in_both_types"] = sorted(k for k, group in by_key.items() if len({r.kind for r in group}) == 2)
    for name, is_odd in (
        ("several_masks", lambda group: len({r.roi_folder for r in group}) < len(group)),
        ("mixed_pathologies", lambda group: 0 < sum(r.pathology == "MALIGNANT" for r in group) < len(group)),
        ("several_abnormalities", lambda group: len({(r.kind, r.number) for r in group}) > 1),
    ):
        found[name] = sorted(key for key, group in by_key.items() if is_odd(group))
    counts = {
        "rows": len(rows) + len(found["repeated_row"]),
        "patients": len(divisions),
        "images": len(by_key),
        "image_folders": len({row.image_folder for row in rows}),
        "malignant_images": sum(any(r.pathology == "MALIGNANT" for r in group) for group in by_key.values()),
        "rois": len({row.roi_folder for row in rows}),
    }
    return {"counts": counts, "oddities": found}


def make_download(
    out: str | Path,
    *,
    test_size: float = 0.2,
    tree: str = "uid",
    oddities: str = "all",
    old_header: bool = False,
    **drawing,
) -> list[Row]:
    """Write a folder like a download of CBIS-DDSM into the new or empty folder `out`.

    Below it are the four description files (`csv/` holds them in the tree "jpeg", with dicom_info.csv), the images
    (`CBIS-DDSM/` or `jpeg/`), README.txt and oddities.json. Every patient has findings; the share `test_size` of
    them is in the official test set.

    tree: "uid", as the description files have it; "descriptive" and "descriptive2", dates and series descriptions
    as the two later downloads name folders; "jpeg", the JPEG re-release.
    oddities: "all", see ODDITIES (as many as there are patients for), or "none". Newlines in the path cells are
    always there. old_header: the older column names and backslash paths. drawing: options of `Drawing`.
    The same options give the same bytes for any number of jobs. Returns the list of `Row`s; with the patient, view
    and index of each, `draw_view` gives the true pixels and mask.
    Raises InputError for a folder with content and for shares that cannot be had.
    """
    out, drawing = Path(out), Drawing(**drawing)
    drawing.check(out)
    patients, seed = drawing.patients, drawing.seed
    people, odd = draw_patients(patients, drawing.prevalence, 1 - drawing.prevalence, seed), {}
    if oddities == "all":
        people, odd = add_oddities(people, seed)
    if tree == "jpeg":
        odd = {name: oddity for name, oddity in odd.items() if oddity != "monochrome1"}
    try:
        malignant = [p.malignant for p in people]
        _, test = stratified_split([p.name for p in people], malignant, test_size, seed, "--test-size")
    except InputError as error:
        raise InputError(f"{error}, or more --patients than {patients}") from None
    divisions = {p.name: "Test" if p.name in test else "Training" for p in people}
    rows = make_rows(people, drawing.views, divisions, odd, seed)
    groups = defaultdict(list)
    for row in rows:
        groups[row.key].append(row)
    info = drawing.run(write_view, list(groups.values()), out=out, tree=tree)
    tables = out / "csv" if tree == "jpeg" else out
    if tree == "jpeg":
        cells = [[line.get(name, "") for name in JPEG_INFO] for group in info for line in group]
        write_rows(tables / "dicom_info.csv", JPEG_INFO, cells)
    for kind, (first, _, second, _) in DESCRIPTORS.items():
        density = "breast density" if kind == "calc" else "breast_density"
        header = HEADERS[old_header].format(density=density, kind=kind, first=first, second=second).split(",")
        for division, name in (("Training", "train"), ("Test", "test")):
            cells = []
            for row in (row for row in rows if (row.kind, row.division) == (kind, division)):
                cells += [describe_download(row, old_header, seed)] * (1 + ("repeated_row" in row.oddities))
            write_rows(tables / f"{kind}_case_description_{name}_set.csv", header, cells)
    write_bytes(out / "oddities.json", json.dumps({"tree": tree} | count_oddities(rows), indent=2).encode())
    like = ", laid out like a download of CBIS-DDSM, for mammo prepare cbis-ddsm"
    drawing.write_readme(out, like, f"oddities: {oddities}", CONTENT.format(tree=tree))
    return rows
