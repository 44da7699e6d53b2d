"""Work on many items at the same time, over joblib, and go on with it after a stop.

`run_parallel` and `prefetch` call one function on all items. `run_resumable` does so for images that become files, and
keeps in the output folder a manifest of what is done and the options that it was done by.
"""

import functools
import hashlib
import importlib.util
import json
import os
import sys
import traceback
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from mammo.base.files import InputError, append_text, locked, remove_partial, write_text
from mammo.base.guards import parse_json, read_json

# module, pip requirement, what to do when it fails
_LOCAL = ("joblib", "joblib", "Most often memory is short: use fewer --jobs")
_ADVICE = "All its machines need this package installed, the same files and enough memory"
BACKENDS = {
    **{"loky": _LOCAL, "threading": _LOCAL},
    "dask": ("distributed", "'dask[distributed]'", _ADVICE),
    "ray": ("ray", "ray", _ADVICE),
}


def run_parallel(
    function: Callable,
    items: Sequence,
    jobs: int = 1,
    backend: str = "loky",
    desc: str | None = None,
    unit: str = "image",
) -> Iterator:
    """Iterate over function(item) for all `items`, in their order, computed `jobs` at a time.

    function: without side effects on this process, except with "threading". It, the items and the results are
    pickled; functools.partial binds further arguments.
    jobs: processes ("loky") or threads ("threading"). "dask" and "ray" use all workers of the cluster at
    DASK_SCHEDULER_ADDRESS or RAY_ADDRESS, whose machines all have this package installed and see the same files, or
    without these a local one of `jobs` processes. A single worker is this process itself.
    desc: title of the progress bar on standard error, which counts in `unit`s; None for no bar.

    What `function` raises is raised here, when its item's turn comes. Raises InputError at once when the backend is
    not installed, and later when it fails, such as when a worker dies.
    """
    if backend not in BACKENDS:
        raise InputError(f"--backend: Expected {', '.join(BACKENDS)}. Received {backend!r}")
    module, requirement, _ = BACKENDS[backend]
    if importlib.util.find_spec(module) is None:
        raise InputError(f"--backend {backend} needs a package that is not installed: pip install {requirement}")
    return _run(function, items, jobs, backend, desc, unit)


def prefetch(function: Callable, items: Iterable, jobs: int = 1) -> Iterator:
    """Iterate over function(item) for all `items`, in their order, computed by `jobs` threads of this process while
    the caller works on earlier ones, such as images that are read while a network predicts.

    At most jobs + 1 results wait. What `function` raises is raised here, when its item's turn comes.
    """
    waiting = deque()
    with ThreadPoolExecutor(jobs) as threads:
        for item in items:
            waiting.append(threads.submit(function, item))
            if len(waiting) > jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _run(function: Callable, items: Sequence, jobs: int, backend: str, desc: str | None, unit: str) -> Iterator:
    from joblib import Parallel, delayed, effective_n_jobs, parallel_config

    # What joblib says when the caller stops early.
    warnings.filterwarnings("ignore", r"\d+ tasks (have been|which were)", UserWarning)
    hidden = None if desc else True  # None: unless on a terminal
    form = "list" if backend == "ray" else "generator"  # Ray's backend has no other
    call, failure = delayed(functools.partial(_call, function, os.getpid())), None
    try:
        with tqdm(total=len(items), desc=desc, unit=unit, disable=hidden) as bar, _config(backend, jobs) as config:
            with parallel_config(**config):
                parallel = Parallel(return_as=form, batch_size=1, pre_dispatch="2*n_jobs")
                # In lots, since joblib goes on computing, and fills the memory, while nobody takes the results.
                lot = 16 * effective_n_jobs(config["n_jobs"])
            with parallel:
                for start in range(0, len(items), lot):
                    for result, failure in parallel(call(item) for item in items[start : start + lot]):
                        if failure is not None:
                            raise failure
                        bar.update()
                        yield result
    except Exception as error:
        if error is failure:
            raise
        # Not from `function`: a worker died, or does not find its modules, or cannot be reached.
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        advice = BACKENDS[backend][-1]
        raise InputError(f"--backend {backend} failed ({type(error).__name__}: {reason}). {advice}") from error


def _call(function: Callable, caller: int, item) -> tuple:
    """Return (result, None) or (None, exception), which joblib would raise before its turn. caller: a process id."""
    elsewhere = os.getpid() != caller
    if elsewhere:
        import cv2

        cv2.setNumThreads(1)  # more would compete with the other workers
    try:
        return function(item), None
    except Exception as error:
        if elsewhere and not isinstance(error, InputError):
            error.add_note(traceback.format_exc())  # a traceback cannot be pickled
        return None, error


@contextmanager
def _config(backend: str, jobs: int) -> Iterator[dict]:
    """Yield the options of joblib.parallel_config."""
    if backend == "dask":
        import dask
        from distributed import Client
        from joblib._dask import DaskDistributedBackend

        class Backend(DaskDistributedBackend):
            def submit(self, func, callback=None):
                """Report failures of Dask itself, such as a worker's death, for which joblib 1.6 waits forever."""
                future = super().submit(func, callback)
                future.add_done_callback(lambda done: done.exception() and callback(done.exception()))
                return future

        address = dask.config.get("scheduler-address", None)
        local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
        with Client(address) if address else Client(**local) as client:
            yield {"backend": Backend(client=client), "n_jobs": -1}
    elif backend == "ray":
        import ray
        from ray.util.joblib import register_ray

        options = {"log_to_driver": False, "logging_level": "ERROR"}
        if not os.environ.get("RAY_ADDRESS"):
            # Its workers do not look for modules where this process does.
            environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
            options |= {"num_cpus": jobs, "include_dashboard": False, "runtime_env": environment}
        register_ray()
        with ray.init(**options):
            yield {"backend": "ray", "n_jobs": -1}
    else:
        yield {"backend": backend, "n_jobs": jobs} | ({"inner_max_num_threads": 1} if backend == "loky" else {})


def check_same_options(folder: str | os.PathLike, theirs: Mapping, ours: Mapping, instead: str) -> None:
    """Raise InputError for options other than of the run that began in `folder`. instead: what else one may do."""
    if different := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        changes = ", ".join(f"{name} {theirs.get(name)} there, {ours.get(name)} now" for name in different)
        remedy = f"Expected the same, to go on. Give these, or {instead}"
        raise InputError(f"{folder}: has the work of a run with other options ({changes}): {remedy}")


# ----------------------------------------------------------------------------------------------- resumable work

MANIFEST, OPTIONS, REPORT = "manifest.jsonl", "options.json", "report.json"

# To be raised when the same files and options shall give other outputs, so that older ones are made again.
RULES = 4


@dataclass(frozen=True)
class Job:
    """Hold one image to prepare.

    sources: paths of all files it may be made from, below the download folder. outputs: paths of all files it may
    become, below the output folder. plan: what the function of `run_resumable` needs to know, in types that
    JSON can hold; these and the sources decide how the outputs look.
    """

    name: str
    sources: tuple[str, ...]
    outputs: tuple[str, ...]
    plan: object


@dataclass
class Outcome:
    """Hold what became of one item, in plain types that JSON can hold.

    outputs: paths below the output folder. repairs: (kind, what was mended). faults: what could not be used, and
    why, one line each. facts: whatever the caller wants to know later. log: lines for who watches, which are printed
    with the faults as soon as the item is done, and not kept.
    """

    name: str
    outputs: list[str] = field(default_factory=list)
    repairs: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    facts: dict = field(default_factory=dict)
    log: list[str] = field(default_factory=list)


def run_resumable(
    items: Sequence[Job],
    function: Callable[[Job], Outcome],
    download: str | Path,
    out: str | Path,
    folders: Sequence[str],
    jobs: int = 1,
    backend: str = "loky",
    on_error: str | None = None,
    fresh: bool = False,
    desc: str = "preparing",
) -> list[Outcome]:
    """Prepare all items, keeping what an earlier run has made of the same files with the same plans.

    function: writes the files of one item below `out`; see `run_parallel`. folders: the folders below `out` that it
    writes to. Nobody else's files may be there, since a trainer would take them for the data set's; hidden files may.
    on_error: "stop" raises InputError at the first fault. fresh: keep nothing. desc: title of the progress bar.

    The manifest in `out` gets a line with all outputs to come, and one as each item is done. What it lists and the
    items no longer have is removed, so that no image stays in the set where an earlier split had put it. An item is
    kept when it had no fault, its sources have the size and time of change they had, and its outputs the checksums.
    The same items give the same files, whether or not the run was interrupted. `report.json`, which the caller
    writes in the end, is removed at the start: while it is there, the outputs are whole.

    Returns one result an item, in their order. Raises InputError when `folders` hold files of someone else, or another
    run writes to `out`.
    """
    download, out = Path(download), Path(out)
    with locked(out):
        manifest = out / MANIFEST
        records, ours = _read_manifest(manifest)
        _make_ready(out, folders, ours)
        stamps = {item.name: _stamp(download, item) for item in items}
        records = {} if fresh else _still_whole(records, stamps, out, jobs)
        pending = [item for item in items if item.name not in records]
        if records:
            print(f"{len(records)} of {len(items)} images are there from an earlier run")
        # Starts with the end of the line that a killed run may have left half written.
        to_come = [path for item in pending for path in item.outputs]
        append_text(manifest, "\n" + json.dumps({"to_come": to_come}) + "\n")
        for item, result in zip(pending, run_parallel(function, pending, jobs, backend, desc), strict=True):
            if result.faults and on_error == "stop":
                raise InputError(result.faults[0])
            if result.log:
                tqdm.write("\n".join([*result.log, *result.faults]))
            records[item.name] = _to_record(result, stamps[item.name], out)
            append_text(manifest, _to_line(records[item.name]))
        ordered = [records[item.name] for item in items]
        ours.update(path for item in items for path in item.outputs)
        for path in ours.difference(*(record["outputs"] for record in ordered)):
            Path(out, path).unlink(missing_ok=True)
        write_text(manifest, "".join(map(_to_line, ordered)))
        return [_to_outcome(record) for record in ordered]


def keep_options(out: str | Path, options: Mapping, fresh: bool = False) -> None:
    """Note what decides the files in `out`; InputError where an earlier run noted other options, unless `fresh`."""
    if not fresh:
        check_kept_options(out, options)
    write_text(Path(out, OPTIONS), json.dumps(options, indent=1) + "\n")


def check_kept_options(out: str | Path, options: Mapping) -> None:
    """Make the check of `keep_options` alone: a run that writes to several folders does before it notes any."""
    if (earlier := read_json(Path(out, OPTIONS))) is not None:
        ours = json.loads(json.dumps(options))
        check_same_options(out, earlier, ours, "another folder, or --fresh to replace the work")


def _make_ready(out: Path, folders: Sequence[str], ours: Container[str]) -> None:
    """Make the output folders, without what a killed run left half written; InputError for files of someone else."""
    present = [path for folder in folders for path in Path(out, folder).rglob("*") if path.is_file()]
    for path in sorted(present):
        if path.relative_to(out).as_posix() not in ours and not path.name.startswith("."):
            expected = (
                "Expected none but its own files in this folder; move it elsewhere, or name another output folder"
            )
            raise InputError(f"{path}: not made by this script, so it is no part of the data set: {expected}")
    (out / REPORT).unlink(missing_ok=True)
    for folder in {out, *(path.parent for path in present)}:
        remove_partial(folder)
    for folder in folders:
        (out / folder).mkdir(parents=True, exist_ok=True)


def _still_whole(records: Mapping[str, dict], stamps: Mapping[str, str], out: Path, jobs: int) -> dict[str, dict]:
    """Return the records of items whose sources and plan are the same, and whose outputs are as they were written."""
    earlier = [records[name] for name, stamp in stamps.items() if name in records and records[name]["stamp"] == stamp]
    whole = run_parallel(functools.partial(_is_whole, out), earlier, jobs, "threading", "checking")
    return {record["name"]: record for record, kept in zip(earlier, whole, strict=True) if kept}


def _stamp(download: Path, item: Job) -> str:
    """Return a text that changes with the item's sources and settings."""
    sources = []
    for source in item.sources:
        try:
            status = (download / source).stat()
        except FileNotFoundError:  # a fault that the function will find
            sources.append([source])
        else:
            sources.append([source, status.st_size, status.st_mtime_ns])
    text = json.dumps([RULES, sources, item.plan], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _is_whole(out: Path, record: dict) -> bool:
    """Tell whether an earlier result had no fault and its outputs are still there as written."""
    with suppress(FileNotFoundError):
        return not record["faults"] and [_checksum(out / path) for path in record["outputs"]] == record["checksums"]
    return False


def _to_record(result: Outcome, stamp: str, out: Path) -> dict:
    """Return what the manifest keeps of a result."""
    checksums = [_checksum(out / path) for path in result.outputs]
    record = {"stamp": stamp, "checksums": checksums, **asdict(result)}
    del record["log"]
    return record


def _to_outcome(record: dict) -> Outcome:
    """Return the result that the manifest keeps."""
    fields = {name: record[name] for name in ("name", "outputs", "repairs", "faults", "facts")}
    return Outcome(**fields | {"repairs": [tuple(repair) for repair in record["repairs"]]})


def _to_line(record: dict) -> str:
    """Return a record as a line of the manifest, with a checksum of itself: damaged ones are made anew."""
    return json.dumps(record | {"checksum": _checksum_of_record(record)}) + "\n"


def _checksum_of_record(record: dict) -> int:
    return zlib.crc32(json.dumps(record).encode())


def _is_own_file(name: object) -> bool:
    """Tell whether an output that the manifest lists is below its folder. Names of images may hold any character."""
    path = PurePosixPath(name) if isinstance(name, str) and "\0" not in name else PurePosixPath()
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _read_manifest(path: Path) -> tuple[dict[str, dict], set[str]]:
    """Return the last record of each item by its name, and all outputs that were ever announced or made."""
    records, outputs = {}, set()
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            record = parse_json(line)
        except ValueError:  # a line cut off when the run was killed, or damaged
            continue
        if not isinstance(record, dict):
            continue
        listed = [record.get(name) for name in ("to_come", "outputs")]
        paths = [name for names in listed if isinstance(names, list) for name in names]
        # What is listed and no longer wanted is removed.
        if others := [name for name in paths if not _is_own_file(name)]:
            raise InputError(f"{path}: lists {others[0]!r}. Expected files of its own folder alone; remove the list")
        outputs.update(paths)
        if record.pop("checksum", None) == _checksum_of_record(record):
            records[record["name"]] = record
    return records, outputs
