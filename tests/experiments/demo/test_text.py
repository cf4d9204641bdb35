"""The text: real, split without overlap, refused when there is too little."""

import numpy as np
import pytest

from experiments.demo.text import byte_entropy, excerpt, own_text, standard_library


def test_standard_library_is_large_and_split_by_whole_files():
    """Several megabytes of sources, none on both sides, the same every time."""
    from pathlib import Path

    text = standard_library()
    assert not set(text.train) & set(text.held_out)
    assert 0 < len(text.held_out) < 0.15 * len(text.train)
    assert sum(Path(p).stat().st_size for p in text.train) > 3e6
    assert not any("site-packages" in p or "/test/" in p for p in text.train + text.held_out)
    assert standard_library() == text


def test_a_python_without_sources_is_told_what_to_do(monkeypatch, tmp_path):
    """Some systems ship compiled modules only."""
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match="--text"):
        standard_library()


def test_own_text_is_a_file_or_a_folder_of_some_size(tmp_path):
    """What is missing or too small is named."""
    (tmp_path / "book.txt").write_text("word " * 3000)
    assert own_text(tmp_path / "book.txt").train == [str(tmp_path / "book.txt")]
    assert own_text(tmp_path).name == tmp_path.name
    with pytest.raises(ValueError, match="no file or folder"):
        own_text(tmp_path / "nothing.txt")
    (tmp_path / "note.txt").write_text("short")
    with pytest.raises(ValueError, match="at least 10,000"):
        own_text(tmp_path / "note.txt")


@pytest.mark.parametrize(("data", "bits"), [(b"ab" * 50, 1.0), (b"abcd" * 50, 2.0), (b"a" * 50, 0.0)])
def test_byte_entropy(data, bits):
    """Equally frequent bytes have the logarithm of their number; ids above 255 do not count."""
    ids = np.concatenate([np.frombuffer(data, np.uint8).astype(np.int64), [257, 257]])
    assert byte_entropy(ids) == pytest.approx(bits)


def test_excerpt_is_the_wordiest_beginning_of_a_document():
    """It does not run over the end of a document."""
    documents = [b"x = [1, 2, 3]; " * 10, b"words and words again " * 10, b"short"]
    ids = np.concatenate([[*d, 257] for d in documents])
    assert bytes(excerpt(ids, 64).tolist()) == documents[1][:64]
    assert len(excerpt(np.array([97, 98, 257, 99]), 64)) == 3
