"""AdaViT: what is decided, that skipping changes nothing, and that the gates can be trained."""

import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer
from families import DEPTH, HEADS, HOSTS

import adaptkit
from adaptkit._cpu import adavit as fast
from adaptkit._cpu import onednn
from adaptkit.adapters.adavit import AdaViT, Decision, Random
from adaptkit.losses import usage, usage_loss
from adaptkit.seam import reference

# One backbone for each thing that packing must get right.
SUMS = transformer(4, 32, 21)
KINDS_OF_HOST = {
    "timm-vit": "one prefix token",
    "timm-siglip": "no prefix token",
    "timm-dinov2-reg": "five prefix tokens, LayerScale",
    "timm-qk-norm": "norms on queries and keys",
    "timm-dinov3": "rotary positions",
    "hf-dinov3": "rotary positions, transformers",
    "timm-beit": "relative bias",
    "hf-dinov2": "LayerScale, transformers",
}


def build(name="timm-vit", **options):
    torch.manual_seed(1)
    head = options.pop("head", None)
    return adaptkit.attach(HOSTS[name].build(), ("adavit", options), head=head).eval()


def images(name="timm-vit", count=3, seed=0):
    side = HOSTS[name].size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def loosen(model, seed=3):
    """Give the gates weights, so that images differ in what they keep."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.adapters["adavit"].parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model


class Fixed:
    """Keep what a function of the block says."""

    def __init__(self, patch=None, head=None, layer=None):
        self.by_kind = (patch, head, layer)

    def __call__(self, index, own):
        kinds = zip(own, self.by_kind)
        return Decision(*(k if k is None or f is None else f(index, torch.ones_like(k)) for k, f in kinds))


def first_only(index, ones):
    keep = torch.zeros_like(ones)
    keep[:, :1] = 1
    return keep


POLICIES = {
    "random": lambda: Random(0.5, 0.6, 0.7, seed=1),
    "sparse": lambda: Random(0.1, 0.3, 0.5, seed=2),
    "no layer at all": lambda: Fixed(layer=lambda i, k: 0 * k),
    "every second block off": lambda: Fixed(layer=lambda i, k: k * (i % 2)),
    "no head": lambda: Fixed(head=lambda i, k: 0 * k),
    "one patch": lambda: Fixed(patch=first_only),
    "no patch": lambda: Fixed(patch=lambda i, k: 0 * k),
    "everything": lambda: Fixed(),
}


# ------------------------------------------------------------------------------------------------ masked and packed


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("name", KINDS_OF_HOST)
def test_packed_equals_masked(name, mode, policy):
    model = loosen(build(name, head_mode=mode, first_block=0, bottleneck=2))
    with model.adapters["adavit"].deciding(POLICIES[policy]()):
        assert model.verify(images(name)) <= 1e-5
        assert model.verify(images(name, 1)) <= 1e-5


@pytest.mark.parametrize("last", ["all", "class"])
@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("name", KINDS_OF_HOST)
def test_one_image_through_onednn_equals_masked(name, mode, last, monkeypatch):
    """Its products are large enough for that on real backbones alone; here they are sent there."""
    if last == "class" and name == "timm-siglip":
        pytest.skip("no class token")
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    seen, there = [], torch.Tensor.to_mkldnn
    monkeypatch.setattr("adaptkit._cpu.onednn.LARGE", 1)
    monkeypatch.setattr(torch.Tensor, "to_mkldnn", lambda x: seen.append(len(x)) or there(x))
    model = loosen(build(name, head_mode=mode, first_block=0, last_block=last))
    for policy in ("random", "no head", "one patch", "no patch"):
        with model.adapters["adavit"].deciding(POLICIES[policy]()):
            assert model.verify(images(name, 1)) <= 1e-5
    assert bool(seen) == (model.vit.begin(images(name, 1))[1][0].projections() is not None)


@pytest.mark.parametrize("last", ["all", "class"])
@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("name", KINDS_OF_HOST)
def test_one_image_with_weights_laid_out_equals_masked(name, mode, last):
    if last == "class" and name == "timm-siglip":
        pytest.skip("no class token")
    model = loosen(build(name, head_mode=mode, first_block=0, last_block=last))
    gates, image = model.adapters["adavit"], images(name, 1)
    with gates.prepacked() as layouts:
        for policy in POLICIES:
            with gates.deciding(POLICIES[policy]()):
                assert model.verify(image) <= 1e-5
        split = model.vit.begin(image)[1][0].projections() is not None
        assert bool(layouts.held) == (split and onednn._prepacks())
        before = len(layouts.held)
        with torch.no_grad():
            for parameter in model.vit.backbone.parameters():
                parameter.mul_(1.1)
        with gates.deciding(POLICIES["random"]()):
            assert model.verify(image) <= 1e-5  # changed weights are laid out anew,
        assert len(layouts.held) == before  # in the place of the old
    assert gates.layouts is None
    with gates.prepacked(layouts):
        assert gates.layouts is layouts


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("name", KINDS_OF_HOST)
@pytest.mark.parametrize("last", ["all", "class"])
@torch.no_grad()
def test_auto_equals_masked(name, mode, last, monkeypatch):
    """What it chooses depends on what pays; here packing always does, image by image never."""
    if last == "class" and name == "timm-siglip":
        pytest.skip("no class token")
    monkeypatch.setattr("adaptkit._cpu.adavit._is_profitable", lambda *a: True)
    model = loosen(build(name, head_mode=mode, last_block=last))
    gates = model.adapters["adavit"]
    with gates.deciding(Random(0.5, 0.6, 0.7, seed=1)), gates.executing("masked"):
        masked = model(images(name))
    with gates.deciding(gates.given(masked.aux)):
        auto = model(images(name))
    assert_rounds_to([auto.prefix, auto.tokens], [masked.prefix, masked.tokens], *SUMS)


@pytest.mark.parametrize("mode", ["full", "partial"])
@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov2-reg", "timm-dinov3", "timm-beit"])
def test_packed_equals_masked_where_only_the_class_token_is_updated(name, mode):
    model = loosen(build(name, head_mode=mode, last_block="class"))
    with model.adapters["adavit"].deciding(Random(0.5, 0.6, 0.7, seed=1)):
        assert model.verify(images(name)) <= 1e-5


@torch.no_grad()
def test_the_masked_path_is_the_equation_written_out():
    model = loosen(build(first_block=0))
    x, blocks = model.vit.begin(images())
    features = model(images())
    keep = {k: features.aux[f"{k}_keep"] for k in ("patch", "head", "layer")}
    assert all(0 < k.mean() < 1 for k in keep.values())
    for i, block in enumerate(blocks):
        rows = []
        for b in range(len(x)):
            on = torch.cat([torch.ones(1), keep["patch"][b, i]]).bool()
            one = x[b : b + 1]
            if keep["layer"][b, i, 0]:
                q, k, v = block.qkv(block.norm1(one)[:, on])
                o = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
                one = one.clone()
                one[:, on] += block.scale1(block.out(o * keep["head"][b, i][None, :, None, None]))
            if keep["layer"][b, i, 1]:
                one = one.clone()
                one[:, on] += block.scale2(block.mlp(block.norm2(one[:, on])))
            rows.append(one)
        x = torch.cat(rows)
    torch.testing.assert_close(torch.cat([features.prefix, features.tokens], 1), model.vit.norm(x))


@torch.no_grad()
def test_the_result_of_an_image_does_not_depend_on_its_batch_mates():
    model = loosen(build(execution="packed"))
    x = images(count=4)
    together, alone = model(x), [model(x[i : i + 1]) for i in range(4)]
    for name in ("patch_keep", "head_keep", "layer_keep"):
        assert torch.equal(together.aux[name], torch.cat([a.aux[name] for a in alone]))
    assert_rounds_to(together.tokens, torch.cat([a.tokens for a in alone]), *SUMS)


def test_verify_finds_a_packing_that_is_wrong(monkeypatch):
    model = loosen(build(first_block=0))
    right = fast.by_image
    monkeypatch.setattr(fast, "by_image", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(RuntimeError, match="packed execution differs from masked"):
        model.verify(images())


def test_verify_needs_gates():
    with pytest.raises(TypeError, match="sfp: nothing to verify, it runs in one way; 'adavit' runs in several"):
        adaptkit.attach(HOSTS["timm-vit"].build(), "sfp").verify(images())


# ------------------------------------------------------------------------------------------------------- decisions


@pytest.mark.parametrize("policy", ["token", "class"])
def test_what_was_decided_is_reported_for_every_gated_block(policy):
    model = loosen(build(patch_policy=policy, first_block=1, grid=(4, 4)))
    x = torch.randn(2, 3, 40, 56)  # another grid than the backbone's
    aux = model(x).aux
    shapes = {"patch": (2, DEPTH - 1, 5 * 7), "head": (2, DEPTH - 1, HEADS), "layer": (2, DEPTH - 1, 2)}
    assert {k: tuple(aux[f"{k}_keep"].shape) for k in shapes} == shapes
    assert {k: tuple(aux[f"{k}_logits"].shape) for k in shapes} == shapes
    for kind in shapes:
        assert torch.equal(aux[f"{kind}_keep"], (aux[f"{kind}_logits"].sigmoid() > 0.5).float())
    assert not [name for name in aux if name.startswith("adavit.")]


def test_training_and_evaluation_share_temperature_and_threshold():
    model = loosen(build(temperature=2.0, patch_threshold=0.6, head_threshold=0.4)).train()
    torch.manual_seed(0)
    aux = model(images()).aux
    assert any(not torch.equal(aux[k], v) for k, v in model.adapters["adavit"].thresholded(aux).items())
    model.eval()
    aux = model(images()).aux
    assert all(torch.equal(aux[k], v) for k, v in model.adapters["adavit"].thresholded(aux).items())


@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_what_keeps_everything_is_the_pretrained_model_bit_for_bit(count):
    assert torch.equal(build(first_block=0)(images(count=count)).logits, HOSTS["timm-vit"].build()(images(count=count)))


@pytest.mark.parametrize("count", [1, 3])
@torch.no_grad()
def test_with_large_layers_what_keeps_everything_goes_through_onednn(count, monkeypatch):
    seen, there = [], onednn.mlp
    monkeypatch.setattr(onednn, "LARGE", 1)
    monkeypatch.setattr(onednn, "mlp", lambda h, *layers: seen.append(len(h)) or there(h, *layers))
    monkeypatch.setattr(fast, "TILE", 16)
    model, plain, x = build(first_block=0), HOSTS["timm-vit"].build(), images(count=count)
    assert_rounds_to(model(x).logits, plain(x), *SUMS)
    rows = model(x).tokens.shape[1] + model(x).prefix.shape[1]
    assert set(seen) == ({rows} if count == 1 else {16})
    with reference():
        assert torch.equal(model(x).logits, plain(x))


@torch.no_grad()
def test_open_gates_are_the_pretrained_model_bit_for_bit():
    model = loosen(build(bottleneck=3))
    plain = HOSTS["timm-vit"].build()
    with model.adapters["adavit"].opened():
        features = model(images())
    assert torch.equal(features.logits, plain(images()))
    assert features.aux == {}


def test_step_zero_keeps_everything():
    aux = build(first_block=0)(images()).aux
    assert all(aux[f"{kind}_keep"].all() for kind in ("patch", "head", "layer"))


def test_the_layer_gates_may_start_from_logits_that_fall_with_depth(tmp_path):
    """In a straight line from the first gated block to the last; the other kinds start where they do without it."""
    model = build(first_block=1, layer_bias=[5.0, 0.5])  # of four blocks three are gated
    aux = model(images()).aux
    assert torch.equal(aux["layer_logits"], torch.tensor([5.0, 2.75, 0.5])[:, None].expand(aux["layer_logits"].shape))
    assert all((aux[f"{kind}_logits"] == 3.0).all() for kind in ("patch", "head"))
    assert aux["layer_keep"].all()

    model.save(tmp_path)
    again = adaptkit.attach(HOSTS["timm-vit"].build(), str(tmp_path))
    assert AdaViT.of(again).config.layer_bias == (5.0, 0.5)  # as given, though JSON knows lists only


def test_one_gated_block_takes_the_first_of_the_two_logits():
    aux = build(first_block=3, layer_bias=(2.0, -1.0))(images()).aux
    assert (aux["layer_logits"] == 2.0).all()


def test_gates_decide_in_float32_under_autocast():
    model = loosen(build())
    expected = model(images()).aux
    with torch.autocast("cpu", torch.bfloat16):
        aux = model(images()).aux
    assert all(aux[k].dtype == torch.float32 for k in aux)
    first = {k: v[:, 0] for k, v in expected.items() if k.endswith("keep") and k != "patch_keep"}
    assert all(torch.equal(aux[k][:, 0], v) for k, v in first.items())
    gates, x = next(iter(AdaViT.of(model).gates.values())), torch.randn(2, 17, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gates(x, x, (4, 4))[1]
    for one, other in zip(inside, gates(x, x, (4, 4))[1]):
        assert torch.equal(one, other)


@torch.no_grad()
def test_the_class_token_gets_the_same_from_a_last_block_that_updates_nothing_else():
    every, only = (loosen(build(last_block=last, execution="packed")) for last in ("all", "class"))
    assert_rounds_to(every(images()).logits, only(images()).logits, *SUMS)


# -------------------------------------------------------------------------------------------------------- training


def test_every_gate_has_a_gradient_from_the_task_alone():
    """The last block's patch gates too: through the softmax over kept keys."""
    model = build(first_block=0).train()
    torch.manual_seed(0)
    model(images(count=8)).logits.square().sum().backward()
    gradients = {n: p.grad.abs().max() for n, p in model.adapters["adavit"].named_parameters()}
    assert len(gradients) == 2 * 3 * DEPTH
    assert all(g > 1e-6 for g in gradients.values()), gradients


@pytest.mark.parametrize("form", ["squared", "absolute"])
def test_usage_loss_drives_each_kind_to_its_budget(form):
    model = build(first_block=0).train()
    budget = {"patch": 0.5, "head": 0.7, "layer": 0.8}
    optimizer = torch.optim.Adam(model.adapters["adavit"].parameters(), lr=0.1)
    torch.manual_seed(0)
    seen = []
    for step in range(180):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 200)
        aux = model(images(count=8, seed=step % 4)).aux
        optimizer.zero_grad()
        usage_loss(aux, budget, form).backward()
        optimizer.step()
        seen.append([float(u.detach()) for u in usage(aux).values()])
    reached = torch.tensor(seen[-40:]).mean(0)
    torch.testing.assert_close(reached, torch.tensor(list(budget.values())), atol=0.02, rtol=0)


# ---------------------------------------------------------------------------------------------------- stacking


@torch.no_grad()
def test_it_runs_under_a_vit_adapter_and_both_are_one_file(tmp_path):
    parts = [("adavit", {"first_block": 0}), ("vit-adapter", {"conv_inplane": 8})]
    torch.manual_seed(1)
    model = loosen(adaptkit.attach(HOSTS["timm-vit"].build(), *parts).eval())
    x = images()
    expected = model(x)
    assert len(expected.maps) == 4
    assert all(m.isfinite().all() for m in expected.maps)
    assert 0 < expected.aux["patch_keep"].mean() < 1
    assert model.verify(x) <= 1e-5
    model.save(tmp_path)
    again = adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path)(x)
    assert torch.equal(again.tokens, expected.tokens)
    assert all(torch.equal(a, b) for a, b in zip(again.maps, expected.maps))


@torch.no_grad()
def test_it_runs_over_lora():
    from peft import LoraConfig, inject_adapter_in_model

    host = HOSTS["timm-vit"].build()
    host = inject_adapter_in_model(LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False), host)
    model = loosen(adaptkit.attach(host, ("adavit", {"first_block": 0})).eval())
    assert 0 < model(images()).aux["head_keep"].mean() < 1
    assert model.verify(images()) <= 1e-5


def test_it_must_be_the_innermost_block_adapter(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import test_contract  # noqa: F401  registers "toy-bottleneck"

    adaptkit.attach(HOSTS["timm-vit"].build(), "adavit", "toy-bottleneck")
    with pytest.raises(ValueError, match="adavit steps inside the blocks, but toy-bottleneck was given before"):
        adaptkit.attach(HOSTS["timm-vit"].build(), "toy-bottleneck", "adavit")


def test_a_host_whose_attention_does_not_come_apart_is_refused():
    with pytest.raises(TypeError, match="does not come apart"):
        adaptkit.attach(HOSTS["timm-sam"].build(), "adavit")


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_block": 4}, "first_block=4 is none of the 4 blocks"),
        ({"first_patch_block": 9}, "first_patch_block=9"),
        ({"patch_threshold": 1.0}, "patch_threshold=1.0"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"gates": ("patches",)}, "'patch', 'head', 'layer'"),
        ({"gates": ()}, "leaves nothing to decide"),
        ({"gates": ("patch", "patch")}, "names a kind twice"),
        ({"head_mode": "half"}, "'full', 'partial'"),
        ({"grid": (0, 3)}, "rows, columns"),
        ({"bottleneck": -1}, "bottleneck=-1"),
        ({"layer_bias": 5.0}, "layer_bias=5.0: give two logits"),
        ({"layer_bias": [5.0, 3.0, 0.5]}, "give two logits"),
        ({"layer_bias": [5.0, float("nan")]}, "layer_bias=nan"),
        ({"layer_bias": "53"}, "give two logits"),
        ({"layer_bias": (5.0, 0.5), "gates": ("patch",)}, "has none: add 'layer'"),
    ],
)
def test_an_option_that_cannot_be_says_so(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_last_block_class_needs_a_class_token():
    with pytest.raises(ValueError, match="needs a class token"):
        build("timm-siglip", last_block="class")


def test_of_finds_the_gates():
    model = build()
    assert AdaViT.of(model) is model.adapters["adavit"]


@pytest.mark.parametrize("options", [{}, {"bottleneck": 4}, {"last_block": "class"}, {"head_mode": "partial"}])
def test_verify_also_compares_everything_on_with_the_host(options, monkeypatch):
    model = adaptkit.attach(HOSTS["timm-vit"].build(), ("adavit", options)).eval()
    with torch.no_grad():
        for parameter in model.adapters["adavit"].bottlenecks.parameters():
            parameter.add_(0.1)
    x = torch.randn(2, 3, 32, 32)
    assert model.verify(x) < 1e-5
    gates = type(model.adapters["adavit"])
    there = gates._run
    monkeypatch.setattr(gates, "_run", lambda self, block, index, trace, x: there(self, block, index, trace, x) * 1.001)
    with pytest.raises(RuntimeError, match="with everything on differs from the backbone's own blocks by"):
        model.verify(x)


def test_what_was_decided_is_repeated_where_patches_are_gated_late():
    model = loosen(build(first_block=0, first_patch_block=DEPTH - 1))
    assert model.verify(images()) < 1e-5


def test_registers_without_a_class_token_decide_nothing():
    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    host = VisionTransformer(**sizes, class_token=False, reg_tokens=4, global_pool="avg")
    model = loosen(adaptkit.attach(host, ("adavit", {"first_block": 0})).eval())
    gates = model.adapters["adavit"].gates["0"]
    x = torch.randn(2, 20, 32)
    _, logits = gates(x, x, (4, 4))
    torch.testing.assert_close(logits.layer, gates.layer(x[:, 4:].mean(1)))
    with pytest.raises(TypeError, match="has registers and no class token; use last_block='all'"):
        adaptkit.attach(VisionTransformer(**sizes, class_token=False, reg_tokens=4, global_pool="avg"),
                        ("adavit", {"last_block": "class"}))  # fmt: skip
