"""The Triton kernels against the float64 definitions, values and all gradients, by Triton's interpreter.

Triton decides when it is imported whether it interprets, so these tests run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from nestling.layers.titans import SelfModifyingTitans
from nestling.memory.fused import MLPStep, by_rule
from nestling.memory.fused_linear import linear_by_rule
from nestling.ops import triton as kernels
from nestling.ops.chunk import Chunk, _decay_table, chunk_reference, decay_table, delta_chunk
from nestling.ops.compiled.linear import LinearStep

INTERPRETED = kernels.is_interpreted()
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_a_process_that_interprets")
SIZES = [(2, 1, 7, 5, 6), (1, 2, 16, 16, 16), (2, 1, 20, 9, 18)]  # memories, heads, tokens, inputs, outputs or hidden
FLAGS = list(product((False, True), repeat=4))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_that_interprets():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (pip install 'nestling[gpu]'): NO KERNEL IS TESTED")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=230)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape):
    return torch.nn.functional.normalize(rand(*shape), dim=-1)


def gate(*shape):
    return torch.rand(*shape, dtype=torch.float64)


def tables(groups, tokens, moves):
    decay = 0.7 + 0.3 * gate(groups, tokens)
    decay[0, tokens // 2] = 0.0  # nothing is divided by a decay
    return _decay_table(decay, gate(groups, tokens) if moves else None)._asdict()


def mlp_arguments(n, groups, tokens, p, h, moves, anchor, reads):
    total, row = n * groups, (groups, tokens, p)
    return MLPStep(
        w2=2 * p**-0.5 * rand(total, h, p), w1=h**-0.5 * rand(total, p, h),
        s2=0.1 * rand(total, h, p) if moves else None,
        s1=0.1 * rand(total, p, h) if moves else None, keys=unit(*row), values=unit(*row),
        queries=unit(*row) if reads else None, eta=gate(groups, tokens),
        mu=gate(groups, tokens) if moves else None,
        **tables(groups, tokens, moves), anchor2=0.3 * rand(total, h, p) if anchor else None,
        anchor1=0.3 * rand(total, p, h) if anchor else None,
    )  # fmt: skip


def linear_arguments(n, groups, tokens, i, o, moves, anchor, reads):
    total, row = n * groups, (groups, tokens, i)
    return LinearStep(
        weight=rand(total, o, i), velocity=0.1 * rand(total, o, i) if moves else None, keys=unit(*row),
        values=unit(*row), queries=unit(*row) if reads else None, eta=gate(groups, tokens),
        mu=gate(groups, tokens) if moves else None,
        **tables(groups, tokens, moves), anchor=rand(total, o, i) if anchor else None,
    )  # fmt: skip


def chunk_arguments(n, groups, tokens, i, o, moves, anchor, reads, erase=True):
    total = n * groups
    return Chunk(
        weight=rand(total, o, i), velocity=rand(total, o, i) if moves else None, products=rand(total, tokens, o),
        keys=unit(total, tokens, i), writes=rand(total, tokens, o), erase=gate(total, tokens) if erase else None,
        **tables(total, tokens, moves), queries=unit(groups, tokens, i) if reads else None,
        anchor=rand(total, o, i) if anchor else None,
    )  # fmt: skip


def run(function, step, after, dtype):
    """Outputs and gradients, by name."""
    step = type(step)(*(None if t is None else t.to(dtype).requires_grad_() for t in step))
    outputs = [o for o in function(step, after) if o is not None]
    torch.manual_seed(1)
    weights = [rand(*o.shape) for o in outputs]
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    names, leaves = zip(*((name, t) for name, t in step._asdict().items() if t is not None), strict=True)
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    for name, grad in zip(names, grads, strict=True):
        found[name] = grad.tril() if name in ("decay", "mixed", "momentum") else grad  # above is no table
    return found


def compare(by_kernels, definition, step, after, allowed=1e-5):
    want, got = run(definition, step, after, torch.float64), run(by_kernels, step, after, torch.float32)
    for name, w in want.items():
        assert (got[name] - w).norm() <= allowed * w.norm() + 1e-6, name


def mlp_step(step, after):
    from nestling.memory.fused_kernels import mlp_step

    return mlp_step(step, after)


def mlp_whole_step(step, after):
    from nestling.memory.fused_kernels import mlp_whole_step

    return mlp_whole_step(step, after)


def linear_step(step, after):
    from nestling.memory.fused_kernels import linear_step

    return linear_step(step, after)


def plain_chunk(step, after):
    return chunk_reference(step, after)


@interpreted
@pytest.mark.parametrize("form", [mlp_step, mlp_whole_step])
@pytest.mark.parametrize("moves, anchor, after, reads", FLAGS)
def test_mlp_step(moves, anchor, after, reads, form):
    torch.manual_seed(0)
    sizes = SIZES[(FLAGS.index((moves, anchor, after, reads)) + (form is mlp_whole_step)) % 3]
    compare(form, by_rule, mlp_arguments(*sizes, moves, anchor, reads), after)


@interpreted
@pytest.mark.parametrize("moves, anchor, after, reads", FLAGS)
def test_linear_step(moves, anchor, after, reads):
    torch.manual_seed(0)
    sizes = SIZES[FLAGS.index((moves, anchor, after, reads)) % 3]
    compare(linear_step, linear_by_rule, linear_arguments(*sizes, moves, anchor, reads), after)


@interpreted
@pytest.mark.parametrize("moves, anchor, after, reads, erase", [(*f, f[2] != f[0] or f[3]) for f in FLAGS])
def test_delta_chunk(moves, anchor, after, reads, erase):
    torch.manual_seed(0)
    sizes = SIZES[(FLAGS.index((moves, anchor, after, reads)) + erase) % 3]
    step = chunk_arguments(*sizes, moves, anchor, reads, erase)
    if not erase:
        step = step._replace(products=None)
    compare(delta_chunk, plain_chunk, step, after)


@interpreted
@pytest.mark.parametrize("tokens", [1, 16, 23])
@pytest.mark.parametrize("moves", [True, False])
def test_decay_table(tokens, moves):
    torch.manual_seed(0)
    decay, momentum = gate(2, 3, tokens), gate(2, 3, tokens) if moves else None
    decay[0, 0, tokens // 2] = 0.0
    found = []
    for form, dtype in ((_decay_table, torch.float64), (decay_table, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in (decay, momentum) if t is not None]
        made = [t for t in form(leaves[0], leaves[1] if moves else None) if t is not None]
        torch.manual_seed(1)
        grads = torch.autograd.grad(made, leaves, [rand(*t.shape).to(dtype) for t in made])
        found.append([*made, *grads])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@interpreted
@pytest.mark.parametrize("limit", [1.0, 100.0])
def test_bounded(limit):
    from nestling.ops.triton.bounded import bounded, plain

    torch.manual_seed(0)
    weight, found = rand(2, 3, 5, 7), []
    for form, dtype in ((plain, torch.float64), (bounded, torch.float32)):
        w = weight.to(dtype).requires_grad_()
        out = form(w, limit)
        found.append([out, *torch.autograd.grad((out**3).sum(), w)])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@interpreted
@pytest.mark.parametrize("sizes", [(2, 1, 64, 16, 1), (2, 1, 5, 3, 1), (1, 2, 17, 7, 5)])
def test_nothing_is_written_outside(sizes, monkeypatch):
    """Every buffer of a step lies among others full of a value that must stay."""
    made, plain = [], torch.Tensor.new_empty

    def guarded(like, *shape, **options):
        if options:  # the interpreter's own
            return plain(like, *shape, **options)
        shape = torch.Size(shape[0] if shape and not isinstance(shape[0], int) else shape)
        whole = plain(like, (shape.numel() + 256,)).fill_(-77.0)
        made.append((whole, shape.numel()))
        return whole[128 : 128 + shape.numel()].view(shape)

    torch.manual_seed(0)
    step = linear_arguments(*sizes, True, True, True)
    step = LinearStep(*(t.float() for t in step))
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(torch, "empty_like", lambda t: guarded(t, t.shape))
    from nestling.ops.triton import linear

    outputs, saved = linear.forward(step, False)
    linear.backward(step, False, saved, *(torch.ones_like(o) for o in outputs))
    assert len(made) > 15
    for whole, size in made:
        assert (whole[:128] == -77).all() and (whole[128 + size :] == -77).all()


@interpreted
def test_like_keys_lose_no_digits():
    """Fully written equal keys: the product (I - L)(I + L^2)... would leave none of float32's digits at 64 tokens."""
    torch.manual_seed(0)
    step = chunk_arguments(1, 1, 64, 16, 16, False, False, True)
    step = step._replace(
        keys=step.keys[:, :1].expand_as(step.keys).contiguous(), erase=0.99 * torch.ones_like(step.erase)
    )
    compare(delta_chunk, plain_chunk, step, False)


@interpreted
@pytest.mark.parametrize("form", [mlp_step, mlp_whole_step])
def test_bf16_inputs_with_float32_state(form):
    torch.manual_seed(0)
    step = mlp_arguments(2, 1, 20, 16, 16, True, True, True)
    rows = ("keys", "values", "queries")

    def rounded(step, after):
        return form(step._replace(**{name: getattr(step, name).bfloat16() for name in rows}), after)

    compare(rounded, by_rule, step, False, allowed=2e-2)


@interpreted
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("own", [False, True])
def test_project(sizes, own):
    """Rows shared by all memories, and rows of their own; bfloat16 rows too."""
    from nestling.ops.triton.project import plain, project

    torch.manual_seed(0)
    n, groups, tokens, p, h = sizes
    given, found = (rand(n * groups, h, p), rand(n * groups, p, h), rand(n * groups if own else groups, tokens, p)), []
    for form, dtype in ((plain, torch.float64), (project, torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        out = form(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for want, got in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()
    rounded = project(given[0].float(), given[1].float(), given[2].bfloat16())
    assert (rounded - found[0][0]).norm() <= 2e-2 * found[0][0].norm()


@interpreted
@pytest.mark.parametrize("form", ["1", "whole"])
@pytest.mark.parametrize("options", [{}, dict(architecture="linear", read="after", momentum=False), dict(gates="mlp")])
def test_a_layer(options, form, monkeypatch):
    """A whole layer, its last chunk cut off, against itself in float64."""
    monkeypatch.setenv("NESTLING_TRITON", form)
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        layer = SelfModifyingTitans(6, 1, chunk_size=5, **options).to(torch.float32).to(dtype)
        x = torch.randn(1, 8, 6).to(dtype).requires_grad_()
        y, _ = layer(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)])
    for want, got in zip(*found, strict=True):
        assert (want is None) == (got is None)
        if want is not None:
            assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7


@interpreted
def test_second_derivatives_are_the_rules():
    torch.manual_seed(0)
    step, found = linear_arguments(1, 1, 5, 4, 4, True, True, True), []
    for function, dtype in ((linear_by_rule, torch.float64), (linear_step, torch.float32)):
        given = LinearStep(*(t.to(dtype).requires_grad_() for t in step))
        reads = function(given, False)[2]
        (slope,) = torch.autograd.grad(reads.square().sum(), given.keys, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), given.weight)[0])
    assert (found[1] - found[0]).norm() <= 1e-5 * found[0].norm()


@interpreted
@pytest.mark.parametrize("kind", ["mlp", "whole", "linear", "chunk", "table"])
def test_compile_sees_one_operator(kind):
    """torch.compile traces the step whole, without a graph break, and its gradients."""
    torch.manual_seed(0)
    if kind == "table":
        step, function = [gate(2, 5), gate(2, 5)], decay_table
    else:
        make = dict(mlp=mlp_arguments, whole=mlp_arguments, linear=linear_arguments, chunk=chunk_arguments)[kind]
        step = make(1, 2, 5, 4, 4, True, True, True)
        form = dict(mlp=mlp_step, whole=mlp_whole_step, linear=linear_step, chunk=delta_chunk)[kind]
        function = lambda *a: form(type(step)(*a), False)  # noqa: E731
    graphs = []

    def record(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    found = []
    for run in (function, torch.compile(function, fullgraph=True, backend=record)):
        leaves = [t.float().requires_grad_() for t in step]
        found.append(torch.autograd.grad(sum(o.sum() for o in run(*leaves)), leaves, allow_unused=True))
    names = dict(mlp="mlp_step", whole="mlp_whole_step", linear="linear_step", chunk="delta_chunk", table="decay_table")
    assert len(graphs) == 1 and sum(f"nestling.{names[kind]}" in target for target in graphs[0]) == 1
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want)
