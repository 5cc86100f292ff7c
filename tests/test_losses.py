"""Usage against budgets, and agreement with the full model."""

import pytest
import torch

from adaptkit.losses import agreement_loss, annealed_budget, macs_loss, usage, usage_loss

AUX = {
    "patch_keep": torch.tensor([[[1.0, 1, 0, 0]], [[1, 0, 0, 0]]]),  # mean 3/8
    "head_keep": torch.tensor([[[1.0, 1]], [[1, 0]]]),  # 3/4
    "layer_keep": torch.ones(2, 1, 2),
    "patch_logits": torch.zeros(2, 1, 4),
}


def test_usage_is_the_mean_of_what_is_kept():
    assert usage(AUX) == {"patch": 0.375, "head": 0.75, "layer": 1.0}


def test_the_squared_form_is_the_papers_equation():
    loss = usage_loss(AUX, {"patch": 0.5, "head": 0.5, "layer": 0.8})
    torch.testing.assert_close(loss, torch.tensor(0.125**2 + 0.25**2 + 0.2**2))


def test_the_absolute_form_pulls_as_hard_near_the_budget_as_far_from_it():
    gradients = []
    for share in (0.51, 0.9):
        keep = torch.tensor(share, requires_grad=True)
        usage_loss({"patch": keep}, 0.5, "absolute").backward()
        gradients.append(keep.grad.item())
    assert gradients == [1.0, 1.0]


def test_one_budget_goes_to_every_kind_that_is_there():
    kinds = {"patch": torch.tensor(0.5), "layer": torch.tensor(0.9)}
    torch.testing.assert_close(usage_loss(kinds, 0.5), torch.tensor(0.16))


def test_one_budget_of_macs_is_the_share_of_the_dense_model():
    torch.testing.assert_close(macs_loss(torch.tensor([60.0, 80.0]), 100.0, 0.5), torch.tensor(0.2))


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan")])
def test_a_budget_outside_zero_to_one_says_so(budget):
    for call in (
        lambda: usage_loss(AUX, budget),
        lambda: usage_loss(AUX, {"head": budget}),
        lambda: macs_loss(torch.ones(2), 1.0, budget),
        lambda: annealed_budget(0, 10, budget),
    ):
        with pytest.raises(ValueError, match=r"lies in \(0, 1\]"):
            call()


def test_a_budget_for_a_kind_without_gates_names_both():
    with pytest.raises(ValueError, match="budget for head, and there are decisions for patch"):
        usage_loss({"patch_keep": torch.ones(1)}, {"head": 0.5})
    with pytest.raises(ValueError, match="'squared', 'absolute'"):
        usage_loss(AUX, 0.5, "cubic")


def test_the_annealed_budget_starts_at_one_and_ends_at_the_budget():
    assert [annealed_budget(s, 4, 0.6) for s in (0, 2, 4, 9)] == pytest.approx([1.0, 0.8, 0.6, 0.6])


def test_agreement_is_zero_with_itself_and_leaves_the_full_model_alone():
    full = torch.randn(4, 5).requires_grad_()
    logits = torch.randn(4, 5).requires_grad_()
    torch.testing.assert_close(agreement_loss(full.detach(), full), torch.tensor(0.0))
    agreement_loss(logits, full, temperature=2.0).backward()
    assert full.grad is None
    assert logits.grad.abs().sum() > 0
