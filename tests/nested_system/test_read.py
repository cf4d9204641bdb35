import copy
import warnings

import pytest
import torch
from torch import nn

import nestling.nested_system
from nestling.layers.mixers import MIXERS
from nestling.nested_system import AssociativeMemory, Frequency, Solver, Transfer, describes
from nestling.nested_system.describe import _CLASSES
from nestling.nested_system.frequency import ALWAYS, NEVER

ATTENTION = {"in_proj": "linear map", "out_proj": "linear map", "attention": "softmax attention"}


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def kinds(system, level):
    return {m.kind for m in system.levels[level - 1].memories}


def stepped(model, optimizer, *args, **kwargs):
    output = model(*args, **kwargs)
    output = getattr(output, "logits", output)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("family", ["gpt2", "llama", "vit", "hope"])
def test_every_tensor_of_a_known_family_has_a_level(request, family, ids):
    model = request.getfixturevalue(family)
    optimizer = adamw(model)
    stepped(model, optimizer, torch.randn(2, 1, 8, 8) if family == "vit" else ids)
    system = nestling.levels(model, optimizer)
    coverage = system.coverage
    assert coverage.complete and system.associative
    assert coverage.parameters == (len(list(model.parameters())),) * 2
    assert coverage.buffers == (len(list(model.buffers())),) * 2
    assert coverage.optimizer_states == (sum(len(s) for s in optimizer.state.values()),) * 2
    assert system.cost.parameters == sum(p.numel() for p in model.parameters())
    named = [t.name for m in system.memories for t in m.tensors if t.shared_with is None and t.role == "parameter"]
    assert sorted(named) == sorted(n for n, _ in model.named_parameters())
    assert not [note for note in system.notes if "by their parts" in note]


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_sequence_layer_is_read(make_hope, mixer):
    system = nestling.levels(make_hope(mixer=mixer, mixer_options={}))
    assert system.coverage.complete
    inner = [m for m in system.memories if m.lifetime == "context"]
    assert all(m.frequency == ALWAYS for m in inner) == (mixer in ("attention", "window_attention"))
    assert all("{" not in m.update and "  " not in m.update for m in inner)
    momentum = [m for m in inner if m.kind == "in-context momentum"]
    assert bool(momentum) == (mixer in ("selfmod", "titans", "titans_linear"))


def test_a_pattern_of_mixers_is_read_layer_by_layer(make_hope):
    model = make_hope(mixers=["selfmod", {"mixer": "window_attention", "window": 8}], mixer_options=None)
    system = nestling.levels(model)
    assert system.coverage.complete
    names = {m.name for m in system.memories}
    assert {"model.layers.0.mixer.memory", "model.layers.1.mixer.attention"} <= names


def test_settings_of_self_modifying_titans_show(make_hope):
    options = dict(chunk_size=4, memory_chunk_size=8, adaptive=("k", "q"), read="chunk", momentum=False, dgd=False)
    system = nestling.levels(make_hope(mixer_options=options))
    assert {str(level.frequency) for level in system.levels} == {"1 / 4 tokens", "1 / 8 tokens", "0"}
    memory = system["model.layers.0.mixer.memory"]
    assert memory.solver.rule == "gradient descent" and memory.update.startswith("W ← α W − e")
    assert "model.layers.0.mixer.k" in {t.source for t in system.transfers if t.target == memory.name}
    first = nestling.levels(make_hope(mixer_options={"meta_grad": "none"}))
    assert not [t for t in first.transfers if t.kind == "backpropagation"]


def test_levels_of_the_continuum_memory_have_paces_of_their_own(make_hope):
    chunks = [{"chunk_size": 16}, {"chunk_size": None}, {"chunk_size": 4096}, {"chunk_size": "inf"}]
    model = make_hope(cms_levels=chunks, cms_variant="nested")
    system = nestling.levels(model, adamw(model), tokens_per_step=1024)
    block = "model.layers.0.memory."
    assert str(system[block + "levels.0"].frequency) == "1 / 16 tokens"
    assert system[block + "blocks.0"].kind == "initial state"
    assert [str(system[block + f"blocks.{i}"].frequency) for i in range(4)] == [
        "1 / step",
        "1 / step",
        "1 / 4,096 tokens",
        "0",
    ]
    assert (
        system.level_of(block + "levels.0") < system.level_of(block + "blocks.1") < system.level_of(block + "blocks.2")
    )
    taught = {(t.source, t.target) for t in system.transfers if t.kind == "initialization" and "memory." in t.source}
    assert (block + "blocks.0", block + "levels.0") in taught and (block + "blocks.2", block + "blocks.1") in taught
    assert system["AdamW: first moment at 1 / 4,096 tokens"].frequency == Frequency.every(4096)


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        ("gd", []),
        ("momentum", ["in-context momentum"]),
        ("adamw", ["in-context first moment", "in-context second moment"]),
    ],
)
def test_a_fast_level_has_the_memories_of_its_own_optimiser(make_hope, rule, kinds):
    fast = {"chunk_size": 16, "optimizer": rule, "momentum": 0.8, "clip": 1.0, "decay": 0.25}
    model = make_hope(cms_levels=[fast, {"chunk_size": None}], mixer="attention", mixer_options={})
    system = nestling.levels(model)
    level = system["model.layers.0.memory.levels.0"]
    assert (
        str(level.frequency) == "1 / 16 tokens" and "|g| ≤ 1" in level.solver.rate and "0.75 (θ − θ₀)" in level.update
    )
    assert sorted({m.kind for m in system.levels[1].memories}) == (kinds or ["in-context level"])
    assert [system[name].kind for name in level.needs] == kinds


@pytest.mark.parametrize(
    ("module", "found"),
    [
        (nn.Conv2d(1, 2, 3), {"conv2d": "convolution"}),
        (nn.Embedding(5, 2), {"embedding": "embedding"}),
        (nn.LayerNorm(3), {"layernorm": "norm"}),
        (nn.PReLU(), {"prelu": "slope"}),
        (nn.Bilinear(2, 2, 2), {"bilinear": "linear map"}),
        (nn.BatchNorm1d(3), {"batchnorm1d": "norm", "running": "running statistics"}),
        (nn.BatchNorm1d(3, affine=False), {"running": "running statistics"}),
        (nn.LSTM(2, 3), {"weights": "recurrent map", "state": "recurrent state"}),
        (nn.GRUCell(2, 3), {"weights": "recurrent map", "state": "recurrent state"}),
        (nn.MultiheadAttention(4, 2), ATTENTION),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=3), ATTENTION),
        (nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.MaxPool1d(2)), {}),
    ],
)  # fmt: skip
def test_modules_of_torch(module, found):
    if not found:
        with pytest.raises(ValueError, match="Sequential holds nothing"):
            nestling.levels(module)
        return
    system = nestling.levels(module)
    assert {m.name: m.kind for m in system.memories} == found
    assert system.coverage.complete


def test_a_transformer_of_torch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    system = nestling.levels(model, adamw(model))
    assert system.coverage.complete
    assert kinds(system, 1) == {"softmax attention"}
    assert system.level_of("layers.1.self_attn.out_proj") == 3


def test_batch_statistics_learn_without_an_optimiser():
    module = nn.BatchNorm1d(3)
    assert str(nestling.levels(module)["running"].frequency) == "1 / step"
    assert nestling.levels(module.eval())["running"].frequency == NEVER


class Fast(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))
        self.inner = nn.Linear(2, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fast, self.head = Fast(), nn.Linear(2, 2)
        self.register_buffer("scale", torch.ones(1))


def test_what_is_unknown_is_shown_as_unknown():
    system = nestling.levels(Net())
    assert {m.name for m in system.memories if m.unknown} == {"fast", "net"}
    assert system["fast"].keys == system["fast"].objective == "?"
    assert system["fast.inner"].kind == "linear map"  # what is inside it is not
    assert not system.coverage.complete and not system.associative
    assert len(system.coverage.unknown) == 2 and system.coverage.parameters == (4, 5)
    assert {f.memory for f in system.findings if f.kind == "unknown"} == {"fast", "net"}
    assert "unknown" in str(system) and "describes" in str(system)


@pytest.fixture
def registry():
    before = dict(_CLASSES)
    yield
    _CLASSES.clear()
    _CLASSES.update(before)


def test_a_parametrised_weight_is_unknown():
    system = nestling.levels(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    assert {m.name: m.kind for m in system.memories}["parametrizations.weight"] == "unknown"


def test_one_function_teaches_a_new_module(registry):
    @describes(Fast)
    def fast(module, place):
        yield place.weights("fast map", ("weight",), retrieval="y = W x", macs=6)
        yield AssociativeMemory(
            place.path("memory"), "in-context memory", "k", "v", "L", frequency=Frequency(1), lifetime="context",
            tensors=(place.state("memory", (2, 2)),), solver=Solver("gradient", "delta rule"), context="sequence",
        )  # fmt: skip
        yield Transfer(place.path(), place.path("memory"), "generation", "keys")

    class Child(Fast):
        pass

    model = nn.Sequential(Child(), Fast())
    system = nestling.levels(model, adamw(model))
    assert system.coverage.complete
    assert {m.name for m in system.levels[0].memories} == {"0.memory", "1.memory"}
    assert system["0"].cost.parameters == 6 and system["0.inner"].kind == "linear map"


def test_a_wrong_description_is_named(registry):
    @describes(Fast)
    def forgets_to_yield(module, place):
        return 3

    with pytest.raises(TypeError, match="description of Fast must yield"):
        nestling.levels(Fast())

    @describes(Fast)
    def yields_a_name(module, place):
        yield "memory"

    with pytest.raises(TypeError, match="description of Fast yielded 'memory'"):
        nestling.levels(Fast())

    @describes(Fast)
    def teaches_nobody(module, place):
        yield place.weights("map", retrieval="", macs=0)
        yield Transfer(place.path(), "nobody", "generation")

    with pytest.raises(ValueError, match="no memory 'nobody'"):
        nestling.levels(Fast())

    @describes(Fast)
    def says_it_twice(module, place):
        yield place.weights("map", retrieval="", macs=0)
        yield place.weights("map", retrieval="", macs=0)

    with pytest.raises(ValueError, match="two memories are named fast"):
        nestling.levels(Fast())
    with pytest.raises(TypeError, match="describes takes"):
        describes(int)
    with pytest.raises(TypeError, match="needs a class"):
        describes()


def test_shared_parameters_are_counted_once_and_shown(gpt2):
    system = nestling.levels(gpt2)
    (tensor,) = system["lm_head"].tensors
    assert tensor.shared_with == "transformer.wte.weight"
    assert system["lm_head"].cost.parameters == 0
    assert [f.memory for f in system.findings if f.kind == "shared"] == ["lm_head"]
    layer = nn.Linear(2, 2)
    twice = nestling.levels(nn.Sequential(layer, nn.ReLU(), layer))
    assert len(twice.memories) == 1 and any("is the module 0 again" in note for note in twice.notes)


def test_frozen_weights_are_a_level_of_their_own(gpt2):
    gpt2.transformer.h[0].requires_grad_(False)
    system = nestling.levels(gpt2, adamw(gpt2))
    assert system.levels[-1].frequency == NEVER
    assert {m.name for m in system.levels[-1].memories} >= {"transformer.h.0.mlp", "transformer.h.0.ln_1"}
    assert system["transformer.h.0.mlp"].solver.kind == "none" and system["transformer.h.0.mlp"].update == "never"
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    half = nestling.levels(layer, adamw(layer))
    assert str(half["linear [weight]"].frequency) == "1 / step" and half["linear [bias]"].frequency == NEVER
    assert half.cost.parameters == 6


def test_without_an_optimiser_no_weight_moves(gpt2):
    system = nestling.levels(gpt2)
    assert [level.frequency for level in system.levels] == [ALWAYS, NEVER]


def test_what_no_optimiser_has_is_found():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    system = nestling.levels(model, torch.optim.SGD(model[0].parameters(), lr=0.1))
    assert [(f.kind, f.memory) for f in system.findings] == [("never moves", "1")]


@pytest.mark.parametrize("wrap", ["compile", "inner compile", "data parallel", "averaged", "checkpoint"])
def test_wrappers_are_looked_through_and_named(wrap):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    if wrap == "compile":
        wrapped, name = torch.compile(model), "torch.compile"
    elif wrap == "inner compile":
        wrapped, name = nn.Sequential(torch.compile(model[0]), nn.ReLU()), "torch.compile"
    elif wrap == "data parallel":
        wrapped, name = nn.DataParallel(model), "DataParallel"
    elif wrap == "averaged":
        wrapped, name = torch.optim.swa_utils.AveragedModel(model), "AveragedModel"
    else:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        wrapped, name = checkpoint_wrapper(model), "activation checkpointing"
    system = nestling.levels(wrapped)
    assert [m.name for m in system.memories] == ["0"] and system["0"].tensors[0].name == "0.weight"
    assert f"read through {name}" in system.notes


def test_a_sharded_model_is_read_as_the_whole(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        plain = nestling.levels(model, adamw(model))
        ddp = DistributedDataParallel(copy.deepcopy(model))
        assert nestling.levels(ddp, adamw(ddp)).levels == plain.levels
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        sharded = nestling.levels(model, adamw(model))
        assert [m.name for m in sharded.memories] == [m.name for m in plain.memories]
        assert sharded.cost == plain.cost and sharded.coverage.complete
        for whole in (True, False):  # the older wrapper: its own flat parameter is named, not guessed at
            module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                old = FullyShardedDataParallel(module, use_orig_params=whole, device_id=torch.device("cpu"))
            system = nestling.levels(old, adamw(old))
            assert "read through FullyShardedDataParallel" in system.notes
            assert system.coverage.complete == whole
            assert whole or "use_orig_params=True" in system.coverage.unknown[0]
    finally:
        dist.destroy_process_group()


def test_a_model_on_the_meta_device_takes_no_memory():
    from nestling.models import HopeForCausalLM, sizes

    with torch.device("meta"):
        model = HopeForCausalLM(sizes.config("1.3b"))
    system = nestling.levels(model, adamw(model))
    assert system.coverage.complete and len(system.levels) == 4
    assert system.cost.parameters == sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((nn.Linear,), TypeError, "model must be a torch.nn.Module.*instance"),
        (({},), TypeError, "model must be"),
        ((nn.Linear(2, 2), torch.optim.SGD), TypeError, "optimizer must be a torch.optim.Optimizer.*instance"),
        ((nn.Linear(2, 2), "adam"), TypeError, "optimizer must be"),
        ((nn.LazyLinear(2),), ValueError, "run the model once"),
    ],
)
def test_wrong_types_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        nestling.levels(*arguments)


def test_wrong_options_are_named():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="trains none of the model's parameters"):
        nestling.levels(model, adamw(nn.Linear(2, 2)))
    for name in ("accumulation", "tokens_per_step", "context_length"):
        with pytest.raises(ValueError, match=name):
            nestling.levels(model, **{name: 0})
    with pytest.raises(TypeError, match="average must be"):
        nestling.levels(model, average=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="other shapes"):
        nestling.levels(model, average=torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)))
    with pytest.raises(TypeError, match="scheduler must be"):
        nestling.levels(model, adamw(model), scheduler="cosine")
