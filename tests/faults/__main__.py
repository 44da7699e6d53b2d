"""Disturb the commands of this project on purpose, and count what comes of it. Run by hand, in hours.

python -m tests.faults kill [--kills 50] [--only sampling ...] [--out faults.csv]
"""

import argparse
import csv
import dataclasses
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from dm_args import HelpFormatter, natural_int, positive_int
from tests.faults.commands import COMMANDS, make_inputs
from tests.faults.kill import Tally, kill_and_compare


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.faults", description=__doc__, formatter_class=HelpFormatter)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    kill = kinds.add_parser("kill", help="kill commands at random moments, give them again, compare the results")
    kill.set_defaults(run=run_kill)
    names = [command.name for command in COMMANDS]
    kill.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=names, help=", ".join(names))
    kill.add_argument("--kills", type=positive_int, default=50, help="signals a command")
    kill.add_argument("--signals", nargs="+", choices=["KILL", "TERM", "INT"], default=["KILL"], help="drawn at random")
    kill.add_argument("--seed", type=natural_int, default=0, help="of the moments")
    kill.add_argument("--work", metavar="DIR", help="folder of inputs and runs, kept; default: a temporary one")
    kill.add_argument("--out", metavar="FILE", default="faults.csv", help="table to add a row a command to")
    return parser


def run_kill(args: argparse.Namespace) -> int:
    signals = [signal.Signals[f"SIG{name}"] for name in args.signals]
    work = Path(args.work or tempfile.mkdtemp(prefix="faults"))
    data = work / "inputs"
    if not data.exists():
        make_inputs(data)
    tallies = []
    for command in COMMANDS:
        if command.name in args.only:
            tally = kill_and_compare(command, data, work / command.name, args.kills, args.seed, signals)
            print(describe(tally), flush=True)
            for names in tally.different:
                print("  different:", *names)
            tallies.append(tally)
    add_rows(Path(args.out), tallies, args.signals)
    if args.work is None:
        shutil.rmtree(work)
    return int(any(tally.different for tally in tallies))


def describe(tally: Tally) -> str:
    return (
        f"{tally.command}: {tally.kills} kills, {tally.restarts} times given again, {tally.equal} of {tally.trials} "
        f"results equal; {tally.seconds:.0f} s when left alone"
    )


def add_rows(path: Path, tallies: list[Tally], signals: list[str]) -> None:
    rows = [dataclasses.asdict(tally) | {"different": len(tally.different)} for tally in tallies]
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "signals"], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(row | {"seconds": f"{row['seconds']:.1f}", "signals": " ".join(signals)} for row in rows)


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
