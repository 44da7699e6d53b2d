"""Write small model files of Keras 2, of all kinds that people have, with the predictions of Keras 2 itself.

  python -m venv keras2 && keras2/bin/pip install tf_keras==2.21.0 tensorflow==2.21.0
  TF_USE_LEGACY_KERAS=1 keras2/bin/python tests/reference/make_keras2_files.py tests/reference/keras2

Each NAME.h5.gz is a model, and NAME.npz holds its inputs x0, x1, ... and its outputs y0, y1, ... All weights and inputs
are random numbers of fixed seeds. `tests/train/test_keras2_files.py` opens them all.
"""

import gzip
import json
import sys
from pathlib import Path

import h5py
import numpy as np
import tensorflow as tf
import tf_keras as keras
from tf_keras import layers

FOLDER = Path(sys.argv[1])
RNG = np.random.default_rng(0)


def trunk(shape=(8, 6, 3), name="trunk"):
    """A small network of convolutions, its batch normalization frozen."""
    image = keras.Input(shape)
    x = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name=f"{name}_conv")(image)
    x = layers.BatchNormalization(name=f"{name}_bn", trainable=False)(x)
    x = layers.ReLU(name=f"{name}_relu")(x)
    return keras.Model(image, layers.Conv2D(4, 3, padding="same", name=f"{name}_conv2")(x), name=name)


def head(name="head"):
    pool = layers.GlobalAveragePooling2D()
    return keras.Sequential(
        [pool, layers.Dense(3, activation="relu"), layers.Dense(2, activation="softmax")], name=name
    )


def sequential():
    convolution = layers.Conv2D(3, 3, activation="relu", input_shape=(8, 6, 3))
    return keras.Sequential([convolution, layers.BatchNormalization(), *head().layers])


def sequential_built_by_a_call():
    model = head()
    model(tf.zeros((1, 8, 6, 3)))
    return model


def sequential_of_base():
    return keras.Sequential([trunk(), layers.GlobalAveragePooling2D(), layers.Dropout(0.3), layers.Dense(2)])


def sequential_head():
    base = trunk()
    return keras.Model(base.input, head()(base.output))


def sequential_in_sequential():
    inner = keras.Sequential([layers.Conv2D(3, 3, input_shape=(8, 6, 3)), layers.PReLU(shared_axes=[1, 2])])
    return keras.Sequential([inner, keras.Sequential([head("inner_head")], name="outer_head")])


def base_in_inference_mode():
    """As guides to transfer learning do it: the base without training, augmentation before it."""
    image = keras.Input((8, 6, 3))
    x = layers.RandomRotation(0.1)(layers.RandomFlip("horizontal")(image))
    x = layers.Rescaling(1 / 127.5, offset=-1)(x)
    x = trunk()(x, training=False)
    return keras.Model(image, head()(x))


def normalization_of_data():
    image = keras.Input((8, 6, 3))
    normalization = layers.Normalization()
    normalization.adapt(RNG.normal(5, 3, (20, 8, 6, 3)))
    return keras.Model(image, head()(normalization(image)))


def names_with_slashes():
    image = keras.Input((8, 6, 3))
    x = layers.Conv2D(4, 3, name="conv1/conv")(image)
    x = layers.BatchNormalization(name="conv1/bn")(x)
    inner_image = keras.Input((6, 4, 4))
    y = layers.Conv2D(4, 3, name="block/1/conv")(inner_image)
    inner = keras.Model(inner_image, layers.BatchNormalization(name="block/1/bn")(y), name="inner/net")
    return keras.Model(image, layers.GlobalAveragePooling2D(name="pool/all")(inner(x)))


def convolutions():
    image = keras.Input((8, 6, 4))
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, padding="same")(image)
    x = layers.SeparableConv2D(4, 3, padding="same", depth_multiplier=2)(x)
    x = layers.Conv2DTranspose(4, 3, strides=2, padding="same")(x)
    x = layers.Conv2D(4, 3, groups=2, dilation_rate=2)(x)
    x = layers.LeakyReLU(0.2)(layers.ZeroPadding2D(((1, 0), (0, 2)))(x))
    x = layers.UpSampling2D(2, interpolation="bilinear")(layers.Cropping2D(1)(x))
    x = layers.LayerNormalization()(layers.MaxPooling2D(2, padding="same")(x))
    x = layers.GroupNormalization(groups=2)(layers.AveragePooling2D(2, padding="same")(x))
    x = layers.SpatialDropout2D(0.3)(layers.PReLU()(x))
    x = layers.GaussianNoise(0.1)(layers.ELU(0.7)(x))
    x = layers.Reshape((-1, 4))(layers.Permute((2, 1, 3))(x))
    x = layers.Conv1DTranspose(3, 3)(layers.SeparableConv1D(3, 2)(x))
    return keras.Model(image, layers.Flatten()(layers.ThresholdedReLU(0.01)(x)))


def activations():
    x = inputs = keras.Input((6,))
    names = ["elu", "exponential", "gelu", "hard_sigmoid", "linear", "relu", "selu", "sigmoid", "softmax"]
    names += ["softplus", "softsign", "swish", "tanh"]
    outputs = [layers.Dense(3, activation=name)(x) for name in [*names, tf.nn.softmax, tf.nn.relu6, tf.nn.leaky_relu]]
    outputs.append(layers.Dense(3, activation=layers.LeakyReLU(0.1))(x))
    outputs += [layers.Activation("hard_sigmoid")(x), layers.Softmax()(x), layers.ReLU(1.0, 0.1, 0.2)(x)]
    return keras.Model(inputs, layers.Concatenate()(outputs))


def attention():
    image = keras.Input((5, 6))
    query = layers.Dense(8)(image)
    x = layers.MultiHeadAttention(2, 3)(query, image)
    x = layers.Add()([layers.MultiHeadAttention(2, 3, output_shape=8, use_bias=False)(x, value=x, key=query), query])
    x = layers.Attention(use_scale=True)([x, query])
    return keras.Model(image, layers.AdditiveAttention()([x, query]))


def recurrent():
    views = keras.Input((4, 8, 6, 3))
    x = layers.TimeDistributed(trunk(name="view"))(views)
    x = layers.TimeDistributed(layers.GlobalAveragePooling2D())(x)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    x = layers.GRU(4, return_sequences=True)(layers.GRU(4, reset_after=False, return_sequences=True)(x))
    x, h, c = layers.LSTM(3, return_sequences=True, return_state=True)(x)
    x = layers.LSTM(3, return_sequences=True)(x, initial_state=[h, c])
    x = layers.RNN([layers.LSTMCell(3), layers.GRUCell(2)])(x)
    return keras.Model(views, [x, layers.Flatten()(layers.ConvLSTM2D(2, 3, recurrent_activation="sigmoid")(views))])


def words():
    numbers = keras.Input((5,), dtype="int32")
    return keras.Model(numbers, layers.LSTM(3)(layers.Embedding(9, 4, mask_zero=True, input_length=5)(numbers)))


def two_views():
    """A network called on two inputs, and called again on what it gave."""
    views = [keras.Input((8, 6, 3), name=name) for name in ("cc", "mlo")]
    same = keras.Sequential([layers.Conv2D(3, 3, padding="same", input_shape=(8, 6, 3))], name="same")
    first, second = same(views[0]), same(same(views[1]))
    x = layers.Dot(3, normalize=True)(
        [layers.Maximum()([first, second]), layers.Subtract(name="subtract")([first, second])]
    )
    return keras.Model(views, [layers.GlobalMaxPooling2D(keepdims=True)(first - second), layers.Flatten()(x)])


def arithmetic():
    """Operations of TensorFlow, and layers that have names which Keras 3 gives to operations."""
    image = keras.Input((8, 6, 3))
    x = (image / 127.5 - 1) * [0.2, 0.3, 0.4] + 2 ** tf.math.sigmoid(image)
    x = layers.Conv2D(4, 3, name="subtract")(1 - x)
    x = tf.concat([x, tf.nn.relu(-x)[:, ::-1], tf.square(x)], axis=-1)
    x = tf.image.resize(x, (5, 7)) - tf.reduce_mean(x, axis=[1, 2], keepdims=True)
    x = tf.nn.max_pool2d(tf.nn.avg_pool2d(x, 2, 1, "SAME"), 3, 2, "VALID")
    size = tf.shape(x)
    x = tf.reshape(x, [size[0], size[1] * size[2], 12])
    x = tf.transpose(x, [0, 2, 1])[..., 1:4]
    x = tf.clip_by_value(tf.where(x > 0.1, x, 0.5 * x), -1.0, 1.0)
    first, second, third = tf.unstack(x, axis=-1)
    x = tf.stack([first, tf.maximum(second, third)], axis=1)
    x = tf.nn.l2_normalize(x, axis=-1) @ tf.ones((12, 2)) + keras.activations.gelu(tf.expand_dims(third, 1)[:, :, :2])
    low, high = tf.split(keras.backend.mean(x, axis=1), [1, 1], axis=-1)
    return keras.Model(image, tf.nn.softmax(tf.squeeze(tf.cast(tf.stack([low, high], 1), "float32"), -1)))


def nodes_of_a_graph():
    """Operations as the graphs of TensorFlow 1 have them; see `main`."""
    image = keras.Input((8, 6, 3))
    x = (image / 127.5 - 1) * [0.2, 0.3, 0.4] + 2 * tf.sigmoid(image)
    x = tf.concat([x, tf.nn.relu(-x)[:, ::-1], tf.square(layers.Conv2D(2, 3, padding="same")(x))], axis=-1)
    x = tf.reduce_mean(x, axis=[1]) - tf.reduce_max(x, axis=1)
    x = tf.transpose(tf.reshape(x, [-1, 3, 16]), [0, 2, 1])
    return keras.Model(image, tf.nn.softmax(tf.squeeze(tf.expand_dims(x, 1)[:, :, 0], 1)))


def half_precision():
    keras.mixed_precision.set_global_policy("mixed_float16")
    base = trunk()
    pooled = layers.GlobalAveragePooling2D()(base.output)
    model = keras.Model(base.input, layers.Dense(2, activation="softmax", dtype="float32")(pooled))
    keras.mixed_precision.set_global_policy("float32")
    return model


def compiled():
    model = sequential_head()
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    model.fit(RNG.random((2, 8, 6, 3)), np.eye(2), verbose=0)
    return model


KINDS = [
    *(sequential, sequential_built_by_a_call, sequential_of_base, sequential_head, sequential_in_sequential),
    *(base_in_inference_mode, normalization_of_data, names_with_slashes, convolutions, activations, attention),
    *(recurrent, words, two_views, arithmetic, half_precision, compiled),
]


def write(name, model, edit=None):
    """Write a model with random weights, and its predictions."""
    keep = "normalization_of_data", "compiled"
    if name not in keep:
        model.set_weights([draw(weight) for weight in model.weights])
    xs = [draw_input(tensor) for tensor in model.inputs]
    ys = model.predict(xs if len(xs) > 1 else xs[0], verbose=0)
    ys = ys if isinstance(ys, list) else [ys]
    path = FOLDER / f"{name}.h5"
    model.save(path, save_format="h5")
    if edit:
        with h5py.File(path, "r+") as h5:
            edit(h5)
    path.with_suffix(".h5.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    path.unlink()
    arrays = {f"x{i}": x for i, x in enumerate(xs)} | {f"y{i}": y for i, y in enumerate(ys)}
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def draw(weight):
    if "StateVar" in weight.name:
        return weight.numpy()
    values = RNG.normal(0, 0.4, weight.shape)
    return 0.5 + np.abs(values) if "variance" in weight.name else values


def draw_input(tensor):
    shape = (2, *tensor.shape[1:])
    return RNG.integers(0, 9, shape).astype("int32") if tensor.dtype == "int32" else RNG.random(shape, np.float32)


def as_keras_2_0(h5):
    """Give a Sequential model the description that Keras 2.0 to 2.2 wrote: a list, and the shape in the first layer."""
    description = json.loads(h5.attrs["model_config"])
    first, *others = description["config"]["layers"]
    others[0]["config"]["batch_input_shape"] = first["config"]["batch_input_shape"]
    h5.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": others})
    h5.attrs["keras_version"] = "2.1.6"


def main():
    FOLDER.mkdir(exist_ok=True)
    if "--graph" in sys.argv:  # the rest of the process then knows no KerasTensors
        tf.compat.v1.disable_eager_execution()
        write("nodes_of_a_graph", nodes_of_a_graph())
        return
    for kind in KINDS:
        keras.utils.set_random_seed(0)
        write(kind.__name__, kind())
    write("sequential_list", sequential(), as_keras_2_0)


if __name__ == "__main__":
    main()
