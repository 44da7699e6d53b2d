#!/usr/bin/env bash
# Map where a patch classifier sees lesions, in the mammograms of the training, validation and test patients: a window
# of 224 pixels swept over the breast, or with ddsm_train/fprop_heatmap_all.sh the whole image at once, far faster.
#   ddsm_train/score_heatmap_all.sh MODEL [more options of heatmap_score.py, which win over those given here]
# MODEL  file of a patch classifier, or of a whole-image classifier, which is explained by Grad-CAM.
# Writes OUT/train.npz, val.npz and test.npz. A killed run goes on when started again.
# Environment: DATA (prepared), SETS ("train val test"), OUT (DATA/heatmaps/sweep), FORMAT (npz; h5 or pkl).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
[ $# -ge 1 ] || usage 2
[ -f "$1" ] || fail "$1: no such model file"
model="$1"
shift
data="${DATA:-prepared}"
for set in ${SETS:-train val test}; do
    list="$data/pat_$set.txt"
    [ -f "$list" ] || fail "no patient list $list: set DATA to the folder of mammo prepare cbis-ddsm, or SETS"
    "${PYTHON:-python}" "$here/heatmap_score.py" "$data/full_img" "$model" --pat-csv "$data/pat_side_cancer.csv" --pat-list "$list" \
        --rescale-factor 0.003891 --featurewise-center --featurewise-mean 52.18 --no-equalize-hist \
        --img-size 1152 896 --img-height 1152 --patch-size 224 --stride 32 \
        --out "${OUT:-$data/heatmaps/sweep}/$set.${FORMAT:-npz}" "$@"
done
