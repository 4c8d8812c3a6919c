"""Every recipe is valid, says what it needs, and runs: the tiny ones as they are, some large ones on random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from alignment.checkpoint import checkpoints, load_state
from alignment.config import known_algorithms, load_recipe
from alignment.gains import compare, decompose
from alignment.metrics import read_metrics
from alignment.run import main
from tests.pipelines import FAMILIES, wan

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = [path for path in RECIPES if path.name.startswith("tiny_")]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name files relative to the repository."""
    monkeypatch.chdir(ROOT)


def by_name(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipe_is_valid(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path), "--check"]) == 0
    assert "good" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_header_states_command_and_hardware(path: Path) -> None:
    header = [line for line in path.read_text("utf-8").splitlines() if line.startswith("#")]
    assert any(f"python -m alignment.run recipes/{path.name}" in line for line in header)
    assert any("Hardware:" in line for line in header)
    assert load_recipe(path).name == path.stem


def test_every_algorithm_has_a_tiny_recipe() -> None:
    used = {type(load_recipe(path).algorithm).__module__.rpartition(".")[2] for path in TINY}
    assert used == set(known_algorithms())


@pytest.mark.parametrize("path", TINY, ids=by_name)
def test_tiny_recipe_runs(path: Path, tmp_path: Path) -> None:
    small = ["iterations=2", "algorithm.prompts_per_iteration=2", "evaluation.num_prompts=2"]
    if hasattr(load_recipe(path).algorithm, "group_size"):  # trees have leaves
        small.append("algorithm.group_size=4")
    assert main([str(path), *small, f"output={tmp_path / 'run'}"]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2]
    # Another number of rows rounds otherwise: exactly 0 where a replay holds those of its rollout.
    assert all(row.get("ratio/first_deviation", 0) < 1e-6 for row in rows)
    for name in ("config.yaml", "report.html", "lora/pytorch_lora_weights.safetensors", "samples/000002/00.mp4"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_full_tuning_with_average_and_reference(tmp_path: Path) -> None:
    """Every weight trained, KL to a copy of the start, EMA: the saved component is the averaged one."""
    small = ["iterations=2", "algorithm.prompts_per_iteration=2", "algorithm.group_size=4", "evaluation.num_prompts=2"]
    full = ["model.trained=full", "optimizer.lr=1e-4", "ema.decay=0.5", "algorithm.kl=0.01", f"output={tmp_path}/run"]
    assert main(["recipes/tiny_grpo.yaml", *small, *full]) == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert rows[0]["kl"] == 0 < rows[1]["kl"]
    assert 0 < rows[0]["drift/weights"] < rows[1]["drift/weights"]
    saved = WanTransformer3DModel.from_pretrained(tmp_path / "run/transformer").state_dict()
    averaged = load_file(tmp_path / "run/checkpoints/000002/ema.safetensors")
    assert all(torch.equal(value, averaged[f"transformer.{name}"]) for name, value in saved.items())


def test_tiny_grpo_learns(tmp_path: Path) -> None:
    """A third of the recipe already raises the held-out reward on valid sprites, and they stay what they were."""
    short = ["iterations=10", "evaluation.num_prompts=48", "evaluation.videos=1", "tracker=null"]
    assert main(["recipes/tiny_grpo.yaml", *short, f"output={tmp_path / 'run'}"]) == 0
    before, after = (json.loads((tmp_path / f"run/samples/{i:06d}/scores.json").read_text()) for i in (0, 10))
    gain = decompose(before, after, "motion")
    assert gain.both_valid.change > 0.03
    assert gain.both_valid.z > 1
    assert gain.validity.after >= 0.95
    assert 0.75 < gain.area_ratio < 1.25
    assert compare(before, after)["reward/motion/speed"].change > 0


@pytest.mark.parametrize("name", ["wan_grpo", "wan_nft"])
def test_wan_recipe_on_random_weights(name: str, tmp_path: Path) -> None:
    """Wan's own scheduler, text-encoder and transformer classes; only the weights' place and the sizes differ."""
    torch.manual_seed(0)
    pipe, _ = wan()
    pipe.save_pretrained(tmp_path / "wan")
    clip = [f"rewards.clip.options.{key}" for key in ("model=null", "pretrained=null", "path=examples/tiny_world/clip")]
    sizes = ["call.height=32", "call.width=32", "call.num_frames=5", "model.lora.rank=4", "evaluation.num_prompts=2"]
    fewer = ["iterations=2", "algorithm.prompts_per_iteration=2", "algorithm.group_size=2", "evaluation.steps=3"]
    output = tmp_path / "run"
    arguments = [f"model.path={tmp_path / 'wan'}", *clip, *sizes, *fewer, f"output={output}", "model.device=cpu"]
    assert main([f"recipes/{name}.yaml", *arguments]) == 0
    rows = read_metrics(output / "metrics.jsonl")
    assert len(rows) == 2
    assert all(row.get("ratio/first_deviation", 0) < 1e-4 for row in rows)
    assert rows[-1]["drift/weights"] > 0


HUNYUAN = ["call.prompt_template={template: '{}', crop_start: 0}", "call.max_sequence_length=32", "algorithm.keep=2"]
HUNYUAN += [f"rewards.video_reward.options.{key}" for key in ("path=examples/tiny_world/video_reward", "template=null")]


@pytest.mark.parametrize(
    ("name", "family", "sizes", "trained"),
    [
        ("wan_i2v_grpo", "wan_image_to_video", [], 1),
        ("hunyuan_grpo", "hunyuan_video", ["sampler.steps=6", "algorithm.trained_steps=2", *HUNYUAN], 2),
    ],
)
def test_large_recipe_on_random_weights(name: str, family: str, sizes: list[str], trained: int, tmp_path: Path) -> None:
    """The model's own classes; the weights' place and the sizes differ, the precision is the recipe's."""
    FAMILIES[family]()[0].save_pretrained(tmp_path / "base")
    clip = [f"rewards.clip.options.{key}" for key in ("model=null", "pretrained=null", "path=examples/tiny_world/clip")]
    sizes = [*clip, *sizes, "call.height=32", "call.width=32", "call.num_frames=5", "model.lora.rank=4"]
    fewer = ["iterations=2", "algorithm.prompts_per_iteration=2", "algorithm.group_size=4", "evaluation.num_prompts=3"]
    place = [f"model.path={tmp_path / 'base'}", f"output={tmp_path / 'run'}", "model.device=cpu", "evaluation.steps=3"]
    assert main([f"recipes/{name}.yaml", *place, *sizes, *fewer]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2
    assert all(row["ratio/first_deviation"] < 1e-3 for row in rows)  # the self-check's bound for bfloat16
    assert rows[-1]["drift/weights"] > 0
    assert len(list((tmp_path / "run" / "samples").glob("*/*.mp4"))) == 6
    updates = load_state(checkpoints(tmp_path / "run" / "checkpoints")[-1]).updates
    assert updates == 2 * trained
