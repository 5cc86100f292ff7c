"""Files that say absurd things: each is a kind, how the header of a sound file is changed, and for which method."""

from __future__ import annotations

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

import adaptkit

HUGE = 10**9


def host():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)


METHODS = {
    "sfp": ("sfp", ("linear", {"num_classes": 3})),
    "vit-adapter": ("vit-adapter", ("fpn", {"num_classes": 3, "channels": 16})),
    "vit-split": ("vit-split", ("upsample", {"num_classes": 3})),
    "metaformer": (("metaformer", {"width": 8, "mixer": ("pool", "conv")}), ("classifier", {"num_classes": 3})),
    "adavit": ("adavit", ("classifier", {"num_classes": 3, "pool": "token"})),
    "dat": ("dat", ("depth", {"max_depth": 10.0, "bins": 8, "channels": 16})),
    "lora": (("lora", {"r": 2}), None),
    "plain-mask": (None, ("plain-mask", {"num_classes": 3, "num_q": 4, "num_blocks": 1})),
}


def write(folder, header, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, folder / "adapter_model.safetensors", {"adaptkit": text})
    return folder


def sound(folder, method):
    """Save a file of this method, its parameters off their initial values; returns its header and tensors."""
    adapter, head = METHODS[method]
    model = adaptkit.attach(host(), *([] if adapter is None else [adapter]), head=head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save(folder)
    return read(folder)


def read(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        return json.loads(f.metadata()["adaptkit"]), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def option(method, **options):
    """Options of the adapter."""
    name = ",".join(f"{k}={str(v)[:40]}" for k, v in options.items())
    return f"{method}:{name}", method, lambda h: h["adapters"][0]["config"].update(options)


def peft(**options):
    name = ",".join(f"{k}={str(v)[:40]}" for k, v in options.items())
    return f"lora:{name}", "lora", lambda h: h["adapters"][0]["config"]["options"].update(options)


def head(method, **options):
    name = ",".join(f"{k}={str(v)[:40]}" for k, v in options.items())
    return f"head of {method}:{name}", method, lambda h: h["head"]["config"].update(options)


def field(name, value, method="sfp"):
    return f"{name}={str(value)[:40]}", method, lambda h: h.__setitem__(name, value)


def of_backbone(name, value):
    return f"backbone.{name}={str(value)[:40]}", "sfp", lambda h: h["backbone"].__setitem__(name, value)


def of_spec(name, value):
    return f"spec.{name}={str(value)[:40]}", "sfp", lambda h: h["backbone"]["spec"].__setitem__(name, value)


#: Kind, method, and what is done to the header.
KINDS = [
    option("vit-adapter", conv_inplane=10**4),
    option("vit-adapter", conv_inplane=HUGE),
    option("vit-adapter", extra_extractors=10**4),
    option("vit-adapter", extra_extractors=HUGE),
    option("vit-adapter", extra_extractors=-1),
    option("vit-adapter", interaction_indexes=[[0, HUGE]]),
    option("vit-adapter", interaction_indexes=[[0, 2**19], [2**19 + 1, 2**20]]),
    option("vit-adapter", interaction_indexes=[[i, i] for i in range(2000)]),
    option("vit-adapter", interaction_indexes=[[0, 1, 2, 3]]),
    option("vit-adapter", interaction_indexes={"0": 3}),
    option("vit-adapter", n_points=HUGE),
    option("vit-adapter", n_points=10**5),
    option("vit-adapter", deform_num_heads=HUGE),
    option("vit-adapter", deform_ratio=1e300),
    option("vit-adapter", deform_ratio=999.9),
    option("vit-adapter", cffn_ratio=1e9),
    option("vit-adapter", cffn_ratio=1000.0),
    option("vit-adapter", drop_path="much"),
    option("vit-adapter", strides=[4] * 10**5),
    option("vit-adapter", attention=["msda"]),
    option("vit-split", select_layers=[HUGE]),
    option("vit-split", select_layers=[0, 1]),
    option("vit-split", select_layers=[1, 1]),
    option("vit-split", select_layers=[1, 2, 3]),
    option("vit-split", select_layers=[]),
    option("vit-split", select_layers=list(range(1, 60000))),
    option("vit-split", select_layers="last"),
    option("vit-split", out_indices=[-1, 3]),
    option("vit-split", out_indices=[3] * 4),
    option("vit-split", out_indices=[3] * 60000),
    option("vit-split", out_indices=[2.5]),
    option("vit-split", out_indices=[]),
    option("vit-split", strides=[5]),
    option("vit-split", strides=None),
    option("vit-split", pad="centre"),
    option("vit-split", pad="left"),
    option("vit-split", checkpoint=1),
    option("metaformer", width=HUGE),
    option("metaformer", width=10**6),
    option("metaformer", width=[8] * 10**5),
    option("metaformer", width=True),
    option("metaformer", mlp_ratio=1e308),
    option("metaformer", mlp_ratio=1000.0),
    option("metaformer", mixer=["pool"] * 10**6),
    option("metaformer", mixer_options={"conv": {"kernel": 10**6 + 1}}),
    option("metaformer", mixer_options={"conv": {"kernel": 10**12}}),
    option("metaformer", mixer_options={"conv": {"kernel": "3"}}),
    option("metaformer", mixer_options={"conv": {"kernel": 3, "kernels": [1]}}),
    option("metaformer", seed=2**70),
    option("adavit", bottleneck=HUGE),
    option("adavit", bottleneck=10**6),
    option("adavit", grid=[10**6, 10**6], patch_policy="class"),
    option("adavit", grid=[10**9, 1]),
    option("adavit", grid=[]),
    option("adavit", first_block=-HUGE),
    option("adavit", gates=["patch"] * 10**5),
    option("adavit", temperature=0),
    option("adavit", head_threshold=None),
    option("dat", bias_grid=10**4),
    option("dat", bias_grid=10**6),
    option("dat", bias_grid=HUGE),
    option("dat", kernel_size=10**6),
    option("dat", groups=HUGE),
    option("dat", groups=-1),
    option("dat", blocks=[0, HUGE]),
    option("dat", blocks=[0] * 10**6),
    option("dat", offset_range="far"),
    option("vit-adapter", interactions=HUGE),
    option("vit-adapter", interactions=-1),
    peft(r=HUGE),
    peft(r=60000),
    peft(r=-1),
    peft(r="2"),
    peft(r=2.5),
    peft(lora_alpha=[1]),
    peft(lora_dropout=7.0),
    peft(rank_pattern={"qkv": HUGE}),
    peft(rank_pattern={"(a+)+": 2}),
    peft(rank_pattern=["qkv"]),
    peft(rank_pattern={f"qkv|z{i}": 2 for i in range(5000)}),
    peft(target_modules=["qkv"] * 10**4),
    peft(alpha_pattern={"qkv": "x"}),
    peft(target_modules="(.*a){25}"),
    peft(target_modules="(([a-z])+.)+[A-Z]([a-z])+$"),
    peft(target_modules="(a|a)*b"),
    peft(target_modules=".*.*.*.*.*.*.*z"),
    peft(target_modules="["),
    peft(target_modules=["qkv"] * 10**5),
    peft(target_modules=[["qkv"]]),
    peft(exclude_modules="(x+x+)+y"),
    peft(layers_to_transform=[0, HUGE]),
    peft(no_such_option=1),
    peft(use_dora="yes"),
    peft(init_lora_weights={"a": 1}),
    peft(modules_to_save=["norm"]),
    head("sfp", num_classes=HUGE),
    head("sfp", num_classes=10**6),
    head("sfp", num_classes=3.0),
    head("sfp", num_classes=None),
    head("sfp", no_such_option=1),
    head("vit-adapter", channels=HUGE),
    head("vit-adapter", channels=10**5),
    head("vit-adapter", dropout=2.0),
    head("vit-adapter", norm=["group"]),
    head("vit-split", num_classes=HUGE),
    head("vit-split", dropout=-1.0),
    head("vit-split", resize="yes"),
    head("metaformer", num_classes=-(10**9)),
    head("dat", bins=HUGE),
    head("dat", bins=10**6),
    head("dat", max_depth=-1.0),
    head("plain-mask", num_q=HUGE),
    head("plain-mask", num_q=10**6),
    head("plain-mask", num_blocks=10**5),
    head("plain-mask", num_blocks=0),
    head("plain-mask", hidden_dim=10**6),
    head("plain-mask", num_heads=3),
    head("plain-mask", num_classes=10**6),
    head("plain-mask", upscale=6),
    head("plain-mask", upscale=HUGE),
    head("plain-mask", upscale=-1),
    head("plain-mask", interaction_indices=[0, HUGE]),
    head("plain-mask", interaction_indices=[3, 1]),
    head("plain-mask", interaction_indices=[]),
    head("plain-mask", interaction_indices=[0] * 10**5),
    head("plain-mask", interaction_indices="all"),
    head("plain-mask", things=[7]),
    head("plain-mask", things=list(range(10**5))),
    head("plain-mask", task="everything"),
    head("plain-mask", lateral_projection="conv"),
    head("plain-mask", lateral_bn="yes"),
    head("plain-mask", norm="layer"),
    field("format", -5),
    field("format", 0),
    field("format", 1.9),
    field("format", True),
    field("format", "1"),
    field("format", None),
    field("format", 3),
    field("adapters", None),
    field("adapters", {}),
    field("adapters", [None]),
    field("adapters", [{"name": "sfp"}]),
    field("adapters", [{"name": ["sfp"], "config": {}}]),
    field("adapters", [{"name": "sfp", "config": {}}] * 5000),
    field("adapters", [{"name": "no-such-adapter", "config": {}}]),
    field("head", []),
    field("head", {"name": "linear"}),
    field("head", {"name": None}),
    field("backbone", None),
    field("backbone", []),
    field("metadata", [1]),
    field("train_backbone", "norm"),
    field("train_backbone", ["*a" * 2000]),
    field("train_backbone", ["*"] * 5000),
    field("surprise", 1),
    of_backbone("spec", None),
    of_backbone("fingerprint", [1]),
    of_backbone("fingerprint", {"patch": ["x"]}),
    of_backbone("digest", {"blocks.0": 1}),
    of_backbone("sums", {"0": [1.0]}),
    of_backbone("mean", "grey"),
    of_backbone("source", 5),
    of_backbone("class", None),
    of_spec("depth", HUGE),
    of_spec("embed_dim", "32"),
    of_spec("depths", [1]),
    of_spec("patch_size", -8),
    of_spec("num_heads", True),
]
