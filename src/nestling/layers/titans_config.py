"""Every setting of the self-modifying Titans layer: its meaning, its default, and what it may be."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property

from nestling.memory.rule import UpdateRule

ADAPTIVE = ("k", "v", "q", "eta", "alpha")
PATHS = ("q", "k", "v")  # projections that may have a short convolution of their own
GATES = ("gate", "eta", "alpha", "mu", "erase")  # what else the input projection may make
_LEAST = dict(dim=1, num_heads=1, expansion=1, chunk_size=1, conv_size=0, qkv_conv=0, segment_size=0)
_LEAST_OR_NONE = dict(head_dim=1, memory_chunk_size=1, cache_every=1, cache_max=1)
_CHOICES = dict(
    architecture=("mlp", "linear"), gates=("mlp", "linear"), decay=("learned", "fixed", "none"),
    rate=("learned", "one", "gate"), retain=("initial", "zero"), read=("before", "after", "chunk"),
    skip=("outer", "inner"), conv_init=("uniform", "last"), qkv_conv_init=(None, "uniform", "last"),
    projection_init=("random", "identity"),
)  # fmt: skip


@dataclass(frozen=True)
class TitansConfig:
    """Settings of `SelfModifyingTitans` (NL Eqs. 83-93), and by them of the linear-attention family.

    Raises:
        ValueError: the first wrong setting by its name.
    """

    dim: int
    """Width D of the input and output."""
    num_heads: int = 4
    """Heads H; each has its own memories (decision D7)."""
    _: KW_ONLY
    head_dim: int | None = None
    """Width p of a head; None is dim // num_heads."""
    expansion: int = 1
    """Hidden width of an MLP memory, over p."""
    chunk_size: int = 64
    """Tokens between two updates of the weights the projections are read from (NL Eq. 90)."""
    memory_chunk_size: int | None = None
    """The same for the main memory; None is `chunk_size`."""
    adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
    """Which of k, v, q, eta, alpha are memories that learn in context (NL Eqs. 83-85); the others are projections."""
    architecture: str = "mlp"
    """Of the memories: "mlp" (NL Eq. 89) or "linear"."""
    skip: str = "outer"
    """Of a deep main memory: "outer", z + W1 silu(W2 z) (NL Eq. 89), or "inner", W1 (z + silu(W2 z)): what is written
    to W1 is bound to a key that W2 bends."""
    gates: str = "linear"
    """Architecture of the eta and alpha memories: "mlp" or "linear"."""
    objective: str = "l2"
    """What a memory descends, see `memory.rule.UpdateRule`; so are dgd, gated_erase, step, self_targets, meta_grad."""
    dgd: bool = True
    """Erase along the key as Delta Gradient Descent does (NL Eqs. 57, 88)."""
    gated_erase: bool = False
    """Erase before the decay, as Gated DeltaNet writes it."""
    step: str = "joint"
    """Size of a write for a learning rate eta (decision D2)."""
    erase_gate: bool = False
    """The main memory erases by a gate of its own, from a static projection: clamp(1.1 sigmoid - 0.05, 0, 1), which has
    exact ends (decision D16); so do erase_range, erase_layer and tied_write."""
    erase_range: float = 1.0
    """Largest erase: 2 turns a key's value around, which tracking a state needs."""
    initial_erase: float = 0.5
    """The erase's gate before training, a part of `erase_range`: from 0.5 a range of 2 begins by overwriting, from 0.85
    by turning values around."""
    erase_heads: int | str | None = None
    """How many heads erase, the first ones, or "half" (of an odd number the larger); the gates of the others are 0, so
    they only add: a sum counts, and holds more pairs (decision D36). It needs tied_write=False. None is all."""
    erase_layer: str = "first"
    """Which layer of a deep memory the gate erases in, "first" or "last"; the other ones as without it."""
    tied_write: bool = True
    """The erase's gate multiplies the step of every write too: at 0 a token leaves the main memory alone."""
    self_targets: bool = True
    """Memories generate their own targets M(v) (NL Eqs. 84-88); if False the target is v."""
    momentum: bool = True
    """A data-dependent momentum mu in (0, 1) of the writes (decision D5)."""
    decay: str = "learned"
    """One of "learned" (alpha from the data), "fixed" (one per head, as RetNet), or "none" (alpha = 1)."""
    rate: str = "learned"
    """One of "learned" (eta > 0 from the data), "one" (eta = 1) and "gate" (the step is a share of the full one, from 0
    to 1 with exact ends as the erase's gate)."""
    initial_rate: float = 0.02
    """A learned eta before training; of a "gate", the share is initial_rate / (1 + initial_rate). The writes of a chunk
    are taken at the same weights and add up."""
    first_rate: float | None = None
    """A learned factor, from this value, on the step of a deep main memory's first layer; None for none."""
    projection_rate: float | None = None
    """A learned factor, from this value, on the eta of all memories but the main one; None for none. A small one lets
    the layer begin as one of static projections."""
    projection_init: str = "random"
    """Initial state of the memories of k, v and q before training: "random", or "identity", M(x) = x: the layer begins
    as one of static projections, and what a memory learns in the context shows where it is read (decision D28)."""
    initial_scale: float = 1.0
    """A factor on the main memory's initial weights, of a deep one's last layer: at 1 they drown what is written."""
    retain: str = "initial"
    """What the decay returns a memory to: "initial", its learned initial state, or "zero" (NL Eq. 88 read literally;
    both layers of a deep memory then fade together and it stops learning for good)."""
    horizon: tuple[float, float] = (128.0, 2048.0)
    """Tokens a learned decay remembers before training, from the first head to the last."""
    read: str = "before"
    """One of "before", W_{t-1} (NL Eq. 86), "after", W_t, and "chunk", the weights of the chunk's start (NL Eq. 90)."""
    normalize_values: bool = True
    """L2-normalise v like k and q; without it self-generated targets feed back and diverge."""
    conv_size: int = 4
    """Width of the causal convolution of the input, 0 for none."""
    conv_for: str | tuple[str, ...] = "all"
    """Which projections see the convolved input: "all", "gates" (gate, eta, alpha, mu, erase, not x, q, k, v), or their
    names."""
    qkv_conv: int = 0
    """Width of a causal convolution with SiLU after each of q, k and v, of an adaptive one before its memory; 0 for
    none (decision D17)."""
    conv_init: str = "uniform"
    """Taps of all convolutions before training: "uniform" in (-1/2, 1/2), or "last", half of that and 1 on the token
    itself."""
    qkv_conv_init: str | None = None
    """The same for those after q, k and v alone; None is as `conv_init`."""
    output_gate: bool = True
    """Gate the output by silu of a projection of the input."""
    meta_grad: str = "full"
    """How the outer loss is differentiated through the writes (decision D9)."""
    segment_size: int = 4096
    """Tokens: longer calls are recomputed piece by piece in the backward pass, so that only the states between pieces
    are kept; 0 keeps everything, in 1.6 times the memory and .55 to .8 of the time. A piece is an eighth of it, or as
    long where chunks are taken at once (`ops.chunks`)."""
    norm_limit: float = 8.0
    """A weight whose root mean square exceeds this at a chunk's end is scaled back to it. Sums meet 8 after some 40
    tokens of one kind: `mixer="hope"`, "linear_attention" and "retnet" have 10,000 (decision D39)."""
    cache_every: int | None = None
    """Tokens of a stretch: what each wrote to the main memory is kept and read beside it (memory caching, decision
    D38), so the state grows with the text. A multiple of `chunk_size` is fastest; for a matrix with static projections.
    None keeps nothing."""
    cache_max: int | None = None
    """Memories that are kept at most, the last ones; None is all."""
    cache_scale: float = 4.0
    """How sharply a query chooses among kept memories before training: a learned factor in a softmax."""

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_choices()
        self._check_cache()
        object.__setattr__(self, "adaptive", tuple(name for name in ADAPTIVE if name in self.adaptive))
        _ = self.rule  # which checks its own settings

    @property
    def head_width(self) -> int:
        """p, channels of a head."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def main_chunk_size(self) -> int:
        """Tokens of a chunk of the main memory."""
        return self.memory_chunk_size or self.chunk_size

    @property
    def erasing(self) -> int:
        """How many heads erase, where there is a gate for it."""
        if isinstance(self.erase_heads, int):
            return self.erase_heads
        return self.num_heads if self.erase_heads is None else -(-self.num_heads // 2)

    @cached_property
    def rule(self) -> UpdateRule:
        """By which the main memory learns."""
        names = (field.name for field in fields(UpdateRule) if field.name != "relative")
        return UpdateRule(**{name: getattr(self, name) for name in names}, relative=self.rate == "gate")

    @cached_property
    def projection_rule(self) -> UpdateRule:
        """By which the other memories learn."""
        return self.rule.without_gate()

    @property
    def convolved(self) -> frozenset[str]:
        """The parts of the input projection that see the convolved input."""
        named = {"all": ("x", *PATHS, *GATES), "gates": GATES}
        return frozenset(named.get(self.conv_for, self.conv_for) if self.conv_size else ())

    def widths(self) -> dict[str, int]:
        """What the input projection makes, and how many channels of each."""
        inner = self.num_heads * self.head_width
        widths = {"x": inner} if self.adaptive else {}
        widths |= {name: inner for name in ("q", "k", "v") if name not in self.adaptive}
        widths |= {"gate": inner} if self.output_gate else {}
        if self.rate != "one" and "eta" not in self.adaptive:
            widths["eta"] = self.num_heads
        if self.decay == "learned" and "alpha" not in self.adaptive:
            widths["alpha"] = self.num_heads
        widths |= {"mu": self.num_heads} if self.momentum else {}
        return widths | ({"erase": self.num_heads} if self.erase_gate else {})

    def _check_numbers(self) -> None:
        given = {name: least for name, least in _LEAST_OR_NONE.items() if getattr(self, name) is not None}
        for name, least in (_LEAST | given).items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}")
        for name in ("norm_limit", "initial_rate", "cache_scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)!r}")
        for name in ("first_rate", "projection_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, or None; got {value!r}")
        if not 0 < self.initial_erase < 1:
            raise ValueError(f"initial_erase must lie between 0 and 1; got {self.initial_erase!r}")
        if self.initial_erase != 0.5 and not self.erase_gate:
            raise ValueError(f"initial_erase={self.initial_erase!r} is of a gate: it needs erase_gate=True")
        if self.erase_heads is not None:
            self._check_erase_heads(self.erase_heads)
        if not self.initial_scale >= 0:
            raise ValueError(f"initial_scale must not be negative; got {self.initial_scale!r}")
        if self.head_dim is None and self.dim % self.num_heads:
            raise ValueError(
                f"dim {self.dim} is not a multiple of num_heads {self.num_heads}: change one, or give head_dim"
            )
        own = self.main_chunk_size
        if own % self.chunk_size and self.chunk_size % own:
            raise ValueError(
                f"memory_chunk_size {own} and chunk_size {self.chunk_size}: one must be a multiple of the other"
            )
        if len(self.horizon) != 2 or min(self.horizon) <= 1:
            raise ValueError(f"horizon must be two numbers of tokens above 1; got {self.horizon!r}")

    def _check_erase_heads(self, heads: int | str) -> None:
        if heads != "half" and (not isinstance(heads, int) or not 0 < heads <= self.num_heads):
            raise ValueError(
                f'erase_heads must be an integer from 1 to num_heads ({self.num_heads}), "half" or None; got {heads!r}'
            )
        if not self.erase_gate or self.tied_write:
            raise ValueError(
                f"erase_heads={heads!r} closes the erase's gate in the other heads: it needs erase_gate=True, and "
                "tied_write=False, or they would not write"
            )

    def _check_cache(self) -> None:
        if self.cache_every is None:
            if self.cache_max is not None:
                raise ValueError(f"cache_max={self.cache_max!r} is of kept memories: it needs cache_every")
            return
        needed = dict(architecture="linear", adaptive=(), momentum=False)
        needed |= {} if self.decay == "none" else {"retain": "zero"}
        for name, value in needed.items():
            found = getattr(self, name)
            if (tuple(found) if name == "adaptive" else found) != value:
                raise ValueError(
                    f"cache_every={self.cache_every} keeps what a stretch wrote to a matrix: it needs "
                    f'{name}={value!r}, as "hope_memory" and its kin have; got {found!r}'
                )

    def _check_choices(self) -> None:
        unknown = set(self.adaptive) - set(ADAPTIVE)
        if unknown:
            raise ValueError(f"adaptive may hold {', '.join(ADAPTIVE)}; got {', '.join(sorted(unknown))}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.conv_for not in ("all", "gates") and (
            isinstance(self.conv_for, str) or not set(self.conv_for) <= {"x", *PATHS, *GATES}
        ):
            known = ", ".join(("x", *PATHS, *GATES))
            raise ValueError(f'conv_for must be "all", "gates" or names among {known}; got {self.conv_for!r}')
        deep = self.architecture == "mlp"
        for name, off in (("skip", "outer"), ("first_rate", None), ("erase_layer", "first")):
            if not deep and getattr(self, name) != off:
                raise ValueError(f"{name}={getattr(self, name)!r} is of a deep memory: it needs architecture='mlp'")
        if self.skip == "inner" and self.expansion != 1:
            raise ValueError(f"skip='inner' adds a key to a hidden layer: expansion must be 1; got {self.expansion}")
        if self.erase_range > 1 and self.objective == "l2" and not (deep and self.erase_layer == "first"):
            raise ValueError(
                f"erase_range {self.erase_range} needs objective='dot' here: the l2 gradient, taken at the chunk's "
                "start, erases the same key of the same layer once more, and a key written an odd number of times in a "
                "chunk then grows from chunk to chunk. erase_layer='first' of a deep memory is apart from it"
            )
        if "eta" in self.adaptive and self.rate == "one":
            raise ValueError(f'adaptive holds "eta", which needs a rate from the data; got rate={self.rate!r}')
        if "alpha" in self.adaptive and self.decay != "learned":
            raise ValueError(f'adaptive holds "alpha", which needs decay="learned"; got {self.decay!r}')
        if self.projection_rate is not None and not self.adaptive:
            raise ValueError("projection_rate is of memories that project: adaptive is empty, leave it None")
        if self.projection_init != "random" and not set(PATHS) & set(self.adaptive):
            raise ValueError(
                f"projection_init={self.projection_init!r} is of memories that project: put k, v or q into adaptive"
            )
        numbers = [name for name in ("eta", "alpha") if name in self.adaptive]
        if numbers and not self.self_targets:
            raise ValueError(
                f"self_targets=False makes the value every memory's target, which {' and '.join(numbers)}, a number "
                "each, cannot take: leave them out of adaptive"
            )
