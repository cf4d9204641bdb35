"""The outer loop: from text to a checkpoint, one optimiser step at a time, over levels of different speed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nestling.layers.titans import SelfModifyingTitans
from nestling.schedule import Schedule
from nestling.training import checkpoint
from nestling.training.batches import Batches
from nestling.training.build import build_model, load_saved
from nestling.training.config import RUN_FILE, TrainConfig
from nestling.training.data import Corpus, load_corpus
from nestling.training.evaluation import Evaluation, bits_per_byte, evaluate, token_losses
from nestling.training.metrics import Metrics
from nestling.training.optimizers import LevelOptimizers
from nestling.training.progress import TrainingProgress
from nestling.training.report import Report, Result
from nestling.training.resume import check_same_run, find_checkpoint
from nestling.training.schedules import lr_factor
from nestling.training.tokenizers import load_tokenizer
from nestling.utils.locks import sole_writer
from nestling.utils.machine import find_device, stop_requests

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Trainer:
    """A training run that can be driven step by step or as a whole.

    Args:
        config: the run.
        model: trained instead of `config.model` (e.g. any Hugging Face causal language model).
        corpus: read instead of `config.data` (several runs can share one).
        resume: go on from the newest whole checkpoint in `config.out`; the end is bit for bit that of an uninterrupted
            run.

    Raises:
        ValueError: a configuration that does not fit (before anything is written), a folder that already holds a run
            without `resume`, a checkpoint of another run or text with it.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        model: PreTrainedModel | None = None,
        corpus: Corpus | None = None,
        resume: bool = False,
    ) -> None:
        self.config = config
        self.device = find_device(config.device)
        if config.threads:
            torch.set_num_threads(config.threads)
        source, self.warnings = find_checkpoint(config.out, resume)
        self._known = checkpoint.list_checkpoints(config.out)
        own = Path(config.model.name)
        tokenizer = (
            load_tokenizer(checkpoint.resolve(own)) if config.data.tokenizer == "auto" and own.is_dir() else None
        )
        self.corpus = corpus if corpus is not None else load_corpus(config.data, tokenizer)
        state = checkpoint.load_trainer_state(source) if source else None
        if state:
            check_same_run(state, config, self.corpus.fingerprint)
        self.model = self._make_model(model, source).to(self.device)
        self.model.train()
        self.warnings += _chunk_warnings(self.model, config.data.seq_len)
        if config.gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self._called = torch.compile(self.model) if config.compile else self.model
        self.schedule = self._make_schedule()
        if config.trained == "levels":
            _train_levels_only(self.model)
        self.optimizers = LevelOptimizers(self.model, config.optim, self.schedule)
        data = config.data
        self.batches = Batches(self.corpus.train, data.seq_len, data.batch_size, config.seed)
        self.step = self.tokens = self.skipped = 0
        self._speed = 0.0
        torch.manual_seed(config.seed)
        if state:
            self.optimizers.load_state_dict(state["optimizers"])
            self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
            checkpoint.set_random_state(state["random"])
        self.resumed_at = self.step

    def train_step(self) -> Report:
        """Take one optimiser step; returns its figures."""
        config, started = self.config, time.perf_counter()
        accumulate = config.optim.accumulate
        loss = 0.0
        for micro in range(accumulate):
            window = self.batches[self.step * accumulate + micro].to(self.device)
            part = token_losses(self._called, window, config.precision).mean() / accumulate
            part.backward()
            loss += part.item()
        factor = lr_factor(self.step, config.steps, config.schedule)
        done = self.optimizers.step(self.tokens, self.tokens + config.tokens_per_step, factor)
        self.step += 1
        self.tokens += config.tokens_per_step
        self.skipped += done.skipped
        speed = config.tokens_per_step / (time.perf_counter() - started)
        self._speed = speed if not self._speed else 0.9 * self._speed + 0.1 * speed
        return Report(
            self.step,
            self.tokens,
            loss,
            bits_per_byte(loss, self.corpus.train),
            config.optim.lr * factor,
            done.grad_norm,
            self._speed,
            done.skipped,
            done.slow_levels,
        )

    def evaluate(self) -> Evaluation | None:
        """The held-out loss now; None if nothing is held out."""
        config = self.config
        if len(self.corpus.val) < 2:
            return None
        return evaluate(
            self.model,
            self.corpus.val,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            max_batches=config.logging.eval_batches,
            precision=config.precision,
        )

    def save(self) -> Path:
        """Write a checkpoint of this moment; returns its folder. OSError if it cannot be written, with nothing lost."""
        state = {
            "config": self.config.to_dict(),
            "corpus": self.corpus.fingerprint,
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "optimizers": self.optimizers.state_dict(),
            "random": checkpoint.random_state(),
        }
        path = checkpoint.save_checkpoint(
            self.config.out, self.step, self.model, self.corpus.tokenizer, state, self.config.logging.keep
        )
        self._known = checkpoint.list_checkpoints(self.config.out)
        return path

    def run(self) -> Result:
        """Train to the end, with figures, evaluations and checkpoints on the way.

        SIGINT and SIGTERM end the run after the current step with a checkpoint. A checkpoint that cannot be written on
        the way is reported and training goes on; at the end it is an OSError.

        Raises:
            ValueError: another run is at the folder, or wrote there after this one had looked.
        """
        with sole_writer(self.config.out):
            return self._run()

    def _run(self) -> Result:
        """`run` with the folder's lock held."""
        if checkpoint.list_checkpoints(self.config.out) != self._known:
            raise ValueError(f"another run wrote into {self.config.out} meanwhile: resume it, or choose another --out")
        config, every = self.config, self.config.logging
        checkpoint.clean(config.out)
        config.save(Path(config.out) / RUN_FILE)
        metrics = Metrics(config, self.step)
        progress = TrainingProgress(config.steps, self.step, Path(config.out).name, every.log_every, every.progress)
        for warning in self.warnings:
            progress.say(warning)
        started, losses, evaluation = time.monotonic(), [], None
        with stop_requests() as stop:
            try:
                while self.step < config.steps and not stop.is_set():
                    report = self.train_step()
                    losses.append(report.loss)
                    progress.step(report)
                    if report.skipped:
                        progress.say(f"step {report.step}: the gradient is not finite; skipped ({self.skipped} so far)")
                    last = self.step == config.steps
                    if last or (every.log_every and self.step % every.log_every == 0):
                        self._log(metrics, report, losses)
                        losses = []
                    if last or (every.eval_every and self.step % every.eval_every == 0):
                        evaluation = self._evaluated(metrics, progress)
                    if not last and every.save_every and self.step % every.save_every == 0:
                        self._save_on_the_way(progress)
                interrupted = self.step < config.steps
                if interrupted:
                    evaluation = None  # of an earlier step, if any
                elif evaluation is None:
                    evaluation = self._evaluated(metrics, progress)
                path = self.save()
            finally:
                progress.close()
                metrics.close()
        return Result(self.step, self.tokens, evaluation, path, time.monotonic() - started, self.skipped, interrupted)

    def _log(self, metrics: Metrics, report: Report, losses: list[float]) -> None:
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else None
        metrics.write(
            "train",
            report.step,
            tokens=report.tokens,
            loss=mean,
            bits_per_byte=None if mean is None else bits_per_byte(mean, self.corpus.train),
            lr=report.lr,
            grad_norm=report.grad_norm if math.isfinite(report.grad_norm) else None,
            tokens_per_second=report.tokens_per_second,
            skipped=self.skipped,
        )

    def _evaluated(self, metrics: Metrics, progress: TrainingProgress) -> Evaluation | None:
        evaluation = self.evaluate()
        if evaluation is not None:
            progress.held_out(evaluation.bits_per_byte)
            metrics.write(
                "eval",
                self.step,
                tokens=self.tokens,
                loss=evaluation.loss,
                bits_per_byte=evaluation.bits_per_byte,
                eval_tokens=evaluation.tokens,
                loss_by_position=evaluation.binned(self.config.logging.position_bins),
            )
        return evaluation

    def _save_on_the_way(self, progress: TrainingProgress) -> None:
        try:
            self.save()
        except OSError as error:
            progress.say(f"step {self.step}: no checkpoint could be written ({error}); training goes on")

    def _make_model(self, model: PreTrainedModel | None, source: Path | None) -> PreTrainedModel:
        if source is not None:
            return load_saved(source, type(model) if model is not None else None)
        if model is not None:
            return model
        return build_model(self.config.model, self.corpus.tokenizer, self.config.seed)

    def _make_schedule(self) -> Schedule | None:
        levels = getattr(self.model.config, "levels", None)
        if not levels or not hasattr(self.model, "level_parameters"):  # a stacked model has no levels in its config
            return None
        config = self.config
        total = config.tokens_per_step * config.steps
        schedule = Schedule(levels, config.data.seq_len, config.tokens_per_step, total)
        if hasattr(self.model, "set_context_length"):
            self.model.set_context_length(config.data.seq_len)
        elif schedule.fast:
            raise ValueError(
                f"levels {', '.join(map(str, schedule.fast))} would be updated inside a context of "
                f"{config.data.seq_len} tokens, which a {type(self.model).__name__} does not do"
            )
        return schedule


def _chunk_warnings(model: PreTrainedModel, window: int) -> list[str]:
    """Memories whose chunk is not shorter than a training window: reading never begins a second chunk there."""
    chunks = [g.chunk_size for m in model.modules() if isinstance(m, SelfModifyingTitans) for g in m.groups]
    if window > max(chunks, default=0):
        return []
    return [
        f"a training window of {window} tokens is not longer than a memory's chunk of {max(chunks)}: what the model "
        "does with a second chunk stays untrained. Take a larger seq_len, or a smaller chunk_size of the mixer"
    ]


def _train_levels_only(model: PreTrainedModel) -> None:
    """Freeze all but the weights from which the levels of a stream begin."""
    learner = getattr(model, "learner", None)
    if learner is None or not learner.fast:
        raise ValueError(
            f'trained "levels" needs a model with levels that learn in a context, and this {type(model).__name__} has '
            "none: convert one first (nestling convert), or train all"
        )
    if learner.meta_grad == "none":
        raise ValueError('trained "levels" needs their meta-gradients, but meta_grad is "none": use "first_order"')
    chosen = {m.weight for i in learner.fast for m in learner.modules[i]}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in chosen)


def train(config: TrainConfig, resume: bool = False) -> Result:
    """Train from text to checkpoint; see `Trainer`."""
    with sole_writer(config.out):  # from before the folder is read
        return Trainer(config, resume=resume)._run()
