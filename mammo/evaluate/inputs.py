"""What is to be evaluated: labelled images in any layout, and what models say of them, in one table.

The table has the columns of `evaluation.IMAGE_COLUMNS`: file (where it can be opened from here), patient ("" where
not known), side (LEFT, RIGHT or ""), view (CC, MLO or "") and label (1 for the positive classes, 0 for others). One
column a model follows: its probability of the positive classes.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from mammo.base.files import InputError, env_int
from mammo.base.tables import find_columns, open_table
from mammo.data.others import read_exams
from mammo.data.own import OWN_COLUMNS, REQUIRED, SET_NAMES, SIDES, VIEWS, known_value, read_labels
from mammo.data.prepare import IMAGE_TABLE, read_image_table
from mammo.evaluate.evaluation import AVERAGE, FLIPS, IMAGE_COLUMNS
from mammo.images.pixels import Pixels, pixel_warnings_of_files
from mammo.images.reading import check_constant, find_images, parse_image_name


def read_images(
    source: str | Path,
    classes: Sequence[str] = ("neg", "pos"),
    positive: Sequence[str] = ("pos",),
    part: str = "test",
    image_dir: str | Path | None = None,
) -> pd.DataFrame:
    """Return the labelled images of a folder or a list; raise InputError for anything missing or malformed.

    Warns, on standard error, of images without a patient.

    Args:
        source: the output folder of a preparation script, of which the set `part` is taken; a folder with one
            sub-folder a class; a table (CSV, Excel) with columns file, label and perhaps patient, side, view, and set,
            of which `part` is taken; or an exam list of the NYU metarepository (`.pkl`). Where patient, side and view
            are not given they are read from names of the form <patient>_<LEFT|RIGHT>_<CC|MLO>.
        classes: sub-folders to read, and labels that a table may have, besides 0 and 1. positive: those of label 1.
        image_dir: folder that file names in lists start from; default: that of a table itself.
    """
    path = Path(source)
    if path.suffix.lower() == ".pkl":
        rows = _read_exams(path, image_dir)
    elif path.is_file():
        folder = path.parent if image_dir is None else Path(image_dir)
        rows = [(str(folder / file), *known) for file, *known in _read_table(path, classes, positive, part)[0]]
    elif not path.is_dir():
        raise InputError(f"{path}: not found. Expected a folder of images, a table or an exam list (.pkl)")
    elif (path / IMAGE_TABLE).is_file():
        rows = _read_prepared(path, part)
    else:
        rows = _read_classes(path, classes, positive)
    table = pd.DataFrame(rows, columns=IMAGE_COLUMNS)
    if missing := [file for file in table["file"] if not Path(file).is_file()]:
        number = f"{len(missing)} of {len(table)}"
        raise InputError(f"{missing[0]}: listed in {source}, but not there ({number} are missing)")
    return _with_patients(table, source)


def _read_prepared(folder: Path, part: str) -> list[tuple]:
    images = read_image_table(folder / IMAGE_TABLE)
    images = images[images["set"] == part]
    if images.empty:
        raise InputError(f"{folder / IMAGE_TABLE}: no images of the set {part}; name another with --set")
    rows = images.itertuples()
    return [(str(folder / row.file), row.patient, row.side, row.view, int(row.label == "pos")) for row in rows]


def _read_classes(folder: Path, classes, positive) -> list[tuple]:
    listed, rows = {}, []
    if (folder.parent / IMAGE_TABLE).is_file():
        images = read_image_table(folder.parent / IMAGE_TABLE)
        listed = {row.file: (row.patient, row.side, row.view) for row in images.itertuples()}
    for name in classes:
        if not (folder / name).is_dir():
            raise InputError(f"{folder / name}: no such class folder. Expected {', '.join(classes)}; see --class-list")
        for file in find_images([folder / name]):
            known = listed.get(file.relative_to(folder.parent).as_posix()) or _from_name(file)
            rows.append((str(file), *known, int(name in positive)))
    return rows


def _from_name(file) -> tuple[str, str, str]:
    return parse_image_name(Path(file).stem) or ("", "", "")


def _read_table(path, classes, positive, part: str) -> tuple[list[tuple], list[dict[str, str]]]:
    """Return the rows of a table, as of `IMAGE_COLUMNS`, and all other cells of each by column.

    Columns, sets, sides and views have the spellings of `own`, and labels those of `own.read_labels` or
    the names of classes. Patient, side and view are read from the file's name where they have no column. Of sets,
    `part` is taken.
    """
    labels = read_labels()
    if set(classes) != {"neg", "pos"} or list(positive) != ["pos"]:
        labels = read_labels(["0", *(name for name in classes if name not in positive)], ["1", *positive])
    rows, others = [], []
    with open_table(path) as (header, lines):
        places = find_columns(path, header, OWN_COLUMNS, OWN_COLUMNS.keys() - REQUIRED)
        if len(set(header)) < len(header):
            raise InputError(f"{path}, line 1: Expected each column once. Received {','.join(header)[:300]}")
        unnamed = {name: place for place, name in enumerate(header) if place not in places.values()}
        for where, cells in lines:
            row = {name: cells[place].strip() for name, place in places.items()}
            if known_value(row.get("set", part), SET_NAMES, "set", where) != part:
                continue
            label = labels.is_positive(row["label"], where)
            if label is None:
                expected = f"Expected 0, 1 or {', '.join(classes)}"
                raise InputError(f"{where}: unknown label. {expected}. Received {row['label']!r}")
            known = dict(zip(("patient", "side", "view"), _from_name(row["file"]), strict=True)) | row
            for column, allowed in (("side", SIDES), ("view", VIEWS)):
                known[column] = known[column] and known_value(known[column], allowed, column, where)
            rows.append((row["file"], known["patient"], known["side"], known["view"], int(label)))
            others.append({name: cells[place].strip() for name, place in unnamed.items()})
    if not rows:
        raise InputError(f"{path}: no images of the set {part}. Expected rows below the header; see --set")
    return rows, others


def _read_exams(path: Path, image_dir) -> list[tuple]:
    if image_dir is None:
        raise InputError(f"{path}: Expected --image-dir, the folder of its images. Received none")
    images = list(read_exams(path))
    if not images:
        raise InputError(f"{path}: no images in these exams")
    print(f"warning: {path}: names no patients: each exam counts as a patient of its own", file=sys.stderr)
    if mirrored := sum(image[-1] for image in images):
        number = f"{mirrored} of {len(images)} images"
        print(f"warning: {path}: {number} are mirrored, and scored as they are", file=sys.stderr)
    return [(str(Path(image_dir, f"{name}.png")), *where, int(malignant)) for name, *where, malignant, _ in images]


def _with_patients(table: pd.DataFrame, source) -> pd.DataFrame:
    """Return the table; images without a patient are one each where others have one. InputError for a repeated file."""
    if (repeated := table["file"].duplicated()).any():
        raise InputError(f"{source}: {table['file'][repeated].iloc[0]} stands there twice; remove one of them")
    without = table["patient"] == ""
    if without.any():
        number = f"{without.sum()} of {len(table)} images have no patient"
        effect = "each counts as a patient of its own, so that intervals are too narrow where patients have several"
        print(f"warning: {source}: {number}: {effect} images", file=sys.stderr)
    if not without.all():
        table.loc[without, "patient"] = table["file"]
    return table


def read_predictions(
    path: str | Path, classes: Sequence[str] = ("neg", "pos"), positive: Sequence[str] = ("pos",), part: str = "test"
) -> tuple[pd.DataFrame, list[str]]:
    """Return a table with predictions from a CSV file, and the names of its models.

    The file is one of ours or anybody's, with the columns of a table of images (see `read_images`). Each other column
    of numbers is a model, but for those of the other classes that a trainer's `predictions.csv` has. The images need
    not be there. Warns of columns of text, which are left out.
    """
    ignored = {name + way for name in classes if name not in positive for way in ("", FLIPS)}
    rows, others = _read_table(path, classes, positive, part)
    cells = pd.DataFrame(others, dtype=str).drop(columns=ignored, errors="ignore")
    numbers = cells.apply(pd.to_numeric, errors="coerce")
    texts = [name for name in cells if numbers[name].isna().all()]
    if texts:
        print(f"warning: {path}: columns without numbers are left out: {', '.join(texts)}", file=sys.stderr)
    models = [name for name in cells if name not in texts]
    if not models:
        raise InputError(f"{path}: Expected images, and a column of predictions a model. Received none")
    table = pd.DataFrame(rows, columns=IMAGE_COLUMNS)
    for name in models:
        if (wrong := numbers[name].isna() & ~cells[name].str.lower().isin(("", "nan"))).any():
            received = f"Received {cells[name][wrong].iloc[0]!r} for {table['file'][wrong].iloc[0]}"
            raise InputError(f"{path}: Expected numbers in the column {name}. {received}")
    return _with_patients(table, path).join(numbers[models].astype(float)), models


# ------------------------------------------------------------------------------------------------- predictions


def name_models(paths: Sequence) -> list[str]:
    """Return short names of model files: without folder and ending, or with as many folders as tell them apart.

    InputError for a file given twice, or one called as what is none of a model in tables of predictions.
    """
    for path in paths:
        if (name := Path(path).stem) in (*IMAGE_COLUMNS, AVERAGE) or name.endswith(FLIPS):
            means = f"{name} means something else in the results"
            raise InputError(f"{path}: Expected a model file of another name, since {means}")
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise InputError(f"Expected each model once. Received {', '.join(map(str, paths))}")
    parts = [Path(path).with_suffix("").resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]  # they differ by their endings


def predict_images(
    table: pd.DataFrame,
    predictors: Mapping[str, object],
    positive: Sequence[str] = ("pos",),
    flips: bool = False,
    batch_size: int = 4,
    on_error: str = "stop",
) -> tuple[pd.DataFrame, list[str]]:
    """Add the probabilities of each model to a table of images.

    predictors: `predict.Predictor`s by name. Those that take the same pixels share the reading of the images. positive:
    classes whose probabilities are added up. flips: add a second column a model, <name>_flips: that of the mean over
    the four flips of each image. on_error: "stop" raises InputError for an unreadable image, "skip" leaves it out.
    Returns the table, of the images that could be read, and a message for each of the others.
    """
    from mammo.evaluate.predict import read_batches

    alike: dict[Pixels, list[str]] = {}
    for name, predictor in predictors.items():
        if missing := [label for label in positive if label not in predictor.class_list]:
            expected = f"Expected {', '.join(predictor.class_list)}; see --positive"
            raise InputError(f"{name}: no class {missing[0]}. {expected}")
        alike.setdefault(predictor.pixels, []).append(name)
    jobs, faults = env_int("NUM_CPU_CORES", 4, minimum=1), {}
    for pixels, names in alike.items():
        files = [file for file in table["file"] if file not in faults]
        for message in pixel_warnings_of_files(files, pixels):
            print(f"warning: {', '.join(names)}: {message}", file=sys.stderr)
        predicted, batches = [], read_batches(partial(_read_whole, pixels), files, batch_size, jobs)
        for batch in tqdm(batches, total=-(-len(files) // batch_size), desc="predict", disable=None):
            faults |= {file: fault for file, _, fault in batch if fault is not None}
            if faults and on_error == "stop":
                raise InputError(next(iter(faults.values())))
            if images := {file: image for file, image, fault in batch if fault is None}:
                columns = [_predict_positive(name, predictors[name], images, positive, flips) for name in names]
                predicted.append(pd.concat(columns, axis=1))
        if not predicted:
            raise InputError(f"none of {len(table)} images can be read; the first: {next(iter(faults.values()))}")
        table = table.join(pd.concat(predicted), on="file", how="inner")
    return table[[*IMAGE_COLUMNS, *model_columns(predictors, flips)]].reset_index(drop=True), list(faults.values())


def _read_whole(pixels: Pixels, file) -> np.ndarray:
    """Return the network input of a file. A mammogram whose pixels are all equal is broken."""
    return pixels.to_input(file, check_constant(file, pixels.resize(file, pixels.read_stored(file))))


def _predict_positive(name: str, predictor, images: dict[str, np.ndarray], positive, flips: bool) -> pd.DataFrame:
    """Return the probabilities of the positive classes, by file, in the columns of one model."""
    wanted = [predictor.class_list.index(label) for label in positive]
    found = np.stack(predictor.probabilities(np.stack(list(images.values())), flips), axis=1)
    values = found[..., wanted].sum(axis=-1, dtype=np.float64)
    return pd.DataFrame(values, index=list(images), columns=model_columns([name], flips))


def model_columns(names: Iterable[str], flips: bool) -> list[str]:
    """Return the names of the columns that `predict_images` adds for these models."""
    return [name + way for way in (("", FLIPS) if flips else ("",)) for name in names]
