"""Hierarchical hosts: the view equals timm bitwise, the MetaFormer adapter keeps every promise on them."""

import copy
import importlib.util
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer
from towers import SWIN, TOWERS, of_config

import adaptkit
from adaptkit.core.hierarchical import HierarchicalSpec
from adaptkit.core.registry import view
from adaptkit.create import create_backbone

DIMS, DEPTHS = (16, 24, 32, 64), (1, 1, 2, 1)
SUMS = transformer(8, 128, 64)  # of the largest host, at its widest


def _randomise(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():  # of an adapted model the adapters alone: the backbone is frozen
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model.eval()


def _metaformer(name):
    """timm's own settings of each family, at a toy size."""
    from timm.models import metaformer as m

    torch.manual_seed(0)
    options = {
        "poolformer": {"downsample_norm": None, "mlp_act": torch.nn.GELU, "mlp_bias": True, "norm_layers": m.GroupNorm1,
                       "layer_scale_init_values": 1e-5, "res_scale_init_values": None, "use_mlp_head": False},
        "poolformerv2": {"norm_layers": m.GroupNorm1NoBias, "use_mlp_head": False},
        "convformer": {"token_mixers": m.SepConv, "norm_layers": m.LayerNorm2dNoBias},
        "caformer": {"token_mixers": [m.SepConv] * 2 + [m.Attention] * 2,
                     "norm_layers": [m.LayerNorm2dNoBias] * 2 + [m.LayerNormNoBias] * 2},
    }[name]  # fmt: skip
    return _randomise(m.MetaFormer(dims=DIMS, depths=DEPTHS, num_classes=5, **options))


def _swin(**options):
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8), "num_classes": 5}
    return _randomise(SwinTransformer(img_size=64, window_size=4, **sizes, **options))


def _dat(**options):
    """Both kinds of window and deformable blocks; two groups of points."""
    from adaptkit.models import DAT

    torch.manual_seed(0)
    sizes = {"dim_stem": 8, "dims": DIMS, "depths": (2, 2, 2, 2), "heads": (1, 2, 2, 4), "groups": (-1, -1, 2, 2)}
    return _randomise(DAT(**sizes, img_size=64, num_classes=5, window_sizes=(4, 3, 2, 2), **options))


HOSTS = {
    "dat": _dat,
    "poolformer": partial(_metaformer, "poolformer"),
    "poolformerv2": partial(_metaformer, "poolformerv2"),
    "convformer": partial(_metaformer, "convformer"),
    "caformer": partial(_metaformer, "caformer"),
    "swin": _swin,
    "swin-dynamic": partial(_swin, dynamic_img_size=True, always_partition=True),
}
if importlib.util.find_spec("transformers"):
    HOSTS |= {"hf-poolformer": TOWERS["PoolFormerForImageClassification"].build}
    HOSTS |= {
        "hf-swin": of_config("swin", "SwinForImageClassification", "SwinConfig", **SWIN | {"depths": [2, 2, 2, 1]})
    }
PAIRS = ("dat", "swin", "swin-dynamic")  # two blocks in each stage
OPTIONS = {
    "pool": {"width": (4, 4, 8, 8)},
    "hybrid": {"width": 8, "mixer": ("pool", "conv", "global", "msda")},
    "gate": {"width": 0, "mixer": "pool", "norm": "group1"},
}
hosts = pytest.mark.parametrize("name", HOSTS)
#: tracing a host takes twenty seconds and more
traced = pytest.mark.parametrize(
    "name", [pytest.param(h, marks=[] if h == "swin" else pytest.mark.full) for h in HOSTS]
)
every = pytest.mark.parametrize(("name", "options"), [pytest.param(h, o, id=f"{h}-{n}") for h in HOSTS for n, o in OPTIONS.items()])  # fmt: skip


def image(height=64, width=64, batch=2, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def attach(name, options, **more):
    torch.manual_seed(1)
    return adaptkit.attach(HOSTS[name](), ("metaformer", options), **more)


def same(a, b):
    pairs = [(a.tokens, b.tokens), (a.logits, b.logits), *zip(a.maps, b.maps)]
    return len(a.maps) == len(b.maps) and all(torch.equal(x, y) for x, y in pairs)


def scalar(features):
    return sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in (features.tokens, *features.maps))


def said_by(host, x):
    """What a host itself says: its stages (B, D, h, w), its last tokens (B, N, D) and its logits."""
    if type(host).__name__.startswith("Swin") and "transformers" in type(host).__module__:
        whole = host.swin(x, output_hidden_states=True, output_hidden_states_before_downsampling=True,
                          interpolate_pos_encoding=x.shape[-2:] != (64, 64))  # fmt: skip
        return whole.reshaped_hidden_states[1:], whole.last_hidden_state, host(x).logits
    if "transformers" in type(host).__module__:
        stages = host.poolformer(x, output_hidden_states=True).hidden_states
        return stages, stages[-1].flatten(2).mT, host(x).logits
    last = host.forward_features(x)
    last = last.movedim(-1, 1) if last.shape[-1] == host.num_features else last
    return host.forward_intermediates(x, intermediates_only=True), last.flatten(2).mT, host(x)


def equals_host(features, host, x):
    """Stages, final tokens and logits, bit for bit."""
    stages, last, logits = said_by(host, x)
    assert [m.shape for m in features.maps] == [s.shape for s in stages]
    assert all(torch.equal(m, s) for m, s in zip(features.maps, stages))
    assert torch.equal(features.tokens, last)
    assert torch.equal(features.logits, logits)


@hosts
@pytest.mark.parametrize("batch", [1, 2])  # of one, the memory layout of a map is told by other strides
@torch.no_grad()
def test_view_equals_host_bitwise(name, batch):
    host, x = HOSTS[name](), image(batch=batch)
    vit = view(host)
    features = vit.features(x)
    equals_host(features._replace(logits=vit.logits(features)), host, x)


@pytest.mark.parametrize("name", [n for n in HOSTS if "swin" not in n])
@torch.no_grad()
def test_hosts_of_any_size_take_it_as_they_do_by_themselves(name):
    host, x = HOSTS[name](), image(48, 100)
    vit = view(host)
    features = vit.features(x)
    equals_host(features._replace(logits=vit.logits(features)), host, x)


@pytest.mark.parametrize("size", [(64, 96), (48, 80)])
@torch.no_grad()
def test_swin_at_another_size_equals_a_host_with_dynamic_masks(size):
    fixed, dynamic = _swin(always_partition=True), _swin(dynamic_img_size=True, always_partition=True)
    dynamic.load_state_dict(fixed.state_dict())
    x = image(*size)
    expected = dynamic.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(view(fixed).features(x).maps, expected))


@hosts
def test_spec_has_the_width_depth_and_stride_of_each_stage(name):
    spec = view(HOSTS[name]()).spec
    assert isinstance(spec, HierarchicalSpec)
    assert spec.strides == (4, 8, 16, 32)
    assert spec.embed_dims == ((16, 32, 64, 128) if "swin" in name else DIMS)
    assert spec.depths == ((2, 2, 2, 2) if name in PAIRS else (2, 2, 2, 1) if name == "hf-swin" else DEPTHS)
    assert (spec.depth, spec.embed_dim, spec.patch_size, spec.num_prefix_tokens) == (
        sum(spec.depths),
        spec.embed_dims[-1],
        32,
        0,
    )


@hosts
@torch.no_grad()
def test_parts_of_a_block_say_the_same_as_the_block_or_say_why_not(name):
    vit = view(HOSTS[name]())
    x, grid = vit.embed(image())
    for stage in range(4):
        x, grid = vit.enter(stage, x, grid)
        for block in vit.blocks(stage, grid):
            if stage > 1 and name in ("poolformerv2", "convformer", "caformer"):
                with pytest.raises(TypeError, match="ResScale"):
                    block.equation(x)
            else:
                torch.testing.assert_close(block.equation(x), block(x), atol=1e-5, rtol=1e-5)
            with pytest.raises(TypeError, match=r"q, k(,| and) v"):
                block.qkv(x)
            x = block(x)


@torch.no_grad()
def test_poolformer_s12_is_timms_bitwise_before_and_after_attach_and_detach():
    import timm

    torch.manual_seed(0)
    host, x = timm.create_model("poolformer_s12", num_classes=10).eval(), image(224, 224, 1)
    before = [s.clone() for s in host.forward_intermediates(x, intermediates_only=True)]
    model = adaptkit.attach(host, "metaformer")
    assert view(host).spec.embed_dims == (64, 128, 320, 512)
    assert all(torch.equal(a, b) for a, b in zip(model(x).maps, before))
    assert torch.equal(model(x).logits, host(x))
    assert model.detach() is host
    after = host.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(after, before))


@every
@torch.no_grad()
def test_just_attached_the_output_is_the_frozen_backbones_bitwise(name, options):
    x = image()
    equals_host(attach(name, options).eval()(x), HOSTS[name](), x)


@every
def test_frozen_means_frozen_detach_restores_and_every_parameter_gets_a_gradient(name, options):
    host = HOSTS[name]().train()
    before = copy.deepcopy(host.state_dict())
    modes = [m.training for m in host.modules()]
    model = adaptkit.attach(host, ("metaformer", options)).train()
    scalar(model(image())).backward()
    assert not any(m.training for m in model.backbone.modules())
    assert all(p.grad is None for p in host.parameters())
    assert all(p.grad is not None for p in model.adapters.parameters())
    assert model.detach() is host
    assert [m.training for m in host.modules()] == modes
    assert all(p.requires_grad for p in host.parameters())
    assert all(torch.equal(v, before[k]) for k, v in host.state_dict().items())


@every
@torch.no_grad()
def test_save_load_attach_elsewhere_gives_the_same_output_bitwise(name, options, tmp_path):
    model = _randomise(attach(name, options, head=("fpn", {"num_classes": 3, "channels": 8})), 3)
    model.save(tmp_path, note="hierarchical")
    x = image(seed=4)
    expected = model(x)
    again = adaptkit.attach(model.detach(), tmp_path)
    assert expected.logits.shape == (2, 3, 64, 64)
    assert same(again(x), expected)


@every
@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 32), (75, 50)], ids=str)
def test_any_input_size_gives_maps_of_the_image_size(name, options, size):
    model = _randomise(attach(name, options, head=("linear", {"num_classes": 3})), 3)
    features = model(image(*size))
    assert [m.shape[-2:] for m in features.maps] == [tuple(-(-n // s) for n in size) for s in (4, 8, 16, 32)]
    assert features.logits.shape == (2, 3, *size)
    assert features.grid == tuple(-(-n // 32) for n in size)
    assert all(m.isfinite().all() for m in features.maps)


@traced
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model = _randomise(attach(name, OPTIONS["hybrid"]), 3)
    x = image()
    compiled, expected = torch.compile(model, fullgraph=True, backend="eager")(x), model(x)
    for a, b in zip(compiled.maps, expected.maps):
        assert_rounds_to(a, b, *SUMS)


@traced
@torch.no_grad()
def test_exports(name):
    model = _randomise(attach(name, OPTIONS["hybrid"]), 3)
    x = image()
    program = torch.export.export(model, (x,), strict=False)
    for a, b in zip(program.module()(x).maps, model(x).maps):
        assert_rounds_to(a, b, *SUMS)
    assert not any("grid_sampler" in str(n.target) for n in program.graph.nodes)


@torch.no_grad()
def test_dat_tiny_by_its_name_is_the_bare_model_bitwise_and_keeps_its_normalisation():
    torch.manual_seed(0)
    host = create_backbone("dat_tiny", pretrained=False, classifier=True).eval()
    x = image(96, 64, 1)
    model = adaptkit.attach(host, "metaformer").eval()
    assert model.vit.spec == HierarchicalSpec("dat", (96, 192, 384, 768), (2, 2, 6, 2), (4, 8, 16, 32))
    assert model.vit.source().mean == (0.485, 0.456, 0.406)
    equals_host(model(x), host, x)
    assert model.detach() is host


@pytest.mark.parametrize("name", [n for n in HOSTS if n == "dat" or n.startswith("hf-")])
def test_gradients_are_the_same_where_blocks_run_a_second_time(name):
    grads = []
    for enable in (False, True):
        model = _randomise(attach(name, OPTIONS["pool"]), 3).train()
        if enable:
            model.gradient_checkpointing_enable()
        scalar(model(image())).backward()
        grads.append([p.grad for p in model.adapters.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.skipif("hf-swin" not in HOSTS, reason="transformers is not installed")
def test_a_swin_that_was_told_to_checkpoint_is_seen_so():
    host = HOSTS["hf-swin"]()
    assert not view(host).is_checkpointing()
    host.gradient_checkpointing_enable()
    assert view(host).is_checkpointing()
    assert adaptkit.attach(host, "metaformer").is_gradient_checkpointing


@torch.no_grad()
def test_a_pruned_dat_has_fewer_stages():
    host = _dat()
    host.prune_intermediate_layers([1], prune_norm=True)
    seen = view(host)
    assert (seen.spec.strides, seen.spec.embed_dims) == ((4, 8), DIMS[:2])
    assert torch.equal(seen.features(image()).maps[-1], host.forward_intermediates(image())[0])


DEFAULTS = {
    "dat": {"proj_qkv", "proj_q", "proj_v"},
    "hf-swin": {"q_proj", "v_proj"},
    "hf-poolformer": {"conv1", "conv2"},
}


@pytest.mark.parametrize("name", [n for n in DEFAULTS if n in HOSTS])
def test_lora_adapts_the_attention_by_default_or_the_mlp_where_there_is_none(name):
    model = adaptkit.attach(HOSTS[name](), "lora")
    names = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.adapters.named_parameters() if "lora_A" in n}
    assert names == DEFAULTS[name]


@pytest.mark.parametrize("adapter", ["vit-adapter", "sfp", "adavit"])
def test_an_adapter_that_needs_one_width_says_why_and_what_to_do(adapter):
    host = HOSTS["poolformer"]()
    with pytest.raises(TypeError, match=rf"{adapter} needs one width.*MetaFormer has stages of 16, 24, 32, 64.*attach adapter-plus, lora, metaformer"):  # fmt: skip
        adaptkit.attach(host, adapter)
    assert all(p.requires_grad for p in host.parameters())


def test_a_file_of_a_plain_vit_does_not_fit_and_says_so(tmp_path):
    import timm

    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    adaptkit.attach(plain, "metaformer").save(tmp_path)
    with pytest.raises(ValueError, match=r"trained on a ViT \(embed_dim=192.*this backbone is a hierarchical backbone"):
        adaptkit.attach(HOSTS["poolformer"](), tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    ({"mixer": ("pool", "conv")}, r"mixer=\('pool', 'conv'\) has 2 entries, the backbone 4 stages of 1, 1, 2, 1 blocks"),
    ({"width": (4, 8)}, r"width=\(4, 8\) has 2 entries, the backbone 4 stages"),
])  # fmt: skip
def test_what_is_given_per_stage_must_be_one_per_stage(options, message):
    with pytest.raises(ValueError, match=message):
        attach("poolformer", options)


def test_one_mixer_and_one_width_per_stage():
    blocks = attach("poolformer", {"width": (4, 6, 8, 10), "mixer": ("pool", "pool", "global", "global")}).adapters["metaformer"].blocks  # fmt: skip
    assert [b.down.weight.shape for b in blocks] == [(4, 16), (6, 24), (8, 32), (8, 32), (10, 64)]
    assert [type(b.mixer).__name__ for b in blocks] == ["Pool", "Pool"] + ["GlobalAttention"] * 3


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_lora_changes_the_layers_of_every_stage_and_goes_into_a_file(name, tmp_path):
    model = adaptkit.attach(HOSTS[name](), "lora", target_modules="all-linear")
    plain = adaptkit.attach(HOSTS[name]()).eval()(image())
    assert torch.equal(model.eval()(image()).tokens, plain.tokens)
    for p in model.adapters.parameters():
        p.add_(0.1)
    changed = model(image())
    assert all(not torch.equal(a, b) for a, b in zip(changed.maps, plain.maps, strict=True))
    model.save(tmp_path)
    assert torch.equal(adaptkit.attach(HOSTS[name](), tmp_path)(image()).tokens, changed.tokens)
