from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
scripts = {
    "dm-prepare-cbis-ddsm": "scripts.prepare_cbis_ddsm",
    "dm-prepare-inbreast": "inbreast.prepare_inbreast",
    "dm-prepare-dataset": "scripts.prepare_dataset",
    "dm-dicom-to-png": "scripts.dicom_to_png",
    "dm-pixel-mean": "scripts.pixel_mean",
    "dm-check-data": "scripts.check_data",
    "dm-sample-patches": "ddsm_train.sample_patches_combined",
    "dm-sample-patches-of-one-type": "ddsm_train.sample_patches_main",
    "dm-train-patch": "ddsm_train.patch_clf_train",
    "dm-train-image": "ddsm_train.image_clf_train",
    "dm-score-heatmaps": "ddsm_train.heatmap_score",
    "dm-train-heatmaps": "ddsm_train.heatmap_clf_train",
    "dm-localise": "ddsm_train.localise",
    "dm-draw-lesions": "scripts.draw_lesions",
    "dm-evaluate": "scripts.evaluate",
    "dm-predict": "scripts.predict",
    "dm-download-models": "scripts.download_models",
    "dm-make-phantom": "scripts.make_phantom",
}
setup(
    name="end2end-mammography",
    version="0.1.0",
    description="End-to-end training of whole-image breast-cancer classifiers on mammograms",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=[
        line for line in (here / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")
    ],
    py_modules=sorted(path.stem for path in here.glob("dm_*.py")),
    packages=["ddsm_train", "inbreast", "scripts"],
    entry_points={"console_scripts": [f"{name} = {module}:main" for name, module in scripts.items()]},
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", "tensorboard>=2.18", "openpyxl>=3.1", "xlrd>=2.0"],
        "tensorboard": ["tensorboard>=2.18"],
        "download": ["gdown>=5.2"],
        "excel": ["openpyxl>=3.1", "xlrd>=2.0"],
        "cluster": ["dask[distributed]>=2024.1", "ray>=2.10"],
    },
)
