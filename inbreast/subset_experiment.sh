#!/usr/bin/env bash
# Finetune whole-image models on INbreast, or on your own data, with few patients: 20, 30, 40, 50 and 60, each number
# holding the patients of the smaller ones and the same share of cancer, on the same validation and test images.
#   inbreast/subset_experiment.sh DATA MODEL... OUT [more options of image_clf_train.py]
# DATA   a folder of train, val and test, each with neg and pos, of images whose names tell the patient
# MODEL  a saved model, FILE or NAME=FILE; those named resnet50, vgg16 and hybrid stand beside their published figures:
#          inbreast/subset_experiment.sh INbreast 'hybrid=ddsm_vgg16_s10_[512-512-1024]x2_hybrid.h5' few_patients
# OUT    gets a sub-folder a training, and subset_auc.csv and subset_auc.png of all trainings in it
# Given again, the same command does what is not finished, and refuses other data or options for what is; --fresh starts
# over. A further MODEL adds to what is in OUT, with options of its own: as a baseline, the same from random weights:
#          inbreast/subset_experiment.sh INbreast scratch=MODEL.h5 few_patients --from-scratch --all-layer-multiplier 1
# Environment: PATIENTS ("20 30 40 50 60"; 0 scores the model as it is), RANDOM_SEED (12345), by which the patients are
#       chosen too, MEAN, as of finetune.sh, NUM_CPU_CORES (4).
set -euo pipefail
source "$(dirname "$(realpath "$0")")/../ddsm_train/recipe.sh"
read_options "$@"
set -- "${words[@]}"
words=()
while [ $# -gt 0 ] && [[ "$1" != -* ]]; do words+=("$1") && shift; done
[ ${#words[@]} -ge 3 ] || usage 2
data="$(realpath -m -- "${words[0]}")" out="$(realpath -m -- "${words[-1]}")"
for part in train val test; do
    [ -d "$data/$part" ] || fail "$data/$part: no such folder. Expected train, val and test, each with neg and pos"
done
images="$(images_of "$data")"
mean="$(pixel_mean "$data")"

names=() files=()
for word in "${words[@]:1:${#words[@]}-2}"; do
    if [ -e "$word" ] || [[ "$word" != *=* ]]; then
        file="$word" name="$(basename "${word%.*}")"
    else
        file="${word#*=}" name="${word%%=*}"
    fi
    [ -f "$file" ] || fail "$file: no such model"
    [[ -n "$name" && "$name" != */* ]] || status=2 fail "$word: Expected FILE or NAME=FILE"
    [[ " ${names[*]} " != *" $name "* ]] || status=2 fail "$name: two models of this name. Expected NAME=FILE"
    names+=("$name") files+=("$(realpath -- "$file")")
done
read -ra patients <<< "${PATIENTS:-20 30 40 50 60}"
for number in "${patients[@]}"; do
    [[ "$number" =~ ^(0|[1-9][0-9]*)$ ]] || status=2 fail "PATIENTS: Expected whole numbers. Received $number"
done
python "$here/published.py" options image_clf_train "$@"
unset RESUME_FROM FINAL_MODEL

lock_out
seed="${RANDOM_SEED:-12345}"
# All subsets first: that the data have enough patients should be known before anything is trained.
for number in "${patients[@]}"; do
    [ "$number" = 0 ] || step "$number-patients" "$images" "" \
        python "$here/published.py" choose "$out/$number-patients" "$data" "$number" --seed "$seed"
done
for i in "${!names[@]}"; do
    weights="$(cksum < "${files[i]}")"
    for number in "${patients[@]}"; do
        run="${names[i]}-$number-patients" subset="$data" source="" epochs=(--all-layer-epochs 0)
        [ "$number" = 0 ] || subset="$out/$number-patients" source="$number-patients" epochs=()
        step "$run" "$images $weights" "$source" env "RANDOM_SEED=$seed" ${mean:+"MEAN=$mean"} \
            "$here/../inbreast/finetune.sh" "${files[i]}" "$subset" "$out/$run/model.h5" \
            --out-dir "$out/$run" "$@" "${epochs[@]}"
    done
done
python "$here/published.py" subsets "$out"
