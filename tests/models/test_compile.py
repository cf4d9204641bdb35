"""Models under torch.compile, torch.export and torch.func: equal to eager, or refused in a sentence."""

import os

import pytest
import torch

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
