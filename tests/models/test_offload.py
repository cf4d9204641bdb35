"""accelerate's hooks: weights that are elsewhere until a module is called."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import Level, stack_levels
from nestling.cms import merge

LEVELS = {"cms_levels": [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}], "context_length": 32}
KINDS = ["selfmod", "deltanet", "attention", "hybrid of heads", "levels", "selfmod with levels", "stacked",
         "stacked, of rank", "stacked, relative"]  # fmt: skip


def make(kind, make_model):
    if kind.startswith("stacked"):
        kept = {"stacked, of rank": dict(rank=2), "stacked, relative": dict(rank=2, optimizer="spectral")}.get(kind, {})
        config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                             num_attention_heads=2)  # fmt: skip
        return stack_levels(LlamaForCausalLM(config).eval(), [Level(4, lr=0.5, **kept), Level(8, lr=0.2, **kept)])
    mixer = {"levels": "attention", "selfmod with levels": "selfmod"}.get(kind, kind)
    return make_model(mixer, **(LEVELS if "levels" in kind else {})).float()


def offload(model, folder):
    cpu_offload(model)


def dispatch(model, folder):
    """One decoder layer on the CPU, the other on the disk."""
    inner = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    places = inner | {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def hook(model, folder):
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook())


@pytest.mark.parametrize("prepare", [offload, dispatch, hook])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hooked_model_reads_as_it_did(make_model, tmp_path, kind, prepare):
    model, ids = make(kind, make_model), torch.randint(1, 40, (2, 15))
    with torch.no_grad():
        first = model(ids[:, :9], use_cache=True)
        want = model(ids[:, 9:], past_key_values=first.past_key_values).logits
        prepare(model, tmp_path)
        first = model(ids[:, :9], use_cache=True)
        got = model(ids[:, 9:], past_key_values=first.past_key_values)
        assert torch.equal(got.logits, want)
        assert all(parameter.is_meta for parameter in model.parameters()) == (prepare is offload)
        if "levels" in kind and prepare is offload:
            with pytest.raises(ValueError, match="offloaded"):
                merge(model, got.past_key_values)
