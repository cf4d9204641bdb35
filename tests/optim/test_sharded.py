"""Optimisers on parameters that FSDP2 shards unevenly over two processes: the weights of one process."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from nestling.optim import M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum
from nestling.optim.division import make_plan
from processes import on_ranks
from slowly import ASKED

SLOWLY = pytest.mark.skipif(not ASKED, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
OPTIMIZERS = {
    "M3": lambda model: M3(model, 0.05, periods=(1, 2), weight_decay=0.1),
    "M3, single": lambda model: M3(model, 0.05, periods=(1, 2), foreach=False),
    "M3, literal, in rows": lambda model: M3(
        model.named_parameters(), 0.01, periods=(1, 2), accumulation="sum", rms_match=False, split={"last": [2, 5]}
    ),
    "M3, in columns": lambda model: M3(
        model.named_parameters(), 0.05, periods=(1,), second_moment=False, split={"even": ("columns", 2)}
    ),
    "M3, flat": lambda model: M3([{"params": list(model.named_parameters()), "view": "flatten"}], 0.05, periods=(1, 2)),
    "delta": lambda model: DeltaMomentum(model.parameters(), 0.05, weight_decay=0.1),
    "deep": lambda model: DeepMomentum(model.parameters(), 0.05, hidden=3),
    "outer": lambda model: PreconditionedMomentum(model.parameters(), 0.05, preconditioner="outer"),
}


class Net(nn.Module):
    """Parameters of 3, 5 and 7 rows; three 4 x 4 matrices of two heads, as a memory's initial states are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(8, 7)
        self.initial = nn.Parameter(torch.randn(3, 2, 4, 4))
        self.even = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        x = torch.tanh(self.first(x))[:, :4]
        return self.last(torch.einsum("bi,nhij->bj", x, self.initial) @ self.even)


def drive(model, optimizer, steps):
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def check(names):
    """On every rank: each optimiser on sharded parameters, saved and resumed, and where it divides its work, on whole
    ones too, has the weights of one process."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for name in names:
        plain = Net().double()
        models = [Net().double() for _ in range(2)]
        for model in models:
            fully_shard(model, mesh=mesh)
        build = OPTIMIZERS[name]
        optimizer, reference = build(models[0]), build(plain)
        drive(models[0], optimizer, range(3))
        saved = get_optimizer_state_dict(models[0], optimizer)
        models[1].load_state_dict(models[0].state_dict())
        resumed = build(models[1])
        set_optimizer_state_dict(models[1], resumed, saved)
        drive(models[1], resumed, range(3, 5))
        drive(plain, reference, range(5))
        found = {"sharded": [p.full_tensor() for p in models[1].parameters()]}
        if isinstance(reference, M3):
            whole = Net().double()
            shared = build(whole)
            shared._ranks = dist.group.WORLD
            drive(whole, shared, range(5))
            found["whole"] = list(whole.parameters())
        for kind, values in found.items():
            for (key, a), b in zip(plain.named_parameters(), values):
                error = (a - b).abs().max().item()
                assert error < 1e-10, (name, kind, key, error)


def test_sharded_training_is_that_of_one_process():
    on_ranks(2, check, list(OPTIMIZERS) if ASKED else ["M3", "M3, literal, in rows", "M3, in columns", "delta"])


@SLOWLY
@pytest.mark.parametrize("world", [3, 4, 8])  # of 8 ranks some hold nothing
def test_on_more_processes(world):
    on_ranks(world, check, list(OPTIMIZERS))


class Counted(TorchDispatchMode):
    """Multiply-adds of matrix products."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        products = {torch.ops.aten.bmm.out: (0, 1), torch.ops.aten.baddbmm.out: (1, 2)}
        if function in products:
            left, right = (args[i] for i in products[function])
            self.total += left.numel() * right.shape[-1]
        return out


def count(path):
    """On every rank: the multiply-adds of a step, divided and not."""
    counts = []
    for ranks in (None, dist.group.WORLD):
        torch.manual_seed(0)
        layers = [nn.Linear(m, n) for m, n in [(16, 64), (64, 16), (16, 16)] * 8]
        optimizer = M3([p for layer in layers for p in layer.parameters()], 0.01, periods=(1, 2), process_group=ranks)
        for _ in range(2):
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.randn(p.shape)
            with Counted() as counted:
                optimizer.step()
        counts.append(counted.total)
    Path(path, str(dist.get_rank())).write_text(json.dumps(counts))


@pytest.mark.filterwarnings("ignore:M3 got parameters without names")
def test_four_ranks_do_a_quarter_each(tmp_path):
    on_ranks(4, count, tmp_path)
    alone, divided = zip(*(json.loads(file.read_text()) for file in tmp_path.iterdir()))
    assert len(set(alone)) == 1
    assert sum(divided) == alone[0]
    assert max(divided) <= 0.3 * alone[0]


def test_a_matrix_has_one_owner_and_every_part_of_it_arrives():
    requests = ((3, torch.Size([5, 4]), (1, 5, 4), 2.0), (2, torch.Size([3, 2, 4, 4]), (6, 4, 4), 1.0))
    for ranks in (1, 2, 4, 7):
        plans = [make_plan(requests, rank, ranks, True) for rank in range(ranks)]
        assert [sum(plan.owned[i] for plan in plans) for i in range(2)] == [3, 12]
        assert plans[0].work == [2.0 * plan.owned[0] + plan.owned[1] for plan in plans]
        assert max(plans[0].work) - min(plans[0].work) <= 2
        for a in range(ranks):
            for b in range(ranks):
                sizes = [[p.stop - p.start for p in side] for side in (plans[a].held[b], plans[b].gathered[a])]
                assert sizes[0] == sizes[1]
