"""What a model does with an image: MACs per image, and the papers' pictures of what it keeps and where it looks."""

from adaptkit.analysis import accounting
from adaptkit.analysis.kept import kept_patches, usage_by_depth
from adaptkit.analysis.points import attended_keys, deformed_points, sampling_points

__all__ = ["accounting", "attended_keys", "deformed_points", "kept_patches", "sampling_points", "usage_by_depth"]
