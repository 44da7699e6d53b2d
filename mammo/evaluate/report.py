"""The report of an evaluation: one HTML page that needs no other file, no network and no script."""

import base64
import html
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cycler import cycler

from mammo.base.files import InputError, counted, write_text
from mammo.evaluate.evaluation import (
    AVERAGE,
    FLIPS,
    at_levels,
    band_opacity,
    describe_weights,
    draw_calibration,
    draw_pr,
    draw_roc,
)
from mammo.images.reading import check_grey, read_resized, resize

# The palette of Okabe and Ito 2008, told apart by colour-blind readers too, less its yellow; dark enough on white.
_COLOURS = ("#0072b2", "#c24e00", "#00795a", "#a3497d", "#1a1a1a", "#8a6d00")

_STYLES = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=_COLOURS)

_NEGATIVE, _POSITIVE = _COLOURS[:2]

_PICTURE_HEIGHT = 560  # pixels

_BINS = 25  # of the histogram

_NONE = "\u2013"  # a dash

_LEVELS = {"image": "Images", "breast": "Breasts", "patient": "Patients"}


def write_report(
    path,
    results: Mapping[str, Any],
    table: pd.DataFrame,
    *,
    root=".",
    predictors: Mapping[str, Any] | None = None,
    positive: Sequence[str] = ("pos",),
    nb_error: int = 4,
    title: str = "Evaluation",
) -> None:
    """Write the page.

    Args:
        results: of `evaluation.evaluate`, with `command` (a string or its words) and `versions` (by name) if known.
        table: see `mammo.evaluate.evaluation`. root: folder that its files are relative to.
        predictors: a `predict.Predictor` by the name of its model, whose Grad-CAM maps are shown beside the
            mammograms. Models without one, such as means of several, have mammograms alone.
        positive: classes that count as cancer, whose maps are added.
        nb_error: how many false positives, and how many false negatives, are shown of each model, the most confident
            first, by the first threshold of its points.

    What is wrong with a picture, such as a missing file, is said in its place. Raises OSError as `write_text` does.
    """
    levels = at_levels(table, results["models"], results["data"]["patient_score"])
    names = [name for name in _LEVELS if name in results["levels"]]
    sections = [("summary", "Summary", _summary(results, table))]
    sections += [(name, _LEVELS[name], _level(name, results["levels"][name], levels[name])) for name in names]
    errors = _errors(results, table, Path(root), predictors or {}, positive, nb_error)
    sections.append(("errors", "Most confident errors", errors))
    sections += [("methods", "How to read the figures", _methods(results)), ("origin", "Origin", _origin(results))]
    links = "".join(f'<li><a href="#{key}">{_text(heading)}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-h"><h2 id="{key}-h">{_text(heading)}</h2>{content}</section>'
        for key, heading, content in sections
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{_text(title)}</h1><p class="lead">{_lead(results)}</p></header>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>{body}</main>\n'
        "<footer><p>Research software. Not a medical device; not for the diagnosis of patients.</p></footer>\n"
        "</body>\n</html>\n"
    )
    write_text(path, page)


# ------------------------------------------------------------------------------------------------------ sections


def _lead(results) -> str:
    data, models = results["data"], results["models"]
    count = _count_models(models) if len(models) > 1 else f"Model {_text(models[0])}"
    patients = "" if data["patients"] is None else f" of {counted(data['patients'], 'patient')}"
    return f"{count} on {counted(data['images'], 'image')}{patients}, {data['positive']:,} with cancer."


def _count_models(columns: Sequence[str]) -> str:
    """How many models there are, and how many columns of predictions where flips and averages add some."""
    models = {name.removesuffix(FLIPS) for name in columns} - {AVERAGE}
    if len(models) in (0, len(columns)):
        return counted(len(columns), "model")
    return f"{counted(len(models), 'model')}, {len(columns)} columns of predictions"


def _summary(results, table) -> str:
    data = results["data"]
    cards = [
        ("Images", f"{data['images']:,}"),
        ("with cancer", f"{data['positive']:,} ({data['positive'] / data['images']:.1%})"),
        ("Patients", "not known" if data["patients"] is None else f"{data['patients']:,}"),
        ("Columns of predictions", f"{len(results['models'])}"),
    ]
    facts = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in cards)
    levels = [name for name in _LEVELS if name in results["levels"]]
    rows = [
        [name, *(_estimate(results["levels"][level]["models"][name]["auc"], "delong") for level in levels)]
        for name in results["models"]
    ]
    areas = _table("Area under the ROC curve (95% interval)", ["Model", *(_LEVELS[name] for name in levels)], rows)
    rows = []
    for key, part in table.groupby(["side", "view"]):
        positive = part["label"].sum()
        name = " ".join(filter(None, key)) or "not known"
        rows.append([name, f"{len(part):,}", f"{len(part) - positive:,}", f"{positive:,}"])
    counts = _table("Images by side and view", ["Side, view", "Images", "Without cancer", "With cancer"], rows)
    notes = [*data.get("notes", ()), *(f"Skipped: {message}" for message in data.get("skipped", ()))]
    return f'<dl class="cards">{facts}</dl>{areas}{counts}{_list(notes, "notes")}'


def _level(kind: str, level: Mapping[str, Any], samples: pd.DataFrame) -> str:
    models = level["models"]
    patients = "" if level["patients"] is None or kind == "patient" else f" of {counted(level['patients'], 'patient')}"
    intro = f"<p>{counted(level['samples'], kind)}{patients}, {level['positive']:,} with cancer.</p>"
    rows = [
        [
            name,
            f"{model['auc']['value']:.3f}",
            _interval(model["auc"]["delong"]),
            _interval(model["auc"]["bootstrap"]),
            _estimate(model["average_precision"], "bootstrap"),
        ]
        for name, model in models.items()
    ]
    columns = ["Model", "AUC", "95%, DeLong", "95%, bootstrap", "Average precision (95%)"]
    tables = _table("Discrimination", columns, rows)
    rows = [
        [
            f"{name}: {point['name']}",
            _score(point["threshold"]),
            _estimate(point["sensitivity"], "interval"),
            _estimate(point["specificity"], "interval"),
        ]
        for name, model in models.items()
        for point in model["points"]
    ]
    columns = ["Model and operating point", "Threshold", "Sensitivity (95%)", "Specificity (95%)"]
    tables += _table("Operating points", columns, rows)
    if level["comparisons"]:
        rows = [
            [" - ".join(pair["models"]), _number(pair["difference"], "+"), _interval(pair["interval"]), _p(pair["p"])]
            for pair in level["comparisons"]
        ]
        tables += _table("AUC compared, DeLong's test", ["Models", "Difference", "95%", "p"], rows)
    calibrated = {name: model for name, model in models.items() if model["calibration"] is not None}
    if calibrated:
        rows = [
            [
                name,
                _estimate(model["calibration"]["brier"], "bootstrap"),
                _estimate(model["calibration"]["intercept"], "interval"),
                _estimate(model["calibration"]["slope"], "interval"),
            ]
            for name, model in calibrated.items()
        ]
        tables += _table("Calibration", ["Model", "Brier score (95%)", "Intercept (95%)", "Slope (95%)"], rows)
    bands = ", 95% bands" if band_opacity(models) else ""
    dot = "".join(f"; dots: {point['name']}" for point in next(iter(models.values()))["points"][:1])
    areas = "; ".join(f"{name} {model['auc']['value']:.3f}" for name, model in models.items())
    figures = [
        _figure(_draw_models(models, draw_roc), f"ROC curves{bands}{dot}", f"AUC: {areas}"),
        _figure(
            _draw_models(models, draw_pr, level["positive"] / level["samples"]), f"Precision and recall{bands}", ""
        ),
    ]
    if calibrated:
        figures.append(
            _figure(_draw_models(calibrated, draw_calibration), "Observed share of cancer by predicted probability", "")
        )
    for name, model in models.items():
        caption = f"Scores of {name}" + "".join(f"; dashed: {point['name']}" for point in model["points"][:1])
        figures.append(_figure(_draw_histogram(samples, name, model), caption, ""))
    return f'{intro}{tables}<div class="figures">{"".join(figures)}</div>'


def _errors(results, table, root, predictors, positive, nb_error) -> str:
    content = "<p>By the first operating point of each model; a label may be wrong, too."
    if predictors:
        content += (
            " The left picture is the mammogram as the model gets it; the right one has the Grad-CAM map for cancer "
            "over it, from its own largest value (bright) to none (clear)."
        )
    content += "</p>"
    for name in results["models"]:
        points = results["levels"]["image"]["models"][name]["points"]
        threshold = points[0]["threshold"] if points else 0.5
        called = table[name] >= threshold
        kinds = {
            "False positives": table[called & (table["label"] == 0)].sort_values(name, ascending=False, kind="stable"),
            "False negatives": table[~called & (table["label"] == 1)].sort_values(name, kind="stable"),
        }
        predictor = predictors.get(name.removesuffix(FLIPS))
        content += f"<h3>{_text(name)}</h3>"
        for kind, rows in kinds.items():
            content += f"<h4>{kind}: {len(rows):,}</h4>"
            shown = [
                _error(row, row[name], threshold, root, predictor, positive)
                for _, row in rows.head(nb_error).iterrows()
            ]
            kind_of = "errors" if predictor else "errors alone"
            content += f'<div class="{kind_of}">{"".join(shown)}</div>' if shown else "<p>None.</p>"
    return content


def _error(row, score, threshold, root, predictor, positive) -> str:
    file, notes = root / row["file"], []
    where = " ".join(part for part in (row["patient"], row["side"], row["view"]) if part) or file.name
    what = "with cancer" if row["label"] else "without cancer"
    pictures: list[np.ndarray] = []
    for explained in (predictor, None) if predictor else (None,):
        try:
            pictures = pictures or _pictures(file, explained, positive)
        except InputError as error:
            notes.append(f"<br>{'No map' if explained else 'No picture'}: {_text(error)}")
    alternatives = (f"Mammogram {where}, {what}", f"The same with the Grad-CAM map for cancer, scored {_score(score)}")
    images = "".join(
        f'<img alt="{_text(text)}" width="{picture.shape[1]}" height="{picture.shape[0]}" '
        f'src="data:image/jpeg;base64,{_jpeg(picture)}">'
        for picture, text in zip(pictures, alternatives, strict=False)
    )
    caption = (
        f"<strong>{_text(where)}</strong>, {what}, scored {_score(score)} (threshold {_score(threshold)})"
        f'<br><span class="file">{_text(row["file"])}</span>{"".join(notes)}'
    )
    return f'<figure><div class="pair">{images}</div><figcaption>{caption}</figcaption></figure>'


def _pictures(file, predictor, positive) -> list[np.ndarray]:
    """The mammogram and, where there is a predictor, its map over it: uint8 (rows, columns, 3) in OpenCV's order."""
    from mammo.maps.draw import blend, share_of_largest

    if predictor is None:
        pictures = [blend(check_grey(file, read_resized(file, target_height=_PICTURE_HEIGHT)))]
    else:
        img, heatmap, grid = predictor.explain(file)
        columns = [predictor.class_list.index(name) for name in positive]
        pictures = [blend(img), blend(img, share_of_largest(heatmap[..., columns].sum(axis=-1), grid))]
    return [
        resize(picture, _PICTURE_HEIGHT, max(1, round(_PICTURE_HEIGHT * picture.shape[1] / picture.shape[0])))
        for picture in pictures
    ]


def _jpeg(picture: np.ndarray) -> str:
    """Base64. Not PNG, which would make the page ten times as large."""
    import cv2

    return base64.b64encode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 88])[1]).decode()


def _methods(results) -> str:
    data = results["data"]
    score = {"max": "the more suspicious breast", "mean": "the mean of both breasts"}[data["patient_score"]]
    return (
        "<ul>"
        "<li>Each image, breast or patient has a score from 0 to 1. A breast's is the mean over its images, a "
        f"patient's that of {score}; either has cancer if any of its images shows it.</li>"
        "<li>Intervals hold 95% and treat patients, not images, as independent. Bootstrap: "
        f"{data['replicates']:,} draws of patients, seed {data['seed']}. The bands of the curves are such intervals at "
        "each point.</li>"
        "<li>AUC: the chance that a sample with cancer scores above one without. Average precision depends on the "
        "share of cancer, too, which is the dashed line beside its curve.</li>"
        f"<li>Thresholds were chosen on {_text(data['thresholds_from'])}"
        + (", which flatters sensitivity and specificity." if data["thresholds_from"] == "these images" else ".")
        + " A sample counts as positive from the threshold on.</li>"
        "<li>Calibration: intercept 0 and slope 1 are perfect. Networks trained with balanced batches predict more "
        "cancer than there is in screening: an intercept far below 0 is then expected.</li>"
        "<li>p: DeLong's test of no difference between two models on the same samples, not corrected for several "
        "comparisons.</li></ul>"
    )


def _origin(results) -> str:
    data, content = results["data"], ""
    if command := results.get("command"):
        command = command if isinstance(command, str) else shlex.join(map(str, command))
        content += f"<h3>Command</h3><pre><code>{_text(command)}</code></pre>"
    lines = []
    for name, file in data.get("model_files", {}).items():
        options = data.get("pixel_options", {}).get(name, {})
        lines.append("; ".join([f"{name}: {file}", *(f"{option} {value}" for option, value in options.items())]))
    lines += describe_weights(data.get("average_weights", {}))
    if lines:
        content += f"<h3>Models</h3>{_list(lines, 'notes')}"
    if versions := results.get("versions"):
        content += _table("Versions", ["Package", "Version"], [[name, str(value)] for name, value in versions.items()])
    return content


# -------------------------------------------------------------------------------------------------------- pieces


def _text(value) -> str:
    return html.escape(str(value))


def _number(value: float | None, sign: str = "") -> str:
    return _NONE if value is None else f"{value:{sign}.3f}".replace("-", "\u2212")


def _score(value: float) -> str:
    """A score or threshold: three digits, and as many more near 1 as tell how near."""
    digits = 0 if value == 1 else 1 - math.floor(math.log10(abs(1 - value)))
    return f"{value:.{max(3, digits)}g}"


def _interval(pair) -> str:
    return _NONE if pair is None else f"{_number(pair[0])} to {_number(pair[1])}"


def _estimate(estimate: Mapping[str, Any], interval: str) -> str:
    """Value and interval of an entry of the results."""
    pair = estimate[interval]
    if estimate["value"] is None:
        return "not defined"
    return f"{_number(estimate['value'])} ({'no interval' if pair is None else _interval(pair)})"


def _p(value: float | None) -> str:
    return _NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _list(lines: Sequence[str], kind: str) -> str:
    return f'<ul class="{kind}">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>' if lines else ""


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose rows begin with their name. On narrow screens each row is a list; hence the roles and labels."""
    head = "".join(f'<th role="columnheader" scope="col">{_text(column)}</th>' for column in columns)
    body = "".join(
        f'<tr role="row"><th role="rowheader" scope="row">{_text(first)}</th>'
        + "".join(
            f'<td role="cell" data-label="{_text(column)}">{_text(cell)}</td>'
            for column, cell in zip(columns[1:], cells, strict=True)
        )
        + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<table role="table"><caption>{_text(caption)}</caption><thead role="rowgroup"><tr role="row">{head}</tr>'
        f'</thead><tbody role="rowgroup">{body}</tbody></table>'
    )


def _figure(svg: bytes, caption: str, alternative: str) -> str:
    source = base64.b64encode(svg).decode()
    text = f"{caption}. {alternative}".rstrip(". ")
    return (
        f'<figure><img alt="{_text(text)}" src="data:image/svg+xml;base64,{source}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


# -------------------------------------------------------------------------------------------------------- drawing


def _axes(lines: int, **settings):
    """A matplotlib figure, readable at the width of a phone, with room for a legend of some lines, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 3.9 + 0.17 * lines), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set(**settings)
    return figure, axes


def _svg(figure) -> bytes:
    """The same figure gives the same bytes."""
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _legend(figure) -> None:
    """Above the axes, where it covers no curve."""
    figure.legend(loc="outside upper left", fontsize=8, frameon=False, handlelength=2.4)


def _short(name: str) -> str:
    """For a legend: long names, such as paths, would leave no room for the curves."""
    return name if len(name) <= 44 else "…" + name[-43:]


def _draw_models(models, draw, level: float | None = None) -> bytes:
    """One picture of all models. draw: a function of `mammo.evaluate.evaluation`. level: of a line to compare with."""
    figure, axes = _axes(len(models), aspect="equal")
    axes.set_prop_cycle(_STYLES)
    for name, model in models.items():
        draw(axes, model, _short(name), band_opacity(models))
    if level is not None:
        axes.axhline(level, color="0.8", linewidth=1, linestyle="--", zorder=0)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    _legend(figure)
    return _svg(figure)


def _draw_histogram(samples: pd.DataFrame, name: str, model) -> bytes:
    scores, truth = samples[name].to_numpy(float), samples["label"].to_numpy()
    figure, axes = _axes(2, xlabel="score", ylabel="share of the class")
    limits = (0, 1) if model["calibration"] is not None else (scores.min(), scores.max())
    edges = np.linspace(*limits, _BINS + 1)
    for label, text, colour, hatch in ((0, "without cancer", _NEGATIVE, None), (1, "with cancer", _POSITIVE, "///")):
        part = scores[truth == label]
        weights = np.full(len(part), 1 / len(part))
        axes.hist(part, edges, weights=weights, histtype="stepfilled", color=colour, alpha=0.35, hatch=hatch)
        axes.hist(
            part, edges, weights=weights, histtype="step", color=colour, linewidth=1.4, label=f"{text} ({len(part)})"
        )
    for point in model["points"][:1]:
        axes.axvline(point["threshold"], color="0.25", linewidth=1.2, linestyle="--")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _legend(figure)
    return _svg(figure)


_STYLE = """
:root { color-scheme: light; --ink: #1c2126; --soft: #4d5760; --line: #d5dadf; --tint: #f4f6f8; --link: #005a8c; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 76rem; padding: 2rem clamp(1rem, 4vw, 3rem); background: #fff; color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: clamp(1.6rem, 4vw, 2.3rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 1rem; padding-bottom: .35rem; border-bottom: 2px solid var(--ink); font-size: 1.45rem; }
h3 { margin: 2rem 0 .25rem; font-size: 1.15rem; overflow-wrap: anywhere; }
h4 { margin: 1.25rem 0 .5rem; font-size: 1rem; }
p, li { max-width: 46rem; }
.lead { margin: .4rem 0 0; color: var(--soft); font-size: 1.1rem; overflow-wrap: anywhere; }
a { color: var(--link); }
a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: 1.2rem 0 0; padding: 0; list-style: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 0; }
.cards div { padding: .8rem 1rem; border-radius: .4rem; background: var(--tint); }
.cards dt { color: var(--soft); font-size: .9rem; }
.cards dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
table { width: 100%; margin: 1.6rem 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; font-weight: 600; text-align: left; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { border-bottom: 1px solid var(--soft); color: var(--soft); font-size: .9rem; vertical-align: bottom; }
td { white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; }
th:first-child { padding-left: 0; text-align: left; }
figure { min-width: 0; margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption { margin-top: .4rem; color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
figcaption strong { color: var(--ink); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.6rem; }
.errors { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem; }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .3rem; }
.errors.alone { grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); }
.alone .pair { grid-template-columns: minmax(0, 1fr); }
.file { font-size: .85em; }
.notes { color: var(--soft); overflow-wrap: anywhere; }
pre { padding: .8rem 1rem; border-radius: .4rem; background: var(--tint); white-space: pre-wrap;
  overflow-wrap: anywhere; }
code { font: .9rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); color: var(--soft); font-size: .9rem; }
@media screen and (max-width: 50rem) {
  table, tbody, tr, caption { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody th { display: block; padding: .7rem 0 .1rem; border: 0; font-weight: 600; }
  td { display: flex; flex-wrap: wrap; justify-content: flex-end; gap: 0 1rem; padding: .1rem 0; border: 0; }
  td::before { content: attr(data-label); margin-right: auto; color: var(--soft); }
  tr { padding-bottom: .5rem; border-bottom: 1px solid var(--line); }
}
@media print {
  @page { size: A4; margin: 15mm; }
  html { font-size: 9pt; }
  body { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { margin-top: 1.6rem; }
  table { margin: 1.1rem 0; }
  th, td { padding: .25rem .5rem; }
  h2, h3, h4, caption { break-after: avoid; }
  tr, figure, .cards, pre { break-inside: avoid; }
  thead { display: table-header-group; }
  #image, #breast, #patient, #errors { break-before: page; }
  .figures { grid-template-columns: repeat(3, 1fr); }
  .errors { grid-template-columns: repeat(2, 1fr); }
  .errors.alone { grid-template-columns: repeat(4, 1fr); }
  .cards div, pre { border: 1px solid var(--line); background: none; }
  a { color: inherit; text-decoration: none; }
}
"""
