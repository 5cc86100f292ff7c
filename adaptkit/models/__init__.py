"""Backbones that timm does not have. Importing this package registers them: ``timm.create_model("dat_tiny")``."""
