#!/usr/bin/env bash
# Reproduce a published figure from prepared data: sample patches, train the patch classifier, convert it, train the
# whole-image classifier in two stages, score it, and write our figure beside the published one.
#   ddsm_train/reproduce_table.sh --list      every row with its published figures and an estimate of its time
#   ddsm_train/reproduce_table.sh ROW DATA [OUT] [options]
# ROW   one of the list, such as patch-resnet50-s10, ddsm-vgg16-512x1 or ddsm-mean-of-three
# DATA  the folder that mammo prepare cbis-ddsm wrote
# OUT   the folder for all rows, default DATA/table: a sub-folder a row, and table.csv
# Options go to all trainings, such as --mixed-precision; those after --sample, --patch, --image or --inbreast to the
# sampler, the patch classifiers', the whole-image classifiers' or INbreast's trainings alone:
#   ddsm_train/reproduce_table.sh ddsm-vgg16-512x1 prepared --patch --pretrained-weights '{net}.h5' --image --batch-size 8
# Rows of INbreast also need the environment variable INBREAST, a folder of train, val and test, each with neg and pos.
# Given again, the same command does what is not finished; rows share patches, patch classifiers and DDSM models. A step
# whose command ended well leaves a file `done`. One that is done, but with other options, another RANDOM_SEED, other
# patients in DATA's sets or other images in INBREAST, is refused: remove its folder, or name another OUT; so is a
# training that has begun. One that was interrupted goes on where it was. --fresh starts over with all steps of ROW,
# those that it shares included.
set -euo pipefail
source "$(dirname "$(realpath "$0")")/recipe.sh"
[ "${1:-}" != --list ] || exec python "$here/published.py" list
[ $# -ge 2 ] || usage 2
wanted="$1" data="$(realpath -m -- "$2")"
shift 2
out="$data/table"
case "${1:-}" in
    "" | -*) ;;
    *) out="$(realpath -m -- "$1")" && shift ;;
esac
all=() sample=() patch=() image=() inbreast=()
declare -n section=all
read_options "$@"
for word in "${words[@]}"; do
    case "$word" in
        --sample | --patch | --image | --inbreast) declare -n section="${word#--}" ;;
        *) section+=("$word") ;;
    esac
done
# On patches of one split and images of another, patients to test on could be trained on.
ddsm_patients="$(cat "$data"/pat_{train,val,test}.txt 2> /dev/null | cksum)" ||
    fail "$data: no such folder, or no patient lists. Expected the one that mammo prepare cbis-ddsm wrote"
unset RESUME_FROM FINAL_MODEL
seed="RANDOM_SEED=${RANDOM_SEED:-12345}"

# read_row ROW: what published.csv says of it, into the caller's variables.
read_row() {
    IFS=, read -r _ kind sources net patch_set top patients _ \
        < <(awk -F, -v row="$1" 'NR > 1 && $1 == row' "$here/../mammo/evaluate/published.csv") ||
        status=2 fail "$1: no such row. Expected one of $(basename "$0") --list"
}

# check ROW: whether each step, of its sources too, takes its options and has its data, before the first one works.
check() {
    local row="$1" kind sources net patch_set top patients source
    read_row "$row"
    for source in $sources; do check "$source"; done
    local options=(python "$here/published.py" options)
    case "$kind" in
        patch)
            "${options[@]}" sample_patches_combined "${sample[@]}"
            "${options[@]}" patch_clf_train "${all[@]}" "${patch[@]}"
            ;;
        image | extend) "${options[@]}" image_clf_train "${all[@]}" "${image[@]}" ;;
        finetune)
            "${options[@]}" image_clf_train "${all[@]}" "${inbreast[@]}"
            [ -n "${INBREAST:-}" ] && [ -d "$INBREAST/train" ] || fail "$row: Expected the environment variable" \
                "INBREAST to be a folder of train, val and test, each with neg and pos. Received '${INBREAST:-}'"
            ;;
    esac
}

# reproduce ROW: its sources first, then the row itself.
reproduce() {
    local row="$1" kind sources net patch_set top patients source inbreast_data inbreast_images
    read_row "$row"
    if [ "$kind" = finetune ]; then
        inbreast_data="$(realpath -- "$INBREAST")"
        inbreast_images="$(images_of "$INBREAST")"
    fi
    for source in $sources; do reproduce "$source"; done

    local options=(--out-dir "$out/$row" "${all[@]}")
    export BEST_MODEL="$out/$row/model.h5"
    case "$kind" in
        patch)
            step "patches_$patch_set" "$ddsm_patients" "" \
                "$here/sample_patches.sh" "$patch_set" "$data" "$out/patches_$patch_set" "${sample[@]}"
            export TRAIN_DIR="$out/patches_$patch_set/train"
            export VAL_DIR="$out/patches_$patch_set/val" TEST_DIR="$out/patches_$patch_set/test"
            step "$row" "" "patches_$patch_set" env "$seed" \
                "$here/train_patch_clf.sh" "$net" "$patch_set" "${options[@]}" "${patch[@]}"
            ;;
        image | extend)
            export TRAIN_DIR="$data/train" VAL_DIR="$data/val" TEST_DIR="$data/test"
            local start=PATCH_MODEL stages=()
            [ "$kind" = image ] || start=RESUME_FROM stages=(--nb-epoch 0)
            step "$row" "" "$sources" env "$seed" "$start=$out/$sources/model.h5" \
                "$here/train_image_clf.sh" "$net" "$top" "${options[@]}" "${image[@]}" "${stages[@]}"
            ;;
        finetune)
            if [ -n "$patients" ]; then
                source="inbreast_${patients}_patients"
                step "$source" "$inbreast_images" "" \
                    python "$here/published.py" choose "$out/$source" "$inbreast_data" "$patients"
                inbreast_data="$out/$source"
            fi
            step "$row" "$inbreast_images" "$sources${patients:+ $source}" env "$seed" \
                "$here/../inbreast/finetune.sh" "$out/$sources/model.h5" "$inbreast_data" "$BEST_MODEL" \
                "${options[@]}" "${inbreast[@]}"
            ;;
        mean)
            local runs=()
            for source in $sources; do runs+=("$out/$source"); done
            step "$row" "" "$sources" python "$here/published.py" average "$out/$row" "${runs[@]}"
            ;;
    esac
}

check "$wanted"
lock_out
reproduce "$wanted"
python "$here/published.py" compare "$out"
