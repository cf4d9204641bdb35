"""Several texts, each read in its share of the tokens whatever its size."""

import numpy as np
import pytest
import torch

from nestling.training import Trainer, checkpoint, train
from nestling.training.batches import MixedBatches, windows
from nestling.training.build import load_saved
from nestling.training.config import DataConfig
from nestling.training.data import Mixture, Tokens, load_corpus
from nestling.training.evaluation import evaluate
from nestling.training.prepare import prepare


def mixture(shares, lengths=(500, 4000, 90)):
    """Streams of whole numbers, the second from 10,000 on, the third from 20,000 on."""
    ids = [np.arange(10_000 * i, 10_000 * i + n, dtype=np.uint32) for i, n in enumerate(lengths)]
    return Mixture(tuple(Tokens(one, len(one) * (i + 1)) for i, one in enumerate(ids)), shares)


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.001, 0.998, 0.001), (1 / 3, 1 / 3, 1 / 3)])
def test_the_share_of_the_tokens_is_right_at_any_time(shares):
    batches = MixedBatches(mixture(shares), 16, 4, seed=3)
    sources = np.array([batches.place(n)[0] for n in range(9500)])
    for i, share in enumerate(shares):
        read = np.cumsum(sources == i)
        assert abs(read - share * np.arange(1, 9501)).max() < 3
        assert abs(read[8999] - 9000 * share) <= 1
    read = torch.cat([batches[i] for i in range(100)])
    assert (read // 10_000)[:, 0].tolist() == sources[:400].tolist()
    assert bool((read.diff(dim=1) == 1).all())  # a window is of one stream


def test_a_stream_is_read_whole_before_anything_twice():
    batches = MixedBatches(mixture((0.5, 0.3, 0.2)), 16, 1)
    places = [batches.place(n) for n in range(3000)]
    epoch = (4000 - 1) // 16 - 1  # windows of the second stream
    starts = [start for source, start in places if source == 1][:epoch]
    assert len(set(starts)) == epoch and sorted(np.diff(sorted(starts)))[-1] == 16


def test_batches_depend_on_seed_and_index_alone_and_ranks_share_them():
    mixed = mixture((0.5, 0.3, 0.2))
    batches = MixedBatches(mixed, 16, 4, seed=1)
    for i in (300, 2, 700, 2):  # of several blocks
        whole = batches[i]
        assert torch.equal(whole, MixedBatches(mixed, 16, 4, seed=1)[i])
        assert torch.equal(whole, torch.cat([MixedBatches(mixed, 16, 4, 1, rank, 2)[i] for rank in (0, 1)]))
    assert not torch.equal(batches[2], MixedBatches(mixed, 16, 4, seed=2)[2])


@pytest.fixture
def mixed(config, tmp_path, text):
    """A run on two texts of very different length."""
    (tmp_path / "digits.txt").write_text("0123456789 " * 60)
    texts = [str(text), str(tmp_path / "digits.txt")]
    return config.changed(**{"data.text": texts, "data.shares": [1, 3], "steps": 6, "logging.save_every": 0})


def test_a_run_reads_and_holds_out_by_shares_and_goes_on(mixed):
    run = Trainer(mixed)
    sources = run.corpus.val.sources
    assert run.corpus.train.shares == (0.25, 0.75) and all(len(stream) > 20 for stream in sources)
    letters = torch.cat([run.batches[i] for i in range(200)]) > ord("9")
    assert letters[:, :16].sum(1).gt(4).float().mean() == pytest.approx(0.25, abs=0.01)
    apart = [evaluate(run.model, stream, seq_len=16, batch_size=2, max_batches=n) for n, stream in zip((1, 2), sources)]
    assert run.evaluate().loss == pytest.approx(0.25 * apart[0].loss + 0.75 * apart[1].loss)
    train(mixed)
    other = mixed.changed(out=mixed.out + "-other")
    for _ in range(3):
        run.train_step()
    run.config = other
    run.save()
    Trainer(other, resume=True).run()
    ends = [load_saved(checkpoint.resolve(config.out)).state_dict() for config in (mixed, other)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    with pytest.raises(ValueError, match=r"cannot change data.shares"):
        Trainer(other.changed(**{"data.shares": [1, 1]}), resume=True)


def test_bits_per_byte_count_the_bytes_that_are_read():
    assert mixture((0.5, 0.3, 0.2)).bytes_per_token == pytest.approx(0.5 * 1 + 0.3 * 2 + 0.2 * 3)


def test_prepared_folders_mix_and_a_tokenizer_is_of_all_texts(tmp_path, text):
    (tmp_path / "digits.txt").write_text("0123456789 " * 200)
    names = [str(text), str(tmp_path / "digits.txt")]
    folders = [str(tmp_path / f"tokens{i}") for i in range(2)]
    for name, folder in zip(names, folders):
        prepare([name], tmp_path / folder, val_fraction=0.1)
    corpus = load_corpus(DataConfig(folders, shares=[2, 1], seq_len=8))
    assert corpus.train.shares == (2 / 3, 1 / 3) and set(windows(corpus.train.sources[1], [0], 8)[0].tolist()) <= set(
        b"0123456789 "
    )
    bpe = load_corpus(DataConfig(names, shares=[2, 1], seq_len=8, tokenizer="bpe:280"))
    assert (
        bpe.tokenizer.get_vocab()
        == load_corpus(DataConfig(names, seq_len=8, tokenizer="bpe:280")).tokenizer.get_vocab()
    )


@pytest.mark.parametrize("shares", [[1], [1, 0], [1, -1], [1, float("nan")], [1, 1e-4], [1, float("inf")]])
def test_shares_that_cannot_be_are_named(mixed, shares):
    with pytest.raises(ValueError, match=r"data.shares must be 2 numbers above 0, one for each text"):
        mixed.changed(**{"data.shares": shares})


def test_a_text_that_is_too_short_is_named(mixed, tmp_path):
    (tmp_path / "digits.txt").write_text("1")
    with pytest.raises(ValueError, match=r"digits.txt: the text is too short"):
        Trainer(mixed)
