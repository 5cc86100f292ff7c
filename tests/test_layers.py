"""Small layers do what their name says."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptkit.layers import DropPath, LayerNorm2d, SyncBatchNorm2d, conv_norm, norm2d, norm_map


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2)
    dropped = DropPath(0.25).train()(x)
    per_sample = dropped.flatten(1)
    assert ((per_sample == 0).all(1) | (per_sample == per_sample[:, :1]).all(1)).all()
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)
    assert DropPath(0.25).eval()(x) is x


def test_layer_norm_2d_is_layer_norm_over_channels():
    x = torch.randn(2, 6, 3, 4)
    norm = LayerNorm2d(6)
    torch.nn.init.normal_(norm.weight)
    expected = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), norm.weight, norm.bias, norm.eps)
    assert torch.equal(norm(x), expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("kind", ["batch", "sync", "group", "layer"])
@pytest.mark.parametrize("channels", [1, 30, 64])
def test_every_norm_takes_every_width(kind, channels):
    x = torch.randn(3, channels, 4, 5)
    assert norm2d(kind, channels)(x).shape == x.shape


def test_sync_norm_on_the_cpu_is_batch_norm_in_training_and_after():
    torch.manual_seed(0)
    sync, batch = norm2d("sync", 5), norm2d("batch", 5)
    for _ in range(3):
        x = torch.randn(4, 5, 2, 2)
        assert torch.equal(sync.train()(x), batch.train()(x))
    assert torch.equal(sync.eval()(x), batch.eval()(x))
    assert sync.state_dict().keys() == batch.state_dict().keys()
    assert all(torch.equal(v, batch.state_dict()[k]) for k, v in sync.state_dict().items())


@pytest.mark.parametrize("kind", ["batch", "sync", "group", "layer"])
def test_a_norm_that_rests_may_work_in_place_and_says_the_same(kind):
    torch.manual_seed(0)
    norm = norm2d(kind, 6).train()
    norm(torch.randn(4, 6, 5, 5))
    torch.nn.init.normal_(norm.weight)
    norm.eval()
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    expected, kept = norm(x), norm_map(norm, x, keep=True)
    torch.testing.assert_close(kept, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, norm.weight]) for y in (kept, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        mine = x.detach().clone()
        out = norm_map(norm, mine, keep=False)
    assert torch.equal(out, kept)
    assert (out.data_ptr() == mine.data_ptr()) == (kind in ("batch", "sync"))


@pytest.mark.parametrize("kind", ["batch", "sync", "group", "layer"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_that_rests_is_part_of_the_convolution_before_it(kind, bias):
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 6, 3, 2, 1, bias=bias).double(), norm2d(kind, 6).double().train()
    x = torch.randn(4, 3, 9, 8).double()
    assert torch.equal(conv_norm(conv, norm, x), norm(conv(x)))
    torch.nn.init.normal_(norm.weight)
    norm.eval()
    x.requires_grad_()
    inputs = [x, conv.weight, norm.weight, norm.bias]
    mine, expected = conv_norm(conv, norm, x), norm(conv(x))
    torch.testing.assert_close(mine, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (mine, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_in_training_sees_its_batch():
    norm, x = norm2d("batch", 3).train(), torch.randn(2, 3, 4, 4)
    assert torch.equal(norm_map(norm, x.clone(), keep=False), norm2d("batch", 3).train()(x))
    assert norm.num_batches_tracked == 1


def test_over_several_gpus_batch_norm_is_that_of_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("adaptkit.layers._TorchSyncBatchNorm.apply", lambda *args: calls.append(args) or args[0])
    with FakeTensorMode(), torch.device("cuda"):
        x, norm = torch.empty(2, 4, 3, 3), SyncBatchNorm2d(4).train()
        norm(x)
        norm.eval()(x)
    ((given, *parameters, eps, share, _, world),) = calls
    assert given is x
    assert parameters[0] is norm.weight
    assert parameters[1] is norm.bias
    assert parameters[2] is norm.running_mean
    assert parameters[3] is norm.running_var
    assert (eps, share, world) == (norm.eps, norm.momentum, 2)
