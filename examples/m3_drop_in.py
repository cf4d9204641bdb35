"""M3 in place of AdamW in an ordinary training loop: predict the next byte of this Python's own library.

Both get the same search: each learning rate runs once, the best held-out loss counts.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn

from nestling.optim import M3, split_parameters

CONTEXT = 8  # bytes the network sees
OPTIMIZERS = {
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr),
    "M3": lambda model, lr: M3(split_parameters(model), lr=lr),  # the only line that changes
}


def make_model(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    hidden = [nn.Linear(CONTEXT * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU()]
    return nn.Sequential(nn.Embedding(256, width), nn.Flatten(), *hidden, nn.Linear(4 * width, 256))


def train(name: str, lr: float, windows: torch.Tensor, steps: int) -> float:
    """Held-out loss (nats per byte) after `steps` steps; windows [N, CONTEXT + 1]."""
    model, held_out = make_model(), windows[-2000:]
    optimizer = OPTIMIZERS[name](model, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = windows[torch.randint(len(windows) - 2000, (256,), generator=batches)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(held_out[:, :-1]), held_out[:, -1]).item()


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2])
    options = parser.parse_args(arguments)
    text, best = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes(), {}
    windows = torch.tensor(list(text)).unfold(0, CONTEXT + 1, 1)
    for name in OPTIMIZERS:
        losses = {lr: train(name, lr, windows, options.steps) for lr in options.lr}
        best[name] = min(losses.values())
        print(f"{name:6s}", "  ".join(f"lr {lr:g}: {loss:.3f}" for lr, loss in losses.items()), "nats per byte")
    return best


if __name__ == "__main__":
    main()
