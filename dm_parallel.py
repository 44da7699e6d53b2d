"""One function on many items at the same time, over joblib."""

import functools
import importlib.util
import os
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dm_files import InputError

_LOCAL = ("joblib", "joblib", "Most often memory is short: use fewer --jobs")
_ADVICE = "All its machines need this package installed, the same files and enough memory"
# module, pip requirement, what to do when it fails
BACKENDS = {
    "loky": _LOCAL,
    "threading": _LOCAL,
    "dask": ("distributed", "'dask[distributed]'", _ADVICE),
    "ray": ("ray", "ray", _ADVICE),
}


def run_parallel(
    function: Callable, items: Sequence, jobs: int = 1, backend: str = "loky", desc: str | None = None, unit="image"
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


def read_ahead(function: Callable, items: Iterable, jobs: int = 1) -> Iterator:
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
    from tqdm import tqdm

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
        # Not of `function`: a worker died, or does not find its modules, or cannot be reached.
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        advice = BACKENDS[backend][-1]
        raise InputError(f"--backend {backend} failed ({type(error).__name__}: {reason}). {advice}") from error


def _call(function: Callable, caller: int, item) -> tuple:
    """(result, None) or (None, exception): joblib would raise it before its turn. caller: a process id."""
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
    """Options of joblib.parallel_config."""
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
