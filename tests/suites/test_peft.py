"""PEFT: an adapter on each kind of model is trained, saved, loaded on a fresh model and merged."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from suites.others import EVERY
from suites.testers import ModelTester

peft = pytest.importorskip("peft")

HOPES = {
    name: {"mixer": name}
    for name in ("selfmod", "selfmod_tracking", "gated_deltanet", "gated_deltanet_tracking", "deltanet", "attention")
} | {
    "hybrid": {"mixers": ["gated_deltanet", {"mixer": "attention", "window": 4}]},
    "levels": {"cms_levels": [{"chunk_size": 4, "lr": 0.1}, {"chunk_size": None}], "context_length": 64},
}
KINDS = [*HOPES, "stacked", "stacked wide"] if EVERY else ["gated_deltanet", "stacked"]


def build(kind: str):
    torch.manual_seed(0)
    if kind.startswith("stacked"):
        model = LlamaForCausalLM(ModelTester(None, LlamaConfig).get_config())
        levels = [Level(4, lr=0.1), Level(8, lr=0.1)]
        return stack_levels(model, levels, placement="width" if "wide" in kind else "depth").eval()
    return HopeForCausalLM(ModelTester(None, HopeConfig, **HOPES[kind]).get_config()).eval()


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def ids():
    return torch.randint(3, 99, (2, 13), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_round_trip(kind, ids, tmp_path):
    model = build(kind)
    plain = logits(model, ids)
    names = [name for name, _ in model.named_parameters()]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=2))
    torch.testing.assert_close(logits(adapted, ids), plain)  # B begins at zero
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained and {n.split(".")[-3] for n, p in adapted.named_parameters() if p.requires_grad} == {
        "lora_A",
        "lora_B",
    }
    optimizer, losses = torch.optim.Adam(trained, lr=0.02), []
    adapted.train()
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    adapted.eval()
    assert losses[-1] < losses[0]
    got = logits(adapted, ids)
    assert (got - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted, ids), plain)

    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(kind), tmp_path).eval()
    torch.testing.assert_close(logits(again, ids), got, rtol=0, atol=0)
    cache = again(ids[:, :6], use_cache=True).past_key_values
    torch.testing.assert_close(again(ids[:, 6:], past_key_values=cache).logits, got[:, 6:], rtol=1e-4, atol=1e-4)
    written = again.generate(input_ids=ids[:, :7], max_new_tokens=3, do_sample=False)
    assert torch.equal(written, adapted.generate(input_ids=ids[:, :7], max_new_tokens=3, do_sample=False))

    merged = again.merge_and_unload()
    assert type(merged) is type(build(kind)) and [name for name, _ in merged.named_parameters()] == names
    if kind == "levels" or kind.startswith("stacked"):
        # merged, a level learns at W + B A, as before: only rounding is between them
        assert merged.reads
    torch.testing.assert_close(logits(merged, ids), got, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded, ids), logits(merged, ids))


def test_two_adapters_side_by_side(kind, ids):
    model = build(kind)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2))
    first = logits(adapted, ids)
    adapted.add_adapter("other", peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, r=2))
    adapted.set_adapter("other")
    second = logits(adapted, ids)
    assert (first - second).abs().max() > 1e-3
    adapted.set_adapter("default")
    torch.testing.assert_close(logits(adapted, ids), first)
    twin = copy.deepcopy(adapted)
    torch.testing.assert_close(logits(twin, ids), first)
