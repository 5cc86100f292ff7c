"""Two libraries resample positions by two rules; the file says which, and the view can follow either."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from families import HOSTS, randomise
from test_families import DINO, HF, image, rename, timm_vit

import adaptkit
from adaptkit.cli import main
from adaptkit.core.registry import view
from adaptkit.networks import network
from adaptkit.serve.mounts import Mounts

transformers = pytest.importorskip("transformers")
OTHER = (24, 40)


def pair():
    """The same weights in timm and in transformers."""
    theirs = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**HF, mlp_ratio=2, layerscale_value=0.5)))
    ours, state = timm_vit(init_values=0.5), rename(theirs.state_dict(), DINO)
    state.pop("embeddings.mask_token")
    ours.load_state_dict(state)
    return ours, theirs


def tokens(host, rule=None, size=OTHER):
    seen = view(host)
    if rule is not None:
        seen.follow(rule)
    return seen.features(image(*size)).tokens


@torch.no_grad()
def test_each_library_follows_the_rule_of_the_other():
    ours, theirs = pair()
    assert (tokens(ours) - tokens(theirs)).abs().max() > 1e-3
    torch.testing.assert_close(tokens(ours, "bicubic"), tokens(theirs), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens(theirs, "bicubic antialias"), tokens(ours), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["timm-vit", "hf-vit", "hf-deit", "hf-clip", "hf-siglip", "hf-dinov2", "hf-dinov2-reg"]
)
@torch.no_grad()
def test_the_rule_changes_other_sizes_and_not_the_backbones_own(name):
    host = HOSTS[name].build()
    rules = view(host).position_rules
    patch, side = view(host).spec.patch_size, HOSTS[name].size
    assert set(rules) == {"bicubic", "bicubic antialias"}
    first, second = (tokens(host, rule, (3 * patch, 5 * patch)) for rule in rules)
    assert not torch.equal(first, second)
    own = view(host).positions
    assert torch.equal(tokens(host, own, (3 * patch, 5 * patch)), tokens(host, None, (3 * patch, 5 * patch)))
    assert all(torch.equal(tokens(host, rule, (side, side)), tokens(host, None, (side, side))) for rule in rules)


def test_a_rule_that_the_family_does_not_know_is_an_error():
    with pytest.raises(ValueError, match=r"positions='nearest': .*'bicubic antialias' or 'bicubic'"):
        adaptkit.attach(HOSTS["timm-vit"].build(), "sfp", positions="nearest")


@torch.no_grad()
def test_a_file_of_the_other_rule_warns_and_says_how_to_follow_it(tmp_path):
    ours, theirs = pair()
    model = adaptkit.attach(theirs, "sfp").eval()
    expected = model(image(*OTHER)).maps
    model.save(tmp_path)
    with pytest.warns(UserWarning, match=r"attach\(\.\.\., positions='bicubic'\)"):
        adaptkit.attach(ours, str(tmp_path)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adaptkit.attach(ours, str(tmp_path), positions="bicubic")
    for a, b in zip(again(image(*OTHER)).maps, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_from_pretrained_follows_the_rule_of_the_file(tmp_path):
    ours, theirs = pair()
    model = adaptkit.attach(theirs, "sfp").eval()
    expected = model(image(*OTHER)).maps
    model.save(tmp_path)
    with pytest.warns(UserWarning, match=r"positions='bicubic'"):
        other = adaptkit.from_pretrained(tmp_path, backbone=ours)
    assert (other(image(*OTHER)).maps[0] - expected[0]).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adaptkit.from_pretrained(tmp_path, backbone=other.detach(), positions="bicubic")
    for a, b in zip(again(image(*OTHER)).maps, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="positions='nearest'"):
        adaptkit.from_pretrained(tmp_path, backbone=again.detach(), positions="nearest")


@torch.no_grad()
def test_commands_follow_the_rule_of_the_file(tmp_path, monkeypatch):
    ours, theirs = pair()
    model = adaptkit.attach(theirs, head=("linear", {"num_classes": 3})).eval()
    expected = model(image(*OTHER).expand(2, -1, -1, -1)).logits
    model.save(tmp_path / "a")
    monkeypatch.setattr("adaptkit.pretrained.create_backbone", lambda name: copy.deepcopy(ours))  # it has no name
    command = ["export", str(tmp_path / "a"), "--backbone", "ours", "--size", *map(str, OTHER), "--fixed-batch"]
    off = {}
    for name, more in (("own", []), ("file", ["--positions", "bicubic"])):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert main([*command, "--out", str(tmp_path / f"{name}.pt2"), "--outputs", "logits", *more]) == 0
        assert any("--positions 'bicubic'" in str(one.message) for one in seen) == (not more)
        found = torch.export.load(tmp_path / f"{name}.pt2").module()(image(*OTHER).expand(2, -1, -1, -1))
        off[name] = (found[0] - expected).abs().max().item()
    assert off["file"] < 1e-4 < 1e-3 < off["own"]


def test_what_is_served_follows_the_rule_that_is_asked_for(tmp_path):
    ours, theirs = pair()
    adaptkit.attach(theirs, head=("linear", {"num_classes": 3})).save(tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mounts = Mounts(ours, positions="bicubic")
        mounts.mount("seg", str(tmp_path))
    assert mounts.passes.vit.positions == "bicubic"


def test_from_pretrained_follows_it_in_a_network_too(tmp_path):
    ours, theirs = pair()
    recipe = {"network": "fcos", "categories": [{"id": 1}], "width": 64, "size": [32, 64], "anchor": 4.0}
    normalised = {"mean": [0.5] * 3, "std": [0.5] * 3}
    network.build(adaptkit.attach(theirs, "sfp"), {**recipe, **normalised}).save(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = adaptkit.from_pretrained(tmp_path, backbone=ours, positions="bicubic")
    assert again.vit.positions == "bicubic"


@torch.no_grad()
def test_many_tasks_follow_one_rule(tmp_path):
    ours, theirs = pair()
    expected = {}
    for name, head in (("sfp", "fpn"), ("adapter-plus", "linear")):
        model = adaptkit.attach(theirs, name, head=(head, {"num_classes": 3})).eval()
        expected[name] = model(image(*OTHER)).logits
        model.save(tmp_path / name)
        model.detach()
    tasks = {name: tmp_path / name for name in expected}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="task 'adapter-plus' has a pass of its own")
        many = adaptkit.attach_many(ours, tasks, positions="bicubic")
    found = many(image(*OTHER))
    for name in tasks:
        torch.testing.assert_close(found[name].logits, expected[name], atol=1e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match=r"positions='bicubic'"):
        other = adaptkit.attach_many(many.detach(), tasks)
    assert (other(image(*OTHER))["sfp"].logits - expected["sfp"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="positions='nearest'"):
        adaptkit.attach_many(other.detach(), tasks, positions="nearest")
