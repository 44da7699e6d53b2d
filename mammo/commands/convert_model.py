"""Convert a model of any age, such as a released one, to a file that Keras 3 opens by keras.models.load_model.

  mammo convert-model models/ddsm-vgg16-512-512-1024x2-extended.h5 vgg16.keras

NEW may end in .keras or .h5. It is opened by Keras itself and predicts the same, or is not written. Layers keep their
names, but for / in them, which becomes _; what trains the model (optimizer and losses) is left out.
"""

import argparse
from pathlib import Path

from mammo.base import cli
from mammo.base.files import InputError, atomic_write
from mammo.train import backend

TOLERANCE = 1e-6  # of predictions, or of the largest where that is more than 1
_UNKNOWN_SIZE = 64  # what an image's side is taken for where the model takes any


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("source", metavar="OLD", help="model file (.h5 of Keras 2 or 3, .keras)")
    parser.add_argument("target", metavar="NEW", help="file to write (.keras or .h5)")
    trust_help = "run Python code that is stored in OLD (only for your own files)"
    parser.add_argument("--trust-checkpoint", action="store_true", help=trust_help)
    return parser


def run(**options) -> None:
    """Convert; keyword arguments are the option names of `make_parser`. Raises InputError where it cannot be done."""
    args = cli.complete(make_parser(), options)
    source, target = Path(args.source), Path(args.target)
    backend.start_backend()
    from mammo.train.checkpoint import check_model_name, load_model, save_model

    check_model_name(target)
    if target.name.endswith(".weights.h5"):
        raise InputError(f"{target}: Expected the name of a full model, .keras or .h5. Received one of weights alone")
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: Expected another file than the one to convert")
    model = load_model(source, args.trust_checkpoint)
    with atomic_write(target, durable=True) as temporary:
        save_model(model, temporary)
        difference = largest_difference(model, temporary, target, args.trust_checkpoint)
    print(f"{target}: predicts as {source}, largest difference {difference:.1g}")


def largest_difference(model, path: Path, target: Path, trust_checkpoint: bool = False) -> float:
    """Return the largest difference of `model`'s predictions from those of the file `path`, opened by Keras itself.

    It is of one image of random pixels from 0 to 1. target: what errors call the file.
    Raises InputError where Keras does not open it, or the predictions differ by more than TOLERANCE.
    """
    import keras
    import numpy as np

    try:
        written = keras.models.load_model(path, compile=False, safe_mode=not trust_checkpoint)
    except Exception as error:  # Keras raises many types
        raise InputError(f"{target}: cannot be converted: Keras does not open what it saved: {error}") from error
    rng = np.random.default_rng(0)
    shapes = [[size or _UNKNOWN_SIZE for size in tensor.shape[1:]] for tensor in model.inputs]
    images = [
        rng.random((1, *shape), np.float32).astype(x.dtype) for shape, x in zip(shapes, model.inputs, strict=True)
    ]
    images = images[0] if len(images) == 1 else images
    expected, received = (
        [keras.ops.convert_to_numpy(each) for each in keras.tree.flatten(one(images, training=False))]
        for one in (model, written)
    )
    difference = max(float(np.abs(a - b).max()) for a, b in zip(expected, received, strict=True))
    largest = max(1.0, *(float(np.abs(each).max()) for each in expected))
    if not difference <= TOLERANCE * largest:
        raise InputError(f"{target}: cannot be converted: its predictions would differ by {difference:.1g}")
    return difference


main = cli.command(make_parser, run)
