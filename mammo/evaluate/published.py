"""Read the published figures and compare ours with them; fetch and check the released models.

`published.csv` beside this file is the one place of the published figures. A row names the network and the recipe that
makes it (`kind`), and the rows whose results it starts from (`from`); `mammo reproduce` walks these.
"""

import csv
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mammo.base.files import InputError, atomic_write, remove_partial, write_text
from mammo.base.guards import parse_json

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED_TABLE = Path(__file__).with_name("published.csv")

FIGURES = {"accuracy": "accuracy", "auc": "AUC", "auc_flips": "AUC, four flips"}

SPLIT_NOTE = (
    "The published figures are on the author's own split of the patients, which was never published (376 test images "
    "of DDSM); on another split a difference of some hundredths means nothing. On the official test split of CBIS-DDSM "
    "users measured the released models at 0.69 to 0.75."
)

_SUBSET_RUN = re.compile(r"(.+)-(\d+)-patients")


class Row(NamedTuple):
    """A published line: `patch`, `image`, `extend`, `finetune` or `mean` made from the rows `sources`."""

    name: str
    kind: str
    sources: list[str]
    figures: dict[str, float]  # published, by the keys of FIGURES
    best_epoch: int | None  # epoch of the best validation AUC, as published
    time: str  # of this row's own training on the 8 GB Quadro M4000: its arithmetic at half of 2.6 TFLOPS, not measured
    net: str
    patch_set: str
    top: str
    patients: int | None  # of INbreast, to train on; None for all

    @property
    def expectation(self) -> str:
        """Return the time and the score to expect, as text."""
        figures = [f"published {FIGURES[name]} {_as_published(value)}" for name, value in self.figures.items()]
        return "; ".join(filter(None, [self.time, *figures]))


class Comparison(NamedTuple):
    """One published figure and ours; `None` where there is none."""

    row: str
    figure: str
    published: float | None
    ours: float
    difference: float | None
    test_samples: int


def read_published(path: str | Path = PUBLISHED_TABLE) -> list[Row]:
    """Read all rows of the published table."""
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(
                cells["row"],
                cells["kind"],
                cells["from"].split(),
                {name: float(cells[name]) for name in FIGURES if cells[name]},
                int(cells["best_epoch"]) if cells["best_epoch"] else None,
                cells["time"],
                cells["net"],
                cells["set"],
                cells["top"],
                int(cells["patients"]) if cells["patients"] else None,
            )
            for cells in csv.DictReader(file)
        ]


def measured(folder: Path) -> tuple[dict[str, float], int]:
    """Return our figures by the keys of `FIGURES`, and the number of test samples, from the metrics.json of a run.

    The AUC is that of the class `pos`; runs without such a class have an accuracy alone.
    Raises InputError for a file that is missing, damaged or of another kind.
    """
    path = Path(folder, "metrics.json")
    try:
        scores = parse_json(path.read_text(encoding="utf-8"))
        single, flips = scores["single"], scores.get("flips")
        figures = {"accuracy": single["accuracy"], "auc": single["auc"].get("pos")}
        figures["auc_flips"] = flips["auc"].get("pos") if flips else None
        return {name: value for name, value in figures.items() if value is not None}, single["samples"]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Expected a folder that one of the trainers wrote") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: not the metrics of a trainer ({type(error).__name__}: {error})") from None


def compare(out: Path, rows: Sequence[Row]) -> list[Comparison]:
    """List ours beside the published figures, for every row with a finished folder `out/<row>`.

    Of a patch row this is the accuracy, of the others the AUC, single and of four flips.
    """
    result = []
    for row in rows:
        if not Path(out, row.name, "metrics.json").exists():
            continue
        ours, samples = measured(Path(out, row.name))
        for name in ["accuracy"] if row.kind == "patch" else ["auc", "auc_flips"]:
            if name in ours:
                published = row.figures.get(name)
                difference = None if published is None else ours[name] - published
                result.append(Comparison(row.name, FIGURES[name], published, ours[name], difference, samples))
    return result


def write_comparison(path: Path, comparisons: Sequence[Comparison]) -> None:
    """Write a CSV file of a row a figure."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Comparison._fields)
        for line in comparisons:
            difference = None if line.difference is None else round(line.difference, 6)
            writer.writerow(line._replace(ours=round(line.ours, 6), difference=difference))


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return the same as text."""
    return text_table(
        ["row", "figure", "published", "ours", "difference", "test set"],
        [
            [
                c.row,
                c.figure,
                "-" if c.published is None else _as_published(c.published),
                f"{c.ours:.3f}",
                "-" if c.difference is None else f"{c.difference:+.3f}",
                str(c.test_samples),
            ]
            for c in comparisons
        ],
    )


def published_table(rows: Sequence[Row]) -> str:
    """Return every row with its command and what was published, as text."""
    return text_table(
        ["command", "published", "best epoch", "training on 8 GB (estimate)"],
        [
            [
                f"mammo reproduce {row.name} DATA",
                "; ".join(f"{FIGURES[name]} {_as_published(value)}" for name, value in row.figures.items()),
                str(row.best_epoch or "-"),
                row.time,
            ]
            for row in rows
        ],
    )


def _as_published(value: float) -> str:
    """Return two decimals, or three where there are so many."""
    return f"{value:.3f}".removesuffix("0")


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table of the columns' widths, as Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join(
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def average_predictions(runs: Sequence[Path], out: Path) -> None:
    """Average the predictions.csv of several runs on one test set, and write the scores of the mean to `out`.

    Images are paired by their file names below the test folder; `out` gets the files of `write_test_results`.
    Raises InputError where the runs differ in images, labels, classes or in having flips.
    """
    import numpy as np

    from mammo.train.scoring import write_test_results

    paths = [Path(run, "predictions.csv") for run in runs]
    if len(paths) < 2:
        raise InputError(f"Expected at least two runs to average. Received {len(paths)}")
    tables = [_read_predictions(path) for path in paths]
    first = tables[0]
    for path, table in zip(paths[1:], tables[1:], strict=True):
        if list(table.columns) != list(first.columns):
            raise InputError(
                f"{path}: Expected the columns of {paths[0]}, {', '.join(first.columns)}. "
                f"Received {', '.join(table.columns)}"
            )
        if different := sorted(set(first.index) ^ set(table.index)):
            one = paths[0] if different[0] in first.index else path
            raise InputError(
                f"{path}: Expected the images of {paths[0]}: both must be scored on one test set. "
                f"Received {len(table)} images instead of {len(first)}; {different[0]} is in {one} only"
            )
        labels = table.label.loc[first.index]
        if (wrong := labels != first.label).any():
            file = wrong.idxmax()
            raise InputError(
                f"{path}: {file}: Expected the label of {paths[0]}, {first.label[file]}. Received {labels[file]}"
            )
    columns = [name for name in first.columns if name != "label"]
    class_list = [name for name in columns if not name.endswith("_flips")]
    mean = sum(table.loc[first.index, columns] for table in tables) / len(tables)
    predictions = {"single": mean[class_list].to_numpy()}
    if len(columns) > len(class_list):
        predictions["flips"] = mean[[f"{name}_flips" for name in class_list]].to_numpy()
    y_true = np.eye(len(class_list))[[class_list.index(label) for label in first.label]]
    write_test_results(Path(out), list(first.index), y_true, predictions, class_list)


def _read_predictions(path: Path) -> "pd.DataFrame":
    """Read predictions.csv as a data frame, indexed by file: `label`, and the probabilities of each class."""
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype={"file": str, "label": str})
        if list(table.columns[:2]) != ["file", "label"] or len(table.columns) < 4:
            raise InputError(
                f"{path}: Expected the columns file, label and one a class. Received {list(table.columns)}"
            )
        repeated = table.file[table.file.duplicated()]
        if len(repeated):
            raise InputError(f"{path}: {repeated.iloc[0]} stands there twice. Expected each image once")
        if not set(table.label) <= set(table.columns[2:]):
            raise InputError(
                f"{path}: a label has no column of its name. Received {', '.join(sorted(set(table.label)))}"
            )
        if not all(kind.kind == "f" for kind in table.dtypes.iloc[2:]) or table.isna().any(axis=None):
            raise InputError(f"{path}: Expected a probability in each cell. Received others, or empty ones")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Expected a folder that one of the trainers wrote") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a table of predictions ({error})") from None
    return table.set_index("file")


def subset_table(out: Path) -> "pd.DataFrame":
    """Return the trainings with few patients in `out`, the folder of `mammo subset`, as a data frame.

    A row a training, sorted by model and patients: `model`, its name; `patients` and `images`, in training; `auc` on
    the test set with its 95% interval `low` to `high` (DeLong, on the logit scale, clustered by patient), and the same
    of the mean of four flips, `auc_flips`, `low_flips`, `high_flips`; `published`, for the models of the paper, else
    NaN; `test_images`, `test_patients`.
    Left out, with a warning, are trainings on patients that `--fresh` has replaced by others.
    Raises InputError where there is none, and for files that a trainer did not write.
    """
    import pandas as pd

    from mammo.base.statistics import auc_interval, delong
    from mammo.data.splits import patient_of

    published = {row.name: row.figures.get("auc") for row in read_published()}
    rows = []
    for folder in sorted(Path(out).glob("*-patients")):
        match = _SUBSET_RUN.fullmatch(folder.name)
        if match is None or not (folder / "metrics.json").exists():
            continue
        model, patients = match[1], int(match[2])
        subset = Path(out, f"{patients}-patients")
        if not _command(folder).startswith(_command(subset)):
            print(
                f"warning: {folder}: left out: trained on others than {subset} has now; train it anew", file=sys.stderr
            )
            continue
        table = _read_predictions(folder / "predictions.csv")
        groups = [patient_of(file) for file in table.index]
        row = {"model": model, "patients": patients, "images": _count_images(subset)}
        for way in ("", "_flips"):
            if f"pos{way}" in table:
                [auc], [[variance]] = delong(table.label == "pos", table[f"pos{way}"], groups)
                low, high = auc_interval(auc, variance)
                row |= {f"auc{way}": auc, f"low{way}": low, f"high{way}": high}
        row |= {"published": published.get(f"inbreast-{folder.name}"), "test_images": len(table)}
        rows.append(row | {"test_patients": len(set(groups))})
    if not rows:
        raise InputError(f"{out}: no training there. Expected the output folder of mammo subset")
    table = pd.DataFrame(rows).astype({"published": float})
    return table.sort_values(["model", "patients"], ignore_index=True)


def _command(folder: Path) -> str:
    """Return by which commands and inputs a step of a recipe made its folder, those of its sources first."""
    path = folder / "command.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _count_images(data: Path) -> int:
    """Count the images to train on in a data folder; none where there is no such folder: no patient, no training."""
    from mammo.base.files import walk_files
    from mammo.images.reading import is_image

    return sum(map(is_image, walk_files(data / "train"))) if data.is_dir() else 0


def plot_subsets(table: "pd.DataFrame", path: Path) -> None:
    """Draw the AUC over the patients in training, of `subset_table`: a colour a model, its published AUC dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    models = list(table.groupby("model", sort=False))
    for place, (model, runs) in enumerate(models):
        color, shift = f"C{place}", 0.4 * (place - (len(models) - 1) / 2)  # so that no interval hides another
        axes.errorbar(
            runs.patients + shift, runs.auc, [runs.auc - runs.low, runs.high - runs.auc], label=model, color=color,
            marker="o", capsize=3,
        )  # fmt: skip
        if runs.published.notna().any():
            axes.plot(runs.patients, runs.published, "x--", color=color, label=f"{model}, published")
    axes.set(xlabel="patients in training", ylabel="test AUC, 95% interval", xticks=sorted(set(table.patients)))
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


RELEASED_TABLE = Path(__file__).with_name("released.csv")

FOLDER_LINK = "https://drive.google.com/open?id=0B1PVLadG_dCKV2pZem5MTjc1cHc"

CHECKSUMS = "SHA256SUMS"

# Convolutions of each kind of patch network.
CONVOLUTIONS = {"resnet50": 53, "vgg16": 13, "vgg19": 16, "yaroslav": 12}


class Released(NamedTuple):
    """One model: its row of the published figures, number of classes, and where the authors put the file."""

    row: Row
    classes: int
    link: str

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def file(self) -> str:
        return f"{self.row.name}.h5"

    @property
    def drive_id(self) -> str:
        return self.link.partition("id=")[2]


class NoConnectionError(InputError):
    """There is no way to the internet: the other models cannot be fetched either."""


def read_released(path: str | Path = RELEASED_TABLE) -> list[Released]:
    """Read the table of the released models."""
    published = {row.name: row for row in read_published()}
    with open(path, newline="", encoding="utf-8") as file:
        return [Released(published[row["row"]], int(row["classes"]), row["link"]) for row in csv.DictReader(file)]


def released_table(models: Sequence[Released]) -> str:
    """Return name, role, published figures and link of each, as text."""
    rows = []
    for model in models:
        figures = "; ".join(f"{FIGURES[name]} {value:.2f}" for name, value in model.row.figures.items())
        rows.append([model.name, role(model), figures, model.link])
    return text_table(["name", "role", "published", "link"], rows)


def role(model: Released) -> str:
    """Return what the model is for, in words."""
    if model.row.kind == "patch":
        return "patch classifier, to build whole-image classifiers on"
    data = "DDSM" if model.name.startswith("ddsm") else "INbreast"
    return f"whole-image classifier, {data}"


def settings(model: Released) -> dict:
    """Return the pixel options and classes that the model was trained with, as published."""
    from mammo.images.pixels import PUBLISHED_PIXELS

    inbreast = {"featurewise_mean": 44.33} if model.name.startswith("inbreast") else {}
    patch = {"img_size": [224, 224], "class_list": ["background", "calc_mal", "calc_ben", "mass_mal", "mass_ben"]}
    return PUBLISHED_PIXELS | inbreast | (patch if model.row.kind == "patch" else {})


def by_hand(models: Sequence[Released], folder: str | Path) -> str:
    """Return what to fetch from where, and where to put it, as text."""
    lines = [f"  {model.link}  as  {Path(folder, model.file)}" for model in models]
    return "\n".join(
        [
            "Fetch with a browser:",
            *lines,
            f"All are in {FOLDER_LINK} too. Then give the same command again: it checks them.",
        ]
    )


def gdown_download(drive_id: str, output: str) -> None:
    """Download a file of Google Drive. Raises InputError."""
    try:
        import gdown
    except ImportError:
        raise NoConnectionError("downloads need the package gdown: pip install gdown") from None
    try:
        done = gdown.download(id=drive_id, output=output, quiet=False)
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        if any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__):
            raise NoConnectionError(f"no connection to Google Drive: {text}") from error
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk
            raise
        raise InputError(f"Google Drive does not give the file: {text}") from error
    if done is None:  # as versions before 5 report what failed
        raise InputError("Google Drive does not give the file: it may be asked for too often just now, or be private")


def fetch(model: Released, folder: str | Path, download: Callable[[str, str], None] = gdown_download) -> bool:
    """Make sure that `<folder>/<name>.h5` is the model: download it where it is not there, check it, and keep its
    SHA-256 in `<folder>/SHA256SUMS`, in the form of `sha256sum`, and its pixel options in `<folder>/<name>/args.json`,
    where `mammo.images.pixels.read_settings` finds them.

    download: of a Drive id to a file. A file that is there is kept as it is. Returns whether it was downloaded.
    Raises InputError for a file that cannot be had, does not open, is another network or is not what it once was;
    a download at fault leaves nothing.
    """
    path, sums_path = Path(folder, model.file), Path(folder, CHECKSUMS)
    sums, there = read_checksums(sums_path), path.exists()
    if there:
        try:
            if path.name in sums:
                check_same(path, sums[path.name])
                return False
            check(path, model)
        except InputError as error:
            raise InputError(f"{error}; remove the file to have it downloaded again") from error
    else:
        try:
            with atomic_write(path) as temporary:
                download(model.drive_id, str(temporary))
                try:
                    check(temporary, model)
                except InputError as error:
                    raise InputError(f"not kept: {error}".replace(str(temporary), "the download")) from error
        finally:
            remove_partial(folder)  # gdown's own temporary files begin as ours do
    settings_path = Path(folder, model.name, "args.json")
    if not settings_path.exists():
        write_text(settings_path, json.dumps(settings(model), indent=1) + "\n")
    sums[path.name] = sha256(path)
    write_text(sums_path, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))
    return not there


def check(path: str | Path, model: Released) -> None:
    """Raise InputError unless the file is a model of the right number of classes, image size and convolutions."""
    from keras.layers import Conv2D

    from mammo.train.checkpoint import leaf_layers, load_model

    with open(path, "rb") as file:
        start = file.read(4096)
    if not start:
        raise InputError(f"{path}: the file is empty (0 bytes)")
    if start.lstrip().startswith((b"<!", b"<h", b"<H")):
        title = re.search(rb"<title>(.*?)</title>", start, re.DOTALL | re.IGNORECASE)
        said = f", which says {title.group(1).decode(errors='replace').strip()!r}" if title else ""
        raise InputError(f"{path}: a web page instead of the file{said}: try again later, or fetch it with a browser")
    network = load_model(path)
    outputs = network.output_shape
    if len(outputs) != 2 or outputs[-1] != model.classes:
        raise InputError(f"{path}: Expected a model of {model.classes} classes. Received outputs of shape {outputs}")
    if len(network.inputs) != 1 or len(network.inputs[0].shape) != 4:
        raise InputError(f"{path}: Expected a model of one image. Received inputs of shape {network.input_shape}")
    built, size = network.input_shape[1:3], settings(model)["img_size"]
    whole = model.row.kind != "patch"
    if whole and any(have not in (None, published) for have, published in zip(built, size, strict=True)):
        raise InputError(f"{path}: Expected a model of images {size[0]} x {size[1]}. Received one of {built}")
    count = sum(isinstance(layer, Conv2D) for layer in leaf_layers(network))
    net = next(net for net in CONVOLUTIONS if net in model.name)
    if CONVOLUTIONS[net] > count or count > _most_convolutions(net, whole):
        body = f"{CONVOLUTIONS[net]} convolutions" + (" and those of the top layers" if whole else "")
        raise InputError(f"{path}: Expected a network of {net}, with its {body}. Received one of {count}")


def _most_convolutions(net: str, whole: bool) -> float:
    """Return how many there may be: the top layers of a whole-image one do not make it as deep as ResNet50."""
    if not whole:
        return CONVOLUTIONS[net]
    return math.inf if net == "resnet50" else CONVOLUTIONS["resnet50"] - 1


def check_same(path: str | Path, expected: str) -> None:
    """Raise InputError unless the file has that SHA-256."""
    if (digest := sha256(path)) != expected:
        raise InputError(
            f"{path}: not the file that was checked: Expected the SHA-256 {expected}. Received {digest}; "
            f"if this is the right file, delete its line in {CHECKSUMS}"
        )


def read_checksums(path: str | Path) -> dict[str, str]:
    """Read the SHA-256 by file name, {} where there is no such file. Raises InputError for a damaged one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        lines = [""]
    sums = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if match is None:
            raise InputError(f"{path}, line {number}: Expected a SHA-256 and a file name. Received {line[:100]!r}")
        sums[match.group(2)] = match.group(1)
    return sums


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
