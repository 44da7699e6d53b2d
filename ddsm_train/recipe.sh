# shellcheck shell=bash disable=SC2034  # variables are for the recipes
# Sourced by the scripts here: their usage text and errors, and what the trainings of the paper have in common.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export NUM_CPU_CORES="${NUM_CPU_CORES:-4}"

# Print the comment at the head of the recipe: for -h as an answer, else as an error.
usage() {
    [ "$1" = 0 ] || exec >&2
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit "$1"
}

# End with one line on standard error; status 1 for data, or that named, as in `status=2 fail ...` for arguments.
fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit "${status:-1}"
}

case "${1:-}" in -h | --help) usage 0 ;; esac

# Pixels of 16-bit images brought to 0..255, less the mean of DDSM; flips, rotation, shear, zoom and channel shift.
training=(--rescale-factor 0.003891 --featurewise-center --featurewise-mean 52.18 --no-equalize-hist --augmentation
    --optimizer adam --auto-batch-balance --final-model "${FINAL_MODEL:-NOSAVE}")

# pixel_mean FOLDER: what MEAN asks for: a number or, for `report`, the one measured on the images of FOLDER; nothing
# where it is not set.
pixel_mean() {
    local report="$1/report.json" mean="${MEAN:-}"
    if [ "$mean" = report ]; then
        [ -f "$report" ] || fail "$report: no such file, so no measured mean. Expected it in $1, or a number in MEAN"
        mean="$(sed -n 's/^ *"featurewise_mean": \([0-9.]*\),*$/\1/p' "$report")" # one value a line
        [ -n "$mean" ] || fail "$report: no featurewise_mean in it. Expected the report of a preparation script"
    fi
    echo "$mean"
}
