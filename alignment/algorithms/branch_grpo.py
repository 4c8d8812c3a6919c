"""BranchGRPO: the samples of a prompt are the leaves of a tree, which share their early steps.

A tree of 20 steps that splits in two at steps 0, 3, 6 and 9 has 16 leaves for 203 rows through the network, not 320.
Its inner nodes tell which of the early steps were good: an edge is worth what the leaves below it are worth, compared
with the other nodes of that depth and tree.

    Dense      splits 0, 3, 6, 9; Mixed 0, 4, 8, 12; Sparse 0, 5, 10, 15
    Mix        with window.size 4: noise there and at the splits alone, the other steps follow the ODE
    pruning    takes edges out of the gradient, not out of the tree. parent_top1: after the last split only the best
               child of each parent is trained. extreme: only the best and the worst `extreme` leaves are. depth:
               `pruned_steps` steps are not, at first those from the second after the last split on, then later ones

Source: BranchGRPO (arXiv 2509.06040), the paper; its code has other noise, other densities and other pruning.

Differs from the paper: the update runs parents, not edges, through the network; `path_weight` weighs log-probabilities
that are averaged over elements (summed, they would leave one leaf all the weight: the one with the luckiest noise); by
default the last step adds no noise (sampler.window) and is not trained.
A pipeline whose initial state cannot be given (some that are conditioned on an image) runs every row of a segment once
more: those of later segments in the rollout, all of them in the update.

Logs: ratio/mean, ratio/max_deviation, ratio/first_deviation (|log ratio| before the first update: 0 if rollout and
replay agree), clip_fraction, clip_fraction/before_update, loss, advantage/std (of leaves), groups/zero_spread (of
leaves), groups/spread_share, depth/<d>/advantage_std and depth/<d>/value_std (within trees) of the children of every
split, tree/leaves, tree/edges (trained ones of a tree), gradient_share/step_<i>.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from samplers import Moment, Recorded, Trajectory
from samplers.transitions import log_ratio

from ..advantages import group_statistics, spread_share
from ..config import Recipe
from ..data import Prompt, conditions
from ..objectives import clipped_surrogate, is_clipped
from ..samples import Plan, chunks
from ..tally import Tally
from ..training import Run
from ..tree_advantages import backup, better_children, depth_advantages, depth_window, extremes, forest, membership
from ..trees import Rows, TreeShape, edge_log_probs, sample_trees
from ..windows import Window, check_noise, noise_range, plan_steps

PRUNES = ("none", "parent_top1", "extreme", "depth")


@dataclass
class Config:
    prompts_per_iteration: int = 8  # over all processes, a tree each
    splits: list[int] = field(default_factory=lambda: [0, 3, 6, 9])  # steps that end in several children
    branching: int = 2  # how many
    spread: float = 4.0  # of siblings' noises, whose covariance is 1 / (1 + spread^2)
    window: Window = field(default_factory=Window)  # where the noise is, beside the splits; by default everywhere
    path_weight: float = 0.0  # leaves count as softmax(path_weight * log-probability of the path); 0: alike
    prune: str = "none"  # none, parent_top1, extreme or depth
    extreme: int = 4  # `extreme` keeps so many of the best leaves, and of the worst
    pruned_steps: int = 4  # `depth` leaves out so many
    prune_every: int = 30  # iterations before those of `depth` move on by one
    max_advantage: float | None = 5.0
    clip: float = 1e-3  # bound of the ratio
    updates_per_rollout: int = 1  # optimiser steps, each on its part of the trees

    @property
    def leaves(self) -> int:
        """Samples of a prompt."""
        return self.branching ** len(self.splits)


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    num_steps, splits, prompts = recipe.sampler.steps, list(config.splits), config.prompts_per_iteration
    start, stop = noise_range(recipe)
    last = min(stop, num_steps - 1) - 1  # children need a step of their own
    wrong = check_noise(recipe, config.window)
    if prompts < 1 or prompts % processes:
        wrong.append(f"algorithm.prompts_per_iteration: {prompts} cannot be dealt to {processes} processes")
    elif not 1 <= config.updates_per_rollout <= prompts // processes:
        wrong.append(f"algorithm.updates_per_rollout: {config.updates_per_rollout} is not in 1..the trees of a process")
    if not recipe.sampler.shared_noise:
        wrong.append("sampler.shared_noise: the leaves of a tree have one initial noise; set it to true")
    if recipe.sampler.tail is not None:
        wrong.append("sampler.tail: trees run every step; set it to null")
    if not splits or splits != sorted(set(splits)):
        wrong.append(f"algorithm.splits: {splits} are not ascending steps; name one or more")
    elif outside := [split for split in splits if not start <= split <= last]:
        wrong.append(f"algorithm.splits: {outside} not in {start}..{last}: noisy (sampler.window), before the last")
    if config.branching < 2:
        wrong.append(f"algorithm.branching: {config.branching} leaves a tree nothing to compare; use 2 or more")
    if config.clip <= 0 or config.spread <= 0 or config.path_weight < 0:
        wrong.append("algorithm: clip and spread have to be above 0, path_weight 0 or more")
    return wrong or check_pruning(config, num_steps)


def check_pruning(config: Config, num_steps: int) -> list[str]:
    """What is wrong with the pruning of trees that are right, one line each."""
    if config.prune not in PRUNES:
        return [f"algorithm.prune: {config.prune!r} is none of {', '.join(PRUNES)}"]
    if config.prune == "extreme" and not 1 <= config.extreme <= config.leaves // 2:
        return [f"algorithm.extreme: {config.extreme} is not in 1..{config.leaves // 2}, half the leaves of a tree"]
    after = num_steps - 1 - config.splits[-1]
    if config.prune == "depth" and not 1 <= config.pruned_steps <= after:
        return [f"algorithm.pruned_steps: {config.pruned_steps} is not in 1..{after}, the steps after the last split"]
    if config.prune == "depth" and config.prune_every < 1:
        return [f"algorithm.prune_every: {config.prune_every} is not 1 or more"]
    return []


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return False


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config: Config = run.recipe.algorithm
    shape = TreeShape(run.recipe.sampler.steps, config.splits, config.branching, config.spread)
    for _ in run.iterations():
        placed = run.next_prompts(config.prompts_per_iteration)
        prompts = [prompt for _, prompt in placed]
        with run.timer("rollout"):
            segments, videos = sample_trees(run, placed, shape, lambda at: plan(run, at))
        leaves = [p for p in placed for _ in range(config.leaves)]
        readings = run.score(videos, [prompt for _, prompt in leaves], [at for at, _ in leaves], config.leaves)
        del videos  # at full size those of a tree weigh more than the model
        signal = own_signal(run, segments, run.scorer.combined(readings.totals))
        tally, edges = Tally(), 0.0
        with run.timer("update"):
            for part in range(config.updates_per_rollout):
                edges += update(run, prompts, segments, signal, part, tally)
        edges /= config.prompts_per_iteration
        run.log({**tally.metrics(run), "tree/leaves": config.leaves, "tree/edges": edges})


def plan(run: Run, position: int) -> Plan:
    """The stochastic and the recorded steps of the tree at a position of the stream."""
    config, allowed = run.recipe.algorithm, run.policy.stochastic_steps
    window = plan_steps(config.window, allowed, None, run.recipe.seed, run.iteration, position)
    noisy = tuple(sorted({*window.stochastic, *config.splits}))
    left_out = set() if config.path_weight else pruned_steps(run)  # path weights need every edge
    return Plan(noisy, tuple(step for step in noisy if step not in left_out))


def pruned_steps(run: Run) -> set[int]:
    """The steps that depth pruning leaves out in this iteration."""
    config: Config = run.recipe.algorithm
    if config.prune != "depth":
        return set()
    num_steps, last = run.recipe.sampler.steps, config.splits[-1]
    return depth_window(num_steps, last, run.iteration - 1, config.pruned_steps, config.prune_every)


class Signal(NamedTuple):
    """What this process's trees are worth."""

    advantages: list[Tensor]  # T + 1: (nodes of this depth,); an edge has that of its child
    chains: list[bool]  # (leaves,) whether the way from the last split to the leaf is trained


def own_signal(run: Run, segments: list[Rows], rewards: Tensor) -> Signal:
    """Compare the nodes of all processes' trees, rewards (all leaves,), and return this process's part; log both."""
    config, processes = run.recipe.algorithm, run.processes
    count = config.prompts_per_iteration
    parent = forest(count, run.recipe.sampler.steps, config.splits, config.branching)
    parent = [up.to(rewards.device) for up in parent]
    trees, paths = membership(parent), None
    if config.path_weight:
        widths = [len(up) // count for up in parent]
        own_paths = edge_log_probs(segments, count // processes.count, widths)
        paths = [edges.flatten() for edges in processes.gather(own_paths.to(rewards.device)).split(widths, dim=1)]
    values = backup(parent, rewards, paths, config.path_weight)
    advantages = depth_advantages(values, trees, config.max_advantage)
    chains = torch.ones_like(trees[-1], dtype=torch.bool)
    if config.prune == "parent_top1":
        chains = better_children(values[config.splits[-1] + 1], parent[config.splits[-1]])
    elif config.prune == "extreme":
        chains = extremes(values[-1], trees[-1], config.extreme)
    log_spread(run, values, advantages, trees)

    def own(nodes: Tensor) -> Tensor:
        return nodes.view(count, -1)[processes.rank :: processes.count].flatten()

    return Signal([own(nodes) for nodes in advantages], own(chains).tolist())


def log_spread(run: Run, values: list[Tensor], advantages: list[Tensor], trees: list[Tensor]) -> None:
    """How values and advantages (T + 1 tensors, of all nodes by depth) spread."""
    leaves = group_statistics(values[-1], trees[-1], values[-1].isfinite())
    found = {
        "advantage/std": float(advantages[-1].std(correction=0)),
        "groups/zero_spread": 1 - float(leaves[2].float().mean()),
        "groups/spread_share": spread_share(values[-1], trees[-1]),
    }
    for depth in (split + 1 for split in run.recipe.algorithm.splits):
        within = group_statistics(values[depth], trees[depth], values[depth].isfinite())[1]
        found[f"depth/{depth}/advantage_std"] = float(advantages[depth].std(correction=0))
        found[f"depth/{depth}/value_std"] = float(within.mean())
    run.log(found)


def update(run: Run, prompts: list[Prompt], segments: list[Rows], signal: Signal, part: int, tally: Tally) -> float:
    """One optimiser step on part of the trees; returns the number of edges, over all processes."""
    config: Config = run.recipe.algorithm
    work = [trained_rows(run, rows, signal, part) for rows in segments]
    edges = run.processes.total(sum(len(places) * r.children for segment, places in work for r in segment.steps))
    for rows, (trajectory, places) in zip(segments, work, strict=True):
        for some in chunks(places, run.recipe.batch.update):
            nodes = [rows.nodes[i] for i in some]
            chosen = [prompts[node // config.branching**rows.splits] for node in nodes]

            def visit(moment: Moment, recorded: Recorded, nodes: list[int] = nodes) -> None:
                mean, old = (m.repeat_interleave(recorded.children, 0) for m in (moment.mean, recorded.mean))
                ratio = log_ratio(recorded.x_next, mean, old, moment.step.std)
                advantages = signal.advantages[recorded.index + 1].view(-1, recorded.children)[nodes].flatten()
                losses = clipped_surrogate(ratio, advantages, config.clip)
                outside = (ratio.detach().exp() - 1).abs() > config.clip
                tally.ratio(ratio, is_clipped(ratio, advantages, config.clip), outside)
                tally.add("loss", losses)
                tally.watch_gradient(moment)
                (losses.sum() / edges).backward()

            texts = [prompt.text for prompt in chosen]
            run.policy.replay(trajectory.rows(some), texts, visit, **conditions(chosen))
    run.apply_update()
    tally.updates += 1
    return edges


def trained_rows(run: Run, rows: Rows, signal: Signal, part: int) -> tuple[Trajectory, list[int]]:
    """The trained steps of a segment, and the places of the rows that an update trains them on.

    The trees of a part are neighbours in the stream, so that they are the same whatever the number of processes.
    """
    config, processes = run.recipe.algorithm, run.processes
    width, left_out = config.branching**rows.splits, pruned_steps(run)

    def is_trained(node: int) -> bool:
        tree = node // width * processes.count + processes.rank  # among those of all processes
        chosen = tree * config.updates_per_rollout // config.prompts_per_iteration == part
        return chosen and (rows.splits < len(config.splits) or signal.chains[node])

    steps = tuple(recorded for recorded in rows.trajectory.steps if recorded.index not in left_out)
    places = [place for place, node in enumerate(rows.nodes) if steps and is_trained(node)]
    return replace(rows.trajectory, steps=steps), places
