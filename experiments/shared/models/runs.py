"""One run of a grid: a contender of equal size, trained by the training loop on one thread, and its held-out losses."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from experiments.shared.corpus import Texts, find_files, load_texts
from experiments.shared.models.speed import measure_speeds
from experiments.shared.models.study import ModelContender, TrainingJob, TrainingStudy
from experiments.shared.work import Progress, Work, curve, one_thread, versions
from nestling.models import HopeForCausalLM, sizes
from nestling.models.hope import HopeConfig
from nestling.training.data import Tokens
from nestling.training.evaluation import bits_per_byte, evaluate
from nestling.training.loop import Trainer


def model_config(experiment: TrainingStudy, contender_name: str, vocab_size: int) -> HopeConfig:
    """The configuration of a contender with the parameters of the experiment's own model, within 2%."""
    options = {"mixer": "selfmod"} | experiment.model.options  # the layer all of these experiments are about
    reference = sizes.config(experiment.model.name, vocab_size=vocab_size, **options)
    contender = experiment.contender(contender_name)
    return sizes.matched_config(reference, contender.mixer, contender.options, **contender.model)


def execute(
    experiment: TrainingStudy, job: TrainingJob, texts: Texts, progress: Progress | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """The result of a job as a row of JSON types; a function of the job and the settings alone (on one thread)."""
    with one_thread():
        row = (_test if job.kind == "test" else _train)(experiment, job, texts, progress, device)
    head = {"kind": job.kind, "key": job.key, "fingerprint": experiment.fingerprint(job, texts.fingerprint)}
    head |= {"contender": job.contender, "lr": job.lr, "seed": job.seed, "precision": job.precision}
    return head | row | versions(device)


class TrainingWork(Work):
    """The runs of a grid of language models; a worker process loads the text anew."""

    anywhere = True

    def __init__(self, experiment: TrainingStudy, data: str | Path | None, smoke: bool = False) -> None:
        self.experiment, self.files = experiment, find_files(data, smoke)
        self.corpus = self.texts.fingerprint

    @property
    def texts(self) -> Texts:
        return load_texts(self.files, self.experiment.test_text, self.experiment.data)

    def __call__(self, job: TrainingJob, progress: Progress | None = None) -> dict[str, Any]:
        return execute(self.experiment, job, self.texts, progress, self.device)

    def fingerprint(self, job: TrainingJob) -> str:
        return self.experiment.fingerprint(job, self.corpus)

    def describe(self, job: TrainingJob, row: dict[str, Any]) -> str:
        bits = row.get("bits_per_byte")
        figure = "diverged" if row.get("diverged") else "-" if bits is None else f"{bits:.3f} bits per byte"
        return f"{'tested' if job.kind == 'test' else 'trained'} {job.key}: {figure}, {row['seconds']:.0f} s"

    def check(self, contenders: list[ModelContender]) -> None:
        """Every contender's configuration is built once, so that a wrong option is an error before the first run."""
        for contender in contenders:
            try:
                model_config(self.experiment, contender.name, len(self.texts.corpus.tokenizer))
            except (ValueError, TypeError) as error:
                raise ValueError(f"contender {contender.name!r}: {error}") from error

    def finish(self, contenders: list[ModelContender]) -> None:
        """Time the layers alone."""
        measure_speeds(self.experiment, contenders)


def weights_path(experiment: TrainingStudy, job: TrainingJob, fingerprint: str) -> Path:
    """Where the weights of a run are kept until they are tested."""
    name = f"{job.key} {fingerprint}".replace(" ", "_").replace("/", "_")
    return Path(experiment.out) / "weights" / f"{name}.pt"


def _model(experiment: TrainingStudy, job: TrainingJob, texts: Texts) -> HopeForCausalLM:
    config = model_config(experiment, job.contender, len(texts.corpus.tokenizer))
    torch.manual_seed(job.seed)
    return HopeForCausalLM(config)


def _train(
    experiment: TrainingStudy, job: TrainingJob, texts: Texts, progress: Progress | None, device: str
) -> dict[str, Any]:
    model = _model(experiment, job, texts)
    config = experiment.run_config(job).changed(device=device, out=str(Path(experiment.out) / "unused"))
    trainer = Trainer(config, model=model, corpus=texts.corpus)
    started, losses, seconds, row_of_skips, longest = time.monotonic(), [], [], 0, 0
    while trainer.step < config.steps and row_of_skips < experiment.max_skips:
        begin = time.perf_counter()
        report = trainer.train_step()
        seconds.append(time.perf_counter() - begin)
        losses.append(report.loss)
        row_of_skips = row_of_skips + 1 if report.skipped else 0
        longest = max(longest, row_of_skips)
        if progress:
            progress(trainer.step, report.loss)
    judged = judge(losses, config.steps, experiment.divergence_margin)
    if experiment.test:
        _save(model, weights_path(experiment, job, experiment.fingerprint(job, texts.fingerprint)))
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "intermediate_size": model.config.intermediate_size,
        "steps": trainer.step,
        "tokens": trainer.tokens,
        "skipped": trainer.skipped,
        "skipped_in_a_row": longest,
        "curve": curve(losses, experiment.curve_points),
        # the median step: a pause of the machine does not count
        "tokens_per_second": config.tokens_per_step / statistics.median(seconds),
        **judged,
        **_held_out(experiment, model, texts.corpus.val, config.precision),
    }
    if experiment.long_context:
        length = experiment.data.seq_len * experiment.long_context
        far = evaluate(model, texts.corpus.val, seq_len=length, batch_size=1, max_batches=2, precision=config.precision)
        row["long_context"] = {"tokens": length, "bits_per_byte": far.bits_per_byte, "bins": far.binned(8)}
    return row | {"seconds": time.monotonic() - started}


def _test(
    experiment: TrainingStudy, job: TrainingJob, texts: Texts, progress: Progress | None, device: str
) -> dict[str, Any]:
    started = time.monotonic()
    with trained(experiment, job, texts, progress, device) as model:
        row = _held_out(experiment, model, texts.test, job.precision)
    return row | {"seconds": time.monotonic() - started}


@contextmanager
def trained(
    experiment: TrainingStudy, job: TrainingJob, texts: Texts, progress: Progress | None, device: str
) -> Iterator[HopeForCausalLM]:
    """The model of a job's training run; its weights are no longer kept afterwards: the figures are."""
    run = dataclasses.replace(job, kind="train")
    path = weights_path(experiment, run, experiment.fingerprint(run, texts.fingerprint))
    if not path.exists():  # someone tidied up: the same run gives the same weights
        _train(experiment, run, texts, progress, device)
    model = _model(experiment, run, texts)
    model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    yield model.to(device)
    path.unlink()


def _held_out(experiment: TrainingStudy, model: HopeForCausalLM, tokens: Tokens, precision: str) -> dict[str, Any]:
    size = experiment.eval_batch_size
    batches = -(-experiment.eval_windows // size)
    found = evaluate(
        model, tokens, seq_len=experiment.data.seq_len, batch_size=size, max_batches=batches, precision=precision
    )
    return {
        "bits_per_byte": found.bits_per_byte,
        "loss_by_position": found.binned(experiment.position_bins),
        "bits_by_window": [round(bits_per_byte(loss, tokens), 5) for loss in found.loss_in.tolist()],
    }


def _save(model: torch.nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(model.state_dict(), aside)
    aside.replace(path)


def judge(losses: list[float], steps: int, margin: float) -> dict[str, Any]:
    """Whether a run diverged: it was given up, ended without finite losses, or `margin` nats above its best mean loss.

    Means are over a twentieth of the run, at least 8 steps.
    """
    values = torch.tensor(losses, dtype=torch.float64)
    width = min(len(losses), max(8, steps // 20))
    last = float(values[-width:].mean())
    means = values.unfold(0, width, 1).mean(1)
    ends = means[means.isfinite()]
    best = float(ends.min()) if len(ends) else float("inf")
    return {
        "nan_losses": int((~values.isfinite()).sum()),
        "first_loss": losses[0],
        "best_loss": best,
        "last_loss": last,
        "diverged": len(losses) < steps or not last <= best + margin,
    }
