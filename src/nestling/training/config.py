"""What a training run is, as nested dataclasses that hold every number, and how they are read and written.

Unknown keys and values of the wrong kind are refused by name, with the nearest valid name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from nestling.utils.places import did_you_mean

RUN_FILE = "run.json"  # a run's configuration in its folder


class Settings:
    """What every configuration can do: be read, checked, changed by dotted name and written."""

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain nested dictionaries."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build a configuration; unknown keys and wrong kinds raise ValueError with the key's full name."""
        return _build(cls, values, "")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a JSON or YAML file."""
        return cls.from_dict(read_mapping(path))

    def save(self, path: str | Path) -> None:
        """Write JSON (or YAML, by the file's ending)."""
        from nestling.utils.files import write_text

        if Path(path).suffix in (".yaml", ".yml"):
            import yaml

            write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))
        else:
            write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def changed(self, **options: Any) -> Self:
        """A copy with some values replaced, named by dotted path: `config.changed(**{"optim.lr": 1e-3})`."""
        values = self.to_dict()
        for path, value in options.items():
            *parents, last = path.split(".")
            inner, kind = values, type(self)
            for depth, name in enumerate(parents):
                kinds = typing.get_type_hints(kind)
                if name not in kinds or not dataclasses.is_dataclass(kinds[name]):
                    sections = [n for n, k in kinds.items() if dataclasses.is_dataclass(k)]
                    raise ValueError(unknown("section", ".".join(parents[: depth + 1]), sections))
                inner, kind = inner[name], kinds[name]
            names = list(typing.get_type_hints(kind))
            if last not in names:
                valid = [".".join([*parents, n]) for n in names] if parents else option_names(type(self))
                raise ValueError(unknown("option", path, valid))
            inner[last] = value
        return self.from_dict(values)


@dataclass
class ModelConfig:
    """Which model is trained.

    `name` is a size of `nestling.models.sizes`, a saved model's folder (training goes on from its weights) or a
    `config.json` (fresh weights); `options` are changes to its configuration, e.g. `{"hidden_size": 128, "mixer":
    "attention"}`.
    """

    name: str = "tiny"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """What is read: text, tokenizer, windows and the part held out.

    `text` names files, folders or one `datasets` data set. `tokenizer` is "bytes", "bpe:4096" (trained on the data), a
    Hugging Face tokenizer's path, or "auto": a saved model's own, else bytes. `val_text` names held-out files; without
    it the last `val_fraction` of every file and of a data set's rows is held out (`val_split="tail"`), or whole files
    (`val_split="documents"`). A folder of `nestling data` is named alone and brings its tokenizer and held-out text.

    `shares`, one for each of `text`, says in which proportion they are read whatever their sizes: [3, 1] takes three
    quarters of all windows, so of all tokens, from the first. Folders of `nestling data` can be mixed so.

    With `stream`, `text` is a data set of the hub or files .jsonl or .parquet that are read while the run trains,
    tokenised on the way and never held: windows are drawn from `shuffle` of them, and the first `val_windows` are held
    out (or `val_text`).

    `documents` "joined" lets a window go on from one text into the next; with "apart" every text of a window begins
    anew: no state, attention or level reaches it from the text before (positions begin again at 0).
    """

    text: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    val_text: list[str] = field(default_factory=list)
    val_fraction: float = 0.05
    val_split: str = "tail"
    pattern: str = "**/*"  # which files of a folder, as a glob
    dataset_config: str | None = None  # the configuration of a `datasets` data set
    column: str = "text"  # its text column
    tokenizer: str = "auto"
    seq_len: int = 256  # tokens of one window
    batch_size: int = 8  # windows of one micro-batch, of all processes together
    documents: str = "joined"
    stream: bool = False
    shuffle: int = 1000  # windows of a stream among which the next is drawn; 1: in the stream's order
    val_windows: int = 160  # held out at a stream's beginning
    cache_dir: str | None = None  # where token files are kept; None: the user's cache folder

    def __post_init__(self) -> None:
        _positive(self, "seq_len", "batch_size", "shuffle")
        _not_negative(self, "val_windows")
        _within(self, "val_fraction", 0.0, 0.9)
        _one_of(self, "val_split", ("tail", "documents"))
        _one_of(self, "documents", ("joined", "apart"))
        usable = all(map(math.isfinite, self.shares)) and min(self.shares, default=1) >= sum(self.shares) / 1000 >= 0
        if self.shares and not (usable and min(self.shares) > 0 and len(self.shares) == len(self.text)):
            raise ValueError(
                f"shares must be {len(self.text)} numbers above 0, one for each text and none below a thousandth of "
                f"all; got {self.shares}"
            )
        if self.stream and (self.shares or self.tokenizer.startswith("bpe")):
            what = "shares" if self.shares else f"tokenizer {self.tokenizer!r}, which is trained on the whole text,"
            raise ValueError(f"{what} cannot go with stream: prepare the texts (nestling data) and train on them")


@dataclass
class OptimConfig:
    """How weights move: the optimiser by name, its options, gradient accumulation and clipping.

    `name` is "adamw", "muon", "m3" or any class as `package.module.Class`; `options` go to its constructor.
    """

    name: str = "muon"  # better than AdamW for every layer that had both (experiment `quality`)
    lr: float = 3e-3  # the best of three for AdamW and for the paper's layer with Muon; the hybrids bear 1e-2 with it
    weight_decay: float = 0.1  # on matrices only
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1  # micro-batches of one step
    clip: float = 1.0  # largest gradient norm; 0 turns clipping off

    def __post_init__(self) -> None:
        _positive(self, "accumulate")
        _not_negative(self, "lr", "weight_decay", "clip")


@dataclass
class ScheduleConfig:
    """What changes over the run: the learning rate, as a factor on `optim.lr`: "cosine", "wsd" (warm-up, stable, decay)
    or "constant"; how often memories write: with a `chunk_factor` above 1 their chunks are so many times as long in
    the steps before `chunk_until`, which is cheaper, and then the model's own (the two stages of TNT); and how far
    attention sees: with a `short_window` no further than so many tokens in a share of the steps before `short_until`,
    drawn at random, so that the memories learn what the attention beside them would otherwise do (decision D37)."""

    name: str = "cosine"
    warmup: float = 0.05  # fraction of the steps
    decay: float = 0.2  # wsd: fraction of the steps
    final: float = 0.1  # the factor at the end
    chunk_factor: int = 1
    chunk_until: float = 0.8  # fraction of the steps
    short_window: int | None = None  # tokens
    short_share: float = 0.5  # of the steps
    short_until: float = 0.75  # fraction of the steps

    def __post_init__(self) -> None:
        _one_of(self, "name", ("cosine", "wsd", "constant"))
        _positive(self, "chunk_factor")
        if self.short_window is not None:
            _positive(self, "short_window")
        for name in ("warmup", "decay", "final", "chunk_until", "short_share", "short_until"):
            _within(self, name, 0.0, 1.0)


@dataclass
class LoggingConfig:
    """What is written and when, in steps (0: never)."""

    log_every: int = 10
    eval_every: int = 250  # and always at the end
    eval_batches: int = 20
    position_bins: int = 8  # the loss by position in the context is averaged in so many bins
    save_every: int = 250  # and always at the end
    keep: int = 2  # checkpoints kept
    trackers: list[str] = field(default_factory=list)  # "trackio", "tensorboard", "wandb"
    progress: bool = True

    def __post_init__(self) -> None:
        _not_negative(self, "log_every", "eval_every", "save_every")
        _positive(self, "eval_batches", "position_bins", "keep")


@dataclass
class ParallelConfig:
    """How the processes that torchrun starts share a run.

    `mode` is "ddp" (every process holds the whole model), "fsdp" (each holds a part of weights, gradients and optimiser
    state; FSDP2), "none", or "auto": ddp where there are several processes. `param_dtype` is the type in which fsdp
    gathers and computes with weights, "float32" or "bf16"; they are kept, and gradients summed, in float32. `offload`
    keeps fsdp's parts in the CPU's memory.

    `sequence` ranks read a slice of each window of their rows and hand the model's state on; the other ranks share the
    batch (ddp). They read `rows` windows at once: the fewer, the less they wait for each other.
    """

    mode: str = "auto"
    param_dtype: str = "float32"
    offload: bool = False
    sequence: int = 1
    rows: int = 1

    def __post_init__(self) -> None:
        _positive(self, "sequence", "rows")
        _one_of(self, "mode", ("auto", "none", "ddp", "fsdp"))
        _one_of(self, "param_dtype", ("float32", "bf16"))


@dataclass
class TrainConfig(Settings):
    """A whole run.

    `trained` says which weights the optimiser moves: "all", or "levels", where the levels that learn in a context begin
    (the short continued training after which a converted model's levels know how to adapt).
    `precision` is "float32" or "bf16" (autocast; weights stay float32). `threads` limits the CPU threads (0: torch's
    choice); with more threads than free cores small products become many times slower. `gradient_checkpointing` keeps
    less for the backward pass and computes it again: layer by layer, or with levels that learn in the context piece by
    piece.
    """

    out: str = "runs/default"
    steps: int = 1000
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    precision: str = "float32"
    compile: bool = False
    gradient_checkpointing: bool = False
    trained: str = "all"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if not self.out:
            raise ValueError("out is empty: name the run's folder")
        _positive(self, "steps")
        _not_negative(self, "threads")
        _one_of(self, "precision", ("float32", "bf16"))
        _one_of(self, "trained", ("all", "levels"))

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step."""
        return self.data.seq_len * self.data.batch_size * self.optim.accumulate


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a JSON or YAML file that holds a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no configuration file at {path}{did_you_mean(path)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except Exception as error:
        raise ValueError(f"{path} is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options, not {type(values).__name__}")
    return values


def nearest(name: str, names: typing.Iterable[str]) -> str | None:
    """The valid name closest to a mistyped one, or None if nothing is close."""
    names = list(names)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not found:  # the last part alone: "lr" for "optim.lr"
        found = [n for n in names if n.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]][:1]
    return found[0] if found else None


def unknown(what: str, name: str, names: typing.Iterable[str]) -> str:
    """The message for an unknown name: the nearest valid one, and all of them if they are few or none is near."""
    names = list(names)
    close = nearest(name, names)
    listed = f"(valid: {', '.join(names)})" if close is None or len(names) <= 12 else ""
    return " ".join([f"unknown {what} {name!r}:", *([f"did you mean {close!r}?"] if close else []), listed]).rstrip()


def option_names(cls: type = TrainConfig, prefix: str = "") -> list[str]:
    """The dotted names of every option of a configuration."""
    names = []
    for name, kind in typing.get_type_hints(cls).items():
        names += option_names(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [prefix + name]
    return names


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be a mapping, not {values!r}")
    kinds = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in kinds:
            raise ValueError(unknown("option", f"{prefix}{key}", [f"{prefix}{name}" for name in kinds]))
        arguments[key] = _convert(kinds[key], value, f"{prefix}{key}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


def _convert(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, name + ".")
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = next(k for k in typing.get_args(kind) if k is not type(None))
        return None if value is None else _convert(inner, value, name)
    if origin is list:
        if isinstance(value, (list, tuple)):
            return [_convert(typing.get_args(kind)[0], item, name) for item in value]
    elif origin is dict:
        if isinstance(value, dict):
            return dict(value)
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, str):  # YAML reads 1e-3 as text
            try:
                return float(value)
            except ValueError:
                pass
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(value, kind):
        return value
    wanted = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "text"}
    raise ValueError(f"{name} must be {wanted.get(getattr(kind, '__name__', ''), str(kind))}, not {value!r}")


def _positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must not be negative, not {getattr(config, name)}")


def _within(config: Any, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}, not {value}")


def _one_of(config: Any, name: str, names: tuple[str, ...]) -> None:
    if getattr(config, name) not in names:
        raise ValueError(unknown(name, getattr(config, name), names))
