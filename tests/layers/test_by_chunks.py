"""Layers that take many chunks at once give what they give chunk by chunk."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.layers import titans_scan
from nestling.layers.mixers import build_mixer
from nestling.layers.titans_scan import MemoryScan
from nestling.ops import compiled
from slowly import examples

NAMES = (
    "linear_attention", "retnet", "deltanet", "gated_deltanet", "gated_deltanet_conv", "gated_deltanet_tracking",
    "hope_memory",
)  # fmt: skip


def one_by_one(plan, size):
    return [[segment] for segment in plan]


def outcome(layer, x, cut, mask):
    """Outputs, final memories and all gradients of a call in two parts."""
    y, state = layer(x[:, :cut], mask=mask[:, :cut])
    rest, state = layer(x[:, cut:], state, mask=mask[:, cut:])
    results = [torch.cat([y, rest], 1), *state.memories[0].now]
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results)
    leaves = [x, *layer.parameters()]
    return results + list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@settings(deadline=None, max_examples=examples(25))
@given(
    name=st.sampled_from(NAMES), tokens=st.integers(2, 30), cut=st.integers(1, 29), chunk=st.integers(1, 6),
    limit=st.sampled_from([8.0, 0.05]), segment=st.sampled_from([0, 9]), padded=st.booleans(),
    meta=st.sampled_from(["full", "first_order"]), native=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_many_chunks_are_one_after_the_other(name, tokens, cut, chunk, limit, segment, padded, meta, native, seed):
    torch.manual_seed(seed)
    options = dict(chunk_size=chunk, norm_limit=limit, segment_size=segment, meta_grad=meta)
    layer = build_mixer(name, 8, 2, **options).double()
    x, mask = (
        torch.randn(2, tokens, 8, dtype=torch.float64, requires_grad=True),
        torch.ones(2, tokens, dtype=torch.bool),
    )
    if padded:
        mask[1, tokens // 2 :] = False
    with nullcontext() if native else compiled.disabled():  # native: each by the C++ form of a chunk
        got = outcome(layer, x, min(cut, tokens - 1), mask)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(titans_scan, "_runs", one_by_one)
            want = outcome(layer, x, min(cut, tokens - 1), mask)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_whole_chunks_are_taken_together(name, monkeypatch):
    seen, plain = [], MemoryScan.chunks
    monkeypatch.setattr(MemoryScan, "chunks", lambda self, *args: seen.append(1) or plain(self, *args))
    layer = build_mixer(name, 8, 2, chunk_size=4)
    with compiled.disabled():
        layer(torch.randn(1, 19, 8))
    layer(torch.randn(1, 19, 8))
    assert seen == [1, 1]


def test_what_does_not_fit_goes_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(MemoryScan, "chunks", lambda *_: pytest.fail("these chunks depend on one another"))
    with compiled.disabled():
        for name, options in (
            ("selfmod", {}), ("selfmod_tracking", {}), ("titans_linear", {}), ("ttt", {}),
            ("gated_deltanet", dict(meta_grad="none")), ("gated_deltanet", dict(read="chunk")),
            ("gated_deltanet", dict(retain="initial")),
        ):  # fmt: skip
            build_mixer(name, 8, 2, **({"chunk_size": 4} | options))(torch.randn(1, 12, 8))
