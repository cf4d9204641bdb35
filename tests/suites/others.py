"""transformers' own tests, fetched at set-up and never part of this repository, as a package to import from."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FETCHED = ROOT / ".venv" / "suites"  # `make suites` puts the source distribution's tests there
CHECKOUT = "NESTLING_TRANSFORMERS_TESTS"  # the tests/ folder of a checkout, which has the generation tests as well
PACKAGE = "transformers_tests"
EVERY = "NESTLING_SLOW_TESTS" in os.environ  # `make suites`; else a part that takes seconds
OURS = {
    "MODEL_MAPPING_NAMES": {"hope": "HopeModel"},
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": {"hope": "HopeForCausalLM", "nestling_stacked": "StackedForCausalLM"},
}


def _folder() -> Path:
    """Where the tests are: a checkout's, or those of the source distribution."""
    given = os.environ.get(CHECKOUT)
    return Path(given) if given else FETCHED


def has_generation() -> bool:
    """Whether the generation tests are there: in a checkout, not in the source distribution."""
    return (_folder() / "generation" / "test_utils.py").is_file()


def _stand_in(name: str, *classes: str) -> None:
    """A module of empty classes in place of one that is not fetched."""
    module = ModuleType(name)
    vars(module).update({each: type(each, (), {}) for each in classes}, __path__=[])
    sys.modules[name] = module


def common() -> ModuleType:
    """`tests/test_modeling_common.py`; skips the module that asks where it is not there."""
    pytest.importorskip("parameterized")
    folder = _folder()
    if not (folder / "test_modeling_common.py").is_file():
        pytest.skip(f"transformers' tests are not in {folder}: make suites fetches them", allow_module_level=True)
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
        # tests of exporters to other runtimes are not ours; those of generation come with a checkout only
        for name in (f"{PACKAGE}.exporters", "tests.exporters"):
            _stand_in(name)
            _stand_in(f"{name}.test_export", "ExportTesterMixin", "ExportGenerateTesterMixin")
        if not has_generation():
            _stand_in(f"{PACKAGE}.generation")
            _stand_in(f"{PACKAGE}.generation.test_utils", "GenerationTesterMixin")
    theirs = importlib.import_module(f"{PACKAGE}.test_modeling_common")
    for kind, names in OURS.items():  # their own copies of the lists that a model of theirs stands in
        setattr(theirs, kind, {**getattr(theirs, kind), **names})
    return theirs
