"""Wrong settings, shapes, dtypes, masks and states: refused by name, before anything is changed."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from nestling.layers.mixers import MIXERS, build_mixer
from nestling.layers.titans import SelfModifyingTitans

DIM = 8


def build(**options):
    return SelfModifyingTitans(DIM, 2, **({"chunk_size": 4} | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(dim=0), "dim"),
        (dict(dim=7), "dim"),
        (dict(dim=8.0), "dim"),
        (dict(num_heads=0), "num_heads"),
        (dict(num_heads=3), "num_heads"),
        (dict(head_dim=0), "head_dim"),
        (dict(head_dim=-4), "head_dim"),
        (dict(expansion=0), "expansion"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(chunk_size=2.5), "chunk_size"),
        (dict(memory_chunk_size=0), "memory_chunk_size"),
        (dict(memory_chunk_size=6), "memory_chunk_size"),
        (dict(memory_chunk_size="4"), "memory_chunk_size"),
        (dict(adaptive=("k", "w")), "adaptive"),
        (dict(adaptive="eta"), "adaptive"),
        (dict(architecture="conv"), "architecture"),
        (dict(gates="conv"), "gates"),
        (dict(objective="l1"), "objective"),
        (dict(step="huge"), "step"),
        (dict(meta_grad="some"), "meta_grad"),
        (dict(decay="exponential"), "decay"),
        (dict(rate="two"), "rate"),
        (dict(read="during"), "read"),
        (dict(conv_size=-1), "conv_size"),
        (dict(segment_size=-1), "segment_size"),
        (dict(norm_limit=0.0), "norm_limit"),
        (dict(rate="one"), "eta"),
        (dict(decay="none"), "alpha"),
        (dict(self_targets=False), "self_targets"),
        (dict(erase_range=2.0), "no effect without erase_gate"),
        (dict(tied_write=False), "no effect without erase_gate"),
        (dict(erase_gate=True, erase_range=2.5), "erase_range"),
        (dict(erase_gate=True, erase_range=0), "erase_range"),
        (dict(erase_gate=True, erase_range=2, architecture="linear"), "erase_range 2 needs objective='dot'.*same key"),
        (dict(erase_gate=True, erase_range=1.5, erase_layer="last"), "erase_range 1.5 needs objective='dot'"),
        (dict(erase_gate=True, erase_layer="middle"), "erase_layer"),
        (dict(erase_gate=True, erase_layer="last", architecture="linear"), "erase_layer='last' is of a deep"),
        (dict(skip="inner", architecture="linear"), "skip='inner' is of a deep"),
        (dict(skip="inner", expansion=2), "expansion must be 1"),
        (dict(first_rate=0.0), "first_rate"),
        (dict(first_rate=0.1, architecture="linear"), "first_rate=0.1 is of a deep"),
        (dict(projection_rate=0.0), "projection_rate"),
        (dict(projection_rate=0.1, adaptive=()), "projection_rate is of memories that project"),
        (dict(projection_init="zero"), "projection_init"),
        (dict(projection_init="identity", adaptive=("eta",)), "projection_init='identity' is of memories that project"),
        (dict(initial_scale=-1.0), "initial_scale"),
        (dict(erase_gate=True, initial_erase=1.0), "initial_erase"),
        (dict(initial_erase=0.8), "erase_gate=True"),
        (dict(erase_gate=True, tied_write=False, erase_heads=3), "from 1 to num_heads"),
        (dict(erase_gate=True, tied_write=False, erase_heads=0), "from 1 to num_heads"),
        (dict(erase_gate=True, erase_heads=1), "tied_write=False"),
        (dict(erase_heads=1), "erase_gate=True"),
        (dict(qkv_conv=-1), "qkv_conv"),
        (dict(conv_init="first"), "conv_init"),
        (dict(conv_for="gate"), "conv_for"),
        (dict(conv_for=("gate", "k", "beta")), "conv_for"),
    ],
)
def test_wrong_settings_are_named(options, words):
    options = {"dim": DIM, "num_heads": 2, "chunk_size": 4} | options
    with pytest.raises((ValueError, TypeError), match=words):
        SelfModifyingTitans(**options)


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(2, 3, DIM + 1), ValueError),
        (torch.zeros(3, DIM), ValueError),
        (torch.zeros(0, 3, DIM), ValueError),
        (torch.zeros(2, 0, DIM), ValueError),
        (torch.zeros(2, 3, DIM, dtype=torch.int64), TypeError),
        (torch.zeros(2, 3, DIM, dtype=torch.float64), (ValueError, TypeError)),
    ],
)
def test_wrong_inputs_are_named(x, error):
    with pytest.raises(error, match=r"^x "):
        build()(x)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 3).long()],
)
def test_wrong_masks_are_named(mask):
    with pytest.raises((ValueError, TypeError), match="mask"):
        build()(torch.zeros(2, 3, DIM), mask=mask)


def foreign_states():
    x = torch.randn(2, 5, DIM)
    own = build()(x)[1]
    yield "another batch size", build()(x[:1])[1]
    yield "another batch size, larger", build()(torch.randn(3, 5, DIM))[1]
    yield "another expansion", build(expansion=3)(x)[1]
    yield "another number of heads", SelfModifyingTitans(DIM, 4, chunk_size=4)(x)[1]
    yield "another set of memories", build(adaptive=("k",))(x)[1]
    yield "other gates", build(gates="mlp")(x)[1]
    yield "another architecture", build(architecture="linear")(x)[1]
    yield "no momentum", build(momentum=False)(x)[1]
    yield "no convolution", build(conv_size=0)(x)[1]
    yield "a wider convolution", build(conv_size=6)(x)[1]
    yield "convolutions after the projections", build(qkv_conv=3)(x)[1]
    yield "two chunk sizes", build(memory_chunk_size=8)(x)[1]
    yield "float64", build().double()(x.double())[1]
    yield "bfloat16", tree_map(lambda leaf: leaf.bfloat16() if leaf.is_floating_point() else leaf, own)
    yield "attention", build_mixer("attention", DIM, 2)(x)[1]
    yield "a tuple", tuple(own)
    yield "a tensor", x


@pytest.mark.parametrize(("kind", "state"), [*foreign_states()], ids=lambda v: v if isinstance(v, str) else "")
def test_foreign_states_are_refused(kind, state):
    layer = build()
    before = [p.clone() for p in layer.parameters()]
    leaves = [leaf.clone() for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    with pytest.raises((ValueError, TypeError), match="state"):
        layer(torch.randn(2, 3, DIM), state)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(leaves, tree_leaves(state)))


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_refuses_the_state_of_another_batch(name):
    layer = build_mixer(name, DIM, 2)
    _, state = layer(torch.randn(2, 5, DIM))
    with pytest.raises(ValueError, match="state"):
        layer(torch.randn(3, 5, DIM), state)
