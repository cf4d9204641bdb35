"""A memory and attention side by side: the sum of the two, with the state of both."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.layers.beside import MemoryBesideAttention
from nestling.layers.mixers import build_mixer, mixer_options
from nestling.models import HopeConfig, HopeForCausalLM


def layer(**options):
    torch.manual_seed(0)
    return build_mixer("memory_and_attention", 32, 2, **({"window": 5, "chunk_size": 4} | options)).double()


def test_it_is_the_sum_of_its_parts():
    both = layer()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    y, state = both(x)
    remembered, memory = both.memory(x)
    attended, attention = both.attention(x)
    torch.testing.assert_close(y, remembered + attended)
    torch.testing.assert_close(state, (memory, attention))
    assert both.attention.num_heads == 4 and both.memory.num_heads == 2 and both.attention.window == 5


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(2, 19), data=st.data())
def test_a_stream_may_be_cut_anywhere_and_padded(tokens, data):
    both, cut = layer(), data.draw(st.integers(1, tokens - 1))
    x = torch.randn(2, tokens, 32, dtype=torch.float64)
    lengths = torch.tensor([data.draw(st.integers(0, tokens)) for _ in range(2)])
    mask = torch.arange(tokens) >= tokens - lengths[:, None]
    whole, end = both(x, None, mask)
    first, state = both(x[:, :cut], None, mask[:, :cut])
    second, last = both(x[:, cut:], state, mask[:, cut:])
    torch.testing.assert_close(torch.cat([first, second], 1)[mask], whole[mask])
    assert last.position.tolist() == end.position.tolist() == lengths.tolist()


def test_its_options_are_those_of_both_parts():
    assert {"window", "attention_heads", "chunk_size", "horizon"} <= set(mixer_options("memory_and_attention"))
    with pytest.raises(ValueError, match="chunk_sise"):
        layer(chunk_sise=4)
    with pytest.raises(ValueError, match="window must be at least 1"):
        layer(window=0)
    with pytest.raises(ValueError, match="chunk_size"):
        layer(chunk_size=0)


def test_in_a_model_its_outputs_begin_as_large_as_those_of_one_layer():
    config = HopeConfig(hidden_size=64, num_hidden_layers=2, vocab_size=17, mixer="memory_and_attention")
    mixer = HopeForCausalLM(config).model.layers[0].mixer
    assert isinstance(mixer, MemoryBesideAttention)
    for output in mixer.outputs:  # a half for two parts, a quarter for four branches of the model
        expected = (1 / output.in_features / 2 / 4) ** 0.5
        assert float(output.weight.detach().std()) == pytest.approx(expected, rel=0.1)
