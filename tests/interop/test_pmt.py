"""The authors' plain mask decoder: parity with their network, and what is asked for by name."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
import adaptkit
from adaptkit.features.cached import CachedFeatures
from adaptkit.heads.plain_mask import rotary_table
from adaptkit.interop import from_official

SHARED = Path(os.environ.get("ADAPTKIT_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "pmt_a.safetensors"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_file(), reason=f"no reference vectors at {GOLDEN} (set ADAPTKIT_SHARED)"
)
LAYERS = [1, 3, 5]


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        config = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return config, tensors


def official(tensors):
    return {k.removeprefix("official."): v for k, v in tensors.items() if k.startswith("official.")}


def host(dim=48, heads=3, depth=6, prefix=5, norm=True, patch=16):
    """Without a final norm its blocks' outputs are what the decoder gets, which the vectors are given as."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=4 * patch, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads, reg_tokens=prefix - 1,
        num_classes=0,
    )  # fmt: skip
    if not norm:
        vit.norm = torch.nn.Identity()
    return vit


def close(found, wanted, tolerance):
    """To a share of the largest entry."""
    wanted = wanted.to(found.dtype)
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().abs().max()) <= tolerance * float(wanted.abs().max())


@needs_golden
@pytest.mark.parametrize("mode", ["masked", "plain"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_outputs_and_gradients_are_the_authors(golden, mode, dtype, tolerance):
    config, tensors = golden
    model = from_official("pmt", official(tensors), host(), interaction_indices=config["interaction_indices"])
    head = model.to(dtype).head
    levels = [tensors[f"tokens.{i}"].to(dtype, copy=True) for i in range(3)]
    levels[0].requires_grad_()
    close(head.fuse(levels), tensors["fused"], tolerance)
    found = head.predictions(levels, tuple(config["grid"]), masked=mode == "masked")
    assert len(found) == sum(k.startswith(f"{mode}.mask_logits.") for k in tensors)
    total = 0
    for i, (classes, masks, _) in enumerate(found):
        close(masks, tensors[f"{mode}.mask_logits.{i}"], tolerance)
        close(classes, tensors[f"{mode}.class_logits.{i}"], tolerance)
        for x in (masks, classes):
            total = total + (x.flatten() * torch.linspace(-1, 1, x.numel(), dtype=dtype)).sum()
    total.backward()
    named = dict(head.named_parameters()) | {"tokens.0": levels[0]}
    keys = [k for k in tensors if k.startswith(f"grad.{mode}.")]
    assert len(keys) == 16
    for key in keys:
        close(named[key.removeprefix(f"grad.{mode}.").removeprefix("decoder.")].grad, tensors[key], tolerance)


@needs_golden
def test_the_attached_model_says_the_same_of_these_very_features(golden):
    config, tensors = golden
    model = from_official("pmt", official(tensors), host(norm=False), interaction_indices=LAYERS)
    states = tuple(tensors[f"tokens.{i}"] for i in range(3))
    side = config["patch"]
    seen = CachedFeatures(states, tuple(LAYERS), (config["grid"][0] * side, config["grid"][1] * side), side)
    classes, masks, earlier = model(seen).logits
    close(masks, tensors["plain.mask_logits.0"], 2e-4)
    close(classes, tensors["plain.class_logits.0"], 2e-4)
    assert earlier == ()
    model.head.train()
    for norm in model.head.bn:
        norm.eval()  # the vectors are of running statistics
    assert len(model(seen).logits.auxiliary_logits) == config["num_blocks"]
    close(model(seen).logits.masks_queries_logits, tensors["masked.mask_logits.2"], 2e-4)


@needs_golden
def test_the_rotary_table_is_the_authors(golden):
    config, tensors = golden
    cos, sin = rotary_table(tuple(config["grid"]), config["dim"] // config["heads"], torch.zeros(()))
    close(cos, tensors["rope.cos"], 1e-6)
    close(sin, tensors["rope.sin"], 1e-6)


# ------------------------------------------------------------------------------------------- written, then read back


def written(model, prefix="network."):
    """A trained head by the authors' keys."""
    found = {}
    for key, tensor in model.head.state_dict().items():
        found[prefix + ("" if key.startswith("bn.") else "decoder.") + key] = tensor.clone()
    return found


def made(backbone, **options):
    torch.manual_seed(1)
    model = adaptkit.attach(backbone, head=("plain-mask", {"num_classes": 4, "num_q": 5, "num_blocks": 2, **options}))
    with torch.no_grad():
        for tensor in model.head.state_dict().values():
            tensor.copy_(tensor + 0.1 * torch.rand(tensor.shape) if tensor.is_floating_point() else tensor + 3)
    return model.eval()


@pytest.mark.parametrize(
    ("of_backbone", "options"),
    [
        ({}, {}),
        ({"dim": 32, "heads": 2, "patch": 14, "prefix": 1}, {"interaction_indices": [2, 5], "hidden_dim": 128}),
        ({"dim": 40, "heads": 5, "patch": 8}, {"lateral_projection": "linear", "num_heads": 2}),
        ({"depth": 8}, {"lateral_projection": "identity", "lateral_bn": False, "num_blocks": 1}),
        ({}, {"residual_projection": False, "num_q": 3, "upscale": 3}),
    ],
)
def test_other_layouts_are_read_off_their_tensors(of_backbone, options):
    model = made(host(**of_backbone), **options)
    image = torch.randn(2, 3, 40, 61)
    expected = model(image).logits
    told = {k: v for k, v in options.items() if k in ("interaction_indices", "num_heads", "residual_projection")}
    if model.spec.depth % 4:
        told["interaction_indices"] = model.head.config.interaction_indices
    again = from_official("pmt", {"state_dict": written(model)}, host(**of_backbone), **told)
    assert again.head.config == model.head.config
    found = again(image).logits
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_what_compilation_and_fusing_left_in_the_names_is_understood():
    model = made(host())
    told = {"interaction_indices": model.head.config.interaction_indices}
    image = torch.randn(1, 3, 64, 64)
    plain, fused = written(model), {}
    for key, tensor in plain.items():
        if "_proj." in key and ".attention." in key and ".o_proj" not in key:
            name, _, kind = key.rpartition(".")
            parts = [plain.get(f"{name[:-6]}{letter}_proj.{kind}", torch.zeros(48)) for letter in "qkv"]
            fused[f"{name[:-6]}qkv_proj.{kind}"] = torch.cat(parts)
        else:
            fused[key.replace("blocks.", "blocks._orig_mod.").replace("network.", "network._orig_mod.")] = tensor
    fused |= {
        "network.encoder.pixel_mean": torch.zeros(3), "criterion.empty_weight": torch.ones(5),
        "network.decoder.attn_mask_probs": torch.zeros(2), "network._attn_mask_probs_fallback": torch.zeros(2),
        "network.bn_prefix.weight": torch.ones(48), "network.decoder.pe.x": torch.ones(1),
    }  # fmt: skip
    found = from_official("pmt", fused, host(), **told)(image).logits
    assert torch.equal(found[1], model(image).logits[1])
    fused["network.decoder.blocks._orig_mod.0.attention.qkv_proj.bias"] = torch.ones(144)
    fused.pop("network.decoder.blocks.0.attention.qkv_proj.bias", None)
    with pytest.raises(ValueError, match="the keys have a bias"):
        from_official("pmt", fused, host(), **told)


def test_masks_are_on_again_in_a_decoder_whose_training_ended_without_them():
    model = made(host())
    ended = written(model) | {"network.decoder.attn_mask_probs": torch.zeros(2)}
    again = from_official("pmt", ended, host(), interaction_indices=model.head.config.interaction_indices)
    assert again.head.attn_mask_probs.tolist() == [1, 1]


def test_what_the_tensors_do_not_tell_is_asked_for_and_what_they_tell_cannot_be_contradicted():
    model = made(host())
    tensors, layers = written(model), model.head.config.interaction_indices
    with pytest.raises(ValueError, match="reads 4 layers of the 6 .* pass interaction_indices="):
        from_official("pmt", tensors, host())
    with pytest.raises(ValueError, match="tensors say 4 layers"):
        from_official("pmt", tensors, host(), interaction_indices=[1, 3])
    with pytest.raises(ValueError, match="num_q=9, but the checkpoint's tensors say 5"):
        from_official("pmt", tensors, host(), interaction_indices=layers, num_q=9)
    with pytest.raises(ValueError, match="patch=14, and the backbone has 16"):
        from_official("pmt", tensors, host(), interaction_indices=layers, patch=14)
    with pytest.raises(ValueError, match="has dim=48, the backbone dim=32"):
        from_official("pmt", tensors, host(dim=32, heads=2))
    with pytest.raises(ValueError, match="interaction_indices=3: give the indices of blocks"):
        from_official("pmt", tensors, host(), interaction_indices=3)
    with pytest.raises(ValueError, match="no PMT"):
        from_official("pmt", {"head.weight": torch.ones(2)}, host())
    with pytest.raises(ValueError, match="without their encoder"):
        from_official("pmt", tensors, host(), load_backbone=True)


def test_a_missing_tensor_is_named_and_the_backbone_stays_free():
    model = made(host())
    tensors = written(model)
    del tensors["network.decoder.mask_head.2.bias"]
    backbone = host()
    with pytest.raises(ValueError, match=r"mask_head\.2\.bias"):
        from_official("pmt", tensors, backbone, interaction_indices=model.head.config.interaction_indices)
    adaptkit.attach(backbone).detach()


@pytest.mark.parametrize(("key", "shape", "match"), [
    ("decoder.q.weight", (48,), r"'q.weight' .* has shape \(48,\), not 2 dimensions"),
    ("decoder.class_head.weight", (), r"'class_head.weight' .* not 2 dimensions"),
    ("decoder.blocks.0.mlp.up_proj.weight", (), r"'blocks.0.mlp.up_proj.weight' .* not 2 dimensions"),
    ("decoder.attn_mask_probs", (), r"attn_mask_probs has shape \(\), and there are tensors of 2"),
    ("decoder.blocks.x.norm1.weight", (3,), "has blocks.x, and blocks are numbered"),
    ("decoder.scalers.x", (3,), "has scalers.x, and scalers are numbered"),
])  # fmt: skip
def test_tensors_that_no_index_and_no_dimension_fits_are_named(key, shape, match):
    model = made(host())
    tensors = {**written(model), f"network.{key}": torch.ones(shape)}
    with pytest.raises(ValueError, match=match):
        from_official("pmt", tensors, host(), interaction_indices=model.head.config.interaction_indices)


def test_masks_are_never_at_the_grid_of_the_patches():
    model = made(host())
    tensors = {k: v for k, v in written(model).items() if "upscale" not in k}
    with pytest.raises(ValueError, match=r"has no 'upscale\.\*'"):
        from_official("pmt", tensors, host(), interaction_indices=model.head.config.interaction_indices)


def test_a_file_that_ddp_saved_is_understood():
    model = made(host())
    saved = {f"module.{key}": tensor for key, tensor in written(model).items()}
    again = from_official("pmt", saved, host(), interaction_indices=model.head.config.interaction_indices)
    assert torch.equal(again.head.q.weight, model.head.q.weight)
