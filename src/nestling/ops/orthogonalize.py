"""The nearest matrix with orthonormal rows or columns, by Newton-Schulz iteration: what Muon does to a gradient.

One step is X <- (a I + b R + c R^2) X with R = X X^T, an odd polynomial a s + b s^3 + c s^5 of every singular value s.
All the factors are polynomials of the first R and commute. So several steps can run on the small matrix R alone and be
applied to X at once, which is the Gram form:

    P = a I + b R + c R^2,   Q <- P Q,   R <- P R P   (k times from Q = I, R = X X^T),   then X <- Q X.

With m the smaller and n the larger side, k steps cost 2 m^2 n + (4 k - 3) m^3 multiply-adds, against k (2 m^2 n + m^3):
less where n > 1.5 m. But rounding in R grows by a^2 per step in the directions where X is small, so R is formed anew
from X before that growth reaches `GROWTH` (at k = 1 the two forms are the same arithmetic, so nothing is lost).

Where the singular values of the matrix go, once it is divided by its Frobenius norm; none ever goes higher:

    coefficients     steps  from above  into
    muon             5      2e-3        0.68 .. 1.21
    polar_express_4  4      4e-3        0.84 .. 1.14
    polar_express    5      1e-3        0.84 .. 1.13
    polar_express    8      1e-3        0.99 .. 1.01
    cubic            15     2e-3        0.72 .. 1.01

Smaller ones are multiplied by the product of the a's, 485 for Muon's five steps. The error of five steps of "muon" or
"polar_express" to float64, relative, in the Frobenius norm, for condition numbers up to 1e6 is at most

    type      plain  gram
    float32   5e-5   3e-3
    float16   6e-2   6e-2
    bfloat16  4e-1   4e-1

It lies in the directions that are multiplied most: for condition numbers up to 10, bfloat16's is below 3e-2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Triple = tuple[float, float, float]

# Optimal compositions: the longer for singular values in [1e-3, 1], the other for [4e-3, 1] in four steps. All but the
# last polynomial of each overshoot, so these get a safety factor: rounding may take a value beyond 1.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_POLAR_EXPRESS_4 = (
    (8.185466062991017, -23.30618884920107, 17.08798241353668),
    (3.956343676205408, -2.910707070011722, 0.5514354338077003),
    (3.344840765312563, -2.5081533429526726, 0.5122767267058385),
    (2.32405773040722, -1.6898267113027345, 0.4210712462028746),
)
SAFETY = 1.01


def _safe(triples: Sequence[Triple]) -> tuple[Triple, ...]:
    """p(s / SAFETY) for every polynomial p but the last."""
    return (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in triples[:-1]), triples[-1])


# One triple per step; the last is repeated.
COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    "muon": ((3.4445, -4.7750, 2.0315),),
    "polar_express": _safe(_POLAR_EXPRESS),
    "polar_express_4": _safe(_POLAR_EXPRESS_4),
    "cubic": ((1.5, -0.5, 0.0),),
}
FORMS = ("auto", "plain", "gram")
GROWTH = 0.03  # of a rounding error in R before R is formed anew
BLOCKS = 4  # row blocks a symmetric product is cut into on a CPU, each of at least 64 rows
CACHE = 2**20  # elements of the matrices that go through all steps together on a CPU


def table(coefficients: str | Triple | Sequence[Triple], steps: int) -> list[Triple]:
    """The (a, b, c) of each step: a name of `COEFFICIENTS`, one triple, or one triple per step (the last repeated)."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, not {steps!r}")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients must be one of {', '.join(COEFFICIENTS)} or triples, not {coefficients!r}")
        triples = COEFFICIENTS[coefficients]
    else:
        triples = tuple(coefficients)
        if len(triples) == 3 and all(isinstance(value, (int, float)) for value in triples):
            triples = (triples,)
        if not triples or not all(isinstance(t, Sequence) and len(t) == 3 for t in triples):
            raise ValueError(f"coefficients must be a name, a triple or a sequence of triples, not {coefficients!r}")
    return [tuple(triples[min(step, len(triples) - 1)]) for step in range(steps)]


def orthogonalize(
    matrix: Tensor,
    steps: int = 5,
    *,
    coefficients: str | Triple | Sequence[Triple] = "muon",
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: str = "auto",
) -> Tensor:
    """Push all singular values of a matrix towards 1 and keep its singular vectors (`NL Eq. 42-44`).

    Args:
        matrix (Tensor): `[..., m, n]`, any aspect ratio; the iteration runs on the smaller side. A zero matrix stays
            zero, an empty one empty; one that holds NaN or infinity becomes NaN, alone in its batch. Entries whose
            squares overflow their type (at least float32) give zero.
        steps (int): iterations.
        coefficients: a name of `COEFFICIENTS`, a triple (a, b, c), or one triple per step.
        eps (float): floor of the Frobenius norm the matrix is divided by first.
        dtype: the type the iteration runs in; None takes bfloat16 on accelerators, where it is fast, and the matrix's
            own type (at least float32) on a CPU, where bfloat16 products are slow.
        form: "plain", "gram", or "auto": the cheaper one at the accuracy of the type.

    Returns:
        Tensor: `[..., m, n]` in the type of `matrix`.

    Raises:
        ValueError: fewer than two dimensions, no steps, an unknown name.  TypeError: not floating point.
    """
    triples = _check(matrix, steps, coefficients, form)
    if matrix.numel() == 0:
        return matrix.clone()
    if dtype is None:
        dtype = torch.promote_types(matrix.dtype, torch.float32) if matrix.device.type == "cpu" else torch.bfloat16
    if hasattr(matrix, "full_tensor"):
        return _sharded(matrix, steps, coefficients=coefficients, eps=eps, dtype=dtype, form=form)
    if matrix.requires_grad and torch.is_grad_enabled():  # the loop below writes in place
        return orthogonalize_reference(matrix.to(dtype), steps, coefficients=coefficients, eps=eps).to(matrix.dtype)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = (matrix.mT if tall else matrix).reshape(-1, *sorted(matrix.shape[-2:]))
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    batch = max(1, CACHE // x[0].numel()) if x.device.type == "cpu" else x.shape[0]
    cut = segments(triples, x.shape[-2], x.shape[-1], dtype, form)
    work = _Workspace(out[:batch])
    for part, place in zip(x.split(batch), out.split(batch)):
        now, then = (place, work.wide[: len(part)])[:: 1 if len(cut) % 2 == 0 else -1]  # the last step ends in `place`
        torch.mul(part, 1 / _norm(part).clamp(min=eps), out=now)
        for steps_of_one_gram in cut:
            work.apply(steps_of_one_gram, now, then)
            now, then = then, now
    out = out.to(matrix.dtype).view(*matrix.shape[:-2], *x.shape[-2:])
    return out.mT if tall else out


def orthogonalize_reference(
    matrix: Tensor,
    steps: int = 5,
    *,
    coefficients: str | Triple | Sequence[Triple] = "muon",
    eps: float = 1e-7,
) -> Tensor:
    """The definition of `orthogonalize`, in the matrix's own type: X <- a X + (b A + c A^2) X with A = X X^T."""
    x = (matrix / _norm(matrix).clamp(min=eps)).to(matrix.dtype)
    for a, b, c in _check(matrix, steps, coefficients, "plain"):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def segments(triples: Sequence[Triple], rows: int, columns: int, dtype: torch.dtype, form: str = "auto") -> list[list]:
    """Steps that share one Gram matrix: single steps (the plain form), or as many as the rounding of `dtype` allows."""
    if form == "plain" or (form == "auto" and columns <= 1.5 * rows):
        return [[triple] for triple in triples]
    cut: list[list[Triple]] = []
    growth = math.inf
    for triple in triples:
        if growth > GROWTH:
            cut.append([])
            growth = torch.finfo(dtype).eps
        cut[-1].append(triple)
        growth *= triple[0] ** 2
    return cut


def multiply_adds(
    steps: int, rows: int, columns: int, *, coefficients="muon", dtype=torch.float32, form="auto", cut=False
) -> float:
    """Multiply-adds of one matrix; `cut`: with symmetric products in row blocks, as on a CPU."""
    m, n = sorted((rows, columns))
    saved = (BLOCKS + 1) / (2 * BLOCKS) if cut and m >= 64 * BLOCKS else 1.0
    parts = segments(table(coefficients, steps), m, n, dtype, form)
    return sum(m * m * n + saved * (m * m * n + (4 * len(part) - 3) * m**3) for part in parts)


def _check(matrix: Tensor, steps: int, coefficients, form: str) -> list[Triple]:
    if matrix.ndim < 2:
        raise ValueError(f"matrix must be [..., m, n], not of shape {list(matrix.shape)}")
    if not matrix.is_floating_point():
        raise TypeError(f"matrix must be real floating point, not {matrix.dtype}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
    return table(coefficients, steps)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norms [..., 1, 1], at least in float32."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))


def _sharded(matrix: Any, steps: int, **options) -> Tensor:
    """A DTensor: every rank orthogonalises the whole matrix and keeps its part."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = matrix.device_mesh
    whole = orthogonalize(matrix.full_tensor(), steps, **options)
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=matrix.placements)


class _Workspace:
    """Buffers for matrices x [B, m, n], m <= n, so that no product allocates."""

    def __init__(self, x: Tensor) -> None:
        batch, m, _ = x.shape
        self.wide = torch.empty_like(x)
        self.square = list(x.new_empty(6, batch, m, m))

    def apply(self, triples: list[Triple], x: Tensor, out: Tensor) -> None:
        """Some steps on one Gram matrix; the last of them needs no new R."""
        buffers = self.square if len(x) == len(self.wide) else [buffer[: len(x)] for buffer in self.square]
        r, step, half, next_r, q, next_q = buffers
        _symmetric(r, x, x.mT)
        if len(triples) == 1:  # a X + (P - a I) X
            [(a, b, c)] = triples
            _symmetric(step, r, r, r, b, c)
            torch.baddbmm(x, step, x, beta=a, out=out)
            return
        for i, (a, b, c) in enumerate(triples):
            _symmetric(step, r, r, r, b, c)  # P - a I = b R + c R^2
            if i == 0:
                q.copy_(step)
                q.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                _symmetric(next_q, step, q, q, a)
                q, next_q = next_q, q
            if i < len(triples) - 1:
                _symmetric(half, step, r, r, a)  # P R
                _symmetric(next_r, half, step, half, a)  # P R P
                r, next_r = next_r, r
        torch.bmm(q, x, out=out)


def _symmetric(out: Tensor, left: Tensor, right: Tensor, plus: Tensor | None = None, beta=0.0, alpha=1.0) -> None:
    """out = beta plus + alpha left right, [B, m, m], where that is known to be symmetric; out is none of the others.

    On a CPU only the row blocks up to the diagonal are computed, 5/8 of the work, and the rest is mirrored. On an
    accelerator, and under the compiler, one product is faster.
    """
    size = out.shape[-1]
    if size < 64 * BLOCKS or out.device.type != "cpu" or torch.compiler.is_compiling():
        _product(out, left, right, plus, beta, alpha)
        return
    edges = [size * i // BLOCKS for i in range(BLOCKS + 1)]
    for start, stop in zip(edges, edges[1:]):
        addend = None if plus is None else plus[:, start:stop, :stop]
        _product(out[:, start:stop, :stop], left[:, start:stop], right[:, :, :stop], addend, beta, alpha)
        out[:, :start, start:stop].copy_(out[:, start:stop, :start].mT)


def _product(out: Tensor, left: Tensor, right: Tensor, plus: Tensor | None, beta: float, alpha: float) -> None:
    if plus is None:
        torch.bmm(left, right, out=out)
    else:
        torch.baddbmm(plus, left, right, beta=beta, alpha=alpha, out=out)
