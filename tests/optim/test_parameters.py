"""split_parameters: what each kind of model's parameters are taken for."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from nestling import HopeConfig, HopeForCausalLM
from nestling.optim import M3, split_parameters

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
LLAMA = dict(**SMALL, vocab_size=32, intermediate_size=24)


def found(split):
    """{parameter name: (group, view)}"""
    return {entry.name: (entry.group, entry.view) for entry in split.entries}


def names(split, group):
    return {entry.name for entry in split.entries if entry.group == group}


MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama without head": lambda: LlamaModel(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**LLAMA)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=9, num_key_value_heads=2)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SMALL, intermediate_size=24, image_size=8, patch_size=4)),
    "hope": lambda: HopeForCausalLM(HopeConfig(**SMALL, vocab_size=32, mixer="selfmod", tie_word_embeddings=False)),
    "hope attention": lambda: HopeForCausalLM(HopeConfig(**SMALL, vocab_size=32, mixer="attention")),
}
OUTSIDE = {  # embeddings, heads
    "llama": ({"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "llama tied": ({"model.embed_tokens.weight"}, set()),
    "llama without head": ({"embed_tokens.weight"}, set()),
    "gpt2": ({"transformer.wte.weight", "transformer.wpe.weight"}, set()),
    "bert": (
        {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
        set(),
    ),
    "mixtral": ({"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "vit": ({"vit.embeddings.position_embeddings"}, {"classifier.weight"}),
    "hope": ({"model.embed_tokens.weight"}, {"lm_head.weight"}),
    "hope attention": ({"model.embed_tokens.weight"}, set()),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind(name):
    model = MODELS[name]()
    split = split_parameters(model)
    embeddings, heads = OUTSIDE[name]
    assert names(split, "embeddings") == embeddings
    assert names(split, "heads") == heads
    every = [p for group in split for _, p in group["params"]]
    assert len(every) == len({id(p) for p in every}) == len(list(model.parameters()))
    assert {id(p) for p in every} == {id(p) for p in model.parameters()}
    assert all(p.ndim >= 2 and min(p.shape[-2:]) > 1 for p in split.matrices)
    assert all(p.ndim < 2 or min(p.shape[-2:]) <= 8 for p in split.rest)
    assert {g["rule"] for g in split if g["group"] == "matrices"} == {"matrix"}
    assert {g["rule"] for g in split if g["group"] != "matrices"} == {"adamw"}
    assert [g["weight_decay"] for g in split if g["group"] == "rest"] == [0.0]
    optimizer = M3(split, lr=0.1, weight_decay=0.2)
    for p in every:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if group["group"] == "rest" else 0.2)
        assert all(("m1" in optimizer.state[p]) == (group["rule"] == "matrix") for p in group["params"])


def test_memories_of_hope_are_batches_of_matrices():
    found_ = found(split_parameters(MODELS["hope"]()))
    assert found_["model.layers.0.mixer.initial.0.0"] == ("matrices", "batch")
    assert found_["model.layers.0.mixer.initial.1.0"] == ("rest", None)  # one row each: rates and decays
    assert found_["model.layers.0.mixer.conv_weight"] == ("rest", None)
    assert found_["model.layers.0.mixer.in_proj.weight"] == ("matrices", None)


def test_experts_are_batches_of_matrices():
    found_ = found(split_parameters(MODELS["mixtral"]()))
    assert found_["model.layers.0.mlp.experts.gate_up_proj"] == ("matrices", "batch")


def test_convolutions_are_rows_and_the_rest():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(8, 4, 5), nn.ConvTranspose2d(4, 6, 2),
        nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 10),
    )  # fmt: skip
    found_ = found(split_parameters(model))
    assert found_["0.weight"] == found_["2.weight"] == found_["3.weight"] == ("matrices", "flatten")
    assert found_["1.weight"] == ("rest", None)
    assert found_["6.weight"] == ("matrices", None)
    assert found_["7.weight"] == ("heads", None)
    assert found_["7.bias"] == found_["4.weight"] == ("rest", None)


def test_which_linear_layer_is_the_head():
    class Net(nn.Module):
        def __init__(self, **layers):
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

    blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(2))
    assert names(split_parameters(Net(blocks=blocks)), "heads") == set()
    assert names(split_parameters(Net(blocks=blocks, out=nn.Linear(4, 3))), "heads") == {"out.weight"}
    classifier = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
    assert names(split_parameters(Net(classifier=classifier, blocks=blocks)), "heads") == {"classifier.1.weight"}
    model = Net(blocks=blocks, out=nn.Linear(4, 3))
    assert names(split_parameters(model, heads=()), "heads") == set()
    given = split_parameters(model, heads=["blocks.1.down"], embeddings=["blocks.0.up.weight"])
    assert names(given, "heads") == {"blocks.1.down.weight"}
    assert names(given, "embeddings") == {"blocks.0.up.weight"}
    for argument in ("heads", "embeddings"):
        with pytest.raises(ValueError, match=f"{argument} names 'nose'"):
            split_parameters(model, **{argument: ["nose"]})


def test_bare_parameters():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(20, 16))
            self.cls = nn.Parameter(torch.zeros(1, 1, 16))
            self.mix = nn.Parameter(torch.zeros(16, 16))
            self.stack = nn.Parameter(torch.zeros(3, 2, 16, 12))
            self.filters = nn.Parameter(torch.zeros(16, 4))
            self.scale = nn.Parameter(torch.zeros(()))
            self.column = nn.Linear(16, 1)
            self.qkv = nn.MultiheadAttention(16, 2)
            self.rnn = nn.LSTM(16, 12)

    assert found(split_parameters(Net(), heads=())) == {
        "position": ("embeddings", None),
        "cls": ("rest", None),
        "mix": ("matrices", None),
        "stack": ("matrices", "batch"),
        "filters": ("rest", None),
        "scale": ("rest", None),
        "column.weight": ("rest", None),
        "column.bias": ("rest", None),
        "qkv.in_proj_weight": ("matrices", None),
        "qkv.in_proj_bias": ("rest", None),
        "qkv.out_proj.weight": ("matrices", None),
        "qkv.out_proj.bias": ("rest", None),
        **{f"rnn.{kind}_{gate}_l0": ("matrices" if kind == "weight" else "rest", None)
           for kind in ("weight", "bias") for gate in ("ih", "hh")},
    }  # fmt: skip


def test_shared_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    split = split_parameters(model)
    assert [entry.name for entry in split.entries] == ["0.weight", "2.bias", "3.weight", "3.bias"]
    assert split.frozen == ["2.weight"]


def test_the_account_says_where_everything_went_and_why():
    text = str(split_parameters(MODELS["hope"]()))
    for line in (
        "  model.layers.*.mixer.initial.*.* [3, 2, 8, 8] x 4: bare parameter, read as a batch of matrices",
        "  model.layers.*.mixer.in_proj.weight [50, 16] x 2: linear layer",
        "embeddings: 1 tensors, 512 parameters (AdamW)",
        "  model.embed_tokens.weight [32, 16]: embedding",
        "  lm_head.weight [32, 16]: output embeddings",
        "(AdamW, no weight decay)",
    ):
        assert line in text
    assert "embedding, tied to lm_head.weight" in str(split_parameters(MODELS["llama tied"]()))
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    assert "frozen, left out: 1 tensors" in str(split_parameters(model))


def test_other_optimisers_take_the_groups():
    """torch.optim.Muon takes the matrices, AdamW all groups."""
    split = split_parameters(MODELS["llama"]())
    torch.optim.Muon(split.matrices)
    torch.optim.AdamW(split)
    assert len(split.matrices) + len(split.embeddings) + len(split.heads) + len(split.rest) == len(split.entries)
