"""transformers' segmentation networks on the maps of an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from adaptkit.model.adapted import AdaptedModel
from adaptkit.model.pyramid import Pyramid, as_pyramid

__all__ = ["mask2former", "upernet"]


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
    """transformers builds a backbone by itself: give it the smallest of the pyramid's widths, to be replaced.

    Of bottlenecks it has 8 D^2 values; of plain 3x3 convolutions 66 D^2, for a wide pyramid more than the network.
    """
    from transformers import ResNetConfig

    stages = [f"stage{i + 1}" for i in range(len(pyramid.channels))]
    sizes = {"hidden_sizes": pyramid.channels, "depths": [1] * len(stages), "embedding_size": 8}
    return ResNetConfig(layer_type="bottleneck", out_features=stages, **sizes)


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
