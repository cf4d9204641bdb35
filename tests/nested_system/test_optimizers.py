"""Optimisers as memories: what is declared is what they keep, name by name, shape by shape, byte by byte."""

import pytest
import torch
from torch import nn

import nestling.nested_system
from nestling.nested_system import OptimizerMemory, Rule, describes
from nestling.nested_system.describe import _CLASSES
from nestling.nested_system.frequency import EVERY_STEP
from nestling.optim import DGD, M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum

OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "Adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
    "ASGD": lambda m: torch.optim.ASGD(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]),
    "M3": lambda m: M3(m.parameters(), periods=(1, 2, 4)),
    "M3 sums": lambda m: M3(m.parameters(), accumulation="sum", second_moment=False),
    "DeltaMomentum": lambda m: DeltaMomentum(m.parameters()),
    "DeepMomentum": lambda m: DeepMomentum(m.parameters(), hidden=3),
    "Preconditioned": lambda m: PreconditionedMomentum(m.parameters()),
    "Outer": lambda m: PreconditionedMomentum(m.parameters(), preconditioner="outer"),
    "Orthogonal": lambda m: PreconditionedMomentum(m.parameters(), preconditioner="orthogonal"),
    "DGD": lambda m: DGD(m, momentum=0.9),
}


def model_of(dtype=torch.float32):
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)).to(dtype)


def step(model, optimizer):
    dtype = next(model.parameters()).dtype
    model(torch.randn(6, 3, dtype=dtype)).square().mean().backward()
    optimizer.step()


def kept(system):
    """The declared states: name, shape, dtype."""
    memories = [m for m in system.memories if m.lifetime == "training"]
    return sorted((t.name, t.shape, t.dtype) for m in memories for t in m.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_declared_is_what_is_kept(name, dtype):
    model = model_of(dtype)
    optimizer = OPTIMIZERS[name](model)
    declared = nestling.levels(model, optimizer)
    step(model, optimizer)
    names = {p: n for n, p in model.named_parameters()}
    real = sorted(
        (f"{names[p]}.{key}", tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for p, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    )
    assert kept(declared) == real
    after = nestling.levels(model, optimizer)
    assert after.coverage.complete
    assert after.coverage.optimizer_states[1] == sum(len(s) for s in optimizer.state.values())
    assert after.levels == declared.levels


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_declared_paces_are_measured(name):
    model = model_of()
    system = nestling.levels(model, OPTIMIZERS[name](model), measure=torch.randn(6, 3), steps=4)
    odd = [f for f in system.findings if f.kind not in ("dropped", "shared") and "no optimiser has it" not in f.message]
    assert odd == []
    assert all(m.measured.updates for m in system.memories if m.lifetime == "model" and str(m.frequency) != "0")


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("SGD", [{"momentum"}, {"linear map"}]),
        ("Adam", [{"second moment"}, {"largest second moment", "first moment"}, {"linear map"}]),
        ("RMSprop", [{"first moment", "second moment"}, {"momentum"}, {"linear map"}]),
        ("ASGD", [{"linear map"}, {"average of weights"}]),
        ("Preconditioned", [{"preconditioner"}, {"momentum"}, {"linear map"}]),
        ("Orthogonal", [{"preconditioner"}, {"momentum"}, {"linear map"}]),
        ("DGD", [{"momentum"}, {"linear map"}]),
        ("DeepMomentum", [{"deep momentum"}, {"linear map"}]),
        ("DeltaMomentum", [{"delta momentum"}, {"linear map"}]),
    ],
)
def test_levels_of_an_optimiser(name, levels):
    model = model_of()
    system = nestling.levels(model, OPTIMIZERS[name](model))
    assert [{m.kind for m in level.memories} for level in system.levels] == levels


def test_m3_has_a_scale_slower_than_the_weights():
    model = nn.Linear(3, 4, bias=False)
    system = nestling.levels(model, M3(model.parameters(), periods=(1, 8, 64), ns_steps=3))
    kinds = [(str(level.frequency), {m.kind for m in level.memories}) for level in system.levels]
    assert kinds == [
        ("3 / step", {"orthogonalization"}),
        ("1 / step", {"momentum", "second moment"}),
        ("1 / step", {"linear map"}),
        ("3 / 8 steps", {"slow momentum 2 orthogonalization"}),
        ("1 / 8 steps", {"slow momentum 2"}),
        ("3 / 64 steps", {"slow momentum 3 orthogonalization"}),
        ("1 / 64 steps", {"slow momentum 3"}),
    ]


def test_dgd_changes_the_objective_of_the_layer():
    model = nn.Linear(3, 4, bias=False)
    system = nestling.levels(model, DGD(model, lr=0.5))
    assert len(system.levels) == 1
    assert "NL Eq. 56" in system["linear"].objective and "e x xᵀ" in system["linear"].update


def test_parameter_groups_of_one_rule_are_one_memory():
    model = model_of()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == two] for two in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    system = nestling.levels(model, torch.optim.AdamW(groups))
    assert [len(level.memories) for level in system.levels] == [2, 2]
    assert "(1 − η λ)" in system["0"].update


def test_accumulated_gradients_are_a_memory():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    system = nestling.levels(model, optimizer, accumulation=4, measure=torch.randn(6, 3))
    assert [(str(level.frequency), {m.kind for m in level.memories}) for level in system.levels] == [
        ("4 / step", {"gradient sum"}), ("1 / step", {"linear map"}),
    ]  # fmt: skip
    total = system.levels[0].memories[0]
    assert (total.measured.updates, total.measured.over) == (12, 12)
    assert {(t.source, t.kind) for t in system.transfers if t.target == "0"} == {(total.name, "parametric")}
    assert {(t.source, t.kind) for t in system.transfers if t.target == total.name} == {
        ("0", "generation"),
        ("2", "generation"),
    }
    assert not [f for f in system.findings if f.kind != "dropped"]


def test_averaged_weights_are_the_slowest_level():
    model = model_of()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters())
    system = nestling.levels(model, optimizer, average=average, measure=torch.randn(6, 3))
    assert [m.kind for m in system.levels[-1].memories] == ["average of weights"] and len(system.levels) == 3
    assert system["average of weights"].measured.updates == 3
    assert int(average.n_averaged) == 0


def test_a_schedule_is_named_with_the_step_size():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    system = nestling.levels(model, optimizer, scheduler=scheduler, measure=torch.randn(6, 3))
    assert system["0"].solver.rate == "lr 0.1 × CosineAnnealingLR"
    assert scheduler.last_epoch == 0 and optimizer.param_groups[0]["lr"] == 0.1
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    assert any("ReduceLROnPlateau" in note for note in nestling.levels(model, optimizer, scheduler=plateau).notes)


def test_the_optimisers_of_a_run_have_slow_levels(make_hope, ids):
    from nestling.schedule import Schedule
    from nestling.training.config import OptimConfig
    from nestling.training.optimizers import LevelOptimizers

    model = make_hope(cms_levels=[{"chunk_size": None}, {"chunk_size": 48}])
    run = LevelOptimizers(model, OptimConfig(name="muon"), Schedule(model.config.levels, 24, 24))
    system = nestling.levels(model, run, measure=ids, steps=4)
    assert system.coverage.complete
    slow = system["model.layers.0.memory.blocks.1"]
    assert str(slow.frequency) == "1 / 48 tokens" and slow.measured.updates == 2
    sums = next(m for m in system.memories if m.kind == "gradient sum")
    assert sums.frequency == EVERY_STEP and sums.measured.updates == 4
    assert system.level_of(sums.name) < system.level_of(slow.name)
    assert not [f for f in system.findings if f.kind not in ("dropped", "shared")]
    assert all(group.steps == 0 for group in run.groups)


class Odd(torch.optim.Optimizer):
    """Keeps something that nobody has described."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["thing"] = self.state[p].get("thing", 0) + p.grad
            p.data -= 0.1 * p.grad


def test_an_unknown_optimiser_is_shown_as_unknown():
    model = model_of()
    optimizer = Odd(model.parameters())
    system = nestling.levels(model, optimizer, measure=torch.randn(6, 3))
    assert "Odd state 'thing'" in system.coverage.unknown and not system.associative
    assert [f.kind for f in system.findings if "thing" in f.message] == ["unknown"]
    step(model, optimizer)
    later = nestling.levels(model, optimizer)
    (memory,) = [m for m in later.memories if m.unknown]
    assert {t.name for t in memory.tensors} == {f"{n}.thing" for n, _ in model.named_parameters()}


def test_one_function_teaches_a_new_optimiser():
    before = dict(_CLASSES)
    try:

        @describes(Odd)
        def odd(optimizer, group):
            thing = OptimizerMemory("thing", "t ← t + g", "−⟨t, g⟩", states={"thing": lambda p: [tuple(p.shape)]})
            return Rule("Odd", "W ← W − 0.1 g", "lr 0.1", (thing,))

        model = model_of()
        system = nestling.levels(model, Odd(model.parameters()), measure=torch.randn(6, 3))
        assert system.coverage.complete and system.coverage.optimizer_states == (4, 4)
        assert system["Odd: thing"].measured.updates == 3

        @describes(Odd)
        def wrong(optimizer, group):
            return "momentum"

        with pytest.raises(TypeError, match="description of Odd must return a Rule"):
            nestling.levels(model, Odd(model.parameters()))
    finally:
        _CLASSES.clear()
        _CLASSES.update(before)
