"""Memories of gradients that have a closed form: what Adam and AdaGrad are the solution of (NL App. B, Eqs. 101-111).

Both functions minimise an L2 objective over everything the memory has seen; with running averages in place of the sums
the element-wise one is Adam's direction (P = sqrt(H)) or momentum's (P = H), and the outer-product one that of
full-matrix AdaGrad and one-sided Shampoo (P = H^(1/2)). `optim.preconditioners` uses them online.
"""

from __future__ import annotations

import torch
from torch import Tensor


def elementwise_memory(gradients: Tensor, squares: Tensor, values: Tensor, ridge: float = 0.0) -> Tensor:
    """m* = (H + ridge)^-1 M P, all element by element: the minimiser of sum_t |m g_t - P|^2 + ridge |m|^2.

    Args:
        gradients: M, the sum of the gradients g_t.  squares: H, the sum of their squares.  values: P.
        ridge: of the penalty; where H + ridge is 0 nothing was seen, and the memory is 0.

    NL Eqs. 101-105.
    """
    seen = squares + ridge
    return torch.where(seen > 0, gradients * values / seen.clamp(min=torch.finfo(seen.dtype).tiny), 0.0)


def outer_memory(gradients: Tensor, gram: Tensor, values: Tensor, ridge: float = 0.0) -> Tensor:
    """m* = M P (H + ridge I)^-1: the minimiser of sum_t 1/2 |m g_t^T|^2 - <m, g_t P> + ridge/2 |m|^2.

    Args:
        gradients: M [o, n], the sum of the gradients g_t, whose rows are the keys.
        gram: H [n, n], the sum of g_t^T g_t.  values: P [n, n].  ridge: of the penalty; H + ridge I must be invertible.

    NL Eqs. 106-111.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * eye, gradients @ values, left=False)


def matrix_power(matrix: Tensor, power: float, eps: float = 0.0) -> Tensor:
    """A power of a symmetric positive semi-definite matrix; eigenvalues below eps times the largest count as that."""
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    floor = eps * eigenvalues[..., -1:] + torch.finfo(matrix.dtype).tiny
    return (vectors * eigenvalues.clamp(min=floor).pow(power).unsqueeze(-2)) @ vectors.mT
