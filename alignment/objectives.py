"""Losses, as pure functions on tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .preference_losses import matching_error


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """(B,) PPO's clipped loss, max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log_ratio).

    Args:
        log_ratio: (B,) log-probability ratio, averaged over the elements of a sample: useful clips are then small
            (1e-4 to 1e-3) and have to exceed the drift between rollout and replay.
        advantage: (B,).
        clip: > 0. Without effect where the ratio is 1, that is, with one update a rollout.
    Source: arXiv 1707.06347, eq. 7; arXiv 2505.07818, eq. 7.
    """
    ratio = log_ratio.exp()
    advantage = advantage.to(ratio.dtype)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def is_clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """(B,) bool: samples whose gradient the clip removes."""
    ratio = log_ratio.detach().exp()
    return ((ratio > 1 + clip) & (advantage > 0)) | ((ratio < 1 - clip) & (advantage < 0))


def divergence_masked_surrogate(log_ratio: Tensor, divergence: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """(B,) FlowDPPO's loss, -A r, and 0 for the samples that `leaves_trust_region` names.

    Args:
        log_ratio: (B,) of the mean over elements; r = exp(log_ratio).
        divergence: (B,) KL of the step from the policy that sampled it (samplers.transitions.kl_divergence).
        advantage: (B,).
        limit: > 0; published 1e-5.
    Source: arXiv 2606.11025. A bound on the divergence replaces the clip, whose ratios are noise around a bias.
    """
    dropped = leaves_trust_region(log_ratio, divergence, advantage, limit)
    ratio = log_ratio.exp()
    return torch.where(dropped, 0.0, -advantage.to(ratio.dtype) * ratio)


def leaves_trust_region(log_ratio: Tensor, divergence: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """(B,) bool: samples at or beyond the limit whose gradient would lead further away."""
    outward = log_ratio.detach().sign() * advantage.sign() > 0
    return (divergence.detach() >= limit) & outward


def optimality(advantages: Tensor, adv_clip: float = 5.0) -> Tensor:
    """(B,) DiffusionNFT's r in [0, 1], the probability that a sample is good: 1/2 + clip(A, +-adv_clip) / (2 adv_clip).

    Source: arXiv 2509.16117; advantages there are divided by the global standard deviation.
    """
    return 0.5 + 0.5 * (advantages / adv_clip).clamp(-1, 1)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    x: Tensor,
    x0: Tensor,
    sigma: float | Tensor,
    r: Tensor,
    beta: float,
    adv_clip: float = 5.0,
) -> Tensor:
    """(B,) float64 DiffusionNFT's loss: adv_clip (r e(v_old + d) + (1 - r) e(v_old - d)) / beta, d = beta (v - v_old).

    e is the `adaptive_error` of the implied clean sample. At v = v_old the gradient does not depend on beta; it leads
    towards x0 where r > 1/2 and away from it where r < 1/2.

    Args:
        velocity: (B, ...) of the trained policy at x.
        old_velocity: (B, ...) of the policy that sampled x0, without gradient.
        x: (B, ...) (1 - sigma) x0 + sigma noise.
        x0: (B, ...) clean sample.
        sigma: noise level, or (B,) levels, in (0, 1].
        r: (B,) from `optimality`.
        beta: > 0; how far the implicit policies lie from the old one. Published: 1, and 0.1 for several rewards.
        adv_clip: the one that r was computed with.
    Source: arXiv 2509.16117, theorem 3.2, with the adaptive weights of its implementation.
    """
    old = old_velocity.detach().double()
    change = beta * (velocity.double() - old)
    good, bad = (adaptive_error(v, x, x0, sigma) for v in (old + change, old - change))
    return adv_clip * (r * good + (1 - r) * bad) / beta


def nft_decay(kind: int, updates: int) -> float:
    """DiffusionNFT's decay of the old policy after so many optimiser steps: old = decay old + (1 - decay) trained.

    Args:
        kind: 1 follows fast at first, min(0.001 i, 0.5); 2 copies for 75 updates, then min(0.0075 (i - 75), 0.999).
    """
    start, slope, limit = {1: (0, 0.001, 0.5), 2: (75, 0.0075, 0.999)}[kind]
    return ramped_decay(updates, slope, limit, start)


def ramped_decay(updates: int, slope: float, limit: float, start: int = 0) -> float:
    """Decay of a moving average that is 0 up to `start` updates and grows from there to `limit`."""
    return min(slope * max(updates - start, 0), limit)


def matching_log_prob(velocity: Tensor, noise: Tensor, x0: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """(B,) float64 likelihood surrogate of a clean sample: -w mean((v - (noise - x0))^2) over its elements.

    Ratios need it under both policies at the same noise and level.

    Args:
        velocity: (B, ...) at (1 - sigma) x0 + sigma noise.
        noise, x0: (B, ...).
        weight: w(sigma), one or (B,).
    Source: AWM (arXiv 2509.25050), which prefers w = 1. Its code knows sigma and sigma^2, too; its recipes use
        4 sigma m^(1/4), m the mean square, which the paper does not mention.
    """
    return -weight * matching_error(velocity, noise, x0)


def adaptive_log_prob(velocity: Tensor, x: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """(B,) float64 V-GRPO's likelihood surrogate, -`adaptive_error`.

    Whatever the noise level and the error, its gradient with respect to the clean estimate has the same 1-norm.

    Source: arXiv 2604.23380. A group shares its noises and levels there, the levels drawn one from each of four strata.
    """
    return -adaptive_error(velocity, x, x0, sigma)


def adaptive_error(velocity: Tensor, x: Tensor, x0: Tensor, sigma: float | Tensor) -> Tensor:
    """(B,) float64 mean square of x0_hat - x0 over its mean absolute value, which counts as a constant >= 1e-5.

    Args:
        velocity, x, x0: (B, ...), x0_hat = x - sigma velocity.
        sigma: noise level, or (B,) levels.
    """
    level = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).view(-1, *[1] * (x.ndim - 1))
    error = (x.double() - level * velocity.double() - x0.double()).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


def velocity_divergence(velocity: Tensor, other: Tensor) -> Tensor:
    """(B,) float64 mean((v - v_other)^2) over elements, the distance of two policies at one noised sample.

    DiffusionNFT's penalty against the reference (weight 1e-4), and AWM's against the reference (0.4, for PickScore
    0.01; in its recipes 0.003 and 0.0001) and, in its recipes alone, against a moving average of the policy itself
    (weight 1, decay min(0.001 updates, 0.3)). Sigma^2 times this is V-GRPO's between clean estimates, against the
    policy that sampled.

    Args:
        velocity: (B, ...).
        other: (B, ...), without gradient.
    """
    return (velocity.double() - other.detach().double()).square().flatten(1).mean(1)


def soft_clip(advantages: Tensor, eta: float) -> Tensor:
    """eta tanh(A / eta): bounds advantages without a kink (V-GRPO, arXiv 2604.23380; published eta: 3)."""
    return eta * torch.tanh(advantages / eta)


def bradley_terry_with_ties(difference: Tensor, label: Tensor, theta: float = 5.0) -> Tensor:
    """-log P(label), of the same shape as `difference`, under the Bradley-Terry model with ties.

    P(first wins) = sigmoid(d - log theta), P(second wins) = sigmoid(-d - log theta), and the rest is a tie,
    (theta^2 - 1) times the product of the two.

    Args:
        difference: d, the score of the first minus that of the second.
        label: 1 where the first is better, -1 where the second is, 0 for a tie.
        theta: > 1; how much room ties have.
    Source: VideoAlign (arXiv 2501.13918), eq. 2 and 3, after Rao and Kupper (1967).
    """
    first, second = F.logsigmoid(difference - math.log(theta)), F.logsigmoid(-difference - math.log(theta))
    tie = first + second + math.log(theta**2 - 1)
    return -torch.where(label > 0, first, torch.where(label < 0, second, tie))
