"""GRPO's loop: what it trains, logs, refuses, and that it learns."""

import json

import pytest

from alignment.algorithms import grpo
from alignment.algorithms.grpo import Config
from alignment.config import EvaluationConfig, LoRAConfig, OptimizerConfig, Recipe, RewardConfig
from tests.alignment.tiny import grpo_run, make_policy, make_run
from tests.pipelines import STEPS


def metrics(run):
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def trained(folder, **algorithm):
    run = grpo_run(folder, **algorithm)
    run.open()
    grpo.train(run)
    return run, metrics(run)


def test_later_updates_see_other_ratios(tmp_path):
    """The second epoch, and the second part too, replay under weights that have moved."""
    _, one = trained(tmp_path / "one")
    _, epochs = trained(tmp_path / "epochs", epochs=2, clip=1e-5)
    _, parts = trained(tmp_path / "parts", updates_per_rollout=2)
    for row in one:
        assert row["ratio/max_deviation"] == row["ratio/first_deviation"] == row["clip_fraction"] == 0
    for row in epochs + parts:
        assert row["ratio/first_deviation"] < 1e-6 < row["ratio/max_deviation"]
        assert row["clip_fraction/before_update"] == 0
    assert all(row["clip_fraction"] > 0.1 for row in epochs)


def test_metrics_of_an_iteration(tmp_path):
    run, rows = trained(tmp_path, trained_steps=2, kl=0.1)
    for row in rows:
        shares = [value for name, value in row.items() if name.startswith("gradient_share/")]
        assert len(shares) == 2
        assert sum(shares) == pytest.approx(1, rel=1e-5)
        assert row["grad_norm"] > 0
        assert row["kl"] > 0
        assert row["advantage/std"] == pytest.approx(1, rel=1e-4)
        rollout, update = 8 * STEPS, 8 * 2
        assert row["nfe"] == 2 * (rollout + update + update)  # guidance doubles; the reference replays too
    assert [row["drift/weights"] > 0 for row in rows] == [True, True]


def refused(**sections):
    """Lines about a recipe that differs from a good one in these values."""
    recipe = Recipe(name="x", algorithm=Config())
    for name, values in sections.items():
        for key, value in values.items():
            setattr(getattr(recipe, name), key, value)
    return grpo.check(recipe, processes=2)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({}, None),
        ({"sampler": {"window": [3, 9]}, "algorithm": {"trained_steps": 6, "std": "none"}}, None),
        ({"sampler": {"kernel": "ode"}}, "sampler: "),
        ({"sampler": {"noise_level": 0.0}}, "sampler: "),
        ({"sampler": {"window": [3, 3]}}, "sampler.window"),
        ({"sampler": {"window": [3, 21]}}, "sampler.window"),
        ({"sampler": {"window": [-1, 3]}}, "sampler.window"),
        ({"sampler": {"steps": 1}}, "sampler.window"),
        ({"sampler": {"kernel": "cps", "window": [3, 20]}}, "sampler.window"),
        ({"algorithm": {"group_size": 1}}, "algorithm.group_size"),
        ({"algorithm": {"trained_steps": 20}}, "algorithm.trained_steps"),
        ({"algorithm": {"trained_steps": 0}}, "algorithm.trained_steps"),
        ({"algorithm": {"updates_per_rollout": 9}}, "algorithm.updates_per_rollout"),
        ({"algorithm": {"updates_per_rollout": 0}}, "algorithm.updates_per_rollout"),
        ({"algorithm": {"prompts_per_iteration": 3}}, "algorithm.prompts_per_iteration"),
        ({"algorithm": {"std": "batch"}}, "algorithm.std"),
        ({"algorithm": {"clip": 0.0}}, "algorithm: "),
        ({"algorithm": {"kl": -0.1}}, "algorithm: "),
        ({"algorithm": {"epochs": 0}}, "algorithm: "),
        ({"model": {"dtype": "float16"}}, "model.dtype"),
    ],
)
def test_impossible_combinations_are_refused(sections, named):
    lines = refused(**sections)
    assert lines == [] if named is None else any(line.startswith(named) for line in lines)


ADAPTED = ["to_v", "to_out.0", "proj_out"]


@pytest.mark.parametrize(
    ("family", "weight"), [("stable_diffusion_3", 1.0), ("stable_diffusion_3", -1.0), ("wan", 1.0)]
)
def test_it_learns(family, weight, tmp_path):
    """Mean brightness, wanted or unwanted: the reward rises by many times its spread, on held-out noise too."""
    targets = [*ADAPTED, "net.2", "net.0.proj"] if family == "wan" else ADAPTED
    policy = make_policy(
        family,
        model={"lora": LoRAConfig(rank=8, alpha=16, targets=targets)},
        sampler={"shared_noise": False, "noise_level": 1.0 if family == "wan" else 0.7},
        call={"guidance_scale": 1.0},
    )
    run = make_run(
        tmp_path,
        policy,
        Config(prompts_per_iteration=2, group_size=12),
        iterations=15,
        rewards={"brightness": RewardConfig(use="tests.alignment.tiny:brightness", weight=weight)},
        optimizer=OptimizerConfig(lr=0.03),
        evaluation=EvaluationConfig(num_prompts=8, videos=1),
    )
    run.open()
    grpo.train(run)
    rows = metrics(run)
    gain = rows[-1]["reward/mean"] - rows[0]["reward/mean"]
    assert gain > 3 * rows[0]["reward/std"]
    before, after = (json.loads((run.folder / f"samples/{i:06d}/scores.json").read_text()) for i in (0, 15))
    pairs = zip(before["values"]["reward/mean"], after["values"]["reward/mean"], strict=True)
    assert all(b < a for b, a in pairs)
