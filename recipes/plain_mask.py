"""Segmentation by queries on a frozen ViT: the plain mask decoder of PMT, semantic, instance or panoptic by --task.

    python -m recipes.plain_mask --task semantic --train ade20k/train --val ade20k/val --num-classes 150 \
        --backbone vit_large_patch16_dinov3_qkvb.lvd1689m --size 512 512 --steps 20200 --batch-size 16
    python -m recipes.plain_mask --task instance --train coco/annotations/instances_train2017.json ...
    python -m recipes.plain_mask --task panoptic --train coco/annotations/panoptic_train2017.json ...

The model, its loss and its training are the same for all three; what is read as data, and the score, are those of
`recipes.segment --head plain-mask`, `recipes.detect --model plain-mask` and `recipes.panoptic --head plain-mask`,
whose options are taken: `--task panoptic --help`. Learning rate, decay, warm-up and clipping are the paper's
unless --config is given.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import detect, panoptic, segment
from .options import command

RECIPES = {"semantic": (segment, "--head"), "instance": (detect, "--model"), "panoptic": (panoptic, "--head")}
#: AdamW 2e-4, decay 0.05, 6000 of 88.7 thousand steps of warm-up, gradients of norm 0.01.
PAPER = ("--lr", "2e-4", "--weight-decay", "0.05", "--warmup", "0.07", "--clip", "0.01")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(prog="plain_mask", description=__doc__, add_help=False, allow_abbrev=False,
                                formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    p.add_argument("--task", choices=sorted(RECIPES), help="what is segmented")
    known, rest = p.parse_known_args(arguments)
    if known.task is None:
        if {"-h", "--help"} & set(rest):
            p.print_help()
            raise SystemExit(0)
        p.error(f"--task is needed: {', '.join(RECIPES)}")
    recipe, option = RECIPES[known.task]
    configured = any(word.partition("=")[0] == "--config" for word in rest)
    return recipe.main([*(() if configured else PAPER), *rest, option, "plain-mask"])


if __name__ == "__main__":
    command("plain_mask", main)
