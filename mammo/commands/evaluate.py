"""Score whole-image classifiers on labelled mammograms: by image, breast and patient, with 95% intervals.

  mammo evaluate resnet.h5 vgg.h5 data --flips --average mean --out-dir evaluation
  mammo evaluate image_model.h5 exams.csv --val data/val --report report.html
  mammo evaluate --predictions evaluation/predictions.csv

DATA, which comes last, is the output folder of a preparation script, a folder with one sub-folder a class, a table
(file,label and perhaps patient,side,view,set) or an exam list of the NYU metarepository (.pkl). Intervals are by
patient. Writes predictions.csv, evaluation.json, scores.csv, points.csv, comparisons.csv and pictures to --out-dir,
and val_predictions.csv of --val. Predictions are there before they are scored: --predictions scores them again.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from mammo.base import cli
from mammo.base.files import InputError, check_writable, env_int, locked
from mammo.images.pixels import PUBLISHED_PIXELS, add_pixel_options_of_model, choose_pixel_options
from mammo.train import backend

# Options that say how models predict; the pixel options do, too.
OF_MODELS = ("flips", "image_dir", "on_error", "batch_size", "trust_checkpoint")


share = cli.number_type("share", float, lambda value: 0 < value <= 1, "number above 0, at most 1")
finite = cli.number_type("finite", float, lambda value: abs(value) < float("inf"), "number")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="MODEL... DATA", help="trained models, and last what to score them on")
    add("--out-dir", metavar="DIR", default="evaluation", help="folder for the results")
    add("--report", metavar="FILE", help="also write a report to read, one HTML page with all figures and pictures")
    of = "of the one model, or of the average, as the scoring script of the NYU metarepository reads them"
    add("--metarepository", metavar="FILE", help=f"also write the image predictions {of}")
    add_data_options(parser)
    add_prediction_options(parser)
    add_score_options(parser)
    add_pixel_options_of_model(parser)
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add what is scored: images or predictions, their classes, and images to choose thresholds on."""
    add = parser.add_argument_group("data").add_argument
    columns = "a CSV file with columns file, label, perhaps patient, side, view, and one a model"
    add("--predictions", metavar="FILE", help=f"score these predictions instead: {columns}")
    text = (
        "images to choose thresholds and fit weights on (with --predictions: a file of predictions); default: "
        "thresholds from DATA itself, which flatters them"
    )
    add("--val", metavar="DATA", help=text)
    add("--set", choices=["train", "val", "test"], default="test", help="set of a prepared folder; of --val's: val")
    add("--image-dir", metavar="DIR", help="folder that file names in lists start from; default: the table's own")
    add("--class-list", nargs="+", metavar="CLASS", help="names of the outputs; default: as trained, else neg pos")
    add("--positive", nargs="+", metavar="CLASS", default=["pos"], help="classes that count as cancer")
    text = "what an unreadable image does: end the run, or be left out and listed"
    add("--on-error", choices=["stop", "skip"], default="stop", help=text)


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add how models predict, and how their predictions are averaged."""
    add = parser.add_argument_group("predictions").add_argument
    add("--flips", action="store_true", help="also score the mean over the four flips of each image")
    text = "also score the mean of all models, or one with weights fitted on --val"
    add("--average", choices=["mean", "fitted"], help=text)
    add("--batch-size", "-bs", type=cli.positive_int, default=4, help="images predicted at a time")
    add("--trust-checkpoint", action="store_true", help="open model files even where they hold Python code")


def add_score_options(parser: argparse.ArgumentParser) -> None:
    """Add how patients are scored, operating points and intervals."""
    group = parser.add_argument_group("scores")
    add = group.add_argument
    add("--patient-score", choices=["max", "mean"], default="max", help="a patient's score from those of the breasts")
    cli.add_flag(group, "--youden", True, "the point of the largest sum of sensitivity and specificity")
    add("--sensitivity", nargs="*", type=share, default=[0.9], metavar="SHARE", help="points of these sensitivities")
    add("--specificity", nargs="*", type=share, default=[0.9], metavar="SHARE", help="points of these specificities")
    add("--threshold", nargs="*", type=finite, default=[0.5], metavar="SCORE", help="points of these thresholds")
    add("--bootstrap", type=cli.positive_int, default=2000, help="draws of patients")


def run(**options) -> None:
    """Write the results; keyword arguments are the option names of `make_parser`."""
    parser = make_parser()
    args = cli.complete(parser, options)
    *models, source = args.inputs or [None]
    if args.predictions is None and not models:
        raise InputError("Expected MODEL... DATA, or --predictions FILE. Received neither")
    if args.predictions is not None and args.inputs:
        raise InputError(f"Expected MODEL... DATA, or --predictions FILE. Received both, such as {args.inputs[0]}")
    of_models = [*OF_MODELS, *(name for name in PUBLISHED_PIXELS if name != "class_list")]
    given = [name.replace("_", "-") for name in of_models if getattr(args, name) != parser.get_default(name)]
    if args.predictions is not None and given:
        raise InputError(f"--{given[0]}: Expected MODEL... DATA. Received --predictions, which are scored as they are")
    if args.average == "fitted" and args.val is None:
        raise InputError("--average fitted: Expected --val, the images to fit the weights on. Received none")
    if args.average and len(models) == 1:
        raise InputError(f"--average: Expected several models. Received {models[0]}")
    check_metarepository(args, models)
    for path in filter(None, (args.report, args.metarepository)):
        check_writable(path)
    with locked(args.out_dir):
        evaluate(args, models, source)


def check_metarepository(args: argparse.Namespace, models: list) -> None:
    """Raise InputError where `--metarepository`, which holds one model's predictions, is asked for of several."""
    if args.metarepository and len(models) > 1 and not args.average:
        raise InputError(f"--metarepository: Expected one model, or --average. Received {', '.join(map(str, models))}")


def evaluate(args: argparse.Namespace, models: list, source: str | Path) -> None:
    """Predict or read what is to be scored, and write the results."""
    from mammo.evaluate import evaluation

    tables, names, about, predictors = predict_source(args, models, source) if models else read(args)
    if args.average:
        fitted_on = tables[1] if args.average == "fitted" else None
        averaged = [evaluation.add_averages(table, names, fitted_on) for table in tables]
        tables, (names, about["average_weights"]) = [table for table, *_ in averaged], averaged[0][1:]
    points = evaluation.OperatingPoints(args.youden, args.sensitivity, args.specificity, args.threshold)
    table, val = tables[0], tables[1] if args.val else None
    drawn = args.bootstrap, env_int("RANDOM_SEED", 12345)
    results = evaluation.evaluate_models(table, names, points, val, args.patient_score, *drawn)
    results["data"] |= about
    results |= {"command": shlex.join(sys.orig_argv), "versions": evaluation.loaded_versions()}
    evaluation.write_evaluation(args.out_dir, table, results)
    if args.metarepository:
        evaluation.write_metarepository(args.metarepository, table, names[-1])
    if args.report:
        from mammo.evaluate.report import write_report

        write_report(args.report, results, table, predictors=predictors, positive=args.positive)
    print(evaluation.describe_results(results))
    if args.average == "fitted":
        print(*evaluation.describe_weights(about["average_weights"]), sep="\n")
    print(f"Results are in {args.out_dir}" + (f", the report in {args.report}" if args.report else ""))


def sets_of(args: argparse.Namespace, source: str | Path) -> list[tuple]:
    """Return what to score and, if given, --val, with the name of the set in it."""
    return [(source, args.set)] + ([] if args.val is None else [(args.val, "val")])


def predict_source(
    args: argparse.Namespace, models: list, source: str | Path
) -> tuple[list, list[str], dict[str, Any], dict]:
    """Predict DATA and, if given, --val.

    Returns their tables, the names of the models, what to say of them in the results, and the `Predictor`s by name.
    """
    from mammo.evaluate import inputs as data
    from mammo.evaluate.evaluation import PREDICTIONS, check_classes, write_predictions

    files = dict(zip(data.name_models(models), models, strict=True))
    classes = {name: choose_pixel_options(vars(args), file)[0]["class_list"] for name, file in files.items()}
    first = next(iter(files))
    for name, theirs in classes.items():
        if theirs != classes[first]:
            expected = f"Expected the classes of {first}, {' '.join(classes[first])}"
            raise InputError(f"{name}: {expected}. Received {' '.join(theirs)}; see --class-list")
    labels = classes[first], args.positive
    tables = [data.read_images(path, *labels, part, args.image_dir) for path, part in sets_of(args, source)]
    check_classes(tables[0])  # before the hours that predictions may take
    backend.start_backend()
    from mammo.evaluate.predict import Predictor

    predictors = {name: Predictor(file, vars(args), args.trust_checkpoint) for name, file in files.items()}
    for name, predictor in predictors.items():
        print(f"{name}: {predictor.source}", file=sys.stderr)
    predicted, skipped, how = [], [], (args.positive, args.flips, args.batch_size, args.on_error)
    for table, name in zip(tables, PREDICTIONS, strict=False):
        with_predictions, at_fault = data.predict_images(table, predictors, *how)
        write_predictions(args.out_dir, name, with_predictions)  # perhaps hours of work
        predicted.append(with_predictions)
        skipped += at_fault
    for message in skipped:
        print(f"skipped: {message}", file=sys.stderr)
    if skipped:
        print(f"warning: {len(skipped)} of {sum(map(len, tables))} images skipped", file=sys.stderr)
    about = {"source": str(source), "val": args.val, "positive_classes": args.positive, "skipped": skipped}
    about["model_files"] = {name: str(file) for name, file in files.items()}
    about["pixel_options"] = {name: predictor.options for name, predictor in predictors.items()}
    return predicted, data.model_columns(files, args.flips), about, predictors


def read(args: argparse.Namespace) -> tuple[list, list[str], dict, dict]:
    """Return what `predict_source` gives, from --predictions and, if given, --val."""
    from mammo.evaluate.inputs import read_predictions

    classes = args.class_list or ["neg", "pos"]
    sources = sets_of(args, args.predictions)
    (table, names), *others = [read_predictions(path, classes, args.positive, part) for path, part in sources]
    check_metarepository(args, names)
    for _, other_names in others:
        if missing := sorted(set(names) - set(other_names)):
            expected = f"Expected the models of {args.predictions}"
            raise InputError(f"{args.val}: {expected}. Received none called {missing[0]}")
    return [table, *(other for other, _ in others)], names, {"source": str(args.predictions), "val": args.val}, {}


main = cli.command(make_parser, run)
