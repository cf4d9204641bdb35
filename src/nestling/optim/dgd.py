"""Delta Gradient Descent for any network of linear and convolutional layers (NL Eqs. 56, 57; decisions D1, D14)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.optim.base import MemoryOptimizer, move
from nestling.optim.checks import check_number
from nestling.optim.layer_inputs import LayerInputs, Sums
from nestling.optim.memories import GradientMemory


class DGD(MemoryOptimizer):
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

    Inputs come from hooks on the model's layers (`optim.layer_inputs`), from passes that were followed by a backward
    pass; several of them before a step are averaged, as is a layer that is called twice. Parameters whose inputs are
    not seen (embeddings, norms, weights used by functions) take plain gradient descent with lr. The loss should be a
    mean: C is one. Sums are not part of `state_dict`, as gradients are not: save after a step. A copy or pickle of the
    model carries no live hooks; the optimiser itself is not copied, but made anew and given the state. One process.

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
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, whose layers' inputs DGD watches, not {type(model).__name__}"
            )
        params = [p for p in model.named_parameters() if p[1].requires_grad] if params is None else params
        self._exact, self._solved = exact, {}
        self._setup(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, erase=erase), nonfinite)
        ours = {p for group in self.param_groups for p in group["params"]}
        self._inputs = LayerInputs(model, ours, gram=exact)
        self._weights = {bias: weight for weight, bias in self._inputs.biases.items() if bias is not None}

    def memory(self, group):
        check_number("erase", group["erase"])
        return GradientMemory(decay=group["momentum"])

    def step(self, closure=None):
        """One step; what the layers saw before it is forgotten, whether it was taken or skipped."""
        if self._inputs.closed:
            raise RuntimeError("this DGD was closed and sees no inputs; make a new one and load its state_dict")
        try:
            return super().step(closure)
        finally:
            self._inputs.clear()
            self._solved.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and what the layers saw."""
        super().zero_grad(set_to_none)
        self._inputs.clear()

    def close(self) -> None:
        """Remove the hooks from the model. `with DGD(...) as optimizer:` does it at the end."""
        self._inputs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __getstate__(self):
        raise TypeError("a DGD hangs on its model by hooks: make a new one on the copy and load the state_dict")

    def _update(self, parameter, memory, group):
        slope = self._slope(parameter, group)
        if group["momentum"]:
            self._remember(parameter, slope, memory, group)
        else:
            move(parameter, -slope, group["lr"], group["weight_decay"])

    def _slope(self, parameter: Tensor, group: dict) -> Tensor:
        """(W_t - W+) / lr, which takes the place of the gradient."""
        weight = self._weights.get(parameter, parameter)
        sums = self._inputs.sums.get(weight)
        if sums is None or not group["erase"]:
            return parameter.grad
        if self._exact:
            if parameter not in self._solved:
                self._solved |= self._solve(weight, sums, group)
            return self._solved.pop(parameter)
        seen = sums.products if weight is parameter else sums.outputs
        slope = torch.add(parameter.grad, seen, alpha=group["erase"] / sums.count)
        return slope / (1 + group["lr"] * group["erase"] * sums.norms.max() / sums.count)

    def _solve(self, weight: Tensor, sums: Sums, group: dict) -> dict[Tensor, Tensor]:
        """(erase V C + G) (I + lr erase C)^-1 for V = [W b], split into weight and bias."""
        scale, flip = group["erase"] / sums.count, weight in self._inputs.transposed
        slope = torch.add(weight.grad, sums.products, alpha=scale)
        rows = (slope.mT if flip else slope).reshape(len(sums.gram), -1, weight[0].numel() if not flip else len(weight))
        bias = self._inputs.biases[weight]
        if sums.outputs is not None:
            offset = torch.add(bias.grad, sums.outputs, alpha=scale).view(*rows.shape[:2], 1)
            rows = torch.cat([rows, offset], 2)
        system = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device) + group["lr"] * scale * sums.gram
        rows = torch.cholesky_solve(rows.mT, torch.linalg.cholesky(system)).mT
        if sums.outputs is None:
            return {weight: (rows[0].mT if flip else rows).reshape(weight.shape)}
        rows, offset = rows[..., :-1], rows[..., -1]
        return {weight: (rows[0].mT if flip else rows).reshape(weight.shape), bias: offset.reshape(bias.shape)}
