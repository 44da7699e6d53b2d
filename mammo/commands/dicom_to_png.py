"""Convert DICOM mammograms of any source to 16-bit greyscale PNG files, which all other scripts read.

  mammo dicom-to-png downloads/mine converted --jobs 4

The PNG files lie in OUT/images, in the folders of the source; OUT/images.csv has a row for each, with patient, side
and view from its header, and OUT/report.json the counts. Pixels are scaled so that the range of the stored bits (12,
14, 16, signed or not) becomes 0..65535, so the rescale factor 0.003891 brings all of them to 0..255. MONOCHROME1 is
inverted. An interrupted run goes on where it was; other options are refused there.
"""

import argparse
import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from mammo.base import cli
from mammo.base.files import InputError, counted, locked, walk_files, write_img, write_text
from mammo.base.tables import write_csv
from mammo.base.work import REPORT, Job, Outcome, keep_options, run_resumable
from mammo.images.reading import DICOM_SUFFIXES, dicom_side, dicom_view, is_dicom, read_dicom_16_bit

COLUMNS = [
    *("file", "patient_id", "laterality", "view", "rows", "columns"),
    *("bits", "photometric_interpretation", "window"),  # window: 1 where --voi-lut found one to apply
]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="DICOM file, or folder searched for them")
    parser.add_argument("out", metavar="OUT", help="folder to write; new, or that of an earlier run")
    voi_help = "apply the display window or lookup table of each file that has one, as a viewer does"
    parser.add_argument("--voi-lut", action="store_true", help=voi_help)
    levels_help = "stretch each image from its own darkest to its own brightest pixel, whatever its bits"
    parser.add_argument("--auto-levels", action="store_true", help=levels_help)
    error_help = "what an unusable file does: end the run, or be left out and listed"
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help=error_help)
    parser.add_argument("--fresh", action="store_true", help="start over, and replace the images of an earlier run")
    cli.add_parallel_options(parser)
    return parser


def find_dicom(sources: Iterable[str | os.PathLike]) -> dict[str, Path]:
    """Return DICOM files by the name of their PNG file, which is relative to the folder that they were found in.

    By ending or, since many have none, by their first bytes; directories of media and hidden files are not images.
    Raises InputError for sources without any, and for two files with one name.
    """
    found = {}
    for source in map(Path, sources):
        files = [source]
        if source.is_dir():
            images = (path for path in walk_files(source) if path.name[0] != "." and path.name.upper() != "DICOMDIR")
            files = list(filter(is_dicom, images))
        if not files:
            raise InputError(f"{source}: no DICOM files in this folder")
        for path in files:
            name = path.relative_to(source) if source.is_dir() else Path(path.name)
            stem = name.with_suffix("") if name.suffix.lower() in DICOM_SUFFIXES else name
            name = f"{stem.as_posix()}.png"
            if name in found:
                raise InputError(f"{path} and {found[name]}: both would be written as {name}; convert them apart")
            found[name] = path
    return found


def convert(item: Job, out: Path) -> Outcome:
    """Write the PNG file of one item, and note its row of images.csv; see `mammo.base.work.run_resumable`."""
    path = f"images/{item.name}"
    try:
        img, dataset = read_dicom_16_bit(item.sources[0], **item.plan)
    except InputError as error:
        return Outcome(item.name, faults=[str(error)])
    write_img(out / path, img)
    has_window = dataset.get("VOILUTSequence") or dataset.get("WindowCenter") is not None
    values = [path, str(dataset.get("PatientID") or ""), dicom_side(dataset), dicom_view(dataset)]
    values += [dataset.Rows, dataset.Columns, dataset.BitsStored, dataset.PhotometricInterpretation]
    values += [int(bool(item.plan["voi_lut"] and has_window))]
    return Outcome(item.name, [path], facts=dict(zip(COLUMNS, values, strict=True)))


def run(**options) -> None:
    """Convert; keyword arguments are the option names of `make_parser`."""
    args = cli.complete(make_parser(), options)
    sources = [args.sources] if isinstance(args.sources, (str, Path)) else args.sources
    settings = {"voi_lut": args.voi_lut, "auto_levels": args.auto_levels}
    files, out = find_dicom(sources), Path(args.out)
    items = [Job(name, (str(path.absolute()),), (f"images/{name}",), settings) for name, path in files.items()]
    how = {"jobs": args.jobs, "backend": args.backend, "on_error": args.on_error, "fresh": args.fresh}
    with locked(out):
        keep_options(out, settings, args.fresh)
        results = run_resumable(items, functools.partial(convert, out=out), "/", out, ["images"], **how)
        rows = [result.facts for result in results if not result.faults]
        faults = [fault for result in results for fault in result.faults]
        write_csv(out / "images.csv", COLUMNS, [row.values() for row in rows])
        report = {"images": len(rows), "skipped": faults}
        print(f"{counted(len(rows), 'image')} in {out / 'images'}, listed in {out / 'images.csv'}")
        if args.voi_lut:
            report["without_window"] = [row["file"] for row in rows if not row["window"]]
            print(f"{len(report['without_window'])} of them have no display window and are scaled by their stored bits")
        write_text(out / REPORT, json.dumps(report | settings, indent=2) + "\n")
    if faults:
        print(f"{counted(len(faults), 'file')} left out:", *faults, sep="\n  ")
    if not rows:
        raise InputError("none of the files could be converted")


main = cli.command(make_parser, run)
