"""DiffusionNFT (arXiv 2509.16117): supervised training on noised samples, towards the good and away from the bad ones.

An old policy draws the samples, by any solver. A sample's reward becomes the probability r that it is good; the policy
learns from r and from 1 - r through two implicit policies, v_old + beta (v - v_old) and v_old - beta (v - v_old), each
matched with the sample. The old policy follows the trained one slowly. Guidance stays off: the policy absorbs it.

    DiffusionNFT, one reward      beta 1, decay 1, group_size 24, LoRA of rank 32, lr 3e-4
    several rewards, or OCR       beta 0.1, decay 2 (OCR), 2 updates a rollout

Differs from the paper: levels are the rollout's, drawn once an iteration for all samples (its code: anew for each), so
that a batch shares them; steps are Euler's unless sampler.tail is 1 (its code: a second-order solver); a sample whose
reward is masked has r = 1/2, which holds the policy near the old one. r follows the code, half the clamped advantage
over its bound, plus a half; the paper divides the centred reward by a constant.

Logs: loss, kl (mean squared distance of velocities from the reference's), drift/old (the same from the old policy's),
old/decay, advantage/std, groups/zero_spread, groups/spread_share, gradient_share/step_<i> (share of the loss gradient's
norm at the network's output, by level, the highest first).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch import Tensor

from samplers import Moment, Recorded, seed_for

from ..config import Recipe
from ..groups import GroupConfig, Signal, check_groups, own_signal
from ..noised import Noised, check_clean, check_flow, noise_seeds, sample_clean
from ..objectives import nft_decay, nft_loss, optimality, velocity_divergence
from ..optimization import follow
from ..tally import Tally
from ..training import Run

Velocities = list[Tensor]  # one (B, ...) a level


@dataclass
class Config(GroupConfig):
    std: str = "global"  # what advantages are divided by: group, global, running, quasi or none
    trained_steps: int | None = None  # of the rollout's levels, drawn anew every iteration; None: all but one
    beta: float = 1.0  # how far the implicit policies lie from the old one
    decay: int = 1  # schedule of the old policy: 1 follows fast at first, 2 copies for 75 updates, then follows slowly
    kl: float = 1e-4  # weight of the distance from the reference


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_groups(config, processes) + check_clean(recipe)
    if config.trained_steps is not None and not 1 <= config.trained_steps <= recipe.sampler.steps:
        wrong.append(f"algorithm.trained_steps: {config.trained_steps} of {recipe.sampler.steps} (sampler.steps)")
    if config.max_advantage is None or config.max_advantage <= 0:
        wrong.append("algorithm.max_advantage: is where a sample counts as surely good; set it above 0, as 5")
    if config.combine == "losses":
        wrong.append("algorithm.combine: losses differ from advantages where ratios are clipped; set it to advantages")
    if config.decay not in (1, 2):
        wrong.append(f"algorithm.decay: {config.decay} is no schedule; use 1 or 2")
    if config.beta <= 0 or config.kl < 0:
        wrong.append("algorithm: beta has to be above 0, kl 0 or more")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return config.kl > 0


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config: Config = run.recipe.algorithm
    check_flow(run.policy)
    old = run.snapshot("old")
    for _ in run.iterations():
        prompts = run.next_prompts(config.prompts_per_iteration)
        with run.timer("rollout"), run.policy.using(old):
            samples, videos, grid = sample_clean(run, prompts, config.group_size)
        readings = run.score(videos, samples.prompts, samples.groups, config.group_size)
        del videos  # at full size a group of them weighs more than the model
        signal = own_signal(run, readings.totals, config)
        seeds = noise_seeds(run, samples, config.group_size)
        noised = Noised(run.policy, samples, trained_levels(run, grid), seeds)
        tally = Tally()
        with run.timer("update"):
            for part in range(config.updates_per_rollout):
                update(run, noised, signal, signal.rows_of_part(part, config.updates_per_rollout), tally)
            decay = nft_decay(config.decay, run.updates)
            follow(old, run.policy.parameters, decay)
        run.log({**tally.metrics(run), "old/decay": decay})


def trained_levels(run: Run, grid: tuple[float, ...]) -> tuple[float, ...]:
    """The noise levels of some of the rollout's steps, the same for all samples of the iteration."""
    num_steps = len(grid) - 1
    count = run.recipe.algorithm.trained_steps or max(1, num_steps - 1)
    draw = random.Random(seed_for(run.recipe.seed, "levels", run.iteration))
    return tuple(grid[i] for i in sorted(draw.sample(range(num_steps), count)))


def update(run: Run, noised: Noised, signal: Signal, rows: list[int], tally: Tally) -> None:
    """One optimiser step on these samples of this process."""
    config: Config = run.recipe.algorithm
    count = run.processes.total(len(rows)) * len(noised.levels)
    r = optimality(signal.advantages[0], config.max_advantage)
    for part, trajectory in noised.batches(run.recipe.batch.update, rows):
        old = noised.velocities(part, trajectory, run.policy.using(run.snapshot("old")))
        anchor = noised.velocities(part, trajectory, run.policy.reference()) if config.kl > 0 else []

        def visit(
            moment: Moment, seen: Recorded, part: list[int] = part, old: Velocities = old, anchor: Velocities = anchor
        ) -> None:
            i, v = seen.index, moment.output
            level, bound = noised.levels[i], config.max_advantage
            loss = nft_loss(v, old[i], seen.x, seen.x_next, level, r[part], config.beta, bound)
            tally.add("drift/old", velocity_divergence(v, old[i]))
            if config.kl > 0:
                distance = velocity_divergence(v, anchor[i])
                tally.add("kl", distance)
                loss = loss + config.kl * distance
            tally.add("loss", loss)
            tally.watch_gradient(moment)
            (loss.sum() / count).backward()

        noised.visit(part, trajectory, visit)
    run.apply_update()
    tally.updates += 1
