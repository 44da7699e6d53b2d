#!/usr/bin/env python
"""Speed of the parts that a training run waits for, each against what it replaces, in the same process.

    python scripts/benchmark.py                 all sections
    python scripts/benchmark.py augmentation    named ones

Every section prints a table and checks that both ways give the same numbers.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dm_image import DMImageDataGenerator

# The augmentation of the published training runs.
SETTINGS = {
    "rotation_range": 25.0,
    "shear_range": 0.2,
    "zoom_range": (0.8, 1.2),
    "channel_shift_range": 20.0,
    "horizontal_flip": True,
    "vertical_flip": True,
}


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


def fastest(function, repeats):
    """Shortest wall time of a call, seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def augmentation(args):
    """Random transform of one image into its place in a batch, drawing included, on one thread."""
    cv2.setNumThreads(1)
    generator = DMImageDataGenerator(**SETTINGS)
    rng = np.random.default_rng(0)
    draws = np.random.RandomState(1)
    print("One random transform into a batch, one thread, fastest of many: the 2017 rule with SciPy against dm_image.")
    print("Channels: one repeated as a view (what the iterators use), equal copies, or three different ones.")
    print(
        f"{'size':>10} {'channels':>10} {'2017 ms':>9} {'ours ms':>9} {'images/s':>9} {'ratio':>6}  pixels that differ"
    )
    for rows, columns in ((1152, 896), (224, 224)):
        img = phantom(rows, columns, rng)
        for name, x in {
            "repeated": np.broadcast_to(img[..., None], (rows, columns, 3)),
            "copies": np.repeat(img[..., None], 3, axis=2),
            "different": np.stack([img, img[::-1], img[:, ::-1]], axis=2),
        }.items():
            plain = np.ascontiguousarray(x)
            different = total = 0
            for seed in range(args.cases):
                ours = generator.random_transform(x, np.random.RandomState(seed))
                different += np.count_nonzero(ours != transform_of_2017(plain, np.random.RandomState(seed)))
                total += ours.size
            batch = np.zeros((2, rows, columns, 3), np.float32)

            def old(plain=plain, batch=batch):
                batch[0] = transform_of_2017(plain, draws)

            def new(x=x, batch=batch):
                generator.apply_transform(x, generator.get_random_transform(x.shape, draws), out=batch[1])

            old, new = (fastest(function, 30 if rows > 500 else 300) for function in (old, new))
            size = f"{rows}x{columns}"
            print(
                f"{size:>10} {name:>10} {old * 1e3:9.3f} {new * 1e3:9.3f} {1 / new:9.0f} {old / new:6.1f}"
                f"  {different} of {total}"
            )


def loading(args):
    """Augmented batches of 16-bit PNG files, from disk and from memory, by number of loader threads."""
    rng = np.random.default_rng(0)
    generator = DMImageDataGenerator(**SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("neg", "pos"):
            Path(folder, name).mkdir()
            for k in range(24):
                pixels = (phantom(576, 448, rng) * 257).astype(np.uint16)
                cv2.imwrite(str(Path(folder, name, f"{k}.png")), pixels)
        print("Batches of 8 augmented images 576x448x3 from 16-bit PNG files, images/s")
        print(f"{'source':>8}" + "".join(f"{f'{n} workers':>12}" for n in (1, 2, 4)))
        for source in ("disk", "memory"):
            speeds = []
            for workers in (1, 2, 4):
                images = generator.flow_from_directory(
                    folder,
                    target_size=(576, 448),
                    batch_size=8,
                    seed=0,
                    dup_3_channels=True,
                    rescale_factor=0.003891,
                    load_to_ram=source == "memory",
                    workers=workers,
                )
                speeds.append(images.nb_sample / fastest(lambda images=images: [x for x, _ in images], 3))
            print(f"{source:>8}" + "".join(f"{speed:12.0f}" for speed in speeds))


SECTIONS = {"augmentation": augmentation, "loading": loading}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", help=f"which to run: {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--cases", type=int, default=40, help="random cases compared pixel by pixel for each row")
    args = parser.parse_args(argv)
    unknown = set(args.section) - set(SECTIONS)
    if unknown:
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    for name in args.section or SECTIONS:
        print(f"\n== {name} ==")
        SECTIONS[name](args)


if __name__ == "__main__":
    main()
