"""What `nestling data` costs on much text: time, processor time and memory, by the number of its processes.

    python -m benchmarks.preparing BOOKS --json benchmarks/results/preparing.json     # a few minutes
    python -m benchmarks.preparing --tables benchmarks/results/preparing.json         # the table of docs/training.md

The text is that of the given files, again and again. Memory is what the processes hold of their own, of all together,
every half second, and the cores wanted are the time in which their threads ran or waited for a core, over the
run's: on free cores that many are busy, whatever else the machine does now. Linux alone tells either.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nestling.training.texts import find_files
from nestling.training.tokenizers import train_bpe

SETTINGS = {"bytes": 1 << 30, "bpe": 64 << 20}  # bytes of text for each tokenizer
VOCABULARY, SAMPLE = 4096, 2 << 20
WORKERS = (1, 2)


def text_of(texts: list[str], size: int, path: Path) -> int:
    """Write the files' text again and again until there are so many bytes of it; returns how many."""
    files = [file for name in texts for _, file in find_files(name, "**/*", "TEXT")]
    with path.open("wb") as out:
        while out.tell() < size:
            for file in files:
                out.write(file.read_bytes())
        return out.tell()


def children(process: int) -> list[int]:
    """A process and all below it."""
    found = [process]
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        for child in listed.read_text().split():
            found += children(int(child))
    return found


def memory_of(process: int) -> int:
    """Megabytes that a process and those below it hold of their own."""
    total = 0
    for each in children(process):
        try:
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
        except OSError:  # has ended
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
    return total >> 10


def wanted_of(process: int) -> dict[str, float]:
    """Of each thread of a process and of those below it, the seconds in which it ran or waited for a core."""
    found = {}
    for each in children(process):
        for path in Path(f"/proc/{each}/task").glob("*/schedstat"):
            try:
                ran, waited, _ = path.read_text().split()
            except OSError:  # has ended
                continue
            found[str(path)] = (int(ran) + int(waited)) / 1e9
    return found


def measure(text: Path, size: int, tokenizer: str, workers: int, out: Path) -> dict:
    """One run of the command."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "nestling", "data", str(text), "--out", str(out), "--workers", str(workers), "-q"]
    load, before, held = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_CHILDREN), []
    begun, wanted = time.perf_counter(), {}
    with subprocess.Popen([*command, "--tokenizer", tokenizer], stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            held.append(memory_of(running.pid))
            wanted |= wanted_of(running.pid)  # of a thread that has ended, what was read of it last
            time.sleep(0.5)
        if running.returncode:
            raise RuntimeError(f"nestling data ended with {running.returncode}")
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    half = len(held) // 2
    return {
        "tokenizer": Path(tokenizer).name, "bytes": size, "workers": workers, "seconds": seconds,
        "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "cores wanted": sum(wanted.values()) / seconds,
        "memory": max(held), "memory, first half": max(held[:half]), "memory, second half": max(held[half:]),
        "load": load,
    }  # fmt: skip


def tables(result: dict) -> str:
    """The figures as Markdown."""
    lines = [
        "| tokenizer | GB of text | processes | seconds | processor seconds | cores wanted | memory, first half, MB |"
        " second half | load before |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        cells = [f"{row['bytes'] / 1e9:.2f}", row["workers"], f"{row['seconds']:.0f}", f"{row['processor']:.0f}"]
        cells += [f"{row['cores wanted']:.2f}", row["memory, first half"], row["memory, second half"]]
        cells.append(f"{row['load']:.1f}")
        lines.append(f"| {row['tokenizer']} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="text files or folders")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tables", type=Path)
    given = parser.parse_args()
    if given.tables:
        print(tables(json.loads(given.tables.read_text(encoding="utf-8"))), end="")
        return
    result: dict = {"settings": SETTINGS, "vocabulary": VOCABULARY, "rows": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for tokenizer, wanted in SETTINGS.items():
            size = text_of(given.texts, wanted, folder / "text.txt")
            chosen = tokenizer
            if tokenizer == "bpe":
                with (folder / "text.txt").open(encoding="utf-8") as file:
                    train_bpe([file.read(SAMPLE)], VOCABULARY).save_pretrained(folder / "bpe")
                chosen = str(folder / "bpe")
            for workers in WORKERS:
                result["rows"].append(measure(folder / "text.txt", size, chosen, workers, folder / "out"))
                print(json.dumps(result["rows"][-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
