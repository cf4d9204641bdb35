"""The chunk form of the delta rule against its definition, the token loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.ops import delta_rule, delta_rule_reference
from nestling.ops.chunk import Chunk, decay_table, delta_chunk
from slowly import examples

pytestmark = pytest.mark.usefixtures("form")

NAMES = ("weight", "keys", "writes", "decay", "erase", "queries", "momentum", "velocity")


def make(lead=(2,), tokens=7, out=3, inp=4, momentum=True, queries=True, seed=0, dtype=torch.float64, edges=False):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def unit(*shape):
        x = torch.rand(*shape, generator=g, dtype=torch.float64)
        if edges:  # decays of exactly 0 and 1
            pick = torch.rand(*shape, generator=g)
            x = torch.where(pick < 0.3, 0.0, torch.where(pick > 0.7, 1.0, x))
        return x

    args = dict(
        weight=normal(*lead, out, inp), keys=normal(*lead, tokens, inp) / inp**0.5, writes=normal(*lead, tokens, out),
        decay=unit(*lead, tokens), erase=unit(*lead, tokens),
    )  # fmt: skip
    if queries:
        args["queries"] = normal(*lead, tokens, inp)
    if momentum:
        args |= dict(momentum=unit(*lead, tokens), velocity=normal(*lead, out, inp))
    return {name: value.to(dtype).requires_grad_() for name, value in args.items()}


def gradients(function, args, **options):
    results = [r for r in function(**args, **options) if r is not None]
    loss = sum((r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view_as(r)).sum() for r in results)
    if not loss.requires_grad:
        return results, {}
    grads = torch.autograd.grad(loss, list(args.values()), allow_unused=True)
    return results, dict(zip(args, grads, strict=True))


def assert_same(args, tolerance=1e-9, **options):
    read = options.get("read", "after")
    got, got_grads = gradients(delta_rule, args, **options)
    want, want_grads = gradients(delta_rule_reference, args, read=read)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for name, b in want_grads.items():
        a = got_grads[name]
        if b is None or a is None:  # an argument without influence, e.g. keys of an empty sequence
            assert (a is None or not a.any()) and (b is None or not b.any()), name
            continue
        assert a.isfinite().all(), name
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 1.0)
        )


@settings(max_examples=examples(60), deadline=None)
@given(
    lead=st.sampled_from([(), (1,), (2, 3)]), tokens=st.integers(0, 21), out=st.integers(1, 5), inp=st.integers(1, 5),
    momentum=st.booleans(), queries=st.booleans(), read=st.sampled_from(["after", "before"]),
    chunk_size=st.integers(1, 24), edges=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_values_and_gradients_equal_the_loop(lead, tokens, out, inp, momentum, queries, read, chunk_size, edges, seed):
    args = make(lead, tokens, out, inp, momentum, queries, seed, edges=edges)
    assert_same(args, read=read, chunk_size=chunk_size)


@pytest.mark.parametrize("decay", [0.0, 1.0])
@pytest.mark.parametrize("zero_keys", [False, True])
def test_finite_at_the_edges(decay, zero_keys):
    args = make(tokens=70)
    with torch.no_grad():
        args["decay"].fill_(decay)
        args["momentum"].fill_(decay)
        args["erase"].fill_(1.0)
        args["keys"].copy_(torch.nn.functional.normalize(args["keys"], dim=-1))
        if zero_keys:
            args["keys"].zero_()
    assert_same(args, chunk_size=32)


@settings(max_examples=examples(25), deadline=None)
@given(tokens=st.integers(1, 30), split=st.integers(0, 30), seed=st.integers(0, 10**6))
def test_split_and_carried_state(tokens, split, seed):
    split = min(split, tokens)
    args = make(tokens=tokens, seed=seed)
    whole = delta_rule(**args, chunk_size=8)
    per_token = [n for n in NAMES if n not in ("weight", "velocity")]
    dims = {n: -1 if n in ("decay", "erase", "momentum") else -2 for n in per_token}
    first = {n: args[n].narrow(dims[n], 0, split) for n in per_token}
    rest = {n: args[n].narrow(dims[n], split, tokens - split) for n in per_token}
    a = delta_rule(args["weight"], velocity=args["velocity"], chunk_size=8, **first)
    b = delta_rule(a.weight, velocity=a.velocity, chunk_size=8, **rest)
    for got, want in (
        (b.weight, whole.weight),
        (b.velocity, whole.velocity),
        (torch.cat([a.reads, b.reads], -2), whole.reads),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives():
    args = make(lead=(), tokens=5, out=2, inp=3)
    names = list(args)

    def f(*values):
        return tuple(r for r in delta_rule(**dict(zip(names, values, strict=True)), chunk_size=3))

    assert torch.autograd.gradcheck(f, tuple(args.values()))
    assert torch.autograd.gradgradcheck(f, tuple(args.values()), fast_mode=True)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_lower_precision_follows_float64(dtype, tolerance):
    exact = make(lead=(2, 2), tokens=100, out=8, inp=8)
    exact["erase"] = (exact["erase"] * 0.5).detach()
    low = {n: v.detach().to(dtype) for n, v in exact.items()}
    got = delta_rule(**low)
    want = delta_rule_reference(**{n: v.double() for n, v in low.items()})
    assert got.weight.dtype == got.velocity.dtype == torch.float32 and got.reads.dtype == dtype
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_mu_zero_without_momentum():
    args = make(tokens=9, momentum=False)
    zero = torch.zeros_like(args["decay"])
    a, b = delta_rule(**args), delta_rule(**args, momentum=zero)
    torch.testing.assert_close(a.weight, b.weight)
    torch.testing.assert_close(a.reads, b.reads)
    assert a.velocity is None


@pytest.mark.parametrize(
    "change,error,word",
    [
        (dict(keys=torch.zeros(2, 7, 5, dtype=torch.float64)), ValueError, "keys"),
        (dict(writes=torch.zeros(2, 6, 3, dtype=torch.float64)), ValueError, "writes"),
        (dict(decay=torch.zeros(7, dtype=torch.float64)), ValueError, "decay"),
        (dict(velocity=torch.zeros(2, 4, 3, dtype=torch.float64)), ValueError, "velocity"),
        (dict(erase=torch.zeros(2, 7, dtype=torch.int64)), TypeError, "erase"),
        (dict(erase=torch.zeros(2, 7)), TypeError, "erase"),
        (dict(read="during"), ValueError, "read"),
        (dict(chunk_size=0), ValueError, "chunk_size"),
    ],
)
def test_wrong_arguments_are_named(change, error, word):
    with pytest.raises(error, match=word):
        delta_rule(**(make() | change))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_decay_towards_an_anchor(momentum, after):
    """The chunk form with an anchor against its recurrence: each token adds (1 - alpha_t) of the anchor."""
    args = make(lead=(2,), tokens=4, momentum=momentum, edges=True)
    anchor = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def chunk(anchor, *values):
        a = dict(zip(args, values, strict=True))
        decays = decay_table(a["decay"], a.get("momentum"))
        fields = a["weight"], a.get("velocity"), a["keys"] @ a["weight"].mT, a["keys"], a["writes"], a["erase"]
        weight, velocity, reads = delta_chunk(Chunk(*fields, *decays, a["queries"][-1:], anchor), after)
        return tuple(t for t in (weight, velocity, reads) if t is not None)

    def loop(anchor, *values):
        a = dict(zip(args, values, strict=True))
        weight, velocity, reads = a["weight"], a.get("velocity"), []
        for t in range(4):
            x, before = a["keys"][:, t], weight
            step = a["writes"][:, t, :, None] * x[:, None]
            if momentum:
                step = velocity = a["momentum"][:, t, None, None] * velocity + step
            alpha = a["decay"][:, t, None, None]
            erased = a["erase"][:, t, None, None] * (weight @ x[:, :, None]) * x[:, None]
            weight = alpha * weight + (1 - alpha) * anchor - erased + step
            reads.append(((weight if after else before) @ a["queries"][:, t, :, None])[-1:, :, 0])
        return tuple(t for t in (weight, velocity, torch.stack(reads, 1)) if t is not None)

    inputs = (anchor, *args.values())
    got, want = chunk(*inputs), loop(*inputs)
    size = lambda parts: sum((p * torch.linspace(-1, 1, p.numel()).view_as(p)).sum() for p in parts)  # noqa: E731
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(size(parts), inputs) for parts in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradgradcheck(chunk, inputs, fast_mode=True)
