"""A tiny Hope per sequence layer, with random weights large enough that states matter."""

import pytest
import torch

from nestling.models import HopeConfig, HopeForCausalLM
from nestling.training.tokenizers import byte_tokenizer


@pytest.fixture
def tokenizer():
    """The byte tokenizer."""
    return byte_tokenizer()


@pytest.fixture
def make_model():
    """Makes a tiny model by the name of its sequence layer and a seed."""

    def make(mixer="selfmod", seed=0):
        torch.manual_seed(seed)
        config = HopeConfig(
            vocab_size=259,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            mixer=mixer,
            initializer_range=1.0,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )
        return HopeForCausalLM(config).eval()

    return make
