"""What every algorithm that learns from preferences does alike, through the command: given pairs, and sampled ones."""

import functools
import importlib
import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import alignment.run
from alignment.algorithms import seppo, sft
from alignment.check import check_recipe
from alignment.checkpoint import checkpoints, load_state
from alignment.config import BatchConfig, known_algorithms, load_recipe
from alignment.data import Member
from alignment.distributed import Processes
from alignment.metrics import read_metrics
from alignment.preference import MatchingConfig
from alignment.run import main, prepare, train
from alignment.training import Run
from alignment.weighted import Video, sample_videos
from samplers import seed_for
from tests.alignment.preference_data import PROMPTS, ran, recipe_for, write_recipe
from tests.alignment.test_resume import assert_same_run
from tests.alignment.tiny import make_policy, make_run, shake
from tests.alignment.two_processes import joined, spawned

SAMPLED = {"prompts_per_iteration": 2, "group_size": 3, "updates_per_rollout": 2}
CASES = {
    "flow_dpo": {"beta": 50.0, "batch_size": 3},
    # What has a state of its own, and every way to weight: poly_alpha, gaps and rarity, generation noise.
    "flow_dpo renewed": {
        **{"beta": 50.0, "batch_size": 3, "renew_reference": 1, "noise": "own", "anchor": 0.1, "loss": "poly"},
        **{"poly_alpha": 2.0, "gap_beta": True, "rarity": 0.5, "beta_schedule": "flow", "dimension": "look"},
    },
    "dense_dpo": {"beta": 50.0, "batch_size": 3},
    "dense_dpo pair": {"beta": 50.0, "batch_size": 3, "aggregate": "pair", "anchor": 0.1, "noise": "independent"},
    "gapo": {"beta": 50.0, "batch_size": 3},
    "flow_rwr": {"batch_size": 5},
    "sft": {"batch_size": 3},
    "seppo": {"beta": 50.0, "batch_size": 4, "keep_every": 1, "checkpoints": 2},
    "tlpo": {"beta": 50.0, "batch_size": 3, "width": 4},
    "latent_reward": {"batch_size": 3, "layer": 1, "dimensions": ["look", "Overall"], "loss": "btt", "head_lr": 3e-3},
    "flow_dpo sampled": {"beta": 50.0, **SAMPLED},
    "gapo sampled": {"beta": 50.0, "score_range": [0.0, 100.0], "noise": "own", **SAMPLED},
    "flow_rwr sampled": SAMPLED,
    "sft sampled": SAMPLED,
}
# Every update and every loop once, where that takes time: others differ in a formula.
ONCE = ["flow_dpo", "dense_dpo", "flow_rwr", "seppo", "tlpo", "latent_reward", "flow_dpo sampled", "sft sampled"]


class Case(NamedTuple):
    recipe: Path
    alone: Path  # the run folder of an uninterrupted run


def written(folder: Path, base: Path, preferences: Path, name: str) -> Path:
    """The recipe of a case."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS), "utf-8")
    data = {"prompts": str(prompts)} if "sampled" in name else {"preferences": str(preferences / "latents.jsonl")}
    algorithm = {"name": name.partition(" ")[0], **CASES[name]}
    if name == "tlpo":
        algorithm["experts"] = {path.name: str(path) for path in sorted((preferences / "experts").iterdir())}
    recipe = recipe_for(base, algorithm, data)
    if name == "latent_reward":  # which trains a reward, and asks none
        del recipe["rewards"]
        recipe["data"]["held_out"] = data["preferences"]
    return write_recipe(folder / f"{name}.yaml", recipe)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base, preferences):
    """From a name to its case, which runs once."""

    @functools.cache
    def runs(name: str) -> Case:
        folder = tmp_path_factory.mktemp("case")
        recipe = written(folder, base, preferences, name)
        return Case(recipe, ran(recipe, folder / "alone"))

    return runs


def test_every_algorithm_is_here():
    modules = {name: importlib.import_module(f"alignment.algorithms.{name}") for name in known_algorithms()}
    wanted = {name for name, module in modules.items() if issubclass(module.Config, MatchingConfig)}
    assert {name.partition(" ")[0] for name in CASES} == wanted


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(checkpoints(folder / "checkpoints")[-1]).trained


def iterations(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without that of an evaluation before training."""
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["iteration"] > 0]


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", CASES)
def test_two_iterations(runs, name):
    alone = runs(name).alone
    rows = iterations(alone)
    assert [row["iteration"] for row in rows] == [1, 2]
    for row in rows:
        assert all(value is not None for value in row.values()), row
        assert row["grad_norm"] > 0
    assert 0 < rows[0]["drift/weights"] < rows[1]["drift/weights"]
    if name in ("flow_dpo", "dense_dpo"):  # the first update is at the reference, the second is not
        assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[0]["margin/size"] == 0 < rows[1]["margin/size"]
    assert (alone / "report.html").exists()
    weights = "latent_reward/weights" if name == "latent_reward" else "lora/pytorch_lora_weights"
    assert (alone / f"{weights}.safetensors").exists()


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_change_nothing(runs, name, tmp_path):
    recipe, alone = runs(name)
    single = ran(recipe, tmp_path / "single", "batch.update=1")
    # Of a head on members that are nearly alike gradients are small, and Adam enlarges what rounding makes of them.
    assert distance(trained(single), trained(alone)) < (1e-4 if name == "latent_reward" else 1e-5)
    for small, all_at_once in zip(*(iterations(path) for path in (single, alone)), strict=True):
        for metric in ("loss", "grad_norm"):  # Adam's weights do not know the size of a gradient
            assert small[metric] == pytest.approx(all_at_once[metric], rel=1e-4), metric


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", CASES)
def test_killed_and_resumed(runs, name, tmp_path, monkeypatch):
    """Nothing is written after the kill: what a process that ends at once leaves behind."""
    recipe, alone = runs(name)
    begin = Run._begin

    def killed(run, iteration):
        if iteration == 2:
            raise Killed
        begin(run, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_begin", killed)
        patch.setattr(alignment.run, "_rescue", lambda session: None)
        with pytest.raises(Killed):
            main([str(recipe), f"output={tmp_path / 'run'}"])
    assert len(iterations(tmp_path / "run")) == 1
    ran(recipe, tmp_path / "run", "--resume")
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize("name", ONCE)
def test_bfloat16(runs, name, tmp_path):
    recipe, alone = runs(name)
    folder = ran(recipe, tmp_path / "run", "model.dtype=bfloat16")
    rows = iterations(folder)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    weights = trained(folder)
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())
    assert 0 < distance(weights, trained(alone)) < 0.02


def worker(rank: int, folder: Path, port: int) -> None:
    processes = joined(rank, port)
    found = {}
    for name in ONCE:
        recipe = load_recipe(folder / f"{name}.yaml", [f"output={folder / name}"])
        check_recipe(recipe, processes.count)
        recipe.folder.mkdir(exist_ok=True)
        session = prepare(recipe, processes)
        train(session)
        session.close()
        found[name] = {n: p.detach().clone() for n, p in session.policy.parameters.items()}
    torch.save(found, folder / f"{rank}.pt")
    processes.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory, base, preferences):
    """A folder with the runs of two processes, and the weights of both ranks."""
    folder = tmp_path_factory.mktemp("two")
    for name in ONCE:
        written(folder, base, preferences, name)
    spawned(worker, folder)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ONCE)
def test_two_processes_are_one(runs, name, two):
    """Three given pairs are two and one; of the sampled groups the blue one is a tie, so one rank has no pair."""
    folder, ranks = two
    alone = runs(name).alone
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(first[weight], second[weight]) for weight in first)
    assert distance(first, trained(alone)) < 1e-4
    ours, theirs = (iterations(path) for path in (folder / name, alone))
    assert len(ours) == len(theirs) == 2
    for both, one in zip(ours, theirs, strict=True):
        assert both.keys() == one.keys()
        for metric in one:
            if not metric.startswith(("time/", "samples_per_second")):
                assert both[metric] == pytest.approx(one[metric], rel=1e-3, abs=1e-5), metric


@pytest.mark.parametrize("name", ["flow_dpo", "flow_rwr"])
def test_videos_are_encoded_first(runs, name, tmp_path, preferences, capsys):
    recipe, latents = runs(name)
    videos = ran(recipe, tmp_path / "videos", f"data.preferences={preferences}/videos.jsonl")
    assert "encoded 13 of 13 videos" in capsys.readouterr().out
    assert len(list((videos / "latents").iterdir())) == 13
    assert distance(trained(videos), trained(latents)) == 0


@pytest.mark.parametrize(
    ("name", "kind"), [("flow_dpo", "lora"), ("flow_dpo", "full"), ("dense_dpo", "full"), ("gapo", "full")]
)
def test_reference_does_not_learn(name, kind, tmp_path, base, preferences):
    recipe = load_recipe(
        written(tmp_path, base, preferences, name), [f"output={tmp_path}/run", f"model.trained={kind}"]
    )
    recipe.folder.mkdir()
    session = prepare(recipe, Processes(cpu=True))
    policy = session.policy
    parameters = dict(policy.pipe.transformer.named_parameters())
    frozen = {n: p for n, p in parameters.items() if not p.requires_grad} if kind == "lora" else policy.full_reference
    before = {n: p.detach().clone() for n, p in frozen.items()}
    start = {n: p.detach().clone() for n, p in policy.parameters.items()}
    train(session)
    assert before
    for n, p in frozen.items():
        assert torch.equal(p, before[n])
        assert p.grad is None
        assert not p.requires_grad
    assert all(not torch.equal(p, start[n]) for n, p in policy.parameters.items() if "lora_B" in n or kind == "full")
    if kind == "full":
        assert all(torch.equal(start[n], before[n]) for n in start)


def test_held_out_pairs_are_watched(runs, tmp_path, preferences):
    recipe, alone = runs("flow_dpo")
    folder = ran(recipe, tmp_path / "run", f"data.held_out={preferences}/latents.jsonl", "evaluation.every=1")
    rows = read_metrics(folder / "metrics.jsonl")
    assert all("eval/pairs/implicit_accuracy" in row and "eval/pairs/margin" in row for row in rows)
    assert distance(trained(folder), trained(alone)) == 0  # watching changes nothing


def sampling_run(folder, algorithm):
    """In its first iteration: groups whose samples differ, of a policy off its start."""
    policy = make_policy(sampler={"kernel": "ode", "shared_noise": False}, call={"guidance_scale": 1.0})
    run = make_run(folder, policy, algorithm)
    shake(policy)
    run.iteration, run.row = 1, {}
    return run


@pytest.mark.parametrize("size", [None, 2])
def test_sampled_videos_are_those_that_were_rewarded(tmp_path, size):
    """The last states of all samples, not all states of the last sample."""
    run = sampling_run(tmp_path, sft.Config(prompts_per_iteration=2, group_size=3))
    run.recipe.batch = BatchConfig(rollout=size)
    sampled = sample_videos(run)
    texts = [prompt.text for prompt in sampled.prompts]
    videos = run.policy.decode(torch.stack(sampled.states), texts)
    assert torch.allclose(videos.mean((1, 2, 3, 4)), sampled.rewards.float(), atol=1e-5)
    assert len({round(float(reward), 6) for reward in sampled.rewards}) == 6


def test_rivals_are_samples_of_the_videos_prompts(tmp_path):
    run = sampling_run(tmp_path, seppo.Config())
    prompts, positions = run.stream.prompts[:3], (4, 5, 6)
    alone = []
    for prompt, position in zip(prompts, positions, strict=True):
        seeds = [seed_for(0, kind, 1, position, 0) for kind in ("latents", "noise")]
        alone.append(run.policy.rollout([prompt.text], [seeds[0]], [seeds[1]], [], stochastic=()).state[0])
    run.given.load = lambda member: (torch.full_like(alone[0], member.seed), None)
    videos = [Video(prompt, Member(None, None, i), i, i, None) for i, prompt in enumerate(prompts)]
    examples = seppo.with_rivals(run, list(zip(positions, videos, strict=True)))
    for i, example in enumerate(examples):
        winner, rival = example.load()[0]
        assert (winner == i).all()
        assert torch.allclose(rival, alone[i], atol=1e-5)
