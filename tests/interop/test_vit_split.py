"""The authors' ViT-Split: parity with their network in outputs and gradients, and what is asked for by name."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer
from families import randomise

from adaptkit.features.replay import replay
from adaptkit.interop import from_official
from adaptkit.model.forward import run

SHARED = Path(os.environ.get("ADAPTKIT_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "vit_split_a.safetensors"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_file(), reason=f"no reference vectors at {GOLDEN} (set ADAPTKIT_SHARED)"
)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        config = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return config, tensors


def official(tensors):
    return {k.removeprefix("official."): v for k, v in tensors.items() if k.startswith("official.")}


def host(config, **options):
    sizes = {"embed_dim": config["dim"], "depth": config["depth"], "num_heads": config["heads"]}
    return VisionTransformer(
        img_size=config["pretrain_img"], patch_size=config["patch"], init_values=1.0, num_classes=0, **sizes, **options
    )


def loaded(config, state, **options):
    said = {name: config[name] for name in ("out_indices", "select_layers", "registers", "grid")}
    return from_official("vit-split", state, host(config), load_backbone=True, **{**said, **options})


def linspace(x):
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)


@needs_golden
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_vit_split_matches_the_authors_outputs_and_gradients(golden, dtype, tolerance):
    config, tensors = golden
    model = loaded(config, official(tensors)).to(dtype)
    adapter, seen = model.adapters["vit-split"], {}
    for name, module in {"prior": adapter.frozen_conv, "fused": adapter.fusion_conv}.items():
        module.register_forward_hook(lambda _, given, out, name=name: seen.update({name: out, f"{name}_in": given[0]}))
    features = model(tensors["input"].to(dtype))
    prior, task = seen["fused_in"].chunk(2, dim=1)
    assert torch.equal(prior, seen["prior"])
    assert len(features.maps) == 1
    found = {"prior_in": seen["prior_in"], "prior": prior, "task": task, "fused": features.maps[0]}
    for name, value in {**found, "logits": features.logits}.items():
        torch.testing.assert_close(value, tensors[name].to(dtype), rtol=tolerance, atol=tolerance)

    head = {f"decode_head.{n}": p for n, p in model.head.named_parameters()}
    own = {f"backbone.{n}": p for n, p in adapter.named_parameters()} | head
    sums = transformer(2 * config["depth"], config["dim"], task[0, 0].numel() + 1)  # there and back
    for output, value in (("fused", features.maps[0]), ("logits", features.logits)):
        names = [k for k in tensors if k.startswith(f"grad.{output}.")]
        assert names
        given = [own[k.removeprefix(f"grad.{output}.")] for k in names]
        gradients = torch.autograd.grad((value * linspace(value)).sum(), given, retain_graph=True)
        for key, gradient in zip(names, gradients):  # the vectors are of float32
            assert_rounds_to(gradient.float(), tensors[key], *sums, 9 * config["dim"], value[0, 0].numel())


@needs_golden
def test_a_backbones_own_state_dict_and_a_whole_checkpoint_are_understood(golden):
    config, tensors = golden
    plain = official(tensors)
    inner = {k.removeprefix("backbone."): v for k, v in plain.items() if k.startswith("backbone.")}
    image, expected = tensors["input"], loaded(config, plain)(tensors["input"])
    again = loaded(config, {"meta": {}, "state_dict": {f"module.{k}": v for k, v in plain.items()}})(image)
    assert torch.equal(again.logits, expected.logits)
    features = loaded(config, inner)(image)
    assert features.logits is None
    assert torch.equal(features.maps[0], expected.maps[0])
    fusion = {k.replace("fusion_conv", "fusion_net"): v for k, v in plain.items()}  # as their detectors call it
    assert torch.equal(loaded(config, fusion)(image).logits, expected.logits)


@needs_golden
@torch.no_grad()
def test_the_transformers_copy_of_the_backbone_does_too(golden):
    transformers = pytest.importorskip("transformers")
    config, tensors = golden
    dinov2 = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=config["dim"],
            num_hidden_layers=config["depth"],
            num_attention_heads=config["heads"],
            image_size=config["pretrain_img"],
            patch_size=config["patch"],
        )
    )
    state = official(tensors)
    dinov2.load_state_dict(
        _by_transformers({k[18:]: v for k, v in state.items() if k.startswith("backbone.backbone.")})
    )
    said = {"out_indices": config["out_indices"], "select_layers": config["select_layers"]}
    model = from_official("vit-split", state, dinov2.eval(), **said)
    features, atol = model(tensors["input"]), 2e-4
    torch.testing.assert_close(features.maps[0], tensors["fused"], rtol=atol, atol=atol)
    torch.testing.assert_close(features.logits, tensors["logits"], rtol=atol, atol=atol)


def _by_transformers(state):
    names = {"cls_token": "embeddings.cls_token", "mask_token": "embeddings.mask_token"}
    names |= {"pos_embed": "embeddings.position_embeddings", "norm.": "layernorm.", "blocks.": "encoder.layer."}
    names |= {"patch_embed.proj.": "embeddings.patch_embeddings.projection.", ".attn.proj.": ".attention.o_proj."}
    names |= {".ls1.gamma": ".layer_scale1.lambda1", ".ls2.gamma": ".layer_scale2.lambda1"}
    own = {}
    for key, value in state.items():
        name = key
        for old, new in names.items():
            if old in name if old.startswith(".") else name.startswith(old):
                name = name.replace(old, new, 1)
        if ".attn.qkv." in name:
            parts = (name.replace(".attn.qkv.", f".attention.{part}_proj.") for part in "qkv")
            own.update(dict(zip(parts, value.chunk(3))))
        else:
            own[name] = value
    return own


# ------------------------------------------------------- other sizes: against the equations, one step after the other

CASES = {
    "registers": {"dim": 32, "depth": 4, "heads": 2, "patch": 14, "registers": 2, "out_indices": [0, 3], "copies": 1},
    "padded": {"dim": 64, "depth": 3, "heads": 4, "patch": 16, "registers": 0, "out_indices": [2, 2, 0], "copies": 2,
               "image": (45, 63)},
    "one level": {"dim": 96, "depth": 5, "heads": 3, "patch": 8, "registers": 0, "out_indices": [4], "copies": 4,
                  "image": (24, 40)},
}  # fmt: skip


def made(case):
    """A random checkpoint by the authors' names for a random timm ViT, and that ViT."""
    sizes = {"embed_dim": case["dim"], "depth": case["depth"], "num_heads": case["heads"], "num_classes": 0}
    options = {"reg_tokens": case["registers"], "no_embed_class": True} if case["registers"] else {}
    torch.manual_seed(0)
    vit = randomise(
        VisionTransformer(4 * case["patch"], case["patch"], init_values=0.5, dynamic_img_size=True, **sizes, **options)
    )
    dim, taps, g = case["dim"], len(case["out_indices"]), torch.Generator().manual_seed(1)
    shapes = {}
    for name, width in (("frozen_conv", taps * dim), ("fusion_conv", 2 * dim)):
        shapes |= {f"{name}.0.weight": (dim, width, 1, 1), f"{name}.0.bias": (dim,)}
        shapes |= {f"{name}.2.offsets.weight": (18, dim, 3, 3), f"{name}.2.offsets.bias": (18,)}
        shapes |= {f"{name}.2.deform_conv.weight": (dim, dim, 3, 3)}
    state = {f"backbone.{k}": 0.1 * torch.randn(shape, generator=g) for k, shape in shapes.items()}
    for place, block in enumerate(vit.blocks[-case["copies"] :]):
        for name, value in block.state_dict().items():
            state[f"backbone.split_head.{place}.{name}"] = value + 0.02 * torch.randn(value.shape, generator=g)
    return vit, state


def deformable(x, state, name):
    """One output cell after the other, as the equation says it."""
    x = torch.nn.functional.gelu(torch.nn.functional.conv2d(x, state[f"{name}.0.weight"], state[f"{name}.0.bias"]))
    offsets = torch.nn.functional.conv2d(
        x, state[f"{name}.2.offsets.weight"], state[f"{name}.2.offsets.bias"], padding=1
    )
    weight, (batch, _, height, width) = state[f"{name}.2.deform_conv.weight"], x.shape
    out = torch.zeros_like(x)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                for point in range(9):
                    dy, dx = offsets[b, 2 * point : 2 * point + 2, row, column].tolist()
                    read = _bilinear(x[b], row + point // 3 - 1 + dy, column + point % 3 - 1 + dx)
                    out[b, :, row, column] += weight[:, :, point // 3, point % 3] @ read
    return torch.nn.functional.gelu(out)


def _bilinear(x, py, px):
    total = torch.zeros_like(x[:, 0, 0])
    for y in range(x.shape[1]):
        for column in range(x.shape[2]):
            share = max(0.0, 1 - abs(py - y)) * max(0.0, 1 - abs(px - column))
            total = total + share * x[:, y, column]
    return total


def by_hand(vit, state, case, image):
    state = {k.removeprefix("backbone."): v.double() for k, v in state.items()}
    height, width = image.shape[-2:]
    down, right = -height % case["patch"], -width % case["patch"]
    image = torch.nn.functional.pad(image, (right // 2, right - right // 2, down // 2, down - down // 2))
    grid = (image.shape[-2] // case["patch"], image.shape[-1] // case["patch"])

    def as_map(tokens):
        return vit.norm(tokens)[:, 1 + case["registers"] :].transpose(1, 2).unflatten(2, grid)

    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    states = []
    for block in vit.blocks:
        x = block(x)
        states.append(x)
    prior = deformable(torch.cat([as_map(states[i]) for i in case["out_indices"]], 1), state, "frozen_conv")
    task = states[case["depth"] - case["copies"] - 1]
    for place, block in enumerate(vit.blocks[-case["copies"] :]):
        own = {
            k.removeprefix(f"split_head.{place}."): v for k, v in state.items() if k.startswith(f"split_head.{place}.")
        }
        task = torch.func.functional_call(block, own, (task,))
    return deformable(torch.cat([prior, as_map(task)], 1), state, "fusion_conv")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_other_widths_grids_paddings_and_numbers_are_what_the_equations_say(case):
    vit, state = made(case)
    model = from_official("vit-split", state, vit, out_indices=case["out_indices"]).double()
    size = case.get("image", (4 * case["patch"], 4 * case["patch"]))
    image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2)).double()
    expected = by_hand(vit, state, case, image)
    torch.testing.assert_close(model(image).maps[0], expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(match, state=None, **options):
    vit, own = made(CASES["padded"])
    with pytest.raises(ValueError, match=match):
        from_official("vit-split", own if state is None else state(own), vit, **options)


def test_what_the_tensors_do_not_tell_is_asked_for_by_name():
    refused(r"out_indices is not in the tensors: pass the 3 blocks")


def test_options_that_contradict_tensors_or_backbone_are_refused():
    refused(r"out_indices=\[0, 1\] are 2, the checkpoint's tensors say 3", out_indices=[0, 1])
    refused(r"select_layers=\[2\] are 1, the checkpoint's tensors say 2", out_indices=[0, 1, 2], select_layers=[2])
    refused(
        r"registers=4 and a class token are 5 prefix tokens, the backbone has 1", out_indices=[0, 1, 2], registers=4
    )
    refused(r"pad=\[3, 0, 0, 0\]: left and top are half", out_indices=[0, 1, 2], pad=[3, 0, 0, 0])
    refused(r"'vit-split' has no option 'layers'", out_indices=[0, 1, 2], layers=3)
    refused(r"select_layers=2: give the indices of blocks", out_indices=[0, 1, 2], select_layers=2)
    refused(r"pad=\[3, 4, 0\]: give 'centre', 'corner', or", out_indices=[0, 1, 2], pad=[3, 4, 0])
    refused(r"strides=\[4, 8\]: this is a segmentor's checkpoint", out_indices=[0, 1, 2], strides=[4, 8])


@pytest.mark.parametrize(("key", "shape", "match"), [
    ("backbone.frozen_conv.0.weight", (64,), r"'frozen_conv.0.weight' .* has shape \(64,\), not 4 dimensions"),
    ("backbone.split_head.a.norm1.weight", (64,), r"has split_head.a, and split_head are numbered"),
])  # fmt: skip
def test_tensors_that_no_index_and_no_dimension_fits_are_named(key, shape, match):
    refused(match, lambda own: {**own, key: torch.ones(shape)}, out_indices=[0, 1, 2])


def test_a_checkpoint_whose_own_vit_has_another_depth_is_refused():
    blocks = {f"backbone.backbone.blocks.{i}.norm1.weight": torch.ones(64) for i in range(9)}
    refused("the checkpoint's own ViT has 9 blocks, the backbone", lambda own: {**own, **blocks}, out_indices=[0, 1, 2])


def test_other_checkpoints_and_variants_are_refused_by_name():
    refused("no ViT-Split checkpoint", lambda own: {"cls_token": torch.ones(1)})
    refused("learnable gate", lambda own: {**own, "backbone.learnable_gate.scores": torch.ones(3, 4)})
    plain = {"backbone.frozen_conv.2.weight": torch.ones(1)}
    refused("LLaVA variant", lambda own: {**{k: v for k, v in own.items() if "deform_conv" not in k}, **plain})
    wide = CASES["padded"] | {"dim": 96, "heads": 3}
    with pytest.raises(ValueError, match="checkpoint has dim=64, the backbone dim=96"):
        from_official("vit-split", made(CASES["padded"])[1], made(wide)[0], out_indices=[0, 1, 2])


@torch.no_grad()
def test_a_pass_that_others_share_is_padded_otherwise_and_says_so():
    case = CASES["padded"]
    vit, state = made(case)
    model = from_official("vit-split", state, vit, out_indices=case["out_indices"])
    whole, odd = torch.randn(1, 3, 48, 64), torch.randn(1, 3, 45, 63)
    assert torch.equal(model(model.extract(whole)).maps[0], model(whole).maps[0])
    assert torch.equal(model(model.extract(odd)).maps[0], model(odd).maps[0])
    with pytest.raises(ValueError, match="padded on all sides here"):
        run(replay(model.vit, odd), model.set_of("default"), odd)
    corner = from_official("vit-split", state, made(case)[0], out_indices=case["out_indices"], pad="corner")
    assert torch.equal(corner(corner.extract(odd)).maps[0], corner(odd).maps[0])
