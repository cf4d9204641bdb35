"""Every example runs, at a size of seconds, and shows what it says."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert set(lengths) == {"continual_reader.py", "m3_drop_in.py", "stack_levels.py", "train_your_own.py"}
    assert max(lengths.values()) < 60, lengths


def test_train_your_own(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    size = ["--width", "16", "--layers", "1", "--window", "32", "--batch-size", "2"]
    out = tmp_path / "run"
    written = load("train_your_own").main([str(text), "--out", str(out), "--steps", "2", *size, "--tokens", "4"])
    assert isinstance(written, str)
    assert (out / "latest" / "model.safetensors").exists()


def test_stack_levels_helps_with_what_it_read():
    found = load("stack_levels").main([])
    assert set(found) == {"read", "not read"}
    before, after = found["read"]
    assert after < before


def test_stack_levels_refuses_a_model_that_is_not_there():
    with pytest.raises(ValueError, match="no-such-model"):
        load("stack_levels").main(["--model", "no-such-model"])


def test_m3_drop_in():
    found = load("m3_drop_in").main(["--steps", "10", "--lr", "1e-2"])
    assert set(found) == {"AdamW", "M3"}
    assert all(loss < math.log(256) for loss in found.values())


def test_the_reader_knows_what_it_read():
    found = load("continual_reader").main(["--steps", "40"])
    before, after = found["Zoe has a"]
    assert after > before + 0.5
