#!/usr/bin/env bash
# Convert a patch classifier into a whole-image classifier and train it on DDSM as published, 1152x896: Adam, 30 epochs
# of the new layers at 1e-4, 20 of all layers at 1e-5, in batches of two for 8 GB. The model of best validation AUC is
# kept and scored. Test AUC to expect: ddsm_train/reproduce_table.sh --list
#   ddsm_train/train_image_clf.sh PATCHNET TOP [more options of image_clf_train.py]
# PATCHNET  resnet50, vgg16, vgg19, yaroslav, xception or inception
# TOP       residual blocks: 512-512-2048x1, 512-512-1024x2 or 256-256-512x3-128-128-256x3
#           VGG blocks: 512x1, 512x3 or 256x1-128x1 (alike twice where one block is named)
#           on a heatmap: heatmap-512-512-1024x2, and with max pooling, dense layers and a shortcut
#           heatmap-fc64-32 or (YaroslavNet) heatmap-fc16-8
# Environment: DATA (prepared), TRAIN_DIR, VAL_DIR, TEST_DIR (DATA/train, val, test), PATCH_MODEL
#       (DATA/models/patch_PATCHNET_s10.h5), BEST_MODEL (DATA/models/image_PATCHNET_TOP.h5), FINAL_MODEL (NOSAVE),
#       NUM_CPU_CORES (4). RESUME_FROM, a whole-image model: train all its layers 50 epochs more.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
[ $# -ge 2 ] || usage 2
net="$1" top="$2"
shift 2
case "$net" in
    resnet50 | vgg16 | vgg19 | yaroslav | xception | inception) ;;
    *) status=2 fail "$net: no such net; see -h" ;;
esac
# The heatmap is the patch classifier on the mean of 7x7 features at each position, for all networks, as in the
# original: the features of a patch of 224x224, except in YaroslavNet, where such a patch has 3x3, one each 64 pixels.
heatmap=(--add-heatmap --avg-pool-size 7 7 --hm-strides 1 1)
case "$top" in
    512-512-2048x1)
        layers=(--block-type resnet --top-depths 512 512 --top-repetitions 1 1 --bottleneck-enlarge-factor 4) ;;
    512-512-1024x2)
        layers=(--block-type resnet --top-depths 512 512 --top-repetitions 2 2 --bottleneck-enlarge-factor 2) ;;
    256-256-512x3-128-128-256x3)
        layers=(--block-type resnet --top-depths 256 128 --top-repetitions 3 3 --bottleneck-enlarge-factor 2) ;;
    512x1) layers=(--block-type vgg --top-depths 512 512 --top-repetitions 1 1) ;;
    512x3) layers=(--block-type vgg --top-depths 512 512 --top-repetitions 3 3) ;;
    256x1-128x1) layers=(--block-type vgg --top-depths 256 128 --top-repetitions 1 1) ;;
    heatmap-512-512-1024x2) # max pooling is named for the dense tops alone
        layers=("${heatmap[@]}" --hm-pool-size 1 1
            --block-type resnet --top-depths 512 512 --top-repetitions 2 2 --bottleneck-enlarge-factor 2) ;;
    heatmap-fc64-32)
        layers=("${heatmap[@]}" --hm-pool-size 5 5 --no-add-conv --fc-init-units 64 --fc-layers 2 --add-shortcut) ;;
    heatmap-fc16-8)
        layers=("${heatmap[@]}" --hm-pool-size 3 3 --no-add-conv --fc-init-units 16 --fc-layers 2 --add-shortcut) ;;
    *) status=2 fail "$top: no such top; see -h" ;;
esac
data="${DATA:-prepared}"
patch_model="${PATCH_MODEL:-$data/models/patch_${net}_s10.h5}"
if [ -n "${RESUME_FROM:-}" ]; then
    start=(--no-patch-model-state --resume-from "$RESUME_FROM" --nb-epoch 0)
else
    [ -e "$patch_model" ] || fail "$patch_model: no such patch classifier." \
        "Train it with ddsm_train/train_patch_clf.sh $net s10, or name another in PATCH_MODEL"
    start=(--patch-model-state "$patch_model" --patch-net "$net" "${layers[@]}" --nb-epoch 30)
fi

exec "${PYTHON:-python}" "$here/image_clf_train.py" \
    "${TRAIN_DIR:-$data/train}" "${VAL_DIR:-$data/val}" "${TEST_DIR:-$data/test}" \
    --img-size 1152 896 --no-img-scale --class-list neg pos "${training[@]}" --batch-size 4 --train-bs-multiplier 0.5 \
    "${start[@]}" --all-layer-epochs 50 --init-learningrate 0.0001 --all-layer-multiplier 0.1 --es-patience 10 \
    --weight-decay 0.001 --weight-decay2 0.001 --hidden-dropout 0 --hidden-dropout2 0 \
    --best-model "${BEST_MODEL:-$data/models/image_${net}_$top.h5}" "$@"
