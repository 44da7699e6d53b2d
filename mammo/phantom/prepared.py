"""Draw phantom data sets that are prepared for the sampler and the trainers."""

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2

from mammo.base.files import InputError, atomic_write, write_img, write_text
from mammo.base.tables import write_csv
from mammo.data.patches import LESION_COLUMNS
from mammo.data.splits import stratified_split
from mammo.phantom.draw import Drawing, Patient, draw_patients

CONTENT = """\
full_img/            16-bit images, <patient>_<SIDE>_<VIEW>.png
roi_mask/            8-bit masks, one a finding, 255 inside
roi_mask_path.csv    one row a finding
pat_train.txt        patients for training and validation; pat_test.txt: for the test
pat_side_cancer.csv  1 where the breast has a malignant finding
train/ val/ test/    whole images, in pos where any finding is malignant, else in neg"""


def assign_folders(people: Sequence[Patient], test_size: float, val_size: float, seed: int) -> dict[str, str]:
    """Map patient names to train, val or test, with the same share of cancer patients in each.

    Of the patients with findings, those go to val whom the patch sampler puts there, given pat_train.txt: so
    no validation patient of one stage is a training patient of the other. Normal patients are divided alike.
    """
    folders = {}
    for has_findings in (True, False):
        cancer = {p.name: p.malignant for p in people if bool(p.findings) == has_findings}
        if not cancer:
            continue
        try:
            remaining, test = stratified_split(list(cancer), cancer.values(), test_size, seed, "--test-size")
            remaining.sort()
            train, val = stratified_split(remaining, [cancer[name] for name in remaining], val_size)
        except InputError as error:
            raise InputError(f"{error}, or more --patients than {len(people)}") from None
        for folder, names in (("train", train), ("val", val), ("test", test)):
            folders |= dict.fromkeys(names, folder)
    return folders


def make_patient(
    patient: Patient, drawing: Drawing, out: Path, folders: Mapping[str, str], img_size: tuple[int, int] | None
) -> None:
    """Draw and write all images and masks of one patient."""
    for view in drawing.views:
        img, masks = drawing.draw(patient, view)
        name = f"{patient.name}_{patient.side}_{view}"
        full_img = out / "full_img" / f"{name}.png"
        write_img(full_img, img)
        for number, ((kind, _), mask) in enumerate(zip(patient.findings, masks, strict=True), start=1):
            write_img(out / "roi_mask" / f"{kind.capitalize()}-Training_{name}_{number}.png", mask)
        whole = out / folders[patient.name] / ("pos" if patient.malignant else "neg") / f"{name}.png"
        if img_size:
            write_img(whole, cv2.resize(img, (img_size[1], img_size[0]), interpolation=cv2.INTER_AREA))
        else:
            _link(full_img, whole)


def _link(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


def make_phantom(
    out: str | Path,
    *,
    img_size: tuple[int, int] | None = None,
    benign_rate: float = 0.4,
    test_size: float = 0.2,
    val_size: float = 0.1,
    **drawing,
) -> list[Patient]:
    """Write a phantom data set into the new or empty folder `out`: the README.txt there lists what.

    Options as on the command line; drawing: those of `Drawing`. The same options give the same bytes for any number of
    jobs. Returns the list of patients. Raises InputError for a folder with content and for shares that cannot be had.
    """
    out, drawing = Path(out), Drawing(**drawing)
    drawing.check(out)
    if (prevalence := drawing.prevalence) + benign_rate > 1:
        text = "Expected --prevalence and --benign-rate of at most 1 together"
        raise InputError(f"{text}. Received {prevalence} and {benign_rate}.")
    people = draw_patients(drawing.patients, prevalence, benign_rate, drawing.seed)
    folders = assign_folders(people, test_size, val_size, drawing.seed)
    drawing.run(make_patient, people, "patient", out=out, folders=folders, img_size=img_size)
    findings = [
        (p.name, p.side, view, number, pathology, kind)
        for p, view in itertools.product(people, drawing.views)
        for number, (kind, pathology) in enumerate(p.findings, start=1)
    ]
    write_csv(out / "roi_mask_path.csv", LESION_COLUMNS, findings)
    for name, is_test in (("pat_train.txt", False), ("pat_test.txt", True)):
        names = [p.name for p in people if (folders[p.name] == "test") == is_test]
        write_text(out / name, "".join(f"{name}\n" for name in names))
    cancers = [(p.name, p.side, int(p.malignant)) for p in people]
    write_csv(out / "pat_side_cancer.csv", ["patient_id", "side", "cancer"], cancers)
    shares = f"malignant {prevalence}, benign {benign_rate}, test {test_size}, validation {val_size}"
    drawing.write_readme(out, "", f"\nshares: {shares}", CONTENT)
    return people
