"""ViT-Split: copies that are the blocks, what is read, cached and saved, and what it refuses."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, DIM, HOSTS
from reference import equal, outputs, stir

import adaptkit
from adaptkit.adapters.vit_split.config import evenly
from adaptkit.adapters.vit_split.copies import common_names
from adaptkit.core.registry import view
from adaptkit.core.tree import blocks_of
from adaptkit.core.view import Spec

KINDS = ("timm-vit", "timm-dinov2-reg", "timm-dinov3", "timm-beit", "timm-sam", "hf-dinov2", "hf-dinov3")
KINDS = [name for name in KINDS if name in HOSTS]


def image(name, batch=2, cells=(3, 5), extra=(0, 0)):
    patch = view(HOSTS[name].build()).spec.patch_size
    size = (cells[0] * patch + extra[0], cells[1] * patch + extra[1])
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def attached(name="timm-vit", head=None, **options):
    torch.manual_seed(1)
    return stir(adaptkit.attach(HOSTS[name].build(), ("vit-split", options), head=head), 0).eval()


# ------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("name", sorted(HOSTS))
@torch.no_grad()
def test_the_copies_say_at_first_what_their_blocks_say_bitwise(name):
    """On another grid than the backbone's own: rotary and relative positions reach the copies."""
    model, x = adaptkit.attach(HOSTS[name].build(), "vit-split", select_layers=[1, 2, 3]).eval(), image(name)
    tokens, blocks = model.vit.begin(x)
    before = blocks[0](tokens)
    expected = before
    for block in blocks[1:]:
        expected = block(expected)
    adapter = model.adapters["vit-split"]
    assert torch.equal(adapter._task(model.vit, before, model.vit.grid(x)), expected)
    trained = sum(p.numel() for p in adapter.split_head.parameters())
    blocks = blocks_of(model.vit.backbone, DEPTH)[1:]
    assert trained == sum(p.numel() for block in blocks for p in block.parameters())


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_cached_pass_and_a_crop_of_it_say_the_same_bitwise(name):
    model, x = attached(name, head=("upsample", {"num_classes": 2})), image(name, extra=(3, 1))
    cached = model.extract(x)
    assert cached.after == (1, 2, 3)
    assert cached.image is None
    assert equal(outputs(model(cached)), outputs(model(x)))
    patch = model.spec.patch_size
    window = cached.crop(patch, 0, 2 * patch, 3 * patch)
    assert model(window).logits.shape[-2:] == (2 * patch, 3 * patch)


def test_only_the_block_before_the_copies_and_those_of_the_prior_are_read():
    model = attached(select_layers=[2, 3], out_indices=[0])
    assert model.adapters["vit-split"].reads() == (0, 1)
    assert model.reads() == ((0, 1, 3), False)  # and the last, whose tokens are returned


def test_the_input_of_the_copies_is_detached_and_their_gradient_is_their_own():
    model, x = attached(out_indices=[3]), image("timm-vit").requires_grad_()
    adapter, seen = model.adapters["vit-split"], []
    adapter.split_head[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x).maps[0].sum().backward()
    assert seen[0].grad_fn is None
    assert not seen[0].requires_grad
    assert x.grad is not None  # through the prior alone
    assert all(p.grad is not None for p in adapter.split_head.parameters())


@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov3"] if "hf-dinov3" in HOSTS else ["timm-vit"])
@torch.no_grad()
def test_a_copy_of_the_model_trains_copies_of_its_own(name):
    model, x = attached(name), image(name)
    expected = outputs(model(x))
    other = copy.deepcopy(model)
    assert equal(outputs(other(x)), expected)
    for parameter in other.adapters["vit-split"].split_head.parameters():
        parameter.mul_(1.5)
    assert not torch.equal(other(x).maps[0], model(x).maps[0])
    assert equal(outputs(model(x)), expected)
    low = [m.float() for m in outputs(copy.deepcopy(model).double()(x.double()))]
    torch.testing.assert_close(low, [m.float() for m in expected], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [n for n in ("timm-vit", "timm-beit-shared", "hf-beit-shared") if n in HOSTS])
@pytest.mark.parametrize("cells", [(4, 4), (3, 5)])
def test_on_a_backbone_in_half_precision_the_copies_are_trained_in_float32(name, cells):
    model, x = adaptkit.attach(HOSTS[name].build().bfloat16(), "vit-split").train(), image(name, cells=cells)
    adapter = model.adapters["vit-split"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    maps = model(x).maps
    sum(m.square().mean() for m in maps).backward()
    assert {m.dtype for m in maps} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    model.bfloat16()(x)


def test_drop_path_of_the_backbone_acts_in_the_copies_while_they_train():
    host = VisionTransformer(32, 8, embed_dim=DIM, depth=2, num_heads=2, num_classes=0, drop_path_rate=0.9)
    model, x = adaptkit.attach(host, "vit-split", norm="layer").train(), torch.randn(4, 3, 32, 32)
    one, two = model(x), model(x)
    assert torch.equal(one.tokens, two.tokens)
    assert not torch.equal(one.maps[0], two.maps[0])
    assert torch.equal(model.eval()(x).maps[0], model(x).maps[0])


@pytest.mark.parametrize("how", ["option", "model"])
def test_checkpointed_copies_have_the_same_gradients_bitwise_and_run_twice(how):
    x, found, calls = image("timm-vit"), [], []
    for again in (False, True):
        model = attached(checkpoint=again and how == "option")
        if again and how == "model":
            model.gradient_checkpointing_enable()
        adapter, run = model.adapters["vit-split"], []
        adapter.split_head[0].register_forward_pre_hook(lambda *_, run=run: run.append(1))
        with adaptkit.reference():  # a fast path of attention rounds otherwise, and is not taken inside a checkpoint
            maps = model(x).maps
        sum(m.square().mean() for m in maps).backward()
        found.append([p.grad for p in adapter.parameters()])
        calls.append(len(run))
    assert equal(*found)
    assert calls == [1, 2]


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name", [n for n in ("hf-dinov2", "hf-dinov2-swiglu", "hf-beit", "timm-eva02-clip") if n in HOSTS]
)
def test_a_file_speaks_timms_names_and_the_parameters_those_of_the_block(name):
    model = attached(name)
    adapter = model.adapters["vit-split"]
    keys = {k.removeprefix("split_head.0.") for k in adapter.state_dict() if k.startswith("split_head.0.")}
    known = {"norm1", "norm2", "attn", "mlp", "ls1", "ls2"}
    assert {k.split(".")[0] for k in keys} <= known
    assert {"attn.qkv.weight", "attn.proj.bias", "mlp.fc1.weight", "mlp.fc2.bias", "norm1.weight"} <= keys
    assert keys.isdisjoint(n for n, _ in adapter.split_head[0].named_parameters() if "q_proj" in n or "gate" in n)
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert adapter.load_state_dict(before).missing_keys == []
    assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())
    whole = model.state_dict()  # of the model around it, too
    assert model.load_state_dict(whole, strict=True).unexpected_keys == []


def test_names_of_parts_are_joined_where_all_are_there():
    biased = [f"attention.{p}_proj.{t}" for p in "kqv" for t in ("weight", "bias")]
    assert common_names(biased) == {
        "attn.qkv.weight": tuple(f"attention.{p}_proj.weight" for p in "qkv"),
        "attn.qkv.bias": tuple(f"attention.{p}_proj.bias" for p in "qkv"),
    }
    without = [n for n in biased if n != "attention.k_proj.bias"]
    assert common_names(without)["attn.q_bias"] == ("attention.q_proj.bias",)
    assert "attn.qkv.bias" not in common_names(without)
    assert common_names(["mlp.up_proj.weight"]) == {"mlp.fc1.weight": ("mlp.up_proj.weight",)}
    gated = ["mlp.up_proj.weight", "mlp.gate_proj.weight"]
    assert common_names(gated) == {"mlp.fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")}


def test_a_file_of_blocks_that_are_built_otherwise_is_refused_by_what_they_have(tmp_path):
    attached("timm-vit").save(tmp_path)
    other = VisionTransformer(32, 8, embed_dim=DIM, depth=4, num_heads=2, num_classes=0, init_values=0.1)
    with (
        pytest.warns(UserWarning, match="weights"),
        pytest.raises(ValueError, match=r"lack ls1\.gamma, ls2\.gamma of it: attach to a"),
    ):
        adaptkit.attach(other, tmp_path)


# ------------------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    ("depth", "copies", "taps"),
    [
        (12, (9, 10, 11), (2, 5, 8, 11)),
        (24, (20, 21, 22, 23), (2, 5, 8, 11, 14, 17, 20, 23)),
        (40, tuple(range(32, 40)), tuple(range(27, 40))),
        (2, (1,), (1,)),
    ],
)
def test_the_papers_values_are_the_defaults(depth, copies, taps):
    spec = Spec("timm-vit", 384, depth, 6, 14, 1)
    config = adaptkit.ViTSplitConfig().resolve(spec)
    assert (config.select_layers, config.out_indices) == (copies, taps)


def test_the_defaults_fit_any_depth():
    for depth in range(2, 60):
        taps = evenly(depth)
        assert taps[-1] == depth - 1
        assert all(a < b for a, b in itertools.pairwise(taps))
        assert adaptkit.ViTSplitConfig().resolve(Spec("timm-vit", 32, depth, 2, 8, 1)).select_layers[0] >= 1


@torch.no_grad()
def test_strides_choose_the_maps_and_none_gives_the_fused_one():
    x = image("timm-vit")
    maps = attached(strides=[8, 32])(x).maps
    assert [m.shape[-2:] for m in maps] == [(3, 5), (1, 2)]
    model = attached("timm-dinov2-reg", strides=None)
    assert model.adapters["vit-split"].strides == (14,)
    (fused,) = model(image("timm-dinov2-reg", extra=(3, 1))).maps
    assert fused.shape == (2, DIM, 4, 6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"select_layers": [0, 1]}, "must be blocks 1 to 3 in ascending order"),
        ({"select_layers": [3, 2]}, "must be blocks 1 to 3 in ascending order"),
        ({"out_indices": [4]}, "must be 1 to 4 of the blocks 0 to 3"),
        ({"out_indices": []}, "must be 1 to 4 of the blocks 0 to 3"),
        ({"pad": "centre"}, "goes with strides=None"),
        ({"pad": "left"}, "is not a choice"),
        ({"norm": "instance"}, "is not a choice"),
        ({"strides": [5]}, "must be some of"),
    ],
)
def test_options_out_of_range_are_clear_errors(options, said):
    with pytest.raises(ValueError, match=said):
        adaptkit.attach(HOSTS["timm-vit"].build(), ("vit-split", options))


def test_backbones_that_it_cannot_split_are_refused_by_name():
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(64, window_size=4, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=5)
    with pytest.raises(TypeError, match="vit-split needs one width and one grid .* SwinTransformer has stages"):
        adaptkit.attach(swin, "vit-split")
    shallow = VisionTransformer(32, 8, embed_dim=DIM, depth=1, num_heads=2, num_classes=0)
    with pytest.raises(ValueError, match="needs two or more; this ViT has 1"):
        adaptkit.attach(shallow, "vit-split")


def test_lora_stays_in_the_backbone():
    """Copies are of the backbone's own layers, whatever else is attached."""
    torch.manual_seed(1)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), "lora", "vit-split")
    names = [n for n, _ in model.adapters["vit-split"].named_parameters()]
    assert not [n for n in names if "lora" in n]
    own = [n for n, _ in attached().adapters["vit-split"].named_parameters()]
    assert names == own


@torch.no_grad()
def test_padded_on_all_sides_it_is_cached_bit_for_bit_and_not_mixed_with_the_other_padding():
    build = HOSTS["timm-vit"].build
    options = {"strides": None, "out_indices": [1, 3], "select_layers": [2, 3]}
    centre, corner = (
        adaptkit.attach(build(), ("vit-split", {**options, "pad": pad})).eval() for pad in ("centre", "corner")
    )
    corner.load_adapter_state_dict(centre.adapter_state_dict())
    side = centre.spec.patch_size
    x = torch.randn(2, 3, 3 * side + 3, 2 * side + 5)
    seen, direct = centre.extract(x), centre(x)
    assert (seen.pad, seen.size, seen.grid) == ("centre", (3 * side + 3, 2 * side + 5), (4, 3))
    assert torch.equal(centre(seen).maps[0], direct.maps[0])
    assert torch.equal(centre(seen).tokens, direct.tokens)
    assert not torch.equal(corner(x).maps[0], direct.maps[0])
    for model, other in ((corner, seen), (centre, corner.extract(x))):
        with pytest.raises(ValueError, match="extract them with this model"):
            model(other)
    with pytest.raises(ValueError, match="padded on all sides"):
        seen.crop(0, 0, side, side)
    with pytest.raises(ValueError, match="padded: centre and corner"):
        type(seen).join([seen, corner.extract(x)])
    whole = x[..., : 3 * side, : 2 * side]
    assert torch.equal(centre(corner.extract(whole)).maps[0], corner(whole).maps[0])
    with pytest.raises(ValueError, match="shared with others"):
        adaptkit.attach_many(build(), {"a": ("vit-split", {**options, "pad": "centre"})}).eval()(x)


@pytest.mark.parametrize("head", ["linear", "fpn", "upsample"])
@torch.no_grad()
def test_what_is_padded_on_all_sides_is_answered_where_it_lies(head):
    """As of the padded image itself, whose middle is the image."""
    options = {"strides": None, "pad": "centre"}
    model = attached("timm-vit", head=(head, {"num_classes": 3}), **options)
    x, patch = image("timm-vit", extra=(3, 5)), model.spec.patch_size
    top, left = (-3 % patch) // 2, (-5 % patch) // 2
    assert left > 0
    whole = torch.nn.functional.pad(x, (left, -5 % patch - left, top, -3 % patch - top))
    expected = model(whole).logits[..., top : top + x.shape[-2], left : left + x.shape[-1]]
    found = model(x)
    assert found.size == tuple(x.shape[-2:])
    assert torch.equal(found.logits, expected)
    assert torch.equal(model(model.extract(x)).logits, expected)
