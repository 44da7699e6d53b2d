#!/usr/bin/env python
"""Reproduce a published figure from prepared data: sample patches, train the patch classifier, convert it, train the
whole-image classifier in two stages, score it, and write our figure beside the published one.

  mammo reproduce --list                    every row with its published figures and an estimate of its time
  mammo reproduce ROW DATA [OUT] [options]

ROW   one of the list, such as patch-resnet50-s10, ddsm-vgg16-512x1 or ddsm-mean-of-three
DATA  the folder that mammo prepare cbis-ddsm wrote
OUT   the folder for all rows, default DATA/table: a sub-folder a row, and table.csv

Options go to all trainings, such as --mixed-precision; those after --sample, --patch, --image or --inbreast to the
sampler, the patch classifiers', the whole-image classifiers' or INbreast's trainings alone:
  mammo reproduce ddsm-vgg16-512x1 prepared --patch --pretrained-weights '{net}.h5' --image --batch-size 8
Rows of INbreast also need the environment variable INBREAST, a folder of train, val and test, each with neg and pos.

Given again, the same command does what is not finished; rows share patches, patch classifiers and DDSM models. A step
that is done, but with other options, another RANDOM_SEED, other patients in DATA's sets or other images in INBREAST, is
refused: remove its folder, or name another OUT; so is a training that has begun. One that was interrupted goes on where
it was. --fresh starts over with all steps of ROW, those that it shares included.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ddsm_train.recipe import Recipe, check_options, checksum, names_of_images, take_fresh
from mammo.base import cli
from mammo.base.files import InputError, env_int, locked

if TYPE_CHECKING:
    from mammo.evaluate.published import Row

SECTIONS = ("sample", "patch", "image", "inbreast")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every row, and do nothing")
    parser.add_argument("row", nargs="?", metavar="ROW", help="the figure to reproduce")
    parser.add_argument("data", nargs="?", metavar="DATA", help="the prepared folder")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="[OUT] ...", help="the output folder, and options")
    return parser


def run(**options) -> None:
    """Reproduce a row; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    from mammo.evaluate import published

    rows = published.read_published()
    if args.list:
        print(published.published_table(rows))
        return
    if args.row is None or args.data is None:
        make_parser().error("Expected ROW and DATA, or --list")
    rows = {row.name: row for row in rows}
    if args.row not in rows:
        make_parser().error(f"{args.row}: no such row. Expected one of mammo reproduce --list")
    data, words = Path(args.data).resolve(), list(args.words or [])
    out = Path(words.pop(0)).resolve() if words and not words[0].startswith("-") else data / "table"
    fresh, words = take_fresh(words)
    given = split_options(words)
    check_row(args.row, rows, given)
    with locked(out):
        Reproduction(Recipe(out, fresh), data, rows, given).make(args.row)
        comparisons = published.compare(out, list(rows.values()))
        published.write_comparison(out / "table.csv", comparisons)
    print(published.comparison_table(comparisons))
    print(published.SPLIT_NOTE)


def split_options(words: list[str]) -> dict[str, list[str]]:
    """Return the options of the sampler, and those of each kind of training, the ones for all trainings first."""
    given: dict[str, list[str]] = {"all": [], **{name: [] for name in SECTIONS}}
    section = "all"
    for word in words:
        if word.startswith("--") and word[2:] in SECTIONS:
            section = word[2:]
        else:
            given[section].append(word)
    return given


def check_row(name: str, rows: dict, given: dict[str, list[str]]) -> None:
    """Check whether each step of a row, and of its sources, takes its options and has its data, before any works."""
    from ddsm_train import image_clf_train, patch_clf_train, sample_patches_combined

    row = rows[name]
    for source in row.sources:
        check_row(source, rows, given)
    if row.kind == "patch":
        check_options(sample_patches_combined.make_parser, "sample_patches_combined.py", given["sample"])
        check_options(patch_clf_train.make_parser, "patch_clf_train.py", given["all"] + given["patch"])
    elif row.kind in ("image", "extend"):
        check_options(image_clf_train.make_parser, "image_clf_train.py", given["all"] + given["image"])
    elif row.kind == "finetune":
        check_options(image_clf_train.make_parser, "image_clf_train.py", given["all"] + given["inbreast"])
        inbreast = os.environ.get("INBREAST", "")
        if not inbreast or not Path(inbreast, "train").is_dir():
            expected = "Expected the environment variable INBREAST to be a folder of train, val and test"
            raise InputError(f"{name}: {expected}, each with neg and pos. Received '{inbreast}'")


class Reproduction:
    """Make rows of the table, each after the rows that it stands on."""

    def __init__(self, recipe: Recipe, data: Path, rows: "dict[str, Row]", given: dict[str, list[str]]) -> None:
        self.recipe, self.data, self.rows, self.given = recipe, data, rows, given
        self.seed = {"RANDOM_SEED": env_int("RANDOM_SEED", 12345)}
        # On patches of one split and images of another, patients to test on could be trained on.
        try:
            lists = [(data / f"pat_{part}.txt").read_bytes() for part in ("train", "val", "test")]
        except OSError:
            expected = "Expected the one that mammo prepare cbis-ddsm wrote"
            raise InputError(f"{data}: no such folder, or no patient lists. {expected}") from None
        self.patients = checksum(b"".join(lists))

    def make(self, name: str) -> None:
        """Make a row's sources first, then the row itself."""
        row = self.rows[name]
        for source in row.sources:
            self.make(source)
        steps = {"patch": self.patch, "image": self.image, "extend": self.image, "finetune": self.finetune}
        steps.get(row.kind, self.mean)(row)

    def patch(self, row: "Row") -> None:
        """Sample the patches of a set, and train a patch classifier on them."""
        patches = f"patches_{row.patch_set}"
        folder = self.recipe.out / patches
        command = ["sample_patches.sh", row.patch_set, self.data, folder, *self.given["sample"]]
        self.recipe.step(patches, command, inputs=self.patients)
        self._train(row, ["train_patch_clf.sh", row.net, row.patch_set], "patch", folder, [patches])

    def image(self, row: "Row") -> None:
        """Convert a patch classifier and train it in two stages, or train all layers of a whole-image classifier."""
        [source] = row.sources
        start, more = ("PATCH_MODEL", []) if row.kind == "image" else ("RESUME_FROM", ["--nb-epoch", "0"])
        env = {start: self.recipe.out / source / "model.h5"}
        self._train(row, ["train_image_clf.sh", row.net, row.top], "image", self.data, [source], env, more)

    def finetune(self, row: "Row") -> None:
        """Finetune a whole-image classifier on INbreast, or on so many of its patients."""
        from mammo.data.splits import choose_patients

        data, [source] = Path(os.environ["INBREAST"]).resolve(), row.sources
        images, sources = names_of_images(data), [source]
        if row.patients:
            name = f"inbreast_{row.patients}_patients"
            chosen = self.recipe.out / name
            make = partial(choose_patients, data, chosen, row.patients)
            self.recipe.step(name, ["choose", data, row.patients], make, inputs=images)
            data, sources = chosen, [source, name]
        model, best = (self.recipe.out / folder / "model.h5" for folder in (source, row.name))
        command = ["../inbreast/finetune.sh", model, data, best]
        self._train(row, command, "inbreast", data, sources, inputs=images)

    def mean(self, row: "Row") -> None:
        """Score the mean of several rows' predictions."""
        from mammo.evaluate.published import average_predictions

        folder, *sources = (self.recipe.out / name for name in (row.name, *row.sources))
        make = partial(average_predictions, sources, folder)
        self.recipe.step(row.name, ["average", *sources], make, sources=row.sources, expect=row.expectation)

    def _train(self, row, command, section, data, sources, env=None, more=(), inputs="") -> None:
        """Train a row's model, best weights in model.h5 of its folder, by a command and the options given for it."""
        folder = self.recipe.out / row.name
        places = {f"{part.upper()}_DIR": data / part for part in ("train", "val", "test")}
        places |= {"BEST_MODEL": folder / "model.h5"}
        command = [*command, "--out-dir", folder, *self.given["all"], *self.given[section], *more]
        how = {"inputs": inputs, "sources": sources, "expect": row.expectation}
        self.recipe.step(row.name, command, env=self.seed | (env or {}), places=places, **how)


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
