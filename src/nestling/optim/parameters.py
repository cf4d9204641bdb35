"""Which rule each parameter of a model takes: matrices are orthogonalised, embeddings, heads and the rest are not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

GROUPS = ("matrices", "embeddings", "heads", "rest")
HEAD_NAMES = ("lm_head", "head", "heads", "classifier", "score", "fc", "output", "qa_outputs", "logits")
TABLE_NAMES = re.compile(r"embed|position|pos_|token|codebook|memory_bank", re.IGNORECASE)
LINEAR = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)
CONVOLUTION = (nn.modules.conv._ConvNd,)
EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
WRAPPERS = ("module", "_orig_mod", "base_model")  # what wrappers of models put before names
NARROW = 8  # a bare 2-D parameter with a side up to this is a set of filters or vectors, no matrix


@dataclass(frozen=True)
class Entry:
    """One parameter: where it went, how more than two dimensions are read ("flatten", "batch"), and why."""

    name: str
    parameter: Tensor
    group: str
    why: str
    view: str | None = None


class ParameterSplit(list):
    """Parameter groups for an optimiser: `M3(split_parameters(model), lr=1e-3)`; `print` shows what was decided.

    Attributes:
        entries: one `Entry` per parameter, in the model's order.
        frozen: names of parameters left out because they need no gradient.
        matrices, embeddings, heads, rest: lists of parameters, for optimisers that take only some.
    """

    def __init__(self, entries: list[Entry], frozen: list[str]) -> None:
        self.entries, self.frozen = entries, frozen
        for group in GROUPS:
            for view in (None, "flatten", "batch"):
                named = [(e.name, e.parameter) for e in entries if e.group == group and e.view == view]
                if named:
                    options = {"group": group, "rule": "matrix" if group == "matrices" else "adamw", "view": view}
                    if group == "rest":
                        options["weight_decay"] = 0.0
                    self.append({"params": named, **options})

    def _of(self, group: str) -> list[Tensor]:
        return [entry.parameter for entry in self.entries if entry.group == group]

    matrices = property(lambda self: self._of("matrices"))
    embeddings = property(lambda self: self._of("embeddings"))
    heads = property(lambda self: self._of("heads"))
    rest = property(lambda self: self._of("rest"))

    def __str__(self) -> str:
        """One line per kind of parameter, layer numbers written as *."""
        kinds: dict[tuple, list[str]] = {}
        for e in self.entries:
            pattern = re.sub(r"\b\d+\b", "*", e.name)
            kinds.setdefault((e.group, pattern, tuple(e.parameter.shape), e.view, e.why), []).append(e.name)
        read = {"flatten": ", read as rows x the rest", "batch": ", read as a batch of matrices", None: ""}
        text = []
        for group in GROUPS:
            own = self._of(group)
            rule = {"matrices": "orthogonalised", "rest": "AdamW, no weight decay"}.get(group, "AdamW")
            text.append(f"{group}: {len(own)} tensors, {sum(p.numel() for p in own):,} parameters ({rule})")
            for (other, pattern, shape, view, why), names in kinds.items():
                if other == group:
                    name = f"{pattern} {list(shape)} x {len(names)}" if len(names) > 1 else f"{names[0]} {list(shape)}"
                    text.append(f"  {name}: {why}{read[view]}")
        if self.frozen:
            text.append(f"frozen, left out: {len(self.frozen)} tensors")
        return "\n".join(text)

    __repr__ = __str__


def split_parameters(
    model: nn.Module, *, heads: Iterable[str] | None = None, embeddings: Iterable[str] = ()
) -> ParameterSplit:
    """Sort a model's parameters into matrices, embeddings, heads and the rest, each once, shared ones included.

    Matrices are the weights of linear layers, of convolutions (read as rows x the rest) and bare parameters of two and
    more dimensions (three and more are batches of matrices: experts, or the initial states [n, H, o, i] of Hope's
    memories). Embeddings are embedding tables and what is tied to them. Heads are the output layers: what
    `get_output_embeddings()` returns, or the last linear layer under a name such as `head`, `classifier` or `fc`, or
    the last one of the model if it is of a kind of its own. The rest are vectors, scalars and depthwise filters.

    Args:
        model: any module.
        heads: parts of the names of the heads, in place of the search; () says that there is none.
        embeddings: parts of the names of more embeddings, such as a bare table of positions.

    Returns:
        ParameterSplit: groups with `rule`, `view` and names, to hand to M3; printable.

    Raises:
        ValueError: a given name is in no parameter's name.
    """
    owners: dict[Tensor, list[tuple[str, str, nn.Module]]] = {}  # (full name, own name, module) of every use
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            owners.setdefault(parameter, []).append((f"{path}.{own}" if path else own, own, module))
    for argument, patterns in (("heads", heads or ()), ("embeddings", embeddings)):
        for pattern in patterns:
            if not any(pattern in name for uses in owners.values() for name, _, _ in uses):
                raise ValueError(f"{argument} names {pattern!r}, which is in no parameter's name")
    outputs = _find_heads(model) if heads is None else {}
    entries, frozen = [], []
    for parameter, uses in owners.items():
        name = uses[0][0]
        if not parameter.requires_grad:
            frozen.append(name)
            continue
        table = next((n for n, _, module in uses if isinstance(module, EMBEDDING)), None)
        given = next((p for p in embeddings for n, _, _ in uses if p in n), None)
        if table is not None or given is not None:
            tied = f", tied to {', '.join(n for n, *_ in uses if n != table)}" if len(uses) > 1 else ""
            entries.append(Entry(name, parameter, "embeddings", f"embedding{tied}" if given is None else "named so"))
        elif parameter in outputs:
            entries.append(Entry(name, parameter, "heads" if parameter.ndim > 1 else "rest", outputs[parameter]))
        elif parameter.ndim > 1 and any(p in n for p in heads or () for n, _, _ in uses):
            entries.append(Entry(name, parameter, "heads", "named so"))
        else:
            entries.append(Entry(name, parameter, *_place(parameter, *uses[0])))
    return ParameterSplit(entries, frozen)


def is_table_name(name: str) -> bool:
    """Whether a parameter's name is that of an embedding table or of an output layer, where names are all there is."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    return parts[0] in HEAD_NAMES or any("embed" in part or part in ("wte", "wpe") for part in parts)


def _place(parameter: Tensor, name: str, own: str, module: nn.Module) -> tuple[str, str, str | None]:
    """(group, why, view) of a parameter that is neither an embedding table nor a head."""
    shape = parameter.shape
    if parameter.ndim < 2:
        return "rest", "vector" if parameter.ndim else "scalar", None
    if isinstance(module, CONVOLUTION):
        if module.groups > 1 and module.in_channels == module.groups:
            return "rest", "depthwise filters", None
        narrow = min(shape[0], shape[1:].numel()) == 1
        return ("rest", "vector", None) if narrow else ("matrices", "convolution", "flatten")
    if min(shape[-2:]) == 1:
        return "rest", "vectors", None
    if isinstance(module, LINEAR):
        return "matrices", "linear layer", None if parameter.ndim == 2 else "batch"
    if TABLE_NAMES.search(own) or shape[0] == 1:
        return "embeddings", "bare table", None
    if min(shape[-2:]) <= NARROW and parameter.ndim == 2:
        return "rest", "filters or vectors", None
    return "matrices", "bare parameter", None if parameter.ndim == 2 else "batch"


def _find_heads(model: nn.Module) -> dict[Tensor, str]:
    """Parameters of the output layers, and why they are taken for it."""
    if hasattr(model, "get_output_embeddings"):
        layer = model.get_output_embeddings()
        if layer is not None:
            return dict.fromkeys(layer.parameters(recurse=False), "output embeddings")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = [name for name in layers if name.split(".")[0] in HEAD_NAMES]
    if named:
        return dict.fromkeys(layers[named[-1]].parameters(recurse=False), "last linear layer of a head by its name")
    if layers and not hasattr(model, "get_output_embeddings"):
        *others, (last, layer) = [(re.sub(r"\d+", "*", name), module) for name, module in layers.items()]
        if all(name != last or module.weight.shape != layer.weight.shape for name, module in others):
            return dict.fromkeys(layer.parameters(recurse=False), "last linear layer of the model")
    return {}
