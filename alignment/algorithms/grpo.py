"""GRPO on flow-matching generators: DanceGRPO (arXiv 2505.07818) and Flow-GRPO (arXiv 2505.05470).

The two differ in values, not in control flow:

                     kernel   noise   initial noise   trained steps           clip   KL          updates a rollout
    DanceGRPO        dance    0.3     shared          a random 60 %           1e-4   none        1 with guidance, 2-4
    Flow-GRPO        flow     0.7     independent     all but the last        1e-4   0.01-0.04   2
    Flow-GRPO (Wan)  wan_linear 1.0   independent     all but the last        1e-3   0.004       2

Differs from the papers: the trained steps are drawn once an iteration for all samples (DanceGRPO's code: anew for each
sample), so that a batch shares its steps; the last step adds no noise (DanceGRPO rewards x0_hat of the last step and
drops its transition, which is the same thing); KL is the exact divergence of the step (Flow-GRPO's code leaves out the
step size, which its coefficients are tuned to); the log-ratio comes from the means (samplers.transitions.log_ratio).
With one update a rollout the ratio is 1 and the clip has no effect.

Logs: ratio/mean, ratio/max_deviation, ratio/first_deviation (|log ratio| before the first update: 0 if rollout and
replay agree), clip_fraction, clip_fraction/before_update, kl, loss, advantage/std, groups/zero_spread,
gradient_share/step_<i> (share of the loss gradient's norm at the network's output).
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplers import Moment, Recorded, Trajectory, seed_for
from samplers.transitions import kl_divergence, log_ratio

from ..advantages import group_advantages, group_statistics
from ..config import Recipe
from ..data import Prompt
from ..objectives import clipped_surrogate, is_clipped
from ..policy import Policy, as_videos, moved
from ..training import Run


@dataclass
class Config:
    prompts_per_iteration: int = 8  # over all processes
    group_size: int = 8  # samples a prompt
    trained_steps: int | None = None  # of the stochastic steps, drawn anew every iteration; None: all
    updates_per_rollout: int = 1  # optimiser steps, each on its part of every group
    epochs: int = 1  # passes over a rollout
    clip: float = 1e-4
    kl: float = 0.0  # weight of KL(policy || reference) of the trained steps
    std: str = "group"  # what advantages are divided by: group, global or none
    max_advantage: float | None = 5.0


class Samples(NamedTuple):
    """This process's samples, group by group."""

    prompts: list[Prompt]  # N
    groups: list[int]  # N, position of the prompt in the stream
    trajectory: Trajectory  # in host memory


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    num_steps = recipe.sampler.steps
    start, stop = recipe.sampler.window or (0, num_steps - 1)
    wrong = []
    if recipe.sampler.kernel == "ode" or recipe.sampler.noise_level == 0:
        wrong.append("sampler: a deterministic sampler has no policy gradient; set kernel and noise_level > 0")
    if config.group_size < 2:
        wrong.append(f"algorithm.group_size: {config.group_size} has no group to compare with; use 2 or more")
    if not 0 <= start < stop <= num_steps:
        wrong.append(f"sampler.window: [{start}, {stop}] holds no step of a rollout of {num_steps} (sampler.steps)")
    elif config.trained_steps is not None and not 1 <= config.trained_steps <= stop - start:
        wrong.append(f"algorithm.trained_steps: {config.trained_steps} of {stop - start} stochastic steps")
    elif stop == num_steps and recipe.sampler.kernel in ("cps", "ddim"):
        wrong.append(
            f"sampler.window: kernel {recipe.sampler.kernel} adds no noise in the last step; end at {stop - 1}"
        )
    if recipe.model.dtype == "float16":
        wrong.append("model.dtype: gradients of a mean over a latent's elements underflow in float16; use bfloat16")
    if not 1 <= config.updates_per_rollout <= config.group_size:
        wrong.append(f"algorithm.updates_per_rollout: {config.updates_per_rollout} is not in 1..group_size")
    if config.prompts_per_iteration < 1 or config.prompts_per_iteration % processes:
        wrong.append(
            f"algorithm.prompts_per_iteration: {config.prompts_per_iteration} cannot be dealt to {processes} processes"
        )
    if config.std not in ("group", "global", "none"):
        wrong.append(f"algorithm.std: {config.std!r} is none of group, global, none")
    if config.clip <= 0 or config.kl < 0 or config.epochs < 1:
        wrong.append("algorithm: clip has to be above 0, kl 0 or more, epochs 1 or more")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return config.kl > 0


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config: Config = run.recipe.algorithm
    for iteration in run.iterations():
        prompts = run.next_prompts(config.prompts_per_iteration)
        steps = trained_steps(run.policy.stochastic_steps, config.trained_steps, run.recipe.seed, iteration)
        with run.timer("rollout"):
            samples, videos = sample_groups(run, prompts, config.group_size, steps)
        readings = run.score(videos, samples.prompts, samples.groups, config.group_size)
        del videos  # at full size a group of them weighs more than the model
        advantages = own_advantages(run, run.scorer.combined(readings.totals), config)
        with run.timer("update"):
            reference = reference_means(run, samples, config) if config.kl > 0 else None
            tally = Tally()
            for _ in range(config.epochs):
                for part in range(config.updates_per_rollout):
                    update(run, samples, advantages, reference, part, tally)
        run.log(tally.metrics(run, config))


def trained_steps(stochastic: list[int], count: int | None, seed: int, iteration: int) -> list[int]:
    """The steps that this iteration trains, the same for every sample and process."""
    if count is None or count >= len(stochastic):
        return stochastic
    return sorted(random.Random(seed_for(seed, "steps", iteration)).sample(stochastic, count))


def sample_groups(
    run: Run, prompts: list[tuple[int, Prompt]], group_size: int, steps: list[int]
) -> tuple[Samples, Tensor]:
    """Draw `group_size` samples a prompt, and their videos (N, F, C, H, W) in [0, 1].

    A sample depends on its prompt, iteration and number alone.
    """
    seed, shared = run.recipe.seed, run.recipe.sampler.shared_noise
    rows = [(position, prompt, member) for position, prompt in prompts for member in range(group_size)]
    latents = [seed_for(seed, "latents", run.iteration, position, 0 if shared else m) for position, _, m in rows]
    noises = [seed_for(seed, "noise", run.iteration, position, m) for position, _, m in rows]
    size = run.recipe.batch.rollout or len(rows)
    videos, trajectories = [], []
    for i in range(0, len(rows), size):
        texts = [prompt.text for _, prompt, _ in rows[i : i + size]]
        part = run.policy.rollout(texts, latents[i : i + size], noises[i : i + size], steps)
        videos.append(as_videos(part.frames))
        trajectories.append(moved(part.trajectory, "cpu"))
    trajectory = Trajectory.joined(trajectories)
    return Samples([p for _, p, _ in rows], [g for g, _, _ in rows], trajectory), torch.cat(videos)


def own_advantages(run: Run, rewards: Tensor, config: Config) -> Tensor:
    """(N,) advantages of this process's samples, from the rewards of all."""
    groups = torch.arange(len(rewards), device=rewards.device) // config.group_size
    advantages = group_advantages(rewards, groups, std=config.std, clamp=config.max_advantage)
    spread = group_statistics(rewards, groups, rewards.isfinite())[2].view(-1, config.group_size)[:, 0]
    run.log(
        {"advantage/std": float(advantages.std(correction=0)), "groups/zero_spread": 1 - float(spread.float().mean())}
    )
    by_group = advantages.view(-1, config.group_size)
    return by_group[run.processes.rank :: run.processes.count].flatten()


def batches(run: Run, rows: list[int]) -> list[list[int]]:
    size = run.recipe.batch.update or len(rows)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def reference_means(run: Run, samples: Samples, config: Config) -> dict[int, Tensor]:
    """step index -> (N, ...) mean of the next state under the reference, in host memory."""
    found: dict[int, list[Tensor]] = defaultdict(list)
    policy: Policy = run.policy
    with policy.reference():
        for rows in batches(run, list(range(len(samples.prompts)))):
            texts = [samples.prompts[i].text for i in rows]
            policy.replay(samples.trajectory.rows(rows), texts, lambda m, r: found[r.index].append(m.mean.cpu()))
    return {index: torch.cat(parts) for index, parts in found.items()}


def update(
    run: Run, samples: Samples, advantages: Tensor, reference: dict[int, Tensor] | None, part: int, tally: Tally
) -> None:
    """One optimiser step on the members `part`, `part + updates_per_rollout`, ... of every group."""
    config: Config = run.recipe.algorithm
    mine = [i for i in range(len(samples.prompts)) if i % config.group_size % config.updates_per_rollout == part]
    share = run.processes.count * len(mine) * len(samples.trajectory.steps)  # of (sample, step) pairs in this update
    for rows in batches(run, mine):
        advantage = advantages[rows]

        def visit(moment: Moment, recorded: Recorded, rows: list[int] = rows, advantage: Tensor = advantage) -> None:
            std = moment.step.std
            ratio = log_ratio(recorded.x_next, moment.mean, recorded.mean, std)
            loss = clipped_surrogate(ratio, advantage, config.clip)
            tally.ratio(ratio.detach(), is_clipped(ratio, advantage, config.clip))
            if reference is not None:
                divergence = kl_divergence(moment.mean, reference[recorded.index][rows].to(moment.mean.device), std)
                tally.kl.append(divergence.detach())
                loss = loss + config.kl * divergence
            tally.loss.append(loss.detach())
            moment.output.register_hook(lambda g: tally.gradient(recorded.index, g))
            (loss.sum() / share).backward()

        run.policy.replay(samples.trajectory.rows(rows), [samples.prompts[i].text for i in rows], visit)
    run.apply_update()
    tally.updates += 1


class Tally:
    """Sums over an iteration's updates, reduced over processes at the end."""

    def __init__(self) -> None:
        self.updates = 0
        self.log_ratios: list[Tensor] = []
        self.first: list[Tensor] = []  # of the first update
        self.clipped: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.loss: list[Tensor] = []
        self.gradients: dict[int, Any] = defaultdict(float)

    def ratio(self, log_ratio: Tensor, clipped: Tensor) -> None:
        self.log_ratios.append(log_ratio)
        self.clipped.append(clipped)
        if self.updates == 0:
            self.first.append(log_ratio)

    def gradient(self, index: int, gradient: Tensor) -> None:
        self.gradients[index] += gradient.detach().float().square().sum()

    def metrics(self, run: Run, config: Config) -> dict[str, float]:
        steps = sorted(self.gradients)
        squares = torch.stack([self.gradients[i] for i in steps]) if steps else torch.zeros(0)
        norms = run.processes.sum(squares).sqrt()
        shares = norms / norms.sum() if float(norms.sum()) > 0 else norms
        logs = run.processes.gather(torch.cat(self.log_ratios))
        first = run.processes.gather(torch.cat(self.first))
        found = {
            "ratio/mean": float(logs.exp().mean()),
            "ratio/max_deviation": float((logs.exp() - 1).abs().max()),
            "ratio/first_deviation": float(first.abs().max()),
            "clip_fraction": float(run.processes.gather(torch.cat(self.clipped).float()).mean()),
            "clip_fraction/before_update": float(((first.exp() - 1).abs() > config.clip).double().mean()),
            "loss": float(run.processes.gather(torch.cat(self.loss)).mean()),
            **{f"gradient_share/step_{i}": float(s) for i, s in zip(steps, shares, strict=True)},
        }
        if self.kl:
            found["kl"] = float(run.processes.gather(torch.cat(self.kl)).mean())
        return found
