"""Run a command by its name: `mammo COMMAND ...` or `python -m mammo COMMAND ...`."""

import importlib
import os
import sys

from mammo import __version__

# In the order of the work: name, module, what it does.
COMMANDS = (
    ("prepare", "mammo.commands.prepare", "prepare a data set as downloaded, or images of your own"),
    ("dicom-to-png", "mammo.commands.dicom_to_png", "convert DICOM mammograms to 16-bit PNG"),
    ("pixel-mean", "mammo.commands.pixel_mean", "measure the mean that trainings subtract"),
    ("check-data", "mammo.commands.check_data", "read all images and list the faulty ones"),
    ("draw-lesions", "mammo.commands.draw_lesions", "draw lesion outlines on a mammogram"),
    ("sample", "ddsm_train.sample_patches_combined", "sample patches of calcifications and masses"),
    ("sample-one-type", "ddsm_train.sample_patches_main", "sample patches of one type of lesion"),
    ("train-patch", "ddsm_train.patch_clf_train", "train a patch classifier"),
    ("train-image", "ddsm_train.image_clf_train", "train or finetune a whole-image classifier"),
    ("heatmaps", "ddsm_train.heatmap_score", "map where a network sees lesions"),
    ("train-heatmaps", "ddsm_train.heatmap_clf_train", "train trees on features of maps"),
    ("localise", "ddsm_train.localise", "measure how well maps point at lesions"),
    ("evaluate", "mammo.commands.evaluate", "score models with intervals, tests and a report"),
    ("predict", "mammo.commands.predict", "predict images of any folder"),
    ("download-models", "mammo.commands.download_models", "download the published models"),
    ("convert-model", "mammo.commands.convert_model", "convert a model to a file that Keras 3 opens by itself"),
    ("reproduce", "ddsm_train.reproduce", "reproduce a row of the published table"),
    ("subset", "inbreast.subset_experiment", "finetune with few patients"),
    ("phantom", "mammo.commands.phantom", "draw phantom data sets to try all this on"),
)


def usage() -> str:
    """Return the list of commands as text."""
    rows = "\n".join(f"  {name:<18} {text}" for name, _, text in COMMANDS)
    begin = "usage: mammo COMMAND ...\n\ncommands, in the order of the work:"
    return f"{begin}\n{rows}\n\nmammo COMMAND --help lists its options, mammo --version the version"


def main(argv: list[str] | None = None) -> int:
    """Run the command that `argv` begins with, and return its exit status; 2 for none of the list."""
    argv = sys.argv[1:] if argv is None else argv
    for name, module, _ in COMMANDS:
        if argv[:1] == [name]:
            sys.argv[0] = f"mammo {name}"  # what argparse calls the program
            return importlib.import_module(module).main(argv[1:]) or 0
    asked = not argv or argv[0] in ("-h", "--help", "--version")
    try:
        print(
            f"mammo {__version__}" if argv[:1] == ["--version"] else usage(),
            file=sys.stdout if asked else sys.stderr,
            flush=True,
        )
    except BrokenPipeError:  # the reader had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not asked:
        print(f"mammo: error: Expected one of these commands. Received {' '.join(argv[:2])}", file=sys.stderr)
    return 0 if asked else 2


if __name__ == "__main__":
    sys.exit(main())
