"""The ways in which people use a model in training, each with every adapter: the gradients are those of the plain way."""

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from errors import assert_rounds_to, one_rounding_off
from reference import image
from test_text import ADAPTERS, FPN, SIDE, SUMS, attach, flat, quiet, scalar, trained
from torch.nn.attention import SDPBackend, sdpa_kernel

import adaptkit

X = image(SIDE)
ONE_OF_EACH = ("vit-adapter", "sfp", "adavit", "dat-add-table", "metaformer-dat", "lora")


def marks(adapter):
    return [] if adapter in ONE_OF_EACH else [pytest.mark.full]


every_adapter = pytest.mark.parametrize("adapter", [pytest.param(a, id=a, marks=marks(a)) for a in ADAPTERS])


def build(adapter, **options):
    """A model in training; what may be dropped is dropped now and then."""
    more = {"drop_path": 0.5} if ADAPTERS[adapter][0] == "vit-adapter" else {}
    return attach(adapter, FPN, **{**more, **options}).train()


def loss(model, x=X):
    torch.manual_seed(1)
    return scalar(flat(model(x)))


def grads(model):
    return [p.grad.clone() for p in trained(model).values()]


def step(model, x=X):
    """The plain way: one forward, one backward."""
    model.zero_grad()
    loss(model, x).backward()
    return grads(model)


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    assert any(g.any() for g in expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def assert_near(found, expected, model):
    assert_rounds_to(found, expected, *SUMS, *SUMS, moved=step(model, one_rounding_off(X)))


# ------------------------------------------------------------------------------------- between forward and backward


CHECKPOINTED = [
    pytest.param(a, way, id=f"{a}-{way}", marks=marks(a))
    for a in ADAPTERS
    for way in ("plain", "checkpoint", "option")
    if way != "option" or ADAPTERS[a][0] == "vit-adapter"
]


def checkpointed(adapter, way):
    model = build(adapter, **({"checkpoint": True} if way == "option" else {}))
    if way == "checkpoint":
        model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize(("adapter", "way"), CHECKPOINTED)
@pytest.mark.parametrize("training", [True, False], ids=["eval-between", "train-between"])
def test_a_change_of_mode_between_forward_and_backward_changes_nothing(adapter, way, training):
    expected = step(checkpointed(adapter, way).train(training))
    model = checkpointed(adapter, way).train(training)
    value = loss(model)
    with torch.no_grad():
        model(X + 1)  # in training it moves the statistics
    model.train(not training)
    modes = [m.training for m in model.modules()]
    value.backward()
    assert_same(grads(model), expected)
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("way", ["plain", "checkpoint", "option"])
def test_so_under_autocast(way):
    expected, found = [], []
    for change, into in ((False, expected), (True, found)):
        model = checkpointed("vit-adapter", way)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model)
        model.train(not change)
        value.backward()
        into += grads(model)
    assert_same(found, expected)


def test_what_decides_in_the_forward_decides_when_it_is_run_again():
    from adaptkit.adapters.adavit import AdaViT

    def of(checkpoint, leave):
        model = checkpointed("adavit", "checkpoint" if checkpoint else "plain")
        gates = AdaViT.of(model)
        with gates.deciding(lambda index, decision: decision._replace(patch=torch.ones_like(decision.patch))):
            value = loss(model)
            if not leave:
                value.backward()
        if leave:
            value.backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(model).values()]

    assert_same(of(True, True), of(False, False))


# --------------------------------------------------------------------------------------------- backward, many times


@every_adapter
def test_gradients_add_up_over_several_backwards(adapter):
    first, second = step(build(adapter)), step(build(adapter), X + 1)
    model = build(adapter)
    loss(model).backward()
    loss(model, X + 1).backward()
    assert_same(grads(model), [a + b for a, b in zip(first, second)])


@every_adapter
def test_a_graph_that_is_retained_gives_the_same_gradients_twice(adapter):
    expected, model = step(build(adapter)), build(adapter)
    value = loss(model)
    value.backward(retain_graph=True)
    assert_same(grads(model), expected)
    model.zero_grad(set_to_none=False)
    value.backward()
    assert_same(grads(model), expected)


@every_adapter
def test_two_forwards_before_one_backward_give_the_sum(adapter):
    first, second = step(build(adapter)), step(build(adapter), X + 1)
    model = build(adapter)
    (loss(model) + loss(model, X + 1)).backward()
    assert_near(grads(model), [a + b for a, b in zip(first, second)], build(adapter))


@every_adapter
def test_a_scaled_loss_has_scaled_gradients(adapter):
    expected, model = step(build(adapter)), build(adapter)
    (loss(model) * 1024).backward()
    assert_near([g / 1024 for g in grads(model)], expected, build(adapter))


# ---------------------------------------------------------------------------------------------- before the training


@every_adapter
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_inference_before_training_changes_nothing(adapter, without):
    expected, model = step(build(adapter)), build(adapter).eval()
    with without():
        model(X)
    assert_same(step(model.train()), expected)


@every_adapter
def test_a_copy_trains_as_its_original_and_leaves_it_alone(adapter):
    expected, model = step(build(adapter)), build(adapter)
    again = copy.deepcopy(model)
    assert_same(step(again), expected)
    assert all(p.grad is None for p in model.parameters())
    assert_same(step(model), expected)


@every_adapter
@pytest.mark.parametrize("odd", [0, 1])
def test_what_is_frozen_gets_no_gradient_and_the_rest_keeps_its_own(adapter, odd):
    model = build(adapter)
    parameters = list(trained(model).values())
    expected = step(build(adapter))[odd::2]
    for p in parameters[1 - odd :: 2]:
        p.requires_grad_(False)
    found = step(model)
    assert all(p.grad is None for p in parameters[1 - odd :: 2])
    moved = step(build(adapter), one_rounding_off(X))[odd::2]
    assert_rounds_to(found, expected, *SUMS, *SUMS, moved=moved)


# -------------------------------------------------------------------------------------------------- other quantities


@every_adapter
def test_the_gradient_of_the_image_is_that_of_the_reference(adapter):
    model = build(adapter).eval()

    def of(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(model, x), x)[0]

    found = of(X)
    with adaptkit.reference():
        assert_rounds_to(found, of(X), *SUMS, *SUMS, moved=of(one_rounding_off(X)))


@every_adapter
def test_autocast_around_forward_and_backward_gives_the_gradients_of_autocast_around_the_forward(adapter):
    found = []
    for around in (False, True):
        model = build(adapter)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(model)
            if around:
                value.backward()
        if not around:
            value.backward()
        found.append(grads(model))
    assert all(g.isfinite().all() for g in found[1])
    assert_rounds_to(*found, *SUMS, *SUMS, dtype=torch.bfloat16)


@every_adapter
def test_a_batch_of_no_images_has_empty_outputs(adapter):
    model = build(adapter).eval()
    with torch.no_grad():
        assert [len(t) for t in flat(model(X[:0]))] == [0] * len(flat(model(X)))


@every_adapter
def test_two_threads_train_two_models_as_each_trains_alone(adapter):
    """In eval mode: what is drawn comes from one generator for all threads."""
    images = [X, X + 1]
    expected = [step(build(adapter).eval(), x) for x in images]
    models, found = [build(adapter).eval() for _ in images], {}

    def work(i):
        found[i] = [step(models[i], images[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for each in found[i]:
            assert_same(each, expected[i])


# ------------------------------------------------------------------------------------------------------- not a number

MOVED = [a for a in ADAPTERS if "dat" in a or a in ("vit-adapter", "metaformer-msda")]


@pytest.mark.parametrize("adapter", MOVED)
def test_an_offset_that_is_not_a_number_makes_the_loss_not_a_number_and_backward_ends(adapter):
    model = build(adapter)
    offsets = [p for n, p in trained(model).items() if "offset" in n and p.ndim > 1]
    assert offsets
    with torch.no_grad():
        for p in offsets:
            p.fill_(torch.nan)
    value = loss(model)
    assert value.isnan()
    value.backward()
    assert any(p.grad.isnan().any() for p in trained(model).values())


# ------------------------------------------------------------------------------------------------------ forward mode


@every_adapter
def test_a_tangent_is_the_derivative_along_it_or_is_refused(adapter):
    """torch's flash attention refuses; its formula has a tangent, and it is the one that gradients give."""
    model = quiet(build(adapter)).eval()
    parameters = trained(model)
    along = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for n, p in parameters.items()}
    values = {n: p.detach() for n, p in parameters.items()}

    def of(values):
        torch.manual_seed(1)
        return scalar(flat(torch.func.functional_call(model, values, (X,))))

    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(of, (values,), (along,))
    with adaptkit.reference():
        expected = [
            torch.stack([(g * v).sum() for g, v in zip(step(model, x), along.values())])
            for x in (X, one_rounding_off(X))
        ]
    terms = sum(p.numel() for p in parameters.values())
    largest = float(expected[0].abs().sum())
    assert_rounds_to(tangent, expected[0].sum(), *SUMS, *SUMS, terms, magnitude=largest, moved=expected[1].sum())
