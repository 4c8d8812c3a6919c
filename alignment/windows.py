"""Which steps of a rollout add noise, and which of them are trained.

The recipe's `sampler.window` says where noise may be; a `Window` says where it is in this iteration: everywhere
(DanceGRPO, Flow-GRPO), in a window that slides (MixGRPO) or is drawn (Flow-GRPO-Fast), or in one step, the same for all
samples of a prompt (Flash-GRPO). Steps without noise follow the ODE and are never trained.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from samplers import seed_for

from .config import Recipe
from .samples import Plan

MOVES = ("progressive", "decay", "random", "frozen")


@dataclass
class Window:
    size: int | None = None  # neighbouring steps that add noise; None: all of sampler.window
    move: str = "progressive"  # progressive, decay (ever faster), random (anew every iteration) or frozen (the first)
    every: int = 25  # iterations before the window moves on
    stride: int = 1  # steps that it moves on by
    decay: float = 0.1  # of `decay`: at start l it stays every * exp(-decay * max(0, l - decay_from)) iterations
    decay_from: int = 13
    per_prompt: bool = False  # random windows differ between prompts, never within a group


def check_noise(recipe: Recipe, window: Window) -> list[str]:
    """What is wrong with the noise of rollouts whose transitions are trained, one line each."""
    sampler, num_steps = recipe.sampler, recipe.sampler.steps
    start, stop = noise_range(recipe)
    wrong = []
    if sampler.kernel == "ode" or sampler.noise_level == 0:
        wrong.append("sampler: a deterministic sampler has no policy gradient; set kernel and noise_level > 0")
    if not 0 <= start < stop <= num_steps:
        wrong.append(f"sampler.window: [{start}, {stop}] holds no step of a rollout of {num_steps} (sampler.steps)")
    else:
        wrong += check_window(window, stop - start)
        if stop == num_steps and sampler.kernel in ("cps", "ddim"):
            kernel = sampler.kernel
            wrong.append(f"sampler.window: kernel {kernel} adds no noise in the last step; end at {stop - 1}")
    if recipe.model.dtype == "float16":
        wrong.append("model.dtype: gradients of a mean over a latent's elements underflow in float16; use bfloat16")
    return wrong


def noise_range(recipe: Recipe) -> tuple[int, int]:
    """[start, stop) of the steps that may add noise."""
    start, stop = recipe.sampler.window or (0, recipe.sampler.steps - 1)
    return start, stop


def check_window(window: Window, allowed: int) -> list[str]:
    """What is wrong, one line each; `allowed` is the number of steps of sampler.window."""
    wrong = []
    if window.size is not None and not 1 <= window.size <= allowed:
        wrong.append(f"algorithm.window.size: {window.size} of {allowed} stochastic steps (sampler.window)")
    if window.move not in MOVES:
        wrong.append(f"algorithm.window.move: {window.move!r} is none of {', '.join(MOVES)}")
    if window.every < 1 or window.stride < 1 or window.decay < 0:
        wrong.append("algorithm.window: every and stride have to be 1 or more, decay 0 or more")
    if window.per_prompt and window.move != "random":
        wrong.append("algorithm.window.per_prompt: only random windows differ between prompts; set move to random")
    return wrong


def window_start(window: Window, allowed: int, iteration: int) -> int:
    """Position of a sliding window among the allowed steps at an iteration (1-based).

    min(floor((iteration - 1) / every) * stride, allowed - size), or with `decay` the same with shrinking stays.

    Source: MixGRPO (arXiv 2507.21802), section 3.2 and its ablation of the moving interval.
    """
    last = allowed - window.size
    start, left = 0, iteration - 1
    while start < last:
        hastens = window.move == "decay"
        stay = window.every * math.exp(-window.decay * max(0, start - window.decay_from)) if hastens else window.every
        if left < max(1, round(stay)):
            break
        left -= max(1, round(stay))
        start = min(start + window.stride, last)
    return start


def plan_steps(
    window: Window, allowed: list[int], trained: int | None, seed: int, iteration: int, position: int
) -> Plan:
    """The steps that add noise and those that are recorded, for the group at a position of the stream.

    Args:
        allowed: the steps of sampler.window.
        trained: how many of the stochastic steps are trained, drawn anew every iteration; None for all.
    """
    where = (position,) if window.per_prompt else ()
    if window.size is None or window.move == "frozen":
        start = 0
    elif window.move == "random":
        start = random.Random(seed_for(seed, "window", iteration, *where)).randint(0, len(allowed) - window.size)
    else:
        start = window_start(window, len(allowed), iteration)
    stochastic = allowed if window.size is None else allowed[start : start + window.size]
    recorded = stochastic
    if trained is not None and trained < len(stochastic):
        recorded = sorted(random.Random(seed_for(seed, "steps", iteration, *where)).sample(stochastic, trained))
    return Plan(tuple(stochastic), tuple(recorded))
