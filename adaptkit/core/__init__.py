"""What everything else is written in: the view of a backbone, the seam, the registry, the owner's proxies."""
