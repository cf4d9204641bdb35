"""Tiny models of each kind of sequence layer, in float64."""

import pytest
import torch

from nestling.models import HopeConfig, HopeForCausalLM

# chunks of 4 tokens, so that a short text has several and stops inside one
MIXERS = {
    "hope": ("hope", {"chunk_size": 4, "window": 5}),
    "selfmod": ("selfmod", {"chunk_size": 4}),
    "deltanet": ("deltanet", {"chunk_size": 4}),
    "attention": ("attention", {"num_kv_heads": 1}),
    "window": ("attention", {"window": 5}),
    # patterns: an entry for each layer, or fewer that repeat
    "hybrid": [{"mixer": "selfmod", "chunk_size": 4}, {"mixer": "window_attention", "window": 5}],
    "hybrid of heads": [{"mixer": "gated_deltanet", "chunk_size": 4, "num_heads": 1}, "attention"],
}


def tiny_config(mixer="attention", **changes):
    chosen = MIXERS[mixer]
    which = {"mixers": chosen} if isinstance(chosen, list) else dict(zip(("mixer", "mixer_options"), chosen))
    return HopeConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            **which,
            **changes,
        }
    )


def tiny_model(mixer="attention", **changes):
    torch.manual_seed(0)
    return HopeForCausalLM(tiny_config(mixer, **changes)).double().eval()


@pytest.fixture(params=MIXERS)
def mixer(request):
    """The name of each kind of sequence layer in turn."""
    return request.param


@pytest.fixture
def model(mixer):
    """A tiny model of each kind in turn."""
    return tiny_model(mixer)


@pytest.fixture
def make_config():
    """`tiny_config(mixer, **changes)`."""
    return tiny_config


@pytest.fixture
def make_model():
    """`tiny_model(mixer, **changes)`."""
    return tiny_model


@pytest.fixture(scope="session")
def mixer_models():
    """One tiny model of each kind, for tests that only read them."""
    return {mixer: tiny_model(mixer) for mixer in MIXERS}
