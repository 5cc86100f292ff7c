"""Calls of AdaViT's packing: every kind of host, decision and head mode, one image and several."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import transformer
from families import DIM, HEADS, HOSTS, randomise
from fast_paths import Example

from adaptkit.adapters.adavit.execution import How
from adaptkit.adapters.adavit.gates import Decision
from adaptkit.adapters.adavit.layouts import Layouts
from adaptkit.core.registry import view

KINDS = ("patch", "head", "layer")
SIZES = {  # (h, w) in pixels; None: the backbone's own
    "timm-vit": (40, 56),  # one prefix token
    "timm-siglip": (40, 56),  # none
    "timm-dinov2-reg": None,  # five, LayerScale
    "timm-qk-norm": None,
    "timm-dinov3": (40, 56),  # rotary positions
    "hf-dinov3": None,
    "timm-beit": None,  # relative bias
    "hf-dinov2": None,
    "large": (64, 96),  # oneDNN is faster on these layers, and their rows fill more than a tile
}
RATES = {"random": 0.6, "sparse": 0.2, "everything": 1.0, "nothing": 0.0}


def large(h, w):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return randomise(
        VisionTransformer(img_size=(h, w), patch_size=4, num_classes=0, embed_dim=320, depth=1, num_heads=5)
    )


def make(name, count, rates, kinds, head_mode, only_prefix, strided, laid_out, dtype):
    """The first block of a backbone, tokens (B, T, D), the same after its first norm, and a decision."""
    size = SIZES[name]
    if name == "large":
        host = large(*size)
    else:
        host = HOSTS[name].build() if size is None else HOSTS[name].at(*size)
    vit, (h, w) = view(host.to(dtype)), size or (HOSTS[name].size,) * 2
    g = torch.Generator().manual_seed(0)
    image = torch.randn(count, 3, h, w, generator=g, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        x, blocks = vit.begin(image)
        block = replace(blocks[0], grid=vit.grid(image))
        if strided:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        grid, heads = vit.grid(image), vit.spec.num_heads
        shapes = ((count, grid[0] * grid[1]), (count, heads), (count, 2))
        keep = [(torch.rand(shape, generator=g) < rate).to(dtype) for shape, rate in zip(shapes, rates)]
        decision = Decision(*(k if kind in kinds else None for k, kind in zip(keep, KINDS)))
        return block, x, block.norm1(x), decision, How(head_mode, only_prefix, Layouts() if laid_out else None)


def sums(name):
    if name == "large":
        return transformer(1, 320, 16 * 24 + 1)
    return transformer(1, DIM, 5 * 7 + 5)


def example(id, name, count=3, rates=(0.5, 0.6, 0.8), kinds=KINDS, head_mode="full", only_prefix=False, strided=False,
            laid_out=False):  # fmt: skip
    made = partial(make, name, count, rates, kinds, head_mode, only_prefix, strided, laid_out)
    return Example(f"{name}-{count}-{id}", made, sums(name), training=False)


def examples():
    assert HEADS > 1
    for name in SIZES:
        for count in (1, 3):
            for mode in ("full", "partial"):
                yield example(mode, name, count, head_mode=mode)
            yield example("no head", name, count, (0.6, 0.0, 1.0), strided=True)
            if name != "timm-siglip":  # which has no class token
                yield example("only prefix", name, count, only_prefix=True)
                yield example("only prefix, partial", name, count, head_mode="partial", only_prefix=True)
    for name in ("timm-vit", "large"):
        for count in (1, 3):
            for kinds in [(kind,) for kind in KINDS]:
                yield example(f"{kinds[0]} alone", name, count, kinds=kinds)
            for rate, value in RATES.items():
                yield example(rate, name, count, (value,) * 3)
            yield example("weights laid out", name, count, laid_out=True)
            yield example("weights laid out, partial", name, count, head_mode="partial", laid_out=True)
            yield example("weights laid out, everything", name, count, (1.0,) * 3, laid_out=True)


EXAMPLES = {f"adaptkit.adapters.adavit.packed.{text}": list(examples()) for text in ("packed", "skipping")}
