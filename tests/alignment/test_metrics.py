"""metrics.jsonl survives kills, its numbers are JSON; lines or a bar for the terminal; what trackers are given."""

import json
import re
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignment.metrics import Display, MetricsFile, Timer, Tracker, plain, read_metrics


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for i in range(1, 5):
        file.append({"iteration": i, "loss": i / 2})
    MetricsFile(path, 3).append({"iteration": 4, "loss": 9.0})
    assert [(row["iteration"], row["loss"]) for row in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]


@pytest.mark.parametrize("rest", ['{"iteration": 3, "los', "\0\0\0\0", "17", '{"loss": 1.0}'])
def test_a_damaged_last_line_is_dropped(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n' + rest)
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2]
    MetricsFile(path, 2).append({"iteration": 3})
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 2}\n{"iteration": 3}\n'


def test_a_line_can_be_completed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.extend_last({"eval/x": 1.0})
    assert read_metrics(path) == []
    file.append({"iteration": 1})
    file.append({"iteration": 2, "a": 0.0})
    file.extend_last({"eval/x": 1.0})
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2, "a": 0.0, "eval/x": 1.0}]


def test_numbers_keep_their_digits_and_stay_json():
    row = plain({"tiny": 1.23456789123e-12, "large": 123456.789, "nan": float("nan"), "inf": float("inf"), "int": 3})
    assert row == {"tiny": 1.2345679e-12, "large": 123456.79, "nan": None, "inf": None, "int": 3.0}
    json.loads(json.dumps(row), parse_constant=pytest.fail)


def test_lines_where_there_is_no_terminal(capsys):
    display = Display(10, active=True)
    display.show(3, {"reward/mean": 0.5, "grad_norm": None, "time/iteration": 1.5})
    display.say("[report] written")
    display.close()
    assert capsys.readouterr().out == "iteration 3/10  reward 0.5  s 1.5\n[report] written\n"


@pytest.mark.parametrize(
    ("logged", "line"),
    [
        ({"reward/mean": 0.5, "loss": 0.1}, "reward 0.5"),  # the loss of policy gradients says nothing
        ({"loss": 0.68, "implicit_accuracy": 0.625, "margin": 0.12}, "loss 0.68  accuracy 0.625  margin 0.12"),
        ({"reward/mean": 0.5, "loss": 0.7, "implicit_accuracy": 0.75}, "reward 0.5  accuracy 0.75"),
        ({"loss": 1.25, "error": 1.1}, "loss 1.25"),
    ],
)
def test_a_line_shows_what_the_run_learns_from(capsys, logged, line):
    Display(10, active=True).show(3, logged)
    assert capsys.readouterr().out == f"iteration 3/10  {line}\n"


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    display = Display(10, active=True)
    display.show(3, {"reward/mean": 0.5})
    display.say("[report] written")
    display.close()
    out = re.sub(r"\x1b\[[\d;?]*\w", "", capsys.readouterr().out)
    assert display.bar.tasks[0].completed == 3
    assert display.bar.tasks[0].fields["note"] == "reward 0.5"
    assert "[report] written" in out
    assert "iteration 3/10" not in out


def test_other_processes_are_silent(capsys):
    display = Display(10, active=False)
    display.show(3, {"reward/mean": 0.5})
    display.say("hello")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["tensorboard", "auto"])
def test_tensorboard_events(tmp_path, kind):
    tracker = Tracker(kind, tmp_path, "tiny")
    tracker.log({"reward/mean": 0.25, "kl": None}, 1)
    tracker.log({"reward/mean": 0.5, "kl": 2.0}, 2)
    tracker.close()
    found = {}
    for events in tmp_path.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events)).Reload()
        for tag in accumulator.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    assert found == {"reward/mean": [(1, 0.25), (2, 0.5)], "kl": [(2, 2.0)]}


def test_no_tracker(tmp_path):
    tracker = Tracker(None, tmp_path, "tiny")
    tracker.log({"reward/mean": 0.25}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_timer_adds_up_by_phase():
    timer = Timer(torch.device("cpu"))
    for phase in ("update", "update", "reward"):
        with timer(phase):
            time.sleep(0.01)
    assert timer.seconds["update"] >= 0.02
    assert 0.01 <= timer.seconds["reward"] < timer.seconds["update"]


def test_timer_counts_evaluations_by_phase() -> None:
    counter = iter(range(0, 100, 10))  # each look at the counter finds ten more
    timer = Timer(torch.device("cpu"), lambda: next(counter))
    with timer("iteration"), timer("rollout"):  # looks at 0, 10, then 20 and 30 on the way out
        pass
    assert timer.counts == {"rollout": 10, "iteration": 30}
    timer.clear()
    assert not timer.counts
