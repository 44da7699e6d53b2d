"""Disturb the commands of this project on purpose, and count what comes of it. Run by hand, in hours.

python -m tests.faults kill [--kills 50] [--only sampling ...] [--out faults.csv]
python -m tests.faults soak [--epochs 2000] [--out memory.csv]
python -m tests.faults read [--epochs 1000]
"""

import argparse
import csv
import dataclasses
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from mammo.base.cli import HelpFormatter, natural_int, positive_int
from tests.faults.commands import COMMANDS, make_inputs
from tests.faults.endure import Memory, growth, read_while_written, soak
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
    long = kinds.add_parser("soak", help="train for many epochs, and watch the memory")
    long.set_defaults(run=run_soak)
    long.add_argument("--epochs", type=positive_int, default=2000, help="of both stages")
    long.add_argument("--out", metavar="FILE", default="memory.csv", help="table of epochs, megabytes and seconds")
    read = kinds.add_parser("read", help="open the best model in a loop while a training writes it")
    read.set_defaults(run=run_read)
    read.add_argument("--epochs", type=positive_int, default=1000, help="each of which writes it")
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


def run_soak(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="faults") as work, open(args.out, "w", newline="") as file:
        make_inputs(Path(work, "inputs"))
        writer, memory = csv.writer(file, lineterminator="\n"), []
        writer.writerow(Memory._fields)
        for now in soak(Path(work, "inputs"), Path(work, "out"), args.epochs):
            memory.append(now)
            writer.writerow((now.epochs, f"{now.megabytes:.1f}", f"{now.seconds:.1f}"))
            file.flush()
    early, late = growth(memory, args.epochs)
    change = late / early - 1
    print(
        f"{args.epochs} epochs in {memory[-1].seconds:.0f} s: {early:.0f} MB, in the end {late:.0f} MB ({change:+.1%})"
    )
    return int(change > 0.05)


def run_read(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="faults") as work:
        for ending in (".h5", ".keras"):
            opens, versions, writes = read_while_written(Path(work, f"best{ending}"), args.epochs)
            print(f"{ending}: opened {opens} times, {versions} different models, while it was written {writes} times")
    return 0


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
