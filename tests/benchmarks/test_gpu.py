"""The script for a GPU machine runs from end to end at toy sizes, so that on that machine only the device is new."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def exceptions(found, path=""):
    """Where in the results something failed, and how."""
    if not isinstance(found, dict):
        return []
    own = [f"{path}: {found['exception']} {found.get('frames')}"] if "exception" in found else []
    return own + [line for key, value in found.items() for line in exceptions(value, f"{path}/{key}")]


SLOW = ("check_layers", "check_models", "graphs,profiling", "optimizers,peers,compiling,decode,training")
ASKED = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="minutes: NESTLING_SLOW_TESTS=1 runs it")


@pytest.mark.timeout(600)
@ASKED
@pytest.mark.parametrize("parts", ["speed", *SLOW])
def test_the_quick_form_measures_everything(parts, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--only", parts, "--out", str(tmp_path)]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert not exceptions(results), "\n".join(exceptions(results))
    for part in ("facts", *parts.split(",")):
        assert results[part]["part"]["finished"], part
        wrong = [name for name, row in results[part].get("checks", {}).items() if not row["ok"]]
        assert not wrong, f"{part}: {wrong}"
    name = results["facts"]["device"]["what"]["name"]
    assert (tmp_path / "summary.md").read_text().startswith(f"# {name}")
    assert {"speed.png", "training.png", "log.txt"} <= {f.name for f in tmp_path.iterdir()}
    assert len(list(tmp_path.iterdir())) <= 8
