"""The nearest matrix with orthonormal rows or columns, by Newton-Schulz iteration: what Muon does to a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrix: Tensor,
    steps: int = 5,
    *,
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Push all singular values of a matrix towards 1: X <- a X + (b A + c A^2) X with A = X X^T.

    Args:
        matrix (Tensor): `[..., m, n]`, any aspect ratio; the iteration runs on the smaller side.
        steps (int): iterations.
        coefficients: a, b, c of the quintic; Muon's leave singular values between about 0.7 and 1.2.
        eps (float): floor of the Frobenius norm the matrix is divided by first.
        dtype: the type the iteration runs in; None takes bfloat16 on accelerators, where it is fast, and the matrix's
            own type (at least float32) on a CPU, where bfloat16 products are slow.

    Returns:
        Tensor: `[..., m, n]` in the type of `matrix`.

    Raises:
        ValueError: fewer than two dimensions, or no steps.
    """
    if matrix.ndim < 2:
        raise ValueError(f"matrix must be [..., m, n], not of shape {list(matrix.shape)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    a, b, c = coefficients
    if dtype is None:
        dtype = torch.promote_types(matrix.dtype, torch.float32) if matrix.device.type == "cpu" else torch.bfloat16
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
