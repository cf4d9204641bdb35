"""The default Hope, and what was saved before it was the default."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nestling.layers.mixers import PATTERNS, build_mixer
from nestling.models import HopeConfig, HopeForCausalLM

# config.json as it was written when the default was "selfmod", and that code's last logits for `filled` weights
OLD = {
    "architectures": ["HopeForCausalLM"], "bos_token_id": None, "cms_layers": None,
    "cms_levels": [{"chunk_size": None, "clip": None, "decay": 0.0, "erase": 1.0, "lr": 0.01, "momentum": 0.9,
                    "optimizer": "gd", "rank": None, "signal": "gradient", "surprise": None}],
    "cms_meta_grad": "full", "cms_variant": "sequential", "context_length": None, "dtype": "float32",
    "eos_token_id": None, "gated_mlp": True, "hidden_act": "silu", "hidden_size": 8,
    "initializer_range": 0.3535533905932738, "intermediate_size": 8, "max_position_embeddings": None,
    "mixer": "selfmod", "mixer_options": {}, "mixers": None, "model_type": "hope", "num_attention_heads": 4,
    "num_hidden_layers": 2, "pad_token_id": None, "rms_norm_eps": 1e-06, "tie_word_embeddings": True,
    "transformers_version": "5.23.0", "use_cache": True, "vocab_size": 16,
}  # fmt: skip
LOGITS = [
    0.062541,
    0.015632,
    -0.038294,
    -0.075031,
    -0.078089,
    -0.046095,
    0.006589,
    0.056316,
    0.080765,
    0.06896,
    0.026202,
    -0.028318,
    -0.070126,
    -0.080458,
    -0.054674,
    -0.004349,
]


def filled(model):
    """A model whose weights follow from their places alone."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.arange(weight.numel()).reshape(weight.shape).double().mul(0.7).cos() / 2)
    return model.eval()


def logits(model):
    return model(torch.arange(12)[None] % 16).logits[0, -1]


@pytest.mark.parametrize("left_out", [(), ("mixer", "mixer_options", "mixers", "num_attention_heads")])
def test_a_model_saved_with_the_first_defaults_is_what_it_was(tmp_path, left_out):
    told = {name: value for name, value in OLD.items() if name not in left_out}
    (tmp_path / "config.json").write_text(json.dumps(told))
    weights = filled(HopeForCausalLM(HopeConfig.from_dict(told))).state_dict()
    save_file({name: w.contiguous() for name, w in weights.items() if name != "lm_head.weight"},
              tmp_path / "model.safetensors", {"format": "pt"})  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.mixer_names == ["selfmod", "selfmod"]
    assert logits(model).tolist() == pytest.approx(LOGITS, abs=1e-6)
    # and it is saved with its version
    model.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (again["defaults"], again["mixer"], again["num_attention_heads"]) == (1, "selfmod", 4)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))


def test_the_first_defaults_stay_available():
    first = HopeConfig(defaults=1, hidden_size=8)
    assert (first.mixer, first.num_attention_heads) == ("selfmod", 4)
    with pytest.raises(ValueError, match="defaults must be one of 1, 2, 3, 4, 5, 6; got 7"):
        HopeConfig(defaults=7)


def test_the_second_defaults_differ_in_what_a_convolution_begins_as(tmp_path):
    second, third = (HopeConfig(defaults=version, hidden_size=8) for version in (2, 3))
    assert second.mixer_names == third.mixer_names
    second.save_pretrained(tmp_path)
    assert HopeConfig.from_pretrained(tmp_path).defaults == 2
    for config, last in ((second, False), (HopeConfig.from_pretrained(tmp_path), False), (third, True)):
        layer = config.build_layer_mixer(0)
        assert bool(layer.conv_weight[:, -1].min() >= 0.75) is last
        assert layer.path_convs["k"][:, -1].min() >= 0.75
    named = HopeConfig(defaults=2, mixers=[{"mixer": "hope_memory", "conv_init": "last"}])
    assert named.layer_mixer(1)[1]["conv_init"] == "last"  # what is written stays


@pytest.mark.parametrize("defaults", [2, 3])
def test_earlier_defaults_alternate_memories_and_a_window(defaults):
    config = HopeConfig(hidden_size=128, num_hidden_layers=3, defaults=defaults)
    assert config.mixer_names == ["hope_memory", "window_attention", "hope_memory"]
    assert config.state_signature() == json.dumps(
        {"hidden_size": 128, "mixer": "hope", "mixer_options": {}, "num_attention_heads": 2, "num_hidden_layers": 3}
    )  # as states on disk have it


@pytest.mark.parametrize(("width", "heads"), [(8, 2), (10, 1), (66, 1), (128, 4), (200, 4), (204, 6)])
def test_attention_beside_a_memory_has_an_even_number_of_channels(width, heads):
    attention = HopeConfig(hidden_size=width, num_hidden_layers=2).build_layer_mixer(1).attention
    assert attention.num_heads == heads and attention.head_dim % 2 == 0


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_last_layer_of_the_default_has_a_memory(layers):
    names = HopeConfig(hidden_size=8, num_hidden_layers=layers).mixer_names
    assert names[-1::-2] == ["memory_and_attention"] * len(names[-1::-2])
    assert names[-2::-2] == ["window_attention"] * len(names[-2::-2])


def test_the_default_is_a_window_and_a_memory_beside_one(tmp_path):
    config = HopeConfig(hidden_size=128, num_hidden_layers=4, mixer_options={"chunk_size": 8, "num_kv_heads": 1})
    assert (config.defaults, config.mixer, config.num_attention_heads) == (6, "hope", 2)
    kinds = {"tied_write": False, "erase_heads": "half", "norm_limit": 1e4}
    given = {"num_heads": 2, "chunk_size": 8, "num_kv_heads": 1}
    assert config.layer_mixer(1) == ("memory_and_attention", given | kinds)
    assert config.layer_mixer(2) == ("window_attention", {"num_heads": 2, "window": 256, "num_kv_heads": 1})
    config.save_pretrained(tmp_path)
    again = HopeConfig.from_pretrained(tmp_path)
    assert again.mixer_names == config.mixer_names and again.state_signature() == config.state_signature()
    with pytest.raises(ValueError, match="no layer of mixer 'hope' has an option chunks"):
        HopeConfig(mixer_options={"chunks": 3})
    with pytest.raises(ValueError, match="pattern of layers .* window_attention, memory_and_attention"):
        build_mixer("hope", 8, 1)


def test_all_heads_of_the_fourth_defaults_erase(tmp_path):
    fourth, now = (HopeConfig(hidden_size=64, num_hidden_layers=3, defaults=version) for version in (4, 6))
    assert fourth.mixer_names == now.mixer_names == ["memory_and_attention", "window_attention", "memory_and_attention"]
    fourth.save_pretrained(tmp_path)
    for config in (fourth, HopeConfig.from_pretrained(tmp_path)):
        memory = config.build_layer_mixer(0).memory.config
        assert (memory.num_heads, memory.erasing, memory.tied_write) == (1, 1, True)
    memory = now.build_layer_mixer(0).memory.config
    assert (memory.num_heads, memory.head_width, memory.erasing, memory.tied_write) == (2, 64, 1, False)
    wide = HopeConfig(hidden_size=192, num_hidden_layers=2).build_layer_mixer(1).memory.config
    assert (wide.num_heads, wide.head_width, wide.erasing) == (3, 64, 2)


@pytest.mark.parametrize(("mixer", "limit"), [("hope", 1e4), ("linear_attention", 1e4), ("retnet", 1e4)])
def test_sums_met_a_bound_until_the_fifth_defaults(mixer, limit, tmp_path):
    fifth = HopeConfig(hidden_size=8, num_hidden_layers=2, mixer=mixer, num_attention_heads=1, defaults=5)
    fifth.save_pretrained(tmp_path)
    sixth = HopeConfig.from_dict(fifth.to_dict() | {"defaults": 6})
    limits = []
    for config in (fifth, HopeConfig.from_pretrained(tmp_path), sixth):
        layer = config.build_layer_mixer(1)
        limits.append(getattr(layer, "memory", layer).config.norm_limit)
    assert limits == [8.0, 8.0, limit]


def test_tracking_is_the_fourth_default_with_keys_of_single_tokens():
    tracking, default = HopeConfig(mixer="hope_tracking"), HopeConfig(mixer_options={"qkv_conv": 0}, defaults=4)
    assert [tracking.layer_mixer(i) for i in range(4)] == [default.layer_mixer(i) for i in range(4)]
    assert not tracking.build_layer_mixer(-1 % tracking.num_hidden_layers).memory.path_convs


def test_counting_is_the_default_with_keys_of_single_tokens():
    counting, default = HopeConfig(mixer="hope_counting"), HopeConfig(mixer_options={"qkv_conv": 0})
    assert [counting.layer_mixer(i) for i in range(4)] == [default.layer_mixer(i) for i in range(4)]


@pytest.mark.parametrize(("width", "heads"), [(256, 4), (64, 1), (48, 1), (160, 2), (200, 2)])
def test_heads_have_64_channels_where_the_width_allows(width, heads):
    assert HopeConfig(hidden_size=width).num_attention_heads == heads


def test_chunks_of_the_default_memory_are_only_a_way_to_compute():
    torch.manual_seed(0)
    layers = [build_mixer(PATTERNS["hope"][-1]["mixer"], 16, 2, chunk_size=size).double() for size in (4, 64)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    torch.testing.assert_close(layers[0](x)[0], layers[1](x)[0], rtol=1e-10, atol=1e-10)
