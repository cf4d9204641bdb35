import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from nestling import Level
from nestling.cli.main import app
from nestling.generation import Sampling, load_state, save_state
from nestling.generation.answers import before_question, prompt_ids
from nestling.sessions.chat import Conversation

FIRST, SECOND = "the cat sat on the mat and then the dog ran", "today the log is under the cat"


@pytest.fixture
def talk(small_model, tokenizer):
    """Begins a conversation with a memory."""
    model = small_model((Level(64, lr=0.5),))
    return lambda memory=None: Conversation(model, tokenizer, memory)


def say(talk, text, count=4):
    return "".join(talk.say(text, count, Sampling(0)))


def deltas(talk):
    return [d for level in talk.now.memory.levels.levels for d in level.deltas]


def test_what_is_said_is_learned_and_the_answer_is_not(talk, tokenizer):
    first, second = talk(), talk()
    say(first, FIRST, 1), say(second, FIRST, 20)
    for ours, theirs in zip(deltas(first), deltas(second), strict=True):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0  # a short turn too: it is no whole chunk
    change = first.what_changed()[0]
    assert change["said"] == FIRST and change["now"] < change["before"]
    assert change["examples"][0]["after"] > change["examples"][0]["before"]


def test_it_is_remembered_in_a_later_session(talk, tmp_path):
    first = talk()
    say(first, FIRST)
    save_state(tmp_path / "s", first.now.memory, first.model)
    later = talk(load_state(tmp_path / "s", first.model))
    assert later.now.turns == ()
    assert all(torch.equal(a, b) for a, b in zip(deltas(later), deltas(first), strict=True))
    say(later, SECOND)
    assert any(not torch.equal(a, b) for a, b in zip(deltas(later), deltas(first), strict=True))


def test_a_turn_about_something_else_is_answered_as_if_nothing_was_remembered(small_model, tokenizer):
    model = small_model((Level(16, lr=0.02, optimizer="adamw"),))
    it, that = Conversation(model, tokenizer), Conversation(model, tokenizer)
    for _ in range(3):
        say(it, FIRST, 1), say(that, SECOND, 1)
    assert it.bears_on(FIRST) and not it.bears_on("0=1;7=4;96:7|40=1;7=4;" * 3)
    it.now, that.now = (replace(talk.now, turns=()) for talk in (it, that))
    other, before = "0=1;7=4;96:7|40=1;7=4;" * 2, deltas(it)
    assert say(it, other, 12) == say(that, other, 12)
    assert not torch.equal(before[0], deltas(it)[0])  # it is learned nevertheless
    it._always = True
    assert it.bears_on(other[::-1])


def test_undo_and_forget(talk):
    it = talk()
    say(it, FIRST)
    once = it.now
    say(it, SECOND)
    it.forget()
    assert it.now.memory.levels is None and it.now.turns == () and it.what_changed() == []
    assert it.undo() and len(it.now.turns) == 2
    assert it.undo() and it.now is once
    assert it.undo() and not it.undo()
    assert it.now.turns == () and it.now.memory.levels is None
    say(it, FIRST)
    assert all(torch.equal(a, b) for a, b in zip(deltas(it), [d for s in once.memory.levels.levels for d in s.deltas]))


def test_a_turn_that_fails_changes_nothing(talk):
    it = talk()
    say(it, FIRST)
    before = it.now
    for text, count, reason in (("  ", 4, "nothing was said"), ("a " * 80, 4, "let nestling learn read it")):
        with pytest.raises(ValueError, match=reason):
            say(it, text, count)
    with pytest.raises(ValueError, match="more than the"):
        say(it, FIRST, 127)
    assert it.now is before


def test_old_turns_leave_the_transcript_of_a_small_context(talk):
    it = talk()  # 128 positions
    for _ in range(4):
        say(it, FIRST)
    assert 1 <= len(it.now.turns) < 4


def test_a_chat_template_puts_the_turns(talk):
    it = talk()
    it.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}!"
    try:
        ids = prompt_ids(it.tokenizer, [("a", "b"), ("c", "")])
        assert it.tokenizer.decode(ids) == "<user>a<assistant>b<user>c!"
        asked = prompt_ids(it.tokenizer, [("Where?", "")])
        assert it.tokenizer.decode(asked[: before_question(it.tokenizer, asked)]) == "<user>"
    finally:
        it.tokenizer.chat_template = None
    assert it.tokenizer.decode(prompt_ids(it.tokenizer, [("a", "b"), ("c", "")])) == (
        "Question: a\nAnswer: b\nQuestion: c\nAnswer:"
    )


def test_from_the_shell(small_model, tokenizer, tmp_path):
    folder = tmp_path / "model"
    small_model((Level(64, lr=0.5),)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def chat(lines, *options):
        return CliRunner().invoke(app, ["chat", str(folder), "-n", "3", *options], input="\n".join(lines))

    first = chat([FIRST, "/what-changed", "/nonsense", "/quit", SECOND], "--json")
    assert first.exit_code == 0 and "there is no /nonsense" in first.stderr
    found = json.loads(first.stdout)
    assert [turn["said"] for turn in found["turns"]] == [FIRST]
    assert found["changes"][0]["now"] < found["changes"][0]["before"]
    state = tmp_path / "model.state"
    one = state.read_bytes()
    shown = chat([SECOND, "/what-changed", "/undo", "/undo"])
    assert "bits/byte" in shown.stdout and "there is nothing to undo" in shown.stderr
    assert load_state(state, small_model((Level(64, lr=0.5),))).levels.levels[0].updates == 1 and one
    assert chat(["/forget"]).exit_code == 0
    assert load_state(state, small_model((Level(64, lr=0.5),))).get_seq_length() == 0
