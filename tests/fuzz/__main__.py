"""Run the command lines on thousands of mutated files, and list what they do wrong. By hand, in minutes to hours.

  python -m tests.fuzz --cases 5000 --seed 0 --jobs 4

A case is a command and a mutation of one of its files; its number and the seed decide both. Wrong are: a stack trace, a
crash, more than 10 s, more than 4 GB beyond the start, outputs that are partial or outside the output folder, and an
error that is no line. Exit status 1 if there was any.
"""

import argparse
import collections
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tqdm import tqdm

from mammo.base.cli import HelpFormatter, natural_int, positive_int
from tests.fuzz.seeds import targets
from tests.helpers import ROOT

# Of one process: each training leaves threads behind, which TensorFlow's data sets keep alive, and their memory.
CASES_A_PROCESS = 200


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--cases", type=positive_int, default=5000, help="how many")
    parser.add_argument("--first", type=natural_int, default=0, help="number of the first")
    parser.add_argument("--seed", type=natural_int, default=0, help="of all cases")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    names = [target.name for target in targets()]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=(), help=", ".join(names))
    parser.add_argument("--out", metavar="FILE", help="list of all outcomes, a line of JSON each")
    return parser


def fuzz(cases, seed: int, jobs: int = 1, report=None, only=()) -> list[dict]:
    """Outcomes of the cases of these numbers, in no order. report: called with each, as it is there. only: names of
    targets, which then are drawn from these."""
    from tests.fuzz.worker import prepare

    waiting, outcomes, lock = collections.deque(cases), [], threading.Lock()
    with tempfile.TemporaryDirectory(prefix="fuzz-inputs") as folder:
        prepare(Path(folder), only)

        def work():
            process, case = None, None
            for number in itertools.count(1):
                with lock:
                    if not waiting:
                        break
                    case = waiting.popleft()
                process = process or start(folder, seed, only)
                try:
                    process.stdin.write(f"{case}\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                except BrokenPipeError:
                    answer = ""
                if answer:
                    outcome = json.loads(answer)
                else:  # the interpreter itself came to its end
                    from tests.fuzz.worker import draw

                    name = draw(case, seed, only)[0].name
                    status = end(process)
                    outcome = {"case": case, "target": name, "finding": f"crash: exit status {status}"}
                    outcome |= {"mutation": "", "status": None, "seconds": 0.0, "message": ""}
                    process = None
                if process and number % CASES_A_PROCESS == 0:
                    end(process)
                    process = None
                with lock:
                    outcomes.append(outcome)
                    if report:
                        report(outcome)
            if process:
                end(process)

        threads = [threading.Thread(target=work) for _ in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


def start(folder: str, seed: int, only) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.fuzz.worker", folder, str(seed), *only]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def end(process: subprocess.Popen) -> int:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    return process.wait()


def main(argv=None) -> int:
    args = make_parser().parse_args(argv)
    bar = tqdm(total=args.cases, unit="case", disable=None)

    def report(outcome):
        bar.update()
        if outcome["finding"]:
            bar.write(f"case {outcome['case']}, {outcome['target']}, {outcome['mutation']}:\n{outcome['finding']}")

    with bar:
        outcomes = fuzz(range(args.first, args.first + args.cases), args.seed, args.jobs, report, args.only)
    if args.out:
        lines = (json.dumps(outcome) + "\n" for outcome in sorted(outcomes, key=lambda outcome: outcome["case"]))
        Path(args.out).write_text("".join(lines))
    findings = [outcome for outcome in outcomes if outcome["finding"]]
    statuses = collections.Counter(outcome["status"] for outcome in outcomes)
    print(f"{len(outcomes)} cases, {len(findings)} findings; exit statuses {dict(sorted(statuses.items(), key=str))}; "
          f"the slowest took {max(outcome['seconds'] for outcome in outcomes):.1f} s")  # fmt: skip
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
