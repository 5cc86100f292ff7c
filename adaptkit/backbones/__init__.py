"""How each host is seen: one family per file, found by folder."""
