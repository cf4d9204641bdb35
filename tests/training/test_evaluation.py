import math

import numpy as np
import pytest
import torch
from torch import nn

from nestling.training.data import Tokens
from nestling.training.evaluation import bin_edges, evaluate


class Repeats(nn.Module):
    """Puts probability p on "the same token again", the rest evenly on the others of a vocabulary of 4."""

    def __init__(self, p):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(p))

    def forward(self, input_ids, use_cache):
        assert not self.training
        logits = torch.log((1 - self.p) / 3) * torch.ones(*input_ids.shape, 4)
        logits = logits.scatter(2, input_ids[..., None], torch.log(self.p).item())
        return type("Output", (), {"logits": logits})


def test_loss_is_exact_and_by_position():
    ids = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2], dtype=np.uint16)
    tokens = Tokens(ids, num_bytes=26)
    model = Repeats(0.7).train()
    result = evaluate(model, tokens, seq_len=4, batch_size=2)
    same, other = -math.log(0.7), -math.log(0.1)
    assert result.loss_at.tolist() == pytest.approx([same, same, same, (same + 2 * other) / 3], rel=1e-5)
    assert result.loss == pytest.approx((10 * same + 2 * other) / 12, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 2)
    assert result.loss_in.tolist() == pytest.approx([(3 * same + other) / 4, same, (3 * same + other) / 4], rel=1e-5)
    assert result.tokens == 12
    assert model.training
    half = evaluate(model, tokens, seq_len=4, batch_size=1, max_batches=1)
    assert half.tokens == 4


def test_bins_cover_every_position_once():
    for length in (1, 2, 7, 256):
        for bins in (1, 3, 8):
            edges = bin_edges(length, bins)
            assert edges[0] == 0
            assert edges[-1] == length
            assert len(edges) <= bins + 1
            assert all(b > a for a, b in zip(edges, edges[1:]))
    result = evaluate(Repeats(0.5), Tokens(np.zeros(65, dtype=np.uint16), 65), seq_len=64, batch_size=1)
    rows = result.binned(4)
    assert sum((r["last"] - r["first"] + 1) * r["loss"] for r in rows) / 64 == pytest.approx(result.loss)


def test_short_streams():
    assert evaluate(Repeats(0.5), Tokens(np.zeros(3, dtype=np.uint16), 3), seq_len=64, batch_size=4).tokens == 2
    with pytest.raises(ValueError, match="val_fraction"):
        evaluate(Repeats(0.5), Tokens(np.zeros(1, dtype=np.uint16), 1), seq_len=64, batch_size=4)
