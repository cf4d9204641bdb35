"""`nestling data`: texts as one memory map of token ids, made by several processes, and gone on with after a kill.

Files are cut into pieces of some megabytes. Each becomes a part of its own, written aside and renamed, its description
last: a part is whole or it is not there. At the end the parts are joined and the folder's `data.json` is written, which
is what `nestling train` looks for. No process ever holds more than a piece, whatever the length of the text.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from nestling.training import tokenizers
from nestling.training.texts import check_file, check_text, find_files, lines_from, pieces_of
from nestling.utils.files import new_file, write_text
from nestling.utils.locks import sole_writer

FORMAT = 1
MANIFEST = "data.json"  # of a folder that is whole
PLAN = "plan.json"
PIECE = 16 << 20  # bytes of a file that one process encodes at a time
STEP = 1 << 17  # characters that a tokenizer is given at a time: more, and its words leave the processor's cache
ENDINGS = {".jsonl": "lines", ".parquet": "rows"}  # other files are one document each


@dataclass(frozen=True)
class Piece:
    """Bytes start..stop of a file, or of a table its group of rows `start`; `source` numbers the TEXT it is of."""

    path: str
    kind: str
    start: int
    stop: int
    last: bool
    source: int


@dataclass(frozen=True)
class Encoder:
    """What encoding needs of a tokenizer. Processes get this, for transformers and torch take seconds to import."""

    name: str
    core: str | None  # the description of one that the library tokenizers can run; None: bytes, or of another kind
    eos: int
    dtype: np.dtype

    def ids(self, text: str) -> Sequence[int]:
        """`tokenizers.encode`, without the places of tokens in the text, which cost as much as the tokens."""
        if self.core is None:
            return tokenizers.encode(_tokenizer(self.name), text)
        return _core(self.core).encode_batch_fast([text], add_special_tokens=False)[0].ids


def encoder_of(name: str, tokenizer: Any) -> Encoder:
    """The encoder of a tokenizer."""
    core = None if name == "bytes" else getattr(tokenizer, "backend_tokenizer", None)
    return Encoder(name, None if core is None else core.to_str(), tokenizer.eos_token_id, dtype_of(tokenizer))


def prepare(
    texts: Sequence[str],
    out: Path,
    *,
    tokenizer: str = "bytes",
    weights: Sequence[float] = (),
    val_fraction: float = 0.01,
    column: str = "text",
    pattern: str = "**/*",
    workers: int = 1,
    piece: int = PIECE,
    told: Callable[[int, int], None] = lambda done, size: None,
) -> dict[str, Any]:
    """Tokenise texts into a folder, or go on where an earlier call was killed; returns the folder's description.

    Args:
        texts: files and folders: .jsonl (a document a line) and .parquet (a row), both by `column`; any other file is
            one document.
        tokenizer: "bytes", or the folder of a Hugging Face tokenizer.
        weights: how many times each of `texts` is read in an epoch, fractions too; none: once.
        val_fraction: part of every piece that is held out, whole documents where they are short.
        workers: processes.  piece: bytes a process encodes at a time.
        told: of the bytes done and of all, after every piece.

    Raises:
        ValueError: nothing to read, a file that is no text or has no such column, other settings than those that the
            folder was begun with.
    """
    if weights and (len(weights) != len(texts) or not all(0 < w <= 1000 for w in weights)):
        raise ValueError(f"weights must be {len(texts)}, one for each TEXT, above 0 and at most 1000; got {weights}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1; got {val_fraction}")
    if workers < 1 or piece < 1:
        raise ValueError(f"workers and piece must be at least 1; got {workers} and {piece}")
    _tokenizer(tokenizer)  # refused before anything is written
    files = [
        (str(path.resolve()), number)
        for number, name in enumerate(texts)
        for _, path in find_files(name, pattern, "--pattern")
    ]
    if not files:
        raise ValueError("no text was given: name files or folders")
    plan = {
        "format": FORMAT, "tokenizer": tokenizer, "fingerprint": tokenizers.fingerprint(_tokenizer(tokenizer)),
        "weights": list(weights or [1.0] * len(texts)), "val_fraction": val_fraction, "column": column,
        "pieces": [asdict(p) for path, number in files for p in _cut(path, number, column, piece)],
        "files": [[path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns] for path, _ in files],
    }  # fmt: skip
    encoder = encoder_of(tokenizer, _tokenizer(tokenizer))
    with sole_writer(out):
        begun = out / PLAN
        if begun.is_file() and json.loads(begun.read_text("utf-8")) != json.loads(json.dumps(plan)):
            raise ValueError(
                f"{out} was begun with other texts or settings (its {PLAN} says which): give those again, or another "
                "--out"
            )
        if not begun.is_file() and out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out} holds other files: give a folder that is empty or not there")
        if not (out / MANIFEST).is_file():
            (out / "parts").mkdir(parents=True, exist_ok=True)
            write_text(begun, json.dumps(plan))
            _encode_all(out, plan, encoder, workers, told)
            _join(out, plan, encoder)
        return read_manifest(out)


def is_prepared(folder: str | Path) -> bool:
    """Whether `prepare` has made this folder, or begun to."""
    return Path(folder, PLAN).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a prepared folder holds. ValueError if it is not whole."""
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is not whole yet: go on with the nestling data command that began it")
    found = json.loads((folder / MANIFEST).read_text("utf-8"))
    for name in ("train", "val"):
        wanted, size = (
            found[name]["tokens"] * np.dtype(found["dtype"]).itemsize,
            (folder / f"{name}.bin").stat().st_size,
        )
        if size != wanted:
            raise ValueError(f"{folder / name}.bin has {size} bytes, not {wanted}: prepare the folder again")
    return found


def _cut(path: str, source: int, column: str, size: int) -> Iterator[Piece]:
    kind = ENDINGS.get(Path(path).suffix, "text")
    if kind == "rows":
        groups = _table(path, column).num_row_groups
        yield from (Piece(path, kind, i, i + 1, i + 1 == groups, source) for i in range(groups))
        return
    length = Path(path).stat().st_size
    if kind == "text":
        check_file(Path(path))
    starts = range(0, max(length, 1), size)
    yield from (Piece(path, kind, s, min(s + size, length), s == starts[-1], source) for s in starts)


def _encode_all(
    out: Path, plan: dict[str, Any], encoder: Encoder, workers: int, told: Callable[[int, int], None]
) -> None:
    pieces = [Piece(**p) for p in plan["pieces"]]
    sizes = [_bytes_of(p) for p in pieces]
    left = [i for i in range(len(pieces)) if not _part(out, i, "json").is_file()]
    done = sum(sizes) - sum(sizes[i] for i in left)
    told(done, sum(sizes))
    settings = (encoder, plan["column"], plan["val_fraction"])
    with ProcessPoolExecutor(min(workers, max(1, len(left))), mp_context=get_context("spawn")) as pool:
        running = {pool.submit(encode, out, i, pieces[i], *settings): i for i in left}
        try:
            for future in as_completed(running):
                future.result()
                done += sizes[running[future]]
                told(done, sum(sizes))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def encode(out: Path, number: int, piece: Piece, encoder: Encoder, column: str, val_fraction: float) -> None:
    """Write one part: its ids, the place in it of every document's end, and where what is held out begins."""
    dtype = encoder.dtype
    step = STEP if not val_fraction else min(STEP, max(256, int(_bytes_of(piece) * val_fraction)))
    tokens = total = 0
    ends, marks = [], [(0, 0, 0)]  # marks: ids, bytes and documents so far, wherever it may be cut
    with new_file(_part(out, number, "bin")) as aside, open(aside, "wb") as file:
        for text, last in _documents(piece, column):
            for part in pieces_of(text, step):
                raw = part.encode()
                ids = np.frombuffer(raw, np.uint8) if encoder.name == "bytes" else encoder.ids(part)
                np.asarray(ids, dtype=dtype).tofile(file)
                tokens, total = tokens + len(ids), total + len(raw)
                marks.append((tokens, total, len(ends)))
            if last:
                np.array([encoder.eos], dtype=dtype).tofile(file)
                tokens += 1
                ends.append(tokens)
                marks.append((tokens, total, len(ends)))
    cut = min(marks, key=lambda mark: abs(mark[0] - tokens * (1 - val_fraction)))
    with new_file(_part(out, number, "ends")) as aside:
        np.array(ends, dtype="<i8").tofile(aside)
    made_of = {"tokens": tokens, "bytes": total, "ends": len(ends), "cut": cut}
    write_text(_part(out, number, "json"), json.dumps(made_of))  # the last: with it the part is whole


def _documents(piece: Piece, column: str) -> Iterator[tuple[str, bool]]:
    """The texts of a piece, and whether a document ends with each."""
    if piece.kind == "rows":
        values = _table(piece.path, column).read_row_group(piece.start, columns=[column])
        yield from ((str(text), True) for text in values.column(column).to_pylist() if text)
    elif piece.kind == "text":
        raw = b"".join(lines_from(Path(piece.path), piece.start, piece.stop, whole_words=True))
        check_text(raw, codecs.getincrementaldecoder("utf-8")(), piece.start, piece.path, final=True)
        yield raw.decode("utf-8"), piece.last
    else:
        for line in lines_from(Path(piece.path), piece.start, piece.stop):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[column]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{piece.path}: a line near byte {piece.start:,} is no JSON object with {column!r} (--column): "
                    f"{line[:60]!r}"
                ) from error
            if text:
                yield str(text), True


def _join(out: Path, plan: dict[str, Any], encoder: Encoder) -> None:
    """Make train.bin and val.bin of the parts, and of their documents' ends train.ends and val.ends."""
    pieces, dtype = [Piece(**p) for p in plan["pieces"]], encoder.dtype
    parts = [json.loads(_part(out, i, "json").read_text("utf-8")) for i in range(len(pieces))]
    manifest: dict[str, Any] = {"format": FORMAT, "dtype": dtype.str}
    order = list(_order(pieces, plan["weights"]))
    end_of_text = np.array([encoder.eos], dtype=dtype)
    for name in ("train", "val"):
        tokens = total = documents = 0
        with (
            new_file(out / f"{name}.bin") as ids_aside, new_file(out / f"{name}.ends") as ends_aside,
            open(ids_aside, "wb") as file, open(ends_aside, "wb") as ends_file,
        ):  # fmt: skip
            for i in order if name == "train" else range(len(pieces)):
                part, (cut, cut_bytes, cut_ends) = parts[i], parts[i]["cut"]
                begin, end = (0, cut) if name == "train" else (cut, part["tokens"])
                ends = np.fromfile(_part(out, i, "ends"), dtype="<i8")
                ends = (ends[:cut_ends] if name == "train" else ends[cut_ends:]) - begin + tokens
                if end > begin:
                    np.memmap(_part(out, i, "bin"), dtype, "r", begin * dtype.itemsize, (end - begin,)).tofile(file)
                tokens += end - begin
                if name == "train" and cut < part["tokens"] and not (len(ends) and ends[-1] == tokens):
                    end_of_text.tofile(file)  # what goes on here is held out
                    tokens, ends = tokens + 1, np.append(ends, tokens + 1)
                ends.astype("<i8").tofile(ends_file)
                documents += len(ends)
                total += cut_bytes if name == "train" else part["bytes"] - cut_bytes
        manifest[name] = {"tokens": tokens, "bytes": total, "documents": documents}
    if not manifest["train"]["tokens"]:
        raise ValueError("nothing to read: the texts hold no bytes")
    _tokenizer(plan["tokenizer"]).save_pretrained(out / "tokenizer")
    manifest["key"] = hashlib.sha256(json.dumps([plan, manifest]).encode()).hexdigest()[:16]
    write_text(out / MANIFEST, json.dumps(manifest, indent=1))
    shutil.rmtree(out / "parts")


def _order(pieces: list[Piece], weights: list[float]) -> Iterator[int]:
    """Parts as often as their text's weight says; of a fraction, the first ones."""
    for source, weight in enumerate(weights):
        own = [i for i, piece in enumerate(pieces) if piece.source == source]
        yield from (own[n % len(own)] for n in range(max(1, round(weight * len(own)))))


def dtype_of(tokenizer: Any) -> np.dtype:
    """The smallest type for all of a tokenizer's ids."""
    size = max(len(tokenizer), tokenizer.eos_token_id + 1)
    return np.dtype(np.uint16 if size <= 1 << 16 else np.uint32).newbyteorder("<")


@cache
def _tokenizer(name: str) -> Any:
    if name.startswith("bpe"):
        raise ValueError("bpe:SIZE is trained on all of the text: give 'bytes', or the folder of a tokenizer")
    return tokenizers.byte_tokenizer() if name == "bytes" else tokenizers.load_tokenizer(name)


@cache
def _core(description: str) -> Any:
    from tokenizers import Tokenizer

    core = Tokenizer.from_str(description)
    core.encode_special_tokens = True  # text that looks like one stays text
    core.no_truncation()
    core.no_padding()
    return core


def _bytes_of(piece: Piece) -> int:
    return 1 << 20 if piece.kind == "rows" else piece.stop - piece.start


def _part(out: Path, number: int, ending: str) -> Path:
    return out / "parts" / f"{number:06d}.{ending}"


def _table(path: str, column: str) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install 'nestling[data]'") from error
    try:
        table = ParquetFile(path)
    except Exception as error:
        raise ValueError(f"{path} is no Parquet file: {str(error).splitlines()[0]}") from error
    if column not in table.schema_arrow.names:
        raise ValueError(f"{path} has no column {column!r} (--column); it has {', '.join(table.schema_arrow.names)}")
    return table
