"""The update that needs no second forward pass: gradients are taken while the rollout runs.

With one update a rollout the ratio is 1 when its gradient is taken, so that the gradient is the sum over samples of
minus the advantage times the gradient of the log-probability. The latter does not depend on the reward: it is taken in
the rollout, sample by sample, waits in host memory, and is scaled once the rewards are known.

Source: LeanGRPO (arXiv 2609.03528).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from samplers import Moment, Recorded
from samplers.transitions import Step, log_prob

if TYPE_CHECKING:
    from .policy import Policy


class ScoreGradients:
    """Gradients of the samples' log-probabilities, one copy of the trained weights' size a sample.

    Args:
        weight: of a step in the sum.
    """

    def __init__(self, policy: Policy, weight: Callable[[Step], float]):
        self.parameters, self.weight = policy.parameters, weight
        self.found: dict[int, dict[str, Tensor]] = {}  # sample -> name -> gradient
        self.steps: dict[int, list[Step]] = {}  # sample -> the steps that it was seen at
        self.seen: list[Step] = []

    def visit(self, moment: Moment, recorded: Recorded) -> None:
        """Take the gradient of one step of a rollout of one sample."""
        self.seen.append(moment.step)
        (self.weight(moment.step) * log_prob(recorded.x_next, moment.mean, moment.step.std)).sum().backward()

    def next_sample(self, row: int) -> None:
        """Put the gradients of this sample aside."""
        self.found[row] = {name: p.grad.cpu() for name, p in self.parameters.items() if p.grad is not None}
        self.steps[row], self.seen = self.seen, []
        for p in self.parameters.values():
            p.grad = None

    def scale(self, coefficients: Tensor) -> None:
        """Set every weight's gradient to the sum over samples of coefficients (N,) times theirs."""
        for name, p in self.parameters.items():
            parts = [(c, self.found[i][name]) for i, c in enumerate(coefficients.tolist()) if name in self.found[i]]
            if parts:
                p.grad = torch.zeros_like(p)
                for coefficient, gradient in parts:
                    p.grad.add_(gradient.to(p.device), alpha=coefficient)
