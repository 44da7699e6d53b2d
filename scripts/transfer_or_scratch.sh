#!/usr/bin/env bash
# Transfer to another hospital's images, on made mammograms: classifiers of phantoms as of film, finetuned with few
# patients on phantoms as of a digital detector, against the same network trained from random weights on these few
# patients, for as many epochs and for twice as many. Three seeds, each with a film classifier and patients of its own.
#   scripts/transfer_or_scratch.sh [OUTPUT_FOLDER]      default: work/patch_or_scratch, for its film classifiers
# About half an hour of one free core where the film classifiers are there, else fifty minutes. Leaves transfer.csv (a
# row a training), transfer.png, and in seed_N/few_patients what inbreast/subset_experiment.sh leaves. Given again, the
# same command goes on where it was.
set -euo pipefail
source "$(dirname "$0")/phantom_steps.sh" "${1:-work/patch_or_scratch}"
digital="$out/digital"

film_sets
if [ ! -e "$digital" ]; then
    rm -rf "$digital.partial" # of a run that was killed
    python -m mammo phantom "$digital.partial" --style digital --patients 180 --height 480 --width 384 \
        --test-size 0.45 --val-size 0.2 --seed 1
    mv "$digital.partial" "$digital"
fi

few_patients() { # NAME [options]: trainings that start from the network of the film classifier
    inbreast/subset_experiment.sh "$digital" "$1=$runs/from_patch.h5" "$runs/few_patients" --img-size 480 384 \
        --featurewise-mean 26 --batch-size 8 --no-test-augment --init-learningrate 0.0003 --all-layer-multiplier 1 \
        --all-layer-epochs 10 --weight-decay2 0.001 "${@:2}"
}

# From random weights all layers learn at the rate at which the patch classifier learned.
scratch=(--from-scratch --init-learningrate 0.001)
for seed in 1 2 3; do
    export RANDOM_SEED=$seed
    runs="$out/seed_$seed"
    film_classifiers
    PATIENTS="0 20 60" few_patients finetuned
    PATIENTS="20 60" few_patients scratch "${scratch[@]}"
    PATIENTS="20 60" few_patients scratch_long "${scratch[@]}" --all-layer-epochs 20
done

python scripts/phantom_summary.py transfer "$out"
