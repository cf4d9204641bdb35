"""The wheel that `pip install` builds: the library whole, and nothing else."""

import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "src" / "nestling"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names of the files in the wheel."""
    wheel = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("dist")
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as file:
        return set(file.namelist())


def test_it_holds_every_file_of_the_library(names):
    files = {f"nestling/{p.relative_to(LIBRARY)}" for p in LIBRARY.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {name for name in names if name.startswith("nestling/")} == files
    for needed in ("py.typed", "nested_system/drawing/page.html", "ops/compiled/library.cpp", "ops/compiled/chunk.h"):
        assert f"nestling/{needed}" in names


def test_it_holds_nothing_else(names):
    assert {name.split("/")[0].split("-")[0] for name in names} == {"nestling"}
