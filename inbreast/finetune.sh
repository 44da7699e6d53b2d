#!/usr/bin/env bash
# Finetune a released whole-image model on INbreast, or on your own data, by ddsm_train/train_image_clf_inbreast.sh.
# Published AUC on a test set of 30% of the patients: 0.95 for the hybrid VGG16, 0.96 averaged over four flips.
#   inbreast/finetune.sh MODEL.h5 DATA_FOLDER BEST_MODEL.h5 [more options of image_clf_train.py]
# MODEL.h5 is a whole-image classifier, such as mammo download-models fetches. DATA_FOLDER holds train, val and
# test, each with neg and pos, as prepare_inbreast.py writes it.
# Environment: MEAN, the pixel mean to subtract (44.33, that of the paper's training images); MEAN=report takes what was
#       measured on yours, from DATA_FOLDER/report.json. NUM_CPU_CORES (4).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/../ddsm_train/recipe.sh"
[ $# -ge 3 ] || usage 2
mean="$(pixel_mean "$2")"
export RESUME_FROM="$1" TRAIN_DIR="$2/train" VAL_DIR="$2/val" TEST_DIR="$2/test" BEST_MODEL="$3"
shift 3
exec "$here/train_image_clf_inbreast.sh" ${mean:+--featurewise-mean "$mean"} "$@"
