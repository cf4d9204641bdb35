"""Tiny experiments on a small text."""

import pytest

from experiments.shared.corpus import load_texts
from experiments.shared.models.study import TrainingStudy

SENTENCES = "the cat sat on the mat. the dog ran to the log! a bird sang in the tree; one two three four five.\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NESTLING_DATA", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Three small books."""
    path = tmp_path / "books"
    path.mkdir()
    for i in range(3):
        (path / f"book{i}.txt").write_text(f"book {i}. " + SENTENCES * (30 + i))
    return path


@pytest.fixture
def tiny(tmp_path):
    """Makes an experiment of a few steps."""

    def make(name="quality", **options):
        values = {
            "name": name,
            "out": str(tmp_path / "out"),
            "steps": 3,
            "model": {
                "name": "tiny",
                "options": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
            },
            "data": {"seq_len": 16, "batch_size": 2},
            "lrs": [1e-3, 1e-2],
            "seeds": [0, 1],
            "test": name == "quality",
            "test_text": "book1.txt",
            "eval_windows": 4,
            "eval_batch_size": 2,
            "position_bins": 3,
            "contenders": [
                {"name": "deltanet", "mixer": "deltanet"},
                {"name": "transformer", "mixer": "attention"},
            ],
        }
        return TrainingStudy.from_dict(values | options)

    return make


@pytest.fixture
def texts(folder):
    """Loads the books for an experiment."""

    def load(experiment):
        return load_texts(sorted(folder.glob("*.txt")), experiment.test_text, experiment.data)

    return load
