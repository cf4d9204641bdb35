"""A gradient beside the slope that it is of."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def assert_meta_gradient(model: nn.Module, ids: Tensor) -> None:
    """The gradient of a model with levels, at a matrix of its last block, along a random way: a central difference."""
    weight = model.model.layers[-1].mlp.up_proj.weight
    way = 1e-8 * torch.randn_like(weight)

    def loss() -> Tensor:
        logits = model(ids).logits[:, :-1]  # of a sum in float64; the model's own is in float32
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    (grad,) = torch.autograd.grad(loss(), weight)
    ends = []
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * way
            ends.append(loss())
    torch.testing.assert_close((grad * way).sum(), (ends[0] - ends[1]) / 2, rtol=1e-4, atol=0.0)
