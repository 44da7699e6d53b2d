"""Prepare INbreast as downloaded: its table, the names of its DICOM files, its annotations, and the files of one image.

The table says "removed" for every patient: the patient stands in the name of the DICOM file alone,
`<File Name>_<patient>_MG_<L|R>_<CC|ML>_ANON.dcm`, where ML means MLO. Annotations are Apple property lists as the
viewer OsiriX exports them, `<File Name>.xml`, with the outlines of findings in pixels of the DICOM image.
"""

import plistlib
import re
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from mammo.base.files import InputError, counted, walk_files
from mammo.base.guards import read_bytes
from mammo.base.tables import TABLE_SUFFIXES, read_columns, write_csv
from mammo.base.work import Job, Outcome
from mammo.data.listing import CLASSES, FOLDERS, RANDOM_SPLIT, DataSet, Listing, Picture
from mammo.data.prepare import full_img_path, print_exclusions, whole_img_path, whole_options, write_output, write_whole
from mammo.data.splits import INBREAST_SIDES, INBREAST_VIEWS, parse_inbreast_name
from mammo.images.reading import DICOM_SUFFIXES, read_dicom_16_bit

INBREAST_COLUMNS = {"file": ("file name",), "side": ("laterality",), "view": ("view",), "birads": ("bi-rads", "birads")}
BIRADS = ("0", "1", "2", "3", "4", "4a", "4b", "4c", "5", "6")
MASK_COLUMNS = ("file", "number", "kind", "names", "findings")
OTHER_VIEWS = ("FB",)  # that are no part of screening: one image is FB, from below
PUBLISHED_MEAN = 44.33  # what the paper's models subtract after finetuning
MAX_COORDINATE = 100_000  # those beyond any detector are damage; OpenCV would wrap them around
POINT_RADIUS = 3  # of the disc for a single calcification marked by a point: 0.2 mm at the detector's 70 micrometres

# Why an image is no part of the data set, though nothing is wrong with it.
INBREAST_EXCLUSIONS = {
    "no_screening_view": "views other than CC and MLO are no part of screening",
    "birads_of_no_class": "their BI-RADS category is in neither class (--neg-birads, --pos-birads)",
    "dicom_without_row": "their File Name is not in the table, so there is no label",
}

# Kinds of findings by the names that annotations give them, in small letters and with their misspellings.
KINDS = {
    **{"mass": "Mass", "calcification": "Calc", "calcifications": "Calc", "cluster": "Cluster"},
    **{"asymmetry": "Asymmetry", "assymetry": "Asymmetry", "distortion": "Distortion"},
    **dict.fromkeys(("spiculated region", "espiculated region"), "Spiculated"),
}
OTHER_KIND = "Other"

# ------------------------------------------------------------------------------------------------------- table


class InbreastRow(NamedTuple):
    """Hold one image in the table. file: the number that it calls File Name. birads: one of `BIRADS`."""

    file: str
    side: str
    view: str
    birads: str


class InbreastTable(NamedTuple):
    """Hold the rows sorted by file, each once, with the place it stands at; and what was mended."""

    path: Path
    rows: dict[InbreastRow, str]
    repairs: dict[str, list[str]]


def read_inbreast_table(path: str | Path) -> InbreastTable:
    """Read the rows of INbreast.csv or .xls.

    Raises InputError, which names the line, for an unknown value, and for a file with two rows that differ: the label
    depends on them.
    """
    rows, lines, repairs = {}, {}, defaultdict(list)
    for where, cells in read_columns(path, INBREAST_COLUMNS):
        if not cells["file"]:  # the .xls ends with rows of sums
            repairs["rows_without_file_name"].append(where)
            continue
        row = _read_row(cells, where)
        if row in rows:
            repairs["duplicate_rows_merged"].append(f"{where}: as in {rows[row]}")
        elif other := lines.get(row.file):
            raise InputError(f"{where}: another row of File Name {row.file} is at {other}; remove the wrong one")
        lines.setdefault(row.file, where)
        rows.setdefault(row, where)
    if not rows:
        raise InputError(f"{path}: no rows below the header")
    return InbreastTable(Path(path), dict(sorted(rows.items(), key=lambda item: int(item[0].file))), dict(repairs))


def _read_row(cells: Mapping[str, str], where: str) -> InbreastRow:
    file = re.fullmatch(r"([0-9]{1,20})(\.0|\.dcm)?", name := cells["file"])
    if not file:
        raise InputError(f"{where}: unknown File Name: Expected a number as in 20588072. Received {name[:100]!r}")
    side, view, birads = cells["side"].upper(), cells["view"].upper(), cells["birads"].lower().removesuffix(".0")
    for name, value, allowed in (
        ("Laterality", side, INBREAST_SIDES),
        ("View", view, (*INBREAST_VIEWS, *OTHER_VIEWS)),
        ("Bi-Rads", birads, BIRADS),
    ):
        if value not in allowed:
            raise InputError(f"{where}: unknown {name}: Expected {', '.join(allowed)}. Received {value!r}")
    return InbreastRow(file[1], INBREAST_SIDES[side], INBREAST_VIEWS.get(view, view), birads)


def count_rows(rows: Iterable[InbreastRow]) -> dict:
    """Count rows by BI-RADS category and by view, sorted."""
    rows = list(rows)
    birads, views = (Counter(getattr(row, name) for row in rows) for name in ("birads", "view"))
    return {"rows": len(rows), "birads": dict(sorted(birads.items())), "views": dict(sorted(views.items()))}


class Classes(NamedTuple):
    """Hold the BI-RADS categories of the negative and of the positive class."""

    neg: frozenset[str]
    pos: frozenset[str]

    def label(self, birads: str) -> str | None:
        """Return one of `CLASSES`, or None for neither."""
        return next((name for name in CLASSES if birads in getattr(self, name)), None)


def add_class_options(parser: ArgumentParser) -> None:
    """Add the options whose values `read_classes` takes."""
    group = parser.add_argument_group("classes (other categories are left out; 4 stands for 4a, 4b and 4c too)")
    group.add_argument("--neg-birads", nargs="+", choices=BIRADS, default=["1", "2"], help="negative (1 2)")
    group.add_argument("--pos-birads", nargs="+", choices=BIRADS, default=["4", "5", "6"], help="positive (4 5 6)")


def read_classes(neg: Iterable[str], pos: Iterable[str]) -> Classes:
    """Return the classes of these categories; 4 stands for 4a, 4b and 4c too. Raises InputError for one in both."""
    expanded = [{birads for birads in BIRADS if names & {birads, birads[:-1]}} for names in map(set, (neg, pos))]
    classes = Classes(*map(frozenset, expanded))
    if both := sorted(classes.neg & classes.pos):
        raise InputError(f"BI-RADS {', '.join(both)}: in both classes: Expected each in --neg-birads or --pos-birads")
    return classes


# ---------------------------------------------------------------------------------------------- download folder


class InbreastFiles(NamedTuple):
    """Hold where the files lie, as paths below the download folder. dicoms, annotations: by File Name."""

    tables: list[str]
    dicoms: dict[str, list[str]]
    annotations: dict[str, list[str]]

    def find_table(self, root: str | Path) -> Path:
        """Return INbreast.csv, or else .xlsx or .xls. Raises InputError for neither, or two of one kind."""
        for suffix in TABLE_SUFFIXES:
            found = [path for path in self.tables if path.lower().endswith(suffix)]
            if len(found) > 1:
                raise InputError(f"{root}: two tables, {found[0]} and {found[1]}: name the right one with --table")
            if found:
                return Path(root, found[0])
        raise InputError(f"{root}: no table: Expected INbreast.csv or .xls there or below; or name it with --table")


def scan_inbreast(root: str | Path, skip: Iterable = ()) -> InbreastFiles:
    """Find the tables, DICOM files and annotations below `root`, but not in the folders `skip`."""
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder: Expected that of the download")
    tables, dicoms, annotations = [], defaultdict(list), defaultdict(list)
    for file in walk_files(root, skip):
        path, suffix = file.relative_to(root).as_posix(), file.suffix.lower()
        if file.name.startswith("."):
            continue
        if suffix in DICOM_SUFFIXES:
            dicoms[file.stem.split("_")[0]].append(path)
        elif suffix == ".xml" and file.stem.isdecimal() and "muscle" not in path.lower():  # of the pectoral muscle
            annotations[file.stem].append(path)
        elif suffix in TABLE_SUFFIXES and file.stem.lower() == "inbreast":
            tables.append(path)
    return InbreastFiles(tables, dict(dicoms), dict(annotations))


@dataclass(frozen=True)
class InbreastPicture(Picture):
    """Hold one image, and the path of its annotations (None: there are none)."""

    annotation: str | None = None


def list_images(table: InbreastTable, download: InbreastFiles, classes: Classes) -> Listing:
    """Find the patient and the class of each row."""
    excluded, repairs = {kind: [] for kind in INBREAST_EXCLUSIONS}, defaultdict(list, table.repairs)
    report = {"table": {"file": table.path.name} | count_rows(table.rows)}
    listing = Listing(excluded=excluded, repairs=repairs, report=report)
    views = Counter()
    for row, where in table.rows.items():
        label = classes.label(row.birads)
        if row.view in OTHER_VIEWS:
            listing.excluded["no_screening_view"].append(f"{row.file}: {row.view}")
            continue
        if label is None:
            listing.excluded["birads_of_no_class"].append(f"{row.file}: BI-RADS {row.birads}")
        try:
            patient, paths = identify(row, where, download)
        except InputError as error:
            if label is not None:
                listing.faults.append(Outcome(row.file, faults=[f"{error}; left out"]))
            continue
        # Counted over rows of no class too, so that other classes do not change the names.
        name = f"{patient}_{row.side}_{row.view}"
        views[name] += 1
        if label is None:
            continue
        name += f"_{views[name]}" if views[name] > 1 else ""
        annotations = download.annotations.get(row.file, [])
        for several in (paths, annotations):
            if len(several) > 1:
                listing.repairs["several_files_for_one_image"].append(f"{name}: {several[0]} of {', '.join(several)}")
        who, annotation = (patient, row.side, row.view), next(iter(annotations), None)
        listing.pictures.append(InbreastPicture(paths[0], label == "pos", *who, name=name, annotation=annotation))
    without = download.dicoms.keys() - {row.file for row in table.rows}
    listing.excluded["dicom_without_row"] += sorted(path for file in without for path in download.dicoms[file])
    return listing


def identify(row: InbreastRow, where: str, download: InbreastFiles) -> tuple[str, list[str]]:
    """Return patient and DICOM files of a row, by the files' names; InputError for none, or others than the row's."""
    form = f"{row.file}_<patient>_MG_{row.side[0]}_{'ML' if row.view == 'MLO' else row.view}_ANON.dcm"
    paths = download.dicoms.get(row.file, [])
    if not paths:
        raise InputError(f"{where}: no DICOM file: Expected {form} below the download folder")
    patients = set()
    for path in paths:
        known = parse_inbreast_name(Path(path).stem)
        if known is None:
            raise InputError(f"{path}: the name tells no patient: Expected {form}")
        if known[1:] != row[1:3]:
            says = f"says {row.side} {row.view}, but its DICOM file is called {path}"
            raise InputError(f"{where}: {says}: Expected {form}")
        patients.add(known[0])
    if len(patients) > 1:
        raise InputError(f"{where}: DICOM files of {len(patients)} patients: Expected one. Received {', '.join(paths)}")
    return patients.pop(), paths


# ------------------------------------------------------------------------------------------------- annotations


class Outline(NamedTuple):
    """Hold a finding as annotated. points: (x, y) in pixels, from the upper left corner."""

    name: str
    points: list[tuple[float, float]]

    @property
    def kind(self) -> str:
        """Return what it is, a value of `KINDS` or `OTHER_KIND`."""
        return KINDS.get(self.name.lower(), OTHER_KIND)


class Region(NamedTuple):
    """Hold what becomes one mask. kind: see `Outline.kind`. number: from 1, over all of an image."""

    kind: str
    number: int
    findings: list[Outline]

    def mask_path(self, name: str) -> str:
        """Return the path of its mask, for the image of this name, as `patches.read_lesion_masks` finds it."""
        return f"roi_mask/{self.kind}-INbreast_{name}_{self.number}.png"


def read_annotation(path: str | Path) -> list[Outline]:
    """Read the findings of an annotation file, in its order. Raises InputError for a damaged file."""
    data = read_bytes(path)
    try:
        images = plistlib.loads(data, fmt=plistlib.FMT_XML)["Images"]
        rois = [roi for image in images for roi in image["ROIs"]]
        return [Outline(" ".join(str(roi["Name"]).split()), list(map(_read_point, roi["Point_px"]))) for roi in rois]
    except Exception as error:  # plistlib and what it reads with raise many kinds
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        raise InputError(f"{path}: not an annotation file ({reason}). Expected a property list of ROIs") from None


def _read_point(text: str) -> tuple[float, float]:
    x, y = (float(number) for number in text.strip("() ").split(","))
    if not (abs(x) < MAX_COORDINATE and abs(y) < MAX_COORDINATE):
        raise ValueError(f"no point of an image: {text}")
    return x, y


def group_findings(findings: Iterable[Outline]) -> tuple[list[Region], list[tuple[str, str]]]:
    """Return the regions that findings make, and the repairs that this takes.

    Single calcifications, outlined or marked by a point each, are one region together: there are dozens in some
    images. Points of other kinds have no extent and are left out.
    """
    regions, repairs, calcs = [], [], None
    for finding in findings:
        if finding.kind == OTHER_KIND:
            repairs.append(("findings_of_unknown_name", finding.name))
        if len(finding.points) < (1 if finding.kind == "Calc" else 2):
            repairs.append(("points_without_extent_left_out", finding.name))
        elif finding.kind == "Calc" and calcs:
            calcs.findings.append(finding)
        else:
            regions.append(Region(finding.kind, len(regions) + 1, [finding]))
            calcs = regions[-1] if finding.kind == "Calc" else calcs
    if points := sum(len(finding.points) == 1 for region in regions for finding in region.findings):
        repairs.append(("points_drawn_as_discs", f"{points} of Calc"))
    return regions, repairs


def draw_mask(region: Region, shape: tuple[int, int]) -> np.ndarray:
    """Draw uint8 (*shape), 255 in the outlines and in discs for points; InputError for a region beside the image."""
    mask = np.zeros(shape, np.uint8)
    for finding in region.findings:
        points = np.rint(finding.points).astype(np.int32)
        if len(points) == 1:
            cv2.circle(mask, points[0].tolist(), POINT_RADIUS, 255, cv2.FILLED)
        else:
            cv2.fillPoly(mask, [points], 255)
    if not mask.any():
        raise InputError(f"it lies beside the image of {shape[0]} x {shape[1]} pixels: is the file of another image?")
    return mask


# -------------------------------------------------------------------------------------------------- one image


class InbreastPlan(NamedTuple):
    """Hold what is to be made of one image, in types that JSON can hold.

    annotation: None to write no masks. folder: of the whole image, such as train/pos. whole: options of `make_whole`.
    full: whether to write the image in full size too.
    """

    dicom: str
    annotation: str | None
    folder: str
    whole: dict
    full: bool


def prepare_inbreast_image(job: Job, download: Path, out: Path) -> Outcome:
    """Write the whole image of one job, and if asked its full image and its masks; see `work.run_resumable`."""
    plan, result = job.plan, Outcome(job.name)
    try:
        img, header = read_dicom_16_bit(Path(download, plan.dicom), auto_levels=plan.whole["levels"])
        write_whole(img, out, plan.folder, plan.whole, plan.dicom, result)
    except InputError as error:
        result.faults.append(f"{job.name}: {error}; left out")
        return result
    if header.PhotometricInterpretation == "MONOCHROME1":
        result.repairs.append(("monochrome1_inverted", f"{job.name}: {plan.dicom}"))
    if plan.full:
        write_output(img, out, full_img_path(job.name), result)
    if plan.annotation:
        write_masks(job, download, out, img.shape, result)
    return result


def write_masks(job: Job, download: Path, out: Path, shape: tuple[int, int], result: Outcome) -> None:
    """Write the masks of one image of `shape` (rows, columns), and note them in the facts of `result`."""
    try:
        regions, repairs = group_findings(read_annotation(Path(download, job.plan.annotation)))
    except InputError as error:
        result.faults.append(f"{job.name}: {error}; left without masks")
        return
    result.repairs += [(kind, f"{job.name}: {what}") for kind, what in repairs]
    result.facts["lesions"] = []
    for region in regions:
        path = region.mask_path(job.name)
        try:
            write_output(draw_mask(region, shape), out, path, result)
        except InputError as error:
            result.faults.append(f"{job.name}: {job.plan.annotation}: {region.kind} {region.number}: {error}")
            continue
        names = sorted({finding.name for finding in region.findings})
        result.facts["lesions"].append([path, region.number, region.kind, "; ".join(names), len(region.findings)])


# ------------------------------------------------------------------------------------------------- the data set


class Inbreast(DataSet):
    """Prepare INbreast as downloaded.

    Reads the table (INbreast.csv, or .xls with the package xlrd), the DICOM files and, with --roi-masks, the XML
    annotations. BI-RADS 1 and 2 are negative, 4 to 6 positive, 3 is left out. A patient is known by the name of the
    DICOM file. Each annotated region is a mask; the single calcifications of an image are one mask together, with
    points as discs of radius 3 pixels.
    """

    name = "inbreast"
    data_help = "folder of the download: DICOM files, annotations and, unless --table names another, the table"
    files = """\
    full_img/<image>.png                        with --roi-masks: 16-bit mammograms of full size
    roi_mask/<Kind>-INbreast_<image>_<n>.png    with --roi-masks: 8-bit masks of the same size, 255 in the lesion
    roi_masks.csv          number and kind of each mask, names and number of the findings in it
"""
    splits = {"random": f"{RANDOM_SPLIT} (the paper's shares)"}  # noqa: RUF012
    test_size = 0.3
    repairs = (
        *("duplicate_rows_merged", "rows_without_file_name", "several_files_for_one_image", "monochrome1_inverted"),
        *("points_drawn_as_discs", "points_without_extent_left_out", "findings_of_unknown_name"),
    )
    exclusions = INBREAST_EXCLUSIONS
    prepare = staticmethod(prepare_inbreast_image)

    @property
    def folders(self) -> tuple[str, ...]:
        return (*FOLDERS, "full_img", "roi_mask") if self.args.roi_masks else FOLDERS

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        text = "INbreast.csv or .xls; default: below the download folder, a CSV first"
        parser.add_argument("--table", metavar="FILE", help=text)
        add_class_options(parser)
        text = "also write lesion masks, and full images with them"
        parser.add_argument_group("annotations").add_argument("--roi-masks", action="store_true", help=text)

    def read(self) -> Listing | None:
        args = self.args
        classes = read_classes(args.neg_birads, args.pos_birads)
        download = scan_inbreast(args.data, self.skip)
        table = read_inbreast_table(args.table or download.find_table(args.data))
        print_table(table, classes)
        if not download.dicoms:
            if args.dry_run:
                print("no DICOM files here, whose names tell the patients: no split")
                return None
            raise InputError(f"{args.data}: no DICOM files: Expected AllDICOMs there or below")
        listing = list_images(table, download, classes)
        print_exclusions(listing, self.exclusions)
        patients = counted(len({picture.patient for picture in listing.pictures}), "patient")
        print(f"used: {listing.count()} of {patients}")
        return listing

    def plan(self, pictures: Mapping[str, Picture], places: Mapping[str, str | None]) -> list[Job]:
        """Return a job for each image of the patients in a set."""
        masks, whole, jobs = self.args.roi_masks, whole_options(self.args), []
        for name, picture in pictures.items():
            folder = places[name]
            if folder is None:
                continue
            annotation = picture.annotation if masks else None
            outputs, sources = [whole_img_path(name, folder)], [picture.file]
            if masks:
                outputs.append(full_img_path(name))
            if annotation:
                sources.append(annotation)
                with suppress(InputError):  # of a damaged file, which is reported when masks are to be made
                    regions, _ = group_findings(read_annotation(Path(self.args.data, annotation)))
                    outputs += [region.mask_path(name) for region in regions]
            plan = InbreastPlan(picture.file, annotation, folder, whole, masks)
            jobs.append(Job(name, tuple(sources), tuple(outputs), plan))
        return jobs

    def complete(self, report: dict, listing: Listing, jobs: Sequence[Job], results: Sequence[Outcome]) -> None:
        """Write roi_masks.csv, count the masks, and compare the pixel mean with the paper's."""
        table = Path(self.args.out, "roi_masks.csv")
        if self.args.roi_masks:
            masks = [mask for result in results for mask in result.facts.get("lesions", ())]
            write_csv(table, MASK_COLUMNS, masks)
            without = sum(job.plan.annotation is None for job in jobs)
            report["counts"] |= {"masks_prepared": len(masks), "images_without_annotations": without}
        else:
            table.unlink(missing_ok=True)  # an earlier run's, whose masks are gone
        if (mean := report["featurewise_mean"]) is not None:
            remedy = "where they differ much, see --auto-levels, and give the trainer your own"
            theirs = f"the paper's, {PUBLISHED_MEAN}, is of other patients and another conversion"
            print(f"pixel mean: {mean:.2f}; {theirs}: {remedy}")


def print_table(table: InbreastTable, classes: Classes) -> None:
    """Print what the table holds, and what the classes make of it."""
    counts = count_rows(table.rows)
    print(f"{table.path.name}: {counts['rows']} rows")
    for title, values in (("BI-RADS", counts["birads"]), ("views", counts["views"])):
        print(f"  {title}: " + ", ".join(f"{value} {count}" for value, count in values.items()))
    for name, title in (("neg", "negative"), ("pos", "positive"), (None, "in neither class")):
        mine = {birads: count for birads, count in counts["birads"].items() if classes.label(birads) == name}
        print(f"  {title}: {sum(mine.values())} (BI-RADS {', '.join(mine) or 'none'})")
