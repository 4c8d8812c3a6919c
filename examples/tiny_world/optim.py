"""What the trainings share: Muon, a bounded schedule, moving averages and checkpoints that survive a kill."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices (B, R, C) close to 1 by Newton-Schulz iteration.

    Source: Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), with its quintic coefficients.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for weights of any rank >= 2; a convolution kernel (O, I, ...) is the matrix (O, I ...).

    Unlike torch.optim.Muon it takes kernels, and orthogonalises all weights of one shape in one batched product. The
    columns of a matrix both of whose sides exceed `block` are orthogonalised in groups, whose cost grows less.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, block: float = math.inf):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "block": block})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    update, weight = self._nesterov(p, group["momentum"]), p.view(len(p), -1)
                    width = weight.shape[1]
                    while min(len(p), width) > group["block"]:
                        width = -(-width // 2)
                    for part, direction in zip(weight.split(width, 1), update.split(width, 1), strict=True):
                        shapes.setdefault(tuple(part.shape), []).append((part, direction))
            for (rows, columns), same in shapes.items():
                updates = orthogonalise(torch.stack([direction for _, direction in same]))
                scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for (part, _), u in zip(same, updates, strict=True):
                    part.sub_(u, alpha=scale)

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        state = self.state[p]
        buffer = state.setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(buffer, momentum).flatten(1)


class Budget(NamedTuple):
    """A training ends after `steps` or `seconds`, whichever comes first."""

    steps: int
    seconds: float = math.inf
    save_every: float = 60.0  # seconds

    def progress(self, step: int, elapsed: float) -> float:
        return min(1.0, max(step / self.steps, elapsed / self.seconds))


class Training:
    """Optimisers, learning rate, clock and checkpoint of one training.

    The learning rate is constant, then linear to 0 over the last 60 % of the budget.

    Args:
        modules: name -> module; what a checkpoint holds besides the optimisers.
        optimisers: stepped together.
        folder: where `state.pt` is written, aside and renamed.
    """

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimisers: list[torch.optim.Optimizer],
        budget: Budget,
        folder: Path,
        generator: torch.Generator,
    ):
        self.modules, self.optimisers, self.budget, self.generator = modules, optimisers, budget, generator
        self.path = Path(folder) / "state.pt"
        self.step, self.elapsed = 0, 0.0
        self._peaks = [[group["lr"] for group in o.param_groups] for o in optimisers]
        if self.path.exists():
            self._load()
        self._tick = self._saved = time.monotonic()

    @property
    def progress(self) -> float:
        return self.budget.progress(self.step, self.elapsed)

    @property
    def done(self) -> bool:
        return self.progress >= 1

    def update(self, loss: Tensor, clip: float = 1.0) -> None:
        """One step down the gradient of `loss`; the state is saved when it is due or the budget is spent."""
        factor = min(1.0, (1 - self.progress) / 0.6)
        loss.backward()
        parameters = [p for o in self.optimisers for group in o.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip)
        for optimiser, peaks in zip(self.optimisers, self._peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        now = time.monotonic()
        self.step, self.elapsed, self._tick = self.step + 1, self.elapsed + now - self._tick, now

    def save_if_due(self) -> None:
        if self.done or time.monotonic() - self._saved >= self.budget.save_every:
            self.save()

    def save(self) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "elapsed": self.elapsed,
            "generator": self.generator.get_state(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".aside")
        torch.save(state, aside)
        os.replace(aside, self.path)
        self._saved = time.monotonic()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.generator.set_state(state["generator"])


def low_precision(device: str | torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the device computes in it; on a CPU that does not, it is several times slower."""
    kind = torch.device(device).type
    able = kind != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=able)


@torch.no_grad()
def track(average: nn.Module, module: nn.Module, decay: float, step: int) -> None:
    """Move `average` towards `module`; early on faster, so that the first weights are forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    for a, p in zip(average.parameters(), module.parameters(), strict=True):
        a.lerp_(p.detach(), 1 - decay)
