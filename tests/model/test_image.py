"""What is no normalised batch is refused by ``forward``, which says what came, what to do and who converts."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit

NORMAL = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    host = HOSTS["timm-vit"].build()
    host.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    return adaptkit.attach(host, "sfp").eval()


PICTURE = NORMAL.mul(60).add(128).clamp(0, 255)


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        (Image.new("RGB", (32, 32)), TypeError, r"the image is a PIL\.Image\.Image; forward takes floating-point"),
        (np.zeros((1, 3, 32, 32), "float32"), TypeError, r"the image is a numpy\.ndarray"),
        ("photo.jpg", TypeError, r"the image is a builtins\.str"),
        ([NORMAL[0]], TypeError, r"the image is a builtins\.list"),
        (PICTURE.byte(), TypeError, r"holds torch\.uint8; .*: \(image / 255 - mean\) / std"),
        (NORMAL.long(), TypeError, r"holds torch\.int64"),
        (NORMAL[0], ValueError, r"\(3, 32, 32\); .* without a batch axis: image\[None\]"),
        (NORMAL[0].permute(1, 2, 0), ValueError, r"\(32, 32, 3\); .* channels last: image\.permute\(2, 0, 1\)\[None\]"),
        (NORMAL[0, 0], ValueError, r"\(32, 32\); .* grey image: image\.expand\(1, 3, -1, -1\)"),
        (NORMAL.permute(0, 2, 3, 1), ValueError, r"channels are last: image\.permute\(0, 3, 1, 2\)"),
        (NORMAL[:, :1], ValueError, r"1 channels; .* it is grey: image\.expand\(-1, 3, -1, -1\)"),
        (PICTURE, ValueError, r"values from .* as a picture in 0\.\.255 has; .*mean \[0\.485"),
    ],
)
def test_it_says_what_came_and_that_predict_converts(model, given, kind, said):
    with pytest.raises(kind, match=rf"(?s){said}.*model\.predict\(\.\.\.\) takes pictures"):
        model(given)


def test_the_remedies_are_right(model):
    for given in (NORMAL[0][None], NORMAL[0].permute(1, 2, 0).permute(2, 0, 1)[None], NORMAL[:, :1].expand(-1, 3, -1, -1),
                  NORMAL[0, 0].expand(1, 3, -1, -1), NORMAL.half(), NORMAL.double()):  # fmt: skip
        assert model(given).grid == (4, 4)


def test_a_normalised_image_of_any_brightness_passes(model):
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    for level in (0.0, 0.5, 1.0):
        model((torch.full((1, 3, 32, 32), level) - mean) / std)
    model(torch.rand(1, 3, 32, 32))  # not normalised, yet in the range: nothing proves it wrong


def test_of_a_backbone_that_declares_no_normalisation_values_are_not_judged():
    host = HOSTS["timm-vit"].build()
    host.pretrained_cfg = {}
    adaptkit.attach(host, "sfp").eval()(PICTURE)


def test_transforms_and_traces_do_not_look_at_values(model):
    torch.func.vmap(lambda x: model(x[None]).tokens, randomness="different")(torch.cat([NORMAL, NORMAL]))
    torch.export.export(model, (NORMAL,), strict=False)


def test_many_tasks_take_the_same(model):
    many = adaptkit.attach_many(HOSTS["timm-vit"].build(), {"a": "sfp"})
    with pytest.raises(TypeError, match=r"holds torch\.uint8"):
        many(PICTURE.byte())
