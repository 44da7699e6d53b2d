"""Results in order on every backend, errors passed on, memory bounded."""

import functools
import os
import time

import pytest

from mammo.base import work as base_work
from mammo.base.files import InputError
from mammo.base.work import prefetch, run_parallel

LOCAL = ["loky", "threading"]


@pytest.fixture(
    params=[*LOCAL, pytest.param("dask", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.slow)]
)
def backend(request):
    if request.param not in LOCAL:
        pytest.importorskip({"dask": "distributed", "ray": "ray"}[request.param])
    return request.param


def work(item, bad=None):
    """Later items are done earlier."""
    if item == bad:
        raise InputError(f"item {item}: Expected another")
    time.sleep(0.05 * (item % 2 == 0))
    return item * item, os.getpid()


@pytest.mark.parametrize("jobs", [1, 2])
def test_results_come_in_order(backend, jobs):
    results = list(run_parallel(work, range(9), jobs, backend))
    assert [value for value, _ in results] == [item * item for item in range(9)]
    elsewhere = jobs > 1 and backend != "threading"
    assert all((process != os.getpid()) == elsewhere for _, process in results)


def test_the_first_error_in_order_is_raised_as_it_was(backend):
    taken = []
    with pytest.raises(InputError, match=r"^item 3: Expected another$"):
        taken.extend(run_parallel(functools.partial(work, bad=3), range(9), 2, backend, desc="work"))
        pytest.fail("no error")
    results = run_parallel(functools.partial(work, bad=3), range(9), 2, backend)
    assert [next(results)[0] for _ in range(3)] == [0, 1, 4]
    results.close()


def count_threads(_):
    import cv2

    return cv2.getNumThreads()


def test_worker_processes_have_one_thread_each(backend):
    if backend != "threading":
        assert set(run_parallel(count_threads, range(4), 2, backend)) == {1}


@pytest.mark.parametrize("jobs", [1, 2])
def test_few_items_are_begun_before_results_are_taken(jobs):
    begun = []
    results = run_parallel(begun.append, range(999), jobs, "threading")
    for taken in range(1, 50):
        next(results)
        time.sleep(0.002)
        assert taken <= len(begun) < taken + 16 * jobs
    results.close()
    assert len(begun) < 70


def die(item):
    os._exit(1)


def test_a_dead_worker_is_an_input_error(backend):
    if backend == "threading":
        pytest.skip("this process would die")
    advice = "use fewer --jobs" if backend == "loky" else "enough memory"
    with pytest.raises(InputError, match=rf"--backend {backend} failed \(\w+: .*{advice}$"):
        list(run_parallel(die, range(3), 2, backend))
    assert [value for value, _ in run_parallel(work, range(3), 2, backend)] == [0, 1, 4]


def test_a_cluster_out_of_reach_is_an_input_error():
    dask = pytest.importorskip("dask")
    pytest.importorskip("distributed")
    nowhere = {"scheduler-address": "tcp://127.0.0.1:9", "distributed.comm.timeouts.connect": "1s"}
    with dask.config.set(nowhere), pytest.raises(InputError, match=r"--backend dask failed \(.* All its machines need"):
        list(run_parallel(work, range(3), 2, "dask"))


@pytest.mark.parametrize(("backend", "install"), [("dask", "'dask[distributed]'"), ("ray", "ray")])
def test_missing_backends_say_what_to_install(monkeypatch, backend, install):
    monkeypatch.setattr(base_work.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        run_parallel(work, range(3), 2, backend)
    assert str(error.value).endswith(f"pip install {install}")


def test_unknown_backends_are_refused():
    with pytest.raises(InputError, match=r"Expected loky, threading, dask, ray\. Received 'spark'"):
        run_parallel(work, range(3), 2, "spark")


@pytest.mark.parametrize("jobs", [1, 3])
def test_reading_ahead_keeps_order_and_few_results(jobs):
    begun = []

    def read(item):
        begun.append(item)
        return work(item, bad=6)[0]

    results = prefetch(read, range(9), jobs)
    for item in range(6):
        assert next(results) == item * item
        time.sleep(0.01)
        assert len(begun) <= item + 1 + jobs + 1
    with pytest.raises(InputError, match="item 6"):
        next(results)
