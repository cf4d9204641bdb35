"""Settings of the self-modifying Titans layer that tests go through, and small layers with them."""

import torch
from torch.utils._pytree import tree_leaves

from nestling.layers.titans import SelfModifyingTitans

DIM, HEADS = 6, 2

SETTINGS = {
    "default": {},
    "wide": dict(expansion=3, head_dim=4),
    "one_head": dict(num_heads=1),
    "linear": dict(architecture="linear"),
    "no_momentum": dict(momentum=False),
    "no_dgd": dict(dgd=False),
    "linear_no_dgd": dict(architecture="linear", dgd=False),
    "gated_erase": dict(gated_erase=True),
    "step_layer": dict(step="layer"),
    "step_plain": dict(step="plain", momentum=False),
    "read_after": dict(read="after"),
    "read_chunk": dict(read="chunk"),
    "slow_memory": dict(memory_chunk_size=8),
    "slow_projections": dict(chunk_size=8, memory_chunk_size=2),
    "slow_memory_read_chunk": dict(memory_chunk_size=8, read="chunk"),
    "chunk_1": dict(chunk_size=1),
    "one_chunk": dict(chunk_size=64),
    "adaptive_q": dict(adaptive=("k", "v", "q", "eta", "alpha")),
    "adaptive_some": dict(adaptive=("q", "alpha")),
    "adaptive_gates": dict(adaptive=("eta", "alpha"), memory_chunk_size=8),
    "static": dict(adaptive=()),
    "mlp_gates": dict(gates="mlp"),
    "mlp_gates_linear_memory": dict(gates="mlp", architecture="linear", memory_chunk_size=8),
    "targets_are_values": dict(adaptive=("k", "v", "q"), self_targets=False),
    "dot": dict(objective="dot", read="after"),
    "no_decay": dict(decay="none", adaptive=("k", "v", "eta")),
    "fixed_decay": dict(decay="fixed", adaptive=("k", "v", "eta")),
    "rate_one": dict(rate="one", adaptive=("k", "v", "alpha")),
    "raw_values": dict(normalize_values=False),
    "bare": dict(conv_size=0, output_gate=False),
    "norm_limit": dict(norm_limit=0.3),
    "retain_zero": dict(retain="zero"),
    "retain_zero_linear": dict(retain="zero", architecture="linear"),
    "erase_gate": dict(erase_gate=True),
    "erase_gate_alone": dict(erase_gate=True, dgd=False, momentum=False, tied_write=False),
    "erase_heads": dict(erase_gate=True, momentum=False, tied_write=False, erase_heads=1),
    "erase_gate_first_of_two": dict(erase_gate=True, erase_range=2.0),
    "erase_gate_last_of_two": dict(
        erase_gate=True, erase_range=2.0, erase_layer="last", objective="dot", gated_erase=True, read="after"
    ),
    "tracking": dict(
        erase_gate=True, erase_range=2.0, architecture="linear", objective="dot", momentum=False, conv_size=0
    ),
    "rate_gate": dict(rate="gate", step="layer", architecture="linear", memory_chunk_size=8),
    "rate_gate_joint": dict(rate="gate", initial_rate=1.0),
    "rate_gate_plain": dict(rate="gate", step="plain", adaptive=("k",)),
    "qkv_conv": dict(qkv_conv=3),
    "qkv_conv_static": dict(qkv_conv=4, conv_for="gates", adaptive=(), normalize_values=False),
    "qkv_conv_some": dict(qkv_conv=2, adaptive=("v", "q", "alpha"), conv_for=("eta", "gate", "x")),
    "conv_for_gates": dict(conv_for="gates", erase_gate=True),
    "projection_rate": dict(projection_rate=0.3),
    "projection_rate_static_gates": dict(
        projection_rate=0.1, adaptive=("k", "v"), architecture="linear", objective="dot", self_targets=False,
        rate="gate", step="layer", erase_gate=True, erase_range=2.0, tied_write=False, momentum=False, qkv_conv=4,
    ),
    "inner_skip": dict(skip="inner", first_rate=0.1),
    "inner_skip_all": dict(
        skip="inner", first_rate=0.02, adaptive=(), objective="dot", self_targets=False, rate="gate", step="layer",
        erase_gate=True, erase_range=2.0, erase_layer="last", tied_write=False, gated_erase=True, momentum=False,
        qkv_conv=4, conv_for="gates", read="after",
    ),
}  # fmt: skip


def build(**options):
    """A small layer in float64 whose parameters all differ from their initial values."""
    torch.manual_seed(0)
    layer = SelfModifyingTitans(DIM, **({"num_heads": HEADS, "chunk_size": 4} | options)).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
        if layer.alpha_bias is not None:
            layer.alpha_bias.sub_(3.0)  # decays that matter within a few tokens
    return layer


CHOICES = {
    "architecture": ("mlp", "linear"), "skip": ("outer", "inner"), "first_rate": (None, 0.3),
    "objective": ("l2", "dot"), "dgd": (True, False), "gated_erase": (False, True), "step": ("joint", "layer", "plain"),
    "erase_gate": (True, True, False), "erase_range": (1.0, 2.0), "erase_layer": ("first", "last"),
    "tied_write": (True, False), "erase_heads": (None, 1, "half"), "self_targets": (True, False),
    "momentum": (True, False),
    "rate": ("learned", "gate", "one"), "decay": ("learned", "none"), "retain": ("initial", "zero"),
    "read": ("before", "after", "chunk"), "conv_size": (3, 0), "qkv_conv": (0, 2),
    "conv_for": ("all", "gates", ("k", "erase", "x")), "normalize_values": (True, False),
    "memory_chunk_size": (None, 8),
    "adaptive": ((), ("k", "v", "eta", "alpha"), ("q", "k"), ("v", "alpha")),
}  # fmt: skip


def build_drawn(seed=0, **options):
    """A small layer whose gates reach their ends."""
    torch.manual_seed(seed)
    layer = SelfModifyingTitans(DIM, 2, **({"chunk_size": 4} | options)).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        if layer.alpha_bias is not None:
            layer.alpha_bias.sub_(3.0)
        at = 0
        for name, width in layer.widths.items():
            if name == "erase":
                layer.in_proj.weight[at : at + width] *= 5
            at += width
    return layer


def possible(o):
    """Drawn settings with those changed that are refused together."""
    if not o["erase_gate"]:
        o |= {"erase_range": 1.0, "erase_layer": "first", "tied_write": True, "erase_heads": None}
    if o["tied_write"]:
        o["erase_heads"] = None
    if o["architecture"] == "linear":
        o |= {"skip": "outer", "first_rate": None, "erase_layer": "first"}
    if o["erase_range"] > 1 and (o["architecture"] == "linear" or o["erase_layer"] == "last"):
        o["objective"] = "dot"
    numbers = o["self_targets"]
    learns = {"eta": numbers and o["rate"] != "one", "alpha": numbers and o["decay"] != "none"}
    return o | {"adaptive": tuple(name for name in o["adaptive"] if learns.get(name, True))}


def close(a, b, tolerance=1e-9):
    """All tensors of two structures agree."""
    for s, t in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(s, t, rtol=tolerance, atol=tolerance)


def in_pieces(layer, x, cuts):
    """Outputs of x read in pieces, the state carried, and the last state."""
    state, outputs = None, []
    ends = [*sorted({c for c in cuts if 0 < c < x.shape[1]}), x.shape[1]]
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        y, state = layer(x[:, start:stop], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state
