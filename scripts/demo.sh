#!/usr/bin/env bash
# The whole method on made mammograms, in under ten minutes on two cores without a GPU: make a download of phantoms,
# prepare it, sample patches, train a patch classifier, convert it, train the whole-image classifier in two stages,
# score it with and without flips. Real CBIS-DDSM takes the same path from step 2 on.
#   scripts/demo.sh [OUTPUT_FOLDER]      default: demo
set -euo pipefail
case "${1:-}" in -*)
    sed -n '2,/^set/s/^# //p' "$0"
    exit 0
    ;;
esac
out="$(realpath -m -- "${1:-demo}")"
cd "$(dirname "$0")/.."
source scripts/activate.sh
export TF_CPP_MIN_LOG_LEVEL=2 NUM_CPU_CORES="${NUM_CPU_CORES:-2}"
data="$out/prepared"
patches="$out/patches"
started=$SECONDS
step() { printf '\n=== %s (%d s so far)\n' "$1" $((SECONDS - started)); }

if [ -e "$out" ] && [ -n "$(ls -A "$out")" ]; then
    echo "demo.sh: error: $out is not empty; remove it, or name another folder: scripts/demo.sh FOLDER" >&2
    exit 1
fi

step "1/7 Making a download: 200 phantom patients in the layout and with the faults of CBIS-DDSM"
python scripts/make_phantom.py "$out/download" --layout cbis-ddsm --patients 200 --height 480 --width 384

step "2/7 Preparing it: PNG images, lesion masks, splits by patient (one file is damaged on purpose, and left out)"
python scripts/prepare_cbis_ddsm.py "$out/download" "$data" --img-size 480 384 --on-error skip

step "3/7 Sampling patches around and away from the lesions"
for part in train val test; do
    python ddsm_train/sample_patches_combined.py "$data/roi_mask_path.csv" "$data/roi_mask" "$data/pat_$part.txt" \
        "$data/full_img" "$patches/$part" "$patches/none" --val-size 0 --target-height 480 --patch-size 96 \
        --nb-abn 5 --nb-bkg 5 --nb-hns 3 --no-verbose --jobs 2
done

# The whole-image classifier sees the pixels as the patch classifier did: one mean for both, as in the paper.
pixels=(--rescale-factor 0.003891 --featurewise-center --featurewise-mean 44 --no-equalize-hist --augmentation
    --load-train-ram --load-val-ram --optimizer adam --auto-batch-balance)

step "4/7 Training a small patch classifier from random weights"
python ddsm_train/patch_clf_train.py "${pixels[@]}" --img-size 96 96 \
    --class-list background calc_mal calc_ben mass_mal mass_ben \
    --net yaroslav --nb-init-filter 8 --no-use-pretrained --batch-size 64 --nb-epoch 12 --init-learningrate 0.001 \
    --best-model "$out/patch_model.h5" --out-dir "$out/patch" "$patches/train" "$patches/val" "$patches/test"

step "5/7 Converting it and training the whole-image classifier in two stages"
python ddsm_train/image_clf_train.py "${pixels[@]}" --img-size 480 384 --class-list neg pos \
    --patch-model-state "$out/patch_model.h5" --patch-net yaroslav --block-type vgg --top-depths 32 \
    --top-repetitions 1 --batch-size 16 --nb-epoch 3 --all-layer-epochs 9 --init-learningrate 0.001 \
    --all-layer-multiplier 0.1 --weight-decay 0.001 --weight-decay2 0.001 \
    --best-model "$out/image_model.h5" --out-dir "$out/image" "$data/train" "$data/val" "$data/test"

step "6/7 Drawing a mammogram with its lesion"
image="$(awk -F, '$5 == "MALIGNANT" && $6 == "mass" {print $1 "_" $2 "_" $3; exit}' "$data/roi_mask_path.csv")"
python scripts/draw_lesions.py "$data/full_img/$image.png" "$out/lesion.png" "$data"/roi_mask/*-Training_"$image"_*.png

step "7/7 Done"
cp "$out/image/predictions.csv" "$out/image/metrics.json" "$out/image/roc.png" "$out/"
python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

out = Path(sys.argv[1])
patch = json.loads((out / "patch" / "metrics.json").read_text())["single"]
image = json.loads((out / "metrics.json").read_text())
print(f"patch classifier, test accuracy     {patch['accuracy']:.3f} on {patch['samples']} patches")
print(f"whole-image classifier, test AUC    {image['single']['auc']['pos']:.3f} on {image['single']['samples']} images")
print(f"the same, mean of four flips        {image['flips']['auc']['pos']:.3f}")
print(f"models, predictions.csv, metrics.json, roc.png and lesion.png are in {out}")
PYTHON
