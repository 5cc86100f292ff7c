"""Networks of other libraries come back from their files, whatever the backbone's width."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")

import timm

import adaptkit
from adaptkit.networks import network

RECIPES = {
    "mask2former": {"width": 32, "queries": 5, "layers": [1, 1], "points": 64},
    "upernet": {"width": 32},
}


def host():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 512, "depth": 1, "num_heads": 4, "mlp_ratio": 1}
    return timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=0)


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
def test_a_small_network_on_a_wide_pyramid_comes_back_from_its_file(name, tmp_path):
    """What transformers builds before the pyramid takes its place is within what the file may make."""
    recipe = {"network": name, "categories": [{"id": i, "name": str(i)} for i in range(3)], **RECIPES[name]}
    model = network.build(adaptkit.attach(host(), "sfp"), recipe).eval()
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first = model(image)
    model.save(tmp_path)
    again = network.load(tmp_path, host())(image)
    key = "masks_queries_logits" if name == "mask2former" else "logits"
    assert torch.equal(getattr(first, key), getattr(again, key))
