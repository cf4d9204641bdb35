"""The class of every pre-trained model with levels, whichever class of the Llama family it was made of."""

from __future__ import annotations

import copy
import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nestling.cms.arguments import check_ids, check_spelling, scoring
from nestling.cms.attention_maps import keeping_model
from nestling.cms.cache import check_plain
from nestling.cms.learning_model import LearningMixin
from nestling.cms.rows import booleans, rows_of, text_positions
from nestling.utils.auto_classes import KnownByFile, NeverCopied, register


class StackedConfig(KnownByFile, NeverCopied, PreTrainedConfig):
    """What a folder says of a model with levels; in memory such a model keeps the original's configuration.

    Attributes:
        original: the configuration of the model that was given levels, as a dict.
        levels: the arguments of `stack_levels`.
    """

    model_type = "nestling_stacked"

    original: dict | None = None
    levels: dict | None = None

    def build(self) -> StackedForCausalLM:
        """The model with its levels, freshly drawn, in torch's default dtype."""
        from nestling.cms.stack import stack_levels

        if self.original is None or self.levels is None:
            raise ValueError("StackedConfig needs the configuration of a model and its levels: use stack_levels")
        config = AutoConfig.for_model(**self.original)
        if self._attn_implementation_internal is not None:
            config._attn_implementation = self._attn_implementation_internal
        model = AutoModelForCausalLM.from_config(config, dtype=torch.get_default_dtype())
        return stack_levels(model, **self.levels)


class StackedForCausalLM(LearningMixin, NeverCopied, PreTrainedModel, GenerationMixin):
    """A Llama-family model with levels: its forward reads streams and lets the levels learn.

    It shares everything with the model it was made of, and computes what that model's class computes wherever nothing
    is learned. What a call's streams have learned goes in with the call (`nestling.cms.fast_linear`).

    Attributes:
        original: the class of that model, such as LlamaForCausalLM.
        recipe: the arguments of `stack_levels`.
    """

    config_class = StackedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_compile_fullgraph = False  # a chunk's end is decided in Python

    def __init__(self, model: PreTrainedModel | StackedConfig, recipe: dict[str, Any] | None = None) -> None:
        nn.Module.__init__(self)  # the model is initialised: this one takes over what it has
        if isinstance(model, StackedConfig):  # as the library makes a model to load weights into it
            self.__dict__.update(vars(model.build()))
            self.learner.backbone.model = self
        else:
            self.__dict__.update(_class_settings(type(model), type(self)) | vars(model))
            self.original, self.recipe = type(model), recipe

    def __getattr__(self, name: str) -> Any:
        """What the original's class defines beside what every Hugging Face model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = inspect.getattr_static(vars(self).get("original"), name, None)
            if found is None or name.startswith("__"):
                raise
            return found.__get__(self, type(self)) if hasattr(found, "__get__") else found

    @property
    def _is_stateful(self) -> bool:
        """Whether tokens cannot be taken back: assisted decoding is refused while levels learn."""
        return self.reads

    @property
    def kind(self) -> str:
        """The name under which states know this model."""
        return f"Stacked{self.original.__name__}"

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **options: Any
    ) -> StackedForCausalLM:
        """The model in a folder that `save_pretrained` wrote, with its levels; options are Hugging Face's.

        Raises:
            ValueError: weights that do not belong to the levels, where nobody asks for output_loading_info to see it.
        """
        wanted, where = options.pop("output_loading_info", False), pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(where, *args, output_loading_info=True, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise  # not of the weights' sizes
            raise ValueError(f"the weights in {where} do not fit its levels: {error}") from error
        model, info = loaded
        if not wanted and (wrong := sorted(info["missing_keys"] | info["unexpected_keys"])):
            raise ValueError(f"the weights in {where} do not fit its levels: {len(wrong)} differ, such as {wrong[0]}")
        model.freeze_levels()
        return (model, info) if wanted else model

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """As Hugging Face saves a model; the configuration says what was given levels, and which."""
        saved, config = copy.copy(self), copy.copy(self.config)  # nothing is written to the model
        config.architectures = [self.original.__name__]
        saved.config = StackedConfig(original=config.to_diff_dict(), levels=self.recipe, dtype=self.config.dtype)
        super(StackedForCausalLM, saved).save_pretrained(save_directory, **options)

    def freeze_levels(self) -> None:
        """Keep frozen levels from every outer optimiser too."""
        for level, modules in zip(self.learner.levels, self.learner.modules):
            for module in modules if level.frozen else ():
                module.weight.requires_grad_(False)

    def level_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Each level's shared weights: where every stream's level begins."""
        return {i: [m.weight for m in modules] for i, modules in enumerate(self.learner.modules)}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        next_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the model's own forward; levels learn from `input_ids` while it reads, and the cache carries them.

        next_tokens: see `LearningMixin.read`.
        """
        call: dict[str, Any] = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        call |= dict(past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache)
        call |= dict(logits_to_keep=logits_to_keep, **kwargs)
        if self.reads:
            return self.read(**call, next_tokens=next_tokens)
        check_spelling(kwargs)
        check_plain(past_key_values)
        asked = kwargs.get("output_attentions", self.config.output_attentions) and not torch.compiler.is_compiling()
        return self.original.forward(keeping_model(self) if asked else self, **self._plain(call))

    def _plain(self, call: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the original's forward, of which it would pass over or misread some.

        It attends across the texts of packed rows wherever it has a mask or a cache, takes an additive mask [B, T] for
        its opposite, and leaves out the loss of shift_labels alone.
        """
        ids, mask, kwargs = call["input_ids"], call["attention_mask"], call
        given = call["inputs_embeds"] if ids is None else ids
        if given is None or torch.compiler.is_compiling():
            return call
        call, shape, vocab = dict(call), tuple(given.shape[:2]), self.config.vocab_size
        if ids is not None:
            call["input_ids"] = check_ids(ids, vocab)
        call |= scoring(call.pop("labels"), kwargs, shape, vocab) or {}
        call.pop("vocab_size", None)
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return call  # of another kind: it says itself which token sees which
        cache = call["past_key_values"]
        seen = 0 if cache is None else cache.get_seq_length()
        rows = rows_of(shape, mask, call["position_ids"], kwargs, seen)
        if rows is not None and rows.packed:
            if seen or call["use_cache"] or not bool(rows.real.all()):
                raise ValueError("packed rows are read whole: without padding, past_key_values or use_cache=True")
            call |= dict(position_ids=text_positions(rows), attention_mask=None, past_key_values=None, use_cache=False)
        elif mask is not None and mask.is_floating_point():
            call["attention_mask"] = booleans(mask)
        return call


register(StackedConfig, StackedForCausalLM)


def _class_settings(theirs: type, ours: type) -> dict[str, Any]:
    """What Hugging Face reads from a model and the original's class sets: split modules, tied weights, plans, ..."""
    found = {}
    for name in dir(theirs):
        value = inspect.getattr_static(theirs, name)
        if name.startswith("__") or name in vars(ours) or callable(value) or hasattr(value, "__get__"):
            continue
        if inspect.getattr_static(ours, name, None) != value:
            found[name] = value
    return found
