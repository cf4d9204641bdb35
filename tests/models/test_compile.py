"""Models under torch.compile, torch.export and torch.func: equal to eager, or refused in a sentence."""

import os

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nestling.models.hope.levels import give_levels

SLOW = pytest.mark.skipif("NESTLING_SLOW_TESTS" not in os.environ, reason="a minute: NESTLING_SLOW_TESTS=1 runs it")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])


def step(model, call, **options):
    """Loss and gradients."""
    model.train().zero_grad()
    loss = call(IDS, labels=IDS, use_cache=False, **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize(
    "mixer", ["hybrid", *(pytest.param(name, marks=SLOW) for name in ("selfmod", "deltanet", "window"))]
)
def test_a_training_step_is_one_graph(make_model, mixer):
    torch._dynamo.reset()
    model = make_model(mixer)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(model, compiled), step(model, model))


def test_the_cache_is_carried_inside_and_between_graphs(make_model):
    """Also from a compiled call to an eager one, with padding in front."""
    torch._dynamo.reset()
    model = make_model("hybrid")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        first = compiled(IDS[:, :5], attention_mask=mask[:, :5])
        second = model(IDS[:, 5:], past_key_values=first.past_key_values)
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("mixer", ["hope", *(pytest.param(name, marks=SLOW) for name in ("selfmod", "attention"))])
def test_writing_takes_few_graphs_however_long_the_text(make_model, mixer):
    """One inside a chunk, one at its end and one at first: no shape of a token's step depends on what was read."""
    torch._dynamo.reset()
    model, ids = make_model(mixer).eval(), torch.arange(40).remainder(11)[None]
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        cache, found = model(ids[:, :20]).past_key_values, []
        for t in range(20, 40):
            made = compiled(ids[:, t : t + 1], past_key_values=cache)
            cache = made.past_key_values
            found.append(made.logits)
        torch.testing.assert_close(torch.cat(found, 1), model(ids).logits[:, 20:])
    assert graphs.frame_count <= 3


LEVELS = {"cms_levels": [{"chunk_size": 4, "lr": 0.5}, {"chunk_size": None}], "context_length": 64}


@pytest.mark.parametrize("meta_grad", ["full", *(pytest.param(name, marks=SLOW) for name in ("first_order", "none"))])
@pytest.mark.parametrize("rank", [None, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("part", ["model", pytest.param("block", marks=SLOW)])
def test_levels_learn_under_a_compiler_as_without(make_model, part, rank, meta_grad):
    """A graph of one layer is never taken for another's, nor are what two streams have learned."""
    torch._dynamo.reset()
    levels = [{**LEVELS["cms_levels"][0], "rank": rank}, LEVELS["cms_levels"][1]]
    model = make_model(**LEVELS | {"cms_levels": levels, "cms_meta_grad": meta_grad})
    caches = [model(ids).past_key_values for ids in (IDS, IDS.flip(0))]
    expected, compiled = step(model, model), model
    if part == "model":
        compiled = torch.compile(model, backend="aot_eager")
    else:
        for block in model.model.layers:
            block.compile(backend="aot_eager")
    torch.testing.assert_close(step(model, compiled), expected, rtol=0, atol=0)
    for cache in caches:
        with model.adapted(cache), torch.no_grad():
            with torch.compiler.set_stance("force_eager"):
                expected = compiled(IDS, use_cache=False).logits
            torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


def test_levels_under_what_may_not_look_at_values(make_model):
    torch._dynamo.reset()
    model = make_model(**LEVELS)
    with pytest.raises(RuntimeError, match=r"compile without fullgraph=True, or with model\.learning = False"):
        torch.compile(model, backend="eager", fullgraph=True)(IDS)
    with pytest.raises(ValueError, match=r"set model\.learning = False"):
        torch.export.export(model, (IDS,), {"use_cache": False})
    with pytest.raises(ValueError, match=r"set model\.learning = False"):
        torch.func.grad(lambda w: torch.func.functional_call(model, w, (IDS,), {"labels": IDS}).loss)(
            {name: p.detach() for name, p in model.named_parameters()}
        )
    with pytest.raises(TypeError, match="compiled already"):
        give_levels(torch.compile(make_model()), LEVELS["cms_levels"][:1])


@SLOW
def test_generation_with_a_compiled_forward(make_model):
    torch._dynamo.reset()
    model = make_model("selfmod")
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = model.generate(IDS, **how)
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(IDS, **how), expected)


def test_an_exported_model_gives_the_same_logits(make_model, tmp_path):
    model = make_model("hybrid")
    exported = torch.export.export(model, (IDS,), {"use_cache": False})
    torch.export.save(exported, tmp_path / "hope.pt2")
    loaded = torch.export.load(tmp_path / "hope.pt2").module()
    torch.testing.assert_close(loaded(IDS, use_cache=False).logits, model(IDS).logits)


def test_each_samples_gradient(make_model):
    model = make_model("selfmod")
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values, row):
        return torch.func.functional_call(model, values, (row[None],), {"labels": row[None], "use_cache": False}).loss

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, IDS)
    whole = sum(model(row[None], labels=row[None]).loss for row in IDS)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    torch.testing.assert_close([g.sum(0) for g in found.values()], list(expected))


@SLOW
@pytest.mark.parametrize("mixer", ["selfmod", "hybrid", "hybrid of heads"])
def test_inductor(make_model, mixer):
    torch._dynamo.reset()
    model = make_model(mixer).float()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(step(model, compiled), step(model, model), rtol=1e-4, atol=1e-5)
