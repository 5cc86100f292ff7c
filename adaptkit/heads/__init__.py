"""Task heads: each takes :class:`adaptkit.core.view.Features` and returns logits; found by folder."""
