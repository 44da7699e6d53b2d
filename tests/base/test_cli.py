"""How command lines end, and outputs that appear whole or not at all."""

import argparse
import os
import stat

import cv2
import numpy as np
import pytest

from mammo.base.cli import add_flag, add_optional, complete, run_main
from mammo.base.files import InputError, atomic_write, env_int, remove_partial, write_img


def parser():
    parser = argparse.ArgumentParser(prog="tool")
    parser.add_argument("source")
    add_optional(parser, "--scale", "-s", type=float, no_flags=["-ns"], help="scale")
    add_flag(parser, "--centre", True, "centre")
    return parser


def test_options_come_as_keyword_arguments():
    seen = []
    assert run_main(parser(), lambda **options: seen.append(options), ["a", "-s", "2", "--no-centre"]) == 0
    assert run_main(parser(), lambda **options: seen.append(options), ["a", "-s", "2", "-ns"]) == 0
    assert seen == [{"source": "a", "scale": 2.0, "centre": False}, {"source": "a", "scale": None, "centre": True}]


class ResourceExhaustedError(Exception):
    """Stand-in for TensorFlow's."""


@pytest.mark.parametrize(
    "error, status, text",
    [
        (InputError("a.png: broken\nbadly"), 1, "tool: error: a.png: broken badly"),
        (OSError(28, "No space left on device", "out.png"), 1, "tool: error: No space left on device: out.png"),
        (MemoryError(), 1, "out of memory\n"),
        (MemoryError("of 8 GB"), 1, "out of memory (of 8 GB)\n"),
        (ResourceExhaustedError("OOM when allocating"), 1, "out of memory\n"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), 1, "out of memory\n"),  # JAX
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "out of memory\n"),  # PyTorch
        (KeyboardInterrupt(), 130, "tool: interrupted"),
    ],
)
def test_failures_are_one_line(error, status, text, capsys):
    def run(**options):
        raise error

    assert run_main(parser(), run, ["a"]) == status
    line = capsys.readouterr().err
    assert text in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["--jobs"], "; use a smaller --jobs"),
        (["--patch-size", "--target-height"], "; use a smaller --target-height or --patch-size"),
        (
            ["--batch-size", "--load-train-ram", "--load-val-ram"],
            "; use a smaller --batch-size, or leave out --load-train-ram and --load-val-ram",
        ),
        (["--batch-size", "--remat"], "; use a smaller --batch-size, or add --remat"),
    ],
)
def test_advice_on_memory_names_the_options_there_are(options, advice, capsys):
    def run(**options):
        raise MemoryError

    tool = parser()
    for option in options:
        tool.add_argument(option)
    assert run_main(tool, run, ["a"]) == 1
    assert capsys.readouterr().err == f"tool: error: out of memory{advice}\n"


def test_our_own_mistakes_are_not_hidden():
    def run(**options):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_main(parser(), run, ["a"])


def test_calls_from_python_get_the_defaults():
    expected = argparse.Namespace(source="a", scale=3, centre=True)
    assert complete(parser(), {"source": "a", "scale": 3}) == expected
    assert complete(parser(), {"scale": 3}, ["a"]) == expected


@pytest.mark.parametrize(
    ("given", "positional", "message"),
    [
        ({}, [], "missing options: source"),
        ({"colour": 1}, ["a"], "unknown options: colour"),
        ({}, ["a", "b"], "too many positional arguments: Expected source. Received 2"),
        ({"source": "b"}, ["a"], "multiple values for keyword argument 'source'"),
    ],
)
def test_calls_from_python_are_checked_as_those_of_functions(given, positional, message):
    with pytest.raises(TypeError, match=message):
        complete(parser(), given, positional)


def test_environment_variables_are_whole_numbers(monkeypatch):
    monkeypatch.setenv("RANDOM_SEED", "7")
    assert env_int("RANDOM_SEED", 1) == 7
    monkeypatch.setenv("RANDOM_SEED", "7.5")
    with pytest.raises(InputError, match=r"RANDOM_SEED.*7\.5"):
        env_int("RANDOM_SEED", 1)
    monkeypatch.delenv("RANDOM_SEED")
    assert env_int("RANDOM_SEED", 1) == 1
    monkeypatch.setenv("NUM_CPU_CORES", "0")
    with pytest.raises(InputError, match=r"NUM_CPU_CORES.*at least 1.*0"):
        env_int("NUM_CPU_CORES", 4, minimum=1)


def test_a_written_file_replaces_the_old_one_and_keeps_its_mode(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with atomic_write(path) as temporary:
        assert temporary.suffix == ".txt" and temporary.parent == path.parent
        temporary.write_text("one")
        assert not path.exists()
    os.chmod(path, 0o600)
    with atomic_write(path) as temporary:
        temporary.write_text("two")
    assert path.read_text() == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("given", [None, "temporary", "other.txt"])
def test_a_full_disk_names_the_output(tmp_path, given, capsys):
    def run(source, **options):
        with atomic_write(source) as temporary:
            raise OSError(28, "No space left on device", str(temporary) if given == "temporary" else given)

    path = tmp_path / "a.txt"
    assert run_main(parser(), run, [str(path)]) == 1
    expected = given if given == "other.txt" else path
    assert capsys.readouterr().err == f"tool: error: No space left on device: {expected}\n"


def test_outputs_that_cannot_be_made_are_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(IsADirectoryError) as caught, atomic_write(tmp_path / "folder.txt"):
        pass
    assert caught.value.filename == str(tmp_path / "folder.txt")
    assert caught.value.filename2 is None
    with pytest.raises(OSError, match="no number"), atomic_write(tmp_path / "a.txt"):
        raise OSError("no number, so the text is all there is")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.txt"]


def test_pictures_are_read_as_written(tmp_path):
    rng = np.random.default_rng(0)
    for name, shape, dtype in (("a.png", (9, 7), "uint8"), ("b.PNG", (9, 7), "uint16"), ("c.png", (9, 7, 3), "uint8")):
        img = rng.integers(0, np.iinfo(dtype).max, shape, dtype)
        write_img(tmp_path / name, img)
        stored = cv2.imread(str(tmp_path / name), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored, img)
    smooth = np.add.outer(np.arange(40), np.arange(30)).astype(np.uint8)
    write_img(tmp_path / "d.jpg", smooth)
    assert (tmp_path / "d.jpg").read_bytes().startswith(b"\xff\xd8\xff")
    np.testing.assert_allclose(cv2.imread(str(tmp_path / "d.jpg"), cv2.IMREAD_UNCHANGED), smooth, atol=3)


@pytest.mark.parametrize(
    "name, shape, dtype",
    [("a", (4, 4), "uint8"), ("a.dcm", (4, 4), "uint8"), ("a.jpg", (4, 4), "uint16"), ("a.png", (4, 4), "float32"),
     ("a.png", (4, 0), "uint8"), ("a.png", (4, 4, 2), "uint8"), ("a.png", (4,), "uint8")],
)  # fmt: skip
def test_what_is_no_picture_is_not_written(tmp_path, name, shape, dtype):
    with pytest.raises(InputError, match=rf"{name}: Expected"):
        write_img(tmp_path / name, np.zeros(shape, dtype))
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_can_be_removed(tmp_path):
    with atomic_write(tmp_path / "a.png") as temporary:
        temporary.write_text("half")
        os.link(temporary, tmp_path / "saved")
        name = temporary.name
    os.rename(tmp_path / "saved", tmp_path / name)
    (tmp_path / ".partial").write_text("the user's own")
    others = {"a.png", ".partial", ".partial.a.12345678.jpg", ".partial.a.b.12345678.png", ".partial.aa.12345678.png"}
    for other in others:
        (tmp_path / other).touch()
    remove_partial(tmp_path / "a.png")
    assert {p.name for p in tmp_path.iterdir()} == others
    remove_partial(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", ".partial"}
