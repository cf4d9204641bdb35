"""How numbers lie in memory changes no step: every optimiser, every layout of weights, gradients and saved states."""

import pytest
import torch
from torch import nn

from nestling.optim import DGD, M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum
from nestling.optim.generalized import Loss, Retention
from nestling.optim.generalized_gd import GeneralizedGD
from nestling.optim.preconditioners import Diagonal
from nestling.training.muon import Muon

pytestmark = pytest.mark.filterwarnings("ignore:M3 got parameters without names")

SHAPES = [(6, 4), (3, 4, 6), (6, 4, 3, 3), (4, 3, 2, 2, 2), (5,)]


def same(x):
    return x


def permuted(x):
    """Dimensions in memory the other way round: a transposed matrix."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def channels_last(x):
    return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])


def sliced(x):
    """Every second number of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
    return wide[..., ::2].copy_(x)


def offset(x):
    """All but the first row of a larger tensor."""
    return torch.cat([torch.full_like(x[:1], torch.nan), x])[1:]


LAYOUTS = {
    "permuted": permuted,
    "channels_last": lambda x: channels_last(x) if x.ndim > 3 else x,
    "sliced": sliced,
    "offset": offset,
}
OPTIMIZERS = {
    "M3": lambda p, **o: M3(p, 0.05, periods=(1, 2), weight_decay=0.1, **o),
    "M3, sum": lambda p: M3(p, 0.05, periods=(1, 2), accumulation="sum", rms_match=False),
    "M3, split": lambda p: M3([(f"w{i}", x) for i, x in enumerate(p)], 0.05, periods=(1, 2), split={"w0": 2}),
    "M3, flatten": lambda p: M3([{"params": p, "view": "flatten"}], 0.05, periods=(1, 2)),
    "M3, single": lambda p: M3(p, 0.05, periods=(1, 2), weight_decay=0.1, foreach=False),
    "M3, adamw": lambda p: M3([{"params": p, "rule": "adamw"}], 0.05),
    "delta": lambda p: DeltaMomentum(p, 0.05, weight_decay=0.1, nesterov=True),
    "delta, diagonal": lambda p: DeltaMomentum(p, 0.05, form="raw", preconditioner=Diagonal()),
    "deep, l2": lambda p: DeepMomentum(p, 0.05, hidden=3, erase=0.5),
    "diagonal": lambda p: PreconditionedMomentum(p, 0.05),
    "outer": lambda p: PreconditionedMomentum(p, 0.05, preconditioner="outer"),
    "orthogonal": lambda p: PreconditionedMomentum(p, 0.05, preconditioner="orthogonal", nesterov=True),
    "Muon": lambda p: Muon([x for x in p if x.ndim == 2], 0.05),
}


def run(build, weights=same, gradients=same, state=same, expand=same, dtype=torch.float32):
    """Three steps, with the state saved and loaded after one; weights, gradients and states in the given layouts."""
    random = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(weights(torch.randn(s, generator=random, dtype=dtype))) for s in SHAPES]
    optimizer = build(parameters)
    for step in range(3):
        for p in parameters:
            p.grad = gradients(expand(torch.randn(p.shape, generator=random, dtype=dtype)))
        if step == 1:
            saved = optimizer.state_dict()
            for values in saved["state"].values():
                values.update({n: state(v) if v.ndim else v for n, v in values.items() if torch.is_tensor(v)})
            optimizer = build(parameters)
            optimizer.load_state_dict(saved)
        optimizer.step()
    return [p.detach() for p in parameters]


def worst(got, right):
    return max((a - b).abs().max().item() for a, b in zip(got, right))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layouts_of_weights_gradients_and_states(name):
    build = OPTIMIZERS[name]
    right = run(build)
    for layout, lay in LAYOUTS.items():
        assert worst(run(build, lay, lay, lay), right) < 1e-6, layout
    assert worst(run(build, weights=permuted), right) < 1e-6
    assert worst(run(build, gradients=permuted), right) < 1e-6
    assert worst(run(build, state=sliced), right) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_expanded_gradients(name):
    def expand(x):
        return x[..., :1].expand(x.shape)

    build = OPTIMIZERS[
        name
    ]  # such gradients are of rank 1, which "outer" inverts: only float64 tells rounding from faults
    right = run(build, expand=lambda x: expand(x).contiguous(), dtype=torch.float64)
    assert worst(run(build, expand=expand, dtype=torch.float64), right) < 1e-6


LAYERWISE = {
    "DGD": lambda model: DGD(model, 0.1, momentum=0.5, weight_decay=0.1),
    "DGD, exact": lambda model: DGD(model, 0.1, exact=True),
    "GeneralizedGD": lambda model: GeneralizedGD(model, 0.1, loss=Loss(0.5), retention=Retention((1.0, 2.0))),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERWISE)
def test_layouts_of_layers_and_their_inputs(name, bias):
    def train(lay):
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias), nn.Tanh(), nn.Conv2d(6, 4, 3, bias=bias),
            nn.Flatten(), nn.Linear(36, 5, bias=bias),
        )  # fmt: skip
        for p in model.parameters():
            p.data = lay(p.data)
        optimizer = LAYERWISE[name](model)
        for _ in range(3):
            optimizer.zero_grad()
            model(lay(torch.randn(3, 4, 5, 5))).square().mean().backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    right = train(same)
    for layout, lay in LAYOUTS.items():
        assert worst(train(lay), right) < 1e-6, layout
