"""Costs against what torch counts: a multiply-add is two of its operations."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import nestling.nested_system

PRODUCTS = ("linear map", "MLP block", "softmax attention", "convolution")


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def total(system, field, tokens):
    """Multiply-adds of all products for so many tokens."""
    return sum(getattr(m.cost, field) for m in system.memories if m.kind in PRODUCTS) * tokens


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reading_and_learning_cost_what_torch_counts(request, family, ids):
    model = request.getfixturevalue(family)
    model.set_attn_implementation("eager")
    tokens = ids.shape[1]
    system = nestling.levels(model, torch.optim.SGD(model.parameters(), lr=0.1), context_length=tokens)
    assert total(system, "read_macs", ids.numel()) == pytest.approx(counted(lambda: model(ids)), rel=rotary(family))
    both = counted(lambda: model(ids).logits.sum().backward())
    expected = total(system, "read_macs", ids.numel()) + total(system, "write_macs", ids.numel())
    assert expected == pytest.approx(both, rel=rotary(family))


def rotary(family):
    return 0.002 if family == "llama" else 1e-12  # angles of rotary positions are a product of their own


def test_attention_with_torchs_own_kernel(gpt2, ids):
    gpt2.set_attn_implementation("sdpa")
    system = nestling.levels(gpt2, context_length=ids.shape[1])
    with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused kernel is one the counter does not know
        assert total(system, "read_macs", ids.numel()) == counted(lambda: gpt2(ids))


def test_images_are_counted_by_patch(vit):
    images, patches = torch.randn(2, 1, 8, 8), 4
    vit.set_attn_implementation("eager")
    system = nestling.levels(vit, context_length=patches + 1)
    tokens = {"vit.embeddings.patch_embeddings.projection": patches, "classifier": 1}
    macs = sum(m.cost.read_macs * tokens.get(m.name, patches + 1) for m in system.memories if m.kind in PRODUCTS)
    assert 2 * macs == counted(lambda: vit(images))


def test_fewer_key_heads_keep_a_smaller_cache(llama):
    system = nestling.levels(llama, context_length=10)
    memory = system["model.layers.0.self_attn.attention"]
    assert memory.cost.state_bytes == 2 * 10 * 2 * 4 * 4  # keys and values, tokens, heads, channels, bytes
    assert memory.cost.read_macs == 2 * 10 * 4 * 4


def test_a_window_bounds_attention(make_hope):
    free = nestling.levels(make_hope(mixer="attention", mixer_options={}), context_length=100)
    near = nestling.levels(make_hope(mixer="attention", mixer_options={"window": 5}), context_length=100)
    name = "model.layers.0.mixer.attention"
    assert near[name].cost.read_macs * 20 == free[name].cost.read_macs
    assert "the last 5 tokens" in near[name].feasible


def test_the_state_of_a_hope_is_what_its_cache_holds(hope, ids):
    from nestling.models.hope.cache import cache_bytes

    with torch.no_grad():
        cache = hope(ids, use_cache=True).past_key_values
    system = nestling.levels(hope)
    declared = sum(m.cost.state_bytes for m in system.memories if m.lifetime == "context")
    rest = sum(
        s.conv[0].numel() * s.conv.element_size() + s.position.element_size()
        for s, _ in (l.state for l in cache.layers)
    )
    assert declared == cache_bytes(cache) // len(ids) - rest


def test_a_linear_memory_costs_what_its_definition_computes(make_hope):
    # per token and head of width 8: 64 to read; W k, W v, the write, the erase and the decay to learn
    options = dict(architecture="linear", adaptive=(), momentum=False)
    memory = nestling.levels(make_hope(mixer_options=options))["model.layers.0.mixer.memory"]
    assert memory.cost.read_macs == 2 * 64
    assert memory.cost.write_macs == 2 * 64 * 5


def test_work_of_a_step_is_told_per_token_where_tokens_are_known():
    model = torch.nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    per_step = nestling.levels(model, optimizer)
    assert "100*" in str(per_step) and "tokens_per_step=" in str(per_step)
    per_token = nestling.levels(model, optimizer, tokens_per_step=50)
    assert "*" not in str(per_token) and str(per_token).count(" 2\n") == 1  # 100 multiply-adds in 50 tokens
    assert per_token.cost == per_step.cost


def test_newton_schulz_iterates_on_the_smaller_side():
    wide, tall = (torch.nn.Linear(*shape, bias=False) for shape in ((20, 3), (3, 20)))
    work = [
        nestling.levels(m, torch.optim.Muon(m.parameters()))["Muon: orthogonalization"].cost.step_macs
        for m in (wide, tall)
    ]
    assert work == [2 * 3 * 3 * 20 + 27] * 2
