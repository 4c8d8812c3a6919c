"""The optimiser: AdamW on float32 masters, learning-rate schedule, gradient clipping and weight averages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .config import EMAConfig, OptimizerConfig
from .errors import TrainingStopped


def learning_rate(config: OptimizerConfig, iteration: int, iterations: int) -> float:
    """Rate at an iteration (1-based): a linear rise over `warmup`, then constant, then linear to 0 after decay_from."""
    rise = min(1.0, iteration / config.warmup) if config.warmup else 1.0
    progress = (iteration - 1) / iterations
    fall = 1.0 if progress <= config.decay_from else (1 - progress) / (1 - config.decay_from)
    return config.lr * rise * fall


def build_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimizerConfig, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW with a group of parameters for each rate, the recipe's first.

    Args:
        rates: base rate of the parameters that have one of their own; see `set_rate`.
    """
    rates, groups = rates or {}, {config.lr: []}
    for name, p in parameters.items():
        groups.setdefault(rates.get(name, config.lr), []).append(p)
    betas = (config.betas[0], config.betas[1])
    options = [{"params": some, "share": rate / config.lr} for rate, some in groups.items() if some]
    return torch.optim.AdamW(options, lr=config.lr, betas=betas, weight_decay=config.weight_decay)


def set_rate(optimizer: torch.optim.AdamW, rate: float) -> None:
    """The recipe's rate of an iteration; groups with a base rate of their own get their share of it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]


def clip_gradients(parameters: dict[str, nn.Parameter], max_norm: float) -> float:
    """Clip the gradients to a total norm and return the norm before.

    Raises: TrainingStopped where a gradient is not finite; the weights are untouched then.
    """
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norm = nn.utils.get_total_norm(gradients.values())
    if not norm.isfinite():
        bad = next((name for name, gradient in gradients.items() if not gradient.isfinite().all()), "their norm")
        raise TrainingStopped(
            f"the gradient is not finite (first in {bad}); lower optimizer.lr or use model.dtype=float32"
        )
    nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)
    return float(norm)


@torch.no_grad()
def follow(average: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    """average = decay average + (1 - decay) parameters, in place."""
    for name, tensor in average.items():
        tensor.lerp_(parameters[name], 1 - decay)


class WeightAverage:
    """Exponential moving average of the trained weights, with decay min((1 + n) / (10 + n), decay) at its n-th step.

    Source: the averaging of Flow-GRPO's code (arXiv 2505.05470), there with decay 0.9 every 8 updates.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: EMAConfig):
        self.parameters, self.config = parameters, config
        self.weights: dict[str, Tensor] = {}
        self.updates = 0
        if config.decay > 0:
            self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Call once an optimiser step, never once a micro-batch."""
        self.updates += 1
        if not self.weights or self.updates % self.config.every:
            return
        n = self.updates // self.config.every
        decay = min((1 + n) / (10 + n), self.config.decay)
        follow(self.weights, self.parameters, decay)


@contextlib.contextmanager
def other_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run with other values of the parameters, by name."""
    kept = {name: p.data for name, p in parameters.items()}
    try:
        for name, p in parameters.items():
            p.data = weights[name]
        yield
    finally:
        for name, p in parameters.items():
            p.data = kept[name]
