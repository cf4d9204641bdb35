"""Whole models, levels, generation and optimisers on the device against the CPU, and the command line on the device."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import autocast, device, set_tf32
from benchmarks.gpu.compare import check, distance, verdict
from benchmarks.gpu.record import Record
from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.optim import DGD, M3, DeltaMomentum, split_parameters

LEVELS = ({"chunk_size": 16, "lr": 0.1}, {"chunk_size": 32, "lr": 0.1}, {"chunk_size": None})
TOKENS = 75
INNER = ("gd", "momentum", "adamw", "dgd", "m3")


def run(record: Record, options: dict[str, Any], turn: Callable[[], None]) -> None:
    # it times nothing, so it waits for no turn
    set_tf32("float32")
    for mixer in ("hope", "selfmod"):
        for precision in ("float32", "bf16"):
            act = partial(hope, precision, mixer=mixer, hidden_size=128)  # narrower, bfloat16's rounding shows
            check(record, f"Hope with {mixer}, {precision}", act)
    for meta_grad in ("full", "first_order", "none"):
        for precision in ("float32", "bf16"):
            what = f"Hope with levels that learn, meta-gradient {meta_grad}, {precision}"
            changes = dict(cms_levels=LEVELS, cms_meta_grad=meta_grad)
            check(record, what, partial(hope, precision, mixer="attention", **changes))
    for optimizer in INNER:
        levels = [dict(LEVELS[0], optimizer=optimizer), LEVELS[2]]
        changes = dict(mixer="attention", cms_levels=levels, cms_meta_grad="first_order", slack=10.0)
        check(record, f"levels that learn by {optimizer}, float32", partial(hope, "float32", **changes))
    for variant in ("sequential", "nested", "independent"):
        changes = dict(cms_levels=LEVELS, cms_variant=variant)
        check(record, f"Hope with selfmod and {variant} levels, float32", partial(hope, "float32", **changes))
    for placement in ("depth", "width"):
        for precision in ("float32", "bf16"):
            what = f"a Llama with levels in {placement} reads, {precision}"
            check(record, what, partial(llama, placement, precision))
    for what, changes in (("Hope", {}), ("Hope with levels", dict(cms_levels=LEVELS))):
        check(record, f"generate, {what}", partial(generate, **changes))
    check(record, "generate, left padding", partial(generate, padded=True))
    check(record, "M3, float32", partial(steps, partial(M3, ns_dtype=torch.float32), "float32"))
    check(record, "M3, the device's own type", partial(steps, M3, "bf16"))
    check(record, "M3, literal Algorithm 1", partial(steps, partial(_literal, M3), "float32", double=True))
    check(record, "DeltaMomentum, float32", partial(steps, DeltaMomentum, "float32"))
    for exact in (False, True):
        check(record, f"DGD, exact={exact}, float32", partial(steps, partial(DGD, exact=exact), "float32", module=True))
    check(record, "M3 trains Hope by split_parameters, bf16", trains)
    if not options["quick"]:
        check(record, "nestling train on the device, bf16", partial(command, "bf16"), 60)


def _hope(**changes: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return HopeForCausalLM(HopeConfig(**(sizes | changes)))


def _ids(batch: int = 2, tokens: int = TOKENS, vocabulary: int = 61) -> Tensor:
    return torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(1))


def _results(model: nn.Module, ids: Tensor, precision: str) -> tuple[dict, dict]:
    with autocast(precision):
        out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": out.logits, "loss": out.loss}, gradients


def hope(precision: str, slack: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Logits, loss and gradients of a training step."""
    reference = _hope(**changes)
    model = copy.deepcopy(reference).to(device())
    want, want_gradients = _results(reference.double(), _ids(), "float32")
    got, got_gradients = _results(model, _ids().to(device()), precision)
    return verdict(distance(got, want), distance(got_gradients, want_gradients, precision), precision, slack)


def llama(placement: str, precision: str) -> dict[str, Any]:
    """A stream read in pieces that are no chunks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2)
    reference = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).eval()
    levels = [Level(16, lr=0.2), Level(32, lr=0.2)]
    models = [stack_levels(copy.deepcopy(reference), levels, placement) for _ in range(2)]

    def read(model: nn.Module, ids: Tensor, precision: str) -> dict[str, Tensor]:
        cache, parts, begin = None, [], 0
        for stop in (1, 40, TOKENS):
            with torch.no_grad(), autocast(precision):
                out = model(ids[:, begin:stop], past_key_values=cache, use_cache=True)
            cache, begin = out.past_key_values, stop
            parts.append(out.logits.float())
        return {"logits": torch.cat(parts, 1)}

    want = read(models[0], _ids(), "float32")
    return verdict(distance(read(models[1].to(device()), _ids().to(device()), precision), want), None, precision)


def generate(padded: bool = False, **changes: Any) -> dict[str, Any]:
    """Greedy text of the device, token by token as the CPU writes it."""
    reference = _hope(**changes).eval()
    model, prompt = copy.deepcopy(reference).to(device()), _ids(2, 20)
    mask = torch.ones_like(prompt)
    mask[0, : 7 if padded else 0] = 0
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    want = reference.generate(prompt, attention_mask=mask, **options)
    got = model.generate(prompt.to(device()), attention_mask=mask.to(device()), **options).cpu()
    equal = float((got == want).float().mean())
    return {"values": 1 - equal, "of": "tokens that differ", "allowed": 0.0, "ok": equal == 1.0}


def _literal(optimizer: type, params: Any, **options: Any) -> torch.optim.Optimizer:
    # in float64: sums of gradients of lower rank have noise for their last directions, and all are made equally long
    literal = dict(accumulation="sum", rms_match=False, periods=(1, 4), ns_dtype=torch.float64)
    return optimizer(params, **literal, **options)


def steps(make: Any, precision: str, module: bool = False, double: bool = False) -> dict[str, Any]:
    """What twenty steps (a slow one of M3 among them) have changed."""
    runs = []
    for where in ("cpu", device()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24), nn.Tanh(), nn.Linear(24, 5)).to(where)
        net.to(torch.float64 if double else torch.float32)
        start = {name: p.detach().cpu().clone() for name, p in net.named_parameters()}
        optimizer = make(net if module else net.parameters(), lr=1e-2)
        for _ in range(20):
            x, y = torch.randn(16, 24), torch.randn(16, 5)
            optimizer.zero_grad()
            x, y = (t.to(where, torch.float64 if double else torch.float32) for t in (x, y))
            (net(x) - y).square().mean().backward()
            optimizer.step()
        runs.append({name: p.detach().cpu() - start[name] for name, p in net.named_parameters()})
    found = verdict(distance(runs[1], runs[0]), None, precision)
    if precision == "bf16":  # rounding of the steps' directions, and what training makes of it
        found |= {"allowed": 0.2, "ok": found["values"] <= 0.2}
    return found


def trains() -> dict[str, Any]:
    """The loss of a batch falls."""
    model = _hope().to(device())
    optimizer, ids, losses = M3(split_parameters(model), lr=1e-2), _ids().to(device()), []
    for _ in range(8):
        with autocast("bf16"):
            loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"values": losses[-1] / losses[0], "of": "the loss that is left", "allowed": 0.95,
            "ok": losses[-1] <= 0.95 * losses[0]}  # fmt: skip


def command(precision: str) -> dict[str, Any]:
    """`nestling train` with its levels and M3, as a user types it."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(f"{a} times {b} is {a * b}." for a in range(60) for b in range(60)))
        line = [sys.executable, "-m", "nestling", "train", str(text), "--out", f"{folder}/run", "--steps", "3"]
        line += ["--model", "tiny", "--device", device(), "--precision", precision, "--optimizer", "m3"]
        line += ["--seq-len", "64", "--batch-size", "2", "--tokenizer", "bytes"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=55)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return {"values": 0.0, "of": "exit status", "allowed": 0.0, "ok": True}
