"""The authors' AdaViT checkpoints: the same decisions, the same logits."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from adaptkit.interop import from_official

SHARED = Path(os.environ.get("ADAPTKIT_SHARED", Path(__file__).parents[3] / "shared"))
FILES = {mode: SHARED / "golden" / f"adavit_{mode}_a.safetensors" for mode in ("partial", "full")}
needs_golden = pytest.mark.skipif(
    not all(f.is_file() for f in FILES.values()), reason=f"no reference vectors in {SHARED} (set ADAPTKIT_SHARED)"
)


def read(mode):
    with safe_open(FILES[mode], "pt") as f:
        config = json.loads(f.metadata()["config"])
        return config, {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def official(tensors):
    return {k.removeprefix("official."): v for k, v in tensors.items() if k.startswith("official.")}


def host(config, classes=7, **options):
    sizes = {"img_size": config["img_size"], "patch_size": config["patch"], "num_classes": classes}
    shape = {"embed_dim": config["dim"], "depth": config["depth"], "num_heads": config["heads"]}
    return VisionTransformer(**{**sizes, **shape, **options})


def attached(mode, dtype=torch.float64, **options):
    config, tensors = read(mode)
    model = from_official("adavit", official(tensors), host(config), load_backbone=True, head_mode=mode, **options)
    return model.to(dtype), tensors


@needs_golden
@pytest.mark.parametrize("execution", ["masked", "packed", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 2e-4)])
@pytest.mark.parametrize("mode", ["partial", "full"])
@torch.no_grad()
def test_decisions_and_logits_are_the_authors(mode, dtype, tolerance, execution):
    model, tensors = attached(mode, dtype, execution=execution)
    features = model(tensors["input"].to(dtype))
    assert torch.equal(features.aux["head_keep"], tensors["head_select"].to(dtype))
    assert torch.equal(features.aux["layer_keep"], tensors["layer_select"].to(dtype))
    assert torch.equal(features.aux["patch_keep"], tensors["token_select"][:, :, 1:].to(dtype))
    for ours, theirs in (("head_logits", "head_logits"), ("layer_logits", "layer_logits")):
        torch.testing.assert_close(features.aux[ours], tensors[theirs].to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(features.logits, tensors["logits"].to(dtype), rtol=tolerance, atol=tolerance)


@needs_golden
def test_something_is_kept_and_something_is_not():
    for mode in FILES:
        tensors = read(mode)[1]
        for kind in ("head_select", "layer_select", "token_select"):
            assert 0 < tensors[kind].float().mean() < 1


@needs_golden
@torch.no_grad()
def test_gates_of_each_kind_may_start_at_another_block():
    config, tensors = read("full")
    later = {
        k: v for k, v in official(tensors).items()
        if not (k.startswith("blocks.1.") and ("head_select" in k or "layer_select" in k))
    }  # fmt: skip
    model = from_official("adavit", later, host(config), load_backbone=True, head_mode="full")
    aux = model(tensors["input"].float()).aux
    assert [aux[f"{kind}_keep"].shape[1] for kind in ("patch", "head", "layer")] == [4, 2, 2]


@needs_golden
def test_a_checkpoint_without_its_classifier_loads_into_a_host_without_classes():
    config, tensors = read("full")
    headless = {k: v for k, v in official(tensors).items() if not k.startswith("head.")}
    model = from_official("adavit", headless, host(config, classes=0), load_backbone=True, head_mode="full")
    assert model(tensors["input"].float()).logits is None


@needs_golden
def test_what_the_tensors_do_not_tell_is_asked_for_and_what_contradicts_them_is_refused():
    config, tensors = read("full")
    with pytest.raises(ValueError, match="pass head_mode="):
        from_official("adavit", official(tensors), host(config))
    with pytest.raises(ValueError, match="first_block=2, but the checkpoint's tensors say 1"):
        from_official("adavit", official(tensors), host(config), head_mode="full", first_block=2)
    with pytest.raises(ValueError, match="checkpoint has depth=4, the backbone depth=6"):
        from_official("adavit", official(tensors), host({**config, "depth": 6}), head_mode="full")
    with pytest.raises(ValueError, match="no AdaViT"):
        from_official("adavit", {"head.weight": torch.ones(2)}, host(config))
