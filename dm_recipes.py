"""Published figures, and ours beside them: what the recipes in `ddsm_train/` and `inbreast/` leave to Python.

`ddsm_train/published.csv` is the one place of the published figures. A row names the network and the recipe that
makes it (`kind`), and the rows whose results it starts from (`from`); `reproduce_table.sh` walks these.
"""

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dm_files import InputError, atomic_write
from dm_limits import parse_json

PUBLISHED = Path(__file__).resolve().parent / "ddsm_train" / "published.csv"
FIGURES = {"accuracy": "accuracy", "auc": "AUC", "auc_flips": "AUC, four flips"}
SPLIT_NOTE = (
    "The published figures are on the author's own split of the patients, which was never published (376 test images "
    "of DDSM); on another split a difference of some hundredths means nothing. On the official test split of CBIS-DDSM "
    "users measured the released models at 0.69 to 0.75."
)
# INbreast's own file names: <image>_<patient>_MG_...
_INBREAST = re.compile(r"[^_]+_([^_]+)_MG_")
_SUBSET_RUN = re.compile(r"(.+)-(\d+)-patients")


class Row(NamedTuple):
    """A published line: `patch`, `image`, `extend`, `finetune` or `mean` made from the rows `sources`."""

    name: str
    kind: str
    sources: list[str]
    figures: dict[str, float]  # published, by the keys of FIGURES
    best_epoch: int | None  # epoch of the best validation AUC, as published
    time: str  # of this row's own training on the 8 GB Quadro M4000: its arithmetic at half of 2.6 TFLOPS, not measured


class Comparison(NamedTuple):
    """One published figure and ours; `None` where there is none."""

    row: str
    figure: str
    published: float | None
    ours: float
    difference: float | None
    test_samples: int


def read_published(path=PUBLISHED) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(
                cells["row"],
                cells["kind"],
                cells["from"].split(),
                {name: float(cells[name]) for name in FIGURES if cells[name]},
                int(cells["best_epoch"]) if cells["best_epoch"] else None,
                cells["time"],
            )
            for cells in csv.DictReader(file)
        ]


def measured(folder: Path) -> tuple[dict[str, float], int]:
    """Our figures by the keys of `FIGURES`, and the number of test samples, from the metrics.json of a run.

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
    """Ours beside the published figures, for every row with a finished folder `out/<row>`.

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
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Comparison._fields)
        for line in comparisons:
            difference = None if line.difference is None else round(line.difference, 6)
            writer.writerow(line._replace(ours=round(line.ours, 6), difference=difference))


def comparison_table(comparisons: Sequence[Comparison]) -> str:
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
    """Every row with its command and what was published."""
    return text_table(
        ["command", "published", "best epoch", "training on 8 GB (estimate)"],
        [
            [
                f"ddsm_train/reproduce_table.sh {row.name} DATA",
                "; ".join(f"{FIGURES[name]} {_as_published(value)}" for name, value in row.figures.items()),
                str(row.best_epoch or "-"),
                row.time,
            ]
            for row in rows
        ],
    )


def _as_published(value: float) -> str:
    """Two decimals, or three where there are so many."""
    return f"{value:.3f}".removesuffix("0")


def text_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of the columns' widths, as Markdown."""
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

    from dm_inference import write_test_results

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


def _read_predictions(path: Path):
    """predictions.csv as a data frame, indexed by file: `label`, and the probabilities of each class."""
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


def patient_of(file: str) -> str:
    """The patient whom the name of an image tells: one of INbreast, or one that data preparation wrote.

    Raises InputError for names of another form.
    """
    from dm_dataset import parse_image_name

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

    from dm_files import walk_files, write_text
    from dm_image import is_image

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


def subset_table(out: Path):
    """The trainings with few patients in `out`, the folder of `inbreast/subset_experiment.sh`, as a data frame.

    A row a training, sorted by model and patients: `model`, its name; `patients` and `images`, in training; `auc` on
    the test set with its 95% interval `low` to `high` (DeLong, on the logit scale, clustered by patient), and the same
    of the mean of four flips, `auc_flips`, `low_flips`, `high_flips`; `published`, for the models of the paper, else
    NaN; `test_images`, `test_patients`.
    Left out, with a warning, are trainings on patients that `--fresh` has replaced by others.
    Raises InputError where there is none, and for files that a trainer did not write.
    """
    import pandas as pd

    from dm_statistics import auc_interval, delong

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
        raise InputError(f"{out}: no training there. Expected the output folder of inbreast/subset_experiment.sh")
    table = pd.DataFrame(rows).astype({"published": float})
    return table.sort_values(["model", "patients"], ignore_index=True)


def _command(folder: Path) -> str:
    """By which commands and inputs a step of a recipe made its folder, those of its sources first."""
    path = folder / "command.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _count_images(data: Path) -> int:
    """Images to train on in a data folder; none where there is no such folder: no patient, no training."""
    from dm_files import walk_files
    from dm_image import is_image

    return sum(map(is_image, walk_files(data / "train"))) if data.is_dir() else 0


def plot_subsets(table, path: Path) -> None:
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
