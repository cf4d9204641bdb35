import json

import pytest

from nestling.nested_system import NestedSystem

MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))

def all_of_it():
    net = model()
    return {"model": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1), "measure": torch.randn(4, 3)}

number = 3
def nothing():
    return number
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "inspected_here.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "inspected_here"


def system(result):
    assert result.exit_code == 0, result.stderr
    return NestedSystem.from_dict(json.loads(result.stdout))


def test_a_size_as_a_table(call):
    result = call("inspect", "tiny")
    assert result.exit_code == 0, result.stderr
    assert "Level 1   ∞" in result.stdout and "Level 2   1 / token" in result.stdout
    assert "0 (never updated)" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_json_is_the_whole_system(call):
    found = system(
        call("inspect", "tiny", "--optimizer", "m3", "-o", "periods=[1, 4]", "--set", "mixer=attention", "--json")
    )
    often = [str(level.frequency) for level in found.levels]
    assert often == ["∞", "5 / step", "5 / 4 steps", "1 / step", "1 / step", "1 / 4 steps"]
    assert found.coverage.complete and found.title == "HopeForCausalLM + M3"


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "dgd", "torch.optim.Adagrad"])
def test_optimisers_by_name(call, name):
    found = system(call("inspect", "tiny", "--optimizer", name, "--lr", "0.5", "--json"))
    assert found.coverage.complete
    assert "lr 0.5" in found["model.layers.0.mixer.memory.in_proj"].solver.rate


def test_slow_levels_with_the_tokens_of_a_step(call):
    levels = '[{"chunk_size": null}, {"chunk_size": 4096}]'
    arguments = [
        "inspect",
        "tiny",
        "--set",
        f"cms_levels={levels}",
        "--optimizer",
        "adamw",
        "--tokens-per-step",
        "1024",
    ]
    found = system(call(*arguments, "--json"))
    assert str(found["model.layers.0.memory.blocks.1"].frequency) == "1 / 4,096 tokens"
    assert any(memory.kind == "gradient sum" for memory in found.memories)


def test_measured(call):
    small = ["--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "mixer_options.chunk_size=4"]
    small += ["--set", "mixer=selfmod"]
    found = system(
        call("inspect", "tiny", *small, "--optimizer", "sgd", "--measure", "--tokens", "8", "--steps", "2", "--json")
    )
    assert found["model.layers.0.mixer.k"].measured.updates == 2
    assert found["model.layers.0.mixer.in_proj"].measured.over == 2
    assert found.tokens_per_step == 16


def test_a_run_and_a_configuration(call, trained, tmp_path):
    run = system(call("inspect", trained, "--json"))
    folder = trained / "checkpoints" / "step-00000004"
    assert system(call("inspect", folder, "--json")) == run == system(call("inspect", folder / "config.json", "--json"))
    measured = system(call("inspect", trained, "--measure", "--tokens", "8", "--json"))
    assert measured["model.layers.0.mixer.memory.memory"].measured.updates == 8
    config = {
        "model_type": "gpt2",
        "n_embd": 8,
        "n_layer": 1,
        "n_head": 2,
        "vocab_size": 20,
        "architectures": ["GPT2Model"],
    }
    (tmp_path / "gpt2.json").write_text(json.dumps(config))
    assert system(call("inspect", tmp_path / "gpt2.json", "--json")).title == "GPT2Model"


def test_a_factory_and_its_files(call, module, tmp_path):
    options = ["--optimizer", "torch.optim.SGD", "-o", "momentum=0.9"]
    files = ["--figure", tmp_path / "new" / "a.svg", "--html", tmp_path / "a.html"]
    result = call("inspect", f"{module}:model", *options, *files)
    assert result.exit_code == 0, result.stderr
    assert "Level 2" in result.stdout and "written:" in result.stdout
    assert (tmp_path / "new" / "a.svg").read_text().startswith("<svg") and (tmp_path / "a.html").stat().st_size > 10_000
    found = system(call("inspect", f"{module}:all_of_it", "--measure", "--json"))
    assert found["0"].measured.updates == 3
    assert system(call("inspect", f"{module}:all_of_it", "--json"))["0"].measured is None


def test_the_gallery(call, tmp_path):
    result = call("inspect", "--gallery", tmp_path / "g", "--json")
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["figures"]) == len(list((tmp_path / "g").glob("*.svg"))) >= 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to inspect"),
        (["nowhere"], "nothing to inspect at 'nowhere'"),
        (["tiny", "--set", "mixr=attention"], "did you mean 'mixer'"),
        (["tiny", "-o", "momentum=0.9"], "name one with --optimizer"),
        (["tiny", "--optimizer", "adamv"], "did you mean 'adamw'"),
        (["tiny", "--optimizer", "sgd", "-o", "momentun=0.9"], "did you mean 'momentum'"),
        (["tiny", "--figure", "picture"], "no ending"),
        (["tiny", "--tokens-per-step", "0"], "tokens_per_step must be"),
        (["tiny", "--measure", "--tokens", "0"], "--tokens must be at least 1"),
        (["none.json"], "no configuration at none.json"),
        (["MODULE:nothing"], "must give a module"),
        (["MODULE:absent"], "cannot be imported"),
        (["MODULE:model", "--set", "a=1"], "a factory has none"),
        (["MODULE:model", "--measure"], "has no vocabulary"),
    ],
)
def test_bad_input_is_one_clear_line(call, module, arguments, words):
    result = call("inspect", *[a.replace("MODULE", module) for a in arguments])
    assert result.exit_code == 2, result.stdout
    assert words in result.stderr and "Traceback" not in result.stderr


def test_broken_configurations_are_named(call, tmp_path):
    for text, words in (("{", "is no JSON"), ("[]", "names no model_type"), ("{}", "names no model_type")):
        (tmp_path / "a.json").write_text(text)
        result = call("inspect", tmp_path / "a.json")
        assert result.exit_code == 2 and words in result.stderr
