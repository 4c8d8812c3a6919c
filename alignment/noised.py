"""Clean samples noised to levels of choice: what algorithms without log-probabilities train on.

The rollout follows the ODE and leaves its last state alone. Copies of it with fresh noise, each at a level of its own,
go through the network; how well its velocity there points from the clean sample to the noise says how likely the policy
makes the sample. Any solver will do for the rollout, and nothing of its trajectory is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from samplers import FlowSDEScheduler, Moment, Recorded, Trajectory, seed_for
from samplers.rollout import generators

from .config import Recipe
from .data import Prompt
from .errors import UserError
from .policy import Policy
from .samples import Plan, Samples, sample_groups

if TYPE_CHECKING:
    from .training import Run


def check_clean(recipe: Recipe) -> list[str]:
    """Settings of the rollout that have no effect or leave nothing to learn from, one line each."""
    sampler, wrong = recipe.sampler, []
    if sampler.shared_noise:
        wrong.append("sampler.shared_noise: without noise in its steps a group would be one video; set it to false")
    if sampler.window is not None:
        wrong.append("sampler.window: the rollout follows the ODE, no step adds noise; set it to null")
    if sampler.tail not in (None, 1):
        wrong.append("sampler.tail: nothing precedes the tail; set it to 1 or null, and sampler.steps to what you want")
    if recipe.model.dtype == "float16":
        wrong.append("model.dtype: gradients of a mean over a latent's elements underflow in float16; use bfloat16")
    return wrong


def check_flow(policy: Policy) -> None:
    """Raises: UserError where the pipeline is no flow, whose levels could be chosen."""
    if not isinstance(policy.scheduler, FlowSDEScheduler):
        name, stock = type(policy.pipe).__name__, type(policy.stock).__name__
        raise UserError(f"algorithm.name: needs a flow pipeline, {name} runs on {stock}; use grpo")


def sample_clean(
    run: Run, prompts: list[tuple[int, Prompt]], group_size: int
) -> tuple[Samples, Tensor, tuple[float, ...]]:
    """Draw groups by the ODE, whatever the sampler's kernel, and keep their last step (see `sample_groups`).

    Returns: the samples, their videos, and the T + 1 noise levels of the rollout.
    """
    plan = Plan(stochastic=(), recorded=(run.recipe.sampler.steps - 1,))
    samples, videos = sample_groups(run, prompts, group_size, lambda position: plan)
    return samples, videos, tuple(run.policy.scheduler.levels)


def noise_seeds(run: Run, samples: Samples, group_size: int, shared: bool = False) -> list[int]:
    """One for the noises of each sample in this iteration; with `shared` one for all of a group."""
    members = [0 if shared else row % group_size for row in range(len(samples.groups))]
    key = run.recipe.seed, "noised", run.iteration
    return [seed_for(*key, position, member) for position, member in zip(samples.groups, members, strict=True)]


class Noised(NamedTuple):
    """This process's N clean samples, each seen at the same S noise levels."""

    policy: Policy
    samples: Samples
    levels: tuple[float, ...]  # S, in (0, 1], highest first
    seeds: list[int]  # N, of the noises; samples of one seed share them

    def batches(self, size: int | None, rows: Sequence[int]) -> Iterator[tuple[list[int], Trajectory]]:
        """Micro-batches of at most `size` of these samples: step i of a trajectory is level i, x_next the clean state.

        On the policy's device. The noise of a sample depends on its seed alone, not on the batch.
        """
        for part, trajectory in self.samples.batches(size, rows):
            clean = trajectory.steps[-1].x_next.to(self.policy.device)
            shape = (len(self.levels), *clean.shape[1:])
            draws = [torch.randn(shape, generator=g) for g in generators([self.seeds[row] for row in part])]
            noises = torch.stack(draws, dim=1).to(clean.device)
            yield part, trajectory.noised(clean, self.levels, noises.unbind())

    def visit(self, rows: list[int], trajectory: Trajectory, visit: Callable[[Moment, Recorded], None]) -> None:
        """Run the network at every level of a micro-batch: `moment.output` is its velocity (see samplers.replay)."""
        self.samples.replay(self.policy, rows, trajectory, visit)

    def velocities(self, rows: list[int], trajectory: Trajectory, weights: AbstractContextManager) -> list[Tensor]:
        """S times (B, ...): what the network gives under other weights, without gradients."""
        found: list[Tensor] = []
        with weights, torch.no_grad():
            self.visit(rows, trajectory, lambda moment, recorded: found.append(moment.output))
        return found
