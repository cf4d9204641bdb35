"""Models with levels and their streams on disk."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from typer.testing import CliRunner

from nestling import Level, stack_levels
from nestling.cli.main import app
from nestling.cms.files import OLD_FORMAT, OLD_RECIPE, load_stacked, save_stacked
from nestling.generation import load_state, save_state
from nestling.training.build import load_saved
from slowly import some

LEVELS = [Level(4, lr=0.5, optimizer="momentum"), Level(8, lr=0.25, optimizer="adamw", clip=1.0)]


@torch.no_grad()
def read(model, ids, cache=None):
    out = model(ids, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values


KINDS = [(torch.float32, True, "1KB"), (torch.bfloat16, False, "1GB")]


@some("placement, kind", [("depth", KINDS[0]), ("width", KINDS[1])], ("depth", "width"), KINDS)
def test_a_model_from_disk_is_what_was_saved(make, ids, tmp_path, placement, kind):
    dtype, tied, shard = kind
    plain = AutoModelForCausalLM.from_config(make(tie_word_embeddings=tied).config, dtype=dtype).eval()
    frozen = Level(math.inf)
    model = stack_levels(plain, [*LEVELS, frozen], placement, blocks=[0, 1, 3], width=3)
    with torch.no_grad():  # weights that no initialisation gives
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 20
    model.generation_config.temperature = 0.33
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "1KB")
    for load in (load_stacked, load_saved, AutoModelForCausalLM.from_pretrained, type(model).from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is type(model) and type(loaded.config) is type(plain.config)
        assert loaded.recipe == model.recipe and loaded.dtype == dtype
        assert loaded.generation_config.temperature == 0.33 and loaded.config.tie_word_embeddings == tied
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
        assert torch.equal(read(loaded, ids)[0], read(model, ids)[0])
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).dtype == torch.float64
    assert plain.config.architectures is None  # saving writes nothing to the model


def test_a_folder_in_the_old_form_loads(make, ids, tmp_path):
    """The recipe lay beside the configuration of the original."""
    model = stack_levels(make(dtype=torch.float32), LEVELS, "width", width=3)
    model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    (tmp_path / OLD_RECIPE).write_text(json.dumps({"format": OLD_FORMAT, **model.recipe}))
    assert torch.equal(read(load_saved(tmp_path), ids)[0], read(model, ids)[0])
    (tmp_path / OLD_RECIPE).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_stacked(tmp_path)
    (tmp_path / OLD_RECIPE).write_text("{}")
    with pytest.raises(ValueError, match="of format None"):
        load_stacked(tmp_path)


def test_what_cannot_be_a_stacked_model_is_refused(make, tmp_path):
    save_stacked(stack_levels(make(dtype=torch.float32), LEVELS), tmp_path / "model")
    assert PreTrainedConfig.from_json_file(tmp_path / "model" / "config.json").levels["placement"] == "depth"
    with pytest.raises(ValueError, match="use stack_levels"):
        AutoModelForCausalLM.from_config(AutoConfig.for_model("nestling_stacked"))


@pytest.mark.parametrize("length", [3, 4, 9, 21])
def test_a_stream_from_disk_goes_on_as_if_never_written(make, ids, tmp_path, length):
    model = stack_levels(make(), LEVELS)
    _, cache = read(model, ids[:, :length])
    save_state(tmp_path / "a.state", cache, model)
    loaded = load_state(tmp_path / "a.state", model)
    assert torch.equal(read(model, ids[:, length:], loaded)[0], read(model, ids[:, length:], cache)[0])


@pytest.mark.parametrize("prefix", ["nestling.continuum.", "nestling.cms."])
def test_a_file_in_the_old_naming_goes_on(make, ids, tmp_path, prefix):
    """`Surprise` was called `Pace`, and its package `continuum`."""
    model = stack_levels(make(), [Level(4, lr=0.5, surprise=0.5), Level(8, lr=0.25)])
    _, cache = read(model, ids[:, :21])
    save_state(tmp_path / "new.state", cache, model)
    with safe_open(tmp_path / "new.state", "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    pace = prefix + ("pace" if "continuum" in prefix else "surprise") + ":Pace"
    old = (
        metadata["learned"]
        .replace("nestling.cms.surprise:Surprise", pace)
        .replace("nestling.cms.state", f"{prefix}state")
    )
    assert f'"{pace}"' in old and f"{prefix}state:LevelState" in old and ":Surprise" not in old
    del metadata["content_digest"]  # older files have none
    (tmp_path / "old.state").write_bytes(save(tensors, metadata | {"learned": old}))
    loaded = load_state(tmp_path / "old.state", model)
    assert torch.equal(read(model, ids[:, 21:], loaded)[0], read(model, ids[:, 21:], cache)[0])


def test_the_stream_of_other_levels_is_refused(make, ids, tmp_path):
    model = stack_levels(make(), LEVELS)
    save_state(tmp_path / "a.state", read(model, ids)[1], model)
    for other in (make(), stack_levels(make(), [Level(4)]), stack_levels(make(), LEVELS, variant="nested")):
        with pytest.raises(ValueError, match="another model"):
            load_state(tmp_path / "a.state", other)


def test_what_does_not_belong_together_is_refused(make, tmp_path):
    with pytest.raises(ValueError, match="has no levels"):
        save_stacked(make(), tmp_path / "plain")
    model = stack_levels(make(dtype=torch.float32), LEVELS, "width", width=3)
    save_stacked(model, tmp_path / "model")
    with pytest.raises(ValueError, match="exists already"):
        save_stacked(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    for changes in ({"width": 5}, {"placement": "depth"}, {"blocks": [0, 1, 2]}):
        path.write_text(json.dumps(config | {"levels": config["levels"] | changes}))
        with pytest.raises(ValueError, match="do not fit"):
            load_stacked(tmp_path / "model")
    path.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_stacked(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no model with levels"):
        load_stacked(tmp_path)


def test_convert(make, ids, tmp_path):
    original = make(dtype=torch.float32)
    original.save_pretrained(tmp_path / "original")
    args = ["convert", str(tmp_path / "original"), str(tmp_path / "out"), "--json"]
    args += ["-l", "4,lr=0.5", "-l", "8", "--blocks=-2:"]
    done = CliRunner().invoke(app, args)
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout.splitlines()[-1])
    loaded = load_stacked(tmp_path / "out")
    assert made["state_bytes"] == loaded.state_bytes() and len(made["levels"]) == 2
    with torch.no_grad():
        assert torch.equal(loaded(ids[:, :4]).logits, original(ids[:, :4]).logits)
    again = CliRunner().invoke(app, args)
    assert again.exit_code == 2 and "exists already" in again.output


@pytest.mark.parametrize(
    "changes, word",
    [
        (("--placement", "width"), "no default levels"),
        (("-l", "4,speed=3"), "no field"),
        (("-l", "4", "--blocks", "x"), "--blocks takes"),
    ],
)
def test_convert_names_what_is_wrong(make, tmp_path, changes, word):
    make(dtype=torch.float32).save_pretrained(tmp_path / "original")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "original"), str(tmp_path / "out"), *changes])
    assert done.exit_code == 2 and word in done.output, done.output
    assert not (tmp_path / "out").exists()
