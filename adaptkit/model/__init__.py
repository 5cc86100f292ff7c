"""``attach`` and what it returns: a frozen backbone with adapters, sets of them, many tasks, a pyramid, shards."""

from adaptkit.model.adapted import AdaptedModel, attach, list_adapters, list_heads

__all__ = ["AdaptedModel", "attach", "list_adapters", "list_heads"]
