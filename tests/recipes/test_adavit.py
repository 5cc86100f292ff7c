"""The AdaViT recipe, small: it ends with a table, a file that attaches, and pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda import Stalls

import adaptkit
from adaptkit.losses import KINDS, agreement_loss
from recipes import adavit, adavit_scores, adavit_training, labelled, record
from recipes.labelled import open_labelled

SMALL = ["--size", "32", "--steps", "4", "--head-steps", "20", "--batch-size", "16"]


@pytest.fixture(scope="module", autouse=True)
def fewer_digits():
    """Every sixth of them."""
    whole = labelled._digits_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled, "_digits_of", lambda split: tuple(part[::6] for part in whole(split)))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    adavit.main(["--data", "digits", *SMALL, "--out", str(out)])
    return out


def test_it_ends_with_scores_at_the_budget(finished):
    result = json.loads((finished / "result.json").read_text())
    assert set(result["accuracy"]) == {"dense", "adaptive", "random"}
    assert result["macs"]["mean"] <= 0.55
    assert result["random_macs"] == pytest.approx(result["macs"]["mean"], abs=0.03)
    assert result["packed_minus_masked"] <= 1e-5


def test_what_was_trained_in_bfloat16_is_scored_in_float32(tmp_path):
    data, seen = open_labelled("digits", "train", 32), []
    args = adavit.parse(["--data", "digits", *SMALL, "--steps", "1", "--out", str(tmp_path)])
    model = adavit.build(data, args, torch.device("cpu"))
    model.backbone.blocks[0].mlp.fc1.register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    adavit.train(model, data, accelerator, args)
    assert torch.bfloat16 in seen
    seen.clear()
    model(torch.randn(2, 3, 32, 32))
    assert set(seen) == {torch.float32}


def test_a_file_is_there_even_where_the_proof_fails(tmp_path, monkeypatch):
    def refuted(*args):
        raise RuntimeError("packed execution differs")

    monkeypatch.setattr(adaptkit.AdaptedModel, "verify", refuted)
    with pytest.raises(RuntimeError, match="packed execution differs"):
        adavit.main(["--data", "digits", *SMALL, "--out", str(tmp_path)])
    assert adaptkit.attach(adaptkit.demo_backbone(), tmp_path / "adapter")


def test_what_it_saved_attaches_to_a_fresh_backbone(finished):
    model = adaptkit.attach(adaptkit.demo_backbone(), finished / "adapter")
    features = model(torch.randn(2, 3, 32, 32))
    assert features.logits.shape == (2, 10)
    assert features.aux["patch_keep"].shape == (2, 11, 4)


def test_it_logs_usage_as_sampled_and_as_thresholded(finished):
    row = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    assert {f"{way}_{kind}" for way in ("sampled", "thresholded") for kind in ("patch", "head", "layer")} <= set(row)


def test_it_draws_what_was_kept(finished):
    from PIL import Image

    assert Image.open(finished / "kept_patches.png").size[0] > 200
    assert min(Image.open(finished / "usage.png").size) > 200


def test_training_asks_the_device_at_its_looks_at_the_loss_alone(tmp_path):
    def asked(steps):
        args = adavit.parse(["--data", "digits", *SMALL, "--out", str(tmp_path), "--steps", str(steps)])
        model = adavit.build(data, args, torch.device("cpu"))
        with adaptkit.reference(), Stalls(adavit.train) as stalls:
            adavit.train(model, data, Accelerator(cpu=True), args)
        return stalls.asked

    data = open_labelled("digits", "train", 32)
    assert asked(3) == asked(7)  # two looks each: at the first step and at the last


@pytest.mark.full
def test_a_compiled_run_trains_the_same_gates(tmp_path, monkeypatch):
    """Backend eager: what is compiled is run as it is, so sampled decisions are the same."""
    monkeypatch.setattr(adavit_training, "BACKEND", "eager")
    data, trained = open_labelled("digits", "train", 32), []
    for more in ([], ["--compile"]):
        torch.compiler.reset()
        args = adavit.parse(["--data", "digits", *SMALL, "--out", str(tmp_path), *more])
        torch.manual_seed(0)
        model = adavit.build(data, args, torch.device("cpu"))
        torch.manual_seed(0)
        with adaptkit.reference():
            adavit.train(model, data, Accelerator(cpu=True), args)
        trained.append(dict(adavit.AdaViT.of(model).named_parameters()))
        assert model._compiled_call_impl is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.compiler.reset()
    torch.testing.assert_close(trained[1], trained[0], atol=1e-5, rtol=1e-4)


def test_the_gates_learn_from_the_frozen_classifier_which_sees_each_image_once(tmp_path, monkeypatch):
    data, told = open_labelled("digits", "train", 32), []
    args = adavit.parse(["--data", "digits", *SMALL, "--out", str(tmp_path)])
    model = adavit.build(data, args, torch.device("cpu"))
    seen = [
        image for image, _ in data.batches(torch.arange(len(data.labels)), 256, model.vit.source(), torch.device("cpu"))
    ]
    with torch.no_grad(), adavit.AdaViT.of(model).opened():
        frozen = torch.cat([model(image).logits for image in seen])
    made, dense = [], adavit_training.dense_logits

    def kept(*args):
        made.append(dense(*args))
        return made[-1]

    monkeypatch.setattr(adavit_training, "dense_logits", kept)
    monkeypatch.setattr(
        adavit_training, "agreement_loss", lambda logits, full: told.append(full) or agreement_loss(logits, full)
    )
    adavit.train(model, data, Accelerator(cpu=True), args)
    order = torch.randint(len(data.labels), (args.steps * args.batch_size,), generator=torch.Generator().manual_seed(0))
    assert [len(one) for one in made] == [len(order.unique())]
    torch.testing.assert_close(torch.cat(told), frozen[order], atol=1e-4, rtol=1e-4)


def trained(tmp_path, monkeypatch, *more):
    """Train six steps; returns the gates after each, by name, whether they sampled, and the model."""
    data, states, modes = open_labelled("digits", "train", 32), [], []
    args = adavit.parse(["--data", "digits", *SMALL, "--out", str(tmp_path), "--steps", "6", *more])
    model = adavit.build(data, args, torch.device("cpu"))
    gates = adavit.AdaViT.of(model).gates

    class Optimiser(torch.optim.AdamW):
        def step(self, *args):
            super().step(*args)
            states.append({name: p.detach().clone() for name, p in gates.named_parameters()})
            modes.append(gates.training)

    monkeypatch.setattr(torch.optim, "AdamW", Optimiser)
    adavit_training.train(model, data, Accelerator(cpu=True), args)
    states.append({name: p.detach().clone() for name, p in gates.named_parameters()})
    return states, modes, model


def test_half_way_the_gates_settle_and_one_shift_holds_the_budget(tmp_path, monkeypatch):
    states, modes, model = trained(tmp_path, monkeypatch, "--budget", "0.2")
    assert modes == [True] * 3 + [False] * 3
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0] if name.endswith("weight"))
    moved = {name: states[-1][name] - states[2][name] for name in states[0]}
    assert all(not change.any() for name, change in moved.items() if name.endswith("weight"))
    assert all(not moved[name].any() for name in moved if "patch" not in name)
    shifts = torch.cat([moved[name] for name in moved if name.endswith("patch.bias")])
    assert shifts.max() < -1.0  # three times of almost 0.8, for almost nothing is off so early
    torch.testing.assert_close(shifts, shifts[:1].expand_as(shifts), atol=1e-5, rtol=0)
    assert any(p.abs().max() > 0 for p in adavit.AdaViT.of(model).bottlenecks.parameters())


@pytest.mark.parametrize("options", ["{}", '{"first_patch_block": 11}', '{"gates": ["layer"]}'])
def test_the_budget_is_met_by_the_patches_where_they_can_and_by_all_gates_where_not(options, tmp_path):
    data, cpu = open_labelled("digits", "train", 32), torch.device("cpu")
    data = data._replace(images=data.images[:96], labels=data.labels[:96])
    args = adavit.parse(["--data", "digits", *SMALL, "--out", str(tmp_path), "--budget", "0.4", "--options", options])
    model = adavit.build(data, args, cpu)
    gates = adavit.AdaViT.of(model)
    with torch.no_grad():
        for p in gates.gates.parameters():
            p.add_(0.3 * torch.randn_like(p))
    before = {name: p.clone() for name, p in gates.gates.named_parameters()}
    adavit_scores.calibrate(model, data, args, cpu)
    score = adavit_scores.evaluate(
        model, data, torch.arange(len(data.labels)), args, cpu, adavit.accounting.costs(model, (32, 32))
    )
    assert 0.3 < score.macs.mean < 0.42
    moved = {name.split(".")[1] for name, p in gates.gates.named_parameters() if not torch.equal(p, before[name])}
    assert moved == ({"patch"} if options == "{}" else set(gates.config.gates))


def test_usage_pulls_every_kind_to_the_one_share_that_costs_the_budget(tmp_path, monkeypatch):
    pulls, real = [], adavit_training.usage_loss

    def seen(aux, share, form):
        loss = real(aux, share, form)
        kinds = {kind: torch.autograd.grad(loss, aux[f"{kind}_keep"], retain_graph=True)[0] for kind in KINDS}
        pulls.append((share, {kind: float(pull.sum()) for kind, pull in kinds.items()}))
        return loss

    monkeypatch.setattr(adavit_training, "usage_loss", seen)
    _, _, model = trained(tmp_path, monkeypatch, "--budget", "0.5", "--budget-loss", "usage")
    share = adavit_training.share_of_each(adavit.accounting.costs(model, (32, 32)), 0.5)
    assert [given for given, _ in pulls] == [1.0, share, share]  # the gates learn three of the six steps
    assert 0.5 < share < 0.8  # patches times sub-layers, and a block without gates
    assert list(pulls[-1][1].values()) == pytest.approx([1.0, 1.0, 1.0])  # all keep more so early: each is pulled down


def test_without_bottlenecks_the_gates_learn_to_the_end(tmp_path, monkeypatch):
    states, modes, _ = trained(tmp_path, monkeypatch, "--options", "{}")
    assert modes == [True] * 6
    weights = [name for name in states[0] if name.endswith("weight")]
    assert any(not torch.equal(states[4][name], states[5][name]) for name in weights)


def test_a_loss_that_is_not_finite_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(adavit_training, "agreement_loss", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(SystemExit, match="the loss is not finite at step 0: stopped after step 0"):
        adavit.main(["--data", "digits", *SMALL, "--out", str(tmp_path)])


def test_a_budget_outside_zero_to_one_is_refused_before_anything_is_read():
    with pytest.raises(ValueError, match=r"--budget is 1.5"):
        adavit.parse(["--budget", "1.5"])


@pytest.fixture
def segmentation(tmp_path):
    import datasets
    import numpy as np
    from PIL import Image

    def picture(array):
        return Image.fromarray(array.astype(np.uint8))

    mask = np.zeros((48, 64))
    mask[:, 32:] = 1
    mask[:8] = 255
    rows = {"image": [picture(np.random.default_rng(0).integers(0, 255, (48, 64, 3)))], "label": [picture(mask)]}
    path = tmp_path / "set.parquet"
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def test_crops_are_labelled_by_the_class_that_covers_them(segmentation):
    crops = open_labelled(f"crops:{segmentation}", "train", 16)
    assert crops.images.shape[1:] == (3, 16, 16)
    assert sorted(set(crops.labels.tolist())) == [0, 1]
    # Three rows of four; half of each crop in the first row is unlabelled.
    assert len(crops.labels) == 2 * 4


def test_crops_that_are_placed_lie_whole_and_smaller_in_an_empty_image(segmentation):
    crops, placed = (
        open_labelled(f"crops:{segmentation}", "train", 11),
        open_labelled(f"placed:{segmentation}", "train", 16),
    )
    assert torch.equal(placed.labels, crops.labels)
    assert placed.images.shape == (len(crops.labels), 3, 16, 16)
    assert placed.images.dtype == torch.uint8
    places = set()
    for image, crop in zip(placed.images, crops.images):
        rows, columns = ((image != 128).any(0).any(axis).nonzero().flatten() for axis in (1, 0))
        side = len(rows)
        assert 4 <= side == len(columns) <= 11
        assert (int(rows[-1] - rows[0]), int(columns[-1] - columns[0])) == (side - 1, side - 1)
        inside = image[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
        assert (inside.mean() - crop.float().mean()).abs() < 10
        places.add((int(rows[0]), int(columns[0]), side))
    assert len(places) > 1
    assert torch.equal(
        placed.images, open_labelled(f"placed:{segmentation}", "train", 16).images
    )  # drawn once and for all


def test_the_smallest_images_hold_a_crop_too(segmentation):
    placed = open_labelled(f"placed:{segmentation}", "train", 2).images
    assert placed.shape[1:] == (3, 2, 2)
    assert (placed != 128).any(1).flatten(1).any(1).all()


def test_images_of_no_size_are_refused_before_anything_is_read(capsys):
    with pytest.raises(SystemExit):
        adavit.parse(["--size", "0"])
    assert "--size, --steps and --batch-size must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["crops", "placed"])
def test_a_run_records_the_file_that_crops_are_cut_from(kind, segmentation):
    plain, cut = record.identity(str(segmentation), None), record.identity(f"{kind}:{segmentation}", None)
    assert cut == {**plain, "name": f"{kind}:{segmentation}"}
    assert len(plain) > 1


def test_a_folder_of_class_folders_is_read(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 30)).save(tmp_path / name / "a.png")
    data = open_labelled(str(tmp_path), "train", 16)
    assert data.images.shape == (2, 3, 16, 16)
    assert data.classes == ["cat", "dog"]


def test_a_set_without_labels_says_what_it_has(segmentation):
    import datasets

    path = segmentation.with_name("plain.parquet")
    datasets.Dataset.from_dict({"number": [1, 2]}).to_parquet(str(path))
    with pytest.raises(ValueError, match="2 rows with the columns number; it needs images"):
        open_labelled(str(path), "train", 16)
    with pytest.raises(ValueError, match="there is no file"):
        open_labelled(str(path) + "x.parquet", "train", 16)
