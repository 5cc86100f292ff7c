"""AdaViT under transforms: gradients of functional calls, of gradients, and of a forward that runs twice."""

import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer
from families import HOSTS
from reference import image, stir

import adaptkit
from adaptkit.adapters.adavit import Random
from adaptkit.seam import reference

SUMS = transformer(4, 32, 17)
BACKWARD = (*SUMS, *SUMS, 3 * 17)


@pytest.fixture
def model():
    torch.manual_seed(1)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), ("adavit", {"first_block": 0, "bottleneck": 2}))
    return stir(model, 0).double().eval()  # no noise, so that what is run again decides the same


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def loss(features):
    return features.logits.square().sum() + sum(features.aux[f"{kind}_keep"].mean() for kind in ("patch", "head"))


def expected(model, x):
    with reference():
        grads = torch.autograd.grad(loss(model(x)), list(trained(model).values()))
    assert all(g.abs().max() > 0 for g in grads)
    return grads


def test_functional_gradients(model):
    x = image(32, 3).double()
    found = torch.func.grad(lambda p: loss(functional_call(model, p, (x,))))(trained(model))
    assert_rounds_to([found[name] for name in trained(model)], expected(model, x), *BACKWARD)


def test_gradients_of_gradients(model):
    x, parameters = image(32, 3).double(), list(trained(model).values())

    def twice():
        grads = torch.autograd.grad(loss(model(x)), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters)

    found = twice()
    with reference():
        assert_rounds_to(found, twice(), *BACKWARD, *BACKWARD)
    assert any(g.abs().max() > 0 for g in found)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_model(model, use_reentrant):
    x = image(32, 3).double().requires_grad_()
    out = checkpoint(lambda x: loss(model(x)), x, use_reentrant=use_reentrant)
    out.backward()
    assert_rounds_to([p.grad for p in trained(model).values()], expected(model, x.detach()), *BACKWARD)


def test_vmap_over_images(model):
    x = image(32, 3).double()
    with torch.no_grad(), model.adapters["adavit"].executing("masked"):
        found = torch.vmap(lambda one: model(one[None]).logits[0])(x)
        assert_rounds_to(found, model(x).logits, *SUMS)


@pytest.mark.parametrize("execution", ["auto", "packed"])
def test_hooks_on_the_gates_and_inside_the_backbone_are_called(model, execution):
    model, seen = model.float(), []
    parts = ("blocks.2.mlp.fc1", "blocks.2.attn.proj")
    for part in parts:
        model.backbone.get_submodule(part).register_forward_hook(lambda *a, part=part: seen.append(part))
    for name, gate in model.adapters["adavit"].gates["2"].named_children():
        gate.register_forward_hook(lambda *a, name=name: seen.append(name))
    with torch.no_grad(), model.adapters["adavit"].executing(execution):
        model(image(32, 2))
    assert set(seen) == {*parts, "patch", "head", "layer"}
    for training in (True, False):
        seen.clear()
        model.train(training)(image(32, 2))
        assert sorted(seen) == sorted([*parts, "patch", "head", "layer"])


@pytest.mark.parametrize("random", [True, False])
def test_checkpointed_blocks_run_again_under_the_decisions_they_had(random):
    def gradients(checkpointed):
        torch.manual_seed(1)
        model = stir(adaptkit.attach(HOSTS["timm-vit"].build(), ("adavit", {"bottleneck": 2})), 0).double().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(2)
        with model.adapters["adavit"].deciding(Random(0.5, 0.6, 0.7) if random else None):
            features = model(image(32, 3).double())
        features.tokens.square().sum().backward()
        return [p.grad for p in trained(model).values() if p.grad is not None]

    plain = gradients(False)
    assert max(g.abs().max() for g in plain) > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), plain, strict=True))


def test_random_decisions_of_a_seed_cannot_be_drawn_twice(model):
    model.gradient_checkpointing_enable()
    with model.train().adapters["adavit"].deciding(Random(0.5, 0.6, 0.7, seed=0)):
        out = model(image(32, 3).double()).tokens.sum()
    with pytest.raises(RuntimeError, match="leave seed out"):
        out.backward()
