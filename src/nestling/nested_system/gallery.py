"""The paper's own decompositions as systems, and the pictures and the page made of them.

`python -m nestling.nested_system.gallery docs` writes docs/gallery.md, docs/images/levels/*.svg and the tables of
docs/levels.md.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nestling.nested_system.analyze import levels
from nestling.nested_system.describe import Place, describes
from nestling.nested_system.formalism import AssociativeMemory, Cost, Solver, Transfer
from nestling.nested_system.frequency import EVERY_TOKEN
from nestling.nested_system.system import NestedSystem
from nestling.schedule import Level


class LinearAttention(nn.Module):
    """y_t = M_t W_q x_t,  M_t = M_{t-1} + W_v x_t (W_k x_t)^T  (NL Eqs. 14-18), one head.

    Args:
        dim: width.
        start: M_0 is learned (the AdaTransformer of NL Eq. 21), else zero.
        writes: False keeps M_t at M_0: what is left is an MLP without its non-linearity.
    """

    def __init__(self, dim: int, *, start: bool = False, writes: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False) if writes else None
        self.v_proj = nn.Linear(dim, dim, bias=False) if writes else None
        self.start = nn.Parameter(torch.randn(dim, dim) / dim**0.5) if start else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> y [B, T, D]."""
        q = self.q_proj(x)
        y = torch.zeros_like(q) if self.start is None else q @ self.start.mT
        if self.k_proj is not None:
            scores = (q @ self.k_proj(x).mT).tril()
            y = y + scores @ self.v_proj(x)
        return y


@describes(LinearAttention)
def linear_attention(module: LinearAttention, place: Place):
    """A Hebbian memory, written with every token; its start, if learned, is a memory of the outer loop."""
    width = module.q_proj.out_features
    adapts = module.k_proj is not None
    if module.start is not None:
        kind = "initial state" if adapts else "linear map"
        yield place.weights(
            kind, ("start",), retrieval="M₀" if adapts else "y = M₀ q", macs=0 if adapts else width**2, name="start"
        )
    if not adapts:
        return
    state = place.state("memory", (width, width), module.q_proj.weight.dtype)
    own = place.path("memory")
    yield AssociativeMemory(
        own, "in-context memory", "k", "v", "−⟨M k, v⟩  (NL Eq. 64)", retrieval="y = M q", update="M ← M + v kᵀ",
        solver=Solver("gradient", "gradient descent", "η = 1"), frequency=EVERY_TOKEN, context="sequence",
        feasible=f"ℝ^{width}×{width}", tensors=(state,), lifetime="context",
        cost=Cost(0, state.bytes, width**2, state.bytes, width**2, 2 * state.bytes),
    )  # fmt: skip
    for name, what in (("k_proj", "keys"), ("v_proj", "values"), ("q_proj", "queries")):
        yield Transfer(place.path(name), own, "generation", what)
    if module.start is not None:
        yield Transfer(place.path("start"), own, "initialization", "M₀ of every sequence (NL Eq. 28)")


@dataclass(frozen=True)
class Exhibit:
    """One decomposition: its name, its title, a sentence, and how it is made."""

    name: str
    title: str
    text: str
    build: Callable[[], NestedSystem]


def _sgd(model: nn.Module, momentum: float = 0.0) -> NestedSystem:
    return levels(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=256, n_positions=128, bos_token_id=0, eos_token_id=0)
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


def _transformer() -> NestedSystem:
    model = _gpt2()
    return levels(model, torch.optim.AdamW(model.parameters(), lr=3e-4))


def _muon() -> NestedSystem:
    model = _gpt2()
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer.h." in n]
    rest = [p for p in model.parameters() if all(p is not h for h in hidden)]
    return levels(model, [torch.optim.Muon(hidden, lr=3e-4), torch.optim.AdamW(rest, lr=3e-4)])


def _hope(mixer: str = "selfmod", **options) -> nn.Module:
    from nestling.models.hope import HopeConfig, HopeForCausalLM

    fixed = {"chunk_size": 64, "expansion": 1, "conv_size": 4}  # so that a new default draws no new picture
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = HopeConfig(**size, mixer=mixer, mixer_options=fixed, **options)
    with torch.device("meta"):
        return HopeForCausalLM(config)


def _titans() -> NestedSystem:
    model = _hope("titans")
    return levels(model, torch.optim.AdamW(model.parameters(), lr=3e-4))


def _hope_with_m3() -> NestedSystem:
    from nestling.optim import M3

    model = _hope(cms_levels=[{"chunk_size": None}, {"chunk_size": 32_768}])
    return levels(model, M3(model, lr=3e-4, periods=(1, 16)), tokens_per_step=4096)


def _hope_deployed() -> NestedSystem:
    return levels(_hope())


def _smollm2() -> nn.Module:
    """A model of SmolLM2-135M's sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49_152)
    heads = dict(num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


def _smollm2_stacked() -> NestedSystem:
    from nestling.cms import stack_levels

    return levels(stack_levels(_smollm2(), [Level(64), Level(512)], blocks=[-4, -3, -2, -1]))


EXHIBITS = (
    Exhibit(
        "linear",
        "A linear layer under gradient descent",
        "One level: the layer is a memory that maps its inputs to their local errors (NL Eqs. 8, 9).",
        lambda: _sgd(nn.Linear(64, 64, bias=False)),
    ),
    Exhibit(
        "linear-momentum",
        "The same with momentum",
        "Two levels: the momentum compresses the gradients, and the layer's next state needs it (NL Eqs. 10-13).",
        lambda: _sgd(nn.Linear(64, 64, bias=False), 0.9),
    ),
    Exhibit(
        "linear-attention",
        "Linear attention under gradient descent",
        "Two levels: a memory that every token is written into, and the projections that make its keys and values "
        "(NL Eqs. 14-18).",
        lambda: _sgd(LinearAttention(64)),
    ),
    Exhibit(
        "linear-attention-momentum",
        "Linear attention, with momentum",
        "Three levels.",
        lambda: _sgd(LinearAttention(64), 0.9),
    ),
    Exhibit(
        "mlp",
        "A linear block, as in a Transformer's MLP",
        "One level. Compare it with the next.",
        lambda: _sgd(LinearAttention(64, start=True, writes=False)),
    ),
    Exhibit(
        "ada-transformer",
        "The same block as an AdaTransformer's",
        "The same memory with one more level: what was its weight is now where every sequence starts (NL Eq. 21).",
        lambda: _sgd(LinearAttention(64, start=True)),
    ),
    Exhibit(
        "transformer-adamw",
        "A Transformer under AdamW",
        "Attention is found anew for every token; AdamW's two moments do not need one another and share a level.",
        _transformer,
    ),
    Exhibit(
        "transformer-muon",
        "A Transformer under Muon",
        "The orthogonalisation of a momentum is an inner problem of its own, five steps for each step (NL Eqs. 42-44). "
        "Embeddings, norms and biases are AdamW's.",
        _muon,
    ),
    Exhibit(
        "titans-adamw",
        "Titans under AdamW",
        "A deep memory with a momentum of its own learns inside the sequence; its initial state is learned outside.",
        _titans,
    ),
    Exhibit(
        "hope-m3",
        "Hope under M3",
        "Projections, learning rate and decay learn in the sequence too. M3 keeps a fast and a slow momentum; by "
        "Def. 2 the slow one is a higher level than the weights it helps to train. The second block of the continuum "
        "memory steps once in 32,768 tokens, "
        "and so do its momenta.",
        _hope_with_m3,
    ),
    Exhibit(
        "hope-deployed",
        "Hope when training has ended",
        "Without an optimiser every weight stands still, and what is left to learn is what learns in the context.",
        _hope_deployed,
    ),
    Exhibit(
        "smollm2",
        "SmolLM2-135M as it was trained",
        "Two levels: attention, and weights that stand still. Nothing lies between.",
        lambda: levels(_smollm2()),
    ),
    Exhibit(
        "smollm2-stacked",
        "SmolLM2-135M after stack_levels",
        "The MLPs of the last four blocks became two levels of 64 and 512 tokens (NL Sec. 7.3). What was their weight "
        "is now where every stream starts. The slower one adds up gradients until its chunk ends.",
        _smollm2_stacked,
    ),
)


def by_name(name: str) -> Exhibit:
    """An exhibit; ValueError lists those there are."""
    for exhibit in EXHIBITS:
        if exhibit.name == name:
            return exhibit
    raise ValueError(f"the gallery has no {name!r}; it has {', '.join(e.name for e in EXHIBITS)}")


def write_figures(folder: str | Path) -> list[Path]:
    """Every exhibit's picture as SVG."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for exhibit in EXHIBITS:
        paths.append(folder / f"{exhibit.name}.svg")
        exhibit.build().figure(paths[-1])
    return paths


def gallery_page(images: str = "images/levels", built: dict[str, NestedSystem] | None = None) -> str:
    """The gallery as Markdown: a picture and the levels of every exhibit."""
    lines = [
        "# Gallery of nested systems",
        "",
        "The decompositions of the paper, read from running code. The pictures and tables of this page are written by",
        "`python -m nestling.nested_system.gallery docs`; [levels](levels.md) says how to read them.",
        "",
    ]
    for exhibit in EXHIBITS:
        system = built[exhibit.name] if built else exhibit.build()
        lines += [
            f"## {exhibit.title}",
            "",
            exhibit.text,
            "",
            f"![{exhibit.title}: its levels as rows]({images}/{exhibit.name}.svg)",
            "",
        ]
        lines += ["| level | updated | memories |", "|--:|---|---|"]
        lines += [f"| {level.index} | {level.frequency} | {_kinds(level)} |" for level in system.levels] + [""]
    return "\n".join(lines)


def _kinds(level) -> str:
    counts: dict[str, int] = {}
    for memory in level.memories:
        counts[memory.kind] = counts.get(memory.kind, 0) + 1
    return ", ".join(f"{kind} ×{count}" if count > 1 else kind for kind, count in counts.items())


def update_page(page: str) -> str:
    """The page with the text between `<!-- levels NAME -->` and `<!-- end -->` written anew from the exhibit."""

    def section(match: re.Match) -> str:
        return f"{match[1]}\n```text\n{by_name(match[2]).build()}\n```\n\n<!-- end -->"

    return re.sub(r"(<!-- levels (\S+) -->\n).*?<!-- end -->", section, page, flags=re.DOTALL)


def write(docs: str | Path) -> None:
    """The gallery's page and pictures in a folder of documentation, and the tables of its page on levels."""
    docs = Path(docs)
    write_figures(docs / "images" / "levels")
    (docs / "gallery.md").write_text(gallery_page(), encoding="utf-8")
    if (page := docs / "levels.md").is_file():
        page.write_text(update_page(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1] if len(sys.argv) > 1 else "docs")
