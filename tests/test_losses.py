"""Usage against budgets, and agreement with the full model."""

import pytest
import torch

from adaptkit import losses
from adaptkit.losses import agreement_loss, annealed_budget, macs_loss, usage, usage_loss

PIXEL_LOSSES = [losses.pixel_loss, losses.focal_loss, losses.dice_loss, losses.lovasz_loss]
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
    with pytest.raises(ValueError, match="^the budget is "):  # not of layers
        macs_loss(torch.ones(2), 1.0, budget)


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


# --------------------------------------------------------------------------------------------------------- of pixels


def pixels_of(classes=4):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 5, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, 5, 6), generator=generator)
    target[0, :2] = 255
    return logits, target


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)])
def test_cross_entropy_of_pixels_is_the_mean_that_torch_computes(weight):
    logits, target = pixels_of()
    want = torch.nn.functional.cross_entropy(logits, target, weight, ignore_index=255)
    torch.testing.assert_close(losses.pixel_loss(logits, target, weight=weight), want)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_focal_loss_is_its_formula_pixel_by_pixel(gamma, weight):
    logits, target = pixels_of()
    total = weights = 0.0
    for (b, y, x), label in zip(
        torch.cartesian_prod(*map(torch.arange, (2, 5, 6))).tolist(), target.flatten().tolist()
    ):
        if label == 255:
            continue
        p = logits[b, :, y, x].softmax(0)[label]
        w = 1.0 if weight is None else weight[label].item()
        total, weights = total - w * (1 - p) ** gamma * p.log(), weights + w
    torch.testing.assert_close(losses.focal_loss(logits, target, weight=weight, gamma=gamma), total / weights)


def test_the_dice_loss_is_its_formula_class_by_class_over_those_that_are_there():
    logits, target = pixels_of()
    target[target == 3] = 0  # a class that is nowhere counts nowhere
    p, known = logits.softmax(1), target != 255
    scores = []
    for k in (0, 1, 2):
        mine, truth = p[:, k][known], (target == k)[known].double()
        scores.append(2 * (mine * truth).sum() / (mine.square().sum() + truth.sum()))
    torch.testing.assert_close(losses.dice_loss(logits, target), 1 - sum(scores) / 3)


def test_the_lovasz_loss_is_the_extension_of_the_jaccard_loss_step_by_step():
    logits, target = pixels_of()
    target[target == 3] = 0
    p, known = logits.softmax(1), target != 255
    scores = []
    for k in (0, 1, 2):
        mine, truth = p[:, k][known].tolist(), (target == k)[known].tolist()
        errors = sorted(((1 - q if true else q), true) for q, true in zip(mine, truth))[::-1]
        missed, invented, jaccard, total = 0, 0, 0.0, 0.0
        for error, true in errors:
            missed, invented = missed + true, invented + (not true)
            now = 1 - (sum(truth) - missed) / (sum(truth) + invented)
            total, jaccard = total + error * (now - jaccard), now
        scores.append(total)
    torch.testing.assert_close(losses.lovasz_loss(logits, target), torch.tensor(sum(scores) / 3, dtype=torch.float64))
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    want = torch.tensor((0.5 * scores[0] + 2 * scores[1]) / 2.5, dtype=torch.float64)
    torch.testing.assert_close(losses.lovasz_loss(logits, target, weight=weight), want)


def test_the_lovasz_loss_of_a_sure_answer_is_one_minus_the_mean_iou():
    _, target = pixels_of()
    answer = torch.randint(0, 4, target.shape, generator=torch.Generator().manual_seed(5))
    known = target != 255
    ious = [
        ((answer == k) & (target == k))[known].sum() / ((answer == k) | (target == k))[known].sum() for k in range(4)
    ]
    logits = 1000 * torch.nn.functional.one_hot(answer, 4).movedim(-1, 1).float()
    assert losses.lovasz_loss(logits, target).item() == pytest.approx(1 - sum(ious).item() / 4, abs=1e-6)


@pytest.mark.parametrize("loss", PIXEL_LOSSES)
def test_a_loss_of_pixels_is_zero_where_nothing_is_known_and_has_the_gradient_of_its_formula(loss):
    logits, target = pixels_of()
    x = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: loss(y, target), (x,))
    total = loss(x, torch.full_like(target, 255))
    total.backward()
    assert total.item() == 0
    assert not x.grad.any()


def test_a_perfect_answer_costs_nothing_and_has_a_finite_gradient():
    _, target = pixels_of()
    logits = 1000 * torch.nn.functional.one_hot(target.clamp(max=3), 4).movedim(-1, 1).float()
    for loss in PIXEL_LOSSES:
        x = logits.clone().requires_grad_()
        loss(x, target).backward()
        assert loss(x, target).item() == pytest.approx(0, abs=1e-6)
        assert x.grad.isfinite().all()


def test_balanced_weights_make_classes_weigh_the_same_and_spare_the_unseen():
    counts = torch.tensor([90, 9, 1, 0])
    weights = losses.balanced_weights(counts)
    torch.testing.assert_close(weights[:3] * counts[:3], torch.full((3,), 25.0))
    assert weights[3] == weights[2]
    with pytest.raises(ValueError, match="no class has a pixel"):
        losses.balanced_weights(torch.zeros(3))
