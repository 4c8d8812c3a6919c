"""GRPO on flow-matching generators, and the algorithms that differ from it in values alone.

                     kernel         noise       stochastic steps      trained       objective     updates a rollout
    DanceGRPO        dance 0.3      shared      all but the last      random 60 %   clip 1e-4     1 with guidance, 2-4
    Flow-GRPO        flow 0.7       independent all but the last      all           clip 1e-4, KL 0.01-0.04     2
    Flow-GRPO (Wan)  wan_linear 1.0 independent all but the last      all           clip 1e-3, KL 0.004         2
    Flow-GRPO-Fast   flow 0.7       independent 2-3, a random window of the first half      clip 1e-5           2
    MixGRPO          flow 0.7       shared      4, a window that slides every 25 iterations clip 1e-4           4
    MixGRPO-Flash    the same, with sampler.tail 0.4: a higher-order ODE solver after the window, on fewer steps
    Flash-GRPO       wan_linear 1.0 independent 1 of the first 10, the same for all samples of a prompt,
                                                losses rectified      clip 1e-3     2
    GRPO-Guard       any            independent as Flow-GRPO          guard 2e-6 to 4e-6 at 65,536 elements     2
    FlowDPPO         any            independent as Flow-GRPO          dppo 1e-5 (of the KL)
    SAGE-GRPO        sage 0.7       independent all but the last, losses rectified, KL to weights that move on

Sources: arXiv 2505.07818 (DanceGRPO), 2505.05470 (Flow-GRPO), 2507.21802 (MixGRPO), 2605.15980 (Flash-GRPO), 2510.22319
(GRPO-Guard), 2606.11025 (FlowDPPO), 2603.21872 (SAGE-GRPO), 2609.03528 (LeanGRPO, the option `lean`).

Differs from the papers: the trained steps are drawn once an iteration for all samples (DanceGRPO's code: anew for each
sample), so that a batch shares its steps; the last step adds no noise (DanceGRPO rewards x0_hat of the last step and
drops its transition, which is the same thing); KL is the exact divergence of the step (Flow-GRPO's code leaves out the
step size, which its coefficients are tuned to); the log-ratio comes from the means (samplers.transitions.log_ratio);
GRPO-Guard's balance divides by c std, which is its step size but for the kernels it was not published for; SAGE's
equaliser divides by the mean of 1/c where its code takes the median, and the weight of its KL does not ramp up.
With one update a rollout the ratio is 1, and neither clip nor guard nor dppo has an effect.

Logs: ratio/mean, ratio/max_deviation, ratio/first_deviation (|log ratio| before the first update: 0 if rollout and
replay agree), clip_fraction, clip_fraction/before_update, kl, kl/<updates>, loss, advantage/std, groups/zero_spread,
groups/spread_share (of the rewards' variance, the part within groups), gradient_share/step_<i> (share of the loss
gradient's norm at the network's output), window/start.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from samplers import Moment, Recorded, Trajectory
from samplers.transitions import Step, kl_divergence, log_ratio, normalised_log_ratio

from ..config import Recipe
from ..groups import GroupConfig, Signal, check_groups, own_signal
from ..lean import ScoreGradients
from ..objectives import clipped_surrogate, divergence_masked_surrogate, is_clipped, leaves_trust_region
from ..samples import Plan, Samples, sample_groups
from ..tally import Tally
from ..training import Run
from ..windows import Window, check_noise, noise_range, plan_steps

OBJECTIVES = ("clip", "guard", "dppo")


@dataclass
class Config(GroupConfig):
    window: Window = field(default_factory=Window)  # where the noise is; by default everywhere
    trained_steps: int | None = None  # of the stochastic steps, drawn anew every iteration; None: all
    rectify: bool = False  # divide a step's loss by its gradient coefficient, so that steps count alike
    objective: str = "clip"  # clip, guard or dppo
    clip: float = 1e-4  # bound of the ratio; of its normalised form with guard; of the KL with dppo
    kl: float = 0.0  # weight of KL(policy || reference) of the trained steps
    kl_moving: dict[int, float] = field(default_factory=dict)  # n: weight of KL to the weights renewed every n updates
    epochs: int = 1  # passes over a rollout
    lean: bool = False  # take gradients while the rollout runs, one sample at a time: no forward pass in the update


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    start, stop = noise_range(recipe)
    wrong = check_groups(config, processes) + check_noise(recipe, config.window)
    noisy = config.window.size or stop - start
    if config.trained_steps is not None and not 1 <= config.trained_steps <= noisy:
        wrong.append(f"algorithm.trained_steps: {config.trained_steps} of {noisy} stochastic steps")
    if recipe.sampler.tail is not None and not config.window.size and stop >= recipe.sampler.steps - 1:
        wrong.append("sampler.tail: no steps follow the noise; set algorithm.window.size or sampler.window")
    if config.objective not in OBJECTIVES:
        wrong.append(f"algorithm.objective: {config.objective!r} is none of {', '.join(OBJECTIVES)}")
    if config.rectify and config.objective == "guard":
        wrong.append("algorithm.rectify: guard balances the steps already; set it to false")
    if config.clip <= 0 or config.kl < 0 or config.epochs < 1:
        wrong.append("algorithm: clip has to be above 0, kl 0 or more, epochs 1 or more")
    if any(every < 1 or weight < 0 for every, weight in config.kl_moving.items()):
        wrong.append("algorithm.kl_moving: updates have to be 1 or more, weights 0 or more, as in {10: 1e-5}")
    plain = config.objective == "clip" and config.kl == 0 and not config.kl_moving
    if config.lean and not (plain and config.updates_per_rollout == config.epochs == 1):
        wrong.append("algorithm.lean: exact for one update a rollout with objective clip and without KL only")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return config.kl > 0


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config: Config = run.recipe.algorithm
    for _ in run.iterations():
        prompts = run.next_prompts(config.prompts_per_iteration)
        scores = ScoreGradients(run.policy, lambda step: step_weight(step, config)) if config.lean else None
        with run.timer("rollout"):
            samples, videos = sample_groups(run, prompts, config.group_size, lambda at: plan(run, at), scores)
        readings = run.score(videos, samples.prompts, samples.groups, config.group_size)
        del videos  # at full size a group of them weighs more than the model
        signal = own_signal(run, readings.totals, config)
        tally = Tally()
        with run.timer("update"):
            if scores:
                lean_update(run, scores, signal)
            for _ in range(0 if scores else config.epochs):
                for part in range(config.updates_per_rollout):
                    rows = signal.rows_of_part(part, config.updates_per_rollout)
                    update(run, samples, signal, rows, tally)
        run.log({**tally.metrics(run), "window/start": plan(run, prompts[0][0]).stochastic[0]})


def plan(run: Run, position: int) -> Plan:
    """The stochastic and the trained steps of the group at a position of the stream."""
    config: Config = run.recipe.algorithm
    allowed = run.policy.stochastic_steps
    return plan_steps(config.window, allowed, config.trained_steps, run.recipe.seed, run.iteration, position)


def step_weight(step: Step, config: Config) -> float:
    """Of a step's loss, before weights are brought to mean 1 over an update."""
    if config.objective == "guard":
        return step.gradient_balance
    return 1 / abs(step.gradient_coefficient) if config.rectify else 1.0


def update(run: Run, samples: Samples, signal: Signal, rows: list[int], tally: Tally) -> None:
    """One optimiser step on these samples of this process."""
    config: Config = run.recipe.algorithm
    count, scale = pairs_and_scale(run, samples.steps(rows))
    for part, trajectory in samples.batches(run.recipe.batch.update, rows):
        anchors = [Anchor(*a, means(run, samples, part, trajectory, a[2])) for a in anchor_weights(run)]
        advantages = signal.advantages[:, part]

        def visit(
            moment: Moment, recorded: Recorded, anchors: list[Anchor] = anchors, advantages: Tensor = advantages
        ) -> None:
            losses, ratio, stopped, outside = surrogate(moment, recorded, advantages, config)
            loss = step_weight(moment.step, config) * scale * (signal.weights.to(losses) @ losses)
            tally.ratio(ratio, stopped, outside)
            for anchor in anchors:
                divergence = kl_divergence(moment.mean, anchor.means[recorded.index], moment.step.std)
                tally.add(anchor.name, divergence)
                loss = loss + anchor.weight * divergence
            tally.add("loss", loss)
            tally.watch_gradient(moment)
            (loss.sum() / count).backward()

        samples.replay(run.policy, part, trajectory, visit)
    for every in config.kl_moving:  # renewed before the step: an anchor equal to the weights would hold nothing
        run.snapshot(f"kl_{every}", renew=run.updates % every == 0)
    run.apply_update()
    tally.updates += 1


def surrogate(
    moment: Moment, recorded: Recorded, advantages: Tensor, config: Config
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses (K, B); log-ratio (B,); whether the trust region takes the gradient away; whether a sample is outside."""
    x_next, std = recorded.x_next, moment.step.std
    ratio_of = normalised_log_ratio if config.objective == "guard" else log_ratio
    ratio = ratio_of(x_next, moment.mean, recorded.mean, std)
    total = advantages.sum(0)
    if config.objective == "dppo":
        divergence = kl_divergence(moment.mean, recorded.mean, std)
        losses = [divergence_masked_surrogate(ratio, divergence, a, config.clip) for a in advantages]
        stopped = leaves_trust_region(ratio, divergence, total, config.clip)
        return torch.stack(losses), ratio, stopped, divergence.detach() >= config.clip
    losses = [clipped_surrogate(ratio, a, config.clip) for a in advantages]
    outside = (ratio.detach().exp() - 1).abs() > config.clip
    return torch.stack(losses), ratio, is_clipped(ratio, total, config.clip), outside


def pairs_and_scale(run: Run, steps: list[Step]) -> tuple[float, float]:
    """The (sample, step) pairs of an update over all processes, and what brings the mean of their weights to 1."""
    config: Config = run.recipe.algorithm
    weights = sum(step_weight(step, config) for step in steps)
    sums = run.processes.sum(torch.tensor([len(steps), weights], dtype=torch.float64, device=run.policy.device))
    return float(sums[0]), float(sums[0] / sums[1])


class Anchor(NamedTuple):
    """Weights that the policy is held close to, and what they make of the steps of a micro-batch."""

    name: str
    weight: float
    weights: Callable[[], AbstractContextManager]
    means: dict[int, Tensor]  # step index -> (B, ...) mean of the next state


def anchor_weights(run: Run) -> list[tuple[str, float, Callable[[], AbstractContextManager]]]:
    """Name, weight of the KL, and a context with the weights, of every anchor."""
    config: Config = run.recipe.algorithm
    found = [("kl", config.kl, run.policy.reference)] if config.kl > 0 else []
    for every, weight in config.kl_moving.items():
        snapshot = run.snapshot(f"kl_{every}")
        found.append((f"kl/{every}", weight, lambda weights=snapshot: run.policy.using(weights)))
    return found


def means(
    run: Run, samples: Samples, rows: list[int], trajectory: Trajectory, weights: Callable[[], AbstractContextManager]
) -> dict[int, Tensor]:
    """Step index -> (B, ...) mean of the next state under other weights, without gradients."""
    found = {}
    with weights(), torch.no_grad():
        samples.replay(run.policy, rows, trajectory, lambda m, r: found.update({r.index: m.mean}))
    return found


def lean_update(run: Run, scores: ScoreGradients, signal: Signal) -> None:
    """The same optimiser step from the gradients that were taken in the rollout."""
    count, scale = pairs_and_scale(run, [step for row in signal.rows for step in scores.steps[row]])
    kept = torch.zeros_like(signal.advantages[0])
    kept[signal.rows] = 1
    scores.scale(-kept * scale * (signal.weights @ signal.advantages) / count)
    run.apply_update()
