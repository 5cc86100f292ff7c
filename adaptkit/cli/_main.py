"""Finds the commands of this folder and runs one."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from adaptkit.core.arguments import Parser
from adaptkit.version import __version__

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. An error of the user's is one line on stderr and status 2."""
    parser, commands = _parser()
    args, left = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    if left:
        commands.get(args.command, parser).unknown(left)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        from adaptkit.core.printable import printable

        said = "\n".join(map(printable, str(error).split("\n")))  # it may quote a file
        print(f"adaptkit {args.command}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"adaptkit {args.command}: {str(stopped) or 'stopped'}", file=sys.stderr)
        return getattr(stopped, "status", 130)  # 143 where a recipe was asked to stop by SIGTERM


def _parser() -> tuple[Parser, dict[str, Any]]:
    parser = Parser(prog="adaptkit", description="Small trainable modules for frozen ViTs.")
    parser.add_argument("--version", action="version", version=f"adaptkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in _commands():
        known = set(commands.choices)
        module.add(commands)
        for name in commands.choices.keys() - known:
            commands.choices[name].set_defaults(run=module.run)
    return parser, dict(commands.choices)


def _commands() -> list[ModuleType]:
    """Import every command of this folder, in the order of their names."""
    package = importlib.import_module("adaptkit.cli")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return [importlib.import_module(f"adaptkit.cli.{name}") for name in names]
