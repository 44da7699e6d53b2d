"""Write the report of an evaluation: one HTML page that needs no other file, no network and no script.

`report.html.j2` beside this module is the page; the functions here collect what it shows.
"""

import base64
import io
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pandas as pd
from cycler import cycler
from jinja2 import Environment, PackageLoader, StrictUndefined

from mammo.base.files import InputError, counted, write_text
from mammo.evaluate import evaluation
from mammo.evaluate.evaluation import AVERAGE, FLIPS, band_opacity
from mammo.images.reading import check_grey, read_resized, resize

if TYPE_CHECKING:
    from mammo.evaluate.predict import Predictor

# The palette of Okabe and Ito 2008, told apart by colour-blind readers too, less its yellow; dark enough on white.
_COLOURS = ("#0072b2", "#c24e00", "#00795a", "#a3497d", "#1a1a1a", "#8a6d00")
_STYLES = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=_COLOURS)
_NEGATIVE, _POSITIVE = _COLOURS[:2]
_PICTURE_HEIGHT = 560  # pixels
_BINS = 25  # of the histogram
_SECTIONS = {"summary": "Summary", "image": "Images", "breast": "Breasts", "patient": "Patients"}
_SECTIONS |= {"errors": "Most confident errors", "methods": "How to read the figures", "origin": "Origin"}


def write_report(
    path: str | Path,
    results: Mapping[str, Any],
    table: pd.DataFrame,
    *,
    root: str | Path = ".",
    predictors: "Mapping[str, Predictor] | None" = None,
    positive: Sequence[str] = ("pos",),
    nb_error: int = 4,
    title: str = "Evaluation",
) -> None:
    """Write the report of an evaluation as one HTML page; missing folders are made. Raises OSError as `write_text`.

    What is wrong with a picture, such as a missing file, is said in its place.

    Args:
        results: of `evaluate_models`; with `command` (a string or its words) and `versions` (by name) if known.
        table: what was evaluated; see `mammo.evaluate.evaluation`. root: folder that its files are relative to.
        predictors: by the name of its model, whose Grad-CAM maps are shown beside the mammograms. Models without one,
            such as means of several, have mammograms alone.
        positive: classes that count as cancer, whose maps are added. title: heading of the page.
        nb_error: how many false positives, and how many false negatives, are shown of each model, the most confident
            first, by the first threshold of its points.
    """
    data, levels = results["data"], results["levels"]
    samples = evaluation.at_levels(table, results["models"], data["patient_score"])
    command = results.get("command")
    loader = PackageLoader("mammo.evaluate", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"estimate": _estimate, "figure": _figure, "score": _score, "thousands": "{:,}".format}
    environment.filters["p_value"] = lambda p: _figure(p) if p is None else evaluation.p_text(p)
    page = environment.get_template("report.html.j2").render(
        title=title,
        results=results,
        sections={key: heading for key, heading in _SECTIONS.items() if key in levels or key not in evaluation.LEVELS},
        count_models=_count_models,
        count_samples=evaluation.count_samples,
        areas=_areas(results),
        by_view=table.groupby(["side", "view"]),
        remarks=[*data.get("notes", ()), *(f"Skipped: {message}" for message in data.get("skipped", ()))],
        with_calibration=_with_calibration,
        figures=lambda name: _figures(levels[name], samples[name]),
        any_map=bool(predictors),
        errors=_errors(results, table, root, predictors or {}, positive, nb_error),
        command=command if isinstance(command, str | None) else shlex.join(map(str, command)),
        origins=_origins(data),
        versions=results.get("versions"),
    )
    write_text(path, page + "\n")


# ------------------------------------------------------------------------------------------------- parts of the page


def _count_models(columns: Sequence[str]) -> str:
    """Name the only model, or count the models, and their columns of predictions where flips and averages add some."""
    if len(columns) == 1:
        return f"Model {columns[0]}"
    models = {name.removesuffix(FLIPS) for name in columns} - {AVERAGE}
    if len(models) in (0, len(columns)):
        return counted(len(columns), "model")
    return f"{counted(len(models), 'model')}, {len(columns)} columns of predictions"


def _areas(results) -> list[list[str]]:
    """Make the rows of a table of AUCs by model and level, its head first."""
    levels = results["levels"]
    by_level = [level["models"] for level in levels.values()]
    rows = [[name, *(_estimate(models[name]["auc"], "delong") for models in by_level)] for name in results["models"]]
    return [["Model", *(_SECTIONS[name] for name in levels)], *rows]


def _with_calibration(models) -> dict[str, Any]:
    return {name: model for name, model in models.items() if model["calibration"] is not None}


def _figures(level, samples: pd.DataFrame) -> Iterator[tuple[str, str, str]]:
    """Draw the curves of a level and the scores of its models; yield SVG in Base64, caption and alternative text."""
    models = level["models"]
    bands = ", 95% bands" if band_opacity(models) else ""
    first = "".join(f"; dots: {point['name']}" for point in next(iter(models.values()))["points"][:1])
    areas = "; ".join(f"{name} {model['auc']['value']:.3f}" for name, model in models.items())
    caption = f"ROC curves{bands}{first}"
    yield _draw_models(models, evaluation.draw_roc), caption, f"{caption}. AUC: {areas}"
    caption = f"Precision and recall{bands}"
    yield _draw_models(models, evaluation.draw_pr, level["positive"] / level["samples"]), caption, caption
    if calibrated := _with_calibration(models):
        caption = "Observed share of cancer by predicted probability"
        yield _draw_models(calibrated, evaluation.draw_calibration), caption, caption
    for name, model in models.items():
        caption = f"Scores of {name}" + "".join(f"; dashed: {point['name']}" for point in model["points"][:1])
        yield _draw_histogram(samples, name, model), caption, caption


def _errors(results, table, root, predictors, positive, nb_error) -> Iterator[tuple[str, float, bool, dict]]:
    """Yield each model's name, its threshold, whether it has maps, and its errors by kind, the most confident first.

    Of each kind: their number and, for the first of them, the row of the table and what `_pictures` returns.
    """
    for name in results["models"]:
        points = results["levels"]["image"]["models"][name]["points"]
        threshold = points[0]["threshold"] if points else 0.5
        called, cancer = table[name] >= threshold, table["label"] == 1
        kinds = {
            "False positives": table[called & ~cancer].sort_values(name, ascending=False, kind="stable"),
            "False negatives": table[~called & cancer].sort_values(name, kind="stable"),
        }
        predictor = predictors.get(name.removesuffix(FLIPS))
        shown = {}
        for kind, rows in kinds.items():
            first = rows.head(nb_error).to_dict("records")
            pictures = (_pictures(Path(root, row["file"]), predictor, positive) for row in first)
            shown[kind] = len(rows), list(zip(first, pictures, strict=True))
        yield name, threshold, predictor is not None, shown


def _pictures(file: Path, predictor, positive) -> tuple[list[tuple[str, int, int]], list[str]]:
    """Draw the mammogram and, where there is a predictor, its map over it.

    Returns JPEG in Base64 (PNG would make the page ten times as large), height and width of each picture; and what
    could not be drawn and why.
    """
    from mammo.maps.draw import blend, share_of_largest

    pictures, problems, encoded = [], [], []
    if predictor is not None:
        try:
            img, heatmap, grid = predictor.explain(file)
            columns = [predictor.class_list.index(name) for name in positive]
            pictures = [blend(img), blend(img, share_of_largest(heatmap[..., columns].sum(axis=-1), grid))]
        except InputError as error:
            problems.append(f"No map: {error}")
    if not pictures:
        try:
            pictures = [blend(check_grey(file, read_resized(file, target_height=_PICTURE_HEIGHT)))]
        except InputError as error:
            problems.append(f"No picture: {error}")
    for picture in pictures:
        width = max(1, round(_PICTURE_HEIGHT * picture.shape[1] / picture.shape[0]))
        resized = resize(picture, _PICTURE_HEIGHT, width)
        jpeg = cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]
        encoded.append((base64.b64encode(jpeg).decode(), *resized.shape[:2]))
    return encoded, problems


def _origins(data) -> list[str]:
    """List the files of the models with their pixel options, and the weights of averages."""
    lines = []
    for name, file in data.get("model_files", {}).items():
        options = data.get("pixel_options", {}).get(name, {})
        lines.append("; ".join([f"{name}: {file}", *(f"{option} {value}" for option, value in options.items())]))
    return lines + evaluation.describe_weights(data.get("average_weights", {}))


# ----------------------------------------------------------------------------------------------------------- numbers


def _figure(value: float | Sequence[float] | None, sign: str = "") -> str:
    return "\u2013" if value is None else evaluation.figure_text(value, sign).replace("-", "\u2212")  # a dash, a minus


def _score(value: float) -> str:
    """Format a score or threshold: three digits, and as many more near 1 as tell how near."""
    digits = 0 if value == 1 else 1 - math.floor(math.log10(abs(1 - value)))
    return f"{value:.{max(3, digits)}g}"


def _estimate(estimate: Mapping[str, Any], interval: str = "interval") -> str:
    """Format an entry of the results with its interval of this name."""
    value, pair = estimate["value"], estimate[interval]
    return "not defined" if value is None else f"{_figure(value)} ({'no interval' if pair is None else _figure(pair)})"


# -------------------------------------------------------------------------------------------------------- drawing


def _axes(lines: int, **settings):
    """Make a figure, readable at the width of a phone, with room for a legend of so many lines, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.9 + 0.17 * lines), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set(**settings)
    return figure, axes


def _svg(figure) -> str:
    """Add a legend above the axes, where it covers no curve, and encode in Base64, the same figure as the same text."""
    import matplotlib

    figure.legend(loc="outside upper left", fontsize=8, frameon=False, handlelength=2.4)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return base64.b64encode(file.getvalue()).decode()


def _draw_models(models, draw, level: float | None = None) -> str:
    """Draw all models in one picture. draw: a function of `evaluation`. level: height of a line to compare with."""
    figure, axes = _axes(len(models), aspect="equal")
    axes.set_prop_cycle(_STYLES)
    for name, model in models.items():
        # In the legend long names, such as paths, would leave no room for the curves.
        draw(axes, model, name if len(name) <= 44 else "…" + name[-43:], band_opacity(models))
    if level is not None:
        axes.axhline(level, color="0.8", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return _svg(figure)


def _draw_histogram(samples: pd.DataFrame, name: str, model) -> str:
    """Draw how the scores of one model are distributed in either class, and its first threshold."""
    scores, truth = samples[name].to_numpy(float), samples["label"].to_numpy()
    figure, axes = _axes(2, xlabel="score", ylabel="share of the class")
    limits = (0, 1) if model["calibration"] is not None else (scores.min(), scores.max())
    edges = np.linspace(*limits, _BINS + 1)
    for label, text, colour, hatch in ((0, "without cancer", _NEGATIVE, None), (1, "with cancer", _POSITIVE, "///")):
        part = scores[truth == label]
        settings = {"bins": edges, "weights": np.full(len(part), 1 / len(part)), "color": colour}
        axes.hist(part, histtype="stepfilled", alpha=0.35, hatch=hatch, **settings)
        axes.hist(part, histtype="step", linewidth=1.4, label=f"{text} ({len(part)})", **settings)
    for point in model["points"][:1]:
        axes.axvline(point["threshold"], color="0.25", linewidth=1.2, linestyle="--")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _svg(figure)
