"""Read and write tables: CSV of any dialect, Excel, columns by their names."""

import csv
import functools
import importlib.util
import io
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath

from mammo.base.files import InputError, atomic_write, one_line
from mammo.base.guards import check_archive, read_bytes, readable

TABLE_SUFFIXES = (".csv", ".xlsx", ".xls")

# What an Excel table may have: cells, also empty ones, and tags in its XML, of which a cell takes four.
_MAX_CELLS, _MAX_TAGS = 2**24, 2**22


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a whole UTF-8 CSV file, its lines ending in a newline alone."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def open_csv(path: str | Path, delimiters: str = ",") -> Iterator[tuple[list[str], Iterator[tuple[str, list[str]]]]]:
    """Yield the header of a CSV file, and its rows, but for empty ones: where each stands ("path, line n"), its cells.

    delimiters: what may divide cells; the one that the header has most of does.
    InputError for what is no UTF-8 text or no CSV, or for a row of more or fewer cells than the header; it names the
    line.
    """
    reader = csv.reader((), strict=True)

    def read_rows():
        line = reader.line_num + 1
        for cells in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if len(cells) != len(header) and any(cells):
                raise InputError(f"{where}: Expected {len(header)} cells. Received {len(cells)}; is the file whole?")
            if any(cells):
                yield where, cells

    try:
        text = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        first = text.readline()
        text.seek(0)
        reader = csv.reader(text, delimiter=max(delimiters, key=first.count), strict=True)
        header = next(reader, [])
        yield header, read_rows()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file: Expected UTF-8 text") from None
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: not a CSV file ({error})") from None


@contextmanager
def open_table(path: str | Path) -> Iterator[tuple[list[str], Iterable[tuple[str, list[str]]]]]:
    """Yield the header and the rows, as `open_csv` does, of a CSV file or of the first sheet of an Excel file.

    Cells of a CSV file are divided by what divides its header: commas, semicolons or tabs.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        with open_csv(path, delimiters=",;\t") as opened:
            yield opened
    elif suffix in TABLE_SUFFIXES:
        header, *lines = _read_excel(path) or [[]]
        yield header, [(f"{path}, row {number}", cells) for number, cells in enumerate(lines, 2) if any(cells)]
    else:
        raise InputError(f"{path}: Expected a table ending in {', '.join(TABLE_SUFFIXES)}")


def _read_excel(path: str | Path) -> list[list[str]]:
    """Return the cells of the first sheet as text; whole numbers have no point."""
    package = {".xls": "xlrd", ".xlsx": "openpyxl"}[Path(path).suffix.lower()]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{path}: reading it needs a package: pip install {package}, or save it as .csv")
    with readable(path, "not a readable table ({})"):
        if package == "openpyxl":
            return _read_xlsx(path)
        import xlrd

        # The first sheet alone: each can claim all cells that the format has.
        rows = xlrd.open_workbook(path, logfile=io.StringIO(), on_demand=True).sheet_by_index(0).get_rows()
        number = xlrd.XL_CELL_NUMBER
        return [[f"{cell.value:.15g}" if cell.ctype == number else str(cell.value) for cell in row] for row in rows]


def _read_xlsx(path: str | Path) -> list[list[str]]:
    """Return the cells of the first sheet as text, in rows of one length, or none.

    Raises InputError where they would fill the memory: one cell far below and to the right makes all those before it,
    and each XML tag an object, of which an archive holds thousands in a few bytes.
    """
    import openpyxl

    check_archive(path, compressed=True)
    with zipfile.ZipFile(path) as archive:
        tags = 0
        for name in archive.namelist():
            with archive.open(name) as member:
                tags += sum(part.count(b"<") for part in iter(functools.partial(member.read, 2**20), b""))
    if tags > _MAX_TAGS:
        raise InputError(f"{path}: refused: a table of {tags} XML tags. Expected at most {_MAX_TAGS}; save it as .csv")
    rows, width, empty = [], 1, []  # of which there may be millions
    with closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
        sheet = book.worksheets[0]
        sheet.reset_dimensions()  # the file's own claim
        for row in sheet.iter_rows(values_only=True):
            cells = list(map(_cell_text, row))
            while cells and not cells[-1]:
                cells.pop()
            width = max(width, len(cells))
            rows.append(cells or empty)
            if len(rows) * max(width, 16) > _MAX_CELLS:  # the format itself has 2**20 rows
                expected = "Expected the table alone on the first sheet, from its first row and column on"
                refused = f"refused: a table of more than {_MAX_CELLS} cells"
                raise InputError(f"{path}: {refused}. {expected}; save it as .csv")
    return [cells + [""] * (width - len(cells)) if cells else cells for cells in rows]


def _cell_text(value) -> str:
    if value is None:
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def plain_header(name: str) -> str:
    """Return the header of a column in small letters, with a space for each "_" or run of spaces."""
    return " ".join(name.replace("_", " ").lower().split())


def find_columns(
    path: str | Path, header: Sequence[str], columns: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> dict[str, int]:
    """Return where in `header` each column is. columns: spellings of each, of which one must be there.

    Spellings are in small letters with spaces; in the header "_" and " " are the same, and so is case. InputError
    names what is missing, by the first spelling, but for the `optional` columns, which are left out.
    """
    names = [plain_header(name) for name in header]
    places, missing = {}, []
    for name, spellings in columns.items():
        if found := [names.index(spelling) for spelling in spellings if spelling in names]:
            places[name] = found[0]
        elif name not in optional:
            missing.append(spellings[0])
    if missing:
        raise missing_columns(path, missing, header)
    return places


def read_columns(
    path: str | Path, columns: Mapping[str, Sequence[str]], optional: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, str]]]:
    """Iterate over rows of a CSV or Excel table: where each stands, its stripped cells by column (`find_columns`)."""
    with open_table(path) as (header, rows):
        places = find_columns(path, header, columns, optional)
        for where, cells in rows:
            yield where, {name: cells[place].strip() for name, place in places.items()}


def missing_columns(path: str | Path, missing: Iterable[str], header: Sequence[str]) -> InputError:
    """Return the error of a table that lacks columns: which, and what there is, cut where it is long."""
    received = one_line(", ".join(header), 100) or "nothing"
    return InputError(f"{path}, line 1: missing columns {', '.join(missing)}. Received {received}")


def is_below(name: str) -> bool:
    """Tell whether a relative path, of any system, can only mean something below the folder it starts from."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    anchored = posix.anchor or windows.anchor or ".." in posix.parts + windows.parts
    return bool(posix.parts) and not anchored and name.isprintable()


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Iterate over rows of a CSV table with these columns: where each stands, its stripped cells; else InputError."""
    with open_csv(path) as (header, rows):
        if wrong := [name for name in columns if header.count(name) != 1]:
            expected = f"Expected {','.join(columns)}. Received {','.join(header)[:200]}"
            raise InputError(f"{path}: missing or repeated columns {', '.join(wrong)}: {expected}")
        places = {name: header.index(name) for name in columns}
        for where, cells in rows:
            yield where, {name: cells[place].strip() for name, place in places.items()}
