#!/usr/bin/env python
"""The figures of a run on made mammograms: what `demo.sh`, `patch_or_scratch.sh` and `transfer_or_scratch.sh` print.

  python scripts/phantom_summary.py demo OUT       those of the demo, in OUT
  python scripts/phantom_summary.py starts OUT     whole-image classifiers from a patch classifier and from scratch
  python scripts/phantom_summary.py transfer OUT   classifiers of film, finetuned with few digital images, and scratch

`starts` also writes OUT/results.csv, a row a run, and OUT/results.png, their validation AUC by epoch; `transfer`
OUT/transfer.csv, likewise, and OUT/transfer.png, the test AUC by patients in training.
"""

import argparse
import csv
import sys
from pathlib import Path

from mammo.base import cli
from mammo.base.files import InputError, atomic_write
from mammo.evaluate.published import measured, subset_table

# Folders of the runs of `patch_or_scratch.sh` in the folder of a seed, and models of `transfer_or_scratch.sh`.
SCRATCH = {"scratch": "from scratch, as many epochs", "scratch_long": "from scratch, twice the epochs"}
STARTS = {"from_patch": "from the patch classifier", **SCRATCH}
TRANSFERS = {"finetuned": "trained on film, finetuned", **SCRATCH}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("what", choices=("demo", "starts", "transfer"), help="the script that made OUT")
    parser.add_argument("out", metavar="OUT", help="its output folder")
    return parser


def demo_figures(out) -> str:
    """The lines of figures that end `demo.sh`, from its output folder. InputError for figures that are not there."""
    out = Path(out)
    patch, patches = measured(out / "patch")
    image, images = measured(out / "image")
    table = out / "localisation" / "localisation.csv"
    try:
        with open(table, newline="", encoding="utf-8") as file:
            maps = next(csv.DictReader(file))
        pointing, chance = float(maps["pointing_accuracy"]), float(maps["chance"])
    except FileNotFoundError:
        raise InputError(f"{table}: no such file. Expected the output folder of scripts/demo.sh") from None
    return f"""\
patch classifier, test accuracy     {patch["accuracy"]:.3f} on {patches} patches
whole-image classifier, test AUC    {image["auc"]:.3f} on {images} images
the same, mean of four flips        {image["auc_flips"]:.3f}
maps that point at a lesion         {pointing:.3f} of {maps["images_with_lesions"]} images, by chance {chance:.3f}"""


def find_runs(out) -> list[tuple[str, int, Path]]:
    """(start, seed, folder) of the runs of `patch_or_scratch.sh` in `out`: in the order of STARTS, then of seeds."""
    runs = []
    for start in STARTS:
        folders = Path(out).glob(f"seed_*/{start}")
        runs += sorted((start, int(folder.parent.name.removeprefix("seed_")), folder) for folder in folders)
    if not runs:
        raise InputError(f"{out}: no runs there. Expected the output folder of scripts/patch_or_scratch.sh")
    return runs


def start_figures(out):
    """The table of `results.csv`, a data frame: start, seed, and test AUC of the single prediction and of the flips."""
    import pandas as pd

    runs = [(start, seed, measured(folder)[0]) for start, seed, folder in find_runs(out)]
    rows = [(start, seed, figures["auc"], figures["auc_flips"]) for start, seed, figures in runs]
    return pd.DataFrame(rows, columns=["start", "seed", "single", "flips"])


def plot_starts(out, path) -> None:
    """Draw the validation AUC of the runs in `out` by epoch, a colour a way of starting."""
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, labels = figure.subplots(), dict(STARTS)
    for start, _, folder in find_runs(out):
        history, place = pd.read_csv(folder / "history.csv"), list(STARTS).index(start)
        # The longer run from scratch begins as the shorter one, and lies below it.
        style = {"color": f"C{place}", "zorder": 3 - place / 10, "marker": "."}
        axes.plot(history.epoch, history.val_auc, label=labels.pop(start, None), **style)
    axes.set(xlabel="epoch of whole-image training", ylabel="validation AUC")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def transfer_figures(out):
    """The table of `transfer.csv`, a data frame: seed, and the columns of `mammo.evaluate.published.subset_table`."""
    import pandas as pd

    folders = {int(path.parent.name.removeprefix("seed_")): path for path in Path(out).glob("seed_*/few_patients")}
    if not folders:
        raise InputError(f"{out}: no runs there. Expected the output folder of scripts/transfer_or_scratch.sh")
    tables = [subset_table(folders[seed]).assign(seed=seed) for seed in sorted(folders)]
    table = pd.concat(tables, ignore_index=True)
    return table[["seed", *table.columns.drop("seed")]]


def plot_transfers(table, path) -> None:
    """Draw the test AUC of `transfer_figures` by patients in training: a dot a seed, a line through their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for place, (model, label) in enumerate(TRANSFERS.items()):
        runs = table[table.model == model]
        means = runs.groupby("patients").auc.mean()
        axes.plot(means.index, means, color=f"C{place}", label=label)
        axes.plot(runs.patients + 0.5 * (place - 1), runs.auc, "o", color=f"C{place}", alpha=0.5, markersize=4)
    axes.set(xlabel="patients in training", ylabel="test AUC", xticks=sorted(set(table.patients)))
    figure.legend(loc="outside upper left")  # inside it would hide some dots
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)


def run(**options) -> None:
    """Print the figures; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    out = Path(args.out)
    if args.what == "demo":
        print(demo_figures(out))
        return
    if args.what == "starts":
        table, name, by, values = start_figures(out), "results", ["start"], ["single", "flips"]
        plot_starts(out, out / "results.png")
        print("Test AUC over the seeds, single prediction and mean of four flips")
    else:
        table, name, by, values = transfer_figures(out), "transfer", ["model", "patients", "images"], ["auc"]
        plot_transfers(table, out / "transfer.png")
        print(f"Test AUC over the seeds, on {table.test_images[0]} images of {table.test_patients[0]} patients")
    with atomic_write(out / f"{name}.csv") as temporary:
        table.round(6).to_csv(temporary, index=False)
    print(table.groupby(by, sort=False)[values].agg(["mean", "std"]).round(3).to_string())


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
