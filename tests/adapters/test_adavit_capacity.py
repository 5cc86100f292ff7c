"""AdaViT where reading a number waits for the device: packed to sizes that are known beforehand, and exact all the same.

Under ``reference()`` a CPU counts as such a device, so that what runs on a GPU runs here on real numbers.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from errors import assert_rounds_to, transformer
from fake_cuda import Questions, fake_cuda, moved
from families import DEPTH, HOSTS

import adaptkit
from adaptkit.adapters.adavit import Decision, Random, adapter, gain
from adaptkit.adapters.adavit.capacity import EVERYTHING, STEPS, Capacities, Capacity
from adaptkit.seam import reference

SUMS = transformer(4, 32, 21)
NAMES = ["timm-vit", "timm-siglip", "timm-dinov2-reg", "timm-dinov3", "hf-dinov3", "timm-beit", "hf-dinov2"]


@pytest.fixture(autouse=True)
def _as_on_a_gpu():
    with reference(), torch.no_grad():
        yield


def build(name="timm-vit", **options):
    torch.manual_seed(1)
    model = adaptkit.attach(HOSTS[name].build(), ("adavit", {"first_block": 0, "execution": "packed", **options}))
    g = torch.Generator().manual_seed(3)
    for p in model.adapters["adavit"].parameters():
        p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return model.eval()


def images(name="timm-vit", count=4):
    side = HOSTS[name].size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def off(index, own):
    return Decision(*(None if keep is None else torch.zeros_like(keep) for keep in own))


def on(index, own):
    return Decision(*(None if keep is None else torch.ones_like(keep) for keep in own))


def alternating(index, own):
    """Sub-layers of every second block, and of every second image in the others."""
    layer = torch.ones_like(own.layer) * (index % 2)
    layer[::2] = 1
    return own._replace(layer=layer)


POLICIES = {"gates": None, "random": Random(0.4, 0.5, 0.6), "off": off, "on": on, "alternating": alternating}


def outputs(features):
    return [features.prefix, features.tokens]


def compared(model, x, policy):
    """Masked and packed outputs under the same decisions, the packed ones with what the forward before has measured."""
    gates = model.adapters["adavit"]
    with gates.deciding(policy), gates.executing("masked"):
        masked = model(x)
    with gates.deciding(gates.given(masked.aux)):
        unknown = model(x)
        assert gates.capacities.of(0) is not None
        return masked, unknown, model(x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{}, {"head_mode": "partial"}, {"last_block": "class"}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_masked(name, options, policy):
    if options.get("last_block") == "class" and name == "timm-siglip":
        pytest.skip("no class token")
    masked, *packed = compared(build(name, **options), images(name), POLICIES[policy])
    for features in packed:
        assert_rounds_to(outputs(features), outputs(masked), *SUMS)
    assert not [key for key in packed[-1].aux if key.startswith("adavit.")]


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_rows_go_through_the_layers(count):
    model, seen = build(), []
    gates, x = model.adapters["adavit"], images(count=count)
    block = model.backbone.blocks[2]
    block.mlp.fc1.register_forward_hook(lambda module, given, out: seen.append(given[0].shape[:-1].numel()))
    with gates.deciding(Random(0.4, 0.5, 0.6)), gates.executing("masked"):
        masked = model(x)
    with gates.deciding(gates.given(masked.aux)):
        model(x)
        model(x)
    kept = (masked.aux["patch_keep"][:, 2].sum(1) + 1) * masked.aux["layer_keep"][:, 2, 1]
    rows = 17 * count
    assert seen[:2] == [rows, rows]
    assert kept.sum() <= seen[2] <= kept.sum() * 1.125 + rows / STEPS + 1


@pytest.mark.parametrize("kind", ["images", "tokens", "rows"])
def test_a_block_with_more_on_than_its_capacity_makes_the_forward_run_again(kind):
    model = build(gates=("patch", "layer"))
    gates, x = model.adapters["adavit"], images()
    masked, *_ = compared(model, x, Random(0.7, 1.0, 0.9, seed=2))
    small = EVERYTHING._replace(**{kind: 2})
    gates.capacities._now[1] = small
    with gates.deciding(gates.given(masked.aux)):
        with Questions() as first:
            features = model(x)
        assert getattr(gates.capacities.of(1), kind) > 2
        with Questions() as second:
            model(x)
    assert_rounds_to(outputs(features), outputs(masked), *SUMS)
    assert (first.asked, second.asked) == (["tolist"] * 2, ["tolist"])  # once in each of two forwards, then in one


def test_a_sub_layer_that_was_off_everywhere_may_come_back():
    model = build()
    compared(model, images(), off)
    assert model.adapters["adavit"].capacities.of(2) == (0, 0, 0)
    masked, *packed = compared(model, images(), on)
    for features in packed:
        assert_rounds_to(outputs(features), outputs(masked), *SUMS)


def test_the_device_is_asked_once_in_a_forward():
    model, x = build(), images()
    for _ in range(2):
        with Questions() as questions:
            model(x)
        assert questions.asked == ["tolist"]


def test_another_size_and_another_batch_are_exact_too():
    model = build("timm-dinov2-reg")
    gates = model.adapters["adavit"]
    for count, side in ((4, 56), (3, 70), (1, 42)):
        x = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        with gates.executing("masked"):
            masked = model(x)
        with gates.deciding(gates.given(masked.aux)):
            assert_rounds_to(outputs(model(x)), outputs(masked), *SUMS)


def test_everything_on_is_compared_at_full_size_whatever_was_kept_before():
    model = build()
    compared(model, images(), off)
    assert model.verify(images()) <= 1e-5


def test_under_a_side_adapter_the_whole_pass_runs_again():
    torch.manual_seed(1)
    parts = [("adavit", {"first_block": 0, "execution": "packed"}), ("vit-adapter", {"conv_inplane": 8})]
    model = adaptkit.attach(HOSTS["timm-vit"].build(), *parts).eval()
    gates, x = model.adapters["adavit"], images()
    gates.capacities._now = dict.fromkeys(range(DEPTH), Capacity(4, 4, 4))
    packed = model(x)
    with gates.executing("masked"):
        masked = model(x)
    assert_rounds_to(list(packed.maps), list(masked.maps), *SUMS)


def test_with_gradients_everything_is_masked():
    model, x = build(), images()
    with torch.enable_grad(), Questions() as questions:
        features = model(x)
    assert questions.asked == []
    with model.adapters["adavit"].executing("masked"):
        assert_rounds_to(outputs(features), outputs(model(x)), *SUMS)


def test_where_processes_run_in_step_none_runs_a_forward_again():
    class Whole:
        def run_whole(self, run, x):
            return run(x)

    model, x = build(), images()
    compared(model, x, off)
    model.vit.sharded = [Whole()] * DEPTH
    with Questions() as questions:
        features = model(x)
    assert questions.asked == []
    with model.adapters["adavit"].executing("masked"):
        assert torch.equal(features.tokens, model(x).tokens)


# ------------------------------------------------------------------------------------------------- whether it pays


@pytest.fixture
def measured(monkeypatch):
    """Times that somebody has measured."""

    def say(*times):
        monkeypatch.setattr(gain, "_measured", {})
        monkeypatch.setattr(gain, "_measure", lambda masked, packed: gain.Gain(*times))

    return say


def ran(model, x, monkeypatch):
    """How many blocks were packed, and what the backbone asked."""
    there, packed = adapter.packed_to, []
    monkeypatch.setattr(
        adapter, "packed_to", lambda capacity, **more: packed.append(capacity) or there(capacity, **more)
    )
    with Questions() as questions:
        model(x)
    monkeypatch.setattr(adapter, "packed_to", there)
    return len(packed), len(questions.asked)


def test_auto_packs_where_that_is_faster(measured, monkeypatch):
    measured(1.0, 0.2, 1.0)  # from a share of 0.8 on it is not
    model, x = build(execution="auto"), images()
    gates = model.adapters["adavit"]
    with gates.deciding(Random(0.4, 0.5, 0.6)):
        assert ran(model, x, monkeypatch) == (0, 1)  # it measures what is kept
        assert ran(model, x, monkeypatch)[0] == DEPTH
    gates.capacities = Capacities()
    with gates.deciding(on):
        assert [ran(model, x, monkeypatch) for _ in range(2)] == [(0, 1), (0, 1)]


def test_where_packing_never_is_faster_nothing_is_asked(measured, monkeypatch):
    measured(1.0, 1.1, 1.0)
    model = build(execution="auto")
    assert [ran(model, images(), monkeypatch) for _ in range(2)] == [(0, 0), (0, 0)]


def test_it_is_measured_once_for_each_shape(monkeypatch):
    timed = []
    monkeypatch.setattr(gain, "_measured", {})
    monkeypatch.setattr(gain, "seconds", lambda run: timed.append(run().shape) or float(len(timed)))
    model = build(execution="auto")
    for _ in range(2):
        model(images(count=3))
        model(images(count=2))
    assert [shape[0] for shape in timed] == [3, 3, 3, 2, 2, 2]


def test_nothing_is_timed_on_fake_tensors(monkeypatch):
    monkeypatch.setattr(gain, "_measured", {})
    monkeypatch.setattr(gain, "seconds", lambda run: pytest.fail("timed"))
    model = build(execution="auto")
    with fake_cuda() as mode:
        moved(model, mode)
        model(torch.empty(2, 3, 32, 32, device="cuda"))
    assert gain._measured == {}


def test_the_gain_is_a_line_through_what_was_measured():
    times = iter((3.0, 2.0, 2.5))  # all of it and half of it packed, and masked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "seconds", lambda run: next(times))
        found = gain._measure(None, None)
    assert found == pytest.approx((2.5, 1.0, 2.0))
    assert found.is_profitable(0.7)
    assert not found.is_profitable(0.8)


# ---------------------------------------------------------------------------------------------------- capacities


def test_a_capacity_is_a_share_of_any_batch():
    x = torch.empty(3, 17, 8)
    assert EVERYTHING.of(x) == (3, 17, 51)
    assert Capacity(8, 1, 8).of(x) == (2, 2, 26)
    assert EVERYTHING.share == pytest.approx(1)


def test_capacities_follow_what_was_kept_lately():
    capacities = Capacities()
    assert capacities.of(0) is None
    assert not capacities.learn({0: [1.0, 0.5, 0.25, 0.0], 1: [0.0, 0.0, 0.0, 0.0]})
    assert capacities.of(0) == (16, 9, 5)
    assert capacities.of(1) == (0, 0, 0)
    capacities.learn({0: [0.5, 0.6, 0.1, 0.0]})
    assert capacities.of(0) == (16, 11, 5)
    assert capacities.learn({0: [0.5, 1.0, 0.1, 1.0]})  # too many
    assert capacities.of(0) is None
    for _ in range(100):
        capacities.learn({0: [0.1, 0.1, 0.1, 0.0]})
    assert capacities.of(0) == (2, 2, 2)
