"""transformers' segmentation networks on the maps of an adapter, and what their outputs say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.pyramid import Pyramid, as_pyramid

__all__ = ["class_scores", "mask2former", "merge", "upernet"]


def upernet(model: AdaptedModel, *, labels: int, width: int, ignore: int = 255) -> nn.Module:
    """UperNet with its auxiliary head on the third map."""
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    pyramid = as_pyramid(model, out="hf")
    sizes = {"hidden_size": width, "auxiliary_channels": width // 2, "auxiliary_in_channels": pyramid.channels[2]}
    config = UperNetConfig(
        backbone_config=stand_in(pyramid), num_labels=labels, loss_ignore_index=ignore, initializer_range=0.02, **sizes
    )
    network: Any = UperNetForSemanticSegmentation(config)
    network.backbone = pyramid
    return network


def mask2former(
    model: AdaptedModel, *, labels: int, width: int, queries: int, layers: list[int], points: int
) -> nn.Module:
    """Mask2Former; ``layers`` of its pixel decoder and of its transformer decoder."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    pyramid = as_pyramid(model, out="hf")
    widths = {k: width for k in ("feature_size", "mask_feature_size", "hidden_dim")}
    widths |= {"encoder_feedforward_dim": 4 * width, "dim_feedforward": 8 * width}
    with quiet():  # that the stand-in is no Swin does not matter: it goes at once
        config = Mask2FormerConfig(
            backbone_config=stand_in(pyramid),
            feature_strides=list(pyramid.strides),
            num_labels=labels,
            num_queries=queries,
            encoder_layers=layers[0],
            decoder_layers=layers[1] + 1,  # transformers counts the prediction before the first layer
            train_num_points=points,
            **widths,
        )
        network: Any = Mask2FormerForUniversalSegmentation(config)
    network.model.pixel_level_module.encoder = pyramid
    return network


def stand_in(pyramid: Pyramid) -> Any:
    """transformers builds a backbone by itself: give it the smallest of the pyramid's widths, to be replaced."""
    from transformers import ResNetConfig

    stages = [f"stage{i + 1}" for i in range(len(pyramid.channels))]
    sizes = {"hidden_sizes": pyramid.channels, "depths": [1] * len(stages), "embedding_size": 8}
    return ResNetConfig(layer_type="basic", out_features=stages, **sizes)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


# ------------------------------------------------------------------------------------------------- what they say


def class_scores(found: Any, size: tuple[int, int]) -> Tensor:
    """Output of Mask2Former -> (B, K, H, W), the sum over queries of p(class) * p(mask) (Cheng et al. 2021, 3.4)."""
    inside = F.interpolate(found.masks_queries_logits.float(), size, mode="bilinear", align_corners=False)
    classes = found.class_queries_logits.float().softmax(-1)[..., :-1]
    return torch.einsum("bqc,bqhw->bchw", classes, inside.sigmoid())


def merge(
    classes: Tensor, masks: Tensor, size: tuple[int, int], things: set[int], thresholds: tuple[float, float]
) -> Tensor:
    """Make one panoptic map of the queries of one image (Cheng et al. 2021, MaskFormer, section 3.4).

    Each pixel goes to the query with the largest p(class) * p(mask). A query whose class is uncertain takes no part,
    and one that others hide for the larger part is dropped. Segments of one stuff class are one segment.

    Args:
        classes: logits (Q, K + 1), the last of "nothing".
        masks: logits (Q, h, w).
        size: (H, W) of the image.
        things: labels of which each query is a segment by itself.
        thresholds: least score of a query, and least share of its mask that must be visible.

    Returns (H, W, 2) int64, label and segment id of each pixel; label -1 where nothing was found.
    """
    result = torch.full((*size, 2), -1, dtype=torch.int64, device=classes.device)
    scores, labels = classes.float().softmax(-1).max(-1)
    keep = (labels < classes.shape[-1] - 1) & (scores > thresholds[0])
    if not keep.any():
        return result
    scores, labels = scores[keep], labels[keep]
    inside = F.interpolate(masks[keep][None].float(), size, mode="bilinear", align_corners=False)[0].sigmoid()
    owner = (scores[:, None, None] * inside).argmax(0)  # (H, W)
    whole = inside >= 0.5
    visible = whole.gather(0, owner[None])[0]  # pixels that lie inside the mask of their owner
    seen = torch.zeros_like(labels).scatter_add_(0, owner.flatten(), visible.flatten().long())  # pixels of each query
    kept = (seen > 0) & (seen >= thresholds[1] * whole.sum((1, 2)))
    is_thing = torch.isin(labels, torch.tensor(sorted(things), device=labels.device))
    number = torch.arange(1, len(labels) + 1, device=labels.device)
    segment = torch.stack([labels, number * is_thing], dim=-1)  # (Q, 2)
    return torch.where((visible & kept[owner])[..., None], segment[owner], result)
