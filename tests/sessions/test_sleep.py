"""Sleep: documents read again after the last, their sentences shuffled."""

import pytest

from nestling.sessions import find_texts
from nestling.sessions.sleep import LEAST, MOST, shuffled, with_readings, with_sleep


def test_sentences_are_shuffled_and_none_is_lost():
    text = "One is red. Two is blue! Is three green? Four is white. Five is black.\nSix is grey. Seven is pink."
    again = shuffled(text, 1)
    assert again != text.replace("\n", " ") and again == shuffled(text, 1) != shuffled(text, 2)
    assert sorted(again.split()) == sorted(text.split()) and again.count("\n\n") == 1
    assert "Two is blue!" in again and shuffled(" \n", 1) == ""


def test_all_documents_are_read_again_after_the_last(model, session, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"The {name} sat. The {name} ran. The {name} saw. The {name} went on.")
    texts = with_sleep(find_texts([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]), 2)
    assert [t.name for t in texts] == ["a.txt", "b.txt", "a.txt, again (1)", "b.txt, again (1)", "a.txt, again (2)",
                                       "b.txt, again (2)"]  # fmt: skip
    for text in texts[2:]:
        with text.opened(text.path) as file:
            found = file.read()
        assert text.size == len(found) and found.decode() != text.path.read_text()
    made = session(model, [tmp_path / "a.txt"], probe=0)
    made.texts = texts[::2]
    made.notes.texts = [[t.name, t.size, t.digest] for t in made.texts]
    rows = made.run()["documents"]
    assert [row["name"] for row in rows] == ["a.txt", "a.txt, again (1)", "a.txt, again (2)"]
    assert rows[2]["reading"]["bits_per_byte"] < rows[0]["reading"]["bits_per_byte"]


def test_a_short_document_is_read_until_it_has_taught_enough(tmp_path, tokenizer):
    texts = []
    for name, size in (("long", LEAST), ("note", LEAST // 3), ("word", 3)):
        (tmp_path / name).write_text("a" * size)  # a token each
        texts += find_texts([str(tmp_path / name)])
    found = with_readings([*texts, *find_texts(["-"])], tokenizer)
    assert [t.name for t in found[:4]] == ["long", "note", "note, reading 2", "note, reading 3"]
    assert [t.again for t in found[:4]] == ["", "", "note", "note"]
    assert len(found) == 1 + 3 + MOST + 1 and found[-1].path is None
    assert with_readings(texts, tokenizer, 0) == texts
    with pytest.raises(ValueError, match="least must not be negative"):
        with_readings(texts, tokenizer, -1)


def test_what_is_read_again_is_out_of_sight(model, session, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("The cat sat on it.")  # with the token in front three chunks of 8, the last shorter
    seen = []

    def made(state, **settings):
        it = session(model, [tmp_path / "a.txt"], state, probe=64, **settings)
        it.texts = with_readings(it.texts, tokenizer, 54)
        it.notes.texts = [[t.name, t.size, t.digest] for t in it.texts]
        return it

    plain = made("plain", show=lambda it: seen.append(it.cache.layers[0].get_seq_length()))
    rows = plain.run()["documents"]
    assert [row["levels"][0]["updates"] for row in rows] == [3, 3, 3] and max(seen) == 19
    assert all(row["before"] == before["after"] for row, before in zip(rows[1:], rows))
    assert rows[2]["after"]["bits_per_byte"] < rows[0]["after"]["bits_per_byte"]
    kept = made("kept", snapshots=3)
    kept.run()
    assert list(kept.cache.snapshots) == ["a.txt"]


def test_a_pipe_cannot_be_read_again(tmp_path):
    with pytest.raises(ValueError, match="pipe cannot be read again"):
        with_sleep(find_texts(["-"]), 1)
    with pytest.raises(ValueError, match="sleep must not be negative"):
        with_sleep(find_texts(["-"]), -1)
    assert len(with_sleep(find_texts(["-"]), 0)) == 1
