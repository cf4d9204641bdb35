import json

import pytest

from nestling.training import OptimConfig, TrainConfig
from nestling.training.config import nearest


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_file_round_trip(tmp_path, ending):
    config = TrainConfig().changed(
        **{"optim.lr": 1e-3, "data.text": ["a.txt"], "model.options": {"mixer": "attention"}, "optim.options": {"k": 2}}
    )
    path = tmp_path / f"run.{ending}"
    config.save(path)
    assert TrainConfig.load(path) == config


def test_yaml_scientific_notation_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim:\n  lr: 1e-3\n")
    assert TrainConfig.load(path).optim.lr == 1e-3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 3}, ["'stepz'", "did you mean 'steps'"]),
        ({"optim": {"learning": 1, "lrr": 3}}, ["'optim.learning'"]),
        ({"optim": {"lrr": 3}}, ["'optim.lrr'", "did you mean 'optim.lr'"]),
        ({"optim": 3}, ["optim must be a mapping"]),
        ({"steps": "many"}, ["steps must be a whole number", "'many'"]),
        ({"steps": True}, ["steps must be a whole number"]),
        ({"data": {"seq_len": 1.5}}, ["data.seq_len must be a whole number"]),
        ({"data": {"seq_len": 0}}, ["data.seq_len must be at least 1"]),
        ({"data": {"val_fraction": 2}}, ["data.val_fraction must lie between"]),
        ({"data": {"text": "a.txt"}}, ["data.text"]),
        ({"schedule": {"name": "cosin"}}, ["did you mean 'cosine'"]),
        ({"precision": "fp8"}, ["precision", "bf16"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr must not be negative"]),
    ],
)
def test_bad_values_are_refused_by_name(values, words):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(values)
    for word in words:
        assert word in str(error.value)


def test_changed_names_the_unknown_option_and_leaves_the_original():
    config = TrainConfig()
    with pytest.raises(ValueError, match="did you mean 'optim.weight_decay'"):
        config.changed(**{"optim.wieght_decay": 0.1})
    with pytest.raises(ValueError, match="unknown section 'optimm': did you mean 'optim'"):
        config.changed(**{"optimm.lr": 0.1})
    with pytest.raises(ValueError, match="unknown option 'lr': did you mean 'optim.lr'"):
        config.changed(lr=0.1)
    assert config == TrainConfig()
    assert config.changed(**{"optim.lr": 0.5}).optim == OptimConfig(lr=0.5)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="no configuration file"):
        TrainConfig.load(tmp_path / "none.json")
    for content, word in (("{", "not valid JSON"), ("[1]", "must hold a mapping")):
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=word):
            TrainConfig.load(path)


def test_saved_file_is_complete_json(tmp_path):
    path = tmp_path / "run.json"
    TrainConfig().save(path)
    assert json.loads(path.read_text()) == TrainConfig().to_dict()


def test_nearest():
    assert nearest("adam", ["adamw", "muon"]) == "adamw"
    assert nearest("xyz", ["adamw", "muon"]) is None
