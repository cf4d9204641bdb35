"""Configuration of the Hope models."""

# no `from __future__ import annotations`: the strict dataclass checks types, and would see only their names
import difflib
import json
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig

from nestling.cms.blocks import ACTIVATIONS, VARIANTS
from nestling.layers.mixers import FORMER, PATTERNS, build_mixer, mixer_options, pattern_of
from nestling.memory.rule import META_GRADS
from nestling.models.hope.cache import LAYER_TYPE
from nestling.schedule import Level, check_order
from nestling.utils.auto_classes import KnownByFile, NeverCopied
from nestling.utils.shapes import shapes_alone

# the sequence layer of a configuration that names none, by the version of the defaults (decision D24)
DEFAULT_MIXERS = {1: "selfmod", 2: "hope", 3: "hope", 4: "hope", 5: "hope", 6: "hope"}

# what Hugging Face itself hands to a configuration besides its fields
_PASSED_ON = {
    "torch_dtype",
    "name_or_path",
    "num_labels",
    "attn_implementation",
    "experts_implementation",
    "output_attentions",
    "per_layer_config",
    "quantization_config",
    "auto_map",
    "custom_pipelines",
    "model_type",
    "tie_last_hidden_states",
    "task_specific_params",
    "finetuning_task",
    "tokenizer_class",
    *GenerationConfig._get_default_generation_params(),
}


@strict
class HopeConfig(KnownByFile, NeverCopied, PreTrainedConfig):
    """Configuration of a Hope model: a sequence layer and a continuum memory per decoder layer (NL Sec. 8.3).

    Args:
        vocab_size: tokens of the vocabulary (256: bytes).
        hidden_size: model width D.
        num_hidden_layers: decoder layers.
        num_attention_heads: heads of the sequence layer. None: heads of 64 channels, or 4 with `defaults` 1.
        intermediate_size: hidden width of each level's MLP; None is 8/3 of the width, up to a multiple of 32.
        mixer: the sequence layer: "hope" is attention over a window in one layer, and with a memory beside it in the
            next, "selfmod" the paper's layer, "attention" Hope-Attention; the baselines by their names. None: what
            `defaults` says.
        mixer_options: keyword arguments of the sequence layer; of a pattern such as "hope", each goes to the layers
            that take it.
        mixers: instead of the two, a sequence layer for each decoder layer, or a shorter list that repeats (decision
            D18). An entry is a name, or a dict of it and its options, `{"mixer": "attention", "window": 64}`;
            `num_heads` among them replaces num_attention_heads.
        cms_levels: levels of the continuum memory, fastest first, as dicts of `nestling.Level`'s fields; None is one
            level that the outer loop trains, the MLP of a Transformer.
        cms_variant: "sequential", "nested" or "independent".
        cms_meta_grad: how the outer loss is differentiated through what levels learn in a context: "full",
            "first_order" or "none" (decision D9).
        context_length: tokens of a context: levels with a smaller chunk_size learn inside it, each stream for itself,
            the others are trained by the outer loop (decision D10). `nestling train` sets it to its window. None:
            max_position_embeddings, or 8192.
        cms_layers: indices of the decoder layers whose levels learn in a context (negative ones from the end); None for
            all. In the others these levels are ordinary weights.
        hidden_act: activation of the MLPs.
        gated_mlp: MLPs with a gate, as Llama's.
        rms_norm_eps: of every RMS norm of the model.
        initializer_range: standard deviation of the embedding (and of an untied output matrix) at the start; None is
            hidden_size^-1/2 (0.02 in a model of 96 to 256 channels learns markedly slower). Layers draw their own
            weights by their own widths.
        tie_word_embeddings: one matrix for embedding and output.
        max_position_embeddings: longest text the model may see; None sets no limit.
        defaults: version of the defaults: 1 when the mixer was "selfmod", 2 and 3 when "hope" alternated memories and
            attention (in 2 the convolution in front of the gates was drawn at random and the erase began at a half), 4
            when all heads of its memory erased, 5 when sums met a bound, 6 now. None: 6, and 1 for a saved
            configuration that does not say, so that it loads as what it was.

    Raises:
        ValueError, TypeError: a value out of range, an unknown option, a field of another type.
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - read by Hugging Face

    vocab_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int | None = None
    intermediate_size: int | None = None
    mixer: str | None = None
    mixer_options: dict | None = None
    mixers: list | tuple | None = None
    cms_levels: list | tuple | None = None
    cms_variant: str = "sequential"
    cms_meta_grad: str = "full"
    context_length: int | None = None
    cms_layers: list | tuple | None = None
    hidden_act: str = "silu"
    gated_mlp: bool = True
    rms_norm_eps: float = 1e-6
    initializer_range: float | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: int | None = None
    defaults: int | None = None
    use_cache: bool = True
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.defaults is None:  # only what transformers has saved names its version
            self.defaults = max(DEFAULT_MIXERS) if self.transformers_version is None else 1
        if self.defaults not in DEFAULT_MIXERS:
            raise ValueError(f"defaults must be one of {', '.join(map(str, DEFAULT_MIXERS))}; got {self.defaults}")
        if self.mixer is None:
            self.mixer = DEFAULT_MIXERS[self.defaults]
        if self.num_attention_heads is None:
            self.num_attention_heads = 4 if self.defaults == 1 else _heads(self.hidden_size)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("intermediate_size", "max_position_embeddings", "context_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 or None; got {getattr(self, name)}")
        if self.initializer_range is None:
            self.initializer_range = self.hidden_size**-0.5
        for name in ("rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        if self.cms_variant not in VARIANTS:
            raise ValueError(f"cms_variant must be one of {', '.join(VARIANTS)}; got {self.cms_variant!r}")
        if self.cms_meta_grad not in META_GRADS:
            raise ValueError(f"cms_meta_grad must be one of {', '.join(META_GRADS)}; got {self.cms_meta_grad!r}")
        if self.cms_layers is not None:
            count = self.num_hidden_layers
            if not self.cms_layers or not all(isinstance(i, int) and -count <= i < count for i in self.cms_layers):
                raise ValueError(
                    f"cms_layers must name decoder layers of the {count}, or be None; got {self.cms_layers}"
                )
            self.cms_layers = sorted({i % count for i in self.cms_layers})
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}")
        if self.intermediate_size is None:
            self.intermediate_size = -(-8 * self.hidden_size // 96) * 32
        levels = [Level()] if self.cms_levels is None else self.cms_levels
        self.cms_levels = [level.to_dict() for level in check_order(levels)]
        self.mixer_options = json_options(self.mixer_options or {})
        if self.mixers is not None:
            self.mixers = self._pattern()
        with shapes_alone():  # the layer checks its own options; nothing is allocated
            for index in range(min(self.num_hidden_layers, len(self._entries()))):
                self._checked(index)
        self.layer_types = [LAYER_TYPE] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Without `layer_types`, which follow from the rest: transformers itself refuses a type that it does not know,
        wherever it reads a configuration without its class (Trainer, on resuming)."""
        return {name: value for name, value in super().to_dict().items() if name != "layer_types"}

    @property
    def mixer_names(self) -> list[str]:
        """The sequence layer of each decoder layer, by name."""
        return [self.layer_mixer(index)[0] for index in range(self.num_hidden_layers)]

    def layer_mixer(self, index: int) -> tuple[str, dict[str, Any]]:
        """The sequence layer of a decoder layer: its name, and its options with `num_heads`."""
        entries = self._entries()
        entry = entries[index % len(entries)]
        former = FORMER.get(self.defaults, {}).get(entry["mixer"], {})
        options = {"num_heads": self.num_attention_heads} | former | entry
        return options.pop("mixer"), options

    def build_layer_mixer(self, index: int) -> nn.Module:
        """The sequence layer of a decoder layer."""
        name, options = self.layer_mixer(index)
        return build_mixer(name, self.hidden_size, **options)

    def _entries(self) -> list[dict[str, Any]]:
        """The sequence layers of the first decoder layers, with their options; they repeat."""
        if self.mixers is not None:
            return [{"mixer": entry} if isinstance(entry, str) else entry for entry in self.mixers]
        if self.mixer not in PATTERNS:
            return [self.mixer_options | {"mixer": self.mixer}]
        entries = pattern_of(self.mixer, self.defaults, self.num_hidden_layers)
        taken = [{"num_heads", *mixer_options(entry["mixer"])} for entry in entries]
        if unknown := set(self.mixer_options) - set().union(*taken):
            known = "; ".join(f"{e['mixer']} takes {', '.join(sorted(own))}" for e, own in zip(entries, taken))
            raise ValueError(f"no layer of mixer {self.mixer!r} has an option {', '.join(sorted(unknown))}: {known}")
        return [
            entry | {option: value for option, value in self.mixer_options.items() if option in own}
            for entry, own in zip(entries, taken)
        ]

    def _pattern(self) -> list[str | dict[str, Any]]:
        """`mixers` as JSON keeps it, each entry of a form that can be a sequence layer."""
        count = self.num_hidden_layers
        if not 1 <= len(self.mixers) <= count:
            raise ValueError(f"mixers must name 1 to {count} sequence layers, one a layer; got {len(self.mixers)}")
        if self.mixer_options:
            raise ValueError('mixer_options belong to `mixer`: with mixers, write {"mixer": name, option: value}')
        pattern = []
        for index, entry in enumerate(self.mixers):
            if not isinstance(entry, str | dict) or (isinstance(entry, dict) and "mixer" not in entry):
                raise ValueError(f'mixers[{index}] must be a name or {{"mixer": name, option: value}}; got {entry!r}')
            pattern.append(entry if isinstance(entry, str) else json_options(entry, f"mixers[{index}]"))
        names = {entry if isinstance(entry, str) else entry["mixer"] for entry in pattern}
        if self.mixer not in {*DEFAULT_MIXERS.values(), *names}:
            raise ValueError(f"mixer={self.mixer!r} has no effect beside mixers={pattern}: leave one of them out")
        return pattern

    def _checked(self, index: int) -> None:
        """Raise what a sequence layer says of its options, naming the layers of a pattern."""
        try:
            self.build_layer_mixer(index)
        except (ValueError, TypeError) as error:
            if self.mixers is None:
                raise
            layers = ", ".join(str(i) for i in range(index, self.num_hidden_layers, len(self.mixers)))
            raise type(error)(f"mixers[{index}] (decoder layers {layers}): {error}") from error

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        """Hugging Face would keep any name as an attribute: a misspelt option would be silently without effect."""
        for name in kwargs:
            if name in _PASSED_ON or name.startswith("_"):
                continue
            near = difflib.get_close_matches(name, type(self).__dataclass_fields__, n=1)
            hint = f"did you mean {near[0]}?" if near else "options of the sequence layer go into mixer_options"
            raise ValueError(f"HopeConfig has no option {name!r}: {hint}")

    def validate_layer_type(self) -> None:
        """Every layer keeps its state in this package's own kind of cache layer."""
        if self.layer_types != [LAYER_TYPE] * self.num_hidden_layers:
            raise ValueError(f"layer_types must be {LAYER_TYPE!r} for each of the {self.num_hidden_layers} layers")

    @property
    def levels(self) -> tuple[Level, ...]:
        """The continuum memory's levels."""
        return check_order(self.cms_levels)

    def state_signature(self) -> str:
        """What decides the shape and the meaning of a state: two models that share it can share a cache."""
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads"]
        names += ["defaults"] if self.defaults > 3 else []  # before, states were alike, and are on disk
        names += ["mixer", "mixer_options"] if self.mixers is None else ["mixers"]
        return json.dumps({name: getattr(self, name) for name in names}, sort_keys=True)


def _heads(width: int, size: int = 64) -> int:
    """Heads of `size` channels, or of the next more that divide the width."""
    return next(n for n in range(max(1, width // size), 0, -1) if width % n == 0)


def json_options(options: dict[str, Any], field: str = "mixer_options") -> dict[str, Any]:
    """Options as JSON keeps them: sets and tuples become lists, so that a saved configuration equals the original."""
    plain = {
        name: sorted(value) if isinstance(value, set | frozenset) else [*value] if isinstance(value, tuple) else value
        for name, value in options.items()
    }
    try:
        json.dumps(plain)
    except TypeError as error:
        raise TypeError(f"{field} must be plain numbers, strings, lists and dicts: {error}") from error
    return plain


def _raise_type_errors(config: type) -> None:
    """A field of another type raises TypeError (the strict dataclass has an exception of its own)."""
    assign = config.__setattr__

    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            assign(self, name, value)  # type: ignore[call-arg]
        except StrictDataclassFieldValidationError as error:
            raise TypeError(str(error.__cause__ or error)) from error

    config.__setattr__ = __setattr__


_raise_type_errors(HopeConfig)
