"""`nestling train`: from text to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nestling.cli.common import assignments, nested, print_json

MODEL, DATA, OPTIMISER, RUN = "Model", "Data", "Optimiser", "Run"


def main(
    text: Annotated[
        list[str] | None,
        typer.Argument(help="Text files, folders, or the name of a `datasets` data set.", metavar="TEXT..."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The run's folder.", rich_help_panel=RUN)] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=RUN)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest whole checkpoint in --out.", rich_help_panel=RUN)
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(help="A JSON or YAML file with any options; the command line wins.", rich_help_panel=RUN),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            metavar="NAME=VALUE",
            help="Any other option, e.g. schedule.name=wsd.",
            rich_help_panel=RUN,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides weights and the order of the data.", rich_help_panel=RUN)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...", rich_help_panel=RUN)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (0: torch's choice).", rich_help_panel=RUN)] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or bf16 (mixed).", rich_help_panel=RUN)] = None,
    compile: Annotated[bool | None, typer.Option(help="Use torch.compile.", rich_help_panel=RUN)] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(help="Keep less for the backward pass, and compute it again.", rich_help_panel=RUN),
    ] = None,
    track: Annotated[
        list[str] | None, typer.Option(help="Also log to trackio, tensorboard or wandb.", rich_help_panel=RUN)
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations (0: only at the end).", rich_help_panel=RUN)
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints (0: only at the end).", rich_help_panel=RUN)
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints kept.", rich_help_panel=RUN)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A size (tiny, mini, 10m, ...), a saved model's folder, or a config.json.", rich_help_panel=MODEL
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Go on from the weights of this saved model: another run, or one of nestling convert.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(help="all, or levels: only where levels that learn in a context begin.", rich_help_panel=MODEL),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change the model's configuration, e.g. mixer=attention.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, bpe:SIZE, or a Hugging Face tokenizer's folder.", rich_help_panel=DATA)
    ] = None,
    val: Annotated[
        list[str] | None, typer.Option(help="Held-out text instead of a part of TEXT.", rich_help_panel=DATA)
    ] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="The part of every file held out.", rich_help_panel=DATA)
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of one window.", rich_help_panel=DATA)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows of one micro-batch.", rich_help_panel=DATA)] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.", rich_help_panel=OPTIMISER)] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw, muon, m3, or package.module.Class.", rich_help_panel=OPTIMISER)
    ] = None,
    optimizer_options: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Its options, e.g. '{\"momentum\": 0.9}'.", rich_help_panel=OPTIMISER),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, wsd or constant.", rich_help_panel=OPTIMISER)] = None,
    accumulate: Annotated[
        int | None, typer.Option(help="Micro-batches of one step.", rich_help_panel=OPTIMISER)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.", rich_help_panel=RUN)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)] = False,
) -> None:
    """Train a language model on text.

    The model reads bytes unless told otherwise, so any text in any language will do. The run's folder gets the
    configuration, the figures (metrics.jsonl) and checkpoints; `latest` points at the newest, a Hugging Face model
    with its tokenizer. A run that was stopped or killed goes on with --resume, and ends as if nothing had happened.

    [bold]Examples[/bold]

    Train a tiny Hope on a book:
      nestling train book.txt --out runs/book --steps 2000

    The same size with softmax attention, for comparison:
      nestling train book.txt --out runs/attention --set mixer=attention

    The memory's own options:
      nestling train book.txt --out runs/chunks --set mixer_options.chunk_size=32

    A folder of texts, two files held out, a tokenizer trained on the data:
      nestling train texts/ --val a.txt --val b.txt --tokenizer bpe:4096 --out runs/texts

    Go on with a run that was killed, or make it longer:
      nestling train --out runs/book --resume --steps 4000

    Teach the levels of a converted model how to adapt, with gradients through what they learn:
      nestling train texts/ --init runs/smol --trained levels --seq-len 512 --batch-size 1 --lr 1e-4 --out runs/adapted

    Any option by its full name (see run.json in a run's folder):
      nestling train book.txt --out runs/book -o schedule.warmup=0.1 -o optim.clip=0.5
    """
    from nestling.training.config import RUN_FILE, TrainConfig

    if init is not None and model is not None:
        raise ValueError("--init and --model both say where the weights come from: give one of them")
    given = {
        "out": out,
        "steps": steps,
        "seed": seed,
        "device": device,
        "threads": threads,
        "precision": precision,
        "compile": compile,
        "gradient_checkpointing": gradient_checkpointing,
        "model.name": model if init is None else str(init),
        "data.tokenizer": tokenizer,
        "trained": trained,
        "data.text": text or None,
        "data.val_text": val or None,
        "data.val_fraction": val_fraction,
        "data.seq_len": seq_len,
        "data.batch_size": batch_size,
        "optim.lr": lr,
        "optim.name": optimizer,
        "optim.options": _json_object(optimizer_options, "--optimizer-options"),
        "optim.accumulate": accumulate,
        "schedule.name": schedule,
        "logging.eval_every": eval_every,
        "logging.save_every": save_every,
        "logging.keep": keep,
        "logging.trackers": track or None,
        "logging.progress": False if quiet else None,
    }
    options = {name: value for name, value in given.items() if value is not None}
    options.update(assignments(option or [], "--option"))
    base = TrainConfig.load(config) if config else TrainConfig()
    stored = Path(str(options.get("out", base.out))) / RUN_FILE
    if resume and config is None and stored.is_file():
        base = TrainConfig.load(stored)
        options.setdefault("out", str(stored.parent))  # the folder may have moved
    if set_:
        options["model.options"] = nested(assignments(set_, "--set"), base.model.options)
    final = base.changed(**options)

    from nestling.training.loop import train

    result = train(final, resume=resume)
    if as_json:
        print_json(result.to_dict(final.logging.position_bins))
    else:
        _report(result, final)


def _json_object(text: str | None, option: str) -> dict[str, Any] | None:
    import json

    if text is None:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} must be a JSON object, not {text!r}: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{option} must be a JSON object, not {text!r}")
    return values


def _report(result, config) -> None:
    typer.echo(f"{'stopped' if result.interrupted else 'done'} at step {result.step} after {result.seconds:.0f} s")
    if result.evaluation is not None:
        held_out = result.evaluation
        typer.echo(f"held out: {held_out.bits_per_byte:.3f} bits per byte, loss {held_out.loss:.3f} nats per token")
    if result.skipped:
        typer.echo(f"{result.skipped} steps were skipped: their gradient was not finite")
    typer.echo(f"checkpoint: {result.checkpoint}")
    if result.interrupted:
        typer.echo(f"go on with: nestling train --out {config.out} --resume")
    else:
        typer.echo(f'try it: nestling generate {config.out} --prompt "..."')
