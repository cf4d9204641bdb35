"""M3 as a torch optimiser: its arguments, its state, and what it does with bad gradients."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from nestling.optim import M3

pytestmark = pytest.mark.filterwarnings("ignore:M3 got parameters without names")

SHAPES = [(4, 6), (6, 4), (4, 6), (3, 4, 6), (5,)]


def make(dtype=torch.float32, shapes=SHAPES, **options):
    g = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    return parameters, M3(parameters, **{"lr": 0.05, "periods": (1, 3), "weight_decay": 0.1, **options})


def gradients(parameters, step, scale=1.0):
    g = torch.Generator().manual_seed(step)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=g)).to(p.dtype)


def drive(parameters, optimizer, steps, start=0):
    for step in range(start, start + steps):
        gradients(parameters, step)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def equal(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(optimizer):
    return [t.clone() for state in optimizer.state.values() for t in state.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("accumulation", ["ema", "sum"])
@pytest.mark.parametrize("at", range(5))
def test_a_resumed_run_is_the_run_bit_for_bit(dtype, accumulation, at):
    parameters, optimizer = make(dtype, accumulation=accumulation)
    drive(parameters, optimizer, at)
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in parameters], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others, resumed = make(dtype, accumulation=accumulation, lr=0.9)
    for p, value in zip(others, saved["weights"]):
        p.data.copy_(value)
    resumed.load_state_dict(saved["optimizer"])
    assert equal(state_of(optimizer), state_of(resumed))
    assert equal(drive(parameters, optimizer, 5, at), drive(others, resumed, 5, at))
    assert equal(state_of(optimizer), state_of(resumed))


def test_loading_copies():
    parameters, optimizer = make()
    drive(parameters, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    others, resumed = make()
    resumed.load_state_dict(saved)
    drive(others, resumed, 2)
    for name, value in before["state"][0].items():
        assert torch.equal(saved["state"][0][name], value)


def test_the_phase_is_in_the_state():
    """O2 changes after every third gradient, also when saved between."""
    parameters, optimizer = make()
    changes, last = [], torch.zeros(4, 6, dtype=torch.bfloat16)
    for step in range(9):
        gradients(parameters, step)
        optimizer.step()
        parameters, other = [nn.Parameter(p.detach().clone()) for p in parameters], optimizer
        optimizer = M3(parameters, periods=(1, 3))
        optimizer.load_state_dict(other.state_dict())
        o2 = optimizer.state[parameters[0]]["o2"]
        changes.append(not torch.equal(o2, last))
        last = o2.clone()
    assert changes == [False, False, True] * 3


@pytest.mark.parametrize("flatten", [False, True])
def test_reading_a_distributed_state_before_the_first_step_changes_nothing(flatten):
    """torch takes a step of zero gradients at lr 0 to make the state; it must not count."""
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        return model, M3(model.named_parameters(), lr=0.05, periods=(1, 3))

    (model, optimizer), (plain_model, plain) = build(), build()
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    parameters, others = list(model.parameters()), list(plain_model.parameters())
    for step in range(4):
        drive(parameters, optimizer, 1, step)
        drive(others, plain, 1, step)
        assert equal(parameters, others)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    (model, optimizer) = build()
    model.load_state_dict(plain_model.state_dict())
    set_optimizer_state_dict(model, optimizer, saved, options=options)
    assert equal(drive(list(model.parameters()), optimizer, 3, 4), drive(others, plain, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_per_parameter(dtype):
    def size(**options):
        parameters, optimizer = make(dtype, [(64, 64), (3, 32, 32)], **options)
        drive(parameters, optimizer, 1)
        total = sum(t.numel() * t.element_size() for s in optimizer.state.values() for n, t in s.items() if n != "step")
        return total / sum(p.numel() for p in parameters)

    assert size() == 14
    assert size(second_moment=False) == 10
    assert size(periods=(1,)) == 8
    assert size(accumulation="sum") == 16


def test_memories_are_float32_and_sums_do_not_stall():
    """A bfloat16 sum of ones stops at 256."""
    [p], optimizer = make(torch.bfloat16, [(4, 4)], accumulation="sum", betas=(1.0, 1.0, 1.0), rms_match=False)
    for _ in range(300):
        p.grad = torch.ones_like(p)
        optimizer.step()
    state = optimizer.state[p]
    assert {name: t.dtype for name, t in state.items()} == dict.fromkeys(("step", "m1", "v", "m2", "o2"), torch.float32)
    assert torch.equal(state["m1"], torch.full((4, 4), 300.0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("where", [0, 4])
def test_a_bad_gradient_changes_nothing(bad, where):
    parameters, optimizer = make()
    drive(parameters, optimizer, 2)
    weights, state = [p.detach().clone() for p in parameters], state_of(optimizer)
    gradients(parameters, 7)
    parameters[where].grad.view(-1)[1] = bad
    optimizer.step()
    assert equal(weights, parameters)
    assert equal(state, state_of(optimizer))
    others, untouched = make()
    assert equal(drive(parameters, optimizer, 3, 2), drive(others, untouched, 5))


def test_a_bad_gradient_can_be_an_error_or_ignored():
    parameters, optimizer = make(nonfinite="raise")
    drive(parameters, optimizer, 1)
    state = state_of(optimizer)
    gradients(parameters, 1)
    parameters[0].grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN"):
        optimizer.step()
    assert equal(state, state_of(optimizer))
    parameters, optimizer = make(nonfinite="ignore")
    gradients(parameters, 0)
    parameters[0].grad[0, 0] = float("nan")
    optimizer.step()
    assert parameters[0].isnan().all()
    assert parameters[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulation", ["ema", "sum"])
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e4])
def test_zero_tiny_and_large_gradients_give_finite_weights(dtype, accumulation, size):
    parameters, optimizer = make(dtype, accumulation=accumulation, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    for step in range(4):
        gradients(parameters, step, size)
        optimizer.step()
    assert all(p.isfinite().all() for p in parameters)
    if size == 0.0:
        assert equal(before, parameters)


def test_a_parameter_without_gradient_waits():
    """It keeps its weight, its memories and its phase; its neighbour of the same shape goes on."""
    parameters, optimizer = make()
    for step in range(6):
        gradients(parameters, step)
        if step in (1, 2):
            weight = parameters[0].detach().clone()
            parameters[0].grad = None
        optimizer.step()
        if step in (1, 2):
            assert torch.equal(parameters[0], weight)
    assert optimizer.state[parameters[0]]["step"] == 4
    assert optimizer.state[parameters[2]]["step"] == 6
    others, alone = make()
    for step in (0, 3, 4, 5):
        gradients(others, step)
        for p in others[1:]:
            p.grad = None
        alone.step()
    assert torch.allclose(parameters[0], others[0], atol=1e-6)
    for p in parameters:
        p.grad = None
    optimizer.step()
    assert optimizer.state[parameters[2]]["step"] == 6


def test_a_tensor_learning_rate_is_its_number():
    numbers, a = make(torch.float64, lr=0.05)
    tensors, b = make(torch.float64, lr=torch.tensor(0.05, dtype=torch.float64))
    for foreach in (True, False):
        a.param_groups[0]["foreach"] = b.param_groups[0]["foreach"] = foreach
        for x, y in zip(drive(numbers, a, 4), drive(tensors, b, 4)):
            assert torch.allclose(x, y, atol=1e-12)
    b.param_groups[0]["lr"].fill_(0.0)
    assert equal(tensors, drive(tensors, b, 1))


def test_closures_schedulers_and_groups():
    weight = nn.Parameter(torch.eye(4))
    optimizer = M3([weight], lr=1.0, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (weight - 3).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(12 * 9 + 4 * 4)
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert calls == [True]
    other = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [other], "lr": 0.0})
    gradients([weight, other], 0)
    optimizer.step()
    assert torch.equal(other, torch.ones(3))


def test_frozen_empty_and_scalar_parameters():
    frozen, empty = nn.Parameter(torch.ones(3, 3), requires_grad=False), nn.Parameter(torch.zeros(0, 4))
    scalar = nn.Parameter(torch.tensor(2.0))
    optimizer = M3([frozen, empty, scalar], lr=0.1)
    empty.grad, scalar.grad = torch.zeros(0, 4), torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(frozen, torch.ones(3, 3))
    assert scalar.item() == pytest.approx(1.9)


def test_models_that_were_cast_or_reshaped_are_refused():
    parameters, optimizer = make()
    gradients(parameters, 0)
    parameters[1].data = parameters[1].data.double()
    with pytest.raises(ValueError, match=r"float32 on cpu.*float64"):
        optimizer.step()
    parameters, optimizer = make()
    gradients(parameters, 0)
    parameters[1].data = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="zero_grad"):
        optimizer.step()
    assert not optimizer.state


def test_a_learning_rate_on_another_device_is_refused():
    parameters, optimizer = make()
    gradients(parameters, 0)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match="lr is on meta"):
        optimizer.step()


def test_copies_go_on_as_the_original():
    parameters, optimizer = make(nonfinite="raise")
    drive(parameters, optimizer, 2)
    others, twin = copy.deepcopy((parameters, optimizer))
    assert equal(drive(parameters, optimizer, 3, 2), drive(others, twin, 3, 2))
    others[0].grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError):
        twin.step()


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = M3(table.named_parameters(), lr=0.1)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"weight.*sparse=False"):
        optimizer.step()


def test_a_state_of_other_shapes_is_refused():
    parameters, optimizer = make()
    drive(parameters, optimizer, 2)
    other = [(f"p{i}", nn.Parameter(torch.ones(s))) for i, s in enumerate([(4, 6), (6, 5), *SHAPES[2:]])]
    fresh = M3(other)
    with pytest.raises(ValueError, match=r"m1 has shape \[6, 4\].*p1.*\[6, 5\]"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state
    with pytest.raises(ValueError, match="group"):
        M3([nn.Parameter(torch.ones(4, 6))]).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr": torch.ones(2)}, "lr as a tensor"),
        ({"periods": (1, 0)}, "periods must be at least 1"),
        ({"periods": (2, 4)}, "periods must begin with 1"),
        ({"periods": (1, 4, 4)}, "periods must rise"),
        ({"periods": ()}, "periods must be"),
        ({"betas": (0.9, 1.0, 0.9)}, r"betas must lie in \[0, 1\)"),
        ({"betas": (0.9, -0.1, 0.9)}, "betas must be"),
        ({"betas": (0.9, 0.9)}, "betas must hold"),
        ({"alpha": -0.1}, "alpha must be"),
        ({"alpha": (0.1, 0.2)}, "more scales than"),
        ({"ns_steps": 0}, "steps must be"),
        ({"coefficients": "moon"}, "coefficients must be one of"),
        ({"eps": -1e-8}, "eps must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"accumulation": "mean"}, "accumulation must be one of 'ema', 'sum'"),
        ({"adam_betas": (0.9, 1.5)}, "adam_betas must lie"),
        ({"nonfinite": "clip"}, "nonfinite must be one of"),
        ({"split": {"qkv": 3}}, "split names 'qkv'.*named_parameters"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        M3([nn.Parameter(torch.ones(2, 2))], **options)


def test_bad_groups_are_named_and_not_added():
    optimizer = M3([nn.Parameter(torch.ones(2, 2))])
    for group, words in (
        ({"params": [nn.Parameter(torch.ones(3))], "rule": "matrix"}, r"\[3\] is no matrix.*adamw"),
        ({"params": [nn.Parameter(torch.ones(()))], "rule": "matrix"}, "is no matrix"),
        ({"params": [nn.Parameter(torch.ones(3, dtype=torch.complex64))]}, "real floating point"),
        ({"params": [nn.Parameter(torch.ones(3))], "rule": "muon"}, "rule must be one of"),
        ({"params": [nn.Parameter(torch.ones(3))], "lr": -1.0}, "lr must be"),
        ({"params": [nn.Parameter(torch.ones(3, 3))], "view": "rows"}, "view must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1
    for parts in (3, 0, [1, 2], [4, 0], ("columns", 3)):
        with pytest.raises(ValueError, match=r"split of qkv must add up to its"):
            M3([("qkv", nn.Parameter(torch.ones(4, 2)))], split={"qkv": parts})


def test_compiled_steps_are_the_eager_ones():
    def build():
        return make(torch.float64, [(4, 6), (4, 6), (5,)], lr=torch.tensor(0.05), periods=(1, 2))

    (ours, eager), (theirs, compiled) = build(), build()
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend="eager")
    for t in range(4):
        drive(ours, eager, 1, t)
        gradients(theirs, t)
        step()
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_model_learns():
    """A small regression: a hundred steps bring the loss down tenfold."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    x = torch.randn(256, 8)
    y = torch.tanh(x @ torch.randn(8, 4))
    optimizer, losses = M3(model.parameters(), lr=0.03), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert losses[-1] < 0.1 * losses[0]
