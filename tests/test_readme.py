"""The README and docs/ against the programs: their commands, options, paths and links, and what they say to type.

Typed for real are finetuning a model of 2017 and scoring it in a notebook.
"""

import ast
import contextlib
import functools
import gzip
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mammo.__main__ import COMMANDS, main
from mammo.commands.prepare import DATA_SETS
from tests.helpers import ROOT

README = ROOT / "README.md"
GUIDE = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDE, *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
guide = pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.name)


def blocks(page, language):
    """Return the code blocks of a language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def block(language, containing):
    """Return the first code block of the guide that contains a text."""
    return next(b for page in GUIDE for b in blocks(page, language) if containing in b)


def command_lines(page):
    """Return the commands in the shell blocks of a page as lists of words, one a line, without comments."""
    lines = "\n".join(blocks(page, "shell")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.count("'") % 2 == 0]


def anchors(page):
    """Return the names by which links reach the headings of a page, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_nothing_is_left_to_fill_in(page):
    assert "@@" not in page.read_text()


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 10_000


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith(("https://", "http://", "mailto:")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def tree():
    """Return the files and folders that the tree of the README names, patterns resolved."""
    [drawn] = [b for b in blocks(README, "text") if "mammo/" in b]
    folders, named = [], set()
    for line in drawn.splitlines():
        indent, names = re.match(r"( *)([^\s,]+(?:, [^\s,]+)*)", line).groups()
        folder = ROOT.joinpath(*folders[: len(indent) // 2])
        for name in names.split(", "):
            found = list(folder.glob(name))
            assert found, f"{folder / name}: not there"
            named |= set(found)
        if names.endswith("/"):
            folders = [*folders[: len(indent) // 2], names.rstrip("/")]
    return named


def test_the_tree_names_every_module():
    modules = {path for path in ROOT.glob("mammo/**/*.py") if path.name != "__init__.py"}
    modules |= {path for path in ROOT.glob("*.py") if path.name != "setup.py"}
    modules |= {path for path in ROOT.glob("ddsm_train/*.py") if path.name != "__init__.py"}
    assert sorted(modules - tree()) == []


def test_the_inbreast_recipe_is_the_published_command():
    def options(text):
        return re.findall(r"--[a-z][\w-]*(?: (?!--)[^\s$\"\\]+)*", text)

    published = options(block("shell", "RESUME_FROM"))
    assert len(published) == 27
    assert options((ROOT / "ddsm_train" / "train_image_clf_inbreast.sh").read_text()) == published


PASSING_ON = ("reproduce", "subset")  # their further options are those of the trainers


@guide
def test_python_names_are_there(page):
    """Everything that Python blocks import, and the table of names in docs/api.md."""
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert [n.name for n in node.names if not hasattr(importlib.import_module(node.module), n.name)] == []
    for module, names in re.findall(r"^\| `(dm_\w+)` \| (.*) \|$", page.read_text(), flags=re.MULTILINE):
        found = importlib.import_module(module)
        members = {name for kind in vars(found).values() if isinstance(kind, type) for name in dir(kind)} | set(
            dir(found)
        )
        assert [name for name in re.findall(r"`(\w+)`", names) if name not in members] == []


@functools.cache
def help_of(*command):
    """Return the help of a command of `mammo`, or None where there is no such command."""
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        patch.setattr(sys, "argv", ["mammo"])
        try:
            status = main([*command, "--help"])
        except SystemExit as end:
            status = end.code
    return None if status else text.getvalue()


@guide
def test_commands_are_there_and_take_their_options(page):
    """Every `mammo ...` in a block with its options, and every script of ours by its path."""
    for words in command_lines(page):
        for word in words:
            if re.match(r"(ddsm_train|inbreast|scripts)/\S+\.(py|sh)$", word):
                assert (ROOT / word).exists(), word
        if "mammo" in words[:-1]:
            words = words[words.index("mammo") + 1 :]
            text = help_of(*words[: 1 + (words[0] == "prepare")])
            assert text is not None, words
            if words[0] in PASSING_ON:
                text += help_of("train-patch") + help_of("train-image")
            known = re.findall(r"--[\w-]+", text)
            assert [word for word in words if word.startswith("--") and word not in known] == [], words


HELPS = [(name,) for name, *_ in COMMANDS if name != "prepare"] + [("prepare", name) for name in DATA_SETS]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_help_shows_the_command_as_it_is_typed_and_each_default_once(command):
    text = " ".join(help_of(*command).split())
    assert not re.findall(r"python (?:-m mammo|\S+/\S+\.py)", text)
    assert not re.findall(r"\((?:default: )?([^()]+)\) \(default: \1\)", text)


@pages
def test_commands_in_the_text_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for code in re.findall(r"`mammo ([a-z-]+(?: [a-z-]+)?)", text):
        words = code.split()
        assert code == "prepare" or help_of(*words[: 1 + (words[0] == "prepare")]), code


def test_the_readme_names_every_command():
    rows = [line.split("|")[1] for line in README.read_text().splitlines() if line.startswith("| `")]
    named = {word for name in re.findall(r"`([^`]+)`", " ".join(rows)) for word in name.split()}
    assert {word for row in COMMANDS for word in row[0].split()} - named == set()


@pytest.mark.slow
def test_finetuning_and_scoring_as_written(golden, real_mammograms, tmp_path):
    """The whole path with a small network on small images, one a class and set; the figures are not looked at."""
    for part in ("train", "val", "test"):
        for name, image in zip(
            ("neg", "pos"), real_mammograms[:2] if part == "train" else real_mammograms[2:4], strict=True
        ):
            folder = tmp_path / "INbreast" / part / name
            folder.mkdir(parents=True)
            (folder / image.name).symlink_to(image)
    checkpoint = tmp_path / "vgg16_512x1.h5"
    before = gzip.decompress((golden / "checkpoints" / "image_f_vgg16_nodrop_512x1.h5.gz").read_bytes())
    checkpoint.write_bytes(before)

    command = block("shell", "RESUME_FROM")
    command = re.sub(r'RESUME_FROM=".*"', f'RESUME_FROM="{checkpoint}"', command)
    command = command.replace("--all-layer-epochs 50", "--all-layer-epochs 1").replace("1152 896", "160 128")
    command = command.replace("python image", f"{sys.executable} {ROOT}/ddsm_train/image")
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^AUROC on test set: neg: \S+, pos: \S+, mean: \S+$", done.stdout, flags=re.MULTILINE)
    assert checkpoint.read_bytes() == before

    best = "INbreast/transferred_inbreast_best_model"
    table = pd.read_csv(tmp_path / best / "predictions.csv")
    notebook = block("python", "calc_test_auc")
    notebook = re.sub(r'robust_load_model\(".*"\)', f'robust_load_model("{best}.h5")', notebook)
    for old, new in (("mean = 52.18", "mean = 44.33"), ("DDSM/", "INbreast/"), ("1152, 896", "160, 128")):
        assert old in notebook
        notebook = notebook.replace(old, new)
    names = {}
    folder = Path.cwd()
    try:
        os.chdir(tmp_path)
        exec(notebook, names)
    finally:
        os.chdir(folder)
    assert names["test_generator"].filenames == table.file.tolist()
    np.testing.assert_allclose(names["y_pred"], table[["neg_flips", "pos_flips"]], atol=1e-5)
    assert names["auc"].shape == (2,)


@pytest.mark.slow
def test_pages_of_all_functions_are_made_by_the_command_of_the_guide(tmp_path):
    command = next(words for words in command_lines(ROOT / "docs/api.md") if words[0] == "pdoc")
    command[command.index("--output-directory") + 1] = tmp_path
    quick = ["--no-search", "--no-show-source"]
    subprocess.run([sys.executable, "-m", *command, *quick], check=True, capture_output=True)
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.html")}
    assert {path.stem for path in ROOT.glob("dm_*.py")} | {"mammo/images/pixels", "mammo/evaluate/predict"} <= pages
    assert "robust_load_model" in (tmp_path / "dm_keras_ext.html").read_text()
