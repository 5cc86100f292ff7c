"""How each backbone is seen: one family per file, found by folder."""
