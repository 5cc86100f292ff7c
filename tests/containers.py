"""Tiny models of transformers around a vision tower, and where in them it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
VISION |= {"intermediate_size": 64}
BERT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
BERT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = BERT | {"num_key_value_heads": 2, "head_dim": 16}
IDS = {key: BERT[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}


def _of(cls: str, config: str, **options: Any) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, cls)(getattr(transformers, config)(**options)).eval()

    return build


def _pair(cls: str, config: str, join: str, first: str, second: dict[str, Any]) -> Callable[[], Any]:
    def build() -> Any:
        import transformers as t

        torch.manual_seed(0)
        joined = getattr(getattr(t, config), join)(getattr(t, first)(**VISION), t.BertConfig(**BERT, **second))
        return getattr(t, cls)(joined).eval()

    return build


def _depth() -> Any:
    import transformers as t

    inner = t.Dinov2Config(**VISION, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    small = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "head_hidden_size": 4, "patch_size": 8}
    return t.DepthAnythingForDepthEstimation(
        t.DepthAnythingConfig(backbone_config=inner, reassemble_hidden_size=32, **small)
    ).eval()


_clip, _siglip = {"model_type": "clip_vision_model", **VISION}, {"model_type": "siglip_vision_model", **VISION}
_llama, _gemma = {"model_type": "llama", **TEXT}, {"model_type": "gemma", **TEXT}
_qformer = {key: BERT[key] for key in BERT if key in VISION or key == "vocab_size"} | {"encoder_hidden_size": 32}
_opt = {"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 32, **BERT}
_clip_text = {key: BERT[key] for key in BERT if key in VISION or key == "vocab_size"}
_square = {"image_size": [32, 32], "patch_size": [8, 8]}
#: class -> how to build one, and the path of its tower
HELD: dict[str, tuple[Callable[[], Any], str]] = {
    "LlavaForConditionalGeneration": (
        _of("LlavaForConditionalGeneration", "LlavaConfig", vision_config=_clip, text_config=_llama),
        "model.vision_tower",
    ),
    "LlavaModel": (_of("LlavaModel", "LlavaConfig", vision_config=_clip, text_config=_llama), "vision_tower"),
    "LlavaNextForConditionalGeneration": (
        _of("LlavaNextForConditionalGeneration", "LlavaNextConfig", vision_config=_clip, text_config=_llama),
        "model.vision_tower",
    ),
    "PaliGemmaForConditionalGeneration": (
        _of("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", vision_config=_siglip, text_config=_gemma,
            projection_dim=32), "model.vision_tower",
    ),
    "DepthAnythingForDepthEstimation": (_depth, "backbone"),
    "VisionTextDualEncoderModel": (
        _pair("VisionTextDualEncoderModel", "VisionTextDualEncoderConfig", "from_vision_text_configs", "ViTConfig", {}),
        "vision_model",
    ),
    "VisionEncoderDecoderModel": (
        _pair("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", "from_encoder_decoder_configs", "ViTConfig",
              {"is_decoder": True, "add_cross_attention": True}), "encoder",
    ),
    "BlipForConditionalGeneration": (
        _of("BlipForConditionalGeneration", "BlipConfig", vision_config=VISION,
            text_config=BERT | {"encoder_hidden_size": 32, "sep_token_id": 3}), "vision_model",
    ),
    "Blip2ForConditionalGeneration": (
        _of("Blip2ForConditionalGeneration", "Blip2Config", vision_config=VISION, qformer_config=_qformer,
            text_config=_opt), "vision_model",
    ),
    "InstructBlipForConditionalGeneration": (
        _of("InstructBlipForConditionalGeneration", "InstructBlipConfig", vision_config=VISION, qformer_config=_qformer,
            text_config=_opt), "vision_model",
    ),
    "InternVLForConditionalGeneration": (
        _of("InternVLForConditionalGeneration", "InternVLConfig", vision_config=VISION | _square,
            text_config={"model_type": "qwen2", **TEXT}), "model.vision_tower",
    ),
    "YolosForObjectDetection": (
        _of("YolosForObjectDetection", "YolosConfig", **VISION | {"image_size": [32, 32]}, num_detection_tokens=3), "vit",
    ),
    "CLIPSegForImageSegmentation": (
        _of("CLIPSegForImageSegmentation", "CLIPSegConfig", vision_config=VISION, text_config=_clip_text,
            extract_layers=[0, 1, 2], reduce_dim=8, decoder_num_attention_heads=2, decoder_intermediate_size=16), "clip",
    ),
    "OwlViTForObjectDetection": (
        _of("OwlViTForObjectDetection", "OwlViTConfig", vision_config=VISION, text_config=_clip_text),
        "owlvit.vision_model",
    ),
    "ViTForMaskedImageModeling": (
        _of("ViTForMaskedImageModeling", "ViTConfig", **VISION, encoder_stride=8), "vit",
    ),
    "ViTMAEForPreTraining": (_of("ViTMAEForPreTraining", "ViTMAEConfig", **VISION), "vit"),
}  # fmt: skip
_rows = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
_merged = _rows | {"intermediate_size": 64, "out_hidden_size": 32}
#: class -> how to build one, and what its refusal says
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "Qwen2VLForConditionalGeneration": (
        _of("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", vision_config=_rows | {"embed_dim": 32},
            text_config=TEXT), "packed into one row",
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        _of("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", vision_config=_merged, text_config=TEXT),
        "packed into one row",
    ),
    "Qwen3VLForConditionalGeneration": (
        _of("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", text_config=TEXT,
            vision_config=_merged | {"deepstack_visual_indexes": [0]}), "packed into one row",
    ),
    "MllamaForConditionalGeneration": (
        _of("MllamaForConditionalGeneration", "MllamaConfig",
            vision_config=VISION | {"num_global_layers": 1, "attention_heads": 2, "max_num_tiles": 1,
                                    "intermediate_layers_indices": [0], "vision_output_dim": 64,
                                    "supported_aspect_ratios": [[1, 1]]},
            text_config=TEXT | {"num_hidden_layers": 2, "cross_attention_layers": [1]}), "all tiles of an image",
    ),
    "Florence2VisionBackbone": (
        _of("Florence2VisionBackbone", "Florence2VisionConfig", embed_dim=[8] * 4, num_heads=[1] * 4, num_groups=[1] * 4,
            depths=[1] * 4), "attends between channels",
    ),
}  # fmt: skip
