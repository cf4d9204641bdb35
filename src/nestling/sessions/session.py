"""The reading loop: documents one after another as one stream, chunk by chunk, with a checkpoint that follows it.

Every call reads one chunk of the fastest level, so each update is seen. Where a call begins depends on the stream only,
not on when a checkpoint was written: a resumed session makes the same calls with the same numbers.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from nestling.cms.anchor import set_anchor
from nestling.cms.cache import LevelsCache
from nestling.generation.state import fingerprint
from nestling.sessions import store
from nestling.sessions.check import ANCHORS, Checker, own_texts
from nestling.sessions.documents import PIECE, PIPE, PIPE_PIECE, Text, TokenReader
from nestling.sessions.journal import Journal, Stopped
from nestling.sessions.notes import LevelCount, Notes, Open, measured, same_session
from nestling.sessions.scores import examples, log_probabilities, score
from nestling.sessions.series import Series
from nestling.sessions.settings import Settings, check_model, choose_context
from nestling.sessions.snapshots import FIRST, keep, recall_nearest
from nestling.utils.locks import sole_writer
from nestling.utils.memory_use import resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RECENT = 20  # documents whose examples are kept
SHARE = 0.05  # of the time that checkpoints may take, if they are written as often as that allows


class Session:
    """A model that reads texts; what it learned and where it is are in one file.

    Args:
        model: with levels that learn.  tokenizer: the model's.  texts: from `find_texts`.
        state: the file; a session that it holds unfinished goes on, what an earlier one learned is the beginning of a
            new one.
        new: begin a new session also where the last is unfinished or read the same texts.
        held_out: ids of a text that is scored now and after every document, and never learned.
        pipe: what the document "-" is read from.
        show: called with this session after every call and every document.

    Raises:
        ValueError: a model without levels that learn, a state that does not fit it, other texts or settings than an
            unfinished session's, a context that does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        texts: list[Text],
        state: Path,
        settings: Settings | None = None,
        *,
        new: bool = False,
        held_out: list[int] | None = None,
        pipe: BinaryIO | None = None,
        show: Callable[[Session], None] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.texts, self.path = model.eval(), tokenizer, texts, Path(state)
        self.settings, self.held_out_ids = settings or Settings(), held_out
        check_model(model)
        if self.settings.check and any(text.path is None for text in texts):
            raise ValueError("what is read from a pipe cannot be checked: nothing of it is known before; give files")
        self._origin = fingerprint(model)
        model.learner.context = choose_context(model, self.settings.context)
        self._pipe, self._show = pipe or sys.stdin.buffer, show or (lambda session: None)
        self._device, self._size = next(model.parameters()).device, model.learner.chunk_size
        self._checker = Checker(model, tokenizer)
        self._chunks, self._saved, self._cost = 0, time.monotonic(), 0.0
        self.cache, self.notes, self.resumed = LevelsCache(), self._new_notes(), False
        self._stamp = store.stamp(self.path)
        if self._stamp is not None:
            self.cache, before = store.load(self.path, model)
            before = None if before is None or new else Notes.from_dict(before)
            if before is not None and same_session(before, self.notes, self.path):
                self.notes, self.resumed = before, True

    def _new_notes(self) -> Notes:
        learner = self.model.learner
        settings = {"context": learner.context or 0, "probe": self.settings.probe, "control": self.settings.control}
        sizes = [learner.levels[i].chunk_size for i in learner.fast]
        texts = [[text.name, text.size, text.digest] for text in self.texts]
        if self.settings.check:  # absent otherwise: sessions of before go on
            settings["check"] = True
        if self.settings.anchor:
            settings["anchor"] = self.settings.anchor
        if self.settings.snapshots:
            settings["snapshots"] = self.settings.snapshots
        held = self.held_out_ids and hashlib.blake2b(str(self.held_out_ids).encode(), digest_size=4).hexdigest()
        settings["held_out"] = held or None
        return Notes(secrets.token_hex(8), settings, texts, sizes, norms=[Series() for _ in sizes])

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all documents; None with a pipe among them."""
        sizes = [text.size for text in self.texts]
        return None if None in sizes else sum(sizes)

    @property
    def read_bytes(self) -> int:
        """Bytes of the documents read so far, up to the piece that is being read."""
        return sum(row["bytes"] for row in self.notes.rows) + self.notes.offset

    @torch.no_grad()
    def run(self, stop: Event | None = None) -> dict[str, Any]:
        """Read to the end; returns `result()`.

        Raises:
            Stopped: `stop` was set; a checkpoint has been written, and the same session goes on from it.
            ValueError: a pipe that is empty or no text, or another session is or was at the same file.
        """
        if not self.notes.done:
            with sole_writer(self.path):
                if store.stamp(self.path) != self._stamp:
                    raise ValueError(
                        f"{self.path} was written by another session after this one had read it: make this one anew"
                    )
                self._run(stop)
        return self.result()

    def _run(self, stop: Event | None) -> None:
        self._hold()
        if not self.resumed:
            self._score_held_out(None)
            self._save()  # a place that cannot be written shows before anything is read
        for index in range(self.notes.document, len(self.texts)):
            self._document(self.texts[index], stop)
        self.notes.done = True
        self._save()

    def _hold(self) -> None:
        """Anchor the model to texts of its own making, if that is wanted."""
        texts = own_texts(self.model, self.tokenizer, ANCHORS) if self.settings.anchor else []
        set_anchor(self.model, [[self.tokenizer.eos_token_id, *ids] for ids in texts], self.settings.anchor)

    def _document(self, text: Text, stop: Event | None) -> None:
        notes = self.notes
        if text.path is None:
            path = self.path.with_name(self.path.name + ".journal")
            source: Any
            source, piece = Journal(path, notes.session, self._pipe, notes.offset, stop), PIPE_PIECE
        else:
            source, piece = text.opened(text.path), PIECE
            source.seek(notes.offset, os.SEEK_CUR)
        try:
            tokens = TokenReader(self.tokenizer, source.read, text.name, notes.offset, notes.skip, piece)
            if notes.open is None:
                if not tokens.ahead(1):
                    raise ValueError(f"{text.name} is empty: there was nothing to read from {PIPE}")
                notes.open = self._opened(tokens, text)
            while self._call(tokens):
                self._chunks += 1
                if stop is not None and stop.is_set():
                    raise Stopped
                if self._due():
                    self._save()
                    if isinstance(source, Journal):
                        source.trim(notes.offset)
                self._show(self)
            following = self.texts[notes.document + 1 : notes.document + 2]
            again = text.again or any(t.again for t in following)
            if self.settings.snapshots or again or not following:
                self._finish()
            if self.settings.snapshots:
                keep(self.cache, text.again or text.name, self.settings.snapshots)
            if again:  # in sight it would be copied, and teach nothing
                self.cache.forget_context()
            self._close(text, tokens)
            if isinstance(source, Journal):
                self._save()  # before the journal goes
                source.close(remove=True)
        except Stopped:
            self._save()
            raise
        finally:
            source.close()

    def _call(self, tokens: TokenReader) -> bool:
        """Read up to the next boundary of the fastest level; False at the document's end."""
        notes, opened, began = self.notes, self.notes.open, time.monotonic()
        position = 0 if self.cache.levels is None else self.cache.levels.position
        room = self._size - position % self._size
        ids = [] if opened.begun else [self.tokenizer.eos_token_id]
        ids += tokens.take(room - len(ids))
        upcoming = tokens.ahead(1)  # before anything changes: a pipe may be waited for, and the wait be stopped
        if not ids:
            return False
        levels = None if self.cache.levels is None else self.cache.levels.levels
        known = torch.tensor([upcoming], device=self._device) if upcoming else None
        out = self.model(
            torch.tensor([ids], device=self._device), past_key_values=self.cache, use_cache=True, next_tokens=known
        )
        self.cache = out.past_key_values
        targets = ids[1:] + upcoming
        found = log_probabilities(out.logits[0, : len(targets)], torch.tensor(targets, device=self._device))
        fine = found[found.isfinite()]
        nats = -float(fine.double().sum())
        opened.nats, opened.counted = opened.nats + nats, opened.counted + len(fine)
        opened.bad += len(found) - len(fine)
        if len(targets):
            notes.loss.add(notes.tokens, nats / len(fine) if len(fine) else math.nan, len(fine))
        self._watch(levels)
        count = len(ids) - (not opened.begun)
        opened.begun, opened.tokens, notes.tokens = True, opened.tokens + count, notes.tokens + len(ids)
        notes.offset, notes.skip = tokens.place
        notes.memory.add(notes.tokens, resident_bytes())
        opened.seconds += time.monotonic() - began
        return True

    def _finish(self) -> None:
        """Learn what is left of a document, in front of the end-of-text token that the next one begins with.

        Nothing is lost if that is never read; reading on opens a chunk.
        """
        levels = self.cache.levels.levels
        self.model.finish(self.cache, torch.tensor([[self.tokenizer.eos_token_id]], device=self._device))
        self._watch(levels)

    def _watch(self, before: tuple | None) -> None:
        """Count what this call changed at every level."""
        notes = self.notes
        for n, i in enumerate(self.model.learner.fast):
            now, old = self.cache.levels.levels[i], None if before is None else before[i]
            if now is None:
                continue
            made, refused = _updates(now) - _updates(old), _refused(now) - _refused(old)
            written = float(now.written[0]) if made else 0.0
            good = math.isfinite(written)
            notes.open.levels[n].add(made if good else 0, refused, written if good else 0.0)
            if made:
                notes.norms[n].add(notes.tokens, written)
            if refused and good:  # a chunk of those a slow level waits for
                notes.norms[n].add(notes.tokens, math.nan)

    def _opened(self, tokens: TokenReader, text: Text) -> Open:
        opened = Open([LevelCount() for _ in self.notes.chunk_sizes], began=self.notes.tokens)
        if self.settings.snapshots and self.cache.levels is not None:
            end, context = self.tokenizer.eos_token_id, self.model.learner.context
            opened.recalled = recall_nearest(self.model, self.cache, tokens.ahead(FIRST), end, context)
        opened.probe = tokens.ahead(self.settings.probe) if self.settings.probe else []
        if opened.probe:
            opened.before = self._score(opened.probe, self.cache)
            opened.control = self._score(opened.probe, None) if self.settings.control else None
        if self.settings.check:
            opened.check = self._checker.before(text.path, self.cache)
        return opened

    def _close(self, text: Text, tokens: TokenReader) -> None:
        """The row of a document that was read to its end."""
        notes, opened, size = self.notes, self.notes.open, tokens.place[0]
        row = {
            "name": text.name, "from": opened.began, "tokens": opened.tokens, "bytes": size,
            "reading": measured(opened.nats, opened.counted, round(size * opened.counted / opened.tokens)),
            "not_finite": opened.bad, "probe_tokens": len(opened.probe), "before": None, "after": None, "control": None,
            "levels": [{"chunk_size": s, **asdict(c)} for s, c in zip(notes.chunk_sizes, opened.levels)],
            "examples": [], "seconds": opened.seconds,
        }  # fmt: skip
        if opened.probe:
            after = self._score(opened.probe, self.cache)
            row |= {"before": self._measured(opened.probe, opened.before), "after": self._measured(opened.probe, after)}
            row["examples"] = examples(self.tokenizer, opened.probe, opened.before, after)
            if opened.control is not None:
                row["control"] = self._measured(opened.probe, opened.control)
        if self.settings.snapshots:
            row["recalled"] = opened.recalled
        if opened.check is not None:
            row["check"] = self._checker.after(text.path, self.cache, opened.check)
        notes.rows.append(row)
        if len(notes.rows) > RECENT:
            notes.rows[-RECENT - 1]["examples"] = []
        notes.document, notes.offset, notes.skip, notes.open = notes.document + 1, 0, 0, None
        self._score_held_out(text.name)
        self._show(self)

    def _score_held_out(self, document: str | None) -> None:
        """What the model knows of the held-out text now."""
        notes, ids = self.notes, self.held_out_ids
        if not ids:
            return
        logs = self._score(ids, self.cache)
        first = notes.held_out[0]["logs"] if notes.held_out else logs
        found = [] if document is None else examples(self.tokenizer, ids, first, logs)
        for row in notes.held_out[1:]:
            row.pop("examples", None)  # only the latest are of interest
        row = {"behind": document, "at": notes.tokens, **self._measured(ids, logs), "examples": found}
        notes.held_out.append(row if notes.held_out else row | {"logs": logs})

    def _score(self, ids: list[int], cache: LevelsCache | None) -> list[float]:
        return score(self.model, cache, ids, self.tokenizer.eos_token_id, self.model.learner.context).tolist()

    def _measured(self, ids: list[int], logs: list[float]) -> dict[str, float | None]:
        return measured(-math.fsum(logs) if logs else 0.0, len(ids), len(self.tokenizer.decode(ids).encode()))

    def _due(self) -> bool:
        if self.settings.save_every:
            return self._chunks >= self.settings.save_every
        return time.monotonic() - self._saved >= self._cost / SHARE

    def _save(self) -> None:
        began = time.monotonic()
        store.save(self.path, self.cache, self.model, self._origin, self.notes.to_dict())
        self._stamp = store.stamp(self.path)
        self._saved, self._chunks = time.monotonic(), 0
        self._cost = self._saved - began

    def result(self) -> dict[str, Any]:
        """What was read and measured, as JSON types."""
        notes = self.notes
        return {
            "state": str(self.path), "state_bytes": self.cache.nbytes, "settings": notes.settings,
            "snapshots": {name: kept.nbytes for name, kept in (self.cache.snapshots or {}).items()},
            "tokens": notes.tokens, "documents": notes.rows, "levels": notes.totals(),
            "held_out": [{k: v for k, v in row.items() if k != "logs"} for row in notes.held_out],
            "memory": notes.memory_halves(),
            "not_finite": sum(row["not_finite"] for row in notes.rows), "resumed": self.resumed,
        }  # fmt: skip


def _updates(state: Any) -> int:
    if state is None:
        return 0
    return state.updates if state.surprise is None else int(state.surprise.updates[0])


def _refused(state: Any) -> int:
    return 0 if state is None else int(state.refused[0])
