#!/usr/bin/env bash
# Train a ResNet50 on three classes of patches, background, malignant and benign, 256x256 from mammograms of 4096 rows:
# the original site's recipe, with the schedule of train_patch_clf.sh. No figure was published.
#   ddsm_train/train_patch_clf_im4096_256_3Cls.sh [more options of patch_clf_train.py]
# Such patches, where no image has a mass and a calcification of one number (else the sampler says which):
#   ddsm_train/sample_patches.sh s10 DATA DATA/patches_im4096 --target-height 4096 --patch-size 256 \
#       --calc-pos-dir malignant --mass-pos-dir malignant --calc-neg-dir benign --mass-neg-dir benign
# Class weights instead of balanced batches: --no-auto-batch-balance --pos-cls-weight 2 --neg-cls-weight 1.
# Environment: DATA (prepared), TRAIN_DIR, VAL_DIR, TEST_DIR (DATA/patches_im4096/train, val, test), RESUME_FROM,
#       BEST_MODEL (DATA/models/patch_resnet50_im4096_3cls.h5), FINAL_MODEL (NOSAVE), NUM_CPU_CORES (4).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
data="${DATA:-prepared}"
patches="$data/patches_im4096"
export TRAIN_DIR="${TRAIN_DIR:-$patches/train}" VAL_DIR="${VAL_DIR:-$patches/val}" TEST_DIR="${TEST_DIR:-$patches/test}"
export BEST_MODEL="${BEST_MODEL:-$data/models/patch_resnet50_im4096_3cls.h5}"
exec "$here/train_patch_clf.sh" resnet50 s10 --img-size 256 256 --class-list background malignant benign "$@"
