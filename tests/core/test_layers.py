"""Small layers do what their name says."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptkit.core.layers import DropPath, LayerNorm2d, SyncBatchNorm2d, norm2d


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


def test_over_several_gpus_batch_norm_is_that_of_torch(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("adaptkit.core.layers._TorchSyncBatchNorm.apply", lambda *args: calls.append(args) or args[0])
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
