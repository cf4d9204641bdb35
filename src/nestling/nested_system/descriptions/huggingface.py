"""Models of Hugging Face as memories: the Llama family, GPT-2, ViT and what is built as they are."""

from __future__ import annotations

from torch import nn

from nestling.nested_system.describe import Place, describes, describes_if, transparent
from nestling.nested_system.descriptions.torch_modules import Parts, attention, gain
from nestling.nested_system.formalism import AssociativeMemory, Cost, Solver
from nestling.nested_system.frequency import NEVER

# families whose containers do nothing but call their parts
_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "gemma", "gemma2", "smollm3", "gpt2", "vit")


def _from_library(module: nn.Module) -> bool:
    return type(module).__module__.startswith("transformers.")


def _holds_nothing(module: nn.Module) -> bool:
    return not module._parameters and not module._buffers


def _is_attention(module: nn.Module) -> bool:
    """The library's softmax attention: three projections and an output of its one interface of kernels."""
    parts = ("q_proj", "k_proj", "v_proj")
    return (
        _from_library(module)
        and type(module).__name__.endswith("Attention")
        and all(isinstance(getattr(module, part, None), nn.Linear) for part in parts)
        and all(hasattr(module, name) for name in ("head_dim", "scaling", "is_causal"))
    )


@describes_if(_is_attention)
def projected_attention(module: nn.Module, place: Place) -> Parts:
    """Attention with q_proj, k_proj, v_proj and o_proj."""
    size = module.head_dim
    output = next((name for name in ("o_proj", "out_proj", "dense") if place.has(name)), None)
    return attention(
        place, module.q_proj.out_features // size, module.k_proj.out_features // size, size,
        dtype=module.q_proj.weight.dtype, window=getattr(module, "sliding_window", None),
        sources=("q_proj", "k_proj", "v_proj"), outputs=(output,) if output else (), causal=module.is_causal,
    )  # fmt: skip


@describes("transformers.models.gpt2.modeling_gpt2.GPT2Attention")
def gpt2_attention(module: nn.Module, place: Place) -> Parts:
    """GPT-2's attention: one joint projection."""
    return attention(
        place, module.num_heads, module.num_heads, module.head_dim, dtype=module.c_attn.weight.dtype,
        sources=("c_attn",), outputs=("c_proj",),
    )  # fmt: skip


@describes("transformers.pytorch_utils.Conv1D")
def conv1d(module: nn.Module, place: Place) -> Parts:
    """GPT-2's linear map, stored transposed."""
    yield place.weights("linear map", retrieval="y = W x", macs=module.weight.numel())


@describes("transformers.models.vit.modeling_vit.ViTEmbeddings")
def vit_embeddings(module: nn.Module, place: Place) -> Parts:
    """The learned class token and positions."""
    width = module.cls_token.shape[-1]
    yield place.weights(
        "embedding", retrieval="y = x + p", macs=0, name="positions", keys="x, a position",
        read_bytes=width * module.cls_token.element_size(),
    )  # fmt: skip


def _is_norm(module: nn.Module) -> bool:
    return _from_library(module) and type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not module._buffers


@describes_if(_is_norm)
def norm(module: nn.Module, place: Place) -> Parts:
    """A normalisation with gains."""
    if module._parameters:
        yield gain(place, sum(p.numel() for p in module.parameters(recurse=False)))


@describes_if(lambda module: _from_library(module) and type(module).__name__.endswith("RotaryEmbedding"))
def rotary(module: nn.Module, place: Place) -> Parts:
    """Fixed frequencies: nothing is ever learned."""
    tensors = place.tensors()
    size = sum(t.bytes for t in tensors)
    yield AssociativeMemory(
        place.path(),
        "fixed positions",
        "a position",
        "its angles",
        "—",
        retrieval="angle = position · ω",
        update="never",
        solver=Solver("none"),
        frequency=NEVER,
        context="none",
        tensors=tensors,
        cost=Cost(0, size, 0, size),
    )


def _is_mlp(module: nn.Module) -> bool:
    """A feed-forward block: linear maps and functions without parameters."""
    maps = [m for m in module.children() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    others = [m for m in module.children() if m not in maps]
    empty = all(next(m.parameters(), None) is None for m in others)
    return (
        _from_library(module)
        and type(module).__name__.endswith("MLP")
        and _holds_nothing(module)
        and bool(maps)
        and empty
    )


@describes_if(_is_mlp)
def mlp(module: nn.Module, place: Place) -> Parts:
    """The block of a Transformer that is one level of a continuum memory (NL Sec. 7)."""
    macs = sum(p.numel() for p in module.parameters() if p.ndim == 2)
    yield place.weights("MLP block", None, retrieval="y = W₁ σ(W₂ x)", macs=macs)


@describes_if(
    lambda module: (
        _holds_nothing(module)
        and (
            type(module).__module__ in ("transformers.activations", "transformers.pytorch_utils")
            or (
                any(type(module).__module__.startswith(f"transformers.models.{family}.") for family in _FAMILIES)
                and not type(module).__name__.endswith("Attention")
            )
        )
    )
)
def container(module: nn.Module, place: Place) -> Parts:
    """Blocks and heads of known families."""
    return transparent(module, place)
