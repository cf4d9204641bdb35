"""A step of one token in C++ equals the layer's own forward, values and carried state, for every layer that has one."""

import contextlib

import pytest
import torch
import torch.nn.utils.parametrize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten

from nestling.layers.attention import Attention
from nestling.layers.mixers import MIXERS, build_mixer
from nestling.layers.titans_reference import self_modifying_titans_reference
from nestling.ops import compiled
from nestling.ops.compiled import build
from slowly import examples
from titans import CHOICES, SETTINGS, build_drawn, possible
from titans import build as build_titans

pytestmark = pytest.mark.skipif(build.native() is None, reason="needs a C++ compiler: the layers run in PyTorch")

VARIANTS = [
    *((name, {} if MIXERS[name][0] is Attention else {"chunk_size": 5}) for name in MIXERS),
    ("hope_memory", dict(chunk_size=5, tied_write=False, momentum=True, retain="initial")),
    ("hope_memory", dict(chunk_size=5, tied_write=False, erase_heads=2)),
    ("titans_linear", dict(chunk_size=4, read="chunk", retain="initial", qkv_conv=3, conv_size=0, output_gate=False)),
    ("gated_deltanet", dict(chunk_size=1, read="before", norm_limit=0.02)),
    ("window_attention", dict(window=9, num_kv_heads=1, qk_norm=True, conv_size=0, output_gate=False)),
    ("window_attention", dict(window=1)),
]


def made(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = build_mixer(name, 12, 3, **options).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.fixture
def steps(monkeypatch):
    """Names of the library's functions as they are called."""
    names, run = [], compiled.run
    monkeypatch.setattr(compiled, "run", lambda name, *rest: (names.append(name), run(name, *rest))[1])
    return names


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{n}-{i}" for i, (n, _) in enumerate(VARIANTS)])
def test_tokens_one_by_one_equal_the_forward_in_pytorch(name, options, steps):
    layer = made(name, **options)
    x, mask = torch.randn(2, 19, 12, dtype=torch.float64), torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False  # so that chunks close, and windows end, at different tokens
    with torch.no_grad():
        _, state = layer(x[:, :7], None, mask)
        want = state
        for t in range(7, 19):
            y, state = layer(x[:, t : t + 1], state)
            with compiled.disabled():
                y_want, want = layer(x[:, t : t + 1], want)
            (found, spec), (wanted, wanted_spec) = tree_flatten((y, state)), tree_flatten((y_want, want))
            assert spec == wanted_spec
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    parts = 2 if name == "memory_and_attention" else 1
    assert sum(step in ("memory_step", "attention_step") for step in steps) == 12 * parts


def one_by_one(layer, x):
    """The outputs of a text that begins with a step, and is read in steps alone."""
    state, found = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = layer(x[:, t : t + 1], state)
            found.append(y)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_one_by_one_equal_the_definition(name, steps):
    """All settings: deep memories, memories that project, gates, targets, reads."""
    layer, x = build_titans(**SETTINGS[name]), torch.randn(2, 18, 6, dtype=torch.float64)
    found = one_by_one(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(found, self_modifying_titans_reference(layer, x), rtol=1e-9, atol=1e-9)
    assert steps.count("memory_step") == 18


@settings(max_examples=examples(40), deadline=None)
@given(
    data=st.data(), seed=st.integers(0, 99), expansion=st.integers(1, 3), gates=st.sampled_from(["mlp", "linear"]),
    factor=st.sampled_from([None, 0.3]), fixed=st.booleans(),
)  # fmt: skip
def test_any_settings_in_steps_equal_the_definition(data, seed, expansion, gates, factor, fixed):
    drawn = possible({name: data.draw(st.sampled_from(c), name) for name, c in CHOICES.items()})
    drawn |= {"expansion": 1 if drawn["skip"] == "inner" else expansion, "gates": gates}
    drawn |= {"projection_rate": factor if drawn["adaptive"] else None}
    if fixed and drawn["decay"] == "none" and "alpha" not in drawn["adaptive"]:
        drawn["decay"] = "fixed"
    layer, x = build_drawn(seed, **drawn), torch.randn(2, 11, 6, dtype=torch.float64)
    found = one_by_one(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(found, self_modifying_titans_reference(layer, x), rtol=1e-8, atol=1e-8)


def test_a_parametrized_layer_takes_no_step(steps):
    layer = made("selfmod", torch.float32)
    x = torch.randn(1, 3, 12)
    torch.nn.utils.parametrize.register_parametrization(layer, "eta_bias", torch.nn.Softplus())
    with torch.no_grad():
        whole = layer(x)[0]
        torch.testing.assert_close(layer(x[:, 2:], layer(x[:, :2])[1])[0], whole[:, 2:], rtol=1e-5, atol=1e-6)
    assert "memory_step" not in steps


@pytest.mark.parametrize("name", ["hope_memory", "selfmod"])
def test_a_state_is_a_value_and_a_text_may_begin_with_a_step(name, steps):
    layer = made(name, torch.float32)
    x = torch.randn(1, 2, 12)
    with torch.no_grad():
        _, state = layer(x[:, :1])
        before = [t.clone() for t in tree_flatten(state)[0]]
        layer(x[:, 1:], state)
        whole, _ = layer(x)
        assert all(torch.equal(a, b) for a, b in zip(before, tree_flatten(state)[0], strict=True))
        torch.testing.assert_close(layer(x[:, 1:], state)[0], whole[:, 1:], rtol=1e-5, atol=1e-6)
    assert steps.count("memory_step") == 3


@pytest.mark.parametrize("name", ["hope_memory", "selfmod", "window_attention"])
def test_what_a_step_cannot_do_is_left_to_pytorch(name, steps):
    """Gradients, padding, autocast, parts that were hooked or replaced."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = made(name, torch.float32)
    x = torch.randn(2, 3, 12)
    state = layer(x[:, :2])[1]
    token = x[:, 2:]
    steps.clear()
    y = layer(token, state)[0]
    assert y.requires_grad
    with torch.no_grad():
        layer(token, state, torch.tensor([[True], [False]]))
        with torch.autocast("cpu", torch.bfloat16):
            layer(token, layer(x[:, :2])[1])
        hook = layer.out_proj.register_forward_hook(lambda module, given, out: 3 * out)
        torch.testing.assert_close(layer(token, state)[0], 3 * y)
        hook.remove()
        weight, layer.out_proj = layer.out_proj.weight, Doubled(12, 12, bias=False)
        layer.out_proj.weight = weight
        torch.testing.assert_close(layer(token, state)[0], 2 * y)
    assert not {"memory_step", "attention_step"} & set(steps)


@pytest.mark.parametrize(
    "forged", [dict(valid=torch.ones(2, 2)), dict(positions=torch.zeros(2, 1, dtype=torch.int64)),
               dict(values=torch.zeros(2, 1, 3, 4)), dict(tokens=torch.zeros(1, dtype=torch.int64))],
)  # fmt: skip
def test_no_address_of_a_forged_state_is_read(forged, steps):
    layer = made("window_attention", torch.float32)
    x = torch.randn(2, 3, 12)
    with torch.no_grad():
        state = layer(x[:, :2])[1]._replace(**forged)
        with contextlib.suppress(Exception):  # PyTorch broadcasts, or refuses
            layer(x[:, 2:], state)
    assert "attention_step" not in steps
