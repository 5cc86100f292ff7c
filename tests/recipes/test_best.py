"""The best evaluation is kept whatever stops the run, and a run without a better one for long ends."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from recipes import depth, engine, segment
from recipes.best import Best, best_of

sys.path.insert(0, str(Path(__file__).parent))
from runs import argv, cut_off, tree


def test_the_first_of_equal_ones_is_the_best_and_nan_never_is():
    best = Best("x", patience=2)
    assert [best.see(i, {"x": v}) for i, v in enumerate([0.1, 0.3, 0.3, 0.2])] == [True, True, False, False]
    assert (best.step, best.value, best.since, best.exhausted) == (1, 0.3, 2, True)
    assert not Best("x").see(0, {"x": float("nan")}) or pytest.fail("NaN is no best")
    lower = Best("x", lower=True)
    assert [lower.see(i, {"x": v}) for i, v in enumerate([0.3, 0.1, 0.2])] == [True, True, False]


def test_its_state_goes_through_json_and_another_metric_starts_anew():
    best = Best("x", patience=3)
    best.see(4, {"x": 0.5})
    best.see(8, {"x": 0.4})
    again, other = Best("x", patience=3), Best("y")
    for each in (again, other):
        each.go_on(json.loads(json.dumps(best.state())))
    assert again.state() == best.state()
    assert (other.step, other.scored) == (None, 8)


def test_less_is_better_of_errors():
    args = Namespace(keep_best="rmse", eval_every=1, patience=0)
    assert best_of(depth.TASK, args).lower
    assert not best_of(depth.TASK, Namespace(keep_best=None, eval_every=1, patience=0)).lower
    assert best_of(depth.TASK, Namespace(keep_best=None, eval_every=0, patience=0)).metric is None


def test_a_metric_that_the_task_has_not_is_an_error_before_any_work(pictures, tmp_path):
    with pytest.raises(ValueError, match="--keep-best acc: segment has no such metric; it has miou"):
        segment.main(argv(pictures, tmp_path / "run", "--keep-best", "acc"))
    with pytest.raises(ValueError, match="--patience 2 counts evaluations .*--eval-every"):
        segment.main(argv(pictures, tmp_path / "run", "--patience", "2"))


def scores(monkeypatch, values):
    """Evaluations say these values, one after the other; the last again and again."""
    said = iter(values)
    last = [0.0]

    def evaluate(*_):
        last[0] = next(said, last[0])
        return {"miou": last[0]}

    monkeypatch.setattr(engine, "evaluate", evaluate)


def test_a_run_that_is_killed_and_goes_on_keeps_the_same_best(pictures, tmp_path, monkeypatch):
    """It is killed after step 5, when its folder holds the best of step 4, which no checkpoint knows."""
    common = ["--steps", "6", "--save-every", "3", "--eval-every", "1"]
    values = [0.1, 0.3, 0.2, 0.4, 0.2, 0.1]
    scores(monkeypatch, values)
    segment.main(argv(pictures, tmp_path / "whole", *common))
    scores(monkeypatch, values)
    with monkeypatch.context() as patch:
        patch.setattr("recipes.segment.F.cross_entropy", cut_off(segment.F.cross_entropy, 6))
        with pytest.raises(KeyboardInterrupt):
            segment.main(argv(pictures, tmp_path / "cut", *common))
    assert json.loads((tmp_path / "cut" / "best" / "adapter_config.json").read_text())["metadata"]["step"] == 4
    scores(monkeypatch, values[3:])
    result = segment.main(argv(pictures, tmp_path / "cut", *common, "--resume"))
    assert result["best"] == {"metric": "miou", "step": 4, "value": 0.4}
    assert tree(tmp_path / "cut" / "best") == tree(tmp_path / "whole" / "best")


def test_the_best_goes_back_with_the_checkpoint(pictures, tmp_path, monkeypatch):
    out, common = tmp_path / "run", ["--steps", "4", "--save-every", "2", "--eval-every", "1"]
    scores(monkeypatch, [0.1, 0.3, 0.9, 0.1])
    segment.main(argv(pictures, out, *common))
    scores(monkeypatch, [0.1, 0.2])  # as a run would score that goes on otherwise
    result = segment.main(argv(pictures, out, *common, "--resume", "--lr", "0.5", "--change", "lr"))
    assert result["best"] == {"metric": "miou", "step": 2, "value": 0.3}
    assert json.loads((out / "best" / "adapter_config.json").read_text())["metadata"]["step"] == 2


def test_patience_ends_a_run_and_a_run_that_goes_on_ends_there_too(pictures, tmp_path, monkeypatch, capsys):
    out, common = tmp_path / "run", ["--steps", "50", "--save-every", "1", "--eval-every", "1", "--patience", "2"]
    scores(monkeypatch, [0.1, 0.5, 0.4, 0.3])
    result = segment.main(argv(pictures, out, *common))
    assert (result["steps"], result["best"]["step"], result["miou"]) == (4, 2, 30.0)
    assert "no miou better than that of step 2" in capsys.readouterr().out
    again = segment.main(argv(pictures, out, *common, "--resume"))
    assert (again["steps"], again["best"]) == (4, result["best"])


def test_none_keeps_none(pictures, tmp_path):
    out = tmp_path / "run"
    result = segment.main(argv(pictures, out, "--steps", "2", "--eval-every", "1", "--keep-best", "none"))
    assert "best" not in result
    assert not (out / "best").exists()


def test_a_metric_that_an_evaluation_does_not_have_is_an_error_that_names_those_it_has():
    """As the AP of large objects where there is none, or of masks of a detector of boxes."""
    with pytest.raises(
        ValueError, match=r"--keep-best box_ap_large: this evaluation has box_ap, box_ap_small; name one"
    ):
        Best("box_ap_large").see(1, {"box_ap": 0.5, "box_ap_small": 0.5})
