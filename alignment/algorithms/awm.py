"""AWM and V-GRPO: policy gradients whose log-probability is how well the velocity matches the finished sample.

A sample, noised to a few levels, is the likelier under a policy the better the policy's velocity points from the sample
to the noise. That surrogate, averaged over levels, takes the place of the log-probability in PPO's loss: the rollout is
one action, and follows the ODE. Guidance stays off: the policy absorbs it.

              surrogate  group_noise  levels  std     trust region
    AWM       matching   no           6       global  kl 0.4 (PickScore: 0.01) and kl_ema 1, 1 update a rollout
    V-GRPO    adaptive   yes          4       group   clip 6e-3 to 3e-2 or kl_old 0.3 with several updates a rollout,
                                                      soft_clip 3 with 1

Sources: arXiv 2509.25050 (AWM; its recipes divide advantages by 5 and have kl 0.003 or 1e-4) and 2604.23380 (V-GRPO).

Differs from the papers: levels are drawn once an iteration for all samples, so that a batch shares them (AWM's code:
for a micro-batch, V-GRPO's: for a batch over all processes), and from the whole rollout (AWM's recipes leave out its
last tenth, some its first step). The ratio is that of a sample, from its mean surrogate, as in V-GRPO; AWM's recipes
take one a level, which with their single update is the same. The step is Euler's unless sampler.tail is 1.

Logs: loss, surrogate (its mean), kl, kl/ema and kl/old (mean squared distances, see Config), advantage/std,
groups/zero_spread, groups/spread_share, gradient_share/step_<i> (by level, the highest first) and, with several updates
a rollout, ratio/mean, ratio/max_deviation, ratio/first_deviation, clip_fraction and clip_fraction/before_update (as in
grpo).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from samplers import Moment, Recorded, Trajectory, seed_for

from ..config import Recipe
from ..groups import GroupConfig, Signal, check_groups, own_signal
from ..noised import Noised, check_clean, check_flow, noise_seeds, sample_clean
from ..objectives import (
    adaptive_log_prob,
    clipped_surrogate,
    is_clipped,
    matching_log_prob,
    ramped_decay,
    soft_clip,
    velocity_divergence,
)
from ..optimization import follow
from ..tally import Tally
from ..training import Run

DRAWS = ("grid", "uniform", "logit_normal")
SURROGATES = ("matching", "adaptive")
LOWEST = 0.01  # level of a draw off the grid; of AWM's code
Weights = dict[str, Tensor]
Velocities = list[Tensor]  # one (B, ...) a level


@dataclass
class Config(GroupConfig):
    surrogate: str = "matching"  # matching (of velocities) or adaptive (of clean estimates, over their own error)
    levels: int = 6  # that a sample is noised to, one from each of as many strata of the rollout
    draw: str = "grid"  # grid: levels of steps; uniform or logit_normal: of any moment of the rollout
    group_noise: bool = False  # the samples of a group are noised alike
    clip: float | None = 0.03  # bound of the ratio; None: none
    soft_clip: float | None = None  # eta: advantages become eta tanh(A / eta)
    kl: float = 0.0  # weight of the distance of velocities from the reference's
    kl_ema: float = 0.0  # the same from a moving average of the policy, of decay min(0.001 updates, 0.3)
    kl_old: float = 0.0  # weight of the distance of clean estimates from those of the policy that sampled
    epochs: int = 1  # passes over a rollout

    @property
    def off_policy(self) -> bool:
        """Whether an update sees weights that are not those of the rollout."""
        return self.updates_per_rollout * self.epochs > 1


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_groups(config, processes) + check_clean(recipe)
    for key, known in (("surrogate", SURROGATES), ("draw", DRAWS)):
        if getattr(config, key) not in known:
            wrong.append(f"algorithm.{key}: {getattr(config, key)!r} is none of {', '.join(known)}")
    if config.levels < 1 or (config.draw == "grid" and config.levels > recipe.sampler.steps):
        wrong.append(f"algorithm.levels: {config.levels} of {recipe.sampler.steps} steps (sampler.steps)")
    if any(bound is not None and bound <= 0 for bound in (config.clip, config.soft_clip)):
        wrong.append("algorithm: clip and soft_clip have to be above 0, or null for none")
    if min(config.kl, config.kl_ema, config.kl_old) < 0 or config.epochs < 1:
        wrong.append("algorithm: kl, kl_ema and kl_old have to be 0 or more, epochs 1 or more")
    if config.kl_old > 0 and not config.off_policy:
        wrong.append("algorithm.kl_old: with one update a rollout it is 0; set it to 0, or raise updates_per_rollout")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return config.kl > 0


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config: Config = run.recipe.algorithm
    check_flow(run.policy)
    average = run.snapshot("ema") if config.kl_ema > 0 else {}
    for _ in run.iterations():
        prompts = run.next_prompts(config.prompts_per_iteration)
        with run.timer("rollout"):
            samples, videos, grid = sample_clean(run, prompts, config.group_size)
        readings = run.score(videos, samples.prompts, samples.groups, config.group_size)
        del videos  # at full size a group of them weighs more than the model
        signal = own_signal(run, readings.totals, config)
        if config.soft_clip is not None:
            signal = signal._replace(advantages=soft_clip(signal.advantages, config.soft_clip))
        levels = draw_levels(grid, config.levels, config.draw, seed_for(run.recipe.seed, "levels", run.iteration))
        seeds = noise_seeds(run, samples, config.group_size, config.group_noise)
        noised, tally = Noised(run.policy, samples, levels, seeds), Tally()
        parameters = run.policy.parameters
        sampled = {name: p.detach().clone() for name, p in parameters.items()} if config.off_policy else {}
        with run.timer("update"):
            for _ in range(config.epochs):
                for part in range(config.updates_per_rollout):
                    rows = signal.rows_of_part(part, config.updates_per_rollout)
                    update(run, noised, signal, rows, sampled, tally)
            follow(average, parameters, ramped_decay(run.updates, 0.001, 0.3))
        run.log(tally.metrics(run))


def draw_levels(grid: Sequence[float], count: int, draw: str, seed: int) -> tuple[float, ...]:
    """Noise levels, one from each of `count` equal strata of the rollout, highest first.

    Args:
        grid: the T + 1 levels of the rollout, falling; between them it is taken to be linear.
        draw: "grid", the level that one of a stratum's steps starts from; "uniform" or "logit_normal", that of any
            moment u in 0..1 of the rollout, uniform or with logit(u) standard normal, in strata of equal probability.
    """
    generator, steps = random.Random(seed), len(grid) - 1
    if draw == "grid":
        bounds = [i * steps // count for i in range(count + 1)]
        return tuple(grid[generator.randrange(*ends)] for ends in zip(bounds, bounds[1:], strict=False))
    moments = [(i + generator.random()) / count for i in range(count)]
    if draw == "logit_normal":
        moments = [1 / (1 + math.exp(-NormalDist().inv_cdf(max(u, 1e-7)))) for u in moments]
    levels = np.interp(moments, np.linspace(0, 1, steps + 1), grid)
    return tuple(max(float(level), LOWEST) for level in levels)


class Anchor(NamedTuple):
    """Weights that the policy is held close to, and their velocities for a micro-batch."""

    name: str
    weight: float
    velocities: Velocities
    clean: bool = False  # whether clean estimates are compared: their distance is level^2 times that of velocities


def update(run: Run, noised: Noised, signal: Signal, rows: list[int], sampled: Weights, tally: Tally) -> None:
    """One optimiser step on these samples of this process.

    Args:
        sampled: the weights that drew the samples; empty where every update is the first after its rollout.
    """
    config: Config = run.recipe.algorithm
    count, clip = run.processes.total(len(rows)) * len(noised.levels), config.clip or math.inf
    for part, trajectory in noised.batches(run.recipe.batch.update, rows):
        old = noised.velocities(part, trajectory, run.policy.using(sampled)) if sampled else []
        before = mean_log_prob(noised, trajectory, old, config)
        changed = sampled and tally.updates > 0
        now = noised.velocities(part, trajectory, nullcontext()) if changed else old
        change = mean_log_prob(noised, trajectory, now, config) - before
        advantages, anchors, after = signal.advantages[:, part], anchors_of(run, noised, part, trajectory, old), []

        def visit(
            moment: Moment,
            seen: Recorded,
            change: Tensor = change,
            advantages: Tensor = advantages,
            anchors: list[Anchor] = anchors,
            after: list[Tensor] = after,
        ) -> None:
            level, v = noised.levels[seen.index], moment.output
            value = log_prob(v, seen, level, config.surrogate)
            log_ratio = change + value - value.detach()  # the sample's in value, this level's part of it in gradient
            losses = torch.stack([clipped_surrogate(log_ratio, a, clip) for a in advantages])
            loss = signal.weights.to(losses) @ losses
            for anchor in anchors:
                distance = velocity_divergence(v, anchor.velocities[seen.index]) * (level**2 if anchor.clean else 1)
                tally.add(anchor.name, distance)
                loss = loss + anchor.weight * distance
            after.append(value.detach())
            tally.add("loss", loss)
            tally.add("surrogate", value)
            tally.watch_gradient(moment)
            (loss.sum() / count).backward()

        noised.visit(part, trajectory, visit)
        if sampled:
            ratio, total = torch.stack(after).mean(0) - before, advantages.sum(0)
            tally.ratio(ratio, is_clipped(ratio, total, clip), (ratio.exp() - 1).abs() > clip)
    run.apply_update()
    tally.updates += 1


def log_prob(velocity: Tensor, seen: Recorded, level: float, surrogate: str) -> Tensor:
    """(B,) float64 likelihood surrogate of clean samples x_next, seen as x at a level."""
    if surrogate == "adaptive":
        return adaptive_log_prob(velocity, seen.x, seen.x_next, level)
    clean = seen.x_next.double()
    return matching_log_prob(velocity, clean + (seen.x - clean) / level, clean)


def mean_log_prob(noised: Noised, trajectory: Trajectory, velocities: Velocities, config: Config) -> Tensor:
    """(B,) over the levels; 0 where no velocities are given."""
    pairs = zip(velocities, trajectory.steps, noised.levels, strict=False)
    values = [log_prob(v, seen, level, config.surrogate) for v, seen, level in pairs]
    return torch.stack(values).mean(0) if values else torch.zeros((), dtype=torch.float64)


def anchors_of(run: Run, noised: Noised, rows: list[int], trajectory: Trajectory, old: Velocities) -> list[Anchor]:
    """The anchors that have a weight."""
    config: Config = run.recipe.algorithm
    anchors = [Anchor("kl/old", config.kl_old, old, clean=True)] if config.kl_old > 0 else []
    if config.kl > 0:
        anchors.append(Anchor("kl", config.kl, noised.velocities(rows, trajectory, run.policy.reference())))
    if config.kl_ema > 0:
        average = run.policy.using(run.snapshot("ema"))
        anchors.append(Anchor("kl/ema", config.kl_ema, noised.velocities(rows, trajectory, average)))
    return anchors
