"""One trained whole-image classifier applied to image files: probabilities, warnings before them, and Grad-CAM."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mammo.base.files import InputError
from mammo.base.work import prefetch
from mammo.data.own import find_view
from mammo.evaluate import preflight
from mammo.images.pixels import Pixels, choose_pixel_options, is_patch_size
from mammo.maps.files import Grid
from mammo.train.checkpoint import check_one_image, check_outputs, load_model
from mammo.train.scoring import predict


class Prediction(NamedTuple):
    """What became of one image file. Of one at fault only the file and the fault are known."""

    file: str
    probabilities: np.ndarray | None  # float32 (classes,)
    warnings: list[str]
    fault: str | None


class Predictor:
    """A model that predicts image files, with the pixel options of its training unless others are given.

    `pixels` reads the images, `options` are the same by name, `source` says where they come from; `class_list` names
    the outputs; `trained` is what is known of the training images, or None.

    given: options that win over the training's; see `mammo.images.pixels.choose_pixel_options`. trust_checkpoint: open
    a file that holds Python code, too. Raises InputError for a file that cannot be opened, a model that is no
    classifier of one image, or options that do not fit it.
    """

    def __init__(self, model_path: str | Path, given: Mapping[str, Any] | None = None, trust_checkpoint: bool = False):
        self.model = load_model(model_path, trust_checkpoint)
        check_one_image(self.model, model_path)
        built = self.model.input_shape[1:3]
        self.options, self.source = choose_pixel_options(given or {}, model_path, built)
        self.trained = preflight.read_pixel_stats(model_path)
        rows, columns = self.options["img_size"]
        if built[0] not in (None, rows) or built[1] not in (None, columns):
            expected = f"Expected --img-size {built[0]} {built[1]}, for which it is built"
            raise InputError(f"{model_path}: {expected}. Received {rows} {columns}")
        self.class_list = self.options["class_list"]
        check_outputs(self.model, len(self.class_list), model_path)
        self.pixels = Pixels.of(self.options)

    @property
    def is_of_patches(self) -> bool:
        """Return whether the model seems to be a patch classifier.

        It has classes other than two, background among them, or a small square image size though it takes any size.
        """
        small = is_patch_size(self.options["img_size"]) and None in self.model.input_shape[1:3]
        return len(self.class_list) != 2 or "background" in self.class_list or small

    def predict(self, files: Sequence, flips: bool = False, batch_size: int = 4, jobs: int = 1) -> Iterator[Prediction]:
        """Predict image files, in their order; one at fault does not stop the others.

        flips: the mean of the four flips of each image. jobs: threads that read images while the network works.
        """
        for batch in read_batches(self.read, files, batch_size, jobs):
            images = [read[0] for _, read, _ in batch if read]
            probabilities = iter(self.probabilities(np.stack(images), flips)[-1] if images else ())
            for file, read, fault in batch:
                found = (next(probabilities), read[1]) if read else (None, [])
                yield Prediction(file, *found, fault)

    def read(self, file: str | Path) -> tuple[np.ndarray, list[str]]:
        """Return the pixels of an image before mean subtraction, float32 (H, W), and what is unlike the training's.

        See `mammo.evaluate.preflight.warnings_for`. Raises InputError.
        """
        stored = self.pixels.read_stored(file)
        x = self.pixels.to_input(file, self.pixels.resize(file, stored))
        about = {"mean": self.pixels.mean, "stored_size": stored.shape, "view": find_view(file)}
        return x, preflight.warnings_for(x, self.trained, **about)

    def probabilities(self, images: np.ndarray, flips: bool = False) -> tuple[np.ndarray, ...]:
        """Return the probabilities, float32 (N, classes), of images (N, H, W) as `read` gives them.

        With `flips`, also return the mean over the four flips of each image.
        """
        x = np.repeat(self.pixels.centered(images)[..., np.newaxis], self.model.input_shape[-1], axis=-1)
        _, single, _, averaged = predict(self.model, (x, np.zeros(len(x))), batch_size=len(x), flips=flips)
        return (single, averaged) if flips else (single,)

    def explain(self, file: str | Path) -> tuple[np.ndarray, np.ndarray, Grid]:
        """Return the pixels (H, W) of an image as `read` does, its Grad-CAM maps (rows, columns, classes), their grid.

        Raises InputError, for networks without a feature map too.
        """
        scan = self._grad_cam.read(file)
        return scan.pixels, self._grad_cam.score(scan), scan.grid

    @cached_property
    def _grad_cam(self):
        from mammo.maps.compute import GradCam

        return GradCam(self.model, self.pixels)


def read_batches(
    read: Callable[[Any], Any], files: Iterable, batch_size: int, jobs: int = 1
) -> Iterator[list[tuple[str, Any, str | None]]]:
    """Read image files ahead by `jobs` threads, and yield them in batches of `batch_size` that could be read.

    Of each file a batch holds its name, what `read` gives for it or None, and its fault, the message of an InputError,
    or None. Those at fault come with the others around them, in the order of the files.
    """

    def read_or_fault(file):
        try:
            return str(file), read(file), None
        except InputError as error:
            return str(file), None, str(error)

    batch = []
    for entry in prefetch(read_or_fault, files, jobs):
        batch.append(entry)
        if sum(fault is None for _, _, fault in batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
