"""The figures that the demo and the comparison of starts print and leave, from hand-made runs."""

import json

import pandas as pd
import pytest

from scripts import phantom_summary
from tests.helpers import write_list


def write_run(folder, single, flips, val_auc=(), samples=60):
    folder.mkdir(parents=True)
    scores = {
        way: {"accuracy": 0.9, "auc": {"neg": 0.1, "pos": auc}, "samples": samples}
        for way, auc in (("single", single), ("flips", flips))
    }
    (folder / "metrics.json").write_text(json.dumps(scores))
    history = pd.DataFrame({"epoch": range(1, len(val_auc) + 1), "val_auc": val_auc})
    history.to_csv(folder / "history.csv", index=False)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    from matplotlib.figure import Figure

    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (saved.append(self), savefig(self, *args, **how)))
    return saved


def test_starts(tmp_path, capsys, figures):
    auc = {"scratch": (0.5, 0.7), "from_patch": (0.9, 0.95), "scratch_long": (0.6, 0.8)}
    for start, (first, second) in auc.items():
        write_run(tmp_path / "seed_2" / start, second, second + 0.01, [0.1, 0.2])
        write_run(tmp_path / "seed_10" / start, first, first + 0.02, [0.3, 0.4, 0.5])
    assert phantom_summary.main(["starts", str(tmp_path)]) == 0

    assert (tmp_path / "results.csv").read_text().splitlines() == [
        "start,seed,single,flips",
        "from_patch,2,0.95,0.96",
        "from_patch,10,0.9,0.92",
        "scratch,2,0.7,0.71",
        "scratch,10,0.5,0.52",
        "scratch_long,2,0.8,0.81",
        "scratch_long,10,0.6,0.62",
    ]
    # By hand: the spread of two values is their distance over the root of two.
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["from_patch", "0.925", "0.035", "0.940", "0.028"] in printed
    assert ["scratch", "0.600", "0.141", "0.615", "0.134"] in printed

    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".partial.*"))
    [axes] = figures[0].axes
    curves = [(line.get_color(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert curves == [
        (color, *curve)
        for color in ("C0", "C1", "C2")
        for curve in (([1, 2], [0.1, 0.2]), ([1, 2, 3], [0.3, 0.4, 0.5]))
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(phantom_summary.STARTS.values())


def test_transfer(tmp_path, capsys, figures):
    """Test AUC by hand: of 4 pairs of a positive and a negative image, those that are ranked right."""
    scores = {1.0: [0.1, 0.2, 0.8, 0.9], 0.75: [0.1, 0.6, 0.5, 0.9], 0.25: [0.4, 0.9, 0.5, 0.1]}

    def write(seed, name, auc):
        folder = tmp_path / f"seed_{seed}" / "few_patients" / name
        write_run(folder, auc, auc)
        labels = ("neg", "neg", "pos", "pos")
        rows = [f"{labels[i]}/P_{i}_LEFT_CC.png,{labels[i]},{1 - p},{p}" for i, p in enumerate(scores[auc])]
        write_list(folder / "predictions.csv", rows, "file,label,neg,pos")

    for seed, first, second in ((10, 1.0, 0.75), (2, 0.75, 0.25)):
        write(seed, "finetuned-0-patients", second)
        write(seed, "finetuned-20-patients", first)
        write(seed, "scratch-20-patients", second)
        write(seed, "scratch_long-20-patients", second)
    assert phantom_summary.main(["transfer", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "transfer.csv")
    assert table.groupby(["model", "patients"], sort=False)[["seed", "auc"]].agg(list).to_dict("index") == {
        ("finetuned", 0): {"seed": [2, 10], "auc": [0.25, 0.75]},
        ("finetuned", 20): {"seed": [2, 10], "auc": [0.75, 1.0]},
        ("scratch", 20): {"seed": [2, 10], "auc": [0.25, 0.75]},
        ("scratch_long", 20): {"seed": [2, 10], "auc": [0.25, 0.75]},
    }
    printed = capsys.readouterr().out
    assert "on 4 images of 4 patients" in printed
    # By hand: the spread of two values is their distance over the root of two.
    assert ["20", "0", "0.875", "0.177"] in [line.split() for line in printed.splitlines()]
    [axes] = figures[0].axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_marker() == "None"]
    assert lines == [([0, 20], [0.5, 0.875]), ([20], [0.5]), ([20], [0.5])]
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")


def test_demo(tmp_path, capsys):
    write_run(tmp_path / "patch", 0.5, 0.5, samples=328)
    write_run(tmp_path / "image", 0.98765, 0.9996)
    (tmp_path / "localisation").mkdir()
    header = "images_with_lesions,pointing_accuracy,chance"
    write_list(tmp_path / "localisation" / "localisation.csv", ["40,0.875,0.0214"], header)
    assert phantom_summary.main(["demo", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "patch classifier, test accuracy     0.900 on 328 patches",
        "whole-image classifier, test AUC    0.988 on 60 images",
        "the same, mean of four flips        1.000",
        "maps that point at a lesion         0.875 of 40 images, by chance 0.021",
    ]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("demo", "patch/metrics.json: no such file"),
        ("starts", "Expected the output folder of scripts/patch_or"),
        ("transfer", "Expected the output folder of scripts/transfer_or"),
    ],
)
def test_what_is_missing_is_named(tmp_path, capsys, what, words):
    assert phantom_summary.main([what, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
