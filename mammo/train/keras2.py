"""Compute losses, metrics and optimizer steps with the arithmetic of Keras 2, which the published program used."""

from typing import Any

import keras
from keras import ops

from mammo.base.files import InputError
from mammo.train.devices import mean_over_devices


class WeightedCrossentropy(keras.losses.CategoricalCrossentropy):
    """Categorical cross-entropy averaged over the samples of non-zero weight, as Keras 2 did, of all devices.

    Keras 3 divides by all samples instead, so that a class of weight 0 would shrink the gradient of the others, and
    with TensorFlow by those of each device. Samples without a class, which fill up batches for several devices, do
    not count.
    """

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        weight = _has_class(y_true)
        if sample_weight is not None:
            weight = weight * ops.reshape(ops.cast(sample_weight, weight.dtype), (-1,))
        loss = super().__call__(y_true, y_pred, weight)
        samples = ops.cast(ops.shape(weight)[0], loss.dtype)
        counted = ops.sum(ops.cast(ops.not_equal(weight, 0), loss.dtype))
        return ops.divide_no_nan(loss * samples, mean_over_devices(counted))


class Accuracy(keras.metrics.CategoricalAccuracy):
    """Share of the samples that are predicted right, whatever their weights, without the samples of no class."""

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        return super().update_state(y_true, y_pred, _has_class(y_true))


def _has_class(y_true):
    """1.0 for each one-hot label, 0.0 for rows of zeros."""
    return ops.cast(ops.any(ops.not_equal(ops.convert_to_tensor(y_true), 0), axis=-1), "float32")


class DMMetrics:
    """Sensitivity and specificity of class 1 (malignant, or `pos`) as Keras metric functions."""

    @staticmethod
    def sensitivity(y_true: Any, y_pred: Any) -> Any:
        """Return the share of the class-1 samples (one-hot or 0/1 labels) that are predicted as class 1."""
        truth, guess = _class_one(y_true), _class_one(y_pred)
        return ops.sum(truth * guess) / (ops.sum(truth) + keras.config.epsilon())

    @staticmethod
    def specificity(y_true: Any, y_pred: Any) -> Any:
        """Return the share of the other samples that are not predicted as class 1."""
        truth, guess = _class_one(y_true), _class_one(y_pred)
        return ops.sum((1 - truth) * (1 - guess)) / (ops.sum(1 - truth) + keras.config.epsilon())


def _class_one(y):
    """1 where class 1 is the most probable of the columns, or where a single column is above one half."""
    y = ops.cast(y, "float32")
    if len(y.shape) > 1 and y.shape[-1] > 1:
        return ops.cast(ops.equal(ops.argmax(y, axis=-1), 1), "float32")
    return ops.cast(ops.reshape(y, (-1,)) > 0.5, "float32")


class _RMSprop(keras.optimizers.RMSprop):
    """RMSprop with epsilon added to the root, as Keras 2 had it, not under it."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        lr = ops.cast(learning_rate, variable.dtype)
        velocity = self._velocities[self._get_variable_index(variable)]
        self.assign(velocity, self.rho * velocity + (1 - self.rho) * ops.square(gradient))
        self.assign_sub(variable, lr * gradient / (ops.sqrt(velocity) + self.epsilon))


class _Adagrad(keras.optimizers.Adagrad):
    """Adagrad with epsilon added to the root, likewise."""

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        lr = ops.cast(learning_rate, variable.dtype)
        accumulator = self._accumulators[self._get_variable_index(variable)]
        self.assign_add(accumulator, ops.square(gradient))
        self.assign_sub(variable, lr * gradient / (ops.sqrt(accumulator) + self.epsilon))


class _Nadam(keras.optimizers.Nadam):
    """Nadam with the momentum schedule of its paper: decay 0.96 to the power of 0.004 t, where Keras 3 has t."""

    def build(self, variables: list) -> None:
        super().build(variables)
        # Built by a LossScaleOptimizer, Keras does not track it, and a step of JAX forgets what is not tracked.
        if not any(variable is self._u_product for variable in self.variables):
            self._track_variable(self._u_product)

    def _momentum(self, step, dtype):
        return self.beta_1 * (1 - 0.5 * ops.power(ops.cast(0.96**0.004, dtype), ops.cast(step, dtype)))

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        product = self._u_product
        self.assign(product, product * self._momentum(self.iterations + 1, product.dtype))
        keras.Optimizer._backend_update_step(self, grads, trainable_variables, learning_rate)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        dtype = variable.dtype
        index = self._get_variable_index(variable)
        m, v = self._momentums[index], self._velocities[index]
        now = self._momentum(self.iterations + 1, dtype)
        after = self._momentum(self.iterations + 2, dtype)
        product = ops.cast(self._u_product, dtype)
        self.assign_add(m, (gradient - m) * (1 - self.beta_1))
        self.assign_add(v, (ops.square(gradient) - v) * (1 - self.beta_2))
        v_hat = v / (1 - ops.power(ops.cast(self.beta_2, dtype), ops.cast(self.iterations + 1, dtype)))
        m_hat = after * m / (1 - product * after) + (1 - now) * gradient / (1 - product)
        self.assign_sub(variable, ops.cast(learning_rate, dtype) * m_hat / (ops.sqrt(v_hat) + self.epsilon))


_EPSILON = {"epsilon": 1e-8}
_OPTIMIZERS = {
    "sgd": (keras.optimizers.SGD, {"momentum": 0.9, "nesterov": True}),
    "rmsprop": (_RMSprop, {"name": "rmsprop", "rho": 0.9, **_EPSILON}),
    "adagrad": (_Adagrad, {"name": "adagrad", "initial_accumulator_value": 0.0, **_EPSILON}),
    "adadelta": (keras.optimizers.Adadelta, {"rho": 0.95, **_EPSILON}),
    "adam": (keras.optimizers.Adam, _EPSILON),
    "adamax": (keras.optimizers.Adamax, _EPSILON),
    "nadam": (_Nadam, {"name": "nadam", **_EPSILON}),
}


def create_optimizer(optim_name: str, lr: float, *, accumulate: int = 1) -> keras.Optimizer:
    """Return the optimizer of this name on the command line, with the arithmetic of Keras 2.0.

    It takes one step for the mean gradient of `accumulate` batches. Raises InputError for an unknown name.
    """
    if optim_name not in _OPTIMIZERS:
        expected = "sgd, rmsprop, adagrad, adadelta, adam, adamax or nadam"
        raise InputError(f"--optimizer: Expected {expected}. Received {optim_name}")
    build, options = _OPTIMIZERS[optim_name]
    return build(lr, gradient_accumulation_steps=accumulate if accumulate > 1 else None, **options)
