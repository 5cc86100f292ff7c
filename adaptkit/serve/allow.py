"""From where files may be mounted while the server runs: from nowhere, unless told so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptkit.hub.card import is_hub_id
from adaptkit.serve.limits import Refused

__all__ = ["Allowed"]

ANYWHERE = "anywhere"


class Allowed:
    """Places that files may be mounted from.

    Args:
        places: ``"anywhere"``, a folder, ``"hub"`` for every repository of the Hub, or ``"hub:org"``. Empty: nothing is
            mounted or unmounted on request.
    """

    def __init__(self, places: Sequence[str] = ()) -> None:
        for place in places:
            if "=" in place:
                raise ValueError(f"--allow-mount {place}: that is a task; put it first, or write --allow-mount=PLACE")
            if place not in (ANYWHERE, "hub") and not place.startswith("hub:") and not _resolved(place).is_dir():
                raise ValueError(f"--allow-mount {place}: no such folder; give a folder, hub, hub:org or {ANYWHERE}")
        self.places = tuple(places)

    def check(self, file: str | None = None) -> None:
        """Raise :class:`Refused` (403) where nothing may be mounted, or not this file."""
        if not self.places:
            raise Refused(403, "this server mounts and unmounts nothing on request: start it with --allow-mount PLACE")
        if file is None or any(self._holds(place, file) for place in self.places):
            return
        raise Refused(
            403, f"{file[:200]!r} is in none of the places that may be mounted from: {', '.join(self.places)}"
        )

    @staticmethod
    def _holds(place: str, file: str) -> bool:
        if place == ANYWHERE:
            return True
        if place == "hub" or place.startswith("hub:"):
            return is_hub_id(file) and place in ("hub", f"hub:{file.partition('/')[0]}")
        return not is_hub_id(file) and _resolved(file).is_relative_to(_resolved(place))


def _resolved(path: str) -> Path:
    """As it is opened: ``~`` is the home folder, links are followed."""
    return Path(path).expanduser().resolve()
