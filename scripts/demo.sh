#!/usr/bin/env bash
# The whole method on made mammograms, in about six minutes on two free cores without a GPU: make a download of phantoms,
# prepare it, sample patches, train a patch classifier, convert it, train the whole-image classifier in two stages,
# score it with and without flips, map where both see lesions. Real CBIS-DDSM takes the same path from step 2 on.
#   scripts/demo.sh [OUTPUT_FOLDER]      default: work/demo
set -euo pipefail
source "$(dirname "$0")/phantom_steps.sh" "${1:-work/demo}"
started=$SECONDS
step() { printf '\n=== %s (%d s so far)\n' "$1" $((SECONDS - started)); }

if [ -e "$out" ] && [ -n "$(ls -A "$out")" ]; then
    echo "demo.sh: error: $out is not empty; remove it, or name another folder: scripts/demo.sh FOLDER" >&2
    exit 1
fi

step "1/7 Making a download: 200 phantom patients in the layout and with the faults of CBIS-DDSM"
make_data "$out/download"

step "2/7 Preparing it: PNG images, lesion masks, splits by patient (one file is damaged on purpose, and left out)"
prepare_data "$out/download"

step "3/7 Sampling patches around and away from the lesions"
sample

step "4/7 Training a small patch classifier from random weights"
train_patch "$out/patch.h5" "$out/patch"

step "5/7 Converting it and training the whole-image classifier in two stages"
train_image "$out/patch.h5" "$out/image.h5" "$out/image"

step "6/7 Mapping where the patch classifier sees lesions, and how well the maps point at them"
sweep "$out/patch.h5" "$out/maps.npz" --pat-list "$data/pat_test.txt"
python ddsm_train/localise.py "$out/maps.npz" --roi-mask-dir "$data/roi_mask" --out-dir "$out/localisation"

step "7/7 Drawing such maps, and what the whole-image classifier looks at: a patient of each kind of lesion"
awk -F, 'NR == FNR {test[$1]; next} ($1 in test) && !seen[substr($5, 1, 3) $6]++ {print $1}' \
    "$data/pat_test.txt" "$data/roi_mask_path.csv" | sort -u > "$out/drawn.txt"
sweep "$out/patch.h5" "$out/drawn.npz" --pat-list "$out/drawn.txt" --overlay "$out/overlays" \
    --roi-mask-dir "$data/roi_mask"
# The labels beside the breast are blanked: their letters are bright and sharp, and Grad-CAM would point at them.
map_lesions "$out/image.h5" "$out/gradcam.npz" --pat-list "$out/drawn.txt" --overlay "$out/gradcam" \
    --roi-mask-dir "$data/roi_mask" --segment-breast

step "Done"
cp "$out/image/predictions.csv" "$out/image/metrics.json" "$out/image/roc.png" "$out/"
python scripts/phantom_summary.py demo "$out"
echo "models, predictions.csv, metrics.json, roc.png, maps and pictures (overlays, gradcam, localisation) are in $out"
