import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

FAMILIES = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def exact(model):
    """The model with norms that stay in float64: those of transformers go through float32."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon))
    return model


@pytest.fixture
def make():
    """A small randomly drawn model of a family, in float64 unless told otherwise."""

    def build(family="llama", dtype=torch.float64, **changes):
        torch.manual_seed(0)
        sizes = dict(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=None,
        )  # fmt: skip
        sizes |= dict(sliding_window=None) if family == "mistral" else {}
        model = AutoModelForCausalLM.from_config(FAMILIES[family](**(sizes | changes)))
        return (exact(model) if dtype == torch.float64 else model).to(dtype).eval()

    return build


@pytest.fixture
def ids():
    return torch.randint(31, (2, 41), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def made():
    """A small Llama in float64 and two streams."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    return exact(model).double().eval(), torch.randint(31, (2, 41))
