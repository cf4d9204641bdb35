"""A stream is packed into windows without being held, drawn through a buffer, and gone on with at any place."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from nestling.training import Trainer, train
from nestling.training.config import DataConfig
from nestling.training.data import load_corpus
from nestling.training.streaming import StreamedBatches
from resumed import assert_same_end, run_with_stops

pytest.importorskip("datasets")
EOS = 257


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two .jsonl files of 60 documents of all lengths, empty ones among them."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "documents"
    folder.mkdir()
    for part in range(2):
        lines = [{"text": f"{part}-{i}:" + "abcdefg" * (i % 9) if i % 13 else ""} for i in range(30)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def batches(folder, rank=0, ranks=1, **options):
    data = DataConfig(text=[str(folder)], stream=True, seq_len=16, val_windows=4, **options)
    return StreamedBatches(load_corpus(data).train, 16, 4, 3, rank, ranks)


def documents(folder):
    """The ids of one epoch."""
    rows = [json.loads(line)["text"] for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]
    return [np.array([*text.encode(), EOS]) for text in rows if text]


def test_what_is_held_out_comes_first_and_all_else_is_read_in_order(files):
    data = DataConfig(text=[str(files)], stream=True, seq_len=16, val_windows=4, shuffle=1)
    corpus = load_corpus(data)
    held, (ids, texts) = np.asarray(corpus.val.ids), (np.concatenate(documents(files)), documents(files))
    assert np.array_equal(held, ids[: len(held)]) and 4 * 16 < len(held) < 4 * 16 + 1 + max(map(len, texts))
    rest, given = ids[len(held) :], StreamedBatches(corpus.train, 16, 4, 3)
    stream = np.concatenate([given[i][:, :-1].flatten() for i in range(40)])
    assert np.array_equal(stream, np.resize(rest, len(stream)))  # the second epoch begins where the first did
    assert corpus.val.num_bytes == sum(held < 256)


def test_a_buffer_shuffles_and_loses_nothing(files):
    plain, mixed = batches(files, shuffle=1), batches(files, shuffle=20)
    in_order, drawn = (torch.cat([b[i] for i in range(30)]) for b in (plain, mixed))
    assert not torch.equal(in_order, drawn)
    ahead = torch.cat([in_order, *(plain[i] for i in range(30, 36))])
    left = Counter(map(tuple, ahead.tolist()))
    left.subtract(map(tuple, [*drawn.tolist(), *mixed.state_dict()["held"].tolist()]))
    assert all(count >= 0 for count in left.values())  # each window once: given, or in the buffer


def test_a_state_gives_the_same_windows_on_any_number_of_ranks(files, tmp_path):
    whole = batches(files, shuffle=7)
    expected = [whole[i] for i in range(50)]  # some epochs
    for stop, ranks in ((0, 1), (1, 2), (23, 4)):
        begun = batches(files, shuffle=7)
        for i in range(stop):
            begun[i]
        torch.save(begun.state_dict(), tmp_path / "state")
        for rank in range(ranks):
            other = batches(files, rank, ranks, shuffle=7)
            other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
            rows = slice(4 // ranks * rank, 4 // ranks * (rank + 1))
            assert all(torch.equal(other[i], expected[i][rows]) for i in range(stop, 50))
    with pytest.raises(ValueError, match="read in order: the next batch is 50, not 3"):
        whole[3]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_run_goes_on_as_if_nothing_had_happened(files, config, tmp_path, kind):
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [json.loads(line)["text"] for p in sorted(files.iterdir()) for line in p.read_text().splitlines()]
        for path in files.iterdir():
            path.unlink()
        pq.write_table(pa.table({"text": rows}), files / "rows.parquet", row_group_size=11)
    changes = {"data.text": [str(files)], "data.stream": True, "data.shuffle": 9, "data.val_windows": 4}
    config = config.changed(**changes, **{"data.documents": "apart", "optim.accumulate": 2})
    train(config)
    other = config.changed(out=str(tmp_path / "other"))
    run_with_stops(other, 5, 12)
    assert_same_end(config, other)


def test_held_out_text_can_be_another(files, config, text):
    run = Trainer(config.changed(**{"data.text": [str(files)], "data.stream": True, "data.val_text": [str(text)]}))
    assert len(run.corpus.val) > 10_000 and run.evaluate() is not None
    first = torch.from_numpy(np.concatenate(documents(files))[:17])
    order = StreamedBatches(dataclasses.replace(run.corpus.train, buffer=1), 16, 1)
    assert torch.equal(order[0][0], first)  # nothing of the stream is held out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.val_windows": 1000}, "holds out at its beginning; hold out less"),
        ({"data.column": "words"}, "has no column 'words' .option data.column.; it has text"),
        ({"data.tokenizer": "bpe:300"}, "cannot go with stream: prepare the texts"),
        ({"data.shares": [1.0]}, "shares cannot go with stream"),
        ({"data.shuffle": 0}, "shuffle must be at least 1, not 0"),
    ],
)
def test_what_does_not_fit_is_refused(files, config, changes, said):
    with pytest.raises(ValueError, match=said):
        Trainer(config.changed(**{"data.text": [str(files)], "data.stream": True, **changes}))


def test_other_files_are_refused(config):
    with pytest.raises(ValueError, match=r"files of one kind, .jsonl or .parquet; got .txt: leave --stream out"):
        Trainer(config.changed(**{"data.stream": True}))
