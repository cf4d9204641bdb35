"""The default rule refined for one model on its texts."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from nestling import Level
from nestling.cli.main import app
from nestling.cms.files import load_stacked, save_new
from nestling.models import HopeConfig, HopeForCausalLM
from nestling.models.hope.levels import give_levels
from nestling.sessions import find_texts
from nestling.sessions.calibrate import Trials, as_text, calibrated, passages, set_level

DEFAULT = Level(16, lr=0.04, optimizer="spectral", rank=4, decay=0.01)


@pytest.fixture
def model(small_model):
    return small_model([DEFAULT])


@pytest.fixture
def texts(write):
    return find_texts([str(write("a.txt", 1500)), str(write("b.txt", 1500))])


@pytest.fixture
def trials(model, tokenizer, texts, tmp_path):
    return lambda: Trials(model, tokenizer, texts, tmp_path / "made.calibrating")


def test_passages_lie_at_equal_distances_over_all_texts(texts, tokenizer):
    found = [bytes(ids).decode() for ids in passages(texts, tokenizer)]
    whole = [text.path.read_text() for text in texts]
    assert found[0] == whole[0][: len(found[0])] and found[1] in whole[0] and found[2].strip()[:300] in whole[1]
    assert all(700 < len(part.encode()) <= 768 for part in found)


def test_too_little_text_and_pipes_are_refused(write, tokenizer):
    with pytest.raises(ValueError, match="too short to calibrate on: .* at least 96 tokens"):
        passages(find_texts([str(write("short.txt", 200))]), tokenizer)
    with pytest.raises(ValueError, match="a pipe"):
        passages(find_texts(["-"]), tokenizer)


def test_what_is_chosen_gains_more_and_harms_no_more(trials, model):
    made = trials()
    found = calibrated(made)
    best = max((t for t in made.tried if not t.harms), key=lambda t: t.gain)
    assert found["chosen"] == {"lr": best.lr, "rank": best.rank}
    assert best.lr > DEFAULT.lr, "a model that knows nothing learns more by larger steps"
    assert not found["kept"] and found["gain_chosen"] > found["gain_default"]
    assert model.learner.levels[0].lr == best.lr and model.recipe["levels"][0]["lr"] == best.lr
    assert "chosen" in as_text(found) and len(as_text(found).splitlines()) == 3 + len(made.tried)


def test_the_default_stays_where_nothing_gains_more_without_harm(trials, monkeypatch):
    made = trials()
    measured = {0.04: (0.5, 0.1), 0.08: (0.9, 0.2), 0.02: (0.4, 0.0)}
    monkeypatch.setattr(Trials, "measured", lambda self, ids, own: measured[self.model.learner.levels[0].lr])
    found = calibrated(made)
    assert found["chosen"] == {"lr": 0.04, "rank": 4} and not found["kept"]
    assert [(t["lr"], t["rank"]) for t in found["tried"]] == [(0.04, 4), (0.08, 4), (0.02, 4), (0.04, 8)]
    assert len(as_text(found).split("harms")) == 2


def test_a_rule_that_is_not_ahead_on_other_text_is_not_taken(trials, monkeypatch, model):
    made = trials()

    def measured(self, ids, own):
        lr = self.model.learner.levels[0].lr
        return (-lr if ids == self.judged_on else lr), 0.0

    monkeypatch.setattr(Trials, "measured", measured)
    found = calibrated(made)
    assert found["kept"] and found["chosen"]["lr"] == 0.16 and model.learner.levels[0] == DEFAULT
    assert "the default stays" in as_text(found)


def test_a_search_that_was_stopped_goes_on(trials, monkeypatch):
    made, whole = trials(), Trials.measured
    first = made.try_(DEFAULT)
    again = trials()
    assert again.tried == [first]
    monkeypatch.setattr(Trials, "measured", lambda *_: pytest.fail("it was known"))
    assert again.try_(DEFAULT) == first
    monkeypatch.setattr(Trials, "measured", whole)
    set_level(again.model, DEFAULT)
    again.journal.write_text("no JSON")
    assert trials().tried == []


def test_another_model_begins_anew(trials, model):
    trials().try_(DEFAULT)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert trials().tried == []


def test_a_hope_keeps_the_rule_that_was_chosen(tokenizer, texts, tmp_path):
    config = HopeConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, context_length=64)
    made = Trials(give_levels(HopeForCausalLM(config)), tokenizer, texts, tmp_path / "hope.calibrating")
    found = calibrated(made)
    save_new(made.model, tmp_path / "hope", tokenizer, found)
    level = HopeForCausalLM.from_pretrained(tmp_path / "hope").learner.levels[0]
    assert level == made.model.learner.levels[0]
    assert found["kept"] or (level.lr, level.rank) == (found["chosen"]["lr"], found["chosen"]["rank"])


def test_convert_writes_what_was_chosen_and_inspect_shows_it(tmp_path, tokenizer, write):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=2, max_position_embeddings=128, eos_token_id=257)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    text, out = write("a.txt", 2000), tmp_path / "made"

    def run(*arguments):
        return CliRunner().invoke(app, [str(a) for a in arguments])

    said = run("convert", tmp_path / "plain", out, "--calibrate", text, "--quiet").stdout
    found = json.loads((out / "calibration.json").read_text())
    assert "calibrated on 1 text " in said and not (tmp_path / "made.calibrating").exists()
    level = load_stacked(out).learner.levels[0]
    assert (level.lr, level.rank) == (found["chosen"]["lr"], found["chosen"]["rank"])
    shown = run("inspect", out)
    assert "calibrated on 1 text " in shown.stdout, shown.stderr
    refused = run("convert", tmp_path / "plain", tmp_path / "other", "--calibrate", text, "-l", "64,lr=0.1")
    assert refused.exit_code and "leave out --level" in refused.stderr
