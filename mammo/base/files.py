"""Bad input and whole outputs: the one error type users see, files below a folder, files that appear only when whole.

Only the standard library is imported at the start, since every command line imports this.
"""

import errno
import glob
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# Reading the umask means setting it, for all threads: done once, while there is one.
_UMASK = os.umask(0)
os.umask(_UMASK)

_PARTIAL = ".partial."
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # answers of file systems without, as of some clusters
_LOCKS: set[Path] = set()  # the files that this process has locked


class InputError(ValueError):
    """Tell the user what is wrong in what was given, in which file or option, and what to do about it.

    Command lines print its message as one line on standard error and exit with status 1.
    """


@contextmanager
def naming(what: object) -> Iterator[None]:
    """Put before the message of an InputError of the block what it is about, such as a file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def one_line(text: str, length: int = 2000) -> str:
    """Return a text, perhaps with parts of a file, as one line of printable characters: terminals obey the others."""
    line = "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
    return line if len(line) <= length else line[:length] + " ..."


def counted(number: int, noun: str) -> str:
    """Return a number and what it counts, with an s but for one: "1 image", "1,566 patients"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_file_name(text: str) -> bool:
    """Tell whether a text can be part of a file's name, and leads to no other folder."""
    return text.isprintable() and text.strip(" .") != "" and not any(part in text for part in ("/", "\\", "..", ":"))


def env_int(name: str, default: int, minimum: int | None = None) -> int:
    """Return an environment variable such as `NUM_CPU_CORES`; InputError if it is no whole number or too low."""
    text = os.environ.get(name, "")
    try:
        value = int(text) if text else default
    except ValueError:
        raise InputError(f"environment variable {name}: Expected a whole number. Received {text!r}") from None
    if minimum is not None and value < minimum:
        raise InputError(f"environment variable {name}: Expected at least {minimum}. Received {text}")
    return value


def walk_files(root: str | os.PathLike, skip: Iterable[str | os.PathLike] = ()) -> list[Path]:
    """Return all files below the folder `root`, sorted, without those of the folders in `skip`.

    Links to folders are followed. A folder that several lead to, or that links to one above it, is entered once, by
    its own name where it has one below `root`. Raises OSError for a folder that may not be read.
    """
    files, folders, links = [], [Path(root)], []
    entered = {os.path.realpath(folder) for folder in skip} - {os.path.realpath(root)}
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        for path in sorted(folder.iterdir()):
            if not path.is_dir():
                files.append(path)
            elif path.is_symlink():
                links.append(path)
            else:
                folders.append(path)
    return sorted(files)


@contextmanager
def atomic_write(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed to `path` when the block ends without error.

    The temporary name keeps the suffix of `path`, since writers choose their format by it. A reader of `path`
    sees the old file or the new one, never a part. On error the old file stays and the temporary one is
    removed; only a killed process leaves it (`remove_partial`). Missing parent folders are created. An OSError
    that names no file (a full disk), or the temporary one, gets `path` as its `filename`.

    durable: also when the machine loses power. For what took hours: it waits for the disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _with_filename(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_partial_prefix(path), suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            if durable:
                _sync(temporary, os.O_RDWR)  # older SMB clients refuse it where a file is open for reading alone
            # mkstemp makes files private: they get the mode of the file they replace, or the user's default.
            os.chmod(temporary, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_UMASK)
            os.replace(temporary, path)
            if durable:
                with suppress(OSError):  # of file systems that keep folders in another way; the file is written
                    _sync(path.parent, os.O_RDONLY)
        finally:
            temporary.unlink(missing_ok=True)


def _sync(path: Path, mode: int) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_text(path: str | os.PathLike, text: str) -> None:
    """Write to the end of a UTF-8 text file. A killed process, or a full disk, may leave a part of the text there."""
    with _with_filename(Path(path)), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


@contextmanager
def _with_filename(path: Path) -> Iterator[None]:
    """Give an OSError that names no file (a full disk), or a temporary one, `path` as its `filename`."""
    try:
        yield
    except OSError as error:
        ours = error.filename is None or Path(str(error.filename)).name.startswith(_PARTIAL)
        if ours and error.errno is not None:  # without a number there is a text, which a file name would hide
            error.filename, error.filename2 = str(path), None
        raise


def write_img(path: str | os.PathLike, img: "np.ndarray") -> None:
    """Write an image (H, W[, 1]), or (H, W, 3) in OpenCV order, as PNG or (8-bit only) JPEG, by the name's ending.

    Raises InputError for another ending or an array that is no such image, OSError when the file cannot be written.
    Both name the file, which is written whole or not at all.
    """
    import cv2

    suffix = Path(path).suffix.lower()
    fits = img.ndim >= 2 and img.shape[2:] in ((), (1,), (3,))
    pixel_types = {".png": ("uint8", "uint16"), ".jpg": ("uint8",), ".jpeg": ("uint8",)}
    if suffix not in pixel_types:
        raise InputError(f"{path}: Expected the name of a picture, ending in {', '.join(pixel_types)}")
    if img.dtype.name not in pixel_types[suffix] or not fits or img.size == 0:
        types = " or ".join(pixel_types[suffix])
        raise InputError(f"{path}: Expected an image of {types}. Received {img.dtype} of shape {img.shape}")
    # Encoded in memory: OpenCV's own writing does not say why it failed, and libpng complains by itself.
    encoded = cv2.imencode(suffix, img)[1]
    with atomic_write(path) as temporary:
        temporary.write_bytes(encoded)


def remove_partial(path: str | os.PathLike) -> None:
    """Remove what killed processes left of `atomic_write` in a folder, or of a file. Not while others write there."""
    path = Path(path)
    names = f"{glob.escape(_partial_prefix(path))}????????{glob.escape(path.suffix)}"
    for partial in path.glob(f"{_PARTIAL}*") if path.is_dir() else path.parent.glob(names):
        partial.unlink(missing_ok=True)


def _partial_prefix(path: Path) -> str:
    return f"{_PARTIAL}{path.stem[:40]}."


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a whole UTF-8 text file with `atomic_write`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def check_writable(path: str | os.PathLike) -> None:
    """Raise InputError where no file can be written at `path`, in folders that may be missing. Leaves nothing."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written to ({error.strerror})") from error


@contextmanager
def locked(folder: str | os.PathLike, file: str = "") -> Iterator[None]:
    """Keep other runs from writing to `folder` while the block runs; a missing folder is created.

    file: name of the one output that is meant, where runs share a folder but write other files there.
    What is locked is a hidden file, `.lock` or `.<file>.lock`, which names the process and its host and is removed in
    the end. The lock is flock's: the kernel releases it however the process ends, so that a file that a killed one
    left stops nobody. A block within another for the same output, of the same process, is part of it.

    Raises InputError when another run holds it, or the folder cannot be written to. Where the file system has no
    locks, says so on standard error and goes on.
    """
    folder = Path(folder)
    path = folder.resolve() / (f".{file}.lock" if file else ".lock")
    if path in _LOCKS:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(path, folder / file)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to ({error.strerror})") from error
    try:
        _LOCKS.add(path)
        yield
    finally:
        _LOCKS.remove(path)
        if _is_open_file(path, handle):  # and not one that a run put there after ours was removed with its folder
            path.unlink()
        os.close(handle)


def _lock(path: Path, output: Path) -> int:
    """Return a descriptor of the file `path`, which is ours now. output: what it stands for."""
    import fcntl

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = os.read(handle, 200).decode(errors="replace")
                os.close(handle)
                remedy = "Expected one at a time: wait for it, end it, or name another place"
                run = f"another run{holder and f' ({holder})'}"
                raise InputError(f"{output}: {run} is writing here. {remedy}") from None
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            text = (
                f"warning: {output}: the file system has no locks ({error.strerror}), so a second run that writes here"
            )
            print(f"{text} would not be noticed", file=sys.stderr)
        if _is_open_file(path, handle):
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {os.uname().nodename}".encode())
            return handle
        os.close(handle)  # the run that held it has removed it meanwhile


def _is_open_file(path: Path, handle: int) -> bool:
    """Tell whether the file called `path` is the open one."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a whole JSON file, its keys sorted, paths as text."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, default=os.fspath) + "\n")
