"""Classification by a language model: greedy decoding that can only spell the name of a class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from experiments.shared.continual.streams import next_logits, pad_left, repeated

Path = tuple[int, ...]
Prior = dict[Path, dict[int, float]]  # by what is spelt: the log-probability of each next token without a text

CONTENT_FREE = ("", "N/A", "something")


class Trie:
    """Names of classes as tokens: which tokens may follow what is spelt so far, and which class is left.

    Args:
        names: tokens of each class's name, with an end, so that none begins another.
    """

    def __init__(self, names: dict[int, Sequence[int]]) -> None:
        self.names = {c: tuple(tokens) for c, tokens in names.items()}
        self.below: dict[Path, list[int]] = {}
        for c, tokens in self.names.items():
            for at in range(len(tokens) + 1):
                self.below.setdefault(tokens[:at], []).append(c)
        self.next: dict[Path, list[int]] = {}
        for path in self.below:
            if path:
                self.next.setdefault(path[:-1], []).append(path[-1])


class Format:
    """How a labelled text is written, and a class's name after it."""

    def __init__(self, tokenizer: Any, labels: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        self.names = [self.encode(f" {label}\n") for label in labels]

    def prompt(self, text: str) -> list[int]:
        """A text and the question for its class."""
        return self.encode(f"{text}\nintent:")

    def example(self, text: str, label: int) -> list[int]:
        """A text with its class."""
        return self.prompt(text) + self.names[label]

    def trie(self, classes: Sequence[int]) -> Trie:
        """The names of these classes."""
        return Trie({c: self.names[c] for c in classes})


@torch.no_grad()
def prior(model: nn.Module, form: Format, trie: Trie, context: DynamicCache | None = None, batch: int = 32) -> Prior:
    """How likely each next token of a name is after texts without content, in the mean over them."""
    found: Prior = {}
    paths = sorted(path for path, options in trie.next.items() if len(options) > 1)
    rows = [(path, form.prompt(text) + [*path]) for path in paths for text in CONTENT_FREE]
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        ids, mask = pad_left([ids for _, ids in part])
        logits, _ = next_logits(model, ids, *after_context(context, mask))
        for (path, _), scores in zip(part, logits):
            options = trie.next[path]
            sums = found.setdefault(path, dict.fromkeys(options, 0.0))
            for o, value in zip(options, scores[options].float().log_softmax(-1).tolist()):
                sums[o] += value / len(CONTENT_FREE)
    return found


def after_context(context: DynamicCache | None, mask: Tensor) -> tuple[Tensor, DynamicCache | None]:
    """The mask [B, seen + T] and cache of a batch of prompts, with mask [B, T], after a context they share."""
    if context is None:
        return mask, None
    return torch.cat([mask.new_ones(len(mask), context.get_seq_length()), mask], 1), repeated(context, len(mask))


@torch.no_grad()
def classify(
    model: nn.Module, prompts: Sequence[Sequence[int]], trie: Trie, priors: Sequence[Prior | None] = (None,),
    context: DynamicCache | None = None, batch: int = 64,
) -> list[list[int]]:  # fmt: skip
    """The class of each prompt, once for each of `priors` (None: none is subtracted): [prior][prompt]."""
    found = [[-1] * len(prompts) for _ in priors]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        ids, mask = pad_left([prompts[i] for i in part])
        mask, past = after_context(context, mask)
        logits, past = next_logits(model, ids, mask, past)
        for n, given in enumerate(priors):
            for i, c in zip(part, _spell(model, trie, given, logits, mask, past), strict=True):
                found[n][i] = c
    return found


def _spell(model: nn.Module, trie: Trie, given: Prior | None, logits: Tensor, mask: Tensor, past: Any) -> list[int]:
    """Greedy classes of a batch, from the logits after its prompts; `past` stays."""
    paths: list[Path] = [()] * len(logits)
    rows = list(range(len(logits)))  # those not decided yet
    fresh = True
    while True:
        for row, scores in zip(rows, logits):
            options = trie.next[paths[row]]
            values = scores[options].float()
            if given is not None and len(options) > 1:
                values = values.log_softmax(-1) - torch.tensor([given[paths[row]][o] for o in options])
            paths[row] += (options[int(values.argmax())],)
        keep = [k for k, row in enumerate(rows) if len(trie.below[paths[row]]) > 1]
        if not keep:
            return [trie.below[path][0] for path in paths]
        past = copy.deepcopy(past) if fresh else past
        past.batch_select_indices(torch.tensor(keep))
        rows, mask, fresh = [rows[k] for k in keep], mask[keep], False
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits, past = next_logits(model, torch.tensor([paths[row][-1:] for row in rows]), mask, past)
