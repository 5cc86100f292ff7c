"""Attention whose gradient is the C kernel's: torch's forward to the bit, the gradient of the formula."""

import logging
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to

from adaptkit._cpu import attention as ops
from adaptkit._cpu.frozen import _FrozenBlock as FrozenBlock
from adaptkit.ops import build


def runs_here():
    q = torch.randn(1, 1, 4, 8)
    return ops.is_supported(q, q, q)


needs_kernel = pytest.mark.skipif(not runs_here(), reason="no C compiler, no AVX, or not Linux")


def heads(batch, tokens, number, dim, seed=0, keys=None):
    """q, k and v, as views of one tensor like a ViT's where they are equally many."""
    generator = torch.Generator().manual_seed(seed)
    if keys is None:
        qkv = torch.randn(batch, tokens, 3, number, dim, generator=generator)
        return [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]
    sizes = (tokens, keys, keys)
    return [torch.randn(batch, number, n, dim, generator=generator).requires_grad_() for n in sizes]


def exact(q, k, v, grad, scale):
    """Gradients of the formula in float64."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out = (q @ k.mT * scale).softmax(-1) @ v
    return torch.autograd.grad(out, (q, k, v), grad.double())


@torch.no_grad()
def magnitudes(q, k, v, grad, scale):
    """Of what is rounded on the way to each gradient: terms of random signs add up like the root of their squares."""
    q, k, v, grad = (x.double() for x in (q, k, v, grad))
    logits = q @ k.mT * scale
    p = logits.softmax(-1) * (1 + logits.abs().amax(-1, keepdim=True))  # exp turns what a logit is off into a share
    out = logits.softmax(-1) @ v
    ds = scale * p * ((grad**2 @ (v**2).mT) + (grad**2 * out**2).sum(-1, keepdim=True)).sqrt()
    squares = (ds**2 @ k**2, (ds**2).mT @ q**2, (p**2).mT @ grad**2)
    return [x.sqrt() for x in squares]


def assert_formula(q, k, v, scale):
    """The gradients that the kernel gives are those of the formula, but for rounding."""
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(ops.attention(q, k, v, scale), (q, k, v), grad)
    dim, keys, queries = q.shape[3], k.shape[2], q.shape[2]
    sizes = zip(
        found, exact(q, k, v, grad, scale), magnitudes(q, k, v, grad, scale), (keys, queries, queries), strict=True
    )
    for a, b, magnitude, terms in sizes:  # a product of rows of length dim, then a sum over keys or queries
        assert_rounds_to(a, b, dim, terms, magnitude=magnitude)


@needs_kernel
@pytest.mark.parametrize(
    ("batch", "tokens", "number", "dim", "keys"),
    [
        (2, 197, 3, 64, None),
        (1, 50, 2, 32, None),
        (3, 7, 1, 20, None),
        (1, 97, 2, 80, 66),
        (2, 3, 2, 128, 65),
        (1, 96, 1, 5, 1),
        (2, 1, 2, 16, 200),
    ],
)
def test_it_is_the_formula(batch, tokens, number, dim, keys):
    q, k, v = heads(batch, tokens, number, dim, keys=keys)
    assert ops.is_supported(q, k, v)
    for scale in (None, 0.3):
        assert torch.equal(ops.attention(q, k, v, scale), F.scaled_dot_product_attention(q, k, v, scale=scale))
        assert_formula(q, k, v, dim**-0.5 if scale is None else scale)


@needs_kernel
def test_sharp_and_flat_rows():
    q, k, v = heads(1, 40, 1, 16)
    for factor in (0.0, 30.0):
        assert_formula((q.detach() * factor).requires_grad_(), k, v, 0.25)


@needs_kernel
def test_any_strides_of_the_gradient():
    q, k, v = heads(2, 9, 2, 16)
    dense = torch.randn(2, 2, 9, 16)
    for grad in (dense.mT.contiguous().mT, dense.transpose(1, 2).contiguous().transpose(1, 2), dense[:1, :, :1]):
        grad = grad.expand(2, 2, 9, 16)
        found = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), grad)
        plain = torch.autograd.grad(ops.attention(q, k, v), (q, k, v), grad.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


@needs_kernel
def test_second_derivatives_are_those_of_the_formula():
    results = []
    for dtype, run in (
        (torch.float32, lambda q, k, v: ops.attention(q, k, v, 0.5)),
        (torch.float64, lambda q, k, v: (0.5 * q @ k.mT).softmax(-1) @ v),
    ):
        leaves = [x.detach().to(dtype).requires_grad_() for x in heads(1, 9, 2, 16)]
        first = torch.autograd.grad(run(*leaves).sin().sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.square().sum() for g in first), leaves)])
    assert_rounds_to(*results, *2 * (16, 9, 9, 16))


@needs_kernel
def test_the_same_bits_with_any_number_of_threads():
    q, k, v = heads(2, 70, 3, 32)
    grad, before, found = torch.randn(2, 3, 70, 32), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(torch.autograd.grad(ops.attention(q, k, v), (q, k, v), grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_what_is_not_a_number_stays_visible():
    q, k, v = heads(1, 70, 1, 16)
    with torch.no_grad():
        q[0, 0, 3, 2] = float("nan")
    found = torch.autograd.grad(ops.attention(q, k, v).sum(), (q, k, v))
    assert all(x.isnan().any() for x in found)


@needs_kernel
def test_it_suits_what_torch_gives_to_its_flash_attention():
    q, k, v = heads(1, 8, 2, 16)
    assert ops.is_supported(q, k, v)
    assert not ops.is_supported(q.double(), k.double(), v.double())
    assert not ops.is_supported(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert not ops.is_supported(q[0], k[0], v[0])
    assert not ops.is_supported(q, k, v[..., :8])
    assert not ops.is_supported(q, k[:, :1], v[:, :1])
    assert not ops.is_supported(q.mT.contiguous().mT, k, v)
    assert not ops.is_supported(*(x[:, :, :0] for x in (q, k, v)))
    assert not ops.is_supported(*(x.to("meta") for x in (q, k, v)))
    with sdpa_kernel(SDPBackend.MATH):
        assert not ops.is_supported(q, k, v)


@pytest.fixture
def taken(monkeypatch):
    seen, there = [], ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: seen.append(args[-1]) or there(*args))
    return seen


@needs_kernel
def test_a_frozen_block_takes_it_for_plain_attention_alone(taken):
    q, k, v = heads(1, 8, 2, 16)
    mask = torch.ones(8, 8, dtype=torch.bool)
    with FrozenBlock():
        plain = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=0.5)
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        F.scaled_dot_product_attention(q, k, v, None, 0.0)
        F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        F.scaled_dot_product_attention(*(x.detach() for x in (q, k, v)))
    assert taken == [0.5]
    assert torch.equal(plain, F.scaled_dot_product_attention(q, k, v, scale=0.5))


@needs_kernel
def test_within_a_transform_torch_s_own_gradient_is_taken(taken):
    q, k, v = (x.detach() for x in heads(1, 8, 2, 16))

    def loss(q: Tensor) -> Tensor:
        with FrozenBlock():
            return F.scaled_dot_product_attention(q, k, v).square().sum()

    found = torch.func.grad(loss)(q)
    assert taken == []
    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    assert taken == [None]
    torch.testing.assert_close(found, leaf.grad)


@pytest.fixture
def built_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_reasons", [])
    ops._library.cache_clear()
    yield tmp_path
    ops._library.cache_clear()


@needs_kernel
def test_the_first_call_may_come_from_inside_a_checkpoint(built_anew):
    q, k, v = heads(1, 8, 2, 16)

    def block(q: Tensor) -> Tensor:
        with FrozenBlock():
            return F.scaled_dot_product_attention(q, k, v)

    checkpoint(block, q, use_reentrant=False).sum().backward()
    assert ops._library.cache_info().currsize == 1
    found = q.grad.clone()
    q.grad = None
    F.scaled_dot_product_attention(q, k, v).sum().backward()
    torch.testing.assert_close(found, q.grad)


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_its_test_gives_the_kernel_the_numbers_that_it_reads_whatever_the_default_dtype(dtype, monkeypatch):
    given = []
    monkeypatch.setattr(ops, "_gradients", lambda library, *tensors: given.extend(tensors[:-1]) or tensors[1:4])
    torch.set_default_dtype(dtype)
    try:
        ops._self_test(ops._library())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in given} == {torch.float32}


def test_without_a_compiler_torch_s_own_gradient_is_taken(built_anew, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert not runs_here()
        assert not runs_here()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "slower: no C compiler" in caplog.text
    q, k, v = heads(1, 8, 2, 16)
    with FrozenBlock():
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert q.grad is not None


@needs_kernel
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (" - delta[i])", ")"),
        (" - lse[i]", ""),
        ("0.5f, 1, 1}", "0.5001f, 1, 1}"),
        ("s->ds, 1, TILE_K, q", "s->p, 1, TILE_K, q"),
    ],
)
def test_a_kernel_that_computes_something_else_is_not_used(right, wrong, built_anew, monkeypatch, caplog):
    text = ops.SOURCE.read_text()
    assert right in text
    source = built_anew / "kernel.c"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setattr(ops, "SOURCE", source)
    assert not runs_here()
    assert "self-test" in caplog.text
