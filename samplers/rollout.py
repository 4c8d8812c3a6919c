"""Rollout and replay of an unmodified diffusers pipeline through its scheduler.

A rollout runs the pipeline and records the transitions that will be trained. A replay runs the same pipeline again
under autograd, over the recorded states: in every step the network's output carries a graph, the visitor takes its loss
and calls backward, and the graph is gone before the next step, so that memory holds one step's graph.

    B batch; states have the shape that the pipeline's loop hands to its scheduler
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transitions
from .schedulers import Moment, SDEScheduler
from .transitions import Step


@dataclass(frozen=True)
class Recorded:
    """One recorded transition of B samples; where a tree splits it leads to K next states of each, else to one."""

    index: int
    step: Step
    x: Tensor  # (B, ...) float32 state
    x_next: Tensor  # (B K, ...) float32 next state: the action; child k of sample b is row b K + k
    mean: Tensor  # (B, ...) float32 mean of the next state under the policy that sampled it

    @property
    def children(self) -> int:
        """K."""
        return len(self.x_next) // len(self.x)

    @property
    def log_prob(self) -> Tensor:
        """(B K,) mean over elements."""
        return transitions.log_prob(self.x_next, self.mean.repeat_interleave(self.children, 0), self.step.std)

    def rows(self, rows: Sequence[int] | slice) -> Recorded:
        """The same transition of some of the samples, with all their children."""
        x_next = self.x_next.unflatten(0, (len(self.x), self.children))[rows].flatten(0, 1)
        step = self.step._replace(output_weight=_picked(self.step.output_weight, rows))
        return replace(self, step=step, x=self.x[rows], x_next=x_next, mean=self.mean[rows])


@dataclass(frozen=True)
class Trajectory:
    """The recorded steps of B samples, in the order in which they ran."""

    steps: tuple[Recorded, ...]
    injectable: bool  # the state that step sees is what prepare_latents returns, so that a replay can start anywhere
    latent_seeds: tuple[int, ...] | None = None  # a replay needs them too: some pipelines sample their condition
    stochastic: tuple[int, ...] | None = None  # the rollout's steps that added noise; None: the scheduler's own
    levels: tuple[float | tuple[float, ...], ...] | None = None  # of noised clean states (see `noised`), on no grid

    @staticmethod
    def of_clean(states: Tensor, injectable: bool, latent_seeds: Sequence[int]) -> Trajectory:
        """A trajectory without a rollout, of clean states that come from elsewhere, to be `noised`.

        Args:
            states: (B, ...) float32, as `Rollout.state`.
            injectable: what a rollout of this pipeline says (`Trajectory.injectable`).
            latent_seeds: B, for what the pipeline draws before its first step.
        """
        recorded = Recorded(0, Step(1.0, 0.0, 0.0), states, states, states)
        return Trajectory((recorded,), injectable, tuple(latent_seeds), ())

    def rows(self, rows: Sequence[int] | slice) -> Trajectory:
        """The same steps for some of the samples."""
        steps = tuple(recorded.rows(rows) for recorded in self.steps)
        levels = None if self.levels is None else tuple(_picked(level, rows) for level in self.levels)
        return replace(self, steps=steps, latent_seeds=_picked(self.latent_seeds, rows), levels=levels)

    @staticmethod
    def joined(parts: Sequence[Trajectory]) -> Trajectory:
        """One trajectory of the samples of several that recorded the same steps, at the same noise levels for all."""
        steps = []
        for same in zip(*(part.steps for part in parts), strict=True):
            each = isinstance(same[0].step.output_weight, tuple)
            if each or len({(recorded.index, recorded.step) for recorded in same}) > 1:
                raise ValueError(f"steps {[recorded.index for recorded in same]} cannot be joined")
            x, x_next, mean = (torch.cat([getattr(s, name) for s in same]) for name in ("x", "x_next", "mean"))
            steps.append(replace(same[0], x=x, x_next=x_next, mean=mean))
        seeds = [part.latent_seeds for part in parts]
        known = None if None in seeds else tuple(seed for part in seeds for seed in part)
        return replace(parts[0], steps=tuple(steps), latent_seeds=known)

    def noised(
        self, clean: Tensor, levels: Sequence[float | Sequence[float] | Tensor], noises: Sequence[Tensor]
    ) -> Trajectory:
        """The clean states of this rollout, noised to levels of any choice, to be visited by `replay`.

        There `moment.output` is the network's velocity at (1 - level) clean + level noise, and `moment.mean` its clean
        estimate; `x_next` and `mean` of what was recorded are the clean state.

        Args:
            clean: (B, ...) the last step's x_next.
            levels: S noise levels in (0, 1], highest first: pipelines with two experts change over once. One may be B
                levels, a sample each, where the pipeline takes timesteps (B,): those that do not raise or go wrong.
            noises: S standard normal tensors (B, ...).
        """
        plain = [level.tolist() if isinstance(level, Tensor) else level for level in levels]
        plain = [level if isinstance(level, float | int) else tuple(level) for level in plain]
        steps = []
        for index, (level, noise) in enumerate(zip(plain, noises, strict=True)):
            kept = 1 - level if isinstance(level, float | int) else [1 - own for own in level]
            x = transitions.by_sample(kept, clean) * clean + transitions.by_sample(level, clean) * noise
            steps.append(Recorded(index, transitions.to_clean(level), x, clean, clean))
        return replace(self, steps=tuple(steps), levels=tuple(plain), stochastic=())


@dataclass(frozen=True)
class Rollout:
    frames: Any  # what the pipeline returns: with output_type="pt" (B, F, C, H, W) in [0, 1], images (B, C, H, W)
    trajectory: Trajectory
    state: Tensor  # (B, ...) float32 state after the last step; (B K, ...) where a segment ends in a split


class Segment(NamedTuple):
    """Neighbouring steps of a rollout that are run by themselves, such as those of a tree between two splits."""

    steps: Sequence[int]
    start: Tensor | None = None  # (B, ...) the state before them; None: the pipeline's own
    injectable: bool = True  # how `start` gets in: what the trajectory of the rollout's first step says
    branch: Callable[[Moment], Tensor] | None = None  # draws (B K, ...) next states in the last of them; None: one each


def seed_for(*key: int | str) -> int:
    """A 63-bit seed from a key, the same on every machine: (run seed, iteration, prompt, sample, purpose)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big") >> 1


def generators(seeds: Sequence[int | torch.Generator]) -> list[torch.Generator]:
    """One CPU generator a sample; CPU, so that a seed means the same noise on every device. Generators stay."""
    return [s if isinstance(s, torch.Generator) else torch.Generator("cpu").manual_seed(s) for s in seeds]


def rollout(
    pipe: Any,
    record: Collection[int],
    latent_seeds: Sequence[int] | None = None,
    noise_seeds: Sequence[int | torch.Generator] | None = None,
    stochastic: Iterable[int] | None = None,
    visit: Callable[[Moment, Recorded], None] | None = None,
    segment: Segment | None = None,
    **call: Any,
) -> Rollout:
    """Run the pipeline with its SDEScheduler and record some steps.

    Args:
        record: indices of the steps to keep.
        stochastic: indices of the steps that add noise. None: as the scheduler says.
        visit: called in every recorded step, which carries a graph then as in a replay, and is not kept.
        latent_seeds: one a sample for the initial noise; equal seeds share it. None: the pipeline's own way.
        noise_seeds: one a sample for the noise of the steps; a generator goes on from where it is.
        segment: the steps to run; where they end early, `call` asks for output_type "latent". None: all of them.
        call: the pipeline's arguments.
    """
    scheduler: SDEScheduler = pipe.scheduler
    steps: list[Recorded] = []
    prepared: list[Tensor] = []
    start, injectable = (segment.start, segment.injectable) if segment else (None, True)
    enters = start is not None and not injectable  # through a step that is run for this alone, as in `replay`
    state = None

    def on_step(moment: Moment) -> Tensor:
        nonlocal injectable, enters, state
        if enters:
            enters = False
            torch.set_grad_enabled(visit is not None and moment.index in record)
            return start.to(moment.x.dtype)
        if start is None and moment.index == scheduler.indices[0]:
            injectable = bool(prepared) and torch.equal(prepared[0].to(moment.x.dtype), moment.x)
        splits = segment is not None and segment.branch is not None and moment.index == segment.steps[-1]
        x_next = (segment.branch if splits else scheduler.draw)(moment).detach()
        state = x_next.float()
        if moment.index in record:
            mean = moment.mean.detach()
            recorded = Recorded(moment.index, moment.step, moment.x.detach().float(), state, mean)
            if visit is None:
                steps.append(recorded)
            else:
                visit(moment, recorded)
        torch.set_grad_enabled(visit is not None and moment.index + 1 in record)
        return x_next[:: len(x_next) // len(moment.x)]  # after a split the loop ends, with any one child of each

    def prepare(latents: Tensor) -> Tensor:
        given = latents if start is None or enters else start.clone()
        prepared.append(given.to(_state_dtype(latents)))
        return prepared[-1]

    if latent_seeds is not None:
        call["generator"] = generators(latent_seeds)
    first = segment.steps[0] if segment else 0
    grad = torch.set_grad_enabled(visit is not None and not enters and first in record)
    with grad, _scheduler_state(scheduler, on_step), _initial_state(pipe, prepare):
        if segment:
            scheduler.steps = [first, *segment.steps] if enters else segment.steps
        scheduler.generators = None if noise_seeds is None else generators(noise_seeds)
        if stochastic is not None:
            scheduler.stochastic = tuple(stochastic)
        frames = (pipe if visit is None else undecorated(pipe))(**call)[0]
        noisy = scheduler.stochastic
    seeds = None if latent_seeds is None else tuple(latent_seeds)
    return Rollout(frames, Trajectory(tuple(steps), injectable, seeds, noisy), state)


def replay(pipe: Any, trajectory: Trajectory, visit: Callable[[Moment, Recorded], None], **call: Any) -> None:
    """Run the recorded steps of the pipeline again, with gradients if the caller has them on.

    Args:
        trajectory: from `rollout`; its samples in the order of `call`'s prompts.
        visit: called in every step with what the network gives now and what was recorded; takes its loss and calls
            backward there, since the graph does not outlive the step.
        call: the pipeline's arguments of the rollout, with the same number of inference steps.
    """
    scheduler: SDEScheduler = pipe.scheduler
    indices = [recorded.index for recorded in trajectory.steps]
    if not indices:
        raise ValueError("the trajectory holds no recorded step")
    # Where the prepared latents are not the state that step sees (image-to-video pipelines that glue their first frame
    # on), the first state enters through a step that is run for this alone, without a graph.
    pending = [*trajectory.steps] if trajectory.injectable else [None, *trajectory.steps]
    position, graph = 0, torch.is_grad_enabled()

    def on_step(moment: Moment) -> Tensor:
        nonlocal position
        recorded = pending[position]
        position += 1
        if recorded is None:
            torch.set_grad_enabled(graph)
        else:
            visit(moment, recorded)
        following = pending[position] if position < len(pending) else recorded  # after the last any state will do
        return following.x.to(moment.x.dtype)

    def prepare(latents: Tensor) -> Tensor:
        state = trajectory.steps[0].x if trajectory.injectable else latents
        return state.to(_state_dtype(latents), copy=True)

    if trajectory.latent_seeds is not None:
        call["generator"] = generators(trajectory.latent_seeds)
    mode = torch.set_grad_enabled(graph and trajectory.injectable)
    with mode, _scheduler_state(scheduler, on_step), _initial_state(pipe, prepare):
        scheduler.steps = indices if trajectory.injectable else [indices[0], *indices]
        scheduler.stochastic, scheduler.levels_visited = trajectory.stochastic, trajectory.levels
        undecorated(pipe)(**{**call, "output_type": "latent"})


def undecorated(pipe: Any) -> Callable[..., Any]:
    """The pipeline's __call__ without its torch.no_grad decorator."""
    function = type(pipe).__call__
    return getattr(function, "__wrapped__", function).__get__(pipe)


@contextlib.contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Replace owner.name by wrap(owner.name) for a while."""
    original = getattr(owner, name)
    shadowed = name in vars(owner)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if shadowed:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _scheduler_state(scheduler: SDEScheduler, on_step: Callable[[Moment], Tensor]) -> Iterator[None]:
    names = ("steps", "generators", "stochastic", "levels_visited", "on_step")
    before = {name: getattr(scheduler, name) for name in names}
    scheduler.on_step = on_step
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(scheduler, name, value)


def _picked(values: Any, rows: Sequence[int] | slice) -> Any:
    """Some rows of a tuple with one value a sample; what else there is holds for all samples."""
    if not isinstance(values, tuple):
        return values
    return values[rows] if isinstance(rows, slice) else tuple(values[row] for row in rows)


def _state_dtype(latents: Tensor) -> torch.dtype:
    """float32 where autocast lets any network take it, else the pipeline's own: some feed the state to it uncast."""
    return torch.float32 if torch.is_autocast_enabled(latents.device.type) else latents.dtype


def _initial_state(pipe: Any, change: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager:
    """Change the latents that the pipeline's prepare_latents returns (alone or as the first of several)."""

    def wrap(prepare_latents: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = prepare_latents(*args, **kwargs)
            if isinstance(result, tuple):
                return (change(result[0]), *result[1:])
            return change(result)

        return wrapped

    return patched(pipe, "prepare_latents", wrap)
