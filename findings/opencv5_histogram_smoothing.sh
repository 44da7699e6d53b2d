#!/usr/bin/env bash
# OpenCV 5 silently stops smoothing histograms: a 1-D array is a row to it, where OpenCV 4 took a column.
#
# Guess before the run: cv2.GaussianBlur(cv2.calcHist(...), (1, 5), 0), the usual way to smooth the grey-level histogram
# of a mammogram before a threshold is sought in it, gives the same figures in OpenCV 4 and 5.
# Seen (opencv-python-headless 4.14.0.94 and 5.0.0.93, Python 3.11, numpy 2): OpenCV 4 returns the histogram as (256, 1)
# and smooths it. OpenCV 5 returns (256,), filters it as one row of 256 columns, so that a kernel 5 high meets one row and
# changes nothing, and gives (1, 256); no error, no warning. The kernel (5, 1) is the other way round. Likewise erode and
# blur of a 1-D intensity profile, and resize, which shortens the profile in 5 with the size that in 4 averaged all of it
# away. medianBlur and normalize are not affected, since their rules have no direction.
# What helps in both: hist.reshape(-1, 1) before the filter, or scipy.ndimage on the flat array.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PY'
import cv2
import numpy as np

picture = (np.random.default_rng(0).normal(90, 30, (200, 150)).clip(0, 255)).astype("uint8")
histogram = cv2.calcHist([picture], [0], None, [256], [0, 256])


def changes(values, result):
    return "changes" if np.abs(result.ravel() - values.ravel()).max() > 0 else "leaves"


tall, wide = cv2.GaussianBlur(histogram, (1, 5), 0), cv2.GaussianBlur(histogram, (5, 1), 0)
print("histogram", histogram.shape, "kernel (1, 5)", changes(histogram, tall), tall.shape,
      "kernel (5, 1)", changes(histogram, wide))
upright = cv2.GaussianBlur(histogram.reshape(-1, 1), (1, 5), 0)
print("made a column", changes(histogram, upright), upright.shape)
profile = np.arange(8, dtype="float32")
print("erode 3 high", changes(profile, cv2.erode(profile, np.ones((3, 1)))))
print("resize to (4, 1)", cv2.resize(profile, (4, 1), interpolation=cv2.INTER_AREA).ravel().tolist())
PY
saw() {
    python3 -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --disable-pip-version-check "opencv-python-headless==$1" "numpy<3"
    "$folder/$1/bin/python" "$folder/probe.py" | tee /dev/stderr
}
four="histogram (256, 1) kernel (1, 5) changes (256, 1) kernel (5, 1) leaves
made a column changes (256, 1)
erode 3 high changes
resize to (4, 1) [0.875, 0.875, 0.875, 0.875]"
five="histogram (256,) kernel (1, 5) leaves (1, 256) kernel (5, 1) changes
made a column changes (256, 1)
erode 3 high leaves
resize to (4, 1) [0.5, 2.5, 4.5, 6.5]"
[ "$(saw 4.14.0.94)" = "$four" ] || { echo "OpenCV 4.14 behaves otherwise than noted" >&2; exit 1; }
[ "$(saw 5.0.0.93)" = "$five" ] || { echo "OpenCV 5.0 behaves otherwise than noted" >&2; exit 1; }
echo "as noted"
