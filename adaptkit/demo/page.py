"""The page at the end of the demo: one HTML file with the picture in it, which opens anywhere and asks for nothing."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from adaptkit.demo.picture import COLOURS
from adaptkit.demo.scoring import Result, Row, percent

__all__ = ["page"]

WAYS = {
    "linear": "one linear layer on each token",
    "sfp": "four maps from the last tokens (ViTDet)",
    "vit-adapter": "the image itself, read beside the tokens (ViT-Adapter without injectors)",
}
STYLE = """
:root { --ink: #222; --faint: #667; --line: #e3e3e8; --bar: #88ccee; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); margin: 0 auto; max-width: 68rem;
       padding: 2.5rem 1.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p, figcaption { max-width: 46rem; } .faint, figcaption { color: var(--faint); font-size: .92rem; }
figure { margin: 1.6rem 0; } img { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; } td.best { font-weight: 700; }
td.bar { background: linear-gradient(90deg, color-mix(in srgb, var(--bar) 45%, white) var(--share), transparent 0); }
.dot { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border-radius: 2px; }
.thin td { background-color: #fafafc; }
pre { background: #f5f5f8; border-radius: 6px; padding: 1rem; overflow-x: auto; font-size: .88rem; }
"""


def page(picture: Path, result: Result, folder: Path) -> str:
    """Return the page: the picture, what each way costs, its IoU class by class, and how to go on from ``folder``."""
    best = max(result.rows, key=lambda row: row.miou)
    title = "Three ways to read one frozen backbone"
    data = base64.b64encode(picture.read_bytes()).decode()
    height, width = result.size
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>adaptkit demo: {title}</title><style>{STYLE}</style></head>
<body>
<h1>{title}</h1>
<p>A ViT-Tiny/16 saw {result.train} drawn scenes of {height} × {width} pixels and their mirror images once
({result.seconds:.0f} seconds) and was never trained. On what it saw, each way was then trained for {result.steps} steps
of {result.batch} images: the same batches, loss, and learning rates. The scores are of {result.val} other scenes.
The best here is {escape(best.name)} with {percent(best.miou)} mIoU.</p>
<figure><img alt="Scenes, their truth and the predictions of each way" src="data:image/png;base64,{data}">
<figcaption>The first validation scenes, not chosen. A token is 16 pixels wide; {escape(", ".join(result.thin))} are at
most a few pixels, and the image turns grey under the colours.</figcaption></figure>
<h2>What each way costs, and what it scores</h2>
<div class="wide"><table><tr><th></th><th>trained parameters</th><th>file</th><th>kept by a step</th><th>seconds</th>
<th>mIoU</th></tr>
{"".join(_cost(row, row is best) for row in result.rows)}</table></div>
<p class="faint">Kept by a step: memory of the training step for its backward pass, beside weights and batch.</p>
<h2>IoU by class</h2>
<div class="wide"><table><tr><th></th>{"".join(f"<th>{escape(row.name)}</th>" for row in result.rows)}</tr>
{"".join(_scores(result, i) for i in range(len(result.classes)))}</table></div>
<h2>How to go on</h2>
<pre>{escape(_commands(folder, best.name))}</pre>
<p class="faint">Seed {result.seed}. The numbers of this page are in result.json beside it.</p>
</body>
</html>
"""


def _cost(row: Row, is_best: bool) -> str:
    cells = (
        f"{row.trained:,}",
        f"{row.file_bytes / 1e6:.2f} MB",
        f"{row.kept_bytes / 1e6:.0f} MB",
        f"{row.seconds:.0f}",
    )
    name = f"{escape(row.name)} <span class=faint>{escape(WAYS.get(row.name, ''))}</span>"
    score = f'<td class="{"best" if is_best else ""}">{percent(row.miou)}</td>'
    return f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}{score}</tr>\n"


def _scores(result: Result, index: int) -> str:
    """One class: a bar as long as the IoU for each way, the best in bold."""
    name, values = result.classes[index], [row.iou[index] for row in result.rows]
    top = max((value for value in values if value == value), default=None)
    cells = (
        f'<td class="bar{" best" if value == top else ""}" '
        f'style="--bar: {COLOURS[name]}; --share: {0 if value != value else 100 * value:.1f}%">{percent(value)}</td>'
        for value in values
    )
    dot = f'<span class="dot" style="background: {COLOURS[name]}"></span>'
    kind = ' class="thin"' if name in result.thin else ""
    return f"<tr{kind}><td>{dot}{escape(name)}</td>{''.join(cells)}</tr>\n"


def _commands(folder: Path, name: str) -> str:
    saved = folder / name
    return f"""adaptkit inspect {saved}
adaptkit export {saved} --out model.onnx --size 160 160
adaptkit train segment --help      # your own images and masks

# in Python
import adaptkit
model = adaptkit.attach(adaptkit.demo_backbone(), "{saved}")"""
