"""The delta rule over many chunks at once against the token loop; a memory on its way from chunk to chunk."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.ops import compiled, delta_rule_reference
from nestling.ops.chunks import delta_chunks
from nestling.ops.products import products, products_by_blocks
from nestling.ops.states import bounded, chunk_states, chunk_states_reference
from slowly import examples


def weighed(results):
    return sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results)


def make(count, tokens, out, inp, seed):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    unit = torch.rand(count, tokens, generator=g, dtype=torch.float64)
    decay = torch.where(unit < 0.2, 0.0, torch.where(unit > 0.8, 1.0, unit))  # exactly 0 and 1 too
    keys = torch.nn.functional.normalize(normal(count, tokens, inp), dim=-1)
    erase = 2 * torch.rand(count, tokens, generator=g, dtype=torch.float64)
    args = normal(count, out, inp), keys, normal(count, tokens, out), decay, erase, normal(count, tokens, inp)
    return [t.requires_grad_() for t in args]


@settings(deadline=None, max_examples=examples(15))
@given(
    count=st.integers(1, 3), chunks=st.integers(1, 4), size=st.integers(1, 7), out=st.integers(1, 4),
    inp=st.integers(1, 4), after=st.booleans(), erases=st.booleans(), native=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_many_chunks_are_the_token_loop(count, chunks, size, out, inp, after, erases, native, seed):
    args = make(count, chunks * size, out, inp, seed)
    weight, keys, writes, decay, erase, queries = args
    leaves = [t for t in args if erases or t is not erase]
    want = delta_rule_reference(
        weight, keys, writes, decay, erase if erases else torch.zeros_like(decay), queries=queries,
        read="after" if after else "before",
    )  # fmt: skip
    with nullcontext() if native else compiled.disabled():
        got = delta_chunks(
            weight, keys, writes, decay, erase if erases else None, queries, chunk_size=size, after=after, limit=1e9
        )
    for a, b in zip(got, (want.weight, want.reads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    found, wanted = (
        torch.autograd.grad(weighed(results), leaves, materialize_grads=True, allow_unused=True)
        for results in (got, (want.weight, want.reads))
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_a_bound_is_met_at_every_chunk_and_in_the_gradients():
    torch.manual_seed(0)
    weight, keep, add = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 4), (2, 5, 4, 4), (2, 5, 3, 4))
    )
    got, want = chunk_states(weight, keep, add, 1.5), chunk_states_reference(weight, keep, add, 1.5)
    assert got[1:].square().sum((-2, -1)).sqrt().max() <= 1.5 + 1e-12  # some would have been larger:
    assert chunk_states(weight, keep, add)[1:].square().sum((-2, -1)).sqrt().max() > 1.5
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    for a, b in zip(*(torch.autograd.grad(weighed([w]), (weight, keep, add)) for w in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(bounded(weight, 1e9), weight)


def test_first_and_second_derivatives_of_the_states():
    torch.manual_seed(0)
    shapes = (1, 2, 2), (1, 3, 2, 2), (1, 3, 2, 2)
    args = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(chunk_states, args)
    assert torch.autograd.gradgradcheck(chunk_states, args)


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 2, 4), (2, 16), (1, 64)])
def test_products_by_blocks(shape):
    a = torch.rand(*shape, dtype=torch.float64).masked_fill(torch.rand(*shape) < 0.1, 0.0)
    torch.testing.assert_close(products_by_blocks(a), products(a), rtol=1e-14, atol=0)
