"""Every architecture name of timm's plain families, shrunk: seen and equal to the backbone bit for bit.

Names whose shrunk models are the same are tried once. The transformers families are those of ``tests/families.py``; here
each registered class of transformers is asked whether it is among them.
"""

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, randomise
from towers import TOWERS

from adaptkit.core.registry import families, view
from adaptkit.model.proof import prove

MODULES = ("vision_transformer", "deit", "eva", "beit", "vision_transformer_hybrid")
SHRUNK = {"embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 5}
SIZES = {"img_size": 32, "patch_size": 8}
#: Blocks whose attention does not come apart.
PARALLEL = {"ParallelThingsBlock", "ParallelScalingBlock", "DiffParallelScalingBlock"}
#: Names whose model cannot be built this small: its stem gives 768 channels.
TOO_LARGE = {"vit_base_mci_224"}


class Case(NamedTuple):
    """One shrunk model, and the names that make it."""

    module: str
    options: dict
    names: list


def asked(module, name, options):
    """What a name asks timm to build: class and keywords."""
    modules = [importlib.import_module(f"timm.models.{m}") for m in {module, "vision_transformer"}]
    given = {}

    def record(cls, variant, pretrained=False, **keywords):
        given.update({k: v for k, v in keywords.items() if not k.startswith("pretrained")}, cls=cls)

    with pytest.MonkeyPatch.context() as patch:
        for m in modules:
            patch.setattr(m, "build_model_with_cfg", record)
        timm.model_entrypoint(name)(pretrained=False, **options)
    return given


def distinct():
    """Every shrunk model once, by what timm is asked to build."""
    cases = {}
    for module in MODULES:
        for name in timm.list_models(module=module):
            options = SHRUNK | ({"img_size": 64} if module.endswith("hybrid") else SIZES)
            given = asked(module, name, options)
            if isinstance(given.get("num_kv_heads"), tuple):  # one for each block
                options["num_kv_heads"] = given["num_kv_heads"] = (1, 2)
            key = (given.pop("cls"), repr(sorted(given.items())))
            cases.setdefault(key, Case(module, options, [])).names.append(name)
    return list(cases.values())


CASES = distinct()
#: Hybrids whose network before the tokens takes seconds; the small ones stay.
SLOW = [case for case in CASES if case.module.endswith("hybrid") and "r_s16" not in case.names[0]]
cases = pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.names[0], marks=[pytest.mark.full] if c in SLOW else []) for c in CASES],
)


def build(case, **more):
    torch.manual_seed(0)
    return randomise(timm.create_model(case.names[0], **case.options, **more))


def tokens(features):
    return torch.cat([features.prefix, features.tokens], dim=1)


def test_the_sweep_covers_every_name():
    names = [name for case in CASES for name in case.names]
    assert sorted(names) == sorted(n for module in MODULES for n in timm.list_models(module=module))


@cases
@torch.no_grad()
def test_an_architecture_is_seen_bitwise_at_two_sizes(case):
    if case.names[0] in TOO_LARGE:
        pytest.skip("cannot be built small")
    host = build(case)
    seen = view(host)
    prove(seen)
    kinds = {type(block).__name__ for block in host.blocks}
    plain = all(type(getattr(block, "attn", None)).__name__ != "DiffAttention" for block in host.blocks)
    assert seen.splits == (plain and not kinds & PARALLEL)
    generator = torch.Generator().manual_seed(0)
    own, patch = host.patch_embed.img_size, seen.spec.patch_size
    image, other = (torch.randn(2, 3, *size, generator=generator) for size in (own, (3 * patch, 5 * patch)))
    features = seen.features(image)
    assert torch.equal(tokens(features), host.forward_features(image))
    assert torch.equal(seen.logits(features), host(image))
    if case.module == "beit":
        again = build(case)
        again.set_input_size((24, 40))
    else:
        again = build(case, dynamic_img_size=True)
        prove(view(again))
    assert torch.equal(tokens(seen.features(other)), again.forward_features(other))


def test_every_transformers_class_is_one_that_the_tests_build():
    """``families.py`` and ``towers.py`` build them; these are the classes around one, tried in test_families.py."""
    around = {"CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "Dinov2Backbone", "DINOv3ViTBackbone"}
    around |= {"Dinov2WithRegistersBackbone", "TimmWrapperForImageClassification", "TimmBackbone"}
    around |= {f"{name}Model" for name in ("MetaClip2", "ChineseCLIP", "AltCLIP", "CLIPSeg", "Siglip2", "Aimv2", "Sam")}
    around |= {"MetaClip2VisionModelWithProjection", "OwlViTVisionModel", "Owlv2VisionModel"}
    around |= {"InstructBlipVideoVisionModel"}  # InstructBLIP's, word for word
    built = {type(host.build()).__qualname__ for name, host in HOSTS.items() if name.startswith("hf")}
    built |= {type(tower.build()).__qualname__ for tower in TOWERS.values() if tower.library == "transformers"}
    known = {path.rpartition(".")[2] for path in families() if path.startswith("transformers.models.")}
    assert known == built | around


@pytest.mark.parametrize("model", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_backbone_classes_of_transformers_are_proven_too(model):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    host = randomise(getattr(transformers, f"{model}Backbone")(getattr(transformers, f"{model}Config")(**sizes)))
    prove(view(host))

    def forward(self, pixel_values, **options):
        return type(self).__mro__[1].forward(self, pixel_values * 2, **options)

    host.__class__ = type("Mine", (type(host),), {"forward": forward})
    with pytest.raises(TypeError, match="Mine is not what"):
        prove(view(host))


@pytest.mark.parametrize("inside", ["CLIPModel", "SiglipModel", "CLIPVisionModelWithProjection"])
def test_the_vision_model_inside_a_larger_one_is_proven(inside):
    import transformers

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, inside).config_class
    if inside == "CLIPVisionModelWithProjection":
        model = transformers.CLIPVisionModelWithProjection(config(**vision, intermediate_size=64))
    else:
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
        model = getattr(transformers, inside)(config(text_config=text, vision_config=vision))
    prove(view(randomise(model)))
