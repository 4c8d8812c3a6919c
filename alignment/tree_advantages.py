"""Trees of samples as index tensors: values of inner nodes, advantages by depth, pruning, and the work they cost.

A forest has one tree a prompt, T steps deep. A node is a state; its row at depth d says which. Step d of the sampler
leads from depth d to depth d + 1: at a split every node has K children, elsewhere one. Children of a node are adjacent,
so that siblings come from one forward pass of their parent, and below the last split a row is one chain down to a leaf.

    N_d nodes of depth d, d = 0 (one root a tree) to T (the leaves)
    parent[d]  (N_{d+1},) int64: row at depth d of the parent of each node of depth d + 1
    trees[d]   (N_d,) int64: the tree of each node

Source: BranchGRPO (arXiv 2509.06040).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .advantages import group_advantages


def forest(num_trees: int, num_steps: int, splits: Collection[int], branching: int) -> list[Tensor]:
    """The parents of trees that split at the same steps: `num_steps` tensors."""
    parent, nodes = [], num_trees
    for step in range(num_steps):
        children = branching if step in splits else 1
        parent.append(torch.arange(nodes).repeat_interleave(children))
        nodes *= children
    return parent


def membership(parent: Sequence[Tensor]) -> list[Tensor]:
    """The trees of all nodes, T + 1 tensors; root n is the root of tree n."""
    trees = [torch.arange(int(parent[0].max()) + 1, device=parent[0].device)]
    for up in parent:
        trees.append(trees[-1][up])
    return trees


def backup(
    parent: Sequence[Tensor],
    leaf_rewards: Tensor,
    edge_log_probs: Sequence[Tensor] | None = None,
    beta: float = 0.0,
) -> list[Tensor]:
    """Value of every node: the mean reward of its leaves, weighted by softmax(beta s), s the log-probability of the way
    from the node to the leaf.

    Args:
        parent: T tensors, on the device of the rewards.
        leaf_rewards: (N_T,); leaves without a finite reward are left out.
        edge_log_probs: T tensors (N_{d+1},), log-probability of the step to each node under the policy that sampled,
            averaged over elements; 0 for deterministic steps. Summed over elements they would leave one leaf all the
            weight, whichever was lucky.
        beta: >= 0; 0 is the plain mean, a large one lets the most probable leaf decide.
    Returns: T + 1 float64 tensors (N_d,); NaN for a node without a leaf that counts.
    Source: arXiv 2509.06040, reward fusion.
    """
    if beta and edge_log_probs is None:
        raise ValueError("path weights (beta > 0) need the log-probabilities of the edges")
    values = [torch.where(leaf_rewards.isfinite(), leaf_rewards.double(), math.nan)]
    mass = torch.where(leaf_rewards.isfinite(), 0.0, -math.inf).double()  # log of the summed weight of a node's leaves
    for depth in reversed(range(len(parent))):
        up = parent[depth]
        none = torch.zeros(int(up.max()) + 1, dtype=torch.float64, device=mass.device)
        score = mass + beta * edge_log_probs[depth].double() if beta else mass
        top = torch.full_like(none, -math.inf).scatter_reduce(0, up, score, "amax")
        share = torch.where(score > -math.inf, (score - top[up]).exp(), 0.0)
        total = none.index_add(0, up, share)
        weighted = torch.where(share > 0, share * values[0], 0.0)
        values.insert(0, none.index_add(0, up, weighted) / total)
        mass = top + total.log()
    return values


def depth_advantages(values: Sequence[Tensor], trees: Sequence[Tensor], clamp: float | None = 5.0) -> list[Tensor]:
    """Advantages of all nodes among those of the same depth and tree: T + 1 float32 tensors (N_d,).

    An edge has the advantage of its child. Roots have 0, as have nodes without a value and depths without spread.

    Args:
        values: from `backup`.
        trees: from `membership`.
        clamp: bound on the absolute advantage, None for none.
    Source: arXiv 2509.06040, depth-wise advantages.
    """
    return [group_advantages(v, tree, clamp=clamp) for v, tree in zip(values, trees, strict=True)]


def better_children(values: Tensor, parent: Tensor) -> Tensor:
    """(N,) bool: one child a parent, the best (width pruning "Parent-Top1").

    For the children of the last split: the chains of the others are left out of the gradient, their own edges are not.

    Args:
        values: (N,); NaN is below everything, the first of equals wins.
        parent: (N,) row of each one's parent.
    """
    rows = torch.arange(len(values), device=values.device)
    values = torch.where(values.isnan(), -math.inf, values)
    num = int(parent.max()) + 1
    best = values.new_full((num,), -math.inf).scatter_reduce(0, parent, values, "amax")
    contenders = torch.where(values == best[parent], rows, len(rows))
    first = rows.new_full((num,), len(rows)).scatter_reduce(0, parent, contenders, "amin")
    return rows == first[parent]


def extremes(leaf_values: Tensor, trees: Tensor, b: int) -> Tensor:
    """(N,) bool: the best b and the worst b leaves of every tree (width pruning "Extreme-b").

    Always 2b a tree, so that every process has the same work; leaves without a value fill up where others are too few.
    Only the chains after the last split are left out of the gradient.

    Args:
        leaf_values: (N,).
        trees: (N,) tree of each leaf.
        b: 1 <= b, 2b <= leaves of a tree.
    """
    keep = torch.zeros_like(trees, dtype=torch.bool)
    for tree in trees.unique():
        rows = (trees == tree).nonzero().flatten()
        if 2 * b > len(rows):
            raise ValueError(f"the best and the worst {b} of {len(rows)} leaves overlap; b can be {len(rows) // 2}")
        valid = int((~leaf_values[rows].isnan()).sum())
        low, high, without = rows[leaf_values[rows].argsort(stable=True)].tensor_split([(valid + 1) // 2, valid])
        ranked = torch.cat([low, without, high])
        keep[ranked[:b]] = keep[ranked[-b:]] = True
    return keep


def depth_window(num_steps: int, last_split: int, iteration: int, size: int = 4, every: int = 30) -> set[int]:
    """The steps that depth pruning leaves out of the gradient.

    `size` steps, of which the first leads to depth last_split + 2; they move on by one every `every` iterations, until
    they end at the last step.

    Args:
        iteration: counted from 0.
    Source: arXiv 2509.06040, depth pruning.
    """
    first = last_split + 1
    if first + size > num_steps:
        raise ValueError(f"{num_steps - first} steps after the last split, {last_split}, hold no window of {size}")
    start = min(first + iteration // every, num_steps - size)
    return set(range(start, start + size))


class Counts(NamedTuple):
    """The work of one tree."""

    leaves: int
    forwards: int  # rows through the network in the rollout: all nodes but the leaves
    edges: int  # that enter the loss
    parents: int  # rows through the network in the update: the edges of one parent share a forward pass


def counts(
    num_steps: int,
    splits: Collection[int],
    branching: int,
    trained: Collection[int] | None = None,
    kept: int | None = None,
) -> Counts:
    """What one tree costs.

    Args:
        trained: steps that enter the loss: stochastic ones, without those of `depth_window`. None: all.
        kept: chains after the last split that enter the loss (width pruning). None: all.
    """
    nodes = [branching ** sum(split < depth for split in splits) for depth in range(num_steps + 1)]
    steps = range(num_steps) if trained is None else trained
    last = max(splits, default=-1)
    narrow = kept if kept is not None else nodes[-1]
    edges = sum(narrow if step > last else nodes[step + 1] for step in steps)
    parents = sum(narrow if step > last else nodes[step] for step in steps)
    return Counts(nodes[-1], sum(nodes[:-1]), edges, parents)
