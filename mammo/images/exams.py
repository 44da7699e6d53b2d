"""Batches of exams, two breasts of two views each, and of patches around bright spots; see `iterators`."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mammo.base.files import InputError, naming
from mammo.images.breast import DMImagePreprocessor, detect_blobs
from mammo.images.iterators import Batches, DMIterator, check_labels, check_one_size, data_format_of, found
from mammo.images.pixels import Pixels, pixels_of


class DMExamListIterator(DMIterator):
    """Iterate over exams of both breasts in two views; a batch holds left and right breasts in turn.

    Args:
        exam_list: dicts with "subj", "exam", and "L" and "R", each a dict with "CC" and "MLO" (a list of files,
            or None) and "cancer" (0, 1 or None); or tuples (subj, exam, {"L": ..., "R": ...}).
        target_size, target_scale, gs_255, data_format; target_height, rescale_factor, equalize_hist, dup_3_channels:
            how images are read, see `read_img_for_pred`; `pixels` stands for all of them.
        validation_mode: no shuffling; the first image of each view. Otherwise a view's image is drawn.
        prediction_mode: no shuffling; all images of each view.
        all_neg_skip, balance_classes: no_pos_skip and balance_classes of `Batches`, an exam counting as positive
            unless both breasts are known to be negative (as published).
        verbose: print how many exams there are of each kind.
        Others: see `Batches`.

    A view without an image is black, of target_size. Batches are ((cc, mlo), y), float32 (2 * exams, H, W, C) each,
    as a model of two inputs takes them, or [cc, mlo] with class_mode None. In prediction mode: (subj, exam, cc,
    mlo[, y]), where cc and mlo hold a list of images a breast.
    """

    def __init__(
        self,
        exam_list: Sequence[dict | tuple],
        image_data_generator: Any,
        target_size: tuple[int, int] | None = (1152, 896),
        target_scale: float | None = 4095,
        gs_255: bool = False,
        data_format: str = "default",
        class_mode: str | None = "binary",
        validation_mode: bool = False,
        prediction_mode: bool = False,
        balance_classes: float = False,
        all_neg_skip: float = 0.0,
        batch_size: int = 16,
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
        workers: int | None = None,
    ):
        batches = Batches.of(locals(), no_pos_skip=all_neg_skip)
        self.exams = [e if isinstance(e, dict) else {"subj": e[0], "exam": e[1], **e[2]} for e in exam_list]
        self.pixels = pixels_of(locals(), data_format_of(image_data_generator, data_format))
        if self.pixels.size is None:
            self._check_no_view_is_missing()
        self.prediction_mode, self.validation_mode = prediction_mode, validation_mode
        cancer = np.array([[exam[side].get("cancer") for side in "LR"] for exam in self.exams], np.float64)
        self.cancer = np.nan_to_num(cancer).astype(int)
        classes = (cancer != 0).any(axis=1).astype(int) if self.exams else None
        if validation_mode or prediction_mode:
            batches = batches.for_validation()
        super().__init__(image_data_generator, len(self.exams), classes, 2, batches)
        if verbose:
            print(found("exam", self.classes, self.nb_sample))

    def _make_batch(self, index, rng):
        views = {"CC": [], "MLO": []}
        for i, side, view in product(index, "LR", views):
            files = _view_files(self.exams[i][side].get(view))
            if not self.prediction_mode:
                drawn = 0 if self.validation_mode or not files else rng.permutation(len(files))[0]
                files = files[drawn : drawn + 1]
            place = "LR".index(side) * 2 + (view == "MLO")
            images = enumerate(map(self.load, files or [None]))
            tensors = [self._augment(x, i, place + 4 * number) for number, x in images]
            views[view].append(tensors if self.prediction_mode else tensors[0])
        classes = self.cancer[index].ravel()
        if not self.prediction_mode:
            for view, images in views.items():
                check_one_size([f"{self._exam_name(i)}, {side} {view}" for i in index for side in "LR"], images)
            cc_mlo = [np.stack(images) for images in views.values()]
            # Keras takes a tuple for the inputs of a model, a list for one tensor; but (cc, mlo) alone for (x, y).
            return self._with_labels(cc_mlo if self.class_mode is None else tuple(cc_mlo), classes)
        batch = self._with_labels(None, classes)
        y = () if batch is None else batch[1:]
        return ([self.exams[i]["subj"] for i in index], [self.exams[i]["exam"] for i in index], *views.values(), *y)

    def load(self, fname: str | Path | None) -> np.ndarray:
        """Read a file, or make the black image of a view without one."""
        if fname is not None:
            return self.pixels.read(fname)
        return self.pixels.to_input("black image", np.zeros(self.pixels.size, np.uint8))

    def _exam_name(self, index):
        return f"exam {self.exams[index]['exam']} of {self.exams[index]['subj']}"

    def _check_no_view_is_missing(self):
        for i, side, view in product(range(len(self.exams)), "LR", ("CC", "MLO")):
            if not _view_files(self.exams[i][side].get(view)):
                expected = "Expected a target_size, which the black image in its place would have. Received None."
                raise InputError(f"{self._exam_name(i)}: no image of {side} {view}. {expected}")


def _view_files(files):
    """List the file names of a view given as a list, a table with a `filename` column, or None."""
    if files is None:
        return []
    return list(files["filename"] if hasattr(files, "columns") else files)


class DMCandidROIIterator(DMIterator):
    """Iterate over patches around bright spots of images, labelled by their image or as background by a classifier.

    Args:
        img_list, lab_list: files, and 1 (cancer) or 0 for each, or None.
        target_height, target_scale, gs_255, data_format; target_size, rescale_factor, equalize_hist, dup_3_channels:
            how images are read, see `read_img_for_pred`; `pixels` stands for all of them. The breast is then cut out.
        img_per_batch, roi_per_img, roi_size: images a batch, patches an image, (rows, columns) of a patch.
        low_int_threshold: see `DMImagePreprocessor.segment_breast`.
        blob_min_area, blob_min_int, blob_max_int, blob_th_step: spot detector; intensities as fractions of the
            maximum. An image without spots gives patches at random places.
        roi_clf, clf_bs, cutpoint, amp_factor: a model that scores patches (n, rows, columns, channels), clf_bs
            at a time; amp_factor * roi_per_img patches are scored and the best roi_per_img kept; those below
            `cutpoint` become background.
        class_mode: "categorical" with three classes (background, cancer, no cancer), "sparse" the same as
            numbers, "binary" the image's label; None for no labels.
        one_patch_mode: only the best patch of each image, with the image's label; needs class_mode "binary".
        return_sample_weight: also give weights: 1 / (class frequency in the batch) with auto_batch_balance, else ones.
        return_raw_img: also give the list of images the patches were cut from, last.
        validation_mode: no shuffling or skipping. all_neg_skip: no_pos_skip of `Batches`.
        tf_graph: without effect; models need no graph of TensorFlow any more.
        verbose: print how many images there are of each class.
        Others: see `Batches`.
    """

    def __init__(
        self,
        image_data_generator: Any,
        img_list: Sequence[str | Path],
        lab_list: Sequence[int] | None = None,
        target_height: int | None = 1024,
        target_scale: float | None = 4095,
        gs_255: bool = False,
        data_format: str = "default",
        class_mode: str | None = "categorical",
        validation_mode: bool = False,
        img_per_batch: int = 2,
        roi_per_img: int = 32,
        roi_size: tuple[int, int] = (256, 256),
        one_patch_mode: bool = False,
        low_int_threshold: float = 0.05,
        blob_min_area: int = 3,
        blob_min_int: float = 0.5,
        blob_max_int: float = 0.85,
        blob_th_step: int = 10,
        tf_graph: Any = None,
        roi_clf: Any = None,
        clf_bs: int = 32,
        cutpoint: float = 0.5,
        amp_factor: float = 1.0,
        return_sample_weight: bool = True,
        auto_batch_balance: bool = True,
        all_neg_skip: float = 0.0,
        shuffle: bool = True,
        seed: int | None = None,
        return_raw_img: bool = False,
        save_to_dir: str | Path | None = None,
        save_prefix: str = "",
        save_format: str = "jpeg",
        verbose: bool = True,
        *,
        target_size: tuple[int, int] | None = None,
        rescale_factor: float | None = None,
        equalize_hist: bool = False,
        dup_3_channels: bool = False,
        pixels: Pixels | None = None,
        workers: int | None = None,
    ):
        check_labels(img_list, lab_list)
        if one_patch_mode and roi_clf is None:
            raise InputError("one_patch_mode: Expected a classifier (roi_clf) that tells which patch is best.")
        weighted = return_sample_weight and auto_batch_balance
        options = {"batch_size": img_per_batch, "no_pos_skip": all_neg_skip, "auto_batch_balance": weighted}
        batches = Batches.of(locals(), **options)
        self.filenames = [str(path) for path in img_list]
        self.pixels = pixels_of(locals(), data_format_of(image_data_generator, data_format))
        self.roi_per_img, self.roi_size = roi_per_img, tuple(roi_size)
        self.low_int_threshold = low_int_threshold
        self._blob_args = {"min_area": blob_min_area, "min_int": blob_min_int}
        self._blob_args |= {"max_int": blob_max_int, "th_step": blob_th_step}
        self.roi_clf, self.clf_bs, self.cutpoint = roi_clf, clf_bs, cutpoint
        self.nb_candidates = int(roi_per_img * amp_factor)
        self.one_patch_mode, self.return_raw_img = one_patch_mode, return_raw_img
        self._equal_weights = return_sample_weight and not auto_batch_balance
        if validation_mode:
            batches = batches.for_validation()
        nb_class = 2 if class_mode == "binary" else 3
        super().__init__(image_data_generator, len(self.filenames), lab_list, nb_class, batches)
        if verbose:
            print(found("image", self.classes, self.nb_sample))

    def _make_batch(self, index, rng):
        patches, classes, raw_imgs = [], [], []
        for i in index:
            raw_imgs.append(img := self._read_breast(i))
            candidates = get_roi_patches(img, self._key_points(img, rng), self.roi_size)
            x = [self._as_input(patch) for patch in candidates]
            kept, kept_classes = self._choose(x, None if self.classes is None else int(self.classes[i]))
            patches += [self._augment(x[k], i, k) for k in kept]
            classes += kept_classes
        batch = self._with_labels(np.stack(patches), np.array(classes))
        if self._equal_weights and isinstance(batch, tuple):
            batch = (*batch, np.ones(len(patches), np.float32))
        if self.return_raw_img:
            batch = (*batch, raw_imgs) if isinstance(batch, tuple) else (batch, raw_imgs)
        return batch

    def _read_breast(self, index):
        fname = self.filenames[index]
        img = self.pixels.rescale(self.pixels.resize(fname, self.pixels.read_stored(fname)), fname)
        with naming(fname):
            return DMImagePreprocessor.segment_breast(img, low_int_threshold=self.low_int_threshold)[0]

    def _key_points(self, img, rng):
        """Choose points (nb_candidates, 2) of x, y: centres of groups of spots, spots drawn again, or random places."""
        n = self.nb_candidates
        spots = detect_blobs(img, max(self.roi_size), **self._blob_args)[:, :2]
        if len(spots) == 0:
            return np.stack([rng.randint(0, length, n) for length in img.shape[::-1]], axis=1)
        return clust_kpts(spots, n) if len(spots) >= n else spots[rng.choice(len(spots), n)]

    def _as_input(self, patch):
        axis = 2 if self.generator.data_format == "channels_last" else 0
        return np.repeat(np.expand_dims(patch, axis), self.pixels.channels, axis=axis)

    def _choose(self, x, label):
        """Return which of the candidates x to keep, and their classes."""
        if self.roi_clf is None:
            return range(len(x)), [self._patch_class(label)] * len(x)
        standardized = np.stack([self.generator.standardize(patch) for patch in x])
        score = np.asarray(self.roi_clf.predict(standardized, batch_size=self.clf_bs))
        score = score.ravel() if score.ndim < 2 or score.shape[1] == 1 else 1 - score[:, 0]
        ranked = np.argsort(score, kind="stable")
        if self.one_patch_mode:
            return ranked[-1:], [self._patch_class(label)]
        kept = np.sort(ranked[-self.roi_per_img :])
        background = score[kept] < self.cutpoint
        return kept, [0 if is_background else self._patch_class(label) for is_background in background]

    def _patch_class(self, label):
        return label if self.nb_class == 2 or label is None else 2 - label


def get_roi_patches(img: np.ndarray, key_pts: np.ndarray, roi_size: tuple[int, int] = (256, 256)) -> np.ndarray:
    """Cut patches (n, rows, columns) around the points (n, 2) of x, y, in the type of `img` (as published).

    A patch that would start before the image is moved to start with it; beyond its end it is zero.
    """
    rows, columns = roi_size
    patches = np.zeros((len(key_pts), rows, columns), img.dtype)
    for patch, (x, y) in zip(patches, key_pts, strict=True):
        top, left = max(int(y - rows // 2), 0), max(int(x - columns // 2), 0)
        inside = img[top : top + rows, left : left + columns]
        patch[: inside.shape[0], : inside.shape[1]] = inside
    return patches


def clust_kpts(key_pts: np.ndarray, nb_clust: int, seed: int = 12345) -> np.ndarray:
    """Return the centres (nb_clust, 2) of a k-means clustering of the points (n, 2) of x, y."""
    from sklearn.cluster import KMeans

    return KMeans(nb_clust, n_init=10, random_state=seed).fit(np.asarray(key_pts, np.float32)).cluster_centers_
