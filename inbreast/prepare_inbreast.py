#!/usr/bin/env python3
"""Turn a download of INbreast into the image folders that finetuning reads: the same as `mammo prepare inbreast`."""

import argparse
import functools
import sys
from collections.abc import Sequence

from mammo.base.cli import run_main
from mammo.commands import prepare

run = functools.partial(prepare.run, "inbreast")


def make_parser() -> argparse.ArgumentParser:
    return prepare.make_parser("inbreast")


def main(argv: Sequence[str] | None = None) -> int:
    return run_main(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
