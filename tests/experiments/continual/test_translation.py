"""Continual translation: verses, measures, and the experiment on a tiny model."""

import gzip
import json
import math

import pytest
import torch

from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.student import Student
from experiments.shared.continual.study import LearnerContender
from experiments.shared.run import run_experiment
from experiments.translation import bible
from experiments.translation.bible import Pair, Verse
from experiments.translation.experiment import TUNING_SEED, Translation, chrf, defaults, work

STACK = {"blocks": [-2, -1], "target_modules": ["down_proj"]}
LEVELS = [{"chunk_size": 16, "lr": 0.01, "optimizer": "adamw"}, {"chunk_size": 32, "lr": 0.01, "optimizer": "adamw"}]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "bible"
    path.mkdir()
    for name in ("aa", "bb"):
        with gzip.open(path / f"{name}.jsonl.gz", "wt") as file:
            for n in range(60):
                row = {"ref": f"x {n}", "book": 40 + n % 3, "src": f"{name} {n} word", "en": f"the word {n}."}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def settings(model):
    return Translation(
        model=model, dtype="float32", languages=["aa", "bb"], verses=6, longest=60, context=32, shown=40, test_book=41,
        tuning_book=42, tests=3, length=4, batch=2, seeds=[0, 1], contenders=[
            LearnerContender("no levels", "nothing"),
            LearnerContender("in-context learning", "context"),
            LearnerContender("2 levels", "levels", LEVELS, STACK),
            LearnerContender("fine-tuning", "fine-tuning", LEVELS[:1], STACK, {"lr": 1e-2, "step": 16}),
            LearnerContender("fine-tuning, all weights", "fine-tuning", options={"lr": 1e-3}),
        ],
    )  # fmt: skip


def encode(text):
    return list(text.encode())


def test_a_pair_reads_as_the_stream_shows_it():
    pair = bible.pair("galela", Verse(40, "O Yesus", "Jesus"), encode)
    assert bytes(pair.prompt) == b"Galela: O Yesus\nEnglish:" and bytes(pair.target) == b" Jesus\n"
    assert bytes(bible.stream([pair, pair], encode)) == b"Galela: O Yesus\nEnglish: Jesus\n\n" * 2


def test_what_is_read_and_what_is_tested_share_no_book(settings, folder):
    job = work(settings, folder, False)
    verses = bible.load(str(folder / "aa.jsonl.gz"))
    book = {f"the word {n}.": v.book for n, v in enumerate(verses)}
    for seed, tested in ((0, 41), (TUNING_SEED, 42)):
        lesson = job.lessons(seed, encode)["aa"]
        lines = bytes(lesson.stream).decode().split("\n")
        read = [line.removeprefix("English: ") for line in lines if "English" in line]
        assert {book[t.text] for t in lesson.tests} == {tested} and {book[r] for r in read} == {40}
        assert len(lesson.tests) == 3 and len(read) == len(set(read)) == 6


def test_too_few_verses_are_named(folder):
    verses = bible.load(str(folder / "aa.jsonl.gz"))
    with pytest.raises(ValueError, match="aa has 20 such verses of at most 60 tokens, not 21"):
        bible.draw(verses, "aa", encode, 21, 60, 0, books=[40])
    with pytest.raises(ValueError, match="aa has 0 such"):
        bible.draw(verses, "aa", encode, 1, 5, 0)


def test_chrf_is_that_of_sacrebleu():
    pytest.importorskip("sacrebleu")
    assert chrf(["the same"], ["the same"]) == pytest.approx(100)
    assert chrf(["xyz"], ["the same"]) == 0
    assert 0 < chrf(["the sane", ""], ["the same", "b"]) < 100


def test_bits_are_those_of_the_english_after_its_source(settings, folder):
    pytest.importorskip("sacrebleu")
    job = work(settings, folder, False)
    model, tokenizer = pretrained(settings.model, "float32")
    pair = Pair(tuple(encode("A: b\nEnglish:")), tuple(encode(" cd\n")), "cd")
    found = job.test(Student(model, settings.contenders[0], 32), [pair], tokenizer)
    ids = torch.tensor([[*pair.prompt, *pair.target]])
    logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    assert found["bits"] == pytest.approx(-logp[-4:].sum().item() / math.log(2) / 3, rel=1e-5)


def test_a_student_reads_in_windows_and_counts_updates(model):
    plain, _ = pretrained(model, "float32")
    before = {n: p.clone() for n, p in plain.named_parameters()}
    ids = list(range(3, 67))
    student = Student(plain, LearnerContender("x", "levels", LEVELS, STACK), 32)
    assert len(student.read(ids)) == 2 and student.updates == [3.0, 1.0]  # the last target is not there yet
    assert len(student.read(ids)) == 2 and student.updates == [7.0, 3.0]
    tuned = Student(plain, LearnerContender("x", "fine-tuning", LEVELS, STACK, {"lr": 1e-2, "step": 16}), 32)
    assert len(tuned.read(ids)) == 2 and tuned.updates == []
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())
    changed = [n for n, p in tuned.model.named_parameters() if not torch.equal(p, before[n])]
    assert changed == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)]


def test_the_experiment_runs_and_reports(settings, folder, tmp_path):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(settings.stored()))
    found = run_experiment("translation", out, data=folder, workers=0, show=False)
    assert found["failed"] == {} and found["missing"] == []
    by_name = {e["contender"]: e for e in found["contenders"]}
    assert by_name["no levels"]["bits lost"]["mean"] == 0
    levels = by_name["2 levels"]
    values = [levels[f"bits aa {stage}"]["values"] for stage in ("alone", "after both")]
    assert levels["bits lost"]["values"] == pytest.approx([b - a for a, b in zip(*values)])
    assert by_name["fine-tuning"]["bits aa alone"]["mean"] < by_name["no levels"]["bits aa alone"]["mean"]
    text = (out / "table.md").read_text()
    assert all(name in text for name in by_name) and (out / "plot.png").stat().st_size > 10_000


def test_wrong_methods_are_refused():
    with pytest.raises(ValueError, match="fine-tuning"):
        defaults().changed(contenders=[{"name": "x", "method": "finetuning"}])
