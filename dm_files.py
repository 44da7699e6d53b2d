"""Bad input and whole outputs: the one error type users see, and files that appear only when complete."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Reading the umask means setting it, for all threads: done once, while there is one.
_UMASK = os.umask(0)
os.umask(_UMASK)
_PARTIAL = ".partial."


class InputError(ValueError):
    """Something the user gave is wrong: says what, in which file or option, and what to do about it.

    Command lines print its message as one line on standard error and exit with status 1.
    """


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, renamed to `path` when the block ends without error.

    The temporary name keeps the suffix of `path`, since writers choose their format by it. A reader of `path`
    sees the old file or the new one, never a part. On error the old file stays and the temporary one is
    removed; only a killed process leaves it (`remove_partial`). Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f"{_PARTIAL}{path.stem[:40]}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _copy_permissions(temporary, path)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partial(folder: str | os.PathLike) -> None:
    """Remove what `atomic_write` left in `folder` when its process was killed. Not while others write there."""
    for path in Path(folder).glob(f"{_PARTIAL}*"):
        path.unlink(missing_ok=True)


def _copy_permissions(temporary: Path, path: Path) -> None:
    """mkstemp makes files private; give ours the mode of the file they replace, or the user's default."""
    if path.exists():
        mode = path.stat().st_mode & 0o777
    else:
        mode = 0o666 & ~_UMASK
    os.chmod(temporary, mode)
