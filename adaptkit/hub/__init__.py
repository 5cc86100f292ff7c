"""The adapter file, and repositories of such files: :func:`load` reads one, :func:`push` publishes one."""

from adaptkit.hub.repository import Commit, is_hub_id, load, push

__all__ = ["Commit", "is_hub_id", "load", "push"]
