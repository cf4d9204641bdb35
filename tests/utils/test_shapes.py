import torch
from torch import nn

from nestling.models import sizes
from nestling.models.hope import HopeForCausalLM
from nestling.utils.shapes import shapes_alone


def test_nothing_is_allocated_or_drawn_inside_and_all_is_as_before_after_it():
    before = torch.get_rng_state()
    with shapes_alone():
        layer = nn.Linear(3, 4)
        nn.init.normal_(tensor=layer.weight, std=2.0)
        nn.init.ones_(layer.bias)
    assert layer.weight.is_meta and layer.weight.shape == (4, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert nn.init.normal_(torch.zeros(3)).any()


def test_parameters_are_those_of_the_model():
    config = sizes.config("tiny", hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    assert sizes.parameters(config) == sum(p.numel() for p in HopeForCausalLM(config).parameters())
