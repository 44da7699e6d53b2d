#!/usr/bin/env bash
# Train a patch classifier of five classes as published: Adam, three epochs of the last layer at 1e-3, ten of the top
# layers at 1e-4, 37 of all layers at 1e-5. Test accuracy to expect: ddsm_train/reproduce_table.sh --list
#   ddsm_train/train_patch_clf.sh NET SET [more options of patch_clf_train.py]
# NET   resnet50, vgg16, vgg19, yaroslav, xception or inception. In the options {net} stands for it, as in
#       --pretrained-weights '{net}_weights_tf_dim_ordering_tf_kernels_notop.h5' on machines without internet.
#       YaroslavNet has no ImageNet weights: it trains in one stage, of 100 epochs at 1e-3; so do the others with
#       --no-use-pretrained --nb-epoch 100.
# SET   s, s10 or s30, of ddsm_train/sample_patches.sh; for the small set s there are 200 epochs in all.
# Environment: DATA (prepared), TRAIN_DIR, VAL_DIR, TEST_DIR (DATA/patches_SET/train, val, test), RESUME_FROM,
#       BEST_MODEL (DATA/models/patch_NET_SET.h5), FINAL_MODEL (NOSAVE), NUM_CPU_CORES (4).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
[ $# -ge 2 ] || usage 2
net="$1" patch_set="$2"
shift 2
case "$net" in
    resnet50 | vgg16 | vgg19 | xception | inception) schedule=(--nb-epoch 3 --top-layer-epochs 13 --all-layer-epochs 50) ;;
    yaroslav) schedule=(--no-use-pretrained --nb-epoch 100) ;;
    *) status=2 fail "$net: no such net; see -h" ;;
esac
case "$patch_set" in
    s) [ "$net" = yaroslav ] || schedule+=(--all-layer-epochs 200) ;;
    s10 | s30) ;;
    *) status=2 fail "$patch_set: no such set; see -h" ;;
esac
data="${DATA:-prepared}"
patches="$data/patches_$patch_set"

exec "${PYTHON:-python}" "$here/patch_clf_train.py" \
    "${TRAIN_DIR:-$patches/train}" "${VAL_DIR:-$patches/val}" "${TEST_DIR:-$patches/test}" \
    --net "$net" --img-size 224 224 --class-list background calc_mal calc_ben mass_mal mass_ben \
    "${training[@]}" --batch-size 64 --train-bs-multiplier 0.5 \
    "${schedule[@]}" --init-learningrate 0.001 --top-layer-multiplier 0.1 --all-layer-multiplier 0.01 \
    --weight-decay 0.0001 --weight-decay2 0.0001 --hidden-dropout 0 --hidden-dropout2 0 \
    ${RESUME_FROM:+--resume-from "$RESUME_FROM"} --best-model "${BEST_MODEL:-$data/models/patch_${net}_$patch_set.h5}" \
    "${@//\{net\}/$net}"
