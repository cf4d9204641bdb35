import io
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from nestling import Level
from nestling.cms import stack_levels
from nestling.sessions import Session, Settings, find_texts
from nestling.sessions.check import open_rest
from nestling.training.tokenizers import byte_tokenizer

LEVELS = (Level(8, lr=0.3, clip=1.0), Level(32, lr=0.1, optimizer="momentum"))
WORDS = "the a cat dog sat ran on under mat log quickly today and then saw é …".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def small_model():
    """Makes a randomly drawn Llama over bytes, with levels."""

    def make(levels=LEVELS, seed=0):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, eos_token_id=257, bos_token_id=256,
        )  # fmt: skip
        return stack_levels(AutoModelForCausalLM.from_config(config), list(levels)).eval()

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(small_model):
    return small_model()


@pytest.fixture
def write(tmp_path):
    """Writes a text of about so many bytes and returns its path."""

    def make(name, size=300, seed=0):
        choice, text = random.Random(f"{name}{seed}"), ""
        while len(text.encode()) < size:
            text += choice.choice(WORDS) + choice.choice([" ", " ", " ", "\n"])
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


@pytest.fixture
def session(tmp_path, tokenizer):
    """Makes a session; `names` are files, or bytes for the pipe."""

    def make(model, names, state="my.state", piped=b"", new=False, held_out=None, show=None, **settings):
        names = [str(name) for name in names]
        texts = find_texts(names, opened=open_rest) if settings.get("check") else find_texts(names)
        return Session(
            model, tokenizer, texts, tmp_path / state, Settings(**settings), new=new, held_out=held_out, show=show,
            pipe=io.BytesIO(piped),
        )  # fmt: skip

    return make
