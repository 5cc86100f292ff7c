"""Official checkpoints: parity with the authors' networks, and what is asked for by name."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer

from adaptkit.interop import from_official

SHARED = Path(os.environ.get("ADAPTKIT_SHARED", Path(__file__).parents[3] / "shared"))
GOLDEN = SHARED / "golden" / "vit_adapter_a.safetensors"
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_file(), reason=f"no reference vectors at {GOLDEN} (set ADAPTKIT_SHARED)"
)


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        config = json.loads(f.metadata()["config"])
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    return config, tensors


def official(tensors):
    return {k.removeprefix("official."): v for k, v in tensors.items() if k.startswith("official.")}


def host(config, **options):
    return VisionTransformer(
        img_size=tuple(config["hw"]),
        embed_dim=config["dim"],
        depth=config["depth"],
        num_heads=config["heads"],
        class_token=False,
        global_pool="avg",
        fc_norm=False,
        init_values=1.0,
        num_classes=0,
        **options,
    )


@needs_golden
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
def test_vit_adapter_matches_the_authors_outputs_and_gradients(golden, dtype, tolerance):
    config, tensors = golden
    model = from_official("vit-adapter", official(tensors), host(config), load_backbone=True, add_vit_feature="last")
    model = model.to(dtype)
    maps = model(tensors["input"].to(dtype)).maps
    for i, m in enumerate(maps):
        torch.testing.assert_close(m, tensors[f"output.{i}"].to(dtype), rtol=tolerance, atol=tolerance)
    sum((m * torch.linspace(-1, 1, m.numel(), dtype=dtype).view_as(m)).sum() for m in maps).backward()
    adapter = model.adapters["vit-adapter"]
    cells = sum(m[0, 0].numel() for m in maps)
    sums = transformer(2 * config["depth"], config["dim"], maps[2][0, 0].numel())  # there and back
    names = [k for k in tensors if k.startswith("grad.")]
    assert names
    for key in names:
        own = key.removeprefix("grad.").replace(".dwconv.dwconv.", ".dwconv.")
        # The vectors are of float32; a gradient adds up the cells of all maps.
        assert_rounds_to(adapter.get_parameter(own).grad, tensors[key], *sums, cells)


@needs_golden
def test_the_backbone_prefix_and_a_whole_checkpoint_are_understood(golden):
    config, tensors = golden
    plain = official(tensors)
    wrapped = {
        "state_dict": {**{f"backbone.{k}": v for k, v in plain.items()}, "decode_head.conv.weight": torch.ones(1)}
    }
    image = tensors["input"]
    outputs = [
        from_official("vit-adapter", sd, host(config), load_backbone=True, add_vit_feature="last")(image).maps[0]
        for sd in (plain, wrapped)
    ]
    assert torch.equal(*outputs)


@needs_golden
def test_what_the_tensors_do_not_tell_is_asked_for_by_name(golden):
    config, tensors = golden
    with pytest.raises(ValueError, match="pass add_vit_feature="):
        from_official("vit-adapter", official(tensors), host(config))
    six = host({**config, "depth": 6})
    with pytest.raises(ValueError, match="pass interaction_indexes="):
        from_official("vit-adapter", official(tensors), six, add_vit_feature="last")


@needs_golden
def test_an_option_that_contradicts_the_tensors_is_refused(golden):
    config, tensors = golden
    with pytest.raises(ValueError, match="extra_extractors=0, but the checkpoint's tensors say 2"):
        from_official("vit-adapter", official(tensors), host(config), add_vit_feature="last", extra_extractors=0)


@needs_golden
def test_another_width_and_a_foreign_state_dict_are_refused(golden):
    config, tensors = golden
    with pytest.raises(ValueError, match="checkpoint has dim=48, the backbone dim=96"):
        from_official("vit-adapter", official(tensors), host({**config, "dim": 96}), add_vit_feature="last")
    with pytest.raises(ValueError, match="no ViT-Adapter checkpoint"):
        from_official("vit-adapter", {"head.weight": torch.ones(2)}, host(config), add_vit_feature="last")
    with pytest.raises(ValueError, match="known: adavit, dat, .*vit-adapter"):
        from_official("unheard-of", {}, host(config))


def test_a_saved_round_trip_of_the_inferred_config_is_exact(tmp_path):
    from adaptkit import attach, load

    config = {"hw": (32, 32), "dim": 40, "depth": 2, "heads": 2}
    first = attach(host(config), ("vit-adapter", {"deform_num_heads": 5, "n_points": 3, "deform_ratio": 0.5,
                                                  "extra_extractors": 1, "with_cffn": False, "conv_inplane": 8,
                                                  "add_vit_feature": None, "prefix": "drop"}))  # fmt: skip
    adapter = first.adapters["vit-adapter"]
    torch.nn.init.normal_(adapter.interactions[0].injector.gamma)
    sd = {k.replace(".ffn.dwconv.", ".ffn.dwconv.dwconv."): v.clone() for k, v in adapter.state_dict().items()}
    backbone = first.detach()
    second = from_official("vit-adapter", sd, backbone, add_vit_feature=None, n_points=3)
    image = torch.randn(1, 3, 32, 64)
    expected = second(image).maps
    second.save(tmp_path)
    third = attach(second.detach(), load(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(expected, third(image).maps))
