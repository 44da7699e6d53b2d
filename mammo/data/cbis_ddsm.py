"""CBIS-DDSM as downloaded: its description files, its folder layouts, and the files of one image.

Three layouts are in circulation: folders named by UID, as the description files have them; folders named by date and
series description; and the JPEG re-release. Which file of a lesion is its mask and which its crop is told by their
content.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from mammo.base.files import InputError, walk_files, write_img
from mammo.base.tables import find_columns, missing_columns, open_csv
from mammo.base.work import Outcome
from mammo.data.prepare import whole_img_path, write_whole
from mammo.images.reading import to_uint16

# Where in the description files, in the two headers in circulation; "_" and " " are the same, and so is case.
COLUMNS = {
    "patient": ("patient id",),
    "side": ("left or right breast", "side"),
    "view": ("image view", "view"),
    "number": ("abnormality id", "abn num"),
    "type": ("abnormality type",),
    "pathology": ("pathology",),
    "image": ("image file path", "od img path"),
    "crop": ("cropped image file path", "od crop path"),
    "mask": ("roi mask file path", "mask path"),
}

ALLOWED = {
    "side": ("LEFT", "RIGHT"),
    "view": ("CC", "MLO"),
    "type": ("calcification", "mass"),
    "pathology": ("MALIGNANT", "BENIGN", "BENIGN_WITHOUT_CALLBACK"),
}

DICOM_INFO_COLUMNS = ("image_path", "PatientID", "SeriesDescription")

# A folder of one view, or with a number at its end of one lesion; also the PatientID in its DICOM files.
FOLDER = re.compile(r"(Calc|Mass)-(Training|Test)_(P_\d+)_(LEFT|RIGHT)_(CC|MLO)(?:_(\d+))?")

# What SeriesDescription has, in capitals or not.
IMAGE_DESCRIPTION, MASK_DESCRIPTION, CROP_DESCRIPTION = "full mammogram", "roi mask", "cropped"

# A mask that JPEG has blurred: nearly all pixels within this fraction of the range of its darkest or brightest.
JPEG_TOLERANCE = 0.15

JPEG_SHARE = 0.05

# Masks of another size than their image have more than this share of its pixels, and most crops have fewer.
LEAST_SHARE = 0.25

# Sizes that differ, though not in the aspect ratio by more than this, are said to be of one shape.
ASPECT_TOLERANCE = 0.02

# Counted for each description file.
TABLE_ODDITIES = ("newline_in_path_cell", "backslash_path", "roi_and_crop_in_different_folders")

# Kinds of repairs that report.json counts even where there are none, besides those found in the tables.
REPAIRS = (
    "mask_found_by_content",
    "mask_resized",
    "mask_of_another_size_not_taken",
    "masks_united",
    "monochrome1_inverted",
    "8_bit_scaled_to_16_bit",
    "one_copy_of_image_kept",
    "unreadable_copy_of_image_not_needed",
    "unreadable_file_not_needed",
    "several_files_for_one_image",
)


class Finding(NamedTuple):
    """One row of the description files. image, crop, mask: path cells, as tuples of their parts."""

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
        """The folder of its view, as its path cell has it or, where that has none, as the download names them."""
        division = {"train": "Training", "test": "Test"}[self.official]
        return _find_folder(self.image) or f"{self.type.capitalize()}-{division}_{self.key}"

    @property
    def roi_folder(self) -> str:
        return _find_folder(self.mask) or f"{self.image_folder}_{self.number}"

    @property
    def malignant(self) -> bool:
        return self.pathology == "MALIGNANT"


def _find_folder(parts: Iterable[str]) -> str | None:
    return next(filter(FOLDER.fullmatch, parts), None)


# ------------------------------------------------------------------------------------------- description files


def find_tables(folder) -> list[Path]:
    """The description files in `folder` or below it, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: Expected the one that holds the description files")
    paths = [path for path in walk_files(folder) if re.fullmatch(r"[^.].*case_description.*\.csv", path.name)]
    paths.sort(key=lambda path: path.name)
    if not paths:
        raise InputError(
            f"{folder}: no description files: Expected calc_case_description_train_set.csv and its three siblings "
            f"there or below; name their folder with --csv-dir"
        )
    names = [path.name for path in paths]
    for path, following in pairwise(paths):
        if path.name == following.name:
            raise InputError(f"{path} and {following}: two files of one name; name the right folder with --csv-dir")
    for kind in ("calc", "mass"):
        for division in ("train", "test"):
            if not any(kind in name and division in name for name in names):
                print(f"Warning: no {kind}_case_description_{division}_set.csv in {folder}")
    return paths


def read_table(path) -> tuple[list[Finding], Counter]:
    """Rows of one description file, in its order, and how many rows have each of its oddities.

    InputError names the line that is wrong. Rows with an unknown value are never left out: the label of the image
    may depend on them.
    """
    findings, oddities = [], Counter()
    division = re.findall("train|test", Path(path).stem.lower())
    with open_csv(path) as (header, rows):
        places = find_columns(path, header, COLUMNS)
        for where, cells in rows:
            cells = {name: cells[place] for name, place in places.items()}
            findings.append(_read_finding(cells, where, division[-1] if division else None, oddities))
    return findings, oddities


def _read_finding(cells: Mapping[str, str], where: str, division: str | None, oddities: Counter) -> Finding:
    paths = {name: cells[name] for name in ("image", "crop", "mask")}
    oddities["newline_in_path_cell"] += any("\n" in path or "\r" in path for path in paths.values())
    oddities["backslash_path"] += any("\\" in path for path in paths.values())
    paths = {name: _read_path(path, f"{where}, {COLUMNS[name][0]}") for name, path in paths.items()}
    oddities["roi_and_crop_in_different_folders"] += paths["crop"][:-1] != paths["mask"][:-1]
    cells = {name: cell.strip() for name, cell in cells.items()}
    for name, allowed in ALLOWED.items():
        if cells[name] not in allowed:
            raise InputError(f"{where}: unknown {name}: Expected {' or '.join(allowed)}. Received {cells[name]!r}")
    patient = re.search(r"P_\d+", cells["patient"])
    if not patient:
        raise InputError(f"{where}: unknown patient: Expected an id like P_00001. Received {cells['patient']!r}")
    if not re.fullmatch(r"0*[1-9]\d{0,3}", cells["number"]):
        raise InputError(f"{where}: unknown abnormality id: Expected 1, 2, ... Received {cells['number']!r}")
    folder = _find_folder(paths["image"])
    if division is None and folder is None:
        raise InputError(f"{where}: in the official training or test set? Expected a file name that has train or test")
    official = division or ("test" if "-Test_" in folder else "train")
    kind = "calc" if cells["type"] == "calcification" else "mass"
    number = int(cells["number"])
    finding = Finding(
        patient[0], cells["side"], cells["view"], number, kind, cells["pathology"], official, **paths
    )  # fmt: skip
    for name, path in paths.items():
        found = _find_folder(path)
        if found and "_".join(FOLDER.fullmatch(found).group(3, 4, 5)) != finding.key:
            raise InputError(f"{where}: the {name} path is of another image. Expected {finding.key}. Received {found}")
    return finding


def _read_path(cell: str, where: str) -> tuple[str, ...]:
    """Parts of a path cell below whatever drive or folder "/" it gives. Newlines are dropped, ".." is refused."""
    path = re.sub(r"\s*[\r\n]\s*", "", cell).strip().replace("\\", "/")
    parts = tuple(part for part in re.sub("^[A-Za-z]:", "", path).split("/") if part not in ("", "."))
    if ".." in parts:
        raise InputError(f"{where}: Expected a path below the download folder. Received {path!r}")
    if not path.isprintable():
        raise InputError(f"{where}: Expected a path. Received {path!r}")
    return parts


class Tables(NamedTuple):
    """All findings by the key of their image, images sorted, duplicates merged; and the counts of report.json."""

    images: dict[str, list[Finding]]
    counts: dict
    repairs: dict[str, list[str]]

    def cancer(self) -> dict[str, bool]:
        """For each patient, whether any finding is malignant."""
        cancer = defaultdict(bool)
        for findings in self.images.values():
            cancer[findings[0].patient] |= is_positive(findings)
        return dict(cancer)


def is_positive(findings: Iterable[Finding]) -> bool:
    return any(finding.malignant for finding in findings)


def read_tables(paths: Sequence[Path]) -> Tables:
    """Read and merge the description files."""
    rows, files = [], {}
    for path in paths:
        findings, oddities = read_table(path)
        rows += findings
        files[path.name] = _count(findings) | {name: oddities[name] for name in TABLE_ODDITIES}
    if not rows:
        raise InputError(f"{', '.join(map(str, paths))}: no rows below the header")
    repairs = {}
    repeated = Counter(rows)
    repairs["duplicate_rows_merged"] = [
        f"{row.key} {row.type} {row.number}: {n} rows" for row, n in repeated.items() if n > 1
    ]
    images, lesions = defaultdict(list), defaultdict(set)
    for finding in sorted(repeated, key=lambda row: (row.key, row.type, row.number)):
        images[finding.key].append(finding)
        lesions[finding.key, finding.type, finding.number].add(finding.pathology)

    def listed(differ):
        return sorted(key for key, findings in images.items() if differ(findings))

    def both(findings, attribute):
        return len({getattr(finding, attribute) for finding in findings}) == 2

    divisions = defaultdict(set)
    for row in rows:
        divisions[row.patient].add(row.official)
    repairs["mixed_pathologies"] = listed(
        lambda findings: is_positive(findings) and not all(finding.malignant for finding in findings)
    )
    repairs["pathologies_of_one_lesion_differ"] = [
        f"{key} {kind} {number}: {', '.join(sorted(found))}"
        for (key, kind, number), found in lesions.items()
        if len(found) > 1
    ]
    repairs["patients_in_both_official_sets"] = sorted(patient for patient, sets in divisions.items() if len(sets) == 2)
    repairs["images_in_both_official_sets"] = listed(lambda findings: both(findings, "official"))
    repairs["images_in_calc_and_mass_of_one_set"] = listed(
        lambda findings: any(
            both([f for f in findings if f.official == official], "type") for official in ("train", "test")
        )
    )
    repairs["images_in_calc_and_mass"] = listed(lambda findings: both(findings, "type"))
    counts = _count(rows) | {
        "image_folders": len({row.image_folder for row in rows}),
        "lesions": len(lesions),
        "positive_images": sum(map(is_positive, images.values())),
    }
    return Tables(dict(images), {"tables": files, "all": counts}, repairs)


def _count(findings: Sequence[Finding]) -> dict[str, int]:
    keys, patients = {finding.key for finding in findings}, {finding.patient for finding in findings}
    return {"rows": len(findings), "images": len(keys), "patients": len(patients)}


# ---------------------------------------------------------------------------------------------- download folder


class Download(NamedTuple):
    """Where the images lie. Paths are relative to the download folder.

    by_series: files by the name of the folder they are in. by_folder: files by the `FOLDER` they are below or,
    where there is none, by their PatientID. descriptions: SeriesDescription of files, where a table tells it.
    """

    by_series: dict[str, list[str]]
    by_folder: dict[str, list[str]]
    descriptions: dict[str, str]

    def find(self, cell: Sequence[str], folder: str) -> list[str]:
        """Files that the path cell of an image may mean: those of its series or, where there are none, of its `folder`.

        Where some of a series have the name that the cell gives, only these.
        """
        series = self._find_series(cell, folder)
        named = [path for path in series if path.split("/")[-1] == cell[-1]]
        return named or series or self.by_folder.get(folder, [])

    def find_roi(self, row: Finding, findings: Iterable[Finding]) -> tuple[str, ...]:
        """Files that may be the mask of a row, which is one of the `findings` of its image.

        Those of the series that its path cells name. Where there are none, those of its ROI folder that are not of
        the series of another row; where there is no such folder, those of the folder of its view.
        """
        if own := self._find_own(row):
            return tuple(sorted(own))
        folder = row.roi_folder if row.roi_folder in self.by_folder else row.image_folder
        return tuple(sorted(set(self.by_folder.get(folder, ())).difference(*map(self._find_own, findings))))

    def _find_own(self, row: Finding) -> set[str]:
        return {path for cell in (row.mask, row.crop) for path in self._find_series(cell, row.roi_folder)}

    def _find_series(self, cell: Sequence[str], folder: str) -> list[str]:
        """Files of the series that a cell names: in the folder that it gives, else `folder`, if it is there."""
        series, below = self.by_series.get(_series(cell), []), self.by_folder.get(_find_folder(cell) or folder)
        return series if below is None else [path for path in series if path in below]


def _series(cell: Sequence[str]) -> str | None:
    return cell[-2] if len(cell) > 1 else None


def scan_download(root, skip: Iterable = ()) -> Download:
    """Find all images below `root`, in any of the layouts that are in circulation, but not in the folders `skip`."""
    from mammo.images.reading import DICOM_SUFFIXES, is_image

    by_series, by_folder, orphans = defaultdict(list), defaultdict(list), []
    descriptions, patient_ids = {}, {}
    for file in walk_files(root, skip):
        relative = file.relative_to(root)
        path, series = relative.as_posix(), relative.parent.name
        if file.name == "dicom_info.csv":
            patient_ids, descriptions = read_dicom_info(file)
        if not is_image(file):
            continue
        by_series[series].append(path)
        if view := _find_folder(reversed(relative.parts[:-1])):
            by_folder[view].append(path)
        else:
            orphans.append(path)
    if not by_series:
        raise InputError(f"{root}: no images below it: Expected the download, DICOM or JPEG files")
    told = {}
    for path in orphans:
        place = "/".join(path.split("/")[-2:])
        if place in patient_ids:
            by_folder[patient_ids[place]].append(path)
            told[path] = descriptions[place]
        elif path.lower().endswith(DICOM_SUFFIXES):
            try:
                by_folder[read_header(root, path, {}).patient_id].append(path)
            except InputError:  # it may be found by its series, and is reported where it is wanted
                continue
    return Download(dict(by_series), dict(by_folder), told)


def read_dicom_info(path) -> tuple[dict[str, str], dict[str, str]]:
    """PatientID and SeriesDescription of the files of the JPEG re-release, by <folder>/<file name>."""
    with open_csv(path) as (header, rows):
        if missing := [name for name in DICOM_INFO_COLUMNS if name not in header]:
            raise missing_columns(path, missing, header)
        columns = [header.index(name) for name in DICOM_INFO_COLUMNS]
        patients, descriptions = {}, {}
        for _, cells in rows:
            image, patient, description = (cells[column].strip() for column in columns)
            place = "/".join(image.replace("\\", "/").split("/")[-2:])
            patients[place], descriptions[place] = patient, description
    return patients, descriptions


class Header(NamedTuple):
    """What is known of an image file without its pixels. description: SeriesDescription in small letters, or ""."""

    path: str
    height: int
    width: int
    patient_id: str
    description: str
    inverted: bool

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def pixels(self) -> int:
        return self.height * self.width


def read_header(root, path: str, descriptions: Mapping[str, str]) -> Header:
    """InputError when there is no header to be read, as `read_dicom_header` and `read_size`."""
    from mammo.images.reading import DICOM_SUFFIXES, read_dicom_header, read_size

    file = Path(root, path)
    try:
        if not path.lower().endswith(DICOM_SUFFIXES):
            return Header(path, *read_size(file), "", descriptions.get(path, "").lower(), False)
        tags = read_dicom_header(file)
    except InputError as error:
        raise InputError(str(error).replace(str(file), path)) from None
    described = str(tags.get("SeriesDescription") or "").lower()
    inverted = tags.get("PhotometricInterpretation") == "MONOCHROME1"
    return Header(path, int(tags.Rows), int(tags.Columns), str(tags.get("PatientID") or ""), described, inverted)


def read_grey(root, path: str):
    """Pixels (H, W) of an image file; InputError as `read_img`, naming the path below the download folder."""
    from mammo.images.reading import check_grey, read_img

    file = Path(root, path)
    try:
        # The re-release has some grey pictures in three channels.
        return check_grey(file, read_img(file, gs_255=is_lossy(path)))
    except InputError as error:
        raise InputError(str(error).replace(str(file), path)) from None


# -------------------------------------------------------------------------------------------------- one image


class Copy(NamedTuple):
    """One of the files that hold an image: those of its calc and of its mass rows may differ."""

    folder: str
    files: tuple[str, ...]  # as `Download.find` gives them


class Candidates(NamedTuple):
    """Files that may be the masks of rows of one lesion.

    copy: index of the `Copy` of their image. named: the files that the mask cells of these rows name. lesions: the
    number of lesions that these files may be of.
    """

    copy: int
    named: tuple[str, ...]
    files: tuple[str, ...]
    lesions: int


class Lesion(NamedTuple):
    """All rows with one image, type and number."""

    type: str
    number: int
    pathology: str
    masks: tuple[Candidates, ...]


class Plan(NamedTuple):
    """What is to be made of one image, in types that JSON can hold.

    folder: of the whole image, such as train/pos; None for no set. whole: options of `make_whole`.
    """

    copies: tuple[Copy, ...]
    lesions: tuple[Lesion, ...]
    folder: str | None
    whole: dict
    descriptions: dict[str, str]

    @property
    def sources(self) -> tuple[str, ...]:
        """All files that the image and its masks may be made from."""
        files = {path for copy in self.copies for path in copy.files}
        return tuple(sorted(files.union(*(masks.files for lesion in self.lesions for masks in lesion.masks))))


def plan_image(findings: Sequence[Finding], download: Download, folder: str | None, whole: dict) -> Plan:
    """The plan for the image of these findings. folder, whole: see `Plan`."""
    copies, lesions, lesions_of = {}, defaultdict(list), Counter()
    for finding in findings:
        name = finding.image_folder
        copies.setdefault(name, Copy(name, tuple(download.find(finding.image, name))))
        lesions[finding.type, finding.number].append(finding)
    order, candidates = list(copies), {}
    for lesion, rows in lesions.items():
        named = candidates[lesion] = defaultdict(dict)
        for row in rows:
            place = order.index(row.image_folder), download.find_roi(row, findings)
            named[place]["/".join(row.mask)] = True
        lesions_of.update(named.keys())
    plans = []
    for (kind, number), rows in lesions.items():
        pathologies = sorted((finding.pathology for finding in rows), key="MALIGNANT".__ne__)
        masks = tuple(
            Candidates(copy, tuple(named), files, lesions_of[copy, files])
            for (copy, files), named in candidates[kind, number].items()
        )
        plans.append(Lesion(kind, number, pathologies[0], masks))
    plan = Plan(tuple(copies.values()), tuple(plans), folder, whole, {})
    descriptions = {path: download.descriptions[path] for path in plan.sources if path in download.descriptions}
    return plan._replace(descriptions=descriptions)


def full_img_path(key: str) -> str:
    return f"full_img/{key}.png"


def mask_path(key: str, lesion: Lesion) -> str:
    return f"roi_mask/{lesion.type.capitalize()}-Training_{key}_{lesion.number}.png"


def list_outputs(key: str, plan: Plan) -> tuple[str, ...]:
    """Paths of all files that `prepare_image` may write for the image, below the output folder."""
    whole = (whole_img_path(key, plan.folder),) if plan.folder else ()
    return full_img_path(key), *whole, *(mask_path(key, lesion) for lesion in plan.lesions)


def prepare_image(item, download, out):
    """Write the full image, the masks and the whole image of one item; see `mammo.base.work.prepare`."""
    plan, result = item.plan, Outcome(item.name)

    def write(path, pixels):
        write_img(Path(out, path), pixels)
        result.outputs.append(path)

    try:
        img, source, headers = read_image(plan, download, result)
        if plan.folder:
            write_whole(img, out, plan.folder, plan.whole, source, result)
        write(full_img_path(item.name), to_uint16(img))
    except InputError as error:
        result.faults.append(f"{item.name}: {error}; left out with its masks")
        return result
    result.facts["lesions"] = []
    for lesion in plan.lesions:
        name = f"{item.name} {lesion.type} {lesion.number}"
        try:
            mask = read_mask(name, lesion, headers, img.shape, plan.descriptions, download, result)
        except InputError as error:
            result.faults.append(f"{name}: {error}")
            continue
        write(mask_path(item.name, lesion), mask)
        result.facts["lesions"].append([lesion.type, lesion.number, lesion.pathology])
    return result


def read_image(plan: Plan, download, result):
    """Pixels and path of the first readable copy of an image, and the header of each copy, None for one without.

    The calc and the mass rows of one view have files of their own, of the same film; one is kept.
    """
    img, headers, problems = None, [], []
    for copy in plan.copies:
        headers.append(None)
        try:
            headers[-1] = header = choose_image(copy, plan.descriptions, download, result)
            if img is None:
                img = check_mammogram(header.path, read_grey(download, header.path))
                kept = header
        except InputError as error:
            problems.append(str(error))
    if img is None:
        raise InputError("; ".join(problems))
    for copy in plan.copies:
        if kept.path not in copy.files:
            result.repairs.append(("one_copy_of_image_kept", f"{result.name}: {kept.path}, not that of {copy.folder}"))
    for problem in problems:
        result.repairs.append(("unreadable_copy_of_image_not_needed", f"{result.name}: {problem}"))
    if kept.inverted:
        result.repairs.append(("monochrome1_inverted", f"{result.name}: {kept.path}"))
    if img.dtype.name == "uint8":
        result.repairs.append(("8_bit_scaled_to_16_bit", f"{result.name}: {kept.path}"))
    return img, kept.path, headers


def choose_image(copy: Copy, descriptions, download, result) -> Header:
    """The header of the full mammogram among the files of `copy`.

    Of several, those that are described as one, by their header, table or path; failing that, those that are not
    described as masks or crops. Of these the largest that has more than two values, which masks have not.
    """
    headers, problems = [], []
    for path in copy.files:
        try:
            headers.append(read_header(download, path, descriptions))
        except InputError as error:
            problems.append(str(error))
    if not headers:
        expected = f"no image of {copy.folder}: Expected a folder of this name, or of its series, in the download"
        raise InputError("; ".join(problems) or expected)
    if len(copy.files) == 1:
        return headers[0]
    others = MASK_DESCRIPTION, CROP_DESCRIPTION
    described = [header for header in headers if IMAGE_DESCRIPTION in f"{header.path} {header.description}".lower()]
    headers = described or [header for header in headers if not any(word in header.description for word in others)]
    headers.sort(key=lambda header: header.pixels, reverse=True)
    for header in headers:
        if header.pixels < LEAST_SHARE * headers[0].pixels:  # a crop, the image itself is missing
            break
        if described or as_mask(read_grey(download, header.path), is_lossy(header.path)) is None:
            text = f"{result.name}: {header.path} of {len(copy.files)} files of {copy.folder}"
            result.repairs.append(("several_files_for_one_image", text))
            result.repairs += [("unreadable_file_not_needed", f"{result.name}: {problem}") for problem in problems]
            return header
    raise InputError(
        f"no image of {copy.folder}: Expected a picture of more than two values. "
        f"Received {len(copy.files)} files such as {copy.files[0]}; {'; '.join(problems) or 'masks and crops'}"
    )


def check_mammogram(path: str, img):
    """`img` if it is a picture of unsigned pixels of more than two values, else InputError."""
    if img.dtype.name not in ("uint8", "uint16"):
        raise InputError(f"{path}: Expected 8- or 16-bit unsigned pixels. Received {img.dtype}")
    if img.min() == img.max():
        raise InputError(f"{path}: the image is constant: Expected a mammogram")
    if as_mask(img, lossy=False) is not None:
        raise InputError(f"{path}: the image has two values, as masks have: Expected a mammogram")
    return img


def read_mask(name: str, lesion: Lesion, headers: Sequence[Header | None], shape, descriptions, download, result):
    """The mask of one lesion, the union of those of its rows: uint8 0/255 (*shape).

    headers: of each copy of the image. shape: of the one that is kept. Raises InputError when a row has no mask.
    """
    import cv2
    import numpy as np

    union, used, repairs = np.zeros(shape, bool), set(), {}  # a dict, so that nothing is listed twice
    images = {header.path for header in headers if header}
    for copy, named, files, lesions in lesion.masks:
        size = headers[copy].size if headers[copy] else shape
        candidates = [path for path in files if path not in images]
        found, others, problems = find_masks(candidates, size, descriptions, download)
        if len(found) < len(named):
            wanted = ", ".join(sorted(named))
            missing = "no mask" if not found else f"no mask for {len(named) - len(found)} of {len(named)} rows"
            reasons = "; ".join([*problems, *map("mask {}".format, [*found, *others])]) or "no file in the download"
            raise InputError(
                f"{missing}: Expected a file of two values and {size[0]} x {size[1]} pixels for {wanted}. "
                f"Received {reasons}"
            )
        if lesions > 1:
            raise InputError(
                f"no mask: {len(found)} masks, such as {min(found)}, may be of any of {lesions} lesions. Expected a "
                f"folder for each, such as {named[0]}"
            )
        for path, mask in found.items():
            if path in used:
                continue
            used.add(path)
            if not is_where_named(path, named, candidates):
                repairs["mask_found_by_content", f"{name}: {path}, not {', '.join(named)}"] = True
            if mask.shape != shape:
                stretch = mask.shape[0] * shape[1] / (mask.shape[1] * shape[0])
                text = "{}: {} from {} x {} to {} x {}".format(name, path, *mask.shape, *shape)
                text += "" if abs(stretch - 1) <= ASPECT_TOLERANCE else ", of another aspect ratio"
                repairs["mask_resized", text] = True
                mask = cv2.resize(mask.astype("uint8"), shape[::-1], interpolation=cv2.INTER_NEAREST) > 0
            union |= mask
        repairs |= {("mask_of_another_size_not_taken", f"{name}: {path}"): True for path in others}
        repairs |= {("unreadable_file_not_needed", f"{name}: {p}"): True for p in problems if "not readable" in p}
    if len(used) > 1:
        repairs["masks_united", f"{name}: {', '.join(sorted(used))}"] = True
    if not union.any():
        raise InputError("nothing is left of the mask once it is resized")
    result.repairs += repairs
    return np.where(union, np.uint8(255), np.uint8(0))


def is_where_named(path: str, named: Iterable[str], candidates: Sequence[str]) -> bool:
    """Whether a mask is the file that one of the cells `named` means, in a layout of whatever names.

    000000.dcm is 1-1.dcm and 1-234.jpg: the first of its folder. Where the folder that a cell gives is not among
    those of the `candidates`, as in the descriptive layouts, the position alone counts; in folders that no layout
    has, not even that.
    """
    parts = path.split("/")
    beside = sorted(candidate for candidate in candidates if candidate.split("/")[:-1] == parts[:-1])
    present = {_series(candidate.split("/")) for candidate in candidates}
    for cell in (cell.split("/") for cell in named):
        position = re.fullmatch(r"(\d+)\.\w+|1-(\d+)\.\w+", cell[-1])
        if _series(cell) in present and _series(cell) != _series(parts):
            continue
        if len(beside) == 1 or not position or not (_find_folder(parts) or _series(cell) in present):
            return True
        if beside.index(path) == (int(position[1]) if position[1] else int(position[2]) - 1):
            return True
    return False


def find_masks(candidates: Sequence[str], size, descriptions, download):
    """Masks among the candidates, by path as boolean arrays; paths of masks not taken; what is wrong with the others.

    Files of two values are masks. Of each folder, those that have the image's `size` (height, width) are taken.
    Where it has none, those of another size are that are described as masks or, failing that, the largest.
    """
    problems, folders = [], defaultdict(lambda: ({}, {}, {}))  # of the image's size, described as masks, others
    for path in candidates:
        exact, described, others = folders[path.rpartition("/")[0]]
        lossy = is_lossy(path)
        try:
            pixels = read_grey(download, path)
            mask = as_mask(pixels, lossy)
            if mask is None:
                problems.append("{} of {} x {} pixels, not of two values".format(path, *pixels.shape))
                continue
            description = read_header(download, path, descriptions).description
            if mask.shape == tuple(size):
                exact[path] = mask
            elif MASK_DESCRIPTION in description:
                described[path] = mask
            elif lossy and (CROP_DESCRIPTION in description or mask.size < LEAST_SHARE * size[0] * size[1]):
                # A crop at the breast's edge has hardly more than two values either.
                problems.append("{} of {} x {} pixels, a crop".format(path, *mask.shape))
            else:
                others[path] = mask
        except InputError as error:
            problems.append(f"not readable: {error}")
    taken, left = {}, []
    for exact, described, others in folders.values():
        largest = sorted(others, key=lambda path: others[path].size)[-1:]
        chosen = exact or described or {path: others[path] for path in largest}
        taken |= chosen
        left += [path for path in exact | described | others if path not in chosen]
    return taken, left, problems


def is_lossy(path: str) -> bool:
    return path.lower().endswith((".jpg", ".jpeg"))


def as_mask(img, lossy: bool):
    """Where an image of two values is bright, or None if it has more or fewer. lossy: JPEG has blurred its edges."""
    import numpy as np

    lowest, highest = int(img.min()), int(img.max())
    if lowest == highest:
        return None
    tolerance = JPEG_TOLERANCE * (highest - lowest) if lossy else 0
    between = np.count_nonzero((img > lowest + tolerance) & (img < highest - tolerance))
    if between > (JPEG_SHARE * img.size if lossy else 0):
        return None
    return img > (lowest + highest) / 2
