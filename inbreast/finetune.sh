#!/usr/bin/env bash
# Finetune a released whole-image classifier on INbreast, as published: all layers, 50 epochs, Adam at 1e-6.
# Published AUC on a test set of 30% of the patients: 0.95 for the hybrid VGG16, 0.96 averaged over four flips.
#   inbreast/finetune.sh MODEL.h5 DATA_FOLDER BEST_MODEL.h5 [more options of image_clf_train.py]
# DATA_FOLDER holds train, val and test, each with neg and pos.
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
model="$1" data="$2" best="$3"
shift 3
export NUM_CPU_CORES="${NUM_CPU_CORES:-4}"
exec python "$(dirname "$0")/../ddsm_train/image_clf_train.py" \
    --no-patch-model-state \
    --resume-from "$model" \
    --img-size 1152 896 \
    --no-img-scale \
    --rescale-factor 0.003891 \
    --featurewise-center \
    --featurewise-mean 44.33 \
    --no-equalize-hist \
    --batch-size 4 \
    --train-bs-multiplier 0.5 \
    --augmentation \
    --class-list neg pos \
    --nb-epoch 0 \
    --all-layer-epochs 50 \
    --load-val-ram \
    --load-train-ram \
    --optimizer adam \
    --weight-decay 0.001 \
    --hidden-dropout 0.0 \
    --weight-decay2 0.01 \
    --hidden-dropout2 0.0 \
    --init-learningrate 0.0001 \
    --all-layer-multiplier 0.01 \
    --es-patience 10 \
    --auto-batch-balance \
    --best-model "$best" \
    --final-model NOSAVE \
    "$@" \
    "$data/train" "$data/val" "$data/test"
