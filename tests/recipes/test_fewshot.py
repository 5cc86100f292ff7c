"""Few-shot evaluation: the closed forms are those of the papers, the draws are fair."""

import sys
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda import Questions

from recipes import adavit, fewshot
from recipes.labelled import open_images


def clouds(n, d, classes, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = 2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    return centres[labels] + torch.randn(n, d, generator=g), labels


@pytest.mark.parametrize(("n", "d"), [(60, 7), (12, 40)])  # more images than features, and fewer
def test_ridge_solves_the_normal_equations(n, d):
    x, y = clouds(n, d, 3, 0)
    new, _ = clouds(20, d, 3, 1)
    a = x.numpy().astype(np.float64)
    mean, std = a.mean(0), a.std(0) + 1e-5
    whiten = lambda z: np.hstack([(z - mean) / std, np.full((len(z), 1), 100.0)])  # noqa: E731
    targets = -np.ones((n, 3))
    targets[np.arange(n), y] = 1
    a = whiten(a)
    w = np.linalg.inv(a.T @ a + 1024.0 * np.eye(d + 1)) @ (a.T @ targets)
    got = fewshot.ridge(x, y, new, 3, 1024.0)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), whiten(new.numpy().astype(np.float64)) @ w, rtol=1e-8, atol=1e-10)


def test_nearest_neighbours_vote_as_scikit_learn_counts_them():
    neighbors = pytest.importorskip("sklearn.neighbors")
    x, y = clouds(60, 5, 4, 0)
    new, _ = clouds(30, 5, 4, 1)
    unit = torch.nn.functional.normalize(x.double(), dim=1).numpy()
    weigh = lambda distance: np.exp((1 - distance) / 0.07)  # noqa: E731
    model = neighbors.KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=weigh).fit(unit, y)
    got = fewshot.nearest(x, y, new, 4, 7, 0.07)
    np.testing.assert_allclose(
        (got / got.sum(1, keepdim=True)).numpy(), model.predict_proba(new.double().numpy()), atol=1e-9
    )


def test_a_small_temperature_does_not_overflow():
    x, y = clouds(20, 5, 2, 0)
    votes = fewshot.nearest(x, y, x, 2, 5, 1e-4)
    assert votes.isfinite().all()
    assert torch.equal(votes.argmax(1), y)  # the image itself outweighs all


def test_a_draw_has_so_many_of_each_class_and_belongs_to_its_seed():
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1, 2])
    chosen = fewshot.draw(labels, 2, seed=3)
    assert labels[chosen].bincount().tolist() == [2, 2, 2]
    assert len(set(chosen.tolist())) == 6
    assert torch.equal(chosen, fewshot.draw(labels, 2, seed=3))
    assert any(not torch.equal(chosen, fewshot.draw(labels, 2, seed=s)) for s in range(4, 8))
    assert torch.equal(fewshot.draw(labels, 0, 3), torch.arange(10))
    with pytest.raises(ValueError, match="class 1 has 3 images, and --shots asks for 4"):
        fewshot.draw(labels, 4, seed=0)


def test_mean_and_spread_are_over_the_seeds():
    args = fewshot.parse(["--train", "digits", "--shots", "2", "0", "--seeds", "0", "1", "2"])
    data, held = clouds(60, 5, 3, 0), clouds(30, 5, 3, 1)
    few, everything = fewshot.accuracies(data, held, args)
    values = few["ridge"]["values"]
    assert len(values) == 3
    assert few["ridge"]["mean"] == pytest.approx(np.mean(values))
    assert few["ridge"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert everything["shots"] == "all"
    assert everything["knn"]["std"] == 0.0


@pytest.mark.parametrize("batches", [1, 2, 3, 5])
def test_features_are_fetched_together_and_in_order(batches, monkeypatch):
    monkeypatch.setattr(fewshot, "TOGETHER", 2)
    loader = [(torch.full((2, 3), float(i)), torch.tensor([2 * i, 2 * i + 1])) for i in range(batches)]
    there = Namespace(autocast=nullcontext, gather_for_metrics=lambda pair: pair)
    model = lambda image: Namespace(prefix=image[:, None], tokens=image[:, None])  # noqa: E731
    with Questions() as questions:
        rows, labels = fewshot.features(model, loader, "avg", there)
    assert labels.tolist() == list(range(2 * batches))
    assert rows[:, 0].tolist() == [i // 2 for i in range(2 * batches)]
    assert questions.asked.count("cpu") == 2 * -(-batches // 2)  # features and labels of two batches at a time


def test_from_images_to_a_table(tmp_path, capsys):
    for split in ("train", "validation"):
        data = open_images("digits", split)[0]
        data.select(range(0, len(data), 7)).to_parquet(str(tmp_path / f"{split}.parquet"))
    common = ["--train", str(tmp_path / "train.parquet"), "--val", str(tmp_path / "validation.parquet")]
    rows = fewshot.main([*common, "--size", "16", "--shots", "1", "10", "--seeds", "0", "1", "--out", str(tmp_path)])
    assert [r["images"] for r in rows] == [10, 100]
    assert 15 < rows[0]["ridge"]["mean"] < rows[1]["ridge"]["mean"]
    assert "| 10 | 100 |" in capsys.readouterr().out
    assert (tmp_path / "result.json").is_file()
    again = [*common, "--size", "16", "--shots", "1", "--seeds", "0", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="holds an earlier run"):
        fewshot.main(again)
    assert len(fewshot.main([*again, "--overwrite"])) == 1


@pytest.mark.parametrize("recipe", ["fewshot", "adavit"])
def test_a_validation_set_of_other_classes_is_refused(recipe, tmp_path):
    """Its labels would be counted from another first class, and everything be wrong."""
    for split, names in (("train", ("ant", "bee", "cat")), ("val", ("bee", "cat"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(tmp_path / split / name / "a.png")
    sets = [str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--size", "16", "--out", str(tmp_path / "out")]
    start, flag = (fewshot.main, "--train") if recipe == "fewshot" else (adavit.main, "--data")
    with pytest.raises(ValueError, match=rf"the classes of {flag} are ant, bee, cat, ... and of --val bee, cat"):
        start([flag, *sets])
