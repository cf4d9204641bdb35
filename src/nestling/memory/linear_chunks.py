"""Many chunks at once of a linear memory that writes whatever its weights are; `rule.advance` is the definition."""

from __future__ import annotations

from torch import Tensor

from nestling.memory.architectures import Architecture, LinearMemory
from nestling.memory.objectives import OBJECTIVES
from nestling.memory.rule import Context, FastWeights, UpdateRule, erases_of, rates_of
from nestling.ops.chunks import delta_chunks


def goes_by_chunks(architecture: Architecture, rule: UpdateRule) -> bool:
    """Whether `advance_chunks` stands for these settings, without momentum and with a decay to zero."""
    given = OBJECTIVES[rule.objective].uses_prediction or rule.self_targets
    return isinstance(architecture, LinearMemory) and not given and rule.meta_grad != "none"


def advance_chunks(
    rule: UpdateRule,
    fast: FastWeights,
    context: Context,
    *,
    chunk_size: int,
    queries: Tensor,
    after: bool,
    limit: float,
) -> tuple[FastWeights, Tensor]:
    """`rule.advance` and `rule.close_chunk`, a chunk after the other: the memory [1, B, H, o, i], reads [B, H, T, o].

    Args:
        context: of whole chunks, T tokens; its tables of decay are not used.
        limit: bound on the norm of the weights at every chunk's end.
    """
    keys, (weight,) = context.keys.unsqueeze(0), fast.now
    error = OBJECTIVES[rule.objective].error(None, context.values).unsqueeze(0)
    (rate,) = rates_of(rule, context, [keys], [error])
    (erase,) = erases_of(rule, [rate], context, [keys])

    def flat(t: Tensor) -> Tensor:
        return t.flatten(0, 2).contiguous()

    writes = -rate.unsqueeze(-1) * error
    now, reads = delta_chunks(
        flat(weight), flat(keys), flat(writes), context.decay.flatten(0, 1), None if erase is None else flat(erase),
        queries.flatten(0, 1), chunk_size=chunk_size, after=after, limit=limit,
    )  # fmt: skip
    now = (now.view(weight.shape),)
    return FastWeights(now, now, ()), reads.view(*queries.shape[:-1], -1)
