"""Pictures of what a model does with an image."""

from adaptkit.analysis import accounting
from adaptkit.analysis.kept import kept_patches, usage_by_depth
from adaptkit.analysis.points import attended_keys, deformed_points

__all__ = ["accounting", "attended_keys", "deformed_points", "kept_patches", "usage_by_depth"]
