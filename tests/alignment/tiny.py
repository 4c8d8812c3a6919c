"""Policies and runs on tiny random pipelines, for the tests of learning."""

from pathlib import Path
from typing import Any

import torch

from alignment.algorithms import grpo
from alignment.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LoRAConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    RewardConfig,
    SamplerConfig,
)
from alignment.distributed import Processes
from alignment.policy import Policy
from alignment.scoring import Scorer
from alignment.training import Run
from samplers.transitions import log_prob
from tests.pipelines import FAMILIES, PROMPTS, STEPS

NOISE, GUIDANCE = 0.5, 3.0
DECIDED = ("prompt", "num_inference_steps", "output_type")  # arguments of a call that the policy sets itself


def brightness(videos, prompts):
    """A plain reward whose optimum anyone can see."""
    return [float(video.mean()) for video in videos]


def make_policy(family="wan", model=None, sampler=None, call=None) -> Policy:
    """A policy on a random pipeline of tests.pipelines; the rest are keys of the recipe's sections."""
    pipe, given = FAMILIES[family]()
    config = ModelConfig(path=family, **{"lora": LoRAConfig(rank=4, alpha=8), **(model or {})})
    if config.dtype != "float32":
        pipe.to(getattr(torch, config.dtype))
    given = {key: value for key, value in given.items() if key not in DECIDED}
    options = SamplerConfig(**{"steps": STEPS, **(sampler or {})})
    return Policy(pipe, config, options, {**given, **(call or {})}, "cpu")


def make_run(folder: Path, policy: Policy, algorithm: Any = None, **recipe) -> Run:
    """A run that rewards brightness, of GRPO or another algorithm, without the command around it."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join([*PROMPTS, "a green triangle moves up", "two white dots"]), "utf-8")
    algorithm = algorithm or grpo.Config(prompts_per_iteration=2, group_size=4)
    defaults = {
        "iterations": 2,
        "rewards": {"brightness": RewardConfig(use="tests.alignment.tiny:brightness")},
        "evaluation": EvaluationConfig(num_prompts=2, videos=1),
        "optimizer": OptimizerConfig(lr=1e-3),
        "batch": BatchConfig(),
        "data": DataConfig(prompts=str(prompts)),
    }
    options = {**defaults, **recipe, "algorithm": algorithm, "model": policy.model, "sampler": policy.sampler}
    settings = Recipe(name="tiny", output=str(folder / "run"), tracker=None, **options)
    settings.folder.mkdir(exist_ok=True)
    processes = Processes(cpu=True)
    return Run(settings, policy, Scorer(settings, processes.device), processes)


def grpo_run(folder: Path, **algorithm) -> Run:
    """A run in its first iteration: guided Wan, DanceGRPO's kernel, two groups of four, weights off the reference."""
    policy = make_policy(sampler={"kernel": "dance", "noise_level": NOISE}, call={"guidance_scale": GUIDANCE})
    shake(policy)
    sizes = {"prompts_per_iteration": 2, "group_size": 4, "clip": 10.0}
    run = make_run(folder, policy, grpo.Config(**{**sizes, **algorithm}))
    run.iteration, run.row = 1, {}
    return run


def ode_run(folder: Path, algorithm: Any) -> Run:
    """The same for an algorithm whose rollout follows the ODE."""
    policy = make_policy(sampler={"kernel": "ode", "shared_noise": False}, call={"guidance_scale": GUIDANCE})
    shake(policy)
    run = make_run(folder, policy, algorithm)
    run.iteration, run.row = 1, {}
    return run


def shake(policy: Policy, size: float = 0.1, seed: int = 0) -> None:
    """Move the trained weights at random, so that nothing is zero by initialisation."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(size * torch.randn(p.shape, generator=draw))


def imitate(policy: Policy, rows=(0, 1)) -> None:
    """Add the gradient of -log-prob of freshly sampled steps to the trained weights' gradients."""
    prompts, count = [PROMPTS[row] for row in rows], len(rows)
    seeds = list(range(count))
    trajectory = policy.rollout(prompts, seeds, [10 + s for s in seeds], policy.stochastic_steps).trajectory

    def visit(now, was):
        (-log_prob(was.x_next, now.mean, now.step.std)).sum().backward()

    policy.replay(trajectory, prompts, visit)
