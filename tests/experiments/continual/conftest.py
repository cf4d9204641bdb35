"""A tiny model for the experiments on continual learning."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestling.training.tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny Llama that reads bytes."""
    torch.manual_seed(0)
    tokenizer, path = byte_tokenizer(), tmp_path_factory.mktemp("model")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )).save_pretrained(path)  # fmt: skip
    tokenizer.save_pretrained(path)
    return str(path)
