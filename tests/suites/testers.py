"""What transformers' test mixins ask of a model: small configurations, and inputs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.testing_utils import torch_device


class ModelTester:
    """A small language model's configuration and inputs, under the names that the mixins read."""

    batch_size, seq_length, is_training = 3, 9, True
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, vocab_size = 32, 2, 2, 64, 99
    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, parent: Any, config_class: type[PreTrainedConfig], **options: Any) -> None:
        self.parent, self.config_class, self.options = parent, config_class, options

    def get_config(self) -> PreTrainedConfig:
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        names += ("pad_token_id", "bos_token_id", "eos_token_id")
        return self.config_class(**{name: getattr(self, name) for name in names}, **self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        # no special tokens among them, as a text has none
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
