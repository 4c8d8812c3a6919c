"""Every recipe is valid, says what it needs, and runs: the tiny ones as they are, some large ones on random weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from alignment import annotate, generate
from alignment.checkpoint import checkpoints, load_state
from alignment.config import known_algorithms, load_recipe, trains_reward
from alignment.gains import compare, decompose
from alignment.metrics import read_metrics
from alignment.run import main
from examples.tiny_world import clips, flawed_pairs, flawed_videos
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


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the heads of recipes say to make first, in small: real clips, pairs from them, candidates, an expert LoRA.

    Pairs also come by their videos alone, which pipelines of any size can encode.
    """
    folder = tmp_path_factory.mktemp("made")
    recipe, real = str(ROOT / "recipes/tiny_flow_dpo.yaml"), folder / "clips"
    prompts, world = folder / "prompts.txt", ROOT / "examples/tiny_world"
    prompts.write_text("a red circle moves left\na small blue square moves up\n", "utf-8")
    small = [f"model.path={world / 'base'}", f"data.prompts={prompts}"]
    clips.make(["--out", str(real), "--num", "4"])
    found = {"clips": real, "flawed_videos": folder / "flawed_videos.jsonl", "flawed": folder / "flawed.jsonl"}
    flawed_videos.make(["--out", str(found["flawed_videos"]), "--num", "6"])
    flawed_pairs.make(["--out", str(found["flawed"]), "--num", "12"])
    for kind, how, labels in (
        ("guided", ["--guided", str(real)], ["--segments", "0.5"]),
        ("candidates", ["--candidates", "3"], []),
    ):
        pairs = folder / kind / "pairs.jsonl"
        assert generate.main([recipe, *small, *how, "--out", str(folder / kind)]) == 0
        index = str(folder / kind / "index.jsonl")
        assert annotate.main([index, "--reward", "sprite_motion", *labels, "--out", str(pairs), "--no-probes"]) == 0
        rows = [json.loads(line) for line in pairs.read_text("utf-8").splitlines()]
        for row in rows:
            row |= {member: {"video": row[member]["video"]} for member in "ab"}
        found[kind] = pairs
        found[f"{kind} as videos"] = pairs.with_name("videos.jsonl")
        found[f"{kind} as videos"].write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    found["expert"] = folder / "expert"
    small += [f"rewards.clip.options.path={world / 'clip'}", f"evaluation.prompts={prompts}", "tracker=null"]
    fewer = ["iterations=1", "algorithm.prompts_per_iteration=1", "algorithm.group_size=2", "evaluation.num_prompts=1"]
    assert main([recipe, *small, *fewer, f"output={found['expert']}"]) == 0
    return found


def made_first(path: Path, made: dict[str, Path]) -> list[str]:
    """Overrides that put something small in the place of what a recipe names and a user makes first."""
    recipe = load_recipe(path)
    found = [f"algorithm.experts.{name}={made['expert']}" for name in getattr(recipe.algorithm, "experts", {})]
    if named := recipe.data.preferences:
        kind = next(kind for kind in ("guided", "candidates", "clips", "flawed_videos", "flawed") if kind in named)
        pairs = made[kind if path in TINY else f"{kind} as videos"]
        found.append(f"data.preferences={pairs}")
        if recipe.data.held_out:
            one_label = ["algorithm.dimensions=[Overall]"] if kind == "candidates" else []
            found += [f"data.held_out={pairs}", *one_label]
    return found


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_recipe_is_valid(path: Path, capsys: pytest.CaptureFixture[str], made: dict[str, Path]) -> None:
    assert main([str(path), *made_first(path, made), "--check"]) == 0
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


@pytest.mark.parametrize("path", [path for path in RECIPES if load_recipe(path).data.preferences], ids=by_name)
def test_header_says_how_to_make_the_preferences(path: Path) -> None:
    """Or where that is said."""
    header = " ".join(line.strip("#\\ ") for line in path.read_text("utf-8").splitlines() if line.startswith("#"))
    other = next((p for p in RECIPES if p != path and f"the head of {p.name} says" in header), None)
    folder = str(Path(load_recipe(path).data.preferences).with_suffix(""))
    header += other.read_text("utf-8") if other else ""
    assert f"--out {folder}" in header


@pytest.mark.parametrize("path", TINY, ids=by_name)
def test_tiny_recipe_runs(path: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    small = ["iterations=2", "evaluation.num_prompts=2", *made_first(path, made)]
    algorithm = load_recipe(path).algorithm
    for key, value in {"prompts_per_iteration": 2, "group_size": 4, "batch_size": 2}.items():
        if hasattr(algorithm, key):  # trees have leaves
            small.append(f"algorithm.{key}={value}")
    assert main([str(path), *small, f"output={tmp_path / 'run'}"]) == 0
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows if row["iteration"]] == [1, 2]  # 0: of a reward that is trained
    # Another number of rows rounds otherwise: exactly 0 where a replay holds those of its rollout.
    assert all(row.get("ratio/first_deviation", 0) < 1e-6 for row in rows)
    left = ["lora/pytorch_lora_weights.safetensors", "samples/000002/00.mp4"]
    if trains_reward(load_recipe(path)):
        name = type(algorithm).__module__.rpartition(".")[2]
        left = {
            "latent_reward": ["latent_reward/weights.safetensors"],
            "reward_model": ["reward/model_config.json", "reward/checkpoint-2/adapter_model.safetensors"],
        }[name]
    for name in ("config.yaml", "report.html", *left):
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


@pytest.mark.parametrize(("name", "kind"), [("wan_flow_dpo", "candidates"), ("wan_dense_dpo", "guided")])
def test_wan_preference_recipe_on_random_weights(name: str, kind: str, tmp_path: Path, made: dict[str, Path]) -> None:
    """From videos: they are encoded by Wan's own VAE class, at the recipe's rate."""
    torch.manual_seed(0)
    wan()[0].save_pretrained(tmp_path / "wan")
    clip = [f"rewards.clip.options.{key}" for key in ("model=null", "pretrained=null", "path=examples/tiny_world/clip")]
    sizes = ["call.height=32", "call.width=32", "call.num_frames=9", "model.lora.rank=4", "evaluation.num_prompts=2"]
    fewer = ["iterations=2", "algorithm.batch_size=2", "evaluation.steps=3", "optimizer.warmup=0"]
    place = [f"model.path={tmp_path / 'wan'}", f"output={tmp_path / 'run'}", "model.device=cpu"]
    place.append(f"data.preferences={made[f'{kind} as videos']}")
    assert main([f"recipes/{name}.yaml", *place, *clip, *sizes, *fewer]) == 0
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2))
    assert rows[0]["margin/size"] == 0 < rows[1]["margin/size"]
    assert len(list((tmp_path / "run/latents").iterdir())) >= 4


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
