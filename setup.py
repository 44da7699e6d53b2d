import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
requirements = (here / "requirements.txt").read_text().splitlines()
tensorboard, excel, docs = ["tensorboard>=2.18"], ["openpyxl>=3.1", "xlrd>=2.0"], ["pdoc>=15"]

setup(
    name="end2end-mammography",
    version=re.search(r'__version__ = "(.+)"', (here / "mammo" / "__init__.py").read_text())[1],
    description="End-to-end training of whole-image breast-cancer classifiers on mammograms",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=[line for line in requirements if line and not line.startswith("#")],
    py_modules=sorted(path.stem for path in here.glob("dm_*.py")),
    packages=find_packages(include=["mammo*", "ddsm_train", "inbreast"]),
    package_data={"mammo.evaluate": ["*.csv", "*.j2"], "ddsm_train": ["*.sh"], "inbreast": ["*.sh"]},
    entry_points={"console_scripts": ["mammo = mammo.__main__:main"]},
    extras_require={
        "test": ["pytest>=8", "pytest-xdist>=3.5", "ruff>=0.6", "setuptools>=70.1", *docs, *tensorboard, *excel],
        "docs": docs,
        "tensorboard": tensorboard,
        "download": ["gdown>=5.2"],
        "excel": excel,
        "cluster": ["dask[distributed]>=2024.1", "ray>=2.10"],
    },
)
