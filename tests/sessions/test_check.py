import random

import pytest

from nestling.sessions.check import EACH, LONGEST, Checker, check_page, held_out

WORDS = "the cat dog sat ran on under mat log quickly today and then".split()  # noqa: SIM905


@pytest.fixture
def text():
    draw = random.Random(0)
    said = [" ".join(draw.choices(WORDS, k=draw.randint(5, 9))).capitalize() + "." for _ in range(40)]
    return "\n".join(" ".join(said[at : at + 4]) for at in range(0, 40, 4))


def test_sentences_are_held_out_and_what_leads_to_them_is_read(text):
    rest, held = held_out(text)
    assert len(held) == 40 // EACH and held_out(text) == (rest, held)
    for one in held:
        assert one.sentence in text and one.sentence not in rest and one.lead in rest
    assert sorted((rest + " " + " ".join(h.sentence for h in held)).split()) == sorted(text.split())
    assert held_out("One line. " + "x" * (LONGEST + 1)) == ("One line. " + "x" * (LONGEST + 1), [])


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
    learned = check["sentences"]
    assert learned["after"]["bits_per_byte"] < learned["before"]["bits_per_byte"]  # of the same words
    page = check_page(result, tmp_path / "check.md")
    assert (tmp_path / "check.md").read_text() == page
    bits = [check[p][n]["bits_per_byte"] for p in ("sentences", "elsewhere") for n in ("without", "before", "after")]
    assert f"| a\\|b.txt | {check['count']} | {' | '.join(f'{b:.3f}' for b in bits)} |" in page
    more = session(model, [path], state="other", check=False, probe=0)
    assert "check" not in more.run()["documents"][0]


def test_a_document_without_sentences_and_a_pipe(model, session, tmp_path):
    (tmp_path / "a.txt").write_text("word " * 30)
    result = session(model, [tmp_path / "a.txt"], check=True).run()
    assert result["documents"][0]["check"]["sentences"]["after"]["bits_per_byte"] is None
    assert "| a.txt | 0 | - | - | - |" in check_page(result)
    with pytest.raises(ValueError, match="pipe cannot be checked"):
        session(model, ["-"], piped=b"a", check=True)


def test_an_anchored_session_harms_less(small_model, session, tmp_path, text):
    """On texts that the model made and was not anchored to; its state goes on only with the same anchor."""
    path, harm = tmp_path / "a.txt", {}
    path.write_text(text[:300])
    for weight in (0.0, 8.0):
        row = session(small_model(), [path], state=f"{weight}", check=True, probe=0, anchor=weight).run()
        found = row["documents"][0]["check"]["elsewhere"]
        harm[weight] = found["after"]["bits_per_byte"] - found["without"]["bits_per_byte"]
        assert row["settings"].get("anchor", 0.0) == weight
    assert harm[8.0] < 0.8 * harm[0.0]
    with pytest.raises(ValueError, match="anchor must be finite"):
        session(small_model(), [path], state="other", anchor=float("nan"))
