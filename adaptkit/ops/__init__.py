"""Tensors in, tensors out: the operators that adapters are made of."""

from adaptkit.ops.ms_deform_attn import ms_deform_attn

__all__ = ["ms_deform_attn"]
