"""Mutations of files: of bytes, and of what a format says by the fields it has."""

import csv
import io
import json
import pickle
import random
import re
import struct
import zipfile
import zlib
from pathlib import Path

from tests.helpers import read_members, write_members

# What numbers in headers become.
NUMBERS = (0, 1, 2, 3, 7, 255, 256, 32767, 32768, 65535, 65536, 2**24, 2**27, 2**31 - 1, 2**31, 2**32 - 1)
# What texts become: names that lead elsewhere, characters that end texts or lines, texts that are too long.
TEXTS = (
    *("", " ", ".", "..", "../../evil", "/tmp/evil", "C:\\evil", "..\\evil", "evil\0.png", "a/b", "~", "con", "-1"),
    *("nan", "1e400", "-inf", "None", "true", '"', "'", "\n", "\r", "\t", ";", ",", "\x1b[31m", "\ufeff", "\u0663"),
    *("é" * 300, "x" * 5000, "9" * 5000, "{}" * 50, "%s%n", "P_0", "LEFT", "RIGHT", "MLO", "MALIGNANT", "0", "1"),
    "99999999999",
)
VALUES = (None, True, False, -1, 0, 1, 2**40, 1e308, float("nan"), "", "x", "../x", [], {}, [[]], "x" * 5000)
DICOM_TAGS = (
    *("Rows", "Columns", "BitsStored", "BitsAllocated", "HighBit", "PixelRepresentation", "SamplesPerPixel"),
    *("PhotometricInterpretation", "NumberOfFrames", "WindowCenter", "WindowWidth", "PatientID", "ViewPosition"),
    *("ImageLaterality", "SeriesDescription", "PixelData", "RescaleSlope", "RescaleIntercept", "PlanarConfiguration"),
)
DICOM_TEXTS = ("PhotometricInterpretation", "PatientID", "ViewPosition", "ImageLaterality", "SeriesDescription")


def mutate(path: Path, rng: random.Random) -> str:
    """Change a file in place, by one to three mutations; returns what was done. Most are of fields that its kind has:
    few files with other bytes get farther than the reader."""
    mutations = FIELDS[path.suffix.lower()] if rng.random() < 0.7 else BYTES
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        mutation = rng.choice(mutations)
        try:
            mutation(path, rng)
            done.append(mutation.__name__)
        except Exception as error:  # of a file that the last mutation has damaged
            done.append(f"{mutation.__name__} ({type(error).__name__})")
    return ", ".join(done)


# -------------------------------------------------------------------------------------------------------- bytes


def _of_bytes(function):
    """A mutation of a file from a function of its bytes, as a bytearray, and the random numbers."""

    def mutation(path, rng):
        data = bytearray(path.read_bytes())
        result = function(data, rng)
        path.write_bytes(data if result is None else result)

    mutation.__name__ = function.__name__
    return mutation


def _part(data, rng) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, start + rng.choice((1, 2, 4, 16, 256, 4096)))


@_of_bytes
def flip_bits(data, rng):
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


@_of_bytes
def flip_bits_of_the_header(data, rng):
    for _ in range(rng.choice((1, 2, 8))):
        data[rng.randrange(min(len(data), 512))] ^= 1 << rng.randrange(8)


@_of_bytes
def truncate(data, rng):
    return data[: rng.choice((0, 1, len(data) - 1, rng.randrange(len(data) + 1)))]


@_of_bytes
def insert(data, rng):
    start = _part(data, rng).start
    data[start:start] = rng.randbytes(rng.choice((1, 2, 16, 1000)))


@_of_bytes
def duplicate(data, rng):
    part = _part(data, rng)
    data[part.stop : part.stop] = bytes(data[part]) * rng.choice((1, 2, 50))


@_of_bytes
def remove(data, rng):
    del data[_part(data, rng)]


@_of_bytes
def blank(data, rng):
    part = _part(data, rng)
    data[part] = rng.choice((b"\0", b"\xff")) * len(data[part])


@_of_bytes
def overwrite_number(data, rng):
    form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
    position = rng.randrange(max(1, min(len(data), rng.choice((64, 512, len(data)))) - struct.calcsize(form)))
    struct.pack_into(form, data, position, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form)))


BYTES = [flip_bits, flip_bits_of_the_header, truncate, insert, duplicate, remove, blank, overwrite_number]


# ------------------------------------------------------------------------------------------------------- images


@_of_bytes
def png_header(data, rng):
    """Sizes and kinds that are wrong, in a header whose checksum is right."""
    field, size = rng.choice(((16, 4), (20, 4), (24, 1), (25, 1), (26, 1), (28, 1)))
    data[field : field + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "big")
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))


@_of_bytes
def png_chunks(data, rng):
    """A chunk left out, repeated or filled otherwise, with a right checksum."""
    chunks, position = [], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunks.append((bytes(data[position + 4 : position + 8]), bytes(data[position + 8 : position + 8 + length])))
        position += 12 + length
    index = rng.randrange(len(chunks))
    kind, content = chunks[index]
    content = zlib.compress(bytes(rng.choice((0, 10, 10**6)))) if kind == b"IDAT" else rng.randbytes(len(content))
    others = ([], [chunks[index]] * 2, [(kind, content)], [(b"tEXt", b"a\0b"), chunks[index]])
    chunks[index : index + 1] = rng.choice(others)
    made = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return bytes(data[:8]) + b"".join(made)


@_of_bytes
def jpeg_header(data, rng):
    start = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    field, size = rng.choice(((4, 1), (5, 2), (7, 2), (9, 1), (1, 1), (2, 2)))
    data[start + field : start + field + size] = (rng.choice(NUMBERS) % 256**size).to_bytes(size, "big")


@_of_bytes
def tiff_header(data, rng):
    (position,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, position)
    entry = position + 2 + 12 * rng.randrange(count)
    field, form = rng.choice(((0, "<H"), (2, "<H"), (4, "<I"), (8, "<I"), (8, "<H")))
    struct.pack_into(form, data, entry + field, rng.choice(NUMBERS) % 2 ** (8 * struct.calcsize(form)))


@_of_bytes
def bmp_header(data, rng):
    struct.pack_into("<I", data, rng.choice((2, 10, 14, 18, 22, 26, 28, 30, 34, 46)), rng.choice(NUMBERS))


@_of_bytes
def pgm_header(data, rng):
    numbers = [match.span() for match in re.finditer(rb"\d+", bytes(data[:40]))][:4]
    start, stop = rng.choice(numbers)
    data[start:stop] = rng.choice((b"0", b"-1", b"65535", b"65536", b"99999", b"9" * 20, b"", b"1.5"))


def dicom_tags(path, rng):
    """A tag with another value, or none."""
    import pydicom

    dataset = pydicom.dcmread(path, force=True)
    name = rng.choice(DICOM_TAGS)
    if rng.random() < 0.3 and name in dataset:
        del dataset[name]
    elif name == "PixelData":
        dataset.PixelData = rng.randbytes(rng.choice((0, 1, 100, 5000, 7000)))
    elif name.startswith(("Window", "Rescale", "Number")) or name in DICOM_TEXTS:
        value = rng.choice((*TEXTS, *NUMBERS, "RGB", "PALETTE COLOR", "MONOCHROME2", "1\\2\\3", "0.5"))
        value = str(value)[:60].encode()
        value += b" " * (len(value) % 2)
        tag = pydicom.tag.Tag(name)
        kind = pydicom.datadict.dictionary_VR(tag)
        element = pydicom.dataelem.RawDataElement(tag, kind, len(value), value, 0, *dataset.original_encoding)
        dataset[tag] = element
    else:
        setattr(dataset, name, rng.choice((*NUMBERS, 8, 12, 14, 16, 64)) % 65536)
    dataset.save_as(path)


@_of_bytes
def dicom_syntax(data, rng):
    """Another transfer syntax than the pixels are in; of the same length, so that the header stays whole."""
    start = bytes(data).find(b"1.2.840.10008.1.2")
    length = struct.unpack_from("<H", data, start - 2)[0]
    data[start : start + length] = rng.choice(
        (b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.5",
         b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.4.90")
    )[:length].ljust(length, b"\0")  # fmt: skip


@_of_bytes
def xls_record(data, rng):
    """A record of an old Excel file with another kind, length or content."""
    records, position = [], 0
    while position + 4 <= len(data):
        records.append(position)
        position += 4 + struct.unpack_from("<H", data, position + 2)[0]
    struct.pack_into("<H", data, rng.choice(records) + rng.choice((0, 2, 4, 6, 8)), rng.choice(NUMBERS) % 65536)


# -------------------------------------------------------------------------------------------------------- texts


def _encoding(rng) -> str:
    return rng.choices(("utf-8", "utf-8-sig", "utf-16", "latin-1"), (90, 6, 2, 2))[0]


def table_cells(path, rng):
    """Cells, rows and columns of a table; perhaps with other quotes, ends of lines and encodings."""
    text = path.read_bytes().decode()
    delimiter = max(",;\t", key=text.splitlines()[0].count)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    for _ in range(rng.choice((1, 1, 3))):
        row = rng.randrange(len(rows))
        column = rng.randrange(len(rows[row]))
        match rng.randrange(8):
            case 0:
                del rows[row][column]
            case 1:
                rows.append(list(rows[row]))
            case 2:
                del rows[row]
            case 3:
                for cells in rows:
                    del cells[column]
            case 4:
                other = rng.choice(rows)
                rows[row][column] = other[min(column, len(other) - 1)]
            case _:
                rows[row][column] = rng.choice((*TEXTS, "x" * 200_000))
    out = io.StringIO()
    delimiter = rng.choices((delimiter, ";", "\t"), (92, 4, 4))[0]
    quoting, end = rng.choice((0, 0, 1)), rng.choice(("\n", "\r\n", "\r"))
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    path.write_bytes(out.getvalue().encode(_encoding(rng), "replace"))


def text_lines(path, rng):
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[rng.randrange(len(lines))] = rng.choice((*TEXTS, rng.choice(lines)))
    path.write_bytes("\n".join(lines).encode(_encoding(rng), "replace"))


def xml_parts(path, rng):
    """An element left out, repeated or with another text; entities; elements within many others."""
    text = path.read_text(encoding="utf-8")
    start, stop = rng.choice([match.span() for match in re.finditer(r"<(\w+)>[^<]*</\1>", text)])
    part = text[start:stop]
    opened = part.partition(">")[0] + ">"
    closed = "</" + part.rpartition("</")[2]
    entities = '<!DOCTYPE a [<!ENTITY e "ee"><!ENTITY f "&e;&e;"><!ENTITY x SYSTEM "file:///etc/passwd">]>'
    match rng.randrange(6):
        case 0:
            text = text[:start] + text[stop:]
        case 1:
            text = text[:stop] + part * rng.choice((1, 1000)) + text[stop:]
        case 2:
            text = text[:start] + opened + rng.choice(TEXTS).replace("<", "") + closed + text[stop:]
        case 3:
            value = rng.choice(("(1e9, 2)", "(nan, 1)", "1", "(,)", "&x;"))
            text = text[:start] + f"<string>{value}</string>" + text[stop:]
        case 4:
            text = re.sub(r"(<\?xml[^>]*>)", r"\1" + entities, text)
            text = text.replace(part, opened + rng.choice(("&f;", "&x;")) + closed)
        case 5:
            text = text[:start] + "<array>" * 20_000 + "</array>" * 20_000 + text[stop:]
    path.write_text(text, encoding="utf-8")


def change_json(value, rng):
    """A JSON value with one part of it, at any depth, left out, replaced or wrapped."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        match rng.randrange(12):
            case 0:
                del value[key]
            case 1:
                value[key] = rng.choice((*VALUES, *NUMBERS, *TEXTS))
            case 2 if isinstance(value, dict):
                value[rng.choice((*TEXTS, *keys))] = value[key]
            case 2:
                value.append(value[key])
            case _:
                value[key] = change_json(value[key], rng)
        return value
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((-value, value + 1, value * 1000, *NUMBERS))
    return rng.choice((*VALUES, *NUMBERS, *TEXTS, value, [value]))


def json_text(text: str, rng) -> str:
    if rng.random() < 0.05:
        return rng.choice(("[" * 100_000, "{}", "", text[: len(text) // 2], '{"a":' * 5000, "9" * 5000))
    return json.dumps(change_json(json.loads(text), rng))


def json_file(path, rng):
    path.write_text(json_text(path.read_text(), rng))


def json_line(path, rng):
    lines = path.read_text().splitlines()
    number = rng.randrange(len(lines))
    lines[number] = json_text(lines[number], rng)
    path.write_text("\n".join(lines) + "\n")


# ----------------------------------------------------------------------------------------------------- archives


def _repack(path, change, compression=zipfile.ZIP_STORED) -> None:
    """Write an archive again, its members, by name, as `change` leaves them."""
    members = read_members(path)
    change(members)
    write_members(path, members, compression)


def _change_member(path, choose, mutation, rng) -> None:
    """Change the member that `choose` names, by a mutation of files."""
    inner = path.with_suffix(".inner")

    def change(members):
        name = choose(members)
        inner.write_bytes(members[name])
        mutation(inner, rng)
        members[name] = inner.read_bytes()
        inner.unlink()

    _repack(path, change)


def archive_members(path, rng):
    """A member left out, added, renamed or changed; perhaps compressed."""

    def change(members):
        name = rng.choice(list(members))
        match rng.randrange(5):
            case 0:
                del members[name]
            case 1:
                members[rng.choice(("../evil", "/tmp/evil", "assets/x", "x" * 300))] = b"x"
            case 2:
                members[rng.choice(("a.npy", "config.json", "schema.json"))] = members.pop(name)
            case 3:
                content = bytearray(members[name])
                for _ in range(8):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                members[name] = bytes(content)
            case 4:
                members[name] = bytes(10**7)

    _repack(path, change, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)))


def archive_json(path, rng):
    def change(members):
        for name in ("config.json", "schema.json"):
            if name in members:
                members[name] = json_text(members[name].decode(), rng).encode()

    _repack(path, change)


def archive_weights(path, rng):
    """The HDF5 file in a `.keras` archive."""
    _change_member(path, lambda members: "model.weights.h5", h5_content, rng)


def archive_xml(path, rng):
    """A part of an Excel file."""

    def choose(members):
        return rng.choice([name for name in members if name.endswith(".xml")])

    _change_member(path, choose, xml_parts, rng)


def npz_arrays(path, rng):
    """Arrays and the header of a map file, or the state of a training."""
    import numpy as np

    with np.load(path) as archive:
        arrays = dict(archive)
    header = "header" if "header" in arrays else "description"
    if rng.random() < 0.6:
        arrays[header] = np.array(json_text(str(arrays[header]), rng))
    else:
        name = rng.choice(sorted(set(arrays) - {header}))
        arrays[name] = _other_array(arrays[name], rng)
    np.savez_compressed(path, **arrays)


def _other_array(array, rng):
    import numpy as np

    return rng.choice(
        (array * np.float32("nan"), array[..., :1], array[0], array[:0], np.zeros((2000, 2000, 2), np.float32),
         array.astype("f8") * 1e300, np.array("text"), np.array([b"x"]), array.astype(complex))
    )  # fmt: skip


def pickled_values(path, rng):
    """The content of a pickle, changed as if it were JSON, its arrays left as they are."""
    content = pickle.loads(path.read_bytes())  # our own seed
    path.write_bytes(pickle.dumps(change_json(content, rng), rng.choice((0, 2, 4))))


def npy_header(path, rng):
    """A shape or type that the array has not, at the same length."""

    def change(members):
        name = rng.choice(sorted(members))
        changes = ((b"(", b"(9"), (b"<f4", b"<f8"), (b"<f4", b"|O8"), (b"False", b"True "), (b"8, 6", b"9**9"))
        old, new = rng.choice(changes)
        members[name] = members[name][:120].replace(old, new)[:120] + members[name][120:]

    _repack(path, change)


# --------------------------------------------------------------------------------------------------------- HDF5


def h5_content(path, rng):
    """An attribute or data set with another value, shape or place."""
    import h5py
    import numpy as np

    with h5py.File(path, "r+") as h5:
        items = []
        h5.visititems(lambda name, item: items.append(name))
        name = rng.choice(items)
        item = h5[name]
        holder = rng.choice((h5, h5, item))
        match rng.randrange(10):
            case 0 | 1 | 2 | 3 if "model_config" in h5.attrs:
                text = h5.attrs["model_config"]
                text = text.decode() if isinstance(text, bytes) else text
                h5.attrs["model_config"] = json_text(text, rng)
            case 0 | 1 | 2 | 3 if "header" in h5:
                text = json_text(h5["header"][()].decode(), rng)
                del h5["header"]
                h5["header"] = text
            case 4 if len(holder.attrs):
                key = rng.choice(list(holder.attrs))
                holder.attrs[key] = rng.choice((1, "x", b"x", [], np.zeros(3), ["a", "b"], h5py.Empty("f4")))
            case 5 if len(holder.attrs):
                del holder.attrs[rng.choice(list(holder.attrs))]
            case 6:
                del h5[name]
            case 7:
                del h5[name]
                links = h5py.SoftLink("/"), h5py.ExternalLink("/etc/passwd", "/"), h5py.SoftLink("/gone")
                h5[name] = rng.choice(links)
            case 8:
                del h5[name]
                if rng.random() < 0.5:
                    h5.create_dataset(name, shape=rng.choice(((2**20, 2**20), (10**5, 10**4), (3,), ())), dtype="f4")
                else:
                    h5[name] = rng.choice((np.zeros((2, 2)), "text", np.zeros(3, "S2"), h5py.Empty("f4")))
            case _ if isinstance(item, h5py.Dataset) and item.dtype.kind == "f":
                content = _other_array(item[()], rng)
                del h5[name]
                h5[name] = content


FIELDS = {
    ".png": [png_header, png_chunks],
    ".jpg": [jpeg_header],
    ".tif": [tiff_header],
    ".bmp": [bmp_header],
    ".pgm": [pgm_header],
    ".dcm": [dicom_tags, dicom_tags, dicom_syntax],
    ".dicom": [dicom_tags, dicom_tags, dicom_syntax],
    ".csv": [table_cells],
    ".xls": [xls_record],
    ".xlsx": [archive_members, archive_xml, archive_xml],
    ".txt": [text_lines],
    "": [text_lines],
    ".xml": [xml_parts],
    ".json": [json_file],
    ".jsonl": [json_line],
    ".h5": [h5_content, h5_content],
    ".keras": [archive_members, archive_json, archive_weights],
    ".npz": [npz_arrays, archive_members, npy_header],
    ".pkl": [pickled_values],
    ".skops": [archive_members, archive_json, archive_json],
}
