"""``adaptkit serve name=FILE ...``: one resident backbone, many adapters, over HTTP."""

from __future__ import annotations

import argparse
from typing import Any

from adaptkit.cli._backbone import add_backbone
from adaptkit.core.arguments import Defaults
from adaptkit.version import DISTRIBUTION

__all__ = ["add", "run"]


def add(commands: Any) -> None:
    """Add the command and its arguments."""
    parser = commands.add_parser(
        "serve",
        help="one resident backbone, many adapters, over HTTP",
        formatter_class=Defaults,
    )
    parser.add_argument("adapters", nargs="*", metavar="name=FILE", help="a saved folder, or org/name on the Hub")
    add_backbone(parser, "the one that the first file records")
    parser.add_argument("--strict", action="store_true", help="refuse files that were trained on other weights")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; without it a GPU where there is one")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; without it torch's own choice")
    http = parser.add_argument_group("address")
    http.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in, and nobody is asked for a password")
    http.add_argument("--port", type=int, default=8000, help="0: any that is free")
    http.add_argument("--ui", action="store_true", help=f"a page at /ui; pip install '{DISTRIBUTION}[ui]'")
    http.add_argument("--allow-mount", action="append", nargs="?", const="anywhere", default=[], metavar="PLACE",
                      help="let clients mount and unmount, from a folder, hub, hub:org or anywhere")  # fmt: skip
    batch = parser.add_argument_group("batches")
    batch.add_argument("--batching", choices=("exact", "close", "off"), default="exact",
                       help="exact: where answers keep their bits; close: all of one size; off: never")  # fmt: skip
    batch.add_argument("--max-batch", type=int, default=8, help="images of a pass")
    batch.add_argument("--window", type=float, default=2.0, help="milliseconds that an image waits for others")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-mb", type=float, default=32.0, help="of a request's body, in 2^20 bytes")
    limits.add_argument("--max-megapixels", type=float, default=40.0, help="of an image")
    limits.add_argument("--max-images", type=int, default=16, help="of a request")
    limits.add_argument("--max-requests", type=int, default=64, help="at once; more are told to come again")


def run(args: argparse.Namespace) -> None:
    """Build the backbone, mount the files, serve until told to stop."""
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401

        from adaptkit.serve import run as listening
        from adaptkit.serve.app import create_app
        from adaptkit.serve.start import service_of
    except ImportError as error:
        raise ImportError(f"{error}: pip install '{DISTRIBUTION}[serve]'") from error
    sock = listening.bound(args.host, args.port)
    try:
        service = service_of(args)
        app: Any = create_app(service)
        if args.ui:
            from adaptkit.serve.ui import with_page

            app = with_page(app, service)
        where = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{sock.getsockname()[1]}"

        def started() -> None:
            print(f"adaptkit: {', '.join(service.mounts.all) or 'nothing yet'} on {where} (pages: /docs"
                  f"{', /ui' if args.ui else ''})", flush=True)  # fmt: skip

        listening.run(app, sock, started, service.streams.end)
    finally:
        sock.close()
