"""The inputs of a Hope model: what its layers need of rows that are packed, and what they have read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nestling.cms.rows import Rows


class Packed(NamedTuple):
    """Rows of several texts as a batch of N texts, the longest of L tokens, for the sequence layers.

    Attributes:
        places: [N, L], where a text's tokens stand among the B T columns.  mask: [N, L] bool, True at its tokens.
        back: [B, T], where a column stands in [N, L]; 0 at padding.  last: [B], the last text of each row.
    """

    places: Tensor
    mask: Tensor
    back: Tensor
    last: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Packed:
        texts = rows.texts()
        longest = int(texts.counts.max())
        text = torch.arange(len(texts.counts), device=rows.real.device).repeat_interleave(texts.counts)
        index = torch.arange(len(text), device=text.device) - (texts.counts.cumsum(0) - texts.counts)[text]
        places = texts.places.new_zeros(len(texts.counts), longest)
        places[text, index] = texts.places
        mask = torch.arange(longest, device=text.device) < texts.counts[:, None]
        back = texts.places.new_zeros(rows.real.numel())
        back[texts.places] = text * longest + index
        return cls(places, mask, back.view_as(rows.text), texts.last.nonzero()[:, 0])

    def apart(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [N, L, D]; what stands behind a text's end means nothing."""
        return x.flatten(0, 1)[self.places]

    def together(self, y: Tensor) -> Tensor:
        """[N, L, D] -> [B, T, D]; what stands at padding means nothing."""
        return y.flatten(0, 1)[self.back]

    def ends(self, state: Any) -> Any:
        """The states of the rows' last texts."""
        return tree_map_only(Tensor, lambda t: t.index_select(0, self.last), state)


def tokens_read(cache: Any, batch: int) -> list[int]:
    """Real tokens of each row that a Hope model's state has seen."""
    state = cache.layers[0].state if cache is not None and cache.layers else None
    if state is None:
        return [0] * batch
    mixer = state[0]
    return (mixer.position if hasattr(mixer, "position") else mixer.tokens).tolist()
