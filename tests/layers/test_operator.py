"""A layer's scan as one operator: torch's own checks of it, and compiled, exported and transformed layers."""

import os

import pytest
import torch

from nestling.layers import titans, titans_operator
from nestling.layers.mixers import build_mixer
from nestling.layers.titans_scan import swap

SLOW = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="seconds: NESTLING_SLOW_TESTS=1 runs it")

# all kinds of arguments: adaptive projections or none, momentum, anchors, learned factors, gates, paths
LAYERS = {
    "selfmod": {},
    "linear_attention": {},
    "titans": dict(momentum=True, segment_size=4),
    "gated_deltanet_tracking": {},
    "factors": dict(first_rate=0.5, projection_rate=0.1, adaptive=("k", "v", "q"), qkv_conv=2),
}


def layer_and_input(name="selfmod", tokens=7):
    """A tiny layer in float64 and an input of two sequences."""
    torch.manual_seed(0)
    layer = build_mixer("selfmod" if name == "factors" else name, 8, 2, chunk_size=3, **LAYERS.get(name, {}))
    return layer.double(), torch.randn(2, tokens, 8, dtype=torch.float64)


def arguments(layer, x, lengths):
    """Of the operator, at a state inside a chunk."""
    with torch.no_grad():
        _, state = layer(x[:, :4])
    features, _, _ = layer._features(x, state.conv, state.paths, lengths)
    named = [features[name].detach() for name in titans_operator.feature_names(layer.config)]
    numbers = [n.detach() for n in layer.numbers() if n is not None]
    anchors = [w.detach() for anchor in layer._anchors(2) for w in anchor]
    memories = [w.contiguous() for w in titans_operator._flat(swap(state.memories))]
    lists = [[t.clone() for t in part] for part in (named, numbers, memories, anchors)]
    return state.position, lengths, *lists, layer.key


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [None, torch.tensor([2, 5])])
def test_torch_accepts_the_operators(name, lengths):
    position, lengths, *lists, key = arguments(*layer_and_input(name), lengths)
    for part in lists:
        for t in part:
            t.requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(titans_operator._scan, (position, lengths, *lists, key), test_utils=tests)
    lists = [[t.detach() for t in part] for part in lists]
    y, new = titans_operator._scan(position, lengths, *lists, key)
    grads = [torch.randn_like(y), None, *(torch.randn_like(w) for w in new[1:])]
    needed = [i % 3 != 0 for i in range(sum(map(len, lists)))]
    torch.library.opcheck(titans_operator._backward, (position, lengths, *lists, key, grads, needed), test_utils=tests)


def gradients(layer, call, x, mask=None):
    """Of outputs and states over two calls, the second from the first one's state."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    first, state = call(x[:, :4], None, None if mask is None else mask[:, :4])
    second, state = call(x[:, 4:], state, None if mask is None else mask[:, 4:])
    found = [first, second, *state.memories[0].now, *state.memories[0].start, state.conv]
    sum(t.square().sum() for t in found).backward()
    return [*found, state.position, x.grad, *(p.grad for p in layer.parameters())]


MASK = torch.tensor([[True] * 9, [False, True, True, False, True, True, True, False, True]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_operator_equals_the_scan(name, mask, monkeypatch):
    """Values and gradients over two calls, cut inside a chunk: the layer as a compiler sees it, called eagerly."""
    layer, x = layer_and_input(name, 9)
    expected = gradients(layer, layer, x, mask)
    monkeypatch.setattr(titans, "is_transformed", lambda: True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(gradients(layer, layer, x, mask), expected)


@SLOW  # in one graph, a hybrid model: tests/models/test_compile.py
def test_a_compiled_layer_is_one_graph():
    torch._dynamo.reset()
    layer, x = layer_and_input("selfmod", 9)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(gradients(layer, compiled, x, MASK), gradients(layer, layer, x, MASK))
    y, state = compiled(x[:, :4], None, torch.zeros(2, 4, dtype=torch.bool))
    assert not y.any() and not state.position.any()


def loss(layer, values, x):
    y, state = torch.func.functional_call(layer, values, (x,))
    return y.square().sum() + state.memories[0].now[0].sum()


def test_torch_func_takes_first_derivatives_and_maps():
    layer, x = layer_and_input()
    values = dict(layer.named_parameters())
    expected = torch.autograd.grad(loss(layer, values, x), list(values.values()))
    values = {name: value.detach() for name, value in values.items()}
    found = torch.func.grad(lambda v: loss(layer, v, x))(values)
    torch.testing.assert_close(list(found.values()), list(expected))
    # each sample's gradient, and a layer for each sample
    each = torch.func.vmap(torch.func.grad(lambda v, row: loss(layer, v, row[None])), (None, 0))(values, x)
    torch.testing.assert_close([g.sum(0) for g in each.values()], list(expected))
    other = {name: value * 1.1 for name, value in values.items()}
    pairs = {name: torch.stack([values[name], other[name]]) for name in values}
    both = torch.func.vmap(lambda v: loss(layer, v, x))(pairs)
    torch.testing.assert_close(both, torch.stack([loss(layer, values, x), loss(layer, other, x)]))


def test_what_torch_func_cannot_do_is_refused_in_a_sentence():
    layer, x = layer_and_input()
    with pytest.raises(NotImplementedError, match="reverse mode"):
        torch.func.jvp(lambda x: layer(x)[0], (x,), (x,))
    with pytest.raises(NotImplementedError, match="outside it"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: layer(x)[0].square().sum())(x).sum())(x)


def test_an_exported_layer_is_differentiated_twice():
    layer, x = layer_and_input()
    exported = torch.export.export(layer, (x,)).module()

    def second(call):
        given = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(call(given)[0].square().sum(), given, create_graph=True)
        return torch.autograd.grad(g.square().sum(), given)[0]

    torch.testing.assert_close(second(exported), second(layer))
