#!/usr/bin/env python3
"""Turn a download of INbreast into the image folders that finetuning reads: the same as `mammo prepare inbreast`."""

import functools
import sys

from mammo.base.cli import command
from mammo.commands import prepare

run = functools.partial(prepare.run, "inbreast")
make_parser = functools.partial(prepare.make_parser, "inbreast")
main = command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
