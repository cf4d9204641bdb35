import errno
import os

import datasets
import numpy as np
import pytest

from nestling.training import DataConfig, load_corpus
from nestling.training.sources import split_documents


def options(*text, **more):
    return DataConfig(text=[str(t) for t in text], **{"seq_len": 8, **more})


def joined(documents):
    return b"".join(d.read() for d in documents)


def test_bytes_of_a_file_become_ids(tmp_path):
    path = tmp_path / "a.txt"
    content = "line one\nzwölf\n".encode() * 20
    path.write_bytes(content)
    corpus = load_corpus(options(path, val_fraction=0))
    assert bytes(corpus.train.ids[:-1].astype(np.uint8)) == content
    assert corpus.train.ids[-1] == corpus.tokenizer.eos_token_id
    assert corpus.train.num_bytes == len(content)
    assert isinstance(corpus.train.ids, np.memmap)
    assert corpus.train.ids.dtype == np.uint16
    assert len(corpus.val) == 0


def test_tail_is_held_out_at_a_line_end_and_nothing_is_lost(text):
    split = split_documents(options(text, val_fraction=0.1))
    train, val = joined(split.train), joined(split.val)
    assert train + val == text.read_bytes()
    assert train.endswith(b"\n")
    assert 0.09 < len(val) / len(train + val) < 0.12


def test_tail_does_not_cut_a_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("世" * 101)
    split = split_documents(options(path, val_fraction=0.5))
    assert joined(split.train).decode() + joined(split.val).decode() == "世" * 101


def test_folder_by_pattern_and_whole_documents_held_out(tmp_path):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for i in range(6):
        (folder / "deep" / f"{i}.txt").write_text(f"document {i}\n" * 5)
    (folder / "skip.md").write_text("no")
    (folder / ".hidden.txt").write_text("no")
    split = split_documents(options(folder, pattern="**/*.txt", val_split="documents", val_fraction=0.3))
    names = {d.name for d in split.train}, {d.name for d in split.val}
    assert names[0] | names[1] == {f"deep/{i}.txt" for i in range(6)}
    assert not names[0] & names[1]
    assert names[0]
    assert names[1]


def test_named_held_out_files_are_never_trained_on(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 50)
    split = split_documents(options(tmp_path, pattern="*.txt", val_text=[str(tmp_path / "b.txt")]))
    assert joined(split.train) == b"a" * 50 + b"c" * 50
    assert joined(split.val) == b"b" * 50


def test_datasets_name(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["first text\n" * 5, "", "second text\n" * 5], "label": [0, 1, 2]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    corpus = load_corpus(options("some/dataset", val_fraction=0))
    assert corpus.train.num_bytes == 2 * 5 * 11 + 5
    with pytest.raises(ValueError, match=r"no column 'body'.*text, label"):
        load_corpus(options("some/dataset", column="body"))


def test_the_last_rows_of_a_data_set_are_held_out(monkeypatch):
    rows = datasets.Dataset.from_dict({"text": [f"row {i}\n" for i in range(10)]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    split = split_documents(options("some/dataset", val_fraction=0.2))
    assert [d.name for d in split.val] == ["some/dataset[8]", "some/dataset[9]"]
    assert len(split.train) == 8


def test_cache_is_used_and_follows_content_and_tokenizer(text):
    first = load_corpus(options(text))
    stamp = (first.folder / "train.bin").stat().st_mtime_ns
    again = load_corpus(options(text))
    assert again.fingerprint == first.fingerprint
    assert (again.folder / "train.bin").stat().st_mtime_ns == stamp
    bpe = load_corpus(options(text, tokenizer="bpe:280"))
    assert bpe.fingerprint != first.fingerprint
    assert len(bpe.train) < len(first.train)
    assert bpe.train.num_bytes == first.train.num_bytes
    text.write_text(text.read_text() + "more\n")
    assert load_corpus(options(text)).fingerprint != first.fingerprint


def test_damaged_cache_is_built_again(text):
    first = load_corpus(options(text))
    ids = np.array(first.train.ids)
    file = first.folder / "train.bin"
    file.write_bytes(file.read_bytes()[:-7])
    assert np.array_equal(load_corpus(options(text)).train.ids, ids)


def test_full_disk_leaves_no_half_written_cache(text, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="the disk is full.*free some space"):
            load_corpus(options(text))
    assert list((tmp_path / "cache").rglob("*.bin")) == []
    assert len(load_corpus(options(text)).train) > 1000


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_bad_texts_are_named(tmp_path, tokenizer):
    empty, short, binary = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "binary.txt"
    empty.write_bytes(b"")
    short.write_bytes(b"abc")
    binary.write_bytes(b"\xff\xfe" * 100)
    with pytest.raises(ValueError, match=r"empty\.txt holds no bytes"):
        load_corpus(options(empty, tokenizer=tokenizer))
    with pytest.raises(ValueError, match="too short"):
        load_corpus(options(short, tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"no file or folder '.*none\.txt'"):
        load_corpus(options(tmp_path / "none.txt", tokenizer=tokenizer))
    with pytest.raises(ValueError, match="no text was given"):
        load_corpus(options(tokenizer=tokenizer))
    with pytest.raises(ValueError, match=r"binary\.txt is UTF-16: convert it"):
        load_corpus(options(binary, tokenizer=tokenizer))


def test_unknown_tokenizer(text):
    with pytest.raises(ValueError, match="bpe:4096"):
        load_corpus(options(text, tokenizer="bpe"))
    with pytest.raises(ValueError, match="no/such"):
        load_corpus(options(text, tokenizer="no/such/tokenizer"))
