"""Self-modifying Titans from their equations, token by token: the definition of `nestling.layers.SelfModifyingTitans`.

Every projection is a memory M_s, s in {k, v, q, eta, alpha, memory}, and every memory is updated with every token:

    k_t = M_k(x_t),  v_t = M_v(x_t),  eta_t = M_eta(x_t),  alpha_t = M_alpha(x_t),  q_t = W_q x_t    NL Eqs. 83-85, 90
    y_t = M_memory(q_t)                                                                              NL Eq. 86
    v^_t = M_s(v_t), the target that a memory generates for itself                                   NL Eqs. 84-88
    M_s <- M_s (alpha_t I - eta_t k_t k_t^T) - eta_t grad L(M_s; k_t, v^_t)                          NL Eq. 88
    M_s(z) = z + W1 silu(W2 z)                                                                       NL Eq. 89

What the paper leaves open is decided as `docs/decisions.md` says: L = 1/2 |M(k) - v^|^2, its gradient taken at the
weights of the chunk's start (NL Eq. 90); NL Eq. 88 in each linear layer W of a memory with the layer's own input as key
(D2) and with a step e <= eta that contracts (D1); a decay towards the initial state W* in place of zero; and a momentum
S (D5). So with d_t the gradient of L at the product W x_t, each layer takes

    S <- mu_t S - (1 - mu_t) e_t d_t x_t^T
    W <- alpha_t W + (1 - alpha_t) W* - e_t W x_t x_t^T + S                                          NL Eq. 88

With a gate g of its own for the erase (decision D16), the main memory takes in one of its layers

    W <- alpha_t W + (1 - alpha_t) W* - alpha_t (r g_t / |x_t|^2) W x_t x_t^T + S

Nothing is shared with the fast forms but the numbers read from a layer: its parameters and settings. Inner gradients
are by hand down to a layer's product; autograd differentiates silu, and everything once more for the outer loss.
Shapes: B sequences, T tokens, D channels; H heads of width p; each memory is one of [B, H].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from nestling.layers.titans import SelfModifyingTitans


class Memory:
    """One memory of every sequence and head: an MLP (NL Eq. 89), or a matrix.

    Args:
        weights: the initial state, [B, H, o, i] of each linear layer, first layer first.
        skip: where an MLP adds its input: "outer" to its output, "inner" to its hidden layer, "none" nowhere.
    """

    def __init__(self, weights: list[Tensor], skip: str, chunk_size: int, retain: str):
        self.now, self.start, self.skip, self.chunk_size = weights, weights, skip, chunk_size
        self.velocity = [torch.zeros_like(w) for w in weights]
        self.anchor = weights if retain == "initial" else [torch.zeros_like(w) for w in weights]

    def __call__(self, weights: list[Tensor], z: Tensor) -> Tensor:
        """M(z), z [B, H, i] to [B, H, o]."""
        return self.record(weights, z)[-1]

    def record(self, weights: list[Tensor], z: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Every layer's input x and product W x, and the output."""
        inputs, products = [z], [apply(weights[0], z)]
        if len(weights) == 1:
            return inputs, products, products[0]
        inputs.append(silu(products[0]) + z if self.skip == "inner" else silu(products[0]))
        products.append(apply(weights[1], inputs[1]))
        return inputs, products, products[1] + z if self.skip == "outer" else products[1]  # NL Eq. 89

    def write(
        self, rule, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor, mu: Tensor | None, gate: Tensor | None = None,
        first_rate: Tensor | float = 1.0,
    ) -> None:  # fmt: skip
        """One token: the gradient at the chunk's start, applied to the running weights. All gates are [B, H]."""
        inputs, products, prediction = self.record(self.start, k)
        target = self(self.start, v) if rule.self_targets else v  # v^
        error = prediction - target if rule.objective == "l2" else -target
        errors = [error]
        if len(inputs) == 2:  # through the second layer's weights, to the first layer's product
            back = (self.start[1] * error.unsqueeze(-1)).sum(-2)
            errors = [back * silu_slope(products[0]), error]
        now, velocity = [], []
        steps = step_sizes(rule, eta, inputs, errors)
        steps[0] = first_rate * steps[0]
        erased = 0 if rule.erase_layer == "first" else len(steps) - 1
        parts = zip(self.now, self.anchor, self.velocity, inputs, errors, steps)
        alpha, mu, gate = (None if g is None else g[..., None, None] for g in (alpha, mu, gate))
        for i, (w, anchor, s, x, d, e) in enumerate(parts):
            e = e[..., None, None]
            if gate is not None and rule.tied_write:
                e = e * gate
            push = -e * outer(d, x)  # NL Eq. 88, its last term
            if mu is not None:
                push = mu * s + (1 - mu) * push
            erase = e * alpha if rule.gated_erase else e if rule.dgd else 0 * e
            if gate is not None and i == erased:
                erase = alpha * rule.erase_range * gate / (x.square().sum(-1)[..., None, None] + 1e-6)
            now.append(alpha * w + (1 - alpha) * anchor - erase * outer(apply(w, x), x) + push)  # NL Eq. 88
            velocity.append(push)
        self.now, self.velocity = now, velocity

    def close_chunk(self, limit: float) -> None:
        """The next gradients are taken where the chunk has ended (NL Eq. 90), within a bound on the norm."""
        bounded = []
        for w in self.now:
            most = limit * (w.shape[-1] * w.shape[-2]) ** 0.5
            norm = w.square().sum((-1, -2), keepdim=True).sqrt()
            bounded.append(torch.where(norm > most, w * (most / norm), w))
        self.now = self.start = bounded


class Cache:
    """What stretches of `every` tokens wrote to a matrix memory, for every sequence and head (decision D38)."""

    def __init__(self, config, scale: Tensor, bias: Tensor, weight: Tensor):
        self.config, self.scale, self.bias = config, scale, bias
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.begin(weight)

    def begin(self, weight: Tensor) -> None:
        """A stretch opens with the memory [B, H, o, i]."""
        self.start, self.decay, self.keys = weight, torch.ones_like(weight[..., :1, :1]), []

    def note(self, k: Tensor, alpha: Tensor) -> None:
        """One token: key [B, H, i] and decay [B, H]."""
        self.keys.append(k)
        self.decay = self.decay * alpha[..., None, None]

    def close(self, weight: Tensor) -> None:
        """Keep what was written and open the next stretch."""
        self.kept.append((weight - self.decay * self.start, sum(self.keys) / len(self.keys)))
        self.kept = self.kept[-(self.config.cache_max or len(self.kept)) :]
        self.begin(weight)

    def read(self, q: Tensor, running: Tensor) -> Tensor:
        """The read of the running memory [B, H, o] with those of the kept ones, each to its share."""
        near = [self.scale * self.config.cache_every**0.5 * (q * m).sum(-1) for _, m in self.kept]
        share = torch.softmax(torch.stack([self.bias + 0 * q[..., 0], *near]), 0).unsqueeze(-1)
        return share[0] * running + sum(g * apply(c, q) for g, (c, _) in zip(share[1:], self.kept))


def step_sizes(rule, eta: Tensor, inputs: list[Tensor], errors: list[Tensor]) -> list[Tensor]:
    """Step e of each layer (decisions D1, D2), [B, H]."""
    sizes = [x.square().sum(-1) for x in inputs]
    if rule.step == "plain":
        return [eta] * len(inputs)
    full = (lambda kappa: eta / (kappa + 1e-6)) if rule.relative else (lambda kappa: eta / (1 + eta * kappa))
    if rule.step == "layer":
        return [full(size) for size in sizes]
    kappa = sizes[-1]  # curvature along the error, over both layers
    if len(inputs) == 2:
        first, last = (d.square().sum(-1) for d in errors)
        kappa = kappa + sizes[0] * (1 + first / (last + 1e-6))
    return [full(kappa)] * len(inputs)


def self_modifying_titans_reference(layer: SelfModifyingTitans, x: Tensor) -> Tensor:
    """What `layer(x)[0]` has to be: x and y [B, T, D]."""
    config, tokens = layer.config, x.shape[1]
    static = static_projections(layer, x)
    gate = static.pop("gate", None)
    static = {name: f.unflatten(-1, (layer.num_heads, -1)) for name, f in static.items()}  # [B, T, H, p or 1]
    memories = initial_memories(layer, x.shape[0])
    main, out, cache = memories["memory"], [], None
    if config.cache_every is not None:
        cache = Cache(config, torch.exp(layer.log_cache_scale), layer.cache_bias, main.now[0])
    for t in range(tokens):
        for memory in memories.values():
            if t and t % memory.chunk_size == 0:
                memory.close_chunk(config.norm_limit)
        if cache is not None and t and t % config.cache_every == 0:
            cache.close(main.now[0])

        def projected(name: str, t: int = t) -> Tensor:
            """Of token t: by a memory at its chunk's start (NL Eqs. 83-85, 90), or by a matrix."""
            if name in config.adaptive:
                x = static[f"x_{name}"] if f"x_{name}" in static else static["x"]
                return memories[name](memories[name].start, unit(x[:, t]))
            return static[name][:, t]

        k, q, v = unit(projected("k")), unit(projected("q")), projected("v")
        v = unit(v) if config.normalize_values else v
        eta = alpha = torch.ones_like(k[..., 0])
        mu = gate_t = None
        if config.rate == "learned":
            eta = torch.log1p(torch.exp(projected("eta").squeeze(-1) + layer.eta_bias))
        elif config.rate == "gate":
            eta = stretched(projected("eta").squeeze(-1) + layer.eta_bias)
        if config.erase_gate:
            gate_t = stretched(static["erase"][:, t].squeeze(-1) + layer.erase_bias)
            gate_t = torch.stack([gate_t[:, h] * (h < config.erasing) for h in range(layer.num_heads)], 1)
        if config.decay == "learned":
            alpha = sigmoid(projected("alpha").squeeze(-1) + layer.alpha_bias)
        elif config.decay == "fixed":
            alpha = alpha * torch.tensor([1 - 2.0 ** -(5 + h) for h in range(layer.num_heads)], dtype=x.dtype)
        if config.momentum:
            mu = sigmoid(static["mu"][:, t].squeeze(-1) + layer.mu_bias)

        before = main.now
        for memory in memories.values():
            own, rate = (), eta
            if memory is main:
                own = gate_t, 1.0 if layer.log_first_rate is None else torch.exp(layer.log_first_rate)
            elif layer.log_projection_rate is not None:
                rate = eta * torch.exp(layer.log_projection_rate)
            memory.write(layer.rule, k, v, rate, alpha, mu, *own)  # NL Eq. 88
        weights = {"before": before, "after": main.now, "chunk": main.start}[config.read]
        out.append(main(weights, q))  # NL Eq. 86
        if cache is not None:
            out[-1] = cache.read(q, out[-1])
            cache.note(k, alpha)
    y = torch.stack(out, 1)  # [B, T, H, p]
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_weight
    y = y.flatten(2)
    return (y if gate is None else y * silu(gate)) @ layer.out_proj.weight.T


def static_projections(layer: SelfModifyingTitans, x: Tensor) -> dict[str, Tensor]:
    """What causal convolutions and one matrix make of the input, by name, [B, T, width] each."""
    chosen, mixed = layer.config.conv_for, x
    if layer.conv_weight is not None:
        mixed = convolution(x, layer.conv_weight)
    static, at = {}, 0
    for name, width in layer.widths.items():
        heads = name in ("x", "q", "k", "v")
        sees = chosen == "all" or (not heads if chosen == "gates" else name in chosen)
        static[name] = (mixed if sees else x) @ layer.in_proj.weight[at : at + width].T
        at += width
    for name, taps in layer.path_convs.items():  # after the projection; of an adaptive one, before its memory
        adapts = name in layer.config.adaptive
        static[f"x_{name}" if adapts else name] = silu(convolution(static["x" if adapts else name], taps))
    return static


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Causal, a filter for each channel: [B, T, D], [D, K] to [B, T, D]."""
    taps, tokens = weight.shape[1], x.shape[1]
    past = torch.cat([x.new_zeros(x.shape[0], taps - 1, x.shape[-1]), x], 1)
    return torch.stack([(past[:, t : t + taps] * weight.T).sum(1) for t in range(tokens)], 1)


def initial_memories(layer: SelfModifyingTitans, batch: int) -> dict[str, Memory]:
    """The layer's memories at their learned initial states, by name."""
    found = {}
    for group, weights in zip(layer.groups, layer.initial, strict=True):
        for j, name in enumerate(group.names):
            own = [w[j].expand(batch, *w.shape[1:]) for w in cast(nn.ParameterList, weights)]
            skip = "none" if name in ("eta", "alpha") else layer.config.skip if name == "memory" else "outer"
            found[name] = Memory(own, skip, group.chunk_size, layer.config.retain)
    return found


def apply(weight: Tensor, x: Tensor) -> Tensor:
    """W x: [B, H, o, i], [B, H, i] to [B, H, o]."""
    return (weight * x.unsqueeze(-2)).sum(-1)


def outer(u: Tensor, x: Tensor) -> Tensor:
    """u x^T: [B, H, o], [B, H, i] to [B, H, o, i]."""
    return u.unsqueeze(-1) * x.unsqueeze(-2)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def stretched(x: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(1.1 * sigmoid(x) - 0.05, 0 * x), 0 * x + 1)


def silu(x: Tensor) -> Tensor:
    return x * sigmoid(x)


def silu_slope(x: Tensor) -> Tensor:
    return torch.autograd.functional.vjp(silu, x, torch.ones_like(x), create_graph=True)[1]
