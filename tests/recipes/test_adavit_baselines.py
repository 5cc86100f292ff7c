"""AdaViT's baselines: at equal MACs, decided without looking, trained alike; one table of them all."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from families import HOSTS, randomise
from runs import ended_by

import adaptkit
from adaptkit.adapters.adavit import AdaViT, Random
from adaptkit.analysis import accounting
from recipes import ablation, adavit, adavit_baselines
from recipes.adavit_policies import WAYS, at_random, by_depth, prepared, warn_out_of_reach

pytest.importorskip("matplotlib")

SIZE = (64, 64)


def model(**options):
    torch.manual_seed(0)
    return adaptkit.attach(HOSTS["timm-vit"].build(), ("adavit", {"bottleneck": 4, **options}))


def images(count, seed=0):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("budget", [0.4, 0.55, 0.7, 0.95, 1.0])
def test_static_keeps_the_first_sub_layers_and_as_many_as_the_budget_allows(budget):
    costs = accounting.costs(model(), SIZE)
    keep = by_depth(costs, budget)
    whole = keep.amin(1).bool().tolist()
    blocks = whole.index(False) if False in whole else len(keep)
    assert bool(keep[:blocks].all())
    assert not keep[blocks + 1 :].any()

    def spent(kept):
        ones = {"patch_keep": torch.ones(1, 3, costs.rows - costs.prefix), "head_keep": torch.ones(1, 3, 2)}
        return float(accounting.macs(costs, {**ones, "layer_keep": kept[None]})) / costs.dense

    assert spent(keep) <= budget
    more = keep.clone()
    if blocks < len(keep):
        more[blocks] = torch.tensor([0.0, 1.0]) if not keep[blocks].any() else torch.ones(2)
        cheaper = keep.clone()
        cheaper[blocks] = torch.tensor([1.0, 0.0])
        assert min(spent(more), spent(cheaper) if not keep[blocks].any() else 9.0) > budget


def test_below_what_the_blocks_without_gates_cost_static_leaves_all_others_out():
    assert not by_depth(accounting.costs(model(), SIZE), 0.05).any()


@pytest.mark.parametrize("host", ["timm-vit", "timm-eva02"])
@pytest.mark.parametrize("gates", [("head",), ("patch",), ("layer",), ("patch", "head", "layer")])
def test_a_budget_that_no_decision_meets_is_warned_of(host, gates, recwarn):
    torch.manual_seed(0)
    adapted = adaptkit.attach(HOSTS[host].build(), ("adavit", {"gates": gates}))
    costs = accounting.costs(adapted, SIZE)
    with AdaViT.of(adapted).deciding(Random(0.0, 0.0, 0.0)):
        least = float(accounting.macs(costs, adapted(images(1)).aux)) / costs.dense
    warn_out_of_reach(costs, least + 1e-6)
    assert not recwarn
    if least > 1e-3:
        with pytest.warns(UserWarning, match=rf"with all gates shut \({', '.join(gates)}\) {least:.0%}"):
            warn_out_of_reach(costs, least - 1e-6)
    if gates == ("head",) and host == "timm-eva02":  # whose heads do not come apart
        assert least > 0.99


@pytest.mark.parametrize("training", [False, True])
def test_static_is_in_the_gates_themselves_and_the_same_for_every_image(training):
    static = model()
    randomise(static.adapters)
    costs = accounting.costs(static, SIZE)
    assert prepared(static, "static", 0.6, SIZE, 0) is None
    static.train(training)
    keep, aux = by_depth(costs, 0.6), static(images(5)).aux
    assert torch.equal(aux["layer_keep"], keep.expand(5, -1, -1))
    assert aux["patch_keep"].all()
    assert aux["head_keep"].all()
    trained = {n for n, p in AdaViT.of(static).named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith("bottlenecks") for n in trained)


@pytest.mark.parametrize("gates", [("patch", "head", "layer"), ("layer",), ("patch", "head")])
def test_random_decisions_cost_the_budget(gates):
    one = model(gates=list(gates)).eval()
    costs, budget = accounting.costs(one, SIZE), 0.7
    policy = prepared(one, "random", budget, SIZE, seed=3)
    assert len(set(policy.rates)) == 1
    with torch.no_grad(), AdaViT.of(one).deciding(policy):
        spent = accounting.macs(costs, one(images(400)).aux) / costs.dense
    error = float(spent.std()) * (1 / 400 + 1 / 256) ** 0.5  # of two means: these images and those of the search
    assert float(spent.mean()) == pytest.approx(budget, abs=4 * error)


def test_the_rate_of_random_decisions_is_the_same_for_every_seed():
    costs = accounting.costs(model(), SIZE)
    assert at_random(costs, 0.5, 1).rates == at_random(costs, 0.5, 2).rates
    assert isinstance(at_random(costs, 0.5, 1), Random)


@pytest.mark.parametrize(
    ("options", "policy", "message"),
    [
        ({"bottleneck": 0}, "random", "--policy random trains the bottlenecks, and there are none"),
        ({"gates": ["patch"]}, "static", "--policy static leaves out sub-layers, and gates is"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options, policy, message):
    with pytest.raises(ValueError, match=message):
        prepared(model(**options), policy, 0.5, SIZE, 0)


def test_all_ways_at_every_budget_are_compared_with_the_gates_at_that_budget():
    table = adavit_baselines.table([0.4, 0.7], {"bottleneck": 4}, list(WAYS))
    assert len(table.rows) == 1 + 2 * len(WAYS)
    for row in table.rows[1:]:
        at = row.name.rpartition(", ")[2]
        assert table.base_of(row) == ("" if row.series == "adaptive" else f"adaptive, {at}")
    runs = ablation.planned(table, "adavit", [0, 1], Path("o"), ["--data", "digits"])
    assert len(runs) == 2 * 2 * 6
    found = {name: adavit.parse(asked.arguments) for (name, seed), asked in runs.items() if seed == 1}
    assert found["random+, 40%"].policy == "random"
    assert found["static by depth, 70%"].policy == "static"
    assert found["heads alone, 40%"].options == {"bottleneck": 4, "gates": ["head"]}
    assert {name: args.budget for name, args in found.items()} == {
        name: int(name.rpartition(", ")[2][:-1]) / 100 for name in found
    }
    with pytest.raises(ValueError, match="compared with adaptive; add it"):
        adavit_baselines.table([0.5], {}, ["static"])
    with pytest.raises(ValueError, match="--budget names one budget twice: 0.5, 0.5"):
        adavit_baselines.table([0.5, 0.5], {}, ["adaptive"])


@pytest.fixture
def listed(tmp_path):
    rng, rows = np.random.default_rng(0), []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{tmp_path}/{i}.png {i % 2}")
    (tmp_path / "list.txt").write_text("\n".join(rows))
    return str(tmp_path / "list.txt")


def test_several_budgets_are_a_table_of_runs_that_are_made_once(listed, tmp_path, monkeypatch, capsys):
    made = []

    def call(command):
        made.append(Path(command[command.index("--out") + 1]).name)
        adavit.main(command[3:])
        return 0

    ended_by(monkeypatch, call)
    monkeypatch.setattr("recipes.adavit_model.create_backbone", lambda name: HOSTS["timm-vit"].build())
    out = tmp_path / "out"
    given = ["--data", listed, "--val", listed, "--size", "64", "--mean", "0.5", "--std", "0.5", "--steps", "1", "--head-steps", "1", "--batch-size", "2",
             "--budget", "0.6", "0.9", "--seeds", "0", "--ways", "adaptive", "random", "random+", "static", "--out", str(out)]  # fmt: skip
    adavit.main(given)
    assert len(made) == 2 * 3
    said = capsys.readouterr().out
    text = (out / "table.md").read_text()
    assert text in said
    for row in ("dense", "adaptive, 60%", "random, 60%", "random+, 90%", "static by depth, 90%"):
        assert f"| {row} |" in text
    assert "to adaptive" in text
    assert (out / "chart.svg").is_file()
    static = json.loads((out / "static-by-depth-60-seed0" / "result.json").read_text())
    assert static["macs"]["mean"] <= 0.6
    assert set(static["accuracy"]) == {"dense", "static"}
    assert static["packed_minus_masked"] <= 1e-5
    saved = adaptkit.attach(HOSTS["timm-vit"].build(), out / "static-by-depth-60-seed0" / "adapter").eval()
    kept = saved(images(3)).aux["layer_keep"]
    assert torch.equal(kept, kept[:1].expand(3, -1, -1))
    assert not kept[0, -1].any()
    random = json.loads((out / "randomwith-60-seed0" / "result.json").read_text())
    assert set(random["accuracy"]) == {"dense", "random+"}
    assert not (out / "randomwith-60-seed0" / "adapter").exists()
    made.clear()
    adavit.main(given)
    assert made == []


@pytest.mark.parametrize("more", [["--policy", "static"], ["--seed", "1"], ["--overwrite"]])
def test_what_a_comparison_sets_cannot_be_given(more, capsys):
    with pytest.raises(SystemExit):
        adavit.main(["--data", "digits", "--seeds", "0", "1", *more])
    assert f"{more[0]} is set for each run of a comparison" in capsys.readouterr().err
