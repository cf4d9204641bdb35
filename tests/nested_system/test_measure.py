import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import nestling.nested_system
from nestling.optim import DGD


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def found(system, kind):
    return {f.memory for f in system.findings if f.kind == kind}


def test_counts_are_of_what_really_changed():
    model, x = mlp(), torch.randn(5, 3)
    system = nestling.levels(model, torch.optim.SGD(model.parameters(), lr=0.1), measure=x, steps=2)
    twin = copy.deepcopy(model)
    (0.5 * twin(x).square().mean()).backward()
    first = twin[0].weight.grad.square().sum() + twin[0].bias.grad.square().sum()
    seen = system["0"].measured
    assert (seen.updates, seen.over, seen.unit) == (2, 2, "step")
    assert seen.norm == pytest.approx(0.1 * first.sqrt().item(), rel=0.2)  # the second step's is a little smaller
    assert system.tokens_per_step == 5


@pytest.mark.parametrize("name", ["adamw", "sgd", "lbfgs", "dgd"])
def test_nothing_of_the_users_is_changed(hope, ids, name):
    make = {
        "adamw": lambda: torch.optim.AdamW(hope.parameters()),
        "sgd": lambda: torch.optim.SGD(hope.parameters(), lr=0.1, momentum=0.9),
        "lbfgs": lambda: torch.optim.LBFGS(hope.parameters(), max_iter=2),
        "dgd": lambda: DGD(hope, 0.1, momentum=0.9),
    }
    optimizer = make[name]()
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss = hope(ids, labels=ids).loss
    loss.backward()
    optimizer.step(lambda: loss) if name == "lbfgs" else optimizer.step()
    scheduler.step()
    called.clear()

    def everything():
        gradients = [None if p.grad is None else p.grad.clone() for p in hope.parameters()]
        states = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        tensors = [t.clone() for t in hope.state_dict().values()]
        generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        return gradients, states, tensors, generators, [g["lr"] for g in optimizer.param_groups], scheduler.state_dict()

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b

    before, hooks = everything(), [len(m._forward_hooks) for m in hope.modules()]
    system = nestling.levels(hope, optimizer, scheduler=scheduler, measure=ids)
    assert same(before, everything())
    assert not called and hooks == [len(m._forward_hooks) for m in hope.modules()]
    assert system["model.layers.0.mixer.in_proj"].measured.updates == 3


def test_memories_in_the_context_are_watched_token_by_token(hope, ids):
    system = nestling.levels(hope, measure=ids)
    counts = {
        m.name.removeprefix("model.layers.1.mixer."): m.measured for m in system.memories if ".layers.1." in m.name
    }
    assert (counts["memory"].updates, counts["memory"].over, counts["memory"].unit) == (12, 12, "token")
    assert counts["k"].updates == counts["eta"].updates == 3  # chunks of 4 tokens
    assert counts["memory.momentum"].updates == counts["alpha.momentum"].updates == 12
    assert counts["in_proj"].updates == 0
    assert not found(system, "never moves") and not found(system, "another rate")


def test_a_parameter_without_a_gradient_is_found():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x) + 0 * self.idle(x).detach()

    model = Idle()
    system = nestling.levels(model, torch.optim.AdamW(model.parameters(), weight_decay=0.0), measure=torch.randn(4, 3))
    assert found(system, "never moves") == {"idle"}
    assert "no gradient reaches it" in next(f.message for f in system.findings if f.memory == "idle")


def test_one_still_tensor_of_a_memory_is_found():
    class Half(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight, self.bias.detach())

    model = Half(3, 3)
    system = nestling.levels(model, torch.optim.SGD(model.parameters(), lr=0.1), measure=torch.randn(4, 3))
    (finding,) = [f for f in system.findings if f.kind == "never moves"]
    assert finding.message == "bias never changed while the rest did"


def test_a_slow_level_under_an_optimiser_that_always_steps_is_found(make_hope, ids):
    model = make_hope(cms_levels=[{"chunk_size": None}, {"chunk_size": 4096}])
    system = nestling.levels(model, torch.optim.AdamW(model.parameters()), measure=ids)
    assert {f"model.layers.{i}.memory.blocks.1" for i in range(2)} <= found(system, "another rate")
    assert "AdamW: first moment" not in found(system, "another rate")


def test_a_level_that_should_learn_in_the_context_and_does_not_is_found(make_hope, ids, monkeypatch):
    model = make_hope(cms_levels=[{"chunk_size": 4}, {"chunk_size": None}])
    system = nestling.levels(model, measure=ids)
    assert system["model.layers.0.memory.levels.0"].measured.updates and not found(system, "never moves")
    monkeypatch.setattr("nestling.cms.learner.Learner._step", lambda self, index, state, *rest: state)
    system = nestling.levels(model, measure=ids)
    assert found(system, "never moves") == {"model.layers.0.memory.levels.0", "model.layers.1.memory.levels.0"}


def test_a_frozen_weight_that_moves_is_found():
    class Drifts(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.weight += 0.1
            return super().forward(x)

    system = nestling.levels(Drifts(3, 3), measure=torch.randn(4, 3))
    assert found(system, "moves though frozen") == {"drifts"}


def test_batch_statistics_move_without_an_optimiser():
    system = nestling.levels(nn.Sequential(nn.BatchNorm1d(3)), measure=torch.randn(4, 3))
    assert system["0.running"].measured.updates == 3 and system["0"].measured.updates == 0
    assert not system.findings


def test_state_that_training_throws_away_is_found():
    model = mlp()
    system = nestling.levels(model, torch.optim.AdamW(model.parameters()), measure=torch.randn(4, 3))
    assert found(system, "dropped") == {"AdamW: first moment", "AdamW: second moment"}


def test_batches_and_losses_of_every_form(gpt2, ids):
    model = nn.Bilinear(2, 3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 2), torch.randn(4, 3)
    for batch in ((x, y), {"input1": x, "input2": y}):
        assert nestling.levels(model, optimizer, measure=batch)["bilinear"].measured.updates == 3
    system = nestling.levels(model, optimizer, measure=(x, y), loss=lambda out, batch: 0 * out.sum())
    assert found(system, "never moves") == {"bilinear"}
    for batch in (ids, {"input_ids": ids, "labels": ids}):
        assert nestling.levels(gpt2, torch.optim.SGD(gpt2.parameters(), lr=0.1), measure=batch).tokens_per_step == 24


def test_a_compiled_model_is_measured_uncompiled():
    model = torch.compile(mlp())
    system = nestling.levels(model, torch.optim.SGD(model.parameters(), lr=0.1), measure=torch.randn(4, 3))
    assert system["0"].measured.updates == 3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(measure="text"), TypeError, "measure must be a batch"),
        (dict(measure=torch.randn(4, 3), steps=0), ValueError, "steps must be"),
        (dict(measure=torch.full((4, 3), torch.inf)), ValueError, "nothing can be measured"),
        (dict(measure=torch.randn(4, 3), loss=lambda out, batch: out), TypeError, "loss must be one number"),
    ],
)
def test_what_cannot_be_measured_is_said(options, error, words):
    with pytest.raises(error, match=words):
        nestling.levels(mlp(), **options)


def test_there_is_nothing_to_measure_on_the_meta_device():
    with pytest.raises(ValueError, match="meta device"):
        nestling.levels(mlp().to("meta"), measure=torch.randn(4, 3))


def test_an_output_without_a_loss_is_said():
    class Words(nn.Linear):
        def forward(self, x):
            return "words"

    with pytest.raises(TypeError, match="holds no loss"):
        nestling.levels(Words(3, 3), measure=torch.randn(4, 3))
