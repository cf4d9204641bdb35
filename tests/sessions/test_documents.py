import io
import random

import pytest

from nestling.sessions.documents import PIECE, TokenReader, find_texts, pieces
from nestling.sessions.series import Series
from nestling.training.tokenizers import encode, train_bpe

PROSE = "It was  a dark, stormy night;\n\nthe rain fell in torrents… except at 3,141 intervals, é à ü.\n"


def long_text(size=3 * PIECE):
    choice, words = random.Random(0), PROSE.split(" ")
    text = ""
    while len(text.encode()) < size:
        text += choice.choice(words) + " "
    return text


def test_pieces_are_the_text_and_start_again_anywhere():
    text = long_text().encode()
    whole = list(pieces(io.BytesIO(text).read, 0, "a"))
    assert b"".join(piece for _, piece in whole) == text
    assert len(whole) > 3
    for n, (offset, _) in enumerate(whole):
        assert list(pieces(io.BytesIO(text[offset:]).read, offset, "a")) == whole[n:]
    slow = io.BytesIO(text)  # a pipe gives what it has
    assert list(pieces(lambda count: slow.read(min(count, 777)), 0, "a")) == whole


@pytest.mark.parametrize("text", ["x" * (2 * PIECE + 5), "é" * PIECE, "…" * PIECE, "a" + "😀" * PIECE])
def test_a_text_without_spaces_is_never_cut_inside_a_character(text):
    found = [piece for _, piece in pieces(io.BytesIO(text.encode()).read, 0, "a")]
    assert len(found) > 1
    assert "".join(piece.decode() for piece in found) == text


def test_tokens_of_pieces_are_the_tokens_of_the_whole_text():
    text = long_text()
    tokenizer = train_bpe([PROSE * 50], 400)
    tokens = TokenReader(tokenizer, io.BytesIO(text.encode()).read, "a")
    assert tokens.take(10**9) == encode(tokenizer, text)


def test_a_place_is_where_reading_goes_on():
    text, tokenizer = long_text(), train_bpe([PROSE * 50], 400)
    whole = encode(tokenizer, text)
    tokens, read = TokenReader(tokenizer, io.BytesIO(text.encode()).read, "a"), 0
    choice = random.Random(1)
    while read < len(whole):
        assert tokens.ahead(50) == whole[read : read + 50]
        read += len(tokens.take(choice.randint(1, 700)))
        offset, skip = tokens.place
        again = TokenReader(tokenizer, io.BytesIO(text.encode()[offset:]).read, "a", offset, skip)
        assert again.ahead(100) == whole[read : read + 100]
    assert tokens.place == (len(text.encode()), 0)
    assert tokens.take(5) == tokens.ahead(1) == []


def test_folders_files_and_the_pipe_in_order(write, tmp_path):
    write("folder/b.txt"), write("folder/a.md"), write("folder/.hidden"), write("folder/deep/c.txt")
    last = write("last.txt")
    (tmp_path / "folder" / "empty.txt").touch()
    names = [t.name for t in find_texts([str(tmp_path / "folder"), "-", str(last)])]
    assert names == ["a.md", "b.txt", "deep/c.txt", "standard input", "last.txt"]
    assert [t.name for t in find_texts([str(tmp_path / "folder")], "*.txt")] == ["b.txt"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n", "byte 0x89 at offset 0"),
        (b"a" * 5000 + b"\0b", "byte 0x00 at offset 5,000"),
        ("é".encode() * 600_000 + b"\xc3", "byte 0xc3 at offset 1,200,000"),
        (b"ok \xc3\x28", "byte 0xc3 at offset 3"),
    ],
)
def test_binary_content_is_named_with_its_offset(tmp_path, content, words):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"a.bin is no text: {words}"):
        find_texts([str(path)])
    with pytest.raises(ValueError, match=f"a pipe is no text: {words}"):
        list(pieces(io.BytesIO(content).read, 0, "a pipe"))


def test_bad_names_are_explained(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        find_texts([str(tmp_path / "nowhere.txt")])
    with pytest.raises(ValueError, match="named twice"):
        find_texts(["-", "-"])
    with pytest.raises(ValueError, match=r"matches '\*\.rst': choose others with --pattern"):
        find_texts([str(tmp_path)], "*.rst")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="nothing to read"):
        find_texts([str(tmp_path / "empty")])


def test_a_series_of_any_length_is_bounded_and_keeps_sums():
    series, choice = Series(limit=10), random.Random(0)
    values = [choice.random() for _ in range(1003)]
    for x, value in enumerate(values):
        series.add(x, value, 2)
    series.add(1003, float("nan"))
    assert len(series.points) <= 10
    assert sum(p[1] for p in series.points) == 2006
    assert sum(p[1] * p[2] for p in series.points) == pytest.approx(2 * sum(values))
    assert max(p[3] for p in series.points) == max(values)
    assert sum(p[4] for p in series.points) == 1
    assert [p[0] for p in series.points] == sorted(p[0] for p in series.points)
