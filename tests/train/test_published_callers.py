"""The call sequences of the published trainers and of the heatmap script, with tiny networks and drawn images.

They are in our words, but the names, positions and keywords are those that researchers' scripts use.
"""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from dm_image import DMImageDataGenerator, get_prob_heatmap, read_img_for_pred
from dm_inference import make_pred_case
from dm_keras_ext import (
    DMAucModelCheckpoint,
    DMMetrics,
    Yaroslav,
    create_optimizer,
    do_2stage_training,
    do_3stage_training,
    freeze_below,
    get_dl_model,
    load_dat_ram,
    robust_load_model,
)
from dm_multi_gpu import make_parallel
from dm_region import prob_heatmap_features
from dm_resnet import add_top_layers
from mammo.train.callbacks import BestModel
from tests.helpers import write_images
from tests.train.networks import quick_training

PATCH_CLASSES = ["background", "malignant", "benign"]


def generators(mean):
    """Return the augmenting and the plain generator of the trainers."""
    train_imgen = DMImageDataGenerator(featurewise_center=True)
    val_imgen = DMImageDataGenerator(featurewise_center=True)
    train_imgen.mean = val_imgen.mean = mean
    train_imgen.horizontal_flip = train_imgen.vertical_flip = True
    train_imgen.rotation_range = 25.0
    train_imgen.shear_range = 0.2
    train_imgen.zoom_range = [0.8, 1.2]
    train_imgen.channel_shift_range = 20.0
    return train_imgen, val_imgen


def flow_options(class_list, size, **others):
    pixels = {"target_size": [size, size], "target_scale": None, "rescale_factor": 0.003891, "equalize_hist": False}
    return pixels | {"dup_3_channels": False, "classes": class_list, "class_mode": "categorical"} | others


def test_the_patch_trainer(tmp_path):
    for seed, part in enumerate(("train", "val", "test")):
        write_images(tmp_path / part, PATCH_CLASSES, 4, seed)
    best_model = str(tmp_path / "best.h5")
    seen = []

    def preprocess(batch):
        seen.append(len(batch))
        return batch / 2

    model, preprocess_input, top_layer_nb = get_dl_model(
        "yaroslav", 3, True, None, 20, 0.01, 0.0, nb_init_filter=1, init_filter_size=5, pool_size=2, alpha=1e-4
    )
    assert (preprocess_input, top_layer_nb) == (None, 20)
    model, org_model = make_parallel(model, 1)
    train_imgen, val_imgen = generators(44.0)
    options = flow_options(PATCH_CLASSES, 64, batch_size=6, preprocess=preprocess, seed=12345)
    train_generator = train_imgen.flow_from_directory(
        str(tmp_path / "train"), auto_batch_balance=True, shuffle=True, **options
    )
    validation_generator = val_imgen.flow_from_directory(str(tmp_path / "val"), shuffle=False, **options)
    validation_set = load_dat_ram(validation_generator, validation_generator.nb_sample)
    with quick_training():
        model, loss_hist, acc_hist = do_3stage_training(
            model,
            org_model,
            train_generator,
            validation_set,
            validation_steps=None,
            best_model_out=best_model,
            steps_per_epoch=len(train_generator),
            top_layer_nb=top_layer_nb,
            net="yaroslav",
            nb_epoch=1,
            top_layer_epochs=2,
            all_layer_epochs=4,
            use_pretrained=True,
            optim="adam",
            init_lr=0.01,
            top_layer_multiplier=0.1,
            all_layer_multiplier=0.01,
            es_patience=25,
            lr_patience=10,
            auto_batch_balance=True,
            nb_class=len(PATCH_CLASSES),
            pos_cls_weight=1.0,
            neg_cls_weight=1.0,
            nb_worker=4,
            weight_decay2=0.01,
            hidden_dropout2=0.0,
        )
    assert set(seen) == {6} and len(loss_hist) == 4

    (lowest,) = np.where(loss_hist == min(loss_hist))
    assert loss_hist[lowest[0]] == loss_hist.min()
    assert acc_hist[lowest[0]] <= max(acc_hist)
    (best_acc,) = np.where(acc_hist == max(acc_hist))
    org_model.load_weights(best_model)
    metrics = ["accuracy", DMMetrics.sensitivity]
    model.compile(create_optimizer("sgd", 0.0), "categorical_crossentropy", metrics=metrics)
    loss, accuracy, _ = model.evaluate(*validation_set, verbose=0)
    assert accuracy == pytest.approx(acc_hist[best_acc[0]])
    assert np.isfinite(loss)

    test_generator = val_imgen.flow_from_directory(str(tmp_path / "test"), shuffle=False, **options)
    org_model.save(str(tmp_path / "final.h5"))
    final = robust_load_model(str(tmp_path / "final.h5"), custom_objects={"sensitivity": DMMetrics.sensitivity})
    for one in (org_model, final):
        auc = DMAucModelCheckpoint.calc_test_auc(test_generator, one, test_samples=test_generator.nb_sample)
        assert auc.shape == (3,)


def test_the_image_trainer(tmp_path, capsys):
    for seed, part in enumerate(("train", "val", "test")):
        write_images(tmp_path / part, ["neg", "pos"], 4, seed)
    best_model = str(tmp_path / "best.h5")
    patch_model = Yaroslav(classes=3, nb_init_filter=1)
    model, top_layer_nb = add_top_layers(
        patch_model,
        [128, 128],
        "yaroslav",
        "vgg",
        depths=[4],
        repetitions=[1],
        nb_class=2,
        dropout=0.0,
        weight_decay=1e-4,
    )
    model, org_model = make_parallel(model, 1)
    train_imgen, val_imgen = generators(44.0)
    options = flow_options(["neg", "pos"], 128, batch_size=4, preprocess=None, seed=12345)
    raw_generator = DMImageDataGenerator().flow_from_directory(str(tmp_path / "train"), shuffle=False, **options)
    raw_set = load_dat_ram(raw_generator, raw_generator.nb_sample)
    train_generator = train_imgen.flow(
        raw_set[0], raw_set[1], 4, auto_batch_balance=True, preprocess=None, shuffle=True, seed=12345
    )
    validation_set = val_imgen.flow_from_directory(str(tmp_path / "val"), shuffle=False, **options)
    auc_checkpointer = DMAucModelCheckpoint(best_model, validation_set, test_samples=validation_set.nb_sample)
    with quick_training():
        model, loss_hist, _ = do_2stage_training(
            model,
            org_model,
            train_generator,
            validation_set,
            len(validation_set),
            best_model,
            len(train_generator),
            top_layer_nb,
            1,
            2,
            "adam",
            init_lr=0.01,
            all_layer_multiplier=0.1,
            es_patience=25,
            lr_patience=10,
            auto_batch_balance=True,
            nb_class=2,
            pos_cls_weight=1.0,
            neg_cls_weight=1.0,
            nb_worker=4,
            auc_checkpointer=auc_checkpointer,
            weight_decay=1e-4,
            hidden_dropout=0.0,
            weight_decay2=1e-4,
            hidden_dropout2=0.0,
        )
    (lowest,) = np.where(loss_hist == min(loss_hist))
    assert len(loss_hist) == 2 and lowest[0] in (0, 1)
    assert capsys.readouterr().out.count("AUC by class") == 2

    org_model.load_weights(best_model)
    test_generator = val_imgen.flow_from_directory(str(tmp_path / "test"), shuffle=False, **options)
    auc, y_true, y_pred = DMAucModelCheckpoint.calc_test_auc(
        test_generator, model, test_samples=test_generator.nb_sample, return_y_res=True, test_augment=True
    )
    assert auc.shape == (2,) and y_true.shape == y_pred.shape == (8, 2)
    x = read_img_for_pred(
        str(tmp_path / "test/pos/0.png"),
        target_size=[128, 128],
        rescale_factor=0.003891,
        dup_3_channels=False,
        standardizer=val_imgen.standardize,
    )
    single = robust_load_model(best_model).predict(x[np.newaxis], verbose=0)
    plain = DMAucModelCheckpoint.calc_test_auc(test_generator, model, return_y_res=True)[2]
    np.testing.assert_allclose(single[0], plain[4], atol=1e-5)


def test_the_heatmap_sweep_and_the_score_of_a_breast(tmp_path):
    write_images(tmp_path, ["breast"], 3, seed=0, size=96)
    files = [str(tmp_path / "breast" / f"{i}.png") for i in range(3)]
    model = Yaroslav(classes=3, nb_init_filter=1)
    parallel, model = make_parallel(model, 1)

    def maps(img_list):
        return get_prob_heatmap(img_list, 96, 255, 64, 8, parallel, 16, True, 44.0, None, False, False)

    cc, mlo, none = maps(files[:2]), maps(files[2]), maps(None)
    assert none == [None] and len(cc) == 2 and cc[0].shape == mlo[0].shape
    np.testing.assert_allclose(cc[0].sum(axis=-1), 1, rtol=1e-5)
    malignant, benign = prob_heatmap_features(cc[0], 0.0, k=2)
    assert malignant["total_area"] == benign["total_area"] == cc[0].shape[0] * cc[0].shape[1]

    names, cutoffs = ["total_area", "top1_max_intensity"], [0.2, 0.3]
    rows = np.random.default_rng(0).random((10, 2 * len(cutoffs) * 2 * len(names)))
    forests = [RandomForestClassifier(5, random_state=seed).fit(rows, np.arange(10) % 2) for seed in range(2)]
    highest = make_pred_case(cc, mlo, names, cutoffs, forests, k=2)
    assert 0 <= make_pred_case(cc, mlo, names, cutoffs, forests, k=2, use_mean=True) <= highest <= 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_model_saved_while_layers_were_frozen_is_loaded_by_keras_itself(tmp_path, whole):
    """`load_weights` goes by position; in a nested model that used to depend on the stage of the best epoch."""

    def image_model():
        return add_top_layers(Yaroslav(classes=3, nb_init_filter=1), [128, 128], "yaroslav", "vgg", [4], [1])

    (trained, top_layer_nb), (fresh, _) = image_model(), image_model()
    rng = np.random.default_rng(0)
    trained.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in trained.weights])
    freeze_below(trained, top_layer_nb)
    if whole:
        trained.layers[1].trainable = False  # the nested model, as notebooks freeze it
    flags = [variable.trainable for variable in trained.variables]
    keeper = BestModel(tmp_path / "best.h5")
    keeper.set_model(trained)
    keeper.on_epoch_end(0, {"val_accuracy": 1.0})
    assert [variable.trainable for variable in trained.variables] == flags and not all(flags)
    fresh.load_weights(str(tmp_path / "best.h5"))
    for weight, expected in zip(fresh.weights, trained.weights, strict=True):
        np.testing.assert_array_equal(weight, expected)
