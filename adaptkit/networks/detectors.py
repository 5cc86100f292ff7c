"""torchvision's detectors on the maps of an adapter."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.pyramid import Pyramid, as_pyramid

__all__ = ["dense", "rcnn"]


def rcnn(model: AdaptedModel, *, masks: bool, labels: int, width: int, anchor: float, **images: Any) -> nn.Module:
    """Mask R-CNN, or Faster R-CNN without masks: FPN of the maps and one level more, anchors of one size per level."""
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    pyramid = as_pyramid(model, out="dict")
    strides = [*pyramid.strides, 2 * pyramid.strides[-1]]
    anchors = AnchorGenerator(tuple((int(anchor * s),) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
    network = MaskRCNN if masks else FasterRCNN
    options = {"rpn_anchor_generator": anchors, **resizing(model, **images)}
    return network(with_fpn(pyramid, width, LastLevelMaxPool()), labels + 1, **options)


def dense(model: AdaptedModel, *, name: str, labels: int, width: int, anchor: float, **images: Any) -> nn.Module:
    """RetinaNet or FCOS: FPN of the maps from stride 8 on and two levels more."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    made = as_pyramid(model).strides
    pyramid = as_pyramid(model, out="dict", strides=[s for s in made if s >= 8])
    strides = [*pyramid.strides, 2 * pyramid.strides[-1], 4 * pyramid.strides[-1]]
    backbone = with_fpn(pyramid, width, LastLevelP6P7(width, width))
    if name == "fcos":  # its anchors are points: the size only scales the distances
        anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
        return FCOS(backbone, labels + 1, anchor_generator=anchors, **resizing(model, **images))
    sizes = tuple(tuple(int(anchor / 2 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))
    return RetinaNet(backbone, labels + 1, anchor_generator=anchors, **resizing(model, **images))


def with_fpn(pyramid: Pyramid, width: int, extra: nn.Module) -> nn.Module:
    """Torchvision's feature pyramid network behind ours."""
    from torchvision.ops import FeaturePyramidNetwork

    fpn = FeaturePyramidNetwork(pyramid.channels, width, extra)  # type: ignore[arg-type]
    backbone = nn.Sequential(OrderedDict(body=pyramid, fpn=fpn))
    backbone.out_channels = width  # type: ignore[assignment]
    return backbone


def resizing(
    model: AdaptedModel, *, size: list[int], mean: list[float] | None = None, std: list[float] | None = None
) -> dict[str, Any]:
    """Shorter side to ``size[0]``, the longer one at most ``size[1]`` pixels; normalised by ``mean`` and ``std``.

    Files of earlier versions do not hold them: then they are the backbone's own. ``ValueError`` where it has none.
    """
    source = model.vit.source()
    mean, std = mean or list(source.mean), std or list(source.std)
    if not mean or not std:
        raise ValueError(
            f"neither the file nor the backbone {source.id or 'of this model'} says how images are normalised; give "
            "the recipe its mean and std"
        )
    return {"min_size": size[0], "max_size": size[1], "image_mean": mean, "image_std": std}
