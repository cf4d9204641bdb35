"""Configuration, initial weights, saving and loading, Hugging Face's Trainer."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from nestling.models import HopeConfig, HopeForCausalLM, HopeModel
from nestling.schedule import Level, Schedule


def randomise(model):
    """Weights that no initialisation would give."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_configuration_survives_json(tmp_path):
    config = HopeConfig(
        mixer="selfmod",
        mixer_options={"adaptive": {"k", "v"}, "chunk_size": 8},
        cms_levels=[Level(lr=0.5), Level(8192), Level(math.inf)],
        cms_variant="independent",
    )
    assert config.levels == (Level(lr=0.5), Level(8192), Level(math.inf))
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert json.loads(text)["cms_levels"][2]["chunk_size"] == "inf"
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HopeConfig
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert HopeConfig.from_dict(config.to_dict()).state_signature() == config.state_signature()


def test_a_pattern_of_mixers_survives_json(tmp_path):
    mixers = ("selfmod", {"mixer": "window_attention", "window": 8, "num_heads": 2}, "selfmod")
    config = HopeConfig(mixers=mixers, num_hidden_layers=5)
    assert config.mixer_names == ["selfmod", "window_attention", "selfmod", "selfmod", "window_attention"]
    assert config.layer_mixer(4) == ("window_attention", {"num_heads": 2, "window": 8})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert again.state_signature() == config.state_signature() != HopeConfig(num_hidden_layers=5).state_signature()


def test_a_pattern_of_one_is_the_mixer():
    models = []
    for fields in ({"mixer": "deltanet"}, {"mixers": ["deltanet"]}):
        torch.manual_seed(0)
        models.append(HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=2, **fields)))
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"mixer": "mamba"}, ValueError, "mamba.*selfmod"),
        ({"mixers": ["selfmod", "mamba"]}, ValueError, r"mixers\[1\] \(decoder layers 1, 3\): .*mamba"),
        ({"mixers": ["selfmod", {"mixer": "attention", "windw": 4}]}, ValueError, r"mixers\[1\].*windw"),
        ({"mixers": ["selfmod", {"mixer": "selfmod", "num_heads": 7}]}, ValueError, r"mixers\[1\].*num_heads 7"),
        ({"mixers": ["selfmod", {"window": 4}]}, ValueError, r"mixers\[1\] must be a name"),
        ({"mixers": [{"mixer": "selfmod", "chunk_size": torch.tensor(3)}]}, TypeError, r"mixers\[0\] must be plain"),
        ({"mixers": []}, ValueError, "1 to 4"),
        ({"mixers": ["selfmod"] * 5}, ValueError, "1 to 4 .* got 5"),
        ({"mixers": ["selfmod"], "mixer_options": {"chunk_size": 4}}, ValueError, "belong to `mixer`"),
        ({"mixers": ["selfmod"], "mixer": "attention"}, ValueError, "no effect"),
        ({"mixers": "selfmod,attention"}, TypeError, "mixers"),
        ({"mixer": "attention", "mixer_options": {"windw": 4}}, ValueError, "windw.*window"),
        ({"mixer": "attention", "mixer_options": {"window": 0}}, ValueError, "window"),
        ({"mixer_options": {"chunk_size": 0}}, ValueError, "chunk_size"),
        ({"mixer_options": {"chunk_size": torch.tensor(3)}}, TypeError, "mixer_options"),
        ({"num_attention_heads": 7}, ValueError, r"num_heads \(7\)"),
        ({"hiden_size": 64}, ValueError, "did you mean hidden_size"),
        ({"conv_size": 4}, ValueError, "no option 'conv_size'"),
        ({"hidden_size": "64"}, TypeError, "hidden_size"),
        ({"hidden_size": 0}, ValueError, "hidden_size"),
        ({"vocab_size": -1}, ValueError, "vocab_size"),
        ({"intermediate_size": 0}, ValueError, "intermediate_size"),
        ({"rms_norm_eps": 0.0}, ValueError, "rms_norm_eps"),
        ({"cms_variant": "serial"}, ValueError, "cms_variant"),
        ({"cms_levels": [{"chunk_size": 3}, {"chunk_size": 5}]}, ValueError, "multiple"),
        ({"cms_levels": [{"size": 3}]}, ValueError, "no field 'size'"),
        ({"hidden_act": "selu"}, ValueError, "hidden_act"),
    ],
)
def test_configuration_that_cannot_be(fields, error, says):
    with pytest.raises(error, match=says):
        HopeConfig(**fields)


def test_layers_keep_their_own_initial_values(make_config, mixer):
    """Gate biases, initial states, convolutions: as the layer alone draws them, not the library's N(0, 0.02)."""
    config = make_config(mixer, hidden_size=64, intermediate_size=256, vocab_size=500)
    model = HopeForCausalLM(config)
    own = config.build_layer_mixer(0)
    for name, parameter in model.model.layers[0].mixer.named_parameters():
        expected = own.get_parameter(name)
        if expected.numel() == 1 or expected.std() == 0 or "bias" in name:
            assert torch.equal(parameter, expected), name
        elif expected.numel() > 200:
            scale = 0.5 if name.startswith("out_proj") else 1.0  # 2 layers of 2 branches
            assert abs(parameter.std() / (scale * expected.std()) - 1) < 0.3, name
    down = model.model.layers[0].memory.blocks[0].down_proj.weight
    assert abs(down.std() * 256**0.5 / 0.5 - 1) < 0.1
    assert abs(model.get_input_embeddings().weight.std() * 8 - 1) < 0.1
    assert abs(HopeModel(make_config(initializer_range=0.5)).embed_tokens.weight.std() / 0.5 - 1) < 0.1


def test_initial_values_follow_the_seed(make_config, mixer):
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        weights.append(HopeForCausalLM(make_config(mixer)).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_save_and_load(tmp_path, make_model, mixer):
    model = randomise(make_model(mixer).float())
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is HopeForCausalLM
    assert not again.training
    assert again.lm_head.weight is again.get_input_embeddings().weight
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    ids = torch.randint(0, 40, (1, 9))
    assert torch.equal(model(ids).logits, again(ids).logits)
    base = HopeModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_larger_vocabulary(make_model):
    model = make_model().float()
    model.resize_token_embeddings(50)
    assert model.config.vocab_size == 50
    ids = torch.arange(50)[None]
    assert model(ids, labels=ids).logits.shape == (1, 50, 50)


def test_untied_output_matrix(tmp_path, make_model):
    model = randomise(make_model(tie_word_embeddings=False).float())
    model.save_pretrained(tmp_path)
    again = HopeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def test_a_checkpoint_with_a_gap_keeps_the_rest(tmp_path, make_model, mixer):
    """A parameter the file lacks starts as its layer draws it; those beside it keep what was loaded."""
    model = randomise(make_model(mixer).float())
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    missing = "model.layers.0.memory.blocks.0.norm.weight"
    del stored[missing]
    save_file(stored, file, metadata={"format": "pt"})
    again = HopeForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(again.pop(missing), torch.ones(16))
    for name, weight in again.items():
        assert torch.equal(weight, model.state_dict()[name]), name


def test_a_truncated_checkpoint_is_refused(tmp_path, make_model):
    make_model().float().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|truncat"):
        HopeForCausalLM.from_pretrained(tmp_path)


def test_on_the_meta_device_nothing_is_allocated(make_config, mixer):
    with torch.device("meta"):
        model = HopeForCausalLM(make_config(mixer))
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.to_empty(device="cpu").parameters():
            parameter.fill_(math.nan)
    model.init_weights()
    assert model(torch.randint(0, 40, (1, 9))).logits.isfinite().all()


def test_slow_levels_step_at_their_own_pace(make_model):
    """A training loop with the schedule: each level's weights change exactly in the steps it is due."""
    levels = [Level(), Level(100), Level(200), Level(math.inf)]
    model = make_model(cms_levels=levels).train()
    schedule = Schedule(levels, context_length=8, tokens_per_step=32)
    levels = model.level_parameters()
    assert list(levels) == [0, 1, 2, 3] and schedule.slow == (1, 2)
    slow = {i: levels[i] for i in schedule.slow}
    frozen = [p for i in schedule.frozen for p in levels[i]]
    apart = {id(p) for p in [*frozen, *(p for level in slow.values() for p in level)]}
    optimisers = {0: torch.optim.SGD([p for p in model.parameters() if id(p) not in apart], lr=0.1)}
    optimisers |= {level: torch.optim.SGD(parameters, lr=0.1) for level, parameters in slow.items()}
    changed = {0: 0, 1: 0, 2: 0, 3: 0}
    before = {level: [p.clone() for p in ps] for level, ps in model.level_parameters().items()}
    for step in range(25):
        ids = torch.randint(0, 40, (4, 8))
        model(ids, labels=ids).loss.backward()
        for level in schedule.due(step * 32, step * 32 + 32):
            optimisers[level].step()
            optimisers[level].zero_grad()
        for level, parameters in model.level_parameters().items():
            if any(not torch.equal(a, b) for a, b in zip(before[level], parameters)):
                changed[level] += 1
            before[level] = [p.clone() for p in parameters]
    assert changed == {0: 25, 1: 8, 2: 4, 3: 0}


class Repeated(torch.utils.data.Dataset):
    """One text, over and over."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = torch.arange(12) * 7 % 40
        return {"input_ids": ids, "labels": ids}


def test_hugging_face_trainer(tmp_path, make_model, mixer):
    model = make_model(mixer).float()
    before = model(Repeated()[0]["input_ids"][None]).logits
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=12,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeated(), eval_dataset=Repeated())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    again = HopeForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    ids = Repeated()[0]["input_ids"][None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert not torch.equal(again(ids).logits, before)
