"""Groups of samples: drawn a prompt at a time, kept as trajectories in host memory, and handed out in micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from samplers import Moment, Recorded, Trajectory, seed_for
from samplers.transitions import Step

from .data import Prompt, conditions
from .policy import Policy, as_videos, moved

if TYPE_CHECKING:
    from .lean import ScoreGradients
    from .training import Run


class Plan(NamedTuple):
    """What a rollout does at its steps: the same for all samples of a group."""

    stochastic: tuple[int, ...]  # steps that add noise
    recorded: tuple[int, ...]  # steps that are kept


class Lot(NamedTuple):
    """Samples that a pipeline call can hold together: one plan, and one condition image if there is any."""

    rows: list[int]  # positions among this process's samples
    trajectory: Trajectory  # of these rows, in host memory


class Samples(NamedTuple):
    """This process's N samples, group by group."""

    prompts: list[Prompt]  # N
    groups: list[int]  # N, position of the prompt in the stream
    lots: list[Lot]

    def batches(self, size: int | None, rows: Sequence[int] | None = None) -> Iterator[tuple[list[int], Trajectory]]:
        """Micro-batches of at most `size` samples (None: no bound), of all rows or of some."""
        wanted = None if rows is None else set(rows)
        for lot in self.lots:
            places = [i for i, row in enumerate(lot.rows) if wanted is None or row in wanted]
            for part in chunks(places, size):
                yield [lot.rows[i] for i in part], lot.trajectory.rows(part)

    def steps(self, rows: Sequence[int]) -> list[Step]:
        """The recorded steps of these samples, one after the other."""
        wanted = set(rows)
        return [s.step for lot in self.lots for row in lot.rows if row in wanted for s in lot.trajectory.steps]

    def replay(
        self, policy: Policy, rows: list[int], trajectory: Trajectory, visit: Callable[[Moment, Recorded], None]
    ) -> None:
        """Run the recorded steps of these samples, all of one lot, again (see samplers.replay)."""
        prompts = [self.prompts[row] for row in rows]
        policy.replay(trajectory, [prompt.text for prompt in prompts], visit, **conditions(prompts))


def sample_groups(
    run: Run,
    prompts: list[tuple[int, Prompt]],
    group_size: int,
    plan: Callable[[int], Plan],
    scores: ScoreGradients | None = None,
) -> tuple[Samples, Tensor]:
    """Draw `group_size` samples a prompt, and their videos (N, F, C, H, W) in [0, 1].

    A sample depends on its prompt, iteration and number alone, not on the batch or process that it is drawn in.

    Args:
        prompts: (position in the stream, prompt).
        plan: from the position to what the group's rollouts do.
        scores: takes the gradients of the recorded steps, which are then not kept; samples are drawn one by one.
    """
    seed, iteration, shared_noise = run.recipe.seed, run.iteration, run.recipe.sampler.shared_noise
    size = run.recipe.batch.rollout if scores is None else 1
    rows = [(position, prompt, member) for position, prompt in prompts for member in range(group_size)]
    latents = [seed_for(seed, "latents", iteration, at, 0 if shared_noise else m) for at, _, m in rows]
    noises = [seed_for(seed, "noise", iteration, at, m) for at, _, m in rows]
    lots, videos = [], {}
    for steps, members in alike([(at, prompt) for at, prompt, _ in rows], plan):
        trajectories = []
        for part in chunks(members, size):
            call = conditions([rows[i][1] for i in part])
            drawn = run.policy.rollout(
                [rows[i][1].text for i in part],
                [latents[i] for i in part],
                [noises[i] for i in part],
                steps.recorded,
                steps.stochastic,
                scores.visit if scores else None,
                **call,
            )
            if scores:
                scores.next_sample(part[0])
            videos |= dict(zip(part, as_videos(drawn.frames), strict=True))
            trajectories.append(moved(drawn.trajectory, "cpu"))
        lots.append(Lot(members, Trajectory.joined(trajectories)))
    films = torch.stack([videos[i] for i in range(len(rows))])
    return Samples([p for _, p, _ in rows], [g for g, _, _ in rows], lots), films


def alike(prompts: Sequence[tuple[int, Prompt]], plan: Callable[[int], Plan]) -> list[tuple[Plan, list[int]]]:
    """Which of these (position, prompt) a pipeline call can hold together: one plan, one condition image."""
    kinds: dict[tuple[Plan, str | None], list[int]] = {}
    for i, (position, prompt) in enumerate(prompts):
        kinds.setdefault((plan(position), prompt.image), []).append(i)
    return [(steps, members) for (steps, _), members in kinds.items()]


def chunks(items: Sequence[int], size: int | None) -> Iterator[list[int]]:
    """Consecutive parts of at most `size`; all at once if that is None."""
    size = size or max(1, len(items))
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
