"""Every sequence layer by name: the linear-attention family as settings of one layer, and softmax attention."""

from __future__ import annotations

import inspect
from functools import cache

from torch import nn

from nestling.layers.attention import Attention
from nestling.layers.beside import MemoryBesideAttention
from nestling.layers.titans import SelfModifyingTitans
from nestling.layers.titans_config import TitansConfig

_STATIC = dict(adaptive=(), self_targets=False, normalize_values=False, momentum=False, retain="zero")
# without an erase the writes of a chunk add up: begin with steps of about 1 / chunk_size
_DESCENT = dict(_STATIC, dgd=False, normalize_values=True, initial_rate=0.02)
_HEBBIAN = dict(
    _STATIC, architecture="linear", objective="dot", dgd=False, rate="one", step="plain", read="after", norm_limit=1e4
)  # a sum grows with the text and is no fault: the bound of 8 is met by some 40 tokens of one kind
_DELTA = dict(_STATIC, architecture="linear", objective="dot", dgd=True, step="layer", read="after", initial_rate=1.0)
_TRACKING = dict(
    architecture="linear", objective="dot", momentum=False, erase_gate=True, erase_range=2.0, conv_size=0,
    chunk_size=16, horizon=(1024.0, 16384.0),
)  # fmt: skip

# the memory of the default Hope (decision D24): one gate for erase and write, which sees single tokens, as all else
# does at first, and begins by turning values around
_HOPE = dict(
    _DELTA, qkv_conv=4, conv_for=("gate", "eta", "alpha"), conv_init="last", initial_scale=0.1, erase_gate=True,
    erase_range=2.0, initial_erase=0.85, rate="gate",
)  # fmt: skip

MIXERS: dict[str, tuple[type[nn.Module], dict]] = {
    # self-modifying Titans, NL Eqs. 83-93
    "selfmod": (SelfModifyingTitans, {}),
    # the same on matrices with an erase gate of range 2: W alpha (I - 2 g k k^T) + g e v^ k^T, which can turn a value
    # around and so keeps count modulo two; no convolution in front of gate and key, which would blur single tokens
    "selfmod_tracking": (SelfModifyingTitans, _TRACKING),
    # W + v k^T, NL Eq. 64
    "linear_attention": (SelfModifyingTitans, dict(_HEBBIAN, decay="none")),
    # gamma W + v k^T, one gamma per head
    "retnet": (SelfModifyingTitans, dict(_HEBBIAN, decay="fixed")),
    # W (I - e k k^T) + e v k^T, NL Eq. 65: DGD on the dot-product objective
    "deltanet": (SelfModifyingTitans, dict(_DELTA, decay="none")),
    # W alpha (I - e k k^T) + e v k^T
    "gated_deltanet": (SelfModifyingTitans, dict(_DELTA, gated_erase=True)),
    # the same with a convolution after each of q, k and v, and a memory that begins small: it recalls pairs
    "gated_deltanet_conv": (
        SelfModifyingTitans,
        dict(_DELTA, gated_erase=True, qkv_conv=4, conv_for="gates", initial_scale=0.1),
    ),
    # the same with an erase gate of range 2, a write gate of its own, decays that keep and convolutions that begin near
    # the identity: it recalls pairs and keeps count modulo two; language wants other convolutions (experiment `choice`)
    "gated_deltanet_tracking": (
        SelfModifyingTitans,
        dict(
            _DELTA,
            qkv_conv=4,
            conv_for="gates",
            conv_init="last",
            initial_scale=0.1,
            erase_gate=True,
            erase_range=2.0,
            tied_write=False,
            rate="gate",
            horizon=(1024.0, 16384.0),
        ),
    ),
    "hope_memory": (SelfModifyingTitans, _HOPE),
    # the same beside attention over a window, their outputs added: what is near is the attention's, so the memory keeps
    # for longer
    "memory_and_attention": (MemoryBesideAttention, dict(_HOPE, window=256, horizon=(2048.0, 32768.0))),
    # gradient descent on the reconstruction of v by an MLP, no momentum, no decay
    "ttt": (SelfModifyingTitans, dict(_DESCENT, decay="none")),
    # the same with momentum and decay, deep and linear
    "titans": (SelfModifyingTitans, dict(_DESCENT, momentum=True)),
    "titans_linear": (SelfModifyingTitans, dict(_DESCENT, momentum=True, architecture="linear")),
    "attention": (Attention, {}),
    # of the last 128 tokens, its state bounded: for layers of a pattern (decision D18)
    "window_attention": (Attention, dict(window=128)),
}

_WINDOW = {"mixer": "window_attention", "window": 256}
_TWO_KINDS = {"mixer": "memory_and_attention", "tied_write": False, "erase_heads": "half"}

# names that stand for one sequence layer after another, by decoder layer, again and again; the last decoder layer has
# the last of them (decision D24)
PATTERNS: dict[str, tuple[dict, ...]] = {
    # half of the memory's heads erase, which tracks a state; the others only add, which counts and holds more pairs
    "hope": (_WINDOW, _TWO_KINDS | {"norm_limit": 1e4}),
    # queries, keys and values of single tokens: reflections along keys that vary with their neighbours turn a state out
    # of its plane, so this keeps parity for longer; language would rather have the convolutions (experiment `choice`)
    "hope_tracking": (_WINDOW, {"mixer": "memory_and_attention", "qkv_conv": 0}),
    # the default with such keys: what follows its neighbours adds up to no count (experiment `languages`)
    "hope_counting": (_WINDOW, _TWO_KINDS | {"norm_limit": 1e4, "qkv_conv": 0}),
}

# what a pattern stood for in configurations saved with earlier defaults
_ALTERNATING = ({"mixer": "hope_memory"}, _WINDOW)
_ONE_KIND = (_WINDOW, {"mixer": "memory_and_attention"})
FORMER_PATTERNS: dict[int, dict[str, tuple[dict, ...]]] = {
    2: {"hope": _ALTERNATING}, 3: {"hope": _ALTERNATING}, 4: {"hope": _ONE_KIND},
    5: {"hope": (_WINDOW, _TWO_KINDS)},
}  # fmt: skip
# the same of a sequence layer, as changes of its options
_BOUNDED = {"linear_attention": {"norm_limit": 8.0}, "retnet": {"norm_limit": 8.0}}
FORMER: dict[int, dict[str, dict]] = dict.fromkeys(range(1, 6), _BOUNDED) | {
    2: {"hope_memory": {"conv_init": "uniform", "qkv_conv_init": "last", "initial_erase": 0.5}} | _BOUNDED
}


def pattern_of(name: str, defaults: int, layers: int) -> tuple[dict, ...]:
    """The sequence layers that a pattern's name stands for in a model of so many, from the first; they repeat."""
    former = FORMER_PATTERNS.get(defaults, {}).get(name)
    if former and defaults < 4:  # which began in the first decoder layer
        return former
    entries = former or PATTERNS[name]
    first = -layers % len(entries)
    return entries[first:] + entries[:first]


# where a layer's options are listed, if not in its own signature
_SETTINGS = {SelfModifyingTitans: (TitansConfig,), MemoryBesideAttention: (MemoryBesideAttention, TitansConfig)}
_SIZES = ("dim", "num_heads")


@cache
def mixer_options(name: str) -> list[str]:
    """The options a sequence layer takes, besides its width and number of heads.

    Raises:
        ValueError: an unknown name, or that of a pattern.
    """
    if name in PATTERNS:
        layers = ", ".join(entry["mixer"] for entry in PATTERNS[name])
        raise ValueError(f"mixer {name!r} is a pattern of layers for a HopeConfig: {layers}; name one of them")
    if name not in MIXERS:
        raise ValueError(f"mixer {name!r} is unknown; known are {', '.join([*PATTERNS, *MIXERS])}")
    layer = MIXERS[name][0]
    named = (option for part in _SETTINGS.get(layer, (layer,)) for option in inspect.signature(part).parameters)
    return [option for option in dict.fromkeys(named) if option not in (*_SIZES, "options")]


def build_mixer(name: str, dim: int, num_heads: int, **options) -> nn.Module:
    """A sequence layer by name, its settings changed by `options`.

    Raises:
        ValueError: an unknown name or option; the message lists the known ones.
    """
    known = mixer_options(name)
    layer, settings = MIXERS[name]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(f"mixer {name!r} has no option {', '.join(unknown)}; it takes {', '.join(known)}")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    return layer(dim, num_heads, **(settings | options))
