"""A page to try the tasks on: choose one, drop an image, see the answer drawn, its classes, and its JSON."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from adaptkit.predict.answers import Answer, Classification, Depth, Detection, Panoptic, Segmentation
from adaptkit.predict.tasks import Asked
from adaptkit.serve.limits import Refused
from adaptkit.serve.overlay import can_draw, overlay
from adaptkit.serve.service import Service
from adaptkit.version import DISTRIBUTION

__all__ = ["legend", "with_page"]

TITLE = "adaptkit"


def with_page(app: Any, service: Service) -> Any:
    """Mount the page at ``/ui``; returns the application. ``ImportError`` says what to install."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"--ui needs gradio ({error}): pip install '{DISTRIBUTION}[serve,ui]'") from error
    limit = service.limits.body
    return gradio.mount_gradio_app(app, _page(gradio, service), path="/ui", max_file_size=limit, show_error=True)


def _page(gradio: Any, service: Service) -> Any:
    def tasks() -> Any:  # asked when the page opens: adapters come and go
        names = list(service.mounts.all)
        return gradio.Dropdown(choices=names, value=names[0] if names else None)

    def answer(task: str | None, path: str | None, threshold: float) -> tuple[Any, str, dict[str, Any]]:
        if not task or not path:
            raise gradio.Error("choose a task and an image")
        try:
            picture, found = service.answer(Path(path).read_bytes(), task, Asked(threshold=threshold))
        except Refused as error:
            raise gradio.Error(error.why) from error
        return overlay(picture, found) if can_draw(found) else None, legend(found), found.json()

    with gradio.Blocks(title=TITLE, analytics_enabled=False) as page:
        gradio.Markdown(
            "## adaptkit\nOne frozen backbone, the adapters that are mounted on it. Choose a task, drop an image."
        )
        with gradio.Row():
            with gradio.Column(scale=2):
                names = list(service.mounts.all)
                task = gradio.Dropdown(choices=names, value=names[0] if names else None, label="Task")
                image = gradio.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=320)
                threshold = gradio.Slider(0, 1, 0.5, step=0.05, label="Least score (detectors)")
                ask = gradio.Button("Predict", variant="primary")
            with gradio.Column(scale=3):
                seen = gradio.Image(label="Answer", interactive=False, format="png", height=420)
                names_seen = gradio.HTML()
                with gradio.Accordion("JSON", open=False):
                    words = gradio.JSON(show_label=False)
        given, shown = [task, image, threshold], [seen, names_seen, words]
        page.load(tasks, outputs=task, api_visibility="private")
        gradio.on([ask.click, image.upload], answer, given, shown, api_visibility="private")
    return page


def legend(answer: Answer) -> str:
    """Return what was found, in HTML: a colour, a name and a number for each; names are a file's, and are escaped."""
    if isinstance(answer, Depth):
        said = answer.json()
        return f"<p>near is bright: {said['min']:.2f} m to {said['max']:.2f} m, median {said['median']:.2f} m</p>"
    chips = "".join(_chip(colour, name, number) for colour, name, number in _found(answer))
    return f'<div style="display:flex;flex-wrap:wrap;gap:6px 14px">{chips or "nothing was found"}</div>'


def _found(answer: Answer) -> list[tuple[Any, str, str]]:
    said = answer.json()
    if isinstance(answer, Segmentation):
        return [(answer.palette[c["id"]], c["name"], f"{c['share']:.1%}") for c in said["classes"]]
    if isinstance(answer, Panoptic):
        return [(answer.palette[s["label"]], s["name"], f"{s['area']:,} px") for s in said["segments"]]
    if isinstance(answer, Detection):
        rows = zip(answer.labels.tolist(), said["objects"])
        return [(answer.palette[label], one["name"], f"{one['score']:.2f}") for label, one in rows]
    if isinstance(answer, Classification):
        names = [*answer.names]
        return [(answer.palette[names.index(t["name"])], t["name"], f"{t['score']:.1%}") for t in said["top"]]
    return []


def _chip(colour: Any, name: str, number: str) -> str:
    square = f"display:inline-block;width:14px;height:14px;border-radius:3px;background:rgb{tuple(colour)}"
    words = f"{html.escape(name)} <b>{html.escape(number)}</b>"
    return f'<span style="display:inline-flex;align-items:center;gap:6px"><span style="{square}"></span>{words}</span>'
