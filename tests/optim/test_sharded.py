"""Optimisers on parameters that FSDP2 shards unevenly over two processes: the weights of one process."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from nestling.optim import M3, DeepMomentum, DeltaMomentum, PreconditionedMomentum

ASKED = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="processes: NESTLING_SLOW_TESTS=1 runs it")
OPTIMIZERS = {
    "M3": lambda model: M3(model, 0.05, periods=(1, 2), weight_decay=0.1),
    "M3, single": lambda model: M3(model, 0.05, periods=(1, 2), foreach=False),
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


def worker(rank, world, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    try:
        for name, build in OPTIMIZERS.items():
            plain = Net().double()
            models = [Net().double() for _ in range(2)]
            for model in models:
                fully_shard(model, mesh=mesh)
            optimizer, reference = build(models[0]), build(plain)
            drive(models[0], optimizer, range(3))
            saved = get_optimizer_state_dict(models[0], optimizer)
            models[1].load_state_dict(models[0].state_dict())
            resumed = build(models[1])
            set_optimizer_state_dict(models[1], resumed, saved)
            drive(models[1], resumed, range(3, 5))
            drive(plain, reference, range(5))
            for (key, a), b in zip(models[1].named_parameters(), plain.parameters()):
                error = (a.full_tensor() - b).abs().max().item()
                assert error < 1e-10, (name, key, error)
    finally:
        dist.destroy_process_group()


@ASKED
@pytest.mark.parametrize("world", [2, 3])
def test_sharded_training_is_that_of_one_process(tmp_path, world):
    mp.spawn(worker, (world, tmp_path / "store"), nprocs=world)
