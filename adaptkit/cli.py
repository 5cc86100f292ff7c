"""The command line: ``adaptkit list | demo | train TASK | inspect FILE | doctor MODEL | export FILE``."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptkit.hub.printable import printable
from adaptkit.version import DISTRIBUTION, __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. An error of the user's is one line on stderr and status 2."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        said = "\n".join(map(printable, str(error).split("\n")))  # it may quote a file
        print(f"adaptkit {args.command}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"adaptkit {args.command}: {str(stopped) or 'stopped'}", file=sys.stderr)
        return getattr(stopped, "status", 130)  # 143 where a recipe was asked to stop by SIGTERM
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adaptkit", description="Small trainable modules for frozen ViTs.")
    parser.add_argument("--version", action="version", version=f"adaptkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="adapters, heads and backbone families")
    listing.set_defaults(run=_list)

    demo = commands.add_parser("demo", help="train three ways to read a frozen backbone, offline, in minutes")
    demo.add_argument(
        "--out", default="adaptkit-demo", help="folder for report, picture and adapters (default: %(default)s)"
    )
    demo.add_argument("--steps", type=int, default=650, help="per way (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    train = commands.add_parser("train", help="train an adapter for a task; alone: the tasks")
    train.add_argument("task", nargs="?", help="segment, classify, ...")
    train.add_argument("arguments", nargs=argparse.REMAINDER, help="of the task: `adaptkit train segment --help`")
    train.set_defaults(run=_train)

    inspect = commands.add_parser("inspect", help="what an adapter file holds and what it fits")
    inspect.add_argument("file", help="a saved folder, its adapter_model.safetensors, or org/name on the Hub")
    inspect.add_argument("--json", action="store_true", help="print the header as it is")
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser("doctor", help="how a backbone is seen, and what attaches to it")
    doctor.add_argument("model", help="demo, a timm name, hf-hub:..., org/repo, or a local folder")
    doctor.add_argument("--pretrained", action="store_true", help="load the weights too (may download them)")
    doctor.set_defaults(run=_doctor)

    export = commands.add_parser("export", help="one file that runs without adaptkit: ONNX or a torch program")
    export.add_argument("file", help="a saved folder, or org/name on the Hub")
    export.add_argument("--out", required=True, help="model.onnx, or model.pt2 for torch.export.load")
    export.add_argument("--size", nargs=2, type=int, default=(224, 224), metavar=("H", "W"), help="pixels")
    export.add_argument("--backbone", help="as for doctor (default: the one that the file records)")
    export.add_argument("--fixed-batch", action="store_true", help="two images at a time, no more and no fewer")
    export.add_argument("--dynamic-size", action="store_true", help="leave the size open where the backbone allows it")
    export.add_argument("--aot", action="store_true", help="compile the .pt2 for this kind of computer")
    export.set_defaults(run=_export)
    return parser


def _table(title: str, rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), title_justify="left", show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))  # as Text it is no markup
    Console().print(table)


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _list(args: argparse.Namespace) -> None:
    from adaptkit.core import registry

    for title, entries in (("adapters", registry.adapters()), ("heads", registry.heads())):
        _table(title, [(name, _first_line(entry.module)) for name, entry in sorted(entries.items())])
    backbones: dict[str, list[str]] = {}
    for path in sorted(registry.families()):
        library, _, name = path.partition(".")[0], None, path.rpartition(".")[2]
        backbones.setdefault(library, []).append(name)
    _table("backbones", [(library, ", ".join(names)) for library, names in backbones.items()])


def _demo(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from adaptkit.demo.run import WAYS, demo
    from adaptkit.demo.scoring import tables

    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: give at least 1")
    console = Console()
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        tasks = {name: progress.add_task(name, total=args.steps, loss="") for name in WAYS}

        def advance(name: str, loss: float) -> None:
            progress.update(tasks[name], advance=1, loss=f"loss {loss:.3f}")

        result = demo(args.out, args.steps, args.seed, advance)
    console.print(*tables(result), sep="\n")
    console.print(f"report:      {args.out}/index.html, with {args.out}/predictions.png", soft_wrap=True)
    console.print(
        f"adapters:    {args.out}/{{{','.join(WAYS)}}}, see `adaptkit inspect {args.out}/vit-adapter`", soft_wrap=True
    )


def _train(args: argparse.Namespace) -> None:
    """Hand the arguments to the recipe's own ``main``: also under ``torchrun -m adaptkit train ...``."""
    package, folder = _recipes()
    tasks = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))  # none is imported to be listed
        mains = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "main" and f.args.args]
        if mains:
            tasks[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    if args.task is None:
        _table("adaptkit train TASK ...", list(tasks.items()))
        return
    if args.task not in tasks:
        raise ValueError(f"no task is named {args.task!r}; the tasks are {', '.join(tasks)}")
    importlib.import_module(f"{package}.{args.task}").main(args.arguments)


def _recipes() -> tuple[str, Path]:
    """Return the package of recipes and its folder: installed in adaptkit, or beside it in a clone."""
    here = Path(__file__).parent
    for name in ("adaptkit.recipes", "recipes"):
        spec = importlib.util.find_spec(name)
        folder = Path(spec.origin).parent if spec is not None and spec.origin else None
        if folder is not None and (name == "adaptkit.recipes" or folder.parent == here.parent):
            return name, folder
    raise ImportError(
        f"the recipes are neither in adaptkit.recipes nor beside {here}; install {DISTRIBUTION} with pip, or run in a "
        "clone"
    )


def _inspect(args: argparse.Namespace) -> None:
    from adaptkit.hub.file import say_spec
    from adaptkit.hub.repository import load

    file = load(args.file)
    if args.json:
        print(json.dumps(file.header, indent=2, sort_keys=True))
        return
    backbone = file.header["backbone"]
    count = sum(t.numel() for t in file.tensors.values())
    rows = [
        (
            "file",
            f"{file.path} ({file.path.stat().st_size / 1e6:.2f} MB, {len(file.tensors)} tensors, {count:,} values)",
        )
    ]
    rows += [(f"adapter {a['name']}", json.dumps(a["config"])) for a in file.header["adapters"]]
    head = file.header["head"]
    if head is not None:
        rows += [(f"head {head['name'] or head['class']}", json.dumps(head.get("config", {})))]
    if backbone is None:
        base = file.header["metadata"]["base_model"] or "unnamed"
        _table("LoRA in peft's layout", [*rows, ("trained on", base), ("written by", file.header["adaptkit"])])
        return
    rows += [
        ("trained on", f"{backbone['source'] or 'unnamed'} ({backbone['class']})"),
        ("fits", f"backbones of {say_spec(file.spec)}"),
        (
            "images",
            f"mean {backbone['mean']}, std {backbone['std']}" if backbone["mean"] else "normalisation not recorded",
        ),
        ("positions", backbone.get("positions", "not recorded")),
        ("metadata", json.dumps(file.header.get("metadata", {}))),
        ("written by", f"adaptkit {file.header.get('adaptkit', '')}, format {file.header['format']}"),
    ]
    _table("adapter file", rows)


def _doctor(args: argparse.Namespace) -> None:
    import torch

    from adaptkit.core import registry
    from adaptkit.core.view import Spec
    from adaptkit.create import create_backbone
    from adaptkit.hub.file import say_spec
    from adaptkit.model.adapted import attach
    from adaptkit.ops.grid import cells

    model = create_backbone(args.model, pretrained=args.pretrained)
    vit = registry.view(model)
    spec, source = vit.spec, vit.source()
    structure = ("structure", say_spec(spec))
    if isinstance(spec, Spec):
        structure = ("width, depth, heads", f"{spec.embed_dim}, {spec.depth}, {spec.num_heads}")
    rows = [
        ("class", f"{type(vit.backbone).__module__}.{type(vit.backbone).__qualname__}"),
        ("family", spec.family),
        ("source", source.id or "unnamed"),
        structure,
        (
            "patch",
            f"{spec.patch_size} pixels; an image of 240x320 is a grid of {cells(240, spec.patch_size)}x"
            f"{cells(320, spec.patch_size)}",
        ),
        ("prefix tokens", str(spec.num_prefix_tokens)),
        ("channels of the image", str(spec.channels)),
        ("positions", f"{vit.positions} to another grid"),
        (
            "normalisation",
            f"mean {list(source.mean)}, std {list(source.std)}" if source.mean else "not recorded by the model",
        ),
    ]
    image = torch.zeros(1, spec.channels, 5 * spec.patch_size + 3, 7 * spec.patch_size)
    for name in sorted(registry.adapters()):
        rows.append((f"attach {name!r}", _try(attach, model, name, image)))
    _table(args.model, rows)


def _export(args: argparse.Namespace) -> None:
    from adaptkit import export
    from adaptkit.pretrained import from_pretrained

    suffix = args.out.rpartition(".")[2]
    if suffix not in ("onnx", "pt2") or (args.aot and suffix != "pt2"):
        raise ValueError(f"--out {args.out}: give a name that ends in .onnx or .pt2{' (.pt2 with --aot)' * args.aot}")
    write = {"onnx": export.to_onnx, "pt2": export.to_aot_package if args.aot else export.to_exported_program}[suffix]
    model = from_pretrained(args.file, backbone=args.backbone)
    opened = {"dynamic_batch": not args.fixed_batch, "dynamic_size": args.dynamic_size}
    try:
        path = write(model, args.out, tuple(args.size), **opened)
    except RuntimeError as error:  # the file does not agree, or there is no compiler
        raise ValueError(str(error)) from error
    rows = [
        ("file", f"{path} ({path.stat().st_size / 1e6:.2f} MB), agrees with the model"),
        (
            "input",
            f"image, {'2' if args.fixed_batch else 'any'} x {model.spec.channels} x {args.size[0]} x {args.size[1]}, "
            "float32",
        ),
        ("outputs", ", ".join(export.output_names(model, tuple(args.size)))),
    ]
    _table("exported", rows)


def _try(attach: Any, model: Any, name: str, image: Any) -> str:
    """Attach, run one odd-sized image, detach; say what happened."""
    import torch

    try:
        adapted = attach(model, name).eval()
    except (TypeError, ValueError) as error:
        return f"no: {error}"
    try:
        with torch.no_grad():
            maps = adapted(image).maps
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        made = ", ".join(f"{m.shape[-2]}x{m.shape[-1]}" for m in maps)
        size = f"{image.shape[-2]}x{image.shape[-1]}"
        return f"yes: {trained:,} trainable parameters; {size} pixels give {f'maps of {made}' if made else 'tokens'}"
    finally:
        adapted.detach()


if __name__ == "__main__":
    sys.exit(main())
