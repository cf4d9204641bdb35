"""The outer loop: from text to a checkpoint, one optimiser step at a time, over levels of different speed."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nestling.training import checkpoint, shards
from nestling.training.batches import Batches, MixedBatches
from nestling.training.build import build_model, load_saved
from nestling.training.config import RUN_FILE, TrainConfig
from nestling.training.data import Corpus, Mixture, load_corpus
from nestling.training.evaluation import Evaluation, bits_per_byte, evaluate
from nestling.training.levels import (
    check_factor,
    check_short_window,
    chunk_warnings,
    freeze,
    longer_chunks,
    make_schedule,
    shorter_windows,
)
from nestling.training.metrics import Metrics
from nestling.training.optimizers import LevelOptimizers
from nestling.training.parallelize import find_mode, parallelize
from nestling.training.progress import Silence, TrainingProgress
from nestling.training.report import Report, Result
from nestling.training.resume import check_same_run, find_checkpoint, writing_alone
from nestling.training.schedules import chunk_factor, lr_factor, window_limit
from nestling.training.streaming import Stream, StreamedBatches
from nestling.training.tokenizers import load_tokenizer
from nestling.utils.machine import find_device, stop_requests
from nestling.utils.ranks import find_ranks, process_group

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
        self.config, self.ranks = config, find_ranks()
        if config.threads:
            torch.set_num_threads(config.threads)
        source, self.warnings = self.ranks.together(lambda: find_checkpoint(config.out, resume), only_first=True)
        self._known = checkpoint.list_checkpoints(config.out)
        state = self.ranks.together(lambda: self._prepare(model, corpus, source))
        self._plain = copy.deepcopy(self.model).to("meta") if self.mode == "fsdp" else None
        self._parallel = parallelize(self.model, self.mode, config, self.device)
        shared = torch.distributed.group.WORLD if self.mode == "ddp" else None
        self.optimizers = self.ranks.together(lambda: LevelOptimizers(self.model, config.optim, self.schedule, shared))
        self.step = self.tokens = self.skipped = 0
        self._speed = 0.0
        torch.manual_seed(config.seed + self.ranks.rank)
        if state and source:
            state = shards.read(state, source / checkpoint.SHARDS, self.mode == "fsdp")
            self.optimizers.load_state_dict(state["optimizers"])
            self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped"]
            self._restore_random(state)
            if "stream" in state:
                self.batches.load_state_dict(state["stream"])
        self.resumed_at = self.step

    def _prepare(self, model: PreTrainedModel | None, corpus: Corpus | None, source: Path | None) -> dict | None:
        """Text and model, whole on this rank, and the state they resume from; every fault of the input shows here."""
        config, ranks = self.config, self.ranks
        self.mode = find_mode(config, ranks)
        self.device = find_device(config.device, ranks.local if ranks.size > 1 else None)
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
        self.warnings += chunk_warnings(self.model, config.data.seq_len)
        check_factor(self.model, config.schedule.chunk_factor, config.data.seq_len)
        check_short_window(self.model, config.schedule.short_window)
        if config.gradient_checkpointing and config.parallel.sequence == 1:  # else slices are read again
            self.model.activation_checkpointing_enable()
        self.schedule = make_schedule(self.model, config)
        freeze(self.model, self.schedule, config.trained)
        data = config.data
        kinds = {Mixture: MixedBatches, Stream: StreamedBatches}
        kind: Any = kinds.get(type(self.corpus.train), Batches)
        row, rows = (number // config.parallel.sequence for number in (ranks.rank, ranks.size))
        self.batches = kind(self.corpus.train, data.seq_len, data.batch_size, config.seed, row, rows)
        return state

    def _restore_random(self, state: dict) -> None:
        """Every generator as it was; another number of ranks begins others, each its own."""
        saved = [state["random"], *state.get("random_of_others", [])]
        if len(saved) == self.ranks.size or self.ranks.first:
            checkpoint.set_random_state(saved[self.ranks.rank])
        else:
            torch.manual_seed(self.config.seed + self.ranks.rank + self.step * self.ranks.size)

    def train_step(self) -> Report:
        """Take one optimiser step; returns its figures."""
        config, started = self.config, time.perf_counter()
        accumulate = config.optim.accumulate
        longer = chunk_factor(self.step, config.steps, config.schedule)
        limit = window_limit(self.step, config.steps, config.schedule, config.seed)
        loss = 0.0
        for micro in range(accumulate):
            window = self.batches[self.step * accumulate + micro].to(self.device)
            with longer_chunks(self.model, longer), shorter_windows(self.model, limit):
                last = micro == accumulate - 1
                loss += self._parallel.backward(window, accumulate, last, config.precision, self._apart)
        loss = self.ranks.mean(loss)
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
            ranks=self.ranks,
            apart=self._apart,
        )

    @property
    def _apart(self) -> int | None:
        return self.corpus.tokenizer.eos_token_id if self.config.data.documents == "apart" else None

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
        if isinstance(self.batches, StreamedBatches):
            state["stream"] = self.batches.state_dict()
        if self.ranks.size > 1:
            state["random_of_others"] = self.ranks.gathered(state["random"])[1:]
        model = self.model if self._plain is None else shards.whole_model(self.model, self._plain, self.ranks.first)
        path = checkpoint.save_checkpoint(
            self.config.out,
            self.step,
            model,
            self.corpus.tokenizer,
            state,
            self.config.logging.keep,
            self.ranks,
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
        with writing_alone(self.config.out, self.ranks):
            return self._run()

    def _run(self) -> Result:
        """`run` with the folder's lock held."""
        config, every = self.config, self.config.logging
        metrics: Any = Silence()
        progress: Any = Silence()

        def begin() -> None:
            if checkpoint.list_checkpoints(config.out) != self._known:
                raise ValueError(f"another run wrote into {config.out} meanwhile: resume it, or choose another --out")
            checkpoint.clean(config.out)
            config.save(Path(config.out) / RUN_FILE)

        self.ranks.together(begin, only_first=True)
        if self.ranks.first:
            metrics = Metrics(config, self.step)
            progress = TrainingProgress(config.steps, self.step, Path(config.out).name, every.log_every, every.progress)
        for warning in self.warnings:
            progress.say(warning)
        started, losses, evaluation = time.monotonic(), [], None
        with stop_requests() as stop:
            try:
                while self.step < config.steps and not self.ranks.any(stop.is_set()):
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


def train(config: TrainConfig, resume: bool = False) -> Result:
    """Train from text to checkpoint; see `Trainer`. Under torchrun every process calls it."""
    with process_group(config.device) as ranks, writing_alone(config.out, ranks):  # from before the folder is read
        return Trainer(config, resume=resume)._run()
