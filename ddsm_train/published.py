#!/usr/bin/env python
"""The published figures, and ours beside them.

  python ddsm_train/published.py list                      every published row, its command and its figures
  python ddsm_train/published.py compare OUT               the rows finished in OUT beside the published ones
  python ddsm_train/published.py average OUT RUN RUN ...   score the mean of several runs' predictions.csv
  python ddsm_train/published.py choose OUT DATA N         link a data folder with N patients to train on
  python ddsm_train/published.py subsets OUT               the trainings with few patients in OUT, table and curve
  python ddsm_train/published.py options SCRIPT [...]      check that a script of this folder takes these options

`reproduce_table.sh` and `inbreast/subset_experiment.sh` use these. `compare` also writes OUT/table.csv, `subsets`
OUT/subset_auc.csv and OUT/subset_auc.png.
"""

import argparse
import importlib
import sys
from pathlib import Path

from mammo.base import cli
from mammo.base.files import atomic_write
from mammo.data import splits
from mammo.evaluate import published


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="print every published row")
    action = actions.add_parser("compare", help="print ours beside the published figures")
    action.add_argument("out", metavar="OUT", help="folder of reproduce_table.sh: one sub-folder a row")
    action = actions.add_parser("average", help="score the mean of several runs")
    action.add_argument("out", metavar="OUT", help="folder for predictions.csv, metrics.json and roc.png of the mean")
    action.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run with predictions.csv")
    action = actions.add_parser("choose", help="make a data folder with fewer training patients")
    action.add_argument("out", metavar="OUT", help="folder to make, of links")
    action.add_argument("data", metavar="DATA", help="folder of train, val and test, each with neg and pos")
    action.add_argument("patients", metavar="N", type=cli.positive_int, help="patients to train on")
    action.add_argument("--seed", type=cli.natural_int, default=12345, help="other seeds choose other patients")
    action = actions.add_parser("subsets", help="print the trainings with few patients beside the published ones")
    action.add_argument("out", metavar="OUT", help="folder of inbreast/subset_experiment.sh: a sub-folder a training")
    action = actions.add_parser("options", help="end with status 2 where a script does not take these options")
    action.add_argument("script", metavar="SCRIPT", help="such as patch_clf_train")
    action.add_argument("words", metavar="...", nargs=argparse.REMAINDER, help="its options")
    return parser


def run(action: str, **options) -> None:
    """Do one `action` of the command line; keyword arguments are its arguments."""
    if action == "list":
        print(published.published_table(published.read_published()))
    elif action == "compare":
        comparisons = published.compare(Path(options["out"]), published.read_published())
        published.write_comparison(Path(options["out"], "table.csv"), comparisons)
        print(published.comparison_table(comparisons))
        print(published.SPLIT_NOTE)
    elif action == "average":
        published.average_predictions(options["runs"], options["out"])
    elif action == "options":
        parser = importlib.import_module(f"ddsm_train.{options['script']}").make_parser()
        parser.prog = f"{options['script']}.py"
        paths = ["-" for argument in parser._actions if not argument.option_strings]
        parser.parse_args([*paths, *options["words"]])
    elif action == "subsets":
        table = published.subset_table(options["out"])
        with atomic_write(Path(options["out"], "subset_auc.csv")) as temporary:
            table.round(6).to_csv(temporary, index=False)
        published.plot_subsets(table, Path(options["out"], "subset_auc.png"))
        print(table.round(3).to_string(index=False, na_rep="-"))
    else:
        splits.choose_patients(options["data"], options["out"], options["patients"], options["seed"])


def main(argv=None) -> int:
    return cli.run_main(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
