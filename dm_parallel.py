"""One function on many items at the same time: in processes, in threads, or on a cluster.

The backends have joblib's names: "loky" are processes of this machine, "threading" its threads, "dask" and "ray"
the workers of a cluster, all machines of which (the scheduler's too) have this package installed and see the same
files. Only the backend asked for is imported.
"""

import functools
import importlib.util
import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

from dm_files import InputError

# For worker processes: threads of their own would compete with the other workers.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}


def run_parallel(
    function: Callable,
    items: Sequence,
    jobs: int = 1,
    backend: str = "loky",
    desc: str | None = None,
    unit: str = "image",
    ahead: int | None = None,
) -> Iterator:
    """Iterate over function(item) for all `items`, in their order, computed `jobs` at a time.

    function: without side effects on this process, except with "threading". It, the items and the results are
    pickled; functools.partial binds further arguments. The fewer and smaller they are, the less travels.
    jobs: processes or threads; of a Dask or Ray cluster that runs already (see `_dask`, `_ray`), all workers are
    used. One job of "loky" is this process itself.
    desc: title of the progress bar on standard error, which counts in `unit`s; None for no bar.
    ahead: results that may be computed, or being computed, before the first of them is taken: so much memory they
    take. More evens out items of unequal length. Default: twice the number of workers.

    What `function` raises is raised here, when its item's turn comes; items not yet begun are then left. Raises
    InputError at once when the backend is not installed, and later when it fails, such as when a worker dies.
    """
    if backend not in BACKENDS:
        raise InputError(f"--backend: Expected {', '.join(BACKENDS)}. Received {backend!r}")
    package, install = _PACKAGES.get(backend, (None, None))
    if package and importlib.util.find_spec(package) is None:
        raise InputError(f"--backend {backend} needs a package that is not installed: pip install {install}")
    results = _run(function, items, jobs, backend, ahead)
    return results if desc is None else _with_bar(results, len(items), desc, unit)


def _with_bar(results: Iterator, total: int, desc: str, unit: str) -> Iterator:
    from tqdm import tqdm

    with closing(results):
        yield from tqdm(results, total=total, desc=desc, unit=unit, disable=None)  # None: on a terminal only


def _run(function: Callable, items: Sequence, jobs: int, backend: str, ahead: int | None) -> Iterator:
    if jobs == 1 and backend == "loky":
        yield from map(function, items)
        return
    call = functools.partial(_outcome, function)
    failure = None
    try:
        with (
            BACKENDS[backend](jobs) as (submit, workers),
            closing(_in_order(submit, call, items, workers, ahead)) as outcomes,
        ):
            for result, failure in outcomes:
                if failure is not None:
                    raise failure
                yield result
    except Exception as error:
        if error is failure:
            raise
        # Not of `function`: a worker died, or does not find its modules, or cannot be reached.
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise InputError(
            f"--backend {backend} failed ({type(error).__name__}: {reason}). {_ADVICE[backend]}"
        ) from error


def _outcome(function: Callable, item) -> tuple:
    """(result, None) or (None, exception): the backends wrap exceptions in different ways, and lose tracebacks."""
    try:
        return function(item), None
    except InputError as error:
        return None, error
    except Exception as error:
        error.add_note(traceback.format_exc())
        return None, error


def _in_order(submit: Callable, call: Callable, items: Sequence, workers: int, ahead: int | None) -> Iterator:
    pending = deque()
    try:
        for item in items:
            if len(pending) >= (ahead or 2 * workers):
                yield pending.popleft().result()
            pending.append(submit(call, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


# ---------------------------------------------------------------------------------------------------- backends
# Each yields (submit, number of workers); submit(function, item) returns a future.


@contextmanager
def _threading(jobs: int) -> Iterator:
    with ThreadPoolExecutor(jobs) as pool:
        yield pool.submit, jobs


@contextmanager
def _loky(jobs: int) -> Iterator:
    from joblib.externals.loky import get_reusable_executor

    pool = get_reusable_executor(max_workers=jobs, env=_ONE_THREAD)
    try:
        yield pool.submit, jobs
    except KeyboardInterrupt:
        pool.shutdown(wait=True, kill_workers=True)
        raise


@contextmanager
def _dask(jobs: int) -> Iterator:
    """The cluster at DASK_SCHEDULER_ADDRESS, else one of `jobs` processes on this machine."""
    import dask
    from distributed import Client

    address = dask.config.get("scheduler-address", None)
    local = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ": _ONE_THREAD}),
        Client(address) if address else Client(**local) as client,
    ):
        yield functools.partial(client.submit, pure=False), max(jobs, sum(client.ncores().values()))


@contextmanager
def _ray(jobs: int) -> Iterator:
    """The cluster at RAY_ADDRESS, else one of `jobs` processes on this machine."""
    import ray

    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if not os.environ.get("RAY_ADDRESS"):
        # Its workers do not look for modules where this process does.
        variables = _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(sys.path)}
        options |= {"num_cpus": jobs, "include_dashboard": False, "runtime_env": {"env_vars": variables}}
    ray.init(**options)
    try:
        remote = ray.remote(_call)
        submit = lambda function, item: remote.remote(function, item).future()  # noqa: E731
        yield submit, max(jobs, int(ray.cluster_resources().get("CPU", 0)))
    finally:
        ray.shutdown()


def _call(function: Callable, item):
    return function(item)


_CLUSTER_ADVICE = "All its machines need this package installed, the same files and enough memory"
_ADVICE = {
    "loky": "Most often memory is short: use fewer --jobs",
    "threading": "Use fewer --jobs",
    "dask": _CLUSTER_ADVICE,
    "ray": _CLUSTER_ADVICE,
}
BACKENDS = {"loky": _loky, "threading": _threading, "dask": _dask, "ray": _ray}
_PACKAGES = {"dask": ("distributed", "'dask[distributed]'"), "ray": ("ray", "ray")}
