"""Tiny random vision towers of libraries and of classes around them: what attaches, and what each says of its tokens.

``families.py`` holds the hosts that meet the whole contract. These are proven bitwise at two sizes and meet every adapter
once (``tests/backbones/test_towers.py``), and ``tests/fits.py`` prints them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from families import DEPTH, DIM, HEADS, randomise
from torch import Tensor, nn

SIDE, PATCH = 32, 8
NATIVE = ((SIDE, SIDE),)
TWO = (*NATIVE, (24, 40))
SIZES = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": SIDE}
SIZES |= {"patch_size": PATCH, "intermediate_size": 2 * DIM}
#: Of adapters that would be large beside these hosts.
OPTIONS = {"vit-adapter": {"conv_inplane": 8}, "metaformer": {"width": 8}}


class Tower(NamedTuple):
    """How to build a backbone, and how to ask it for its own tokens (B, P+N, D), prefix first, after the final norm."""

    build: Callable[[], nn.Module]
    tokens: Callable[[Any, Tensor], Tensor]
    sizes: tuple[tuple[int, int], ...] = TWO  # that the host itself takes
    library: str = "transformers"
    logits: Callable[[Any, Tensor], Tensor] | None = None


TOWERS: dict[str, Tower] = {}


def have(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _of(path: str, cls: str) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{path}"), cls)


def of_config(path: str, cls: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """A function that builds a class of transformers from a config with these options."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomise(_of(path, cls)(_of(path, config)(**options)))

    return build


def hf(path: str, cls: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    """The same, of the tiny sizes."""
    return of_config(path, cls, config, **{**SIZES, **options})


def given_by(module: nn.Module, host: Any, image: Tensor) -> Tensor:
    """What a module inside the host gives while the host runs on an image."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, args, out: kept.append(out))
    host(image)
    hook.remove()
    return kept[0]


def last(**options: Any) -> Callable[[Any, Tensor], Tensor]:
    """``last_hidden_state``; these options at another size than the host's own."""

    def tokens(host: Any, image: Tensor) -> Tensor:
        return host(image, **(options if image.shape[-2:] != (SIDE, SIDE) else {})).last_hidden_state

    return tokens


def _normed(host: Any, image: Tensor) -> Tensor:
    """CLIP's, all of them through the norm that the host keeps for the pooled one."""
    return host.post_layernorm(last(interpolate_pos_encoding=True)(host, image))


RESIZED = last(interpolate_pos_encoding=True)
TOWERS["MetaClip2VisionModel"] = Tower(hf("metaclip_2", "MetaClip2VisionModel", "MetaClip2VisionConfig"), _normed)
TOWERS["ChineseCLIPVisionModel"] = Tower(
    hf("chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"), _normed
)
TOWERS["AltCLIPVisionModel"] = Tower(hf("altclip", "AltCLIPVisionModel", "AltCLIPVisionConfig"), _normed)
TOWERS["CLIPSegVisionModel"] = Tower(hf("clipseg", "CLIPSegVisionModel", "CLIPSegVisionConfig"), _normed)
TOWERS["OwlViTVisionTransformer"] = Tower(
    lambda: hf("owlvit", "OwlViTVisionModel", "OwlViTVisionConfig")().vision_model, _normed
)
TOWERS["Owlv2VisionTransformer"] = Tower(
    lambda: hf("owlv2", "Owlv2VisionModel", "Owlv2VisionConfig")().vision_model, _normed
)
TOWERS["BlipVisionModel"] = Tower(hf("blip", "BlipVisionModel", "BlipVisionConfig"), RESIZED)
TOWERS["Blip2VisionModel"] = Tower(hf("blip_2", "Blip2VisionModel", "Blip2VisionConfig"), RESIZED)
TOWERS["InstructBlipVisionModel"] = Tower(
    hf("instructblip", "InstructBlipVisionModel", "InstructBlipVisionConfig", qkv_bias=False), RESIZED
)
TOWERS["InternVLVisionModel"] = Tower(
    hf("internvl", "InternVLVisionModel", "InternVLVisionConfig", layer_scale_init_value=0.5, use_qk_norm=True,
       use_absolute_position_embeddings=True, norm_type="rms_norm"), last(),
)  # fmt: skip
TOWERS["Aimv2VisionModel"] = Tower(hf("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig"), last(), NATIVE)
TOWERS["Aimv2VisionModel (native)"] = Tower(
    hf("aimv2", "Aimv2VisionModel", "Aimv2VisionConfig", is_native=True, qkv_bias=True), last()
)
_data2vec = ("data2vec.modeling_data2vec_vision", "Data2VecVisionModel")
TOWERS["Data2VecVisionModel"] = Tower(lambda: _data2vec_vision(use_relative_position_bias=True), last())
TOWERS["Data2VecVisionModel (shared bias)"] = Tower(
    lambda: _data2vec_vision(use_shared_relative_position_bias=True, use_absolute_position_embeddings=True,
                             use_mean_pooling=False, layer_scale_init_value=0.0), last(),
)  # fmt: skip


def _data2vec_vision(cls: str = "Data2VecVisionModel", **options: Any) -> nn.Module:
    config = _of("data2vec", "Data2VecVisionConfig")(**{**SIZES, "layer_scale_init_value": 0.5, **options})
    torch.manual_seed(0)
    return randomise(_of("data2vec.modeling_data2vec_vision", cls)(config))


DETECTING = {"num_detection_tokens": 3, "image_size": [SIDE, SIDE]}


def _detection_first(host: Any, image: Tensor) -> Tensor:
    """Class token, detection tokens, patches."""
    x = host(image).last_hidden_state
    return torch.cat([x[:, :1], x[:, -3:], x[:, 1:-3]], dim=1)


TOWERS["YolosModel"] = Tower(
    hf("yolos", "YolosModel", "YolosConfig", use_mid_position_embeddings=True, **DETECTING), _detection_first
)
TOWERS["YolosModel (positions once)"] = Tower(
    hf("yolos", "YolosModel", "YolosConfig", use_mid_position_embeddings=False, qkv_bias=False, **DETECTING),
    _detection_first,
)


def patches(image: Tensor) -> dict[str, Tensor]:
    """An image as SigLIP 2's processor gives it, no patch padded."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    rows = torch.stack([convert_image_to_patches(x, PATCH) for x in image])
    shape = torch.tensor([image.shape[2] // PATCH, image.shape[3] // PATCH]).expand(len(image), 2)
    return {"pixel_values": rows, "pixel_attention_mask": torch.ones(rows.shape[:2]).long(), "spatial_shapes": shape}


TOWERS["Siglip2VisionModel"] = Tower(
    hf("siglip2", "Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16),
    lambda host, image: host(**patches(image)).last_hidden_state,
)


def _no_queries(host: Any, image: Tensor) -> Tensor:
    """EoMT's blocks by hand, without the queries that join before the last ones."""
    x, given = host.embeddings(image), {}
    if hasattr(host, "rope_embeddings"):
        given = {"position_embeddings": host.rope_embeddings(image)}
    for layer in host.layers:
        x = layer(x, **given)
    return host.layernorm(x)


EOMT = {"num_blocks": 2, "num_queries": 3, "num_register_tokens": 2, "num_upscale_blocks": 1}
TOWERS["EomtForUniversalSegmentation"] = Tower(
    hf("eomt", "EomtForUniversalSegmentation", "EomtConfig", **EOMT), _no_queries, NATIVE
)
TOWERS["EomtDinov3ForUniversalSegmentation"] = Tower(
    hf("eomt_dinov3", "EomtDinov3ForUniversalSegmentation", "EomtDinov3Config", **EOMT), _no_queries
)


# ------------------------------------------------------------------------------------ those with a classifier of theirs


def _headed(
    path: str, cls: str, config: str, inside: str, tokens: Callable[[Any, Tensor], Tensor], **more: Any
) -> None:
    """``more``: of the config, and ``sizes``."""
    sizes = more.pop("sizes", NATIVE)
    TOWERS[cls] = Tower(
        hf(path, cls, config, num_labels=5, **more),
        lambda host, image: tokens(getattr(host, inside), image),
        sizes,
        logits=lambda host, image: host(image).logits,
    )


def _of_vision(path: str, cls: str, config: str, tokens: Callable[[Any, Tensor], Tensor], **more: Any) -> None:
    """Those whose config holds one of the vision model."""

    def build() -> nn.Module:
        whole = _of(path, config)(vision_config={**SIZES, **more}, num_labels=5)
        torch.manual_seed(0)
        return randomise(_of(path, cls)(whole))

    inputs = patches if "Siglip2" in cls else (lambda image: {"pixel_values": image})
    TOWERS[cls] = Tower(
        build,
        lambda host, image: tokens(host.vision_model, image),
        NATIVE,
        logits=lambda host, image: host(**inputs(image)).logits,
    )


_headed("vit", "ViTForImageClassification", "ViTConfig", "vit", RESIZED)
_headed("deit", "DeiTForImageClassification", "DeiTConfig", "deit", RESIZED)
_headed("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", "deit", RESIZED)
_headed("vit_msn", "ViTMSNForImageClassification", "ViTMSNConfig", "vit", RESIZED)
_headed("ijepa", "IJepaForImageClassification", "IJepaConfig", "ijepa", RESIZED)
_dinov2 = {"layerscale_value": 0.5, "mlp_ratio": 2, "sizes": TWO}
_headed("dinov2", "Dinov2ForImageClassification", "Dinov2Config", "dinov2", last(), **_dinov2)
_headed(
    "dinov2_with_registers", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
    "dinov2_with_registers", last(), **_dinov2,
)  # fmt: skip
_headed("beit", "BeitForImageClassification", "BeitConfig", "beit", last(), use_relative_position_bias=True,
        sizes=TWO)  # fmt: skip
TOWERS["Data2VecVisionForImageClassification"] = Tower(
    lambda: _data2vec_vision("Data2VecVisionForImageClassification", num_labels=5, use_relative_position_bias=True),
    lambda host, image: host.data2vec_vision(image).last_hidden_state,
    logits=lambda host, image: host(image).logits,
)
_of_vision("clip", "CLIPForImageClassification", "CLIPConfig", last())
_of_vision("metaclip_2", "MetaClip2ForImageClassification", "MetaClip2Config", last())
_of_vision("siglip", "SiglipForImageClassification", "SiglipConfig", last())
_of_vision("siglip2", "Siglip2ForImageClassification", "Siglip2Config", TOWERS["Siglip2VisionModel"].tokens,
           num_patches=16)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- those on a map


def _map_tokens(host: Any, image: Tensor) -> Tensor:
    return host(image).last_hidden_state.flatten(2).transpose(1, 2)


VITDET = {"window_size": 3, "window_block_indices": [0, 2], "use_relative_position_embeddings": True, "mlp_ratio": 2}
VITDET |= {"pretrain_image_size": SIDE}
TOWERS["VitDetModel"] = Tower(hf("vitdet", "VitDetModel", "VitDetConfig", **VITDET), _map_tokens)
TOWERS["VitDetBackbone"] = Tower(
    hf("vitdet", "VitDetBackbone", "VitDetConfig", **VITDET),
    lambda host, image: host(image).feature_maps[-1].flatten(2).transpose(1, 2),
)


def _before_neck(host: Any, image: Tensor) -> Tensor:
    """What the last layer of SAM's encoder gives."""
    return given_by(host.layers[-1], host, image).flatten(1, 2)


SAM = {"window_size": 3, "global_attn_indexes": [1, 3], "output_channels": 8, "mlp_dim": 2 * DIM}
TOWERS["SamVisionEncoder"] = Tower(
    lambda: hf("sam", "SamVisionModel", "SamVisionConfig", **SAM)().vision_encoder, _before_neck, NATIVE
)
TOWERS["SamVisionModel"] = Tower(
    hf("sam", "SamVisionModel", "SamVisionConfig", **SAM), lambda host, x: _before_neck(host.vision_encoder, x), NATIVE
)


# ------------------------------------------------------------------------------------------------- those of several stages


HIERA = {"embed_dim": 16, "image_size": [64, 64], "patch_stride": [4, 4], "mlp_ratio": 2.0}
HIERA |= {"depths": [2, 2, 3, 2], "num_heads": [1, 2, 4, 8], "num_labels": 5}
BIG = ((64, 64), (64, 96))


def _hiera_tokens(host: Any, image: Tensor) -> Tensor:
    other = tuple(image.shape[-2:]) != (64, 64)
    return host(image, interpolate_pos_encoding=other).last_hidden_state


TOWERS["HieraModel"] = Tower(of_config("hiera", "HieraModel", "HieraConfig", **HIERA), _hiera_tokens, BIG)
TOWERS["HieraForImageClassification"] = Tower(
    of_config("hiera", "HieraForImageClassification", "HieraConfig", **HIERA),
    lambda host, image: _hiera_tokens(host.hiera, image),
    BIG[:1],
    logits=lambda host, image: host(image).logits,
)

SWIN = {"image_size": 64, "embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "mlp_ratio": 2.0}
SWIN |= {"window_size": 2, "num_labels": 5}
ALL_STAGES = {"out_features": ["stage1", "stage4"]}


def _swin_tokens(host: Any, image: Tensor) -> Tensor:
    return host(image, interpolate_pos_encoding=tuple(image.shape[-2:]) != (64, 64)).last_hidden_state


def _last_map(host: Any, image: Tensor) -> Tensor:
    return host(image).feature_maps[-1].flatten(2).mT


for _path, _name in (("swin", "Swin"), ("swinv2", "Swinv2")):
    TOWERS[f"{_name}Model"] = Tower(of_config(_path, f"{_name}Model", f"{_name}Config", **SWIN), _swin_tokens, BIG)
    TOWERS[f"{_name}Backbone"] = Tower(
        of_config(_path, f"{_name}Backbone", f"{_name}Config", **ALL_STAGES, **SWIN), _last_map, BIG
    )
    TOWERS[f"{_name}ForImageClassification"] = Tower(
        of_config(_path, f"{_name}ForImageClassification", f"{_name}Config", **SWIN),
        lambda host, image: _swin_tokens(host.base_model, image),
        BIG,
        logits=lambda host, image: host(image).logits,
    )

TOWERS["SwinModel (positions)"] = Tower(
    of_config("swin", "SwinModel", "SwinConfig", use_absolute_embeddings=True, **SWIN), _swin_tokens, BIG
)  # of Swinv2 such a model does not run: its table has one position too many

POOLFORMER = {"hidden_sizes": [16, 24, 32, 64], "depths": [1, 1, 2, 1], "layer_scale_init_value": 0.5, "num_labels": 5}
for _scaled in (True, False):
    TOWERS[f"PoolFormerModel{'' if _scaled else ' (no scale)'}"] = Tower(
        of_config("poolformer", "PoolFormerModel", "PoolFormerConfig", use_layer_scale=_scaled, **POOLFORMER),
        lambda host, image: host(image).last_hidden_state.flatten(2).mT,
        BIG,
    )
TOWERS["PoolFormerForImageClassification"] = Tower(
    of_config("poolformer", "PoolFormerForImageClassification", "PoolFormerConfig", **POOLFORMER),
    lambda host, image: host.poolformer(image).last_hidden_state.flatten(2).mT,
    BIG,
    logits=lambda host, image: host(image).logits,
)

SAM2 = {"hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [2, 2, 4, 2]}
SAM2 |= {"embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8], "mlp_ratio": 2.0}
SAM2 |= {"window_size_per_stage": [4, 2, 4, 2], "global_attention_blocks": [6]}
SAM2 |= {"window_positional_embedding_background_size": [3, 3]}


def _sam2(around: bool = False) -> nn.Module:
    config = _of("sam2", "Sam2HieraDetConfig")(**SAM2)
    torch.manual_seed(0)
    if not around:
        return randomise(_of("sam2.modeling_sam2", "Sam2HieraDetModel")(config))
    whole = _of("sam2", "Sam2VisionConfig")(backbone_config=config, backbone_channel_list=[128, 64, 32, 16])
    return randomise(_of("sam2", "Sam2VisionModel")(whole))


TOWERS["Sam2HieraDetModel"] = Tower(_sam2, lambda host, image: host(image).last_hidden_state.flatten(1, 2), BIG)
TOWERS["Sam2VisionModel"] = Tower(
    lambda: _sam2(True), lambda host, image: host(image).last_hidden_state.flatten(1, 2), BIG
)


# ------------------------------------------------------------------------------------------------- of other libraries


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return randomise(VisionTransformer(SIDE, PATCH, DEPTH, HEADS, DIM, 2 * DIM, num_classes=5))


def _open_clip(**options: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    return randomise(VisionTransformer(SIDE, PATCH, DIM, DEPTH, HEADS, 2.0, output_dim=16, **options))


def _open_clip_tokens(host: Any, image: Tensor) -> Tensor:
    """All that go through the last norm, or into the attention that pools."""
    normed = host.attn_pool is None and not host.final_ln_after_pool
    return given_by(host.ln_post if normed else host.transformer, host, image)


def _trunk() -> nn.Module:
    from open_clip.timm_model import TimmModel

    torch.manual_seed(0)
    return randomise(TimmModel("test_vit", embed_dim=16, image_size=160, pool="token", proj="linear"))


def _naflex(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.naflexvit import NaFlexVit

        sizes = {"patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
        torch.manual_seed(0)
        return randomise(NaFlexVit(num_classes=5, pos_embed_grid_size=(4, 4), **sizes, **options))

    return build


if have("torchvision"):
    TOWERS["torchvision VisionTransformer"] = Tower(
        _torchvision,
        lambda host, image: given_by(host.encoder, host, image),
        NATIVE,
        "torchvision",
        lambda host, image: host(image),
    )
if have("open_clip"):
    TOWERS["open_clip VisionTransformer"] = Tower(_open_clip, _open_clip_tokens, NATIVE, "open_clip")
    TOWERS["open_clip VisionTransformer (LayerScale, mean)"] = Tower(
        lambda: _open_clip(ls_init_value=0.5, pool_type="avg", final_ln_after_pool=True, no_ln_pre=True),
        _open_clip_tokens, NATIVE, "open_clip",
    )  # fmt: skip
    TOWERS["open_clip VisionTransformer (attention pool)"] = Tower(
        lambda: _open_clip(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
        _open_clip_tokens, NATIVE, "open_clip",
    )  # fmt: skip
    TOWERS["open_clip TimmModel"] = Tower(
        _trunk, lambda host, image: host.trunk.forward_features(image), ((160, 160),), "open_clip"
    )
_features = (lambda host, image: host.forward_features(image), TWO, "timm")
_head = (lambda host, image: host(image),)
TOWERS["timm NaFlexVit"] = Tower(_naflex(global_pool="map", class_token=False, embed_proj_type="linear",
                                         pos_embed="factorized"), *_features, *_head)  # fmt: skip
TOWERS["timm NaFlexVit (table)"] = Tower(_naflex(reg_tokens=2, init_values=0.5), *_features, *_head)
TOWERS["timm NaFlexVit (rope)"] = Tower(
    _naflex(rope_type="axial", pos_embed="none", init_values=0.5, global_pool="avg"), *_features, *_head
)
TOWERS["timm NaFlexVit (mixed rope)"] = Tower(
    _naflex(rope_type="mixed", swiglu_mlp=True, reg_tokens=1), *_features, *_head
)


def _timm_vit(block: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models import vision_transformer

        sizes = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
        sizes |= {"block_fn": getattr(vision_transformer, block), "init_values": 0.5, "dynamic_img_size": True}
        torch.manual_seed(0)
        return randomise(vision_transformer.VisionTransformer(num_classes=5, **sizes, **options))

    return build


for _name in ("ParallelScalingBlock", "DiffParallelScalingBlock", "ParallelThingsBlock"):
    TOWERS[f"timm VisionTransformer ({_name})"] = Tower(_timm_vit(_name), *_features, *_head)


def _hybrid() -> nn.Module:
    import timm

    torch.manual_seed(0)
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5, "img_size": 64, "dynamic_img_size": True}
    return randomise(timm.create_model("vit_base_r50_s16_224", **sizes))


TOWERS["timm VisionTransformer (R50 hybrid)"] = Tower(_hybrid, _features[0], ((64, 64), (48, 80)), "timm", *_head)


def _own(cls: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return randomise(getattr(importlib.import_module("dino_hub"), cls)(SIDE, PATCH, DIM, DEPTH, HEADS, **options))

    return build


def _dict_tokens(host: Any, image: Tensor) -> Tensor:
    said = host.forward_features(image)
    registers = said["x_norm_regtokens" if "x_norm_regtokens" in said else "x_storage_tokens"]
    return torch.cat([said["x_norm_clstoken"][:, None], registers, said["x_norm_patchtokens"]], dim=1)


_hub = (_dict_tokens, TWO, "torch.hub")
TOWERS["DINOv2 of torch.hub"] = Tower(_own("DinoV2"), *_hub)
TOWERS["DINOv2 of torch.hub (registers, classifier)"] = Tower(
    _own("DinoV2", registers=3, classes=5), *_hub, lambda host, image: host(image)
)
TOWERS["DINOv2 of torch.hub (chunks)"] = Tower(_own("DinoV2", chunks=2), *_hub)
TOWERS["DINOv3 of torch.hub"] = Tower(_own("DinoV3"), *_hub)
TOWERS["DINOv3 of torch.hub (two norms)"] = Tower(_own("DinoV3", storage=0, untied=True), *_hub)
