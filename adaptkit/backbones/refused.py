"""Vision towers whose blocks are no plain ``x + attn(norm(x))``, ``x + mlp(norm(x))`` on one image, and why."""

from __future__ import annotations

from adaptkit.core.registry import register_refusal

_T = "transformers.models"

register_refusal(
    "the images of a batch run through its blocks packed into one row of patches, each block is told where one image "
    "ends and the next begins, and windows or pairs of frames are laid out anew before: there is no (B, N, D) to "
    "adapt. Use the ViT of a model that takes images, for instance SigLIP or InternVL",
    f"{_T}.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
    f"{_T}.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
    f"{_T}.qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniVisionEncoder",
    f"{_T}.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
    f"{_T}.qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeVisionModel",
    f"{_T}.qwen3_omni_moe.modeling_qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
    f"{_T}.qwen3_5.modeling_qwen3_5.Qwen3_5VisionModel",
    f"{_T}.qwen3_5_moe.modeling_qwen3_5_moe.Qwen3_5MoeVisionModel",
    f"{_T}.glm4v.modeling_glm4v.Glm4vVisionModel",
    f"{_T}.glm4v_moe.modeling_glm4v_moe.Glm4vMoeVisionModel",
    f"{_T}.pixtral.modeling_pixtral.PixtralVisionModel",
)
register_refusal(
    "its blocks run on all tiles of an image at once, padded to a multiple of eight tokens, under a mask that says "
    "which tiles there are, and a second, gated stack of blocks follows the first: there is no one list of blocks on "
    "the patches of one image. Use the ViT of a model that takes one image, for instance CLIP or SigLIP",
    f"{_T}.mllama.modeling_mllama.MllamaVisionModel",
)
register_refusal(
    "it is a DaViT: each block has convolutions for positions before attention and before FFN, and every second one "
    "attends between channels, so that none is of the form x + attn(norm(x)), x + mlp(norm(x)). Use a ViT, or a Swin "
    "of timm",
    f"{_T}.florence2.modeling_florence2.Florence2VisionBackbone",
)
