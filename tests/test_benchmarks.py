"""The benchmark scripts run, on a recipe made small."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import algorithms, branch_cost, preferences, random_checkpoints, reward_throughput, serve_throughput
from benchmarks.filmstrip import filmstrip
from benchmarks.seeds import markdown, run_seed
from benchmarks.serve_throughput import Load
from benchmarks.throughput import PHASES, measure, table
from examples.tiny_world.clips import make
from rewards.arguments import RewardArgument

ROOT = Path(__file__).parent.parent
SMALL = ["algorithm.prompts_per_iteration=1", "algorithm.group_size=2", "algorithm.trained_steps=3"]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_throughput_splits_an_iteration() -> None:
    """8 steps of a rollout of 2 samples without guidance, 3 of them trained: 16 and 6 function evaluations."""
    result = measure("recipes/tiny_grpo.yaml", SMALL, iterations=1)
    assert result["nfe"] == {"rollout": 16, "update": 6}
    assert sum(result["seconds"][phase] for phase in PHASES) == pytest.approx(result["seconds"]["iteration"])
    assert 0 < result["seconds"]["overhead"] < result["seconds"]["iteration"]
    assert all(phase in table(result) for phase in PHASES)


def test_seeds_and_film_strip(tmp_path: Path) -> None:
    small = [*SMALL, "iterations=1", "evaluation.num_prompts=3", "evaluation.videos=2"]
    results = [run_seed("recipes/tiny_grpo.yaml", small, seed, tmp_path / str(seed)) for seed in (0, 1)]
    page = markdown("recipes/tiny_grpo.yaml", small, results)
    assert page.count("| motion |") == 2
    assert "Never trained on: match, clip." in page
    picture = filmstrip(tmp_path / "0", rows=2, frames=3)
    assert isinstance(picture, Image.Image)
    assert len(picture.getcolors(2**20)) > 10


def test_contest_of_algorithms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of a recipe made small: curves to the budgets, the page, and a plot."""
    monkeypatch.setattr(algorithms, "EVALUATIONS", 40)
    monkeypatch.setattr(algorithms, "PROMPTS", 2)
    out = tmp_path / "contest"
    small = [*SMALL, "evaluation.num_prompts=3"]
    for seed in ("0", "1"):
        arguments = [*small, "--out", str(out), "--recipes", "tiny_grpo", "--seeds", seed]
        monkeypatch.setattr(sys, "argv", ["algorithms", *arguments])
        assert algorithms.main() == 0
    result = json.loads((out / "tiny_grpo_1/result.json").read_text("utf-8"))
    price = json.loads((out / "cost/tiny_grpo.json").read_text("utf-8"))
    assert price["nfe"] == 22  # 8 steps of 2 samples, 3 of them trained
    assert [point["nfe"] for point in result["curve"]] == [0, 22, 44]
    assert 0.5 < result["diversity"] < 2
    page = algorithms.report(out, tmp_path / "results/page")
    assert page.count("| tiny_grpo |") == 1
    assert "Held-out reward (the base model's is" in page
    with Image.open(tmp_path / "results/page.png") as picture:
        assert picture.width > 600
    record = json.loads((tmp_path / "results/page.json").read_text("utf-8"))
    assert {"command", "versions"} <= record.keys()
    assert [row["seeds"] for row in record["recipes"]] == [2]


def test_values_at_a_budget_lie_between_evaluations() -> None:
    curve = [{"nfe": 0.0, "reward": 1.0}, {"nfe": 10.0, "reward": 3.0}, {"nfe": 30.0, "reward": 2.0}]
    assert [algorithms.at(curve, "nfe", x, "reward") for x in (0, 5, 10, 20, 30, 99)] == [1, 2, 3, 2.5, 2, 2]


def test_branches_cost_what_their_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree of the paper: 203 rows in the rollout, for Mix 19 parents in the update."""
    some = {name: branch_cost.SETTINGS[name] for name in ("DanceGRPO", "BranchGRPO-Mix")}
    monkeypatch.setattr(branch_cost, "SETTINGS", some)
    result = branch_cost.compare(1, ["algorithm.prompts_per_iteration=1"])
    dance, mix = (result["settings"][name] for name in some)
    assert (dance["evaluations, rollout"], dance["evaluations, update"]) == (320, 304)
    assert (mix["evaluations, rollout"], mix["evaluations, update"]) == (203, 19)
    assert mix["cost by evaluations"] == pytest.approx((203 + 3 * 19) / (320 + 3 * 304))
    assert "BranchGRPO-Mix" in branch_cost.table(result)


def test_serving_is_measured_beside_the_reward_in_process() -> None:
    load = Load(calls=2, clips=2, frames=4, size=32)
    result = serve_throughput.measure("sprite_colour", load, [], numbers=[2])
    assert list(result["clips_per_second"]) == ["in process", "2 clients"]
    assert all(rate > 0 for rate in result["clips_per_second"].values())
    assert 1 <= result["questions_per_call"]["2 clients"] <= 2
    assert "2 clients" in serve_throughput.table(result)


def test_rewards_of_the_published_architectures_are_measured_on_random_weights(tmp_path: Path) -> None:
    """The same checkpoint as --true-size makes, but narrow: Qwen2-VL's parts and names, the template's length."""
    narrow = copy.deepcopy(random_checkpoints.QWEN2_VL_2B)
    text = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    narrow["text_config"] |= text | {"num_attention_heads": 3, "num_key_value_heads": 1}
    narrow["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    narrow["vision_config"] |= {"depth": 1, "embed_dim": 32, "hidden_size": 96, "num_heads": 2}
    rewards = {
        "bright": RewardArgument("bright", "sprite_colour", {}),
        "video_reward": RewardArgument(
            "video_reward", "video_reward", random_checkpoints.video_reward(tmp_path, narrow)
        ),
    }
    result = reward_throughput.measure(rewards, (4, 32, 32), batches=[1, 2], repeats=1)
    assert result["clips_per_second"].keys() == rewards.keys()
    assert all(rate > 0 for row in result["clips_per_second"].values() for rate in row.values())
    assert "batch 2" in reward_throughput.table(result)


def test_bad_input_is_one_line() -> None:
    cases = {"throughput": "missing.yaml", "filmstrip": "missing", "reward_throughput": "--reward=absent"}
    for module, argument in cases.items():
        command = [sys.executable, "-m", f"benchmarks.{module}", argument, *(["out.png"] if "film" in module else [])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1


def test_results_state_what_they_were_made_with() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        result = json.loads(path.read_text("utf-8"))
        assert {"command", "versions"} <= result.keys(), path


def test_preference_methods_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two arms of different questions, made small: data by the commands, runs, and the page."""
    monkeypatch.setattr(preferences, "BUDGET", ["iterations=1", "algorithm.batch_size=2", "evaluation.num_prompts=2"])
    monkeypatch.setattr(preferences, "HELD_OUT", 2)
    monkeypatch.setattr(preferences, "clips", lambda folder, *options: _few_clips(folder, *options))
    out = tmp_path / "preferences"
    arms = ["dense_dpo", "seppo", "guided"]
    monkeypatch.setattr(sys, "argv", ["preferences", "--out", str(out), "--seeds", "0", "--arms", *arms])
    assert preferences.main() == 0
    found = json.loads((out / "results/dense_dpo_0.json").read_text("utf-8"))
    assert found["pairs"] == 4
    assert 0 <= found["held_out"] <= 1
    target = tmp_path / "page"
    monkeypatch.setattr(sys, "argv", ["preferences", "--out", str(out), "--report", str(target)])
    assert preferences.main() == 0
    page = target.with_suffix(".md").read_text("utf-8")
    assert page.count("| dense_dpo |") == page.count("| seppo |") == page.count("| guided |") == 1


def _few_clips(folder: Path, *options: str) -> Path:
    make(["--out", str(folder), "--num", "6", *options])
    return folder


def test_calm_judge_by_hand() -> None:
    """A frame that changes by .1 everywhere costs half; a still video loses nothing."""
    video = torch.zeros(1, 3, 3, 4, 4)
    assert preferences.calm(video, [""]).item() == 1
    video[:, 1] = 0.1
    assert preferences.calm(video, [""]).item() == pytest.approx(0.5)
