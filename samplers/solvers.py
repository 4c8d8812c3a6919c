"""A higher-order ODE solver for the steps that follow the noise, so that fewer of them do.

MixGRPO-Flash (arXiv 2507.21802) compresses the steps after its window and takes them by DPM-Solver++ (2M, data
prediction, midpoint; arXiv 2211.01095, algorithm 2). With lambda = log((1 - sigma) / sigma) and h the change of lambda,
its first-order step is Euler's of the flow, (1 - sigma') x0_hat + sigma' eps_hat; its second-order one adds

    weight * (x0_hat - x0_hat of the step before)

so a step stays affine in state and output, plus an offset that the step before has left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def second_order_weight(before: float, sigma: float, sigma_next: float) -> float:
    """alpha' (1 - exp(-h)) h / (2 h_before) of the step sigma -> sigma_next that follows before -> sigma.

    0, which makes the step first-order, where a change of lambda is infinite: after pure noise (before = 1), and to
    sigma_next = 0, which is a step to the clean estimate.
    """
    if before == 1 or sigma_next == 0:
        return 0.0
    before, now, after = (math.log((1 - s) / s) for s in (before, sigma, sigma_next))
    covered = (1 - sigma_next) - sigma_next * (1 - sigma) / sigma
    return covered * (after - now) / (2 * (now - before))


def shortened(levels: Sequence[float], start: int, share: float, shift: float) -> list[float]:
    """The grid with the steps from `start` on replaced by ceil(share * their number), evenly spaced before the shift.

    Args:
        levels: T + 1 noise levels, falling.
        start: 0..T, the first step that is replaced; its level stays.
        share: in (0, 1]; 1 leaves the grid as it is.
        shift: k of the grid's time shift k u / (1 + (k - 1) u). Between its levels the grid is linear in u.
    """
    num_steps = len(levels) - 1
    kept = math.ceil(share * (num_steps - start) - 1e-9)  # 0.28 * 25 is a little above 7
    if kept == num_steps - start:
        return list(levels)
    unshifted = [s / (shift - (shift - 1) * s) for s in levels]
    times = np.interp(np.linspace(start, num_steps, kept + 1)[1:], range(num_steps + 1), unshifted)
    return [*levels[: start + 1], *(shift * times / (1 + (shift - 1) * times)).tolist()]
