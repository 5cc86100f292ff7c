"""Heads put logits back on the image, whatever its size, and learn."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit

HEADS = {"linear": {"num_classes": 3}, "fpn": {"num_classes": 3, "channels": 16}, "upsample": {"num_classes": 3}}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("adapter", [(), ("sfp",)], ids=["tokens", "pyramid"])
@pytest.mark.parametrize("size", [(32, 32), (45, 70)])
@torch.no_grad()
def test_logits_have_the_images_own_size(name, adapter, size):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), *adapter, head=(name, HEADS[name])).eval()
    assert model(torch.randn(2, 3, *size)).logits.shape == (2, 3, *size)


@torch.no_grad()
def test_logits_stay_where_their_token_is():
    """A head that copies one channel: its logits peak at the centre of the token that holds the peak."""
    model = adaptkit.attach(HOSTS["timm-vit"].build(), head=("linear", {"num_classes": 1})).eval()
    features = model(torch.randn(1, 3, 45, 70))  # a grid of 6 x 9 patches of 8 pixels
    tokens = torch.zeros_like(features.tokens)
    tokens[0, 2 * 9 + 5] = 1.0
    model.head.classifier.weight.fill_(1.0)
    logits = model.head(features._replace(tokens=tokens))[0, 0]
    rows, columns = (logits > logits.max() - 0.01 * logits.max().abs()).nonzero(as_tuple=True)
    assert rows.float().mean().item() == pytest.approx(2 * 8 + 3.5)
    assert columns.float().mean().item() == pytest.approx(5 * 8 + 3.5)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_learns_what_a_token_shows(name):
    torch.manual_seed(0)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), head=(name, HEADS[name])).train()
    bright = (torch.arange(16).view(4, 4) % 3).repeat_interleave(8, 0).repeat_interleave(8, 1)
    image = bright[None, None].expand(2, 3, -1, -1).float() + 0.1 * torch.randn(2, 3, 32, 32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(60):
        loss = F.cross_entropy(model(image).logits, bright[None].expand(2, -1, -1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    correct = (model.eval()(image).logits.argmax(1) == bright).float().mean()
    assert correct > 0.7


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {"num_classes": 0}),
        ("fpn", {"num_classes": 2, "channels": 0}),
        ("upsample", {"num_classes": 0}),
        ("fpn", {"num_classes": 2, "norm": "x"}),
    ],
)
def test_options_out_of_range_are_clear_errors(name, options):
    with pytest.raises(ValueError, match="must be at least 1|is not a choice"):
        adaptkit.attach(HOSTS["timm-vit"].build(), head=(name, options))


@pytest.mark.parametrize(("pool", "width"), [("avg", 32), ("token", 32), ("both", 64)])
def test_the_classifier_reads_what_it_says(pool, width):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), head=("classifier", {"num_classes": 3, "pool": pool})).eval()
    features = model(torch.randn(2, 3, 32, 32))
    assert features.logits.shape == (2, 3)
    pooled = model.head.pool(features)
    assert pooled.shape == (2, width)
    expected = {"avg": features.tokens.mean(1), "token": features.prefix[:, 0]}
    expected["both"] = torch.cat([expected["token"], expected["avg"]], 1)
    assert torch.equal(pooled, expected[pool])


def test_the_classifier_needs_the_token_that_it_reads():
    with pytest.raises(ValueError, match="this backbone has none; use 'avg'"):
        adaptkit.attach(HOSTS["timm-siglip"].build(), head=("classifier", {"num_classes": 3, "pool": "token"}))
    drops = ("vit-adapter", {"prefix": "drop", "conv_inplane": 8})
    head = ("classifier", {"num_classes": 3, "pool": "token"})
    with pytest.raises(ValueError, match="an adapter dropped it"):
        adaptkit.attach(HOSTS["timm-vit"].build(), drops, head=head)(torch.randn(2, 3, 32, 32))
