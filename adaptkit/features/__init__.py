"""Features of a frozen backbone, computed once: recorded, replayed, kept on disk."""

from adaptkit.features.cache import FeatureCache
from adaptkit.features.recorded import Recorded

__all__ = ["FeatureCache", "Recorded"]
