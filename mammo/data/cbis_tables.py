"""Read the description files of CBIS-DDSM: who and what is on which image, and what is odd about the rows."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

from mammo.base.files import InputError, walk_files
from mammo.base.tables import find_columns, open_csv
from mammo.data.listing import Listing, Picture

# Where in the description files, in the two headers in circulation; "_" and " " are the same, and so is case.
CBIS_COLUMNS = {
    **{"patient": ("patient id",), "side": ("left or right breast", "side"), "view": ("image view", "view")},
    **{"number": ("abnormality id", "abn num"), "type": ("abnormality type",), "pathology": ("pathology",)},
    "image": ("image file path", "od img path"),
    "crop": ("cropped image file path", "od crop path"),
    "mask": ("roi mask file path", "mask path"),
}

CBIS_VALUES = {"side": ("LEFT", "RIGHT"), "view": ("CC", "MLO"), "type": ("calcification", "mass")}
CBIS_VALUES |= {"pathology": ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK")}

# A folder of one view, or with a number at its end of one lesion; also the PatientID in its DICOM files.
FOLDER = re.compile(r"(Calc|Mass)-(Training|Test)_(P_\d+)_(LEFT|RIGHT)_(CC|MLO)(?:_(\d+))?")

# Counted for each description file, and kinds of images that report.json lists, whether or not there are any.
TABLE_ODDITIES = ("newline_in_path_cell", "backslash_path", "roi_and_crop_in_different_folders")
IMAGE_ODDITIES = (
    *("mixed_pathologies", "images_in_both_official_sets"),
    *("images_in_calc_and_mass", "images_in_calc_and_mass_of_one_set"),
)


class Finding(NamedTuple):
    """Hold one row of the description files. image, crop, mask: path cells, as tuples of their parts."""

    patient: str
    side: str
    view: str
    number: int
    type: str  # calc or mass
    pathology: str
    official: str  # train or test
    image: tuple[str, ...]
    crop: tuple[str, ...]
    mask: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.patient}_{self.side}_{self.view}"

    @property
    def image_folder(self) -> str:
        """Return the folder of its view, by its path cell or, where that has none, as the download names them."""
        division = {"train": "Training", "test": "Test"}[self.official]
        return find_view_folder(self.image) or f"{self.type.capitalize()}-{division}_{self.key}"

    @property
    def roi_folder(self) -> str:
        return find_view_folder(self.mask) or f"{self.image_folder}_{self.number}"

    @property
    def malignant(self) -> bool:
        return self.pathology == "MALIGNANT"


def find_view_folder(parts: Iterable[str]) -> str | None:
    """Return the first part of a path that is a `FOLDER`."""
    return next(filter(FOLDER.fullmatch, parts), None)


def find_tables(folder: str | Path) -> list[Path]:
    """Find the description files in `folder` or below it, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: Expected the one that holds the description files")
    paths = [path for path in walk_files(folder) if re.fullmatch(r"[^.].*case_description.*\.csv", path.name)]
    paths.sort(key=lambda path: path.name)
    if not paths:
        expected = "Expected calc_case_description_train_set.csv and its three siblings there or below"
        raise InputError(f"{folder}: no description files: {expected}; name their folder with --csv-dir")
    for path, following in pairwise(paths):
        if path.name == following.name:
            raise InputError(f"{path} and {following}: two files of one name; name the right folder with --csv-dir")
    for kind, division in product(("calc", "mass"), ("train", "test")):
        if not any(kind in path.name and division in path.name for path in paths):
            print(f"Warning: no {kind}_case_description_{division}_set.csv in {folder}")
    return paths


def read_cbis_table(path: str | Path) -> tuple[list[Finding], Counter]:
    """Read the rows of one description file, in its order, and count the rows that have each of its oddities.

    Raises InputError, which names the line that is wrong. Rows with an unknown value are never left out: the label of
    the image may depend on them.
    """
    findings, oddities = [], Counter()
    division = re.findall("train|test", Path(path).stem.lower())
    with open_csv(path) as (header, rows):
        places = find_columns(path, header, CBIS_COLUMNS)
        for where, cells in rows:
            cells = {name: cells[place] for name, place in places.items()}
            findings.append(_read_finding(cells, where, division[-1] if division else None, oddities))
    return findings, oddities


def _read_finding(cells: Mapping[str, str], where: str, division: str | None, oddities: Counter) -> Finding:
    paths = {name: cells[name] for name in ("image", "crop", "mask")}
    oddities["newline_in_path_cell"] += any("\n" in path or "\r" in path for path in paths.values())
    oddities["backslash_path"] += any("\\" in path for path in paths.values())
    paths = {name: _read_path(path, f"{where}, {CBIS_COLUMNS[name][0]}") for name, path in paths.items()}
    oddities["roi_and_crop_in_different_folders"] += paths["crop"][:-1] != paths["mask"][:-1]
    cells = {name: cell.strip() for name, cell in cells.items()}
    for name, allowed in CBIS_VALUES.items():
        if cells[name] not in allowed:
            raise InputError(f"{where}: unknown {name}: Expected {' or '.join(allowed)}. Received {cells[name]!r}")
    patient = re.search(r"P_\d+", cells["patient"])
    if not patient:
        raise InputError(f"{where}: unknown patient: Expected an id like P_00001. Received {cells['patient']!r}")
    if not re.fullmatch(r"0*[1-9]\d{0,3}", cells["number"]):
        raise InputError(f"{where}: unknown abnormality id: Expected 1, 2, ... Received {cells['number']!r}")
    folder = find_view_folder(paths["image"])
    if division is None and folder is None:
        raise InputError(f"{where}: in the official training or test set? Expected a file name that has train or test")
    official = division or ("test" if "-Test_" in folder else "train")
    kind = "calc" if cells["type"] == "calcification" else "mass"
    what = int(cells["number"]), kind, cells["pathology"], official
    finding = Finding(patient[0], cells["side"], cells["view"], *what, **paths)
    for name, path in paths.items():
        found = find_view_folder(path)
        if found and "_".join(FOLDER.fullmatch(found).group(3, 4, 5)) != finding.key:
            raise InputError(f"{where}: the {name} path is of another image. Expected {finding.key}. Received {found}")
    return finding


def _read_path(cell: str, where: str) -> tuple[str, ...]:
    """Return the parts of a path cell below whatever drive or "/" it begins with, newlines dropped; ".." is refused."""
    path = re.sub(r"\s*[\r\n]\s*", "", cell).strip().replace("\\", "/")
    parts = tuple(part for part in re.sub("^[A-Za-z]:", "", path).split("/") if part not in ("", "."))
    if ".." in parts:
        raise InputError(f"{where}: Expected a path below the download folder. Received {path!r}")
    if not path.isprintable():
        raise InputError(f"{where}: Expected a path. Received {path!r}")
    return parts


@dataclass(frozen=True)
class CbisPicture(Picture):
    """Hold one image, and all findings in it."""

    findings: tuple[Finding, ...] = ()


def is_positive(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is malignant."""
    return any(finding.malignant for finding in findings)


def read_cbis_tables(paths: Sequence[Path]) -> Listing:
    """Read and merge the description files; who is in the official test set too has all images in the test set."""
    rows, files = [], {}
    for path in paths:
        findings, oddities = read_cbis_table(path)
        rows += findings
        files[path.name] = _count(findings) | {name: oddities[name] for name in TABLE_ODDITIES}
    if not rows:
        raise InputError(f"{', '.join(map(str, paths))}: no rows below the header")
    repeated = Counter(rows)
    images, lesions, divisions = defaultdict(list), defaultdict(set), defaultdict(set)
    for finding in sorted(repeated, key=lambda row: (row.key, row.type, row.number)):
        images[finding.key].append(finding)
        lesions[finding.key, finding.type, finding.number].add(finding.pathology)
        divisions[finding.patient].add(finding.official)
    pictures = []
    for key, findings in images.items():
        official = "test" if "test" in divisions[findings[0].patient] else "train"
        who = findings[0][:3]
        pictures.append(CbisPicture("", is_positive(findings), *who, official, key, findings=tuple(findings)))
    differing = [(" ".join(map(str, lesion)), sorted(found)) for lesion, found in lesions.items() if len(found) > 1]
    merged = [f"{row.key} {row.type} {row.number}: {n} rows" for row, n in repeated.items() if n > 1]
    repairs = _list_oddities(images) | {
        "duplicate_rows_merged": merged,
        "pathologies_of_one_lesion_differ": [f"{lesion}: {', '.join(found)}" for lesion, found in differing],
        "patients_in_both_official_sets": sorted(patient for patient, sets in divisions.items() if len(sets) == 2),
    }
    counts = _count(rows) | {"image_folders": len({row.image_folder for row in rows}), "lesions": len(lesions)}
    counts |= {"positive_images": sum(picture.positive for picture in pictures)}
    return Listing(pictures, repairs=repairs, counts=counts, report={"tables": files})


def _list_oddities(images: Mapping[str, Sequence[Finding]]) -> dict[str, list[str]]:
    """List the images whose findings differ in what matters, by kind. images: findings by the name of the image."""
    listed = defaultdict(list, {kind: [] for kind in IMAGE_ODDITIES})
    for key, findings in images.items():
        divisions, types = {row.official for row in findings}, {row.type for row in findings}
        if is_positive(findings) and not all(row.malignant for row in findings):
            listed["mixed_pathologies"].append(key)
        if len(divisions) == 2:
            listed["images_in_both_official_sets"].append(key)
        if len(types) == 2:
            listed["images_in_calc_and_mass"].append(key)
        if len({(row.official, row.type) for row in findings}) > len(divisions):  # both types in one
            listed["images_in_calc_and_mass_of_one_set"].append(key)
    return dict(listed)


def _count(findings: Sequence[Finding]) -> dict[str, int]:
    keys, patients = {finding.key for finding in findings}, {finding.patient for finding in findings}
    return {"rows": len(findings), "images": len(keys), "patients": len(patients)}
