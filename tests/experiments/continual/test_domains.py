"""The stream of domains: its parts, its measures, and the experiment on a tiny model."""

import json
import random

import pytest

from experiments.domains.experiment import TUNING_SEED, Domains, draw
from experiments.domains.report import summary, table
from experiments.shared.continual.study import LearnerContender
from experiments.shared.run import run_experiment
from nestling.training.tokenizers import byte_tokenizer

STACK = {"blocks": [-2, -1], "target_modules": ["down_proj"]}
FAST = {"chunk_size": 16, "lr": 0.01, "optimizer": "adamw"}


@pytest.fixture
def books(tmp_path):
    path = tmp_path / "books"
    path.mkdir()
    for n, name in enumerate("abc"):
        words = [f"{name}{random.Random(n).random():.3f}" for _ in range(40)]
        (path / f"{name}.txt").write_text(" ".join(f"{w} {i}" for i in range(30) for w in words))
    return path


@pytest.fixture
def settings(model):
    slow = {**FAST, "chunk_size": 32}
    return Domains(
        model=model, dtype="float32", books=2, length=128, context=64, probes=1, seeds=[0, 1], contenders=[
            LearnerContender("no levels", "attention"),
            LearnerContender("2 levels", "levels", [FAST, slow], STACK),
            LearnerContender("fine-tuning", "fine-tuning", [FAST], STACK, {"lr": 1e-2}),
            LearnerContender("fixed, every 32", "levels", [slow], STACK),
            LearnerContender("adaptive, by loss", "levels", [FAST | {"surprise": 0.5, "signal": "loss"}], STACK),
        ],
    )  # fmt: skip


def test_parts_do_not_overlap_and_tuning_reads_elsewhere(settings, books):
    tokenizer, found = byte_tokenizer(), {}
    for seed in (0, 1, 2, TUNING_SEED):
        drawn = draw(settings, books, tokenizer, seed)
        assert len({b.name for b in drawn}) == 2
        for book in drawn:
            text = (books / f"{book.name}.txt").read_text()
            places = [text.index(tokenizer.decode(ids)) / len(text) for ids in
                      (book.first, book.back, book.probes.flatten().tolist())]  # fmt: skip
            assert len(book.first) == len(book.back) == 128 and book.probes.shape == (1, 64)
            assert places[0] + 128 / len(text) <= places[1] and places[1] + 128 / len(text) <= places[2]
            assert (places[0] > 0.7) == (seed >= TUNING_SEED) and (places[2] < 0.7) == (seed < TUNING_SEED)
        found[seed] = [b.name for b in drawn]
    assert len({tuple(f) for f in found.values()}) > 1


def test_short_books_and_odd_lengths_are_named(settings, books):
    with pytest.raises(ValueError, match="too short"):
        draw(settings.changed(length=64 * 100), books, byte_tokenizer(), 0)
    with pytest.raises(ValueError, match="holds 3 .txt files, but books is 4"):
        draw(settings.changed(books=4), books, byte_tokenizer(), 0)
    with pytest.raises(ValueError, match="multiple of context"):
        settings.changed(length=100)


def test_measures_by_hand(settings):
    base = {"seed": 0, "seconds": 1.0, "windows": [[2.0, 2.0], [1.0, 1.0], [2.0, 2.0]], "known": [[2.0, 1.0]],
            "held": [], "updates": [], "books": ["a", "b"]}  # fmt: skip
    own = base | {
        "windows": [[1.9, 1.7], [1.0, 0.8], [1.5, 1.5]], "known": [[2.0, 1.0], [1.5, 0.9], [1.6, 0.7], [1.4, 0.7]],
        "held": [[1.7, 0.8], [1.6, 1.0]], "updates": [8.0, 2.0],
    }  # fmt: skip
    found = summary(settings, {"no levels": [base], "2 levels": [own]})
    entry = found["contenders"][1]
    expected = {"gain first": 0.2, "gain sight": 0.15, "gain back": 0.5}
    expected |= {"learned": 0.4, "forgotten": 0.1, "transfer": 0.1}
    assert {k: entry[k]["mean"] for k in expected} == pytest.approx(expected)
    assert [s["mean"] for s in entry["first book"]] == pytest.approx([0, 0.5, 0.4, 0.6])
    assert [(h["first"]["mean"], h["last"]["mean"]) for h in entry["held"]] == [
        pytest.approx((0.1, 0.1)), pytest.approx((0.0, 0.3)),
    ]  # fmt: skip
    assert "0.4000" in table(found) and "8 + 2" in table(found)


def test_the_experiment_runs_and_reports(settings, books, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(settings.stored()))
    found = run_experiment("domains", out, data=books, workers=0, show=False)
    assert found["failed"] == {} and found["missing"] == []
    by_name = {e["contender"]: e for e in found["contenders"]}
    assert by_name["no levels"]["gain sight"]["mean"] == 0
    assert len(by_name["2 levels"]["held"]) == 2 and by_name["fixed, every 32"]["updates"][0]["mean"] == 11
    assert by_name["fine-tuning"]["learned"]["mean"] > 0
    assert (out / "table.md").read_text().count("level 1") and (out / "plot.png").stat().st_size > 10_000
