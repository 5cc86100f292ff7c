"""What figures are given: who has a class token, which set acts, and inputs that cannot be are refused by name."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, stirred

import adaptkit
from adaptkit.analysis import (
    attended_keys,
    attention_distance,
    attention_maps,
    feature_maps,
    grad_cam,
    offset_lengths,
    query_keys,
    rollout,
    spectrum,
)
from adaptkit.analysis.pca import features_of
from adaptkit.analysis.watch import BackboneAlone, chosen

IMAGE = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))


def pixels():
    """A model that classifies pixels, three classes."""
    return stirred(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp", head=("fpn", {"num_classes": 3}))).eval()


# ------------------------------------------------------------------------------------------------------- who is seen


def registers_alone(name):
    if name == "vit":
        sizes = {"img_size": 64, "depth": 4, "embed_dim": 32, "num_heads": 2}
        return timm.create_model("vit_betwixt_patch16_reg4_gap_256", num_classes=0, **sizes)
    sizes = {"patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "pos_embed_grid_size": (4, 4)}
    return NaFlexVit(NaFlexVitCfg(reg_tokens=4, class_token=False, **sizes))


@pytest.mark.parametrize("name", ["vit", "naflexvit"])
def test_registers_alone_are_no_class_token(name):
    """The map is that of the mean patch, and the query the middle of the image, as where there is no prefix."""
    model = registers_alone(name).eval()
    found = rollout(model, IMAGE)
    assert found.prefix == 4
    torch.testing.assert_close(found.maps[0].flatten(), found.matrices[0][4:, 4:].mean(0))
    maps = attention_maps(model, IMAGE)
    assert maps.query == (32.0, 32.0)
    assert maps.figure().axes[0].get_title() == "query"


def test_a_class_token_before_registers_is_one():
    found = rollout(HOSTS["timm-dinov3"].build(), IMAGE)
    assert found.prefix > 1
    torch.testing.assert_close(found.maps[0].flatten(), found.matrices[0][0, found.prefix :])


@pytest.mark.parametrize("figure", [attention_distance, rollout, grad_cam, spectrum])
def test_the_mean_of_several_sets_has_no_one_inside(figure):
    model = stirred(adaptkit.attach(HOSTS["timm-vit"].build(), "adapter-plus"))
    model.add_adapter("lora", name="other")
    stirred(model).eval().set_adapter(["default", "other"])
    with pytest.raises(TypeError, match=r"the sets default, other act as their mean.* model.set_adapter\('default'\)"):
        figure(model, IMAGE)
    model.set_adapter("other")
    figure(model, IMAGE)
    model.set_adapter(["default", "other"])
    with model.disable_adapter():
        figure(model, IMAGE)


def test_a_branch_beside_the_frozen_attention_leaves_it_as_it_was():
    """DAT-KV of mode "add": gamma is 0, whatever its points are."""
    backbone = HOSTS["timm-vit"].build()
    bare = attention_distance(backbone, IMAGE).distances
    model = stirred(adaptkit.attach(backbone, "dat", mode="add")).eval()
    with torch.no_grad():
        for name, parameter in model.adapters.named_parameters():
            if name.endswith("gamma"):
                parameter.zero_()
    assert all(map(torch.equal, attention_distance(model, IMAGE).distances, bare))
    torch.testing.assert_close(rollout(model, IMAGE).matrices[0].sum(-1), torch.ones(65))
    model.detach()
    moved = stirred(adaptkit.attach(backbone, "dat", mode="replace")).eval()
    with pytest.raises(TypeError, match="moved keys"):
        rollout(moved, IMAGE)


def test_rows_sum_to_one_in_half_precision_too():
    with torch.autocast("cpu", torch.bfloat16):
        rows = rollout(HOSTS["timm-vit"].build(), IMAGE).matrices[0].sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows), atol=1e-5, rtol=0)


def test_where_the_prefix_was_dropped_no_patch_is_taken_for_the_class_token():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), ("vit-adapter", {"conv_inplane": 8, "prefix": "drop"})).eval()
    assert attention_maps(model, IMAGE).query == (32.0, 32.0)


def test_grad_cam_leaves_inference_mode():
    model = pixels()
    expected = grad_cam(model, IMAGE, 1, (5, 7))
    with torch.inference_mode():
        found = grad_cam(model, IMAGE.clone(), 1, (5, 7))
    assert torch.equal(found.cam, expected.cam)


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("picture.jpg", TypeError, "images are a str: give tensors"),
        (np.zeros((3, 64, 64), np.float32), TypeError, "images are a ndarray: give tensors"),
        (torch.zeros(3, 0, 64), ValueError, r"images have shape \(3, 0, 64\)"),
        (torch.zeros(64, 64), ValueError, r"images have shape \(64, 64\)"),
        (torch.full((3, 64, 64), float("nan")), ValueError, "NaN or infinite"),
        ([], ValueError, "no image was given"),
    ],
)
def test_what_is_no_image_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        attention_distance(HOSTS["timm-vit"].build(), given)


@pytest.mark.parametrize("blocks", [[1.5], -1, 0, [4], [], [-5], "ab"])
def test_what_is_no_block_is_refused(blocks):
    with pytest.raises(ValueError, match="blocks="):
        chosen(blocks, 4)


def test_blocks_are_counted_from_the_end_and_by_any_integer():
    assert chosen(np.int64(2), 4) == (2, 3)
    assert chosen([np.int64(0), -1], 4) == chosen(np.array([0, 3]), 4) == chosen(torch.tensor([0, 3]), 4) == (0, 3)
    assert chosen(9, 4) == chosen(None, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("target", "at", "error", "message"),
    [
        (1.5, None, TypeError, "target=1.5: give the index of a class"),
        (lambda logits: logits[0, :, 0, 0], None, TypeError, r"target= returns a tensor \(3,\)"),
        (lambda logits: 1.0, None, TypeError, "target= returns a float"),
        (1, torch.zeros(64, 64, dtype=torch.bool), ValueError, "a mask of no pixel"),
        (1, np.zeros((64, 64), bool), ValueError, "a mask of no pixel"),
        (1, torch.ones(1, 64, 64), ValueError, "give a mask"),
        (1, (1, 2, 3), ValueError, r"pixels=\(1, 2, 3\) is no place"),
        (1, (-1, 2), ValueError, r"pixels \(-1, 2\) is outside"),
        (1, 5, ValueError, "pixels=5 is no place"),
    ],
)
def test_what_grad_cam_cannot_be_asked_for_is_refused(target, at, error, message):
    with pytest.raises(error, match=message):
        grad_cam(pixels(), IMAGE, target, at)


def test_a_pixel_and_a_mask_may_be_given_in_any_form():
    model = pixels()
    mask = np.zeros((64, 64), bool)
    mask[3, 2] = True
    cams = [grad_cam(model, IMAGE, 1, given).cam for given in ((3, 2), (3.5, 2.9), torch.tensor([3, 2]), mask)]
    assert all(torch.equal(cam, cams[0]) for cam in cams)


def test_a_stride_that_no_map_has_is_refused_and_many_models_have_colours(tmp_path):
    backbone = HOSTS["timm-vit"].build()
    with pytest.raises(ValueError, match=r"strides=\[7\]: the maps have strides 8"):
        spectrum(backbone, IMAGE, strides=[7])
    with pytest.raises(ValueError, match=r"strides=\[\]"):
        spectrum(backbone, IMAGE, strides=[])
    with pytest.raises(ValueError, match="strides 4, 8, 16, 32"):
        spectrum({"bare": HOSTS["timm-vit"].build(), "adapted": pixels()}, IMAGE, strides=[4, 7])
    assert spectrum({str(i): backbone for i in range(14)}, IMAGE).save(tmp_path / "many.svg").is_file()


def test_no_model_no_key_and_no_mask_are_refused():
    model = adaptkit.attach(HOSTS["timm-vit"].build(), ("vit-adapter", {"conv_inplane": 8})).eval()
    for figure in (lambda: feature_maps({}, IMAGE), lambda: spectrum({}, IMAGE), lambda: query_keys({}, IMAGE, (1, 1))):
        with pytest.raises(ValueError, match="no model was given"):
            figure()
    with pytest.raises(ValueError, match="top=-1"):
        query_keys(model, IMAGE, (1, 1), top=-1)
    with pytest.raises(ValueError, match="top=-2"):
        attended_keys(model, IMAGE, (1, 1), top=-2)
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    found = offset_lengths(model, IMAGE, mask)
    assert found == offset_lengths(model, IMAGE, torch.from_numpy(mask))


@torch.no_grad()
def test_a_model_is_compared_with_its_backbone_without_what_changes_its_layers():
    backbone = HOSTS["timm-vit"].build()
    image = torch.randn(1, 3, 32, 32)
    plain = adaptkit.view(backbone).features(image).tokens
    model = stirred(adaptkit.attach(backbone, "lora")).eval()
    assert (model(image).tokens - plain).abs().max() > 1e-3
    assert torch.equal(features_of(BackboneAlone(model), image).tokens, plain)
    curves = spectrum({"backbone": BackboneAlone(model), "lora": model}, image).curves
    assert not torch.equal(curves["backbone"][8].amplitude, curves["lora"][8].amplitude)
