"""Start Keras and its backend, quietly and from one seed; nothing heavy is imported before."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from mammo.base.files import InputError, env_int


def start_backend(deterministic: bool = False) -> None:
    """Import Keras, start its backend and seed it with RANDOM_SEED (12345); call before a model is built.

    deterministic: keep to operations that repeat exactly.

    TensorFlow's native code writes notices to standard error, where errors of one line belong, before its logging
    can be configured: they are dropped, unless TF_CPP_MIN_LOG_LEVEL is 0.
    """
    seed = env_int("RANDOM_SEED", 12345)
    if not 0 <= seed < 2**32:
        raise InputError(f"environment variable RANDOM_SEED: Expected 0 to 2**32 - 1. Received {seed}")
    quiet = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2") != "0"
    with _dropped_standard_error() if quiet else nullcontext():
        try:
            import keras
        except (ImportError, ValueError) as error:
            backend = os.environ.get("KERAS_BACKEND", "tensorflow")
            raise InputError(f"Keras cannot start with the backend {backend} (KERAS_BACKEND): {error}") from error
        if deterministic:
            from mammo.train.devices import set_determinism

            set_determinism(seed)
        else:
            keras.utils.set_random_seed(seed)
        keras.ops.zeros(1)


@contextmanager
def _dropped_standard_error() -> Iterator[None]:
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
