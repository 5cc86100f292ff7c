"""A lock for processes that fork while their threads compute."""

from __future__ import annotations

import os
import sys
import threading

__all__ = ["Lock"]


class Lock:
    """A lock that is open in the child of a fork: the thread that may have held it does not exist there.

    What it guards must be whole between any two statements, for the child sees it as it was at the fork.
    """

    def __init__(self) -> None:
        self._open()
        if sys.platform != "win32":  # where nothing forks
            os.register_at_fork(after_in_child=self._open)

    def _open(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
