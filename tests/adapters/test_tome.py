"""Token merging against a slow rewrite of the paper's equations: one image at a time, token by token, backbone's layers."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import DEPTH, DIM, HEADS, HOSTS, stirred
from towers import TOWERS

import adaptkit
from adaptkit.adapters.base import BlockAdapter
from adaptkit.adapters.tome import Matching, Stream, ToMeConfig, schedule
from adaptkit.analysis import accounting
from adaptkit.core.registry import view

TIMM = {"timm-siglip": 0, "timm-vit": 1, "timm-distilled": 2, "timm-dinov2-reg": 5}  #: prefix tokens
TRANSFORMERS = {"hf-ijepa": 0, "hf-dinov2": 1, "hf-dinov2-reg": 5}
ROTARY = {"timm-dinov3": 5, "hf-dinov3": 5}
PREFIX = {**TIMM, **TRANSFORMERS, **ROTARY}


def image(name, batch=2, cells=None, seed=0, dtype=torch.float64):
    patch = view(HOSTS[name].build()).spec.patch_size
    size = (HOSTS[name].size,) * 2 if cells is None else (cells[0] * patch, cells[1] * patch)
    return torch.randn(batch, 3, *size, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def attach(name, *others, dtype=torch.float64, **options):
    return adaptkit.attach(HOSTS[name].build().to(dtype), ("tome", options), *others).to(dtype).eval()


# ----------------------------------------------------------------------------------------------- the slow rewrite


def heads(x):
    """(T, D) -> (heads, T, E)."""
    return x.unflatten(1, (HEADS, -1)).transpose(0, 1)


def layers(name, backbone):
    """For each block: norm1, tokens -> q, k, v, output projection, scale1, norm2, mlp, scale2, as the library has them."""
    if name.startswith("timm"):
        for b in backbone.blocks:
            ones = [torch.nn.Identity() if not hasattr(b, n) else getattr(b, n) for n in ("ls1", "ls2")]
            if name == "timm-dinov3":
                ones = [lambda x, g=g: g * x for g in (b.gamma_1, b.gamma_2)]
            yield b.norm1, lambda h, b=b: b.attn.qkv(h).chunk(3, dim=-1), b.attn.proj, ones[0], b.norm2, b.mlp, ones[1]
        return
    dino = "dino" in name
    for b in view(backbone).layers():
        a, same = b.attention, torch.nn.Identity()
        norms = (b.norm1, b.norm2) if dino else (b.layernorm_before, b.layernorm_after)
        scales = (b.layer_scale1, b.layer_scale2) if dino else (same, same)

        def qkv(h, a=a):
            return a.q_proj(h), a.k_proj(h), a.v_proj(h)

        yield norms[0], qkv, a.o_proj, scales[0], norms[1], b.mlp, scales[1]


def turned(name, backbone, x, places, grid):
    """DINOv3's rotation of (heads, T, E): cell i of n lies at 2 (i + 1/2) / n - 1; None is a prefix token."""
    if name not in ROTARY:
        return x
    frequencies = 1 / backbone.rope.periods if name.startswith("timm") else backbone.rope_embeddings.inv_freq
    out = x.clone()
    half = x.shape[-1] // 2
    for t, place in enumerate(places):
        if place is None:
            continue
        y, across = (2 * (p + 0.5) / n - 1 for p, n in zip(place, grid))
        angle = 2 * math.pi * torch.cat([y * frequencies, across * frequencies])
        a, b = x[:, t, :half], x[:, t, half:]
        out[:, t, :half] = a * angle.cos() - b * angle.sin()
        out[:, t, half:] = b * angle.cos() + a * angle.sin()
    return out


def rewritten(name, backbone, x, r, proportional=True):
    """One image: tokens after the norm (P+N, D), and for each merged token the input tokens in it."""
    seen, prefix = view(backbone), PREFIX[name]
    grid = seen.grid(x)
    x = seen.embed(x, grid)[0]
    cells = [(i // grid[1], i % grid[1]) for i in range(grid[0] * grid[1])]
    sources = [{t} for t in range(len(x))]
    for (norm1, qkv, proj, scale1, norm2, mlp, scale2), count in zip(layers(name, backbone), r, strict=True):
        places = [
            None if min(s) < prefix else [sum(cells[t - prefix][i] for t in s) / len(s) for i in (0, 1)]
            for s in sources
        ]
        q, k, v = (heads(y) for y in qkv(norm1(x)))
        q, k = turned(name, backbone, q, places, grid), turned(name, backbone, k, places, grid)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        if proportional:
            for j, s in enumerate(sources):
                logits[:, :, j] += math.log(len(s))
        x = x + scale1(proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1)))
        x, sources = merge(x, k, sources, count, prefix)
        x = x + scale2(mlp(norm2(x)))
    x = seen.norm(x)
    rows = [next(i for i, s in enumerate(sources) if t in s) for t in range(prefix + len(cells))]
    return x[rows], sources


def merge(x, k, sources, r, prefix):
    metric = [key / key.norm() for key in k.mean(0)]
    r = min(r, (len(x) - prefix) // 2)
    if not r:
        return x, sources
    proposals = []
    for a in range(0, len(x), 2):
        scores = {b: float(metric[a] @ metric[b]) if b >= prefix else -math.inf for b in range(1, len(x), 2)}
        best = max(scores, key=scores.get, default=None)
        proposals.append((scores[best] if best is not None and a >= prefix else -math.inf, a, best))
    proposals.sort(key=lambda p: -p[0])
    partner = {a: b for _, a, b in proposals[:r]}
    unmerged = [a for _, a, _ in proposals[r:]]
    if prefix:
        unmerged.sort()
    new, of = [], []
    for b in [*unmerged, *range(1, len(x), 2)]:
        together = [b, *(a for a, other in partner.items() if other == b)]
        weights = [len(sources[t]) for t in together]
        new.append(sum(w * x[t] for w, t in zip(weights, together)) / sum(weights))
        of.append(set().union(*(sources[t] for t in together)))
    order = sorted(
        range(len(new)), key=lambda i: min(of[i]) if min(of[i]) < prefix else prefix
    )  # class, registers first
    return torch.stack([new[i] for i in order]), [of[i] for i in order]


def assert_close(name, found, expected):
    """In float64, but the libraries' rotary angles are float32: 6e-8 of a radian, through the blocks."""
    off = 2e-6 if name in ROTARY else 1e-9
    torch.testing.assert_close(found, expected, atol=off, rtol=off)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"r": 3}, {"r": (0, 5, 0, 2), "proportional": False}], ids=["r3", "list"])
@pytest.mark.parametrize("name", PREFIX)
def test_it_is_the_papers_equations_one_image_at_a_time(name, options):
    model, x = attach(name, **options), image(name, batch=3)
    features = model(x)
    r = (3,) * DEPTH if options["r"] == 3 else options["r"]
    for i in range(len(x)):
        backbone = HOSTS[name].build().double()
        tokens, sources = rewritten(name, backbone, x[i : i + 1], r, options.get("proportional", True))
        found = torch.cat([features.prefix[i], features.tokens[i]])
        assert_close(name, found, tokens)
        of = [s for s in sources if min(s) >= PREFIX[name]]
        assert features.aux["token_size"][i].tolist() == [len(s) for s in of]
        for t, place in enumerate(features.aux["patch_token"][i].tolist()):
            assert t + PREFIX[name] in of[place]


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-siglip", "timm-vit", "timm-distilled", "timm-dinov3"])
def test_an_odd_number_of_patches_and_more_merges_than_there_are_tokens(name):
    host = HOSTS[name].at(3 * 8, 5 * 8).double()
    model, x = adaptkit.attach(host, "tome", r=100).double().eval(), image(name, cells=(3, 5))
    features = model(x)
    counts = model.adapters["tome"].counts(15)
    assert counts == (7, 4, 2, 1)
    for i in range(len(x)):
        tokens, _ = rewritten(name, HOSTS[name].at(3 * 8, 5 * 8).double(), x[i : i + 1], (100,) * DEPTH)
        assert_close(name, torch.cat([features.prefix[i], features.tokens[i]]), tokens)
    assert features.aux["token_size"].tolist() == [[15.0]] * len(x)


# ------------------------------------------------------------------------------------------------- what it promises


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in sorted(HOSTS) if HOSTS[n].splits and "beit" not in n])
def test_nothing_merged_is_the_backbone_bit_for_bit_and_merged_patches_are_all_there(name):
    x = image(name, dtype=torch.float32)
    model = attach(name, dtype=torch.float32, r=3)
    features = model(x)
    with model.adapters["tome"].opened():
        opened = model(x)
    for r in (0, (0, 0)):
        nothing = attach(name, dtype=torch.float32, r=r)(x)
        plain = view(HOSTS[name].build()).features(x)
        for found in (nothing, opened):
            assert torch.equal(found.tokens, plain.tokens)
            assert torch.equal(found.prefix, plain.prefix)
            assert found.aux == {}
    size, token = features.aux["token_size"], features.aux["patch_token"]
    assert size.sum(1).tolist() == [plain.tokens.shape[1]] * len(x)
    assert torch.equal(torch.stack([t.bincount(minlength=size.shape[1]) for t in token]), size.long())
    assert features.tokens.shape == plain.tokens.shape
    for tokens, of in zip(features.tokens, token):  # patches in one token are copies, all others differ
        same = (tokens[:, None] == tokens[None]).all(-1)
        assert torch.equal(same, of[:, None] == of[None])


def test_the_schedule():
    def of(depth=12, **options):
        return schedule(ToMeConfig(**options), depth)

    assert of(r=8) == (8,) * 12
    assert of(depth=3, r=5, inflect=-1.0) == (10, 5, 0) == of(depth=3, r=(5, -1.0))
    assert of(depth=3, r=5, inflect=1) == (0, 5, 10)
    assert of(depth=4, r=7, inflect=0.5) == tuple(int(3 + 8 / 3 * i) for i in range(4)) == (3, 5, 8, 11)
    assert of(depth=4, r=[3, 1]) == (3, 1, 0, 0)
    assert of(depth=1, r=(4, -1.0)) == (8,)
    with pytest.raises(ValueError, match="5 blocks, the backbone has 4"):
        of(depth=4, r=(1,) * 5)
    for wrong, said in [
        ({"r": -1}, "r=-1 is no number of tokens"),
        ({"r": (8, -1)}, r"a pair \(r, inflect\) whose second number is a float"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": 4, "inflect": 2.0}, "inflect=2.0"),
        ({"r": (4, 4, 4), "inflect": 1.0}, "leave out one of them"),
    ]:
        with pytest.raises(ValueError, match=said):
            adaptkit.attach(HOSTS["timm-vit"].build(), "tome", **wrong)


class Between(BlockAdapter):
    """Stands for an adapter that changes patches after each block, or only looks at them."""

    def __init__(self, act):
        super().__init__(None, None)
        self.act = act

    def wrap(self, block, index, trace):
        return lambda x: self.act(block(x))


@torch.no_grad()
def test_tokens_that_somebody_changes_on_the_way_go_on_as_the_means_of_their_patches():
    from adaptkit.adapters.wrapped import wrapped

    model, x = attach("timm-dinov2-reg", r=3), image("timm-dinov2-reg")
    expected, own = model(x), model.adapters["tome"]
    copied = wrapped(model.vit, [own, Between(torch.clone)], {}).features(x)
    torch.testing.assert_close(copied.tokens, expected.tokens, atol=1e-10, rtol=1e-10)
    shift = torch.linspace(-1, 1, DIM, dtype=torch.float64)
    moved = wrapped(model.vit, [own, Between(lambda y: y + shift)], {}).features(x)
    assert not torch.allclose(moved.tokens, expected.tokens, atol=0.1)

    token = torch.tensor([[1, 0, 1, 2, 1], [0, 0, 0, 1, 2]])
    size = torch.stack([t.bincount() for t in token])[..., None].double()
    full = torch.randn(2, 2 + 5, 4, dtype=torch.float64)
    got = Stream(full[:, :5], size, token, None, full).at(full + 0)
    for i in range(2):
        rows = [*full[i, :2], *(full[i, 2:][token[i] == t].mean(0) for t in range(3))]
        torch.testing.assert_close(got[i], torch.stack(rows))


@torch.no_grad()
def test_images_of_a_batch_do_not_meet():
    model, x = attach("timm-dinov3", r=4), image("timm-dinov3", batch=3)
    together = model(x)
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]).tokens[0], together.tokens[i], atol=1e-10, rtol=1e-10)


def test_the_matching_has_no_gradient_and_what_is_merged_has_that_of_finite_differences_also_when_checkpointed():
    keys = torch.randn(2, HEADS, 9, 4, requires_grad=True)
    assert not any(isinstance(y, torch.Tensor) and y.requires_grad for y in Matching.of(keys, 2, 1))
    model, x = stirred(attach("timm-dinov3", "lora", r=3)), image("timm-dinov3", batch=1)
    p = next(p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n)
    weights = torch.randn(model(x).tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def value():
        return (model(x).tokens * weights).sum()

    (grad,) = torch.autograd.grad(value(), p)
    direction = torch.randn(p.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        p.add_(1e-6 * direction)
        up = value()
        p.sub_(2e-6 * direction)
        down = value()
        p.add_(1e-6 * direction)
    torch.testing.assert_close((up - down) / 2e-6, (grad * direction).sum(), rtol=1e-6, atol=1e-6)
    model.gradient_checkpointing_enable()
    (again,) = torch.autograd.grad(value(), p)
    torch.testing.assert_close(again, grad, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-vit", "hf-dinov3"])
def test_half_precision_and_autocast_merge_by_the_same_rule(name):
    x = image(name, dtype=torch.float32)
    exact = attach(name, dtype=torch.float32, r=3)(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attach(name, dtype=torch.float32, r=3)(x)
    half = attach(name, dtype=torch.bfloat16, r=3)(x)
    assert half.tokens.dtype == torch.bfloat16
    keys = torch.randn(2, 1, 17, 32, dtype=torch.bfloat16)  # of one head, whose mean rounds nothing
    for one, other in zip(Matching.of(keys, 3, 1)[:3], Matching.of(keys.float(), 3, 1)[:3]):
        assert torch.equal(one, other)
    for found in (mixed, half):
        assert found.tokens.isfinite().all()
        assert found.aux["token_size"].dtype == torch.float32
        assert found.aux["token_size"].shape == exact.aux["token_size"].shape
        assert found.aux["token_size"].sum(1).tolist() == [16.0, 16.0]


@torch.no_grad()
def test_its_file_has_a_config_and_no_tensors(tmp_path):
    model, x = attach("timm-vit", dtype=torch.float32, r=[3, 2], proportional=False), image("timm-vit").float()
    assert not [p for p in model.parameters() if p.requires_grad]
    model.save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert list(file.keys()) == []
        assert '"tome"' in json.dumps(file.metadata()).replace("\\", "")
    again = adaptkit.attach(HOSTS["timm-vit"].build(), tmp_path)
    assert again.adapters["tome"].config == ToMeConfig(r=(3, 2), proportional=False)
    assert torch.equal(again(x).tokens, model(x).tokens)
    with pytest.raises(ValueError, match="tome changes what the blocks compute"):
        model.extract(x)


def test_hosts_on_which_merging_is_not_defined_are_refused_with_the_reason():
    from timm.models.swin_transformer import SwinTransformer

    for name in ("timm-beit", "timm-beit-shared", "hf-beit", "hf-beit-shared"):
        host = HOSTS[name].build()
        with pytest.raises(TypeError, match=rf"{type(host).__name__} adds a bias for each pair of places.*'adavit'"):
            adaptkit.attach(host, "tome")
    with pytest.raises(TypeError, match="rotary positions of .* known at whole patches alone; attach it to timm's"):
        adaptkit.attach(TOWERS["DINOv3 of torch.hub"].build(), "tome")
    with pytest.raises(TypeError, match="VisionTransformerSAM does not come apart"):
        adaptkit.attach(HOSTS["timm-sam"].build(), "tome")
    with pytest.raises(TypeError, match="one width and one grid.*SwinTransformer has stages"):
        adaptkit.attach(SwinTransformer(64, embed_dim=16, depths=(1, 1), num_heads=(1, 2)), "tome")
    for pair in (("adavit", "tome"), ("tome", "adavit")):
        with pytest.raises(ValueError, match="only one adapter of this kind"):
            adaptkit.attach(HOSTS["timm-vit"].build(), *pair)


def test_a_refused_backbone_is_as_it_was():
    host = HOSTS["timm-beit"].build().train()
    before = [(n, p.requires_grad) for n, p in host.named_parameters()]
    with pytest.raises(TypeError):
        adaptkit.attach(host, "tome")
    assert [(n, p.requires_grad) for n, p in host.named_parameters()] == before
    assert host.training


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-vit", "timm-siglip", "timm-dinov2-reg", "hf-dinov2", "timm-dinov3"])
@pytest.mark.parametrize("r", [0, 3, (0, 7, 0, 100)])
def test_macs_are_what_is_multiplied(name, r):
    model, x = attach(name, dtype=torch.float32, r=r), image(name, batch=1, dtype=torch.float32)
    costs = accounting.costs(model, tuple(x.shape[-2:]))
    found = []
    counted = accounting.counted(lambda: found.append(model(x)))
    spent = accounting.macs(costs, found[0].aux)
    assert spent.tolist() == pytest.approx([counted], rel=1e-9)
    plain = view(HOSTS[name].build().requires_grad_(False))
    assert costs.dense == accounting.counted(lambda: plain.logits(plain.features(x)))
    assert (float(spent) < costs.dense) == (r != 0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-dinov2-reg", "hf-dinov3", "timm-siglip"])
def test_no_shape_depends_on_what_is_in_an_image_so_that_no_device_is_waited_for(name):
    model, x = attach(name, dtype=torch.float32, r=3), image(name, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):  # raises where a number is asked for
        shapes = [tuple(y.shape) for y in (model(x + 0).tokens, model(x + 0).aux["token_size"])]
    assert shapes == [(2, 16, DIM), (2, 16 - sum(model.adapters["tome"].counts(16)))]


@pytest.mark.full
def test_it_goes_to_onnx_with_an_open_batch(tmp_path):
    pytest.importorskip("onnxruntime")
    from adaptkit.export import to_onnx

    model = attach("timm-dinov2-reg", dtype=torch.float32, r=3)
    assert to_onnx(model, tmp_path / "tome.onnx", (56, 56)).exists()  # which has compared it with the model
