"""A run past its held-out peak ends well, says where the peak was and saves its weights; a resumed one knows, too."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from alignment.checkpoint import checkpoints, load_state
from alignment.config import EvaluationConfig
from alignment.early_stop import Peak, best_weights, past_peak, peak, watch
from alignment.metrics import read_metrics
from tests.alignment.conftest import in_subprocess
from tests.alignment.test_resume import assert_same_run

SCRIPT = '''
"""A reward that gives to evaluations what a script says, whatever the videos show, and to training their brightness."""

import os
import signal

calls = 0


def scripted(videos, prompts, folder="", script=(), kill=0, fail=0):
    """Training has two samples a prompt, an evaluation one. `kill`, `fail`: the call that ends the run, from 1."""
    global calls
    calls += 1
    if calls == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if calls == fail:
        raise KeyError("no such judge")
    bright = videos.mean((1, 2, 3, 4))
    if len(set(prompts)) < len(prompts):
        return bright
    try:
        done = max(int(name) for name in os.listdir(os.path.join(folder, "samples")) if name.isdigit()) // 2 + 1
    except (FileNotFoundError, ValueError):
        done = 0
    return bright * 0 + script[done]
'''


@pytest.fixture
def scripted(recipe, tmp_path):
    """A recipe that evaluates every two iterations and finds there what it is told; its arguments for the command."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT, "utf-8")
    recipe["algorithm"] |= {"prompts_per_iteration": 1}
    recipe["optimizer"]["lr"] = 0.1

    def arguments(script, *more, folder="run", kill=0, fail=0):
        options = f"{{folder: {tmp_path / folder}, script: {list(script)}, kill: {kill}, fail: {fail}}}"
        use = [f"rewards.bright.use={path}:scripted", f"rewards.bright.options={options}"]
        return [*use, "iterations=12", "evaluation.every=2", f"output={tmp_path / folder}", *more]

    return arguments


def saved(folder):
    return load_file(folder / "lora" / "pytorch_lora_weights.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


PEAK_AT_4 = [1.0, 2.0, 3.0, 2.5, 2.75, 9.0]  # iterations 0, 2, 4, 6, 8; the last is never seen


def test_a_run_ends_past_its_peak_with_the_weights_of_the_peak(command, scripted, tmp_path):
    outcome = command(*scripted(PEAK_AT_4, "evaluation.patience=2"))
    assert (outcome.code, outcome.err) == (0, "")
    ending = "no new best in 2 evaluations: the run ends; saved are the weights of iteration 4"
    assert f"{ending}, of the best held-out reward: 3.00" in outcome.out
    rows = read_metrics(outcome.folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(1, 9))
    assert [row["eval/reward/mean"] for row in rows if "eval/reward/mean" in row] == [2, 3, 2.5, 2.75]
    until_4 = command(*scripted(PEAK_AT_4, "iterations=4", folder="until_4"))
    until_8 = command(*scripted(PEAK_AT_4, "iterations=8", folder="until_8"))
    assert same(saved(outcome.folder), saved(until_4.folder))
    assert not same(saved(outcome.folder), saved(until_8.folder))
    state = load_state(checkpoints(outcome.folder / "checkpoints")[-1])
    assert state.iteration == 8
    assert same(state.trained, load_state(checkpoints(until_8.folder / "checkpoints")[-1]).trained)
    report = (outcome.folder / "report.html").read_text()
    assert "Stopped at the peak" in report
    assert "peak at iteration 4: 3.00" in report
    assert "The saved weights are those of iteration 4, where it peaked at 3.00." in report
    assert "Not finished" not in report


def test_the_average_is_what_is_kept(command, scripted):
    stopped = command(*scripted(PEAK_AT_4, "evaluation.patience=2", "ema.decay=0.5"))
    until_4 = command(*scripted(PEAK_AT_4, "iterations=4", "ema.decay=0.5", folder="until_4"))
    assert same(saved(stopped.folder), saved(until_4.folder))


def test_a_held_out_reward_can_be_watched(command, scripted):
    """The trained reward is another; the peak is that of the one named, in the report, too."""
    held_out = ["rewards.bright.weight=0", "rewards.contrast.weight=1", "evaluation.watch=bright"]
    outcome = command(*scripted(PEAK_AT_4, "evaluation.patience=2", *held_out))
    assert "saved are the weights of iteration 4, of the best held-out reward: 3.00" in outcome.out
    assert "peak at iteration 4: 3.00" in (outcome.folder / "report.html").read_text()
    refused = command("evaluation.watch=brigth", "output=elsewhere")
    assert refused.code == 2
    assert "evaluation.watch: 'brigth' is no reward of this recipe; did you mean bright?" in refused.only_line()


def test_without_patience_a_run_goes_on_and_saves_its_last_weights(command, scripted):
    script = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    outcome = command(*scripted(script, "iterations=6"))
    last = load_state(checkpoints(outcome.folder / "checkpoints")[-1])
    assert last.iteration == 6
    assert not last.snapshots
    assert "peak at iteration 2" in (outcome.folder / "report.html").read_text()  # marked all the same
    patient = command(*scripted(script, "iterations=6", "evaluation.patience=9", folder="patient"))
    assert "saved are the weights of iteration 2, of the best held-out reward: 3.00" in patient.out
    assert "the run ends" not in patient.out
    assert not same(saved(outcome.folder), saved(patient.folder))


@pytest.mark.parametrize("kill", [5, 7, 8, 10])  # in iteration 3, the evaluation of the peak, iteration 5, evaluation 6
def test_killed_and_resumed_it_ends_alike(command, write, scripted, kill, tmp_path):
    alone = command(*scripted(PEAK_AT_4, "evaluation.patience=2", folder="alone"))
    killed = in_subprocess(str(write()), *scripted(PEAK_AT_4, "evaluation.patience=2", kill=kill))
    assert killed.returncode == -9
    resumed = command(*scripted(PEAK_AT_4, "evaluation.patience=2"), "--resume")
    assert (resumed.code, resumed.err) == (0, "")
    assert "saved are the weights of iteration 4" in resumed.out
    assert_same_run(resumed.folder, alone.folder)
    one, two = (load_state(checkpoints(f / "checkpoints")[-1]) for f in (resumed.folder, alone.folder))
    assert one.memory == two.memory
    assert same(one.snapshots["best"], two.snapshots["best"])


def test_an_evaluation_that_failed_is_made_up_for(command, scripted):
    """That of iteration 4, the last one, which turns out to be the best: its weights are saved then."""
    short = (PEAK_AT_4, "evaluation.patience=2", "iterations=4")
    alone = command(*scripted(*short, folder="alone"))
    failed = command(*scripted(*short, fail=7))
    assert failed.code == 1
    assert "no such judge" in failed.only_line()
    assert not same(saved(failed.folder), saved(alone.folder))
    assert command(*scripted(*short), "--resume").code == 0
    assert_same_run(failed.folder, alone.folder)


def test_a_run_that_ended_stays_ended_unless_there_is_more_patience(command, scripted):
    first = command(*scripted(PEAK_AT_4, "evaluation.patience=2"))
    kept = saved(first.folder)
    again = command(*scripted(PEAK_AT_4, "evaluation.patience=2"), "--resume")
    assert again.code == 0
    assert "no new best in 2 evaluations: the run ends" in again.out
    assert "iteration 9/" not in again.out
    assert same(saved(first.folder), kept)
    further = command(*scripted(PEAK_AT_4, "evaluation.patience=3", "iterations=10"), "--resume")
    assert "saved are the weights of iteration 10, of the best held-out reward: 9.00" in further.out
    assert not same(saved(first.folder), kept)


def test_the_first_evaluation_can_be_the_best(command, scripted):
    """Then training only did harm, and what is saved is the base model."""
    outcome = command(*scripted([3.0, 2.0, 1.0], "evaluation.patience=2"))
    assert "saved are the weights of iteration 0" in outcome.out
    assert all(not t.any() for name, t in saved(outcome.folder).items() if "lora_B" in name)


def test_patience_needs_evaluations_on_the_way(command):
    for override, words in [
        ("evaluation.patience=2", "evaluation.patience: no evaluation on the way; set evaluation.every above 0"),
        ("evaluation.patience=-1", "evaluation.patience: -1 is not 0 or more"),
    ]:
        outcome = command(override)
        assert outcome.code == 2
        assert words in outcome.only_line()


# --- the bookkeeping -------------------------------------------------------------------------------------------------


def fake_run(patience):
    run = SimpleNamespace(
        memory={}, snapshots={}, recipe=SimpleNamespace(evaluation=EvaluationConfig(patience=patience))
    )
    run.weights = 0

    def snapshot(name, renew):
        run.snapshots[name] = run.weights

    run.snapshot = snapshot
    return run


def seen(run, *rewards):
    for i, reward in enumerate(rewards):
        run.weights = i
        watch(run, i, reward)
    return json.loads(json.dumps(run.memory))


def test_ties_missing_values_and_patience():
    """The first of equals; an evaluation without a reward is no best, but counts."""
    run = fake_run(3)
    assert peak(run) is None
    assert not past_peak(run)
    run.memory = seen(run, 1.0, 2.0, 2.0, float("nan"))
    assert peak(run) == Peak(1, 2.0, 2)
    assert run.snapshots == {"best": 1}
    assert not past_peak(run)
    watch(run, 4, 1.0)
    assert past_peak(run)
    nothing = fake_run(1)
    seen(nothing, float("nan"), float("nan"))
    assert peak(nothing) is None
    assert not past_peak(nothing)
    assert best_weights(nothing) is None


def test_an_evaluation_that_is_repeated_counts_once():
    run = fake_run(2)
    seen(run, 3.0, 2.0)
    watch(run, 1, 2.0)
    assert peak(run).since == 1
    watch(run, 1, 4.0)
    assert peak(run) == Peak(1, 4.0, 0)


def test_weights_of_an_earlier_patience_are_not_saved():
    run = fake_run(0)
    run.snapshots["best"] = 7
    assert best_weights(run) is None
