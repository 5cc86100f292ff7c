"""The cache of features: whole shards, one key, and what was recorded runs as the backbone would."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS

import adaptkit
from adaptkit.features.cache import FeatureCache, checksum

x = torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(0))
READERS = {
    "head": [],
    "sfp": ["sfp"],
    "extractor": [("vit-adapter", {"conv_inplane": 8, "injector": False})],
    "tap-norm": [("vit-adapter", {"conv_inplane": 8, "injector": False, "tap_norm": True, "interaction_indexes": [[0, 1], [2, 3]]})],
}  # fmt: skip


def sample(i):
    return {"a": torch.full((2, 3), float(i)), "target": torch.tensor(i)}


def test_samples_come_back_as_they_were_also_in_another_process(tmp_path):
    cache = FeatureCache(tmp_path, 5, {"backbone": "b"}, shard=2)
    assert cache.missing() == [0, 1, 2]
    for number, wanted in enumerate(cache.shards()):
        cache.write(number, [sample(i) for i in wanted])
    again = FeatureCache(tmp_path, 5, {"backbone": "b"}, shard=2)
    assert again.missing() == []
    assert torch.equal(again[4]["a"], sample(4)["a"])
    moved = pickle.loads(pickle.dumps(again))
    assert all(torch.equal(moved[i]["target"], torch.tensor(i)) for i in range(5))
    assert again.bytes() > 0


def test_a_cache_of_something_else_and_a_missing_shard_are_errors(tmp_path):
    cache = FeatureCache(tmp_path, 5, {"backbone": "b"}, shard=2)
    with pytest.raises(IndexError, match="sample 3 is not in .*3 shards are missing"):
        cache[3]
    with pytest.raises(ValueError, match="shard 2 has 1 samples, 2 were given"):
        cache.write(2, [sample(0), sample(1)])
    with pytest.raises(ValueError, match="were made with backbone='b', now it is backbone='c': choose another folder"):
        FeatureCache(tmp_path, 5, {"backbone": "c"}, shard=2)
    with pytest.raises(ValueError, match="were made with an earlier version, which did not record data: choose"):
        FeatureCache(tmp_path, 5, {"backbone": "b", "data": "d"}, shard=2)


def test_what_was_kept_of_a_shard_is_found_again_and_goes_when_it_is_whole(tmp_path):
    cache = FeatureCache(tmp_path / "cut", 9, {"backbone": "b"}, shard=6)
    assert cache.begun(0) == []
    cache.keep(0, 0, [sample(i) for i in range(2)])
    cache.keep(0, 2, [sample(2)])
    cache.keep(0, 4, [sample(4)])  # behind a gap
    again = FeatureCache(tmp_path / "cut", 9, {"backbone": "b"}, shard=6)
    found = again.begun(0)
    assert [int(s["target"]) for s in found] == [0, 1, 2]
    assert again.missing() == [0, 1]
    assert again.bytes() == 0
    again.write(0, [*found, *(sample(i) for i in range(3, 6))])
    again.keep(1, 0, [sample(i) for i in range(6, 9)])  # completes the shard, which is about to be written
    again.write(1, [sample(i) for i in range(6, 9)])
    whole = FeatureCache(tmp_path / "whole", 9, {"backbone": "b"}, shard=6)
    for number, wanted in enumerate(whole.shards()):
        whole.write(number, [sample(i) for i in wanted])
    files = [{f.name: f.read_bytes() for f in (tmp_path / run).iterdir()} for run in ("cut", "whole")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_parts_that_a_kill_left_beside_their_whole_shard_go_when_the_folder_is_opened(tmp_path):
    cache = FeatureCache(tmp_path, 4, {}, shard=2)
    cache.write(0, [sample(0), sample(1)])
    cache.keep(0, 0, [sample(0)])
    cache.keep(1, 0, [sample(2)])
    FeatureCache(tmp_path, 4, {}, shard=2)
    assert [f.name for f in tmp_path.glob("*.part")] == ["features-00001-00000.part"]


def test_samples_of_two_integer_types_become_one_shard_of_the_wider(tmp_path):
    cache = FeatureCache(tmp_path, 2, {}, shard=2)
    cache.keep(0, 0, [{"target": torch.tensor([1, 2], dtype=torch.uint8)}])
    cache.write(0, [*cache.begun(0), {"target": torch.tensor([300, -1])}])
    assert cache[0]["target"].tolist() == [1, 2]
    assert cache[1]["target"].tolist() == [300, -1]


def test_the_checksum_sees_every_weight():
    host = HOSTS["timm-vit"].build()
    before = checksum(host)
    assert before == checksum(HOSTS["timm-vit"].build())
    with torch.no_grad():
        host.blocks[2].mlp.fc1.weight[3, 4] += 1e-6
    assert checksum(host) != before


@torch.no_grad()
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov3", "timm-beit", "timm-siglip", "hf-dinov2-reg"])
def test_what_was_recorded_gives_what_the_images_give_bitwise(name, reader):
    model = adaptkit.attach(HOSTS[name].build(), *READERS[reader], head=("linear", {"num_classes": 3})).eval()
    expected, recorded = model(x), model.extract(x)
    runs = []
    for module in model.backbone.modules():
        if "attn" in type(module).__name__.lower():
            module.register_forward_pre_hook(lambda *_: runs.append(0))
    features = model(recorded)
    assert not runs
    assert features.size == expected.size
    assert features.grid == expected.grid
    pairs = [(features.logits, expected.logits), (features.prefix, expected.prefix), *zip(features.maps, expected.maps)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (recorded.image is not None) == (reader in ("extractor", "tap-norm"))
    assert len(recorded.states) == {"head": 1, "sfp": 1, "extractor": 4, "tap-norm": 2}[reader]


@pytest.mark.parametrize("adapters", [["lora"], ["metaformer"], [("vit-adapter", {"conv_inplane": 8})]])
def test_what_changes_the_blocks_cannot_be_recorded(adapters):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), *adapters)
    with pytest.raises(ValueError, match="these adapters cannot run on cached features: .*(blocks|tokens)"):
        model.extract(x)
