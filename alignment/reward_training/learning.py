"""Updates and evaluations of a reward model on pairs, groups and scores.

N clips, C comparisons, K dimensions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from samplers import seed_for

from ..samples import chunks
from ..tally import Tally
from .config import RewardModelConfig
from .data import Clips, Example, in_a_row, videos_of
from .frames import Frames
from .losses import answer_cells, comparison_cells, labels_of_scores, ranked_right, regression_cells

if TYPE_CHECKING:
    from ..training import Run

EVALUATED = 16  # pairs or groups at once, where the recipe does not say


class Loaded(NamedTuple):
    """An example and what the model looks at of its members."""

    example: Example
    frames: list[Frames]


def load(run: Run, examples: Sequence[Example]) -> list[Loaded]:
    """Raises: RewardError, in all processes together, for a video that cannot be used."""
    return run.together(lambda: [Loaded(example, run.policy.videos.load(videos_of([example]))) for example in examples])


def centre_of(examples: Sequence[Example], num_dimensions: int) -> Tensor:
    """(K,) mean of the known scores; 0 where there is none."""
    return in_a_row(examples, num_dimensions).scores.nanmean(0).nan_to_num()


def cells_of(config: RewardModelConfig, raw: Tensor, clips: Clips, centre: Tensor) -> Tensor:
    """(cells, K) losses of clips with raw scores (N, K), of yes_no from answers (N, 2)."""
    if config.loss == "regression":
        return regression_cells(raw, clips.scores.to(raw), centre.to(raw))
    if config.loss == "yes_no":
        return answer_cells(raw, clips.first, clips.second, clips.labels.to(raw))
    difference, labels = raw[clips.first] - raw[clips.second], clips.labels.to(raw)
    return comparison_cells(difference, labels, config.loss, config.theta, config.ties)


def update(run: Run, loaded: Sequence[Loaded], centre: Tensor, tally: Tally) -> None:
    """One optimiser step on this process's examples."""
    run.policy.learning(True)
    with run.timer("update"):
        if run.recipe.algorithm.pairs == "all":
            _compare_all(run, loaded, tally)
        else:
            _compare_given(run, loaded, centre, tally)
        run.apply_update()
    run.policy.learning(False)


def _compare_given(run: Run, loaded: Sequence[Loaded], centre: Tensor, tally: Tally) -> None:
    """Gradients of what examples say by themselves, so that each micro-batch is done at once."""
    config: RewardModelConfig = run.recipe.algorithm
    num = len(config.dimensions)
    everything = in_a_row([item.example for item in loaded], num)
    cells = everything.scores if config.loss == "regression" else everything.labels
    count = run.processes.total(cells.numel())
    for part in chunks(loaded, run.recipe.batch.update):
        clips, raw = in_a_row([item.example for item in part], num), _said(run, part)
        cells = cells_of(config, raw, clips, centre)
        (cells.sum() / count).backward()
        tally.add("loss", cells.flatten())
        raw = _as_scores(config, raw)
        _watch(config, raw[clips.first] - raw[clips.second], clips.labels, tally)


def _compare_all(run: Run, loaded: Sequence[Loaded], tally: Tally) -> None:
    """Gradients of comparisons between all clips of the batch, those of other processes included.

    The loss needs all scores before any gradient is known. Where there are several micro-batches each is run twice:
    for its scores, and for the gradient of its weights given that of its scores (gradient caching, arXiv 2101.06983).
    """
    config: RewardModelConfig = run.recipe.algorithm
    rank, num = run.processes.rank, len(config.dimensions)
    parts = list(chunks(loaded, run.recipe.batch.update))
    seeds = [seed_for(run.recipe.seed, "dropout", run.iteration, rank, number) for number in range(len(parts))]
    twice = len(parts) > 1
    with torch.set_grad_enabled(not twice):
        raw = torch.cat([_said(run, part, seed) for part, seed in zip(parts, seeds, strict=True)])
    own = raw.detach().requires_grad_()
    known = in_a_row([item.example for item in loaded], num).scores.to(own)
    rows = torch.cat([torch.full_like(own[:, :1], rank), own.detach(), known], 1)
    owner, everyone, known = run.processes.gather(rows).split([1, num, num], 1)
    everyone = everyone.clone()
    everyone[owner[:, 0] == rank] = own
    i, j = torch.triu_indices(len(everyone), len(everyone), offset=1, device=own.device)
    difference, labels = everyone[i] - everyone[j], labels_of_scores(known[i], known[j], config.tie_eps)
    cells = comparison_cells(difference, labels, config.loss, config.theta, config.ties)
    cells.mean().backward()
    if twice:
        gradients = own.grad.split([sum(len(item.frames) for item in part) for part in parts])
        for part, seed, gradient in zip(parts, seeds, gradients, strict=True):
            _said(run, part, seed).backward(gradient)
    else:
        raw.backward(own.grad)
    tally.add("loss", cells.flatten())
    _watch(config, difference, labels, tally)


def _said(run: Run, loaded: Sequence[Loaded], seed: int | None = None) -> Tensor:
    """What the loss is a function of: raw scores (N, K) of all members, or answers (N, 2). Args: seed: of dropout."""
    if seed is not None:
        torch.manual_seed(seed)
    ask = run.policy.answers if run.recipe.algorithm.loss == "yes_no" else run.policy.scores
    frames = [frame for item in loaded for frame in item.frames]
    return ask(frames, [item.example.record.prompt.text for item in loaded for _ in item.frames])


def _as_scores(config: RewardModelConfig, said: Tensor) -> Tensor:
    """(N, K): of answers the log-odds of Yes."""
    return said[:, :1] - said[:, 1:] if config.loss == "yes_no" else said


def _watch(config: RewardModelConfig, difference: Tensor, labels: Tensor, tally: Tally) -> None:
    """Note how comparisons come out. difference, labels: (C, K)."""
    difference, labels = difference.detach(), labels.to(difference)
    right = ranked_right(difference, labels)
    for name, column in zip(config.dimensions, right.unbind(1), strict=True):
        if len(known := column[column.isfinite()]):
            tally.add(f"accuracy/{name}", known)
    if len(margin := (difference * labels)[right.isfinite()]):
        tally.add("margin", margin)


@torch.no_grad()
def ranked(run: Run, held_out: Sequence[Example]) -> tuple[dict[str, float], float]:
    """The share of comparisons that are ranked right in each dimension and, as "mean", in all; and the mean loss."""
    config: RewardModelConfig = run.recipe.algorithm
    num, size = len(config.dimensions), run.recipe.evaluation.batch or EVALUATED
    centre, mine = centre_of(held_out, num), run.processes.share(list(held_out))
    run.policy.learning(False)

    def own() -> tuple[Tensor, Tensor]:
        right, losses = [torch.zeros(0, num)], [torch.zeros(0, num)]
        for start in range(0, len(mine), size):
            run.policy.videos.ahead(videos_of(mine[start : start + 2 * size]))
            part = [Loaded(e, run.policy.videos.load(videos_of([e]))) for e in mine[start : start + size]]
            raw, clips = _said(run, part), in_a_row([item.example for item in part], num)
            losses.append(cells_of(config, raw, clips, centre).cpu())
            raw = _as_scores(config, raw)
            right.append(ranked_right(raw[clips.first] - raw[clips.second], clips.labels.to(raw)).cpu())
        return torch.cat(right), torch.cat(losses)

    right, losses = (run.processes.gather(found).double() for found in run.together(own))
    shares = right.nanmean(0)
    found = dict(zip(config.dimensions, shares.tolist(), strict=True)) | {"mean": float(shares.nanmean())}
    return found, float(losses.mean())


@torch.no_grad()
def measured(run: Run, held_out: Sequence[Example]) -> dict[str, tuple[float, float]]:
    """Mean and deviation of each dimension's raw scores, over evenly spaced clips."""
    config: RewardModelConfig = run.recipe.algorithm
    run.policy.learning(False)  # an update that failed leaves it on
    clips = [(example, member) for example in held_out for member in example.members]
    clips = clips[:: max(1, len(clips) // config.norm_videos)][: config.norm_videos]
    found = []
    for part in chunks(clips, 2 * (run.recipe.evaluation.batch or EVALUATED)):
        frames = run.policy.videos.load((member.video, example.fps) for example, member in part)
        found.append(run.policy.scores(frames, [example.record.prompt.text for example, _ in part]).cpu())
    raw = torch.cat(found).double()
    columns = zip(config.dimensions, raw.unbind(1), strict=True)
    return {name: (float(column.mean()), float(column.std()) or 1.0) for name, column in columns}
