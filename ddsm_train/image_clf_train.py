#!/usr/bin/env python
"""Train a whole-image classifier on top of a patch classifier, or finetune a saved whole-image classifier.

  mammo train-image --patch-model-state patch.h5 ... train val test           convert and train
  mammo train-image --resume-from image.h5 --nb-epoch 0 ... train val test    finetune

The folders hold one sub-folder a class (--class-list). Stage 1 trains the new layers, stage 2 all layers; epoch
options are cumulative totals. The model of best mean validation AUC is kept and scored on the test set.
Environment: NUM_CPU_CORES (loader workers, 4), NUM_GPU_DEVICES (1), RANDOM_SEED (12345).
"""

import argparse
import sys
from typing import TYPE_CHECKING

from ddsm_train import options
from mammo.base import cli
from mammo.base.files import InputError, naming
from mammo.train import backend

if TYPE_CHECKING:
    import keras

# Options that `dm_resnet.add_top_layers` has by the same names.
_TOP_OPTIONS = (
    *("patch_net", "block_type", "bottleneck_enlarge_factor", "weight_decay", "add_heatmap", "avg_pool_size"),
    *("add_conv", "add_shortcut", "hm_strides", "hm_pool_size", "fc_init_units", "fc_layers"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    options.add_training_options(parser)
    image = {"img_size": [1152, 896], "featurewise_mean": 52.16, "equalize_hist": False, "augmentation": True}
    training = {"class_list": ["neg", "pos"], "auto_batch_balance": True, "all_layer_multiplier": 0.1}
    parser.set_defaults(**image, **training, best_model="./modelState/image_clf.h5")
    text = "patch classifier to build the whole-image classifier on"
    cli.add_optional(parser, "--patch-model-state", metavar="FILE", help=text)
    text = (
        "take the network of --patch-model-state or --resume-from without its weights: they are drawn at random, to "
        "learn from image labels alone"
    )
    cli.add_flag(parser, "--from-scratch", False, text)
    cli.add_flag(parser, "--test-augment", True, "score the test set by the mean of four flips too")

    group = parser.add_argument_group("top layers, with --patch-model-state")
    add, count = group.add_argument, cli.positive_int
    text = "network of the patch classifier: resnet50, vgg16, vgg19, yaroslav, ..."
    add("--patch-net", default="resnet50", help=text)
    add("--block-type", default="resnet", choices=["resnet", "vgg"], help="residual bottlenecks or VGG blocks")
    add("--top-depths", nargs="+", type=count, default=[512, 512], help="depth of each block")
    add("--top-repetitions", nargs="+", type=count, default=[3, 3], help="units in each block")
    text = "the last convolution of a residual unit is this many times the depth"
    add("--bottleneck-enlarge-factor", type=count, default=4, help=text)
    cli.add_flag(group, "--add-heatmap", False, "put the patch classifier's own last layer below the blocks")
    add("--avg-pool-size", nargs=2, type=count, default=[7, 7], help="average pooling before the heatmap")
    add("--hm-strides", nargs=2, type=count, default=[1, 1], help="strides of that average pooling")
    add("--hm-pool-size", nargs=2, type=count, default=[5, 5], help="max pooling after the heatmap")
    cli.add_flag(group, "--add-conv", True, "blocks on top of the heatmap; --no-add-conv: dense layers instead")
    cli.add_flag(group, "--add-shortcut", False, "connect the heatmap to the output too, with --no-add-conv")
    add("--fc-init-units", type=count, default=64, help="units of the first dense layer, then halved")
    add("--fc-layers", type=cli.natural_int, default=2, help="number of dense layers before the output; may be 0")
    return parser


def build_model(args: argparse.Namespace) -> "tuple[keras.Model, int | None]":
    """Return (model, index of its first new layer or None)."""
    import keras

    import dm_keras_ext
    from dm_resnet import add_top_layers

    def opened(path):
        model = dm_keras_ext.robust_load_model(path, trust_checkpoint=args.trust_checkpoint)
        # A copy has weights of its own, drawn anew.
        return keras.models.clone_model(model) if args.from_scratch else model

    if args.resume_from is not None:
        model, top_layer_nb = opened(args.resume_from), args.top_layer_nb
    elif args.patch_model_state is not None:
        patch_model = opened(args.patch_model_state)
        if len(patch_model.inputs) != 1 or len(patch_model.inputs[0].shape) != 4:
            raise InputError(f"{args.patch_model_state}: Expected a patch classifier, a model of one image")
        options = {name: getattr(args, name) for name in _TOP_OPTIONS}
        options |= {"depths": args.top_depths, "repetitions": args.top_repetitions, "dropout": args.hidden_dropout}
        with naming(args.patch_model_state):
            model, top_layer_nb = add_top_layers(patch_model, args.img_size, nb_class=len(args.class_list), **options)
        top_layer_nb = args.top_layer_nb or top_layer_nb
    else:
        expected = "Expected --patch-model-state FILE, to build on a patch classifier, or --resume-from FILE"
        raise InputError(f"{expected}, to finetune a whole-image classifier. Received neither")
    if args.nb_epoch > 0:
        dm_keras_ext.check_top_layer(model, top_layer_nb)
    return model, top_layer_nb


def run(**options) -> None:
    """Train and score; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    backend.start_backend(args.deterministic)
    from ddsm_train.training import run_training
    from dm_keras_ext import Schedule, image_stages
    from mammo.train.callbacks import DMAucModelCheckpoint

    model, top_layer_nb = build_model(args)

    def make_stages(model):
        return image_stages(model, Schedule.of(vars(args)), top_layer_nb=top_layer_nb)

    def make_keeper(run):
        return DMAucModelCheckpoint(args.best_model, run.val_set, model_to_save=run.org_model)

    run_training(args, model, make_stages, make_keeper, allow_constant=False, flips=args.test_augment)


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
