"""Named sizes of Hope, from one that trains on a CPU in minutes to the paper's, and models of equal size."""

from __future__ import annotations

from typing import Any

from nestling.models.hope import HopeConfig, HopeForCausalLM
from nestling.utils.shapes import shapes_alone

# vocabulary, width, layers, width of the MLP (None: 8/3 of the width); bytes up to 10m; heads have 64 channels
_SIZES: dict[str, tuple[int, int, int, int | None]] = {
    "tiny": (256, 192, 3, None),
    "mini": (256, 256, 4, None),
    "10m": (256, 384, 5, 672),
    "35m": (32_000, 448, 7, 992),
    "125m": (32_000, 768, 12, 1664),
    "350m": (32_000, 1024, 24, 1728),
    "760m": (32_000, 1536, 24, 2560),
    "1.3b": (32_000, 2048, 24, 3200),
}

NAMES = tuple(_SIZES)


def config(name: str, **overrides: Any) -> HopeConfig:
    """The configuration of a named size, its fields changed by `overrides`.

    "tiny" (1.9M parameters) and "mini" (4.2M) read bytes and train on a CPU; the others are named by their parameters
    ("760m" and "1.3b" are the paper's).

    Raises:
        ValueError: an unknown name or field.
    """
    if name not in _SIZES:
        raise ValueError(f"size {name!r} is unknown; known are {', '.join(NAMES)}")
    vocabulary, width, layers, inner = _SIZES[name]
    fields = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
    }
    return HopeConfig(**(fields | overrides))


def parameters(config: HopeConfig) -> int:
    """Parameters of the model, shared ones counted once; nothing is allocated."""
    with shapes_alone():
        return sum(p.numel() for p in HopeForCausalLM(config).parameters())


def matched_config(
    config: HopeConfig,
    mixer: str | None = None,
    mixer_options: dict[str, Any] | None = None,
    *,
    tolerance: float = 0.02,
    **overrides: Any,
) -> HopeConfig:
    """A configuration with another sequence layer and as many parameters: the MLPs' width makes up the difference.

    Args:
        config: the model to match.
        mixer, mixer_options: the other sequence layer (None: config's own) and its options (None: its defaults).
        tolerance: largest relative difference in parameters.
        overrides: further fields to change, `mixers=[...]` among them.

    Raises:
        ValueError: no width of the MLPs comes close enough.
    """
    kept = {name: getattr(config, name) for name in _own_fields()}
    if mixer is not None:  # for all layers, with its own options
        kept |= {"mixer": mixer, "mixer_options": {}, "mixers": None}
    if overrides.get("mixers") is not None:
        kept |= {"mixer": None, "mixer_options": {}}
    kept |= overrides
    kept |= {} if mixer is None else {"mixer": mixer}
    kept |= {} if mixer_options is None else {"mixer_options": mixer_options}
    target = parameters(config)

    def of_width(width: int) -> HopeConfig:
        return HopeConfig(**(kept | {"intermediate_size": width}))

    # parameters are linear in the width
    base, one = parameters(of_width(1)), parameters(of_width(2))
    exact = 1 + (target - base) / (one - base)
    for step in (32, 8, 1):
        width = round(exact / step) * step
        if width >= 1 and abs(parameters(of_width(width)) - target) <= tolerance * target:
            return of_width(width)
    raise ValueError(
        f"no intermediate_size gives a {kept['mixers'] or kept['mixer']} model {target} parameters within "
        f"{tolerance:.1%}: without its MLPs it has {base - (one - base)}; change hidden_size or num_hidden_layers"
    )


def _own_fields() -> list[str]:
    """What HopeConfig itself declares, without what it derives."""
    return [name for name in HopeConfig.__annotations__ if name != "layer_types"]
