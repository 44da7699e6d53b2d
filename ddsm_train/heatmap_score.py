#!/usr/bin/env python
"""Map where a trained network sees lesions: probability maps of a patch classifier, Grad-CAM of an image classifier.

  mammo heatmaps full_img patch.h5 --fprop-mode --pat-csv pat_side_cancer.csv --out maps.npz
  mammo heatmaps full_img image.h5 --pat-csv pat_side_cancer.csv --out cam.npz --overlay pictures

A patch classifier sweeps the breast window by window, or with --fprop-mode sees the whole image at once, 25 times
faster or more. A whole-image classifier is explained by Grad-CAM. Pixel options and the size of windows default to
those of the model's training (args.json in the folder named as the model without its ending), else to the published
program's. A killed run, started again with the same options, goes on where it was; a finished one draws its pictures.
"""

import argparse
import functools
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mammo.base import cli
from mammo.base.files import InputError, counted, locked, naming, remove_partial
from mammo.base.work import run_parallel
from mammo.data.splits import read_patient_list
from mammo.images import pixels
from mammo.maps import compute
from mammo.maps.files import HeatmapRecord, check_map_name
from mammo.train import backend

if TYPE_CHECKING:
    import keras

# Usual class names, by their number.
CLASSES = {
    2: ["neg", "pos"],
    3: ["background", "malignant", "benign"],
    5: ["background", "calc_mal", "calc_ben", "mass_mal", "mass_ben"],
}

# The published program's defaults, for models that do not tell what they were trained with.
PUBLISHED = {"img_size": [1152, 896], "img_scale": None, "rescale_factor": None, "equalize_hist": False}
PUBLISHED |= {"featurewise_center": False, "featurewise_mean": 71.8, "class_list": None, "patch_size": 256}

# The options that maps depend on, of all modes and of each.
SHARED_OPTIONS = ("img_scale", "rescale_factor", "equalize_hist", "featurewise_center", "featurewise_mean")
MODE_OPTIONS = {
    "sweep": ("img_height", "patch_size", "stride"),
    "fprop": ("img_size", "segment_breast", "avg_pool_size", "hm_strides"),
    "gradcam": ("img_size", "segment_breast", "grad_cam_layer"),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    add_image_options(parser)
    add_map_options(parser)
    add_picture_options(parser)
    add_sweep_options(parser)
    add_fprop_options(parser)
    add_grad_cam_options(parser)
    return parser


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add which mammograms and which model, and how the pixels of the first are brought to the second."""
    add = parser.add_argument
    add("img_folder", help="folder of the mammograms: <patient_id>_<side>_<CC|MLO>.png")
    add("dl_state", help="trained model: a patch classifier or a whole-image classifier")
    pixels.add_pixel_options_of_model(parser)
    text = "blank all but the breast, so labels at which Grad-CAM may point; windows are always cut from it alone"
    cli.add_flag(parser, "--segment-breast", False, text)
    add("--pat-csv", default="./full_img/pat.csv", help="table of breasts with the columns patient_id,side,cancer")
    text = "map these patients alone: one id a line; a header line patient_id may come first"
    cli.add_optional(parser, "--pat-list", metavar="FILE", help=text)


def add_map_options(parser: argparse.ArgumentParser) -> None:
    """Add where the maps go, and how the work is done."""
    add = parser.add_argument
    text = "map file to write: .npz (a name without ending becomes one), .h5, or .pkl, the published program's"
    add("--out", default="./output/prob_heatmap.pkl", help=text)
    add("--class-list", nargs="+", metavar="CLASS", help="names of the classes; default: as trained, else usual ones")
    text = "what an image at fault, or a patient without images, does: end the run, or be left out and listed"
    add("--on-error", choices=["stop", "skip"], default="stop", help=text)
    add("--fresh", action="store_true", help="start over, and replace the maps of an earlier run")
    add("--jobs", type=cli.positive_int, default=2, help="images read at the same time, while the network works")
    add("--trust-checkpoint", action="store_true", help="open a model file even where it holds Python code")


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of pictures of the maps."""
    add = parser.add_argument_group("pictures").add_argument
    add("--overlay", metavar="DIR", help="draw each class on the mammogram: <DIR>/<image>.png")
    text = "with --overlay, outline lesions: <Calc|Mass>-<set>_<image>_<abn_num>.png"
    add("--roi-mask-dir", metavar="DIR", help=text)


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compute.Sweep`."""
    group = parser.add_argument_group("patch classifier, sliding windows")
    text = "height that images are resized to, their shape kept; default: that of --img-size"
    cli.add_optional(group, "--img-height", "-ih", type=cli.positive_int, help=text)
    add = group.add_argument
    text = "height and width of a window; default: as trained, else 256"
    add("--patch-size", type=cli.positive_int, default=pixels.OF_MODEL, help=text)
    add("--stride", type=cli.positive_int, default=8, help="pixels from window to window")
    add("--batch-size", type=cli.positive_int, default=128, help="windows held in memory and predicted at a time")


def add_fprop_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compute.ForwardPropagation`."""
    group = parser.add_argument_group("patch classifier, the whole image at once")
    cli.add_flag(group, "--fprop-mode", False, "apply the network to the image, resized to --img-size, at once")
    add = group.add_argument
    add("--net", default="vgg19", help="network of the patch classifier; its layers themselves say what it is")
    text = "features averaged for a cell, as a patch gave: 7 of stride 32 for 224 pixels, 3 of YaroslavNet's stride 64"
    add("--avg-pool-size", nargs=2, type=cli.positive_int, default=[7, 7], help=text)
    add("--hm-strides", nargs=2, type=cli.positive_int, default=[1, 1], help="features from cell to cell")


def add_grad_cam_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `compute.GradCam`."""
    add = parser.add_argument_group("whole-image classifier").add_argument
    text = "explain the model by Grad-CAM; default: if it has a network inside, as whole-image classifiers have"
    add("--grad-cam", action=argparse.BooleanOptionalAction, help=f"{text}. --no-grad-cam: it is a patch classifier")
    text = "which feature map: the last one, or the finer one of the patch net; default: patch if there is one"
    add("--grad-cam-layer", choices=["last", "patch"], help=text)


def run(*paths, **options) -> None:
    """Write the maps and pictures; arguments as on the command line, in its order or by keyword."""
    args = cli.complete(make_parser(), options, paths)
    args.out = args.out if Path(args.out).suffix else f"{args.out}.npz"
    check_map_name(args.out)
    check_scoring_options(args)
    breasts, faults = find_breasts(with_options_of_model(args)[0])

    backend.start_backend()
    from mammo.train import checkpoint

    model = checkpoint.load_model(args.dl_state, args.trust_checkpoint)
    checkpoint.check_one_image(model, args.dl_state)
    if model.output_shape[-1] < 2:
        raise InputError(f"{args.dl_state}: Expected at least two classes. Received {model.output_shape[-1]}")
    args, source = with_options_of_model(args, model.input_shape[1:3])
    scorer, class_names = make_scorer(model, args), name_classes(model, args)
    print(f"{args.dl_state}: {source}")
    kept = {name: getattr(args, name) for name in (*SHARED_OPTIONS, *MODE_OPTIONS[scorer.mode])}
    # The same model may lie elsewhere on another machine.
    kept |= {"dl_state": Path(args.dl_state).name, "dl_state_crc32": zlib.crc32(Path(args.dl_state).read_bytes())}
    work = {"class_names": class_names, "jobs": args.jobs, "on_error": args.on_error, "fresh": args.fresh}
    with locked(Path(args.out).parent, Path(args.out).name):
        records, at_fault = compute.score_breasts(breasts, scorer, args.out, options=kept, **work)
    faults += at_fault
    nb_map = sum(1 for record in records for _ in record.views())
    window, strides = (" x ".join(f"{size:g}" for size in sizes) for sizes in (scorer.window, scorer.strides))
    print(f"{counted(nb_map, 'map')} of {counted(len(records), 'breast')} in {args.out} ({scorer.mode})")
    print(f"Their cells stand for {window} pixels of the scored image and are {strides} pixels apart")
    if args.overlay is not None:
        faults += draw_pictures(records, class_names, scorer.mode, args)
    if faults:
        print(f"{len(faults)} left out:", *faults, sep="\n  ")


def check_scoring_options(args: argparse.Namespace) -> None:
    """Raise InputError for options that contradict each other, or that would have no effect without a word."""
    if args.fprop_mode and args.grad_cam:
        raise InputError("--fprop-mode and --grad-cam: Expected one of them")
    if args.grad_cam_layer is not None and (args.fprop_mode or args.grad_cam is False):
        raise InputError("--grad-cam-layer: Expected Grad-CAM. Received --fprop-mode or --no-grad-cam")
    if args.overlay is not None and Path(args.overlay).resolve() == Path(args.img_folder).resolve():
        raise InputError(f"--overlay {args.overlay}: Expected another folder than that of the mammograms")
    if args.roi_mask_dir is not None:
        if args.overlay is None:
            raise InputError("--roi-mask-dir: outlines lesions in pictures: Expected --overlay with it")
        if not Path(args.roi_mask_dir).is_dir():
            raise InputError(f"--roi-mask-dir {args.roi_mask_dir}: no such folder")


def with_options_of_model(args: argparse.Namespace, built: Sequence[int | None] = ()) -> tuple[argparse.Namespace, str]:
    """Return the options, those not given as the model was trained, else the published ones; and where they come from.

    built: (rows, columns) that the model is built for, if known. What patches were resized to is the size of windows,
    and not of mammograms. Raises InputError for a damaged file beside the model.
    """
    chosen, source = pixels.choose_pixel_options(vars(args), args.dl_state, published=PUBLISHED)
    own = pixels.size_of_model(args.dl_state, built) or PUBLISHED["img_size"]
    of_patches = pixels.is_patch_size(own)
    if args.img_size is pixels.OF_MODEL:
        chosen["img_size"] = PUBLISHED["img_size"] if of_patches else own
    if args.patch_size is pixels.OF_MODEL:
        chosen["patch_size"] = own[0] if of_patches else PUBLISHED["patch_size"]
    return argparse.Namespace(**vars(args) | chosen), source


def find_breasts(args: argparse.Namespace) -> tuple[list[compute.Breast], list[str]]:
    """Return the breasts to map, checked as far as can be before the long work, and the faults met.

    Warns of pixels unlike what networks expect. Raises InputError where there is no breast, or a fault is to stop.
    """
    patients = None if args.pat_list is None else read_patient_list(args.pat_list)
    breasts, faults = compute.read_breasts(args.pat_csv, args.img_folder, patients)
    if faults and args.on_error == "stop":
        raise InputError(f"{faults[0]} ({len(faults)} such; --on-error skip leaves them out)")
    if not breasts:
        raise InputError(f"{args.pat_csv}: no breast to map: Expected images in {args.img_folder}. Received none")
    if args.roi_mask_dir is not None and args.on_error == "stop":
        check = functools.partial(compute.check_masks, roi_mask_dir=args.roi_mask_dir)
        list(run_parallel(check, breasts, args.jobs, desc="masks", unit="breast"))
    # As large as windows are cut from; a whole image in the same size differs little.
    read_as = replace(pixels.Pixels.of(args), height=args.img_height or args.img_size[0], equalize=False)
    files = [file for breast in breasts for file in breast.files.values()]
    for message in pixels.pixel_warnings_of_files(files, read_as, 8):
        print(f"warning: {message}", file=sys.stderr)
    if (one_view := sum(len(breast.files) == 1 for breast in breasts)) > 0:
        print(f"{one_view} of {len(breasts)} breasts have an image of one view alone")
    return breasts, faults


def name_classes(model: "keras.Model", args: argparse.Namespace) -> list[str]:
    """Return the names of the model's classes: those given, else the usual ones. Raises InputError for wrong ones."""
    count = model.output_shape[-1]
    names = args.class_list or CLASSES.get(count) or [f"class_{i}" for i in range(count)]
    if len(names) != count:
        expected = f"Expected {count} names, one for each output of {args.dl_state}"
        raise InputError(f"--class-list: {expected}. Received {len(names)}")
    if len(set(names)) < len(names):
        raise InputError(f"--class-list: Expected different names. Received {' '.join(names)}")
    return names


def draw_pictures(
    records: list[HeatmapRecord], class_names: list[str], mode: str, args: argparse.Namespace
) -> list[str]:
    """Draw the maps of all records into the folder --overlay, and return the faults met."""
    options = {"on_error": args.on_error, "out_dir": args.overlay, "roi_mask_dir": args.roi_mask_dir}
    draw = functools.partial(draw_or_fault, class_names=class_names, mode=mode, **options)
    with locked(args.overlay):
        remove_partial(args.overlay)
        drawn = list(run_parallel(draw, records, args.jobs, desc="overlays", unit="breast"))
    print(f"Pictures of {counted(drawn.count(None), 'breast')} are in {args.overlay}")
    return [fault for fault in drawn if fault is not None]


def draw_or_fault(record: HeatmapRecord, on_error: str, **options) -> str | None:
    """Draw the pictures of a breast; with "skip" return what was at fault, if anything."""
    from mammo.maps.draw import draw_overlays

    try:
        draw_overlays(record, **options)
    except InputError as error:
        if on_error == "stop":
            raise
        return f"picture: {error}"


def is_for_grad_cam(model: "keras.Model", args: argparse.Namespace) -> bool:
    """Return whether the maps are those of Grad-CAM. Raises InputError for options that do not fit the model's kind."""
    import keras

    nested = any(isinstance(layer, keras.Model) for layer in model.layers)
    grad_cam = args.grad_cam if args.grad_cam is not None else nested and not args.fprop_mode
    if args.grad_cam_layer is not None and not grad_cam:
        raise InputError(f"--grad-cam-layer: Expected a whole-image classifier. Received {args.dl_state}")
    own = pixels.size_of_model(args.dl_state, model.input_shape[1:3])
    if args.grad_cam is None and not nested and own is not None and not pixels.is_patch_size(own):
        received = f"Received a whole-image classifier, of images of {own[0]} x {own[1]}"
        remedy = "give --grad-cam to explain it, or --no-grad-cam if its patches are as large"
        raise InputError(f"{args.dl_state}: Expected a patch classifier. {received}; {remedy}")
    return grad_cam


def make_scorer(model: "keras.Model", args: argparse.Namespace) -> compute.Scorer:
    """Return what computes the maps. Raises InputError for a model that the options do not fit."""
    read_as = pixels.Pixels.of(args)
    if is_for_grad_cam(model, args):
        built, size = model.input_shape[1:3], args.img_size
        if built[0] not in (None, size[0]) or built[1] not in (None, size[1]):
            expected = f"Expected --img-size {built[0]} {built[1]}, for which it is built"
            otherwise = "or --no-grad-cam for a patch classifier"
            raise InputError(f"{args.dl_state}: {expected}, {otherwise}. Received {size[0]} {size[1]}")
        with naming(args.dl_state):
            return compute.GradCam(model, read_as, args.grad_cam_layer, segment_breast=args.segment_breast)
    if args.fprop_mode:
        from dm_resnet import add_top_layers

        cells = {"avg_pool_size": args.avg_pool_size, "hm_strides": args.hm_strides}
        try:
            net = add_top_layers(model, args.img_size, patch_net=args.net, return_heatmap=True, **cells)
            return compute.ForwardPropagation(net, read_as, segment_breast=args.segment_breast, **cells)
        except InputError as error:
            raise InputError(f"{args.dl_state}: {error} (--img-size, --avg-pool-size)") from error
    args.img_height = args.img_height or args.img_size[0]
    return compute.Sweep(model, args.img_height, args.patch_size, args.stride, args.batch_size, read_as)


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
