"""A page to try the tasks on: choose one, drop an image, see the answer drawn, its classes, and its JSON.

``adaptkit.predict.draw`` draws it, as it does the files of ``adaptkit predict``; ``legend.py`` has the words beside it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse

from adaptkit.predict.answers import Answer
from adaptkit.predict.draw import laid
from adaptkit.predict.pixels import shown
from adaptkit.predict.tasks import Asked
from adaptkit.serve.docs import ICON
from adaptkit.serve.legend import legend
from adaptkit.serve.limits import Refused
from adaptkit.serve.mounts import Mounted
from adaptkit.serve.service import Service
from adaptkit.version import DISTRIBUTION

__all__ = ["with_page"]

TITLE = "adaptkit"
KEPT = 3600  #: seconds that Gradio's copies of what was uploaded and answered stay on the disk
STYLE = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
#head { display: flex; gap: 14px; align-items: center; margin: 4px 0; }
#head svg { width: 44px; height: 44px; flex: none; }
#head h1 { font-size: 1.5rem; line-height: 1.2; margin: 0; font-weight: 650; }
#head p, .foot { color: var(--body-text-color-subdued); margin: 2px 0 0; }
#answer { min-height: 240px; } #answer img { width: 100%; max-height: 520px; object-fit: contain; }
.legend { display: grid; grid-template-columns: auto auto 1fr auto; gap: 9px 12px; align-items: center; }
.legend i { width: 14px; height: 14px; border-radius: 4px; }
.legend s { height: 8px; border-radius: 4px; min-width: 2px; }
.legend b { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
.ramp { height: 14px; border-radius: 7px; margin: 4px 0; } .ends { display: flex; justify-content: space-between; }
.foot { font-size: .92rem; margin: 12px 0 0; }
"""


def with_page(app: Any, service: Service) -> Any:
    """Mount the page at ``/ui``; returns the application. ``ImportError`` says what to install."""
    remedy = f"pip install '{DISTRIBUTION}[serve,ui]'"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"--ui needs gradio ({error}): {remedy}") from error
    if int(gradio.__version__.split(".")[0]) < 6:
        raise ImportError(f"--ui needs gradio 6 or later, and this is {gradio.__version__}: {remedy}")

    @app.get("/manifest.json", include_in_schema=False)  # Gradio's page asks for it there, wherever it is mounted
    async def manifest() -> Any:
        return JSONResponse({"name": TITLE, "start_url": "/ui/", "display": "browser"})

    fonts, blue = ["system-ui", "sans-serif"], "#0072b2"
    theme = gradio.themes.Base(primary_hue="blue", neutral_hue="slate", radius_size="md", font=fonts,
                               font_mono=["ui-monospace", "monospace"])  # fmt: skip
    theme.set(
        body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500", link_text_color=blue,
        button_primary_background_fill=blue, button_primary_background_fill_dark=blue,
        button_primary_background_fill_hover="#005f94", button_primary_background_fill_hover_dark="#005f94",
    )  # fmt: skip
    return gradio.mount_gradio_app(
        app, _page(gradio, service), path="/ui", max_file_size=service.limits.body, show_error=True, footer_links=[],
        ssr_mode=False, mcp_server=False, theme=theme, css=STYLE,
    )  # fmt: skip


def _page(gradio: Any, service: Service) -> Any:
    def tasks() -> Any:  # asked when the page opens: adapters come and go
        names = list(service.mounts.all)
        first = names[0] if names else None
        one = service.mounts.all.get(first or "")
        return gradio.Dropdown(choices=names, value=first, info=about(one)), gradio.Slider(visible=detects(one))

    def chosen(task: str | None) -> Any:
        one = service.mounts.all.get(task or "")
        return gradio.Dropdown(info=about(one)), gradio.Slider(visible=detects(one))

    def answer(task: str | None, path: str | None, threshold: float) -> tuple[Any, str, dict[str, Any]]:
        if not task or not path:
            raise gradio.Error("choose a task and an image")
        began = time.perf_counter()
        try:
            picture, found = service.answer(Path(path).read_bytes(), task, Asked(threshold=threshold))
        except Refused as error:
            raise gradio.Error(error.why) from error
        seconds = time.perf_counter() - began
        return laid(shown(picture), found), legend(found) + _foot(found, seconds), found.json()

    there = service.mounts.all
    first = next(iter(there.values()), None)
    with gradio.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gradio.HTML(
            f'<div id="head">{ICON}<div><h1>{TITLE}</h1><p>One frozen backbone, many small adapters. Choose a task and '
            'drop an image, or <a href="/docs" target="_blank">call it from your code</a></p></div></div>'
        )
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                task = gradio.Dropdown(choices=list(there), value=first and first.name, label="Task",
                                       info=about(first), elem_id="task")  # fmt: skip
                # No mode: in another than the file's Gradio would compress it again, and the answer would be another.
                image = gradio.Image(type="filepath", image_mode=None, label="Image", sources=["upload", "clipboard"],
                                     height=300, buttons=["fullscreen"], elem_id="image")  # fmt: skip
                threshold = gradio.Slider(0, 1, 0.5, step=0.05, label="Least score", visible=detects(first))
                ask = gradio.Button("Predict", variant="primary", elem_id="predict")
            with gradio.Column(scale=3, min_width=320):
                seen = gradio.Image(label="Answer", interactive=False, format="png", elem_id="answer",
                                    buttons=["download", "fullscreen"])  # fmt: skip
                names = gradio.HTML(elem_id="names")
                with gradio.Accordion("JSON", open=False):
                    words = gradio.JSON(show_label=False)
        given, results = [task, image, threshold], [seen, names, words]
        # What is no answer keeps out of Gradio's queue, whose stream closes after each and may lose what begins then.
        page.load(tasks, outputs=[task, threshold], queue=False, api_visibility="private")
        task.input(chosen, task, [task, threshold], queue=False, api_visibility="private")
        # All at once, not one by one: the service has a queue of its own, and batches what comes together.
        gradio.on([ask.click, image.upload], answer, given, results, concurrency_limit=None, api_visibility="private")
    return page


def detects(mounted: Mounted | None) -> bool:
    """Whether a task finds objects, each with a score."""
    return mounted is not None and mounted.described.answers == "detection"


def about(mounted: Mounted | None, most: int = 8) -> str:
    """Say in a line what a task answers."""
    if mounted is None:
        return "nothing is mounted"
    said = mounted.json()
    names = said["classes"] or []
    more = ", ..." if len(names) > most else ""
    return f"{said['answers']}: {', '.join(names[:most])}{more}" if names else said["answers"]


def _foot(found: Answer, seconds: float) -> str:
    height, width = found.size
    return f'<p class="foot">{width:,} × {height:,} pixels, answered in {seconds:.2f} s</p>'
