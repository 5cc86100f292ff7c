"""Going on: without a checkpoint an error, longer or at another rate where that is asked for by name."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from recipes import segment
from recipes.checkpoints import checkpoints
from recipes.optimising import as_asked, schedule_of

sys.path.insert(0, str(Path(__file__).parent))
from runs import argv


def rates(out):
    return {r["step"]: r["lr"] for r in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "lr" in r}


def test_resuming_nothing_is_an_error_that_names_the_folder(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"--resume: .*run/checkpoints holds no checkpoint .*--overwrite"):
        segment.main(argv(pictures, tmp_path / "run", "--resume"))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_is_made_longer_only_where_that_is_said(pictures, tmp_path):
    out = tmp_path / "run"
    segment.main(argv(pictures, out, "--steps", "10", "--save-every", "5"))
    longer = argv(pictures, out, "--steps", "20", "--save-every", "5", "--resume")
    with pytest.raises(ValueError, match=r"trained with steps=10; now it is steps=20.*--change steps"):
        segment.main(longer)
    result = segment.main([*longer, "--change", "steps"])
    assert result["steps"] == 20
    assert checkpoints(out)[-1].name == "step-00000015"
    args = segment.parse(longer)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule = schedule_of(optimizer, args, 1)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert rates(out)[10] == schedule.get_last_lr()[0]  # as of a run of twenty steps from the start
    segment.main([*longer])  # the newest checkpoint is of the longer run: nothing is changed any more


def test_another_rate_is_taken_where_that_is_said_and_moments_stay(pictures, tmp_path):
    out = tmp_path / "run"
    segment.main(argv(pictures, out, "--steps", "10", "--save-every", "5", "--lr", "0.01"))
    before = rates(out)[10]
    other = argv(pictures, out, "--steps", "20", "--save-every", "5", "--lr", "0.1", "--resume")
    with pytest.raises(ValueError, match=r"steps=10, lr=0.01; now it is steps=20, lr=0.1.*--change steps lr"):
        segment.main(other)
    segment.main([*other, "--change", "steps", "lr"])
    assert before == 0
    assert rates(out)[10] > 0.05


def test_a_checkpoint_beyond_the_last_step_is_an_error(pictures, tmp_path):
    out = tmp_path / "run"
    segment.main(argv(pictures, out, "--steps", "4", "--save-every", "1"))
    with pytest.raises(ValueError, match="step-00000003 has 3 steps behind it, and --steps is 2"):
        segment.main(argv(pictures, out, "--steps", "2", "--save-every", "1", "--resume", "--change", "steps"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--change", "steps"], "give --resume, or leave it out"),
        (["--resume", "--change", "train"], "'train' cannot change within a run; steps lr"),
    ],
)
def test_what_cannot_be_changed_is_said(more, message, capsys):
    with pytest.raises(SystemExit):
        segment.parse(["--train", "t", "--num-classes", "3", *more])
    assert message in capsys.readouterr().err


def test_rates_are_those_of_now_to_the_bit_where_nothing_changed():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=0.03)
    args = Namespace(schedule="cosine", steps=20, warmup=0.1)
    schedule = schedule_of(optimizer, args, 2)
    asked = [(rate, group["weight_decay"]) for rate, group in zip(schedule.base_lrs, optimizer.param_groups)]
    for _ in range(14):
        optimizer.step()
        schedule.step()
    before = [dict(group) for group in optimizer.param_groups]
    as_asked(schedule, optimizer, asked)
    assert [dict(group) for group in optimizer.param_groups] == before
