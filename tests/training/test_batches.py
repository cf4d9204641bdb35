import numpy as np
import pytest
import torch

from nestling.training.batches import Batches, spread, windows
from nestling.training.data import Tokens


def stream(length):
    return Tokens(np.arange(length, dtype=np.uint32), length)


def test_a_batch_depends_on_seed_and_index_alone():
    first, second = Batches(stream(1000), 16, 4, seed=1), Batches(stream(1000), 16, 4, seed=1)
    for _ in range(40):
        second[_]
    assert torch.equal(first[77], second[77])
    assert not torch.equal(first[77], Batches(stream(1000), 16, 4, seed=2)[77])
    assert not torch.equal(first[3], first[4])
    assert first[0].shape == (4, 17)
    assert first[0].dtype == torch.int64


def windows_per_epoch(length):
    """Of 16 tokens, in a stream of a length: one less than fit, for the phase."""
    return max(1, (length - 1) // 16 - 1)


@pytest.mark.parametrize("length", [17, 33, 40, 1000])
def test_an_epoch_has_no_repetition_and_stays_inside(length):
    batches = Batches(stream(length), 16, 1, seed=0)
    for epoch in range(3):
        n = windows_per_epoch(length)
        starts = sorted(batches.start(epoch * n + i) for i in range(n))
        assert all(b - a == 16 for a, b in zip(starts, starts[1:]))
        assert starts[0] >= 0
        assert starts[-1] + 17 <= length


def test_epochs_differ_in_phase_and_order():
    batches = Batches(stream(2000), 16, 1, seed=0)
    n = windows_per_epoch(2000)
    orders = [[batches.start(e * n + i) for i in range(n)] for e in range(4)]
    assert len({o[0] % 16 for o in orders} | {o[1] % 16 for o in orders}) > 1
    assert orders[0] != orders[1]


def test_windows_are_the_stream():
    assert windows(stream(100), [5, 50], 3).tolist() == [[5, 6, 7, 8], [50, 51, 52, 53]]


def test_spread_is_even_and_disjoint():
    assert spread(stream(101), 10, 5) == [0, 20, 40, 60, 80]
    assert spread(stream(101), 10, 99) == list(range(0, 100, 10))


def test_too_short_a_stream_is_refused():
    with pytest.raises(ValueError, match="16 tokens are too few"):
        Batches(stream(16), 16, 1)
