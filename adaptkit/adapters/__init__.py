"""Adapters: one method per file, found by folder. The three kinds are in :mod:`adaptkit.adapters.base`."""
