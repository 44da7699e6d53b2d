#!/usr/bin/env python
"""Speed of the parts that a training run waits for, each against what it replaces, in the same process.

    python scripts/benchmark.py                 all sections
    python scripts/benchmark.py augmentation    named ones

Every section prints a table and checks that both ways give the same numbers.
"""

import argparse
import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from ddsm_train import sample_patches_combined as sampler
from dm_image import DMImageDataGenerator
from mammo.base.cli import HelpFormatter, complete, positive_int
from mammo.base.files import atomic_write, write_img
from mammo.data.patch_rules import Roi, sample_patches
from mammo.data.patches import mask_name, plan_patches, read_breast, read_lesions, read_sampled, sample_image
from mammo.images.warp import empty_aligned
from mammo.phantom.prepared import make_phantom
from mammo.train.backend import start_backend

# The augmentation of the published training runs.
SETTINGS = {"rotation_range": 25.0, "shear_range": 0.2, "zoom_range": (0.8, 1.2), "channel_shift_range": 20.0}
SETTINGS |= {"horizontal_flip": True, "vertical_flip": True}

PATCH, WHOLE = (224, 224), (1152, 896)


def transform_of_2017(x, rng):
    """The 2017 rule, plainly: SciPy channel by channel, shift and clip, flips. x: float32 (H, W, C)."""
    from scipy import ndimage

    rows, columns, _ = x.shape
    limit = SETTINGS["rotation_range"]
    theta = np.pi / 180 * rng.uniform(-limit, limit)
    shear = rng.uniform(-SETTINGS["shear_range"], SETTINGS["shear_range"])
    zx, zy = rng.uniform(*SETTINGS["zoom_range"], 2)
    rotation = np.array([[np.cos(theta), -np.sin(theta), 0], [np.sin(theta), np.cos(theta), 0], [0, 0, 1]])
    shearing = np.array([[1, -np.sin(shear), 0], [0, np.cos(shear), 0], [0, 0, 1]])
    matrix = rotation @ shearing @ np.diag([zx, zy, 1])
    centre = np.array([[1, 0, rows / 2 + 0.5], [0, 1, columns / 2 + 0.5], [0, 0, 1]])
    back = np.array([[1, 0, -rows / 2 - 0.5], [0, 1, -columns / 2 - 0.5], [0, 0, 1]])
    matrix = centre @ matrix @ back
    planes = [
        ndimage.affine_transform(plane, matrix[:2, :2], matrix[:2, 2], order=0, mode="nearest")
        for plane in np.moveaxis(x, 2, 0)
    ]
    low, high = np.min(planes), np.max(planes)
    limit = SETTINGS["channel_shift_range"]
    shifted = [np.clip(plane + rng.uniform(-limit, limit), low, high) for plane in planes]
    x = np.stack(shifted, axis=2)
    if rng.random() < 0.5:
        x = x[:, ::-1]
    if rng.random() < 0.5:
        x = x[::-1]
    return x


def phantom(rows, columns, rng):
    """float32 (rows, columns) in 0..255 with detail at all scales, black on one side as in a mammogram."""
    img = sum(cv2.resize(rng.random((rows // k, columns // k), dtype=np.float32), (columns, rows)) for k in (1, 4, 16))
    img[:, : columns // 3] = 0
    return img * np.float32(255 / 3)


def clock():
    """(2,) seconds: wall time and this process's processor time."""
    return np.array([time.perf_counter(), time.process_time()])


def fastest(function, repeats, number=1):
    """Shortest (wall time, processor time) of a call, seconds, of so many means over `number` calls."""
    times = []
    for _ in range(repeats):
        start = clock()
        for _ in range(number):
            function()
        times.append((clock() - start) / number)
    return np.min(times, axis=0)


def table(columns):
    """Print the header of a table, "name:format ..." with "_" for a space; return what prints a row."""
    names, forms = zip(*(column.split(":") for column in columns.split()), strict=True)
    print(*(f"{name.replace('_', ' '):>{form.partition('.')[0]}}" for name, form in zip(names, forms, strict=True)))
    return lambda *cells: print(*(f"{cell:>{form}}" for cell, form in zip(cells, forms, strict=True)), flush=True)


def by_size(size):
    return "{}x{}".format(*size)


def augmentation(args):
    """Random transform of one image into its place in a batch, drawing included, on one thread: the 2017 rule with
    SciPy against dm_image. Means over several draws, fastest of many such means.
    Channels: one repeated as a view (what the iterators use), equal copies, or three different ones.
    """
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    row = table("size:10 channels:10 2017_ms:9.3f ours_ms:9.3f images/s:9.0f ratio:6.1f pixels_that_differ:20")
    for size in (WHOLE, PATCH):
        img = phantom(*size, rng)
        for name, x in {
            "repeated": np.broadcast_to(img[..., None], (*size, 3)),
            "copies": np.repeat(img[..., None], 3, axis=2),
            "different": np.stack([img, img[::-1], img[:, ::-1]], axis=2),
        }.items():
            old, new, different = compare_transforms(x, args.cases)
            different = f"{different} of {args.cases * x.size}"
            row(by_size(size), name, old * 1e3, new * 1e3, 1 / new, old / new, different)


def compare_transforms(x, cases):
    """(seconds by the 2017 rule, by dm_image, pixels that differ in so many cases) of images like x (H, W, C)."""
    generator, draws = DMImageDataGenerator(**SETTINGS), np.random.RandomState(1)
    plain = np.ascontiguousarray(x)
    different = 0
    for seed in range(cases):
        ours = generator.random_transform(x, np.random.RandomState(seed))
        different += np.count_nonzero(ours != transform_of_2017(plain, np.random.RandomState(seed)))
    batch = empty_aligned((2, *x.shape))
    batch[...] = 0

    def old():
        batch[0] = transform_of_2017(plain, draws)

    def new():
        generator.apply_transform(x, generator.get_random_transform(x.shape, draws), out=batch[1])

    number = 4 if len(x) > 500 else 32
    # Alternating, so that both see the same of what else the machine does.
    return *np.min([(fastest(old, 2, number)[0], fastest(new, 8, number)[0]) for _ in range(6)], axis=0), different


def loading(args):
    """Batches of 8 augmented images 576x448x3 from 16-bit PNG files, images/s, from disk and from memory, by number of
    loader threads.
    """
    rng = np.random.default_rng(0)
    generator = DMImageDataGenerator(**SETTINGS)
    how = {"target_size": (576, 448), "batch_size": 8, "seed": 0, "dup_3_channels": True, "rescale_factor": 0.003891}
    with tempfile.TemporaryDirectory() as folder:
        for name, k in itertools.product(("neg", "pos"), range(24)):
            write_img(Path(folder, name, f"{k}.png"), (phantom(576, 448, rng) * 257).astype(np.uint16))
        row = table("source:8 1_workers:11.0f 2_workers:11.0f 4_workers:11.0f")
        for source in ("disk", "memory"):
            speeds = []
            for workers in (1, 2, 4):
                images = generator.flow_from_directory(folder, load_to_ram=source == "memory", workers=workers, **how)
                speeds.append(images.nb_sample / fastest(functools.partial(list, images), 3)[0])
            row(source, *speeds)


def overlap_of_2017(mask, x, y, patch_size):
    """The 2017 rule, plainly: a mask of the patch as large as the image, against the lesion's."""
    half = patch_size // 2
    patch = np.zeros(mask.shape, np.uint8)
    patch[y - half : y + half, x - half : x + half] = 1
    shared = (mask * patch).sum()
    return max(shared / patch.sum(), shared / mask.sum())


def centres_of_2017(mask, count, patch_size, pos_cutoff=0.75, neg_cutoff=0.35):
    """`count` centres on and off the lesion of `mask` (padded, 0 or 1), drawn as in 2017; list of (x, y)."""
    rng = np.random.RandomState(12345)
    half = patch_size // 2
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    left, top, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
    lesion, background = [], []
    while len(lesion) < count:
        x, y = int(rng.randint(left, left + width)), int(rng.randint(top, top + height))
        if overlap_of_2017(mask, x, y, patch_size) >= pos_cutoff:
            lesion.append((x, y))
    while len(background) < count:
        x, y = (int(rng.randint(half, size - half)) for size in mask.shape[::-1])
        if overlap_of_2017(mask, x, y, patch_size) < neg_cutoff:
            background.append((x, y))
    return lesion + background


class Study:
    """A phantom data set, for the patch sampler: 10 patches of 256 pixels on each lesion, 10 beside the first."""

    count, patch_size = 10, 256

    def __init__(self, folder, patients, height, width):
        self.root = Path(folder)
        size = {"height": height, "width": width}
        make_phantom(self.root, patients=patients, views=("CC",), **size, test_size=0, val_size=0)
        names = ("roi_mask_path.csv", "roi_mask", "pat_train.txt", "full_img", "out/train", "out/val")
        self.paths = [self.root / name for name in names]
        self.options = {"target_height": height, "nb_abn": self.count, "nb_bkg": self.count, "nb_hns": 0}
        self.options |= {"val_size": 0.0, "verbose": False}
        self.args = complete(sampler.make_parser(), self.options, self.paths)
        # Images of one lesion: the others sample more patches than the rest of the table counts.
        lesions = read_lesions(self.args.roi_mask_path_file)
        views = [lesion[:3] for lesion in lesions]
        self.lesions = [lesion for lesion in lesions if views.count(lesion[:3]) == 1]

    def sample(self, lesion):
        """All of one image: from its files to its patches on disk."""
        class_dirs = {("calc", True): "cm", ("calc", False): "cb", ("mass", True): "mm", ("mass", False): "mb"}
        return sample_image(plan_patches([lesion], self.args, class_dirs), self.args, class_dirs, self.root / "out")

    def sample_all(self, jobs):
        """All images anew, without a word; seconds."""
        shutil.rmtree(self.root / "out", ignore_errors=True)  # patches that are there would be kept
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            return fastest(lambda: sampler.run(*self.paths, **self.options, jobs=jobs), 1)[0]

    def image(self, lesion):
        return self.root / "full_img" / f"{lesion.image_id}.png"

    def compare_with_2017(self, lesion):
        """(seconds to choose centres by the 2017 rule, by patch_rules, seconds of all with ours, whether all agree)."""
        breast = read_breast(self.image(lesion), self.args)
        mask = read_sampled(self.root / "roi_mask" / mask_name(lesion), self.args)
        mask = mask[breast.top : breast.top + breast.height, breast.left : breast.left + breast.width]
        half, img = self.patch_size // 2, breast.padded
        padded = np.pad((mask > 0).astype(np.uint8), half)

        def ours():
            roi = Roi.from_mask(mask, half, img.shape)
            numbers = {"nb_abn": self.count, "nb_bkg": self.count, "nb_hns": 0}
            patches, _ = sample_patches(img, roi, [roi], patch_size=self.patch_size, **numbers)
            return [(patch.x, patch.y) for patch in patches]

        def old():
            return centres_of_2017(padded, self.count, self.patch_size)

        functions = (old, ours, functools.partial(self.sample, lesion))
        return *(fastest(function, 3)[0] for function in functions), ours() == old()

    def compare_with_files_alone(self, lesion):
        """(seconds to decode the image of a lesion and to encode its patches, seconds of all)."""
        files = [self.root / "out" / file for file in self.sample(lesion).outputs]
        patches = [cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in files]

        def alone():
            cv2.imread(str(self.image(lesion)), cv2.IMREAD_UNCHANGED)
            for patch in patches:
                cv2.imencode(".png", patch)

        return fastest(alone, 5)[0], fastest(functools.partial(self.sample, lesion), 5)[0]


def sampling(args):
    """Choosing the centres of 10 + 10 patches, and all of it (decode, segment, choose, encode, write), ms an image of
    4096 x 3328: the 2017 rule with masks as large as the image against patch_rules, fastest of 3.
    """
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        row = table("image:18 2017:8.1f ours:8.2f ratio:6.0f all_2017:9.1f all_ours:9.1f ratio:6.1f centres:12")
        study = Study(Path(folder, "large"), 6, 4096, 3328)
        for lesion in study.lesions[:3]:
            *times, same = study.compare_with_2017(lesion)
            plain, choose, whole = np.multiply(times, 1e3)
            all_plain = whole - choose + plain
            ratios = plain / choose, all_plain, whole, all_plain / whole
            row(lesion.image_id, plain, choose, *ratios, "the same" if same else "NOT the same")

        print("\nAll of it against decoding the image and encoding the patches alone, ms, images 1152 x 896,")
        print("fastest of 5")
        row = table("image:18 alone:7.1f ours:7.1f ratio:6.2f")
        study = Study(Path(folder, "small"), 80, *WHOLE)
        for lesion in study.lesions[:4]:
            alone, ours = study.compare_with_files_alone(lesion)
            row(lesion.image_id, alone * 1e3, ours * 1e3, ours / alone)

        print(
            "\nTwo processes against one, all images of the set, started before, five times in turn; with the load of"
        )
        print("the machine before (1 is one processor)")
        row = table("one_s:7.2f two_s:7.2f ratio:6.2f load:5.1f")
        # The one is a fresh process like the two, not this one: large images drawn here have left it memory to reuse.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            alone.submit(study.sample_all, 1).result()
            study.sample_all(2)
            for _ in range(5):
                load = os.getloadavg()[0]
                one, two = alone.submit(study.sample_all, 1).result(), study.sample_all(2)
                row(one, two, one / two, load)


# The published top layers: two of [512-512-1024]x2, and two of 512x1.
TOPS = {
    "resnet50": {"block_type": "resnet", "depths": (512, 512), "repetitions": (2, 2), "bottleneck_enlarge_factor": 2},
    "vgg16": {"block_type": "vgg", "depths": (512, 512), "repetitions": (1, 1)},
}
BATCH = {PATCH: 16, WHOLE: 2}


def set_environment(variables):
    os.environ.update(variables)


def fresh_process(threads):
    """An executor of one process, which Keras or PyTorch have to themselves, with so many threads."""
    environment = dict.fromkeys(("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS"), str(threads))
    environment |= {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_environment, (environment,))


def build_network(net, size, top=None):
    """An untrained patch classifier of five classes, or a whole-image classifier of two with these options on one."""
    start_backend()
    from dm_keras_ext import get_dl_model
    from dm_resnet import add_top_layers

    model = get_dl_model(net, nb_class=5, use_pretrained=False)[0]
    return model if size == PATCH else add_top_layers(model, size, patch_net=net, **top or TOPS[net])[0]


def hold(batches, count=None):
    """PyDataset of the first `count` of `batches`; in memory where those are."""
    import keras

    class Held(keras.utils.PyDataset):
        def __len__(self):
            return len(batches) if count is None else count

        def __getitem__(self, i):
            return batches[i]

    return Held()


def fit_first(model, data):
    """Compile as the trainers do when all layers train, and fit an epoch of `data`; its loss."""
    from dm_keras_ext import Stage, train_stages

    with contextlib.redirect_stdout(io.StringIO()):
        return train_stages(model, [Stage(1, 1e-5, 0)], data, hold([data[0]]), optim="adam")[0]["loss"]


class Contestant:
    """A network in a process of its own, and the batch that it computes on; `instance` is that process's."""

    instance = None

    def __init__(self, size):
        rng = np.random.default_rng(0)
        self.x = np.stack([phantom(*size, rng)] * BATCH[size])[..., None].repeat(3, axis=3) - np.float32(52)
        self.x += rng.normal(0, 20, self.x.shape).astype(np.float32)  # images of a batch differ
        nb_class = 5 if size == PATCH else 2
        self.y = np.eye(nb_class, dtype=np.float32)[np.arange(BATCH[size]) % nb_class]
        self.weights = np.linspace(0.5, 2, BATCH[size], dtype=np.float32)

    @classmethod
    def start(cls, *args):
        Contestant.instance = cls(*args)
        return Contestant.instance.facts()

    @staticmethod
    def seconds(step):
        """(wall time, processor time of all threads) of a step"""
        return fastest(getattr(Contestant.instance, step), 1)


class Ours(Contestant):
    def __init__(self, net, size):
        from mammo.train.checkpoint import leaf_layers

        super().__init__(size)
        self.model = build_network(net, size)
        # Normalised by this batch's statistics: else the outputs of an untrained network saturate, and agree always.
        norms = [layer for layer in leaf_layers(self.model) if hasattr(layer, "moving_mean")]
        for layer in norms:
            layer.momentum, usual = 0.0, layer.momentum
        self.model(self.x, training=True)
        for layer in norms:
            layer.momentum = usual

    def facts(self):
        """(layers for `TorchNetwork`, whether on a GPU, predictions, cross-entropy of the first step)"""
        import keras

        from scripts.torch_network import describe

        if keras.backend.backend() == "torch":
            import torch

            gpu = torch.cuda.is_available()
        else:
            gpu = bool(keras.distribution.list_devices("gpu"))
        layers, predictions = describe(self.model), self.predict()
        penalty = sum(map(float, self.model.losses))
        loss = fit_first(self.model, hold([(self.x, self.y, self.weights)])) - penalty
        self.train()
        return layers, gpu, predictions, loss

    def predict(self):
        return self.model.predict_on_batch(self.x)

    def train(self):
        return self.model.train_on_batch(self.x, self.y, self.weights)


class Torch(Contestant):
    def __init__(self, size, *args):
        from scripts.torch_network import TorchNetwork

        super().__init__(size)
        self.network = TorchNetwork(*args)

    def facts(self):
        """(predictions, cross-entropy of the first step)"""
        predictions, loss = self.predict(), self.train()
        self.train()
        return predictions, loss

    def predict(self):
        return self.network.predict(self.x)

    def train(self):
        return self.network.train(self.x, self.y, self.weights)


def networks(args):
    """Training and prediction, images/s, of our networks and of the same ones in PyTorch, a process of --threads each,
    in turn, fastest of --rounds. Ratios: ours to PyTorch's, of wall time and of processor time (the steadier on a
    shared machine); above 1 is faster. Differences: of predictions and of the first step's loss, of one network.
    """
    if importlib.util.find_spec("torch") is None:
        print("skipped: PyTorch is not installed. For this section: pip install torch")
        return
    columns = "network:9 size:10 batch:5 step:8 ours:7.2f PyTorch:8.2f ratio:6.2f of_CPU:6.2f differences:14 load:5.1f"
    row = table(columns)
    for size, net in itertools.product((PATCH, WHOLE), TOPS):
        with fresh_process(args.threads) as ours, fresh_process(args.threads) as other:
            layers, gpu, *mine = ours.submit(Ours.start, net, size).result()
            theirs = other.submit(Torch.start, size, layers, args.threads, "cuda" if gpu else "cpu").result()
            differences = " ".join(f"{np.abs(a - b).max():.0e}" for a, b in zip(mine, theirs, strict=True))
            for step in ("train", "predict"):
                load = os.getloadavg()[0]
                rounds = [
                    [process.submit(Contestant.seconds, step).result() for process in (ours, other)]
                    for _ in range(args.rounds)
                ]
                (wall, cpu), (torch_wall, torch_cpu) = np.min(rounds, axis=0)
                speeds = BATCH[size] / wall, BATCH[size] / torch_wall, torch_wall / wall, torch_cpu / cpu
                row(net, by_size(size), BATCH[size], step, *speeds, differences, load)


def class_folders(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def training_set(folder, size, model, workers):
    """What the trainers would train `model` on, with the published augmentation."""
    from ddsm_train import image_clf_train, patch_clf_train, training

    os.environ["NUM_CPU_CORES"] = str(workers)
    options = {"batch_size": BATCH[size], "img_size": list(size), "rescale_factor": 0.003891, "best_model": "NOSAVE"}
    options |= {"featurewise_center": True, "augmentation": True, "auto_batch_balance": True}
    options |= {"class_list": class_folders(folder)}
    parser = (patch_clf_train if size == PATCH else image_clf_train).make_parser()
    args = complete(parser, options, [str(folder)] * 3)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return training.make_sets(args, model.input_shape[-1], allow_constant=True)[0]


def smallest_network(size, folder):
    """A network that costs next to nothing, so that a pause after each step can stand in for a fast one."""
    start_backend()
    import keras

    image = keras.Input((*size, 3))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.MaxPooling2D(1, strides=32)(image))
    return keras.Model(image, keras.layers.Dense(len(class_folders(folder)), "softmax")(features))


def load(size, folder, workers, steps):
    """(wall time, processor time) of loading so many batches, fastest of 3."""
    train_set = training_set(folder, size, smallest_network(size, folder), workers)
    return fastest(lambda: [train_set[i] for i in range(steps)], 3)


def feed(net, size, folder, workers, steps, rounds, pause=0.0):
    """(wall time, processor time) of so many steps of `fit`, fastest of the rounds: with real loading; in memory.

    The first batch, for which nothing but the loader can run, counts. `net` None: `smallest_network`, with a pause.
    """
    model = build_network(net, size) if net else smallest_network(size, folder)
    import keras

    train_set = training_set(folder, size, model, workers)
    held = hold([train_set[i] for i in range(steps)])
    fit_first(model, hold(held, 1))
    times = ([], [])
    for _ in range(rounds):
        for data, column in zip((hold(train_set, steps), held), times, strict=True):
            marks = []
            callback = keras.callbacks.LambdaCallback(
                on_epoch_begin=lambda epoch, logs, marks=marks: marks.append(clock()),
                on_train_batch_end=lambda batch, logs: time.sleep(pause),
                on_epoch_end=lambda epoch, logs, marks=marks: marks.append(clock()),
            )
            model.fit(data, shuffle=False, verbose=0, callbacks=[callback])
            column.append(marks[1] - marks[0])
    return np.min(times, axis=1)


def feeding(args):
    """Training on augmented 16-bit PNG files against training on the same batches in memory."""
    with tempfile.TemporaryDirectory() as folder:
        study = Study(folder, 48, *WHOLE)
        study.options["patch_size"] = PATCH[0]
        study.sample_all(args.threads)
        folders = {PATCH: study.root / "out" / "train", WHOLE: study.root / "train"}
        workers = sorted({1, 2, args.threads})

        def alone(function, *arguments):
            with fresh_process(args.threads) as process:
                return process.submit(function, *arguments).result()

        print("Loading alone, images/s, and images a second of processor time")
        row = table(" ".join(["size:10", *(f"{n}_{what}:10.0f" for what in ("workers", "CPU") for n in workers)]))
        for size, source in folders.items():
            speeds = [16 * BATCH[size] / alone(load, size, source, n, 16) for n in workers]
            row(by_size(size), *np.transpose(speeds).ravel())

        print(f"\nA step of `fit`, s, loader and network on the same {args.threads} processors: target 1.1")
        row = table("network:9 size:10 memory:8.2f files:8.2f ratio:6.2f of_processor_time:18.2f load:5.1f")
        for size, net in ((PATCH, "resnet50"), (WHOLE, "resnet50"), (WHOLE, "vgg16")):
            before, steps = os.getloadavg()[0], 6 if size == PATCH else 3
            files, memory = alone(feed, net, size, folders[size], args.threads, steps, args.rounds) / steps
            row(net, by_size(size), memory[0], files[0], files[0] / memory[0], files[1] / memory[1], before)

        print("\nThe same with a network elsewhere, for which a pause after each step stands: ratio by its speed")
        for size, speeds in ((PATCH, (100, 200, 400, 800)), (WHOLE, (5, 10, 20, 40))):
            row = table(" ".join([f"{by_size(size)}:10", *(f"{speed}/s:8.2f" for speed in speeds), "load:5.1f"]))
            for n in workers:
                before = os.getloadavg()[0]
                pauses = [BATCH[size] / speed for speed in speeds]
                times = [alone(feed, None, size, folders[size], n, 16, args.rounds, pause) for pause in pauses]
                row(f"{n} workers", *(files[0] / memory[0] for files, memory in times), before)


def heatmap(args):
    """Maps of a patch classifier over one image 1152 x 896, seconds: all windows of 224 pixels, 32 apart, against one
    forward propagation of the image; the faster of 2, both ways in turns. Arithmetic: pixels of all windows to those of
    the image. Difference: of the map of an image of one window, from that window's probabilities.
    """
    start_backend()
    from dm_resnet import add_top_layers
    from mammo.images.pixels import Pixels
    from mammo.maps.compute import ForwardPropagation, Scan, Sweep

    def forward_propagation(size):
        return ForwardPropagation(add_top_layers(model, size, patch_net=net, return_heatmap=True), Pixels(size))

    patch, stride = PATCH[0], 32
    grid = [(size - patch) // stride + 1 for size in WHOLE]
    batch_size = grid[0] * grid[1] // 10  # of equal batches, so that nothing idle is computed
    row = table(
        "network:9 windows:10.1f once:10.2f ratio:10.1f of_CPU:10.1f arithmetic:10.1f difference:10.0e load:10.1f"
    )
    image = np.maximum(phantom(*WHOLE, np.random.default_rng(0)), 1)
    arithmetic = grid[0] * grid[1] * patch**2 / (WHOLE[0] * WHOLE[1])
    for net in ("resnet50", "vgg16"):
        model = build_network(net, PATCH)
        sweep = Sweep(model, WHOLE[0], patch, stride, batch_size)
        forward = forward_propagation(WHOLE)
        window = image[:patch, :patch]
        alone = forward_propagation(PATCH).score(Scan("window", window, None))
        difference = np.abs(alone - sweep.score(Scan("window", window, None))).max()
        sweep.score(Scan("warm-up", image[: patch + stride * 10, : patch + stride * 5], None))  # 66 windows
        maps = forward.score(Scan("warm-up", image, None))
        load = os.getloadavg()[0]
        times = {sweep: [], forward: []}
        assert maps.shape == (*grid, 5)
        for scorer in (sweep, forward) * 2:
            times[scorer].append(fastest(functools.partial(scorer.score, Scan("image", image, None)), 1))
        (windows, windows_cpu), (once, once_cpu) = (np.min(rounds, axis=0) for rounds in times.values())
        row(net, windows, once, windows / once, windows_cpu / once_cpu, arithmetic, difference, load)


FC16_8 = {"add_heatmap": True, "hm_pool_size": (3, 3), "add_conv": False, "fc_init_units": 16, "add_shortcut": True}

# Networks of the memory table: name -> (patch net, image size, options of add_top_layers; None: the patch net alone).
MEMORY_NETS = {
    "ResNet50 patches": ("resnet50", PATCH, None),
    "VGG16 patches": ("vgg16", PATCH, None),
    "ResNet50 [512-512-1024]x2": ("resnet50", WHOLE, TOPS["resnet50"]),
    "VGG16 512x1": ("vgg16", WHOLE, TOPS["vgg16"]),
    "VGG16 [512-512-1024]x2": ("vgg16", WHOLE, TOPS["resnet50"]),
    "Yaroslav heatmap FC16-8": ("yaroslav", WHOLE, FC16_8),
}

MEMORY_BATCHES = {PATCH: (32, 64, 128, 256), WHOLE: (1, 2, 4, 8, 16)}
GIB = 2**30


def memory_models(name):
    """Yield (way, model) for a network of `MEMORY_NETS`, as the trainers train it with the options of that way."""
    net, size, top = MEMORY_NETS[name]
    model = build_network(net, size, top)
    from mammo.train.memory import mixed_precision, rematerialize

    yield "plain", model
    yield "remat", rematerialize(model, size)
    mixed_precision(model)
    yield "mixed", model
    yield "mixed+remat", rematerialize(model, size)


def device_peak():
    """Peak bytes that this process has held on its GPU, or None without one."""
    import keras

    if keras.backend.backend() == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    if keras.backend.backend() == "jax":
        import jax

        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    import tensorflow as tf

    return tf.config.experimental.get_memory_info("GPU:0")["peak"] if tf.config.list_physical_devices("GPU") else None


def measured_peak(name, way, batch):
    """Peak bytes of two training steps on this process's GPU; NaN when they do not fit."""
    start_backend()
    from mammo.train.keras2 import WeightedCrossentropy, create_optimizer

    model = next(model for this, model in memory_models(name) if this == way)
    model.compile(create_optimizer("adam", 1e-5), WeightedCrossentropy())
    x = np.zeros((batch, *MEMORY_NETS[name][1], model.input_shape[-1]), np.float32)
    y = np.eye(model.output_shape[-1], dtype=np.float32)[np.zeros(batch, int)]
    try:
        for _ in range(2):
            model.train_on_batch(x, y)
    except Exception as error:  # each backend has its own for this
        if any(word in str(error).lower() for word in ("out of memory", "oom", "resource_exhausted")):
            return np.nan
        raise
    return device_peak()


def memory(args):
    """Peak memory of a training step, all layers and Adam, GiB, by network, batch and the options that reduce it, as
    estimated from the graph, and measured where there is a GPU, in brackets. Fits: the largest batch estimated at
    --gib, less 1 for what is not counted.
    """
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # the measuring processes need the GPU
    start_backend()
    import pandas as pd

    from mammo.train.memory import half_type, training_memory

    measures, rows = half_type() == "float16", []
    for name, (_, size, _) in MEMORY_NETS.items():
        for way, model in memory_models(name):
            one = training_memory(model, 1, size, optimizer_slots=2)
            image = one.activations + one.transient
            fixed = one.total - image
            fits = int(((args.gib - 1) * GIB - fixed) // image)
            cells = []
            for batch in MEMORY_BATCHES[size]:
                estimated, measured = fixed + batch * image, None
                if measures:
                    with fresh_process(args.threads) as alone:  # the peak is that of a process
                        measured = alone.submit(measured_peak, name, way, batch).result()
                rows.append((name, *size, way, batch, estimated, measured, fits))
                cells.append(f"{batch}: {estimated / GIB:5.2f}" + (f" ({measured / GIB:.2f})" if measures else ""))
            print(f"{name:>25} {way:>11}  fits {fits:3d}   {'  '.join(cells)}", flush=True)
    if args.out:
        names = ["network", "rows", "columns", "way", "batch", "estimated_bytes", "measured_bytes", "largest_batch"]
        with atomic_write(Path(args.out)) as temporary:
            pd.DataFrame(rows, columns=names).to_csv(temporary, index=False)


SECTIONS = {f.__name__: f for f in (augmentation, loading, sampling, networks, feeding, heatmap, memory)}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("section", nargs="*", help=f"which to run: {', '.join(SECTIONS)} (default: all)")
    add("--cases", type=int, default=40, help="random cases compared pixel by pixel for each row")
    add("--rounds", type=positive_int, default=3, help="of networks and feeding, in turn")
    add("--threads", type=positive_int, default=len(os.sched_getaffinity(0)), help="of each network")
    add("--gib", type=positive_int, default=8, help="memory of the device of the memory section")
    add("--out", metavar="CSV", help="file for the table of the memory section")
    args = parser.parse_args(argv)
    if unknown := set(args.section) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    for name in args.section or SECTIONS:
        print(f"\n== {name} ==\n{inspect.getdoc(SECTIONS[name])}")
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
