"""The models that the paper's authors released: what they are, fetching them, and whether a file is one of them."""

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dm_files import InputError, atomic_write, remove_partial, write_text
from dm_preflight import PUBLISHED
from dm_recipes import FIGURES, Row, read_published, text_table

RELEASED = Path(__file__).resolve().parent / "ddsm_train" / "released.csv"
FOLDER_LINK = "https://drive.google.com/open?id=0B1PVLadG_dCKV2pZem5MTjc1cHc"
CHECKSUMS = "SHA256SUMS"
# Convolutions of each kind of patch network.
CONVOLUTIONS = {"resnet50": 53, "vgg16": 13, "vgg19": 16, "yaroslav": 12}


class Released(NamedTuple):
    """One model: its row of the published figures, number of classes, and where the authors put the file."""

    row: Row
    classes: int
    link: str

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def file(self) -> str:
        return f"{self.row.name}.h5"

    @property
    def drive_id(self) -> str:
        return self.link.partition("id=")[2]


class NoConnectionError(InputError):
    """There is no way to the internet: the other models cannot be fetched either."""


def read_released(path=RELEASED) -> list[Released]:
    published = {row.name: row for row in read_published()}
    with open(path, newline="", encoding="utf-8") as file:
        return [Released(published[row["row"]], int(row["classes"]), row["link"]) for row in csv.DictReader(file)]


def released_table(models: Sequence[Released]) -> str:
    """Name, role, published figures and link of each, as text."""
    rows = []
    for model in models:
        figures = "; ".join(f"{FIGURES[name]} {value:.2f}" for name, value in model.row.figures.items())
        rows.append([model.name, role(model), figures, model.link])
    return text_table(["name", "role", "published", "link"], rows)


def role(model: Released) -> str:
    if model.row.kind == "patch":
        return "patch classifier, to build whole-image classifiers on"
    data = "DDSM" if model.name.startswith("ddsm") else "INbreast"
    return f"whole-image classifier, {data}"


def settings(model: Released) -> dict:
    """The pixel options and classes that the model was trained with, as published."""
    inbreast = {"featurewise_mean": 44.33} if model.name.startswith("inbreast") else {}
    patch = {"img_size": [224, 224], "class_list": ["background", "calc_mal", "calc_ben", "mass_mal", "mass_ben"]}
    return PUBLISHED | inbreast | (patch if model.row.kind == "patch" else {})


def by_hand(models: Sequence[Released], folder) -> str:
    """What to fetch from where, and where to put it."""
    lines = [f"  {model.link}  as  {Path(folder, model.file)}" for model in models]
    return "\n".join(
        [
            "Fetch with a browser:",
            *lines,
            f"All are in {FOLDER_LINK} too. Then give the same command again: it checks them.",
        ]
    )


def gdown_download(drive_id: str, output: str) -> None:
    """Download a file of Google Drive. Raises InputError."""
    try:
        import gdown
    except ImportError:
        raise NoConnectionError("downloads need the package gdown: pip install gdown") from None
    try:
        done = gdown.download(id=drive_id, output=output, quiet=False)
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        if any(kind.__name__ == "ConnectionError" for kind in type(error).__mro__):
            raise NoConnectionError(f"no connection to Google Drive: {text}") from error
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk
            raise
        raise InputError(f"Google Drive does not give the file: {text}") from error
    if done is None:  # as versions before 5 report what failed
        raise InputError("Google Drive does not give the file: it may be asked for too often just now, or be private")


def fetch(model: Released, folder, download: Callable[[str, str], None] = gdown_download) -> bool:
    """Make sure that `<folder>/<name>.h5` is the model: download it where it is not there, check it, and keep its
    SHA-256 in `<folder>/SHA256SUMS`, in the form of `sha256sum`, and its pixel options in `<folder>/<name>/args.json`,
    where `dm_preflight.read_settings` finds them.

    download: of a Drive id to a file. A file that is there is kept as it is. Returns whether it was downloaded.
    Raises InputError for a file that cannot be had, does not open, is another network or is not what it once was;
    a download at fault leaves nothing.
    """
    path, sums_path = Path(folder, model.file), Path(folder, CHECKSUMS)
    sums, there = read_checksums(sums_path), path.exists()
    if there:
        try:
            if path.name in sums:
                check_same(path, sums[path.name])
                return False
            check(path, model)
        except InputError as error:
            raise InputError(f"{error}; remove the file to have it downloaded again") from error
    else:
        try:
            with atomic_write(path) as temporary:
                download(model.drive_id, str(temporary))
                try:
                    check(temporary, model)
                except InputError as error:
                    raise InputError(f"not kept: {error}".replace(str(temporary), "the download")) from error
        finally:
            remove_partial(folder)  # gdown's own temporary files begin as ours do
    settings_path = Path(folder, model.name, "args.json")
    if not settings_path.exists():
        write_text(settings_path, json.dumps(settings(model), indent=1) + "\n")
    sums[path.name] = sha256(path)
    write_text(sums_path, "".join(f"{value}  {name}\n" for name, value in sorted(sums.items())))
    return not there


def check(path, model: Released) -> None:
    """Raise InputError unless the file is a model of the right number of classes, image size and convolutions."""
    from keras.layers import Conv2D

    from dm_checkpoint import leaf_layers, load_model

    with open(path, "rb") as file:
        start = file.read(4096)
    if not start:
        raise InputError(f"{path}: the file is empty (0 bytes)")
    if start.lstrip().startswith((b"<!", b"<h", b"<H")):
        title = re.search(rb"<title>(.*?)</title>", start, re.DOTALL | re.IGNORECASE)
        said = f", which says {title.group(1).decode(errors='replace').strip()!r}" if title else ""
        raise InputError(f"{path}: a web page instead of the file{said}: try again later, or fetch it with a browser")
    network = load_model(path)
    outputs = network.output_shape
    if len(outputs) != 2 or outputs[-1] != model.classes:
        raise InputError(f"{path}: Expected a model of {model.classes} classes. Received outputs of shape {outputs}")
    if len(network.inputs) != 1 or len(network.inputs[0].shape) != 4:
        raise InputError(f"{path}: Expected a model of one image. Received inputs of shape {network.input_shape}")
    built, size = network.input_shape[1:3], settings(model)["img_size"]
    whole = model.row.kind != "patch"
    if whole and any(have not in (None, published) for have, published in zip(built, size, strict=True)):
        raise InputError(f"{path}: Expected a model of images {size[0]} x {size[1]}. Received one of {built}")
    count = sum(isinstance(layer, Conv2D) for layer in leaf_layers(network))
    net = next(net for net in CONVOLUTIONS if net in model.name)
    if CONVOLUTIONS[net] > count or count > _most_convolutions(net, whole):
        body = f"{CONVOLUTIONS[net]} convolutions" + (" and those of the top layers" if whole else "")
        raise InputError(f"{path}: Expected a network of {net}, with its {body}. Received one of {count}")


def _most_convolutions(net: str, whole: bool) -> float:
    """That a network may have: the top layers of a whole-image one add fewer than make it as deep as ResNet50."""
    if not whole:
        return CONVOLUTIONS[net]
    return math.inf if net == "resnet50" else CONVOLUTIONS["resnet50"] - 1


def check_same(path, expected: str) -> None:
    if (digest := sha256(path)) != expected:
        raise InputError(
            f"{path}: not the file that was checked: Expected the SHA-256 {expected}. Received {digest}; "
            f"if this is the right file, delete its line in {CHECKSUMS}"
        )


def read_checksums(path) -> dict[str, str]:
    """SHA-256 by file name, {} where there is no such file. Raises InputError for a damaged one."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError:
        lines = [""]
    sums = {}
    for number, line in enumerate(lines, 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)", line)
        if match is None:
            raise InputError(f"{path}, line {number}: Expected a SHA-256 and a file name. Received {line[:100]!r}")
        sums[match.group(2)] = match.group(1)
    return sums


def sha256(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
