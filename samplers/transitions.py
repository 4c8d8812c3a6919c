"""Transition kernels: how a sampler moves from one noise level to the next.

Every kernel has one form, x' = c0 * x0_hat + ce * eps_hat + std * noise, so mean, log-probability, log-ratio, KL and
gradient follow from (c0, ce, std) alone. On the flow path x = (1 - sigma) x0 + sigma eps with velocity v = eps - x0:
x0_hat = x - sigma v and eps_hat = x + (1 - sigma) v. On a variance-preserving path (DDIM) x = a x0 + b eps with
a^2 + b^2 = 1.

Which kernels keep the marginals of the flow: ode, dance, flow, wan_linear, sage and ddim, up to a discretisation error
that vanishes with the number of steps (sage integrates g^2 over the step; flow's error on its first step does not
vanish). cps keeps the coefficients of x0_hat and of the total noise but contracts the marginals: use it in a window.

    B batch, D elements of one sample; scalars are Python floats (float64), tensors are computed in float32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SAGE_CLAMP = 3e-3  # 1 - sigma is kept at least this large inside sage's logarithm, as in its reference code


class Transition(NamedTuple):
    """x' = c0 * x0_hat + ce * eps_hat + std * noise."""

    c0: float
    ce: float
    std: float


class Grid(NamedTuple):
    """Constants of the whole rollout grid. A replay runs a slice of the grid but has to use the same constants."""

    second: float  # sigma_1, the level after the first step
    last: float  # sigma_T, usually 0


def _ode(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    return Transition(1 - sigma_next, sigma_next, 0.0)


def _euler(sigma: float, sigma_next: float, variance: float) -> Transition:
    """Euler-Maruyama step of dx = (v + g^2/(2 sigma) eps_hat) dsigma + g dw; variance = g^2 (sigma - sigma')."""
    return Transition(1 - sigma_next, sigma_next - variance / (2 * sigma), math.sqrt(variance))


def _dance(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """DanceGRPO (arXiv 2505.07818): constant g = noise_level."""
    return _euler(sigma, sigma_next, noise_level**2 * (sigma - sigma_next))


def _flow(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """Flow-GRPO (arXiv 2505.05470): g = noise_level sqrt(sigma / (1 - sigma)), its pole held at sigma_1.

    The bound is min(sigma, sigma_1), not a test for sigma == 1: grids that start at 0.9997 or 1 - 1e-6 would otherwise
    take a first step of standard deviation 5 or 92.
    """
    g2 = noise_level**2 * sigma / (1 - min(sigma, grid.second))
    return _euler(sigma, sigma_next, g2 * (sigma - sigma_next))


def _wan_linear(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """Flow-GRPO's port to Wan: g falls linearly from sigma_1 to sigma_T; noise_level scales it (published: 1)."""
    g = noise_level * (grid.last + (grid.second - grid.last) * sigma)
    return _euler(sigma, sigma_next, g**2 * (sigma - sigma_next))


def _sage(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """SAGE-GRPO (arXiv 2603.21872): flow's g^2 integrated over the step, S = eta^2 [log((1-s')/(1-s)) - (s - s')]."""
    held = min(sigma, 1 - SAGE_CLAMP)
    variance = noise_level**2 * (math.log((1 - sigma_next) / (1 - held)) - (sigma - sigma_next))
    if variance < 0 or (variance == 0 and noise_level > 0):
        raise ValueError(
            f"kernel sage has no positive variance from sigma {sigma:.5f} to {sigma_next:.5f}: "
            f"the step lies within {SAGE_CLAMP} of sigma 1; use fewer steps, a smaller shift or a later window"
        )
    return _euler(sigma, sigma_next, variance)


def _cps(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """Coefficient-preserving sampling (arXiv 2509.05952): std = sigma' sin(eta pi / 2). Contracts the marginals."""
    angle = noise_level * math.pi / 2
    return Transition(1 - sigma_next, sigma_next * math.cos(angle), sigma_next * math.sin(angle))


def _ddim(sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """DDIM's eta (arXiv 2010.02502, eq. 16) on the flow path, as in DiffusionNFT's solver (arXiv 2509.16117)."""
    kept = sigma_next * (1 - sigma) / (sigma * (1 - sigma_next))
    std = noise_level * sigma_next * math.sqrt(1 - kept**2)
    return Transition(1 - sigma_next, math.sqrt(sigma_next**2 - std**2), std)


KERNELS: dict[str, Callable[[float, float, float, Grid], Transition]] = {
    "ode": _ode,
    "dance": _dance,
    "flow": _flow,
    "wan_linear": _wan_linear,
    "sage": _sage,
    "cps": _cps,
    "ddim": _ddim,
}


def transition(kernel: str, sigma: float, sigma_next: float, noise_level: float, grid: Grid) -> Transition:
    """The coefficients of one step on the flow path.

    Args:
        kernel: one of KERNELS.
        sigma, sigma_next: 1 >= sigma > sigma_next >= 0.
        noise_level: >= 0; g for dance, a for flow, scale for wan_linear, eta in [0, 1] for cps and ddim. 0 is the ODE.
        grid: constants of the full grid (flow and wan_linear read them).
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(f"a step needs 1 >= sigma > sigma_next >= 0, got {sigma} and {sigma_next}")
    if noise_level < 0 or (kernel in ("cps", "ddim") and noise_level > 1):
        raise ValueError(f"kernel {kernel}: noise_level {noise_level} is out of range")
    return KERNELS[kernel](sigma, sigma_next, noise_level, grid)


def vp_transition(a: float, a_next: float, eta: float) -> Transition:
    """DDIM on a variance-preserving path (arXiv 2010.02502, eqs. 12, 16); a = sqrt(alpha_bar), a < a_next <= 1."""
    b, b_next = math.sqrt(1 - a**2), math.sqrt(1 - a_next**2)
    std = eta * b_next / b * math.sqrt(1 - (a / a_next) ** 2)
    return Transition(a_next, math.sqrt(b_next**2 - std**2), std)


class Prediction(NamedTuple):
    """How a network's output o gives x0_hat = x0_x x + x0_o o and eps_hat = eps_x x + eps_o o."""

    x0_x: float
    x0_o: float
    eps_x: float
    eps_o: float


def flow_prediction(sigma: float) -> Prediction:
    """Velocity v = eps - x0 on the flow path."""
    return Prediction(1.0, -sigma, 1.0, 1 - sigma)


def vp_prediction(kind: str, a: float) -> Prediction:
    """The three outputs of variance-preserving models; a = sqrt(alpha_bar)."""
    b = math.sqrt(1 - a**2)
    if kind == "v_prediction":
        return Prediction(a, -b, b, a)
    if kind == "epsilon" and a > 0:
        return Prediction(1 / a, -b / a, 0.0, 1.0)
    if kind == "sample" and b > 0:
        return Prediction(0.0, 1.0, 1 / b, -a / b)
    raise ValueError(f"prediction_type {kind!r} has no clean estimate at sqrt(alpha_bar) = {a}")


class Step(NamedTuple):
    """One step in terms of what a scheduler sees: mean = x_weight * x + output_weight * output."""

    x_weight: float
    output_weight: float | tuple[float, ...]  # B of them where each sample has a noise level of its own (`to_clean`)
    std: float

    @property
    def gradient_coefficient(self) -> float:
        """c, with d(sum log-prob)/d(output) = -c * noise (for a flow c = (c0 sigma - ce (1 - sigma)) / std)."""
        return -self.output_weight / self.std

    @property
    def gradient_balance(self) -> float:
        """1 / |c std|: times this, the gradient of `normalised_log_ratio` is equally large at every step.

        For the Euler family c std = dt (1 + g^2 (1 - sigma) / (2 sigma)) with dt = sigma - sigma'; GRPO-Guard
        (arXiv 2510.22319) divides its loss by dt alone, which other kernels are not proportional to.
        """
        return 1 / abs(self.output_weight)


def compose(t: Transition, p: Prediction) -> Step:
    """The transition written in the network's own output."""
    return Step(t.c0 * p.x0_x + t.ce * p.eps_x, t.c0 * p.x0_o + t.ce * p.eps_o, t.std)


def to_clean(level: float | Sequence[float]) -> Step:
    """The step from a noise level, one for all samples or B of their own, to the clean estimate x - level velocity."""
    return Step(1.0, -level if isinstance(level, float | int) else tuple(-own for own in level), 0.0)


def by_sample(values: float | Sequence[float], x: Tensor) -> float | Tensor:
    """What multiplies a batch x (B, ...): one value for all as it is, B of their own as a tensor (B, 1, ...)."""
    if isinstance(values, float | int):
        return values
    if len(values) != len(x):
        raise ValueError(f"{len(values)} noise levels for a batch of {len(x)}")
    return torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.dim() - 1))


def mean(step: Step, x: Tensor, output: Tensor) -> Tensor:
    """(B, ...) mean of x' given x and the network's output, in float32 (float64 stays)."""
    output = _wide(output)
    return step.x_weight * _wide(x) + by_sample(step.output_weight, output) * output


def log_prob(x_next: Tensor, mean: Tensor, std: float) -> Tensor:
    """(B,) Gaussian log-density of x_next, averaged over the D elements; x_next (B, ...) is an action: detached.

    Raises: ValueError where std is 0: a deterministic step has no density.
    """
    if std == 0:
        raise ValueError("a deterministic step (std 0) has no log-probability; train stochastic steps only")
    z = (_wide(x_next).detach() - mean) / std
    return (-0.5 * z.square()).flatten(1).mean(1) - math.log(std) - 0.5 * math.log(2 * math.pi)


def log_ratio(x_next: Tensor, mean: Tensor, old_mean: Tensor, std: float) -> Tensor:
    """(B,) float64 log p(x_next | mean) - log p(x_next | old_mean), averaged over the D elements.

    Taken from the difference of the means, not of two log-probabilities: at D = 2e6 that difference is about 1e-6,
    below what two float32 log-probabilities can hold. Exactly 0 where mean repeats old_mean.
    """
    if std == 0:
        raise ValueError("a deterministic step (std 0) has no log-ratio; train stochastic steps only")
    noise = (_wide(x_next) - _wide(old_mean)).detach() / std
    shift = (mean - _wide(old_mean).detach()) / std
    return (noise * shift - 0.5 * shift.square()).double().flatten(1).mean(1)


def normalised_log_ratio(x_next: Tensor, mean: Tensor, old_mean: Tensor, std: float) -> Tensor:
    """(B,) float64 GRPO-Guard's log-ratio, std (log_ratio + mean((mean - old_mean)^2) / (2 std^2)).

    A log-ratio of means over many elements is below 0 for almost every sample after an update, so that clips work on
    one side only; this one has mean 0 over the noise. It equals the mean of noise * (mean - old_mean), noise being
    (x_next - old_mean) / std. The added term keeps its gradient, as in the paper's code: the gradient is the noise,
    however far the policy has moved.

    Source: arXiv 2510.22319. Its clips (2e-6 to 4e-6 at D = 65536) scale as 1 / sqrt(D).
    """
    if std == 0:
        raise ValueError("a deterministic step (std 0) has no log-ratio; train stochastic steps only")
    noise = (_wide(x_next) - _wide(old_mean)).detach() / std
    return (noise * (mean - _wide(old_mean).detach())).double().flatten(1).mean(1)


def kl_divergence(mean: Tensor, reference_mean: Tensor, std: float) -> Tensor:
    """(B,) KL between two steps of equal std, averaged over the D elements: (mean - reference)^2 / (2 std^2)."""
    shift = (mean - _wide(reference_mean).detach()) / std
    return 0.5 * shift.square().flatten(1).mean(1)


def sibling_noise(shared: Tensor, own: Tensor, spread: float) -> Tensor:
    """(N K, ...) noise of the K children of N states: (shared + spread * own) / sqrt(1 + spread^2).

    Standard normal for every child, so that a branch follows the law of a rollout of its own; the noises of siblings
    have covariance 1 / (1 + spread^2). Row n K + b is child b of state n. An only child takes `own` itself.

    Args:
        shared: (N, ...) standard normal, one a state.
        own: (N K, ...) standard normal, one a child.
        spread: >= 0; 0 makes siblings alike, infinity independent.
    Source: BranchGRPO (arXiv 2509.06040), which found 4 the best of 1, 2, 4, 8.
    """
    by_parent = own.unflatten(0, (len(shared), -1))
    if by_parent.shape[1] == 1:
        return own
    weight = 1 / math.hypot(1, spread)
    return (weight * shared.unsqueeze(1) + math.sqrt(1 - weight**2) * by_parent).flatten(0, 1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
