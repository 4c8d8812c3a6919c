"""Trees of samples: rollouts that share their first steps, so that few network evaluations give many comparable videos.

After some steps, the splits, every row goes on as K children, drawn around the one mean that its one forward pass gave.
Between two splits the number of rows stays the same, so a tree is a chain of ordinary pipeline calls, its segments:
each starts from the states where the one before split. Any pipeline that can be replayed can be grown.

A row's noise depends on the seed of its tree and its place there alone, not on the batch that it is drawn in. A tree
that never branches is an ordinary rollout, bit for bit.

    N trees, T steps; nodes of one depth lie tree by tree, children next to one another: child b of row n is row n K + b

Source: BranchGRPO (arXiv 2509.06040).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .rollout import Rollout, Segment, Trajectory, generators, seed_for
from .schedulers import Moment
from .transitions import sibling_noise


class Forest(NamedTuple):
    """N trees that were grown together."""

    segments: list[Trajectory]  # each with the rows that a depth between two splits has, over all trees
    frames: Tensor  # of the leaves, in order


class Node(NamedTuple):
    """Where a row's noise comes from."""

    tree: int
    seed: int
    generator: torch.Generator

    def children(self, branching: int) -> list[Node]:
        """An only child goes on with its parent's generator."""
        if branching == 1:
            return [self]
        seeds = [seed_for(self.seed, "child", number) for number in range(branching)]
        return [Node(self.tree, seed, *generators([seed])) for seed in seeds]


def grow(
    roll: Callable[..., Rollout],
    num_steps: int,
    splits: Sequence[int],
    branching: int,
    spread: float,
    latent_seeds: Sequence[int],
    noise_seeds: Sequence[int],
    batch: int | None = None,
) -> Forest:
    """Grow one tree for each seed.

    Args:
        roll: called with the tree of each row and keyword arguments for `rollout`, does the rollout of these rows, and
            returns a tensor as its frames. Which steps it adds noise to and records are its own affair; splits have to
            be among the former.
        num_steps: T.
        splits: steps that end in a split, ascending, before the last step.
        branching: K >= 1.
        spread: of siblings' noises, see `transitions.sibling_noise`.
        latent_seeds: of the roots, and of what a pipeline samples as its condition.
        noise_seeds: one a tree, for all noise in it.
        batch: rows that are run together; None: all of a segment.

    A pipeline that takes no initial state (Trajectory.injectable) runs one row more for every row and segment but the
    first, as it does in a replay.
    """
    nodes = [Node(tree, seed, *generators([seed])) for tree, seed in enumerate(noise_seeds)]
    segments, states, injectable = [], None, True
    for steps in segment_steps(num_steps, splits):
        split, ends = steps[-1] in splits, steps[-1] == num_steps - 1
        families = [node.children(branching if split else 1) for node in nodes]
        drawn = []
        for first in range(0, len(nodes), batch or len(nodes)):
            rows = slice(first, first + (batch or len(nodes)))
            branch = brancher(nodes[rows], families[rows], spread) if split and branching > 1 else None
            segment = Segment(steps, None if states is None else states[rows], injectable, branch)
            seeds = {"latent_seeds": [latent_seeds[node.tree] for node in nodes[rows]]}
            seeds["noise_seeds"] = [node.generator for node in nodes[rows]]
            output = {} if ends else {"output_type": "latent"}
            drawn.append(roll([node.tree for node in nodes[rows]], **seeds, segment=segment, **output))
        segments.append(Trajectory.joined([part.trajectory for part in drawn]))
        states, injectable = torch.cat([part.state for part in drawn]), segments[0].injectable
        nodes = [child for family in families for child in family]
    return Forest(segments, torch.cat([part.frames for part in drawn]))


def segment_steps(num_steps: int, splits: Sequence[int]) -> list[range]:
    """The steps of each segment: all but the last end in a split.

    Raises: ValueError where splits do not ascend or leave no step after them.
    """
    ends = [*(split + 1 for split in splits), num_steps]
    starts = [0, *ends[:-1]]
    if any(start >= end for start, end in zip(starts, ends, strict=True)):
        raise ValueError(f"splits {list(splits)} have to ascend from 0 on and end before step {num_steps - 1}")
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def brancher(parents: Sequence[Node], families: Sequence[Sequence[Node]], spread: float) -> Callable[[Moment], Tensor]:
    """What draws the (N K, ...) children of N rows, in the dtype of their states (see `SDEScheduler.draw`)."""

    def branch(moment: Moment) -> Tensor:
        mean, std = moment.mean, moment.step.std
        if std == 0:
            raise ValueError(f"step {moment.index} adds no noise: children would all be the same")

        def noise(nodes: Sequence[Node]) -> Tensor:
            shape = (len(nodes), *mean.shape[1:])
            return randn_tensor(shape, [n.generator for n in nodes], mean.device, torch.float32)

        children = [child for family in families for child in family]
        drawn = sibling_noise(noise(parents), noise(children), spread)
        mean = mean.repeat_interleave(len(families[0]), 0)
        return (mean + std * drawn).to(moment.x.dtype)

    return branch
