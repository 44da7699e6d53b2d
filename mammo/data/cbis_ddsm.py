"""Prepare CBIS-DDSM as downloaded: its folder layouts, and the files of one image.

Three layouts are in circulation: folders named by UID, as the description files have them; folders named by date and
series description; and the JPEG re-release. The content of a lesion's files tells which is its mask and which its crop.
"""

import re
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mammo.base.files import InputError, walk_files
from mammo.base.tables import read_rows, write_csv
from mammo.base.work import Job, Outcome
from mammo.data.cbis_tables import Finding, find_tables, find_view_folder, read_cbis_tables
from mammo.data.listing import FOLDERS, RANDOM_SPLIT, DataSet, Listing, Picture
from mammo.data.patches import ASPECT_TOLERANCE, LESION_COLUMNS
from mammo.data.prepare import finished, full_img_path, whole_img_path, whole_options, write_output, write_whole
from mammo.images.reading import DICOM_SUFFIXES, check_grey, is_image, read_dicom_header, read_img, read_size, to_uint16

DICOM_INFO_COLUMNS = ("image_path", "PatientID", "SeriesDescription")

# What SeriesDescription has, in capitals or not.
IMAGE_DESCRIPTION, MASK_DESCRIPTION, CROP_DESCRIPTION = "full mammogram", "roi mask", "cropped"

# Of a mask that JPEG has blurred, all but this share of the pixels are nearly as dark, or bright, as the extremes.
JPEG_SHARE, JPEG_TOLERANCE = 0.05, 0.15

# Masks of another size than their image have more than this share of its pixels, and most crops have fewer.
LEAST_SHARE = 0.25


# ---------------------------------------------------------------------------------------------- download folder


class CbisFiles(NamedTuple):
    """Hold where the images lie, as paths below the download folder.

    by_series: files by the name of the folder they are in. by_folder: files by the `FOLDER` they are below or,
    where there is none, by their PatientID. descriptions: SeriesDescription of files, where a table tells it.
    """

    by_series: dict[str, list[str]]
    by_folder: dict[str, list[str]]
    descriptions: dict[str, str]

    def find(self, cell: Sequence[str], folder: str) -> list[str]:
        """Return the files that the path cell of an image may mean: its series or, where that has none, its `folder`.

        Where some files of a series have the name that the cell gives, only these.
        """
        series = self._find_series(cell, folder)
        return [path for path in series if path.split("/")[-1] == cell[-1]] or series or self.by_folder.get(folder, [])

    def find_roi(self, row: Finding, findings: Iterable[Finding]) -> tuple[str, ...]:
        """Return the files that may be the mask of a row, one of the `findings` of its image.

        These are the files of the series that its path cells name. Where there are none, they are the files of its ROI
        folder that are not of the series of another row; without such a folder, the files of the folder of its view.
        """
        if own := self._find_own(row):
            return tuple(sorted(own))
        folder = row.roi_folder if row.roi_folder in self.by_folder else row.image_folder
        return tuple(sorted(set(self.by_folder.get(folder, ())).difference(*map(self._find_own, findings))))

    def _find_own(self, row: Finding) -> set[str]:
        return {path for cell in (row.mask, row.crop) for path in self._find_series(cell, row.roi_folder)}

    def _find_series(self, cell: Sequence[str], folder: str) -> list[str]:
        """Return the files of the series that a cell names, in the folder that it gives, else in `folder`."""
        series, below = self.by_series.get(_series(cell), []), self.by_folder.get(find_view_folder(cell) or folder)
        return series if below is None else [path for path in series if path in below]


def _series(cell: Sequence[str]) -> str | None:
    return cell[-2] if len(cell) > 1 else None


def scan_cbis(root: str | Path, skip: Iterable = ()) -> CbisFiles:
    """Find all images below `root`, in any of the layouts that are in circulation, but not in the folders `skip`."""
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
        if view := find_view_folder(reversed(relative.parts[:-1])):
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
            with suppress(InputError):  # it may be found by its series, and is reported where it is wanted
                by_folder[Reader(root, {}).header(path).patient_id].append(path)
    return CbisFiles(dict(by_series), dict(by_folder), told)


def read_dicom_info(path: str | Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read PatientID and SeriesDescription of the files of the JPEG re-release, by <folder>/<file name>."""
    patients, descriptions = {}, {}
    for _, row in read_rows(path, DICOM_INFO_COLUMNS):
        place = "/".join(row["image_path"].replace("\\", "/").split("/")[-2:])
        patients[place], descriptions[place] = row["PatientID"], row["SeriesDescription"]
    return patients, descriptions


class Header(NamedTuple):
    """Hold what is known of an image file without its pixels. description: SeriesDescription in small letters."""

    path: str
    height: int
    width: int
    patient_id: str
    description: str
    inverted: bool

    @property
    def pixels(self) -> int:
        return self.height * self.width


class Reader(NamedTuple):
    """Read files below the download folder `root`; errors name their paths below it. descriptions: see `CbisFiles`."""

    root: str | Path
    descriptions: Mapping[str, str]

    def header(self, path: str) -> Header:
        """Read the header of an image file. Raises InputError as `read_dicom_header` and `read_size`."""
        with self._naming(path) as file:
            if not path.lower().endswith(DICOM_SUFFIXES):
                return Header(path, *read_size(file), "", self.descriptions.get(path, "").lower(), False)
            tags = read_dicom_header(file)
        described = str(tags.get("SeriesDescription") or "").lower()
        inverted = tags.get("PhotometricInterpretation") == "MONOCHROME1"
        return Header(path, int(tags.Rows), int(tags.Columns), str(tags.get("PatientID") or ""), described, inverted)

    def grey(self, path: str) -> np.ndarray:
        """Read the pixels (H, W) of an image file; the re-release has some grey pictures in three channels."""
        with self._naming(path) as file:
            return check_grey(file, read_img(file, gs_255=is_lossy(path)))

    @contextmanager
    def _naming(self, path: str) -> Iterator[Path]:
        file = Path(self.root, path)
        try:
            yield file
        except InputError as error:
            raise InputError(str(error).replace(str(file), path)) from None


# -------------------------------------------------------------------------------------------------- one image


class Copy(NamedTuple):
    """Hold the files of one copy of an image: its calc and its mass rows may name different ones."""

    folder: str
    files: tuple[str, ...]  # as `CbisFiles.find` gives them


class Candidates(NamedTuple):
    """Hold the files that may be the masks of rows of one lesion.

    copy: index of the `Copy` of their image. named: the files that the mask cells of these rows name. lesions: how many
    lesions these files may belong to.
    """

    copy: int
    named: tuple[str, ...]
    files: tuple[str, ...]
    lesions: int


class CbisLesion(NamedTuple):
    """Hold what all rows with one image, type and number say together."""

    type: str
    number: int
    pathology: str
    masks: tuple[Candidates, ...]

    def mask_path(self, key: str) -> str:
        """Return the path of its mask below the output folder, for the image of this name."""
        return f"roi_mask/{self.type.capitalize()}-Training_{key}_{self.number}.png"


class CbisPlan(NamedTuple):
    """Hold what is to be made of one image, in types that JSON can hold.

    folder: of the whole image, such as train/pos; None for no set. whole: options of `make_whole`.
    """

    copies: tuple[Copy, ...]
    lesions: tuple[CbisLesion, ...]
    folder: str | None
    whole: dict
    descriptions: dict[str, str]

    @property
    def sources(self) -> tuple[str, ...]:
        """Return all files that the image and its masks may be made from."""
        files = {path for copy in self.copies for path in copy.files}
        return tuple(sorted(files.union(*(masks.files for lesion in self.lesions for masks in lesion.masks))))


def plan_image(findings: Sequence[Finding], download: CbisFiles, folder: str | None, whole: dict) -> CbisPlan:
    """Return the plan for the image of these findings. folder, whole: see `CbisPlan`."""
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
        pathology = min((finding.pathology for finding in rows), key="MALIGNANT".__ne__)
        places = candidates[kind, number].items()
        masks = (Candidates(place[0], tuple(named), place[1], lesions_of[place]) for place, named in places)
        plans.append(CbisLesion(kind, number, pathology, tuple(masks)))
    plan = CbisPlan(tuple(copies.values()), tuple(plans), folder, whole, {})
    descriptions = {path: download.descriptions[path] for path in plan.sources if path in download.descriptions}
    return plan._replace(descriptions=descriptions)


def prepare_cbis_image(job: Job, download: Path, out: Path) -> Outcome:
    """Write the full image, the masks and the whole image of one job; see `work.run_resumable`."""
    plan, result, reader = job.plan, Outcome(job.name), Reader(download, job.plan.descriptions)
    try:
        img, source, headers = read_image(plan, reader, result)
        if plan.folder:
            write_whole(img, out, plan.folder, plan.whole, source, result)
        write_output(to_uint16(img), out, full_img_path(job.name), result)
    except InputError as error:
        result.faults.append(f"{job.name}: {error}; left out with its masks")
        return result
    result.facts["lesions"] = []
    for lesion in plan.lesions:
        name = f"{job.name} {lesion.type} {lesion.number}"
        try:
            mask = read_mask(name, lesion, headers, img.shape, reader, result)
        except InputError as error:
            result.faults.append(f"{name}: {error}")
            continue
        write_output(mask, out, lesion.mask_path(job.name), result)
        result.facts["lesions"].append([lesion.type, lesion.number, lesion.pathology])
    return result


def read_image(plan: CbisPlan, reader: Reader, result: Outcome) -> tuple[np.ndarray, str, list[Header | None]]:
    """Read pixels and path of the first readable copy of an image, and the header of each copy, None for one without.

    The calc and the mass rows of one view have files of their own, of the same film; one is kept.
    """
    img, headers, problems = None, [], []
    for copy in plan.copies:
        headers.append(None)
        try:
            headers[-1] = header = choose_image(copy, reader, result)
            if img is None:
                img = check_mammogram(header.path, reader.grey(header.path))
                kept = header
        except InputError as error:
            problems.append(str(error))
    if img is None:
        raise InputError("; ".join(problems))
    others = [copy.folder for copy in plan.copies if kept.path not in copy.files]
    repairs = [("one_copy_of_image_kept", f"{kept.path}, not that of {folder}") for folder in others]
    repairs += [("unreadable_copy_of_image_not_needed", problem) for problem in problems]
    repairs += [("monochrome1_inverted", kept.path)] * kept.inverted
    repairs += [("8_bit_scaled_to_16_bit", kept.path)] * (img.dtype.name == "uint8")
    result.repairs += [(kind, f"{result.name}: {what}") for kind, what in repairs]
    return img, kept.path, headers


def choose_image(copy: Copy, reader: Reader, result: Outcome) -> Header:
    """Return the header of the full mammogram among the files of `copy`.

    Of several files, the ones count that are described as mammograms, by their header, table or path; failing that,
    the ones that are not described as masks or crops. The largest of them with more than two values is taken, since
    masks have two.
    """
    headers, problems = [], []
    for path in copy.files:
        try:
            headers.append(reader.header(path))
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
        if described or as_mask(reader.grey(header.path), is_lossy(header.path)) is None:
            text = f"{result.name}: {header.path} of {len(copy.files)} files of {copy.folder}"
            result.repairs.append(("several_files_for_one_image", text))
            result.repairs += [("unreadable_file_not_needed", f"{result.name}: {problem}") for problem in problems]
            return header
    received = f"{len(copy.files)} files such as {copy.files[0]}; {'; '.join(problems) or 'masks and crops'}"
    raise InputError(f"no image of {copy.folder}: Expected a picture of more than two values. Received {received}")


def check_mammogram(path: str, img: np.ndarray) -> np.ndarray:
    """Return `img` if it is a picture of unsigned pixels of more than two values, else InputError."""
    if img.dtype.name not in ("uint8", "uint16"):
        raise InputError(f"{path}: Expected 8- or 16-bit unsigned pixels. Received {img.dtype}")
    if img.min() == img.max():
        raise InputError(f"{path}: the image is constant: Expected a mammogram")
    if as_mask(img, lossy=False) is not None:
        raise InputError(f"{path}: the image has two values, as masks have: Expected a mammogram")
    return img


def read_mask(
    name: str,
    lesion: CbisLesion,
    headers: Sequence[Header | None],
    shape: tuple[int, int],
    reader: Reader,
    result: Outcome,
) -> np.ndarray:
    """Return the mask of one lesion, the union of the masks of its rows: uint8 0/255 (*shape).

    headers: of each copy of the image. shape: of the copy that is kept. Raises InputError when a row has no mask.
    """
    union, used, repairs = np.zeros(shape, bool), set(), {}  # a dict, so that nothing is listed twice
    images = {header.path for header in headers if header}
    for copy, named, files, lesions in lesion.masks:
        size = headers[copy][1:3] if headers[copy] else shape  # height, width
        candidates = [path for path in files if path not in images]
        found, others, problems = find_masks(candidates, size, reader)
        if len(found) < len(named):
            wanted = ", ".join(sorted(named))
            missing = f"no mask for {len(named) - len(found)} of {len(named)} rows" if found else "no mask"
            reasons = "; ".join([*problems, *map("mask {}".format, [*found, *others])]) or "no file in the download"
            expected = f"Expected a file of two values and {size[0]} x {size[1]} pixels for {wanted}"
            raise InputError(f"{missing}: {expected}. Received {reasons}")
        if lesions > 1:
            text = f"no mask: {len(found)} masks, such as {min(found)}, may be of any of {lesions} lesions"
            raise InputError(f"{text}. Expected a folder for each, such as {named[0]}")
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
    """Return whether a mask is the file that one of the cells `named` means, in a layout of whatever names.

    000000.dcm is 1-1.dcm and 1-234.jpg: the first of its folder. Where the folder that a cell gives has
    none of the `candidates`, as in the descriptive layouts, the position alone counts; in folders that no layout
    has, not even that.
    """
    parts = path.split("/")
    beside = sorted(candidate for candidate in candidates if candidate.split("/")[:-1] == parts[:-1])
    present = {_series(candidate.split("/")) for candidate in candidates}
    for cell in (cell.split("/") for cell in named):
        position = re.fullmatch(r"(\d+)\.\w+|1-(\d+)\.\w+", cell[-1])
        if _series(cell) in present and _series(cell) != _series(parts):
            continue
        if len(beside) == 1 or not position or not (find_view_folder(parts) or _series(cell) in present):
            return True
        if beside.index(path) == (int(position[1]) if position[1] else int(position[2]) - 1):
            return True
    return False


def find_masks(
    candidates: Sequence[str], size: tuple[int, int], reader: Reader
) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Return the masks among the candidates, boolean by path; paths of those not taken; what is wrong with other files.

    Files of two values are masks. In each folder, the masks that have the image's `size` (height, width) are taken.
    Where there are none, masks of another size are taken: the ones that are described as masks or, failing that, the
    largest.
    """
    problems, folders = [], defaultdict(lambda: ({}, {}, {}))  # of the image's size, described as masks, others
    for path in candidates:
        exact, described, others = folders[path.rpartition("/")[0]]
        try:
            pixels, lossy = reader.grey(path), is_lossy(path)
            mask = as_mask(pixels, lossy)
            if mask is None:
                problems.append("{} of {} x {} pixels, not of two values".format(path, *pixels.shape))
                continue
            description = reader.header(path).description
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
    """Return whether a file is JPEG, by its name."""
    return path.lower().endswith((".jpg", ".jpeg"))


def as_mask(img: np.ndarray, lossy: bool) -> np.ndarray | None:
    """Return where an image of two values is bright, None for others. lossy: JPEG has blurred its edges."""
    lowest, highest = int(img.min()), int(img.max())
    if lowest == highest:
        return None
    tolerance = JPEG_TOLERANCE * (highest - lowest) if lossy else 0
    between = np.count_nonzero((img > lowest + tolerance) & (img < highest - tolerance))
    if between > (JPEG_SHARE * img.size if lossy else 0):
        return None
    return img > (lowest + highest) / 2


# ------------------------------------------------------------------------------------------------- the data set


class CbisDdsm(DataSet):
    """Prepare CBIS-DDSM as downloaded.

    Reads the DICOM files of the archive, in any of its folder layouts, or the JPEG files of the re-release, and the
    four description files. An image is positive when any of its findings is malignant.
    """

    name = "cbis-ddsm"
    data_help = "folder of the download: the images and, unless --csv-dir names another, description files"
    files = """\
    full_img/<patient>_<side>_<view>.png                                    16-bit mammograms, as they are
    roi_mask/<Calc|Mass>-Training_<patient>_<side>_<view>_<number>.png      8-bit masks, 255 in the lesion
    roi_mask_path.csv      the lesions (the sampler's names: also test patients have "Training" in them)
    pat_side_cancer.csv    1 where a breast has a malignant finding
"""
    splits = {  # noqa: RUF012
        "author": f"{RANDOM_SPLIT} (the paper's)",
        "official": "the data set's own test patients, with those who are in both of its sets, then --val-size of the "
        "others",
    }
    repairs = (
        *("mask_found_by_content", "mask_resized", "mask_of_another_size_not_taken", "masks_united"),
        *("monochrome1_inverted", "8_bit_scaled_to_16_bit", "several_files_for_one_image", "one_copy_of_image_kept"),
        *("unreadable_copy_of_image_not_needed", "unreadable_file_not_needed"),
    )
    prepare = staticmethod(prepare_cbis_image)

    @property
    def folders(self) -> tuple[str, ...]:
        return "full_img", "roi_mask", *FOLDERS

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        text = "folder of the four description files; default: below the download folder"
        parser.add_argument("--csv-dir", metavar="DIR", help=text)

    def read(self) -> Listing:
        listing = read_cbis_tables(find_tables(self.args.csv_dir or self.args.data))
        for name, counts in listing.report["tables"].items():
            print(name, "{rows} rows, {images} images, {patients} patients".format(**counts), sep=": ")
        images = "{image_folders} image folders, {images} images ({positive_images} positive)"
        text = "together: {rows} rows, {lesions} lesions, " + images + ", {patients} patients"
        print(text.format(**listing.counts))
        repairs = {kind: len(items) for kind, items in listing.repairs.items()}
        text = "in both official sets: {patients_in_both_official_sets} patients, {images_in_both_official_sets} images"
        print(text.format(**repairs) + "; they are for the test only" * (self.args.split == "official"))
        text = "in the calc and the mass table: {images_in_calc_and_mass} images ({images_in_calc_and_mass_of_one_set}"
        print(text.format(**repairs), "within one official set); each is taken once")
        print(f"both malignant and other findings: {repairs['mixed_pathologies']} images, which are positive")
        return listing

    def plan(self, pictures: Mapping[str, Picture], places: Mapping[str, str | None]) -> list[Job]:
        """Return a job for each image; without a place, full image and masks alone are made."""
        self.download = scan_cbis(self.args.data, self.skip)
        jobs = []
        for name, picture in pictures.items():
            plan = plan_image(picture.findings, self.download, folder := places[name], whole_options(self.args))
            outputs = [full_img_path(name), *([whole_img_path(name, folder)] if folder else [])]
            outputs += [lesion.mask_path(name) for lesion in plan.lesions]
            jobs.append(Job(name, plan.sources, tuple(outputs), plan))
        return jobs

    def complete(self, report: dict, listing: Listing, jobs: Sequence[Job], results: Sequence[Outcome]) -> None:
        """Write roi_mask_path.csv and pat_side_cancer.csv, of what was made, and count masks and files."""
        lesions = [(result.name, *lesion) for result in results for lesion in result.facts.get("lesions", ())]
        rows = [(*name.rsplit("_", 2), number, pathology, kind) for name, kind, number, pathology in lesions]
        write_csv(Path(self.args.out, "roi_mask_path.csv"), LESION_COLUMNS, rows)
        breasts = defaultdict(bool)
        for picture in listing.pictures:
            breasts[picture.patient, picture.side] |= picture.positive
        seen = {tuple(result.name.rsplit("_", 2)[:2]) for result in finished(results)}
        cancers = [(*breast, int(cancer)) for breast, cancer in sorted(breasts.items()) if breast in seen]
        write_csv(Path(self.args.out, "pat_side_cancer.csv"), ["patient_id", "side", "cancer"], cancers)
        found = {path for paths in self.download.by_series.values() for path in paths}
        of_no_row = found.difference(*(job.sources for job in jobs))
        report["counts"] |= {"masks_prepared": len(lesions), "masks_skipped": listing.counts["lesions"] - len(lesions)}
        report["counts"] |= {"files_found": len(found), "files_of_no_row": len(of_no_row)}
