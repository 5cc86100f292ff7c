"""Readable training scripts, one per task; run them from the project folder: `python -m recipes.segment --help`."""
