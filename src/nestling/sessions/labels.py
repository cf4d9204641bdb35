"""Labels learned from examples, one reading of each: a model that stays as it is, and an exact memory on what it makes
of a text.

A model that learns to *spell* labels that come group by group is drawn to those that it met last. Here the model only
reads; its states of a text are keys, the labels values, and `ExactMemory` solves for all examples ever shown. So labels
may come in any order, in any number, and none is forgotten.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestling.generation.state import fingerprint, read_tensors
from nestling.memory.exact import ExactMemory
from nestling.training.tokenizers import encode
from nestling.utils.files import write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = "nestling-labels-1"
ASK = "\nlabel:"  # stands after a text: the state that answers it is half of its key
LONGEST = 512  # tokens of a text that are read
BATCH = 64  # texts read at once


@dataclass(frozen=True)
class Labelled:
    """What a text is taken for: labels and how far each is believed, from 0 to 1, the likeliest first."""

    labels: list[str]
    beliefs: list[float]


class Labels:
    """Labels that a model knows from examples.

    Args:
        model, tokenizer: as `load_model` gives them; nothing of the model is changed, and levels that learn do not.

    Attributes:
        names: the labels met, in their order.  memory: what is known of them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.names: list[str] = []
        self.memory = ExactMemory(2 * model.config.hidden_size)

    def learn(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Learn examples; they may be of new labels, or more of known ones."""
        keys = self.keys(texts)
        self.names += [name for name in dict.fromkeys(labels) if name not in self.names]
        self.memory.widen(len(self.names))
        self.memory.write(keys, self._values(labels))

    def forget(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Forget examples that were learned, as if they never had been; nothing checks that they were.

        Raises:
            ValueError: a label that was never met, or more examples than were learned.
        """
        if odd := [name for name in labels if name not in self.names]:
            raise ValueError(f"no example of the label {odd[0]!r} was learned, so none can be forgotten")
        self.memory.erase(self.keys(texts), self._values(labels))

    def answer(self, texts: Sequence[str], top: int = 1) -> list[Labelled]:
        """The likeliest labels of each text. ValueError before the first example."""
        if not self.names:
            raise ValueError("no label was learned yet: give examples first")
        beliefs, places = self.memory.read(self.keys(texts)).topk(min(top, len(self.names)))
        return [
            Labelled([self.names[i] for i in row], [min(max(b, 0.0), 1.0) for b in belief])
            for row, belief in zip(places.tolist(), beliefs.tolist(), strict=True)
        ]

    @torch.no_grad()
    def keys(self, texts: Sequence[str]) -> Tensor:
        """What the model makes of texts: [N, 2 D], the mean of their states after a third of the blocks, and the last
        state behind `ASK`. Texts of one length are read together, so that none needs padding."""
        if not texts:
            raise ValueError("there is no text: give at least one")
        ask, found = encode(self.tokenizer, ASK), torch.empty(len(texts), self.memory.dim, dtype=torch.float64)
        by_length: dict[int, list[int]] = defaultdict(list)
        ids = [encode(self.tokenizer, text)[:LONGEST] for text in texts]
        for at, own in enumerate(ids):
            if not own:
                raise ValueError(f"text {at + 1} is empty: leave it out")
            by_length[len(own)].append(at)
        device = next(self.model.parameters()).device
        with _unlearning(self.model):
            for length, group in by_length.items():
                for start in range(0, len(group), BATCH):
                    part = group[start : start + BATCH]
                    rows = torch.tensor([ids[at] + ask for at in part], device=device)
                    states = self.model(rows, use_cache=False, output_hidden_states=True).hidden_states
                    early = states[max(1, round((len(states) - 1) / 3))][:, :length].double().mean(1)
                    found[part] = torch.cat([early, states[-1][:, -1].double()], 1).cpu()
        return found

    def save(self, path: str | Path) -> None:
        """Write what was learned, some megabytes, as one file that is whole or as before."""
        from safetensors.torch import save

        kept = {name: tensor.contiguous() for name, tensor in _packed(self.memory).items()}
        said = {"format": FORMAT, "model": fingerprint(self.model), "names": json.dumps(self.names)}
        write_bytes(path, save(kept, said | {"digest": _digest(kept, said["names"])}))

    def load(self, path: str | Path) -> None:
        """Take up what a file holds. ValueError: no such file, a damaged one, or one of another model."""
        if not Path(path).is_file():
            raise ValueError(f"no labels at {path}: learn some first (nestling label MODEL --learn FILE)")
        said, kept = read_tensors(path, "holds no labels")
        if said.get("format") != FORMAT:
            raise ValueError(f"{path} holds no labels of this version (format {said.get('format')!r})")
        if said.get("model") != fingerprint(self.model):
            raise ValueError(f"{path} holds labels of another model: load the model that wrote it")
        if said.get("digest") != _digest(kept, said.get("names", "")):
            raise ValueError(f"{path} is damaged: its content does not match its digest; start without it")
        self.names = json.loads(said["names"])
        self.memory = _unpacked(kept, self.memory.dim, len(self.names))

    def _values(self, labels: Sequence[str]) -> Tensor:
        place = {name: at for at, name in enumerate(self.names)}
        return F.one_hot(torch.tensor([place[name] for name in labels]), len(self.names)).double()


@contextlib.contextmanager
def _unlearning(model: Any):
    """Inside, levels of a model learn nothing and know nothing: its keys do not move."""
    with model.adapted(model._new_cache()) if getattr(model, "learner", None) else contextlib.nullcontext():
        yield


def _packed(memory: ExactMemory) -> dict[str, Tensor]:
    """A memory's sums, of the symmetric one half: [D (D + 1) / 2]."""
    rows, columns = torch.tril_indices(memory.dim, memory.dim)
    return memory.sums() | {"gram": memory.gram[rows, columns]}


def _unpacked(kept: dict[str, Tensor], dim: int, values: int) -> ExactMemory:
    memory = ExactMemory(dim, values)
    half = torch.zeros_like(memory.gram)
    rows, columns = torch.tril_indices(dim, dim)
    half[rows, columns] = kept["gram"]
    for name, tensor in (kept | {"gram": half + half.tril(-1).T}).items():
        setattr(memory, name, tensor.clone())
    return memory


def _digest(kept: dict[str, Tensor], names: str) -> str:
    digest = hashlib.sha256(names.encode())
    for name in sorted(kept):
        digest.update(kept[name].numpy().tobytes())
    return digest.hexdigest()


def examples(path: Path, columns: Sequence[str] = ("text", "label")) -> tuple[list[str], list[str]]:
    """Texts and labels of a .csv or .tsv file with a line of names at its top, or of the objects of a .jsonl file.

    Args:
        columns: the names under which a text and its label stand.

    Raises:
        ValueError: another kind of file, one that cannot be read, a line without a text or a label; the line is named.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".jsonl"):
        raise ValueError(f"{path} is no .csv, .tsv or .jsonl file: write one, a text and its label to a line")
    try:
        content = path.read_text(encoding="utf-8-sig")
        rows = [*_lines(content)] if kind == ".jsonl" else [*_table(content, "," if kind == ".csv" else "\t")]
    except (UnicodeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {kind} ({error}): mend it") from None
    for line, row in rows:
        for name in columns:
            if not isinstance(row.get(name), str) or not row[name].strip():
                has = ", ".join(str(n) for n in row if n is not None) or "nothing"
                raise ValueError(f"{path}, line {line}: no {name!r} there, but {has}: name the columns with --columns")
    if not rows:
        raise ValueError(f"{path} holds no example")
    return [row[columns[0]] for _, row in rows], [row[columns[1]].strip() for _, row in rows]


def _lines(content: str) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            yield number, row


def _table(content: str, between: str) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=between)
    for row in reader:
        yield reader.line_num, row
