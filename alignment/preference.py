"""Learning from clean samples that are compared or weighted: what every preference algorithm shares.

Members of an example (the two of a pair, the one of a video to imitate) are noised to one level, with one noise unless
the recipe says otherwise, and go through the pipeline's own loop together. How far the network's velocities are from
noise minus clean, under the policy and under a reference, is all that a loss sees.

    P examples of a micro-batch, M members of each, F latent frames
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from samplers import Moment, Segment, Trajectory, seed_for
from samplers.rollout import generators

from .config import Recipe
from .data import Prompt, by_image, conditions
from .errors import UserError
from .noised import check_flow
from .policy import Policy
from .preference_losses import LAWS, draw_levels, frame_errors, implicit_accuracy, matching_error
from .samples import chunks
from .self_check import takes_levels_each
from .tally import Tally

if TYPE_CHECKING:
    from .training import Run

NOISES = ("shared", "independent", "own")
BUCKETS = 4  # of noise levels, in the metrics


@dataclass
class MatchingConfig:
    """What every algorithm that matches velocities with clean samples has to know."""

    batch_size: int = 16  # examples an update, over all processes
    level_law: str = "logit_normal"  # of the noise levels: logit_normal or uniform
    level_shift: float = 1.0  # time shift of these levels; 1: none
    call: dict[str, Any] = field(default_factory=dict)  # arguments of the pipeline in updates, as guidance_scale: 1.0


class Example(NamedTuple):
    """What a loss compares or weights, its latents still on disk or in host memory."""

    prompt: Prompt
    seed: int  # its level and noise depend on it alone
    load: Callable[[], tuple[Tensor, Tensor | None]]  # (M, ...) clean states, and the noises that they were made from
    weight: float = 1.0  # of its loss
    gap: float = 0.0  # how much better the first member is, in standard deviations of such gaps
    labels: Sequence[float] | None = None  # of a pair by frame or dimension: 1 first is better, -1 second, or 0
    level: float | None = None  # of noise; None: drawn


def check_matching(recipe: Recipe, processes: int) -> list[str]:
    """What is wrong with the shared settings, one line each."""
    config: MatchingConfig = recipe.algorithm
    wrong = []
    if config.batch_size < processes:
        wrong.append(f"algorithm.batch_size: {config.batch_size} for {processes} processes")
    if config.level_law not in LAWS:
        wrong.append(f"algorithm.level_law: {config.level_law!r} is none of {', '.join(LAWS)}")
    if config.level_shift <= 0:
        wrong.append(f"algorithm.level_shift: {config.level_shift} is not above 0; 1 is none")
    if recipe.model.dtype == "float16":
        wrong.append("model.dtype: gradients of a mean over a latent's elements underflow in float16; use bfloat16")
    return wrong


def look_at_pipeline(policy: Policy, config: MatchingConfig, prompt: Prompt) -> None:
    """Find out how this pipeline takes noise levels; after the self-check.

    Raises: UserError where it is no flow, or guides in the update: errors have to be the network's own.
    """
    check_flow(policy)
    call = {**conditions([prompt]), **config.call}
    before = policy.evaluations
    policy.rollout([prompt.text], [0], [0], [], segment=Segment([0]), output_type="latent", **call)
    if policy.evaluations - before > 1:
        name = type(policy.pipe).__name__
        raise UserError(
            f"algorithm.call: {name} guides (two evaluations a sample), and errors have to be the network's own; "
            "add what turns that off, as guidance_scale: 1.0"
        )
    policy.levels_each = takes_levels_each(policy, prompt.text, **call)


class Batch:
    """P examples at their noise levels, ready to be run under any weights.

    Attributes:
        levels, weights, gaps: (P,).
        labels: (P, F) by latent frame, or by dimension; None where the examples have none.
    """

    def __init__(self, run: Run, examples: Sequence[Example], noise: str, frame_of: Tensor | None):
        self.run, self.frame_of = run, frame_of
        config, device = run.recipe.algorithm, run.policy.device
        loaded = [example.load() for example in examples]
        self.members = len(loaded[0][0])
        self.clean = torch.cat([states for states, _ in loaded]).to(device).float()  # (P M, ...)
        noises = [_noises(*pair, e.seed, noise) for pair, e in zip(loaded, examples, strict=True)]
        self.noises = torch.cat(noises).to(device)
        drawn = draw_levels(config.level_law, [seed_for(e.seed, "level") for e in examples], config.level_shift)
        levels = [level if e.level is None else e.level for e, level in zip(examples, drawn, strict=True)]
        self.levels = torch.tensor(levels, device=device)
        self.weights, self.gaps = torch.tensor([(e.weight, e.gap) for e in examples], device=device).unbind(1)
        labels = [example.labels for example in examples]
        self.labels = None if labels[0] is None else torch.tensor(labels, device=device)
        self.prompts = [example.prompt for example in examples for _ in range(self.members)]
        level = self.levels.repeat_interleave(self.members) if len(examples) > 1 else float(self.levels)
        seeds = [seed_for(example.seed, "condition") for example in examples for _ in range(self.members)]
        clean = Trajectory.of_clean(self.clean, run.policy.injectable, seeds)
        self.trajectory = clean.noised(self.clean, [level], [self.noises])

    def visit(self, visit: Callable[[Tensor], None]) -> None:
        """Run the network; `visit` sees the errors (P, M), by latent frame (P, M, F), float32, with their graph.

        It calls backward where it wants to: the graph does not outlive it.
        """

        def on_moment(moment: Moment, recorded: Any) -> None:
            visit(self._errors(moment.output.float()))

        texts = [prompt.text for prompt in self.prompts]
        call = {**conditions(self.prompts), **self.run.recipe.algorithm.call}
        self.run.policy.replay(self.trajectory, texts, on_moment, **call)

    def errors_under(self, weights: AbstractContextManager) -> Tensor:
        """The errors under other weights, without gradients."""
        found: list[Tensor] = []
        with weights, torch.no_grad():
            self.visit(found.append)
        return found[0]

    def _errors(self, velocity: Tensor) -> Tensor:
        if self.frame_of is None:
            found = matching_error(velocity, self.noises, self.clean)
        else:
            found = frame_errors(velocity, self.noises, self.clean, self.frame_of)
        return found.unflatten(0, (-1, self.members))


def batches(
    run: Run, examples: Sequence[Example], noise: str = "shared", frame_of: Tensor | None = None
) -> Iterator[Batch]:
    """Micro-batches of this process's examples, at most batch.update of them each.

    Args:
        noise: one for all members of an example (shared), one each (independent), or each the one that it was generated
            from (own).
        frame_of: the latent frame of each element of a state; errors are by latent frame then.
    """
    # A pipeline that takes one timestep for all its samples sees one example, and so one level, at a time.
    size = run.recipe.batch.update if run.policy.levels_each else 1
    for alike in by_image([example.prompt for example in examples]):
        for part in chunks(alike, size):
            yield Batch(run, [examples[i] for i in part], noise, frame_of)


def watch_pairs(tally: Tally, margin: Tensor, errors: Tensor, reference: Tensor, levels: Tensor) -> None:
    """Note how well P pairs are told apart, and which member moved.

    A policy can widen the margin by fitting both members worse, the better one less so (likelihood displacement):
    `error/winner` and `error/loser` are their errors over the reference's.

    Args:
        margin: (P,) z, what the loss is a function of.
        errors, reference: (P, 2), the better one first.
        levels: (P,) of noise.
    """
    tally.add("implicit_accuracy", implicit_accuracy(margin))
    tally.add("margin", margin)
    tally.add("margin/size", margin.abs())
    ratio = errors.detach() / reference
    tally.add("error/winner", ratio[:, 0])
    tally.add("error/loser", ratio[:, 1])
    buckets = (levels * BUCKETS).long().clamp(max=BUCKETS - 1)
    for bucket in buckets.unique().tolist():
        low, high = bucket / BUCKETS, (bucket + 1) / BUCKETS
        tally.add(f"margin/levels_{low:.2f}_{high:.2f}", margin[buckets == bucket])


def _noises(states: Tensor, own: Tensor | None, seed: int, kind: str) -> Tensor:
    """(M, ...) float32 noises of one example."""
    if kind == "own":
        return own.float()
    generator = generators([seed_for(seed, "noise")])[0]
    count = 1 if kind == "shared" else len(states)
    return torch.randn((count, *states.shape[1:]), generator=generator).expand(len(states), *states.shape[1:])
