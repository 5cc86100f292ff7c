"""The adapter between two: the ends are the files, bit for bit, and what does not lie on one line is refused."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS
from reference import image, stir

import adaptkit

HEAD = ("linear", {"num_classes": 3})


def saved(folder, *adapters, seed=1, host=None, head=HEAD, **metadata):
    torch.manual_seed(seed)
    backbone = HOSTS["timm-vit"].build() if host is None else host
    model = adaptkit.attach(backbone, *(adapters or ("adapter-plus",)), head=head)
    stir(model, seed).eval().save(folder, **metadata)
    model.detach()
    return folder


@torch.no_grad()
def test_the_ends_are_the_files_and_the_middle_is_their_mean(tmp_path):
    a, b = (saved(tmp_path / n, ("vit-adapter", {"conv_inplane": 8}), seed=i) for i, n in enumerate("ab"))
    files = [adaptkit.load(f) for f in (a, b)]
    for t, file in zip((0, 1), files):
        found = adaptkit.interpolate(a, b, t)
        assert found.tensors.keys() == file.tensors.keys()
        assert all(torch.equal(v, file.tensors[k]) for k, v in found.tensors.items())
    middle = adaptkit.interpolate(*files, 0.25, folder=tmp_path / "c")
    for key, value in middle.tensors.items():
        x, y = (f.tensors[key].double() for f in files)
        expected = torch.maximum(x, y) if key.endswith("num_batches_tracked") else 0.75 * x + 0.25 * y
        torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    x = image(32)
    logits = [adaptkit.attach(HOSTS["timm-vit"].build(), f)(x).logits for f in (middle, tmp_path / "c")]
    assert torch.equal(*logits)


@torch.no_grad()
def test_a_last_layer_alone_is_interpolated_in_its_answers_too(tmp_path):
    torch.manual_seed(0)
    a = saved(tmp_path / "a", "sfp", seed=1)
    model = adaptkit.attach(HOSTS["timm-vit"].build(), a)
    classifier = next(m for m in model.head.modules() if isinstance(m, torch.nn.Conv2d))
    for p in classifier.parameters():
        p.add_(torch.randn_like(p))
    model.save(tmp_path / "b")
    x = image(32)
    one, other, between = (
        adaptkit.attach(HOSTS["timm-vit"].build(), f)(x).logits
        for f in (a, tmp_path / "b", adaptkit.interpolate(a, tmp_path / "b", 0.3))
    )
    torch.testing.assert_close(between, 0.7 * one + 0.3 * other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"adapters": ("vpt",)}, r"a.adapter_model.* has adapter-plus \+ linear, .*b.* has vpt \+ linear"),
        ({"adapters": (("adapter-plus", {"rank": 4}),)}, "rank=8, .* has rank=4"),
        ({"head": ("linear", {"num_classes": 4})}, "num_classes=3, .* has num_classes=4"),
        ({"classes": ["x", "y", "z"]}, r"classes=None, .* has classes=\['x', 'y', 'z'\]"),
        ({"mean": [0.1] * 3, "std": [0.2] * 3}, "mean="),
        ({"backbone": "patch_embed.proj"}, r"been trained on patch_embed of .* on other weights there"),
        ({"backbone": "blocks.0.attn.proj"}, r"been trained on blocks\.0 of .* on other weights there"),
    ],
)
def test_what_does_not_lie_on_one_line_is_refused_with_both_sides(other, message, tmp_path):
    saved(tmp_path / "a")
    host = None
    changed = other.pop("backbone", None)
    if changed:
        host = HOSTS["timm-vit"].build()
        torch.nn.init.normal_(host.get_submodule(changed).weight)
    adapters = other.pop("adapters", ())
    saved(tmp_path / "b", *adapters, host=host, **other)
    with pytest.raises(ValueError, match=message):
        adaptkit.interpolate(tmp_path / "a", tmp_path / "b", 0.5)


def test_t_is_between_the_two_and_a_name_is_no_file(tmp_path):
    a = saved(tmp_path / "a")
    with pytest.raises(ValueError, match=r"t=1\.5 is not between 0"):
        adaptkit.interpolate(a, a, 1.5)
    with pytest.raises(TypeError, match="'vpt' is no saved adapter"):
        adaptkit.interpolate(a, "vpt", 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_of_the_backbone_in_fewer_bits_is_the_same_backbone(dtype, tmp_path):
    a = saved(tmp_path / "a")
    b = saved(tmp_path / "b", seed=2, host=HOSTS["timm-vit"].build().to(dtype))
    assert adaptkit.interpolate(a, b, 0.5).tensors.keys() == adaptkit.load(a).tensors.keys()
    other = HOSTS["timm-vit"].build().to(dtype)
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight.mul_(1.5)
    c = saved(tmp_path / "c", host=other)
    with pytest.raises(ValueError, match="block 1"):
        adaptkit.interpolate(a, c, 0.5)


def test_what_is_no_number_and_no_file_says_what_it_is(tmp_path):
    a = saved(tmp_path / "a")
    with pytest.raises(TypeError, match="t='0.5' is no number"):
        adaptkit.interpolate(a, a, "0.5")
    with pytest.raises(TypeError, match="^a VisionTransformer is no saved adapter"):
        adaptkit.interpolate(HOSTS["timm-vit"].build(), a, 0.5)


def test_folders_of_peft_are_interpolated_in_memory_alone(tmp_path):
    for name in "ab":
        model = adaptkit.attach(HOSTS["timm-vit"].build(), "lora")
        adaptkit.interop.to_peft(model, tmp_path / name)
    assert adaptkit.interpolate(tmp_path / "a", tmp_path / "b", 0.5).tensors
    with pytest.raises(ValueError, match="says nothing of its backbone.*leave folder out"):
        adaptkit.interpolate(tmp_path / "a", tmp_path / "b", 0.5, folder=tmp_path / "c")
    assert not (tmp_path / "c").exists()
