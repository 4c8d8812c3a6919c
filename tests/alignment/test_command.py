"""The command from end to end: what a run folder holds, and how a run ends when something fails in its middle."""

import json
import re
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import alignment.report
import alignment.run
import alignment.training
from alignment.checkpoint import checkpoints, load_state
from alignment.config import load_recipe
from alignment.metrics import read_metrics
from tests.alignment.conftest import REPOSITORY, in_subprocess

NAMES = ["reward/mean", "reward/std", "reward/bright", "reward/contrast", "advantage/std", "ratio/mean"]
NAMES += ["ratio/max_deviation", "clip_fraction", "kl", "loss", "grad_norm", "lr", "nfe", "samples_per_second"]
NAMES += [f"time/{phase}" for phase in ("rollout", "decode", "reward", "update", "iteration")]


def rows(outcome):
    return read_metrics(outcome.folder / "metrics.jsonl")


def newest(outcome):
    return load_state(checkpoints(outcome.folder / "checkpoints")[-1])


def trouble(kind: str, at: int) -> list[str]:
    return [f"rewards.bright.options.trouble={kind}", f"rewards.bright.options.at={at}"]


@pytest.fixture
def run(command):
    """A good run of two iterations."""
    outcome = command("algorithm.kl=0.01")
    assert (outcome.code, outcome.err) == (0, "")
    return outcome


class TestRunFolder:
    def test_metrics(self, run):
        found = rows(run)
        assert [row["iteration"] for row in found] == [1, 2]
        for row in found:
            assert not set(NAMES) - row.keys()
            assert all(isinstance(row[name], float) for name in NAMES)
        assert "eval/reward/mean" not in found[0]
        assert {"eval/reward/mean", "eval/reward/bright", "eval/reward/contrast"} <= found[1].keys()

    def test_metrics_mean_what_they_say(self, run, recipe):
        row = rows(run)[0]
        assert row["lr"] == recipe["optimizer"]["lr"]
        # 4 samples, 3 steps in the rollout; 2 trained steps in the update, and as many of the reference
        assert row["nfe"] == 4 * 3 + 4 * 2 + 4 * 2
        assert row["samples_per_second"] == pytest.approx(4 / row["time/iteration"], rel=1e-4)
        phases = sum(row[f"time/{phase}"] for phase in ("rollout", "decode", "reward", "update"))
        assert phases == pytest.approx(row["time/iteration"], rel=0.1)
        assert row["reward/mean"] == pytest.approx(row["reward/bright"])
        assert row["drift/weights"] > 0

    def test_the_saved_configuration_reruns_the_run(self, run, capsys, tmp_path):
        saved = run.folder / "config.yaml"
        content = yaml.safe_load(saved.read_text())
        assert content["seed"] == 0
        assert content["versions"]["torch"] == torch.__version__
        revision = content["versions"]["git"].rstrip("+")
        git = ["git", "-C", str(REPOSITORY), "cat-file", "-t", revision]
        assert subprocess.run(git, capture_output=True, text=True).stdout == "commit\n" or revision == "unknown"
        assert load_recipe(saved) == load_recipe(tmp_path / "recipe.yaml", ["algorithm.kl=0.01"])
        assert alignment.run.main([str(saved), f"output={tmp_path / 'again'}"]) == 0
        again = read_metrics(tmp_path / "again" / "metrics.jsonl")
        assert [row["loss"] for row in again] == [row["loss"] for row in rows(run)]
        assert [row["drift/weights"] for row in again] == [row["drift/weights"] for row in rows(run)]

    def test_samples(self, run):
        folders = sorted(path.name for path in (run.folder / "samples").iterdir())
        assert folders == ["000000", "000002"]
        for name in folders:
            record = json.loads((run.folder / "samples" / name / "scores.json").read_text())
            assert len(record["values"]["reward/bright"]) == 2
            assert len(iio.imread(run.folder / "samples" / name / "00.mp4")) == 5
        after = json.loads((run.folder / "samples" / "000002" / "scores.json").read_text())["values"]
        assert np.mean(after["reward/mean"]) == pytest.approx(rows(run)[-1]["eval/reward/mean"], rel=1e-5)

    def test_weights_and_checkpoints(self, run):
        lora = load_file(run.folder / "lora" / "pytorch_lora_weights.safetensors")
        trained = newest(run).trained
        assert len(lora) == len(trained) == 16
        assert sum(float(t.square().sum()) for t in lora.values()) == pytest.approx(
            sum(float(t.square().sum()) for t in trained.values())
        )
        assert any(t.abs().max() > 0 for name, t in lora.items() if "lora_B" in name)
        assert [path.name for path in checkpoints(run.folder / "checkpoints")] == ["000001", "000002"]

    def test_report_and_lines(self, run):
        assert "tiny: run report" in (run.folder / "report.html").read_text()
        lines = run.out.splitlines()
        *lines, warning, report = lines
        assert [re.sub(r"[\d.]+$", "*", line.partition("  ")[0]) for line in lines] == [
            "evaluation at iteration 0: reward *",
            "iteration 1/*",
            "evaluation at iteration 2: reward *",
            "iteration 2/*",
        ]
        assert warning.startswith("warning: No significant gain. On 2 evaluation prompts")
        assert report == f"report: {run.folder / 'report.html'}"

    def test_no_tracker_unless_asked(self, run):
        assert not (run.folder / "tracker").exists()

    def test_nothing_else(self, run):
        assert {path.name for path in run.folder.iterdir()} == {
            "checkpoints", "config.yaml", "embeddings", "lora", "metrics.jsonl", "report.html", "samples",
        }  # fmt: skip


def test_tensorboard(command):
    outcome = command("tracker=tensorboard")
    assert outcome.code == 0
    assert list((outcome.folder / "tracker").rglob("events.out.tfevents.*"))


def test_a_second_run_is_refused_and_the_first_is_left_alone(command):
    first = command()
    before = (first.folder / "metrics.jsonl").read_bytes()
    second = command("iterations=3")
    assert second.code == 2
    assert "already holds a run; add --resume" in second.only_line()
    assert (first.folder / "metrics.jsonl").read_bytes() == before


def test_evaluations_on_the_way(command):
    outcome = command("iterations=3", "evaluation.every=2")
    assert sorted(path.name for path in (outcome.folder / "samples").iterdir()) == ["000000", "000002", "000003"]
    assert ["eval/reward/mean" in row for row in rows(outcome)] == [False, True, True]


class TestRewardThatFails:
    """A reward is called once for the evaluation before training, then once an iteration."""

    @pytest.mark.parametrize(
        ("kind", "words"),
        [("shape", "total has shape (1,), expected (2,)"), ("raise", "KeyError: 'no such judge' (")],
    )
    def test_before_training_it_is_bad_input(self, command, kind, words):
        outcome = command(*trouble(kind, 1))
        assert outcome.code == 2
        line = outcome.only_line()
        assert line.startswith("error: rewards.bright: ")
        assert words in line
        assert not (outcome.folder / "checkpoints").exists()
        assert command("--resume").code == 0

    @pytest.mark.parametrize("kind", ["shape", "raise"])
    def test_in_an_iteration_it_stops_the_run_with_its_state_saved(self, command, kind):
        outcome = command(*trouble(kind, 3), "checkpoint.every=100")
        assert outcome.code == 1
        line = outcome.only_line()
        assert line.startswith("stopped: rewards.bright: ")
        assert line.endswith("--resume goes on")
        assert newest(outcome).iteration == 1
        assert [row["iteration"] for row in rows(outcome)] == [1]
        assert (outcome.folder / "report.html").exists()
        assert (outcome.folder / "lora").exists()
        resumed = command("--resume")
        assert resumed.code == 0
        assert [row["iteration"] for row in rows(resumed)] == [1, 2]

    def test_in_the_last_evaluation_the_iteration_counts_and_a_resume_makes_up_for_it(self, command):
        outcome = command(*trouble("raise", 4))
        assert outcome.code == 1
        assert newest(outcome).iteration == 2
        assert [row["iteration"] for row in rows(outcome)] == [1, 2]
        assert "eval/reward/mean" not in rows(outcome)[-1]
        assert command("--resume").code == 0
        assert "eval/reward/mean" in rows(outcome)[-1]
        assert (outcome.folder / "samples" / "000002" / "scores.json").exists()

    def test_a_single_nan_is_masked_and_counted(self, command):
        outcome = command(*trouble("one nan", 2))
        assert (outcome.code, outcome.err) == (0, "")
        first, second = rows(outcome)
        assert (first["reward/invalid"], second["reward/invalid"]) == (1, 0)
        assert first["reward/bright/invalid"] == 1
        assert "reward/bright/invalid" not in second
        assert np.isfinite([first["reward/mean"], first["reward/std"], first["loss"], first["grad_norm"]]).all()
        assert all(t.isfinite().all() for t in newest(outcome).trained.values())

    def test_a_masked_sample_trains_nothing(self, command):
        outcome = command(*trouble("one nan", 2), "algorithm.prompts_per_iteration=1", "algorithm.group_size=2")
        assert rows(outcome)[0]["grad_norm"] == 0  # what is left of the group has no spread

    def test_more_nan_than_allowed_stops_the_run(self, command):
        outcome = command(*trouble("all nan", 3))
        assert outcome.code == 1
        assert "reward bright gave no finite number for 4 of 4 samples (max_invalid is 0.5)" in outcome.only_line()
        assert newest(outcome).iteration == 1
        assert command("--resume").code == 0
        assert [row["iteration"] for row in rows(outcome)] == [1, 2]

    def test_any_share_of_nan_can_be_allowed(self, command):
        outcome = command(*trouble("all nan", 2), "max_invalid=1")
        assert (outcome.code, outcome.err) == (0, "")
        first = rows(outcome)[0]
        assert first["reward/invalid"] == 4
        assert first["reward/mean"] is None
        assert first["grad_norm"] == 0


class TestOtherFailures:
    def test_a_full_disk(self, command, monkeypatch):
        save = alignment.training.save_state
        full = {"full": True}

        def save_state(folder, state, keep):
            if full["full"] and state.iteration == 2:
                raise OSError(28, "No space left on device")
            return save(folder, state, keep)

        monkeypatch.setattr(alignment.training, "save_state", save_state)
        outcome = command()
        assert outcome.code == 1
        assert outcome.only_line() == "stopped: [Errno 28] No space left on device; once mended, --resume goes on"
        assert "state not saved: [Errno 28]" in outcome.out
        assert newest(outcome).iteration == 1
        full["full"] = False
        assert command("--resume").code == 0
        assert [row["iteration"] for row in rows(outcome)] == [1, 2]

    def test_a_fault_of_ours_keeps_its_traceback_even_if_the_rescue_fails(self, command, monkeypatch):
        def broken(*arguments):
            raise ZeroDivisionError("ours")

        def no_report(folder):
            raise AttributeError("report")

        monkeypatch.setattr(alignment.training.Run, "apply_update", broken)
        monkeypatch.setattr(alignment.report, "write_report", no_report)
        with pytest.raises(ZeroDivisionError, match="ours"):
            command()

    def test_a_failure_within_an_iteration_leaves_a_complete_checkpoint_as_it_is(self, command, monkeypatch, tmp_path):
        """Two updates an iteration, and the second one of iteration 2 fails: checkpoint 1 must not get the first."""
        apply, calls = alignment.training.Run.apply_update, []

        def apply_update(run):
            calls.append(run.iteration)
            if calls == [1, 1, 2, 2]:
                raise ZeroDivisionError
            apply(run)

        alone = command("algorithm.updates_per_rollout=2", f"output={tmp_path / 'alone'}", "iterations=1")
        expected = newest(alone).trained
        monkeypatch.setattr(alignment.training.Run, "apply_update", apply_update)
        with pytest.raises(ZeroDivisionError):
            command("algorithm.updates_per_rollout=2")
        saved = load_state(checkpoints(tmp_path / "run" / "checkpoints")[-1])
        assert saved.iteration == 1
        assert all(torch.equal(saved.trained[name], expected[name]) for name in expected)

    @pytest.mark.parametrize("place", ["prepare", "train"])
    def test_out_of_memory(self, command, monkeypatch, place):
        def full(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore lines")

        monkeypatch.setattr(alignment.policy.Policy, "rollout" if place == "prepare" else "generate", full)
        outcome = command()
        assert outcome.code == 2
        assert "out of GPU memory: lower batch.rollout" in outcome.only_line()

    def test_two_interrupts_end_at_once(self, command, monkeypatch):
        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(alignment.training.Run, "apply_update", interrupted)
        outcome = command()
        assert outcome.code == 1
        assert outcome.only_line() == "stopped: interrupted; --resume goes on"
        assert newest(outcome).iteration == 0

    def test_an_interrupt_while_loading(self, command, monkeypatch):
        def interrupted(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(alignment.policy, "load_pipeline", interrupted)
        outcome = command()
        assert (outcome.code, outcome.only_line()) == (1, "stopped: interrupted before training")


def test_as_a_program(write, tmp_path):
    """Exit codes and streams as a shell sees them."""
    good = in_subprocess(str(write()), "iterations=1")
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    bad = in_subprocess(str(write()), "iteration=1")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.endswith("unknown key iteration; did you mean iterations?\n")
    assert bad.stderr.count("\n") == 1
