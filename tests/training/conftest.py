"""Tiny runs: a text that can be learned, a tiny Llama and a tiny Hope."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from nestling.training import TrainConfig

SENTENCES = "the cat sat on the mat. the dog ran to the log! a bird sang in the tree; one two three four five.\n"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("NESTLING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    """A text file of about 12 kB."""
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES * 120)
    return path


HOPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def config(tmp_path, text):
    """A run of a few steps of a tiny Hope that takes well under a second."""
    return TrainConfig.from_dict(
        {
            "out": str(tmp_path / "run"),
            "steps": 12,
            "device": "cpu",
            "model": {"options": HOPE},
            "data": {"text": [str(text)], "seq_len": 16, "batch_size": 2},
            "optim": {"lr": 3e-3},
            "logging": {"log_every": 1, "eval_every": 6, "eval_batches": 2, "save_every": 4, "progress": False},
        }
    )


@pytest.fixture(scope="session")
def llama():
    """Makes a tiny Llama, a model this package knows nothing of."""

    def make(**options):
        return LlamaForCausalLM(
            LlamaConfig(
                **{"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, **options},
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )

    return make
