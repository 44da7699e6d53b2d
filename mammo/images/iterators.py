"""Batches of samples for Keras: the order, labels and weights that all have in common, and images in arrays.

`file_iterators` and `exams` iterate over files, and read DICOM as the 16-bit PNG that data preparation makes of it.
`dm_image.DMImageDataGenerator.flow*` make all of them; they are apart from it because they import Keras.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np

from mammo.base.files import InputError, counted, env_int, write_img
from mammo.images.warp import empty_aligned

# Batches are loaded in parallel; threads of OpenCV's own would only compete with that.
cv2.setNumThreads(1)

# How often others are tried where no image of a batch can be read: then they are gone with their disk.
_MAX_ATTEMPTS = 5

CLASS_MODES = ("categorical", "binary", "sparse", None)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Hold how samples come in batches, by the names of the iterators' arguments.

    Args:
        batch_size: samples a batch.
        shuffle, seed: order; without a seed, the iterator draws one.
        class_mode: labels as one-hot float32 rows ("categorical"), float32 class numbers ("binary"), integers
            ("sparse") or no labels (None: batches are then x alone).
        auto_batch_balance: also return sample weights, 1 / (frequency of the sample's class in its batch).
        no_pos_skip: probability of leaving out a batch without a sample of class 1.
        balance_classes: if above 0, redraw each batch with this ratio of others to class 1 (`index_balancer`).
        preprocess: function that is given the pixels of each batch, float32 (n, H, W, C), augmented and standardised,
            and returns those to use, such as `preprocess_input` of a network of `keras.applications`.
        save_to_dir, save_prefix, save_format: folder for a picture ("jpeg" or "png") of each augmented image, stretched
            to 0..255 and called PREFIX_EPOCH_SAMPLE[_OCCURRENCE].FORMAT; without one there are none.
        workers: threads that load the images of a batch (default NUM_CPU_CORES, 4). They are ours, and Keras is told
            of one worker: its own queue (as of 3.15) carries batches over from the start of one epoch to the next, so
            that under a distribution strategy, and with JAX and PyTorch, images come twice and others never.
    """

    batch_size: int = 32
    shuffle: bool = True
    seed: int | None = None
    class_mode: str | None = "categorical"
    auto_batch_balance: bool = False
    no_pos_skip: float = 0.0
    balance_classes: float = 0.0
    preprocess: Callable[[np.ndarray], np.ndarray] | None = None
    save_to_dir: str | Path | None = None
    save_prefix: str = ""
    save_format: str = "jpeg"
    workers: int | None = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **changed) -> "Batches":
        """Take those of a function's arguments, its `locals()`, that are fields; `changed` win over them."""
        arguments = {**arguments, **changed}
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def for_validation(self) -> "Batches":
        """Return the same in the order of the samples, each of them once."""
        return replace(self, shuffle=False, no_pos_skip=0.0, balance_classes=0.0)


class DMIterator(keras.utils.PyDataset):
    """Iterate over batches of n samples: order, labels and weights. Subclasses say what a batch of samples is.

    Batch i of an epoch is a pure function of (seed, epoch, i), so any number of workers gives the same batches, and
    every sample comes once an epoch, the last batch being shorter. Order, as published: an epoch that starts after
    k batches takes RandomState(seed + k).permutation(n); batch number j (from 1, over all epochs) has a generator
    RandomState(seed + j) whose first uniform decides on skipping it, and which then balances it and picks images.

    Use as a PyDataset (`len`, `[i]`, `on_epoch_end`), or call `next()` for an endless stream over the same batches;
    a `for` loop goes to the end of the epoch. `reset()` starts a new epoch. `.input_error` keeps the InputError of a
    batch that failed, since TensorFlow turns it into an error of its own.

    Args:
        generator: DMImageDataGenerator that augments and standardises.
        n: number of samples. classes: their class numbers (n,), or None without labels. nb_class: number of classes.
        batches: see `Batches`.
    """

    def __init__(
        self,
        generator: Any,
        n: int,
        classes: Sequence[int] | np.ndarray | None,
        nb_class: int | None,
        batches: Batches,
    ):
        super().__init__()
        if batches.class_mode not in CLASS_MODES:
            raise InputError(f"class_mode: Expected one of {CLASS_MODES}. Received {batches.class_mode!r}.")
        if n < 1:
            raise InputError("Expected at least one image to iterate over. Received none.")
        if batches.batch_size < 1:
            raise InputError(f"batch_size: Expected at least 1. Received {batches.batch_size}.")
        if batches.no_pos_skip >= 1 and classes is not None and not np.any(np.equal(classes, 1)):
            raise InputError("Expected a sample of class 1, since all batches without one are skipped. Received none.")
        workers = default_workers(batches.workers)
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        # Loads the next batch while the network works on this one. Only TensorFlow would do so of itself. Pictures are
        # those of batches that were asked for.
        self._reader = ThreadPoolExecutor(1) if workers > 1 and not batches.save_to_dir else None
        self._ahead = None  # (plan of the epoch, position in it, its future batch)
        self.generator = generator
        self.nb_sample = n
        self.classes = None if classes is None else np.asarray(classes)
        self.nb_class = nb_class
        self.batch_size = batches.batch_size
        seed = np.random.SeedSequence().generate_state(1)[0] if batches.seed is None else batches.seed
        self.seed = int(seed) % 2**32
        self.class_mode = None if classes is None else batches.class_mode
        self.options = batches
        self.input_error = None
        self._epoch = 0
        self._next = 0  # position of next() in the epoch
        self._plan_epoch(batches_before=0)

    @property
    def labels(self) -> np.ndarray | None:
        """Return the class numbers (n,) of the samples, or None."""
        return self.classes

    # -- order

    def _plan_epoch(self, batches_before):
        """List the batches of the epoch that begins after `batches_before`, as (number, sample indices)."""
        self._next, self._batches, self._ahead = 0, [], None
        while not self._batches:  # all of an epoch's batches may be skipped
            self._before = batches_before
            order = np.arange(self.nb_sample)
            if self.options.shuffle:
                order = self._random_state(batches_before).permutation(self.nb_sample)
            for start in range(0, self.nb_sample, self.batch_size):
                index = order[start : start + self.batch_size]
                batches_before += 1
                if not self._is_skipped(batches_before, index):
                    self._batches.append((batches_before, index))
        self._after = batches_before

    def _random_state(self, number):
        return np.random.RandomState((self.seed + number) % 2**32)

    def _is_skipped(self, number, index):
        if not self.options.no_pos_skip or self.classes is None or (self.classes[index] == 1).any():
            return False
        return self._random_state(number).uniform() < self.options.no_pos_skip

    def __len__(self):
        return len(self._batches)

    def __getitem__(self, i):
        plan, position = self._batches, range(len(self))[i]
        ahead, self._ahead = self._ahead, None
        try:
            is_next = ahead and ahead[0] is plan and ahead[1] == position
            batch = ahead[2].result() if is_next else self._make(plan, position)
        except InputError as error:
            self.input_error = error
            raise
        if self._reader and position + 1 < len(plan):
            self._ahead = (plan, position + 1, self._reader.submit(self._make, plan, position + 1))
        return batch

    def _make(self, plan, position):
        return self._make_batch(*self._balanced(*plan[position]))

    def _balanced(self, number, index):
        """Return the samples of batch `number`, and the generator for what else it draws."""
        rng = self._random_state(number)
        if self.classes is not None:
            rng.uniform()  # the draw that decides on skipping
            if self.options.balance_classes:
                index = index_balancer(index, self.classes[index], self.options.balance_classes, rng)
        return index, rng

    def batch_names(self, i: int) -> list[str]:
        """Return what the samples of batch i of this epoch are called: the paths of their files, if they have any."""
        return [str(self._name(sample)) for sample in self._balanced(*self._batches[i])[0]]

    def on_epoch_end(self) -> None:
        """Go on to the next epoch; Keras calls this."""
        self._epoch += 1
        self._plan_epoch(self._after)

    def reset(self) -> None:
        """Start a new epoch; batches drawn so far by `next()` count for its order."""
        if self._next:
            self._epoch += 1
        self._plan_epoch(self.total_batches_seen)

    @property
    def position(self) -> tuple[int, int]:
        """Return where the epoch stands in the order of all, for `go_to`: its number, and the batches before it."""
        return self._epoch, self._before

    def go_to(self, epoch: int, batches_before: int, skip: int = 0) -> None:
        """Take up the epoch at a `position`, without its first `skip` batches."""
        self._epoch = epoch
        self._plan_epoch(batches_before)
        del self._batches[:skip]

    @property
    def total_batches_seen(self) -> int:
        """Count the batches of past epochs and those that `next()` drew (or skipped) of this one."""
        return self._batches[self._next - 1][0] if self._next else self._before

    def next(self) -> np.ndarray | tuple | list:
        """Return the next batch, without end; a new epoch begins when one is through."""
        if self._next == len(self):
            self.on_epoch_end()
        self._next += 1
        return self[self._next - 1]

    __next__ = next

    def __iter__(self):
        """Go through the batches left in this epoch, or all of the next one when there are none."""
        yield self.next()
        while self._next < len(self):
            yield self.next()

    # -- content

    def _make_batch(self, index, rng):
        """Return the batch of the samples `index`, as Keras takes it; random choices draw from `rng`."""
        raise NotImplementedError

    def _name(self, index):
        return f"sample {index}"

    def close(self) -> None:
        """End the threads. Batches can still be drawn, by the caller's own."""
        for pool in (self._pool, self._reader):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._pool = self._reader = self._ahead = None

    def _map(self, function, *items):
        """List function(item), or of several, for all, on this iterator's threads."""
        return list((self._pool.map if self._pool else map)(function, *items))

    def _augment(self, x, index, occurrence=0, out=None):
        """Augment and standardise sample `index`: x float32 (H, W, C), as drawn for (seed, epoch, index).

        `occurrence` tells apart images that belong to one sample, or one sample drawn repeatedly. Returns `out`, of
        the shape of x, or a new array.
        """
        rng = np.random.default_rng([self.seed, self._epoch, int(index), occurrence])
        x = self.generator.apply_transform(x, self.generator.get_random_transform(x.shape, rng), out)
        standardized = self.generator.standardize(x, copy=False)
        if standardized is not x:  # a preprocessing function may return another array
            x[...] = standardized
        if self.options.save_to_dir:
            self._save(x, index, occurrence)
        return x

    def _save(self, x, index, occurrence):
        if self.generator.data_format == "channels_first":
            x = np.moveaxis(x, 0, -1)
        x = x - x.min()
        again = f"_{occurrence}" if occurrence else ""
        name = f"{self.options.save_prefix}_{self._epoch}_{index}{again}.{self.options.save_format}"
        write_img(Path(self.options.save_to_dir, name), np.rint(x * (255 / max(float(x.max()), 1e-7))).astype(np.uint8))

    def _with_labels(self, x, classes, there=slice(None)):
        """Return (x, y), (x, y, weights) or x, after class_mode and auto_batch_balance.

        there: places of the samples that count; the others get one-hot labels of zeros, and no weight.
        """
        if self.class_mode is None:
            return x
        if self.class_mode == "categorical":
            y = np.zeros((len(classes), self.nb_class), np.float32)
            y[there] = np.eye(self.nb_class)[classes[there]]
        else:
            y = classes.astype(np.float32 if self.class_mode == "binary" else np.int64)
        if not self.options.auto_batch_balance:
            return x, y
        weights = np.zeros(len(classes), np.float32)
        weights[there] = batch_weights(classes[there])
        return x, y, weights


def default_workers(workers: int | None) -> int:
    """Return the number of threads that is asked for: NUM_CPU_CORES, or 4, where it is None."""
    return env_int("NUM_CPU_CORES", 4, minimum=1) if workers is None else workers


def check_one_size(names: Sequence[str], images: Sequence[np.ndarray]) -> None:
    """Raise InputError, with the name of the first that differs, unless images have one shape."""
    for name, x in zip(names, images, strict=True):
        if x.shape != images[0].shape:
            raise InputError(
                f"{name}: images of a batch differ in size. Expected {images[0].shape}. "
                f"Received {x.shape}; set target_size."
            )


def batch_weights(classes: np.ndarray) -> np.ndarray:
    """Return 1 / (frequency of each sample's class among `classes`), float32 (n,) (as published)."""
    _, position, count = np.unique(classes, return_inverse=True, return_counts=True)
    return np.float32(1) / (count / len(classes)).astype(np.float32)[position]


class SampleIterator(DMIterator):
    """Iterate over samples of one tensor each: subclasses give `load(index)`, float32 (H, W, C) unaugmented."""

    def _make_batch(self, index, rng):
        drawn = index
        for attempt in range(_MAX_ATTEMPTS):  # others take the place of a whole batch, such as a batch of one
            index = (drawn + attempt * len(drawn)) % self.nb_sample
            images = self._map(self.load_or_none, index)
            there = [place for place, image in enumerate(images) if image is not None]
            if there:
                break
        else:
            raise InputError(f"none of {_MAX_ATTEMPTS * len(drawn)} images can be read, such as {self._name(drawn[0])}")
        check_one_size([self._name(index[place]) for place in there], [images[place] for place in there])
        batch = empty_aligned((len(index), *images[there[0]].shape))

        def fill(place):
            sample, occurrence = index[place], int((index[:place] == index[place]).sum())
            self._augment(images[place], sample, occurrence, batch[place])

        self._map(fill, there)
        for place in set(range(len(index))).difference(there):  # a batch keeps its size
            batch[place] = batch[there[place % len(there)]]
        if self.options.preprocess is not None:
            # Those of keras.applications return views of reversed channels, which PyTorch does not take.
            batch = np.ascontiguousarray(self.options.preprocess(batch), np.float32)
        weighted = [] if attempt else there
        return self._with_labels(batch, None if self.classes is None else self.classes[index], weighted)

    def load(self, index: int) -> np.ndarray:
        """Read sample `index`."""
        raise NotImplementedError

    def load_or_none(self, index: int) -> np.ndarray | None:
        """Read sample `index`, or return None where another one takes its place."""
        return self.load(index)


class DMNumpyArrayIterator(SampleIterator):
    """Iterate over images in an array x (N, H, W, C) and labels y.

    y: class numbers (N,), one-hot rows (N, classes), or None; returned as they were given. Other arguments: see
    `Batches`, and `data_format_of`.
    """

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray | None,
        image_data_generator,
        batch_size: int = 32,
        auto_batch_balance: bool = True,
        no_pos_skip: float = 0.0,
        balance_classes: float = 0.0,
        preprocess: Callable | None = None,
        shuffle: bool = False,
        seed: int | None = None,
        data_format: str = "default",
        save_to_dir: str | Path | None = None,
        save_prefix: str = "",
        save_format: str = "jpeg",
        *,
        workers: int | None = None,
    ):
        batches = Batches.of(locals(), class_mode="sparse")
        data_format_of(image_data_generator, data_format)
        self.x = np.asarray(x)
        if self.x.ndim != 4:
            raise InputError(f"flow: Expected images of shape (N, H, W, C). Received {self.x.shape}.")
        if y is not None and len(y) != len(self.x):
            raise InputError(f"flow: Expected as many labels as images, {len(self.x)}. Received {len(y)}.")
        self.y = None if y is None else np.asarray(y)
        classes = None if y is None else to_sparse(y).astype(np.int64)
        nb_class = None if y is None else int(classes.max()) + 1
        super().__init__(image_data_generator, len(self.x), classes, nb_class, batches)

    def load(self, index: int) -> np.ndarray:
        return self.x[index].astype(np.float32)

    def _make_batch(self, index, rng):
        batch = super()._make_batch(index, rng)
        return batch if self.y is None else (batch[0], self.y[index], *batch[2:])


def data_format_of(generator: Any, asked: str | None) -> str:
    """Return the data format of a generator, which is the one that is asked for, "default" or None."""
    if asked not in ("default", None, generator.data_format):
        raise InputError(f"data_format: Expected that of the generator, {generator.data_format}. Received {asked}.")
    return generator.data_format


def found(what: str, classes: np.ndarray | None, n: int) -> str:
    """Return how many samples there are, such as "3 images: 1 of class 0, 2 of class 1"."""
    numbers = [] if classes is None else zip(*np.unique(classes, return_counts=True), strict=True)
    by_class = ", ".join(f"{count} of class {number}" for number, count in numbers)
    return counted(n, what) + (f": {by_class}" if by_class else "")


def check_labels(img_list: Sequence, lab_list: Sequence | None) -> None:
    """Raise InputError unless there is a label for each image, or None."""
    if lab_list is not None and len(lab_list) != len(img_list):
        raise InputError(f"Expected as many labels as images, {len(img_list)}. Received {len(lab_list)}.")


# ------------------------------------------------------------------------------------- labels and class balance


def to_sparse(y: np.ndarray | Sequence) -> np.ndarray:
    """Return the class numbers of labels that are one-hot rows (n, classes) or class numbers (n,) already.

    Raises InputError where a row is not one-hot, TypeError for arrays of more than two dimensions.
    """
    y = np.asarray(y)
    if y.ndim == 1:
        return y
    if y.ndim != 2:
        raise TypeError(f"Labels: Expected shape (n,) or (n, classes). Received {y.shape}.")
    if not (np.isin(y, (0, 1)).all() and (y.sum(axis=1) == 1).all()):
        raise InputError("Labels: Expected one-hot rows (a single 1, else 0). Received rows that are not.")
    return y.argmax(axis=1)


def index_balancer(
    index_array: np.ndarray | Sequence[int],
    classes: np.ndarray | Sequence[int],
    ratio: float,
    rng: np.random.RandomState | np.random.Generator,
) -> np.ndarray:
    """Draw len(index_array) of its elements with replacement, sorted, negatives to positives as `ratio` to 1.

    As published. classes: (n,) class numbers, 1 being positive and all others negative. With a single kind, all are
    equally likely.
    """
    index_array, positive = np.asarray(index_array), np.asarray(classes) == 1
    nb_positive = positive.sum()
    probability = np.ones(len(index_array))
    if 0 < nb_positive < len(positive):
        probability = np.where(positive, 1 / nb_positive, ratio / (len(positive) - nb_positive))
    return np.sort(rng.choice(index_array, len(index_array), p=probability / probability.sum()))


def sample_images(iterator: SampleIterator, nb_images: int = 32) -> list[np.ndarray]:
    """Load up to `nb_images` images, evenly spread, before augmentation and mean subtraction."""
    chosen = np.linspace(0, iterator.nb_sample - 1, min(nb_images, iterator.nb_sample)).astype(int)
    images = [image for image in map(iterator.load_or_none, chosen) if image is not None]
    return [image * iterator.generator.rescale for image in images] if iterator.generator.rescale else images
