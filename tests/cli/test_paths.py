"""Paths that are empty, mistyped, of the wrong kind or no text: exit code 2 at once, nothing made, everywhere."""

import codecs
import os
from functools import partial

import pytest

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 800


@pytest.fixture
def place(tmp_path, monkeypatch, trained):
    """A folder to work in, with a text, a model `run` and things that are not what they should be."""
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "my_notes"
    notes.mkdir()
    (notes / "a.txt").write_text("the cat sat on the mat.\n" * 130)
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.txt").write_text("the cat sat on the mat.\n" * 130)
    (tmp_path / "mixed" / "b.png").write_bytes(PNG)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "gone.txt").symlink_to("nowhere")
    (tmp_path / "link.txt").symlink_to("nowhere")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "only_a_mark.txt").write_bytes(codecs.BOM_UTF8)
    (tmp_path / "wide.txt").write_text("the cat", encoding="utf-16")
    (tmp_path / "none").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def all_of(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if "cache" not in path.parts}


TEXTS = [
    ("", "is empty"),
    ("my_nots", "no file or folder 'my_nots'; did you mean my_notes?"),
    ("my_nots/a.txt", "did you mean my_notes?"),
    ("my_notes/b.txt", "did you mean my_notes/a.txt?"),
    ("zzz", "no file or folder 'zzz'"),
    ("mixed", "b.png is no text: byte 0x89 at offset 0"),
    ("wide.txt", "wide.txt is UTF-16: convert it to UTF-8"),
    ("empty.txt", "holds no bytes"),
    ("only_a_mark.txt", "holds no bytes"),
    ("none", "no file in none matches"),
    ("fifo", "neither a file nor a folder"),
    ("link.txt", "points at 'nowhere', where nothing is"),
    ("links", "gone.txt points at 'nowhere', where nothing is"),
    ("~nosuchuser/x", "no such user"),
    ("a\0b", "NUL"),
    ("x" * 300, "File name too long"),
]


@pytest.mark.parametrize(("named", "words"), TEXTS, ids=[t[:20] or "empty" for t, _ in TEXTS])
def test_texts(call, place, named, words):
    before = all_of(place)
    for arguments in (["train", named, "--out", "new/run"], ["train", "my_notes", "--val", named, "--out", "new/run"],
                      ["learn", "run", named, "--state", "new/my.state"]):  # fmt: skip
        result = call(*arguments)
        assert result.exit_code == (1 if "too long" in words else 2), (arguments, result.output)
        assert words in " ".join(result.stderr.split()), (arguments, result.stderr)
    assert all_of(place) == before


PATHS = {
    "an empty path": [
        ["train", "my_notes", "--out", ""], ["train", "my_notes", "--config", ""], ["train", "my_notes", "--init", ""],
        ["learn", "", "my_notes", "--state", "s"], ["learn", "run", "my_notes", "--state", ""],
        ["learn", "run", "my_notes", "--state", "s", "--held-out", ""],
        ["learn", "run", "my_notes", "--state", "s", "--page", ""],
        ["generate", ""], ["generate", "run", "--state", ""], ["convert", "", "out", "-l", "8,lr=0.1"],
        ["convert", "run", "", "-l", "8,lr=0.1"], ["eval", "span", "--out", ""], ["eval", "span", "--data", ""],
        ["eval", "span", "--experiments", ""], ["tune", "my_notes", "--out", ""], ["tune", "--config", ""],
        ["inspect", ""], ["inspect", "tiny", "--html", ""], ["inspect", "tiny", "--figure", ""],
        ["inspect", "--gallery", ""], ["bench", "--json", ""], ["bench", "--plot", ""], ["demo", "--out", ""],
        ["demo", "--text", ""],
    ],
    "a name too long": [
        ["train", "my_notes", "--out", "x" * 300], ["generate", "run", "--state", "x" * 300],
    ],
    "a folder where a file is needed": [
        ["learn", "run", "my_notes", "--state", "none"], ["generate", "run", "--state", "none"],
        ["learn", "run", "my_notes", "--state", "s", "--page", "none"], ["bench", "--json", "none"],
        ["bench", "--plot", "none"], ["inspect", "tiny", "--html", "none"], ["inspect", "tiny", "--figure", "none"],
        ["train", "my_notes", "--config", "none", "--out", "new"], ["tune", "--config", "none"],
        ["generate", "run", "--state", "fifo"],
    ],
    "a file where a folder is needed": [
        ["train", "my_notes", "--out", "empty.txt"], ["train", "my_notes", "--out", "empty.txt/run"],
        ["train", "my_notes", "--init", "text.txt", "--out", "new"], ["generate", "text.txt"],
        ["learn", "text.txt", "my_notes", "--state", "s"], ["learn", "run", "my_notes", "--state", "empty.txt/s"],
        ["convert", "text.txt", "out", "-l", "8,lr=0.1"], ["convert", "run", "empty.txt/x", "-l", "8,lr=0.1"],
        ["eval", "span", "--out", "empty.txt"], ["tune", "my_notes", "--out", "empty.txt"], ["inspect", "text.txt"],
        ["inspect", "--gallery", "empty.txt"], ["demo", "--out", "empty.txt"], ["eval", "span", "--experiments", "run"],
    ],
    "a mistyped name": [
        ["generate", "runn"], ["learn", "runn", "my_notes", "--state", "s"],
        ["convert", "runn", "out", "-l", "8,lr=0.1"],
        ["inspect", "./runn"], ["train", "my_notes", "--init", "runn", "--out", "new"], ["demo", "--text", "my_nots"],
        ["train", "my_notes", "--config", "runn.json", "--out", "new"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", PATHS)
def test_paths_of_every_command(call, place, kind):
    (place / "run.json").write_text("{}")
    before = all_of(place)
    for arguments in PATHS[kind]:
        result = call(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        said = " ".join(result.stderr.replace("│", " ").split())
        assert "fault of nestling" not in said
        if kind == "an empty path":
            assert "is empty" in said or "no folder" in said, (arguments, said)
        if kind == "a mistyped name":
            assert "did you mean" in said, (arguments, said)
        assert all_of(place) == before, arguments


def test_a_byte_order_mark_is_no_text(call, place, trained):
    from nestling.sessions.documents import TokenReader, find_texts
    from nestling.training import DataConfig, load_corpus
    from nestling.training.texts import open_text
    from nestling.training.tokenizers import byte_tokenizer

    text = "the cat sat on the mat.\n" * 9
    (place / "mark.txt").write_text(text, encoding="utf-8-sig")
    corpus = load_corpus(DataConfig(text=["mark.txt"], val_fraction=0, seq_len=8))
    assert bytes(corpus.train.ids[:-1].astype("uint8")).decode() == text and corpus.train.num_bytes == len(text)
    (found,) = find_texts(["mark.txt"])
    assert found.size == len(text)
    with open_text(found.path) as file:
        assert bytes(TokenReader(byte_tokenizer(), file.read, "mark").take(10**6)).decode() == text


def test_a_pipe_with_a_byte_order_mark(tmp_path):
    import io

    from nestling.sessions.journal import Journal

    for content in (b"\xef\xbb\xbfthe cat", b"the cat", b"\xef\xbb\xbf"):
        journal = Journal(tmp_path / f"{len(content)}.journal", "s", io.BufferedReader(io.BytesIO(content), 2))
        said = b"".join(iter(partial(journal.read, 2), b""))
        assert said == content.removeprefix(b"\xef\xbb\xbf")
