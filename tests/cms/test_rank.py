"""Levels of low rank: a difference B A of fixed features and learned weights."""

import copy

import pytest
import torch

from nestling import Level, stack_levels
from nestling.cms import merge
from nestling.cms.defaults import default_levels
from nestling.cms.fast_linear import Factors, FastLinear, applied, features
from nestling.cms.inner_optimizers import OPTIMIZERS, begin, known_size, mean_singular_value, update
from nestling.generation.state import load_state, save_state
from nestling.ops.orthogonalize import orthogonalize_reference
from slopes import assert_meta_gradient


def low(optimizer="adamw", chunk=4, rank=3, **options):
    return Level(chunk, lr=0.05, optimizer=optimizer, rank=rank, **options)


def test_features_are_orthonormal_and_every_layer_has_its_own():
    a = features(3, 16, 0, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(a @ a.mT, torch.eye(3, dtype=torch.float64))
    assert not torch.allclose(a, features(3, 16, 1, torch.float64, torch.device("cpu")))


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("watched", [False, True])
def test_a_layer_with_factors_is_the_layer_with_their_product(streams, watched):
    torch.manual_seed(0)
    layer = FastLinear.of(torch.nn.Linear(16, 6)).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64, requires_grad=True)
    up = torch.randn(streams, 6, 3, dtype=torch.float64, requires_grad=True)
    factors = Factors(up, features(3, 16, 0, torch.float64, torch.device("cpu")))
    found = []
    for delta in (factors, factors.product):
        with applied([layer], [delta], watched=watched):
            y = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, up])])
    torch.testing.assert_close(found[0], found[1], rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_cut_anywhere_predicted_saved_and_merged(made, tmp_path, optimizer):
    model, ids = made
    stacked = stack_levels(copy.deepcopy(model), [low(optimizer), low(optimizer, 8)], target_modules=".*(mlp|q_proj).*")
    assert torch.equal(stacked(ids[:, :4]).logits, model(ids[:, :4]).logits)  # nothing is learned yet
    whole = stacked(ids, use_cache=True)
    part = stacked(ids[:, :13], use_cache=True).past_key_values
    part.snapshot("here")
    save_state(tmp_path / "s", part.fork(), stacked)
    part = load_state(tmp_path / "s", stacked)
    rest = stacked(ids[:, 13:], past_key_values=part)
    torch.testing.assert_close(rest.logits, whole.logits[:, 13:], rtol=1e-10, atol=1e-10)
    cache = whole.past_key_values
    assert cache.nbytes == stacked.state_bytes(2)
    with stacked.adapted(cache):
        want = stacked(ids).logits[1:]
    assert not torch.equal(want, model(ids[1:]).logits)
    merge(stacked, cache, stream=1)
    stacked.learning = False
    torch.testing.assert_close(stacked(ids[1:]).logits, want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("optimizer", ["gd", "dgd"])
def test_a_first_step_of_descent_is_the_dense_one_on_the_features(made, optimizer):
    model, ids = made
    learned = {}
    for rank in (None, 3):
        stacked = stack_levels(copy.deepcopy(model), [low(optimizer, 16, rank, erase=0.0)], blocks=[-1])
        cache = stacked(ids[:, :17], use_cache=True).past_key_values
        learned[rank] = stacked.learner.differences(0, cache.levels.levels[0].deltas)
    for dense, factors in zip(learned[None], learned[3], strict=True):
        torch.testing.assert_close(factors.product, dense @ factors.down.mT @ factors.down, rtol=1e-9, atol=1e-12)


def test_a_spectral_step_is_relative_to_the_weights():
    torch.manual_seed(0)
    g, weight = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    level, zeros = low("spectral"), [torch.zeros_like(g)]
    size = mean_singular_value(weight)
    torch.testing.assert_close(size, torch.linalg.svdvals(weight).square().mean().sqrt())
    (moved,), slots, written = update(
        level, zeros, [5 * g], begin(level, zeros), torch.full((2,), 5.0).double(), sizes=[size]
    )
    torch.testing.assert_close(moved, -0.05 * size * orthogonalize_reference(g), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(written, moved.square().sum((-1, -2)).sqrt())
    assert slots == {} and mean_singular_value(torch.zeros(2, 2)) == 1


def test_a_step_of_many_matrices_is_that_of_each():
    torch.manual_seed(0)
    grads = [torch.randn(2, rows, 3, dtype=torch.float64) for rows in (6, 5, 6, 6)]
    level = low("spectral")
    for one, g in zip(OPTIMIZERS["spectral"][0](level, grads, {})[0], grads, strict=True):
        torch.testing.assert_close(one, orthogonalize_reference(g), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_weights_size_is_known_anew_when_it_changes():
    weight = torch.nn.Parameter(torch.randn(6, 16))
    first = known_size(weight)
    assert known_size(weight) is first
    weight.mul_(2)
    torch.testing.assert_close(known_size(weight), 2 * first)
    weight.data = weight.data.double()
    assert known_size(weight).dtype == torch.float64


@pytest.mark.parametrize("optimizer", ["adamw", "spectral", "dgd"])
def test_a_full_meta_gradient_goes_through_the_factors(made, optimizer):
    model, ids = made
    stacked = stack_levels(copy.deepcopy(model), [low(optimizer)], blocks=[-1], meta_grad="full")
    assert_meta_gradient(stacked, ids[:, :10])


@torch.no_grad()
def test_added_blocks_take_a_rank_too(made):
    model, ids = made
    stacked = stack_levels(copy.deepcopy(model), [low("spectral", rank=2)], "width", width=4)
    cache = stacked(ids, use_cache=True).past_key_values
    assert cache.nbytes == stacked.state_bytes(2)
    assert all(d.shape[-1] == 2 and d.isfinite().all() for d in cache.levels.levels[0].deltas)
    assert any(d.any() for d in cache.levels.levels[0].deltas)
    with pytest.raises(ValueError, match="rank 5 of level 0"):
        stack_levels(copy.deepcopy(model), [low(rank=5)], "width", width=4)


def test_ranks_that_cannot_be_are_refused(made):
    model, _ = made
    for rank in (0, 2.5, True):
        with pytest.raises(ValueError, match="rank"):
            Level(4, rank=rank)
    with pytest.raises(ValueError, match="rank 17 of level 0"):
        stack_levels(copy.deepcopy(model), [low(rank=17)])


@torch.no_grad()
def test_the_default_levels_fit_a_small_model_and_learn(made):
    model, ids = made
    stacked = stack_levels(copy.deepcopy(model), default_levels(model.config))
    cache = stacked(ids.repeat(1, 8), use_cache=True).past_key_values
    with stacked.adapted(cache):
        after = stacked(ids, labels=ids).loss
    assert after < model(ids, labels=ids).loss
