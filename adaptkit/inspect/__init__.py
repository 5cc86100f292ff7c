"""Pictures of what a model does with an image."""

from adaptkit.inspect.kept import kept_patches, usage_by_depth

__all__ = ["kept_patches", "usage_by_depth"]
