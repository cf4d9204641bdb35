"""The continuum memory's forward: a chain of MLPs, one per level."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from nestling.cms.blocks import ContinuumMemory
from nestling.cms.fast_linear import applied
from nestling.schedule import Level

LEVELS = [Level(), Level(1024), Level(4096)]


def mlp(block, x):
    n = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * block.norm.weight
    return (F.silu(n @ block.gate_proj.weight.T) * (n @ block.up_proj.weight.T)) @ block.down_proj.weight.T


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_one_level_is_the_mlp_of_a_transformer(variant):
    memory = ContinuumMemory(8, variant=variant, intermediate_size=20).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y, state = memory(x)
    assert state == ()
    assert set(dict(memory.named_parameters())) == {
        f"blocks.0.{name}.weight" for name in ("norm", "gate_proj", "up_proj", "down_proj")
    }
    torch.testing.assert_close(y, x + mlp(memory.blocks[0], x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_a_chain_of_residual_blocks(variant):
    memory = ContinuumMemory(8, LEVELS, variant, intermediate_size=[12, 20, 8]).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = x
    for block in memory.blocks:
        expected = expected + mlp(block, expected)
    torch.testing.assert_close(memory(x)[0], expected, rtol=1e-9, atol=1e-12)


def test_independent_levels_see_the_same_input():
    memory = ContinuumMemory(8, LEVELS, "independent", intermediate_size=12).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(memory.aggregate, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.nn.init.normal_(memory.aggregate)
    expected = x + sum(a * mlp(block, x) for a, block in zip(memory.aggregate, memory.blocks))
    torch.testing.assert_close(memory(x)[0], expected, rtol=1e-9, atol=1e-12)
    memory(x)[0].square().sum().backward()
    assert memory.aggregate.grad.abs().min() > 0


def test_each_sequence_may_have_weights_of_its_own():
    """The place where weights learned in the context go in: the same function, other weights, gradients and all."""
    memory = ContinuumMemory(8, LEVELS, intermediate_size=12).double()
    x, plain = torch.randn(3, 4, 8, dtype=torch.float64), copy.deepcopy(memory)
    fast = [m for m in memory.blocks[0].modules() if isinstance(m, torch.nn.Linear)]
    deltas = [torch.randn(3, *m.weight.shape, dtype=torch.float64, requires_grad=True) for m in fast]
    with applied(fast, deltas):
        together = memory(x)[0]
    together.sum().backward()
    assert all(d.grad.any() for d in deltas)
    for i in range(3):
        alone = copy.deepcopy(plain)
        with torch.no_grad():
            for m, d in zip([m for m in alone.blocks[0].modules() if isinstance(m, torch.nn.Linear)], deltas):
                m.weight += d[i]
        torch.testing.assert_close(together[i], alone(x[i : i + 1])[0][0], rtol=1e-9, atol=1e-12)
    assert torch.equal(memory(x)[0], plain(x)[0])


def test_level_parameters_are_each_block_once():
    memory = ContinuumMemory(8, LEVELS, "independent", intermediate_size=12)
    levels = memory.level_parameters()
    assert list(levels) == [0, 1, 2]
    found = [p for parameters in levels.values() for p in parameters]
    assert len(found) == len({id(p) for p in found}) == 12
    assert all(p is not memory.aggregate for p in found)


def test_plain_mlp_and_activations():
    memory = ContinuumMemory(8, gated=False, activation="gelu", intermediate_size=12).double()
    x = torch.randn(1, 2, 8, dtype=torch.float64)
    block = memory.blocks[0]
    n = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = x + F.gelu(n @ block.up_proj.weight.T) @ block.down_proj.weight.T
    torch.testing.assert_close(memory(x)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "serial"}, "variant must be one of"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"intermediate_size": [4, 4]}, "one per level"),
        ({"levels": [Level(16), Level(24)]}, "not a multiple"),
        ({"levels": [Level(math.inf), Level(math.inf)]}, "one frequency"),
    ],
)
def test_settings_that_do_not_fit(options, says):
    with pytest.raises(ValueError, match=says):
        ContinuumMemory(8, **options)


def test_input_that_does_not_fit():
    memory = ContinuumMemory(8)
    with pytest.raises(ValueError, match="x must be"):
        memory(torch.randn(2, 8))
    with pytest.raises(ValueError, match="state"):
        memory(torch.randn(1, 2, 8), (torch.zeros(1),))
