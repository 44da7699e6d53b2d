"""Split patients into training, validation and test sets, or check a split that is given."""

import re
from argparse import ArgumentParser
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mammo.base.files import InputError, counted

# ------------------------------------------------------------------------------------------- splits by patient


def split_by_patient(cancer: Mapping[str, bool], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Divide patients in two, both parts with the same share of cancer patients.

    cancer: for each patient, whether any finding is malignant. share: of the patients in the second part, 0..1.
    Patients are taken in sorted order, so that the split depends on nothing but the patients and the seed. Few
    patients are divided class by class, at least one of each class of two or more going to the second part.

    Returns (first part, second part), both sorted.
    """

    patients = sorted(cancer)
    try:
        first, second = split_patients(patients, [cancer[patient] for patient in patients], share, seed)
    except InputError:
        print(f"only {counted(len(patients), 'patient')} ({sum(cancer.values())} with cancer): divided class by class")
        rng = np.random.RandomState(seed)
        second = []
        for label in (False, True):
            group = [patient for patient in patients if bool(cancer[patient]) == label]
            wanted = max(1, round(share * len(group))) if len(group) > 1 else 0
            second += [group[index] for index in rng.permutation(len(group))[:wanted]]
        first = set(patients) - set(second)
    return sorted(first), sorted(second)


def split_in_three(cancer: Mapping[str, bool], test_size: float, val_size: float, seed: int) -> dict[str, list[str]]:
    """Patients of train, val and test: first `test_size` of all for the test, then `val_size` of the others."""
    rest, test = split_by_patient(cancer, test_size, seed)
    train, val = split_by_patient({patient: cancer[patient] for patient in rest}, val_size, seed)
    return {"train": train, "val": val, "test": test}


def read_patient_list(path) -> list[str]:
    """Patient ids, one a line; a header line `patient_id` may come first. InputError for repeated ids or none."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: Expected one patient id a line") from None
    patients = [line.strip() for line in lines if line.strip()]
    if patients and patients[0].lower() == "patient_id":
        del patients[0]
    if not patients:
        raise InputError(f"{path}: no patients: Expected one patient id a line")
    patient, count = Counter(patients).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: patient {patient} stands there {count} times; remove the others")
    return patients


def check_disjoint(sets: Mapping[str, Iterable[str]]) -> None:
    """InputError when a patient is in two sets. sets: patient ids by the name of the set."""
    for (name, patients), (other_name, others) in combinations(sets.items(), 2):
        if shared := sorted(set(patients) & set(others)):
            raise InputError(
                f"{counted(len(shared), 'patient')} in both {name} and {other_name}, such as {', '.join(shared[:10])}: "
                f"Expected all images of a patient in one set"
            )


class Image(NamedTuple):
    """What the tables tell of one picture. side: LEFT, RIGHT or "". view: CC, MLO or ""."""

    patient: str
    side: str
    view: str
    positive: bool


# ------------------------------------------------------------------------------------------------------ splits


def cancer_patients(images: Iterable[Image]) -> dict[str, bool]:
    """For each patient, whether any image is positive."""
    cancer = defaultdict(bool)
    for image in images:
        cancer[image.patient] |= image.positive
    return dict(cancer)


def _check_drawn(name: str, args, parser: ArgumentParser) -> None:
    """InputError where a share of patients was given for a set that `args.split` does not draw."""
    if getattr(args, f"{name}_size") != parser.get_default(f"{name}_size"):
        raise InputError(
            f"--{name}-size: Expected a --split that draws the {name} set. Received --split {args.split}, by which its "
            f"patients are given"
        )


def sets_of_patients(sets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {patient: name for name, patients in sets.items() for patient in patients}


def count_sets(sets: Mapping[str, Sequence[str]], images: Iterable[Image]) -> dict[str, dict[str, int]]:
    """Patients, cancer patients, images and positive images of each set."""
    images, counts = list(images), {}
    for name, patients in sets.items():
        wanted = set(patients)
        mine = [image for image in images if image.patient in wanted]
        counts[name] = {
            "patients": len(patients),
            "cancer_patients": sum(cancer_patients(mine).values()),
            "images": len(mine),
            "positive_images": sum(image.positive for image in mine),
        }
    return counts


def count_left_patients(sets: Mapping[str, Sequence[str]], images: Iterable[Image]) -> int:
    """Patients in no set."""
    return len({image.patient for image in images} - sets_of_patients(sets).keys())


def print_split(sets: Mapping[str, Sequence[str]], images: Iterable[Image], args) -> None:
    images = list(images)
    seed = f", random state {args.random_state}" if args.split != "lists" else ""
    print(f"split {args.split}{seed}:")
    for name, counts in count_sets(sets, images).items():
        print(
            f"  {name:5} {counts['patients']:5} patients ({counts['cancer_patients']} with cancer), "
            f"{counts['images']:5} images ({counts['positive_images']} positive)"
        )
    placed = [patient for patients in sets.values() for patient in patients]
    print(f"no patient is in two sets: {len(placed)} places, {len(set(placed))} patients")
    if left := count_left_patients(sets, images):
        print(f"in no set: {counted(left, 'patient')}")


# INbreast's own file names: <image>_<patient>_MG_...
_INBREAST = re.compile(r"[^_]+_([^_]+)_MG_")


def patient_of(file: str) -> str:
    """The patient whom the name of an image tells: one of INbreast, or one that data preparation wrote.

    Raises InputError for names of another form.
    """
    from mammo.images.reading import parse_image_name

    name = Path(file).name
    if match := _INBREAST.match(name):
        return match[1]
    if parsed := parse_image_name(Path(name).stem):
        return parsed[0]
    raise InputError(
        f"{file}: the name tells no patient. Expected <image>_<patient>_MG_<side>_<view>_ANON as in INbreast, or "
        f"<patient>_<LEFT|RIGHT>_<CC|MLO>"
    )


def choose_patients(source: Path, out: Path, patients: int, seed: int = 12345) -> list[str]:
    """Make `out` the data folder `source` (train, val, test; neg and pos in each) with fewer patients to train on.

    The patients with cancer, and the others, stand in an order drawn from the seed, and the first of both are chosen,
    in the shares of the training set: so that fewer patients are some of the more.
    Images are linked, not copied; `patients.txt` lists the patients. Returns them, sorted.
    Raises InputError for names that tell no patient, for fewer patients than are asked for, where these are too few
    for both classes, and where `out` has links of another choice: images of other patients would stay in it.
    """
    import numpy as np

    from mammo.base.files import walk_files, write_text
    from mammo.images.reading import is_image

    source, out = Path(source).resolve(), Path(out)
    images: dict[str, list[Path]] = {}
    cancer = set()
    for label in ("neg", "pos"):
        folder = source / "train" / label
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Expected train, val and test, each with neg and pos")
        for path in filter(is_image, walk_files(folder)):
            patient = patient_of(str(path))
            images.setdefault(patient, []).append(path)
            if label == "pos":
                cancer.add(patient)
    if len(images) < patients:
        raise InputError(f"{source / 'train'}: Expected at least {patients} patients. Received {len(images)}")
    with_cancer = round(patients * len(cancer) / len(images))
    if not 0 < with_cancer < patients:
        raise InputError(
            f"{source / 'train'}: {len(cancer)} of {len(images)} patients have cancer. Expected a number of patients "
            f"for which this share means some with and some without. Received {patients}"
        )
    rng = np.random.default_rng(seed)
    chosen = [
        *rng.permutation(sorted(cancer)).tolist()[:with_cancer],
        *rng.permutation(sorted(images.keys() - cancer)).tolist()[: patients - with_cancer],
    ]
    paths = [path for name in chosen for path in images[name]] + [source / "val", source / "test"]
    links = {out / path.relative_to(source): path for path in paths}
    for there in sorted(path for path in out.rglob("*") if path.is_symlink()):
        if there not in links or there.readlink() != links[there]:
            raise InputError(f"{there}: is of another choice. Expected a new folder, or that you remove this one")
    for link, path in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(path)
    write_text(out / "patients.txt", "".join(f"{name}\n" for name in sorted(chosen)))
    return sorted(chosen)


SEED = 12345


def split_patients(patients, malignant, val_size, seed=SEED, option="--val-size"):
    """Split patients into training and validation (or any two parts), each with the same share of cancer patients.

    patients: list of ids. malignant: for each, whether any of their findings is malignant.
    val_size: fraction of the patients to validate on; 0 gives an empty validation list.
    option: where the user has `val_size` from, for the error.

    Returns (training ids, validation ids). The same ids in the same order give the same split: fed with the
    patient list and the labels of the patch sampler, it splits whole images as the patches were split.
    Raises InputError when a part would lack one of the classes.
    """
    if val_size == 0:
        return list(patients), []
    from sklearn.model_selection import train_test_split

    malignant = [bool(label) for label in malignant]
    try:
        train, val = train_test_split(list(patients), test_size=val_size, stratify=malignant, random_state=seed)
    except ValueError as error:
        raise InputError(
            f"cannot split {len(malignant)} patients ({sum(malignant)} with cancer) at {option} {val_size:g} "
            f"so that both parts have both classes: {error}; give another {option}, or 0 for no split"
        ) from None
    return train, val
