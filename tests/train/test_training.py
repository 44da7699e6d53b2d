"""Both trainers' command lines, from folders of images to models, scores and error lines."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import cv2
import keras
import numpy as np
import pandas as pd
import pytest

from ddsm_train import image_clf_train, patch_clf_train, training
from dm_image import DMImageDataGenerator
from dm_keras_ext import DMAucModelCheckpoint, Yaroslav
from mammo.train import checkpoint
from mammo.train.callbacks import plot_history
from tests.helpers import ROOT, write_images
from tests.train.networks import quick_training

SIZE = 64
PIXELS = [
    *("--img-size", str(SIZE), str(SIZE), "--rescale-factor", "0.003891", "--featurewise-mean", "44"),
    *("--no-equalize-hist", "--optimizer", "adam", "--init-learningrate", "0.01", "--batch-size", "8"),
]


def write_sets(folder):
    for seed, part in enumerate(("train", "val", "test")):
        write_images(folder / part, ("neg", "pos"), 6, seed)
    return folder


@pytest.fixture
def data(tmp_path):
    return write_sets(tmp_path)


@pytest.fixture(scope="module")
def patch_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "patch.h5"
    keras.utils.set_random_seed(1)
    checkpoint.save_model(Yaroslav(classes=5, nb_init_filter=1), path)
    return path


def folders(data):
    return [str(data / part) for part in ("train", "val", "test")]


def train_patches(data, *options, quick=True):
    best = str(data / "out" / "best.h5")
    network = ("--net", "yaroslav", "--nb-init-filter", "2", "--no-use-pretrained", "--class-list", "neg", "pos")
    with quick_training() if quick else nullcontext():
        return patch_clf_train.main([*PIXELS, *network, "--best-model", best, *options, *folders(data)])


def train_images(data, *options, quick=True):
    best = str(data / "out" / "best.h5")
    with quick_training() if quick else nullcontext():
        return image_clf_train.main([*PIXELS, "--best-model", best, *options, *folders(data)])


def convert(patch_model):
    """Options of a small whole-image classifier on the patch classifier."""
    net = ["--patch-model-state", str(patch_model), "--patch-net", "yaroslav", "--block-type", "vgg"]
    return [*net, "--img-size", "128", "128", "--top-depths", "4", "--top-repetitions", "1"]


def last_error(capfd):
    return capfd.readouterr().err.splitlines()[-1]


def make_test_set(data):
    generator = DMImageDataGenerator(featurewise_center=True)
    generator.mean = 44.0
    return generator.flow_from_directory(
        data / "test", target_size=(128, 128), rescale_factor=0.003891, classes=["neg", "pos"], shuffle=False
    )


@pytest.mark.parametrize("script", [image_clf_train, patch_clf_train])
def test_options_are_the_published_ones(script, spec):
    parser = script.make_parser()
    by_flag = {flag: action for action in parser._actions for flag in action.option_strings}
    positional = [action.dest for action in parser._actions if not action.option_strings]
    for option in json.loads((spec / "cli_flags.json").read_text())[script.__name__.split(".")[-1]]:
        for flag in option["flags"]:
            assert by_flag[flag].dest == option["dest"], flag
        assert option["flags"] or option["dest"] in positional
        assert parser.get_default(option["dest"]) == option["default"], option["dest"]


@pytest.mark.parametrize("script", [image_clf_train, patch_clf_train])
def test_every_option_is_explained(script):
    assert [action.dest for action in script.make_parser()._actions if not action.help] == []


def test_optional_values_can_be_taken_back():
    parser = image_clf_train.make_parser()
    args = parser.parse_args(
        ["-ic", "4095", "-nic", "--top-layer-nb", "3", "--no-top-layer-nb", "-is", "8", "9", "--no-add-conv", *"abc"]
    )
    assert (args.img_scale, args.top_layer_nb, args.img_size, args.add_conv) == (None, None, [8, 9], False)


def test_help_imports_nothing_heavy():
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from ddsm_train import heatmap_clf_train, heatmap_score, image_clf_train, localise, patch_clf_train
for script in (heatmap_clf_train, heatmap_score, image_clf_train, localise, patch_clf_train):
    try: script.main(['--help'])
    except SystemExit: pass
    assert not {{'keras', 'tensorflow', 'pandas', 'sklearn', 'matplotlib'}} & set(sys.modules), (script, sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_patch_training_leaves_model_scores_and_predictions(data, capsys):
    options = ("--nb-epoch", "4", "--es-patience", "10", "--train-bs-multiplier", "0.25")
    assert train_patches(data, *options, "--augmentation", "--auto-batch-balance", quick=False) == 0
    printed = capsys.readouterr().out
    assert "Minimum val loss achieved at epoch:" in printed
    out = data / "out" / "best"
    history = pd.read_csv(out / "history.csv")
    assert list(history.epoch) == [1, 2, 3, 4]
    # Not the accuracy: the moving averages of batch normalization need hundreds of steps.
    assert history.loss.min() < 0.8 * history.loss[0]
    assert json.loads((out / "args.json").read_text())["nb_init_filter"] == 2
    assert (out / "roc.png").stat().st_size > 0

    # The saved model gives the predictions that were written.
    table = pd.read_csv(out / "predictions.csv")
    images = np.stack([cv2.imread(str(data / "test" / name), cv2.IMREAD_UNCHANGED) for name in table.file])
    x = (images.astype(np.float32) * np.float32(0.003891) - 44)[..., None]
    model = checkpoint.load_model(data / "out" / "best.h5")
    np.testing.assert_allclose(model.predict_on_batch(x), table[["neg", "pos"]], atol=1e-4)
    assert list(table.label) == [name.split("/")[0] for name in table.file]
    metrics = json.loads((out / "metrics.json").read_text())["single"]
    confusion = pd.crosstab(table.label, table[["neg", "pos"]].idxmax(axis=1)).reindex(columns=["neg", "pos"])
    assert metrics["confusion_matrix"] == confusion.fillna(0).to_numpy().tolist()
    assert metrics["accuracy"] == pytest.approx(np.trace(metrics["confusion_matrix"]) / 12)


@pytest.fixture(scope="module")
def converted(patch_model, tmp_path_factory):
    """The folder of image sets and of a whole-image classifier that was trained in both stages, with logs."""
    data = write_sets(tmp_path_factory.mktemp("converted"))
    options = ("--nb-epoch", "1", "--all-layer-epochs", "3", "--tensorboard", str(data / "logs"))
    assert train_images(data, *convert(patch_model), *options, quick=False) == 0
    return data


@pytest.mark.slow
def test_conversion_finetuning_and_the_notebook_agree(converted, capsys):
    data, best = converted, converted / "finetuned.h5"
    options = ["--resume-from", str(data / "out" / "best.h5"), "--nb-epoch", "0", "--all-layer-epochs", "3"]
    options += ["--best-model", str(best), "--load-train-ram", "--load-val-ram"]
    assert train_images(data, *options, "--img-size", "128", "128") == 0
    printed = capsys.readouterr().out
    line = re.findall(r"AUROC on test set: neg: \S+, pos: (\S+), mean: \S+", printed)[-1]
    flips = re.findall(r"AUROC on test set, mean of 4 flips: neg: \S+, pos: (\S+), mean", printed)[-1]

    imgen = DMImageDataGenerator(featurewise_center=True)
    imgen.mean = 44.0
    pixels = {"target_size": (128, 128), "target_scale": None, "rescale_factor": 0.003891, "equalize_hist": False}
    labels = {"classes": ["neg", "pos"], "class_mode": "categorical", "batch_size": 4, "shuffle": False}
    generator = imgen.flow_from_directory(str(data / "test"), dup_3_channels=False, **pixels, **labels)
    model = checkpoint.load_model(best)
    for augment, expected in ((False, line), (True, flips)):
        auc, y_true, y_pred = DMAucModelCheckpoint.calc_test_auc(
            generator, model, test_samples=generator.nb_sample, return_y_res=True, test_augment=augment
        )
        assert f"{auc[1]:.4f}" == expected
        table = pd.read_csv(data / "finetuned" / "predictions.csv")
        np.testing.assert_allclose(y_pred[:, 1], table["pos_flips" if augment else "pos"], atol=1e-5)
        assert y_true.sum() == len(table) == 12


@pytest.mark.slow
def test_workers_and_memory_change_nothing(data, monkeypatch):
    """Same seed, same batches: the losses of a run agree for 1 and 3 workers, from disk and from memory."""
    runs = []
    for workers, memory in (("1", []), ("3", ["--load-train-ram", "--load-val-ram"])):
        monkeypatch.setenv("NUM_CPU_CORES", workers)
        out = data / f"run{workers}"
        files = ("--best-model", f"{out}.h5", "--out-dir", str(out))
        assert train_patches(data, "--nb-epoch", "2", "--augmentation", *files, *memory) == 0
        runs.append(pd.read_csv(out / "history.csv"))
    np.testing.assert_allclose(runs[0].to_numpy(), runs[1].to_numpy(), rtol=1e-4)


def test_nosave_leaves_nothing(data, monkeypatch):
    monkeypatch.chdir(data)
    before = sorted(data.rglob("*"))
    assert train_patches(data, "--nb-epoch", "1", "--best-model", "NOSAVE") == 0
    assert sorted(data.rglob("*")) == before


# --- Bad input: one line on standard error, status 1, no model -----------------------------------------------------


def untouched(data):
    pass


def remove_class(data):
    (data / "val" / "pos").rename(data / "elsewhere")


def empty_class(data):
    for file in (data / "train" / "pos").iterdir():
        file.unlink()


def truncate_image(data):
    file = data / "train" / "pos" / "3.png"
    file.write_bytes(file.read_bytes()[:200])


FAULTS = {
    "class folder missing": (remove_class, [], r"val.pos"),
    "class folder empty": (empty_class, [], r"train.pos"),
    "image cut short": (truncate_image, [], r"3\.png"),
    "image cut short, in memory": (truncate_image, ["--load-train-ram"], r"3\.png"),
    "training folder missing": (lambda data: (data / "train").rename(data / "t"), [], r"train"),
    "unknown net": (untouched, ["--net", "nothing"], r"dm_resnet_14.*nothing"),
    "images too small": (untouched, ["--img-size", "32", "32"], r"--img-size 32 32"),
    "format of the best model": (untouched, ["--best-model", "best.pt"], r"best\.pt.*\.keras"),
    "bare weights as the best model": (untouched, ["--best-model", "a.weights.h5"], r"a\.weights\.h5"),
    "one name for two models": (untouched, ["--final-model", "{best}"], r"--final-model"),
    "best model in a file": (lambda data: (data / "out").write_text(""), [], r"out"),
    "class twice": (untouched, ["--class-list", "neg", "neg", "--es-patience", "1"], r"neg"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_faults_are_named_in_one_line(fault, data, capfd):
    spoil, options, pattern = FAULTS[fault]
    spoil(data)
    options = [option.format(best=data / "out" / "best.h5") for option in options]
    assert train_patches(data, "--nb-epoch", "1", *options) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert re.search(pattern, errors[0])
    assert "Traceback" not in errors[0]
    assert not (data / "out" / "best.h5").exists()


def test_skipping_an_unreadable_image_goes_on_and_lists_it(data, capfd):
    truncate_image(data)
    assert train_patches(data, "--nb-epoch", "1", "--on-error", "skip") == 0
    assert "3.png" in "".join(capfd.readouterr())
    assert (data / "out" / "best.h5").exists()


MODEL_FAULTS = {
    "no model": ([], r"--patch-model-state.*--resume-from"),
    "no such file": (["--resume-from", "absent.h5"], r"absent\.h5"),
    "another class count": (["--resume-from", "{patch}", "--nb-epoch", "0"], r"patch\.h5.*2 classes.*5"),
    "not a model": (["--resume-from", "{text}"], r"text\.h5"),
    "no weights of this kind": (["--patch-model-state", "{text}"], r"text\.h5"),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_model_faults_are_named_in_one_line(fault, data, patch_model, capfd):
    options, pattern = MODEL_FAULTS[fault]
    (data / "text.h5").write_text("not a model")
    assert train_images(data, *[o.format(patch=patch_model, text=data / "text.h5") for o in options]) == 1
    assert re.search(pattern, last_error(capfd))


def test_a_constant_whole_image_is_refused(data, patch_model, capfd):
    cv2.imwrite(str(data / "train" / "neg" / "2.png"), np.full((SIZE, SIZE), 700, np.uint16))
    assert train_images(data, *convert(patch_model), "--nb-epoch", "1", "--all-layer-epochs", "1") == 1
    assert re.search(r"neg.2\.png.*constant", last_error(capfd))
    assert train_patches(data, "--nb-epoch", "1") == 0


def test_networks_of_another_kind_are_refused(data, capfd):
    """Vectors, two images, maps instead of classes: each named before any image is read."""
    layers = keras.layers
    vector, image, other = layers.Input((5,)), layers.Input((SIZE, SIZE, 1)), layers.Input((SIZE, SIZE, 1))
    pooled = layers.GlobalAveragePooling2D()
    nets = {
        "vector.keras": (vector, layers.Dense(2)(vector)),
        "views.keras": ([image, other], layers.Dense(2)(layers.Add()([pooled(image), pooled(other)]))),
        "map.keras": (image, layers.Conv2D(2, 1)(image)),
    }
    for name, (inputs, outputs) in nets.items():
        checkpoint.save_model(keras.Model(inputs, outputs), data / name)
        for option in ("--resume-from", "--patch-model-state"):
            assert train_images(data, option, str(data / name), "--nb-epoch", "0") == 1
            assert name in last_error(capfd)


def test_class_weights_need_two_or_three_classes(tmp_path, capfd):
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, "abcd", 1, 0)
    assert train_patches(tmp_path, "--class-list", *"abcd", "--pos-cls-weight", "2") == 1
    assert "--auto-batch-balance" in last_error(capfd)


@pytest.mark.parametrize("top_layer_nb", [[], ["--top-layer-nb", "99"]])
def test_the_first_layer_to_train_is_checked_before_the_images(data, top_layer_nb, capfd):
    checkpoint.save_model(Yaroslav(classes=2, nb_init_filter=1), data / "net.keras")
    assert train_images(data / "absent", "--resume-from", str(data / "net.keras"), *top_layer_nb) == 1
    assert "--top-layer-nb" in last_error(capfd)


@pytest.mark.slow
def test_networks_without_imagenet_weights_train_all_layers(data, capsys):
    assert train_patches(data, "--net", "dm_resnet_14", "--use-pretrained", "--nb-epoch", "1") == 0
    assert "dm_resnet_14 has no ImageNet weights" in capsys.readouterr().out


@pytest.mark.slow
def test_a_diverged_training_is_scored_with_its_best_model(data, patch_model, monkeypatch, capfd):
    """Predictions turn NaN after the first epoch: said by epoch, and the first epoch's model is scored."""
    score, epochs = DMAucModelCheckpoint.calc_test_auc, []

    def diverging(test_set, model, *args, **kwargs):
        epochs.append(model)
        if len(epochs) > 1:
            model.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
        return score(test_set, model, *args, **kwargs)

    monkeypatch.setattr(DMAucModelCheckpoint, "calc_test_auc", staticmethod(diverging))
    options = ("--es-patience", "0", "--nb-epoch", "3", "--all-layer-epochs", "3")
    assert train_images(data, *convert(patch_model), *options) == 0
    captured = capfd.readouterr()
    assert "epoch 2" in captured.err and "--init-learningrate" in captured.err
    assert re.search(r"AUROC on test set: neg: \d", captured.out)


def test_a_model_for_another_image_size_is_refused(data, capfd):
    checkpoint.save_model(Yaroslav((96, 96, 1), classes=2, nb_init_filter=1), data / "fixed.h5")
    assert train_images(data, "--resume-from", str(data / "fixed.h5"), "--nb-epoch", "0") == 1
    assert re.search(r"fixed\.h5.*64 64.*96 x 96", last_error(capfd))


def test_one_class_validation_says_so_and_the_loss_decides(data, patch_model, capfd):
    for file in (data / "val" / "pos").iterdir():
        file.unlink()
    assert train_images(data, *convert(patch_model), "--nb-epoch", "2", "--all-layer-epochs", "2") == 0
    errors = capfd.readouterr().err
    assert "AUC is undefined" in errors
    assert re.search(r"warning: \S*val.pos: no images", errors)
    assert (data / "out" / "best.h5").exists()


@pytest.mark.parametrize(
    "options", [["--optimizer", "sdg"], ["--batch-size", "0"], ["--img-size", "8"], ["--hidden-dropout", "1.5"]]
)
def test_wrong_options_end_with_status_2(options, data, capsys):
    with pytest.raises(SystemExit) as ended:
        train_patches(data, *options)
    assert ended.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX accumulates on several devices")
def test_accumulation_on_several_devices_is_refused(data, monkeypatch, capfd):
    monkeypatch.setenv("NUM_GPU_DEVICES", "2")
    for options in (["--accumulate", "2"], ["--jit"]):
        assert train_patches(data, *options) == 1
        assert re.search(f"{options[0]}.*NUM_GPU_DEVICES", last_error(capfd))


def test_options_of_a_step_reach_it(data, monkeypatch):
    """All options that say how stages train, with values of their own."""
    seen = {}

    def stages_seen(model, stages, *sets, **options):
        seen.update(options, stages=stages)
        return []

    monkeypatch.setattr(training, "train_stages", stages_seen)
    options = ["--accumulate", "3", "--optimizer", "nadam", "--es-patience", "7", "--lr-patience", "4"]
    options += ["--frozen-bn", "inference", "--pos-cls-weight", "2", "--no-auto-batch-balance"]
    jit = keras.backend.backend() != "torch"
    assert train_patches(data, *options, *(["--jit"] if jit else [])) == 0
    expected = {"accumulate": 3, "optim": "nadam", "es_patience": 7, "lr_patience": 4, "frozen_bn": "inference"}
    expected |= {"class_weight": {0: 1.0, 1: 2.0}, "jit": jit}
    assert {name: seen[name] for name in expected} == expected
    assert seen["stages"][0].lr == 0.01


def test_a_wrong_environment_variable_is_named(data, monkeypatch, capfd):
    monkeypatch.setenv("RANDOM_SEED", "many")
    assert train_patches(data) == 1
    assert "RANDOM_SEED" in last_error(capfd)


def test_run_from_python_checks_names(data):
    with pytest.raises(TypeError, match="batch_sice"):
        patch_clf_train.run(train_dir="a", val_dir="b", test_dir="c", batch_sice=3)
    with pytest.raises(TypeError, match="test_dir"):
        patch_clf_train.run(train_dir="a", val_dir="b")


def test_from_scratch_keeps_the_network_and_draws_its_weights_anew(data, patch_model):
    """Nothing of the file's weights is left, and one seed gives one network."""

    def built(*more):
        keras.utils.set_random_seed(3)
        options = [*convert(patch_model), "--nb-epoch", "0", *more, *folders(data)]
        return image_clf_train.build_model(image_clf_train.make_parser().parse_args(options))[0]

    started, scratch, again = built(), built("--from-scratch"), built("--from-scratch")
    old = checkpoint.load_model(patch_model)
    assert [w.shape for w in scratch.weights] == [w.shape for w in started.weights]
    for ours, theirs in zip(scratch.weights, started.weights, strict=True):
        if ours.path.endswith("/kernel"):
            assert not np.array_equal(ours, theirs)
    for layer in old.layers:
        if layer.name.endswith("conv1"):
            np.testing.assert_array_equal(started.layers[1].get_layer(layer.name).kernel, layer.kernel)
    assert all(np.array_equal(one, two) for one, two in zip(scratch.get_weights(), again.get_weights(), strict=True))


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_training_and_names_batch_and_files(data, capfd):
    """The first step of an absurd rate makes the second batch's loss overflow; no model is saved, none is scored."""
    assert train_patches(data, "--nb-epoch", "3", "--init-learningrate", "1e38") == 1
    lines = capfd.readouterr().err.splitlines()
    stopped = next(line for line in lines if line.startswith("training stopped"))
    files = re.search(r"epoch 1 at batch 2: the loss is not finite \((.*)\)", stopped).group(1).split(", ")
    assert len(files) == 4
    assert all(Path(name).is_relative_to(data / "train") and Path(name).is_file() for name in files)
    assert not (data / "out" / "best.h5").exists()
    assert "diverged" in lines[-1]


@pytest.mark.slow
def test_learning_curves_and_tensorboard_logs_cover_all_stages(converted):
    import tensorflow as tf

    written = {}
    for file in sorted((converted / "logs" / "validation").iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(file)):
            for value in event.summary.value:
                if value.tag == "epoch_loss":
                    written[event.step] = float(tf.make_ndarray(value.tensor))
    history = pd.read_csv(converted / "out" / "best" / "history.csv")
    assert len(history) == 3
    assert written == pytest.approx(dict(enumerate(history.val_loss)), rel=1e-5)
    picture = cv2.imread(str(converted / "out" / "best" / "history.png"))
    assert picture is not None and picture.std() > 0


def test_learning_curves_show_each_column_and_stage(tmp_path, monkeypatch):
    """What is drawn, read back from the figure: one panel a metric, both sets in it, a line where a stage begins."""
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    columns = {"loss": [3, 2, 1], "val_loss": [3, 3, 2], "accuracy": [0, 1, 1], "val_accuracy": [0, 0, 1]}
    columns["val_auc"] = [0.5, 0.6, 0.7]
    plot_history(tmp_path / "history.png", pd.DataFrame({"epoch": [1, 2, 3], **columns}), [1])
    panels = figures[0].axes
    assert [axes.get_ylabel() for axes in panels] == ["loss", "accuracy", "auc"]
    curves = [[list(line.get_ydata()) for line in axes.lines] for axes in panels]
    assert curves[0] == [columns["loss"], columns["val_loss"], [0, 1]]
    assert curves[2] == [columns["val_auc"], [0, 1]]
    assert [list(axes.lines[-1].get_xdata()) for axes in panels] == [[1.5, 1.5]] * 3


@pytest.mark.slow
def test_options_that_save_memory_change_neither_the_steps_nor_the_file(data, patch_model):
    """Recomputed activations give the same history; half precision a close one; files compute in float32 as scored."""
    options = [*convert(patch_model), "--nb-epoch", "1", "--all-layer-epochs", "2"]
    options += ["--hidden-dropout", "0.3", "--init-learningrate", "0.001"]
    results = data / "out" / "best"
    histories = {}
    for name, more in {"plain": [], "remat": ["--remat"], "mixed": ["--mixed-precision"]}.items():
        assert train_images(data, *options, *more, "--fresh", quick=True) == 0
        histories[name] = pd.read_csv(results / "history.csv")
    plain = histories.pop("plain")
    pd.testing.assert_frame_equal(histories["remat"], plain, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(histories["mixed"].loss, plain.loss)
    np.testing.assert_allclose(histories["mixed"].loss, plain.loss, rtol=0.25)

    model = keras.models.load_model(data / "out" / "best.h5", compile=False)
    assert {layer.dtype_policy.name for layer in checkpoint.leaf_layers(model)} == {"float32"}
    y_pred = DMAucModelCheckpoint.calc_test_auc(make_test_set(data), model, return_y_res=True)[2]
    table = pd.read_csv(results / "predictions.csv")
    np.testing.assert_allclose(y_pred, table[["neg", "pos"]], atol=1e-6)
