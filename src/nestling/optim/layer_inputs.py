"""What the layers of a model saw since the last step: sums over inputs and outputs, captured by hooks (decision D14).

A layer is an affine map y = W x + b, written y = V z with V = [W b] and z = (x, 1). A convolution is that map for each
patch of its input. A forward hook adds up what Delta Gradient Descent needs of x and y, and the sums count once the
output's gradient arrives, so passes without a backward pass (evaluation) leave no trace.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Sums:
    """Sums over the positions (samples, tokens, patches) that a weight was applied to, in float32 at least.

    Attributes:
        products: of y x^T, in the weight's shape.
        outputs: of y [o], or None where no bias is learned.
        norms: of |z|^2 (|x|^2 where no bias is learned) for each group of channels [groups].
        gram: of z z^T [groups, n, n], or None unless asked for.
        count: positions.
    """

    products: Tensor
    outputs: Tensor | None
    norms: Tensor
    gram: Tensor | None
    count: int

    def __add__(self, other: Sums) -> Sums:
        def both(a, b):
            return b if a is None else a if b is None else a + b

        names = ("products", "outputs", "norms", "gram")
        return Sums(*(both(getattr(self, n), getattr(other, n)) for n in names), self.count + other.count)


class LayerInputs:
    """Hooks on every linear and convolutional layer of a model, and the sums they collect, by weight.

    Args:
        model: its nn.Linear, nn.Conv1d to 3d and transformers' Conv1D layers are watched, as they are called; a weight
            that is used otherwise (by functions, by transposed convolutions, as an embedding) has no sums.
        weights: those of interest.
        gram: collect z z^T too.

    Raises:
        ValueError: with `gram`, a weight shared by layers with different biases.
    """

    def __init__(self, model: nn.Module, weights: set[Tensor], gram: bool = False) -> None:
        self.gram, self.sums, self.biases, self.transposed = gram, {}, {}, set()
        hook = _Hook(self)
        layers = [m for m in model.modules() if _watchable(m) and m.weight in weights]
        for layer in layers:
            bias = self.biases.setdefault(layer.weight, layer.bias)
            if _transposed(layer):
                self.transposed.add(layer.weight)
            if gram and bias is not layer.bias:
                raise ValueError("exact=True cannot solve for a weight that layers with different biases share")
        self._handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]

    def clear(self) -> None:
        """Forget what was collected."""
        self.sums = {}

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    @property
    def closed(self) -> bool:
        return not self._handles and bool(self.biases)

    @torch.no_grad()
    def watch(self, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        """Sums of one call, added when the gradient of y arrives."""
        weight = layer.weight
        sums = (_convolution_sums if isinstance(layer, CONVOLUTIONS) else _linear_sums)(layer, x, y, self.gram)

        def arrived(_: Tensor) -> None:
            self.sums[weight] = self.sums[weight] + sums if weight in self.sums else sums

        y.register_hook(arrived)


class _Hook:
    """A forward hook that does not keep its collector alive; a copied or pickled model carries an inert one."""

    def __init__(self, collector: LayerInputs | None = None) -> None:
        self.collector = (lambda: None) if collector is None else weakref.ref(collector)

    def __deepcopy__(self, memo):
        return _Hook()

    def __reduce__(self):
        return _Hook, ()

    @torch.compiler.disable
    def __call__(self, layer, args, kwargs, output):
        collector = self.collector()
        if collector is not None and torch.is_grad_enabled() and layer.weight.requires_grad and output.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            collector.watch(layer, x, output)


def _watchable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or _transposed(module)


def _transposed(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer whose weight is [i, o]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _learns_bias(layer: nn.Module) -> bool:
    return layer.bias is not None and layer.bias.requires_grad


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _linear_sums(layer: nn.Module, x: Tensor, y: Tensor, gram: bool) -> Sums:
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    products = x.mT @ y.to(x.dtype) if _transposed(layer) else y.to(x.dtype).mT @ x
    bias, norms = _learns_bias(layer), _wide(x).square().sum().view(1)
    return Sums(
        _wide(products),
        _wide(y).sum(0) if bias else None,
        norms + len(x) if bias else norms,
        _gram(x.unsqueeze(0), bias) if gram else None,
        len(x),
    )


def _convolution_sums(layer: nn.Module, x: Tensor, y: Tensor, gram: bool) -> Sums:
    dims, padding = len(layer.kernel_size), layer.padding
    if x.dim() == dims + 1:
        x, y = x.unsqueeze(0), y.unsqueeze(0)
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * dims
    x, y = _wide(x), _wide(y)
    how = dict(stride=layer.stride, padding=padding, dilation=layer.dilation, groups=layer.groups)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    products = torch.ops.aten.convolution_backward(
        y, x, _wide(layer.weight), None, layer.stride, padding, layer.dilation, False, (0,) * dims, layer.groups,
        (False, True, False),
    )[1]  # fmt: skip
    groups, patch = layer.groups, layer.weight.shape[1:]
    norms = convolve(x.square(), x.new_ones(groups, *patch), **how).transpose(0, 1).reshape(groups, -1)
    bias, count = _learns_bias(layer), norms.shape[1]
    if gram:  # the patches themselves, by convolving with every unit kernel
        kernels = torch.eye(patch.numel(), dtype=x.dtype, device=x.device).view(-1, *patch)
        kernels = kernels.repeat(groups, *(1 for _ in patch))
        patches = convolve(x, kernels, **how).unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    return Sums(
        products,
        y.transpose(0, 1).flatten(1).sum(1) if bias else None,
        norms.sum(1) + count if bias else norms.sum(1),
        _gram(patches, bias) if gram else None,
        count,
    )


def _gram(inputs: Tensor, bias: bool) -> Tensor:
    """Sum of z z^T over positions: [groups, N, n] to [groups, n, n]."""
    inputs = _wide(inputs)
    z = F.pad(inputs, (0, 1), value=1.0) if bias else inputs
    return z.mT @ z
