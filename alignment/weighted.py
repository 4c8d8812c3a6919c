"""Videos to imitate, each with a weight: what supervised and reward-weighted fine-tuning share.

They are given, or sampled by the policy and rewarded. No reference is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from samplers import seed_for

from .config import Recipe
from .data import Group, Member, Pair, Prompt, Stream, combined, score_of
from .errors import UserError
from .noised import check_clean, sample_clean
from .preference import Batch, Example, MatchingConfig, batches, check_matching
from .tally import Tally

if TYPE_CHECKING:
    from .training import Run


@dataclass
class WeightedConfig(MatchingConfig):
    dimension: str | None = None  # whose scores or labels count; None: the mean of the scores, the pair's label
    # Where data.prompts are named, each iteration samples its videos:
    prompts_per_iteration: int = 8  # over all processes
    group_size: int = 4  # samples a prompt
    updates_per_rollout: int = 4  # each on all that count, at new levels and with new noise


class Video(NamedTuple):
    """A given video, and what it counts."""

    prompt: Prompt
    member: Member
    record: int  # the number of the pair or group that it belongs to
    group: int  # the number of its prompt
    score: float | None


class Sampled(NamedTuple):
    """This process's N samples of an iteration."""

    prompts: list[Prompt]  # N
    groups: list[int]  # N, position of the prompt in the stream
    states: list[Tensor]  # N
    rewards: Tensor  # of all processes, whole groups in stream order


def check_weighted(recipe: Recipe, processes: int) -> list[str]:
    """What is wrong with the shared settings, one line each."""
    config: WeightedConfig = recipe.algorithm
    wrong = check_matching(recipe, processes)
    if recipe.data.held_out is not None:
        wrong.append("data.held_out: pairs are told apart by what has a reference, as flow_dpo; leave it out")
    if recipe.data.preferences is None:
        wrong += check_clean(recipe)
        if config.prompts_per_iteration < 1 or config.prompts_per_iteration % processes:
            wrong.append(
                f"algorithm.prompts_per_iteration: {config.prompts_per_iteration} cannot be dealt to {processes} "
                "processes"
            )
        if config.group_size < 2:
            wrong.append(f"algorithm.group_size: {config.group_size} has nothing to compare with; use 2 or more")
        if config.updates_per_rollout < 1:
            wrong.append(f"algorithm.updates_per_rollout: {config.updates_per_rollout} is below 1")
    return wrong


def given_videos(recipe: Recipe, records: Sequence[Pair | Group]) -> list[Video]:
    """All members of pairs and groups. A pair without scores scores its better member 1, the other 0."""
    dimension, found, numbers = recipe.algorithm.dimension, [], {}
    for i, record in enumerate(records):
        group = numbers.setdefault((record.prompt.text, record.prompt.image), len(numbers))
        for member, score in zip(record.members, _scores(record, dimension), strict=True):
            found.append(Video(record.prompt, member, i, group, score))
    return found


def worth_imitating(videos: Sequence[Video]) -> list[Video]:
    """The best of each record of those that are scored, all of a record without scores, none of one that is tied."""
    records: dict[int, list[Video]] = {}
    for video in videos:
        records.setdefault(video.record, []).append(video)
    found = []
    for members in records.values():
        scored = {video.score: video for video in reversed(members) if video.score is not None}
        if not scored:
            found += members
        elif len(members) == 1 or len(scored) > 1:
            found.append(scored[max(scored)])
    return found


def to_imitate(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Video]:
    """The given videos that are worth imitating. Raises: UserError, which names the place, where ties are all."""
    if found := worth_imitating(given_videos(recipe, records)):
        return found
    raise UserError(f"{place}: no video to imitate: all records are tied; annotate them, or name another dimension")


def given_updates(run: Run, videos: Sequence[tuple[Video, float]]) -> Iterator[list[Example]]:
    """Updates of an iteration: one, on this process's share of the next `batch_size` videos and their weights."""
    size = run.recipe.algorithm.batch_size
    stream, start = Stream(videos, run.recipe.seed, run.recipe.data.shuffle), (run.iteration - 1) * size
    taken = list(enumerate(stream.take(start, size), start))
    yield [
        Example(
            video.prompt, seed_for(run.recipe.seed, "video", at), lambda video=video: _alone(run, video.member), weight
        )
        for at, (video, weight) in run.processes.share(taken)
    ]


def sample_videos(run: Run) -> Sampled:
    """Draw and reward the iteration's groups."""
    config: WeightedConfig = run.recipe.algorithm
    prompts = run.next_prompts(config.prompts_per_iteration)
    with run.timer("rollout"):
        samples, videos, _ = sample_clean(run, prompts, config.group_size)
    readings = run.score(videos, samples.prompts, samples.groups, config.group_size)
    states: dict[int, Tensor] = {}
    for rows, trajectory in samples.batches(None):
        states |= dict(zip(rows, trajectory.steps[-1].x_next, strict=True))
    total = run.scorer.combined(readings.totals)
    return Sampled(samples.prompts, samples.groups, [states[row] for row in range(len(samples.prompts))], total)


def sampled_updates(run: Run, sampled: Sampled, weights: Tensor) -> Iterator[list[Example]]:
    """Updates of an iteration over these samples, without those of weight 0.

    Args:
        weights: (N of all processes,), as `Sampled.rewards`.
    """
    config: WeightedConfig = run.recipe.algorithm
    own = weights.view(-1, config.group_size)[run.processes.rank :: run.processes.count].flatten().tolist()
    rows = [row for row, weight in enumerate(own) if weight > 0]
    for number in range(config.updates_per_rollout):
        yield [
            Example(
                sampled.prompts[row],
                seed_for(run.recipe.seed, "video", run.iteration, sampled.groups[row], row % config.group_size, number),
                lambda row=row: (sampled.states[row][None], None),
                own[row],
            )
            for row in rows
        ]


def update(run: Run, examples: Sequence[Example], tally: Tally) -> None:
    """One optimiser step on the weighted mean of this process's and all others' errors."""
    count = run.processes.total(len(examples))
    if count == 0:
        return
    with run.timer("update"):
        for batch in batches(run, examples):

            def visit(errors: Tensor, batch: Batch = batch) -> None:
                losses = batch.weights * errors[:, 0]
                tally.add("loss", losses)
                tally.add("error", errors[:, 0])
                tally.add("weight", batch.weights)
                (losses.sum() / count).backward()

            batch.visit(visit)
        run.apply_update()


def _scores(record: Pair | Group, dimension: str | None) -> list[float | None]:
    """Of each member; None where it has none."""
    if isinstance(record, Pair):
        if (scores := score_of(record, dimension)) is not None:
            return list(scores)
        label = record.labels.get(dimension) if dimension else record.label
        return [None, None] if label is None else [(1 + label) / 2, (1 - label) / 2]
    rows = [{name: row[i] for name, row in record.scores.items()} for i in range(len(record.members))]
    found = [combined(row, dimension) for row in rows]
    return [score if math.isfinite(score) else None for score in found]


def _alone(run: Run, member: Member) -> tuple[Tensor, None]:
    return run.given.load(member)[0][None], None
