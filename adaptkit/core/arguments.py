"""An argument parser that says what was meant: of a command, an option or a choice that does not exist."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from adaptkit.core.near import hint, nearest

__all__ = ["Defaults", "Parser"]


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that ends with the default of an option, where it has one and does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default == []
        silent = nothing or "default" in (action.help or "").lower()
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` whose errors end with the name that is nearest to the wrong one."""

    _given: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does; what was given is kept for :meth:`error`."""
        self._given = () if args is None else tuple(map(str, args))
        return super().parse_known_args(args, namespace)

    def unknown(self, args: Sequence[str]) -> NoReturn:
        """End because of arguments that nothing takes."""
        self._given = tuple(args)
        self.error(f"unrecognized arguments: {' '.join(args)}")

    def error(self, message: str) -> NoReturn:
        """Print usage and message and leave with status 2.

        An option that does not exist is named whatever the message says: often it is that the right one is missing.
        """
        super().error(message + self._choice(message) + self._options())

    def _choice(self, message: str) -> str:
        found = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        return "" if found is None else hint(found[1], re.findall(r"[\w.-]+", found[2]))

    def _options(self) -> str:
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        flags = [one.partition("=")[0] for one in self._given if one.startswith("--") and one != "--"]
        wrong = [flag for flag in flags if not any(option.startswith(flag) for option in known)]  # no abbreviation
        meant = [(flag, nearest(flag, known)) for flag in dict.fromkeys(wrong)]
        return "".join(f"; {flag}: did you mean {near}?" for flag, near in meant if near)
