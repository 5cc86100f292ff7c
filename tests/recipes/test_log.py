"""What a run says: lines where no one looks, a bar in a terminal, and trackers that are there."""

import pytest
import rich.progress

from recipes import log, trackers


def test_without_a_terminal_there_are_plain_lines(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "time", lambda: now[0])
    lines = log.Lines("train", 40, 0)
    for step in range(1, 41):
        now[0] += 1
        lines.advance(step, "loss 0.5" if step % 10 == 0 else None)
    assert capsys.readouterr().out.splitlines() == [
        f"train {n}/40  loss 0.5  0:00:{40 - n:02d} left" for n in (10, 20, 30, 40)
    ]


def test_lines_come_every_ten_seconds_and_at_the_end(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "time", lambda: now[0])
    lines = log.Lines("train", 2000, 1000)
    for step in range(1010, 2001, 10):
        now[0] += 0.25
        lines.advance(step, "loss 0.5")
    said = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["train 1010", "train 1410", "train 1810", "train 2000"]


def test_a_validation_says_how_far_it_is_when_it_takes_long(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(log.time, "time", lambda: now[0])
    shown = log.Lines("validate", 30, 0, True, log.Lines("train", 1, 0))
    for batch in range(1, 31):
        now[0] += 1
        shown.advance(batch)
    assert [line[:14] for line in capsys.readouterr().out.splitlines()] == [f"validate {n}/30" for n in (10, 20, 30)]


def test_others_than_the_first_process_say_nothing(capsys):
    log.Lines("train", 1, 0, main=False).advance(1, "loss 1")
    assert capsys.readouterr().out == ""


def test_in_a_terminal_a_validation_is_a_row_of_the_bar():
    bar = log.Bar("train", 4, 0)
    try:
        bar.advance(2, "loss 1")
        inner = log.Bar("validate", 3, 0, True, bar)
        inner.advance(1)
        assert isinstance(bar.bar, rich.progress.Progress)
        assert [(task.description, task.completed) for task in bar.bar.tasks] == [("train", 2), ("validate", 1)]
        inner.close()
        assert len(bar.bar.tasks) == 1
    finally:
        bar.close()


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (3725.9, "1:02:05"), (360000, "100:00:00")])
def test_time_is_read_by_people(seconds, text):
    assert log.clock(seconds) == text


# ----------------------------------------------------------------------------------------------------- trackers


def test_a_tracker_that_is_not_installed_is_an_error_with_the_line_for_pip(monkeypatch, tmp_path):
    from recipes import segment

    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    argv = ["--train", "nowhere", "--num-classes", "3", "--tracker", "wandb", "--out", str(tmp_path / "run")]
    with pytest.raises(ImportError, match="--tracker wandb needs wandb, which is not installed: pip install wandb"):
        segment.main(argv)
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_no_one_knows_names_the_others():
    with pytest.raises(
        ValueError, match="--tracker wandbe: there is no such tracker; give one of aim, .*wandb, or all"
    ):
        trackers.check_tracker("wandbe")
    trackers.check_tracker(None)


def test_the_table_of_trackers_is_that_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(trackers.TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
