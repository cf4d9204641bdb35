"""What a call gives goes in with the call: nothing is written to shared modules, and no argument is passed over."""

import copy
import gc
import inspect
import multiprocessing
import os
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import nestling
from nestling import HopeConfig, HopeForCausalLM, Level, stack_levels
from nestling.cms.fast_linear import FastLinear, applied
from streams import read

SLOW = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="a minute: NESTLING_SLOW_TESTS=1 runs it")
TWO = [Level(4, lr=0.5), Level(8, lr=0.25, optimizer="dgd")]


def hope():
    torch.manual_seed(0)
    levels = [*(level.to_dict() for level in TWO), {"chunk_size": None}]
    config = HopeConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, cms_levels=levels,
                        mixer="selfmod")  # fmt: skip
    return HopeForCausalLM(config).eval()


@pytest.fixture(params=["depth", "width", "hope"])
def model(request, make):
    return hope() if request.param == "hope" else stack_levels(make(dtype=torch.float32), TWO, request.param)


def streams(count, length=21):
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(31, (1 + i % 2, length), generator=generator) for i in range(count)]


@pytest.mark.parametrize("count, reads", [(2, 12), pytest.param(4, 100, marks=SLOW)])
def test_threads_read_as_if_one_after_the_other(model, count, reads):
    """So many threads and reads of each, one of them through `adapted` now and then: bit for bit as in a row."""
    texts = streams(10, 13)
    cache = read(model, texts[0])[1]

    @torch.no_grad()
    def answer(n):
        if n % 5:
            return model(texts[n % 10]).logits
        with model.adapted(cache):
            return model(texts[n % 10]).logits

    want = [answer(n) for n in range(10)]
    wrong = []

    def work(first):
        try:
            wrong.extend(n for n in range(first, count * reads, count) if not torch.equal(answer(n), want[n % 10]))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


def test_sharded_weights_are_read_whole_or_refused(model, ids):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    _, cache = expected = read(model, ids[:, :20])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        blocks, mesh = copy.deepcopy(model), dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        assert torch.equal(read(model, ids[:, :20])[0], expected[0])
        model.reshard()
        with pytest.raises(ValueError, match=r"weights are sharded \(FSDP2\).* read through its forward"):
            model.finish(cache)
        for block in blocks.model.layers:
            fully_shard(block, mesh=mesh)
        with pytest.raises(ValueError, match="fully_shard the model alone and not its blocks"):
            fully_shard(blocks, mesh=mesh)(ids)
    finally:
        dist.destroy_process_group()


def snapshot(model):
    """What shared modules hold: attributes, classes and flags (buffers and parameters by identity and by value)."""
    found = {}
    for name, module in model.named_modules():
        found[name] = (type(module), {k: id(v) for k, v in vars(module).items()})
    return found, {n: (id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()}


def test_a_call_writes_nothing_to_shared_modules(model, ids):
    before, weights = snapshot(model), copy.deepcopy(model.state_dict())
    _, cache = read(model, ids, [7])
    with model.adapted(cache), torch.no_grad():
        model(ids)
    with pytest.raises(ValueError, match="2 streams"), model.adapted(cache):
        model(torch.cat([ids, ids[:1]]))
    model(ids)  # with an outer gradient
    assert snapshot(model) == before
    assert all(torch.equal(v, weights[n]) for n, v in model.state_dict().items())


def test_no_class_is_exchanged_at_run_time():
    from pathlib import Path

    folder = Path(nestling.__file__).parent
    assert not [p for p in folder.rglob("*.py") if ".__class__ =" in p.read_text() or ".__class__, " in p.read_text()]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_one_class_serves_every_family(make, ids, family):
    original = make(family, torch.float32)
    model = stack_levels(original, TWO)
    assert type(model) is nestling.cms.StackedForCausalLM and model.original is type(original)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(copied) is type(model) and copied.learner.backbone.model is copied
        assert torch.equal(read(copied, ids)[0], read(model, ids)[0])
    assert model.vocab_size == original.vocab_size and model._no_split_modules == original._no_split_modules
    assert model.state_dict().keys() == original.state_dict().keys()


def test_a_saved_object_loads(model, ids, tmp_path):
    torch.save(model, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(read(loaded, ids)[0], read(model, ids)[0])


def answer_in_another_process(model, ids, queue):
    torch.set_num_threads(1)
    queue.put(read(model, ids)[0].numpy())


def test_a_model_goes_to_a_spawned_worker(make, ids):
    model = stack_levels(make(), TWO)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=answer_in_another_process, args=(model, ids, queue))
    worker.start()
    got = torch.from_numpy(queue.get(timeout=120))
    worker.join()
    torch.testing.assert_close(got, read(model, ids)[0], rtol=1e-12, atol=1e-12)


def test_adapted_models_nest(make, ids):
    first, second = stack_levels(make(), TWO), stack_levels(make(), TWO)
    one, two = read(first, ids[:1])[1], read(second, ids[1:])[1]
    with torch.no_grad():
        with first.adapted(one):
            want = first(ids).logits
        with second.adapted(two), first.adapted(one):
            assert torch.equal(first(ids).logits, want) and not second.reads
        with first.adapted(one), second.adapted(two):
            assert torch.equal(first(ids).logits, want)
        assert first.reads and second.reads


# hooks and adapters


def linear(model):
    return model.model.layers[-1].mlp.down_proj


@pytest.mark.parametrize("where", [lambda m: m, lambda m: m.model, linear])
def test_hooks_of_accelerate_are_refused_by_name_before_and_work_after(make, ids, where):
    hooks = pytest.importorskip("accelerate.hooks")

    class CountingHook(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hooked = make()
    hooks.add_hook_to_module(where(hooked), CountingHook())
    with pytest.raises(TypeError, match="the hook CountingHook"):
        stack_levels(hooked, TWO)
    model, hook = stack_levels(make(), TWO), CountingHook()
    want, _ = read(model, ids)
    hooks.add_hook_to_module(where(model), hook)
    got, cache = read(model, ids)
    assert torch.equal(got, want) and [s.updates for s in cache.levels.levels] == [10, 5]
    assert where(model) is model.model or hook.calls


def test_hooks_on_other_modules_go_on_working(make, ids):
    hooks = pytest.importorskip("accelerate.hooks")
    model = make()
    hooks.add_hook_to_module(model.model.layers[0].self_attn.q_proj, hooks.ModelHook())
    calls = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    _, cache = read(stack_levels(model, TWO), ids)
    assert calls and [s.updates for s in cache.levels.levels] == [10, 5]


def test_mixed_precision_of_accelerate(make, ids):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # a process has one, which a Trainer may have made
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare(make(dtype=torch.float32))
    with pytest.raises(TypeError, match="forward"):
        stack_levels(prepared, TWO)
    model = accelerator.prepare(stack_levels(make(dtype=torch.float32), TWO))
    logits, cache = read(model, ids)
    assert logits.isfinite().all() and [s.updates for s in cache.levels.levels] == [10, 5]
    model(ids, labels=ids).loss.backward()
    assert linear(model).weight.grad.isfinite().all()


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_proj", "up_proj", "down_proj", "q_proj"]])
@pytest.mark.parametrize("chosen", [None, ["down_proj"], r"mlp\.(up|down)_proj"])
@pytest.mark.parametrize("placement", ["depth", "width"])
def test_adapters_keep_their_layers(make, ids, targets, chosen, placement):
    """Base layers only become levels, under their own names; the adapter goes on being applied."""
    peft = pytest.importorskip("peft")
    if placement == "width" and chosen is not None:
        return
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
    torch.manual_seed(3)
    plain, adapted = make(), make()
    adapted.add_adapter(config)
    with torch.no_grad():
        want = adapted(ids[:, :4]).logits
        assert not torch.allclose(want, plain(ids[:, :4]).logits)
    of_plain = stack_levels(plain, TWO, placement, target_modules=chosen, blocks=[2, 3])
    model = stack_levels(adapted, TWO, placement, target_modules=chosen, blocks=[2, 3])
    count = [len(level) for level in of_plain.learner.modules]
    assert [len(level) for level in model.learner.modules] == count
    fast = {m for level in model.learner.modules for m in level}
    assert not [n for n, m in model.named_modules() if m in fast and "lora" in n]
    got, cache = read(model, ids)
    torch.testing.assert_close(got[:, :4], want, rtol=1e-6, atol=1e-8)
    assert [s.updates for s in cache.levels.levels] == [10, 5]


def test_an_adapter_may_come_after_the_levels(make, ids):
    peft = pytest.importorskip("peft")
    model = stack_levels(make(), TWO)
    want, _ = read(model, ids)
    model.add_adapter(peft.LoraConfig(target_modules=["down_proj"]))  # begins at zero
    got, cache = read(model, ids)
    assert torch.equal(got, want) and [s.updates for s in cache.levels.levels] == [10, 5]


# keywords


@pytest.mark.parametrize("learning", [True, False])
def test_the_loss_is_the_originals(model, ids, learning):
    """num_items_in_batch, shift_labels: what the loss of the logits gives, learning or not."""
    model.learning = learning
    logits = model(ids).logits
    labels, shifted = ids.clone(), torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    labels[0, :5] = -100
    for given in ({"num_items_in_batch": 392}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": shifted}):
        want = model.loss_function(logits, labels, vocab_size=31, **given)
        torch.testing.assert_close(model(ids, labels=labels, **given).loss, want)


def test_return_dict_and_use_cache(model, ids):
    with torch.no_grad():
        want = model(ids)
        logits, cache = model(ids, return_dict=False)
        assert torch.equal(logits, want.logits) and type(cache) is type(want.past_key_values)
        assert model(ids, use_cache=False).past_key_values is None
        model.config.use_cache = False
        assert model(ids).past_key_values is None
        assert model(ids, use_cache=True).past_key_values is not None


POSITIONS = torch.arange(41)
REFUSED = [
    (dict(lables=1), TypeError, "did you mean labels"),
    (dict(attention_msk=1), TypeError, "did you mean attention_mask"),
    (dict(output_hidden_states=[9]), ValueError, "output_hidden_states"),
    (dict(inputs_embeds=torch.zeros(2, 41, 16)), ValueError, "input"),
    (dict(position_ids=(POSITIONS + POSITIONS // 20)[None]), ValueError, "position_ids"),
    (dict(position_ids=POSITIONS[None] + 3), ValueError, "position_ids"),
    (dict(position_ids=POSITIONS[None, :-1]), ValueError, "position_ids"),
    (dict(attention_mask=torch.ones(2, 40)), ValueError, "attention_mask"),
    (dict(attention_mask=torch.ones(1, 41)), ValueError, "attention_mask"),
    (dict(attention_mask=torch.ones(2, 1, 41, 41)), ValueError, "attention_mask"),
    (dict(cu_seq_lens_q=torch.tensor([0, 20, 41])), ValueError, "cu_seq_lens_q"),
    (dict(unheard_of=1), TypeError, "unheard_of"),
]


@pytest.mark.parametrize("given, error, word", REFUSED)
def test_what_cannot_be_done_while_learning_is_refused_by_name(model, ids, given, error, word):
    with pytest.raises(error, match=word):
        model(ids, **given)


@pytest.mark.parametrize("name", ["lables", "attention_msk", "positions_ids", "use_cach"])
def test_a_misspelt_name_is_refused_without_learning_too(model, ids, name):
    model.learning = False
    with pytest.raises(TypeError, match="did you mean"):
        model(ids, **{name: 1})


def test_keywords_that_change_nothing_are_taken(model, ids):
    with torch.no_grad():
        want = model(ids).logits
        for given in (dict(position_ids=POSITIONS[None]), dict(attention_mask=torch.ones_like(ids))):
            assert torch.equal(model(ids, **given).logits, want)
        cache = model(ids[:, :20]).past_key_values
        got = model(ids[:, 20:], past_key_values=cache, position_ids=POSITIONS[None, 20:],
                    attention_mask=torch.ones_like(ids)).logits  # fmt: skip
    torch.testing.assert_close(got, want[:, 20:], rtol=1e-4, atol=1e-5)


def test_every_keyword_of_the_original_forward_is_known(make):
    from nestling.cms.arguments import NAMES

    theirs = set(inspect.signature(LlamaForCausalLM.forward).parameters) - {"self", "kwargs"}
    assert theirs <= set(NAMES)


def test_a_cache_that_cannot_carry_levels_is_not_begun_anew_in_silence(make, ids):
    model, cache = stack_levels(make(), TWO), DynamicCache()
    with torch.no_grad():
        out = model(ids[:, :20], past_key_values=cache)
        assert torch.equal(
            model(ids[:, 20:], past_key_values=out.past_key_values).logits, read(model, ids, [20])[0][:, 20:]
        )
        with pytest.raises(ValueError, match="filled without levels"):
            model(ids[:, 20:], past_key_values=cache)


# inference mode


def test_inference_mode_learns_as_no_grad_does(model, ids):
    want, _ = read(model, ids, [9])
    with torch.inference_mode():
        first = model(ids[:, :9].clone(), use_cache=True)
        second = model(ids[:, 9:].clone(), past_key_values=first.past_key_values)
        text = model.generate(ids[:, :11], max_new_tokens=9, num_beams=2, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.cat([first.logits, second.logits], 1), want)
    assert torch.equal(
        model.generate(ids[:, :11], max_new_tokens=9, num_beams=2, do_sample=False, pad_token_id=0), text
    )


def test_weights_of_inference_mode_are_refused(make, ids):
    with torch.inference_mode():
        model = stack_levels(make(), TWO)
        with pytest.raises(ValueError, match="inference_mode"):
            model(ids)


def test_a_fast_layer_is_let_go_with_its_model(make, ids):
    model = stack_levels(make(), TWO)
    read(model, ids)
    del model
    gc.collect()
    assert not [m for m in gc.get_objects() if type(m) is FastLinear]


def test_a_compiled_layer_never_forgets_the_differences_of_a_call():
    torch._dynamo.reset()
    layer = FastLinear(4, 3, bias=False)
    compiled = torch.compile(layer, backend="eager")
    x, delta = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    plain = compiled(x)
    with applied([layer], [delta]):
        torch.testing.assert_close(compiled(x), x @ (layer.weight + delta).mT)
    torch.testing.assert_close(compiled(x), plain)
