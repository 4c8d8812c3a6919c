"""Trees of samples: grown a prompt at a time, and kept as trajectories of the rows between two splits.

Nodes of one depth are counted over all trees of this process, tree by tree; child b of node n is node n K + b of the
next depth. Trees are counted in the order of the process's prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from samplers import Rollout, Trajectory, grow, seed_for

from .data import Prompt, conditions
from .policy import as_videos, moved
from .samples import Plan, alike

if TYPE_CHECKING:
    from .training import Run


class TreeShape(NamedTuple):
    num_steps: int
    splits: Sequence[int]
    branching: int  # K
    spread: float  # of siblings' noises


class Rows(NamedTuple):
    """Rows of a segment that a pipeline call can hold together: one plan, and one condition image if there is any."""

    splits: int  # before the segment
    nodes: list[int]  # of each row
    trajectory: Trajectory  # of these rows, in host memory


def sample_trees(
    run: Run, prompts: list[tuple[int, Prompt]], shape: TreeShape, plan: Callable[[int], Plan]
) -> tuple[list[Rows], Tensor]:
    """Grow a tree a prompt; what they recorded, and their leaves' videos (N, F, C, H, W) in [0, 1], tree by tree.

    A tree depends on its prompt and iteration alone, not on the batch or process that it is grown in.

    Args:
        prompts: (position in the stream, prompt).
        plan: from the position to what the tree's rollout does.
    """
    found, videos = [], {}
    for steps, trees in alike(prompts, plan):

        def roll(rows: list[int], trees: list[int] = trees, steps: Plan = steps, **options: Any) -> Rollout:
            chosen = [prompts[trees[row]][1] for row in rows]
            options |= {"record": steps.recorded, "stochastic": steps.stochastic, **conditions(chosen)}
            drawn = run.policy.rollout([prompt.text for prompt in chosen], **options)
            return replace(drawn, trajectory=moved(drawn.trajectory, "cpu"))

        latents, noises = (
            [seed_for(run.recipe.seed, purpose, run.iteration, prompts[tree][0], 0) for tree in trees]
            for purpose in ("latents", "noise")
        )
        grown = grow(roll, *shape, latents, noises, run.recipe.batch.rollout)
        for splits, trajectory in enumerate(grown.segments):
            width = shape.branching**splits
            found.append(Rows(splits, [tree * width + i for tree in trees for i in range(width)], trajectory))
        leaves = shape.branching ** len(shape.splits)
        videos |= dict(zip(trees, as_videos(grown.frames).split(leaves), strict=True))
    return found, torch.cat([videos[tree] for tree in range(len(prompts))])


def edge_log_probs(segments: Sequence[Rows], num_trees: int, widths: Sequence[int]) -> Tensor:
    """(num_trees, edges of a tree, step by step) log-probabilities of the recorded edges; 0 for the others.

    Args:
        num_trees: of this process.
        widths: T numbers, edges of a tree at every step.
    """
    found = [torch.zeros(num_trees * width) for width in widths]
    for rows in segments:
        for recorded in rows.trajectory.steps:
            found[recorded.index].view(-1, recorded.children)[rows.nodes] = recorded.log_prob.unflatten(
                0, (-1, recorded.children)
            )
    return torch.cat([log_probs.view(num_trees, -1) for log_probs in found], dim=1)
