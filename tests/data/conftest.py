"""Phantoms that tests of several data sets share, made once."""

import shutil

import pytest

from mammo.phantom.cbis_ddsm import TREES
from tests.data.phantoms import OWN, draw_breasts, make_cbis, make_odd_inbreast, make_plain, prepare


@pytest.fixture(scope="session")
def drawn():
    return draw_breasts()


@pytest.fixture(scope="session")
def prepared_data(tmp_path_factory, drawn):
    """Function of a layout: (what was made, prepared folder, report)."""
    done = {}

    def get(layout):
        if layout not in done:
            folder = tmp_path_factory.mktemp(layout)
            if layout in OWN:
                made = OWN[layout](folder / "data", drawn)
            elif layout == "inbreast":
                made = make_odd_inbreast(folder / "data")
            else:
                made = make_cbis(folder / "data", layout)
            done[layout] = made, folder / "out", prepare(made.name, made.folder, folder / "out", **made.options)
        return done[layout]

    return get


@pytest.fixture(params=[*TREES, "inbreast", *OWN])
def prepared(request, prepared_data):
    """(what was made, prepared folder, report) of every layout."""
    return prepared_data(request.param)


@pytest.fixture(scope="session")
def plain_data(tmp_path_factory):
    """Function of a data set's name: its `Plain`."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = make_plain(name, tmp_path_factory.mktemp("plain"))
        return done[name]

    return get


@pytest.fixture(params=["cbis-ddsm", "inbreast", "folders"])
def plain(request, plain_data):
    """A small data set of each kind of reader."""
    return plain_data(request.param)


@pytest.fixture
def copy(plain, tmp_path):
    """A copy of the plain data, to be changed."""
    return shutil.copytree(plain.folder, tmp_path / "copy")


@pytest.fixture
def download(plain, copy):
    """A copy of the plain data, to be changed, and their rows or views."""
    return copy, plain.content
