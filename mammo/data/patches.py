"""From tables of lesions, images and masks to folders of patches: what both patch samplers do.

Where patches are cut is decided in `dm_region`. Output folders: one sub-folder a class with the patches as 16-bit
PNG, `patches.csv` (a row a patch, see `PatchRow`) and `pat_lst.txt` (the patients of the set). The two tables are
there when a set is complete; the same run started again after it was killed goes on and ends with the same files
(`mammo.base.work.prepare`). `options.json` holds the options that decide them, and a run with others is refused.
"""

import contextlib
import csv
import functools
import glob
import io
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from mammo.base.files import InputError, atomic_write, counted, is_file_name, locked, write_img, write_text
from mammo.base.tables import read_rows
from mammo.data.splits import SEED
from mammo.images.breast import detect_blobs

FOLDERS = ("roi_mask_dir", "full_img_dir", "train_out_dir", "val_out_dir")

# Written when a set is complete.
TABLES = ("pat_lst.txt", "patches.csv")

# Those that decide nothing about a patch.
_OTHER_OPTIONS = (
    *FOLDERS,
    "roi_mask_path_file",
    "pat_train_list_file",
    "val_size",
    "on_error",
    "jobs",
    "backend",
    "verbose",
    "fresh",
)

COLUMNS = ("patient_id", "side", "view", "abn_num", "pathology", "type")

ALLOWED = {"side": ("LEFT", "RIGHT"), "view": ("CC", "MLO"), "type": ("calc", "mass")}

BENIGN = ("BENIGN", "BENIGN_WITHOUT_CALLBACK")

# A mask of another size than its image is resized like it; of another shape, it belongs to another image.
ASPECT_TOLERANCE = 0.02

# Files that a killed run has left half written start with a dot.
_PATCH_NAME = re.compile(r"(?!\.)(.+)_(LEFT|RIGHT)_(CC|MLO)_.+_\d{4,}\.png")


class Lesion(NamedTuple):
    """One row of the lesion table; `number` tells the lesions of one image apart."""

    patient: str
    side: str
    view: str
    number: str
    type: str
    malignant: bool

    @property
    def image_id(self) -> str:
        return f"{self.patient}_{self.side}_{self.view}"


class PatchRow(NamedTuple):
    """One row of patches.csv; its header is these names, with `class` for `class_name`.

    x, y: centre as in `dm_region` and in the log. image_x, image_y: the same centre in the whole image as resized
    to image_height x image_width. source_height, source_width: the size of the image file. overlap: see
    `mammo.data.patches.Roi.overlap`.
    """

    file: str
    patient: str
    side: str
    view: str
    abnormality: str
    class_name: str
    kind: str
    x: int
    y: int
    overlap: float
    image_x: int
    image_y: int
    image_height: int
    image_width: int
    source_height: int
    source_width: int


# ---------------------------------------------------------------------------------------------- input tables


def read_lesions(path) -> list[Lesion]:
    """Rows of the lesion table, in the order of the file; InputError names the row that is wrong."""
    lesions, first_seen = [], {}
    for number, cells in read_rows(path, COLUMNS):
        row = f"{path}, row {number}"
        lesion = _read_lesion(cells, row)
        key = lesion[:5]
        if key in first_seen:
            raise InputError(
                f"{row}: repeats row {first_seen[key]} ({lesion.image_id}, {lesion.type} {lesion.number}); "
                f"remove one of them"
            )
        first_seen[key] = number
        lesions.append(lesion)
    return lesions


def _read_lesion(cells: Mapping[str, str], row: str) -> Lesion:
    for name, allowed in ALLOWED.items():
        if cells[name] not in allowed:
            raise InputError(f"{row}: unknown {name}: Expected {' or '.join(allowed)}. Received {cells[name]!r}")
    pathology = cells["pathology"]
    malignant = pathology.startswith("MALIGNANT")
    if not malignant and pathology not in BENIGN:
        raise InputError(f"{row}: unknown pathology: Expected MALIGNANT, {' or '.join(BENIGN)}. Received {pathology!r}")
    for name in ("patient_id", "abn_num"):
        if not is_file_name(cells[name]):
            raise InputError(f"{row}: {name} is part of file names. Received {cells[name]!r}")
    return Lesion(cells["patient_id"], cells["side"], cells["view"], cells["abn_num"], cells["type"], malignant)


# -------------------------------------------------------------------------------------------------- one image


def image_item(lesions: Sequence[Lesion], args, class_dirs: Mapping, prefix: str = ""):
    """What `sample_image` is to do for one image, as a `mammo.base.work.Item`.

    lesions: those of the image. prefix: what the image's file name has before the image id. See there for the others.
    """
    from mammo.base.work import Job

    image_id = lesions[0].image_id
    masks = (Path(args.roi_mask_dir, mask_name(lesion)) for lesion in lesions)
    sources = (Path(args.full_img_dir, f"{prefix}{image_id}.png"), *masks)
    most = Counter()  # patches by folder and number of the lesion
    for lesion in lesions:
        most[class_dirs[lesion.type, lesion.malignant], lesion.number] += args.nb_abn
        most[args.bkg_dir, lesion.number] += args.nb_bkg + args.nb_hns + args.nb_hard_neg
    outputs = (patch_name(image_id, *key, index) for key, count in most.items() for index in range(count))
    plan = {"lesions": tuple(lesions), "options": deciding_options(args)}
    return Job(image_id, tuple(map(str, sources)), tuple(outputs), plan)


def mask_name(lesion: Lesion) -> str:
    return f"{lesion.type.capitalize()}-Training_{lesion.image_id}_{lesion.number}.png"


def patch_name(image_id: str, class_dir: str, number: str, index: int) -> str:
    return f"{class_dir}/{image_id}_{number}_{index:04d}.png"


def sample_image(item, args, class_dirs: Mapping, out_dir):
    """Sample and write all patches of one image.

    item: of `image_item`. args: the options. class_dirs: class folder by (type, malignant). out_dir: where the class
    folders are.

    Returns a `mammo.base.work.Prepared`, whose facts are the `rows` of patches.csv, as text.
    """
    import numpy as np

    from mammo.base.work import Outcome
    from mammo.images.reading import read_size

    result, rows = Outcome(item.name, facts={"rows": ""}), io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    image_id, half = item.name, args.patch_size // 2
    image_path, *mask_paths = map(Path, item.sources)

    def log(text):
        if args.verbose:
            result.log.append(text)

    def fault(path, error):
        result.faults.append(str(error) if str(path) in str(error) else f"{path}: {error}")

    try:
        whole = read_resized_mask(image_path, args)
        source_size = read_size(image_path)
        breast, (left, top, width, height) = find_breast(whole, args.segment_breast)
    except InputError as error:
        fault(image_path, error)
        return result
    log(f"ID:{image_id}, read image of size={whole.shape} size after segmentation={breast.shape}")
    padded = np.pad(breast, half)

    rois = []
    for lesion, path in zip(item.plan["lesions"], mask_paths, strict=True):
        try:
            mask = read_resized_mask(path, args)[top : top + height, left : left + width]
            check_mask_fits(read_size(path), source_size)
            rois.append((lesion, path, Roi.from_mask(mask, half, padded.shape)))
        except InputError as error:
            fault(path, error)

    # To avoid all lesions, all must be known. Background comes with one lesion, hard negatives with each.
    background_due = others_known = not (args.avoid_all_rois and result.faults)
    # Of the image: the background of two lesions of one number, a mass and a calcification, is in one folder.
    numbers = Counter()
    for lesion, path, roi in rois:
        try:
            patches, cutoff = sample_patches(
                padded,
                roi,
                avoid=[other for *_, other in rois] if args.avoid_all_rois else [roi],
                nb_abn=args.nb_abn,
                nb_bkg=args.nb_bkg if background_due else 0,
                nb_hns=args.nb_hns if background_due else 0,
                nb_hard_neg=args.nb_hard_neg if others_known else 0,
                patch_size=args.patch_size,
                pos_cutoff=args.pos_cutoff,
                neg_cutoff=args.neg_cutoff,
            )
        except InputError as error:
            fault(path, error)
            continue
        background_due = False
        log(f"ROI centroid= {roi.centroid}")
        if cutoff < args.pos_cutoff:
            log(f"Nb of trials reached maximum, decrease overlap cutoff to {cutoff:.2f}")
        for patch in patches:
            class_dir = class_dirs[lesion.type, lesion.malignant] if patch.kind == "abn" else args.bkg_dir
            file = patch_name(image_id, class_dir, lesion.number, numbers[class_dir, lesion.number])
            numbers[class_dir, lesion.number] += 1
            write_patch(Path(out_dir, file), padded, patch, args.patch_size)
            article = "an" if patch.kind == "abn" else "a"
            log(f"sampled {article} {patch.kind} patch at (x,y) center= {(patch.x, patch.y)}")
            result.outputs.append(file)
            writer.writerow(
                PatchRow(
                    file, lesion.patient, lesion.side, lesion.view, lesion.number, class_dir, patch.kind,
                    patch.x, patch.y, round(patch.overlap, 4), patch.x - half + left, patch.y - half + top,
                    *whole.shape, *source_size,
                )
            )  # fmt: skip
    result.facts["rows"] = rows.getvalue()
    return result


def read_resized_mask(path, args):
    """Image file or mask as a float32 array of the size that the options ask for."""
    from mammo.images.pixels import read_resize_img
    from mammo.images.reading import check_grey

    if args.target_width is None:
        return check_grey(path, read_resize_img(path, target_height=args.target_height))
    return check_grey(path, read_resize_img(path, target_size=(args.target_height, args.target_width)))


def find_breast(image, segment: bool):
    """(breast image, its (left, top, width, height) in `image`); all of `image` when not to `segment`."""
    from mammo.images.breast import DMImagePreprocessor

    if segment:
        return DMImagePreprocessor.segment_breast(image)
    height, width = image.shape
    return image, (0, 0, width, height)


def check_mask_fits(mask_size, image_size) -> None:
    """Refuse a mask whose aspect ratio is not its image's. Sizes: (height, width) of the files."""
    if abs(mask_size[0] / mask_size[1] * image_size[1] / image_size[0] - 1) > ASPECT_TOLERANCE:
        raise InputError(
            "the mask does not fit its image: Expected the shape of {} x {} pixels. Received {} x {}".format(
                *image_size, *mask_size
            )
        )


class LesionMask(NamedTuple):
    type: str  # calc or mass, as in the lesion table
    number: str
    pixels: Any  # NumPy array of bool (rows, columns)


def read_lesion_masks(
    roi_mask_dir, image_id: str, image, image_size: tuple[int, int] | None = None
) -> list[LesionMask]:
    """Masks of the lesions of one image, resized to `image_size` (default: the image's own), by the order of names.

    Files are `<Calc|Mass>-<set>_<image_id>_<number>.png` of any set, where `image_id` is `<patient>_<side>_<CC|MLO>`.
    image: the image's file. Raises InputError for a mask that is unreadable, has not the shape of the image, or is
    empty.
    """
    from mammo.images.pixels import read_resize_img
    from mammo.images.reading import check_grey, read_size

    name = re.compile(rf"(calc|mass)-[^_]+_{re.escape(image_id)}_(.+)\.png", re.IGNORECASE)
    masks = []
    for path in sorted(Path(roi_mask_dir).glob(f"*_{glob.escape(image_id)}_*.png")):
        if (match := name.fullmatch(path.name)) is None:  # of an image whose name ends in this one's
            continue
        source_size = read_size(image)
        try:
            check_mask_fits(read_size(path), source_size)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        pixels = check_grey(path, read_resize_img(path, target_size=image_size or source_size)) > 0  # as when sampling
        if not pixels.any():
            raise InputError(f"{path}: the mask marks no lesion: Expected pixels above 0. Received none")
        masks.append(LesionMask(match[1].lower(), match[2], pixels))
    return masks


def write_patch(path, padded, patch, patch_size: int) -> None:
    """Save a patch of the padded image as 16-bit greyscale PNG with the same pixel values."""
    import numpy as np

    pixels = np.clip(np.rint(cut_patch(padded, patch.x, patch.y, patch_size)), 0, 65535).astype("uint16")
    write_img(path, pixels)


# -------------------------------------------------------------------------------------------------- all images


def sample_dataset(args, class_dirs: Mapping[tuple[str, bool], str], prefix: str = "") -> None:
    """Sample the training and the validation set; see `sample_image` for the arguments.

    Lesions of a type without a class folder are not used. Raises InputError for bad tables or options, and, once
    all other images are sampled, for images at fault unless `args.on_error` is "skip".
    """
    from mammo.base.work import check_kept_options, keep_options
    from mammo.data.splits import read_patient_list, split_patients

    check_options(args, class_dirs)
    # The workers of a cluster start in folders of their own.
    folders = {name: Path(getattr(args, name)).absolute() for name in FOLDERS}
    args = Namespace(**vars(args) | folders)
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
    malignant = {lesion.patient for lesion in lesions if lesion.malignant}
    train, val = split_patients(patients, [patient in malignant for patient in patients], args.val_size)
    sets = (("train", train, args.train_out_dir), ("val", val, args.val_out_dir))
    with contextlib.ExitStack() as locks:
        for name, names, out_dir in sets:
            if names:
                locks.enter_context(locked(out_dir))
            if names and not args.fresh:
                check_kept_options(out_dir, deciding_options(args))
            if not (names and args.fresh):  # which removes the others' patches
                check_patients(name, names, out_dir)
        for _, names, out_dir in sets:
            if names:
                keep_options(out_dir, deciding_options(args), args.fresh)
        faults = sample_set("train", train, lesions, args, class_dirs, prefix, args.train_out_dir)
        if val:
            faults += sample_set("val", val, lesions, args, class_dirs, prefix, args.val_out_dir)
    if faults:
        print(f"{len(faults)} left out:", *faults, sep="\n  ")
        if args.on_error != "skip":
            raise InputError(
                f"images or masks at fault: {len(faults)}, all others sampled; mend them, or leave them out with "
                f"--on-error skip. The first: {faults[0]}"
            )


def sample_set(name: str, patients: Sequence[str], lesions, args, class_dirs, prefix, out_dir) -> list[str]:
    """Sample the images of `patients` into `out_dir`; return the faults met."""
    from mammo.base.work import run_resumable

    print(f"Sampling into {out_dir}")
    wanted = set(patients)
    images = groupby(
        # A stable sort: the lesions of an image stay in the order of the table.
        sorted((lesion for lesion in lesions if lesion.patient in wanted), key=lambda lesion: lesion[:3]),
        key=lambda lesion: lesion[:3],
    )
    items = [image_item(list(group), args, class_dirs, prefix) for _, group in images]
    sample = functools.partial(sample_image, args=args, class_dirs=dict(class_dirs), out_dir=out_dir)
    for table in TABLES:
        Path(out_dir, table).unlink(missing_ok=True)
    folders = sorted({args.bkg_dir, *class_dirs.values()})
    results = run_resumable(
        items, sample, "/", out_dir, folders, args.jobs, args.backend, args.on_error, args.fresh, desc=name
    )

    with atomic_write(Path(out_dir, "patches.csv")) as temporary, open(temporary, "w", encoding="utf-8") as file:
        # "class" is a word of Python and cannot name a field.
        file.write(",".join(field.removesuffix("_name") for field in PatchRow._fields) + "\n")
        file.writelines(result.facts["rows"] for result in results)
    write_text(Path(out_dir, "pat_lst.txt"), "".join(f"{patient}\n" for patient in patients))
    counts = Counter(path.split("/")[0] for result in results for path in result.outputs)
    print(f"{counts.total()} patches: {dict(counts)}")
    return [fault for result in results for fault in result.faults]


def deciding_options(args) -> dict:
    """The options that decide how the patches of an image look."""
    return {name: value for name, value in vars(args).items() if name not in _OTHER_OPTIONS}


def check_patients(name: str, patients: Sequence[str], out_dir) -> None:
    """Refuse patches of other patients in `out_dir`: of a run with another split, they could be in both sets."""
    matches = (_PATCH_NAME.fullmatch(path.name) for path in Path(out_dir).glob("*/*.png"))
    if others := {match[1] for match in matches if match} - set(patients):
        raise InputError(
            f"{out_dir}: has patches of {counted(len(others), 'patient')}, such as {min(others)}, not in the {name} "
            f"set of this run: use new folders, {'--fresh, ' if patients else ''}or remove those of the earlier run"
        )


def check_names(lesions: Sequence[Lesion], class_dirs: Mapping) -> None:
    """Refuse two lesions whose patches would have the same names."""
    names = Counter((class_dirs[lesion.type, lesion.malignant], lesion.image_id, lesion.number) for lesion in lesions)
    for (class_dir, image_id, number), count in names.items():
        if count > 1:
            raise InputError(
                f"{count} lesions would share the file names {class_dir}/{image_id}_{number}_*.png; "
                f"give their types folders of their own"
            )


def check_options(args, class_dirs: Mapping) -> None:
    if args.patch_size < 2:
        raise InputError(f"--patch-size: Expected at least 2. Received {args.patch_size}")
    if Path(args.train_out_dir).resolve() == Path(args.val_out_dir).resolve():
        raise InputError(f"training and validation folder are the same: {args.train_out_dir}")
    for name, value in vars(args).items():
        if name.endswith("_dir") and name not in FOLDERS and not is_file_name(value):
            option = name.replace("_", "-")
            raise InputError(f"--{option}: Expected the name of a folder, without a path. Received {value!r}")
    if args.bkg_dir in class_dirs.values():
        raise InputError(f"--bkg-dir: Expected a folder of its own. Received {args.bkg_dir}, that of lesions")


# Random centres tried before the overlap asked of a lesion patch is lowered by OVERLAP_STEP.
TRIES_PER_CUTOFF = 1000

OVERLAP_STEP = 0.05

# The published program tries for ever where a lesion leaves no room for background.
MAX_BACKGROUND_TRIES = 100_000


class Patch(NamedTuple):
    """A patch centre: `kind` is "abn" (lesion), or background: "bkg" (anywhere), "blob" (on a bright spot) or
    "hard" (beside a lesion).

    overlap: see `Roi.overlap`; for background the largest over the lesions it had to avoid.
    """

    kind: str
    x: int
    y: int
    overlap: float


@dataclass(frozen=True)
class Roi:
    """The outline of one lesion, kept as what sampling asks of it rather than as a whole-image mask.

    centroid: (x, y) of the largest contour, truncated; the centre of `box` where that contour has no area.
    box: (x, y, width, height) of the largest contour.
    image_shape: (height, width) of the padded image.
    """

    centroid: tuple[int, int]
    box: tuple[int, int, int, int]
    image_shape: tuple[int, int]
    _sums: np.ndarray
    _origin: tuple[int, int]

    @classmethod
    def from_mask(cls, mask, margin, image_shape):
        """Read a lesion mask: 2-D array, above zero inside the lesion.

        margin: zero pixels that the padded image has on each side and `mask` lacks.
        image_shape: (height, width) of the padded image.
        Raises InputError when no pixel is above zero.
        """
        inside = (mask > 0).astype("uint8")
        left, top, width, height = cv2.boundingRect(inside)
        if width == 0:
            raise InputError("the mask marks no lesion in the image: Expected pixels above 0. Received none")
        inside = np.ascontiguousarray(inside[top : top + height, left : left + width])
        origin = (left + margin, top + margin)
        contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE, offset=origin)
        largest = max(contours, key=cv2.contourArea)
        x, y, width, height = cv2.boundingRect(largest)
        moments = cv2.moments(largest)
        area = moments["m00"]
        if area > 0:
            centroid = (int(moments["m10"] / area), int(moments["m01"] / area))
        else:
            centroid = (x + width // 2, y + height // 2)
        return cls(centroid, (x, y, width, height), image_shape, cv2.integral(inside), origin)

    def overlap(self, x, y, patch_size):
        """How much the patch centred at (x, y) and the lesion share, 0..1.

        The larger of two fractions: of the patch (the part of it inside the image) that is lesion, and of the
        lesion that is in the patch. Constant time, by the integral image of the mask.
        """
        height, width = self.image_shape
        left, top, right, bottom = patch_box(x, y, patch_size)
        left, right = max(left, 0), min(right, width)
        top, bottom = max(top, 0), min(bottom, height)
        if left >= right or top >= bottom:
            return 0.0
        rows, columns = self._sums.shape
        x0, y0 = self._origin
        x1, x2 = (min(max(value - x0, 0), columns - 1) for value in (left, right))
        y1, y2 = (min(max(value - y0, 0), rows - 1) for value in (top, bottom))
        sums = self._sums
        shared = int(sums[y2, x2]) - int(sums[y1, x2]) - int(sums[y2, x1]) + int(sums[y1, x1])
        return max(shared / ((right - left) * (bottom - top)), shared / int(sums[-1, -1]))


def patch_box(x, y, patch_size):
    """(left, top, right, bottom) of the patch centred at (x, y); right and bottom are exclusive."""
    half = patch_size // 2
    return x - half, y - half, x + half, y + half


def cut_patch(img, x, y, patch_size):
    """View of the patch centred at (x, y) in the padded image `img`."""
    left, top, right, bottom = patch_box(x, y, patch_size)
    return img[top:bottom, left:right]


def sample_patches(
    img, roi, avoid, *, nb_abn, nb_bkg, nb_hns, nb_hard_neg=0, patch_size=256, pos_cutoff=0.75, neg_cutoff=0.35
):
    """Choose the patch centres of one lesion and of the background of its image.

    img: padded image, 2-D array. roi: the lesion. avoid: list of `Roi`s that background keeps off.
    nb_abn: lesion patches; 1 gives the centroid, more give random centres that overlap at least `pos_cutoff`.
    nb_bkg: background patches that overlap less than `neg_cutoff`; the first `nb_hns` of them are bright
    blobs, where the image has so many. nb_hard_neg: further ones that lie beside the lesion.

    Returns (list of Patch in the order blob, abn, bkg, hard; the overlap cutoff in the end, which is lower than
    `pos_cutoff` when the lesion allowed no other way). Raises InputError when the lesion or its surroundings
    leave no room.
    """
    rng = np.random.RandomState(SEED)
    blobs = sample_blobs(img, avoid, nb_hns, patch_size, neg_cutoff)
    lesions, cutoff = sample_lesion(roi, nb_abn, patch_size, pos_cutoff, rng)
    background = sample_background(avoid, nb_bkg - len(blobs), patch_size, neg_cutoff, img.shape, rng)
    beside = sample_hard_negatives(roi, avoid, nb_hard_neg, patch_size, neg_cutoff)
    return blobs + lesions + background + beside, cutoff


def sample_lesion(roi, nb_abn, patch_size, pos_cutoff, rng):
    """Patches on a lesion, and the lowest overlap cutoff used; see `sample_patches`.

    Every try draws x, then y, within the box of the lesion from `rng` (a RandomState). After every
    TRIES_PER_CUTOFF tries the cutoff falls by OVERLAP_STEP, at last to any overlap at all.
    """
    if nb_abn == 1:
        x, y = roi.centroid
        return [Patch("abn", x, y, roi.overlap(x, y, patch_size))], pos_cutoff
    left, top, width, height = roi.box
    patches, tries = [], 0
    while len(patches) < nb_abn:
        x = int(rng.randint(left, left + width))
        y = int(rng.randint(top, top + height))
        tries += 1
        if tries == TRIES_PER_CUTOFF:
            tries = 0
            pos_cutoff = max(pos_cutoff - OVERLAP_STEP, 0)
        overlap = roi.overlap(x, y, patch_size)
        # Ends: a patch centred on any pixel of the outline has some of the lesion.
        if overlap > 0 and overlap >= pos_cutoff:
            patches.append(Patch("abn", x, y, overlap))
    return patches, pos_cutoff


def sample_background(avoid, nb_bkg, patch_size, neg_cutoff, image_shape, rng):
    """Patches anywhere in the image, margins excepted, that overlap all of `avoid` less than `neg_cutoff`.

    rng: a RandomState. Raises InputError after MAX_BACKGROUND_TRIES.
    """
    half = patch_size // 2
    height, width = image_shape
    return _sample_apart("bkg", avoid, nb_bkg, patch_size, neg_cutoff, (half, half, width - half, height - half), rng)


def sample_hard_negatives(roi, avoid, nb_hard_neg, patch_size, neg_cutoff):
    """Patches beside a lesion: centres within half a patch of its box, that overlap `avoid` less than `neg_cutoff`.

    The box is cut at the margins of the image. The draws are from a generator of their own. (The published program
    has this sampler, without a call of it.) Raises InputError after MAX_BACKGROUND_TRIES.
    """
    half = patch_size // 2
    left, top, width, height = roi.box
    image_height, image_width = roi.image_shape
    limits = (
        max(left - half, half),
        max(top - half, half),
        min(left + width + half, image_width - half),
        min(top + height + half, image_height - half),
    )
    return _sample_apart("hard", avoid, nb_hard_neg, patch_size, neg_cutoff, limits, np.random.RandomState(SEED))


def _sample_apart(kind, avoid, count, patch_size, neg_cutoff, limits, rng):
    """`count` patches with centres within `limits` (left, top, right, bottom); every try draws x, then y."""
    left, top, right, bottom = limits
    patches, tries = [], 0
    while len(patches) < count:
        if tries == MAX_BACKGROUND_TRIES:
            raise InputError(
                f"only {len(patches)} of {count} background patches ({kind}) found in {tries} tries: "
                f"use a smaller --patch-size, fewer of them, or a larger --neg-cutoff"
            )
        x = int(rng.randint(left, right))
        y = int(rng.randint(top, bottom))
        tries += 1
        overlap = max(roi.overlap(x, y, patch_size) for roi in avoid)
        if overlap < neg_cutoff:
            patches.append(Patch(kind, x, y, overlap))
    return patches


def sample_blobs(img, avoid, nb_hns, patch_size, neg_cutoff):
    """Up to `nb_hns` patches on bright blobs (hard negatives) that overlap `avoid` less than `neg_cutoff`.

    Blobs are taken in the order of a permutation from a generator of their own.
    """
    if nb_hns < 1:
        return []
    centres = detect_blobs(img, patch_size)[:, :2].astype(int)
    patches = []
    for index in np.random.RandomState(SEED).permutation(len(centres)):
        x, y = (int(value) for value in centres[index])
        overlap = max(roi.overlap(x, y, patch_size) for roi in avoid)
        if overlap < neg_cutoff:
            patches.append(Patch("blob", x, y, overlap))
            if len(patches) == nb_hns:
                break
    return patches
