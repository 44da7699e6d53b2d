"""Run scripts as `python` does, without the minutes that TensorFlow takes to turn each training step into a graph."""

import os
import runpy
import sys

sys.argv = sys.argv[1:]
if sys.argv[0].endswith("_clf_train.py") and os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow":
    import tensorflow

    tensorflow.config.run_functions_eagerly(True)
runpy.run_path(sys.argv[0], run_name="__main__")
