"""What every optimiser made of a memory owes to a torch training script."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from nestling.optim import DeepMomentum, DeltaMomentum, PreconditionedMomentum

OPTIMIZERS = {
    "delta": DeltaMomentum,
    "deep": DeepMomentum,
    "deep-l2": lambda params, lr=1e-2, **options: DeepMomentum(params, lr, erase=0.5, **options),
    "diagonal": PreconditionedMomentum,
    "outer": lambda params, lr=1e-3, **options: PreconditionedMomentum(params, lr, preconditioner="outer", **options),
    "orthogonal": lambda params, lr=1e-3, **options: PreconditionedMomentum(
        params, lr, preconditioner="orthogonal", **options
    ),
}
SHAPES = [(4, 3), (5,), (), (3, 2, 2, 2), (2, 3, 4)]


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    return OPTIMIZERS[request.param]


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, params, steps):
    for step in steps:
        gradients(params, step)
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_training_goes_on_bit_for_bit_from_a_state_dict(build, dtype):
    params = parameters(dtype)
    optimizer = build(params, 0.05, weight_decay=0.1)
    train(optimizer, params, range(3))
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    other = build(resumed, 0.5)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, range(3, 6))
    train(other, resumed, range(3, 6))
    for a, b, start in zip(params, resumed, parameters(dtype)):
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert not torch.equal(a, start)
        for name, value in optimizer.state[a].items():
            assert value.dtype == other.state[b][name].dtype == torch.promote_types(dtype, torch.float32)
            assert torch.equal(value, other.state[b][name])


def test_a_copy_or_pickle_goes_on_as_the_original(build):
    params = parameters()
    optimizer = build(params, nonfinite="raise")
    train(optimizer, params, range(2))
    twins = [copy.deepcopy(optimizer)]
    if optimizer.state_dict()["param_groups"][0]:
        twins.append(pickle.loads(pickle.dumps(optimizer)))
    train(optimizer, params, range(2, 4))
    for twin in twins:
        own = twin.param_groups[0]["params"]
        train(twin, own, range(2, 4))
        assert all(torch.equal(a, b) for a, b in zip(params, own))
        own[0].grad.fill_(torch.nan)
        with pytest.raises(FloatingPointError):
            twin.step()


def test_closures_tensor_rates_groups_and_names(build):
    """One run said in five ways."""

    def fresh(**options):
        params = parameters()
        return params, build(params, 0.01, **options)

    plain, optimizer = fresh()
    train(optimizer, plain, range(3))

    tensor = parameters()
    train(build(tensor, torch.tensor(0.01)), tensor, range(3))

    named = parameters()
    optimizer = build([(f"p{i}", p) for i, p in enumerate(named)], 0.01)
    assert optimizer.param_groups[0]["param_names"] == ["p0", "p1", "p2", "p3", "p4"]
    train(optimizer, named, range(3))

    grouped = parameters()
    optimizer = build([{"params": grouped[:2]}, {"params": grouped[2:], "lr": 0.01}], 0.5)
    optimizer.param_groups[0]["lr"] = 0.01
    train(optimizer, grouped, range(3))

    closed = parameters()
    optimizer = build(closed, 0.01)
    for step in range(3):

        def closure(step=step):
            assert torch.is_grad_enabled()
            gradients(closed, step)
            return torch.tensor(float(step))

        assert optimizer.step(closure) == step
    for other in (tensor, named, grouped, closed):
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, other))


def test_weight_decay_is_decoupled(build):
    params = parameters()
    optimizer = build(params, 0.1, weight_decay=0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.allclose(p, 0.95 * q) for p, q in zip(params, parameters()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e20])
def test_a_gradient_that_is_no_number_changes_nothing(build, value):
    params = parameters()
    optimizer = build(params)
    train(optimizer, params, range(2))
    weights, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict()["state"])
    gradients(params, 5)
    params[-1].grad.view(-1)[1] = value
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, weights))
    assert all(torch.equal(v, state[i][k]) for i, s in optimizer.state_dict()["state"].items() for k, v in s.items())
    train(optimizer, params, [6])
    assert all(p.isfinite().all() and not torch.equal(p, w) for p, w in zip(params, weights))


def test_huge_and_tiny_gradients_leave_numbers(build):
    for size in (1e-30, 1e-12, 1e12):
        params = parameters()
        optimizer = build(params)
        for step in range(5):
            gradients(params, step)
            for p in params:
                p.grad.mul_(size)
            optimizer.step()
        assert all(p.isfinite().all() for p in params)
        assert all(v.isfinite().all() for s in optimizer.state.values() for v in s.values())


def test_a_parameter_without_gradient_waits(build):
    params = parameters()
    optimizer = build(params)
    gradients(params, 0)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], parameters()[1])
    assert params[1] not in optimizer.state
    assert optimizer.step() is None


def test_empty_parameters_are_carried_along(build):
    p = nn.Parameter(torch.zeros(0, 3))
    optimizer = build([p, *parameters(shapes=[(2,)])])
    p.grad = torch.zeros(0, 3)
    optimizer.step()
    assert p.shape == (0, 3)


def test_sparse_gradients_and_odd_parameters_are_refused(build):
    params = parameters()
    optimizer = build(params)
    gradients(params, 0)
    before = [p.detach().clone() for p in params]
    params[-1].grad = params[-1].grad.to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before))
    with pytest.raises(TypeError, match="complex64"):
        build([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    "options, name",
    [
        (dict(lr=-1.0), "lr"),
        (dict(lr=torch.ones(2)), "lr"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(nonfinite="ok"), "nonfinite"),
    ],
)
def test_settings_out_of_range_are_named(build, options, name):
    with pytest.raises(ValueError, match=name):
        build(parameters(), **options)


def test_a_bad_group_is_not_added(build):
    optimizer = build(parameters())
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": parameters(shapes=[(2,)]), "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_a_state_of_other_shapes_is_refused():
    params = parameters()
    optimizer = DeltaMomentum(params)
    train(optimizer, params, range(1))
    other = DeltaMomentum(parameters(shapes=[(3, 4), *SHAPES[1:]]))
    with pytest.raises(ValueError, match=r"\[4, 3\].*\[3, 4\]"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_the_state_torch_makes_for_a_distributed_checkpoint_counts_as_no_step(build):
    params = parameters()
    fresh, warmed = build(params), build(twins := parameters())
    for p in twins:
        p.grad = torch.zeros_like(p)
    lr = warmed.param_groups[0]["lr"]
    warmed.param_groups[0]["lr"] = torch.tensor(0.0)
    warmed.step()
    assert len(warmed.state) == len(twins)
    warmed.param_groups[0]["lr"] = lr
    train(fresh, params, range(2))
    train(warmed, twins, range(2))
    assert all(torch.equal(a, b) for a, b in zip(params, twins))


@pytest.mark.parametrize("name", ["delta", "deep"])
def test_a_compiled_step_is_the_step(name):
    plain, compiled = parameters(shapes=SHAPES[:2]), parameters(shapes=SHAPES[:2])
    one, two = OPTIMIZERS[name](plain), OPTIMIZERS[name](compiled)
    step = torch.compile(two.step, backend="eager")
    for i in range(2):
        gradients(plain, i)
        gradients(compiled, i)
        one.step()
        step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, compiled))


def moons(points=200):
    angle, y = torch.rand(points) * torch.pi, torch.arange(points) % 2
    x = torch.stack([torch.where(y == 0, angle.cos(), 1 - angle.cos()), (1 - 2 * y) * angle.sin() + 0.5 * y], 1)
    return x + 0.1 * torch.randn(points, 2), y


def loss_after(build, steps=100):
    torch.manual_seed(0)
    x, y = moons()
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = build(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_every_default_trains_a_small_network_with_only_lr_set(build):
    start = loss_after(build, 1)
    lr = 0.03 if build in (OPTIMIZERS["delta"], OPTIMIZERS["deep"], OPTIMIZERS["deep-l2"]) else 0.01
    assert loss_after(lambda p: build(p, lr), 80) < 0.5 * start


@pytest.mark.parametrize("lr", [0.1, 0.3])
@pytest.mark.parametrize("build", [DeltaMomentum, DeepMomentum])
def test_the_defaults_learn_two_moons_no_slower_than_sgd_with_momentum(build, lr):
    assert loss_after(lambda p: build(p, lr)) < loss_after(lambda p: torch.optim.SGD(p, lr, momentum=0.9))
