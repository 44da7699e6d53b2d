#!/usr/bin/env bash
# Keras 3 loads its own .h5 file into the wrong weights, without a word, when a nested model was frozen as it was saved.
#
# Guess before the run: `model.load_weights(file)` gives a model of the same code the weights that the file was saved
# from, whatever layers were frozen at the time; at worst it raises an error.
# Seen (keras 3.15.1 on jax 0.10.2): a model with a nested model of two batch normalizations, whose
# nested model is frozen (transfer learning's usual first stage), is saved by `model.save("x.h5")`. The same model with
# all layers trainable loads it: no error, no warning, and four of the eight arrays of the nested model are those of
# others: moving means and variances of one layer stand as gamma and beta of the next and the other way round. The
# `.keras` and `.weights.h5` formats are right. The legacy file lists the weights of a nested model by position,
# trainable ones first, so the order depends on flags. Where shapes differ an error comes instead.
# What helps: save with all layers trainable, or in the newer formats, or pair weights by name.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PY'
import logging
import sys
import warnings

import keras
import numpy as np
from keras import layers

logging.getLogger("absl").setLevel(logging.ERROR)


def build():
    inner = keras.Input((3,))
    nested = keras.Model(inner, layers.BatchNormalization()(layers.BatchNormalization()(inner)))
    image = keras.Input((3,))
    return keras.Model(image, layers.Dense(2)(nested(image)))


def mixed_up(name, frozen):
    saved = build()
    rng = np.random.default_rng(0)
    values = [rng.uniform(1, 2, weight.shape) for weight in saved.weights]
    saved.set_weights(values)
    saved.layers[1].trainable = not frozen
    save = saved.save_weights if name.endswith(".weights.h5") else saved.save
    save(f"{sys.argv[1]}/{name}")
    loaded = build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_weights(f"{sys.argv[1]}/{name}")
    x = np.ones((1, 3), "float32")
    apart = float(np.abs(np.asarray(saved(x)) - np.asarray(loaded(x))).max())
    wrong = [w.path for w, value in zip(loaded.weights, values) if not np.allclose(np.asarray(w), value)]
    print(f"{name}, nested model {'frozen' if frozen else 'trainable'}: {len(wrong)} arrays wrong, outputs {apart:.3f} apart")
    return len(wrong), apart


for name in ("x.h5", "x.keras", "x.weights.h5"):
    assert mixed_up(name, False) == (0, 0.0)
    count, apart = mixed_up(name, True)
    assert (count == 4 and apart > 0.1) if name == "x.h5" else (count, apart) == (0, 0.0)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check keras==3.15.1 jax==0.10.2
KERAS_BACKEND=jax "$folder/env/bin/python" "$folder/probe.py" "$folder" || {
    echo "behaves otherwise than noted" >&2
    exit 1
}
echo "as noted"
