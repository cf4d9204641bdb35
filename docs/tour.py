"""The tour, cell by cell; `python docs/figures/make_tour.py` makes tour.ipynb and tour.md of it."""

# ruff: noqa: E402 - a cell imports what it is about

# %% [markdown]
# # Tour: from one memory to levels that learn
#
# Twenty minutes, no data, no GPU. Every cell is run by the test-suite. The page and the notebook (`docs/tour.ipynb`)
# are the same cells.
# %%
import torch

import nestling

torch.manual_seed(0)
print("nestling", nestling.__version__)
# %% [markdown]
# ## 1. One memory, by hand
#
# A memory is a matrix W. It is shown a key k and a value v and should answer W k = v. One step of gradient descent on
# ½ |W k - v|² with rate e is the *delta rule*: erase what it answers to k, write v (NL Eq. 65).
# %%
width = 8
key = torch.nn.functional.normalize(torch.randn(width), dim=0)
value = torch.randn(width)
W = torch.randn(width, width) / width**0.5

rate = 1.0
W = W - rate * torch.outer(W @ key, key) + rate * torch.outer(value, key)
print("distance of the answer:", (W @ key - value).norm().item())
assert (W @ key - value).norm() < 1e-5
# %% [markdown]
# With more keys than the memory is wide something has to give: old pairs fade. That is all a linear-attention layer
# can do, and why decay, erase and step size matter.
# %%
keys = torch.nn.functional.normalize(torch.randn(24, width), dim=-1)
values = torch.randn(24, width)
W = torch.zeros(width, width)
for k, v in zip(keys, values):
    W = W - torch.outer(W @ k, k) + torch.outer(v, k)
errors = (keys @ W.T - values).norm(dim=-1)
print("error of the first six:", errors[:6].mean().item(), " of the last six:", errors[-6:].mean().item())
assert errors[-6:].mean() < errors[:6].mean()
# %% [markdown]
# ## 2. The operator
#
# The same loop is `delta_rule_reference`, with decay and momentum: W ← W (α I - β x xᵀ) + S. Every memory here is a
# setting of it.
# %%
from nestling.ops import delta_rule, delta_rule_reference

ones = torch.ones(24)
loop = delta_rule_reference(torch.zeros(width, width), keys, values, ones, ones)
print("same as by hand:", torch.allclose(loop.weight, W, atol=1e-5))
assert torch.allclose(loop.weight, W, atol=1e-5)
# %% [markdown]
# `delta_rule` computes it a chunk at a time: products of matrices and one triangular solve instead of a loop over
# tokens. It is exact, not an approximation.
# %%
exact = [t.double() for t in (torch.zeros(width, width), keys, values, ones, ones)]
difference = (delta_rule(*exact, chunk_size=8).weight - delta_rule_reference(*exact).weight).abs().max()
print("chunk form - loop:", difference.item())
assert difference < 1e-12
# %% [markdown]
# ## 3. The layer: memories that choose their own keys, values and rates
#
# `SelfModifyingTitans` (NL Eqs. 83-93) holds five memories per head. One answers queries. The other four *are* the
# projections k, v, η and α. All of them are written to as the text goes by.
# %%
from nestling.layers import SelfModifyingTitans

layer = SelfModifyingTitans(32, num_heads=2, chunk_size=8)
x = torch.randn(1, 40, 32)
y, state = layer(x)
print("output", tuple(y.shape))
print("adaptive projections:", layer.config.adaptive)
# %% [markdown]
# `inspect` shows what the memories do at each token: their inner loss, the rate and the decay they chose.
# %%
with torch.no_grad():
    figures = layer.inspect(x)
print(type(figures).__name__, "with", len(figures), "fields")
# %% [markdown]
# The state is a value. Cut the sequence anywhere, also inside a chunk, carry the state, and nothing changes.
# %%
first, state = layer(x[:, :13])
second, state = layer(x[:, 13:], state)
print("one pass - two pieces:", (torch.cat([first, second], 1) - y).abs().max().item())
assert torch.allclose(torch.cat([first, second], 1), y, atol=1e-4)
# %% [markdown]
# Gradients run through every inner update to the initial states: the outer loop learns where the memories begin.
# %%
y.square().mean().backward()
missing = [name for name, p in layer.named_parameters() if p.grad is None]
print("parameters without a gradient:", missing)
assert not missing
# %% [markdown]
# ## 4. The model
#
# Hope is this layer, then a chain of MLPs (the continuum memory, here one), in every block. It is a Hugging Face
# model.
# %%
config = nestling.HopeConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=2)
model = nestling.HopeForCausalLM(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
# %% [markdown]
# Train it for a moment on one sentence, as bytes. `M3` is the paper's optimiser: Muon with momentum at several time
# scales.
# %%
from nestling.optim import M3, split_parameters

sentence = torch.tensor([list(b"the memory writes, the memory reads. " * 4)])
optimizer = M3(split_parameters(model), lr=1e-2)
losses = []
for _ in range(12):
    optimizer.zero_grad()
    loss = model(sentence, labels=sentence).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"{losses[0]:.2f} -> {losses[-1]:.2f} nats per byte")
assert losses[-1] < losses[0]
# %% [markdown]
# ## 5. See it as a nested system
#
# Which memories are there, what does each compress, how often is it updated? The optimiser's momenta are memories too
# (NL Defs. 2-4).
# %%
print(nestling.levels(model, optimizer))
# %% [markdown]
# ## 6. Levels: MLPs that learn while the model reads
#
# Give a block a clock. This level takes one step of AdamW every 16 tokens of the stream, on the loss of those tokens.
# The step belongs to the stream: the model's weights stay as they are. Rule and rate are ours for this toy, not
# defaults for yours.
# %%
levels = [{"chunk_size": 16, "lr": 3e-3, "optimizer": "adamw"}, {"chunk_size": None}]
config = nestling.HopeConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=2, mixer="attention", cms_levels=levels
)
reader = nestling.HopeForCausalLM(config).eval()
note = torch.tensor([list(b"Ada keeps bees. " * 12)])
# %% [markdown]
# Read a note; then let the context go. What is left of the note is what the level learned.
# %%
question = torch.tensor([list(b"Ada keeps bees. ")])


def loss_of(cache) -> float:
    """Nats per byte of the question, in a fresh context, learning nothing."""
    with torch.no_grad(), reader.adapted(cache):
        return reader(question, labels=question).loss.item()


with torch.no_grad():
    cache = reader(note[:, :1], use_cache=True).past_key_values  # one token: nothing is learned yet
    before = loss_of(cache)
    reader(note[:, 1:], past_key_values=cache)
    cache.forget_context()
after = loss_of(cache)
print(f"{before:.2f} -> {after:.2f} nats per byte; {cache.nbytes:,} bytes of state")
assert after < before
# %% [markdown]
# Go back, fork, save: the state is a value here as well.
# %%
copy = cache.fork()
copy.reset([0])  # the copy's level begins anew
print(f"the copy: {loss_of(copy):.2f}, the original: {loss_of(cache):.2f}")
assert loss_of(cache) < loss_of(copy)
# %% [markdown]
# ## Where to go on
#
# - [Streams](streams.md): carry, ask, reset, batches, padding.
# - [Models that go on learning](continuum.md): the same on a pre-trained model, `nestling.stack_levels`.
# - [Maths](maths.md) and [decisions](decisions.md): what is computed, and why so.
# - [Negative results](negative_results.md): what all this is *not* worth, as far as was measured.
