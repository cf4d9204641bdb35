"""Meta-gradients with states alone kept between pieces: the same numbers, less memory."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestling import HopeConfig, HopeForCausalLM, stack_levels
from nestling.cms import learner
from slowly import some

LEVELS = [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": 8, "lr": 0.2, "optimizer": "momentum"}]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(learner, "PIECE", 8)


def outer(model, ids, checkpointing, parts=1, watch=None):
    """Loss and all gradients, in `parts` calls that carry their cache; `watch` is a context around the forwards."""
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    model.train().zero_grad()
    logits, cache = [], None
    with watch or nullcontext():
        for piece in ids.chunk(parts, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        loss = F.cross_entropy(torch.cat(logits, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


class Kept(TorchDispatchMode):
    """Counts the bytes of all storages made inside that are still alive at its end."""

    def __init__(self):
        super().__init__()
        self.alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
            if (key := storage._cdata) not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _, key=key: self.alive.pop(key)), storage.nbytes()
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        self.bytes = sum(size for _, size in self.alive.values())


def kept_bytes(model, ids, checkpointing):
    """Bytes kept for the backward pass."""
    watch = Kept()
    outer(model, ids, checkpointing, watch=watch)
    return watch.bytes


def models(make, kind, meta_grad):
    if kind == "stacked":
        return stack_levels(make(), LEVELS, meta_grad=meta_grad, context=16, blocks=[2, 3])
    torch.manual_seed(0)
    config = HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mixer=kind,
                        cms_levels=[*LEVELS, {"chunk_size": None}], cms_meta_grad=meta_grad)  # fmt: skip
    return HopeForCausalLM(config).double()


@some(
    "kind, meta_grad, parts",
    [(kind, "full", 2) for kind in ("stacked", "attention", "selfmod")]
    + [("stacked", "full", 1), ("selfmod", "first_order", 1), ("attention", "none", 2)],
    ("stacked", "attention", "selfmod"), ("full", "first_order", "none"), (1, 2),
)  # fmt: skip
def test_the_gradients_are_the_same(make, ids, kind, meta_grad, parts):
    model, ids = models(make, kind, meta_grad), ids[:, :27]
    loss, want = outer(model, ids, False, parts)
    again, got = outer(model, ids, True, parts)
    assert again == pytest.approx(loss, rel=1e-12) and got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-12)


def test_memory_grows_by_the_states_between_pieces_only(make, ids):
    model = models(make, "stacked", "full")
    ids = ids[:, :24]
    long = ids.repeat(1, 3)
    whole, pieces = ([kept_bytes(model, x, on) for x in (ids, long)] for on in (False, True))
    assert pieces[1] < whole[1] / 3
    assert pieces[1] - pieces[0] < (whole[1] - whole[0]) / 3


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_reaches_given_embeddings(make, checkpointing):
    model = stack_levels(make(num_hidden_layers=2, tie_word_embeddings=False), LEVELS).train()
    (model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable)()
    ids = torch.randint(31, (2, 22), generator=torch.Generator().manual_seed(0))
    table = model.get_input_embeddings().weight
    (want,) = torch.autograd.grad(model(ids, labels=ids).loss, table)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    (got,) = torch.autograd.grad(model(inputs_embeds=embeds, labels=ids).loss, embeds)
    torch.testing.assert_close(torch.zeros_like(table).index_add(0, ids.flatten(), got.flatten(0, 1)), want)
