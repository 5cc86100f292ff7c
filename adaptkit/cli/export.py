"""``adaptkit export FILE --out model.onnx``: one file that runs without adaptkit."""

from __future__ import annotations

import argparse
from typing import Any

from adaptkit.cli._backbone import add_backbone
from adaptkit.cli._show import table

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("export", help="one file that runs without adaptkit: ONNX or a torch program")
    parser.add_argument("file", help="a saved folder, or org/name on the Hub")
    parser.add_argument("--out", required=True, help="model.onnx, or model.pt2 for torch.export.load")
    parser.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("H", "W"), help="pixels")
    add_backbone(parser)
    parser.add_argument("--fixed-batch", action="store_true", help="two images at a time, no more and no fewer")
    parser.add_argument("--dynamic-size", action="store_true", help="leave the size open where the backbone allows it")
    parser.add_argument(
        "--outputs",
        nargs="+",
        metavar="NAME",
        help="of logits, maps, map_4, ..., tokens, prefix, boxes, scores, labels, masks: all",
    )
    parser.add_argument("--aot", action="store_true", help="compile the .pt2 for this kind of computer")


def run(args: argparse.Namespace) -> None:
    """Open the file and write it for another runtime, compared with the model."""
    from adaptkit import export
    from adaptkit.pretrained import from_pretrained

    suffix = args.out.rpartition(".")[2]
    if suffix not in ("onnx", "pt2") or (args.aot and suffix != "pt2"):
        raise ValueError(f"--out {args.out}: give a name that ends in .onnx or .pt2{' (.pt2 with --aot)' * args.aot}")
    write = {"onnx": export.to_onnx, "pt2": export.to_aot_package if args.aot else export.to_exported_program}[suffix]
    model = from_pretrained(args.file, backbone=args.backbone, positions=args.positions)
    opened = {"dynamic_batch": not args.fixed_batch, "dynamic_size": args.dynamic_size, "outputs": args.outputs}
    try:
        path = write(model, args.out, tuple(args.size), **opened)
    except RuntimeError as error:  # the file does not agree, or there is no compiler
        raise ValueError(str(error)) from error
    graph = export.graph_of(model, tuple(args.size), args.outputs)
    batch = str(graph.images or ("2" if args.fixed_batch else "batch"))
    unit = "float32, in 0..1, not normalised" if graph.sized else "float32"
    rows = [
        ("file", f"{path} ({path.stat().st_size / 1e6:.2f} MB), agrees with the model"),
        ("input", f"image, {batch} x {graph.adapted.spec.channels} x {_sides(args)}, {unit}"),
        ("outputs", ", ".join(export.output_names(model, tuple(args.size), args.outputs))),
    ]
    table("exported", rows)


def _sides(args: argparse.Namespace) -> str:
    return "height x width" if args.dynamic_size else f"{args.size[0]} x {args.size[1]}"
