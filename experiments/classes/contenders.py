"""The contenders of the experiment with classes, as tuned on streams and texts of their own."""

from __future__ import annotations

from typing import Any

from experiments.classes.small_models import OURS
from experiments.shared.continual.study import Contender

WINDOW = 2048  # tokens attention reaches back
CHUNK = 64
STACK = {"blocks": [10, 12, 14, 16, 18, 20, 22, 24, 26, 28], "target_modules": ["down_proj"]}
# attention begins anew with every chunk: else what stands in the context answers for the levels, which learn less
READING = STACK | {"context": CHUNK}


def m3(*levels: tuple[int, float]) -> list[dict[str, Any]]:
    """Levels of M3 from chunk sizes and learning rates."""
    return [{"chunk_size": size, "lr": lr, "optimizer": "m3"} for size, lr in levels]


def contenders() -> list[Contender]:
    """All of them: those that start from the pre-trained model, then those from a small one of ours."""
    one, tuned, whole = m3((CHUNK, 6e-3)), {"lr": 2e-3, "size": CHUNK}, {"lr": 1e-4, "size": CHUNK}
    shown = {"choice": "balanced"}  # examples that stand in the context at a test, as in in-context learning
    as_level = {"lr": 6e-3, "size": CHUNK, "optimizer": "m3"}
    found = [
        Contender("zero-shot", "zero-shot"),
        Contender("in context, balanced", "in-context", options=shown),
        Contender("1 level", "levels", one, READING),
        Contender("1 level, in context", "levels", one, READING, shown),
        Contender("2 levels", "levels", m3((CHUNK, 8e-3), (128, 1e-2)), READING),
        Contender("fine-tuning, same weights", "finetune", one, STACK, tuned),
        Contender("fine-tuning, same weights, M3", "finetune", one, STACK, as_level),
        Contender("fine-tuning, same weights, M3, in context", "finetune", one, STACK, as_level | shown),
        Contender("fine-tuning, all weights", "finetune", options=whole),
        Contender("EWC, all weights", "finetune", options=whole | {"ewc": 1e3, "fisher": 15}),
        Contender("replay, same weights", "finetune", one, STACK, tuned | {"replay": 1.0, "buffer": WINDOW}),
        Contender("linear probe", "probe", options={"lr": 0.5}),
        Contender("class means", "class means"),
    ]
    small = {"window": 512}
    plain = small | {"model": OURS[1]}
    return found + [
        Contender("ours: levels", "levels", options=small | {"model": OURS[0]}),
        Contender("ours: fine-tuning, all weights", "finetune", options=plain | {"lr": 3e-4, "size": 256}),
        Contender("ours: class means", "class means", options=plain),
    ]
