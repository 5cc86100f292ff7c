"""Two processes say what one says: DDP, and FSDP2 with the frozen blocks sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ranks
from families import HOSTS

import adaptkit
from adaptkit.core.layers import SyncBatchNorm2d
from adaptkit.core.registry import view
from adaptkit.model.sharding import blocks_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).parents[1] / "ranks.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
               "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(script), ",".join(ranks.METHODS), str(out)]  # fmt: skip
    root = str(Path(__file__).parents[2])
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("method", ranks.METHODS)
def test_two_ranks_lose_what_one_process_loses_on_the_same_batches(method, runs):
    start = ranks.build(method).adapter_state_dict()
    losses, tensors = ranks.reference(method)
    seen = json.loads((runs / f"{method}.json").read_text())
    assert len(losses) == ranks.STEPS
    assert any(not torch.equal(v, start[k]) for k, v in tensors.items())
    assert seen["ddp"] == pytest.approx(losses, abs=1e-5)
    assert seen["fsdp"] == pytest.approx(losses, abs=1e-5)
    for folder in (f"{method}-ddp-0", f"{method}-ddp-1", f"{method}-fsdp"):
        saved = adaptkit.load(runs / folder).tensors
        assert saved.keys() == tensors.keys()
        for key, tensor in saved.items():
            moved = float((tensors[key] - start[key]).abs().max()) if key in start else 0.0
            torch.testing.assert_close(tensor, tensors[key], atol=max(1e-6, 0.05 * moved), rtol=0)


@pytest.mark.parametrize("method", ranks.METHODS)
def test_a_sharded_model_holds_its_half_of_the_frozen_weights_and_saves_the_adapter_alone(method, runs):
    seen = json.loads((runs / f"{method}.json").read_text())
    assert seen["share"] == pytest.approx(0.5, abs=0.05)
    file = adaptkit.load(runs / f"{method}-fsdp")
    assert not any(key.startswith("backbone") for key in file.tensors)
    again = adaptkit.attach(HOSTS["timm-vit"].build(), file, head=ranks.Head())
    assert again(torch.zeros(1, 3, 64, 64)).logits.isfinite().all()


@pytest.mark.parametrize("name", sorted(HOSTS))
def test_the_blocks_of_every_host_are_found(name):
    vit = view(HOSTS[name].build())
    blocks = blocks_of(vit.backbone, len(vit.spec.widths))
    assert len({id(b) for b in blocks}) == len(vit.spec.widths)
    inside = sum(p.numel() for b in blocks for p in b.parameters())
    assert inside > 0.5 * sum(p.numel() for p in vit.backbone.parameters())


def test_sharding_without_processes_says_how_to_start_them():
    with pytest.raises(RuntimeError, match=r"needs a process group: start with torchrun"):
        adaptkit.shard(adaptkit.attach(HOSTS["timm-vit"].build(), "sfp"))


def test_a_single_process_has_plain_batch_norm():
    x = torch.randn(3, 4, 5, 5)
    ours, plain = SyncBatchNorm2d(4).train(), torch.nn.BatchNorm2d(4).train()
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.running_var, plain.running_var)
