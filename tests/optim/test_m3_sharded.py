"""M3 on parameters sharded by FSDP2 (one process here; its tensors are DTensors all the same)."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nestling.optim import M3

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch.distributed is not built")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 7))


def sharded(mesh):
    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def drive(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("foreach", [True, False])
def test_sharded_steps_are_the_whole_ones_and_their_state_is_kept(mesh, foreach):
    plain, model = network(), sharded(mesh)
    options = dict(lr=0.01, periods=(1, 2), weight_decay=0.1, foreach=foreach)
    reference, optimizer = M3(plain.parameters(), **options), M3(model.parameters(), **options)
    drive(plain, reference, 3)
    drive(model, optimizer, 3)
    for a, b in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(a.full_tensor(), b, atol=1e-5)
    saved = get_optimizer_state_dict(model, optimizer)
    other = sharded(mesh)
    other.load_state_dict(model.state_dict())
    resumed = M3(other.parameters(), **options)
    set_optimizer_state_dict(other, resumed, saved)
    drive(model, optimizer, 2, 3)
    drive(other, resumed, 2, 3)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a.full_tensor(), b.full_tensor())
