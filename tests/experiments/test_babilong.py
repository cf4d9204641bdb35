"""BABILong's form: the last fact about a person answers; every question is asked of the state after the text."""

import random
import re

import pytest
import torch

from experiments.babilong import experiment, study
from experiments.babilong.tasks import PEOPLE, PLACES, QUESTION, TASKS, Facts, Question
from experiments.needles.study import configuration
from nestling.models import HopeForCausalLM, sizes

BOOK = "It is a truth. Universally acknowledged! Or is it? " * 40
FACT = re.compile(rf"({'|'.join(PEOPLE)}) (?:\w+ )+?the ({'|'.join(PLACES)})\. ")


@pytest.mark.parametrize("length", [256, 777])
def test_the_last_fact_about_a_person_answers(length):
    task = TASKS["qa1"]
    assert task.least <= 256
    for seed in range(20):
        text, (span,) = task.draw(random.Random(seed), length, BOOK)
        assert len(text) == length
        hay, question = text.split("\n")
        facts = FACT.findall(hay)
        assert 2 <= len(facts) <= 5
        person = re.match(r"Where is (\w+)\? ", question)[1]
        assert text[span] == dict(facts)[person] and question.endswith(text[span])
        assert FACT.sub("", hay) in BOOK


def test_every_person_is_asked_for():
    for seed in range(20):
        hay, questions = Facts().ask(random.Random(seed), 400, BOOK)
        facts = FACT.findall(hay)
        assert len(hay) == 400 - QUESTION
        assert {q.person: q.place for q in questions} == dict(facts)
        assert {q.person: q.facts for q in questions} == {p: [f[0] for f in facts].count(p) for p, _ in facts}
        assert {q.last for q in questions} == {facts[-1][1]}
        assert all(len(q.asked + q.place) <= QUESTION for q in questions)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="are too few"):
        Facts(fewest=5).draw(random.Random(0), 100, BOOK)


class Reader(torch.nn.Module):
    """Counts the bytes of its cache and names what it is told to, at every place of a question."""

    def __init__(self, places):
        super().__init__()
        self.places, self.weight, self.read = places, torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, tokens, past_key_values=None, use_cache=True, logits_to_keep=0):
        seen = (past_key_values or [0])[0] + tokens.shape[1]
        self.read.append(seen)
        logits = torch.zeros(*tokens.shape, 256)
        for row, line in enumerate(tokens.tolist()):
            text = bytes(line).decode("latin-1")
            found = re.match(r"\nWhere is (\w+)\? ", text)
            if found and past_key_values:
                answer = self.places[found[1]]
                for i, letter in enumerate(answer):
                    if found.end() - 1 + i < tokens.shape[1]:
                        logits[row, found.end() - 1 + i, ord(letter)] = 1
        return type("", (), {"logits": logits, "past_key_values": [seen]})


def test_questions_are_asked_of_the_state_after_the_text():
    mary, john = Question("Mary", "garden", 2, "office"), Question("John", "office", 1, "office")
    reader = Reader({"Mary": "garden", "John": "kitchen"})
    told = [("x" * 1000, [mary, john]), ("y" * 1000, [mary])]
    found = study.asked(reader, told, together=2)
    assert found["questions"] == 3 and found["answers"] == 2 / 3
    assert found["moved"] == 1.0 and found["last"] == 1 / 3
    assert reader.read[:2] == [512, 1000] and all(seen > 1000 for seen in reader.read[2:])
    assert max(reader.read) < 1000 + QUESTION  # each question begins at the text's end


def test_pieces_of_a_text_are_the_text():
    settings = experiment.defaults().smoke()
    torch.manual_seed(0)
    model = HopeForCausalLM(configuration(settings, settings.contenders[0])).eval()
    text, question = BOOK[:300], Question("Mary", "garden", 1, "garden")
    with torch.no_grad():
        cut = model(torch.tensor([list(b"Where?")]), past_key_values=study.read(model, [text], piece=64)).logits
        whole = model(torch.tensor([list(text.encode() + b"Where?")])).logits[:, -6:]
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=1e-3)
    cache = study.read(model, [text])
    assert study.answered(model, cache, [question]) == study.answered(model, cache, [question])
    assert cache.get_seq_length() == 300


def test_contenders_have_equal_parameters():
    settings = experiment.defaults()
    for contender in settings.contenders:
        config = configuration(settings, contender)
        assert sizes.parameters(config) == pytest.approx(settings.parameters, rel=0.02), contender.name


def test_a_run_and_its_table(tmp_path):
    settings = experiment.defaults().smoke().changed(texts={"256": 2, "1024": 3, "32768": 1})
    work = experiment.work(settings, None, True)
    jobs = experiment.plan(settings, [settings.contenders[i] for i in (0, 2)], lambda job: None)
    rows = {job: work(job) for job in jobs}
    assert [list(row["found"]) for row in rows.values()] == [["256", "1024", "32768"], ["256", "1024"]]
    summary = experiment.summarize(settings, settings.contenders, rows.get)
    table = experiment.table(summary)
    assert "| attention, µs a byte | 1 |" in table and "| 32K |" in table
    experiment.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
