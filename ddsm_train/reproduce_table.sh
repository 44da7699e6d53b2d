#!/usr/bin/env bash
# Reproduce a published figure from prepared data: sample patches, train the patch classifier, convert it, train the
# whole-image classifier in two stages, score it, and write our figure beside the published one.
#   ddsm_train/reproduce_table.sh --list      every row with its published figures and an estimate of its time
#   ddsm_train/reproduce_table.sh ROW DATA [OUT] [options]
# ROW   one of the list, such as patch-resnet50-s10, ddsm-vgg16-512x1 or ddsm-mean-of-three
# DATA  the folder that scripts/prepare_cbis_ddsm.py wrote
# OUT   the folder for all rows, default DATA/table: a sub-folder a row, and table.csv
# Options go to all trainings, such as --mixed-precision; those after --sample, --patch, --image or --inbreast to the
# sampler, the patch classifiers', the whole-image classifiers' or INbreast's trainings alone:
#   ddsm_train/reproduce_table.sh ddsm-vgg16-512x1 prepared --patch --pretrained-weights '{net}.h5' --image --batch-size 8
# Rows of INbreast also need the environment variable INBREAST, a folder of train, val and test, each with neg and pos.
# Given again, the same command does what is not finished; rows share patches, patch classifiers and DDSM models. A step
# is finished when its last output is there. One that is, with other options, is refused: remove its folder, or name
# another OUT. One that is not, with other options, is begun anew.
set -euo pipefail
source "$(dirname "$0")/recipe.sh"
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
for word in "$@"; do
    case "$word" in
        --sample | --patch | --image | --inbreast) declare -n section="${word#--}" ;;
        *) section+=("$word") ;;
    esac
done
[ -d "$data" ] || fail "$data: no such folder. Expected the one that scripts/prepare_cbis_ddsm.py wrote"
unset RESUME_FROM FINAL_MODEL

# Does a step's last output exist, whole?
finished() {
    case "$1" in
        *.json) [ "$(tail -n 1 "$1" 2> /dev/null)" = "}" ] ;;
        *) [ -s "$1" ] ;;
    esac
}

# step FOLDER LAST SOURCES COMMAND... : unless finished, run the command, which ends by writing OUT/FOLDER/LAST from the
# folders SOURCES. OUT/FOLDER/command.txt says by which commands, the sources' own included, it was made.
step() {
    local name="$1" folder="$out/$1" last="$out/$1/$2" sources="$3" source record=""
    shift 3
    for source in $sources; do record+="$(cat "$out/$source/command.txt")"$'\n'; done
    record+="$(printf '%q ' "${@//"$out/"/OUT/}")"
    record="${record//"$here/"/}"
    if finished "$last"; then
        if [ "$record" = "$(cat "$folder/command.txt" 2> /dev/null)" ]; then
            echo "=== $name: finished before"
            return
        fi
        fail "$folder: finished with other options (see command.txt there). Expected the same options, another OUT, or" \
            "that you remove the folder. Received: ${record##*$'\n'}"
    fi
    if [ -e "$folder/command.txt" ] && [ "$record" != "$(cat "$folder/command.txt")" ]; then
        rm -r "$folder"
    fi
    mkdir -p "$folder"
    rm -f "$last"
    echo "$record" > "$folder/command.txt"
    echo "=== $name: ${record##*$'\n'}"
    "$@"
    finished "$last" || fail "$last: was not written"
}

# reproduce ROW: its sources first, then the row itself.
reproduce() {
    local row="$1" kind sources net patch_set top patients source inbreast_data=""
    IFS=, read -r _ kind sources net patch_set top patients _ \
        < <(awk -F, -v row="$row" 'NR > 1 && $1 == row' "$here/published.csv") ||
        status=2 fail "$row: no such row. Expected one of $(basename "$0") --list"
    if [ "$kind" = finetune ]; then
        [ -n "${INBREAST:-}" ] && [ -d "$INBREAST/train" ] || fail "$row: Expected the environment variable INBREAST" \
            "to be a folder of train, val and test, each with neg and pos. Received '${INBREAST:-}'"
        inbreast_data="$(realpath -- "$INBREAST")"
    fi
    for source in $sources; do reproduce "$source"; done

    local options=(--out-dir "$out/$row" "${all[@]}")
    export BEST_MODEL="$out/$row/model.h5"
    case "$kind" in
        patch)
            step "patches_$patch_set" test/pat_lst.txt "" \
                "$here/sample_patches.sh" "$patch_set" "$data" "$out/patches_$patch_set" "${sample[@]}"
            export TRAIN_DIR="$out/patches_$patch_set/train"
            export VAL_DIR="$out/patches_$patch_set/val" TEST_DIR="$out/patches_$patch_set/test"
            step "$row" metrics.json "patches_$patch_set" \
                "$here/train_patch_clf.sh" "$net" "$patch_set" "${options[@]}" "${patch[@]}"
            ;;
        image | extend)
            export TRAIN_DIR="$data/train" VAL_DIR="$data/val" TEST_DIR="$data/test"
            local start=PATCH_MODEL stages=()
            [ "$kind" = image ] || start=RESUME_FROM stages=(--nb-epoch 0)
            step "$row" metrics.json "$sources" env "$start=$out/$sources/model.h5" \
                "$here/train_image_clf.sh" "$net" "$top" "${options[@]}" "${image[@]}" "${stages[@]}"
            ;;
        finetune)
            if [ -n "$patients" ]; then
                source="inbreast_${patients}_patients"
                step "$source" patients.txt "" \
                    python "$here/published.py" choose "$out/$source" "$inbreast_data" "$patients"
                inbreast_data="$out/$source"
            fi
            step "$row" metrics.json "$sources${patients:+ $source}" \
                "$here/../inbreast/finetune.sh" "$out/$sources/model.h5" "$inbreast_data" "$BEST_MODEL" \
                "${options[@]}" "${inbreast[@]}"
            ;;
        mean)
            local runs=()
            for source in $sources; do runs+=("$out/$source"); done
            step "$row" metrics.json "$sources" python "$here/published.py" average "$out/$row" "${runs[@]}"
            ;;
    esac
}

reproduce "$wanted"
python "$here/published.py" compare "$out"
