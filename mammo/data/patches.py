"""Sample patches from images with lesion masks: what both patch samplers do.

The rows of the lesion table become jobs, one an image; a job reads image and masks, chooses the centres of patches and
writes them. Output folders hold one sub-folder a class with the patches as 16-bit PNG, `patches.csv` (a row a patch,
of `PATCH_COLUMNS`) and `pat_lst.txt` (the patients of the set). The two tables are there when a set is complete. A run
that was killed, started again, goes on and ends with the same files (`work.run_resumable`). `options.json` holds the
options that decide them, and a run with others is refused.
"""

import contextlib
import csv
import functools
import glob
import io
import operator
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mammo.base.files import InputError, atomic_write, counted, is_file_name, locked, naming, write_img, write_text
from mammo.base.tables import read_rows
from mammo.base.work import Job, Outcome, check_kept_options, keep_options, run_resumable
from mammo.data.patch_rules import Patch, Roi, cut_patch, sample_patches
from mammo.data.splits import read_patient_list, stratified_split
from mammo.images.breast import DMImagePreprocessor
from mammo.images.pixels import read_resize_img
from mammo.images.reading import check_grey, read_size

TABLES = ("pat_lst.txt", "patches.csv")  # written when a set is complete

FOLDER_OPTIONS = ("roi_mask_dir", "full_img_dir", "train_out_dir", "val_out_dir")

# Options that decide nothing about a patch.
_OTHER_OPTIONS = (
    *(*FOLDER_OPTIONS, "roi_mask_path_file", "pat_train_list_file", "val_size"),
    *("on_error", "jobs", "backend", "verbose", "fresh"),
)

LESION_COLUMNS = ("patient_id", "side", "view", "abn_num", "pathology", "type")
LESION_VALUES = {"side": ("LEFT", "RIGHT"), "view": ("CC", "MLO"), "type": ("calc", "mass")}
BENIGN = ("BENIGN", "BENIGN_WITHOUT_CALLBACK")

# Of patches.csv. x, y: centre as in `Patch` and in the log. image_x, image_y: the same in the whole image as resized to
# image_height x image_width. source_height, source_width: of the image file. overlap: see `Roi.overlap`.
PATCH_COLUMNS = (
    *("file", "patient", "side", "view", "abnormality", "class", "kind", "x", "y", "overlap"),
    *("image_x", "image_y", "image_height", "image_width", "source_height", "source_width"),
)

# A mask of another size than its image is resized like it; of another shape, it belongs to another image.
ASPECT_TOLERANCE = 0.02

# Files that a killed run has left half written start with a dot.
_PATCH_NAME = re.compile(r"(?!\.)(.+)_(LEFT|RIGHT)_(CC|MLO)_.+_\d{4,}\.png")


class Lesion(NamedTuple):
    """Hold one row of the lesion table. number: different for each lesion of one type in one image."""

    patient: str
    side: str
    view: str
    number: str
    type: str
    malignant: bool

    @property
    def image_id(self) -> str:
        return f"{self.patient}_{self.side}_{self.view}"


# ---------------------------------------------------------------------------------------------- input tables


def read_lesions(path: str | Path) -> list[Lesion]:
    """Read the rows of the lesion table, in the order of the file. Raises InputError, which names the row."""
    lesions, seen = [], {}
    for where, cells in read_rows(path, LESION_COLUMNS):
        lesion = _read_lesion(cells, where)
        if other := seen.get(lesion[:5]):
            line, same = other.rpartition(", ")[2], f"{lesion.image_id}, {lesion.type} {lesion.number}"
            raise InputError(f"{where}: repeats {line} ({same}); remove one of them")
        seen[lesion[:5]] = where
        lesions.append(lesion)
    return lesions


def _read_lesion(cells: Mapping[str, str], where: str) -> Lesion:
    for name, allowed in LESION_VALUES.items():
        if cells[name] not in allowed:
            raise InputError(f"{where}: unknown {name}: Expected {' or '.join(allowed)}. Received {cells[name]!r}")
    pathology = cells["pathology"]
    malignant = pathology.startswith("MALIGNANT")
    if not malignant and pathology not in BENIGN:
        expected = f"Expected MALIGNANT, {' or '.join(BENIGN)}"
        raise InputError(f"{where}: unknown pathology: {expected}. Received {pathology!r}")
    for name in ("patient_id", "abn_num"):
        if not is_file_name(cells[name]):
            raise InputError(f"{where}: {name} is part of file names. Received {cells[name]!r}")
    return Lesion(cells["patient_id"], cells["side"], cells["view"], cells["abn_num"], cells["type"], malignant)


# -------------------------------------------------------------------------------------------------- one image


def plan_patches(lesions: Sequence[Lesion], args: Namespace, class_dirs: Mapping, prefix: str = "") -> Job:
    """Return what `sample_image` is to do for one image.

    lesions: all of the image. class_dirs: class folder by (type, malignant). prefix: what the image's file name has
    before the image id.
    """
    image_id = lesions[0].image_id
    masks = (Path(args.roi_mask_dir, mask_name(lesion)) for lesion in lesions)
    sources = (Path(args.full_img_dir, f"{prefix}{image_id}.png"), *masks)
    most = Counter()  # patches by folder and number of the lesion
    for lesion in lesions:
        most[class_dirs[lesion.type, lesion.malignant], lesion.number] += args.nb_abn
        most[args.bkg_dir, lesion.number] += args.nb_bkg + args.nb_hns + args.nb_hard_neg
    outputs = (patch_name(image_id, *key, index) for key, count in most.items() for index in range(count))
    plan = {"lesions": tuple(lesions), "options": deciding_sampling_options(args)}
    return Job(image_id, tuple(map(str, sources)), tuple(outputs), plan)


def mask_name(lesion: Lesion) -> str:
    """Return the name of the file of a mask."""
    return f"{lesion.type.capitalize()}-Training_{lesion.image_id}_{lesion.number}.png"


def patch_name(image_id: str, class_dir: str, number: str, index: int) -> str:
    """Return the path of a patch below the output folder."""
    return f"{class_dir}/{image_id}_{number}_{index:04d}.png"


class BreastImage(NamedTuple):
    """Hold one image as it is sampled.

    padded: the breast, with a margin of half a patch of zeros on each side. left, top: of the breast in the whole image
    as resized to `shape`. source_size: (height, width) of the file.
    """

    padded: np.ndarray
    left: int
    top: int
    width: int
    height: int
    shape: tuple[int, int]
    source_size: tuple[int, int]


def read_breast(path: Path, args: Namespace) -> BreastImage:
    """Read an image and find the breast in it. Raises InputError for an image without, or an unreadable one."""
    whole = read_sampled(path, args)
    source_size, height, width = read_size(path), *whole.shape
    breast, box = whole, (0, 0, width, height)
    if args.segment_breast:
        breast, box = DMImagePreprocessor.segment_breast(whole)
    return BreastImage(np.pad(breast, args.patch_size // 2), *box, whole.shape, source_size)


def read_roi(path: Path, breast: BreastImage, args: Namespace) -> Roi:
    """Read the mask of a lesion. Raises InputError for one that is unreadable, empty or of another image."""
    mask = read_sampled(path, args)
    mask = mask[breast.top : breast.top + breast.height, breast.left : breast.left + breast.width]
    check_mask_fits(read_size(path), breast.source_size)
    return Roi.from_mask(mask, args.patch_size // 2, breast.padded.shape)


def sample_image(job: Job, args: Namespace, class_dirs: Mapping, out_dir: str | Path) -> Outcome:
    """Sample and write all patches of one image; the facts of the result are the `rows` of patches.csv, as text.

    job: what `plan_patches` returned. class_dirs: class folder by (type, malignant), below `out_dir`.
    """
    result, text = Outcome(job.name, facts={"rows": ""}), io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    image_path, *mask_paths = map(Path, job.sources)

    def log(line):
        if args.verbose:
            result.log.append(line)

    def fault(path, error):
        result.faults.append(str(error) if str(path) in str(error) else f"{path}: {error}")

    try:
        breast = read_breast(image_path, args)
    except InputError as error:
        fault(image_path, error)
        return result
    log(f"ID:{job.name}, read image of size={breast.shape} size after segmentation={(breast.height, breast.width)}")
    rois = []
    for lesion, path in zip(job.plan["lesions"], mask_paths, strict=True):
        try:
            rois.append((lesion, path, read_roi(path, breast, args)))
        except InputError as error:
            fault(path, error)

    # To avoid all lesions, all must be known. Background comes with one lesion, hard negatives with each.
    background_due = others_known = not (args.avoid_all_rois and result.faults)
    how = {"patch_size": args.patch_size, "pos_cutoff": args.pos_cutoff, "neg_cutoff": args.neg_cutoff}
    # Of the image: the background of two lesions of one number, a mass and a calcification, is in one folder.
    written = Counter()
    for lesion, path, roi in rois:
        try:
            avoid = [other for *_, other in rois] if args.avoid_all_rois else [roi]
            numbers = {"nb_bkg": args.nb_bkg * background_due, "nb_hns": args.nb_hns * background_due}
            numbers |= {"nb_abn": args.nb_abn, "nb_hard_neg": args.nb_hard_neg * others_known}
            patches, cutoff = sample_patches(breast.padded, roi, avoid, **numbers, **how)
        except InputError as error:
            fault(path, error)
            continue
        background_due = False
        log(f"ROI centroid= {roi.centroid}")
        if cutoff < args.pos_cutoff:
            log(f"Nb of trials reached maximum, decrease overlap cutoff to {cutoff:.2f}")
        for patch in patches:
            class_dir = class_dirs[lesion.type, lesion.malignant] if patch.kind == "abn" else args.bkg_dir
            file = patch_name(job.name, class_dir, lesion.number, written[class_dir, lesion.number])
            written[class_dir, lesion.number] += 1
            pixels = np.rint(cut_patch(breast.padded, patch.x, patch.y, args.patch_size))
            write_img(Path(out_dir, file), np.clip(pixels, 0, 65535).astype("uint16"))
            result.outputs.append(file)
            article = "an" if patch.kind == "abn" else "a"
            log(f"sampled {article} {patch.kind} patch at (x,y) center= {(patch.x, patch.y)}")
            rows.writerow(make_row(file, class_dir, lesion, patch, breast, args.patch_size // 2))
    result.facts["rows"] = text.getvalue()
    return result


def make_row(file: str, class_dir: str, lesion: Lesion, patch: Patch, breast: BreastImage, half: int) -> tuple:
    """Return the row of patches.csv about one patch. half: the margin of the padded image."""
    place = patch.x - half + breast.left, patch.y - half + breast.top
    cut = class_dir, patch.kind, patch.x, patch.y, round(patch.overlap, 4)
    return file, *lesion[:4], *cut, *place, *breast.shape, *breast.source_size


def read_sampled(path: str | Path, args: Namespace) -> np.ndarray:
    """Read an image file or mask as a float32 array of the size that the options ask for."""
    if args.target_width is None:
        return check_grey(path, read_resize_img(path, target_height=args.target_height))
    return check_grey(path, read_resize_img(path, target_size=(args.target_height, args.target_width)))


def check_mask_fits(mask_size: tuple[int, int], image_size: tuple[int, int]) -> None:
    """Raise InputError for a mask with another aspect ratio than its image. Sizes: (height, width) of the files."""
    if abs(mask_size[0] / mask_size[1] * image_size[1] / image_size[0] - 1) > ASPECT_TOLERANCE:
        text = "the mask does not fit its image: Expected the shape of {} x {} pixels. Received {} x {}"
        raise InputError(text.format(*image_size, *mask_size))


class LesionMask(NamedTuple):
    """Hold the mask of one lesion. type: calc or mass, as in the lesion table. pixels: bool (rows, columns)."""

    type: str
    number: str
    pixels: np.ndarray


def read_lesion_masks(
    roi_mask_dir: str | Path, image_id: str, image: str | Path, image_size: tuple[int, int] | None = None
) -> list[LesionMask]:
    """Read the masks of the lesions of one image, resized to `image_size` (default: the image's own), sorted by name.

    Files are `<Calc|Mass>-<set>_<image_id>_<number>.png` of any set, where `image_id` is `<patient>_<side>_<CC|MLO>`.
    image: the image's file. Raises InputError for a mask that is unreadable, has not the shape of the image, or is
    empty.
    """
    name = re.compile(rf"(calc|mass)-[^_]+_{re.escape(image_id)}_(.+)\.png", re.IGNORECASE)
    masks = []
    for path in sorted(Path(roi_mask_dir).glob(f"*_{glob.escape(image_id)}_*.png")):
        if (match := name.fullmatch(path.name)) is None:  # of an image whose name ends in this one's
            continue
        source_size = read_size(image)
        with naming(path):
            check_mask_fits(read_size(path), source_size)
        pixels = check_grey(path, read_resize_img(path, target_size=image_size or source_size)) > 0  # as when sampling
        if not pixels.any():
            raise InputError(f"{path}: the mask marks no lesion: Expected pixels above 0. Received none")
        masks.append(LesionMask(match[1].lower(), match[2], pixels))
    return masks


# -------------------------------------------------------------------------------------------------- all images


def sample_dataset(args: Namespace, class_dirs: Mapping[tuple[str, bool], str], prefix: str = "") -> None:
    """Sample the training and the validation set; see `plan_patches` for the arguments.

    Lesions of a type without a class folder are not used. Raises InputError for bad tables or options, and, once
    all other images are sampled, for images at fault unless `args.on_error` is "skip".
    """
    check_sampling_options(args, class_dirs)
    # The workers of a cluster start in folders of their own.
    folders = {name: Path(getattr(args, name)).absolute() for name in FOLDER_OPTIONS}
    args = Namespace(**vars(args) | folders)
    lesions, patients = choose_lesions(args, class_dirs)
    malignant = {lesion.patient for lesion in lesions if lesion.malignant}
    train, val = stratified_split(patients, [patient in malignant for patient in patients], args.val_size)
    sets = (("train", train, args.train_out_dir), ("val", val, args.val_out_dir))
    options, faults = deciding_sampling_options(args), []
    with contextlib.ExitStack() as locks:
        for name, names, out_dir in sets:
            if names:
                locks.enter_context(locked(out_dir))
            if names and not args.fresh:
                check_kept_options(out_dir, options)
            if not (names and args.fresh):  # which removes the others' patches
                check_patches_of(name, names, out_dir)
        sets = [each for each in sets if each[1]]
        for *_, out_dir in sets:
            keep_options(out_dir, options, args.fresh)
        for name, names, out_dir in sets:
            faults += sample_set(name, names, lesions, args, class_dirs, prefix, out_dir)
    if faults:
        print(f"{len(faults)} left out:", *faults, sep="\n  ")
        if args.on_error != "skip":
            remedy = "mend them, or leave them out with --on-error skip"
            raise InputError(
                f"images or masks at fault: {len(faults)}, all others sampled; {remedy}. The first: {faults[0]}"
            )


def choose_lesions(args: Namespace, class_dirs: Mapping) -> tuple[list[Lesion], list[str]]:
    """Return the lesions of the table whose type is sampled, and the listed patients who have any.

    Prints how many patients and lesions are not used. Raises InputError where no patient is left.
    """
    table = read_lesions(args.roi_mask_path_file)
    lesions = [lesion for lesion in table if (lesion.type, True) in class_dirs]
    check_names(lesions, class_dirs)
    annotated = {lesion.patient for lesion in lesions}
    listed = read_patient_list(args.pat_train_list_file)
    patients = [patient for patient in listed if patient in annotated]
    if not patients:
        raise InputError(f"{args.pat_train_list_file}: no patient in it is in {args.roi_mask_path_file}")
    if len(patients) < len(listed):
        print(f"{len(listed) - len(patients)} of {len(listed)} listed patients have no lesion in the table to sample")
    wanted = set(patients)
    if unused := len(table) - sum(lesion.patient in wanted for lesion in lesions):
        print(f"{unused} of {len(table)} lesions in the table are of patients not listed, or of another type")
    return lesions, patients


def sample_set(
    name: str,
    patients: Sequence[str],
    lesions: Iterable[Lesion],
    args: Namespace,
    class_dirs: Mapping,
    prefix: str,
    out_dir: Path,
) -> list[str]:
    """Sample the images of `patients` into `out_dir`; return the faults met."""
    print(f"Sampling into {out_dir}")
    wanted = set(patients)
    # A stable sort: the lesions of an image stay in the order of the table.
    view = operator.itemgetter(slice(3))
    mine = sorted((lesion for lesion in lesions if lesion.patient in wanted), key=view)
    jobs = [plan_patches(list(group), args, class_dirs, prefix) for _, group in groupby(mine, view)]
    sample = functools.partial(sample_image, args=args, class_dirs=dict(class_dirs), out_dir=out_dir)
    for table in TABLES:
        Path(out_dir, table).unlink(missing_ok=True)
    folders = sorted({args.bkg_dir, *class_dirs.values()})
    how = {option: getattr(args, option) for option in ("jobs", "backend", "on_error", "fresh")}
    results = run_resumable(jobs, sample, "/", out_dir, folders, **how, desc=name)

    with atomic_write(Path(out_dir, "patches.csv")) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(",".join(PATCH_COLUMNS) + "\n")
        file.writelines(result.facts["rows"] for result in results)
    write_text(Path(out_dir, "pat_lst.txt"), "".join(f"{patient}\n" for patient in patients))
    counts = Counter(path.split("/")[0] for result in results for path in result.outputs)
    print(f"{counts.total()} patches: {dict(counts)}")
    return [fault for result in results for fault in result.faults]


def deciding_sampling_options(args: Namespace) -> dict:
    """Return the options that decide how the patches of an image look."""
    return {name: value for name, value in vars(args).items() if name not in _OTHER_OPTIONS}


def check_patches_of(name: str, patients: Sequence[str], out_dir: Path) -> None:
    """Raise InputError for patches of other patients in `out_dir`: after another split, they could be in both sets."""
    matches = (_PATCH_NAME.fullmatch(path.name) for path in Path(out_dir).glob("*/*.png"))
    if others := {match[1] for match in matches if match} - set(patients):
        raise InputError(
            f"{out_dir}: has patches of {counted(len(others), 'patient')}, such as {min(others)}, not in the {name} "
            f"set of this run: use new folders, {'--fresh, ' if patients else ''}or remove those of the earlier run"
        )


def check_names(lesions: Sequence[Lesion], class_dirs: Mapping) -> None:
    """Raise InputError for two lesions whose patches would have the same names."""
    counts = Counter((class_dirs[lesion.type, lesion.malignant], lesion.image_id, lesion.number) for lesion in lesions)
    for (class_dir, image_id, number), count in counts.items():
        if count > 1:
            names = f"{class_dir}/{image_id}_{number}_*.png"
            raise InputError(
                f"{count} lesions would share the file names {names}; give their types folders of their own"
            )


def check_sampling_options(args: Namespace, class_dirs: Mapping) -> None:
    """Raise InputError for options that cannot work."""
    if args.patch_size < 2:
        raise InputError(f"--patch-size: Expected at least 2. Received {args.patch_size}")
    if Path(args.train_out_dir).resolve() == Path(args.val_out_dir).resolve():
        raise InputError(f"training and validation folder are the same: {args.train_out_dir}")
    for name, value in vars(args).items():
        if name.endswith("_dir") and name not in FOLDER_OPTIONS and not is_file_name(value):
            option = name.replace("_", "-")
            raise InputError(f"--{option}: Expected the name of a folder, without a path. Received {value!r}")
    if args.bkg_dir in class_dirs.values():
        raise InputError(f"--bkg-dir: Expected a folder of its own. Received {args.bkg_dir}, that of lesions")
