"""The memory whose inner problem is solved: what it minimises, and that order, merging and forgetting are exact."""

import pytest
import torch

from nestling.memory import ExactMemory


def pairs(count=40, dim=6, values=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    keys = (
        5
        + 3
        * torch.randn(count, dim, generator=draw, dtype=torch.float64)
        @ torch.randn(dim, dim, generator=draw).double()
    )
    return keys, torch.randn(count, values, generator=draw, dtype=torch.float64)


def written(keys, values, **options):
    memory = ExactMemory(keys.shape[1], values.shape[1], **options)
    memory.write(keys, values)
    return memory


def test_it_is_the_minimiser():
    """The gradient of sum |M k - v|^2 + ridge |M|^2 is zero."""
    keys, values = pairs()
    matrix = written(keys, values, ridge=0.3, normalized=False).solved()[2].clone().requires_grad_()
    loss = (keys @ matrix.T - values).square().sum() + 0.3 * matrix.square().sum()
    assert torch.autograd.grad(loss, matrix)[0].abs().max() < 1e-8


def test_of_one_key_it_is_the_papers_step():
    """NL Eq. 57 from nothing: M = e v k^T, e = eta / (1 + eta |k|^2), with eta = 1 / ridge."""
    keys, values = pairs(1)
    matrix = written(keys, values, ridge=0.25, normalized=False).solved()[2]
    step = 4 / (1 + 4 * keys[0].square().sum())
    torch.testing.assert_close(matrix, step * torch.outer(values[0], keys[0]))


def test_it_is_recursive_least_squares():
    """One key after the other with the inverse second moment P in place of a rate: M += (v - M k) (P k)^T."""
    keys, values = pairs()
    matrix, inverse = torch.zeros(3, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64) / 0.5
    for k, v in zip(keys, values, strict=True):
        inverse = inverse - torch.outer(inverse @ k, inverse @ k) / (1 + k @ inverse @ k)
        matrix = matrix + torch.outer(v - matrix @ k, inverse @ k)
    torch.testing.assert_close(written(keys, values, ridge=0.5, normalized=False).solved()[2], matrix)


def test_normalized_keys_are_centred_of_length_one_and_values_centred():
    keys, values = pairs()
    unit = (keys - keys.mean(0)) / (keys.std(0, correction=0) * 6**0.5)
    torch.testing.assert_close(unit.square().sum(1).mean(), torch.ones((), dtype=torch.float64))
    plain = written(unit, values - values.mean(0), normalized=False)
    found = written(keys, values).read(keys)
    torch.testing.assert_close(found, plain.read(unit) + values.mean(0))
    torch.testing.assert_close(written(1000 * keys - 7, values).read(1000 * keys - 7), found)


@pytest.mark.parametrize("normalized", [True, False])
def test_order_merging_and_forgetting_are_exact(normalized):
    keys, values = pairs()
    whole = written(keys, values, normalized=normalized)
    first, second = (written(keys[s], values[s], normalized=normalized) for s in (slice(25, None), slice(25)))
    first.merge(second)
    torch.testing.assert_close(first.read(keys), whole.read(keys))
    whole.erase(keys[25:], values[25:])
    torch.testing.assert_close(whole.read(keys), second.read(keys))


def test_values_that_come_later_are_as_if_they_had_been_there():
    keys, values = pairs()
    late, whole = ExactMemory(6, 1), torch.cat([values[:20, :1], torch.zeros(20, 2, dtype=torch.float64)], 1)
    late.write(keys[:20], values[:20, :1])
    late.widen(3)
    late.write(keys[20:], values[20:])
    torch.testing.assert_close(late.read(keys), written(keys, torch.cat([whole, values[20:]])).read(keys))


def test_nothing_and_a_channel_without_news_are_read_as_numbers():
    keys, values = pairs()
    assert ExactMemory(6, 3).read(keys).eq(0).all()
    keys[:, 2] = 1e6
    found = written(keys, values).read(keys)
    torch.testing.assert_close(found, written(keys.index_fill(1, torch.tensor(2), 0.0), values).read(keys))
    one = written(keys[:1], values[:1])
    torch.testing.assert_close(one.read(keys), values[:1].expand(40, 3))


def test_what_cannot_be_is_refused():
    keys, values = pairs()
    memory = written(keys, values)
    for call, said in (
        (lambda: ExactMemory(0), "dim must be at least 1"),
        (lambda: ExactMemory(3, ridge=0.0), "ridge must be above 0"),
        (lambda: memory.write(keys[:, :5], values), r"keys must be \[N, 6\]"),
        (lambda: memory.write(keys, values[:3]), "one value for each key"),
        (lambda: memory.write(keys / 0, values), "not finite"),
        (lambda: memory.widen(2), "at least 3"),
        (lambda: memory.merge(ExactMemory(6, 2)), "another dim"),
        (lambda: memory.erase(keys.repeat(2, 1), values.repeat(2, 1)), "cannot be erased"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
