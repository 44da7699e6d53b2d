"""Locks: one run a folder, on every way that a run can end."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mammo.base import files
from mammo.base.files import InputError, check_writable, counted, locked
from tests.helpers import ROOT, varied, write_dicom

HOLD = """
import signal, sys, time
from mammo.base.files import locked
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job and its children ignore it
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
TAKE = """
import os, sys
from argparse import ArgumentParser
import fcntl, mammo.base.cli, mammo.base.files

def run():
    if len(sys.argv) > 2:
        os.setuid(int(sys.argv[2]))  # here, since others may not reach the interpreter
    with mammo.base.files.locked(sys.argv[1], *sys.argv[3:]):
        print("taken")

sys.exit(mammo.base.cli.run_main(ArgumentParser("tool"), run, []))
"""


def take(*arguments):
    command = [sys.executable, "-c", TAKE, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `tmp_path`/out."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_of_the_first(tmp_path, holder):
    second = take(tmp_path / "out")
    assert (second.returncode, second.stdout) == (1, "")
    first = f"process {holder.pid} on {os.uname().nodename}"
    assert second.stderr.startswith(f"tool: error: {tmp_path}/out: another run ({first}) is writing here.")
    assert second.stderr.count("\n") == 1
    assert take(tmp_path / "other").stdout == "taken\n"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_lock_of_a_run_that_was_ended_is_free(tmp_path, holder, sent):
    holder.send_signal(sent)
    holder.wait()
    assert (tmp_path / "out/.lock").exists() == (sent != signal.SIGINT)
    assert take(tmp_path / "out").stdout == "taken\n"
    assert not list((tmp_path / "out").iterdir())


def test_the_lock_ends_with_the_outermost_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        with locked(Path()):
            pass
        assert take(tmp_path).returncode == 1
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    assert take(tmp_path).returncode == 0


def test_outputs_that_share_a_folder_have_locks_of_their_own(tmp_path):
    with locked(tmp_path, "a.npz"):
        assert [path.name for path in tmp_path.iterdir()] == [".a.npz.lock"]
        with locked(tmp_path, "b.npz"):
            refused = take(tmp_path, os.getuid(), "b.npz")
        assert refused.stderr.startswith(f"tool: error: {tmp_path}/b.npz: another run (process {os.getpid()} on ")
        assert take(tmp_path, os.getuid(), "b.npz").returncode == 0
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_removed_meanwhile_is_not_taken_for_ours(tmp_path, monkeypatch):
    """Its holder may remove the file between our opening and our locking it: a third run would make a new one."""
    flock, removed = fcntl.flock, []

    def remove_first(handle, how):
        if not removed:
            removed.append(os.fstat(handle).st_ino)
            os.unlink(tmp_path / ".lock")
            (tmp_path / ".lock").write_text("of another")
        return flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(tmp_path):
        assert (tmp_path / ".lock").stat().st_ino not in removed
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_the_lock_of_a_run_that_came_after_our_folder_went_stays(tmp_path):
    with locked(tmp_path / "out"):
        (tmp_path / "out/.lock").unlink()
        (tmp_path / "out/.lock").write_text("of another")
    assert (tmp_path / "out/.lock").read_text() == "of another"
    with locked(tmp_path / "out"):
        (tmp_path / "out/.lock").unlink()
        (tmp_path / "out").rmdir()


def test_places_that_cannot_be_written_to_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file/out", "Not a directory")):
        with pytest.raises(InputError, match=rf"^{folder}: cannot be written to \({reason}\)$"), locked(folder):
            pass


def test_places_are_checked_for_writing_and_left_as_they_were(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "file/out.csv", "Not a directory"),
        (tmp_path / "file/deep/out.csv", "Not a directory"),
        (Path("/proc/out.csv"), "No such file or directory"),
    ):
        with pytest.raises(InputError, match=rf"^{path}: cannot be written to \({reason}\)$"):
            check_writable(path)
    for path in (tmp_path / "file", tmp_path / "new/deep/out.csv"):
        check_writable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_read_only_folder_is_named():
    """Root may write anywhere: tried as somebody else then."""
    user = os.getuid() or 65534
    with tempfile.TemporaryDirectory() as parent:  # pytest's are private
        os.chmod(parent, 0o755)
        folders = [Path(parent, name) for name in ("open", "closed")]
        for folder, mode in zip(folders, (0o777, 0o555), strict=True):
            folder.mkdir()
            folder.chmod(mode)
        written, refused = (take(folder, user) for folder in folders)
    assert (written.returncode, written.stdout, written.stderr) == (0, "taken\n", "")
    message = f"tool: error: {folders[1]}: cannot be written to (Permission denied)\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", message)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_locks_of_the_file_system_it_is_said(tmp_path, monkeypatch, capsys, code):

    def refuse(handle, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        assert (tmp_path / ".lock").exists()
    assert not list(tmp_path.iterdir())
    message = capsys.readouterr().err
    assert message.startswith(f"warning: {tmp_path}: the file system has no locks ({os.strerror(code)})")
    assert message.count("\n") == 1


def test_other_faults_of_the_lock_end_the_run(tmp_path, monkeypatch):

    def fail(handle, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(InputError, match=r"cannot be written to .Input/output error"), locked(tmp_path):
        pass


# -------------------------------------------------------------------------------------------- who takes the lock


def test_data_are_prepared_by_one_run_at_a_time(tmp_path, holder):
    from mammo.base.work import Job, run_resumable

    with pytest.raises(InputError, match=f"^{tmp_path}/out: another run .process {holder.pid} on "):
        run_resumable([Job("a", (), (), None)], None, tmp_path, tmp_path / "out", ["images"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_the_lock_of_a_preparation_covers_its_report(tmp_path, monkeypatch):
    """A run of other options that began in between would have its images told by this run's report."""
    from mammo.commands import dicom_to_png

    write_dicom(tmp_path / "download/a.dcm", varied((8, 8)))
    written, refused = dicom_to_png.write_text, []

    def attempt_then_write(path, text):
        refused.append(take(tmp_path / "out").returncode)
        written(path, text)

    monkeypatch.setattr(dicom_to_png, "write_text", attempt_then_write)
    assert dicom_to_png.main([str(tmp_path / "download"), str(tmp_path / "out")]) == 0
    assert refused == [1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "images", "images.csv", "manifest.jsonl", "options.json", "report.json"
    ]  # fmt: skip


def test_what_took_hours_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """Else a machine that loses power may keep the new name and not its content."""
    calls, sync, replace = [], os.fsync, os.replace

    def log_sync(handle):
        name = Path(os.readlink(f"/proc/self/fd/{handle}")).name
        is_writable = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
        calls.append(("sync", "content" if name.startswith(".partial.") and is_writable else name))
        sync(handle)

    def log_replace(source, target):
        calls.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", log_sync)
    monkeypatch.setattr(os, "replace", log_replace)
    for durable, expected in (
        (False, [("replace", "model.h5")]),
        (True, [("sync", "content"), ("replace", "model.h5"), ("sync", tmp_path.name)]),
    ):
        calls.clear()
        with files.atomic_write(tmp_path / "model.h5", durable) as temporary:
            temporary.write_bytes(b"weights")
        assert calls == expected


def test_one_is_counted_without_an_s():
    said = [counted(number, "image") for number in (0, 1, 2, 1566)]
    assert said == ["0 images", "1 image", "2 images", "1,566 images"]
