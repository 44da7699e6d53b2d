# shellcheck shell=bash
# Sourced with OUTPUT_FOLDER by the scripts that show the method on made mammograms: its steps, as functions. From here
# on the root of the project is the current folder, and $data and $patches, in $out, are those of prepared images and of
# patches. An option instead of the folder prints the comment at the head of the script.
case "$1" in -*)
    sed -n '2,/^set/s/^# //p' "$0"
    exit 0
    ;;
esac
out="$(realpath -m -- "$1")"
cd "$(dirname "$0")/.."
source scripts/activate.sh
export TF_CPP_MIN_LOG_LEVEL=2 NUM_CPU_CORES="${NUM_CPU_CORES:-2}"
data="$out/prepared"
patches="$out/patches"

make_data() { # DOWNLOAD_FOLDER: 200 phantom patients in the layout and with the faults of CBIS-DDSM
    python -m mammo phantom "$1" --layout cbis-ddsm --patients 200 --height 480 --width 384
}

prepare_data() { # DOWNLOAD_FOLDER: PNG images, lesion masks, splits by patient
    # One file is damaged on purpose, and left out.
    python -m mammo prepare cbis-ddsm "$1" "$data" --img-size 480 384 --on-error skip
}

sample() { # patches around and away from the lesions
    local part
    for part in train val test; do
        python ddsm_train/sample_patches_combined.py "$data/roi_mask_path.csv" "$data/roi_mask" "$data/pat_$part.txt" \
            "$data/full_img" "$patches/$part" "$patches/none" --val-size 0 --target-height 480 --patch-size 96 \
            --nb-abn 5 --nb-bkg 5 --nb-hns 3 --no-verbose --jobs 2
    done
}

# The whole-image classifier sees the pixels as the patch classifier did: one mean for both, as in the paper.
pixels=(--rescale-factor 0.003891 --featurewise-center --featurewise-mean 44 --no-equalize-hist --augmentation
    --load-train-ram --load-val-ram --optimizer adam --auto-batch-balance)

train_patch() { # MODEL OUT_DIR: a small patch classifier from random weights
    python ddsm_train/patch_clf_train.py "${pixels[@]}" --img-size 96 96 \
        --class-list background calc_mal calc_ben mass_mal mass_ben \
        --net yaroslav --nb-init-filter 8 --no-use-pretrained --batch-size 64 --nb-epoch 12 --init-learningrate 0.001 \
        --best-model "$1" --out-dir "$2" "$patches/train" "$patches/val" "$patches/test"
}

train_image() { # PATCH_MODEL MODEL OUT_DIR [options]: convert it, train new layers, then all layers
    python ddsm_train/image_clf_train.py "${pixels[@]}" --img-size 480 384 --class-list neg pos \
        --patch-model-state "$1" --patch-net yaroslav --block-type vgg --top-depths 32 \
        --top-repetitions 1 --batch-size 16 --nb-epoch 3 --all-layer-epochs 9 --init-learningrate 0.001 \
        --all-layer-multiplier 0.1 --weight-decay 0.001 --weight-decay2 0.001 \
        --best-model "$2" --out-dir "$3" "${@:4}" "$data/train" "$data/val" "$data/test"
}

# What patch_or_scratch.sh and transfer_or_scratch.sh share: each part is made once in $out, and $runs is of one seed.

film_sets() { # prepared images and patches
    [ ! -f "$out/sampled" ] || return 0
    if [ ! -e "$out/download" ]; then
        rm -rf "$out/download.partial" # of a run that was killed
        make_data "$out/download.partial"
        mv "$out/download.partial" "$out/download"
    fi
    prepare_data "$out/download"
    sample
    touch "$out/sampled"
}

finished() { [ -f "$runs/$1/metrics.json" ]; } # FOLDER

film_classifiers() { # of patches, and of whole images that starts from it
    finished patch || train_patch "$runs/patch.h5" "$runs/patch"
    finished from_patch || train_image "$runs/patch.h5" "$runs/from_patch.h5" "$runs/from_patch"
}

map_lesions() { # MODEL MAPS [options]: Grad-CAM of a whole-image classifier; see sweep
    python ddsm_train/heatmap_score.py "$data/full_img" "$1" --rescale-factor 0.003891 --featurewise-center \
        --featurewise-mean 44 --img-size 480 384 --pat-csv "$data/pat_side_cancer.csv" \
        --out "$2" "${@:3}"
}

sweep() { # PATCH_MODEL MAPS [options]: map the patch classifier's windows
    map_lesions "$@" --patch-size 96 --stride 16
}
