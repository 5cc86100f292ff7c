"""torchvision's detectors as one graph: an image in, the detections out, always as many rows, filled up with zeros.

How many boxes a detector finds depends on the image, and a graph has fixed shapes. What torchvision does after its
heads is therefore written again with masks in place of shorter lists; backbone, heads, box coders, anchors and pooling
are torchvision's own. Rows beyond the last detection are zero: boxes, labels and masks, and the score, by which
they are known.

Only what non-maximum suppression is given has an open length: the candidates above the threshold. Boxes of one class
(of a proposal: of one level) are moved away from those of every other, by class times (largest coordinate + 1), so
that one suppression does for all. torchvision does the same up to 1000 boxes and goes class by class beyond; the
rounding of the moved boxes, up to 2^-24 times classes times side in pixels, is all that differs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Detections", "framed", "nms", "paste"]


class Detections(nn.Module):
    """A detector of torchvision for one image of one size.

    Args:
        network: FCOS, RetinaNet, Faster or Mask R-CNN, in eval mode, with resizing of its own.
        size: (H, W) of the image in pixels.

    ``threshold`` is the least score of a detection, the network's own at first.
    """

    def __init__(self, network: Any, size: tuple[int, int]) -> None:
        super().__init__()
        from torchvision.models.detection.image_list import ImageList

        # Not registered: its parameters are those of the graph that this is in, and tracing wants one name for each.
        self._network, self.size = [network], size
        self.two_stages = hasattr(network, "rpn")
        images, _ = network.transform([torch.zeros(3, *size)])
        self.inside = images.image_sizes[0]  #: (h, w) that the image is brought to, without padding
        maps = network.backbone(images.tensors)
        anchors = (network.rpn if self.two_stages else network).anchor_generator
        made = anchors(ImageList(images.tensors, images.image_sizes), list(maps.values()))[0]
        self.register_buffer("anchors", made, persistent=False)
        cells = [x.shape[-2] * x.shape[-1] for x in maps.values()]
        each = made.shape[0] // sum(cells)
        self.levels = [n * each for n in cells]  #: anchors of each map, the finest first
        if self.two_stages:  # the pooler looks once, at the first image, which stride each map has
            network.roi_heads.box_roi_pool(maps, [made[:1]], [self.inside])
            if network.roi_heads.has_mask():
                network.roi_heads.mask_roi_pool(maps, [made[:1]], [self.inside])
        self.threshold: float = (network.roi_heads if self.two_stages else network).score_thresh

    @property
    def network(self) -> Any:
        """The detector."""
        return self._network[0]

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Image (1, 3, H, W) in 0..1 -> boxes (n, 4) in pixels, scores (n,), labels (n,), and masks (n, 1, H, W)."""
        maps = self.network.backbone(framed(image, self.inside, self.network.transform))
        named = self._of_regions(maps) if self.two_stages else self._of_anchors(maps)
        height, width = (n / m for n, m in zip(self.size, self.inside))
        named["boxes"] = named["boxes"] * named["boxes"].new_tensor([width, height, width, height])
        if "masks" in named:
            named["masks"] = paste(named["masks"], named["boxes"], self.size) * (named["scores"] > 0)[:, None, None]
            named["masks"] = named["masks"][:, None]
        return named

    # ---------------------------------------------------------------------------------------------------- one stage

    def _of_anchors(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """FCOS and RetinaNet: the best ``topk_candidates`` of each level."""
        network: Any = self.network
        heads = network.head(list(maps.values()))
        scores = heads["cls_logits"][0].sigmoid()
        if "bbox_ctrness" in heads:
            scores = (scores * heads["bbox_ctrness"][0].sigmoid()).sqrt()
        classes, found, first = scores.shape[-1], [], 0
        decode = getattr(network.box_coder, "decode_single", network.box_coder.decode)
        for count in self.levels:
            flat = scores[first : first + count].flatten()
            best, index = flat.topk(min(network.topk_candidates, flat.shape[0]))
            anchor = index // classes + first
            boxes = decode(heads["bbox_regression"][0][anchor], self.anchors[anchor])
            found.append((clipped(boxes, self.inside), best, index % classes))
            first += count
        boxes, best, labels = (torch.cat(part) for part in zip(*found))
        kept = nms(boxes, best, labels, best > self.threshold, network.nms_thresh)
        return self._first(boxes, best * kept, labels, network.detections_per_img)

    # --------------------------------------------------------------------------------------------------- two stages

    def _proposals(self, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Maps -> boxes (n, 4), and which of them are proposals (n,)."""
        from torchvision.models.detection.rpn import concat_box_prediction_layers

        rpn: Any = self.network.rpn
        scores, deltas = concat_box_prediction_layers(*rpn.head(list(maps.values())))
        boxes, scores = rpn.box_coder.decode(deltas, [self.anchors])[:, 0], scores.flatten()
        first, best, levels = 0, [], []
        for i, count in enumerate(self.levels):
            index = scores[first : first + count].topk(min(rpn.pre_nms_top_n(), count)).indices
            best.append(index + first)
            levels.append(torch.full_like(index, i))
            first += count
        taken = torch.cat(best)
        boxes, scores = clipped(boxes[taken], self.inside), scores[taken].sigmoid()
        allowed = large(boxes, rpn.min_size) & (scores >= rpn.score_thresh)
        kept = nms(boxes, scores, torch.cat(levels), allowed, rpn.nms_thresh)
        # A probability may be rounded to 0: those that are left out come after it.
        order = torch.where(kept, scores, -1.0).topk(min(rpn.post_nms_top_n(), scores.shape[0])).indices
        return boxes[order] * kept[order][:, None], kept[order]

    def _of_regions(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Faster and Mask R-CNN."""
        heads: Any = self.network.roi_heads
        proposals, real = self._proposals(maps)
        pooled = heads.box_roi_pool(maps, [proposals], [self.inside])
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        boxes = clipped(heads.box_coder.decode(deltas, [proposals]), self.inside)[:, 1:].reshape(-1, 4)
        scores = logits.softmax(-1)[:, 1:]
        labels = torch.arange(1, logits.shape[-1], device=logits.device).expand_as(scores).reshape(-1)
        allowed = (real[:, None] & (scores > self.threshold)).reshape(-1) & large(boxes, 1e-2)
        scores = scores.reshape(-1)
        kept = nms(boxes, scores, labels, allowed, heads.nms_thresh)
        named = self._first(boxes, scores * kept, labels, heads.detections_per_img)
        if heads.has_mask():
            pooled = heads.mask_roi_pool(maps, [named["boxes"]], [self.inside])
            logits = heads.mask_predictor(heads.mask_head(pooled))
            index = named["labels"][:, None, None, None].expand(-1, 1, *logits.shape[-2:])
            named["masks"] = logits.gather(1, index)[:, 0].sigmoid()
        return named

    @staticmethod
    def _first(boxes: Tensor, scores: Tensor, labels: Tensor, count: int) -> dict[str, Tensor]:
        """Return the best ``count``; what was not kept has score 0 and becomes zero."""
        best, index = scores.topk(min(count, scores.shape[0]))
        real = best > 0
        return {"boxes": boxes[index] * real[:, None], "scores": best, "labels": labels[index] * real}


def framed(image: Tensor, inside: tuple[int, int], transform: Any) -> Tensor:
    """(1, 3, H, W) in 0..1 -> normalised, resized to ``inside``, and zeros to the right and below to a multiple."""
    mean, std = (image.new_tensor(x)[:, None, None] for x in (transform.image_mean, transform.image_std))
    image = F.interpolate((image - mean) / std, size=inside, mode="bilinear", align_corners=False)
    unit = transform.size_divisible
    rows, columns = (math.ceil(n / unit) * unit - n for n in inside)
    return F.pad(image, (0, columns, 0, rows))


def clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes (..., 4) -> the same within an image of (H, W)."""
    height, width = size
    return torch.stack([boxes[..., i].clamp(0, (width, height)[i % 2]) for i in range(4)], -1)


def large(boxes: Tensor, side: float) -> Tensor:
    """Boxes (n, 4) -> whether both sides have at least so many pixels, (n,)."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(-1)


def nms(boxes: Tensor, scores: Tensor, groups: Tensor, allowed: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression within each group, among the boxes that are allowed; returns which are kept, (n,)."""
    from torchvision.ops import nms as suppress

    index = allowed.nonzero()[:, 0]
    moved = boxes + (groups * (boxes.max() + 1))[:, None]
    kept = index[suppress(moved[index], scores[index], threshold)]
    return torch.zeros_like(allowed).index_put((kept,), torch.ones_like(kept, dtype=torch.bool))


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    r"""Masks (n, m, m) and boxes (n, 4) -> (n, H, W), as torchvision pastes them: zero outside of the box.

    One cell is added around the mask, the box grows by (m + 2) / m about its centre and is cut off to whole pixels.
    Pixel y of the h rows from y0 on reads, with M = m + 2, at

        s = max(0, (y - y0 + 1/2) M / h - 1/2),      a_j = max(0, 1 - |min(s, M - 1) - j|)

    which is bilinear resizing; so is it along x, and the mask is A_y mask A_x^T.
    """
    side = masks.shape[-1] + 2
    centre, half = (boxes[:, :2] + boxes[:, 2:]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5 * (side / masks.shape[-1])
    low, high = (centre - half).trunc(), (centre + half).trunc()
    length = (high - low + 1).clamp_min(1)

    def along(axis: int, pixels: int) -> Tensor:
        at = torch.arange(pixels, device=boxes.device, dtype=boxes.dtype) - low[:, axis, None]  # (n, pixels)
        read = ((at + 0.5) * (side / length[:, axis, None]) - 0.5).clamp(0, side - 1)
        weights = (1 - (read[..., None] - torch.arange(side, device=boxes.device)).abs()).clamp_min(0)
        return weights * ((at >= 0) & (at < length[:, axis, None]))[..., None]

    rows, columns = along(1, size[0]), along(0, size[1])
    return rows @ F.pad(masks, (1, 1, 1, 1)) @ columns.transpose(1, 2)
