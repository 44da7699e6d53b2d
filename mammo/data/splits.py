"""Split patients into training, validation and test sets, or check a split that is given."""

import re
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from mammo.base.files import InputError, counted, walk_files, write_text
from mammo.data.listing import CLASSES, SETS, Picture
from mammo.images.reading import is_image, parse_image_name

SEED = 12345

# What INbreast's names of sides and views mean.
INBREAST_SIDES = {"L": "LEFT", "R": "RIGHT"}
INBREAST_VIEWS = {"CC": "CC", "MLO": "MLO", "ML": "MLO"}
_INBREAST_NAME = re.compile(r"[^_]+_([0-9a-z]+)_MG_([LR])_([A-Z]+)_ANON", re.IGNORECASE)


def stratified_split(
    patients: Sequence[str], malignant: Iterable[bool], share: float, seed: int = SEED, option: str = "--val-size"
) -> tuple[list[str], list[str]]:
    """Split patients in two parts, such as training and validation, each with the same share of cancer patients.

    The same ids in the same order give the same split: fed with the patient list and the labels of the patch sampler,
    it splits whole images as the patches were split. Raises InputError where a part would lack one of the classes.

    malignant: for each patient, whether any finding is malignant. share: of the patients in the second part; 0 leaves
    it empty. option: where the user has the share from, for the error.
    """
    if share == 0:
        return list(patients), []
    from sklearn.model_selection import train_test_split

    malignant = [bool(label) for label in malignant]
    try:
        first, second = train_test_split(list(patients), test_size=share, stratify=malignant, random_state=seed)
    except ValueError as error:
        text = (
            f"cannot split {len(malignant)} patients ({sum(malignant)} with cancer) at {option} {share:g} so that both"
        )
        remedy = f"give another {option}, or 0 for no split"
        raise InputError(f"{text} parts have both classes: {error}; {remedy}") from None
    return first, second


def split_by_patient(cancer: Mapping[str, bool], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Split patients in two parts with the same share of cancer patients; return both, sorted.

    Patients are taken in sorted order, so that the split depends on nothing but the patients and the seed. Few
    patients are divided class by class, at least one of each class of two or more going to the second part.

    cancer: for each patient, whether any finding is malignant. share: of the patients in the second part, 0..1.
    """
    patients = sorted(cancer)
    try:
        first, second = stratified_split(patients, [cancer[patient] for patient in patients], share, seed)
    except InputError:
        few = f"{counted(len(patients), 'patient')} ({sum(cancer.values())} with cancer)"
        print(f"{few} are too few for a split with equal shares of cancer: those with and without are split separately")
        rng = np.random.RandomState(seed)
        second = []
        for label in (False, True):
            group = [patient for patient in patients if bool(cancer[patient]) == label]
            wanted = max(1, round(share * len(group))) if len(group) > 1 else 0
            second += rng.permutation(group)[:wanted].tolist()
        first = set(patients) - set(second)
    return sorted(first), sorted(second)


def split_in_three(cancer: Mapping[str, bool], test_size: float, val_size: float, seed: int) -> dict[str, list[str]]:
    """Split patients into train, val and test: first `test_size` of all for the test, then `val_size` of the others."""
    rest, test = split_by_patient(cancer, test_size, seed)
    train, val = split_by_patient({patient: cancer[patient] for patient in rest}, val_size, seed)
    return {"train": train, "val": val, "test": test}


def read_patient_list(path: str | Path) -> list[str]:
    """Read patient ids, one a line; a header line `patient_id` may come first. InputError for repeated ids or none."""
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
    """Raise InputError when a patient is in two sets. sets: patient ids by the name of the set."""
    for (name, patients), (other_name, others) in combinations(sets.items(), 2):
        if shared := sorted(set(patients) & set(others)):
            both = f"{counted(len(shared), 'patient')} in both {name} and {other_name}"
            such = ", ".join(shared[:10])
            raise InputError(f"{both}, such as {such}: Expected all images of a patient in one set")


def parse_inbreast_name(stem: str) -> tuple[str, str, str | None] | None:
    """Return (patient, side, view) by an INbreast file's stem, the view None if not CC or MLO; None for other names."""
    match = _INBREAST_NAME.fullmatch(stem)
    return match and (match[1].lower(), INBREAST_SIDES[match[2].upper()], INBREAST_VIEWS.get(match[3].upper()))


def patient_of(file: str) -> str:
    """Return the patient whom an image's name tells, of INbreast or as data preparation writes it; else InputError."""
    stem = Path(file).stem
    if found := parse_inbreast_name(stem) or parse_image_name(stem):
        return found[0]
    expected = "Expected <image>_<patient>_MG_<side>_<view>_ANON as in INbreast, or <patient>_<LEFT|RIGHT>_<CC|MLO>"
    raise InputError(f"{file}: the name tells no patient. {expected}")


def cancer_patients(pictures: Iterable[Picture]) -> dict[str, bool]:
    """Return for each patient whether any image is positive."""
    cancer = defaultdict(bool)
    for picture in pictures:
        cancer[picture.patient] |= picture.positive
    return dict(cancer)


def sets_of_patients(sets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the set of each patient."""
    return {patient: name for name, patients in sets.items() for patient in patients}


def named_sets(pictures: Iterable[Picture]) -> dict[str, set[str]] | None:
    """Return the patients of the sets that the data name, or None where they name none."""
    pictures = list(pictures)
    sets = {name: {picture.patient for picture in pictures if picture.set == name} for name in SETS}
    return sets if any(sets.values()) else None


def count_sets(sets: Mapping[str, Sequence[str]], pictures: Iterable[Picture]) -> dict[str, dict[str, int]]:
    """Count patients, cancer patients, images and positive images of each set."""
    pictures, counts = list(pictures), {}
    for name, patients in sets.items():
        wanted = set(patients)
        mine = [picture for picture in pictures if picture.patient in wanted]
        counts[name] = {"patients": len(patients), "cancer_patients": sum(cancer_patients(mine).values())}
        counts[name] |= {"images": len(mine), "positive_images": sum(picture.positive for picture in mine)}
    return counts


def count_left_patients(sets: Mapping[str, Sequence[str]], pictures: Iterable[Picture]) -> int:
    """Count the patients in no set."""
    return len({picture.patient for picture in pictures} - sets_of_patients(sets).keys())


def split_by_options(pictures: Iterable[Picture], args: Namespace, parser: ArgumentParser) -> dict[str, list[str]]:
    """Split patients into train, val and test by `args.split`: "lists", "official", or any other name for a random one.

    The official split is the one that the data name; where they name no validation set, part of the training patients
    are for validation. parser: the one of `args`, which knows the defaults. Raises InputError when a patient is in two
    sets, and for lists of patients, or shares, that this split does not use.
    """
    pictures = list(pictures)
    cancer = cancer_patients(pictures)
    files = {name: getattr(args, f"pat_{name}") for name in SETS}
    if args.split != "lists" and (given := [f"--pat-{name}" for name, path in files.items() if path is not None]):
        raise InputError(f"{', '.join(given)}: Expected --split lists. Received --split {args.split}")
    if args.split == "lists":
        _check_drawn(("test", "val"), args, parser)
        sets = _read_lists(files, cancer)
    elif args.split == "official":
        sets = named_sets(pictures)
        check_disjoint(sets)
        _check_drawn(("test", "val") if sets["val"] else ("test",), args, parser)
        rest = {patient: label for patient, label in cancer.items() if patient not in sets["val"] | sets["test"]}
        if not rest:
            raise InputError("--split official: no training patients: Expected the tables of both sets")
        sets = {name: sorted(sets[name]) for name in SETS} | {"train": sorted(rest)}
        if not sets["val"]:
            sets["train"], sets["val"] = split_by_patient(rest, args.val_size, args.random_state)
    else:
        sets = split_in_three(cancer, args.test_size, args.val_size, args.random_state)
    check_disjoint(sets)
    return sets


def _read_lists(files: Mapping[str, str | None], known: Iterable[str]) -> dict[str, list[str]]:
    """Read the patients of each set, sorted. Raises InputError for a file that is not given, or patients not known."""
    if missing := [f"--pat-{name}" for name, path in files.items() if path is None]:
        raise InputError(f"--split lists: Expected a file for each set. Missing {', '.join(missing)}")
    sets = {name: sorted(read_patient_list(path)) for name, path in files.items()}
    for name, path in files.items():
        if unknown := [patient for patient in sets[name] if patient not in known]:
            raise InputError(f"{path}: {counted(len(unknown), 'patient')} not in the tables, such as {unknown[0]}")
    return sets


def _check_drawn(names: Iterable[str], args: Namespace, parser: ArgumentParser) -> None:
    """Raise InputError where a share of patients was given for a set that `args.split` does not draw."""
    for name in names:
        if getattr(args, f"{name}_size") != parser.get_default(f"{name}_size"):
            received = f"Received --split {args.split}, by which its patients are given"
            raise InputError(f"--{name}-size: Expected a --split that draws the {name} set. {received}")


def print_split(sets: Mapping[str, Sequence[str]], pictures: Iterable[Picture], args: Namespace) -> None:
    """Print how many patients and images each set has, and how many patients are in none."""
    pictures = list(pictures)
    seed = f", random state {args.random_state}" if args.split != "lists" else ""
    print(f"split {args.split}{seed}:")
    for name, counts in count_sets(sets, pictures).items():
        patients = "{patients:5} patients ({cancer_patients} with cancer)".format(**counts)
        print(f"  {name:5} {patients}, {counts['images']:5} images ({counts['positive_images']} positive)")
    placed = [patient for patients in sets.values() for patient in patients]
    print(f"no patient is in two sets: {len(placed)} places, {len(set(placed))} patients")
    if left := count_left_patients(sets, pictures):
        print(f"in no set: {counted(left, 'patient')}")


def choose_patients(source: Path, out: Path, patients: int, seed: int = SEED) -> list[str]:
    """Make `out` the data folder `source` (train, val, test; neg and pos in each) with fewer patients to train on.

    The patients with cancer, and the others, are put in an order drawn from the seed, and the first of both are chosen,
    in the shares of the training set. So a smaller choice is always part of a larger one.
    Images are linked, not copied; `patients.txt` lists the patients. Returns them, sorted.

    Raises InputError for names that tell no patient, for fewer patients than are asked for, where these are too few for
    both classes, and where `out` has links of another choice: images of other patients would stay in it.
    """
    source, out = Path(source).resolve(), Path(out)
    images, cancer = defaultdict(list), set()
    for label in CLASSES:
        folder = source / "train" / label
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder. Expected train, val and test, each with neg and pos")
        for path in filter(is_image, walk_files(folder)):
            patient = patient_of(str(path))
            images[patient].append(path)
            if label == "pos":
                cancer.add(patient)
    if len(images) < patients:
        raise InputError(f"{source / 'train'}: Expected at least {patients} patients. Received {len(images)}")
    with_cancer = round(patients * len(cancer) / len(images))
    if not 0 < with_cancer < patients:
        have = f"{len(cancer)} of {len(images)} patients have cancer"
        expected = "Expected a number of patients for which this share means some with and some without"
        raise InputError(f"{source / 'train'}: {have}. {expected}. Received {patients}")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(sorted(cancer)).tolist()[:with_cancer]
    chosen += rng.permutation(sorted(images.keys() - cancer)).tolist()[: patients - with_cancer]
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
