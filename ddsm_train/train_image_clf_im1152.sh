#!/usr/bin/env bash
# Convert a ResNet50 patch classifier into the best single whole-image model of the paper, [512-512-1024]x2 twice, and
# train it on DDSM, 1152x896. Published test AUC: 0.86, mean of four flips 0.88.
#   ddsm_train/train_image_clf_im1152.sh [more options of image_clf_train.py]
# Environment: that of train_image_clf.sh, by which it is done.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
exec "$here/train_image_clf.sh" resnet50 512-512-1024x2 "$@"
