"""Knowledge incorporation: the invented world, the measures, and the experiment on a tiny model."""

import json
import re

import pytest
import torch

from experiments.knowledge import pages
from experiments.knowledge.biographies import ATTRIBUTES, Question, build
from experiments.knowledge.experiment import PROMPT, Knowledge, answers, chance, measures, taught
from experiments.shared.continual.pretrained import pretrained
from experiments.shared.continual.streams import adapted, prefilled
from experiments.shared.continual.study import LearnerContender
from experiments.shared.retrieval import best, words
from experiments.shared.run import run_experiment

STACK = {"blocks": [-2, -1]}
LEVELS = [{"chunk_size": 32, "lr": 0.01, "optimizer": "adamw"}]


@pytest.fixture
def settings(model):
    return Knowledge(
        model=model, dtype="float32", people=3, paraphrases=1, context=64, other_text="a.txt", other_length=40,
        other_parts=2, seeds=[0, 1], contenders=[
            LearnerContender("closed book", "none"),
            LearnerContender("in context", "context"),
            LearnerContender("retrieval", "retrieval", options={"passages": 1}),
            LearnerContender("1 level", "levels", LEVELS, STACK),
            LearnerContender("width", "levels", LEVELS, {"placement": "width", "width": 4}),
            LearnerContender("same weights", "finetune", LEVELS, STACK, {"lr": 1e-2, "size": 32}),
            LearnerContender("all weights", "finetune", options={"lr": 1e-2, "size": 32}),
        ],
    )  # fmt: skip


def test_every_fact_is_stated_once_in_each_wording():
    world = build(12, 3, seed=0)
    assert len(world.texts) == 36 and len(world.questions) == 12 * len(ATTRIBUTES)
    text = "\n".join(world.texts)
    for q in world.questions:
        _, _, statements, _ = ATTRIBUTES[q.attribute]
        name = re.search("[A-Z][a-z]+ [A-Z][a-z]+", q.text)[0]
        said = [s.format(name=name, value=v) for s in statements for v in q.choices]
        found = [s for s in said if s in text]
        assert len(found) == 3 and all(q.choices[q.answer] in s for s in found)
        assert q.opening not in text and q.text not in text


def test_values_are_dealt_evenly_and_by_seed():
    world = build(12, 1, seed=0)
    for attribute in ATTRIBUTES:
        held = [q.choices[q.answer] for q in world.questions if q.attribute == attribute]
        counts = sorted(held.count(v) for v in set(held))
        assert counts[-1] - counts[0] <= 1
    assert build(12, 1, seed=0) == world != build(12, 1, seed=1)


@pytest.mark.parametrize(("people", "paraphrases"), [(1, 1), (99, 1), (3, 0), (3, 9)])
def test_a_world_that_cannot_be_is_refused(people, paraphrases):
    with pytest.raises(ValueError, match="must be between"):
        build(people, paraphrases, 0)


def test_measures_by_hand():
    questions = [Question("a", "?", "", ("x", "y"), 0), Question("a", "?", "", ("x", "y"), 1)]
    found = measures(questions, [[-1.0, -4.0], [-2.0, -3.0]])  # x is likelier for anybody; less so for the second
    assert found == {"accuracy": 0.5, "calibrated": 1.0, "right": -2.0, "margin": 1.0}
    assert chance(questions) == 0.5
    before = [[-1.0, -5.0], [-3.0, -3.0]]  # what was said of each before anything was read
    assert measures(questions, [[-1.0, -4.0], [-2.0, -3.0]], before)["calibrated"] == 0.0


def test_pages_answer_their_questions_and_give_no_wording_away():
    world = pages.build()
    for q in world.questions:
        text = pages.PAGES[q.attribute].read_text().lower()
        assert len(set(q.choices)) == 4 and q.choices[q.answer] in [asked[2] for asked in pages.ASKED[q.attribute]]
        assert q.opening.lower() not in text and q.text.lower() not in text
    assert {q.answer for q in world.questions} == {0, 1, 2, 3} and [*pages.ASKED] == [*pages.PAGES]


def test_retrieval_ranks_rare_shared_words_first():
    passages = ["the cat sat on the mat", "the dog and the cat", "a bassoon, the loud one", "the the the the"]
    assert best("Who plays the BASSOON?", passages, 1) == passages[2:3]
    assert best("the dog's cat", passages, 2) == passages[:2]
    assert best("nothing shared", passages, 9) == passages and words("Ab-c, D") == ["ab", "c", "d"]


def test_answers_are_log_probabilities_of_the_choices(model):
    plain, tokenizer = pretrained(model, "float32")

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    question = build(2, 1, seed=0).questions[0]
    for before in ("", "Something else.\n\n"):
        context = prefilled(plain, encode(before))
        (found,) = answers(plain, [question], encode, context)
        for choice, value in zip(question.choices, found, strict=True):
            prompt = encode(before + PROMPT.format(question=question.text, opening=question.opening))
            ids = torch.tensor([prompt + encode(f" {choice}")])
            with torch.no_grad():
                log = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            assert value == pytest.approx(log[len(prompt) - 1 :].sum().item(), abs=1e-4)


def test_learning_leaves_the_model_it_began_from_alone(settings):
    plain, _ = pretrained(settings.model, "float32")
    before = {n: p.clone() for n, p in plain.named_parameters()}
    ids = torch.randint(200, (1, 100), generator=torch.Generator().manual_seed(0))
    prompt = ids[:, :9]
    for contender in settings.contenders:
        model, cache, updates = taught(plain, settings, contender, [ids])
        with adapted(model, cache):
            same = torch.equal(model(prompt).logits, plain(prompt).logits)
        learns = contender.method in ("levels", "finetune")
        assert same != learns and (updates == [3] if contender.method == "levels" else len(updates) == learns)
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())


def test_the_experiment_runs_and_reports(settings, tmp_path):
    books, out = tmp_path / "books", tmp_path / "out"
    books.mkdir()
    out.mkdir()
    (books / "a.txt").write_text("Nothing that anybody asks about. " * 100)
    settings.contenders = [c for c in settings.contenders if c.name not in ("width", "all weights")]  # as two others
    settings.contenders.append(LearnerContender("default", "levels", [], STACK))
    (out / "config.json").write_text(json.dumps(settings.stored()))
    summary = run_experiment("knowledge", out, data=books, workers=0, show=False)
    assert not summary["missing"] and not summary["failed"]
    found = {c["contender"]: c for c in summary["contenders"]}
    assert found["closed book"]["gain"]["mean"] == 0 == found["in context"]["harm"]["mean"]
    assert (
        found["retrieval"]["gain"]["mean"] != found["in context"]["gain"]["mean"]
        and found["retrieval"]["updates"] == []
    )
    assert [c["contender"] for c in summary["pages"]] == ["closed book", "in context", "retrieval", "default"]
    assert set(summary["pages"][3]["by_attribute"]) == set(pages.PAGES) and summary["pages"][3]["harm"] != 0
    assert "| default |" in (out / "table.md").read_text().partition("Pages (")[2]
    assert found["1 level"]["gain"]["mean"] != 0 != found["1 level"]["harm"]["mean"]
    assert set(found["1 level"]["by_attribute"]) == set(ATTRIBUTES)
    assert 0 <= found["default"]["chosen"]["taken"]["mean"] <= 1 and found["1 level"]["chosen"] is None
    # of 40 tokens all are "first", which nothing learned predicts
    assert found["default"]["chosen"]["harm"]["mean"] == 0
    assert "| 1 level | 32 |" in (out / "table.md").read_text() and (out / "plot.png").stat().st_size > 10_000
