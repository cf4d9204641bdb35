"""What a trial runs: a command, a Python function, or a training of `nestling train`."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import string
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestling.training.config import TrainConfig, option_names, unknown
from nestling.tuning.space import Space, text_of, value_of

Report = Callable[[int, float], bool]  # (step, value so far) -> whether the trial should stop
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?(?:nan|inf|infinity)", re.IGNORECASE)
NAMES = ("objective", "loss", "value")  # of the figure in a JSON line, unless --metric names it


class Failed(Exception):
    """A trial that gave no figure; the message says why."""


class Pruned(Exception):
    """A trial that was stopped because it does worse than others did."""


class Command:
    """A command line with {placeholders}, run without a shell; its output ends in the figure.

    A line that is a number, or a JSON object with the metric, is the figure; the last one counts. A JSON line that also
    holds "step" is one on the way, for pruning.

    Args:
        template: e.g. `python train.py --lr {lr} --periods {periods}`; {{ and }} are braces.
        metric: the figure's name in JSON lines; None takes "objective", "loss" or "value".
    """

    def __init__(self, template: str, metric: str | None = None) -> None:
        try:
            self.words = shlex.split(template)
            parts = [part for word in self.words for part in string.Formatter().parse(word)]
        except ValueError as error:
            hint = "write {{ and }} for braces"
            raise ValueError(f"--command {template!r} cannot be read: {error}; {hint}") from None
        self.names = {name for _, name, _, _ in parts if name is not None}
        if not self.words:
            raise ValueError("--command is empty")
        if not self.names:
            raise ValueError(f"--command {template!r} has no placeholder such as {{lr}}: every trial would be the same")
        self.template, self.metric = template, metric

    def space(self, given: Space, defaults: Space) -> Space:
        """The ranges for the placeholders: given ones, else the defaults. ValueError for what does not match."""
        for name in given:
            if name not in self.names:
                raise ValueError(f"--space names {name!r}, but the command has no {{{name}}}")
        for name in self.names:
            if name not in given and name not in defaults:
                raise ValueError(f"the command has {{{name}}}: give its range with --space {name}=LOW:HIGH")
        return Space({name: given.get(name) or defaults[name] for name in (*defaults, *given) if name in self.names})

    def filled(self, values: dict[str, Any]) -> list[str]:
        """The words of the command line with values in place."""
        return [word.format(**{name: text_of(v) for name, v in values.items()}) for word in self.words]

    def paste(self, values: dict[str, Any]) -> str:
        """The command line with the best values."""
        return shlex.join(self.filled(values))

    def __call__(self, values: dict[str, Any], report: Report) -> float:
        words = self.filled(values)
        with tempfile.TemporaryFile("w+") as errors:
            try:
                process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
            except OSError as error:
                raise Failed(f"the command cannot be run: {error.strerror or error}: {words[0]}") from None
            try:
                found, last = self._read(process, report)
                code = process.wait()
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
                process.stdout.close()
            errors.seek(0)
            if code:
                tail = " | ".join((errors.read().strip().splitlines() or ["no message"])[-3:])
                raise Failed(f"the command ended with code {code}: {tail}")
        if found is None:
            wanted = self.metric or "/".join(NAMES)
            raise Failed(
                f"the command printed no figure: its output must end in a number or a JSON object with {wanted!r}; "
                f"the last line was {last!r}"
            )
        return found

    def _read(self, process: subprocess.Popen, report: Report) -> tuple[float | None, str]:
        found, last = None, ""
        for line in process.stdout:
            if not line.strip():
                continue
            last = line.strip()
            step, value = self.figure(last)
            if value is not None:
                found = value
                if step is not None and report(step, value):
                    raise Pruned
        return found, last

    def figure(self, line: str) -> tuple[int | None, float | None]:
        """(step, figure) of a line of output; None where it holds none."""
        if NUMBER.fullmatch(line):
            return None, float(line)
        if not line.startswith("{"):
            return None, None
        try:
            values = json.loads(line)
        except ValueError:
            return None, None
        name = next((n for n in ((self.metric,) if self.metric else NAMES) if n in values), None)
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None, None
        step = values.get("step")
        return step if isinstance(step, int) else None, float(value)


class TrainingRun:
    """A run of `nestling train` with other optimiser settings; the figure is the held-out bits per byte.

    `lr` is optim.lr, a dotted name any option of the run, every other name an option of the optimiser.

    Args:
        config: the run; its folder is not used.
        reports: evaluations on the way, for pruning.
    """

    metric = "bits_per_byte"

    def __init__(self, config: TrainConfig, reports: int = 5) -> None:
        self.config, self.reports = config, max(1, reports)
        self._corpus = None

    def space(self, given: Space, defaults: Space) -> Space:
        """The given ranges; without any the defaults."""
        for name in given:
            if "." in name and name not in option_names():
                raise ValueError(unknown("option", name, option_names()))
        return given or defaults

    def changed(self, values: dict[str, Any]) -> TrainConfig:
        """The run with these settings."""
        options: dict[str, Any] = {}
        inner = dict(self.config.optim.options)
        for name, value in values.items():
            if name == "lr":
                options["optim.lr"] = value
            elif "." in name:
                options[name] = value_of(name, value)
            else:
                inner[name] = value_of(name, value)
        return self.config.changed(**(options | {"optim.options": inner}))

    def paste(self, values: dict[str, Any]) -> str:
        """Options for `nestling train`."""
        run = self.changed(values)
        words = ["--optimizer", run.optim.name, "--lr", text_of(run.optim.lr)]
        if run.optim.options:
            words += ["--optimizer-options", json.dumps(run.optim.options)]
        for name in values:
            if "." in name:
                words += ["-o", f"{name}={text_of(values[name])}"]
        return shlex.join(words)

    def check(self, values: dict[str, Any]) -> None:
        """Build the run once, so that a wrong option is an error before the first trial."""
        self._trainer(values)

    def __call__(self, values: dict[str, Any], report: Report) -> float:
        trainer = self._trainer(values)
        every = max(1, trainer.config.steps // self.reports)
        while trainer.step < trainer.config.steps:
            done = trainer.train_step()
            if not math.isfinite(done.loss):
                raise Failed(f"the loss at step {done.step} is {done.loss}")
            on_the_way = done.step % every == 0 and done.step < trainer.config.steps
            if on_the_way and report(done.step, trainer.evaluate().bits_per_byte):
                raise Pruned
        return trainer.evaluate().bits_per_byte

    def _trainer(self, values: dict[str, Any]) -> Any:
        from nestling.training.data import load_corpus
        from nestling.training.loop import Trainer

        # a folder nobody writes to: a trial keeps figures, no checkpoints
        config = self.changed(values).changed(out=str(Path(tempfile.gettempdir()) / "nestling-tune-unused"))
        if self._corpus is None:
            self._corpus = load_corpus(config.data)
            if len(self._corpus.val) < 2:
                raise ValueError("nothing is held out to judge a trial by: set data.val_fraction or data.val_text")
        return Trainer(config, corpus=self._corpus)


def load_callable(name: str) -> Callable[[Any], float]:
    """The function that `module:function` names, looked for in the current folder first; it takes an optuna trial and
    returns the figure. ValueError if there is none."""
    module, sign, function = name.partition(":")
    if not sign or not module or not function:
        raise ValueError(f"--call takes module:function, not {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"--call {name}: {error}") from None
    if not callable(found):
        raise ValueError(f"--call {name}: {module} has no function {function!r}")
    return found
