"""``adaptkit look MODEL IMAGE... --out DIR``: the papers' figures of a model, those that apply."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add", "run"]

FORMATS = ("png", "pdf", "svg")


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser("look", help="the papers' figures of a model: attention, features, frequencies, ...")
    parser.add_argument("model", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, folders or patterns")
    parser.add_argument("--out", required=True, metavar="DIR", help="for NAME.png and NAME.pdf")
    parser.add_argument("--file", metavar="ADAPTER", help="a saved adapter to attach: a folder, or org/name")
    parser.add_argument("--size", type=int, metavar="SIDE", help="of the square cut from each picture (default: 224)")
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="R",
        help="of the images in 0..1, for each channel or for all (default: as recorded)",
    )
    parser.add_argument("--std", type=float, nargs="+", metavar="R", help="the same, standard deviation")
    parser.add_argument("--blocks", type=int, nargs="+", metavar="I", help="of the backbone (default: as fits)")
    parser.add_argument("--query", type=float, nargs=2, metavar=("Y", "X"), help="in pixels of the square")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these figures alone")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["png", "pdf"], help="(default: png pdf)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")


def run(args: argparse.Namespace) -> None:
    """Make the figures; say for each where it is, or why it does not apply."""
    from adaptkit.analysis.looks import FIGURES, looks
    from adaptkit.core.near import hint
    from adaptkit.core.printable import printable
    from adaptkit.create import best_device, create_backbone
    from adaptkit.hub.write import check_writable
    from adaptkit.predict.files import found
    from adaptkit.pretrained import from_pretrained

    for name in args.only or ():
        if name not in FIGURES:
            raise ValueError(f"--only {name}: there is no such figure{hint(name, FIGURES)}; {', '.join(FIGURES)}")
    given, out = [one for one in found(args.images) if not one.is_video], Path(args.out).expanduser()
    if not given:
        raise ValueError("no picture was given, only videos")
    check_writable(out)
    device = best_device(args.device)
    if args.file:
        model: Any = from_pretrained(args.file, backbone=args.model)
    else:
        model = create_backbone(args.model, classifier=True)
    model = model.to(device).eval()
    normalised = {name: value for name, value in (("mean", args.mean), ("std", args.std)) if value is not None}
    images = _squares(model, [one.path for one in given], args.size, normalised)
    out.mkdir(parents=True, exist_ok=True)
    query = tuple(args.query) if args.query else None
    made = looks(model, [i.to(device) for i in images], out, args.blocks, query, args.formats, args.only or ())
    for one in made:
        files = ", ".join(str(path) for path in one.files)
        print(printable(f"{one.name}: {files}" if files else f"{one.name}: no, {one.why}"), flush=True)


def _squares(model: Any, paths: list[Path], size: int | None, normalised: dict[str, list[float]]) -> list[Any]:
    """Read pictures, bring the shorter side to ``size`` and cut the middle; normalised so, or as the backbone says."""
    from adaptkit.analysis.watch import Watched
    from adaptkit.predict.transform import transform_of

    watched = Watched.of(model)
    patch = watched.vit.spec.patch_size
    side = 224 if size is None else size
    if side < patch:
        raise ValueError(f"--size {side} is less than one patch of {patch} pixels")
    side = round(side / patch) * patch
    channels, source = watched.vit.spec.channels, watched.vit.source()
    given = {name: values * (channels if len(values) == 1 else 1) for name, values in normalised.items()}
    if min(given.get("std", [1.0])) <= 0:
        raise ValueError(f"--std {' '.join(map(str, given['std']))}: a standard deviation is above 0")
    said = {**(model.metadata if watched.acting else {}), **given, "size": side}
    if not all(said.get(name) or getattr(source, name) for name in ("mean", "std")):
        raise ValueError(
            f"nobody says how images are normalised for {type(watched.vit.backbone).__name__}: --mean and --std"
        )
    how = transform_of(source, said, "segmentation", channels)
    return [how.normalise(_middle(how.frame(_pixels(path, watched)), side)) for path in paths]


def _pixels(path: Path, watched: Any) -> Any:
    from adaptkit.predict.pixels import pixels

    return pixels(path, watched.vit.spec.channels)


def _middle(image: Any, side: int) -> Any:
    from torchvision.transforms.v2 import functional as F

    return F.center_crop(image, [side, side])
