"""DAT-KV: identity at the start, gradients, rotary and relative positions of moved keys, what is refused."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import HOSTS, randomise

import adaptkit
from adaptkit.adapters.dat import DATConfig
from adaptkit.core.registry import view
from adaptkit.core.view import Spec

SPLIT = sorted(n for n, h in HOSTS.items() if h.splits)
VARIETY = ["timm-vit", "timm-dinov2-reg", "timm-siglip", "timm-dinov3", "timm-rope-mixed", "timm-beit", "hf-dinov3"]
ROTARY = ["timm-eva02", "timm-dinov3", "timm-pe", "timm-rope-mixed", "timm-eva-gqa", "hf-dinov3"]


def attach(name, seed=1, **options):
    host = HOSTS[name].build()
    torch.manual_seed(seed)
    return adaptkit.attach(host, "dat", **options)


def image(name, cells=None, batch=2):
    patch = view(HOSTS[name].build()).spec.patch_size
    cells = cells or (HOSTS[name].size // patch,) * 2
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, cells[0] * patch, cells[1] * patch, generator=g)


@torch.no_grad()
@pytest.mark.parametrize("cells", [None, (3, 5), (1, 1), (1, 4)])
@pytest.mark.parametrize(
    ("name", "bias"), [(n, "table") for n in SPLIT] + [(n, b) for n in VARIETY for b in ("log-cpb", None)]
)
def test_replace_is_the_frozen_attention_within_1e_5_before_training(name, cells, bias):
    x = image(name, cells)
    expected = view(HOSTS[name].build()).features(x).tokens
    tokens = attach(name, mode="replace", bias=bias).eval()(x).tokens
    torch.testing.assert_close(tokens, expected, atol=1e-5 * float(expected.std()), rtol=1e-5)


@pytest.mark.parametrize("bias", ["table", "log-cpb", None])
@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("name", VARIETY)
def test_within_four_sgd_steps_every_tensor_has_a_gradient_above_rounding(name, mode, bias):
    # Above rounding: the same gradient in float64 and float32. Without offsets (replace) every point lies on a kink of
    # the interpolation, where rounding picks the slope to its left or right; both are gradients, hence the half.
    grads = []
    for dtype in (torch.float32, torch.float64):
        model = attach(name, mode=mode, bias=bias).to(dtype).train()
        x = image(name).to(dtype)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(trained.values(), lr=0.1)
        most = dict.fromkeys(trained, 0.0)
        for _ in range(4):
            optimizer.zero_grad()
            tokens = model(x).tokens
            (tokens * torch.linspace(-1, 1, tokens.numel(), dtype=dtype).view_as(tokens)).mean().backward()
            for n, p in trained.items():
                most[n] = max(most[n], float(p.grad.norm()))
            optimizer.step()
        grads.append(most)
    for n in grads[0]:
        assert grads[1][n] > 1e-12, n
        assert math.isclose(grads[0][n], grads[1][n], rel_tol=1e-2 if mode == "add" else 0.5), (
            n,
            grads[0][n],
            grads[1][n],
        )


@torch.no_grad()
@pytest.mark.parametrize("cells", [(4, 4), (3, 5), (2, 9)])
@pytest.mark.parametrize("name", ROTARY)
def test_between_the_cells_keys_turn_by_the_rule_of_the_host(name, cells):
    vit = view(HOSTS[name].build())
    tokens, blocks = vit.begin(image(name, cells))
    here = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in cells), indexing="ij"), -1).flatten(0, 1)
    for block in blocks:
        h = block.norm1(tokens)
        q, k, _ = (t[:, :, vit.spec.num_prefix_tokens :] for t in block.qkv(h))
        bare_q, bare_k, _ = (
            t[:, :, vit.spec.num_prefix_tokens :] for t in block.qkv_at(h, torch.full((h.shape[1],), -1))
        )
        torch.testing.assert_close(block.rotate(bare_q, here), q, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(block.rotate(bare_k, here), k, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_two_half_turns_are_a_whole_one_where_angles_count_from_the_first_cell():
    vit = view(HOSTS["timm-eva02"].build())
    block = vit.begin(image("timm-eva02"))[1][0]
    x = torch.randn(1, 2, 1, 16)
    half = torch.tensor([[0.5, 1.0]])
    torch.testing.assert_close(block.rotate(block.rotate(x, half), half), block.rotate(x, 2 * half))


def shift_by_one_cell(model, index, cells):
    """Make every point of a block lie one cell further right, whatever the image says."""
    own = model.adapters["dat"].blocks[str(index)]
    net = own.conv_offset
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net[1].norm.bias.fill_(1.0)
        gelu = float(torch.nn.functional.gelu(torch.ones(1)))
        net[3].weight[1].fill_(2.0 / cells[1] / gelu / net[3].weight.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm-vit", "timm-dinov3", "timm-rope-mixed", "timm-beit", "timm-siglip", "hf-beit"])
def test_keys_moved_by_one_cell_are_the_neighbours_keys(name):
    cells = (4, 4)
    model = attach(name, mode="replace", bias=None, blocks=(0,), offset_range=None).eval()
    shift_by_one_cell(model, 0, cells)
    adapter = model.adapters["dat"]
    tokens, blocks = model.vit.begin(image(name))
    block = replace(blocks[0], grid=cells)
    h = block.norm1(tokens)
    prefix = model.spec.num_prefix_tokens
    keys = adapter.blocks["0"].keys(block, h)
    q, k, v = block.qkv(h)
    there = (torch.arange(16).view(4, 4)[:, [1, 2, 3, 3]]).flatten() + prefix  # the last column stays in the map
    # A point half a cell beyond the last centre lies on the border: the last key, rotated to that edge.
    inside = torch.arange(16).view(4, 4)[:, :3].flatten() + prefix
    torch.testing.assert_close(keys.v[:, :, prefix:], v[:, :, there], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(keys.k[:, :, inside], k[:, :, inside + 1], atol=1e-5, rtol=1e-4)
    if block.bias is not None:
        expected = block.bias.expand(2, -1, -1, -1)[..., inside + 1]
        torch.testing.assert_close(keys.bias[..., inside], expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(keys.k[:, :, :prefix], k[:, :, :prefix])
    torch.testing.assert_close(keys.q, q, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_bias_is_added_between_patches_only():
    model = randomise(attach("timm-dinov2-reg"))
    block = replace(model.vit.begin(image("timm-dinov2-reg"))[1][0], grid=(4, 4))
    keys = model.adapters["dat"].blocks["0"].keys(block, torch.randn(1, 21, 32))
    assert keys.bias.shape == (1, 2, 21, 21)
    assert (keys.bias[:, :, :5] == 0).all()
    assert (keys.bias[..., :5] == 0).all()
    assert (keys.bias[:, :, 5:, 5:] != 0).any()


@torch.no_grad()
def test_a_stride_of_two_has_a_quarter_of_the_keys():
    model = attach("timm-vit", stride=2).eval()
    assert model(image("timm-vit", (4, 6))).aux["points.0"].shape == (2, 2, 2, 3, 2)


@torch.no_grad()
@pytest.mark.parametrize(("kernel", "stride"), [(5, 1), (5, 2), (3, 2), (2, 2)])
def test_without_offsets_the_points_are_those_of_offsets_that_are_zero(kernel, stride):
    """Ablated: no offset network, and the keys stay where a network that says zero leaves them."""
    options = {"kernel_size": kernel, "stride": stride, "mode": "add"}
    moved = attach("timm-vit", **options).eval()
    still = attach("timm-vit", **options, offset_range=0).eval()
    randomise(moved.adapters)
    own = still.adapters.state_dict()
    assert not any("conv_offset" in key for key in own)
    for block in moved.adapters["dat"].blocks.values():
        block.conv_offset[-1].weight.zero_()
    still.adapters.load_state_dict({k: v for k, v in moved.adapters.state_dict().items() if k in own})
    x = image("timm-vit", (3, 5))
    one, other = moved(x), still(x)
    assert torch.equal(one.aux["points.2"], other.aux["points.2"])
    assert torch.equal(one.tokens, other.tokens)


def test_without_offsets_a_grid_that_has_no_key_is_refused():
    with pytest.raises(ValueError, match="kernel_size=4 and stride=4 make no key of 3 cells"):
        attach("timm-vit", kernel_size=4, stride=4, offset_range=0)(image("timm-vit", (3, 5)))


@torch.no_grad()
def test_points_of_every_chosen_block_are_reported():
    model = attach("timm-vit", blocks=(1, -1)).eval()
    assert set(model(image("timm-vit")).aux) == {"points.1", "points.3"}


@torch.no_grad()
def test_points_stay_in_float32_where_the_backbone_is_bfloat16():
    host = HOSTS["timm-dinov3"].build().bfloat16()
    model = adaptkit.attach(host, "dat").eval()
    features = model(image("timm-dinov3"))
    assert features.tokens.dtype == torch.bfloat16
    assert features.aux["points.0"].dtype == torch.float32


@torch.no_grad()
def test_replace_agrees_with_the_backbone_under_autocast():
    x = image("timm-vit")
    with torch.autocast("cpu", torch.bfloat16):
        expected = view(HOSTS["timm-vit"].build()).features(x).tokens
        tokens = attach("timm-vit", mode="replace").eval()(x).tokens
    torch.testing.assert_close(tokens.float(), expected.float(), atol=0.05, rtol=0.05)


def test_a_block_of_a_small_vit_has_the_parameters_of_the_specification():
    # 14x14, three groups, kernel 5: 3,840 for the offsets, 4,374 for the table, 384 for the gate.
    spec = Spec("timm-vit", embed_dim=384, depth=12, num_heads=6, patch_size=16, num_prefix_tokens=1)
    adapter = adaptkit.core.registry.adapters()["dat"].module(spec, DATConfig())
    assert sum(p.numel() for p in adapter.parameters()) == 12 * 8598


@pytest.mark.parametrize(
    ("blocks", "chosen"), [(None, [0, 1, 2, 3]), (2, [2, 3]), ((0, -1), [0, 3]), (9, [0, 1, 2, 3])]
)
def test_blocks_are_all_the_last_few_or_by_index(blocks, chosen):
    assert list(attach("timm-vit", blocks=blocks).adapters["dat"].config.blocks) == chosen


def test_groups_are_three_or_divide_the_heads():
    def groups(heads):
        return (
            DATConfig()
            .resolve(Spec("any", embed_dim=heads * 8, depth=1, num_heads=heads, patch_size=16, num_prefix_tokens=1))
            .groups
        )

    assert [groups(h) for h in (1, 2, 3, 6, 8, 12, 16)] == [1, 2, 3, 3, 2, 3, 2]


def test_the_file_keeps_the_convention_and_the_grid_of_the_table(tmp_path):
    attach("timm-vit").save(tmp_path)
    config = adaptkit.load(tmp_path).header["adapters"][0]["config"]
    assert (config["convention"], config["bias_grid"]) == ("exact", 14)


@torch.no_grad()
def test_one_file_fits_the_timm_and_the_transformers_copy(tmp_path):
    model = attach("timm-vit").eval()
    randomise(model.adapters)
    model.save(tmp_path)
    with pytest.warns(UserWarning, match="other"):
        again = adaptkit.attach(HOSTS["hf-vit"].build(), tmp_path)
    own = model.adapter_state_dict()
    assert all(torch.equal(v, own[k]) for k, v in again.adapter_state_dict().items())


def test_a_host_whose_attention_does_not_come_apart_is_refused():
    with pytest.raises(TypeError, match=r"dat steps inside the attention, and that of VisionTransformerSAM"):
        attach("timm-sam")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"groups": 5}, "groups=5 does not divide heads=2"),
        ({"blocks": (4,)}, r"blocks=\(4,\) are not among the 4 blocks"),
        ({"offset_range": -1.0}, "offset_range=-1.0 must be positive, 0 for points that stay, or None"),
        ({"offset_range": 0, "bias": None, "mode": "replace"}, "has nothing to train; give a bias"),
        ({"mode": "mix"}, "mode='mix' is not a choice"),
        ({"stride": 0}, "stride=0 must be positive"),
    ],
)
def test_options_that_do_not_fit_say_so(options, words):
    with pytest.raises(ValueError, match=words):
        attach("timm-vit", **options)
