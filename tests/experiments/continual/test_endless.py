"""The endless stream: what is written and asked, a real kill, figures."""

import json

import pytest
from transformers import AutoModelForCausalLM

from experiments.endless import texts
from experiments.endless.experiment import EndlessJob, defaults, plan, plot, summarize, table
from experiments.endless.reading import Reading, killed, known, read
from nestling import Level, stack_levels
from nestling.training.tokenizers import byte_tokenizer


def test_documents_are_the_texts_and_what_is_asked_is_never_read(tmp_path):
    stream = texts.write(tmp_path, tmp_path, True, 1024, 2, 2, 100)
    names = [path.stem for path in stream.documents]
    assert names[:2] == ["argparse-1", "argparse-2"] and names[: len(names) // 2] * 2 == names
    whole = texts.whole("python/argparse.py", str(tmp_path)).encode()
    assert b"".join(path.read_bytes() for path in stream.documents[:2]) == whole[:1024]
    assert stream.first == whole[1024:1124] and len(stream.elsewhere) == 100
    with pytest.raises(ValueError, match="take a smaller size"):
        texts.write(tmp_path, tmp_path, True, 10**7, 2, 1, 100)


def test_a_killed_reader_goes_on_and_its_notes_are_whole(model, tmp_path):
    learner = stack_levels(
        AutoModelForCausalLM.from_pretrained(model).requires_grad_(False), [Level(16, lr=0.01)], context=32
    )
    stream = texts.write(tmp_path, tmp_path, True, 400, 2, 1, 80)
    asked = {"first": list(stream.first)}
    reading = Reading(learner.eval(), byte_tokenizer(), stream.documents[:3], tmp_path / "a.state", 2, asked, 4)
    kill = killed(reading, 100, 0.0)
    assert kill["whole"] and kill["before"] == 0 and kill["after"] >= 100
    result = read(reading, None)
    assert result["tokens"] == 603 and len(result["snapshots"]) == 2
    lines = [json.loads(line) for line in reading.log.read_text().splitlines()]
    assert {line["document"] for line in lines if "document" in line} == {1, 2, 3}
    assert all(line["milliseconds"] > 0 and line["memory"] > 0 for line in lines if "memory" in line)
    before = known(learner, None, byte_tokenizer(), asked)["first"]
    assert before["now"] == before["best"] > 0


def test_a_document_that_ends_in_the_first_call_is_noted(model, tmp_path):
    learner = stack_levels(
        AutoModelForCausalLM.from_pretrained(model).requires_grad_(False), [Level(16, lr=0.01)], context=32
    )
    stream = texts.write(tmp_path, tmp_path, True, 400, 2, 1, 80)
    reading = Reading(
        learner.eval(), byte_tokenizer(), stream.documents[:2], tmp_path / "a.state", 0, {"first": [1]}, 4
    )

    def killed_at_the_end_of_the_first(session):
        if session.notes.document == 0 and session.notes.offset == 200:
            session._save()
            raise KeyboardInterrupt

    session = reading.session(killed_at_the_end_of_the_first)
    with pytest.raises(KeyboardInterrupt):
        session.run()
    read(reading, None)
    lines = [json.loads(line) for line in reading.log.read_text().splitlines()]
    assert [line["document"] for line in lines if "document" in line] == [1, 2]


def test_figures_are_gains_over_the_model_without_levels(tmp_path):
    settings = defaults()
    ask = {"first": {"now": 3.0, "best": 3.0}, "elsewhere": {"now": 4.0, "best": 4.0}}
    asks = [{"document": n, "first": {"now": 2.0 + n / 100, "best": 1.5}, "elsewhere": {"now": 4.5, "best": 4.0}}
            for n in range(1, 41)]  # fmt: skip
    row = {
        "texts": ["moby"], "tokens": 10**7, "not_finite": 0, "kills": [{"whole": True}] * 20, "whole": 20, "same": True,
        "state_bytes": 10**6, "known": [{"document": 0, **ask}, *asks],
        "stretches": [{"tokens": n, "milliseconds": 20.0 + n // 19, "memory": 10**8 + 5 * 10**6 * (n // 18)}
                      for n in range(20)],
    }  # fmt: skip
    summary = summarize(settings, settings.contenders, lambda job: row if job == EndlessJob("snapshots") else None)
    assert [job.contender for job in plan(settings, settings.contenders, lambda job: None)] == ["snapshots", "default"]
    (found,) = summary["contenders"]
    assert found["learned"]["first now"] == pytest.approx(0.96) and found["end"]["first now"] == pytest.approx(0.6)
    assert found["end"]["first best"] == 1.5 and found["end"]["elsewhere now"] == -0.5
    assert found["time"] == pytest.approx(20.5 / 20.0)
    assert "| snapshots | 10,000,000 | 0 | 20 of 20 | yes | 1.050 | 1.025 |" in table(summary)
    plot(summary, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
