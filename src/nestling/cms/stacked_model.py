"""The class of every pre-trained model with levels, whichever class of the Llama family it was made of."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from nestling.cms.arguments import check_spelling
from nestling.cms.learning_model import LearningMixin
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
        return self.original.forward(self, **call)


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
