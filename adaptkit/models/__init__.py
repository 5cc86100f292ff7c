"""Backbones that timm does not have. Importing this package registers them: ``timm.create_model("dat_tiny")``."""

from adaptkit.models.dat import DAT

__all__ = ["DAT"]
