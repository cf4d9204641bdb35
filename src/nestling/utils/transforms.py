"""Whether tensors stand for others, so that Python may not look at their values."""

import torch


def is_transformed() -> bool:
    """Inside torch.compile or torch.export, or a transform of torch.func (grad, vmap, jvp)."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
