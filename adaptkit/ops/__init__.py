"""Tensors in, tensors out: the operators that adapters are made of."""

from adaptkit.ops.ms_deform_attn import ms_deform_attn, set_backend, use_backend

__all__ = ["ms_deform_attn", "set_backend", "use_backend"]
