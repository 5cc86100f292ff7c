"""Several tasks on one backbone: what does one pass for all cost, beside a model for each?

    python -m recipes.bench.serve                       # four extractor-only ViT-Adapters on a ViT-S at 512 pixels
    python -m recipes.bench.serve --backbone vit_base_patch16_224 --adapter sfp

Each row has N tasks: N separate models, one after the other, and ``attach_many``, in turns; medians. Before anything is
timed the outputs are compared: they are the same bits.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch

import adaptkit

from .measure import in_turns, machine


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="a timm name; weights are random")
    parser.add_argument("--adapter", default="vit-adapter")
    parser.add_argument("--adapter-options", type=json.loads, default=None, help="default: no injectors")
    parser.add_argument("--head", default="linear", help="of each task: linear or fpn")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    if args.adapter_options is None:
        args.adapter_options = {"injector": False} if args.adapter == "vit-adapter" else {}
    return args


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    import timm

    args = arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    host = timm.create_model(args.backbone, num_classes=0, dynamic_img_size=True).eval()
    image = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
    given: Any = (args.adapter, args.adapter_options)
    rows = []
    for count in args.tasks:
        names = [f"task {i}" for i in range(count)]
        heads = {name: (args.head, {"num_classes": 5 + i}) for i, name in enumerate(names)}
        many = adaptkit.attach_many(copy.deepcopy(host), dict.fromkeys(names, given), heads).eval().to(args.device)
        alone = {}
        for name in names:
            alone[name] = adaptkit.attach(copy.deepcopy(host), given, head=heads[name]).eval().to(args.device)
            alone[name].load_adapter_state_dict(many.model.set_of(name).tensors())
        together = many(image)
        for name in names:
            if not torch.equal(together[name].logits, alone[name](image).logits):
                raise RuntimeError(f"{name} of attach_many says something else than alone")

        def separately(models: Any = alone) -> dict[str, Any]:  # both give the features of every task at once
            return {name: model(image) for name, model in models.items()}

        took = in_turns({"alone": separately, "many": lambda m=many: m(image)}, args.rounds, args.device)  # type: ignore[misc]
        ratio = took["many"] / took["alone"]
        cells = (count, f"{1e3 * took['alone']:.0f}", f"{1e3 * took['many']:.0f}", f"{ratio:.2f}", many.passes())
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    print(
        f"{args.backbone}, {args.adapter} {json.dumps(args.adapter_options)}, {args.head} heads, {args.size} pixels, "
        f"batch {args.batch}; medians of {args.rounds} on {machine(args.threads, args.device)}\n"
    )
    print("| tasks | separate models, ms | attach_many, ms | ratio | passes |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
