"""Images read before they are used: what each is, and a list by cause of those that cannot be used.

A fault that is found hours into a training costs those hours. What is known of a file is kept in a table by path, size
and time of change, so that each file is read once.
"""

import csv
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mammo.base.files import InputError, counted, env_int
from mammo.base.tables import write_csv
from mammo.base.work import run_parallel
from mammo.images.reading import CAUSES, ImageError, check_constant, check_grey, read_img

TABLE = "data_check.csv"


class ImageCheck(NamedTuple):
    """Hold what was found in a file: a row of the table. `type` to `columns` are empty for an unreadable one."""

    file: str  # absolute
    bytes: int  # -1 of a file that is not there
    changed: int  # nanoseconds since 1970
    type: str  # of the pixels as stored, such as uint16
    rows: int
    columns: int
    cause: str  # why it cannot be used, one of `mammo.images.reading.CAUSES`, or ""
    message: str  # the same in words


def check_image(path: str | os.PathLike, gs_255: bool = False) -> ImageCheck:
    """Read one file. Constant images have that cause, though not all uses exclude them."""
    path = Path(path).absolute()
    stamp = _stamp(path)
    found, cause, message = ("", 0, 0), "", ""
    try:
        img = check_grey(path, read_img(path, gs_255, dicom_16_bit=True))
        found = img.dtype.name, *img.shape
        check_constant(path, img)
    except ImageError as error:
        cause, message = error.cause, str(error)
    except InputError as error:  # it cannot be read at all, or claims more memory than any image takes
        unread = isinstance(error.__cause__, OSError) or not path.is_file()
        cause, message = "unreadable" if unread else "refused", str(error)
    return ImageCheck(str(path), *stamp, *found, cause, message)


def check_images(
    paths: Iterable[str | os.PathLike],
    table: str | Path | None = None,
    allow_constant: bool = True,
    jobs: int | None = None,
    gs_255: bool = False,
) -> list[ImageCheck]:
    """Read the files that `table` does not know, by `jobs` threads (default NUM_CPU_CORES, 4).

    Threads do it as fast as processes, since decoding does not hold Python's lock, and start at once.
    table: a CSV of `ImageCheck` rows that is read, if it is there, and written, even when interrupted; None for none.
    Files that could not be used are read again, since the reason, such as a missing decoder, may lie elsewhere.
    gs_255: see `read_img`; without a table.

    Returns what is known of each file, in the order of `paths`. Constant images are at fault unless allowed.
    """
    jobs = jobs or env_int("NUM_CPU_CORES", 4, minimum=1)
    names = [str(Path(path).absolute()) for path in paths]
    earlier = {} if table is None else read_checks(table)
    known = {name: earlier[name] for name in names if name in earlier and _is_current(earlier[name])}
    new = [name for name in dict.fromkeys(names) if name not in known]
    try:
        check = functools.partial(check_image, gs_255=gs_255)
        for result in run_parallel(check, new, jobs, "threading", "checking images" if new else None):
            known[result.file] = result
    finally:
        if table is not None:
            write_csv(table, ImageCheck._fields, [known[name] for name in sorted(known)])
    return [accept_constant(known[name]) if allow_constant else known[name] for name in names]


def accept_constant(check: ImageCheck) -> ImageCheck:
    """Return the same for a use where constant images are no fault."""
    return check._replace(cause="", message="") if check.cause == "constant" else check


def read_checks(path: str | os.PathLike) -> dict[str, ImageCheck]:
    """Return the rows of a table by file; none where the table is not there or not ours, since it only saves work."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    if not rows or tuple(rows[0]) != ImageCheck._fields:
        return {}
    checks = {}
    for row in rows[1:]:
        with suppress(ValueError):  # a row that is damaged
            file, size, changed, pixel_type, height, width, *why = row
            checks[file] = ImageCheck(file, int(size), int(changed), pixel_type, int(height), int(width), *why)
    return checks


def report_faults(checks: Sequence[ImageCheck], table: str | Path | None = None, on_error: str = "stop") -> None:
    """Print how many images cannot be used, by cause, if any; raise InputError for them, unless to "skip" them."""
    faults = [check for check in checks if check.cause]
    if not faults:
        return
    print(f"{len(faults)} of {len(checks)} images cannot be used:")
    for cause in sorted({fault.cause for fault in faults}, key=CAUSES.index):
        files = [fault.file for fault in faults if fault.cause == cause]
        print(f"  {cause}: {len(files)}, such as", *files[:3], sep="\n    ")
    if on_error == "stop":
        listed = "" if table is None else f"; {table} lists all"
        raise InputError(f"{counted(len(faults), 'image')} cannot be used{listed}. The first: {faults[0].message}")


def warn_of_types(checks: Sequence[ImageCheck]) -> None:
    """Say on standard error if images are of several pixel types, so that no one rescale factor fits them."""
    good = [check for check in checks if not check.cause]
    types = Counter(check.type for check in good).most_common()
    if len(types) > 1:
        example = next(check.file for check in good if check.type == types[-1][0])
        received = f"{', '.join(f'{count} of {name}' for name, count in types)}, such as {example}"
        text = f"no one rescale factor fits images of several pixel types. Received {received}"
        print(f"warning: {text}", file=sys.stderr)


def _stamp(path) -> tuple[int, int]:
    """Return (bytes, time of change) of a file; -1 for one that cannot be asked."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _is_current(check: ImageCheck) -> bool:
    return check.cause in ("", "constant") and (check.bytes, check.changed) == _stamp(check.file)
