#!/usr/bin/env bash
# Finetune a whole-image classifier of DDSM on INbreast, as published: all layers, 50 epochs, Adam at 1e-6.
# Published AUC on a test set of 30% of the patients: 0.95 for the hybrid VGG16, 0.96 averaged over four flips.
#   ddsm_train/train_image_clf_inbreast.sh [more options of image_clf_train.py]
# Environment: TRAIN_DIR, VAL_DIR, TEST_DIR (INbreast/train, val, test, each with neg and pos), RESUME_FROM
#       (ddsm_vgg16_s10_[512-512-1024]x2_hybrid.h5), BEST_MODEL (INbreast/transferred_inbreast_best_model.h5),
#       FINAL_MODEL (NOSAVE), NUM_CPU_CORES (4).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
exec "${PYTHON:-python}" "$here/image_clf_train.py" \
    "${TRAIN_DIR:-INbreast/train}" "${VAL_DIR:-INbreast/val}" "${TEST_DIR:-INbreast/test}" \
    --no-patch-model-state --resume-from "${RESUME_FROM:-ddsm_vgg16_s10_[512-512-1024]x2_hybrid.h5}" \
    --img-size 1152 896 --no-img-scale --rescale-factor 0.003891 --featurewise-center --featurewise-mean 44.33 \
    --no-equalize-hist --batch-size 4 --train-bs-multiplier 0.5 --augmentation --class-list neg pos \
    --nb-epoch 0 --all-layer-epochs 50 --load-val-ram --load-train-ram --optimizer adam --weight-decay 0.001 \
    --hidden-dropout 0.0 --weight-decay2 0.01 --hidden-dropout2 0.0 --init-learningrate 0.0001 \
    --all-layer-multiplier 0.01 --es-patience 10 --auto-batch-balance \
    --best-model "${BEST_MODEL:-INbreast/transferred_inbreast_best_model.h5}" \
    --final-model "${FINAL_MODEL:-NOSAVE}" "$@"
