#!/usr/bin/env bash
# The claim of the paper on made mammograms: a whole-image classifier that starts from a patch classifier against the
# same network trained from random weights on the image labels alone, for three seeds. From scratch it gets the same
# number of epochs, and in a second run twice that.
#   scripts/patch_or_scratch.sh [OUTPUT_FOLDER]      default: work/patch_or_scratch; half an hour on two cores
# Leaves results.csv (a row a run), results.png and every run's own files. Given again, the same command goes on where
# it was: runs that are done are not done again.
set -euo pipefail
source "$(dirname "$0")/phantom_steps.sh" "${1:-work/patch_or_scratch}"

film_sets

# All layers from the start, at the rate at which the patch classifier learns from random weights too.
scratch=(--from-scratch --nb-epoch 0 --all-layer-multiplier 1)
for seed in 1 2 3; do
    export RANDOM_SEED=$seed
    runs="$out/seed_$seed"
    patch="$runs/patch.h5"
    film_classifiers
    finished scratch || train_image "$patch" "$runs/scratch.h5" "$runs/scratch" "${scratch[@]}"
    finished scratch_long ||
        train_image "$patch" "$runs/scratch_long.h5" "$runs/scratch_long" "${scratch[@]}" --all-layer-epochs 18
done

python scripts/phantom_summary.py starts "$out"
