import copy

import pytest
import torch
from torch import nn

from nestling.schedule import Level, Schedule
from nestling.training import OptimConfig
from nestling.training.muon import Muon
from nestling.training.optimizers import LevelOptimizers

TOKENS = 32  # of one step


class Leveled(nn.Module):
    """One ordinary layer and one layer per level."""

    def __init__(self, levels):
        super().__init__()
        self.base = nn.Linear(3, 3)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in levels)

    def level_parameters(self):
        return {i: list(block.parameters()) for i, block in enumerate(self.blocks)}


def with_levels(*chunks, **options):
    levels = [Level(chunk) for chunk in chunks]
    model = Leveled(levels)
    schedule = Schedule(levels, context_length=16, tokens_per_step=TOKENS)
    config = OptimConfig(**{"lr": 0.1, "weight_decay": 0.0, "clip": 0.0, **options})
    return model, LevelOptimizers(model, config, schedule)


def drive(model, optimizers, steps, gradient=lambda step: 1.0, start=0):
    """Take steps with constant gradients; returns which slow levels stepped at each."""
    slow = []
    for step in range(start, start + steps):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, gradient(step))
        slow.append(optimizers.step(step * TOKENS, (step + 1) * TOKENS).slow_levels)
    return slow


def test_a_slow_level_steps_once_per_chunk():
    model, optimizers = with_levels(None, 3 * TOKENS, 6 * TOKENS)
    before = [block.weight.clone() for block in model.blocks]
    slow = drive(model, optimizers, 5)
    assert slow == [(), (), (1,), (), ()]
    assert not torch.equal(model.blocks[0].weight, before[0])
    assert not torch.equal(model.blocks[1].weight, before[1])
    assert torch.equal(model.blocks[2].weight, before[2])
    slow += drive(model, optimizers, 7, start=5)
    assert [i + 1 for i, levels in enumerate(slow) if 1 in levels] == [3, 6, 9, 12]
    assert [i + 1 for i, levels in enumerate(slow) if 2 in levels] == [6, 12]
    assert {group.level: group.steps for group in optimizers.groups} == {None: 12, 1: 4, 2: 2}


def test_a_chunk_that_is_no_multiple_of_a_step_keeps_its_rate():
    model, optimizers = with_levels(int(2.5 * TOKENS))
    slow = drive(model, optimizers, 10)
    assert [i + 1 for i, levels in enumerate(slow) if levels] == [3, 5, 8, 10]


def test_a_slow_step_uses_the_mean_gradient_of_its_chunk():
    model, optimizers = with_levels(4 * TOKENS, name="torch.optim.SGD")
    before = model.blocks[0].weight.clone()
    drive(model, optimizers, 4, gradient=lambda step: float(step))
    assert torch.allclose(before - model.blocks[0].weight, torch.full((3, 3), 0.1 * (0 + 1 + 2 + 3) / 4))
    drive(model, optimizers, 3, start=4)
    middle = model.blocks[0].weight.clone()
    drive(model, optimizers, 1, start=7)
    assert torch.allclose(middle - model.blocks[0].weight, torch.full((3, 3), 0.1))


def test_frozen_levels_never_move():
    model, optimizers = with_levels(None, float("inf"))
    before = model.blocks[1].weight.clone()
    drive(model, optimizers, 3)
    assert torch.equal(model.blocks[1].weight, before)
    assert not model.blocks[1].weight.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model, optimizers = with_levels(2 * TOKENS, name="torch.optim.SGD")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.base.bias.grad[1] = bad
    report = optimizers.step(0, TOKENS)
    assert report.skipped
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    drive(model, optimizers, 1, start=1, gradient=lambda step: 3.0)  # the boundary: the mean of the one good step
    assert torch.allclose(before["blocks.0.weight"] - model.blocks[0].weight, torch.full((3, 3), 0.3))


@pytest.mark.parametrize("name", ["adamw", "m3"])
def test_a_saved_state_goes_on_in_the_middle_of_a_chunk(name):
    model, optimizers = with_levels(None, 4 * TOKENS, name=name)
    drive(model, optimizers, 6, gradient=lambda step: 0.1 * step)
    weights = {name: p.detach().clone() for name, p in model.state_dict().items()}
    saved = copy.deepcopy(optimizers.state_dict())
    other, resumed = with_levels(None, 4 * TOKENS, name=name)
    other.load_state_dict(weights)
    resumed.load_state_dict(saved)
    for pair in ((model, optimizers), (other, resumed)):
        drive(*pair, 3, start=6, gradient=lambda step: 0.1 * step)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="other parameters or levels"):
        with_levels(None)[1].load_state_dict(saved)


def test_clipping_is_of_the_whole_group():
    model, optimizers = with_levels(None, name="torch.optim.SGD", clip=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    drive(model, optimizers, 1, gradient=lambda step: 50.0)
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters())])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("name", ["adamw", "muon", "m3"])
def test_vectors_and_marked_parameters_are_not_decayed(name):
    model = Leveled([])
    model.base.special = nn.Parameter(torch.ones(3, 3))
    model.base.special._no_weight_decay = True
    optimizers = LevelOptimizers(model, OptimConfig(name=name, weight_decay=0.3)).groups[0].optimizers
    decays = {id(p): g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    assert decays[id(model.base.weight)] == 0.3
    assert decays[id(model.base.bias)] == 0.0
    assert decays[id(model.base.special)] == 0.0


def test_muon_takes_hidden_matrices_only(llama):
    model = llama()
    muon, adamw = LevelOptimizers(model, OptimConfig(name="muon")).groups[0].optimizers
    hidden = {p for g in muon.param_groups for p in g["params"]}
    rest = {p for g in adamw.param_groups for p in g["params"]}
    assert model.model.layers[0].mlp.up_proj.weight in hidden
    assert model.model.embed_tokens.weight in rest
    assert model.lm_head.weight in rest
    assert model.model.norm.weight in rest
    assert len(hidden) + len(rest) == len(list(model.parameters()))


def test_m3_takes_hidden_matrices_and_adamw_the_rest_in_one_optimiser(llama):
    model = llama()
    options = {"split": {"up_proj": 2}, "periods": [1, 4]}
    [m3] = LevelOptimizers(model, OptimConfig(name="m3", weight_decay=0.3, options=options)).groups[0].optimizers
    rules = {id(p): (g["rule"], g["weight_decay"]) for g in m3.param_groups for p in g["params"]}
    assert rules[id(model.model.layers[0].mlp.up_proj.weight)] == ("matrix", 0.3)
    assert rules[id(model.model.embed_tokens.weight)] == rules[id(model.lm_head.weight)] == ("adamw", 0.3)
    assert rules[id(model.model.norm.weight)] == ("adamw", 0.0)
    assert len(rules) == len(list(model.parameters()))
    groups = with_levels(None, 2 * TOKENS, name="m3", options={"split": {"blocks.1": 3}})[1].groups
    assert [group.optimizers[0].defaults["split"] for group in groups] == [{}, {"blocks.1": 3}]
    with pytest.raises(ValueError, match="split names 'qkv'"):
        LevelOptimizers(model, OptimConfig(name="m3", options={"split": {"qkv": 3}}))


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_muon_is_torch_muon_up_to_its_bfloat16(adjust):
    shapes = [(8, 16), (8, 16), (16, 8)]
    ours, theirs = (
        [nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)]
        for _ in range(2)
    )
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    pairs = (Muon(ours, **options), ours), (torch.optim.Muon(theirs, **options), theirs)
    start = [p.detach().clone() for p in ours]
    for step in range(3):
        for optimizer, params in pairs:
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            optimizer.step()
    for a, b, s in zip(ours, theirs, start):
        assert (a - b).norm() < 0.02 * (a - s).norm()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "adamx"}, "did you mean 'adamw'"),
        ({"name": "torch.optim.Adamm"}, "cannot be imported"),
        ({"name": "torch.nn.Linear"}, "not a torch.optim.Optimizer"),
        ({"name": "torch.optim.SGD", "options": {"momentun": 0.9}}, "did you mean 'momentum'"),
        ({"name": "torch.optim.SGD", "options": {"momentum": -1}}, "refused its options"),
    ],
)
def test_bad_optimizers_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        LevelOptimizers(Leveled([]), OptimConfig(**options))
