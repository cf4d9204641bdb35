"""Tokenizers: bytes (the default), byte-pair encoding trained on the data, or any Hugging Face tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
NUM_BYTES = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer: byte i is id i, then bos 256, eos 257, pad 258. Any text round-trips exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in _letters().items()}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _wrapped(core)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` ids (the three special ones included) trained on texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < NUM_BYTES + 3:
        raise ValueError(
            f"tokenizer 'bpe:{vocab_size}' is too small: {NUM_BYTES} bytes and 3 special ids need {NUM_BYTES + 3}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=sorted(_letters().values()), show_progress=False, special_tokens=[]
    )
    core.train_from_iterator(texts, trainer)
    return _wrapped(core)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer from a folder, a run's too (or a hub name); ValueError says what is wrong with it."""
    from transformers import AutoTokenizer

    import nestling.models  # noqa: F401 - registers the model types, which decide of a tokenizer too
    from nestling.training.checkpoint import resolve

    try:
        folder = resolve(path) if (Path(path) / "checkpoints").is_dir() else path
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(
            f"tokenizer {str(path)!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "give 'bytes', 'bpe:SIZE' or the folder of a Hugging Face tokenizer"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {str(path)!r} has no end-of-text token, which marks the end of a document")
    return tokenizer


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether ids 0..255 are the bytes themselves and nothing is merged, so that text needs no encoding."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or len(tokenizer) != NUM_BYTES + 3:
        return False
    vocab = core.get_vocab()
    return all(vocab.get(letter) == byte for byte, letter in _letters().items())


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a plain text: nothing is added, and text that looks like a special token stays text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """A short hash of what the tokenizer does; two tokenizers with one fingerprint encode alike."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is not None:
        content = core.to_str()
    else:
        content = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _wrapped(core) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _letters() -> dict[int, str]:
    """The printable letter by which a ByteLevel tokenizer stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(NUM_BYTES):
        if byte not in letters:
            letters[byte] = chr(NUM_BYTES + len(letters) - len(printable))
    return letters
