"""The page at ``/docs``: what is mounted, every route with its parameters, and a line of curl for each.

FastAPI's own page loads its script from a host on the internet; this one is a single file, and works without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["EXAMPLES", "ICON", "docs_page"]

#: By method and route: options of curl; {base} and {task} are filled in.
EXAMPLES: dict[tuple[str, str], tuple[str, ...]] = {
    ("post", "/predict/{task}"): (
        "curl --data-binary @photo.jpg {base}/predict/{task}",
        'curl --data-binary @photo.jpg -H "Accept: image/png" {base}/predict/{task} > answer.png',
        'curl --data-binary @photo.jpg -H "Accept: image/png" "{base}/predict/{task}?draw=true" > overlay.png',
    ),
    ("post", "/predict"): (
        'curl --data-binary @photo.jpg "{base}/predict?tasks={task}"',
        "curl -F image=@photo.jpg -F image=@photo.jpg {base}/predict",
    ),
    ("get", "/adapters"): ("curl {base}/adapters",),
    ("post", "/adapters/{name}"): ('curl --json \'{{"file": "org/name"}}\' {base}/adapters/new',),
    ("delete", "/adapters/{name}"): ("curl -X DELETE {base}/adapters/new",),
    ("get", "/healthz"): ("curl {base}/healthz",),
    ("get", "/metrics"): ("curl {base}/metrics",),
}
FIRST = ("/predict/{task}", "/predict", "/adapters")  #: routes that come first, for people come for them

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#0072b2"/>'
    '<path d="M7 22 16 8l9 14" fill="none" stroke="#fff" stroke-width="3.4" stroke-linejoin="round"/>'
    '<circle cx="16" cy="21" r="3.2" fill="#e69f00"/></svg>'
)
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1d2026; --faint: #5d6470; --line: #dfe2e8; --panel: #f6f7f9;
  --get: #00805d; --post: #0072b2; --delete: #b3410a; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e8eaee; --faint: #a2a9b5; --line: #333843;
  --panel: #1d2026; --get: #3fcf9f; --post: #56b4e9; --delete: #f0955a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 3rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; }
.lead, .faint { color: var(--faint); } .lead { font-size: 1.1rem; margin: 0; } a { color: var(--post); }
.route { border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.2rem; margin: 0 0 1rem; }
h3 { font-size: 1rem; margin: 0; display: flex; flex-wrap: wrap; gap: .3rem .8rem; align-items: baseline; }
h3 b { font-size: .78rem; letter-spacing: .06em; } h3 span { color: var(--faint); font-weight: 400; }
.get b { color: var(--get); } .post b { color: var(--post); } .delete b { color: var(--delete); }
code, pre { font-family: ui-monospace, "Cascadia Mono", Menlo, monospace; font-size: .86rem; }
pre { background: var(--panel); border-radius: 8px; padding: .7rem .9rem; margin: .7rem 0 0; overflow-x: auto; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; margin-top: .7rem; }
th, td { text-align: left; padding: .3rem 1.2rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 500; }
"""


def docs_page(description: Mapping[str, Any], base: str, mounted: list[dict[str, Any]], has_page: bool = False) -> str:
    """Return the page, in HTML.

    Args:
        description: OpenAPI's, as the application has it.
        base: address of the server as the client wrote it, without a slash at the end.
        mounted: what ``/adapters`` lists.
        has_page: whether ``/ui`` is there.
    """
    links = '<a href="openapi.json">OpenAPI description</a>' + (' · <a href="ui/">try it</a>' if has_page else "")
    task = mounted[0]["name"] if mounted else "seg"
    paths = sorted(description["paths"], key=lambda path: FIRST.index(path) if path in FIRST else len(FIRST))
    routes = "".join(
        _route(method, path, said, base, task) for path in paths for method, said in description["paths"][path].items()
    )
    title, version = escape(description["info"]["title"]), escape(description["info"]["version"])
    icon = ICON.replace("#", "%23").replace('"', "'")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" '
        f'href="data:image/svg+xml,{icon}"><style>{STYLE}</style></head><body><main><h1>{title}</h1><p class="lead">'
        f'{escape(description["info"]["description"])}</p><p class="faint">Version {version} · {links}</p>'
        f"<h2>Tasks</h2>{_tasks(mounted)}<h2>Routes</h2>{routes}</main></body></html>"
    )


def _tasks(mounted: list[dict[str, Any]]) -> str:
    if not mounted:
        return '<p class="faint">Nothing is mounted yet: see POST /adapters below.</p>'
    rows = "".join(
        f"<tr><td><code>{escape(one['name'])}</code></td><td>{escape(one['answers'])}</td>"
        f"<td>{escape(_named(one['classes']))}</td><td>{escape(one['pass'])}</td></tr>"
        for one in mounted
    )
    head = "<tr><th>task</th><th>answers</th><th>classes</th><th>pass of the backbone</th></tr>"
    return f'<div class="wide"><table>{head}{rows}</table></div>'


def _named(classes: list[str] | None, most: int = 12) -> str:
    if not classes:
        return "not named"
    more = f" and {len(classes) - most} more" if len(classes) > most else ""
    return ", ".join(classes[:most]) + more


def _route(method: str, path: str, said: Mapping[str, Any], base: str, task: str) -> str:
    lines = EXAMPLES.get((method, path), ())
    curl = "".join(f"<pre>{escape(line.format(base=base, task=task), quote=False)}</pre>" for line in lines)
    rows = "".join(_parameter(one) for one in said.get("parameters", []))
    table = f'<div class="wide"><table>{rows}</table></div>' if rows else ""
    errors = "; ".join(
        f"{status} {one['description']}" for status, one in said["responses"].items() if str(status)[0] in "45"
        and one["description"] != "Validation Error"
    )  # fmt: skip
    refusals = f'<p class="faint">Refusals: {escape(errors)}.</p>' if errors else ""
    return (
        f'<section class="route {method}"><h3><b>{method.upper()}</b><code>{escape(path)}</code>'
        f"<span>{escape(said.get('summary', ''))}</span></h3>{table}{curl}{refusals}</section>"
    )


def _parameter(one: Mapping[str, Any]) -> str:
    schema = one["schema"]
    kind = schema.get("type", "")
    usual = f", default {schema['default']!r}" if schema.get("default", "") != "" else ""
    usual = usual.replace("True", "true").replace("False", "false")
    return (
        f"<tr><td><code>{escape(one['name'])}</code></td><td class='faint'>{escape(one['in'])}, {escape(kind)}"
        f"{escape(usual)}</td><td>{escape(one.get('description', ''))}</td></tr>"
    )
