"""Valid small inputs of every command line, made by code: a folder a target, in which its command runs."""

import contextlib
import csv
import hashlib
import importlib
import io
import json
import pickle
import shutil
import signal
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np

from tests import helpers
from tests.helpers import exam, write_list, write_picture

SIZE = (64, 48)
PARTS = ("train", "val", "test")
LESIONS = "patient_id,side,view,abn_num,pathology,type"
RELEASED = "ddsm-vgg16-512-512-1024x2-extended.h5"


@dataclass(frozen=True)
class Target:
    """One command line and the files of its folder that are mutated, one a case.

    command: module and arguments, in the folder; outputs go to `out`. make: fills the folder with inputs. files:
    patterns of the files that are mutated. weight: how often it is drawn. error: what is on standard error where files
    are at fault, if there is no last line for it.
    """

    name: str
    command: str
    make: Callable[[Path], None]
    files: tuple[str, ...]
    weight: int = 10
    error: str = ""

    @property
    def module(self) -> str:
        return self.command.split()[0]

    @property
    def args(self) -> list[str]:
        return self.command.split()[1:]


def mammogram(seed: int = 0, size: tuple[int, int] = SIZE, dtype=np.uint16) -> np.ndarray:
    """A bright half ellipse on black, with noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: size[0], : size[1]] / np.array(size)[:, np.newaxis, np.newaxis]
    inside = ((rows - 0.5) / 0.4) ** 2 + (columns / 0.7) ** 2 < 1
    img = inside * (0.4 + 0.1 * rng.random(size) + 0.3 * rng.random() * rows)
    return (img * np.iinfo(dtype).max).astype(dtype)


def mask() -> np.ndarray:
    pixels = np.zeros(SIZE, np.uint8)
    pixels[24:36, 8:20] = 255
    return pixels


def write_dicom(path: Path, img: np.ndarray, syntax: str, **tags) -> None:
    """A DICOM file of one image. syntax: of `pydicom.uid`, or RLELossless, to which it is then compressed."""
    import pydicom

    header = {
        "PatientID": "P_1",
        "ImageLaterality": "L",
        "ViewPosition": "CC",
        "PhotometricInterpretation": "MONOCHROME1",
    }
    header |= {"WindowCenter": 2048, "WindowWidth": 4096}
    helpers.write_dicom(path, img >> 4, 12, getattr(pydicom.uid, syntax), **header | tags)


SYNTAXES = {
    "explicit": "ExplicitVRLittleEndian",
    "implicit": "ImplicitVRLittleEndian",
    "deflated": "DeflatedExplicitVRLittleEndian",
    "rle": "RLELossless",
}


# ------------------------------------------------------------------------------------------------------- images


def make_images(folder: Path, ending: str = ".png") -> None:
    dtype = np.uint16 if ending in (".png", ".tif") else np.uint8
    for i in range(6):
        write_picture(folder / "in" / ("pos" if i % 2 else "neg") / f"P_{i}_LEFT_CC{ending}", mammogram(i, dtype=dtype))
    write_picture(folder / "mask.png", mask())


def make_dicoms(folder: Path, syntax: str) -> None:
    for i in range(3):
        path = folder / "in" / ("pos" if i % 2 else "neg") / f"P_{i}_LEFT_CC.dcm"
        write_dicom(path, mammogram(i), SYNTAXES[syntax], PatientID=f"P_{i}")


def make_sampling(folder: Path) -> None:
    rows = []
    for i in range(4):
        malignant = "MALIGNANT" if i % 2 else "BENIGN"
        rows.append(f"P_{i},LEFT,CC,1,{malignant},{'mass' if i < 2 else 'calc'}")
        write_picture(folder / "full" / f"P_{i}_LEFT_CC.png", mammogram(i))
        write_picture(folder / "roi" / f"{'Mass' if i < 2 else 'Calc'}-Training_P_{i}_LEFT_CC_1.png", mask())
    write_list(folder / "lesions.csv", rows, LESIONS)
    (folder / "patients.txt").write_text("".join(f"P_{i}\n" for i in range(4)))


# ---------------------------------------------------------------------------------------------------- downloads


def make_phantom(folder: Path, layout: str) -> None:
    from mammo.commands import phantom

    args = [str(folder / "in"), "--layout", layout, "--patients", "10", "--height", "128", "--width", "128"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = phantom.main([*args, "--jobs", "1", "--oddities", "none", "--views", "CC"])
    assert status == 0


def as_biff2(lines: Sequence[Sequence[str]]) -> bytes:
    """An .xls file of the oldest kind, of text and numbers."""
    records = [(9, struct.pack("<HH", 7, 16))]
    for row, cells in enumerate(lines):
        for column, cell in enumerate(cells):
            place = struct.pack("<HH3x", row, column)
            if cell.isdecimal():
                records.append((3, place + struct.pack("<d", float(cell))))
            elif cell:
                records.append((4, place + struct.pack("B", len(cell)) + cell.encode()))
    return b"".join(struct.pack("<HH", kind, len(data)) + data for kind, data in [*records, (10, b"")])


def write_excel(path: Path, lines: Sequence[Sequence[str]]) -> None:
    """By the name's ending: .xls or .xlsx."""
    if path.suffix == ".xls":
        path.write_bytes(as_biff2(lines))
    else:
        import pandas as pd

        pd.DataFrame(lines).to_excel(path, header=False, index=False)


def make_excel(folder: Path, ending: str) -> None:
    """INbreast with its table in an Excel file."""
    make_phantom(folder, "inbreast")
    [table] = folder.rglob("INbreast.csv")
    write_excel(table.with_suffix(ending), list(csv.reader(table.read_text().splitlines(), delimiter=";")))
    table.unlink()


def make_cmmd(folder: Path) -> None:
    lines = [["ID1", "LeftRight", "Age", "number", "abnormality", "classification", "subtype"]]
    for i in range(6):
        patient = f"D1-000{i}"
        lines.append([patient, "L", "50", "2", "mass", "Malignant" if i % 2 else "Benign", ""])
        path = folder / "in" / "CMMD" / patient / "1-1.dcm"
        write_dicom(path, mammogram(i), SYNTAXES["explicit"], PatientID=patient)
    write_excel(folder / "in" / "CMMD_clinicaldata_revision.xlsx", lines)


def make_vindr(folder: Path) -> None:
    header = "study_id,series_id,image_id,laterality,view_position,height,width,breast_birads,breast_density,split"
    rows = []
    for i in range(8):
        part = "test" if i > 5 else "training"
        rows.append(f"study{i},series{i},image{i},L,CC,64,48,BI-RADS {4 if i % 2 else 1},DENSITY C,{part}")
        write_dicom(folder / "in" / "images" / f"study{i}" / f"image{i}.dicom", mammogram(i), SYNTAXES["explicit"])
    write_list(folder / "in" / "breast-level_annotations.csv", rows, header)


def make_own_table(folder: Path) -> None:
    make_images(folder)
    rows = []
    for i in range(6):
        rows.append(f"{'pos' if i % 2 else 'neg'}/P_{i}_LEFT_CC.png,{i % 2},P_{i},LEFT,CC,{PARTS[i // 2]}")
    write_list(folder / "labels.csv", rows, "file,label,patient,side,view,set")
    for i, part in enumerate(PARTS):
        (folder / f"{part}.txt").write_text(f"P_{2 * i}\nP_{2 * i + 1}\n")


def make_exams(folder: Path) -> None:
    exams = [exam(i, left=i % 2) for i in range(4)]
    for i in range(4):
        for view in ("L_CC", "R_CC", "L_MLO", "R_MLO"):
            write_picture(folder / "in" / f"{i}_{view}.png", mammogram(i))
    (folder / "exams.pkl").write_bytes(pickle.dumps(exams, 2))


def make_mias(folder: Path) -> None:
    lines = []
    for i in range(1, 9):
        lines.append(f"mdb{i:03} D CIRC {'M' if i % 2 else 'B'} 30 30 5" if i < 7 else f"mdb{i:03} D NORM")
        write_picture(folder / "in" / f"mdb{i:03}.pgm", mammogram(i, dtype=np.uint8))
    (folder / "in" / "Info.txt").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------ predictions, maps, models


def make_predictions(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        f"P_{i // 2}_LEFT_{i}.png,{i % 2},P_{i // 2},LEFT,CC,{rng.random() * 0.6 + 0.3 * (i % 2):.3f}"
        for i in range(24)
    ]
    write_list(folder / "predictions.csv", rows, "file,label,patient,side,view,model")


def make_maps(folder: Path, ending: str) -> None:
    from mammo.maps.files import Grid, HeatmapRecord, save_heatmaps

    rng, records = np.random.default_rng(0), []
    for i in range(12):
        path = folder / "full" / f"P_{i}_LEFT_CC.png"
        write_picture(path, mammogram(i))
        write_picture(folder / "roi" / f"Mass-Training_P_{i}_LEFT_CC_1.png", mask())
        grid = Grid(SIZE, (4.0, 4.0), (8.0, 8.0))
        heatmap = rng.dirichlet([1, 1], (8, 6)).astype(np.float32)
        views = {"cc": heatmap, "cc_file": str(Path("full", path.name)), "cc_grid": grid}
        if i % 3 == 0:
            views |= {"mlo": heatmap[::-1], "mlo_file": views["cc_file"], "mlo_grid": grid}
        records.append(HeatmapRecord(f"P_{i}", "LEFT", i % 2, **views))
    options = {"window": [16.0, 16.0]}
    save_heatmaps(folder / f"maps{ending}", records, class_names=["bg", "mass"], strides=(8, 8), options=options)


def make_trees(folder: Path, kind: str) -> None:
    from mammo.maps import trees as clf

    make_maps(folder, ".npz")
    heatmaps = clf.load_breasts([folder / "maps.npz"])
    cancer = np.array([record.cancer for record in heatmaps.records])
    features = clf.feature_table(heatmaps, [0.5], 1)
    model = clf.make_model(kind, 3, 0)
    clf.save_classifier(folder / "trees.skops", clf.HeatmapClassifier.fit(model, heatmaps, features, cancer, [0.5], 1))


def make_model(folder: Path, ending: str) -> None:
    """A whole-image classifier on a nested net, as small as can be; with the options of its training beside it."""
    import keras
    from keras import layers

    from mammo.images.pixels import PUBLISHED_PIXELS
    from mammo.train.checkpoint import save_model

    inner = keras.Sequential([layers.Input((None, None, 3)), layers.Conv2D(2, 3, strides=2, padding="same")])
    patch_in = layers.Input((None, None, 3))
    patch = keras.Model(patch_in, layers.BatchNormalization()(inner.layers[0](patch_in)), name="patch")
    whole = layers.Input((*SIZE, 3))
    x = layers.GlobalAveragePooling2D()(layers.Activation("relu")(patch(whole)))
    model = keras.Model(whole, layers.Dense(2, activation="softmax")(layers.Dropout(0.1)(x)))
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder / f"model{ending}")
    write_picture(folder / "in" / "P_1_LEFT_CC.png", mammogram())
    options = PUBLISHED_PIXELS | {"img_size": list(SIZE), "featurewise_mean": 50.0}
    (folder / "model").mkdir()
    (folder / "model" / "args.json").write_text(json.dumps(options))
    (folder / "breasts.csv").write_text("patient_id,side,cancer\nP_1,LEFT,1\n")


def make_images_to_predict(folder: Path) -> None:
    from mammo.evaluate.preflight import pixel_statistics

    make_model(folder, ".h5")
    statistics = pixel_statistics([mammogram(i).astype(np.float32) * 0.003891 for i in range(20)])
    (folder / "model" / "pixel_stats.json").write_text(json.dumps(statistics))


def make_mapped(command: str, folder: Path) -> None:
    """A model, what to map with it, the maps of an earlier run, and those of one that was stopped."""

    def make(folder):
        make_model(folder, ".h5")
        write_picture(folder / "roi" / "Mass-Training_P_1_LEFT_CC_1.png", mask())

    make_again(make, command, folder)
    parts = folder / "out" / "cam.npz.parts"
    parts.mkdir()
    shutil.copy(folder / "out" / "cam.npz", parts / "P_1_LEFT.npz")


def make_lesions(folder: Path) -> None:
    make_maps(folder, ".npz")
    write_list(folder / "lesions.csv", [f"P_{i},LEFT,CC,1,MALIGNANT,mass" for i in range(12)], LESIONS)


def make_two_maps(folder: Path) -> None:
    from mammo.maps.files import load_heatmaps, save_heatmaps

    make_maps(folder, ".npz")
    maps = load_heatmaps(folder / "maps.npz")
    for record in maps.records:
        record.patient_id = f"Q_{record.patient_id}"
    save_heatmaps(
        folder / "test.npz", maps.records, class_names=maps.class_names, strides=maps.strides, options=maps.options
    )


def make_scored(folder: Path) -> None:
    """A model, a table of images, and a prepared folder."""
    prepare_all = "mammo.commands.prepare csv in prepared --table labels.csv --img-size 64 48 --jobs 1"
    make_again(make_own_table, prepare_all, folder)
    text = (folder / "labels.csv").read_text()
    (folder / "labels.csv").write_text(text.replace(",train", ",test"))
    make_model(folder, ".h5")


def make_downloaded(folder: Path) -> None:
    (folder / "out").mkdir(parents=True)
    (folder / "out" / RELEASED).write_bytes(b"a model")
    (folder / "out" / "SHA256SUMS").write_text(f"{hashlib.sha256(b'a model').hexdigest()}  {RELEASED}\n")


# ---------------------------------------------------------------------------------------------------- trainings


def make_training(folder: Path, ending: str = ".png") -> None:
    """Sets of a few images, a patch classifier, and a whole-image classifier in `.h5` and `.keras`."""
    import keras

    from dm_keras_ext import Yaroslav
    from mammo.train.checkpoint import save_model

    for part in PARTS:
        for i in range(4):
            path = folder / part / ("pos" if i % 2 else "neg") / f"{part}_{i}{ending}"
            if ending == ".dcm":
                write_dicom(path, mammogram(i), SYNTAXES["explicit"])
            else:
                write_picture(path, mammogram(i, dtype=np.uint16 if ending == ".png" else np.uint8))
    make_model(folder, ".h5")
    keras.utils.set_random_seed(0)
    patch = Yaroslav(classes=2, nb_init_filter=2)
    for kind in (".h5", ".keras"):
        save_model(keras.saving.load_model(folder / "model.h5", compile=False), folder / f"model{kind}")
        save_model(patch, folder / f"patch{kind}")


def train_images(options: str, sets: str = ".") -> str:
    """Command line of the trainer, in a folder of `make_training`. sets: the folder of the sets."""
    epochs = "--nb-epoch 0 --all-layer-epochs 0 --no-test-augment --best-model out/best.h5"
    pixels = "--img-size 64 48 --rescale-factor 0.003891 --batch-size 4"
    parts = " ".join(f"{sets}/{part}" for part in PARTS)
    return f"ddsm_train.image_clf_train {pixels} {epochs} {options} {parts}"


def train_patches(options: str) -> str:
    epochs = "--nb-epoch 0 --all-layer-epochs 0 --top-layer-epochs 0 --top-layer-nb 2"
    pixels = "--img-size 128 96 --rescale-factor 0.003891 --batch-size 4"
    network = "--net yaroslav --class-list neg pos --best-model out/best.keras"
    return f"ddsm_train.patch_clf_train {pixels} {epochs} {network} {options} {' '.join(PARTS)}"


# The checks of images name them by their whole path: this one is right in any folder that a command runs in.
STOPPED = train_images(
    "--resume-from model.h5 --top-layer-nb 2 --nb-epoch 1 --all-layer-epochs 2 --on-error skip", sets="/proc/self/cwd"
)


def make_stopped(folder: Path) -> None:
    """A training whose first stage has ended, and which was stopped after the first step of the second."""
    from ddsm_train import image_clf_train

    def stop(callback, batch, logs=None):
        if callback._epoch == 1:
            signal.raise_signal(signal.SIGTERM)

    make_training(folder)
    with contextlib.chdir(folder), mock.patch("mammo.train.callbacks.FiniteLoss.on_train_batch_end", stop), quiet():
        status = image_clf_train.main(STOPPED.split()[1:])
    assert status == 143


@contextlib.contextmanager
def quiet():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def make_again(make: Callable[[Path], None], command: str, folder: Path) -> None:
    """Inputs of a command, and what it makes of them."""
    make(folder)
    module, *args = command.split()
    with contextlib.chdir(folder), quiet():
        status = importlib.import_module(module).main(args)
    assert status == 0


# ------------------------------------------------------------------------------------------------------ targets


def prepare(data_set: str, options: str = "") -> str:
    return f"mammo.commands.prepare {data_set} in out {options} --img-size 32 24 --jobs 1 --on-error skip"


MEAN = "mammo.commands.pixel_mean in --img-size 32 24"
CHECK = "mammo.commands.check_data in --table out/t.csv --jobs 1"
SAMPLE = (
    "ddsm_train.sample_patches_combined lesions.csv roi patients.txt full out/train out/val --target-height 64 "
    "--patch-size 16 --nb-bkg 1 --nb-abn 1 --nb-hns 1 --val-size 0.5 --no-segment-breast --jobs 1"
)


def targets() -> list[Target]:
    """All of them. The cheap ones are drawn more often."""
    result = []

    def add(name, command, make, files, weight=10, error=""):
        result.append(Target(name, command, make, tuple(files.split()), weight, error))

    for ending in (".png", ".jpg", ".tif", ".bmp"):
        make, file = partial(make_images, ending=ending), f"in/neg/P_0_LEFT_CC{ending}"
        add(f"mean of {ending}", MEAN, make, file, 40)
        add(f"check of {ending}", CHECK, make, file, 40)
        lesion = f"mammo.commands.draw_lesions {file} out/x.png mask.png"
        add(f"lesion on {ending}", lesion, make, f"{file} mask.png", 30)
        add(f"folders of {ending}", prepare("folders"), make, file, 15)
    for syntax in SYNTAXES:
        make, file = partial(make_dicoms, syntax=syntax), "in/neg/P_0_LEFT_CC.dcm"
        add(f"DICOM {syntax}", "mammo.commands.dicom_to_png in out --voi-lut --on-error skip", make, file, 60)
        add(f"mean of {syntax}", MEAN, make, file, 20)
        add(f"check of {syntax}", CHECK, make, file, 20)
    add("sampling", SAMPLE, make_sampling, "lesions.csv patients.txt full/P_0*.png roi/*P_0*.png", 60)
    cbis, make = prepare("cbis-ddsm"), partial(make_phantom, layout="cbis-ddsm")
    add("CBIS-DDSM tables", cbis, make, "in/**/*.csv", 50)
    add("CBIS-DDSM images", cbis, make, "in/**/*.dcm", 15)
    inbreast, make = prepare("inbreast", "--roi-masks"), partial(make_phantom, layout="inbreast")
    add("INbreast tables", inbreast, make, "in/**/*.csv", 40)
    add("INbreast XML", inbreast, make, "in/**/*.xml", 40)
    add("INbreast images", inbreast, make, "in/**/*.dcm", 15)
    table = prepare("csv", "--table labels.csv")
    add("own table", table, make_own_table, "labels.csv", 40)
    lists = f"{table} --split lists --pat-train train.txt --pat-val val.txt --pat-test test.txt"
    add("own lists", lists, make_own_table, "train.txt")
    exams = prepare("nyu", "--table exams.pkl")
    add("exams", exams, make_exams, "exams.pkl", 25)
    add("MIAS", prepare("mias"), make_mias, "in/Info.txt in/mdb001.pgm", 25)
    evaluate = "mammo.commands.evaluate --predictions predictions.csv --out-dir out --bootstrap 20"
    add("predictions", evaluate, make_predictions, "predictions.csv", 15)
    for ending in (".npz", ".h5", ".pkl"):
        localise = f"ddsm_train.localise maps{ending} --roi-mask-dir roi --out-dir out"
        add(f"maps {ending}", localise, partial(make_maps, ending=ending), f"maps{ending}", 40)
    for kind in ("rf", "gbt"):
        score = "ddsm_train.heatmap_clf_train maps.npz --model trees.skops --out-dir out --bootstrap 20"
        add(f"trees {kind}", score, partial(make_trees, kind=kind), "trees.skops", 20)
    for ending in (".h5", ".keras"):
        predict = f"mammo.commands.predict model{ending} in --out out/p.csv --jobs 1"
        add(f"model {ending}", predict, partial(make_model, ending=ending), f"model{ending}", 50)
    make = partial(make_model, ending=".h5")
    add("options", "mammo.commands.predict model.h5 in --out out/p.csv --jobs 1", make, "model/args.json")
    cam = "ddsm_train.heatmap_score in model.h5 --img-size 64 48 --pat-csv breasts.csv --out out/cam.npz"
    add("breasts", cam, make, "breasts.csv")

    for ending in (".xls", ".xlsx"):
        add(f"INbreast {ending}", inbreast, partial(make_excel, ending=ending), f"in/**/*{ending}", 20)
    add("CMMD", prepare("cmmd"), make_cmmd, "in/*.xlsx in/**/D1-000[01]/*.dcm", 20)
    add("VinDr-Mammo", prepare("vindr"), make_vindr, "in/*.csv in/images/study[01]/*", 20)
    add("images of exams", exams, make_exams, "in/0*.png")
    make = partial(make_again, make_own_table, table)
    add("own table again", table, make, "out/manifest.jsonl out/images.csv", 40)
    make = partial(make_again, make_sampling, SAMPLE)
    add("sampling again", SAMPLE, make, "out/train/manifest.jsonl out/train/options.json", 20)
    check = "mammo.commands.check_data /proc/self/cwd/in --table out/t.csv --jobs 1"
    add("check again", check, partial(make_again, make_images, check), "out/t.csv", 20)
    sums = f"mammo.commands.download_models {Path(RELEASED).stem} --out-dir out"
    add("sums", sums, make_downloaded, "out/SHA256SUMS", 5, error="Fetch with a browser:")

    predict = "mammo.commands.predict model.h5 in --out out/p.json --flips --overlay out/pictures --jobs 1"
    files = "in/*.png model/*.json"
    add("images to predict", predict, make_images_to_predict, files, 20, error=" at fault:")
    overlay = f"{cam} --overlay out/pictures --roi-mask-dir roi --jobs 1"
    files = "in/*.png roi/*.png out/*.npz out/cam.npz.parts/*.npz"
    add("maps again", overlay, partial(make_mapped, overlay), files, 20)
    lesions = "ddsm_train.localise maps.npz --roi-mask-dir roi --malignant lesions.csv --out-dir out"
    add("lesions", lesions, make_lesions, "lesions.csv roi/*P_1_*.png", 20)
    grow = "ddsm_train.heatmap_clf_train maps.npz --test test.npz --trees 3 --folds 2 --bootstrap 20 --cutoffs 0.5"
    add("growing trees", f"{grow} --out-dir out", make_two_maps, "*.npz", 20)
    score = "--bootstrap 20 --out-dir out --metarepository out/m.csv"
    images = "model.h5 labels.csv --image-dir in --val labels.csv --on-error skip"
    files = "labels.csv in/*/P_[45]*.png"
    add("scored table", f"mammo.commands.evaluate {images} {score}", make_scored, files)
    folder = f"mammo.commands.evaluate model.h5 prepared {score} --report out/r.html"
    add("scored folder", folder, make_scored, "prepared/images.csv", 15)

    for ending, trainer, options in (
        (".png", train_images, "--resume-from model.h5 --load-train-ram --load-val-ram"),
        (".jpg", train_images, "--resume-from model.h5 --on-error skip"),
        (".dcm", train_images, "--resume-from model.h5 --on-error skip --no-check-data --all-layer-epochs 1"),
        (".tif", train_patches, "--on-error skip --equalize-hist"),
        (".bmp", train_patches, "--no-check-data --img-scale 255"),
    ):
        make = partial(make_training, ending=ending)
        add(f"training on {ending}", trainer(options), make, f"*/*/*_0{ending}")
    build = "--patch-net yaroslav --block-type vgg --top-depths 2 --top-repetitions 1 --img-size 192 160"
    for ending in (".h5", ".keras"):
        finetune = train_images(f"--resume-from model{ending} --all-layer-epochs 1")
        add(f"finetuning {ending}", finetune, make_training, f"model{ending}", 15)
        build_on = train_images(f"{build} --patch-model-state patch{ending}")
        add(f"building on {ending}", build_on, make_training, f"patch{ending}", 15)
        train_more = train_patches(f"--resume-from patch{ending}")
        add(f"more training of {ending}", train_more, make_training, f"patch{ending}", 15)
    kept = "out/best/state/*.npz out/best/data_check.csv"
    add("stopped training", STOPPED, make_stopped, f"{kept} train/neg/train_0.png", 30)
    finished = partial(make_again, make_training, STOPPED)
    add("finished training", STOPPED, finished, f"{kept} out/best.h5 test/neg/test_0.png", 20)
    return result
