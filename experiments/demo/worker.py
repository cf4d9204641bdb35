"""One of the two models: trained step by step and measured, each in a process of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from experiments.demo import measure

if TYPE_CHECKING:
    from nestling.training.loop import Trainer


class ModelWorker:
    """A model in training. Every method takes and returns plain values, so that it can be asked from afar.

    Args:
        run: the training run, for `TrainConfig.from_dict`.
        demo: the fields of `DemoConfig`.
    """

    def __init__(self, run: dict[str, Any], demo: dict[str, Any]) -> None:
        self.run, self.demo = run, demo
        self.trainer: Trainer = self._fresh(1)
        self.seconds = 0.0  # spent in training steps

    def describe(self) -> dict[str, Any]:
        """Parameters and settings."""
        from nestling.layers import SelfModifyingTitans

        model = self.trainer.model
        groups = next((m.groups for m in model.modules() if isinstance(m, SelfModifyingTitans)), ())
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "mixers": model.config.mixer_names,
            "layers": model.config.num_hidden_layers,
            "width": model.config.hidden_size,
            "heads": model.config.num_attention_heads,
            "mlp_width": model.config.intermediate_size,
            "chunk": groups[-1].chunk_size if groups else None,  # of the main memory
        }

    def calibrate(self, seconds: float) -> float:
        """Seconds that one training step takes, measured on a copy that is thrown away."""
        trial = self._fresh(1000)
        trial.train_step()  # the first one sets up what later ones find
        started, steps = time.perf_counter(), 0
        while steps < 2 or time.perf_counter() - started < seconds:
            trial.train_step()
            steps += 1
        return (time.perf_counter() - started) / steps

    def plan(self, steps: int) -> None:
        """Set the number of steps of the run; before the learning rate's decay it may be set again."""
        if self.trainer.step == 0:
            self.trainer = self._fresh(steps)
        self.trainer.config.steps = steps

    def step(self) -> dict[str, float]:
        """Take one training step."""
        started = time.perf_counter()
        report = self.trainer.train_step()
        self.seconds += time.perf_counter() - started
        return {
            "step": report.step,
            "tokens": report.tokens,
            "seconds": self.seconds,
            "bits": report.bits_per_byte,
            "skipped": report.skipped,
        }

    def held_out(self) -> dict[str, Any]:
        """The held-out loss now, of every window in bits per byte."""
        windows = measure.window_bits(
            self.trainer.model, self.trainer.corpus.val, self.demo["seq_len"], self.demo["eval_windows"]
        )
        bits = [sum(row) / len(row) for row in windows.tolist()]
        return {
            "step": self.trainer.step,
            "tokens": self.trainer.tokens,
            "seconds": self.seconds,
            "bits": sum(bits) / len(bits),
            "windows": bits,
        }

    def save(self) -> str:
        """Write the model as a checkpoint; returns its folder."""
        return str(self.trainer.save())

    def positions(self) -> dict[str, Any]:
        """The held-out loss by position in a context longer than any seen in training."""
        return measure.by_position(
            self.trainer.model,
            self.trainer.corpus.val,
            self.demo["long_context"],
            self.demo["long_windows"],
            self.demo["first_bin"],
        )

    def states(self) -> list[dict[str, int]]:
        """The bytes of the state along a long text."""
        ids = self.trainer.corpus.val.ids
        return measure.state_sizes(self.trainer.model, ids, self.demo["state_context"], self.demo["state_every"])

    def memory(self) -> dict[str, Any]:
        """The text looked at closely, the model's own loss on it, and what its memories do meanwhile (if any)."""
        return measure.memory_over_text(self.trainer.model, self.trainer.corpus.val.ids, self.demo["excerpt"])

    def samples(self) -> list[dict[str, str]]:
        """Text written from the prompts, the same random numbers for every model."""
        corpus, demo = self.trainer.corpus, self.demo
        prompts = demo["prompts"] or measure.prompts_from(corpus.val.ids, demo["prompt_bytes"])
        samples = []
        for i, prompt in enumerate(prompts):
            options = (demo["sample_bytes"], demo["temperature"], demo["seed"] + i)
            samples.append(
                {"prompt": prompt, "text": measure.sample(self.trainer.model, corpus.tokenizer, prompt, *options)}
            )
        return samples

    def _fresh(self, steps: int) -> Trainer:
        from nestling.training import TrainConfig, Trainer

        return Trainer(TrainConfig.from_dict({**self.run, "steps": steps}))
