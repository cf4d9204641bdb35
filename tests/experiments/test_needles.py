"""Needles: what is asked for stands in the text, once each; equal parameters; one run and its table."""

import random
import re

import pytest
import torch

from experiments.needles import experiment, report, study
from experiments.needles.tasks import NOISE, TASKS, batch
from nestling.models import sizes

BOOK = "It is a truth. Universally acknowledged! Or is it? " * 40


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [256, 777])
def test_what_is_asked_for_stands_in_the_text(name, length):
    task = TASKS[name]
    for seed in range(5):
        text, spans = task.draw(random.Random(seed), length, BOOK)
        hay, question = text.split("\n")
        assert len(text) == length and task.least <= 256 and len(spans) == task.asked * task.values
        needles = re.findall(rf"The magic {task.value} of (\w+) is ([0-9a-f-]+)\. ", hay)
        assert len(needles) == task.keys * task.values
        asked = re.fullmatch(rf"The magic {task.value} of (.+) is (.+)", question)
        expected = [value for key in asked[1].split(", ") for k, value in needles if k == key]
        assert [text[span] for span in spans] == expected == asked[2].split(", ")
        straw = re.sub(rf"The magic {task.value} of \w+ is [0-9a-f-]+\. ", "", hay)
        assert straw in (BOOK if task.haystack == "book" else NOISE * 9)


def test_too_short_a_text_is_refused():
    with pytest.raises(ValueError, match="100 are too few"):
        TASKS["multi-value"].draw(random.Random(0), 100, BOOK)
    with pytest.raises(ValueError, match="the book has"):
        TASKS["single-2"].draw(random.Random(0), 5000, BOOK)


def test_a_batch_marks_the_bytes_of_every_answer():
    tokens, targets, answers = batch(TASKS["multi-query"], random.Random(0), 3, 300, BOOK)
    assert tokens.shape == targets.shape == answers.shape == (3, 299)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    for number in (1, 2, 3, 4):
        found = bytes(targets[0][answers[0] == number].tolist()).decode()
        assert re.fullmatch(r"\d{7}", found) and found in bytes(tokens[0].tolist()).decode().split("\n")[0]


class Told(torch.nn.Module):
    """Names the given bytes."""

    def __init__(self, named):
        super().__init__()
        self.named = named

    def forward(self, tokens):
        return type("", (), {"logits": torch.nn.functional.one_hot(self.named, 256).float()})


def test_an_answer_counts_only_if_all_of_it_is_named():
    drawn = batch(TASKS["multi-query"], random.Random(0), 2, 300, BOOK)
    named = drawn[1].clone()
    assert study.accuracy(Told(named), drawn) == {"answers": 1.0, "bytes": 1.0}
    wrong = (drawn[2][0] == 2).nonzero()[3, 0]
    named[0, wrong] += 1
    named[:, 0] += 1  # of the straw
    assert study.accuracy(Told(named), drawn) == {"answers": 7 / 8, "bytes": 55 / 56}


def test_contenders_have_equal_parameters():
    settings = experiment.defaults()
    for contender in (settings.contenders[0], settings.contenders[-1]):
        config = study.configuration(settings, contender)
        assert sizes.parameters(config) == pytest.approx(settings.parameters, rel=0.02), contender.name


def test_a_run_and_its_table(tmp_path):
    settings = experiment.defaults().smoke()
    work = experiment.work(settings, None, True)
    jobs = experiment.plan(settings, settings.contenders[:1], lambda job: None)
    assert [job.task for job in jobs] == settings.tasks
    rows = {jobs[0]: work(jobs[0])}
    assert rows[jobs[0]]["accuracy"] == work(jobs[0])["accuracy"]
    summary = report.summarize(settings, settings.contenders, rows.get)
    assert "| fourth default |" in report.table(summary) and "(1)" in report.table(summary)
    report.plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_what_decides_a_run():
    settings = experiment.defaults()
    work = object.__new__(study.NeedlesWork)

    def found(data, settings, task):
        work.data, work.settings = data, settings
        return work.fingerprint(study.TaskJob("attention", task, 0))

    other = settings.changed(contenders=[c | {"runs": {"single-1": [0]}} for c in settings.to_dict()["contenders"]])
    assert (
        found("a", settings, "single-1")
        == found("b", other, "single-1")
        != found("a", settings.changed(steps=1), "single-1")
    )
    assert found("a", settings, "single-2") != found("b", settings, "single-2")
