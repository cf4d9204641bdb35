"""Loading a saved state: checked before anything is changed, and then taken over bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Shapes = dict[str, torch.Size]  # what an optimiser remembers of a parameter: names and shapes


@contextmanager
def exact_loading(
    optimizer: torch.optim.Optimizer, expected: Callable[[Tensor, dict, int], Shapes | None]
) -> Iterator[None]:
    """While it is open, `torch.optim.Optimizer.load_state_dict` loads exactly, or raises before it changes anything.

    Torch alone casts memories to the parameter's type, takes any names and shapes, and forgets options that the saved
    groups do not hold. Here options missing in an older checkpoint keep the optimiser's own values, numbers saved as
    Python numbers or as tensors of one element become what they were, and every tensor keeps its type.

    Args:
        optimizer: the one whose `load_state_dict` is called inside.
        expected: of (parameter, group, its index in the group): names and shapes of its state; None is not checked.

    Raises:
        ValueError: a saved state that belongs to another optimiser, other options or another model.
    """
    found: list[tuple[Tensor, dict]] = []

    def prepare(_, saved: dict) -> dict:
        groups, ours = [dict(group) for group in saved["param_groups"]], optimizer.param_groups
        if [len(g["params"]) for g in groups] != [len(g["params"]) for g in ours]:
            return saved  # torch says so
        for i, own in enumerate(ours):
            kept = {name: value for name, value in own.items() if name not in ("params", "param_names")}
            groups[i] = {**kept, **groups[i]}
        states = dict(saved["state"])
        for own, group in zip(ours, groups):
            for index, (parameter, key) in enumerate(zip(own["params"], group["params"])):
                if states.get(key):
                    try:
                        shapes = expected(parameter, {**own, **group}, index)
                    except (TypeError, ValueError) as error:
                        raise ValueError(
                            f"the options were saved by another optimizer, or are wrong: {error}"
                        ) from error
                    states[key] = dict(states[key]) if shapes is None else _fitting(states[key], shapes, own, index)
                    found.append((parameter, states[key]))
        return {**saved, "state": states, "param_groups": groups}

    def restore(_) -> None:
        for parameter, values in found:
            for name, value in values.items():
                if isinstance(value, Tensor):  # the number of a step stays where it was
                    place = parameter.device if value.ndim or name != "step" else value.device
                    optimizer.state[parameter][name] = value.to(place, copy=True).contiguous()

    before = optimizer.register_load_state_dict_pre_hook(prepare)  # the last to see what is loaded
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _fitting(saved: dict, shapes: Shapes, group: dict, index: int) -> dict:
    """The saved state of one parameter, with numbers as tensors; ValueError if it is none of this optimiser's."""
    parameter = group["params"][index]
    name = group["param_names"][index] if "param_names" in group else str(index)
    if saved.keys() != shapes.keys():
        raise ValueError(
            f"the saved state of parameter {name} {list(parameter.shape)} holds {', '.join(map(str, saved))}, "
            f"this optimizer keeps {', '.join(shapes)}: it was saved by another one or with other options; "
            "load a state of the same optimizer, or start without one"
        )
    fitting = {}
    for key, value in saved.items():
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value))
        if value.shape != shapes[key] and value.numel() == 1 and not shapes[key]:
            value = value.reshape(())
        if value.shape != shapes[key]:
            raise ValueError(
                f"the saved {key} has shape {list(value.shape)}, parameter {name} {list(parameter.shape)} needs "
                f"{list(shapes[key])}; the state belongs to another model"
            )
        fitting[key] = value
    return fitting
