"""Tiny random hosts, one per family and variant, and what each host itself says: the yardstick of the contract."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DIM, DEPTH, HEADS = 32, 4, 2


class Host(NamedTuple):
    """How to build a backbone, and how to ask it for its own features at any size."""

    build: Callable[[], nn.Module]
    tokens: Callable[[Any, Tensor], Tensor]  # host, image -> (B, P+N, D) after the final norm
    logits: Callable[[Any, Tensor], Tensor] | None  # host, image -> (B, classes)
    size: int  # native side in pixels
    at: Callable[[int, int], nn.Module]  # a backbone of the same weights that takes another (h, w) in pixels
    splits: bool = True  # whether attention comes apart into qkv, bias and out


HOSTS: dict[str, Host] = {}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a value that is neither zero nor one, so that nothing agrees by accident."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def stirred(model: nn.Module, seed: int = 1, by: float = 0.2) -> nn.Module:
    """Move what is trained of a model, as training does, by normal noise of this deviation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=g))
    return model


def _timm(name: str, cls: Callable[[], Any], patch: int = 8, side: int = 4, **options: Any) -> None:
    def build(**more: Any) -> nn.Module:
        sizes = {"img_size": side * patch, "patch_size": patch, "num_classes": 5}
        torch.manual_seed(0)
        return randomise(cls()(embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **sizes, **options, **more))

    HOSTS[name] = Host(
        build=build,
        tokens=lambda host, image: host.forward_features(image),
        logits=lambda host, image: host(image),
        size=side * patch,
        at=lambda h, w: build(dynamic_img_size=True),
    )


def _resized(build: Callable[..., nn.Module]) -> Callable[[int, int], nn.Module]:
    """For hosts that are never dynamic but can be rebuilt in place."""

    def at(height: int, width: int) -> nn.Module:
        host: Any = build()
        host.set_input_size((height, width))
        return host

    return at


def _sam_tokens(host: Any, image: Tensor) -> Tensor:
    """What the last block gives, before the neck."""
    return host.forward_intermediates(image, indices=1, intermediates_only=True)[0].flatten(2).transpose(1, 2)


def _vit() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer


def _distilled() -> Any:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled


def _res_post() -> Any:
    from functools import partial

    from timm.models.vision_transformer import ResPostBlock, VisionTransformer

    return partial(VisionTransformer, block_fn=ResPostBlock, init_values=0.5)


def _eva() -> Any:
    from timm.models.eva import Eva

    return Eva


def _beit() -> Any:
    from timm.models.beit import Beit

    return Beit


def _sam() -> Any:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    return VisionTransformerSAM


_timm("timm-vit", _vit)
_timm("timm-vit-patch14", _vit, patch=14)
_timm("timm-mae", _vit, global_pool="avg")  # fc_norm instead of norm
_timm("timm-deit3", _vit, no_embed_class=True, init_values=0.5)
_timm("timm-distilled", _distilled)
_timm("timm-dinov2", _vit, patch=14, init_values=0.5)
_timm("timm-dinov2-reg", _vit, patch=14, init_values=0.5, reg_tokens=4, no_embed_class=True)
_timm("timm-clip", _vit, pre_norm=True)
_timm("timm-siglip", _vit, class_token=False, global_pool="map")
_timm("timm-qk-norm", _vit, qk_norm=True)
_timm("timm-res-post", _res_post)

EVA02 = {"mlp_ratio": 8 / 3, "swiglu_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
_timm("timm-eva02", _eva, **EVA02)
_timm("timm-eva02-clip", _eva, qkv_fused=False, scale_mlp=True, scale_attn_inner=True, global_pool="token", **EVA02)
_timm("timm-eva-post-norm", _eva, use_post_norm=True)
_timm(
    "timm-dinov3",
    _eva,
    qkv_bias=False,
    init_values=0.5,
    rope_type="dinov3",
    rope_temperature=100,
    rope_rotate_half=True,
    use_rot_pos_emb=True,
    use_abs_pos_emb=False,
    num_reg_tokens=4,
    use_fc_norm=False,
)
_timm(
    "timm-pe",
    _eva,
    attn_type="rope",
    use_pre_transformer_norm=True,
    use_rot_pos_emb=True,
    ref_feat_shape=(4, 4),
    rope_grid_offset=1.0,
    rope_grid_indexing="xy",
    global_pool="map",
    attn_pool_num_heads=HEADS,
)
_timm(
    "timm-rope-mixed",
    _eva,
    attn_type="rope",
    init_values=0.5,
    use_abs_pos_emb=False,
    use_rot_pos_emb=True,
    rope_grid_indexing="xy",
    rope_temperature=10.0,
    rope_type="mixed",
    global_pool="token",
)
_timm(
    "timm-eva-gqa",
    _eva,
    attn_type="rope",
    qkv_fused=False,
    num_kv_heads=1,
    qk_norm=True,
    use_rot_pos_emb=True,
    init_values=0.5,
    attn_only_layer_scale=True,
)
_timm("timm-beit", _beit, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5)
_timm("timm-beit-shared", _beit, use_shared_rel_pos_bias=True)
_timm("timm-beit-both", _beit, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, global_pool="token")
_timm("timm-sam", _sam, use_rel_pos=True, window_size=3, global_attn_indexes=(1, 3), neck_chans=8)

for _name in ("timm-beit", "timm-beit-shared", "timm-beit-both"):
    HOSTS[_name] = HOSTS[_name]._replace(at=_resized(HOSTS[_name].build))
_build_sam = HOSTS["timm-sam"].build
HOSTS["timm-sam"] = HOSTS["timm-sam"]._replace(
    tokens=_sam_tokens, logits=None, at=lambda h, w: _build_sam(), splits=False
)


def _hf(
    name: str,
    path: str,
    cls: str,
    config: str,
    tokens: Callable[[Any, Tensor], Tensor] | None = None,
    patch: int = 8,
    side: int = 4,
    interpolates: bool = True,
    **options: Any,
) -> None:
    """``interpolates``: the backbone asks for ``interpolate_pos_encoding`` at another size; others just do it."""
    sizes = {"hidden_size": DIM, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "patch_size": patch}
    sizes |= {"image_size": side * patch, "intermediate_size": 2 * DIM}

    def build() -> nn.Module:
        module = importlib.import_module(f"transformers.models.{path}")
        torch.manual_seed(0)
        return randomise(getattr(module, cls)(getattr(module, config)(**{**sizes, **options})))

    def last_hidden_state(host: Any, image: Tensor) -> Tensor:
        other = tuple(image.shape[-2:]) != (side * patch, side * patch)
        return host(image, **({"interpolate_pos_encoding": True} if interpolates and other else {})).last_hidden_state

    def host_tokens(host: Any, image: Tensor) -> Tensor:
        return tokens(host, image) if tokens else last_hidden_state(host, image)

    HOSTS[name] = Host(build, host_tokens, None, side * patch, lambda h, w: build())


def _unmasked(host: Any, image: Tensor) -> Tensor:
    """What MAE says of all patches in their order, by its own masking with a ratio of zero."""
    ratio, host.config.mask_ratio = host.config.mask_ratio, 0.0
    try:
        cells = (image.shape[-2] // host.config.patch_size) * (image.shape[-1] // host.config.patch_size)
        noise = torch.arange(cells).expand(len(image), -1)
        other = image.shape[-2:] != (host.config.image_size,) * 2
        return host(image, noise=noise, interpolate_pos_encoding=other).last_hidden_state
    finally:
        host.config.mask_ratio = ratio


def _normed(host: Any, image: Tensor) -> Tensor:
    """CLIP's tokens, all of them through the norm that the backbone keeps for the pooled one."""
    other = image.shape[-2:] != (host.config.image_size,) * 2
    return host.post_layernorm(host(image, interpolate_pos_encoding=other).last_hidden_state)


def _wrapper(**timm_options: Any) -> nn.Module:
    from transformers import TimmWrapperConfig, TimmWrapperModel

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS}
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={**sizes, **timm_options})
    return randomise(TimmWrapperModel(config))


if importlib.util.find_spec("transformers"):
    _hf("hf-vit", "vit", "ViTModel", "ViTConfig")
    _hf("hf-deit", "deit", "DeiTModel", "DeiTConfig")
    _hf("hf-vit-msn", "vit_msn", "ViTMSNModel", "ViTMSNConfig")
    _hf("hf-ijepa", "ijepa", "IJepaModel", "IJepaConfig")
    _hf("hf-vit-mae", "vit_mae", "ViTMAEModel", "ViTMAEConfig", tokens=_unmasked)
    _dinov2 = {"patch": 14, "interpolates": False, "layerscale_value": 0.5, "mlp_ratio": 2}
    _reg = ("dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig")
    _hf("hf-dinov2", "dinov2", "Dinov2Model", "Dinov2Config", **_dinov2)
    _hf("hf-dinov2-swiglu", "dinov2", "Dinov2Model", "Dinov2Config", use_swiglu_ffn=True, **_dinov2)
    _hf("hf-dinov2-reg", *_reg, num_register_tokens=4, drop_path_rate=0.1, **_dinov2)
    _dinov3 = {"interpolates": False, "num_register_tokens": 4, "layerscale_value": 0.5}
    _hf("hf-dinov3", "dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", **_dinov3)
    _hf("hf-clip", "clip", "CLIPVisionModel", "CLIPVisionConfig", tokens=_normed)
    _hf("hf-siglip", "siglip", "SiglipVisionModel", "SiglipVisionConfig")
    _beit_options = {"interpolates": False, "layer_scale_init_value": 0.5}
    _hf("hf-beit", "beit", "BeitModel", "BeitConfig", use_relative_position_bias=True, **_beit_options)
    _hf(
        "hf-beit-shared",
        "beit",
        "BeitModel",
        "BeitConfig",
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=True,
        use_mean_pooling=False,
        **_beit_options,
    )
    HOSTS["hf-timm-wrapper"] = Host(
        build=_wrapper,
        tokens=lambda host, image: host(image, do_pooling=False).last_hidden_state,
        logits=None,
        size=32,
        at=lambda h, w: _wrapper(dynamic_img_size=True),
    )
