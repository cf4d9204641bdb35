"""A model's state on disk: one file, whole or absent, that knows which model it belongs to."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestling.utils.files import write_bytes

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

FORMAT = "nestling-state-2"
APART = "nestling-state-3"  # of streams that stand at different places
CONTENT = ("layers", "learned", "parts", "columns")  # what a file says of its tensors
# the types in older files: as module:name, what they are called now
MOVED = {
    "nestling.cms.surprise:Pace": "nestling.cms.surprise:Surprise",
    "nestling.continuum.pace:Pace": "nestling.cms.surprise:Surprise",
    "nestling.continuum.state:LevelState": "nestling.cms.state:LevelState",
    "nestling.continuum.state:StreamState": "nestling.cms.state:StreamState",
}


def save_state(
    path: str | Path,
    cache: Cache,
    model: PreTrainedModel,
    compact: bool = False,
    *,
    notes: dict[str, Any] | None = None,
    origin: str | None = None,
) -> None:
    """Write the state of a text begun with `model`; the old file stays if the disk is full.

    A state read back goes on bit for bit. With `compact`, matrices that levels learned are kept as two factors where
    that is smaller and gives them back to float32's rounding: after few updates of a level they are of low rank.

    Args:
        notes: JSON values to be kept beside it, see `load_notes`.
        origin: the model's `fingerprint`, if it is known already (it takes a pass over the weights).
    """
    from safetensors.torch import save

    tensors: list[Tensor] = []
    parts = [{"rows": list(rows), **_content(part, tensors, compact)} for rows, part in getattr(cache, "parts", ())]
    content = {"layers": [], "learned": None, "parts": parts} if parts else _content(cache, tensors, compact)
    content["columns"] = cache.get_seq_length()
    # clones: a state's tensors may share memory, which a file of tensors cannot
    named = {f"t{i}": tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(tensors)}
    metadata = {"format": APART if parts else FORMAT, "model": origin or fingerprint(model), "digest": _digest(named)}
    metadata |= {name: json.dumps(value) for name, value in content.items()}
    metadata["content_digest"] = _content_digest(metadata)
    if notes is not None:
        text = json.dumps(notes)
        metadata |= {"notes": text, "notes_digest": hashlib.sha256(text.encode()).hexdigest()}
    write_bytes(path, save(named, metadata))


def load_state(path: str | Path, model: PreTrainedModel) -> Cache:
    """The state in a file, as a cache on the model's device.

    Raises:
        ValueError: no such file, a damaged one, or the state of another model.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no state at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or no state file ({error}); start without it") from None
    if metadata.get("format") not in (FORMAT, APART):
        raise ValueError(f"{path} is no state file of this version (format {metadata.get('format')!r})")
    if metadata.get("model") != fingerprint(model):
        raise ValueError(f"{path} is the state of another model: load the model that wrote it, or start without it")
    if metadata.get("digest") != _digest(tensors):
        raise ValueError(f"{path} is damaged: its content does not match its digest; start without it")
    if metadata.get("content_digest", _content_digest(metadata)) != _content_digest(metadata):  # none in older files
        raise ValueError(f"{path} is damaged: its description does not match its digest; start without it")
    try:
        return _read(model, metadata, tensors)
    except Exception as error:  # whole in itself, and not what this version writes
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no state that this version can read ({said}); start without it") from error


def _read(model: PreTrainedModel, metadata: dict[str, str], tensors: dict[str, Tensor]) -> Cache:
    """The cache that a file's metadata and tensors describe."""
    device = next(model.parameters()).device
    # clones: views of the file may be aligned otherwise, and products may round by alignment
    ordered = [tensors[f"t{i}"].to(device).clone() for i in range(len(tensors))]
    content = {name: json.loads(metadata.get(name, "null")) for name in CONTENT}
    if content["parts"] is None:
        return _make_cache(model, content, ordered, content["learned"] != {"value": None})
    cache = _empty_cache(model, True)
    cache.place((tuple(part["rows"]), _make_cache(model, part, ordered, True)) for part in content["parts"])
    cache.advance(content["columns"])
    return cache


def load_notes(path: str | Path) -> dict[str, Any] | None:
    """The notes that were saved beside a state, None if there are none; ValueError if they are damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no state file ({error}); start without it") from None
    text = metadata.get("notes")
    if text is None:
        return None
    if metadata.get("notes_digest") != hashlib.sha256(text.encode()).hexdigest():
        raise ValueError(f"{path} is damaged: its notes do not match their digest; start without it")
    return json.loads(text)


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's kind and weights: a state means something only to the weights that made it."""
    levels = getattr(model, "learner", None)
    rules = f"{levels and (levels.levels, levels.variant)}".replace(", rank=None", "")  # as before there were ranks
    digest = hashlib.sha256(f"{getattr(model, 'kind', type(model).__name__)}{rules}".encode())
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(parameter.shape)}{parameter.dtype}".encode())
        digest.update(_bytes(parameter))
    return digest.hexdigest()[:32]


def _layer_content(layer: Any, tensors: list[Tensor], begun: bool) -> dict[str, Any]:
    if hasattr(layer, "origin"):  # a layer that holds its state as one value
        return {"kind": "value", "state": _plain(layer.state, tensors), "tokens": layer.tokens, "origin": layer.origin}
    empty = getattr(layer, "keys", None) is None
    if hasattr(layer, "keys") and (begun or not empty) and not getattr(layer, "is_sliding", False):
        # empty: forgotten (`forget_context`), or of rows that held padding alone
        return {"kind": "keys", "state": _plain(None if empty else (layer.keys, layer.values), tensors)}
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be kept on disk")


def _content(cache: Any, tensors: list[Tensor], compact: bool) -> dict[str, Any]:
    """Streams that stand at one place."""
    begun = getattr(cache, "columns", 0) > 0
    layers = [_layer_content(layer, tensors, begun) for layer in cache.layers]
    return {"layers": layers, "learned": _plain(getattr(cache, "levels", None), tensors, compact)}  # of levels


def _make_cache(model: PreTrainedModel, content: dict[str, Any], tensors: list[Tensor], learned: bool) -> Any:
    from nestling.cms.state import StreamState

    cache = _empty_cache(model, learned)
    for index, layer in enumerate(content["layers"]):
        state = _rebuilt(layer["state"], tensors)
        if layer["kind"] == "value":
            cache.layers[index].store(state, layer["tokens"], layer["origin"])
        elif state is not None:
            cache.update(*state, index)
    if learned and (levels := _rebuilt(content["learned"], tensors)) is not None:
        if not isinstance(levels, StreamState):
            raise TypeError(f"what the levels learned is a {type(levels).__name__}")
        cache.levels, cache.columns = levels, content.get("columns") or levels.position
    return cache


def _empty_cache(model: PreTrainedModel, learned: bool) -> Any:
    from transformers import DynamicCache

    from nestling.cms.cache import LevelsCache

    return (LevelsCache if learned else DynamicCache)(config=model.config)


def _plain(value: Any, tensors: list[Tensor], compact: bool = False) -> Any:
    """A nest of tensors, numbers and named tuples as JSON; tensors go to the list."""
    if isinstance(value, Tensor):
        factors = low_rank(value) if compact else None
        tensors += [value] if factors is None else factors
        return {"tensor": len(tensors) - 1} if factors is None else {"factors": [len(tensors) - 2, len(tensors) - 1]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return {"named": kind, "items": [_plain(item, tensors, compact) for item in value]}
    if is_dataclass(value) and not isinstance(value, type):
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        items = [getattr(value, field.name) for field in fields(value)]
        return {"named": kind, "items": [_plain(item, tensors, compact) for item in items]}
    if isinstance(value, list | tuple):
        return {"list" if isinstance(value, list) else "tuple": [_plain(item, tensors, compact) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[key, _plain(item, tensors, compact)] for key, item in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise ValueError(f"a state holds a {type(value).__name__}, which cannot be kept on disk")


def _rebuilt(content: dict[str, Any], tensors: list[Tensor]) -> Any:
    if "tensor" in content:
        return tensors[content["tensor"]]
    if "factors" in content:
        left, right = (tensors[i] for i in content["factors"])
        return (left.double() @ right.double()).to(left.dtype)
    if "named" in content:
        return _known(content["named"])(*(_rebuilt(item, tensors) for item in content["items"]))
    for kind, make in (("list", list), ("tuple", tuple)):
        if kind in content:
            return make(_rebuilt(item, tensors) for item in content[kind])
    if "dict" in content:
        return {key: _rebuilt(item, tensors) for key, item in content["dict"]}
    return content["value"]


def _known(kind: str) -> type:
    """A named tuple or dataclass of this package by its name; a file can name nothing else."""
    module, _, name = MOVED.get(kind, kind).partition(":")
    if module.split(".")[0] == "nestling":
        found = getattr(importlib.import_module(module), name, None)
        if isinstance(found, type) and (is_dataclass(found) or hasattr(found, "_fields")):
            return found
    raise ValueError(f"the state holds a {kind}, which this version does not know")


def low_rank(value: Tensor) -> list[Tensor] | None:
    """Factors [B, o, r], [B, r, i] of matrices [B, o, i] in float32, where they are smaller and rounding is all that is
    lost; else None."""
    if value.dim() != 3 or value.dtype != torch.float32 or min(value.shape[1:]) < 8 or not value.isfinite().all():
        return None
    left, size, right = torch.linalg.svd(value.double(), full_matrices=False)
    rank = max(1, int((size > 1e-7 * size.amax(-1, keepdim=True)).sum(-1).max()))
    if rank * sum(value.shape[1:]) >= value[0].numel():
        return None
    factors = [(left[..., :rank] * size[:, None, :rank]).float(), right[:, :rank].float()]
    rebuilt = (factors[0].double() @ factors[1].double()).float()
    close = (rebuilt - value).abs().max() <= 1e-6 * value.abs().max()
    return factors if bool(close) else None


def _content_digest(metadata: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([metadata.get(name) for name in CONTENT]).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
