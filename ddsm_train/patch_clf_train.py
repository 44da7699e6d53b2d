#!/usr/bin/env python
"""Train a patch classifier in three stages: its last layer, its top layers, all layers.

  mammo train-patch --net resnet50 --class-list background calc_mal ... train val test

The folders hold one sub-folder a class, as written by `mammo sample`. Epoch options are cumulative
totals. The model of best validation accuracy is kept and scored on the test set.
Environment: NUM_CPU_CORES (loader workers, 4), NUM_GPU_DEVICES (1), RANDOM_SEED (12345).
"""

import argparse
import sys

from ddsm_train import options
from mammo.base import cli
from mammo.train import backend

# Options that `dm_keras_ext.get_dl_model` has by the same names, besides those of the networks of ResNetBuilder.
_NETWORK_OPTIONS = (
    *("use_pretrained", "pretrained_weights", "resume_from", "trust_checkpoint"),
    *("top_layer_nb", "weight_decay", "nb_init_filter"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    options.add_training_options(parser)
    image = {"img_size": [256, 256], "featurewise_mean": 59.6, "equalize_hist": True, "augmentation": False}
    classes = {"class_list": ["background", "malignant", "benign"], "auto_batch_balance": False}
    parser.set_defaults(**image, **classes, all_layer_multiplier=0.01, best_model="./modelState/patch_clf.h5")
    group = parser.add_argument_group("network")
    text = "resnet50, vgg16, vgg19, xception, inception, yaroslav, or a ResNetBuilder network such as dm_resnet_14"
    group.add_argument("--net", default="resnet50", help=text)
    cli.add_flag(group, "--use-pretrained", True, "start from ImageNet weights, and train in three stages")
    group.add_argument("--pretrained-weights", metavar="FILE", help="local file of the ImageNet weights without top")
    text = "total epochs when stage 2 (top layers) ends"
    group.add_argument("--top-layer-epochs", type=cli.natural_int, default=10, help=text)
    text = "stage 2's rate is stage 1's times this"
    group.add_argument("--top-layer-multiplier", type=cli.positive_float, default=0.1, help=text)

    group = parser.add_argument_group("networks of ResNetBuilder (the first option: yaroslav too)")
    add, count = group.add_argument, cli.positive_int
    add("--nb-init-filter", "-nif", type=count, default=32, help="width of the first block")
    add("--init-filter-size", "-ifs", type=count, default=5, help="size of the first filters")
    add("--init-conv-stride", "-ics", type=count, default=2, help="their stride")
    add("--max-pooling-size", "-mps", dest="pool_size", type=count, default=2, help="first pooling")
    add("--max-pooling-stride", "-mpr", dest="pool_stride", type=count, default=2, help="its stride")
    add("--alpha", type=cli.natural_float, default=1e-4, help="elastic-net penalty of the last layer")
    add("--l1-ratio", type=cli.natural_float, default=0.0, help="share of L1 in that penalty")
    add("--inp-dropout", "-id", type=cli.fraction, default=0.0, help="dropout rate of the input")
    return parser


def run(**options) -> None:
    """Train and score; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    backend.start_backend(args.deterministic)
    from ddsm_train.training import run_training
    from dm_keras_ext import BUILDER_OPTIONS, Schedule, get_dl_model, patch_stages
    from mammo.train.callbacks import BestModel

    same = {name: getattr(args, name) for name in (*_NETWORK_OPTIONS, *BUILDER_OPTIONS)}
    # With dropout in any stage the layer must be there from the start.
    dropout = max(args.hidden_dropout, args.hidden_dropout2)
    model, _, top_layer_nb = get_dl_model(args.net, nb_class=len(args.class_list), hidden_dropout=dropout, **same)

    def make_stages(model):
        networks = {"net": args.net, "use_pretrained": args.use_pretrained, "top_layer_nb": top_layer_nb}
        return patch_stages(model, Schedule.of(vars(args)), **networks)

    def make_keeper(run):
        return BestModel(args.best_model, "val_accuracy", model_to_save=run.org_model)

    run_training(args, model, make_stages, make_keeper)


main = cli.command(make_parser, run)

if __name__ == "__main__":
    sys.exit(main())
