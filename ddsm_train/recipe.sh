# shellcheck shell=bash disable=SC2034  # variables are for the recipes
# Sourced by the recipes: their usage text, errors and steps, and what the trainings of the paper have in common.
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

# Of recipes of several steps, whose outputs are sub-folders of $out:

# Takes --fresh out of the options, which go to `words`: each step of this run is then to begin anew.
declare -A renewed=()
read_options() {
    local word
    fresh="" words=()
    for word in "$@"; do
        if [ "$word" = --fresh ]; then fresh=yes; else words+=("$word"); fi
    done
}

# One run at a time works there: two at once could make the same folder.
lock_out() {
    command -v flock > /dev/null || return 0
    mkdir -p "$out"
    exec {lock}> "$out/lock"
    flock -n "$lock" || fail "$out: another run is working there: wait until it is done, or name another OUT"
}

# Checksum of the names of all images of a folder of train, val and test.
images_of() {
    (cd "$1" && find -L train val test -type f ! -name '.*' | LC_ALL=C sort | cksum)
}

# step FOLDER INPUTS SOURCES COMMAND... : unless done, make OUT/FOLDER by the command from the folders SOURCES and from
# data of which INPUTS is a checksum. OUT/FOLDER/command.txt says by which commands and inputs, the sources' own
# included, it was made. The command finds what it left when it was killed, and goes on.
step() {
    local name="$1" folder="$out/$1" inputs="$2" sources="$3" source kept="" record=""
    shift 3
    for source in $sources; do record+="$(cat "$out/$source/command.txt")"$'\n'; done
    record+="${inputs:+[$inputs] }$(printf '%q ' "${@//"$out/"/OUT/}")"
    record="${record//"$here/"/}"
    if [ -n "$fresh" ] && [ -z "${renewed[$name]:-}" ]; then rm -rf "$folder"; fi
    renewed[$name]=yes
    if [ "$record" = "$(cat "$folder/command.txt" 2> /dev/null)" ]; then
        if [ -e "$folder/done" ]; then
            echo "=== $name: finished before"
            return
        fi
    else
        [ ! -e "$folder/state" ] || kept="begun to train"
        [ ! -e "$folder/done" ] || kept="finished"
        [ -z "$kept" ] || fail "$folder: $kept with other options or data (see command.txt there). Expected the same," \
            "another OUT, that you remove the folder, or --fresh. Received: ${record##*$'\n'}"
        [ ! -e "$folder/command.txt" ] || rm -r "$folder"
        mkdir -p "$folder"
        echo "$record" > "$folder/.command.txt" && mv "$folder/.command.txt" "$folder/command.txt"
    fi
    echo "=== $name: ${record##*$'\n'}"
    "$@"
    touch "$folder/done"
}
