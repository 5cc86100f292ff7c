"""What is special in one family, and what two libraries' copies of the same weights have in common."""

import copy
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, DIM, HEADS, HOSTS, randomise
from reference import stir

import adaptkit
from adaptkit import analysis
from adaptkit.core.registry import view

transformers = pytest.importorskip("transformers")
SIDE, HF = 32, {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": 32}
HF |= {"patch_size": 8, "intermediate_size": 2 * DIM}


def image(height=SIDE, width=SIDE, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def tokens(model, x):
    features = view(model).features(x)
    return torch.cat([features.prefix, features.tokens], dim=1)


def native(host):
    return image(host.size, host.size)


# -- for every family ------------------------------------------------------------------------------------------------


def state(model):
    """Everything a module holds: parameters and buffers (also those not saved), and plain attributes."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    plain = {
        f"{name}.{key}": repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, torch.Tensor | torch.nn.Module)
    }
    return tensors, plain


@pytest.mark.parametrize("name", sorted(HOSTS))
@torch.no_grad()
def test_a_forward_at_another_size_leaves_the_host_as_it_was(name):
    model = HOSTS[name].build()
    before, plain = state(model)
    values = copy.deepcopy(before)
    patch = view(model).spec.patch_size
    view(model).features(image(3 * patch, 5 * patch))
    after, plain_after = state(model)
    assert {k: id(v) for k, v in after.items()} == {k: id(v) for k, v in before.items()}
    assert all(torch.equal(after[k], values[k]) for k in values)
    assert plain_after == plain


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_fingerprint_tensors_have_the_same_names_and_shapes_in_every_family(name):
    vit = view(HOSTS[name].build())
    shapes = {key: tuple(t.shape) for key, t in vit.fingerprint_tensors().items()}
    assert shapes == {"patch": (DIM, 3, vit.spec.patch_size, vit.spec.patch_size), "first": (DIM,), "last": (DIM,)}


@pytest.mark.parametrize("name", sorted(HOSTS))
@torch.no_grad()
def test_blocks_run_without_the_prefix_where_the_view_says_so(name):
    vit = view(HOSTS[name].build())
    if not vit.prefix_optional:
        pytest.skip("these blocks need their prefix")
    x, blocks = vit.begin(image(3 * vit.spec.patch_size, 5 * vit.spec.patch_size))
    for block in blocks:
        x = block(x[:, -15:])
    assert x.shape[1] == 15


# One backbone per family: compilation is the slow part of this file.
COMPILED = (
    "timm-vit timm-dinov3 timm-beit-both timm-sam hf-vit hf-vit-mae hf-dinov2-reg hf-dinov3 hf-clip hf-siglip hf-beit"
)


@pytest.mark.parametrize("name", COMPILED.split())
@torch.no_grad()
def test_the_forward_is_one_graph(name):
    torch.compiler.reset()
    host = HOSTS[name]
    vit = view(host.build())
    compiled = torch.compile(lambda x: vit.features(x).tokens, fullgraph=True, backend="eager")
    assert torch.equal(compiled(native(host)), vit.features(native(host)).tokens)


# -- the same weights in two libraries -------------------------------------------------------------------------------


def assert_same_backbone(ours, theirs, x):
    torch.testing.assert_close(tokens(ours, x), tokens(theirs, x), atol=1e-5, rtol=1e-5)
    a, b = view(ours).fingerprint_tensors(), view(theirs).fingerprint_tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert view(ours).spec[1:] == view(theirs).spec[1:]  # all but the family's name
    for adapter in (("vit-adapter", {"conv_inplane": 8}), "vit-split"):
        with tempfile.TemporaryDirectory() as folder:  # one file, saved beside one copy, attached strictly to the other
            trained = stir(adaptkit.attach(theirs, adapter), 0).eval()
            expected = trained(x)
            trained.save(folder)
            trained.detach()
            attached = adaptkit.attach(ours, adaptkit.load(folder), strict=True)
            for a, b in zip(attached(x).maps, expected.maps):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
            attached.detach()


def rename(state, table):
    """Keys of timm from keys of transformers, the parts of q, k, v joined."""
    out = {}
    for key, value in state.items():
        for old, new in table:
            key = key.replace(old, new)
        out[key] = value
    for key in [k for k in out if ".q_proj." in k]:
        parts = [out.pop(key.replace("q_proj", part), None) for part in ("q_proj", "k_proj", "v_proj")]
        parts = [torch.zeros_like(parts[0]) if p is None else p for p in parts]
        out[key.replace("q_proj", "qkv")] = torch.cat(parts)
    return out


VIT = [("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("embeddings.cls_token", "cls_token")]
VIT += [("embeddings.position_embeddings", "pos_embed"), ("encoder.layer.", "blocks."), ("layernorm.", "norm.")]
VIT += [("attention.o_proj", "attn.proj"), ("attention.", "attn.")]
DINO = [*VIT, ("layer_scale", "ls"), (".lambda1", ".gamma"), ("embeddings.register_tokens", "reg_token")]


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
    return VisionTransformer(**sizes, mlp_ratio=2, **options).eval()


@torch.no_grad()
def test_dinov2_is_the_same_backbone_in_both_libraries():
    theirs = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**HF, mlp_ratio=2, layerscale_value=0.5)))
    ours = timm_vit(init_values=0.5)
    state = rename(theirs.state_dict(), DINO)
    state.pop("embeddings.mask_token")
    ours.load_state_dict(state)
    assert_same_backbone(ours, theirs, image())


@torch.no_grad()
def test_dinov2_with_registers_is_the_same_backbone_in_both_libraries():
    config = transformers.Dinov2WithRegistersConfig(**HF, mlp_ratio=2, layerscale_value=0.5, num_register_tokens=4)
    theirs = randomise(transformers.Dinov2WithRegistersModel(config))
    ours = timm_vit(init_values=0.5, reg_tokens=4, no_embed_class=True)
    state = rename(theirs.state_dict(), DINO)
    state.pop("embeddings.mask_token")
    # timm adds the class token's position to the class token once and for all
    positions = state["pos_embed"]
    state["cls_token"] = state["cls_token"] + positions[:, :1]
    state["pos_embed"] = positions[:, 1:]
    ours.load_state_dict(state)
    assert_same_backbone(ours, theirs, image())
    assert_same_backbone(ours, theirs, image(24, 40))  # both resample with antialias


@torch.no_grad()
def test_dinov3_is_the_same_backbone_in_both_libraries():
    config = transformers.DINOv3ViTConfig(**HF, num_register_tokens=4, layerscale_value=0.5, key_bias=True)
    theirs = randomise(transformers.DINOv3ViTModel(config))
    from timm.models.eva import Eva

    ours = Eva(
        img_size=SIDE,
        patch_size=8,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=2,
        num_classes=0,
        attn_type="rope",  # a plain bias on q, k and v
        init_values=0.5,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-5),
    ).eval()
    table = [("embeddings.patch_embeddings", "patch_embed.proj"), ("embeddings.cls_token", "cls_token")]
    table += [("embeddings.register_tokens", "reg_token"), ("model.layer.", "blocks."), ("attention.o_", "attn.")]
    table += [("attention.", "attn."), ("layer_scale1.lambda1", "gamma_1"), ("layer_scale2.lambda1", "gamma_2")]
    table += [("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2")]
    state = rename(theirs.state_dict(), table)
    state.pop("embeddings.mask_token")
    ours.load_state_dict(state)
    for x in (image(), image(24, 40)):  # rotary positions agree on any grid
        assert_same_backbone(ours, theirs, x)


@torch.no_grad()
def test_clip_is_the_same_backbone_in_both_libraries():
    theirs = HOSTS["hf-clip"].build()
    ours = timm_vit(pre_norm=True, act_layer=partial(QuickGELU), norm_layer=partial(torch.nn.LayerNorm, eps=1e-5))
    table = [("embeddings.patch_embedding.", "patch_embed.proj."), ("embeddings.class_embedding", "cls_token")]
    table += [("embeddings.position_embedding.weight", "pos_embed"), ("pre_layrnorm", "norm_pre")]
    table += [("encoder.layers.", "blocks."), ("self_attn.out_proj", "attn.proj"), ("self_attn.", "attn.")]
    table += [("layer_norm", "norm"), ("post_layernorm", "norm")]
    state = rename(theirs.state_dict(), table)
    state["cls_token"], state["pos_embed"] = state["cls_token"][None, None], state["pos_embed"][None]
    ours.load_state_dict(state)
    assert_same_backbone(ours, theirs, image())


class QuickGELU(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


# -- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["hf-vit", "hf-beit", "hf-dinov3"])
@torch.no_grad()
def test_the_view_equals_the_host_under_either_attention(name, implementation):
    model = HOSTS[name].build()
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    x = native(HOSTS[name])
    assert torch.equal(tokens(model, x), model(x).last_hidden_state)


@torch.no_grad()
def test_clip_is_normed_where_the_host_norms_only_what_it_pools():
    model = HOSTS["hf-clip"].build()
    vit, x = view(model), image()
    said = model(x)
    y, blocks = vit.begin(x)
    for block in blocks:
        y = block(y)
    assert torch.equal(y, said.last_hidden_state)
    torch.testing.assert_close(vit.features(x).prefix[:, 0], said.pooler_output, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_mae_is_seen_unmasked_and_its_config_is_left_alone():
    model = HOSTS["hf-vit-mae"].build()
    x = image()
    assert model(x).last_hidden_state.shape[1] == 1 + 16 // 4
    assert view(model).features(x).tokens.shape[1] == 16
    assert model.config.mask_ratio == 0.75
    assert torch.equal(tokens(model, x), tokens(model, x))  # no chance in it


@pytest.mark.parametrize("inside", ["CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel"])
@torch.no_grad()
def test_the_vision_model_inside_a_larger_one_is_seen(inside):
    config = getattr(transformers, inside).config_class
    kind = inside.replace("Model", "").replace("WithProjection", "").replace("Vision", "")
    if inside != "CLIPVisionModelWithProjection":
        text = {k: v for k, v in HF.items() if k not in ("image_size", "patch_size")}
        model = getattr(transformers, inside)(config(text_config={**text, "vocab_size": 99}, vision_config=HF)).eval()
    else:
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**HF)).eval()
    vit = view(model)
    assert vit.spec.family == f"hf-{kind.lower()}"
    assert vit.backbone is model.vision_model
    assert torch.equal(tokens(model, image()), tokens(model.vision_model, image()))


@pytest.mark.parametrize("model", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
@torch.no_grad()
def test_a_backbone_class_gives_the_map_of_its_last_stage(model):
    config = getattr(transformers, f"{model}Config")(**HF)
    backbone = randomise(getattr(transformers, f"{model}Backbone")(config))
    features = view(backbone).features(image())
    expected = backbone(image()).feature_maps[-1]
    assert torch.equal(features.tokens.transpose(1, 2).unflatten(2, features.grid), expected)


@torch.no_grad()
def test_a_timm_model_inside_transformers_is_seen_as_the_timm_model():
    model = HOSTS["hf-timm-wrapper"].build()
    assert view(model).spec.family == "timm-vit"
    assert view(model).backbone is model.timm_model


@torch.no_grad()
def test_a_timm_backbone_inside_transformers_is_seen_to_its_last_block():
    backbone = transformers.TimmBackbone(transformers.TimmBackboneConfig(backbone="test_vit"), pretrained=False).eval()
    features = view(backbone).features(image(160, 160))
    expected = backbone(image(160, 160)).feature_maps[-1]
    assert torch.equal(features.tokens.transpose(1, 2).unflatten(2, features.grid), expected)


def test_a_transformers_model_has_no_classifier():
    vit = view(HOSTS["hf-vit"].build())
    assert vit.logits(vit.features(image())) is None


def test_source_is_the_hub_id_and_commit():
    model = HOSTS["hf-vit"].build()
    model.config._name_or_path, model.config._commit_hash = "org/model", "abc"
    assert view(model).source()[:2] == ("org/model", "abc")


# -- refusals --------------------------------------------------------------------------------------------------------


def test_sam_says_that_its_attention_does_not_come_apart():
    vit = view(HOSTS["timm-sam"].build())
    x, blocks = vit.begin(image())
    for part in (blocks[0].qkv, blocks[1].qkv, blocks[0].out):
        with pytest.raises(TypeError, match="inside padded windows"):
            part(x)


@torch.no_grad()
def test_sam_without_convolutions_has_a_final_norm_and_logits():
    """timm calls the norm ``neck``; ``samvit_base_patch16_224`` is such a model."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    options = {"neck_chans": None, "use_abs_pos": False, "use_rel_pos": True, "window_size": 3}
    sizes = {"img_size": 64, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
    host = randomise(VisionTransformerSAM(**sizes, **options))
    for size in ((64, 64), (48, 80)):
        image = torch.randn(2, 3, *size)
        features = adaptkit.attach(host, "lora").eval()(image)
        assert torch.equal(features.tokens, host.forward_features(image).flatten(2).mT)
        assert torch.equal(features.logits, host(image))
    assert type(host.neck).__name__ == "LayerNorm2d"
    assert view(host).positions == "relative ones linear"
    with pytest.raises(TypeError, match=r"no table of positions to its tokens \(positions: relative ones linear\)$"):
        analysis.position_similarity(adaptkit.attach(host, "lora"))


def test_gated_attention_runs_but_does_not_come_apart():
    from timm.models.eva import EvaBlock

    model = HOSTS["timm-eva02"].build()
    for i in range(DEPTH):
        model.blocks[i] = randomise(EvaBlock(DIM, HEADS, gated_attn=True, norm_layer=torch.nn.LayerNorm))
    assert torch.equal(tokens(model, image()), model.forward_features(image()))
    x, blocks = view(model).begin(image())
    with pytest.raises(TypeError, match="gates its attention"):
        blocks[0].attention(x)


def test_a_strange_eva_block_is_refused():
    model = HOSTS["timm-eva02"].build()
    strange = torch.nn.ModuleDict({"attn": model.blocks[1].attn})
    strange.__class__ = type("Strange", (torch.nn.ModuleDict,), {})
    model.blocks[1] = strange
    with pytest.raises(TypeError, match="timm's Strange is not of the form"):
        view(model).begin(image())


def test_a_subclass_of_a_block_that_computes_the_same_is_seen():
    model = HOSTS["timm-eva02"].build()
    model.blocks[1].__class__ = type("Mine", (type(model.blocks[1]),), {})
    assert torch.equal(tokens(model, image()), tokens(HOSTS["timm-eva02"].build(), image()))


def test_oblong_patches_are_refused():
    config = transformers.ViTConfig(**{**HF, "patch_size": (8, 4)})
    with pytest.raises(TypeError, match="8x4 pixels are not square"):
        view(transformers.ViTModel(config))
