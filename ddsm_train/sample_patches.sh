#!/usr/bin/env bash
# Sample a published set of patches, for training, validation and test: 224x224 from mammograms resized to 1152 rows.
#   ddsm_train/sample_patches.sh SET DATA [OUT] [more options of sample_patches_combined.py]
# SET   s     one patch round the centre of each lesion and one of background in each image
#       s10   ten patches of each lesion, with an overlap of at least 0.9, and ten of background
#       s30   thirty and thirty
# DATA  the folder that mammo prepare cbis-ddsm wrote
# OUT   the folder to write, with train, val and test; default: DATA/patches_SET
# Environment: NUM_CPU_CORES, images worked on at the same time (4).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
[ $# -ge 2 ] || usage 2
patch_set="$1" data="$2"
shift 2
out="$data/patches_$patch_set"
case "${1:-}" in
    "" | -*) ;;
    *) out="$1" && shift ;;
esac
case "$patch_set" in
    s) number=1 ;;
    s10) number=10 ;;
    s30) number=30 ;;
    *) status=2 fail "$patch_set: no such set; see -h" ;;
esac
[ -e "$data/roi_mask_path.csv" ] || fail "$data: Expected the folder that mammo prepare cbis-ddsm wrote"

for part in train val test; do
    "${PYTHON:-python}" "$here/sample_patches_combined.py" \
        "$data/roi_mask_path.csv" "$data/roi_mask" "$data/pat_$part.txt" "$data/full_img" "$out/$part" "$out/none" \
        --val-size 0 --target-height 1152 --patch-size 224 --nb-abn "$number" --nb-bkg "$number" --nb-hns 0 \
        --pos-cutoff 0.9 --jobs "$NUM_CPU_CORES" --no-verbose "$@"
done
