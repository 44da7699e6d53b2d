"""Download the models that the paper's authors released, and check that each is what it should be.

  mammo download-models --list
  mammo download-models ddsm-vgg16-512-512-1024x2-extended patch-resnet50-s10
  mammo download-models --all --out-dir models

Needs the package gdown and the internet; without, it says what to fetch from which link and where to put it. A file
that is there is kept; its SHA-256, in SHA256SUMS beside it, tells the next run whether it is still the same. Its
pixel options go to <NAME>/args.json, where `mammo predict` and `mammo evaluate` find them.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from mammo.base import cli
from mammo.base.files import InputError, locked, remove_partial
from mammo.train import backend


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to download, by their names in --list")
    parser.add_argument("--all", action="store_true", help="download all models")
    parser.add_argument("--list", action="store_true", help="print names, roles, published figures and links")
    parser.add_argument("--out-dir", metavar="DIR", default="models", help="folder for the files: <DIR>/<NAME>.h5")
    return parser


def run(**options) -> int:
    """Download; keyword arguments are the option names of `make_parser`. 1 if a model is not there in the end."""
    args = cli.complete(make_parser(), options)
    from mammo.evaluate import published

    models = published.read_released()
    if args.list:
        print(published.released_table(models))
        return 0
    if unknown := sorted(set(args.names) - {model.name for model in models}):
        raise InputError(f"{unknown[0]}: no released model: Expected a name that --list prints")
    if bool(args.names) == args.all:
        raise InputError("Expected names of models, or --all; --list prints the names")
    wanted = [model for model in models if args.all or model.name in args.names]
    backend.start_backend()  # models are opened to check them
    with locked(args.out_dir):
        remove_partial(args.out_dir)
        missing = fetch_all(wanted, args.out_dir)
    if missing:
        print(published.by_hand(missing, args.out_dir), file=sys.stderr)
    return 1 if missing else 0


def fetch_all(models: Iterable, folder: str | Path) -> list:
    """Fetch each; say on standard error what is wrong with those that are returned."""
    from mammo.evaluate.published import NoConnectionError, fetch

    missing, connected = [], True
    for model in models:
        path = Path(folder, model.file)
        if not connected and not path.exists():
            missing.append(model)
            continue
        try:
            what = "downloaded and checked" if fetch(model, folder) else "is there"
            print(f"{path}: {what}, {model.classes} classes", flush=True)
        except InputError as error:
            connected = connected and not isinstance(error, NoConnectionError)
            print(f"{model.name}: {error}", file=sys.stderr)
            missing.append(model)
    return missing


main = cli.command(make_parser, run)
