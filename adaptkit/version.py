"""The one place the version is written, and the name to install by."""

__version__ = "0.1.0"

#: What pip installs. On the package index ``adaptkit`` is another project's.
DISTRIBUTION = "adaptkit-vit"
