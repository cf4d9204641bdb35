"""The contenders of the experiment with classes, as tuned on streams and texts of their own."""

from __future__ import annotations

from typing import Any

from experiments.classes.small_models import OURS
from experiments.shared.continual.study import LearnerContender
from nestling.cms.defaults import default_levels

WINDOW = 2048  # tokens attention reaches back
CHUNK = 64
STACK = {"blocks": [10, 12, 14, 16, 18, 20, 22, 24, 26, 28], "target_modules": ["down_proj"]}
# attention begins anew with every chunk: else what stands in the context answers for the levels, which learn less
READING = STACK | {"context": CHUNK}


def m3(*levels: tuple[int, float]) -> list[dict[str, Any]]:
    """Levels of M3 from chunk sizes and learning rates."""
    return [{"chunk_size": size, "lr": lr, "optimizer": "m3"} for size, lr in levels]


def contenders() -> list[LearnerContender]:
    """All of them: those that start from the pre-trained model, then those from a small one of ours."""
    one, tuned, whole = m3((CHUNK, 6e-3)), {"lr": 2e-3, "size": CHUNK}, {"lr": 1e-4, "size": CHUNK}
    shown = {"choice": "balanced"}  # examples that stand in the context at a test, as in in-context learning
    default = [level.to_dict() for level in default_levels(None)]  # what `nestling convert` writes
    kept = {"replay": 1.0, "buffer": WINDOW}
    as_level = {"lr": 6e-3, "size": CHUNK, "optimizer": "m3"}
    found = [
        LearnerContender("zero-shot", "zero-shot"),
        LearnerContender("in context, balanced", "in-context", options=shown),
        LearnerContender("1 level", "levels", one, READING),
        LearnerContender("1 level, in context", "levels", one, READING, shown),
        LearnerContender("2 levels", "levels", m3((CHUNK, 8e-3), (128, 1e-2)), READING),
        LearnerContender("default", "levels", default, {"context": CHUNK}),
        LearnerContender("default, replay", "levels", default, {"context": CHUNK}, kept),
        LearnerContender("default, snapshots", "levels", default, {"context": CHUNK}, {"snapshots": True}),
        LearnerContender("fine-tuning, same weights", "finetune", one, STACK, tuned),
        LearnerContender("fine-tuning, same weights, M3", "finetune", one, STACK, as_level),
        LearnerContender("fine-tuning, same weights, M3, in context", "finetune", one, STACK, as_level | shown),
        LearnerContender("fine-tuning, all weights", "finetune", options=whole),
        LearnerContender("EWC, all weights", "finetune", options=whole | {"ewc": 1e3, "fisher": 15}),
        LearnerContender("replay, same weights", "finetune", one, STACK, tuned | kept),
        LearnerContender("linear probe", "probe", options={"lr": 0.5}),
        LearnerContender("class means", "class means"),
        LearnerContender("exact memory", "exact"),
        LearnerContender("exact memory's keys, linear probe", "probe", options={"lr": 0.5, "keys": True}),
        LearnerContender("exact memory's keys, class means", "class means", options={"keys": True}),
    ]
    small = {"window": 512}
    plain = small | {"model": OURS[1]}
    return found + [
        LearnerContender("ours: levels", "levels", options=small | {"model": OURS[0]}),
        LearnerContender("ours: fine-tuning, all weights", "finetune", options=plain | {"lr": 3e-4, "size": 256}),
        LearnerContender("ours: class means", "class means", options=plain),
    ]
