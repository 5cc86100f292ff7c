"""Adapters: one method per file, found by folder. The two kinds that exist are in :mod:`adaptkit.adapters.base`."""
