"""M3, the multi-scale momentum Muon of `NL Alg. 1`, as a drop-in torch optimiser."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nestling.optim import checks
from nestling.optim.m3_divided import divided_step
from nestling.optim.m3_options import check_group, is_matrix, moment_of, parts_of, settings_of
from nestling.optim.multiscale import m3_batched, m3_single, new_state
from nestling.optim.parameters import split_parameters
from nestling.optim.sharding import is_cut_by_rows, is_sharded, keep_shard, local, whole
from nestling.optim.states import exact_loading

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class M3(torch.optim.Optimizer):
    """Momentum at several time scales, orthogonalised, over the root of the second moment (`NL Alg. 1, Eq. 75`).

    Matrices take the step of `nestling.optim.multiscale`, everything else AdamW's. A step whose gradients hold NaN or
    infinity changes no weight, no memory and no phase. A parameter without gradient waits; its phase waits with it.

    Args:
        params: a model, which goes through `split_parameters`; or parameters, groups, `named_parameters()`. Group keys
            besides the options: `rule` "matrix", "adamw" or "auto" (two dimensions and more are matrices, but not what
            is named like an embedding or a head), and `view`, how more than two dimensions are read: "flatten"
            (o, rest), "batch" (a batch of the last two), None ("batch" for three, "flatten" for more).
        lr (float or Tensor): AdamW's fits, given `rms_match`.
        betas: of the fast momentum, the second moment, and each slow momentum (the last is repeated). Weights of the
            sums in "sum", what averages keep in "ema".
        alpha: weight of each slow direction beside the fast one (a number is every scale's).
        periods: steps between two updates of each scale; (1,) has no slow scale, (1, 16, 256) has two.
        ns_steps, coefficients, ns_dtype: of the orthogonalisation, see `nestling.ops.orthogonalize`.
        eps: added to the root of the second moment; None is 1e-8 for "sum" and 0.05, relative to the matrix, for "ema".
        weight_decay: decoupled.
        accumulation: "ema", or "sum" for the literal Algorithm 1 (with rms_match=False, weight_decay=0).
        rms_match: scale each matrix's step to a root mean square of 0.2 lr.
        nesterov: orthogonalise the momentum one step ahead; None does for "ema", not for the literal "sum".
        second_moment: what the step is divided by the root of: the second moment of the "direction" (O1 + alpha O2, as
            AdaMuon has it), or of the "gradient" (True; Algorithm 1). None: the first for "ema", the second for "sum".
            False: no division, so the state is smaller and M3 is Muon with several scales.
        adam_betas, adam_eps: of the AdamW rule.
        split: which fused matrices are orthogonalised in parts: a part of a parameter's name -> number of equal row
            blocks or a list of their sizes; ("columns", ...) for columns. Needs `named_parameters()`.
        slow_dtype: type of the cached slow directions; None is bfloat16, or the state's own for "sum" and float64.
        nonfinite: "skip", "raise", or "ignore" (no check, so no synchronisation with a device).
        process_group: ranks that hold the same parameters and gradients, as under DDP: each orthogonalises its share of
            the matrices and sends it to the others. None: every rank does all of them, and nothing is sent. Parameters
            that FSDP2 shards are always divided among their ranks.
        foreach: False takes the plain definition, one parameter after the other, in place of batches of one shape.

    Raises:
        ValueError, TypeError: naming the argument; nothing is changed.
    """

    _ranks: ProcessGroup | None = None  # a copy has none

    def __init__(
        self,
        params: Iterable | nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        betas: Sequence[float] = (0.95, 0.95, 0.9),
        alpha: float | Sequence[float] = 0.25,
        periods: Sequence[int] = (1, 16),
        ns_steps: int = 5,
        coefficients="muon",
        eps: float | None = None,
        weight_decay: float = 0.0,
        accumulation: str = "ema",
        rms_match: bool = True,
        nesterov: bool | None = None,
        second_moment: str | bool | None = None,
        adam_betas: tuple[float, float] = (0.9, 0.95),
        adam_eps: float = 1e-8,
        split: Mapping[str, object] | None = None,
        ns_dtype: torch.dtype | None = None,
        slow_dtype: torch.dtype | None = None,
        nonfinite: str = "skip",
        foreach: bool | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        checks.check_choice("nonfinite", nonfinite, checks.NONFINITE)
        options = dict(
            lr=lr, betas=betas, alpha=alpha, periods=periods, ns_steps=ns_steps, coefficients=coefficients, eps=eps,
            weight_decay=weight_decay, accumulation=accumulation, rms_match=rms_match, nesterov=nesterov,
            second_moment=second_moment, adam_betas=adam_betas, adam_eps=adam_eps, split=dict(split or {}),
            ns_dtype=ns_dtype, slow_dtype=slow_dtype, nonfinite=nonfinite, foreach=foreach is not False, rule="auto",
            view=None,
        )  # fmt: skip
        check_group(options)
        self._ranks = process_group
        super().__init__(split_parameters(params) if isinstance(params, nn.Module) else params, options)
        self._warn_of_tables()
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        for pattern in options["split"]:
            if not any(pattern in name for name in names):
                raise ValueError(
                    f"split names {pattern!r}, which is in no parameter's name; "
                    + ("check it against named_parameters()" if names else "pass model.named_parameters()")
                )

    def _warn_of_tables(self) -> None:
        """A whole model without names hides its embedding and its head among the matrices."""
        groups = [g for g in self.param_groups if g["rule"] == "auto" and "param_names" not in g]
        dims = [p.ndim for g in groups for p in g["params"]]
        if sum(d >= 2 for d in dims) > 1 and any(d < 2 for d in dims):
            warnings.warn(
                "M3 got parameters without names: an embedding or an output head among them is orthogonalised, which "
                'harms. Give M3 the model, split_parameters(model) or named_parameters(), or groups with "rule"; '
                "docs/optimizers.md has the line for Hugging Face's Trainer",
                stacklevel=3,
            )

    def add_param_group(self, param_group: dict) -> None:
        """Add parameters with their own options; ValueError or TypeError before any change."""
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), Tensor):
            param_group = {**param_group, "params": list(param_group["params"])}
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for index, parameter in enumerate(group["params"]):
                checks.check_parameter(parameter, _name(group, index))
                if group["rule"] == "matrix" and parameter.ndim < 2:
                    raise ValueError(
                        f"parameter {_name(group, index)}{list(parameter.shape)} is no matrix; "
                        'put it into a group with rule="adamw"'
                    )
                if is_matrix(parameter, group, index):
                    parts_of(parameter, group, index)
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    @torch.compiler.disable(recursive=False)  # the compiler gets the tensor work, not the bookkeeping
    @torch.no_grad()
    def step(self, closure=None):
        """One step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._is_usable():
            for function, *arguments in self._open():
                function(*arguments)
        return loss

    @torch.compiler.disable
    def _is_usable(self) -> bool:
        """Whether there are gradients and a step may be taken along them; ValueError for one that fits no parameter."""
        used = []
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    checks.check_gradient(parameter, _name(group, index))
                    _check_lr_device(group["lr"], parameter)
                    used.append(parameter.grad)
        return bool(used) and checks.finite(used, self.defaults["nonfinite"])

    @torch.compiler.disable
    def _open(self) -> list[tuple]:
        """Make what state is missing and count the step; returns what is left to do, (function, *arguments) each."""
        # Reading a distributed state dict before any step makes torch take a step of zero gradients at lr 0 to create
        # the state. That is no step of ours: it would shift the slow periods.
        used = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        counts = (
            bool(self.state)
            or any(float(g["lr"]) for g in self.param_groups)
            or any(bool(whole(p.grad).any()) for p in used)
        )
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None and parameter.numel() and not self.state[parameter]:
                    new = _matrix_state if is_matrix(parameter, group, index) else _adamw_state
                    self.state[parameter].update(new(parameter, group))
        if not counts:
            return []
        divided: dict[Any, list[tuple]] = {}  # one exchange for all parameters of the same ranks
        work = [work for group in self.param_groups for work in self._open_group(group, divided)]
        for mesh, together in divided.items():
            ranks = self._ranks if mesh is None else mesh.get_group()
            work.append((divided_step, together, ranks, mesh is not None))
        return work

    def _open_group(self, group: dict, divided: dict[Any, list[tuple]]) -> list[tuple]:
        """Parameters that take the same step go together; matrices whose work ranks share go to `divided`."""
        work, vectors, matrices = [], {}, {}
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None or parameter.numel() == 0:
                continue
            kind = (parameter.device, parameter.dtype)
            if is_matrix(parameter, group, index):
                state = self.state[parameter]
                state["step"] += 1
                key = (*kind, parameter.shape, int(state["step"]), parts_of(parameter, group, index))
                matrices.setdefault(key, []).append(parameter)
            else:
                vectors.setdefault(kind, []).append(parameter)
        for parameters in vectors.values():
            work.append((_adamw_step, parameters, [self.state[p] for p in parameters], group))
        for (*_, shape, step, (sizes, dim)), parameters in matrices.items():
            settings = settings_of(group, shape, sizes, dim)
            states, gradients = [self.state[p] for p in parameters], [p.grad for p in parameters]
            sharded = is_sharded(parameters[0])
            if group["foreach"] and (is_cut_by_rows(parameters[0]) if sharded else self._ranks is not None):
                mesh = parameters[0].device_mesh if sharded else None
                divided.setdefault(mesh, []).append((parameters, gradients, states, settings, step))
            elif sharded:
                work.append((_gathered_step, parameters, gradients, states, settings, step))
            elif group["foreach"]:
                work.append((m3_batched, parameters, gradients, states, settings, step))
            else:
                work += [(m3_single, *one, settings, step) for one in zip(parameters, gradients, states)]
        return work

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over a saved state, bit for bit; ValueError, before any change, if it belongs to something else."""
        with exact_loading(self, _state_shapes):
            super().load_state_dict(state_dict)


def _state_shapes(parameter: Tensor, group: dict, index: int) -> dict[str, torch.Size]:
    check_group(group)
    names = [f"{kind}{scale}" for scale in range(2, len(group["periods"]) + 1) for kind in "mo"]
    matrix = ["m1", *(["v"] if moment_of(group) else []), *names]
    memories = matrix if is_matrix(parameter, group, index) else ["exp_avg", "exp_avg_sq"]
    return {"step": torch.Size()} | dict.fromkeys(memories, parameter.shape)


def _check_lr_device(lr: float | Tensor, parameter: Tensor) -> None:
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != parameter.device:
        raise ValueError(f"lr is on {lr.device}, a parameter on {parameter.device}; keep lr on the CPU to serve both")


def _name(group: dict, index: int) -> str:
    return f"{group['param_names'][index]} " if "param_names" in group else ""


def _matrix_state(parameter: Tensor, group: dict) -> dict[str, Tensor]:
    exact = group["accumulation"] == "sum" or parameter.dtype == torch.float64
    slow_dtype = group["slow_dtype"] or (None if exact else torch.bfloat16)
    return new_state(parameter, len(group["periods"]), moment_of(group) is not None, slow_dtype)


def _adamw_state(parameter: Tensor, group: dict) -> dict[str, Tensor]:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return {"step": torch.tensor(0.0)} | {
        name: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
    }


@torch.compiler.disable
def _gathered_step(parameters: list[Tensor], gradients: list[Tensor], states: list[dict], settings, step: int) -> None:
    """The step of parameters sharded in any other way, one by one: whole on every rank, which keeps its part."""
    for parameter, gradient, state in zip(parameters, gradients, states):
        weight = whole(parameter).clone()
        memories = {name: whole(value).clone() for name, value in state.items() if name != "step"}
        m3_batched([weight], [whole(gradient)], [memories], settings, step)
        keep_shard(parameter, weight)
        for name, value in memories.items():
            keep_shard(state[name], value)


@torch.compiler.disable
def _adamw_step(parameters: list[Tensor], states: list[dict], group: dict) -> None:
    """torch's own AdamW, on a float32 copy of narrower parameters; each rank on its shards."""
    gradients = [local(p.grad) for p in parameters]
    parameters = [local(p) for p in parameters]
    states = [{name: local(value) for name, value in state.items()} for state in states]
    dtype = states[0]["exp_avg"].dtype
    copies = [p.to(dtype) for p in parameters]
    adamw(
        copies,
        [g.to(dtype) for g in gradients],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        foreach=group["foreach"] and not isinstance(group["lr"], Tensor),
        amsgrad=False,
        beta1=group["adam_betas"][0],
        beta2=group["adam_betas"][1],
        lr=checks.scalar(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["adam_eps"],
        maximize=False,
    )
    if copies[0] is not parameters[0]:
        for parameter, stepped in zip(parameters, copies):
            parameter.copy_(stepped)
