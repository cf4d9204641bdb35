"""Delta Gradient Descent for any network of linear and convolutional layers (NL Eqs. 56, 57; decisions D1, D14)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.optim.checks import check_number, scalar
from nestling.optim.layer_inputs import Sums, pack, unpack
from nestling.optim.layerwise import LayerwiseOptimizer
from nestling.optim.memories import GradientMemory


class DGD(LayerwiseOptimizer):
    """Gradient descent whose inner objective is L2 regression: a layer forgets what it answers before it learns.

    For a layer y = W x and the error signal u = -dL/dy, one sample gives the exact minimiser of NL Eq. 56,

        W+ = argmin_W erase/2 |W x|^2 - <W x, u> + 1/(2 lr) |W - W_t|^2       (erase = 1: 1/2 |W x - u|^2)
           = W_t (I - erase e x x^T) - e (dL/dy) x^T,    e = lr / (1 + lr erase |x|^2)

    and a batch, with C the mean of x x^T over its positions (samples, tokens, patches) and G the gradient,

        W+ = W_t - e (erase W_t C + G),               e = lr / (1 + lr erase mean |x|^2)      exact=False
        W+ = (W_t - lr G) (I + lr erase C)^-1                                                 exact=True

    The eigenvalues of the first form's decay, erase e C, lie in [0, 1) for any batch and any lr; it costs one product
    of the weight gradient's size for each layer. The second is the exact minimiser of the batch's mean objective, at
    the cost of C and a solve, both for the inputs' width. A bias is learned as the weight of one more input, 1.

    It does not end in a minimum of the loss: on least squares W comes to 1 / (1 + erase) of the solution, so as an
    ordinary optimiser it wants a small `erase`. What hooks see, and when, says `LayerwiseOptimizer`. The loss should
    be a mean, as C is.

    Args:
        model: the network; its parameters that require gradients are optimised.
        lr: eta, a number or a tensor of one.
        momentum: decay of a sum of steps, in [0, 1); 0 keeps no state.
        weight_decay: decoupled.
        erase: weight of the regression; 1 is the paper's, 0 is gradient descent.
        exact: solve for a batch's minimiser.
        params: parameter groups, if not all of the model's parameters as one.
        nonfinite: as for `MemoryOptimizer`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr=1e-1,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        erase: float = 1.0,
        exact: bool = False,
        params=None,
        nonfinite: str = "skip",
    ):
        self._exact = exact
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, erase=erase)
        self._attach(model, params, defaults, nonfinite, gram=exact)

    def memory(self, group):
        check_number("erase", group["erase"])
        return GradientMemory(decay=group["momentum"])

    def slope(self, parameter, weight, seen, group):
        erase, lr = group["erase"], scalar(group["lr"])
        if not erase:
            return parameter.grad
        if not self._exact:
            sums = seen.products if weight is parameter else seen.outputs
            slope = sums.mul_(erase / seen.count).add_(parameter.grad)  # in place: sums are used once
            return slope.div_(1 + lr * erase * seen.norms.max() / seen.count)
        if parameter not in self._solved:
            self._solved |= self._solve(weight, seen, lr, erase / seen.count)
        return self._solved.pop(parameter)

    def _solve(self, weight: Tensor, seen: Sums, lr: float | Tensor, scale: float) -> dict[Tensor, Tensor]:
        """(erase V C + G) (I + lr erase C)^-1 for V = [W b], by parameter."""
        bias = None if seen.outputs is None else self._inputs.biases[weight]
        flip = weight in self._inputs.transposed
        offset = None if bias is None else torch.add(bias.grad, seen.outputs, alpha=scale)
        rows = pack(torch.add(weight.grad, seen.products, alpha=scale), offset, len(seen.gram), flip)
        system = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device) + lr * scale * seen.gram
        rows = torch.cholesky_solve(rows.mT, torch.linalg.cholesky(system)).mT
        return unpack(rows, weight, bias, flip)
