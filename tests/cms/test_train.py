"""Continued training of models with levels: through what they learn, resumable, only where levels begin."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from nestling import Level, stack_levels
from nestling.cli.main import app
from nestling.cms import learner, recompute
from nestling.cms.files import load_stacked, save_stacked
from nestling.training.tokenizers import byte_tokenizer

TEXT = "the cat sat on the mat and the dog ran to the log. " * 200
ARGS = ["--seq-len", "32", "--batch-size", "2", "--optimizer", "adamw", "--lr", "0.01", "--quiet", "--threads", "1"]


@pytest.fixture
def converted(tmp_path):
    torch.manual_seed(0)
    sizes = dict(vocab_size=259, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = stack_levels(LlamaForCausalLM(LlamaConfig(**sizes)), [Level(8, lr=0.1), Level(16, lr=0.1)])
    save_stacked(model, tmp_path / "model", byte_tokenizer())
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "model"


def train(converted, out, *more):
    text = [] if "--resume" in more else [str(converted.parent / "a.txt"), "--init", str(converted), *ARGS]
    done = CliRunner().invoke(app, ["train", *text, "--out", str(out), *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return load_stacked(out / "latest").state_dict()


def test_only_the_levels_initial_states_move_and_they_learn_to_adapt(converted, tmp_path):
    before = load_stacked(converted)
    after = train(converted, tmp_path / "run", "--trained", "levels", "--steps", "6")
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, after[name])}
    assert moved == {n for n in after if ".mlp." in n}
    ids = torch.tensor([list(TEXT[:64].encode())])
    with torch.no_grad():
        assert load_stacked(tmp_path / "run" / "latest")(ids, labels=ids).loss < before(ids, labels=ids).loss


def test_keeping_less_for_the_backward_pass_changes_nothing(converted, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(learner, "recomputed", lambda *a: calls.append(a) or recompute.recomputed(*a))
    options = ["--trained", "levels", "--steps", "3"]
    want = train(converted, tmp_path / "whole", *options)
    assert not calls
    got = train(converted, tmp_path / "less", *options, "--gradient-checkpointing")
    assert len(calls) >= 3
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_a_run_that_stopped_goes_on_bit_for_bit(converted, tmp_path):
    want = train(converted, tmp_path / "whole", "--steps", "6")
    train(converted, tmp_path / "parts", "--steps", "6", "--save-every", "3", "--keep", "9")
    newest = sorted((tmp_path / "parts" / "checkpoints").iterdir())[-1]
    newest.rename(tmp_path / "gone")  # as if killed after the third step
    got = train(converted, tmp_path / "parts", "--resume")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_what_cannot_be_is_named(converted, tmp_path):
    run = ["train", str(converted.parent / "a.txt"), "--out", str(tmp_path / "x"), "--quiet"]
    both = CliRunner().invoke(app, [*run, "--init", str(converted), "--model", "tiny"])
    assert both.exit_code == 2 and "--init and --model" in both.output
    none = CliRunner().invoke(app, [*run, "--trained", "levels", "--seq-len", "16", "--batch-size", "1"])
    assert none.exit_code == 2 and "convert one first" in none.output
