"""The demonstration backbone: a plain timm ViT with weights that are there and are not random."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from adaptkit.demo.backbone import WEIGHTS, demo_backbone


@pytest.fixture(scope="module")
def backbone() -> VisionTransformer:
    """The backbone with the weights that ship."""
    return demo_backbone()


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """Two images whose sides differ, (2, 3, 64, 96)."""
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_it_is_a_plain_timm_vit(backbone):
    assert type(backbone) is VisionTransformer
    assert len(backbone.blocks) == 12
    assert backbone.embed_dim == 192
    assert backbone.num_classes == 0


def test_it_is_in_eval_mode_and_fp32(backbone):
    assert not backbone.training
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_the_file_fits_in_twelve_megabytes_with_its_card_beside_it():
    assert WEIGHTS.stat().st_size <= 12_000_000
    card = (WEIGHTS.parent / "README.md").read_text()
    assert "recipes.pretrain_mae" in card
    assert "Apache-2.0" in card


def test_its_config_names_no_foreign_weights(backbone):
    cfg = backbone.pretrained_cfg
    assert cfg["architecture"] == "vit_tiny_patch16_224"
    assert tuple(cfg["mean"]) == tuple(cfg["std"]) == (0.5, 0.5, 0.5)
    assert not cfg["url"]
    assert not cfg.get("hf_hub_id")


@torch.inference_mode()
def test_features_are_finite_and_the_same_every_time(backbone, image):
    first, again = backbone.forward_features(image), demo_backbone().forward_features(image)
    assert first.shape == (2, 1 + 4 * 6, 192)
    assert first.isfinite().all()
    assert torch.equal(first, again)


@torch.inference_mode()
def test_training_left_its_mark_on_every_block(backbone):
    """Where a network begins norms are 1 and 0, and biases are 0."""
    for block in backbone.blocks:
        for norm in (block.norm1, block.norm2):
            assert norm.weight.std() > 0.01
            assert norm.bias.std() > 0.01
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            assert layer.bias.std() > 0.01
