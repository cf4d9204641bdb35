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

        found = {n: both(getattr(self, n), getattr(other, n)) for n in ("products", "outputs", "norms", "gram")}
        return Sums(**found, count=self.count + other.count)


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
        layers = [m for m in model.modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS)) or _transposed(m)]
        layers = [layer for layer in layers if layer.weight in weights]
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


class LayerSamples(LayerInputs):
    """All inputs z and error signals u = -dL/dy of each weight, as lists: sums[weight] = [(z, u), ...]."""

    @torch.no_grad()
    def watch(self, layer, x, y):
        weight = layer.weight

        def arrived(gradient: Tensor) -> None:
            sample = layer_rows(layer, x.detach()), -output_rows(layer, gradient)
            self.sums.setdefault(weight, []).append(sample)

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
        _gram(layer_rows(layer, x)) if gram else None,
        len(x),
    )


def _convolution_sums(layer: nn.Module, x: Tensor, y: Tensor, gram: bool) -> Sums:
    dims, groups = len(layer.kernel_size), layer.groups
    padded, padding = _padded(layer, x)
    y = _wide(y if y.dim() == dims + 2 else y.unsqueeze(0))
    products = torch.ops.aten.convolution_backward(
        y, padded, _wide(layer.weight), None, layer.stride, padding, layer.dilation, False, (0,) * dims, groups,
        (False, True, False),
    )[1]  # fmt: skip
    norms = _convolve(layer, x, torch.square, padded.new_ones(groups, *layer.weight.shape[1:])).sum((1, 3))
    bias, count = _learns_bias(layer), y.numel() // y.shape[1]
    return Sums(
        products,
        y.transpose(0, 1).flatten(1).sum(1) if bias else None,
        norms.flatten() + count if bias else norms.flatten(),
        _gram(layer_rows(layer, x)) if gram else None,
        count,
    )


def layer_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs z of a layer [groups, N, n]: positions or patches, with a 1 at the end where a bias is learned."""
    if isinstance(layer, CONVOLUTIONS):  # a patch is what convolving with every unit kernel gives
        patch = layer.weight.shape[1:]
        kernels = torch.eye(patch.numel(), dtype=_wide(x).dtype, device=x.device).view(-1, *patch)
        rows = _convolve(layer, x, lambda padded: padded, kernels.repeat(layer.groups, *(1 for _ in patch)))
        rows = rows.transpose(2, 3).flatten(1, 2)
    else:
        rows = _wide(x).reshape(1, -1, x.shape[-1])
    return F.pad(rows, (0, 1), value=1.0) if _learns_bias(layer) else rows


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """Outputs of a layer, or their gradients, in the order of `layer_rows`: [groups, N, o / groups]."""
    if not isinstance(layer, CONVOLUTIONS):
        return _wide(y).reshape(1, -1, y.shape[-1])
    y = _wide(y if y.dim() == len(layer.kernel_size) + 2 else y.unsqueeze(0))
    return y.unflatten(1, (layer.groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)


def pack(weight: Tensor, bias: Tensor | None, groups: int, transposed: bool) -> Tensor:
    """[W b], or gradients of them, as [groups, o / groups, n] to go with `layer_rows`."""
    matrix = (weight.mT if transposed else weight.flatten(1)).unflatten(0, (groups, -1))
    return matrix if bias is None else torch.cat([matrix, bias.view(groups, -1, 1)], 2)


def unpack(rows: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> dict[Tensor, Tensor]:
    """What `pack` packed, by parameter."""
    matrix = rows.flatten(0, 1)
    if bias is None:
        return {weight: matrix.mT if transposed else matrix.reshape(weight.shape)}
    matrix, last = matrix[:, :-1], matrix[:, -1]
    return {weight: matrix.mT if transposed else matrix.reshape(weight.shape), bias: last}


def _padded(layer: nn.Module, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A convolution's input [B, i, ...] with the padding that its operator cannot do, and what it still has to do."""
    dims = len(layer.kernel_size)
    x = _wide(x if x.dim() == dims + 2 else x.unsqueeze(0))
    if not isinstance(layer.padding, str) and layer.padding_mode == "zeros":
        return x, layer.padding
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * dims


def _convolve(layer: nn.Module, x: Tensor, function, kernels: Tensor) -> Tensor:
    """A function of the input, convolved with other kernels as the layer would: [groups, B, outputs, positions]."""
    x, padding = _padded(layer, x)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
    y = convolve(function(x), kernels, None, layer.stride, padding, layer.dilation, layer.groups)
    return y.unflatten(1, (layer.groups, -1)).flatten(3).transpose(0, 1)


def _gram(rows: Tensor) -> Tensor:
    """Sum of z z^T over positions: [groups, N, n] to [groups, n, n]."""
    return rows.mT @ rows
