"""Which of the two runs, the text or the fast path; and that both say the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from errors import assert_rounds_to
from fast_paths import Example, gathered

import adaptkit
from adaptkit import seam

EXAMPLES = gathered()
CALLS = [
    pytest.param(text, e, id=f"{text.removeprefix('adaptkit.')}-{e.id}") for text in EXAMPLES for e in EXAMPLES[text]
]
every = pytest.mark.parametrize(("text", "example"), CALLS)


# ------------------------------------------------------------------------------------------- each against its text


def test_every_fast_path_has_examples():
    assert set(seam.fast_paths()) == set(EXAMPLES)


def inputs(args) -> list[Tensor]:
    """Tensors of a call, parameters among them, that want a gradient."""
    found = []
    for arg in tree_leaves(args):
        found += list(arg.parameters()) if isinstance(arg, nn.Module) else [arg] if isinstance(arg, Tensor) else []
    return [t for t in found if t.requires_grad]


def outcome(run, example: Example, dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for weights that differ from number to number."""
    args = example.make(dtype=dtype)
    torch.manual_seed(1)  # dropped paths
    with torch.set_grad_enabled(example.training):
        out = [t for t in tree_leaves(run(*args)) if isinstance(t, Tensor)]
    wanted = inputs(args) if example.training else []
    if not wanted:
        return out, []
    grads = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64).to(t)
        for i, t in enumerate(out)
    ]
    pairs = [(t, g) for t, g in zip(out, grads) if t.requires_grad]
    return out, list(torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True))


@every
def test_a_fast_path_says_what_its_text_says(text, example):
    path = seam.fast_paths()[text]
    args = example.make(dtype=torch.float32)
    assert seam.may_be_fast(args)
    with torch.set_grad_enabled(example.training):
        assert path.is_supported(*args)
    exact, exact_grads = outcome(path.text, example, torch.float64)
    fast, grads = outcome(path.run, example, torch.float32)
    assert_rounds_to(fast, exact, *example.sums)
    rows = max([t.numel() // max(1, t.shape[-1]) for t in exact], default=1)
    largest = max([float(g.abs().max()) for g in exact_grads], default=0.0)
    for found, wanted in zip(grads, exact_grads, strict=True):
        own = float(wanted.abs().max())
        magnitude = own if own > 1e-9 * largest else largest  # else all terms of a sum cancel, as before a BatchNorm
        assert_rounds_to(
            found, wanted, *(example.backward or (*example.sums, *example.sums, rows)), magnitude=magnitude
        )


differentiated = pytest.mark.parametrize(("text", "example"), [c for c in CALLS if c.values[1].training])


@differentiated
def test_a_backward_that_is_called_inside_of_autocast_is_that_outside(text, example):
    """A fast path runs without autocast. What autograd itself multiplies for it would round to bfloat16."""
    path, found = seam.fast_paths()[text], []
    for inside in (False, True):
        args = example.make(dtype=torch.float32)
        torch.manual_seed(1)  # dropped paths
        out = [t for t in tree_leaves(path.run(*args)) if isinstance(t, Tensor) and t.requires_grad]
        total = sum(t.square().sum() for t in out)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found.append(torch.autograd.grad(total, inputs(args), materialize_grads=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every
def test_other_dtypes_get_the_text(text, example):
    path, args = seam.fast_paths()[text], example.make(dtype=torch.float64)
    with torch.set_grad_enabled(example.training):
        assert not (seam.may_be_fast(args) and path.is_supported(*args))


def second(run, example: Example, dtype) -> list[Tensor]:
    """Gradients of the squared gradients."""
    args = example.make(dtype=dtype)
    torch.manual_seed(1)  # dropped paths
    out = [t for t in tree_leaves(run(*args)) if isinstance(t, Tensor) and t.requires_grad]
    wanted = inputs(args)
    grads = torch.autograd.grad([t.square().sum() for t in out], wanted, create_graph=True, materialize_grads=True)
    squares = sum(g.square().sum() for g in grads)
    return [g.detach() for g in torch.autograd.grad(squares, wanted, materialize_grads=True)]


@differentiated
def test_second_derivatives_are_those_of_the_text(text, example):
    """In float32 both are as far from float64 as rounding takes them; a wrong derivative is off by its own size."""
    path = seam.fast_paths()[text]
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        exact = second(path.text, example, torch.float64)
        largest = max(float(g.norm()) for g in exact)
        with seam.reference():
            plain = second(path.text, example, torch.float32)
        for wanted, by_text, by_path in zip(exact, plain, second(path.run, example, torch.float32), strict=True):
            rounding = float((by_text - wanted).norm()) + 1e-5 * float(wanted.norm()) + 1e-7 * largest
            assert float((by_path - wanted).norm()) <= 20 * rounding


# ------------------------------------------------------------------------------------------------- the predicate


class Doubled(nn.Module):
    """A text with a fast path that gives itself away."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    @seam.accelerated
    def forward(self, x):
        return self.inner(x) * 0 + 1.0


Doubled.__module__ = "adaptkit.test"  # as if it were ours


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(seam, "_registered", dict(seam._registered))
    seam.fast_path(Doubled.forward)(lambda self, x: torch.full_like(x, 2.0))
    return Doubled()


def is_fast(model, x=None) -> bool:
    out = model(torch.zeros(1, 2) if x is None else x)
    return bool((out == 2).all())


def test_plain_calls_are_fast(model):
    assert is_fast(model)
    assert is_fast(model, torch.zeros(1, 2, requires_grad=True))


def test_reference_runs_the_text_and_ends(model):
    with adaptkit.reference():
        assert not is_fast(model)
    assert is_fast(model)


def test_the_environment_variable_runs_the_text():
    code = "from adaptkit import seam; print(seam.is_reference())"
    for value, wanted in (("1", "True"), ("0", "False"), ("", "False")):
        env = {**os.environ, "ADAPTKIT_REFERENCE": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_run_the_text(model, dtype):
    assert not is_fast(model.to(dtype), torch.zeros(1, 2, dtype=dtype))


def test_autocast_runs_the_text(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fast(model)


def test_hooks_are_called(model):
    seen = []
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        handle = getattr(model.inner, register)(lambda *a: seen.append(register))
        assert not is_fast(model, torch.zeros(1, 2, requires_grad=True))
        handle.remove()
        assert is_fast(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *a: seen.append("global"))
    assert not is_fast(model)
    handle.remove()
    assert seen.count("register_forward_hook") == 1
    assert "global" in seen


def test_another_layer_in_the_place_of_ours_runs(model):
    class Other(nn.Linear):
        pass

    model.inner = Other(2, 2)
    assert not is_fast(model)
    model.inner = nn.Linear(2, 2)
    assert is_fast(model)
    nn.utils.parametrizations.weight_norm(model.inner)
    assert not is_fast(model)
    model.inner = nn.Linear(2, 2)
    model.inner.forward = lambda x: x
    assert not is_fast(model)
    model.inner = nn.Linear(2, 2)
    model.inner.compile(backend="eager")
    assert not is_fast(model)


def test_a_subclass_of_the_user_runs_its_own(model):
    class Mine(Doubled):
        pass

    assert not is_fast(Mine())


def test_transforms_and_modes_run_the_text(model):
    x = torch.zeros(2)
    assert torch.equal(torch.func.vmap(model)(x[None]), torch.ones(1, 2))
    assert torch.equal(torch.func.jvp(model, (x,), (x,))[0], torch.ones(2))
    with FlopCounterMode(display=False) as counter:
        assert not is_fast(model)
    assert counter.get_total_flops() > 0
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not seam.may_be_fast((mode.from_tensor(x),))
    with seam.reference():
        text = torch.jit.trace(model, x, check_trace=False)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), text(x))
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), torch.ones(2))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), torch.ones(2))


def test_a_subclass_of_tensor_gets_the_text(model):
    class Mine(Tensor):
        pass

    assert not is_fast(model, torch.zeros(1, 2).as_subclass(Mine))


def test_a_checkpoint_computes_again_what_it_computed(model):
    seen = []

    def run(x):
        seen.append(is_fast(model, x.detach()))
        return x * 2

    x = torch.zeros(1, 2, requires_grad=True)
    with adaptkit.reference():
        y = checkpoint(seam.bound(run), x, use_reentrant=False)
    y.sin().sum().backward()
    assert set(seen) == {False}


# ----------------------------------------------------------------------------------------------- what a text may ask


def test_a_text_can_ask_whether_reading_a_number_waits():
    x = torch.zeros(2)
    assert not seam.must_wait(x)
    assert seam.must_wait(x.to("meta"))
    with seam.reference():
        assert seam.must_wait(x)


def test_a_text_can_ask_whether_it_is_traced():
    class Asks(nn.Module):
        def forward(self, x):
            return x + 1 if seam.is_traced() else x - 1

    model, x = Asks(), torch.zeros(2)
    assert torch.equal(model(x), -torch.ones(2))
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), torch.ones(2))
    assert torch.equal(torch.export.export(model, (x,)).module()(x), torch.ones(2))
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), torch.ones(2))


def test_only_what_really_runs_can_be_timed():
    x = torch.zeros(2)
    assert seam.is_timeable(x)
    assert not seam.is_timeable(x.to("meta"))
    with FlopCounterMode(display=False):
        assert not seam.is_timeable(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not seam.is_timeable(mode.from_tensor(x))


def test_full_precision_switches_autocast_off_and_on_again():
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        with seam.full_precision(x):
            assert layer(x).dtype == seam.product_dtype(x) == torch.float32
        assert layer(x).dtype == seam.product_dtype(x) == torch.bfloat16
    with seam.full_precision(x):
        assert layer(x).dtype == torch.float32


# ------------------------------------------------------------------------------------- derivatives of derivatives


def softened(x, weight, scale):
    """A text of two outputs, tanh(scale x w) and its square."""
    y = (scale * x @ weight).tanh()
    return y, y.square()


class Softened(torch.autograd.Function):
    """A fast path for it, with a backward pass that autograd cannot look into."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return softened(x, weight, scale)

    @staticmethod
    def backward(ctx, grad_y, grad_square):
        if torch.is_grad_enabled():
            return seam.twice(softened, (*ctx.saved_tensors, ctx.scale), grad_y, grad_square)
        x, weight = (t.detach() for t in ctx.saved_tensors)
        y = (ctx.scale * x @ weight).tanh()
        grad = ctx.scale * (grad_y + 2 * y * grad_square) * (1 - y.square())
        return grad @ weight.mT, x.mT @ grad, None


def numbers(*shapes):
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


def fast_softened(x, weight):
    return Softened.apply(x, weight, 0.5)


def test_a_fast_path_has_second_and_third_derivatives_by_its_text():
    leaves = numbers((3, 2), (2, 4))
    assert torch.autograd.gradcheck(fast_softened, leaves)
    assert torch.autograd.gradgradcheck(fast_softened, leaves)

    def gradients(*leaves):
        return torch.autograd.grad(fast_softened(*leaves)[1].sum(), leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(gradients, leaves)


def test_an_output_without_a_gradient_and_an_input_that_wants_none_are_left_out():
    x, weight = numbers((3, 2), (2, 4))
    _, square = fast_softened(x, weight.detach())
    (found,) = torch.autograd.grad(square.sum(), x, create_graph=True)
    _, expected_square = softened(x, weight.detach(), 0.5)
    (expected,) = torch.autograd.grad(expected_square.sum(), x, create_graph=True)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(g.sin().sum(), x)[0] for g in (found, expected)))


def test_what_one_argument_owes_to_another_is_counted_once():
    """The weight is made of x, and the path is taken twice with one weight: its text must not look behind its inputs."""

    def loss(run, x):
        weight = x.mT.sin()
        y, square = run(run(x, weight)[0] @ weight.mT, weight)
        return (y * square).sum()

    (x,) = numbers((3, 3))
    results = []
    for run in (fast_softened, lambda x, w: softened(x, w, 0.5)):
        (first,) = torch.autograd.grad(loss(run, x), x, create_graph=True)
        results += [first, *torch.autograd.grad(first.square().sum(), x)]
    torch.testing.assert_close(results[:2], results[2:])


def test_parameters_of_a_module_are_arguments_of_its_text():
    layer = nn.Sequential(nn.Linear(2, 3), nn.Tanh()).double()
    names = [n for n, _ in layer.named_parameters()]

    def text(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    class Fast(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return text(*args)

        @staticmethod
        def backward(ctx, grad):
            assert torch.is_grad_enabled()
            return seam.twice(text, ctx.saved_tensors, grad)

    leaves = numbers((4, 2)) + list(layer.parameters())
    assert torch.autograd.gradgradcheck(Fast.apply, leaves)


def test_the_text_of_a_second_derivative_takes_no_fast_path(model):
    """Else a fast path, whose backward asks its text, would ask itself."""
    x = torch.zeros(1, 2, requires_grad=True)
    seen = []
    seam.twice(lambda x: (seen.append(is_fast(model)), x * 2)[1], (x,), torch.ones(1, 2))
    assert seen == [False]
