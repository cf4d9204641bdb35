"""A state that is whole in itself, but made of other tensors than its model says, is refused by the tensor's name."""

import json
import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.generation import load_state, save_state
from nestling.generation.state import _content_digest, _digest
from nestling.layers.mixers import MIXERS
from nestling.schedule import OPTIMIZERS

SLOW = bool(os.environ.get("NESTLING_SLOW_TESTS"))
SIZES = dict(vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
IDS = torch.randint(31, (2, 15), generator=torch.Generator().manual_seed(0))


def hope(levels=None, **changes):
    return HopeForCausalLM(HopeConfig(**SIZES | changes, cms_levels=levels)).eval()


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def rule(optimizer="gd", size=4, **changes):
    """A level that learns, and one that waits for its boundary."""
    fast = Level(size, lr=0.1, optimizer=optimizer, **changes)
    return [fast.to_dict(), Level(2 * size, lr=0.1, optimizer=optimizer, **changes).to_dict()]


MODELS = {
    "plain Llama": llama,
    "selfmod": hope,
    "levels": lambda: hope([*rule("adamw", 8), {"chunk_size": None}], context_length=64, num_hidden_layers=1),
    "pattern": lambda: hope(rule("dgd"), mixers=["gated_deltanet_conv", "window_attention"], cms_layers=[1]),
    "stacked": lambda: stack_levels(llama(), rule("momentum", surprise=0.5)),
    "factors": lambda: stack_levels(
        llama(), rule(rank=3), placement="width", width=4, blocks=[1], context=8, meta_grad="none"
    ),
}


def state_of(model, file, mask=None):
    with torch.no_grad():
        call = dict(attention_mask=mask) if mask is not None else {}
        save_state(file, model(IDS, use_cache=True, **call).past_key_values, model)
    with safe_open(str(file), "pt") as content:
        return load_file(file), content.metadata()


def write(file, tensors, metadata):
    digests = {"digest": _digest(tensors), "content_digest": _content_digest(metadata)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata | digests)


DAMAGE = {
    "rank": lambda t: t[None],
    "flat": lambda t: t.flatten() if t.dim() > 1 else t[:, None],
    "size": lambda t: torch.cat([t, t], -1),
    "streams": lambda t: torch.cat([t, t]),
    "none": lambda t: t[:0],
    "type": lambda t: t.to(torch.int32),
    "wide": lambda t: t.double() if t.is_floating_point() else t.float(),
}


@pytest.mark.parametrize("kind", MODELS)
def test_each_tensor_of_another_shape_or_type_is_refused(tmp_path, monkeypatch, kind):
    torch.manual_seed(0)
    model, file = MODELS[kind](), tmp_path / "a.state"
    tensors, metadata = state_of(model, file)
    load_state(file, model)
    monkeypatch.setattr("nestling.generation.state.fingerprint", lambda model: metadata["model"])  # the same each time
    for number, (name, tensor) in enumerate(tensors.items()):
        for damage in list(DAMAGE)[0 if SLOW else number % 7 :: 1 if SLOW else 7]:
            change = DAMAGE[damage]
            forged = change(tensor)
            if forged.shape == tensor.shape and forged.dtype == tensor.dtype:
                continue  # nothing to flatten or to double
            write(file, tensors | {name: forged}, metadata)
            with pytest.raises(ValueError, match=r"(layers\[\d\]|learned|keys of)") as refusal:
                load_state(file, model)
            if tensor is not next(iter(tensors.values())):  # the first of all may say how many streams there are
                assert "should" in str(refusal.value), (name, damage, refusal.value)
    for name in list(tensors)[:: 1 if SLOW else 5]:
        write(file, {n: t for n, t in tensors.items() if n != name}, metadata)
        with pytest.raises(ValueError, match=f"tensor {name} of its description is missing"):
            load_state(file, model)
    write(file, tensors | {"t999": torch.zeros(1)}, metadata)
    with pytest.raises(ValueError, match="tensor t999 is no part of its description"):
        load_state(file, model)


def test_an_error_says_the_tensor_its_shape_and_the_expected_one(tmp_path):
    model, file = MODELS["stacked"](), tmp_path / "a.state"
    tensors, metadata = state_of(model, file)
    place = json.loads(metadata["learned"])["items"][0]["tuple"][1]["items"][0]["tuple"][2]["tensor"]
    write(file, tensors | {f"t{place}": torch.zeros(2, 5)}, metadata)
    words = "learned.levels[1].deltas[2] is float32 [2, 5]; it should be float32 [2, 16, 16]"
    with pytest.raises(ValueError, match=re.escape(words)):
        load_state(file, model)


@pytest.mark.parametrize("kind", ["levels", "stacked", "factors"])
def test_nan_is_refused_where_no_update_leaves_it(tmp_path, monkeypatch, kind):
    """What a sequence layer holds may be anything that the model computed."""
    model, file = MODELS[kind](), tmp_path / "a.state"
    tensors, metadata = state_of(model, file)
    monkeypatch.setattr("nestling.generation.state.fingerprint", lambda model: metadata["model"])
    learned = {*re.findall(r'"tensor": (\d+)', json.dumps(json.loads(metadata["learned"])["items"][0]))}
    refused = []
    for name, tensor in list(tensors.items())[:: 1 if SLOW or kind == "factors" else 3]:
        if not tensor.is_floating_point():
            continue
        write(file, tensors | {name: torch.full_like(tensor, torch.nan)}, metadata)
        try:
            load_state(file, model)
        except ValueError as error:
            refused.append((name, str(error)))
    assert all(name[1:] in learned and "holds NaN" in said for name, said in refused)
    if kind == "factors":
        assert len(refused) == len(learned) - 2  # `written` of both levels is NaN where an update was refused


@pytest.mark.parametrize("value", [-1, 31])
def test_a_token_outside_the_vocabulary_is_refused(tmp_path, value):
    model, file = MODELS["levels"](), tmp_path / "a.state"
    tensors, metadata = state_of(model, file)
    number = json.loads(metadata["learned"])["items"][1]["tensor"]
    write(file, tensors | {f"t{number}": torch.full_like(tensors[f"t{number}"], value)}, metadata)
    with pytest.raises(ValueError, match=r"learned.tokens has an id outside the vocabulary of 31"):
        load_state(file, model)


@pytest.mark.parametrize("position", [-1, 3, "4", 2.0, None, True])
def test_a_position_between_boundaries_is_refused(tmp_path, position):
    model, file = MODELS["levels"](), tmp_path / "a.state"
    tensors, metadata = state_of(model, file)
    learned = json.loads(metadata["learned"])
    learned["items"][4] = {"value": position}
    write(file, tensors, metadata | {"learned": json.dumps(learned)})
    with pytest.raises(ValueError, match=r"position"):
        load_state(file, model)


def own_states():
    for mixer in MIXERS:
        yield mixer, lambda mixer=mixer: hope(rule(), mixer=mixer)
    for optimizer in OPTIMIZERS:
        for changes in ({}, {"surprise": 0.5}, {"rank": 2})[: 3 if SLOW or optimizer == "adamw" else 1]:
            yield (f"{optimizer} {changes}", lambda o=optimizer, c=changes: stack_levels(llama(), rule(o, **c)))


@pytest.mark.parametrize(("kind", "make"), [pytest.param(*pair, id=pair[0]) for pair in own_states()])
def test_every_own_state_is_taken(tmp_path, kind, make):
    torch.manual_seed(0)
    model, file = make(), tmp_path / "a.state"
    state_of(model, file)
    load_state(file, model)


@pytest.mark.parametrize("kind", ["levels", "pattern", "stacked"])
def test_a_state_in_other_types_is_taken_and_one_of_padded_rows(tmp_path, kind):
    model, file = MODELS[kind](), tmp_path / "a.state"
    for changed in (model.double(), model.bfloat16()):
        state_of(changed, file)
        load_state(file, changed)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    state_of(model.float(), file, mask)
    assert load_state(file, model).streams == 2
    with torch.autocast("cpu", torch.bfloat16):
        state_of(model, file)
    load_state(file, model)
