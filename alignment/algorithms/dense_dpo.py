"""DenseDPO (arXiv 2506.03517): pairs that share their motion, and a preference for each segment of a second or so.

Both members of a pair start from one real video, noised to one level, so that they move alike and differ in what the
labels are about; pairs from independent noise teach a model that still videos have fewer flaws. `python -m
alignment.generate --guided` makes such pairs, `python -m alignment.annotate --segments` labels them. Every latent frame
has its segment's label, errors are by latent frame, and ties say nothing.

    paper, AdamW 1e-5 after 250 iterations of warm-up, LoRA of rank 128, 256 pairs an update, 1000 updates     beta 500

Two ways to put a pair's frames together: `frame` takes the sigmoid of each and averages over all untied frames of an
update (the listing of appendix E), `pair` takes it of a pair's mean (equation 7). A pair is used where more than
`least_untied` of its segments have a preference.

Differs from the paper: nothing known.

Logs: loss, implicit_accuracy, margin, margin/size, margin/levels_<low>_<high>, error/winner and error/loser (of the
untied frames, over the reference's), frames/tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Group, Pair, frame_labels, num_segments
from ..errors import UserError
from ..pairs import (
    Compared,
    PairConfig,
    check_noises,
    check_pairs,
    close_iteration,
    given_examples,
    raise_for,
    update,
    watch_held_out,
)
from ..preference import Batch, Example, watch_pairs
from ..preference_losses import margins, pair_losses, pair_margin, token_losses, usable
from ..tally import Tally
from ..training import Run

LOSSES = {"frame": token_losses, "pair": pair_losses}


@dataclass
class Config(PairConfig):
    aggregate: str = "frame"  # what a sigmoid is taken of: each latent frame, or the mean of a pair
    least_untied: float = 0.2  # share of a pair's segments that have to have a preference


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_pairs(recipe, processes)
    if recipe.data.preferences is None:
        wrong.insert(0, "algorithm.name: dense_dpo learns from labelled segments of given pairs; name data.preferences")
    if config.aggregate not in LOSSES:
        wrong.append(f"algorithm.aggregate: {config.aggregate!r} is none of {', '.join(LOSSES)}")
    if not 0 <= config.least_untied < 1:
        wrong.append(f"algorithm.least_untied: {config.least_untied} is no share from 0 to below 1")
    if config.dimension is not None:
        wrong.append("algorithm.dimension: segments have one label each; annotate them by that dimension")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return not config.renew_reference


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    frame_of = run.given.encoder.frame_of.to(run.policy.device)
    watch_held_out(run, labelled(run, "held_out"), partial(watch, run), frame_of)
    updates = given_examples(run, labelled(run, "preferences"))
    for _ in run.iterations():
        tally = Tally()
        for examples in updates():
            update(run, examples, partial(losses, run, tally), tally, counted(run, examples), frame_of)
        close_iteration(run, tally)


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Pair]:
    """The pairs that have enough untied segments. Raises: UserError where there is none, or noises lack."""
    least = recipe.algorithm.least_untied
    found = [r for r in records if isinstance(r, Pair) and r.segment_labels and usable(r.segment_labels, least)]
    if not found:
        share = f"more than {least:.0%} of its segments labelled for one side"
        raise UserError(f"{place}: no pair has {share}; annotate segments, or lower algorithm.least_untied")
    check_noises(recipe, found, place)
    return found


def labelled(run: Run, key: str) -> list[Compared]:
    """The chosen pairs of data.`key`, with a label for each latent frame that is trained on.

    A clip that is longer than those has labels for what is left out, which may be all that are no ties.

    Raises: UserError where no pair is left; Problems for segments that the frames do not fit.
    """
    encoder, fps, place = run.given.encoder, run.recipe.fps, f"data.{key}: {getattr(run.recipe.data, key)}"
    frames, found, problems = encoder.video_shape[0], [], []
    pairs = run.given.chosen(key, chosen)
    for pair in pairs:
        seconds = pair.segment_seconds
        try:
            seen = pair.segment_labels[: num_segments(frames, fps, seconds)]
            labels = tuple(frame_labels(seen, frames, encoder.latent_frames, fps, seconds))
        except ValueError as error:
            problems.append(f"{place} line {pair.line}: {error}; label it again")
            continue
        if usable(seen, run.recipe.algorithm.least_untied) and any(labels):
            found.append(Compared(pair, labels=labels))
    raise_for(problems)
    if pairs and not found:
        raise UserError(f"{place}: all segments of the first {frames} frames are ties; raise call.num_frames")
    return found


def losses(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """(P,) sums over what is counted; errors and reference (P, 2, F)."""
    config: Config = run.recipe.algorithm
    watch(run, tally, errors, reference, batch)
    tally.add("frames/tied", (batch.labels == 0).double().mean(1))
    sums, counts = LOSSES[config.aggregate](margins(errors, reference, run.recipe.algorithm.beta), batch.labels)
    return sums + counts * config.anchor * oriented(errors, batch.labels)[:, 0]


def counted(run: Run, examples: Sequence[Example]) -> float:
    """Of all processes: untied frames, or pairs, whichever is averaged over."""
    if run.recipe.algorithm.aggregate == "pair":
        return run.processes.total(len(examples))
    return run.processes.total(sum(label != 0 for example in examples for label in example.labels))


def watch(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> None:
    """Note how the policy tells the untied frames of these pairs apart."""
    labels = batch.labels
    z = pair_margin(margins(errors, reference, run.recipe.algorithm.beta).detach(), labels)
    watch_pairs(tally, z, oriented(errors, labels), oriented(reference, labels), batch.levels)


def oriented(errors: Tensor, labels: Tensor) -> Tensor:
    """(P, 2) means over the untied frames of (P, 2, F) errors, those of the better member in each frame first."""
    better = torch.where(labels[:, None] > 0, errors, errors.flip(1))
    untied = (labels != 0)[:, None]
    return (better * untied).sum(2) / untied.sum(2)
