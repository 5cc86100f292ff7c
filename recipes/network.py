"""Networks of other libraries on an adapter's pyramid: built from a few words, saved with the adapter in one file.

    mask-rcnn, faster-rcnn, retinanet, fcos    torchvision
    upernet, mask2former                       transformers

The words (``recipe``) are kept in the file, so that :func:`load` builds the same network on a fresh backbone::

    network = load("runs/detect/adapter", adaptkit.demo_backbone())
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.model.pyramid import Pyramid


class Network(nn.Module):
    """A network of another library around a pyramid, and how to build it again. Called like that network."""

    def __init__(self, network: nn.Module, recipe: dict[str, Any]) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe

    @property
    def pyramid(self) -> Pyramid:
        """Where the adapter is."""
        return next(m for m in self.network.modules() if isinstance(m, Pyramid))

    @property
    def vit(self) -> Any:
        """The view of the frozen backbone."""
        return self.pyramid.model.vit

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


# -------------------------------------------------------------------------------------------------------- build


def build(model: adaptkit.AdaptedModel, recipe: dict[str, Any]) -> Network:
    """Put the network that ``recipe`` names around an adapted model.

    ``recipe``: ``network``, one of ``BUILDERS``; ``categories``, a list with an entry for each; ``thresholds`` of
    whoever reads the output; the rest are options of the builder.
    """
    options = {k: v for k, v in recipe.items() if k not in ("network", "categories", "thresholds")}
    return Network(BUILDERS[recipe["network"]](model, labels=len(recipe["categories"]), **options), recipe)


def rcnn(
    model: adaptkit.AdaptedModel, *, masks: bool, labels: int, width: int, anchor: float, **images: Any
) -> nn.Module:
    """Mask R-CNN, or Faster R-CNN without masks: FPN of the maps and one level more, anchors of one size per level."""
    from torchvision.models.detection import FasterRCNN, MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

    pyramid = adaptkit.as_pyramid(model, out="dict")
    strides = [*pyramid.strides, 2 * pyramid.strides[-1]]
    anchors = AnchorGenerator(tuple((int(anchor * s),) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))
    network = MaskRCNN if masks else FasterRCNN
    options = {"rpn_anchor_generator": anchors, **resizing(model, **images)}
    return network(with_fpn(pyramid, width, LastLevelMaxPool()), labels + 1, **options)


def dense(
    model: adaptkit.AdaptedModel, *, name: str, labels: int, width: int, anchor: float, **images: Any
) -> nn.Module:
    """RetinaNet or FCOS: FPN of the maps from stride 8 on and two levels more."""
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    made = adaptkit.as_pyramid(model).strides
    pyramid = adaptkit.as_pyramid(model, out="dict", strides=[s for s in made if s >= 8])
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
    model: adaptkit.AdaptedModel, *, size: list[int], mean: list[float] | None = None, std: list[float] | None = None
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


def upernet(model: adaptkit.AdaptedModel, *, labels: int, width: int, ignore: int = 255) -> nn.Module:
    """UperNet with its auxiliary head on the third map."""
    from transformers import UperNetConfig, UperNetForSemanticSegmentation

    pyramid = adaptkit.as_pyramid(model, out="hf")
    sizes = {"hidden_size": width, "auxiliary_channels": width // 2, "auxiliary_in_channels": pyramid.channels[2]}
    config = UperNetConfig(
        backbone_config=stand_in(pyramid), num_labels=labels, loss_ignore_index=ignore, initializer_range=0.02, **sizes
    )
    network: Any = UperNetForSemanticSegmentation(config)
    network.backbone = pyramid
    return network


def mask2former(
    model: adaptkit.AdaptedModel, *, labels: int, width: int, queries: int, layers: list[int], points: int
) -> nn.Module:
    """Mask2Former; ``layers`` of its pixel decoder and of its transformer decoder."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    pyramid = adaptkit.as_pyramid(model, out="hf")
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


def mask2former_options(p: argparse.ArgumentParser) -> None:
    """Add the sizes of Mask2Former to a command line; the defaults are the paper's."""
    p.add_argument("--width", type=int, default=256, help="channels of the network, a multiple of 32")
    p.add_argument("--queries", type=int, default=100)
    p.add_argument("--layers", type=int, nargs=2, default=(6, 9), metavar=("PIXEL", "DECODER"))
    p.add_argument("--points", type=int, default=12544, help="of each mask that the loss looks at")


def check_mask2former(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse sizes that cannot be built."""
    if args.width < 32 or args.width % 32:
        p.error(f"--width {args.width}: give a multiple of 32, for its norms have 32 groups")
    if min(args.queries, args.points, *args.layers) < 1:
        p.error("--queries, --points and --layers must be at least 1")


def mask2former_recipe(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`mask2former` needs of the command line."""
    return {"width": args.width, "queries": args.queries, "layers": list(args.layers), "points": args.points}


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


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "mask-rcnn": lambda model, **options: rcnn(model, masks=True, **options),
    "faster-rcnn": lambda model, **options: rcnn(model, masks=False, **options),
    "retinanet": lambda model, **options: dense(model, name="retinanet", **options),
    "fcos": lambda model, **options: dense(model, name="fcos", **options),
    "upernet": upernet,
    "mask2former": mask2former,
}

# --------------------------------------------------------------------------------------------------------- file


def save(model: Network, folder: Path, **metadata: Any) -> Path:
    """Write the adapter, the network beside it, and how to build it."""
    return model.pyramid.save(folder, model.network, recipe=model.recipe, **metadata)


def restore(model: Network, folder: str | os.PathLike[str]) -> None:
    """Read back what ``save`` wrote, into the same network."""
    model.pyramid.load(folder, model.network)


def load(folder: str | os.PathLike[str], backbone: nn.Module) -> Network:
    """Build the network that was saved around a fresh backbone; in eval mode, ready to be asked.

    Raises ``ValueError`` for a file without such a network, or of another backbone.
    """
    file = adaptkit.load(folder)
    recipe = (file.header.get("metadata") or {}).get("recipe")
    if not isinstance(recipe, dict) or recipe.get("network") not in BUILDERS:
        raise ValueError(f"{file.path} holds no network of {', '.join(BUILDERS)}; attach it with adaptkit.attach")
    adapters = [(a["name"], a["config"]) for a in file.header["adapters"]]
    trained = file.header.get("train_backbone", ())
    network = build(adaptkit.attach(backbone, *adapters, train_backbone=trained), recipe)
    restore(network, folder)
    return network.eval()


def again(args: argparse.Namespace, folder: Path) -> nn.Module:
    """Load what was saved around a fresh backbone."""
    return load(folder, create_backbone(args.backbone, pretrained=not args.random_backbone))
