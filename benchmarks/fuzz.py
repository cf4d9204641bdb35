"""`make fuzz`: damaged states and models, odd levels, arguments and texts: each is taken or refused in a line, in time.

A fault is an error other than those a caller is promised (ValueError, TypeError, OSError), a run over the time limit, a
file left half-written, or an original that changed. The limit is of processor time, so that a busy machine finds no
faults; what waits without working ends by the clock. Input N of a kind is a pure function of the seed: `--only KIND:N`
replays it, with its traceback.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.damage import ODD, changed, mutated, odd_json, plain

LIMIT = 20  # processor seconds an input may take; a process also begins within them
WAIT = 30 * LIMIT  # seconds by the clock, for what waits and does not work
PROMISED = (ValueError, TypeError, OSError)


class Hung(BaseException):
    """An input took longer than the limit."""


class Fuzz:
    """The originals in a folder, and a method for each kind of input that takes a random generator."""

    def __init__(self, root: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        from nestling import HopeConfig, HopeForCausalLM, stack_levels
        from nestling.cms.files import save_stacked
        from nestling.generation import TextGenerator, save_state
        from nestling.generation.load import load_model
        from nestling.training.tokenizers import byte_tokenizer

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.originals, self.work, self.tokenizer = root / "originals", root / "work", byte_tokenizer()
        self.originals.mkdir()
        ids = dict(vocab_size=259, eos_token_id=257, bos_token_id=256, pad_token_id=258)
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, **ids)
        hope = HopeForCausalLM(HopeConfig(**sizes))
        llama = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=128))
        hope.save_pretrained(self.originals / "hope")
        self.tokenizer.save_pretrained(self.originals / "hope")
        levels = [dict(chunk_size=8, lr=0.1), dict(chunk_size=16, lr=0.1, optimizer="adamw")]
        save_stacked(stack_levels(llama, levels), self.originals / "stacked", self.tokenizer)
        self.models = {}
        for name in ("hope", "stacked"):
            self.models[name] = model = load_model(self.originals / name, "cpu")[0]
            generator = TextGenerator(model, self.tokenizer, seed=0)
            list(generator.stream("the cat sat on the mat and looked", 3))
            save_state(self.originals / f"{name}.state", generator.state, model)
        (self.originals / "a.txt").write_text("the cat sat on the mat.\n" * 40)
        self.digest = self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for file in sorted(p for p in self.originals.rglob("*") if p.is_file()):
            digest.update(str(file).encode() + file.read_bytes())
        return digest.hexdigest()

    def state(self, draw: random.Random) -> None:
        """A state with other bytes, or whole in itself with other tensors and another description."""
        from safetensors.torch import load_file, safe_open, save_file

        from nestling.generation import load_notes, load_state
        from nestling.generation.state import _content_digest, _digest

        name = draw.choice(list(self.models))
        original, path = self.originals / f"{name}.state", self.work / "x.state"
        if draw.random() < 0.4:
            path.write_bytes(mutated(original.read_bytes(), draw))
        else:
            tensors = load_file(original)
            with safe_open(str(original), "pt") as file:
                metadata = dict(file.metadata())
            for _ in range(draw.randint(0, 3)):
                changed(tensors, draw)
            for key in draw.sample(["layers", "learned", "format", "model"], draw.randint(0, 2)):
                if draw.random() < 0.1:
                    metadata.pop(key)
                else:
                    metadata[key] = odd_json(metadata[key], draw) if key in ("layers", "learned") else "x"
            metadata |= {"digest": _digest(tensors), "content_digest": _content_digest(metadata)}
            save_file(tensors, path, metadata)
        cache = load_state(path, self.models[name])
        load_notes(path)
        self._go_on(name, cache)

    def _go_on(self, name: str, cache: Any) -> None:
        """A state that was taken can be gone on with."""
        from nestling.generation import TextGenerator

        list(TextGenerator(self.models[name], self.tokenizer, cache, seed=0).stream("a", 1))

    def model(self, draw: random.Random) -> None:
        """A model's folder with one of its files changed or gone."""
        from nestling.generation.load import load_model

        folder = self.work / "model"
        shutil.copytree(self.originals / draw.choice(list(self.models)), folder)
        file = draw.choice(sorted(p for p in folder.iterdir()))
        how = draw.random()
        if how < 0.1:
            file.unlink()
        elif file.suffix == ".json" and how < 0.8:
            file.write_text(odd_json(file.read_text(), draw))
        else:
            file.write_bytes(mutated(file.read_bytes(), draw))
        load_model(folder, "cpu")

    def levels(self, draw: random.Random) -> None:
        """Levels as the command line and a configuration write them."""
        from nestling import HopeConfig, HopeForCausalLM, Level
        from nestling.cli.convert import _level

        names = ["chunk_size", "lr", "optimizer", "momentum", "clip", "decay", "betas", "eps", "x", ""]
        if draw.random() < 0.5:
            parts = [draw.choice(["8", "0", "-1", "1e9", "inf", "null", "", "x", "[8]", "NaN"])]
            parts += [f"{draw.choice(names)}={plain(draw)}" for _ in range(draw.randint(0, 3))]
            Level(**_level(",".join(parts)))
        else:
            levels = [{draw.choice(names): draw.choice(ODD) for _ in range(draw.randint(0, 3))} for _ in range(2)]
            sizes = dict(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
            )
            HopeForCausalLM(HopeConfig(cms_levels=draw.choice([levels, draw.choice(ODD)]), **sizes))

    def arguments(self, draw: random.Random) -> None:
        """Any command with odd values, run in this process."""
        from typer.main import get_command
        from typer.testing import CliRunner

        from nestling.cli.main import app

        commands = {k: v for k, v in get_command(app).commands.items() if k not in ("demo", "bench", "eval")}
        name = draw.choice(sorted(commands))
        options = [p.opts[0] for p in commands[name].params if p.opts[0].startswith("-")]
        there = ["hope", "stacked", "a.txt", "hope.state", "nowhere", "", ".", "tiny", "-", "8,lr=0.1"]
        given = [draw.choice([*there, plain(draw)]) for _ in range(draw.randint(0, 3))]
        for option in draw.sample(options, min(len(options), draw.randint(0, 4))):
            given += [option, draw.choice([*there, plain(draw), "1", "2"])][: draw.choice([1, 2, 2, 2])]
        small = ["--steps", "1", "--seq-len", "8", "--batch-size", "1", "--quiet"] if name == "train" else []
        small = ["--trials", "1", "-o", "steps=1", "--quiet"] if name == "tune" else small
        result = CliRunner().invoke(app, [name, *given, *small], input="")
        unplanned = result.exception is not None and not isinstance(result.exception, SystemExit)
        if unplanned or "fault of nestling" in result.output or result.exit_code not in (0, 1, 2, 130):
            raise RuntimeError(f"{[name, *given]}: {result.output[-300:]}") from result.exception

    def parse(self, draw: random.Random) -> None:
        """Arguments of the commands that measure for minutes, as far as they are read."""
        from typer.main import get_command

        from nestling.cli.main import app

        name = draw.choice(["bench", "demo", "eval"])
        command = get_command(app).commands[name]
        options = [p.opts[0] for p in command.params if p.opts[0].startswith("-")] or ["--help"]
        words = [draw.choice(["quality", "continuum", "--", "-o", plain(draw)]) for _ in range(draw.randint(0, 3))]
        for option in draw.choices(options, k=draw.randint(0, 4)):
            words += [option, draw.choice(["1", "-1", "x", ".", plain(draw)])][: draw.choice([1, 2, 2])]
        try:
            command.make_context(name, words)
        except Exception as error:
            # typer carries a click of its own: its classes are known by their names
            if not {"ClickException", "Exit", "Abort"} & {kind.__name__ for kind in type(error).__mro__}:
                raise
            raise ValueError(str(error)) from error

    def process(self, draw: random.Random) -> None:
        """The installed script in a process of its own, on damaged states, folders and texts."""
        script = Path(sys.executable).with_name("nestling")
        (self.work / "bad.state").write_bytes(mutated((self.originals / "stacked.state").read_bytes(), draw))
        weights = self.work / "stacked" / "model.safetensors"
        if draw.random() < 0.3:
            weights.write_bytes(mutated(weights.read_bytes(), draw))
        given = draw.choice([
            ["generate", "stacked", "--state", "bad.state", "--prompt", "a", "--max-new-tokens", "1"],
            ["generate", "stacked", "--prompt", plain(draw), "--max-new-tokens", "1"],
            ["learn", "stacked", "a.txt", "--state", "bad.state"],
            ["learn", "stacked", plain(draw), "--state", "new.state"],
            ["inspect", draw.choice(["hope", "stacked", plain(draw)])],
            ["convert", "hope", "out", "-l", f"8,lr={plain(draw)}"],
        ])  # fmt: skip
        given = [word.encode("utf-8", "surrogateescape" if word.isascii() else "replace").decode() for word in given]
        try:
            ended = subprocess.run(
                [script, *given], capture_output=True, timeout=WAIT, stdin=subprocess.DEVNULL, preexec_fn=_limited
            )
        except subprocess.TimeoutExpired:
            raise Hung from None
        if ended.returncode == -signal.SIGXCPU:
            raise Hung
        said = ended.stdout + ended.stderr
        if ended.returncode not in (0, 1, 2) or b"Traceback" in said or b"fault of nestling" in said:
            raise RuntimeError(f"{given}: {ended.returncode} {said[-300:].decode(errors='replace')}")
        if ended.returncode:
            raise ValueError(said.decode(errors="replace"))

    def text(self, draw: random.Random) -> None:
        """Texts and prompts of any bytes."""
        from nestling.generation import Sampling, TextGenerator
        from nestling.sessions.documents import TokenReader, find_texts
        from nestling.training import DataConfig, load_corpus

        alphabet = ["a", " ", "\n", "é", "\0", "\ufeff", "\ud800", "😀", "\u202e", "x" * 3000, "<|eos|>", "\r\n"]
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 40)))
        content = text.encode("utf-8", "surrogatepass")
        path = self.work / "x.txt"
        path.write_bytes(mutated(content, draw) if draw.random() < 0.3 else content)
        which = draw.randrange(3)
        if which == 0:
            (found,) = find_texts([str(path)])
            with found.path.open("rb") as file:
                TokenReader(self.tokenizer, file.read, found.name).take(10**6)
        elif which == 1:
            load_corpus(DataConfig(text=[str(path)], seq_len=draw.choice([1, 8]), cache_dir=str(self.work / "cache")))
        else:
            generator = TextGenerator(self.models["hope"], self.tokenizer, seed=0)
            list(
                generator.stream(text[:200], 2, Sampling(draw.choice([0.0, 0.8, 1e-30, 1e30]), draw.choice([0, 10**6])))
            )

    def run(self, kind: str, number: int, seed: int) -> str:
        """What came of one input: "taken", "refused", or the name of a fault."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for file in ("a.txt", "hope.state"):
            shutil.copy(self.originals / file, self.work)
        for name in self.models:
            shutil.copytree(self.originals / name, self.work / name)
        os.chdir(self.work)
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        signal.setitimer(signal.ITIMER_REAL, 2 * WAIT)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                getattr(self, kind)(random.Random(f"{seed}:{kind}:{number}"))
            verdict = "taken"
        except PROMISED:
            verdict = "refused"
        finally:
            for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
                signal.setitimer(timer, 0)
        left = [p for p in self.work.rglob("*") if ".tmp" in p.suffixes or p.suffix == ".lock"]
        return f"left behind: {left[0].name}" if left else verdict


# shares of 10,000
KINDS = {"state": 3900, "model": 1000, "levels": 2480, "arguments": 1000, "text": 1500, "parse": 110, "process": 10}


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the number of faults."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="inputs of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="KIND, or KIND:N to replay one input")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="begin no further input then; the same --out goes on"
    )
    parser.add_argument("--out", type=Path, help="the summary, as JSON")
    given = parser.parse_args(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    for signum in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(signum, _hang)
    kind, _, number = (given.only or "").partition(":")
    root, here, began = Path(tempfile.mkdtemp(prefix="nestling-fuzz-")), Path.cwd(), time.monotonic()
    os.environ["NESTLING_CACHE"] = str(root / "cache")
    summary = _begun(None if number else given.out, given.seed)
    kinds, faults = summary["kinds"], summary["faults"]
    try:
        fuzz = Fuzz(root)
        for name, share in KINDS.items() if not kind else [(kind, KINDS[kind])]:
            counts, since = collections.Counter(kinds.get(name, {})), time.monotonic()
            numbers = [int(number)] if number else range(_inputs(counts), round(given.count * share / 10_000))
            for n in numbers:
                if time.monotonic() - began > 60 * given.minutes:
                    break
                counts[_judged(fuzz.run, name, n, given.seed, faults, bool(number))] += 1
            counts["seconds"] += round(time.monotonic() - since)
            kinds[name] = dict(sorted(counts.items()))
            sys.stderr.write(f"{name}: {kinds[name]}\n")
        summary["originals_untouched"] &= fuzz._digest() == fuzz.digest
        summary["inputs"] = sum(map(_inputs, kinds.values()))
    finally:
        os.chdir(here)
        shutil.rmtree(root, ignore_errors=True)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["faults"], indent=1), table(summary), sep="\n")
    return len(summary["faults"]) + (not summary["originals_untouched"])


def table(summary: dict[str, Any]) -> str:
    """The counts of a summary in Markdown."""
    rows = [f"| {kind} | {_inputs(of)} | {of.get('taken', 0)} | {of.get('refused', 0)} | {of.get('fault', 0)} |"
            for kind, of in summary["kinds"].items()]  # fmt: skip
    return "\n".join(["| kind | inputs | taken | refused | faults |", "| --- |" + " ---: |" * 4, *rows])


def _begun(out: Path | None, seed: int) -> dict[str, Any]:
    """The summary of what was run before with this seed: a run that its minutes ended goes on there."""
    if out is not None and out.exists() and (before := json.loads(out.read_text()))["seed"] == seed:
        return before
    return {"seed": seed, "kinds": {}, "faults": [], "originals_untouched": True}


def _inputs(counts: dict[str, int]) -> int:
    return sum(n for what, n in counts.items() if what != "seconds")


def _judged(run: Callable, kind: str, number: int, seed: int, faults: list[dict], whole: bool) -> str:
    try:
        verdict = run(kind, number, seed)
    except Hung:
        verdict, place = "hung", f"over {LIMIT} processor seconds, or {WAIT} s by the clock"
    except Exception as error:
        if whole:
            traceback.print_exc()
        cause = error.__cause__ or error
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        here = [f for f in traceback.extract_tb(cause.__traceback__) if "src/nestling" in f.filename]
        frame = here[-1] if here else frame
        place = f"{type(cause).__name__}: {cause!s:.300} at {frame.filename.split('src/')[-1]}:{frame.lineno}"
        verdict = "fault"
    else:
        place = verdict
    if verdict not in ("taken", "refused"):
        faults.append({"input": f"{kind}:{number}", "seed": seed, "what": place})
        return "fault"
    return verdict


def _hang(*_: Any) -> None:
    raise Hung


def _limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))


if __name__ == "__main__":
    sys.exit(min(main(), 1))
