#!/usr/bin/env python
"""Finetune whole-image models on INbreast, or on your own data, with few patients: 20, 30, 40, 50 and 60.

A choice of patients holds all those of the smaller choices, with the same share of cancer. Validation and test images
are the same for all.

  mammo subset DATA MODEL... OUT [more options of mammo train-image]

DATA   a folder of train, val and test, each with neg and pos, of images whose names tell the patient
MODEL  a saved model, FILE or NAME=FILE; those named resnet50, vgg16 and hybrid stand beside their published figures:
         mammo subset INbreast 'hybrid=ddsm_vgg16_s10_[512-512-1024]x2_hybrid.h5' few_patients
OUT    gets a sub-folder a training, and subset_auc.csv and subset_auc.png of all trainings in it

Given again, the same command does what is not finished, and refuses other data or options for what is; --fresh starts
over. A further MODEL adds to what is in OUT, with options of its own: as a baseline, the same from random weights:
         mammo subset INbreast scratch=MODEL.h5 few_patients --from-scratch --all-layer-multiplier 1
A training of 50 epochs with 20 patients takes minutes on one GPU. Published for the hybrid: AUC 0.89 with 20 patients,
0.91 with 60. Environment: PATIENTS ("20 30 40 50 60"; 0 scores the model as it is), RANDOM_SEED (12345), by which the
patients are chosen too, MEAN, as of finetune.sh, NUM_CPU_CORES (4).
"""

import argparse
import itertools
import os
import re
import sys
from functools import partial
from pathlib import Path

from ddsm_train.recipe import Recipe, check_options, checksum, names_of_images, take_fresh
from mammo.base import cli
from mammo.base.files import InputError, atomic_write, env_int, locked
from mammo.base.guards import read_json


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="DATA MODEL... OUT ...", help="as above")
    return parser


def run(**options) -> None:
    """Run the experiment; `words` are those of the command line."""
    parser = make_parser()
    fresh, words = take_fresh(cli.complete(parser, options).words or [])
    places = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    more = words[len(places) :]
    if len(places) < 3:
        parser.error("Expected DATA, a MODEL or more, and OUT")
    data, out = Path(places[0]).resolve(), Path(places[-1]).resolve()
    for part in ("train", "val", "test"):
        if not (data / part).is_dir():
            raise InputError(f"{data / part}: no such folder. Expected train, val and test, each with neg and pos")
    images, mean = names_of_images(data), pixel_mean(data)
    models = read_models(places[1:-1], parser)
    numbers = os.environ.get("PATIENTS", "20 30 40 50 60").split()
    if wrong := [number for number in numbers if not re.fullmatch(r"0|[1-9]\d*", number)]:
        parser.error(f"PATIENTS: Expected whole numbers. Received {wrong[0]}")

    from ddsm_train import image_clf_train
    from mammo.data.splits import choose_patients
    from mammo.evaluate import published

    check_options(image_clf_train.make_parser, "image_clf_train.py", more)
    seed = env_int("RANDOM_SEED", 12345)
    with locked(out):
        recipe = Recipe(out, fresh)
        # All subsets first: that the data have enough patients should be known before anything is trained.
        for number in filter(int, numbers):
            subset = out / f"{number}-patients"
            make = partial(choose_patients, data, subset, int(number), seed)
            recipe.step(subset.name, ["choose", data, number, "--seed", seed], make, inputs=images)
        for name, file in models.items():
            inputs = f"{images} {checksum(file.read_bytes())}"
            for number in numbers:
                folder, chosen = out / f"{name}-{number}-patients", f"{number}-patients"
                subset, sources, epochs = out / chosen, [chosen], []
                if number == "0":
                    subset, sources, epochs = data, [], ["--all-layer-epochs", "0"]
                command = ["../inbreast/finetune.sh", file, subset, folder / "model.h5", "--out-dir", folder]
                env = {"RANDOM_SEED": seed} | ({"MEAN": mean} if mean else {})
                recipe.step(folder.name, [*command, *more, *epochs], env=env, inputs=inputs, sources=sources)
        table = published.subset_table(out)
        with atomic_write(out / "subset_auc.csv") as temporary:
            table.round(6).to_csv(temporary, index=False)
        published.plot_subsets(table, out / "subset_auc.png")
    print(table.round(3).to_string(index=False, na_rep="-"))


def pixel_mean(data: Path) -> str:
    """Return what MEAN asks for: a number, for `report` the mean measured on `data`, or nothing."""
    mean = os.environ.get("MEAN", "")
    if mean != "report":
        return mean
    report = data / "report.json"
    content = read_json(report)
    if content is None:
        raise InputError(f"{report}: no such file, so no measured mean. Expected it in {data}, or a number in MEAN")
    if not isinstance(content.get("featurewise_mean"), int | float):
        raise InputError(f"{report}: no featurewise_mean in it. Expected the report of a preparation script")
    return str(content["featurewise_mean"])


def read_models(words: list[str], parser: argparse.ArgumentParser) -> dict[str, Path]:
    """Return the model files by name, of words FILE or NAME=FILE; end with status 2 for names that do not do."""
    models: dict[str, Path] = {}
    for word in words:
        name, named, file = word.partition("=")
        if Path(word).exists() or not named:
            name, file = Path(word).stem, word
        if not Path(file).is_file():
            raise InputError(f"{file}: no such model")
        if not name or "/" in name:
            parser.error(f"{word}: Expected FILE or NAME=FILE")
        if name in models:
            parser.error(f"{name}: two models of this name. Expected NAME=FILE")
        models[name] = Path(file).resolve()
    return models


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
