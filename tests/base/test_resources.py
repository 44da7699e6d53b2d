"""Too little memory, too few open files, no permission: one line, exit status 1, and no image taken for a bad one."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mammo.base import files
from mammo.commands import check_data
from tests.helpers import varied, write_dicom, write_picture

resource = pytest.importorskip("resource")
HERE = Path(files.__file__).parents[2]

# Runs a command line's main with so many MiB more address space than after its imports, or so many open files.
LIMITED = """
import importlib, resource, sys

sys.path[:0] = [{here!r}]
main = importlib.import_module({module!r}).main
for name in {imports!r}:
    importlib.import_module(name)
extra, files = {extra!r}, {files!r}
if extra is not None:
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra * 2**20,) * 2)
if files is not None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
sys.exit(main(sys.argv[1:]))
"""


def run(module, *arguments, imports=(), extra=None, files=None, **options):
    """The finished process of `module.main(arguments)`."""
    code = LIMITED.format(here=str(HERE), module=module, imports=imports, extra=extra, files=files)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def error_line(process):
    """The one line of its own that a failed command line writes; native libraries may write others."""
    assert process.returncode == 1, process.stderr[-2000:]
    assert "Traceback" not in process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("-c: error: ")]
    assert len(lines) == 1, process.stderr[-2000:]
    return lines[0].removeprefix("-c: error: ")


# ------------------------------------------------------------------------------------------------------ memory

READERS = ("cv2", "numpy", "mammo.images.reading", "mammo.images.check", "joblib", "tqdm", "concurrent.futures.thread")
needs_statm = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")


@needs_statm
@pytest.mark.parametrize("kind", ["png", "dcm"])
def test_an_image_that_does_not_fit_the_memory_is_not_at_fault(tmp_path, kind):
    """Where it was left out as damaged, sets would shrink without a word with --on-error skip."""
    path, imports = tmp_path / "images" / f"big.{kind}", READERS
    if kind == "png":
        write_picture(path, varied((5000, 5000)))
    else:
        write_dicom(path, varied((5000, 5000)))
        imports = (*READERS, "pydicom.pixels", "pydicom.pixels.decoders")
    table = tmp_path / "t.csv"
    short = run("mammo.commands.check_data", path, "--table", table, "--jobs", 1, imports=imports, extra=40)
    assert error_line(short).startswith("out of memory")
    assert "big" not in table.read_text()  # nothing is known of it
    enough = run("mammo.commands.check_data", path, "--table", table, "--jobs", 1, imports=imports, extra=4000)
    assert (enough.returncode, enough.stderr) == (0, "")


@needs_statm
def test_preparation_says_that_memory_is_short(tmp_path):
    write_dicom(tmp_path / "download" / "a.dcm", varied((5000, 5000)))
    imports = (*READERS, "mammo.data.prepare", "pydicom.pixels", "pydicom.pixels.decoders")
    for on_error in ("stop", "skip"):
        options = ["--on-error", on_error]
        process = run("mammo.commands.dicom_to_png", tmp_path / "download", tmp_path / "out", *options,
                      imports=imports, extra=40)  # fmt: skip
        assert error_line(process).startswith("out of memory")
        left = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert sorted(left) == ["manifest.jsonl", "options.json"]
    assert run("mammo.commands.dicom_to_png", tmp_path / "download", tmp_path / "out").returncode == 0


@needs_statm
@pytest.mark.slow
def test_training_says_that_memory_is_short(tmp_path):
    """2,000 images of 1152 x 896 in memory take 4 GB."""
    image = write_picture(tmp_path / "image.png", varied((64, 64)))
    for part in ("train", "val", "test"):
        for label in ("neg", "pos"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for k in range(1000 if part == "train" else 2):
                os.link(image, folder / f"{k}.png")
    imports = ("dm_keras_ext", "ddsm_train.training", "pandas", "sklearn.metrics", "matplotlib.figure")
    process = run(
        "ddsm_train.patch_clf_train", *(tmp_path / part for part in ("train", "val", "test")),
        *("--img-size", 1152, 896, "--class-list", "neg", "pos", "--net", "yaroslav", "--nb-init-filter", 1),
        *("--no-use-pretrained", "--load-train-ram", "--best-model", tmp_path / "out/best.h5"),
        imports=imports, extra=2500,
    )  # fmt: skip
    message = error_line(process)
    assert message.startswith("out of memory (Unable to allocate 3.8")
    assert "--load-train-ram" in message
    assert not (tmp_path / "out/best.h5").exists()


def test_too_many_open_files_are_no_fault_of_an_image(tmp_path):
    write_picture(tmp_path / "images" / "a.png", varied((8, 8)))
    imports = (*READERS, "mammo.base.guards")
    process = run(
        "mammo.commands.check_data", tmp_path / "images", "--table", tmp_path / "t.csv", imports=imports, files=3
    )
    assert error_line(process).startswith("Too many open files")
    assert not (tmp_path / "t.csv").exists()


# -------------------------------------------------------------------------------------------------- permission


def obey_permissions():
    """Root may read and write anything by two capabilities, which are given up here for what is executed next."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if os.getuid() == 0 and prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "prctl")


@pytest.fixture
def forbidding():
    """Options of `run` under which permissions hold for every user."""
    try:
        subprocess.run(["true"], preexec_fn=obey_permissions, check=True)
    except (subprocess.SubprocessError, AttributeError):
        pytest.skip("root cannot give up its rights here")
    return {"preexec_fn": obey_permissions}


def test_images_that_may_not_be_read_are_listed(tmp_path, forbidding):
    for name in ("a.png", "b.png"):
        write_picture(tmp_path / "images" / name, varied((8, 8)))
    (tmp_path / "images/b.png").chmod(0)
    table = tmp_path / "t.csv"
    process = run("mammo.commands.check_data", tmp_path / "images", "--table", table, **forbidding)
    message = f"The first: {tmp_path}/images/b.png: cannot be read: Permission denied"
    assert error_line(process) == f"1 image cannot be used; {table} lists all. {message}"
    assert "  unreadable: 1, such as\n" in process.stdout
    (tmp_path / "images/b.png").chmod(0o600)
    assert run("mammo.commands.check_data", tmp_path / "images", "--table", table, **forbidding).returncode == 0


def test_a_folder_that_may_not_be_read_is_named(tmp_path, forbidding):
    (tmp_path / "images" / "closed").mkdir(parents=True)
    (tmp_path / "images" / "closed").chmod(0)
    process = run("mammo.commands.check_data", tmp_path / "images", **forbidding)
    assert error_line(process) == f"Permission denied: {tmp_path}/images/closed"


def test_outputs_into_a_folder_that_may_not_be_written_to_are_refused(tmp_path, forbidding):
    write_picture(tmp_path / "images/a.png", varied((8, 8)))
    write_dicom(tmp_path / "download/a.dcm", varied((8, 8)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o555)
    process = run("mammo.commands.check_data", tmp_path / "images", "--table", tmp_path / "out/t.csv", **forbidding)
    assert error_line(process) == f"Permission denied: {tmp_path}/out/t.csv"
    process = run("mammo.commands.dicom_to_png", tmp_path / "download", tmp_path / "out", **forbidding)
    assert error_line(process) == f"{tmp_path}/out: cannot be written to (Permission denied)"
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_gone_is_named(tmp_path, capsys):
    assert check_data.main([str(tmp_path / "nowhere.png"), "--table", str(tmp_path / "t.csv")]) == 1
    assert "nowhere.png: cannot be read: No such file or directory" in capsys.readouterr().err
