"""`nestling train`: from text to a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from nestling.cli.common import a_folder, a_path, assignments, json_object, nested, print_json

# an option in the panel of this name of the help
run, model_, data, optimiser = (
    partial(typer.Option, rich_help_panel=panel) for panel in ("Run", "Model", "Data", "Optimiser")
)


def main(
    text: Annotated[
        list[str] | None,
        typer.Argument(help="Text files, folders, or a data set of the hub as owner/name.", metavar="TEXT..."),
    ] = None,
    out: Annotated[Path | None, run(parser=a_folder, help="The run's folder.")] = None,
    steps: Annotated[int | None, run(help="Optimiser steps.")] = None,
    resume: Annotated[bool, run("--resume", help="Go on from the newest whole checkpoint in --out.")] = False,
    config: Annotated[
        Path | None, run(parser=a_path, help="A JSON or YAML file with any options; the command line wins.")
    ] = None,
    option: Annotated[
        list[str] | None, run("--option", "-o", metavar="NAME=VALUE", help="Any other option, e.g. schedule.name=wsd.")
    ] = None,
    seed: Annotated[int | None, run(help="Decides weights and the order of the data.")] = None,
    device: Annotated[str | None, run(help="auto, cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int | None, run(help="CPU threads (0: torch's choice).")] = None,
    parallel: Annotated[
        str | None,
        run(
            help="Under torchrun: ddp (auto takes it) or fsdp, which spreads weights and optimiser over the processes."
        ),
    ] = None,
    sequence_ranks: Annotated[
        int | None, run(help="Under torchrun: so many processes cut each window, and hand the model's state on.")
    ] = None,
    precision: Annotated[str | None, run(help="float32, or bf16 (mixed).")] = None,
    compile: Annotated[bool | None, run(help="Use torch.compile.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, run(help="Keep less for the backward pass, and compute it again.")
    ] = None,
    track: Annotated[list[str] | None, run(help="Also log to trackio, tensorboard or wandb.")] = None,
    eval_every: Annotated[int | None, run(help="Steps between evaluations (0: only at the end).")] = None,
    save_every: Annotated[int | None, run(help="Steps between checkpoints (0: only at the end).")] = None,
    keep: Annotated[int | None, run(help="Checkpoints kept.")] = None,
    model: Annotated[
        str | None, model_(help="A size (tiny, mini, 10m, ...), a saved model's folder, or a config.json.")
    ] = None,
    init: Annotated[
        Path | None,
        model_(
            parser=a_path, help="Go on from the weights of this saved model: another run, or one of nestling convert."
        ),
    ] = None,
    trained: Annotated[
        str | None, model_(help="all, or levels: only where levels that learn in a context begin.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        model_("--set", metavar="NAME=VALUE", help="Change the model's configuration, e.g. mixer=attention."),
    ] = None,
    tokenizer: Annotated[str | None, data(help="bytes, bpe:SIZE, or a Hugging Face tokenizer's folder.")] = None,
    share: Annotated[
        list[float] | None, data(help="Once for each TEXT: its part of the tokens that are read, e.g. 3 and 1.")
    ] = None,
    stream: Annotated[
        bool | None,
        data(
            "--stream",
            help="Read a data set of the hub, .jsonl or .parquet files while training; nothing is held or written.",
        ),
    ] = None,
    val: Annotated[list[str] | None, data(help="Held-out text instead of a part of TEXT.")] = None,
    val_fraction: Annotated[float | None, data(help="The part of every file held out.")] = None,
    seq_len: Annotated[int | None, data(help="Tokens of one window.")] = None,
    batch_size: Annotated[int | None, data(help="Windows of one micro-batch, of all processes together.")] = None,
    lr: Annotated[float | None, optimiser(help="Peak learning rate.")] = None,
    optimizer: Annotated[str | None, optimiser(help="muon (the default), adamw, m3, or package.module.Class.")] = None,
    optimizer_options: Annotated[
        str | None, optimiser(metavar="JSON", help="Its options, e.g. '{\"momentum\": 0.9}'.")
    ] = None,
    schedule: Annotated[str | None, optimiser(help="cosine, wsd or constant.")] = None,
    accumulate: Annotated[int | None, optimiser(help="Micro-batches of one step.")] = None,
    quiet: Annotated[bool, run("--quiet", "-q", help="No progress bar.")] = False,
    as_json: Annotated[bool, run("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a language model on text.

    The model reads bytes unless you give a --tokenizer, so any text in any language will do. The run's folder gets the
    configuration, the figures (metrics.jsonl) and checkpoints; `latest` points at the newest, a Hugging Face model
    with its tokenizer. A run that was stopped or killed goes on with --resume, and ends as if nothing had happened.

    [bold]Examples[/bold]

    Train a tiny Hope on a book:
      nestling train book.txt --out runs/book --steps 2000

    The same size with softmax attention, for comparison:
      nestling train book.txt --out runs/attention --set mixer=attention

    The memory's own options:
      nestling train book.txt --out runs/chunks --set mixer_options.chunk_size=32

    Chunks of 128 tokens in the first four fifths of the steps, which is cheaper, then the model's own 64:
      nestling train book.txt --out runs/two --set mixer=selfmod -o schedule.chunk_factor=2

    Attention that sees only 16 tokens in half of the steps, so that the memories learn to carry what is further back:
      nestling train book.txt --out runs/carry -o schedule.short_window=16

    A folder of texts, two files held out, a tokenizer trained on the data:
      nestling train texts/ --val a.txt --val b.txt --tokenizer bpe:4096 --out runs/texts

    Three quarters of all tokens from one source, a quarter from another, however large each is:
      nestling train web/ books/ --share 3 --share 1 --out runs/mixed

    A data set of the hub that is read as it arrives, each window drawn from 5,000; it goes on at the same place:
      nestling train owner/name --stream -o data.shuffle=5000 --out runs/web

    Go on with a run that was killed, or make it longer:
      nestling train --out runs/book --resume --steps 4000

    Teach the levels of a converted model how to adapt, with gradients through what they learn:
      nestling train texts/ --init runs/smol --trained levels --batch-size 1 --optimizer adamw --lr 1e-4 --out runs/own

    On two processes (GPUs where there are any), each with a part of the model; the result is that of one process:
      torchrun --nproc-per-node 2 -m nestling train texts/ --parallel fsdp --out runs/texts

    Long texts on four processes: two cut every window of 8,192 tokens, and two such pairs share the batch:
      torchrun --nproc-per-node 4 -m nestling train texts/ --seq-len 8192 --sequence-ranks 2 --out runs/long

    Any option by its full name (see run.json in a run's folder):
      nestling train book.txt --out runs/book -o schedule.warmup=0.1 -o optim.clip=0.5
    """
    from nestling.training.config import RUN_FILE, TrainConfig
    from nestling.utils.ranks import is_launched

    if init is not None and model is not None:
        raise ValueError("--init and --model both say where the weights come from: give one of them")
    given = {
        "out": None if out is None else str(out),
        "steps": steps,
        "seed": seed,
        "device": device,
        "threads": threads,
        "parallel.mode": parallel,
        "parallel.sequence": sequence_ranks,
        "precision": precision,
        "compile": compile,
        "gradient_checkpointing": gradient_checkpointing,
        "model.name": model if init is None else str(init),
        "data.tokenizer": tokenizer,
        "trained": trained,
        "data.text": text or None,
        "data.shares": share or None,
        "data.stream": stream,
        "data.val_text": val or None,
        "data.val_fraction": val_fraction,
        "data.seq_len": seq_len,
        "data.batch_size": batch_size,
        "optim.lr": lr,
        "optim.name": optimizer,
        "optim.options": json_object(optimizer_options, "--optimizer-options"),
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
        if not is_launched():  # a run of several processes goes on in one
            for name, alone in (("mode", "auto"), ("sequence", 1), ("offload", False)):
                options.setdefault(f"parallel.{name}", alone)
    if set_:
        options["model.options"] = nested(assignments(set_, "--set"), base.model.options)
    final = base.changed(**options)

    from nestling.training.loop import train
    from nestling.utils.ranks import Elsewhere, is_first

    try:
        result = train(final, resume=resume)
    except Elsewhere:
        raise typer.Exit(2) from None
    if not is_first():
        return
    if as_json:
        print_json(result.to_dict(final.logging.position_bins))
    else:
        _report(result, final)


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
