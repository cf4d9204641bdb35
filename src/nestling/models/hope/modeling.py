"""Hope as a Hugging Face model: HopeModel, HopeForCausalLM (NL Sec. 8.3, Eqs. 94-97)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from nestling.cms.arguments import check_ids, check_names, scoring
from nestling.cms.blocks import ContinuumMemory
from nestling.cms.cache import LevelsCache, check_plain
from nestling.cms.learning_model import LearningMixin
from nestling.cms.rows import rows_of
from nestling.layers.beside import MemoryBesideAttention
from nestling.models.hope.backbone import make_learner
from nestling.models.hope.cache import check_cache
from nestling.models.hope.configuration import HopeConfig
from nestling.models.hope.inputs import Packed, tokens_read
from nestling.utils.auto_classes import NeverCopied
from nestling.utils.offload import brought


class HopeDecoderLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then the continuum memory's residual blocks."""

    def __init__(self, config: HopeConfig, index: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = config.build_layer_mixer(index)
        self.memory = ContinuumMemory(
            config.hidden_size,
            config.levels,
            config.cms_variant,
            intermediate_size=config.intermediate_size,
            activation=config.hidden_act,
            gated=config.gated_mlp,
            norm_eps=config.rms_norm_eps,
        )
        # GPT-2's rule: the residual stream has the same size after any number of branches
        self.output_scale = (config.num_hidden_layers * (1 + len(config.levels))) ** -0.5
        for module in [m for m in self.modules() if m is not self]:
            module._is_hf_initialized = True  # drawn by this layer: the library would fill linear maps its own way

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Each part by its own rule (the mixer knows its initial states and gate biases), its output scaled down."""
        for part in (self.norm, self.mixer, self.memory):
            part.reset_parameters()
        outputs = self.mixer.outputs if isinstance(self.mixer, MemoryBesideAttention) else (self.mixer.out_proj,)
        for output in (*outputs, *(block.down_proj for block in self.memory.blocks)):
            output.weight.mul_(self.output_scale)

    # the state goes in and comes out as a value, by position: checkpointing drops a cache, and recomputes with values
    def forward(
        self, hidden: Tensor, state: Any = None, mask: Tensor | None = None, packed: Packed | None = None
    ) -> tuple[Tensor, Any]:
        """hidden [B, T, D], the layer's state and padding mask -> hidden [B, T, D] and the new state.

        At padding the mixer adds nothing. Of packed rows the state is that of every text, from the learned initial one.
        """
        if self.norm.weight.is_meta and not hidden.is_meta:
            with brought(self):
                return self._forward(hidden, state, mask, packed)
        return self._forward(hidden, state, mask, packed)

    def _forward(self, hidden: Tensor, state: Any, mask: Tensor | None, packed: Packed | None) -> tuple[Tensor, Any]:
        mixer_state, memory_state = (None, None) if state is None else state
        normed = self.norm(hidden)
        if packed is None:
            mixed, mixer_state = self.mixer(normed, mixer_state, mask)
        else:
            mixed, mixer_state = self.mixer(packed.apart(normed), None, packed.mask)
            mixed = packed.together(mixed)
        if mask is not None:
            mixed = mixed.masked_fill(~mask[..., None], 0)
        hidden, memory_state = self.memory(hidden + mixed, memory_state)
        return hidden, (mixer_state, memory_state)


class HopePreTrainedModel(NeverCopied, PreTrainedModel):
    """Weights, saving and loading, common to all Hope models."""

    config_class = HopeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HopeDecoderLayer"]  # noqa: RUF012 - read by Hugging Face
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True
    _can_record_outputs = {"hidden_states": HopeDecoderLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """A decoder layer draws its own weights; the base class fills the embedding, the output matrix and the norm."""
        if isinstance(module, HopeDecoderLayer):
            _reset_unloaded(module)
        else:
            super()._init_weights(module)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # for code outside its own package the base class passes over modules without parameters of their own, such as a
        # decoder layer, and would leave what a loaded checkpoint lacks as uninitialised memory
        super()._initialize_weights(module, False)

    def level_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Each level of the continuum memory: its parameters in all layers."""
        levels: dict[int, list[nn.Parameter]] = {}
        for module in self.modules():
            if isinstance(module, ContinuumMemory):
                for index, parameters in module.level_parameters().items():
                    levels.setdefault(index, []).extend(parameters)
        return levels


def _reset_unloaded(module: nn.Module) -> None:
    """`reset_parameters`, but what a checkpoint has filled stays as it is."""
    tensors = [*module.parameters(), *module.buffers()]
    loaded = [tensor for tensor in tensors if getattr(tensor, "_is_hf_initialized", False)]
    if len(loaded) < len(tensors):
        kept = [tensor.clone() for tensor in loaded]
        module.reset_parameters()
        for tensor, value in zip(loaded, kept):
            tensor.copy_(value)


class HopeModel(HopePreTrainedModel):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HopeDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.signature = config.state_signature()
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the input, given everything the cache has seen.

        Args:
            input_ids: [B, T], or inputs_embeds [B, T, D].
            attention_mask: [B, T], or [B, seen + T], see `nestling.cms.rows.real_tokens`. Padding writes nothing and
                takes no position; its own output is that of its embedding alone.
            position_ids: not needed (positions are counted in the state), and checked to agree. Where they begin again
                at 0 inside a row, the row is packed: the state begins anew there.
            past_key_values: the cache an earlier call returned. It is brought up to date.
            use_cache: return the cache; None follows the configuration, and is False in training.
            kwargs: cu_seq_lens_q or seq_idx, which say the same of packed rows.

        Raises:
            ValueError, TypeError: ids outside the vocabulary, an empty input, a mask, positions or cache that do not
                fit, packed rows that follow something, an unknown argument.
        """
        check_names(kwargs)
        if kwargs.get("output_attentions", getattr(self.config, "output_attentions", False)):
            raise ValueError("output_attentions is not available: the sequence layers keep no attention maps")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            inputs_embeds = self.embed_tokens(check_ids(input_ids, self.config.vocab_size))
        hidden = inputs_embeds
        batch, tokens = hidden.shape[:2]
        if batch == 0 or tokens == 0:
            raise ValueError(f"the input is empty ({batch} sequences of {tokens} tokens): give at least one token")
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        check_plain(past_key_values)
        if past_key_values is not None:
            check_cache(past_key_values, len(self.layers), self.signature, batch)
        elif use_cache:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        limit = self.config.max_position_embeddings
        if limit is not None and seen + tokens > limit:
            raise ValueError(f"{seen + tokens} tokens are more than max_position_embeddings ({limit})")
        read = None
        if position_ids is not None and not torch.compiler.is_compiling():
            read = tokens_read(past_key_values, batch)
        rows = rows_of((batch, tokens), attention_mask, position_ids, kwargs, seen, read)
        packed = Packed.of(rows) if rows is not None and rows.packed else None
        if packed is not None and seen:
            raise ValueError("packed rows begin with no past: read them with past_key_values=None, or each text alone")

        states = []
        for index, layer in enumerate(self.layers):
            state = None if past_key_values is None else past_key_values.layers[index].state
            hidden, state = layer(hidden, state, None if rows is None else rows.real, packed)
            states.append(state if packed is None else packed.ends(state))
        # only after every layer went well: a failed call leaves the cache as it was
        if use_cache:
            for cached, state in zip(past_key_values.layers, states):
                cached.store(state, tokens, self.signature)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values if use_cache else None
        )


class HopeForCausalLM(LearningMixin, HopePreTrainedModel, GenerationMixin):
    """HopeModel with an output matrix over the vocabulary.

    Levels of the continuum memory whose chunk is shorter than a context learn from what the model reads, each stream
    for itself; the cache carries them (`nestling.cms.LearningMixin`).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - read by Hugging Face

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model = HopeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.learner = make_learner(self)
        self.post_init()

    def set_context_length(self, tokens: int) -> None:
        """Say how long a context is: levels with a smaller chunk_size learn inside it."""
        self.config.context_length = tokens
        self.learner = make_learner(self)

    def _new_cache(self) -> LevelsCache:
        return LevelsCache(config=self.config)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        next_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the mean next-token loss if there are labels.

        Args:
            labels: [B, T], input_ids with -100 where no loss is taken; shifted inside (shift_labels are so already).
            logits_to_keep: compute logits for the last so many tokens (0: all), or for these indices.
            next_tokens: [B, 1], those after the input, for levels that learn from what is read (`LearningMixin.read`).
            Others as in HopeModel.
        """
        check_names(kwargs)
        if self.reads:
            self._check_call(inputs_embeds if input_ids is None else input_ids, past_key_values)
            return self.read(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
                inputs_embeds=inputs_embeds, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep,
                next_tokens=next_tokens, **kwargs,
            )  # fmt: skip
        given = inputs_embeds if input_ids is None else input_ids
        scored = None if given is None else scoring(labels, kwargs, given.shape[:2], self.config.vocab_size)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, keep] if scored is None else hidden)  # a loss takes all
        return CausalLMOutputWithPast(
            loss=None if scored is None else self.loss_function(logits, **scored),
            logits=logits if scored is None else logits[:, keep],
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _check_call(self, ids: Any, cache: Any) -> None:
        """The checks of HopeModel, for a call that the levels learn from."""
        if ids is None:
            return
        for place in cache.places(ids.shape[0]) if isinstance(cache, LevelsCache) else ():
            check_cache(place.cache, len(self.model.layers), self.model.signature, len(place.rows))
        if cache is not None and not isinstance(cache, LevelsCache):
            check_cache(cache, len(self.model.layers), self.model.signature, ids.shape[0])
        seen, context = 0 if cache is None else cache.get_seq_length(), self.learner.context
        total = seen + ids.shape[1] if context is None else min(context, seen + ids.shape[1])
        limit = self.config.max_position_embeddings
        if limit is not None and total > limit:
            raise ValueError(f"{total} tokens are more than max_position_embeddings ({limit})")
