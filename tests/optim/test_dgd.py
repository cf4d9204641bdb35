import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from nestling.optim import DGD

LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear, no bias, tokens": (lambda: nn.Linear(5, 3, bias=False), (2, 4, 5)),
    "conv1d, no batch": (lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (4, 9)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 7)),
    "conv2d, circular": (lambda: nn.Conv2d(2, 3, (3, 2), padding=1, padding_mode="circular", bias=False), (2, 2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 3, 4, 3)),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture(params=LAYERS)
def layer(request):
    build, shape = LAYERS[request.param]
    return build(), torch.randn(shape)


def mean_loss(layer, x, signal=None):
    """A loss whose gradient at the output is `signal`, as a mean over positions; and the output."""
    y = layer(x)
    signal = torch.randn_like(y) if signal is None else signal
    positions = y.numel() // layer.weight.shape[0]
    return (y * signal).sum() / positions, y, signal, positions


def step(optimizer, layer, x):
    optimizer.zero_grad()
    loss, _, signal, positions = mean_loss(layer, x)
    loss.backward()
    optimizer.step()
    return signal, positions


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_one_sample_through_one_layer_is_decision_d1_and_the_minimiser_of_equation_56(exact, size):
    layer, x, delta, lr = nn.Linear(5, 3, bias=False), size * torch.randn(1, 5), torch.randn(1, 3), 0.7
    start = layer.weight.detach().clone()
    optimizer = DGD(layer, lr, exact=exact)
    (layer(x) * delta).sum().backward()
    optimizer.step()
    e = lr / (1 + lr * x.square().sum())
    assert torch.allclose(layer.weight, start @ (torch.eye(5) - e * x.T @ x) - e * delta.T @ x, atol=1e-13)
    solved = torch.linalg.solve(torch.eye(5) + lr * x.T @ x, (start - lr * delta.T @ x).T).T
    assert torch.allclose(layer.weight, solved, atol=1e-13)
    objective = 0.5 * (layer(x) + delta).square().sum() + (layer.weight - start).square().sum() / (2 * lr)
    assert torch.autograd.grad(objective, layer.weight)[0].abs().max() < 1e-11 * max(1, size**2)


@pytest.mark.parametrize("erase", [1.0, 0.2])
def test_the_exact_step_minimises_the_objective_of_a_batch(layer, erase):
    layer, x = layer
    start = [p.detach().clone() for p in layer.parameters()]
    signal, positions = step(DGD(layer, 0.3, erase=erase, exact=True), layer, x)
    y = layer(x)
    objective = (erase / 2 * y.square() + y * signal).sum() / positions
    objective += sum((p - q).square().sum() for p, q in zip(layer.parameters(), start)) / (2 * 0.3)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(objective, list(layer.parameters())))


def test_the_averaged_step_is_one_rate_over_the_slope_of_that_objective(layer):
    """erase W C + G by autograd; the rate from the mean squared norm of the inputs, found as squares of gradients."""
    layer, x = layer
    start = {name: p.detach().clone() for name, p in layer.named_parameters()}
    loss, y, signal, positions = mean_loss(layer, x)
    objective = (y.square() / 2 + y * signal).sum() / positions
    slopes = dict(zip(start, torch.autograd.grad(objective, list(layer.parameters()), retain_graph=True)))
    groups = getattr(layer, "groups", 1)
    norms = torch.zeros(groups)
    for value, group in zip(y.flatten(), _groups(layer, y)):
        row = torch.autograd.grad(value, list(layer.parameters()), retain_graph=True)
        norms[group] += sum(g.square().sum() for g in row) / (layer.weight.shape[0] // groups)
    optimizer = DGD(layer, 0.3)
    loss, *_ = mean_loss(layer, x, signal)
    loss.backward()
    optimizer.step()
    e = 0.3 / (1 + 0.3 * norms.max() / positions)
    for name, p in layer.named_parameters():
        assert torch.allclose(p, start[name] - e * slopes[name], atol=1e-12)


def _groups(layer, y):
    """The channel group of each entry of y."""
    if isinstance(layer, nn.Linear):
        return [0] * y.numel()
    channels = y.dim() - len(layer.kernel_size) - 1
    size = layer.weight.shape[0] // layer.groups
    index = torch.arange(layer.weight.shape[0]) // size
    return index.view(*[1] * channels, -1, *[1] * len(layer.kernel_size)).expand(y.shape).flatten().tolist()


def test_without_erasure_it_is_sgd():
    a = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(8, 3))
    b = copy.deepcopy(a)
    ours, theirs = DGD(a, 0.1, 0.9, erase=0.0), torch.optim.SGD(b.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        x = torch.randn(5, 2, 4)
        for model, optimizer in ((a, ours), (b, theirs)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("exact", [False, True])
def test_the_decay_never_expands(exact):
    """Without an error signal a layer only forgets, whatever batch and rate."""
    for lr in (1e-3, 1.0, 1e4):
        layer = nn.Linear(6, 4, bias=False)
        optimizer = DGD(layer, lr, exact=exact)
        for size in (1e-3, 1.0, 100.0):
            before = torch.linalg.matrix_norm(layer.weight.detach(), 2)
            optimizer.zero_grad()
            (0.0 * layer(size * torch.randn(9, 6))).sum().backward()
            optimizer.step()
            assert torch.linalg.matrix_norm(layer.weight.detach(), 2) <= before * (1 + 1e-12)


@pytest.mark.parametrize("erase", [1.0, 0.25])
def test_on_least_squares_it_ends_at_the_solution_over_one_plus_erase(erase):
    layer, x, solution = nn.Linear(4, 2, bias=False), torch.randn(50, 4), torch.randn(2, 4)
    optimizer = DGD(layer, 1.0, erase=erase, exact=True)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (layer(x) - x @ solution.T).square()).sum(1).mean().backward()
        optimizer.step()
    assert torch.allclose(layer.weight, solution / (1 + erase), atol=1e-6)


def grown(layer, optimizer, x, signal, pieces, forward=None):
    """The weights after one step on x, its backward pass taken in pieces."""
    optimizer.zero_grad()
    for part, s in zip(x.chunk(pieces), signal.chunk(pieces)):
        ((forward or layer)(part) * s).sum().div(len(x)).backward()
    optimizer.step()
    return layer.weight.detach().clone()


@pytest.mark.parametrize("exact", [False, True])
def test_several_backward_passes_before_a_step_are_one_batch(exact):
    x, signal = torch.randn(6, 5), torch.randn(6, 3)
    layers = [nn.Linear(5, 3)]
    layers.append(copy.deepcopy(layers[0]))
    results = [grown(m, DGD(m, 0.3, exact=exact), x, signal, n) for m, n in zip(layers, (1, 3))]
    assert torch.allclose(*results)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_counts_once(reentrant):
    x, signal = torch.randn(6, 5, requires_grad=True), torch.randn(6, 3)
    layers = [nn.Linear(5, 3)]
    layers.append(copy.deepcopy(layers[0]))
    plain = grown(layers[0], DGD(layers[0], 0.3), x, signal, 1)
    forward = lambda part: checkpoint(layers[1], part, use_reentrant=reentrant)  # noqa: E731
    assert torch.allclose(plain, grown(layers[1], DGD(layers[1], 0.3), x, signal, 1, forward))


def test_a_layer_called_twice_and_a_shared_weight_see_both_inputs():
    x, signal = torch.randn(8, 5), torch.randn(8, 5)
    once, twice, tied = (nn.Linear(5, 5) for _ in range(3))
    twice.load_state_dict(once.state_dict())
    tied.load_state_dict(once.state_dict())
    other = nn.Linear(5, 5)
    other.weight, other.bias = tied.weight, tied.bias
    pair = nn.ModuleList([tied, other])
    expected = grown(once, DGD(once, 0.3), x, signal, 1)
    for model, weight, calls in ((twice, twice.weight, (twice, twice)), (pair, tied.weight, (tied, other))):
        optimizer = DGD(model, 0.3)
        y = torch.cat([call(part) for call, part in zip(calls, x.chunk(2))])
        ((y * signal).sum() / 8).backward()
        optimizer.step()
        assert torch.allclose(weight, expected)


def test_an_activation_in_place_does_not_disturb_what_was_seen():
    a = nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    b = copy.deepcopy(a)
    b[1].inplace = False
    x = torch.randn(7, 5)
    for model in (a, b):
        optimizer = DGD(model, 0.3)
        model(x).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_passes_without_a_backward_pass_leave_no_trace():
    layer, x, signal = nn.Linear(5, 3), torch.randn(6, 5), torch.randn(6, 3)
    other = copy.deepcopy(layer)
    expected = grown(layer, DGD(layer, 0.3), x, signal, 1)
    optimizer = DGD(other, 0.3)
    other(torch.randn(4, 5))
    with torch.no_grad():
        other(torch.randn(4, 5))
    (other(x) * signal).sum().div(6).backward()
    other(torch.randn(4, 5))
    optimizer.step()
    assert torch.equal(other.weight, expected)


def test_what_is_not_seen_takes_plain_gradient_descent():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)
            self.free = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.head(self.norm(self.embed(x)) * self.free)

    model = Net()
    optimizer = DGD(model, 0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randint(9, (3, 5))).square().mean().backward()
    optimizer.step()
    plain = {name: torch.allclose(p, before[name] - 0.1 * p.grad) for name, p in model.named_parameters()}
    assert not plain.pop("head.weight")
    assert not plain.pop("head.bias")
    assert all(plain.values())


def test_frozen_parameters_stay_and_a_frozen_bias_is_no_input():
    layer, x, signal = nn.Linear(5, 3), torch.randn(1, 5), torch.randn(1, 3)
    layer.bias.requires_grad_(False)
    start, bias = layer.weight.detach().clone(), layer.bias.clone()
    for exact in (False, True):
        layer.load_state_dict({"weight": start, "bias": bias})
        got = grown(layer, DGD(layer, 0.3, exact=exact), x, signal, 1)
        e = 0.3 / (1 + 0.3 * x.square().sum())
        assert torch.allclose(got, start - e * (start @ x[0] + bias + signal[0]).outer(x[0]))
    assert torch.equal(layer.bias, bias)


def test_transformers_linear_layer_with_a_transposed_weight():
    for exact in (False, True):
        a, b = nn.Linear(5, 3), Conv1D(3, 5)
        b.load_state_dict({"weight": a.weight.detach().T, "bias": a.bias})
        x, signal = torch.randn(6, 5), torch.randn(6, 3)
        ours = grown(b, DGD(b, 0.3, exact=exact), x, signal, 1)
        assert torch.allclose(ours.T, grown(a, DGD(a, 0.3, exact=exact), x, signal, 1))


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(torch.bfloat16)
    optimizer, data = DGD(model, 0.1, 0.9, weight_decay=0.1), torch.randn(6, 7, 5).bfloat16()

    def train(model, optimizer, batches):
        for x in batches:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    train(model, optimizer, data[:3])
    twin = copy.deepcopy(model)
    resumed = DGD(twin, 0.5, 0.1)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, data[3:])
    train(twin, resumed, data[3:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


def test_a_gradient_that_is_no_number_is_skipped_with_its_inputs():
    layer, x, signal = nn.Linear(5, 3), torch.randn(6, 5), torch.randn(6, 3)
    other = copy.deepcopy(layer)
    expected = grown(layer, DGD(layer, 0.3), x, signal, 1)
    optimizer = DGD(other, 0.3)
    (other(x) * torch.nan).sum().backward()
    optimizer.step()
    assert torch.equal(grown(other, optimizer, x, signal, 1), expected)


def test_copies_and_pickles_of_the_model_carry_inert_hooks():
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    optimizer = DGD(model, 0.3)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x).sum().backward()
        assert not optimizer._inputs.sums
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_hooks_end_with_the_optimizer():
    model, x = nn.Linear(5, 3), torch.randn(4, 5)
    with DGD(model, 0.3) as optimizer:
        assert model._forward_hooks
    assert not model._forward_hooks
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
    forgotten = DGD(model, 0.3)
    del forgotten
    gc.collect()
    model(x).sum().backward()  # the hook is still there and does nothing


def test_closures_tensor_rates_and_parameter_groups():
    a = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    b, c, x = copy.deepcopy(a), copy.deepcopy(a), torch.randn(6, 5)

    def closure(model, optimizer):
        def evaluate():
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return evaluate

    plain, tensor = DGD(a, 0.2), DGD(b, torch.tensor(0.2))
    groups = DGD(c, 0.9, params=[{"params": c[0].parameters(), "lr": 0.2}, {"params": c[1].parameters(), "lr": 0.2}])
    for model, optimizer in ((a, plain), (b, tensor), (c, groups)):
        assert optimizer.step(closure(model, optimizer)) > 0
    for other in (b, c):
        assert all(torch.allclose(p, q) for p, q in zip(a.parameters(), other.parameters()))
    assert tensor.param_groups[0]["param_names"][0] == "0.weight"


def test_mixed_precision():
    torch.set_default_dtype(torch.float32)
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2)), torch.randn(6, 5)
    twin = copy.deepcopy(model)
    for m, context in ((model, torch.autocast("cpu", torch.bfloat16)), (twin, torch.autocast("cpu", enabled=False))):
        optimizer = DGD(m, 0.3)
        with context:
            loss = m(x).float().square().mean()
        loss.backward()
        optimizer.step()
    assert all(torch.allclose(p, q, atol=0.02) for p, q in zip(model.parameters(), twin.parameters()))


def test_a_compiled_model_and_step_are_seen():
    model, x, signal = nn.Linear(5, 3), torch.randn(6, 5), torch.randn(6, 3)
    twin = copy.deepcopy(model)
    expected = grown(model, DGD(model, 0.3), x, signal, 1)
    optimizer = DGD(twin, 0.3)
    forward, take = torch.compile(twin, backend="eager"), torch.compile(optimizer.step, backend="eager")
    (forward(x) * signal).sum().div(6).backward()
    take()
    assert torch.allclose(twin.weight, expected)


@pytest.mark.parametrize(
    "build, error, name",
    [
        (lambda: DGD(nn.Linear(2, 2).parameters(), 0.1), TypeError, "model"),
        (lambda: DGD(nn.Linear(2, 2), -0.1), ValueError, "lr"),
        (lambda: DGD(nn.Linear(2, 2), 0.1, 1.0), ValueError, "momentum"),
        (lambda: DGD(nn.Linear(2, 2), 0.1, erase=-1.0), ValueError, "erase"),
        (lambda: DGD(nn.ReLU(), 0.1), ValueError, "empty"),
    ],
)
def test_settings_out_of_range_are_named(build, error, name):
    with pytest.raises(error, match=name):
        build()


def test_exact_refuses_a_weight_under_two_biases():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    with pytest.raises(ValueError, match="share"):
        DGD(nn.ModuleList([a, b]), exact=True)
    DGD(nn.ModuleList([a, b]))
