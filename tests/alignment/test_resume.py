"""Killed anywhere and resumed, a run gives the metrics and the weights of one that was left alone, bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from alignment.checkpoint import checkpoints, load_state
from alignment.metrics import read_metrics
from tests.alignment.conftest import in_subprocess

# Everything that has a state: moments, averages, a schedule, random steps and two updates a rollout.
STATEFUL = [
    "iterations=4",
    "ema.decay=0.9",
    "optimizer.warmup=2",
    "optimizer.decay_from=0.5",
    "algorithm.updates_per_rollout=2",
    "algorithm.trained_steps=1",
    "algorithm.kl=0.01",
    "evaluation.every=3",
]


def comparable(folder):
    """The lines of metrics.jsonl without what depends on the clock."""
    kept = []
    for row in read_metrics(folder / "metrics.jsonl"):
        kept.append({k: v for k, v in row.items() if not k.startswith("time/") and k != "samples_per_second"})
    return kept


def assert_same_run(folder, other):
    assert comparable(folder) == comparable(other)
    saved = [*folder.glob("lora/*.safetensors"), *folder.glob("latent_reward/*.safetensors")]
    assert saved
    for file in saved:
        one, two = (load_file(f / file.relative_to(folder)) for f in (folder, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (load_state(checkpoints(f / "checkpoints")[-1]) for f in (folder, other))
    assert (one.iteration, one.updates) == (two.iteration, two.updates)
    for name in one.trained:
        assert torch.equal(one.trained[name], two.trained[name])
    assert one.ema.keys() == two.ema.keys()
    for name in one.ema:
        assert torch.equal(one.ema[name], two.ema[name])
    for key, moments in one.optimizer["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, two.optimizer["state"][key][name]), name
    for path in folder.glob("samples/*"):
        values = [json.loads((f / "samples" / path.name / "scores.json").read_text()) for f in (folder, other)]
        assert values[0] == values[1]


@pytest.fixture
def alone(command, tmp_path):
    """The folder of an uninterrupted run."""
    outcome = command(*STATEFUL, f"output={tmp_path / 'alone'}")
    assert outcome.code == 0
    assert len(comparable(outcome.folder)) == 4
    return outcome.folder


def trouble(kind: str, at: int) -> list[str]:
    return [f"rewards.bright.options.trouble={kind}", f"rewards.bright.options.at={at}"]


@pytest.mark.parametrize("every", [1, 2])
def test_killed_in_the_middle(command, write, alone, every):
    # Call 1 is the evaluation before training, so the fourth is in iteration 3, after the checkpoint of 2.
    killed = in_subprocess(str(write()), *STATEFUL, f"checkpoint.every={every}", *trouble("SIGKILL", 4))
    assert killed.returncode == -9
    folder = alone.parent / "run"
    assert [row["iteration"] for row in comparable(folder)] == [1, 2]
    assert not (folder / "samples" / "000003").exists()
    # What a kill at a worse moment leaves behind: a checkpoint, a line and a folder of samples that are half written.
    shutil.copytree(folder / "checkpoints" / "000002", folder / "checkpoints" / ".000003.new")
    (folder / "checkpoints" / ".000003.new" / "optimizer.pt").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "reward/me')
    (folder / "samples" / ".000003.new").mkdir()
    resumed = command("--resume", *STATEFUL)
    assert (resumed.code, resumed.err) == (0, "")
    assert_same_run(folder, alone)


def test_stopped_by_a_reward_between_two_checkpoints(command, alone):
    stopped = command(*STATEFUL, "checkpoint.every=100", *trouble("raise", 4))
    assert stopped.code == 1
    assert command("--resume", *STATEFUL).code == 0
    assert_same_run(stopped.folder, alone)


def test_an_interrupt_ends_after_the_iteration(command, alone):
    stopped = command(*STATEFUL, "checkpoint.every=100", *trouble("SIGINT", 3))
    assert stopped.code == 1
    assert stopped.only_line() == "stopped: stopped by a signal after iteration 2; --resume goes on"
    assert "stopping after this iteration" in stopped.out
    assert [row["iteration"] for row in comparable(stopped.folder)] == [1, 2]
    assert load_state(checkpoints(stopped.folder / "checkpoints")[-1]).iteration == 2
    assert (stopped.folder / "report.html").exists()
    assert command("--resume", *STATEFUL).code == 0
    assert_same_run(stopped.folder, alone)


def test_an_interrupt_in_the_last_iteration_lets_the_run_end(command):
    outcome = command(*trouble("SIGINT", 3))
    assert (outcome.code, outcome.err) == (0, "")
    assert [path.name for path in checkpoints(outcome.folder / "checkpoints")] == ["000001", "000002"]


def test_a_finished_run_is_left_as_it_is(command):
    first = command()
    kept = ["metrics.jsonl", "lora/pytorch_lora_weights.safetensors", "checkpoints/000002/optimizer.pt"]
    before = [(first.folder / name).read_bytes() for name in kept]
    again = command("--resume")
    assert (again.code, again.err) == (0, "")
    assert "all 2 iterations are done" in again.out
    assert [(first.folder / name).read_bytes() for name in kept] == before
    assert command("--resume", "iterations=1").code == 0
    assert [(first.folder / name).read_bytes() for name in kept] == before


def test_more_iterations_extend_a_run(command, tmp_path):
    command("iterations=2")
    longer = command("--resume", "iterations=4")
    assert longer.code == 0
    whole = command("iterations=4", "evaluation.every=2", f"output={tmp_path / 'whole'}")
    assert_same_run(longer.folder, whole.folder)


def test_resuming_before_the_first_checkpoint_starts_anew(command):
    outcome = command("--resume")
    assert outcome.code == 0
    assert "holds no checkpoint yet: starting from the beginning" in outcome.out
    assert len(comparable(outcome.folder)) == 2


def test_the_last_checkpoints_are_kept(command):
    outcome = command("iterations=4", "checkpoint.keep=2")
    assert sorted(path.name for path in (outcome.folder / "checkpoints").iterdir()) == ["000003", "000004"]
    sparse = command("iterations=5", "checkpoint.every=2", "checkpoint.keep=9", f"output={outcome.folder}-sparse")
    assert sorted(path.name for path in (sparse.folder / "checkpoints").iterdir()) == ["000002", "000004", "000005"]


def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(command, tmp_path):
    alone = command("iterations=3", f"output={tmp_path / 'alone'}")
    first = command("iterations=3")
    weights = first.folder / "checkpoints" / "000003" / "trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused = command("--resume", "iterations=3")
    assert refused.code == 2
    line = refused.only_line()
    assert str(weights.parent) in line
    assert "damaged checkpoint" in line
    assert "delete it to resume from the one before" in line
    shutil.rmtree(weights.parent)
    assert command("--resume", "iterations=3").code == 0
    assert_same_run(first.folder, alone.folder)


def test_a_checkpoint_of_another_recipe_is_refused(command):
    command()
    outcome = command("--resume", "iterations=3", "model.lora.rank=4")
    assert outcome.code == 2
    assert "000002: transformer." in outcome.only_line()
    assert "has shape" in outcome.only_line()


def test_the_optimizer_follows_the_recipe_on_resume(command):
    command("iterations=1", "optimizer.weight_decay=0.5", "optimizer.betas=[0.8,0.9]")
    changed = command("--resume", "iterations=2", "optimizer.weight_decay=0.25", "optimizer.betas=[0.7,0.95]")
    group = load_state(checkpoints(changed.folder / "checkpoints")[-1]).optimizer["param_groups"][0]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.25, (0.7, 0.95))


def test_an_average_that_begins_on_resume_begins_at_the_trained_weights(command):
    first = command("iterations=1", "optimizer.lr=0.1")
    trained = load_state(checkpoints(first.folder / "checkpoints")[-1]).trained
    command("--resume", "iterations=2", "optimizer.lr=1e-9", "ema.decay=0.9")
    average = load_state(checkpoints(first.folder / "checkpoints")[-1]).ema
    assert average.keys() == trained.keys()
    assert all(torch.allclose(average[name], trained[name], atol=1e-6) for name in trained)
