import json

import pytest

from nestling.training import TrainConfig

TINY = ["--set", "hidden_size=16", "--set", "num_hidden_layers=1", "--set", "num_attention_heads=2", "--quiet"]


def test_a_run_leaves_its_configuration_and_a_model(trained):
    config = TrainConfig.load(trained / "run.json")
    assert config.model.options["hidden_size"] == 16
    assert config.data.seq_len == 16
    assert not config.logging.progress
    assert (trained / "latest" / "model.safetensors").is_file()


def test_json_is_one_object_with_the_result(call, text, tmp_path):
    result = call("train", text, "--out", tmp_path / "r", "--steps", 2, "--seq-len", 16, *TINY, "--json")
    values = json.loads(result.stdout)
    assert values["step"] == 2
    assert values["bits_per_byte"] > 0
    assert values["loss_by_position"]
    assert values["checkpoint"].endswith("step-00000002")


def test_resume_needs_only_the_folder(call, trained):
    result = call("train", "--out", trained, "--resume", "--steps", 6)
    assert result.exit_code == 0, result.stderr
    assert "done at step 6" in result.stdout
    assert "nestling generate" in result.stdout


def test_a_run_of_several_processes_goes_on_in_one(call, trained):
    """Its run.json says how they shared it; one process shares it with none."""
    stored = TrainConfig.load(trained / "run.json")
    stored.changed(**{"parallel.mode": "fsdp", "parallel.offload": True}).save(trained / "run.json")
    result = call("train", "--out", trained, "--resume", "--steps", 6)
    assert result.exit_code == 0, result.stderr
    assert TrainConfig.load(trained / "run.json").parallel == stored.parallel
    refused = call("train", "--out", trained, "--resume", "--steps", 7, "--parallel", "fsdp")
    assert refused.exit_code != 0 and "needs the processes of torchrun" in refused.stderr


def test_options_reach_every_part_of_the_configuration(call, text, tmp_path):
    (tmp_path / "base.yaml").write_text("optim:\n  weight_decay: 0.3\n  lr: 0.5\n")
    arguments = ["train", text, "--out", tmp_path / "r", "--config", tmp_path / "base.yaml", "--steps", 1, *TINY]
    arguments += ["--lr", "1e-3", "-o", "schedule.name=wsd", "-o", "data.seq_len=8", "--set", "mixer=attention"]
    arguments += ["--set", "mixer_options.conv_size=0", "--optimizer-options", '{"eps": 1e-6}']
    result = call(*arguments)
    assert result.exit_code == 0, result.stderr
    config = TrainConfig.load(tmp_path / "r" / "run.json")
    assert config.optim.weight_decay == 0.3
    assert config.optim.lr == 1e-3
    assert config.optim.options == {"eps": 1e-6}
    assert config.schedule.name == "wsd"
    assert config.data.seq_len == 8
    assert config.model.options["mixer_options"] == {"conv_size": 0}


def test_a_pattern_of_mixers_from_the_command_line(call, text, tmp_path):
    pattern = ["selfmod", {"mixer": "window_attention", "window": 4}]
    arguments = ["--steps", 1, "--seq-len", 8, *TINY, "--set", f"mixers={json.dumps(pattern)}"]
    arguments += ["--set", "num_hidden_layers=2"]
    result = call("train", text, "--out", tmp_path / "r", *arguments)
    assert result.exit_code == 0, result.stderr
    saved = json.loads((tmp_path / "r" / "latest" / "config.json").read_text())
    assert saved["mixers"] == pattern
    wrong = call("train", text, "--out", tmp_path / "w", *arguments, "--set", 'mixers=["selfmod", "atention"]')
    assert wrong.exit_code != 0 and "mixers[1] (decoder layers 1)" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.txt"], "no file or folder 'nowhere.txt'"),
        (["TEXT", "--model", "tinny"], "did you mean 'tiny'"),
        (["TEXT", "--set", "hiden_size=8"], "did you mean 'hidden_size'"),
        (["TEXT", "--set", "hidden_size"], "--set takes NAME=VALUE"),
        (["TEXT", "-o", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["TEXT", "--optimizer-options", "momentum"], "must be a JSON object"),
        (["TEXT", "--steps", "0"], "steps must be at least 1"),
        (["TEXT", "--set", "mixer=atention"], "attention"),
        (["TEXT", "--config", "none.yaml"], "no configuration file"),
        ([], "no text was given"),
    ],
)
def test_bad_input_is_one_clear_line(call, text, tmp_path, arguments, words):
    arguments = [str(text) if a == "TEXT" else a for a in arguments]
    result = call("train", *arguments, "--out", tmp_path / "r")
    assert result.exit_code == 2, result.stderr
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_errors_are_json_too(call, trained, text):
    result = call("train", text, "--out", trained, "--json")
    assert result.exit_code == 2
    assert "already holds a run" in json.loads(result.stdout)["error"]
