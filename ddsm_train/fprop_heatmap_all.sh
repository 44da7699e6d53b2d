#!/usr/bin/env bash
# Map where a patch classifier sees lesions, in the mammograms of the training, validation and test patients, by
# applying it to each whole image at once, of which all but the breast is blanked.
#   ddsm_train/fprop_heatmap_all.sh MODEL NET [more options of heatmap_score.py, which win over those given here]
# MODEL  file of a patch classifier. NET  what it is: resnet50, vgg16, vgg19, xception, inception or yaroslav.
# Writes OUT/train.npz, val.npz and test.npz. A killed run goes on when started again.
# Environment: DATA (prepared), SETS ("train val test"), OUT (DATA/heatmaps/fprop), FORMAT (npz; h5 or pkl).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
[ $# -ge 2 ] || usage 2
model="$1" net="$2"
shift 2
features=7 # of a 224-pixel patch
[ "$net" != yaroslav ] || features=3
export OUT="${OUT:-${DATA:-prepared}/heatmaps/fprop}"
exec "$here/score_heatmap_all.sh" "$model" --fprop-mode --segment-breast --net "$net" --avg-pool-size "$features" "$features" \
    --hm-strides 1 1 "$@"
