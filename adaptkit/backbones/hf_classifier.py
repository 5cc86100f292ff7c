"""transformers' classes for image classification: the base model inside is seen, and their classifier is kept.

``model.logits`` is what the class itself would say of the tokens: ``classifier(pool(tokens))``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaptkit.backbones._hf import HfViT, headed
from adaptkit.backbones.hf_beit import HfBeit
from adaptkit.backbones.hf_clip import HfCLIP
from adaptkit.backbones.hf_data2vec import HfData2VecVision
from adaptkit.backbones.hf_dinov2 import HfDinov2, HfDinov2WithRegisters
from adaptkit.backbones.hf_siglip import HfSiglip
from adaptkit.backbones.hf_siglip2 import HfSiglip2
from adaptkit.backbones.hf_vit import HfPlainViT
from adaptkit.core.registry import register_family
from adaptkit.core.view import ViT

_MODELS = "transformers.models"


class HfCLIPUnnormed(HfCLIP):
    """CLIP before its last norm: the classifier on top of it reads the tokens as they leave the last block."""

    def norm(self, x: Tensor) -> Tensor:
        """The identity."""
        return x


def _register(path: str, family: Callable[[Any], HfViT], inside: str, head: Callable[[Any, Tensor], Tensor]) -> None:
    def see(model: Any) -> ViT:
        return headed(family(getattr(model, inside)), model, inside, head)

    register_family(f"{_MODELS}.{path}")(see)  # type: ignore[type-var]


def _first(model: Any, x: Tensor) -> Tensor:
    return model.classifier(x[:, 0])


def _two(model: Any, x: Tensor) -> Tensor:
    """Class token and distillation token, each with its classifier."""
    return (model.cls_classifier(x[:, 0]) + model.distillation_classifier(x[:, 1])) / 2


def _mean(model: Any, x: Tensor) -> Tensor:
    return model.classifier(x.mean(dim=1))


def _patch_mean(model: Any, x: Tensor) -> Tensor:
    return model.classifier(x[:, 1:].mean(dim=1))


def _first_and_mean(model: Any, x: Tensor) -> Tensor:
    """Class token and mean of the patches; registers are left out."""
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return model.classifier(torch.cat([x[:, 0], x[:, prefix:].mean(dim=1)], dim=1))


def _beit(model: Any, x: Tensor) -> Tensor:
    return model.classifier(model.beit.pooler(x))


def _data2vec(model: Any, x: Tensor) -> Tensor:
    return model.classifier(model.data2vec_vision.pooler(x))


_register("vit.modeling_vit.ViTForImageClassification", HfPlainViT, "vit", _first)
_register("deit.modeling_deit.DeiTForImageClassification", HfPlainViT, "deit", _first)
_register("deit.modeling_deit.DeiTForImageClassificationWithTeacher", HfPlainViT, "deit", _two)
_register("vit_msn.modeling_vit_msn.ViTMSNForImageClassification", HfPlainViT, "vit", _first)
_register("ijepa.modeling_ijepa.IJepaForImageClassification", HfPlainViT, "ijepa", _mean)
_register("dinov2.modeling_dinov2.Dinov2ForImageClassification", HfDinov2, "dinov2", _first_and_mean)
_register(
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersForImageClassification",
    HfDinov2WithRegisters,
    "dinov2_with_registers",
    _first_and_mean,
)
_register("beit.modeling_beit.BeitForImageClassification", HfBeit, "beit", _beit)
_register(
    "data2vec.modeling_data2vec_vision.Data2VecVisionForImageClassification",
    HfData2VecVision,
    "data2vec_vision",
    _data2vec,
)
_register("clip.modeling_clip.CLIPForImageClassification", HfCLIPUnnormed, "vision_model", _patch_mean)
_register("metaclip_2.modeling_metaclip_2.MetaClip2ForImageClassification", HfCLIPUnnormed, "vision_model", _patch_mean)
_register("siglip.modeling_siglip.SiglipForImageClassification", HfSiglip, "vision_model", _mean)
_register("siglip2.modeling_siglip2.Siglip2ForImageClassification", HfSiglip2, "vision_model", _mean)
