"""The class of every pre-trained model with levels, whichever class of the Llama family it was made of."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nestling.cms.arguments import check_ids, check_spelling, scoring
from nestling.cms.cache import check_plain
from nestling.cms.learning_model import LearningMixin
from nestling.cms.rows import booleans, rows_of, text_positions
from nestling.utils.files import write_text

RECIPE, FORMAT = "levels.json", "nestling-levels-1"


class StackedForCausalLM(LearningMixin, PreTrainedModel, GenerationMixin):
    """A Llama-family model with levels: its forward reads streams and lets the levels learn.

    It shares everything with the model it was made of, and computes what that model's class computes wherever nothing
    is learned. What a call's streams have learned goes in with the call (`nestling.cms.fast_linear`).

    Attributes:
        original: the class of that model, such as LlamaForCausalLM.
        recipe: the arguments of `stack_levels`.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, model: PreTrainedModel, recipe: dict[str, Any]) -> None:
        nn.Module.__init__(self)  # the model is initialised: this one takes over what it has
        vars(self).update(_class_settings(type(model), type(self)) | vars(model))
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
    def kind(self) -> str:
        """The name under which states know this model."""
        return f"Stacked{self.original.__name__}"

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> StackedForCausalLM:
        """The model in a folder that `save_pretrained` wrote, with its levels (`nestling.cms.load_stacked`)."""
        from nestling.cms.files import load_stacked

        if options:
            raise TypeError(f"from_pretrained of a model with levels takes a folder alone, not {', '.join(options)}")
        return load_stacked(folder)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """As Hugging Face saves a model, with the recipe of its levels beside it (`nestling.cms.files`)."""
        super().save_pretrained(save_directory, **options)
        write_text(Path(save_directory) / RECIPE, json.dumps({"format": FORMAT, **self.recipe}, indent=2) + "\n")

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
        return self.original.forward(self, **self._plain(call))

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
        if call.get("output_attentions") and self.config._attn_implementation != "eager":
            raise ValueError("output_attentions needs attention that keeps its maps: attn_implementation='eager'")
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


def _class_settings(theirs: type, ours: type) -> dict[str, Any]:
    """What Hugging Face reads from a model and the original's class sets: split modules, tied weights, plans, ..."""
    found = {}
    for name in dir(theirs):
        value = inspect.getattr_static(theirs, name)
        if name.startswith("__") or callable(value) or hasattr(value, "__get__"):
            continue
        if inspect.getattr_static(ours, name, None) != value:
            found[name] = value
    return found
