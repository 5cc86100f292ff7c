"""Task heads: each takes :class:`adaptkit.vit.Features` and returns logits; found by folder."""
