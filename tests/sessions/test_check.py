import random

import pytest

from nestling.sessions.check import EACH, LONGEST, PIECES, Checker, check_page, held_out

WORDS = "the cat dog sat ran on under mat log quickly today and then".split()  # noqa: SIM905


@pytest.fixture
def text():
    draw = random.Random(0)
    said = [" ".join(draw.choices(WORDS, k=draw.randint(5, 9))).capitalize() + "." for _ in range(24)]
    return "\n".join(" ".join(said[at : at + 4]) for at in range(0, 24, 4))


def test_sentences_are_held_out_and_what_leads_to_them_is_read(text):
    rest, held = held_out(text)
    assert len(held) == 24 // EACH and held_out(text) == (rest, held)
    for one in held:
        assert one.sentence in text and one.sentence not in rest and one.lead in rest
    assert sorted((rest + " " + " ".join(h.sentence for h in held)).split()) == sorted(text.split())
    assert held_out("One line. " + "x" * (LONGEST + 1)) == ("One line. " + "x" * (LONGEST + 1), [])
    short = "The key hangs behind the door. Mara keeps the sails in the attic.\nThe anchor lies under the stairs."
    assert [h.sentence for h in held_out(short)[1]] == ["The anchor lies under the stairs."]
    two = "The key hangs behind the door. Mara keeps the sails in the attic."
    assert held_out(two) == (two, [])  # a note of one sentence that may be held out is read whole


def test_a_checked_session_says_what_is_known_of_them(model, tokenizer, session, tmp_path, text):
    path = tmp_path / "a|b.txt"
    path.write_text(text)
    made = session(model, [path], check=True, probe=0)
    result = made.run()
    row = result["documents"][0]
    assert row["bytes"] == len(held_out(text)[0].encode())
    check, alone = row["check"], Checker(model, tokenizer)
    assert check["count"] == len(held_out(text)[1])
    for part, now in (("sentences", alone.known(path, made.cache)), ("elsewhere", alone.elsewhere(made.cache))):
        assert check[part]["without"] == check[part]["before"]  # nothing was learned yet
        assert check[part]["after"] == now != check[part]["before"]
    chosen = alone.elsewhere(made.cache, choose=True)
    assert check["elsewhere"]["chosen"] == chosen != check["elsewhere"]["after"]
    learned = check["sentences"]
    assert learned["after"]["bits_per_byte"] < learned["before"]["bits_per_byte"]  # of the same words
    page = check_page(result, tmp_path / "check.md")
    assert (tmp_path / "check.md").read_text() == page
    bits = [check[p][n]["bits_per_byte"] for p in ("sentences", "elsewhere") for n in ("without", "before", "after")]
    assert (
        f"| a\\|b.txt | {check['count']} | {' | '.join(f'{b:.3f}' for b in bits)} | {chosen['bits_per_byte']:.3f} |"
        in page
    )
    more = session(model, [path], state="other", check=False, probe=0)
    assert "check" not in more.run()["documents"][0]


def test_a_document_without_sentences_and_a_pipe(model, session, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 30)
    result = session(model, [tmp_path / "a.txt"], check=True).run()
    assert result["documents"][0]["check"]["sentences"]["after"]["bits_per_byte"] is None
    assert "| a.txt | 0 | - | - | - |" in check_page(result)
    with pytest.raises(ValueError, match="pipe cannot be checked"):
        session(model, ["-"], piped=b"a", check=True)


def test_a_session_is_anchored_to_texts_that_harm_is_not_measured_on(model, session, tmp_path, monkeypatch):
    path, asked = tmp_path / "a.txt", []
    path.write_text("the dog ran. " * 5)

    def made(model, tokenizer, seeds):
        asked.extend(seeds)
        return [[1, 2, 3]]

    monkeypatch.setattr("nestling.sessions.session.own_texts", made)
    states = {}
    for weight in (0.0, 8.0, 0.0):
        run = session(model, [path], state=f"{len(states)}", probe=0, anchor=weight)
        assert run.run()["settings"].get("anchor", 0.0) == weight
        states[len(states)] = run.cache.levels.levels[0].deltas[0]
    assert asked and not set(asked) & set(range(PIECES)) and model.learner.anchor is None
    assert states[0].equal(states[2]) and not states[0].equal(states[1])
    with pytest.raises(ValueError, match="anchor must be finite"):
        session(model, [path], state="other", anchor=float("nan"))
