"""A model's state on disk: one file, whole or absent, that knows which model it belongs to."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nestling.generation.description import from_json, tensors_of, to_json
from nestling.utils.files import write_bytes
from nestling.utils.likeness import check_like, columns

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

FORMAT = "nestling-state-2"
APART = "nestling-state-3"  # of streams that stand at different places
CONTENT = ("layers", "learned", "parts", "columns")  # what a file says of its tensors
SNAPSHOTS = "snapshots"  # and, where there are any, of each: [name, what CONTENT says]


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

    A state read back goes on bit for bit, and has the snapshots it had. With `compact`, matrices that levels learned
    are kept as two factors where that is smaller and gives them back to float32's rounding: after few updates of a
    level they are of low rank.

    Args:
        notes: JSON values to be kept beside it, see `load_notes`.
        origin: the model's `fingerprint`, if it is known already (it takes a pass over the weights).
    """
    from safetensors.torch import save

    tensors: list[Tensor] = []
    content = _whole(cache, tensors, compact)
    snapshots = getattr(cache, "snapshots", None) or {}
    if snapshots:
        content[SNAPSHOTS] = [[name, _whole(kept, tensors, compact)] for name, kept in snapshots.items()]
    # clones: a state's tensors may share memory, which a file of tensors cannot
    named = {f"t{i}": tensor.detach().cpu().contiguous().clone() for i, tensor in enumerate(tensors)}
    form = APART if "parts" in content else FORMAT
    metadata = {"format": form, "model": origin or fingerprint(model), "digest": _digest(named)}
    metadata |= {name: json.dumps(value) for name, value in content.items()}
    metadata["content_digest"] = _content_digest(metadata)
    if notes is not None:
        text = json.dumps(notes)
        metadata |= {"notes": text, "notes_digest": hashlib.sha256(text.encode()).hexdigest()}
    write_bytes(path, save(named, metadata))


def read_tensors(path: str | Path, unlike: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a safetensors file says of itself, and its tensors. ValueError: it is damaged, or what `unlike` says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged or {unlike} ({error}); start without it") from None


def load_state(path: str | Path, model: PreTrainedModel) -> Cache:
    """The state in a file, as a cache on the model's device.

    Raises:
        ValueError: no such file, a damaged one, or the state of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no state at {path}")
    metadata, tensors = read_tensors(path, "no state file")
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
    ordered = {name: tensor.to(device).clone() for name, tensor in tensors.items()}
    content = {name: json.loads(metadata.get(name, "null")) for name in (*CONTENT, SNAPSHOTS)}
    if unused := ordered.keys() - set(tensors_of(content)):
        raise ValueError(f"tensor {sorted(unused)[0]} is no part of its description")
    cache = _made(model, content, ordered)
    if snapshots := content[SNAPSHOTS]:
        cache.snapshots = {name: _made(model, kept, ordered) for name, kept in snapshots}
        if odd := {kept.streams for kept in cache.snapshots.values()} - {0, cache.streams}:
            raise ValueError(f"a snapshot is of {odd.pop()} streams, and the state of {cache.streams}")
    return cache


def _made(model: PreTrainedModel, content: dict[str, Any], ordered: dict[str, Tensor]) -> Cache:
    """The cache of one `_whole`."""
    if content.get("parts") is None:
        return _make_cache(model, content, ordered, content["learned"] != {"value": None})
    cache = _empty_cache(model, True)
    rows = [tuple(part["rows"]) for part in content["parts"]]
    if sorted(itertools.chain(*rows)) != list(range(sum(map(len, rows)))):
        raise ValueError(f"its parts are of rows {rows}, not of each row once")
    cache.place((own, _make_cache(model, part, ordered, True, len(own))) for own, part in zip(rows, content["parts"]))
    cache.advance(_count(content["columns"], "columns"))
    return cache


def _count(value: Any, what: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} is {value!r:.40}, not a number of tokens")
    return value


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
        return {"kind": "value", "state": to_json(layer.state, tensors), "tokens": layer.tokens, "origin": layer.origin}
    empty = getattr(layer, "keys", None) is None
    if hasattr(layer, "keys") and (begun or not empty) and not getattr(layer, "is_sliding", False):
        # empty: forgotten (`forget_context`), or of rows that held padding alone
        return {"kind": "keys", "state": to_json(None if empty else (layer.keys, layer.values), tensors)}
    raise ValueError(f"a cache layer of type {type(layer).__name__} cannot be kept on disk")


def _whole(cache: Any, tensors: list[Tensor], compact: bool) -> dict[str, Any]:
    """Streams wherever they stand, snapshots apart."""
    parts = [{"rows": list(rows), **_content(part, tensors, compact)} for rows, part in getattr(cache, "parts", ())]
    content = {"layers": [], "learned": None, "parts": parts} if parts else _content(cache, tensors, compact)
    return content | {"columns": cache.get_seq_length()}


def _content(cache: Any, tensors: list[Tensor], compact: bool) -> dict[str, Any]:
    """Streams that stand at one place."""
    begun = getattr(cache, "columns", 0) > 0
    layers = [_layer_content(layer, tensors, begun) for layer in cache.layers]
    return {"layers": layers, "learned": to_json(getattr(cache, "levels", None), tensors, compact)}  # of levels


def _make_cache(
    model: PreTrainedModel, content: dict[str, Any], tensors: dict[str, Tensor], learned: bool, batch: int = -1
) -> Any:
    """A cache of a description, checked against what the model says of it; of `batch` streams, -1 for any number."""
    from nestling.cms.checks import check_stream, check_values

    states = [from_json(layer["state"], tensors) for layer in content["layers"]]
    levels = from_json(content["learned"], tensors) if learned else None
    found = [leaf for leaf in tree_leaves([getattr(levels, "tokens", None), states]) if isinstance(leaf, Tensor)]
    batch = columns(found[0], 0) if found and batch < 0 else batch
    _check_layers(model, [layer["kind"] for layer in content["layers"]], states, batch)
    cache = _empty_cache(model, learned)
    for index, (layer, state) in enumerate(zip(content["layers"], states)):
        if layer["kind"] == "value":
            cache.layers[index].store(state, _count(layer["tokens"], f"layers[{index}].tokens"), layer["origin"])
        elif state is not None:
            cache.update(*state, index)
    if levels is not None:
        check_stream(model.learner, levels, batch)
        check_values(model.learner, levels)
        cache.levels = levels
        cache.columns = _count(content.get("columns") or levels.position, "columns")
    return cache


def _check_layers(model: PreTrainedModel, kinds: list[str], states: list[Any], batch: int) -> None:
    """Raise ValueError unless the sequence layers' states are those of `batch` streams of the model."""
    from nestling.cms.backbones import expected_layer

    config = model.config
    if states and len(states) != config.num_hidden_layers:
        raise ValueError(f"layers are {len(states)}, but the model has {config.num_hidden_layers}")
    for index, (kind, state) in enumerate(zip(kinds, states)):
        if kind != ("value" if hasattr(config, "state_signature") else "keys"):
            raise ValueError(f"layers[{index}] is of kind {kind!r:.40}, which {type(model).__name__} has not")
        if state is not None:
            check_like(state, expected_layer(model, index, state, batch), f"layers[{index}]")
    if len(lengths := {columns(s[0], 2) for k, s in zip(kinds, states) if k == "keys" and s is not None}) > 1:
        raise ValueError(f"layers hold keys of {sorted(lengths)} tokens: they should be of the same ones")


def _empty_cache(model: PreTrainedModel, learned: bool) -> Any:
    from transformers import DynamicCache

    from nestling.cms.cache import LevelsCache

    return (LevelsCache if learned else DynamicCache)(config=model.config)


def _content_digest(metadata: dict[str, str]) -> str:
    said = [metadata.get(name) for name in CONTENT] + [metadata[name] for name in (SNAPSHOTS,) if name in metadata]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{list(tensors[name].shape)}{tensors[name].dtype}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
