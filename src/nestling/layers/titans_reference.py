"""Self-modifying Titans from their equations, token by token, for the tests (NL Eqs. 83-93).

It shares nothing with the package but the numbers it reads from a layer: its parameters and the values of its settings.
Inner gradients come from autograd, at the products of each linear layer.
"""

import torch


def heads(x, num_heads):
    """[B, T, H p] -> [T, B, H, p]"""
    return x.unflatten(-1, (num_heads, -1)).movedim(1, 0)


def apply(weight, x):
    """W x: [B, H, o, i], [B, H, i] -> [B, H, o]"""
    return (weight * x.unsqueeze(-2)).sum(-1)


def outer(u, x):
    return u.unsqueeze(-1) * x.unsqueeze(-2)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def silu_slope(x):
    return torch.autograd.functional.vjp(silu, x, torch.ones_like(x), create_graph=True)[1]


class Memory:
    """One memory of every sequence and head: an MLP z + W1 silu(W2 z), or a matrix."""

    def __init__(self, name, weights, residual, chunk_size, retain):
        self.name, self.now, self.start, self.residual = name, weights, weights, residual
        self.velocity = [torch.zeros_like(w) for w in weights]
        self.chunk_size = chunk_size
        self.anchor = weights if retain == "initial" else [torch.zeros_like(w) for w in weights]

    def record(self, weights, z):
        """Every layer's input and product, and the output."""
        inputs, products = [z], [apply(weights[0], z)]
        if len(weights) == 1:
            return inputs, products, products[0]
        inputs.append(silu(products[0]))
        products.append(apply(weights[1], inputs[1]))
        return inputs, products, products[1] + z if self.residual else products[1]

    def __call__(self, weights, z):
        return self.record(weights, z)[-1]

    def write(self, rule, k, v, eta, alpha, mu):
        """One token: the gradient at the chunk's start, applied to the running weights."""
        inputs, products, prediction = self.record(self.start, k)
        target = self(self.start, v) if rule.self_targets else v
        error = prediction - target if rule.objective == "l2" else -target
        errors = [error]
        if len(inputs) == 2:  # through the second layer's weights, to the first layer's product
            back = (self.start[1] * error.unsqueeze(-1)).sum(-2)
            errors = [back * silu_slope(products[0]), error]
        size = [x.square().sum(-1) for x in inputs]
        size_error = [d.square().sum(-1) for d in errors]
        if rule.step == "plain":
            steps = [eta] * len(inputs)
        elif rule.step == "layer":  # decision D1 in each layer
            steps = [eta / (1 + eta * s) for s in size]
        else:  # curvature along the error, over both layers
            kappa = size[-1]
            if len(inputs) == 2:
                kappa = kappa + size[0] * (1 + size_error[0] / (size_error[1] + 1e-6))
            steps = [eta / (1 + eta * kappa)] * len(inputs)
        now, velocity = [], []
        for w, anchor, s, x, d, e in zip(self.now, self.anchor, self.velocity, inputs, errors, steps, strict=True):
            push = -e[..., None, None] * outer(d, x)
            if mu is not None:
                push = mu[..., None, None] * s + (1 - mu)[..., None, None] * push
            erase = torch.zeros_like(e)
            if rule.gated_erase:
                erase = e * alpha
            elif rule.dgd:
                erase = e
            kept = alpha[..., None, None] * w + (1 - alpha[..., None, None]) * anchor
            now.append(kept - erase[..., None, None] * outer(apply(w, x), x) + push)
            velocity.append(push)
        self.now, self.velocity = now, velocity

    def open_chunk(self, limit):
        """A new chunk begins: its gradients are taken where the last one ended."""
        bounded = []
        for w in self.now:
            most = limit * (w.shape[-1] * w.shape[-2]) ** 0.5
            norm = w.square().sum((-1, -2), keepdim=True).sqrt()
            bounded.append(torch.where(norm > most, w * (most / norm), w))
        self.now = self.start = bounded


def memories(layer, batch):
    """The layer's memories at their initial states, by name."""
    found = {}
    for group, weights in zip(layer.groups, layer.initial, strict=True):
        for j, name in enumerate(group.names):
            own = [w[j].expand(batch, *w.shape[1:]) for w in weights]
            found[name] = Memory(name, own, name not in ("eta", "alpha"), group.chunk_size, layer.retain)
    return found


def self_modifying_titans_reference(layer, x):
    """What `layer(x)[0]` has to be, x [B, T, D]."""
    batch, tokens, _ = x.shape
    gate = None
    if layer.conv_weight is not None:
        taps = layer.conv_weight.shape[1]
        past = torch.cat([x.new_zeros(batch, taps - 1, x.shape[-1]), x], 1)
        x = torch.stack([(past[:, t : t + taps] * layer.conv_weight.T).sum(1) for t in range(tokens)], 1)
    static, at = {}, 0
    for name, width in layer.widths.items():
        static[name] = x @ layer.in_proj.weight[at : at + width].T
        at += width
    if "gate" in static:
        gate = silu(static.pop("gate"))
    static = {n: heads(f, layer.num_heads) for n, f in static.items()}
    mem = memories(layer, batch)

    out = []
    for t in range(tokens):
        for m in mem.values():
            if t and t % m.chunk_size == 0:
                m.open_chunk(layer.norm_limit)

        def projected(name, t=t):
            """Of token t: by a memory at its chunk's start, or by a matrix."""
            if name in layer.adaptive:
                m = mem[name]
                return m(m.start, unit(static["x"][t]))
            return static[name][t]

        def bias(b):
            return b.view(1, -1)

        k, q, v = unit(projected("k")), unit(projected("q")), projected("v")
        v = unit(v) if layer.normalize_values else v
        eta = alpha = torch.ones_like(k[..., 0])
        mu = None
        if layer.rate == "learned":
            eta = torch.log1p(torch.exp(projected("eta").squeeze(-1) + bias(layer.eta_bias)))
        if layer.decay == "learned":
            alpha = 1 / (1 + torch.exp(-projected("alpha").squeeze(-1) - bias(layer.alpha_bias)))
        elif layer.decay == "fixed":
            alpha = alpha * bias(torch.tensor([1 - 2.0 ** -(5 + h) for h in range(layer.num_heads)], dtype=x.dtype))
        if layer.momentum:
            mu = 1 / (1 + torch.exp(-static["mu"][t].squeeze(-1) - bias(layer.mu_bias)))

        main = mem["memory"]
        if layer.read == "before":
            y = main(main.now, q)
        elif layer.read == "chunk":
            y = main(main.start, q)
        for m in mem.values():
            m.write(layer.rule, k, v, eta, alpha, mu)
        if layer.read == "after":
            y = main(main.now, q)
        out.append(y)
    y = torch.stack(out, 1)  # [B, T, H, p]
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_weight
    y = y.flatten(2)
    return (y if gate is None else y * gate) @ layer.out_proj.weight.T
