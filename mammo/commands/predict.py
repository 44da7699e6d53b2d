"""Predict the probability of cancer in mammograms by a trained whole-image classifier.

  mammo predict image_model.h5 mammogram.dcm > predictions.csv
  mammo predict image_model.h5 folder more.png --flips --out predictions.json --overlay pictures

Reads DICOM, PNG, JPEG, BMP and TIFF files, and folders of them; DICOM as the 16-bit PNG that data preparation makes of
it without --auto-levels or --voi-lut, so that both give the same. Pixel options default to those of the model's
training (args.json in the folder named as the model without its ending), else to the published ones. Warns of each
image that does not look like the training's. Research software: no medical device, and no substitute for a radiologist.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mammo.base import cli
from mammo.base.files import InputError, atomic_write, check_writable, write_text
from mammo.images.pixels import add_pixel_options_of_model
from mammo.images.reading import find_images
from mammo.train import backend

if TYPE_CHECKING:
    from mammo.evaluate.predict import Prediction, Predictor


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="whole-image classifier: .h5 of any age, or .keras")
    add("images", nargs="+", metavar="IMAGE", help="image, or folder searched for them")
    add("--out", metavar="FILE", help=".csv, or .json with options and warnings; default: CSV on standard output")
    add("--flips", action="store_true", help="average over the four flips of each image: better, four times the time")
    add("--overlay", metavar="DIR", help="also write each mammogram with its Grad-CAM maps as a picture to this folder")
    add("--class-list", nargs="+", metavar="CLASS", help="names of the outputs; default: as trained, else neg pos")
    add("--batch-size", "-bs", type=cli.positive_int, default=4, help="images predicted at a time")
    add("--jobs", type=cli.positive_int, default=2, help="images read at the same time, while the network works")
    add("--trust-checkpoint", action="store_true", help="open a model file even where it holds Python code")
    add_pixel_options_of_model(parser)
    return parser


def run(**options) -> int:
    """Write the predictions; keyword arguments are the option names of `make_parser`. 1 if an image is at fault."""
    args = cli.complete(make_parser(), options)
    if args.out is not None and Path(args.out).suffix not in (".csv", ".json"):
        raise InputError(f"--out {args.out}: Expected a name ending in .csv or .json")
    files = find_images([args.images] if isinstance(args.images, str | Path) else args.images)
    pictures = {} if args.overlay is None else name_heatmaps(files, args.overlay)
    for path in filter(None, [args.out, *list(pictures.values())[:1]]):
        check_writable(path)
    backend.start_backend()
    from mammo.evaluate.predict import Predictor

    predictor = Predictor(args.model, vars(args), args.trust_checkpoint)
    say(f"{args.model}: {predictor.source}")
    if predictor.is_of_patches:
        seems = "this seems to be a patch classifier, which is not meant for whole mammograms"
        say(f"warning: {args.model}: {seems}: ddsm_train/heatmap_score.py maps them with it")
    if predictor.trained is None:
        say("what its training images looked like is not known: checking images by general rules")
    predictions = []
    found = predictor.predict(files, args.flips, args.batch_size, args.jobs)
    for prediction in tqdm(found, total=len(files), desc="predict", unit="image", disable=None):
        for text in prediction.warnings:
            say(f"warning: {prediction.file}: {text}")
        predictions.append(prediction)
    good = [prediction for prediction in predictions if prediction.fault is None]
    faults = [prediction.fault for prediction in predictions if prediction.fault is not None]
    content = as_json(args, predictor, predictions) if str(args.out).endswith(".json") else as_csv(predictor, good)
    if args.out is None:
        print(content, end="")
    else:
        write_text(args.out, content)
    for prediction in tqdm(good if pictures else (), desc="pictures", unit="image", disable=None):
        try:
            draw(predictor, prediction, pictures[prediction.file])
        except InputError as error:
            faults.append(f"no picture: {error}")
    if faults:
        say(f"{len(faults)} of {len(files)} images at fault:", *faults)
    return 1 if faults else 0


def say(*lines: str) -> None:
    """Print on standard error: standard output is for predictions."""
    tqdm.write("\n  ".join(lines), file=sys.stderr)


def as_csv(predictor: "Predictor", predictions: "Sequence[Prediction]") -> str:
    """Return as CSV text one row an image: file, the probability of each class, warnings."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", *predictor.class_list, "warnings"])
    writer.writerows([file, *values, "; ".join(warnings)] for file, values, warnings, _ in predictions)
    return text.getvalue()


def as_json(args: argparse.Namespace, predictor: "Predictor", predictions: "Sequence[Prediction]") -> str:
    """Return as JSON text how the predictions were made, and all of them, those at fault with the reason instead."""
    entries = []
    for file, probabilities, warnings, fault in predictions:
        if fault is None:
            named = dict(zip(predictor.class_list, probabilities.tolist(), strict=True))
            entries.append({"file": file, "probabilities": named, "warnings": warnings})
        else:
            entries.append({"file": file, "fault": fault})
    content = {"model": str(args.model), "flips": args.flips, "options": predictor.options, "predictions": entries}
    return json.dumps(content, indent=1) + "\n"


def name_heatmaps(files: Sequence[Path], folder: str) -> dict[str, Path]:
    """Return `<folder>/<image>.png` by file, numbered from the second of a name on; InputError where it is an image."""
    pictures, taken, images = {}, set(), {path.resolve() for path in files}
    for file in files:
        path, number = Path(folder, f"{file.stem}.png"), 2
        while path in taken:
            path, number = Path(folder, f"{file.stem}_{number}.png"), number + 1
        if path.resolve() in images:
            raise InputError(f"--overlay {folder}: Expected another folder than that of the mammograms")
        taken.add(path)
        pictures[str(file)] = path
    return pictures


def draw(predictor: "Predictor", prediction: "Prediction", path: Path) -> None:
    """Write the mammogram with the Grad-CAM map of each class. Raises InputError."""
    from mammo.maps.draw import overlay_figure

    img, heatmap, grid = predictor.explain(prediction.file)
    named = zip(predictor.class_list, prediction.probabilities, strict=True)
    title = f"{Path(prediction.file).name}: " + ", ".join(f"{name} {value:.3f}" for name, value in named)
    figure = overlay_figure(img, heatmap, grid, predictor.class_list, title, probabilities=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


main = cli.command(make_parser, run)
