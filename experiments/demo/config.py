"""Every number of the demo."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from experiments.demo.text import Text

HOPE, TRANSFORMER = "Hope", "Transformer"


@dataclass(frozen=True)
class DemoConfig:
    """A small Hope and a Transformer of its size, what they read, and what is measured.

    Both are trained by one recipe (optimiser, learning rate, schedule, seed) on the same batches in the same order.
    """

    out: str = "runs/demo"
    minutes: float = 4.0  # from the start to the report
    threads: int = 1  # of each of the two models
    seed: int = 0

    # the models: bytes in, bytes out
    size: str = "tiny"
    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4  # of the Transformer: 32 channels each; Hope's have 64

    # the training
    seq_len: int = 256
    batch_size: int = 4
    optimizer: str = "muon"
    lr: float = 5e-3
    decay: float = 0.4  # the last part of the steps, over which the learning rate falls
    min_steps: int = 60  # however slow the machine
    max_steps: int = 4000
    calibration_seconds: float = 4.0
    replan_at: float = 0.3  # the part of the steps after which their number is set anew from the speed so far

    # the measurements
    eval_at: tuple[float, ...] = (0.04, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # parts of the steps
    eval_windows: int = 24
    long_windows: int = 24  # windows of long_context bytes for the loss by position
    long_context: int = 1024
    first_bin: int = 16  # bytes of the first bin of positions; each next one ends at twice the position
    state_context: int = 8192
    state_every: int = 1024
    excerpt: int = 1024  # bytes of the text looked at closely
    prompts: tuple[str, ...] = ()  # of the samples; none: the beginning of held-out text
    prompt_bytes: int = 48
    sample_bytes: int = 280
    temperature: float = 0.7
    margin: float = 0.75  # bits per byte below the entropy of the bytes that count as having learned

    def __post_init__(self) -> None:
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"--minutes must lie above 0 and at most at {24 * 60}, not {self.minutes:g}")
        if self.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {self.threads}")
        if not self.replan_at < 1 - self.decay:
            raise ValueError("replan_at must come before the learning rate's decay")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def model_options(self) -> dict[str, dict[str, Any]]:
        """What each model changes of the named size: Hope, and the Transformer with as many parameters."""
        from nestling.models import sizes
        from nestling.training.tokenizers import NUM_BYTES

        options = {
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
        }
        hope = sizes.config(self.size, **options, vocab_size=NUM_BYTES + 3)
        other = {"mixer": "attention", "num_attention_heads": self.num_attention_heads}
        matched = sizes.matched_config(hope, **other)
        return {HOPE: options, TRANSFORMER: options | other | {"intermediate_size": matched.intermediate_size}}

    def train_config(self, name: str, text: Text, options: dict[str, Any], out: str, steps: int = 1) -> dict[str, Any]:
        """The run of one model, for `TrainConfig.from_dict`; the two differ in model and folder only."""
        return {
            "out": f"{out}/{name.lower()}",
            "steps": steps,
            "seed": self.seed,
            "device": "cpu",
            "model": {"name": self.size, "options": options},
            "data": {
                "text": text.train,
                "val_text": text.held_out,
                "val_fraction": 0.1,
                "tokenizer": "bytes",
                "seq_len": self.seq_len,
                "batch_size": self.batch_size,
                "cache_dir": f"{out}/text",
            },
            "optim": {"name": self.optimizer, "lr": self.lr},
            "schedule": {"name": "wsd", "decay": self.decay},
            "logging": {"keep": 1},
        }
