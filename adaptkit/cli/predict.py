"""``adaptkit predict FILE IMAGE... --out DIR``: a saved adapter's answers to pictures, as files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adaptkit.cli._backbone import add_backbone

__all__ = ["add", "add_ways", "run", "ways_of"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("predict", help="masks, boxes, depths or classes of pictures, by an adapter file")
    parser.add_argument("file", help="a saved folder, or org/name on the Hub")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, folders, patterns or videos")
    parser.add_argument("--out", required=True, metavar="DIR", help="for NAME.png, NAME_overlay.png, predictions.json")
    add_backbone(parser)
    add_ways(parser)
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of an object (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every Nth frame of a video")
    parser.add_argument("--no-overlay", action="store_true", help="write the answers alone")


def add_ways(parser: Any) -> None:
    """Add the ways of looking at a picture, and where."""
    parser.add_argument("--slide", type=int, nargs=2, metavar=("H", "W"), help="move a window over the picture")
    parser.add_argument("--stride", type=int, nargs=2, metavar=("H", "W"), help="of it (default: two thirds of it)")
    parser.add_argument("--resize", metavar="SIDE", help="shorter side in pixels, or native (default: as trained)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="X", help="sizes to average over")
    parser.add_argument("--flip", action="store_true", help="average over the mirrored picture too")
    parser.add_argument("--batch-size", type=int, default=8, help="images or tiles at once (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def ways_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return what ``model.predict`` takes of these arguments. Raises ``ValueError`` for a size that is none."""
    resize: Any = args.resize
    if resize is not None and resize != "native":
        if not resize.isdigit():
            raise ValueError(f"--resize {resize}: give the shorter side in pixels, or native")
        resize = int(resize)
    return {
        "slide": tuple(args.slide) if args.slide else None,
        "stride": tuple(args.stride) if args.stride else None,
        "resize": resize,
        "scales": tuple(args.scales),
        "flip": args.flip,
        "batch_size": args.batch_size,
    }


def run(args: argparse.Namespace) -> None:
    """Predict and write."""
    import sys

    from adaptkit.cli._show import progress
    from adaptkit.create import best_device
    from adaptkit.hub.write import check_writable
    from adaptkit.predict.files import found
    from adaptkit.predict.pixels import pixels, shown
    from adaptkit.predict.tasks import Asked
    from adaptkit.predict.ways import Ways
    from adaptkit.predict.write import Written
    from adaptkit.pretrained import from_pretrained

    asked = Asked(Ways(**ways_of(args)), threshold=args.threshold)
    if args.every < 1:
        raise ValueError(f"--every {args.every}: give at least 1")
    given, out = found(args.images), Path(args.out).expanduser()
    check_apart(out, given, overlays=not args.no_overlay)
    check_writable(out)
    model = from_pretrained(args.file, backbone=args.backbone, positions=args.positions)
    model = model.to(best_device(args.device))
    channels, written = model.vit.spec.channels, Written(out, draws=not args.no_overlay)
    numbers, seen = ids_of([one.path for one in given]), []

    def images() -> Iterator[Any]:
        for name, number, image in pictures(given, numbers, args.every):
            held = pixels(image, channels)
            seen.append((name, number, held))
            yield held

    with progress("predict", None if any(one.is_video for one in given) else len(given)) as advance:
        for answer in model.predict_each(images(), asked):
            name, number, held = seen.pop(0)
            written.add(name, answer, shown(held), number)
            advance()
    path = written.close()
    print(f"{path}: {len(written.entries)} entries; pictures in {out}", file=sys.stdout)


def pictures(given: Any, numbers: dict[Path, int], every: int) -> Iterator[tuple[str, int, Any]]:
    """Yield name, id and picture of each file, and of each frame of a video."""
    from adaptkit.predict.files import frames

    for one in given:
        if not one.is_video:
            yield one.name, numbers[one.path], one.path
            continue
        for number, image in frames(one.path, every):
            yield f"{one.name}_{number:06d}", number, image


def ids_of(paths: list[Path]) -> dict[Path, int]:
    """Return COCO's id of each picture: the number that its name is, where all are numbers, else its place from 1."""
    numeric = all(p.stem.isdecimal() for p in paths) and len({int(p.stem) for p in paths}) == len(paths)
    return {p: int(p.stem) if numeric else i for i, p in enumerate(paths, 1)}


def check_apart(out: Path, given: Any, overlays: bool = True) -> None:
    """Raise ``ValueError`` where an answer would be written over a picture that was given, or over another answer."""
    paths, names = {one.path.resolve() for one in given}, {one.name: one.path for one in given}
    for name, path in names.items():
        drawn = f"{name}_overlay"
        if overlays and drawn in names:
            raise ValueError(
                f"{path} and {names[drawn]} would both be answered in {drawn}.png: leave out what an earlier run drew, "
                "or draw nothing with --no-overlay"
            )
    for one in given:
        for end in (".png", "_overlay.png"):
            target = out / f"{one.name}{end}"
            if target.resolve() in paths:
                raise ValueError(f"--out {out}: the answer {target} would overwrite a picture that was given")
