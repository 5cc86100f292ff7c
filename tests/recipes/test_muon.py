"""Muon: orthogonal updates for matrices and kernels, AdamW for the rest, in one optimiser."""

import argparse
import copy

import pytest
import torch
import torchvision
from torch import nn

import adaptkit
from adaptkit.create import create_backbone
from recipes.muon import Muon, matrices, orthogonal
from recipes.optimising import optimizer_of, schedule_of

ASKED = argparse.Namespace(optimizer="muon", lr=1e-2, weight_decay=0.1, layer_decay=1.0, schedule="cosine",
                           steps=20, warmup=0.1)  # fmt: skip


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 3, stride=2), nn.BatchNorm2d(24), nn.Conv2d(24, 24, 3, groups=24), nn.GELU(),
                         nn.Conv2d(24, 32, 1), nn.Flatten(), nn.Linear(32 * 25, 48), nn.Linear(48, 5))  # fmt: skip


def trained(model, optimizer, steps, seed=1):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 15, 15, generator=g)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_the_orthogonal_update_keeps_singular_vectors_and_has_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    update = orthogonal(matrix)
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.5
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    within = u.T @ update @ v.T  # in its own singular vectors it is diagonal
    torch.testing.assert_close(within, torch.diag(within.diag()), atol=1e-4, rtol=0)


def test_matrices_are_trained_weights_of_dense_layers_that_are_large_enough():
    model = network()
    model.add_module("frozen", nn.Linear(32, 32).requires_grad_(False))
    model.add_module("table", nn.Embedding(32, 32))
    model.add_module("deformable", torchvision.ops.DeformConv2d(16, 16, 3))
    names = {n for n, p in model.named_parameters() if id(p) in matrices(model)}
    assert names == {
        "0.weight",
        "4.weight",
        "6.weight",
        "deformable.weight",
    }  # no kernel of one channel, no classifier of five classes


def test_two_steps_are_the_equations_and_a_kernel_is_its_matrix():
    start, gradients = torch.randn(20, 6, 3, 3), [torch.randn(20, 6, 3, 3) for _ in range(2)]
    p, mean, want = nn.Parameter(start.clone()), torch.zeros(20, 54), start.flatten(1).clone()
    optimizer = Muon([{"params": [p], "orthogonal": True}], lr=0.1, weight_decay=0.2)
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        g = gradient.flatten(1)
        mean = 0.95 * mean + 0.05 * g
        want = want - 0.1 * 0.2 * want - 0.1 * 0.2 * 54**0.5 * orthogonal(0.05 * g + 0.95 * mean)
    torch.testing.assert_close(p.detach().flatten(1), want, atol=1e-5, rtol=1e-5)


def test_everything_else_learns_by_adamw_to_the_bit():
    one, other = network(), network()
    for model in (one, other):
        for name in ("0.weight", "4.weight", "6.weight"):
            model.get_parameter(name).requires_grad_(False)
    adamw = argparse.Namespace(**{**vars(ASKED), "optimizer": "adamw"})
    trained(one, optimizer_of(one, ASKED), 3)
    trained(other, optimizer_of(other, adamw), 3)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_a_run_that_goes_on_from_its_state_is_the_run_that_was_never_stopped():
    whole, part = network(), network()
    first = optimizer_of(part, ASKED)
    trained(whole, optimizer_of(whole, ASKED), 1)
    trained(part, first, 1)
    saved, again = copy.deepcopy((part.state_dict(), first.state_dict())), network()
    second = optimizer_of(again, ASKED)
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    trained(part, first, 2, seed=2)
    trained(again, second, 2, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), again.state_dict().values()))


def test_both_halves_follow_one_schedule_and_slower_parts_keep_their_rate():
    model = adaptkit.attach(create_backbone("demo"), "vit-adapter", head=("fpn", {"num_classes": 3}))
    optimizer = optimizer_of(model, ASKED)
    schedule = schedule_of(optimizer, ASKED, 1)
    assert {bool(group.get("orthogonal")) for group in optimizer.param_groups} == {True, False}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({group["lr"] / group["initial_lr"] for group in optimizer.param_groups}) == 1
    optimizer.step()
    schedule.step()
    assert len({group["lr"] / group["initial_lr"] for group in optimizer.param_groups}) == 1
