"""The C++ chunk forms: equal to PyTorch's in every type and on every number of threads, and absent without harm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestling.layers import SelfModifyingTitans
from nestling.ops import compiled
from nestling.ops.chunk import Chunk, decay_table, delta_chunk
from nestling.ops.compiled import build
from slowly import examples

pytestmark = pytest.mark.skipif(
    build.native() is None, reason="needs a C++ compiler (g++, clang++ or $CXX): PyTorch's forms are tested alone"
)


def outputs_and_gradients(function, inputs):
    outputs = [o for o in function(*inputs) if o is not None]
    weights = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
    grads = torch.autograd.grad(outputs, [t for t in inputs if t is not None], weights, allow_unused=True)
    return [*outputs, *grads]


def both(function, inputs):
    want = outputs_and_gradients(function, inputs)
    with compiled.disabled():
        return want, outputs_and_gradients(function, inputs)


def random(*shape, unit=False):
    x = torch.rand(*shape, dtype=torch.float64) if unit else torch.randn(*shape, dtype=torch.float64)
    return x.requires_grad_()


@settings(max_examples=examples(40), deadline=None)
@given(
    memories=st.integers(1, 4), read=st.integers(0, 4), tokens=st.integers(1, 35), out=st.integers(1, 9),
    inner=st.integers(1, 9), momentum=st.booleans(), erase=st.booleans(), anchor=st.booleans(), after=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_one_chunk_equals_pytorch(memories, read, tokens, out, inner, momentum, erase, anchor, after, seed):
    torch.manual_seed(seed)
    read, size = min(read, memories), (memories, tokens)
    tables = decay_table(random(*size, unit=True), random(*size, unit=True) if momentum else None)
    tables = [None if t is None else t.detach().requires_grad_() for t in tables]
    weight, keys = random(memories, out, inner), random(*size, inner)
    chunk = Chunk(
        weight, random(memories, out, inner) if momentum else None, random(*size, out) if erase else None, keys,
        random(*size, out), random(*size, unit=True) if erase else None, *tables,
        random(read, tokens, inner) if read else None, random(memories, out, inner) if anchor else None,
    )  # fmt: skip
    for a, b in zip(*both(lambda *c: delta_chunk(Chunk(*c), after), chunk), strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_decay_tables_equal_pytorch(momentum, zeros):
    torch.manual_seed(0)
    decay, mu = random(2, 3, 11, unit=True), random(2, 3, 11, unit=True) if momentum else None
    if zeros:
        with torch.no_grad():
            decay[..., ::3] = 0
    for a, b in zip(*both(decay_table, (decay, mu)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


OPTIONS = {"mlp": {}, "linear": dict(architecture="linear"), "no momentum": dict(momentum=False, retain="zero")}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_equals_pytorch(name, dtype):
    torch.manual_seed(0)
    layer = SelfModifyingTitans(32, 2, chunk_size=24, **OPTIONS[name]).to(dtype)
    x = torch.randn(2, 61, 32, dtype=dtype, requires_grad=True)

    def run(x, *parameters):
        return (layer(x)[0],)

    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for a, b in zip(*both(run, (x, *layer.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    torch.manual_seed(0)
    layer, x = SelfModifyingTitans(16, 2, chunk_size=8), torch.randn(3, 20, 16)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            y, _ = layer(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), layer.parameters())))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_types_and_devices_that_stay_with_pytorch():
    double, single = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    assert compiled.is_available(single, None) and compiled.is_available(double)
    assert not compiled.is_available(single, double)
    assert not compiled.is_available(single.bfloat16())
    assert not compiled.is_available(single.to("meta"))


@pytest.mark.parametrize(
    "setting, reason", [(dict(NESTLING_COMPILED="0"), "NESTLING_COMPILED"), (dict(CXX="", PATH=""), "compiler")]
)
def test_why_there_is_no_compiled_form(setting, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(build.Unavailable, match=reason):
        build._load()
    assert build.native.__wrapped__() is None
    assert not any(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "FLAGS", ["--no-such-flag"])
    with pytest.raises(build.Unavailable, match="failed"):
        build.compile_to(tmp_path / "cache" / "chunk.so")
    assert not any(tmp_path.iterdir())
