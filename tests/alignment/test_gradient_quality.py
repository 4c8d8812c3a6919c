"""How well one stochastic step tells the truth: the estimated policy gradient against the true one, in closed form.

x0 ~ N(0, 1) in 256 dimensions has a linear velocity, so a rollout with noise in one step only gives
x0 = carried x_T + injected xi. The reward is linear, w x0, so the true gradient with respect to a shift of the step's
mean is along w; the estimate is the mean of advantage times xi over 24 prompts of 8 samples. The expected cosines are
of an independent study of the kernels on the same grid, over many seeds.
"""

import math

import pytest
import torch

from alignment.advantages import group_advantages
from samplers.transitions import transition
from tests.samplers.grids import constants, old_unipc

DIMENSIONS, PROMPTS, GROUP, SEEDS = 256, 24, 8, 60
LEVELS = old_unipc(20, 3.0)


def weights(kernel: str, noise_level: float, step: int) -> tuple[float, float]:
    """(carried, injected): x0 = carried x_T + injected xi where only this step adds noise."""
    carried, injected = 1.0, 0.0
    for i, (sigma, sigma_next) in enumerate(zip(LEVELS, LEVELS[1:], strict=False)):
        t = transition(kernel if i == step else "ode", sigma, sigma_next, noise_level, constants(LEVELS))
        factor = (t.c0 * (1 - sigma) + t.ce * sigma) / ((1 - sigma) ** 2 + sigma**2)
        carried, injected = factor * carried, factor * injected + t.std
    return carried, injected


def cosine(kernel: str, noise_level: float, step: int, shared: bool) -> float:
    """Mean over seeds of the cosine between estimate and truth."""
    carried, injected = weights(kernel, noise_level, step)
    groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
    truth = torch.ones(DIMENSIONS) / math.sqrt(DIMENSIONS)
    found = []
    for seed in range(SEEDS):
        draw = torch.Generator().manual_seed(seed)
        start = torch.randn(PROMPTS if shared else PROMPTS * GROUP, DIMENSIONS, generator=draw)
        noise = torch.randn(PROMPTS * GROUP, DIMENSIONS, generator=draw)
        x0 = carried * (start[groups] if shared else start) + injected * noise
        advantages = group_advantages(x0 @ truth, groups)
        found.append(torch.cosine_similarity((advantages[:, None] * noise).mean(0), truth, dim=0))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize(
    ("kernel", "noise_level", "step"), [("dance", 0.3, 1), ("wan_linear", 1.0, 9), ("ddim", 1.0, 5), ("cps", 0.8, 1)]
)
def test_with_shared_initial_noise_every_kernel_is_alike(kernel, noise_level, step):
    assert cosine(kernel, noise_level, step, shared=True) == pytest.approx(0.61, abs=0.02)


@pytest.mark.parametrize(
    ("kernel", "noise_level", "step", "expected"),
    [
        ("dance", 0.3, 1, 0.033),
        ("wan_linear", 1.0, 1, 0.116),
        ("wan_linear", 1.0, 9, 0.153),
        ("ddim", 1.0, 5, 0.440),
        ("cps", 0.8, 1, 0.596),
    ],
)
def test_with_independent_initial_noise_small_kernels_learn_little(kernel, noise_level, step, expected):
    assert cosine(kernel, noise_level, step, shared=False) == pytest.approx(expected, abs=0.02)
