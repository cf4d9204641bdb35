"""Tiny models of each family, offline, and the browser if there is one."""

import shutil

import pytest
import torch


@pytest.fixture
def gpt2():
    """A GPT-2 of two layers with tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    options = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**options, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0))


@pytest.fixture
def llama():
    """A Llama of two layers with grouped heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(**options, intermediate_size=24, vocab_size=40, max_position_embeddings=32))


@pytest.fixture
def vit():
    """A ViT of two layers on images of 8 x 8."""
    from transformers import ViTConfig, ViTForImageClassification

    options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return ViTForImageClassification(ViTConfig(**options, image_size=8, patch_size=4, num_channels=1))


def tiny_hope(**changes):
    """A Hope of two self-modifying layers with chunks of 4 tokens."""
    from nestling.models import HopeConfig, HopeForCausalLM

    options = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=40)
    options["mixer"] = "selfmod"
    return HopeForCausalLM(HopeConfig(**{**options, "mixer_options": {"chunk_size": 4}, **changes}))


@pytest.fixture
def hope():
    """See `tiny_hope`."""
    return tiny_hope()


@pytest.fixture
def make_hope():
    """`tiny_hope(**changes)`."""
    return tiny_hope


@pytest.fixture
def ids():
    """Two texts of 12 tokens."""
    return torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; the test is skipped, and says so, where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("the interactive page is tried in a headless browser: install chromium to run this test")
