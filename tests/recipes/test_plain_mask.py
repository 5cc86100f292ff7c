"""The head plain-mask by its one recipe: semantic, instance and panoptic, from files to a score and back."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("faster_coco_eval")
sys.path.insert(0, str(Path(__file__).parents[2]))

from runs import reset, write_masks

import adaptkit
from adaptkit.create import create_backbone
from adaptkit.heads.plain_mask import annealed
from recipes import detect, panoptic, plain_mask, queries, segment, semantic, shapes
from recipes.evaluate import main as evaluate

QUICK = ["--backbone", "test_vit", "--random-backbone", "--size", "32", "48", "--queries", "6", "--points", "64",
         "--batch-size", "2", "--lr", "3e-3", "--clip", "1", "--steps", "6", "--save-every", "2",
         "--head-options", '{"num_blocks": 2}']  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    shapes.write(path / "shapes", 4, 32, 48, seed=0)
    write_masks(path / "semantic")
    return path


def command(folders, task, out, *more):
    data = str(folders / ("semantic" if task == "semantic" else "shapes"))
    own = {"semantic": ["--num-classes", "3"], "panoptic": ["--object-threshold", "0.2"]}.get(task, [])
    return ["--task", task, "--train", data, "--val", data, "--out", str(out), *QUICK, *own, *more]


SCORE = {"semantic": "miou", "instance": "mask_ap", "panoptic": "pq"}
MODULES = {"semantic": segment, "instance": detect, "panoptic": panoptic}


@pytest.mark.parametrize("task", SCORE)
def test_it_trains_scores_saves_predicts_and_is_evaluated(task, folders, tmp_path, capsys, monkeypatch):
    result = plain_mask.main(command(folders, task, tmp_path))
    score = SCORE[task]
    assert result["head"] == "plain-mask"
    assert 0 <= result[score] == result[f"{score}_reattached"] <= 100
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", pretrained=False)
    model = adaptkit.attach(backbone, tmp_path / "adapter")
    assert model.head.config.task == task
    assert model.head.config.num_q == 6
    found = model.predict(torch.rand(3, 45, 61))
    assert found.size == (45, 61)
    if task != "semantic":
        assert model.described().said["categories"] == [
            {k: c[k] for k in ("id", "name", "isthing")[: 3 if task == "panoptic" else 2]}
            for c in shapes.CATEGORIES
            if task == "panoptic" or c["isthing"]
        ]
        assert model.transform.size == (32, 48)
    # at the images' own size and as trained the scores are the run's
    monkeypatch.setattr("recipes.evaluate.from_pretrained", lambda file, **options: model)
    data = str(folders / ("semantic" if task == "semantic" else "shapes"))
    again = evaluate(argv=[str(tmp_path / "adapter"), "--data", data, "--json"])
    assert 100 * again[score] == pytest.approx(result[score], abs=0.01)


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_stopped_and_resumed_is_byte_identical_to_never_stopped(task, folders, tmp_path, monkeypatch):
    """Annealing goes by the step, wherever the run started."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plain_mask.main(command(folders, task, whole))
    real, seen = queries.loss, []

    def dies(model, *args):
        seen.append(queries.head_in(model).attn_mask_probs.tolist())
        if len(seen) == 4:  # after the checkpoint of step 2, before that of step 4
            raise KeyboardInterrupt
        return real(model, *args)

    monkeypatch.setattr(queries, "loss", dies)
    reset()
    with pytest.raises(KeyboardInterrupt):
        plain_mask.main(command(folders, task, stopped))
    assert seen == [pytest.approx(annealed(2, step / 6)) for step in range(4)]
    monkeypatch.undo()
    reset()
    plain_mask.main([*command(folders, task, stopped), "--resume"])
    name = "adapter/adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_cached_features_train_the_same_head_bit_for_bit(folders, tmp_path):
    for name, more in (("a", []), ("b", ["--cache-features", str(tmp_path / "cache"), "--cache-dtype", "float32"])):
        reset()
        plain_mask.main(command(folders, "semantic", tmp_path / name, "--views", "2", *more))
    a, b = (adaptkit.load(tmp_path / name / "adapter").tensors for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_loss_falls(folders, tmp_path):
    argv = command(folders, "semantic", tmp_path)[2:]
    args = segment.parse([*argv, "--head", "plain-mask"])
    torch.manual_seed(0)
    model = semantic.build_queries(args)
    rows = segment.data(args, model, True)
    batch = [torch.stack(x) for x in zip(*(rows[0, i] for i in range(4)))]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(25):
        torch.manual_seed(0)  # the same points
        losses.append(semantic.query_loss(model, batch, args))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_batch_without_labels_has_a_loss_of_zero():
    args = segment.parse(["--train", "unused", *QUICK, "--num-classes", "3", "--head", "plain-mask"])
    model = semantic.build_queries(args)
    loss = semantic.query_loss(model, [torch.randn(2, 3, 32, 48), torch.full((2, 32, 48), 255)], args)
    loss.backward()
    assert loss == 0


def test_options_that_do_not_go_together_end_with_a_line(folders, tmp_path, capsys):
    for argv, said in (
        ([], "--task is needed: semantic, instance, panoptic"),
        (["--task", "semantic", "--train", "t", "--num-classes", "3", "--loss", "dice"], "plain-mask brings a loss"),
        (["--task", "semantic", "--train", "t", "--num-classes", "3", "--queries", "0"], "must be at least 1"),
        (["--task", "semantic", "--train", "t", "--num-classes", "3", "--head-options", "3"], "give a JSON object"),
    ):
        with pytest.raises(SystemExit):
            plain_mask.main(argv)
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        segment.parse(["--train", "t", "--num-classes", "3", "--head-options", '{"num_q": 3}'])
    assert "--head-options are of plain-mask, and the head is fpn" in capsys.readouterr().err
    with pytest.raises(ValueError, match="attach it without sfp"):
        plain_mask.main(command(folders, "semantic", tmp_path, "--adapter", "sfp"))


def test_a_file_that_says_other_categories_than_its_head_is_refused(tmp_path):
    from adaptkit.model.queries import described_by

    model = adaptkit.attach(
        create_backbone("test_vit", pretrained=False),
        head=("plain-mask", {"num_classes": 2, "task": "panoptic", "num_q": 2, "num_blocks": 1}),
    )
    for said, message in (
        ({"categories": [{"id": 1}]}, "the head has 2 classes"),
        ({"categories": [{"name": "a"}, {"name": "b"}]}, "an object with an id for each"),
        ({"categories": "ab"}, "metadata.categories: found 'ab'"),
        ({"thresholds": [0.1]}, "expected two numbers"),
        ({"thresholds": "ab"}, "expected two numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            described_by(model.head, said, model)
    assert dataclasses.is_dataclass(described_by(model.head, {}, model))
