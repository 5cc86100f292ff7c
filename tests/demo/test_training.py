"""How the demo trains and scores."""

import json
import math

import pytest
import torch

import adaptkit
from adaptkit.demo.scoring import Result, Row, ious, percent
from adaptkit.demo.training import examples, fit, kept_bytes, loss, predict, weights


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    images, masks = torch.rand(3, 3, 32, 48) * 2 - 1, torch.randint(0, 9, (3, 32, 48))
    return model(), images, masks


def model():
    torch.manual_seed(1)
    return adaptkit.attach(
        adaptkit.demo_backbone(), "vit-adapter", injector=False, head=("fpn", {"num_classes": 9, "channels": 16})
    )


def test_all_classes_weigh_alike():
    masks = torch.tensor([[[0, 0, 0], [0, 0, 1]]])
    weight = weights(masks, 3)
    share = torch.tensor([5 / 6, 1 / 6])
    torch.testing.assert_close(weight[:2] * share, torch.full((2,), 1 / 3))


def test_the_loss_is_cross_entropy_and_dice_as_written():
    torch.manual_seed(0)
    logits, masks, weight = torch.randn(2, 3, 4, 5), torch.randint(0, 2, (2, 4, 5)), torch.rand(3) + 0.5
    share = logits.softmax(1)
    dice = []
    for k in (0, 1):  # the third class is not there
        true = (masks == k).float()
        dice.append(1 - (2 * (share[:, k] * true).sum() + 1) / (share[:, k].sum() + true.sum() + 1))
    rows = -torch.log(share.gather(1, masks[:, None]))[:, 0]
    crossed = (rows * weight[masks]).sum() / weight[masks].sum()
    torch.testing.assert_close(loss(logits, masks, weight), crossed + torch.stack(dice).mean())


def test_features_of_images_and_of_their_mirror_images_stand_for_them(data):
    adapted, images, masks = data
    adapted.eval()
    made = examples(adapted, images, masks, mirrored=True)
    assert len(made.masks) == 6
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(made.batch(torch.tensor([4])).seen).logits, adapted(images[1:2].flip(-1)).logits
        )
    assert torch.equal(made.masks[4], masks[1].flip(-1))


def test_training_lowers_the_loss_and_a_seed_gives_the_same_steps(data):
    _, images, masks = data
    runs = []
    for _ in range(2):
        adapted = model()
        made = examples(adapted, images, masks)
        torch.manual_seed(0)
        runs.append((list(fit(adapted, made, 12, seed=3)), predict(adapted, made)))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert sum(runs[0][0][-3:]) < sum(runs[0][0][:3])


def test_counting_what_a_step_keeps_leaves_the_model_as_it_was(data):
    adapted, images, masks = data
    made = examples(adapted, images, masks)
    adapted.eval()
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    state = torch.get_rng_state()
    assert kept_bytes(adapted, made) > masks[0].numel() * 9 * 4
    assert torch.equal(torch.get_rng_state(), state)
    assert not adapted.training
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_iou_by_class_and_what_is_not_defined():
    predicted, masks = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 1]])
    scores = ious(predicted, masks, 3)
    assert scores[:2] == (1 / 2, 2 / 3)
    assert math.isnan(scores[2])
    row = Row("linear", 10, 20, 1.0, 30, scores, predicted)
    assert row.miou == pytest.approx((1 / 2 + 2 / 3) / 2)
    said = json.loads(Result(("a", "b", "c"), ("b",), 1, 2, 0, 3, 4, (1, 4), 0.5, (row,)).to_json())
    assert said["ways"][0]["iou"] == {"a": 1 / 2, "b": 2 / 3, "c": None}
    assert (percent(scores[0]), percent(scores[2])) == ("50.0", "–")
