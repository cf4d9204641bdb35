"""Levels and frequencies: haystacks, answers, reading in segments, and the experiment on a tiny model."""

import json

import pytest
import torch

from experiments.frequencies import needles as module
from experiments.frequencies.experiment import TUNING_SEED, Frequencies, haystack, per_byte, study
from experiments.frequencies.needles import Needle, build
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.streams import learner, read
from experiments.shared.continual.study import LearnerContender
from experiments.shared.run import run_experiment

SLOW = LearnerContender("32", "levels", [{"chunk_size": 32, "lr": 0.1}], {"blocks": [-2, -1], "context": 16})


@pytest.fixture
def books(tmp_path):
    path = tmp_path / "books"
    path.mkdir()
    for name in "abc":
        (path / f"{name}.txt").write_text(f"This is line {name} of a book. Does anyone read it? " * 200)
    return path


@pytest.fixture
def settings(model):
    return Frequencies(
        model=model, dtype="float32", length=712, context=256, edges=[0, 256], beyond=2, inside=2, seeds=[0, 1],
        tuning_text="c.txt", contenders=[LearnerContender("no levels", "attention"), SLOW],
    )  # fmt: skip


def test_needles_lie_where_they_say_after_sentences(settings, books):
    _, tokenizer = pretrained(settings.model, "float32")
    stack = haystack(settings, books, 0)
    assert len(stack.ids) == settings.length and len(stack.needles) == 4
    for needle in stack.needles:
        said = tokenizer.decode(stack.ids[needle.start : needle.stop])
        assert said == f" One of the special magic numbers for {needle.key} is: {needle.number}."
        assert tokenizer.decode(stack.ids[: needle.start])[-1:] in ("", ".", "?")
    assert stack.straw.count(False) == sum(n.stop - n.start for n in stack.needles)
    held = settings.length - settings.length % settings.context
    assert [n.start >= held for n in stack.needles] == [False, False, True, True]
    assert haystack(settings, books, 0) == stack != haystack(settings, books, 1)


def test_tuning_seeds_read_a_book_of_their_own(settings, books):
    _, tokenizer = pretrained(settings.model, "float32")
    for seed, name in ((0, "a"), (1, "b"), (2, "a"), (TUNING_SEED, "c"), (TUNING_SEED + 1, "c")):
        assert f"line {name}" in tokenizer.decode(haystack(settings, books, seed).ids)


def test_a_haystack_too_small_for_its_needles_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        build([1] * 20, 20, [0, 5], lambda text: [2] * 15, lambda token: True, 0)


def test_answers_are_judged_against_the_other_numbers(monkeypatch):
    needles = [Needle("a", "1", 0, 1), Needle("b", "2", 1, 2), Needle("c", "3", 2, 3)]
    monkeypatch.setattr(module, "weigh", lambda *_: ([-1.0, -9.0, -5.0], [True, False, False]))
    good, bad, _ = module.ask(None, needles, None, list)
    assert (good.exact, good.chosen, good.margin) == (True, True, 6.0)
    assert (bad.exact, bad.chosen, bad.margin) == (False, False, -6.0)


def test_attention_begins_anew_inside_a_slow_chunk(model):
    """Two segments to a chunk: boundaries are those of the level, and a cut anywhere changes nothing."""
    plain, _ = pretrained(model, "float32")
    ids = torch.randint(200, (1, 101), generator=torch.Generator().manual_seed(0))
    slow = learner(plain, SLOW)
    losses, cache = read(slow, ids)
    assert cache.levels.levels[0].updates == 3 and cache.layers[-1].get_seq_length() == 101 % 16
    without, _ = read(plain, ids, context=16)
    torch.testing.assert_close(losses[:, :31], without[:, :31])
    assert not torch.allclose(losses[:, 32:], without[:, 32:], rtol=1e-6)
    first, cache = read(slow, ids[:, :41])
    second, _ = read(slow, ids[:, 41:], cache)
    torch.testing.assert_close(torch.cat([first, second], 1), losses)


def test_bits_count_the_tokens_of_the_book_alone(settings, books):
    plain, tokenizer = pretrained(settings.model, "float32")
    stack = haystack(settings, books, 0)
    found = study(plain, settings, settings.contenders[0], stack, tokenizer)
    assert sum(b["bytes"] for b in found["bins"]) == stack.straw[1:].count(True)  # a byte a token
    losses, _ = read(plain, torch.tensor([stack.ids]), context=settings.context)
    expected = losses[0][torch.tensor(stack.straw[1:])].mean().item() / 0.6931471805599453
    assert per_byte(found["bins"]) == pytest.approx(expected, rel=1e-5)


def test_length_must_leave_something_in_attention():
    with pytest.raises(ValueError, match="multiple of context"):
        Frequencies(length=1024, context=512)


def test_the_experiment_runs_reports_and_resumes(settings, books, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(settings.stored()))
    summary = run_experiment("frequencies", out, data=books, workers=0, show=False)
    assert not summary["missing"] and not summary["failed"]
    plain, slow = summary["contenders"]
    assert plain["gain"]["mean"] == 0 and slow["gain"]["mean"] != 0 and slow["updates"] == [22]
    assert len(slow["by_position"]) == 2 and len(slow["bits"]["values"]) == 2
    assert "| 32 |" in (out / "table.md").read_text() and (out / "plot.png").stat().st_size > 10_000
    size = (out / "results.jsonl").stat().st_size
    run_experiment("frequencies", out, data=books, workers=0, show=False)
    assert (out / "results.jsonl").stat().st_size == size
