"""Features of a frozen backbone, computed once: extracted, replayed, kept on disk."""

from adaptkit.features.cache import FeatureCache
from adaptkit.features.cached import CachedFeatures

__all__ = ["CachedFeatures", "FeatureCache"]
