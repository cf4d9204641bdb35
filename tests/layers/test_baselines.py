"""The linear-attention family against definitions from elsewhere: the papers' recurrences, and transformers' code."""

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from nestling.layers.mixers import MIXERS, build_mixer

DIM, HEADS, TOKENS = 12, 3, 19


def build(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = build_mixer(name, DIM, HEADS, **({"chunk_size": 8} | options)).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for weights in layer.initial:  # the definitions start from nothing
            for w in weights:
                w.zero_()
        if layer.alpha_bias is not None:
            layer.alpha_bias.sub_(4.0)
    return layer


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def projections(layer, x):
    """The layer's own inputs to its recurrence, [B, H, T, ...], written out from its parameters."""
    size = layer.conv_weight.shape[1]
    past = torch.cat([x.new_zeros(x.shape[0], size - 1, DIM), x], 1)
    x = sum(past[:, i : i + x.shape[1]] * layer.conv_weight[:, i] for i in range(size))
    parts = dict(zip(layer.widths, (x @ layer.in_proj.weight.T).split(list(layer.widths.values()), -1)))
    heads = {n: parts[n].unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in ("q", "k", "v")}
    gates = {n: parts[n].transpose(1, 2) for n in ("eta", "alpha") if n in parts}
    eta = alpha = None
    if "eta" in gates:
        eta = torch.nn.functional.softplus(gates["eta"] + layer.eta_bias[:, None])
    if "alpha" in gates:
        alpha = torch.sigmoid(gates["alpha"] + layer.alpha_bias[:, None])
    return unit(heads["q"]), unit(heads["k"]), heads["v"], eta, alpha, parts["gate"]


def finish(layer, reads, gate):
    """Per-head norm, output gate and projection of reads [B, H, T, p]."""
    y = reads.transpose(1, 2)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.norm_weight
    return (y.flatten(2) * gate * torch.sigmoid(gate)) @ layer.out_proj.weight.T


def tokens(dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, TOKENS, DIM, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_delta_rule_equals_transformers(name):
    """Values and gradients equal the recurrence transformers ships for Qwen3-Next (which computes in float32)."""
    layer, x = build(name, torch.float32), tokens(torch.float32)
    q, k, v, eta, alpha, gate = projections(layer, x)
    beta = eta / (1 + eta * k.square().sum(-1))  # NL Eq. 57: the exact step of the regression
    decay = torch.zeros_like(beta) if alpha is None else alpha.log()
    assert (alpha is None) == (name == "deltanet")
    args = [t.transpose(1, 2) for t in (q * q.shape[-1] ** 0.5, k, v, decay, beta)]
    reads, _ = torch_recurrent_gated_delta_rule(*args)
    want, (got, _) = finish(layer, reads.transpose(1, 2), gate), layer(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    leaves = [x, layer.in_proj.weight, layer.eta_bias, layer.conv_weight]
    grads = [torch.autograd.grad((y * weights).sum(), leaves, retain_graph=True) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", ["linear_attention", "retnet"])
def test_hebbian_memories_equal_their_papers(name):
    """S_t = gamma_h S_{t-1} + k_t v_t^T, o_t = q_t S_t; RetNet: gamma = 1 - 2^(-5 - h), linear attention: gamma = 1."""
    layer, x = build(name), tokens()
    q, k, v, eta, alpha, gate = projections(layer, x)
    assert eta is None
    assert alpha is None
    gamma = torch.tensor([1 - 2.0 ** -(5 + h) if name == "retnet" else 1.0 for h in range(HEADS)], dtype=x.dtype)
    reads = torch.zeros_like(v)
    for b in range(2):
        for h in range(HEADS):
            state = torch.zeros(q.shape[-1], v.shape[-1], dtype=x.dtype)
            rows = []
            for t in range(TOKENS):
                state = gamma[h] * state + torch.outer(k[b, h, t], v[b, h, t])
                rows.append(q[b, h, t] @ state)
            reads = reads.index_put((torch.tensor(b), torch.tensor(h)), torch.stack(rows))
    torch.testing.assert_close(layer(x)[0], finish(layer, reads, gate), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["linear_attention", "retnet"])
def test_hebbian_memories_equal_their_parallel_form(name):
    """o = (q k^T . D) v with D[t, s] = gamma^(t - s), RetNet's training form."""
    layer, x = build(name), tokens()
    q, k, v, _, _, gate = projections(layer, x)
    gamma = torch.tensor([1 - 2.0 ** -(5 + h) if name == "retnet" else 1.0 for h in range(HEADS)], dtype=x.dtype)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    decay = torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0.0)
    torch.testing.assert_close(layer(x)[0], finish(layer, (q @ k.mT * decay) @ v, gate), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["titans_linear"])
def test_titans_linear_memory_equals_its_paper(name):
    """S_t = mu S_{t-1} - theta grad, M_t = alpha M_{t-1} + S_t: gradient of |M k - v|^2 / 2, chunks of one token."""
    layer, x = build(name, chunk_size=1), tokens()
    size = layer.conv_weight.shape[1]
    past = torch.cat([x.new_zeros(2, size - 1, DIM), x], 1)
    mixed = sum(past[:, i : i + TOKENS] * layer.conv_weight[:, i] for i in range(size))
    parts = dict(zip(layer.widths, (mixed @ layer.in_proj.weight.T).split(list(layer.widths.values()), -1)))
    q, k, v, eta, alpha, gate = projections(layer, x)
    v, mu = unit(v), torch.sigmoid(parts["mu"].transpose(1, 2) + layer.mu_bias[:, None])
    memory = surprise = torch.zeros(2, HEADS, q.shape[-1], q.shape[-1], dtype=x.dtype)
    reads = []
    for t in range(TOKENS):
        reads.append((memory @ q[:, :, t, :, None]).squeeze(-1))
        kt, vt = k[:, :, t, :, None], v[:, :, t, :, None]
        theta = (1 - mu[:, :, t]) * eta[:, :, t] / (1 + eta[:, :, t] * kt.square().sum((-1, -2)))
        gradient = (memory @ kt - vt) @ kt.mT
        surprise = mu[:, :, t, None, None] * surprise - theta[..., None, None] * gradient
        memory = alpha[:, :, t, None, None] * memory + surprise
    torch.testing.assert_close(layer(x)[0], finish(layer, torch.stack(reads, 2), gate), rtol=1e-9, atol=1e-9)


def test_ttt_is_gradient_descent_by_autograd():
    """An MLP memory after one chunk: W - sum of e_t grad_t, gradients of the reconstruction at the chunk's start."""
    torch.manual_seed(0)
    layer = build_mixer("ttt", DIM, HEADS, chunk_size=TOKENS, step="plain").double()
    x = tokens()
    _, k, v, eta, alpha, _ = projections(layer, x)
    assert alpha is None
    w2, w1 = (w[0].detach().expand(2, -1, -1, -1).clone().requires_grad_() for w in layer.initial[0])
    prediction = k + torch.nn.functional.silu(k @ w2.mT) @ w1.mT
    loss = 0.5 * (prediction - unit(v)).square().sum(-1)
    grads = torch.autograd.grad((eta.detach() * loss).sum(), [w2, w1])
    _, state = layer(x)
    for now, before, g in zip(state.memories[0].now, (w2, w1), grads, strict=True):
        torch.testing.assert_close(now[:, 0], before - g, rtol=1e-9, atol=1e-9)


def test_baselines_have_static_projections():
    for name in MIXERS:
        if name in ("selfmod", "selfmod_tracking", "attention", "window_attention"):
            continue
        layer = build_mixer(name, DIM, HEADS)
        layer = getattr(layer, "memory", layer)  # beside attention
        assert layer.config.adaptive == ()
        assert [g.names for g in layer.groups] == [("memory",)]


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_learns(name):
    torch.manual_seed(0)
    layer = build_mixer(name, DIM, HEADS, **({"head_dim": 4} if name in ("attention", "window_attention") else {}))
    layer(torch.randn(2, 40, DIM))[0].square().mean().backward()
    for n, p in layer.named_parameters():
        assert p.grad is not None, n
        assert p.grad.isfinite().all(), n
        assert p.grad.any(), n


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="selfmod"):
        build_mixer("mamba", DIM, HEADS)
    with pytest.raises(ValueError, match="chunk_size"):
        build_mixer("selfmod", DIM, HEADS, chunks=3)
    with pytest.raises(ValueError, match="window"):
        build_mixer("attention", DIM, HEADS, chunk_size=3)
