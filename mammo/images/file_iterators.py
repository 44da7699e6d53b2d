"""Batches of image files: in lists, or in one folder a class; see `iterators` for what all batches have in common."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mammo.base.files import InputError
from mammo.base.work import run_parallel
from mammo.images.check import ImageCheck, check_images
from mammo.images.iterators import Batches, SampleIterator, check_labels, data_format_of, default_workers, found
from mammo.images.pixels import Pixels, pixels_of
from mammo.images.reading import IMAGE_SUFFIXES, ImageError, check_constant, is_image

_NO_IMAGES = f"no images in this class folder. Expected {', '.join(IMAGE_SUFFIXES)}."


class _FileIterator(SampleIterator):
    """Iterate over image files, read for each batch or once into memory.

    Args:
        paths, names: the files, and what to call them in `.filenames`.
        pixels: how the images are read.
        load_to_ram: keep the resized images as one array (N, H, W) of the files' integer type, read at once by
            `workers` threads. Batches are the same as from disk.
        on_error: "stop": an unreadable image raises InputError when it is read. "skip": all are read now, and
            those that cannot be are left out. With one-hot labels, one that cannot be read later is lost: another, of
            its batch where one is left, takes its place with a label of zeros and no weight. `.skipped` lists both, as
            messages.
        checked: what is known of the files, by their absolute names (`check.ImageCheck`): "skip" need not read
            them now then. Images that are not what they were are unreadable.
        allow_constant: whether an image whose pixels are all equal is readable. A patch may well be so; a whole
            mammogram is broken.
    """

    def __init__(
        self,
        generator,
        paths: Sequence[str | Path],
        names: Sequence[str],
        classes: Sequence[int] | None,
        nb_class: int | None,
        batches: Batches,
        pixels: Pixels,
        load_to_ram: bool,
        on_error: str,
        checked: dict[str, ImageCheck] | None,
        allow_constant: bool,
    ):
        if on_error not in ("stop", "skip"):
            raise InputError(f"on_error: Expected stop or skip. Received {on_error!r}.")
        if load_to_ram and (pixels.size is None or pixels.height is not None):
            raise InputError("load_to_ram: Expected target_size and no target_height, so that all images fit.")
        self.pixels = pixels
        self._allow_constant = allow_constant
        self._paths, self.filenames = list(paths), list(names)
        self.nb_file = len(self._paths)
        self._left_out, self._lost = [], {}  # messages, and those of samples lost later
        self._ram = self._checks = None
        if load_to_ram:
            errors = self._read_to_ram(on_error, default_workers(batches.workers))
        elif checked is not None:
            self._checks = [checked[_absolute(path)] for path in self._paths]
        elif on_error == "skip":
            self._checks = check_images(self._paths, None, allow_constant, batches.workers, pixels.gs_255)
        if self._checks is not None:
            errors = [check.message for check in self._checks]
        if load_to_ram or self._checks is not None:
            self._left_out = [error for error in errors if error]
            if self._left_out and on_error == "stop":
                raise InputError(self._left_out[0])
            classes = None if classes is None else np.asarray(classes)
            classes = self._keep([index for index, error in enumerate(errors) if not error], classes)
        super().__init__(generator, len(self._paths), classes, nb_class, batches)
        self._replaces = on_error == "skip" and self.class_mode == "categorical"

    @property
    def file_sizes(self) -> list[int]:
        """Return the bytes of each file, as they were when it was checked, if it was."""
        if self._checks is None:
            return [os.path.getsize(path) for path in self._paths]
        return [check.bytes for check in self._checks]

    @property
    def skipped(self) -> list[str]:
        """Return what is wrong with each image that was left out or lost."""
        return [*self._left_out, *(message for _, message in sorted(self._lost.copy().items()))]

    def _keep(self, good, classes):
        """Go on with the samples `good` alone; return their classes."""
        self._paths, self.filenames = ([files[i] for i in good] for files in (self._paths, self.filenames))
        if self._checks is not None:
            self._checks = [self._checks[i] for i in good]
        if self._ram is not None and len(good) < len(self._ram):
            for place, index in enumerate(good):
                self._ram[place] = self._ram[index]
            self._ram = self._ram[: len(good)]
        return None if classes is None else classes[good]

    def _read(self, index):
        path = self._paths[index]
        img = self.pixels.read_stored(path)
        if self._checks is not None:
            check = self._checks[index]
            if (img.dtype.name, *img.shape) != (check.type, check.rows, check.columns):
                raise ImageError(
                    f"{path}: the image has changed. Expected {check.rows} x {check.columns} pixels of {check.type}, "
                    f"as when it was checked. Received {img.shape[0]} x {img.shape[1]} of {img.dtype}.",
                    "changed",
                )
        img = self.pixels.resize(path, img)
        return img if self._allow_constant else check_constant(path, img)

    def load(self, index: int) -> np.ndarray:
        img = self._read(index) if self._ram is None else self._ram[index]
        return self.pixels.to_input(self._paths[index], img)

    def _name(self, index):
        return self._paths[index]

    def load_or_none(self, index: int) -> np.ndarray | None:
        try:
            return self.load(index)
        except InputError as error:
            if not self._replaces:
                raise
            self._lost[int(index)] = str(error)
            return None

    def _read_to_ram(self, on_error, workers):
        """Read every file with `workers` threads; list what is wrong with each, None for good ones."""
        workers = self._make_ram(workers)

        def read(index):
            try:
                img = self._read(index)
            except InputError as error:
                if on_error == "stop":
                    raise
                return str(error)
            if self._ram is not None:
                if img.dtype != self._ram.dtype:
                    raise InputError(
                        f"{self._paths[index]}: load_to_ram needs one pixel type. Expected {self._ram.dtype}. "
                        f"Received {img.dtype}; convert the files or switch load_to_ram off."
                    )
                self._ram[index] = img  # right here: images waiting for their place would add to the peak
            return None

        return list(run_parallel(read, range(len(self._paths)), workers, "threading", "read images"))

    def _make_ram(self, workers):
        """Allocate the array for all images; return how many threads can read them without adding much to it."""
        for path in self._paths:
            try:
                source = self.pixels.read_stored(path)
            except InputError:
                continue
            self._ram = np.empty((len(self._paths), *map(int, self.pixels.size)), source.dtype)
            # A reader holds the file's bytes and the decoded image, then that and the resized one. Files differ in
            # size, so this is well below the tenth that the peak may be above what is kept.
            reading = source.nbytes + max(os.path.getsize(path), self._ram[0].nbytes)
            return min(workers, max(1, self._ram.nbytes // 16 // reading))
        return workers


class DMImgListIterator(_FileIterator):
    """Iterate over image files in a list, with class numbers (0 or 1) in another, or None.

    Args:
        img_list, lab_list: files, and a class number for each, or None.
        target_size, target_scale, gs_255, data_format; target_height, rescale_factor, equalize_hist, dup_3_channels:
            how images are read, see `read_img_for_pred`; `pixels` stands for all of them.
        validation_mode: no shuffling, skipping or balancing. all_neg_skip: no_pos_skip of `Batches`.
        verbose: print how many images there are of each class.
        load_to_ram, on_error, checked, allow_constant: see `_FileIterator`.
        Others: see `Batches`.
    """

    def __init__(
        self,
        img_list: Sequence[str | Path],
        lab_list: Sequence[int] | None,
        image_data_generator,
        target_size: tuple[int, int] | None = (1152, 896),
        target_scale: float | None = 4095,
        gs_255: bool = False,
        data_format: str = "default",
        class_mode: str | None = "binary",
        validation_mode: bool = False,
        balance_classes: float = False,
        all_neg_skip: float = 0.0,
        batch_size: int = 32,
        shuffle: bool = True,
        seed: int | None = None,
        save_to_dir: str | Path | None = None,
        save_prefix: str = "",
        save_format: str = "jpeg",
        verbose: bool = True,
        *,
        target_height: int | None = None,
        rescale_factor: float | None = None,
        equalize_hist: bool = False,
        dup_3_channels: bool = False,
        pixels: Pixels | None = None,
        auto_batch_balance: bool = False,
        preprocess: Callable | None = None,
        load_to_ram: bool = False,
        on_error: str = "stop",
        checked: dict[str, ImageCheck] | None = None,
        allow_constant: bool = True,
        workers: int | None = None,
    ):
        check_labels(img_list, lab_list)
        batches = Batches.of(locals(), no_pos_skip=all_neg_skip)
        super().__init__(
            image_data_generator,
            img_list,
            [str(path) for path in img_list],
            lab_list,
            _count_classes(lab_list),
            batches.for_validation() if validation_mode else batches,
            pixels_of(locals(), data_format_of(image_data_generator, data_format)),
            load_to_ram,
            on_error,
            checked,
            allow_constant,
        )
        if verbose:
            print(found("image", self.classes, self.nb_sample))


def _count_classes(labels):
    """Count at least two: a list may happen to hold one class only."""
    return None if labels is None or not len(labels) else max(2, int(max(labels)) + 1)


class DMDirectoryIterator(_FileIterator):
    """Iterate over image files in one folder a class, found at any depth, sorted.

    Args:
        directory: folder of the class folders.
        target_size, target_scale, gs_255, equalize_hist, rescale_factor, dup_3_channels, data_format; target_height:
            how images are read, see `read_img_for_pred`; `pixels` stands for all of them.
        classes: names of the class folders in the order of the outputs; by default all sub-folders, sorted.
        allow_empty: accept class folders without images, as long as one has some.
        follow_links: also descend into linked folders.
        load_to_ram, on_error, allow_constant: see `_FileIterator`.
        checked: see there. Its files are the images then, whether or not they are still there.
        Others: see `Batches`.

    `.filenames` are relative to `directory`; `.class_indices` maps class names to numbers; `.empty_classes` lists the
    class folders without images.
    """

    def __init__(
        self,
        directory: str | Path,
        image_data_generator,
        target_size: tuple[int, int] | None = (256, 256),
        target_scale: float | None = None,
        gs_255: bool = False,
        equalize_hist: bool = False,
        rescale_factor: float | None = None,
        dup_3_channels: bool = False,
        data_format: str = "default",
        classes: Sequence[str] | None = None,
        class_mode: str | None = "categorical",
        auto_batch_balance: bool = False,
        batch_size: int = 32,
        preprocess: Callable | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        save_to_dir: str | Path | None = None,
        save_prefix: str = "",
        save_format: str = "jpeg",
        follow_links: bool = False,
        *,
        target_height: int | None = None,
        pixels: Pixels | None = None,
        no_pos_skip: float = 0.0,
        balance_classes: float = 0.0,
        allow_empty: bool = False,
        load_to_ram: bool = False,
        on_error: str = "stop",
        checked: dict[str, ImageCheck] | None = None,
        allow_constant: bool = True,
        workers: int | None = None,
    ):
        batches = Batches.of(locals())
        pixels = pixels_of(locals(), data_format_of(image_data_generator, data_format))
        self.directory = directory = Path(directory)
        files = find_classes(directory, classes, follow_links, checked)
        self.class_indices = {name: number for number, name in enumerate(files)}
        self.empty_classes = []
        names, labels = [], []
        for name, number in self.class_indices.items():
            if not files[name]:
                self.empty_classes.append(str(directory / name))
                if not allow_empty:
                    raise InputError(f"{directory / name}: {_NO_IMAGES}")
            names += files[name]
            labels += [number] * len(files[name])
        if not names:
            raise InputError(f"{directory}: {_NO_IMAGES}")
        super().__init__(
            image_data_generator,
            [directory / name for name in names],
            names,
            labels,
            len(self.class_indices),
            batches,
            pixels,
            load_to_ram,
            on_error,
            checked,
            allow_constant,
        )


def find_classes(
    directory: str | Path,
    classes: Sequence[str] | None = None,
    follow_links: bool = False,
    checked: dict[str, ImageCheck] | None = None,
) -> dict[str, list[str]]:
    """List the images in each class folder of `directory`, relative to it and sorted; see `DMDirectoryIterator`.

    Raises InputError for a missing folder, and for `classes` that repeat a name.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such folder. Expected a folder with one sub-folder a class.")
    if not classes:
        classes = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    if not classes:
        raise InputError(f"{directory}: Expected one sub-folder a class. Received none.")
    if len(set(classes)) < len(classes):
        raise InputError(f"class folders (classes): Expected each name once. Received {' '.join(classes)}.")
    if checked is None:
        return {name: _find_images(directory, name, follow_links) for name in classes}
    root = f"{_absolute(directory)}/"
    known = sorted(file.removeprefix(root) for file in checked if file.startswith(root))
    return {name: [file for file in known if file.startswith(f"{name}/")] for name in classes}


def _find_images(directory, class_name, follow_links):
    folder = directory / class_name
    if not folder.is_dir():
        raise InputError(f"{folder}: class folder not found; name the folders in --class-list (classes).")
    return sorted(
        Path(root, name).relative_to(directory).as_posix()
        for root, _, files in os.walk(folder, followlinks=follow_links)
        for name in files
        if is_image(name)
    )


def _absolute(path):
    return str(Path(path).absolute())
