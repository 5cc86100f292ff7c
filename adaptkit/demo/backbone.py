"""The demonstration backbone: a ViT-Tiny/16 of our own, pretrained on pictures drawn by formula, inside the package."""

from pathlib import Path
from typing import TYPE_CHECKING

from adaptkit.version import DISTRIBUTION

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = "vit_tiny_patch16_224"
WEIGHTS = Path(__file__).parent / "weights" / "demo_backbone.safetensors"
TAG = "adaptkit_demo"
DEMO = f"{ARCHITECTURE}.{TAG}"  #: how the model names itself
MEAN = STD = (0.5, 0.5, 0.5)


def demo_backbone(pretrained: bool = True) -> "VisionTransformer":
    """Make the demonstration backbone; no network is needed.

    A plain timm `VisionTransformer`: patches of 16 pixels, 192 channels, 12 blocks, 3 heads, a class token, no
    classifier, 5.5 million parameters. It takes images (B, 3, H, W), H and W multiples of 16, normalised with mean and
    standard deviation 0.5 as its `pretrained_cfg` says. What it was trained on stands in the card `weights/README.md`.

    Args:
        pretrained: load the weights that ship (fp16 on disk, fp32 in memory); False leaves timm's random ones.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        FileNotFoundError: the package was installed without its weights.
    """
    import timm
    from safetensors.torch import load_file

    overlay: dict[str, object] = {
        "architecture": ARCHITECTURE,
        "tag": TAG,
        "mean": MEAN,
        "std": STD,
        "license": "apache-2.0",
        "url": "",
        "hf_hub_id": None,
        "custom_load": False,
        "num_classes": 0,
        "fixed_input_size": False,
    }
    model = timm.create_model(
        ARCHITECTURE, pretrained=False, num_classes=0, dynamic_img_size=True, pretrained_cfg_overlay=overlay
    )
    if pretrained:
        if not WEIGHTS.is_file():
            raise FileNotFoundError(f"{WEIGHTS} is missing; reinstall {DISTRIBUTION}, or say pretrained=False")
        model.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()})
    return model.eval()
