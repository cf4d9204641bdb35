"""Sleep: documents read again after the last, their sentences shuffled."""

import pytest

from nestling.sessions import find_texts
from nestling.sessions.sleep import shuffled, with_sleep


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


def test_a_pipe_cannot_be_read_again(tmp_path):
    with pytest.raises(ValueError, match="pipe cannot be read again"):
        with_sleep(find_texts(["-"]), 1)
    with pytest.raises(ValueError, match="sleep must not be negative"):
        with_sleep(find_texts(["-"]), -1)
    assert len(with_sleep(find_texts(["-"]), 0)) == 1
