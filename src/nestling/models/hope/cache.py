"""The state of a Hope model between calls, as a layer of Hugging Face's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

LAYER_TYPE = "hope"


class HopeCacheLayer(CacheLayerMixin):
    """One decoder layer's state: a pytree whose every tensor has the batch in front.

    A state is a value. It is replaced, never written into: graphs through it stay intact, and a copy of the cache made
    before a call still holds the state before that call. `state` None stands for the learned initial state.

    Attributes:
        state: the layer's state, or None before the first token and after `reset`.
        tokens: columns seen so far, padding included (what Hugging Face calls the sequence length).
        origin: what made the state (`HopeConfig.state_signature`).
    """

    _layer_type = LAYER_TYPE
    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.state: Any = None
        self.tokens = 0
        self.origin: str | None = None

    def store(self, state: Any, tokens: int, origin: str) -> None:
        """Take over the state after `tokens` more columns."""
        self.state, self.origin = state, origin
        self.tokens += tokens
        self.is_initialized = True

    def check(self, origin: str, batch: int) -> None:
        """Raise ValueError unless a model of this configuration can continue here with this many sequences."""
        if self.state is None:
            return
        if self.origin != origin:
            raise ValueError(
                "past_key_values comes from a model of another configuration:\n"
                f"  cache: {self.origin}\n  model: {origin}\nstart with past_key_values=None"
            )
        if self.batch_size != batch:
            raise ValueError(
                f"past_key_values holds {self.batch_size} sequences, but the input has {batch}: start with "
                "past_key_values=None, or pick the sequences with its batch_select_indices / batch_repeat_interleave"
            )

    @property
    def batch_size(self) -> int:
        """Sequences of the state; -1 before the first token."""
        first = next((leaf for leaf in tree_iter(self.state) if isinstance(leaf, Tensor)), None)  # asked at every token
        return -1 if first is None else first.shape[0]

    def state_bytes(self) -> int:
        """Bytes the state's tensors take."""
        tensors = [leaf for leaf in tree_flatten(self.state)[0] if isinstance(leaf, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = tree_map_only(Tensor, change, self.state)

    def detach(self) -> None:
        """Cut the graph: the next call's gradients end at this state (truncated backpropagation)."""
        self._map(lambda tensor: tensor.detach())

    def reset(self) -> None:
        """Back to the learned initial state."""
        self.state, self.origin, self.tokens, self.is_initialized = None, None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state of the beam it continues."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order."""
        self._map(lambda tensor: tensor.index_select(0, indices.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence's state."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        """Move the state to the CPU."""
        tensors = [leaf for leaf in tree_flatten(self.state)[0] if isinstance(leaf, Tensor)]
        self.device = tensors[0].device if tensors else None
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move an offloaded state back."""
        if (device := getattr(self, "device", None)) is not None:
            self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        """A recurrent state cannot give tokens back: anything but 0 is a ValueError."""
        if tokens_to_remove:
            raise ValueError("the state of a Hope model cannot be cropped: keep a copy from before those tokens")

    def get_seq_length(self) -> int:
        """Columns seen so far."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over everything seen."""
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Not a key-value cache: the layer's own state goes in by `store`."""
        raise TypeError("a Hope cache layer holds a layer's state, not keys and values: use store()")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not a key-value cache: the layer's own state goes in by `store`."""
        raise TypeError("a Hope cache layer holds a layer's state, not keys and values: use store()")


def check_cache(cache: Any, layers: int, origin: str, batch: int) -> None:
    """Raise unless `cache` can carry the state of a model with this many layers; an empty DynamicCache is filled.

    Raises:
        TypeError: not a cache.  ValueError: the cache of another model, configuration or batch.
    """
    if not isinstance(cache, Cache):
        raise TypeError(
            f"past_key_values must be a transformers Cache (what a model call returned); got {type(cache).__name__}"
        )
    if not cache.layers:
        cache.layers = [HopeCacheLayer() for _ in range(layers)]
    if foreign := [layer for layer in cache.layers if not isinstance(layer, HopeCacheLayer)]:
        raise ValueError(
            f"past_key_values has a {type(foreign[0]).__name__}, which cannot hold a Hope model's state: "
            "use what a call of this model returned, or DynamicCache(config=model.config)"
        )
    if len(cache.layers) != layers:
        raise ValueError(f"past_key_values has {len(cache.layers)} layers, but the model has {layers}")
    for layer in cache.layers:
        layer.check(origin, batch)


def detach_cache(cache: Cache) -> Cache:
    """Cut the graph at every layer's state, in place (truncated backpropagation over segments)."""
    for layer in cache.layers:
        layer.detach()
    return cache


def cache_bytes(cache: Cache) -> int:
    """Bytes of all layers' states."""
    return sum(layer.state_bytes() for layer in cache.layers)
