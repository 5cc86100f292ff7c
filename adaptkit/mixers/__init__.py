"""Token mixers: the part of a MetaFormer block that moves information between positions.

A mixer is a module built as ``Mixer(dim, **options)`` that maps (B, C, H, W) to (B, C, H, W). It has no gate: the
zero that keeps a frozen host unchanged belongs to the adapter that holds the mixer.
"""
