"""What policy-gradient updates say of themselves: sums over an iteration, reduced over processes at its end."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from samplers import Moment

if TYPE_CHECKING:
    from .training import Run


class Tally:
    """Ratios, losses and gradients of an iteration.

    Attributes:
        updates: optimiser steps so far; ratios of the first one show whether rollout and replay agree.
    """

    def __init__(self) -> None:
        self.updates = 0
        self.values: dict[str, list[Tensor]] = defaultdict(list)
        self.gradients: dict[int, Any] = defaultdict(float)

    def ratio(self, log_ratio: Tensor, clipped: Tensor, clips_at_once: Tensor) -> None:
        """Count samples (B,).

        Args:
            clipped: bool, those whose gradient the trust region takes away.
            clips_at_once: bool, those outside the trust region whatever their advantage.
        """
        self.values["log_ratio"].append(log_ratio.detach())
        self.values["clipped"].append(clipped.double())
        if self.updates == 0:
            self.values["first"].append(log_ratio.detach())
            self.values["first_clipped"].append(clips_at_once.double())

    def add(self, name: str, values: Tensor) -> None:
        """Values (B,) whose mean over the iteration is logged under this name."""
        self.values[name].append(values.detach().double())

    def watch_gradient(self, moment: Moment) -> None:
        """Add the squared norm of the loss gradient at the network's output to its step, once backward reaches it."""
        index = moment.index  # a hook that held the moment would hold its own tensor, which nothing could free
        if moment.output.requires_grad:
            moment.output.register_hook(lambda gradient: self._gradient(index, gradient))

    def _gradient(self, index: int, gradient: Tensor) -> None:
        self.gradients[index] += gradient.detach().float().square().sum()

    def metrics(self, run: Run) -> dict[str, float]:
        """The iteration's metrics, the same in every process."""
        device = run.policy.device

        def gathered(name: str) -> Tensor:
            mine = self.values[name]
            return run.processes.gather(torch.cat(mine) if mine else torch.zeros(0, dtype=torch.float64, device=device))

        found = {}
        logs, first = gathered("log_ratio"), gathered("first")
        if len(logs):
            found = {
                "ratio/mean": float(logs.exp().mean()),
                "ratio/max_deviation": float((logs.exp() - 1).abs().max()),
                "ratio/first_deviation": float(first.abs().max()),
                "clip_fraction": float(gathered("clipped").mean()),
                "clip_fraction/before_update": float(gathered("first_clipped").mean()),
            }
        own = set(self.values) - {"log_ratio", "first", "clipped", "first_clipped"}
        found |= {name: float(gathered(name).mean()) for name in sorted(run.processes.union(sorted(own)))}
        return found | self._shares(run)

    def _shares(self, run: Run) -> dict[str, float]:
        """Share of every step in the gradient's norm at the network's output."""
        names = sorted(int(name) for name in run.processes.union([str(i) for i in self.gradients]))
        own = [torch.as_tensor(self.gradients.get(i, 0.0), dtype=torch.float32) for i in names]
        if not own:
            return {}
        norms = run.processes.sum(torch.stack([s.to(run.policy.device) for s in own])).sqrt()
        shares = norms / norms.sum() if float(norms.sum()) > 0 else norms
        return {f"gradient_share/step_{i}": float(share) for i, share in zip(names, shares, strict=True)}
