"""A training run, and the grid of models, learning rates and seeds around it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from experiments.shared.study import Contender, check_names, without_stages
from experiments.shared.work import Job
from nestling.training.config import TrainConfig

# options of a training run that decide no result
MACHINE = ("out", "device", "compile", "gradient_checkpointing", "threads", "logging", "parallel")

_SMOKE = {
    "steps": 4,
    "seeds": [0, 1],
    "data.seq_len": 24,
    "data.batch_size": 2,
    "data.val_fraction": 0.02,
    "test_text": "",
    "eval_windows": 4,
    "eval_batch_size": 2,
    "position_bins": 4,
    "curve_points": 4,
    "speed_shape": [1, 16, 16, 2],
}
_SMOKE_MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass
class ModelContender(Contender):
    """A sequence layer with its options.

    `model` changes other fields of the model's configuration; `optim` (a name), `lrs` and `seeds` replace the
    experiment's.
    The MLPs' width is set so that every contender has the parameters of the experiment's own model.
    """

    mixer: str = "selfmod"
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optim: str = ""
    lrs: list[float] | None = None
    seeds: list[int] | None = None


@dataclass
class TrainingStudy(TrainConfig):
    """A training run (what all contenders share) and the grid around it; `out` is the experiment's folder.

    `test_text` names the file of the data folder that is held out whole; the tails of the others (`data.val_fraction`)
    are for choosing. "" holds out the last file.
    """

    name: str = "quality"
    contenders: list[ModelContender] = field(default_factory=list)
    lrs: list[float] = field(default_factory=lambda: [3e-3])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    precisions: list[str] = field(default_factory=lambda: ["float32"])
    test: bool = False  # whether the finished runs are tested on the held-out text
    test_text: str = "herman-melville--moby-dick.txt"
    eval_windows: int = 96  # windows of seq_len tokens per held-out text
    eval_batch_size: int = 8
    position_bins: int = 8  # the loss by position is averaged in bins that widen geometrically
    long_context: int = 0  # also evaluate windows that many times seq_len: does the memory stay stable?
    divergence_margin: float = 0.5  # nats the last mean loss may lie above the best one
    max_skips: int = 50  # steps in a row without a finite gradient after which a run is given up
    curve_points: int = 60
    speed_rounds: int = 0  # rounds of timing every contender's layer alone, at the end (0: none)
    speed_shape: list[int] = field(default_factory=lambda: [2, 512, 256, 4])  # batch, tokens, width, heads

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.contenders)
        for name in ("lrs", "seeds", "precisions"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold at least one value")
        if len(self.speed_shape) != 4:
            raise ValueError(f"speed_shape must be [batch, tokens, width, heads], not {self.speed_shape}")

    def contender(self, name: str) -> ModelContender:
        """The contender of that name."""
        return next(c for c in self.contenders if c.name == name)

    def stored(self) -> dict[str, Any]:
        """What `config.json` keeps: nothing that belongs to this machine or comes from the grid."""
        values = self.to_dict()
        for name in MACHINE + ("seed", "precision", "trained"):
            values.pop(name, None)
        values["data"] = {name: values["data"][name] for name in ("seq_len", "batch_size", "val_fraction")}
        values["optim"].pop("lr")
        for contender in values["contenders"]:
            for name in ("options", "model", "optim", "lrs", "seeds"):
                if not contender[name]:
                    contender.pop(name)
        return values

    def smoke(self) -> TrainingStudy:
        """A version that takes seconds; it has every contender, so that none is found broken after an hour."""
        contenders = [dataclasses.asdict(c) | {"seeds": None} for c in self.contenders]
        changes = {"model.options": self.model.options | _SMOKE_MODEL, "contenders": contenders, "lrs": self.lrs[:2]}
        changes |= {"speed_rounds": min(1, self.speed_rounds), "long_context": min(2, self.long_context)}
        return self.changed(**(_SMOKE | changes))

    def run_config(self, job: TrainingJob) -> TrainConfig:
        """The training run of a job."""
        values = self.to_dict()
        run = TrainConfig.from_dict({f.name: values[f.name] for f in dataclasses.fields(TrainConfig)})
        own = self.contender(job.contender).optim or run.optim.name
        return run.changed(**{"seed": job.seed, "precision": job.precision, "optim.lr": job.lr, "optim.name": own})

    def fingerprint(self, job: TrainingJob, corpus: str) -> str:
        """A digest of everything that decides the result of a job: a result of other settings does not count."""
        run = self.run_config(job).to_dict()
        for name in (*MACHINE, "trained"):  # every contender trains all its weights
            run.pop(name, None)
        run["data"] = {k: v for k, v in run["data"].items() if k in ("seq_len", "batch_size")}
        run["schedule"] = without_stages(run["schedule"])
        contender = dataclasses.asdict(self.contender(job.contender)) | {"seeds": None}
        contender.pop("optim")  # it stands in the run, as the rate does
        contender.pop("lrs")
        own = {
            k: getattr(self, k) for k in ("eval_windows", "position_bins", "long_context", "max_skips", "curve_points")
        }
        text = json.dumps([run, contender, own, corpus], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TrainingJob(Job):
    """One training run of the grid ("train"), or the test of its weights on the held-out text ("test")."""

    contender: str
    lr: float
    seed: int
    precision: str = "float32"
    kind: str = "train"

    @property
    def key(self) -> str:
        """A readable name, the same for training and test."""
        return f"{self.contender} lr={self.lr:g} seed={self.seed} {self.precision}"

    @property
    def label(self) -> str:
        return self.key + (" (test)" if self.kind == "test" else "")
