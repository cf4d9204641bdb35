"""`quality` at a second size: four times the parameters, in four layers, each contender at its best rate there."""

from __future__ import annotations

from experiments.quality.experiment import (
    HYBRID,
    SAMBA,
    final_jobs,
    plan,
    plot,
    summarize,
    table,
    work,
)
from experiments.shared.models.study import TrainingStudy

GROUP = "Models"
QUESTION = "Does the order of quality stay at four times the parameters?"

__all__ = ["defaults", "final_jobs", "plan", "plot", "summarize", "table", "work"]


def defaults() -> TrainingStudy:
    """The experiment's settings: the same text, windows and bytes read, the optimiser that was best for all."""
    heads = {"num_attention_heads": 3}  # of 64, as in the smaller models
    return TrainingStudy.from_dict(
        {
            "name": "quality_2m",
            "steps": 800,
            "test": True,
            "model": {
                "name": "tiny",
                "options": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6}
                | {"mixer_options": {"expansion": 2}},
            },
            "data": {"seq_len": 512, "batch_size": 2},
            "optim": {"name": "muon"},
            # around the best of three in `quality`
            "contenders": [
                {"name": "hope", "lrs": [3e-3, 5e-3]},
                {"name": "hope, hybrid", "model": HYBRID | heads, "lrs": [5e-3, 1e-2]},
                {"name": "transformer + conv", "mixer": "attention", "lrs": [5e-3, 1e-2]},
                {"name": "gated deltanet and window", "model": SAMBA | heads, "lrs": [5e-3, 1e-2]},
            ],
        }
    )
