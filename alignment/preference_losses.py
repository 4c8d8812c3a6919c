"""Losses on preferences, as pure functions on tensors.

A clean sample, noised to a level t, is the likelier under a policy the smaller its `matching_error` e there. What
counts is the change against the reference, Delta = e_policy - e_reference, at the same noise and level, and for a pair
the difference of the two members' changes:

    z = -(beta / 2) (Delta_winner - Delta_loser)        `margin`; > 0: prefers the winner more than the reference does
    -log sigmoid(z)                                     `dpo_loss`; log 2 at the reference

Everything else is another function of z, one z a latent frame, or a weight or beta a pair. Results are per pair: the
caller applies weights, then takes means. Errors are means over elements; sums of N elements need beta / N. A beta that
was published for -log sigmoid(-beta (...)), without the half, has to be doubled.

B samples, P pairs, F latent frames, N rewards
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantages import group_statistics

SCHEDULES = ("constant", "flow")
LAWS = ("uniform", "logit_normal")


def draw_levels(law: str, seeds: Sequence[int], shift: float = 1.0) -> list[float]:
    """A noise level in (0, 1] from each seed, which depends on nothing else.

    Args:
        law: "uniform"; or "logit_normal", logit(t) standard normal.
        seeds: P; others than those of the noise, which would depend on the level.
        shift: > 0; s of the time shift s t / (1 + (s - 1) t), which above 1 leads to higher levels.
    Raises: ValueError for another law.
    Source: uniform in Flow-DPO (arXiv 2501.13918), logit-normal in DenseDPO (arXiv 2506.03517).
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if law == "uniform":
        times = [1 - torch.rand((), generator=g, dtype=torch.float64).item() for g in generators]
    elif law == "logit_normal":
        times = [torch.randn((), generator=g, dtype=torch.float64).sigmoid().item() for g in generators]
    else:
        raise ValueError(f"law is {law!r}, expected one of {', '.join(LAWS)}")
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def matching_error(velocity: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
    """(B,) float64 mean((v - (noise - clean))^2) over the elements of a sample, whatever its dimensions.

    Args:
        velocity: (B, ...) at (1 - t) clean + t noise.
        noise, clean: (B, ...).
    """
    return _squares(velocity, noise, clean).mean(1)


def frame_errors(velocity: Tensor, noise: Tensor, clean: Tensor, frame_of: Tensor) -> Tensor:
    """(B, F) float64 `matching_error` of each latent frame.

    Args:
        velocity, noise, clean: (B, ...).
        frame_of: int64 of the shape of one sample, or that expands to it; the frame in 0..F-1 of each element.
    """
    squares = _squares(velocity, noise, clean)
    frames = frame_of.to(squares.device).expand(velocity.shape[1:]).flatten()
    sizes = frames.bincount()
    return squares.new_zeros(len(squares), len(sizes)).index_add(1, frames, squares) / sizes


def _squares(velocity: Tensor, noise: Tensor, clean: Tensor) -> Tensor:
    """(B, elements) float64: changes of 1e-4 in errors of 1 have to survive a difference of four of them."""
    return (velocity.double() - (noise.double() - clean.double())).square().flatten(1)


def beta_at(beta: float, level: Sequence[float] | Tensor, schedule: str) -> Tensor:
    """(P,) float64 beta at each level t: "constant", or "flow", beta (1 - t)^2.

    The second is what the derivation gives, DPO on errors of the predicted noise: they are (1 - t)^2 times those of the
    velocity. Its authors found the first better for every beta.

    Raises: ValueError for another schedule.
    Source: Flow-DPO (arXiv 2501.13918).
    """
    level = torch.as_tensor(level, dtype=torch.float64)
    if schedule == "constant":
        return beta * torch.ones_like(level)
    if schedule == "flow":
        return beta * (1 - level).square()
    raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")


def margin(error_w: Tensor, error_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float | Tensor) -> Tensor:
    """z = -(beta / 2) (Delta_w - Delta_l), float64, of the shape of the errors.

    Args:
        error_w, error_l: (P,) or (P, F) errors of the policy on winners and losers, or on first and second members.
        ref_w, ref_l: those of the reference at the same noises and levels; they get no gradient.
        beta: >= 0, one or (P,).
    Source: Flow-DPO (arXiv 2501.13918) with a constant beta; after Diffusion-DPO (arXiv 2311.12908).
    """
    change_w = error_w.double() - ref_w.detach().double()
    change_l = error_l.double() - ref_l.detach().double()
    return -0.5 * _per_pair(beta, change_w) * (change_w - change_l)


def margins(errors: Tensor, reference: Tensor, beta: float | Tensor) -> Tensor:
    """`margin` of (P, 2) errors, or by latent frame (P, 2, F): the first members against the second ones."""
    return margin(errors[:, 0], errors[:, 1], reference[:, 0], reference[:, 1], beta)


def _per_pair(value: float | Tensor, like: Tensor) -> Tensor:
    """One value, or P of them, such that it multiplies (P, ...)."""
    return torch.as_tensor(value, dtype=torch.float64, device=like.device).view(-1, *[1] * (like.ndim - 1))


def implicit_accuracy(z: Tensor) -> Tensor:
    """1 where the policy prefers the winner more than the reference does, 0 where less, 1/2 where nothing changed."""
    return 0.5 + 0.5 * z.detach().sign()


def dpo_loss(z: Tensor) -> Tensor:
    """-log sigmoid(z), of the shape of z (DPO, arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(z)


def poly_loss(z: Tensor, alpha: float) -> Tensor:
    """-log p + alpha (1 - p) with p = sigmoid(z), of the shape of z (ViPO's Poly-DPO).

    Args:
        alpha: > 0 attends more to pairs that are undecided (8 for noisy labels), < 0 less (too easy ones); 0 is DPO.
    """
    return dpo_loss(z) + alpha * torch.sigmoid(-z)


def ipo_loss(z: Tensor, beta: float | Tensor) -> Tensor:
    """(h - 1 / (2 beta))^2 with h = z / beta, of the shape of z: the margin is led to 1/2 instead of to infinity.

    Args:
        z: (P,) or (P, F) margins.
        beta: > 0, that of the margins, one or (P,).
    Source: IPO (arXiv 2310.12036), eq. 17.
    """
    return ((z - 0.5) / _per_pair(beta, z)).square()


def gap_weight(score_w: Tensor, score_l: Tensor, base: float = 2.0) -> Tensor:
    """(P,) float64 weights base^winner - base^loser of the pairs' losses, without gradient; with base 2 in [0, 1].

    Args:
        score_w, score_l: (P,) scores of the members, brought to [0, 1].
        base: > 1.
    Raises: ValueError unless 0 <= loser <= winner <= 1: a negative weight has no minimum.
    Source: GAPO (arXiv 2504.10044).
    """
    if not ((score_l >= 0) & (score_l <= score_w) & (score_w <= 1)).all():
        found = f"losers {score_l.tolist()}, winners {score_w.tolist()}"
        raise ValueError(f"scores have to be 0 <= loser <= winner <= 1, found {found}")
    return base ** score_w.detach().double() - base ** score_l.detach().double()


def gap_beta(gap: Tensor, progress: float) -> Tensor:
    """(P,) float64 factors of beta, (2 sigmoid(gap) - 1) times a cosine that falls from 1 to 1/2.

    Args:
        gap: (P,) winner's score minus loser's, >= 0, in standard deviations: raw gaps of 0.02 would switch beta off.
        progress: share of the training that is done, in [0, 1].
    Raises: ValueError for a gap below 0.
    Source: PNAPO (arXiv 2605.09433), whose betas (2000 to 5000) are without the half.
    """
    if not (gap >= 0).all():
        raise ValueError(f"gaps of scores have to be 0 or more, found {gap.tolist()}")
    return torch.tanh(gap.detach().double() / 2) * (0.75 + 0.25 * math.cos(math.pi * progress))


def seppo_loss(
    error_w: Tensor, error_r: Tensor, ref_w: Tensor, ref_r: Tensor, beta: float | Tensor, lowest: int = -1
) -> Tensor:
    """(P,) -log sigmoid(-(beta / 2) (Delta_w - s Delta_r)): winners against samples of the reference.

    Where the policy already fits the winner better than the reference (s = 1), the reference's sample is a loser. Where
    it fits it worse, the sample is pulled up along with the winner (s = -1) or left out (s = 0, with `lowest` 0).

    Args:
        error_w, error_r: (P,) errors of the policy on winners and on the reference's samples.
        ref_w, ref_r: those of the reference, an earlier checkpoint; without gradient.
        lowest: -1 or 0, the least s.
    Source: SePPO (arXiv 2410.05255). That an unchanged error has s = 0 is decided here.
    """
    s = anchor_sign(error_w, ref_w, lowest)
    return dpo_loss(margin(error_w, s * error_r, ref_w, s * ref_r, beta))


def anchor_sign(error_w: Tensor, ref_w: Tensor, lowest: int = -1) -> Tensor:
    """(P,) SePPO's s, sign(ref_w - error_w) but at least `lowest`; without gradient."""
    return (ref_w.double() - error_w.double()).detach().sign().clamp(min=lowest)


def token_losses(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) sums of -log sigmoid(label z) over the frames that are no ties, and (P,) their counts.

    The loss is the sum of the sums over that of the counts, over all processes and micro-batches of an update.

    Args:
        z: (P, F) margins of first against second members, frame by frame.
        labels: (P, F); 1 where the first is better, -1 where the second is, 0 for a tie.
    Source: DenseDPO (arXiv 2506.03517), as in the code of its appendix E.
    """
    untied = labels != 0
    return torch.where(untied, dpo_loss(labels * z), 0.0).sum(1), untied.sum(1)


def pair_losses(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) -log sigmoid(`pair_margin`), 0 where all frames are ties, and (P,) counts, 1 or 0.

    Takes and is divided as `token_losses`, which is never less for one pair: the mean is inside the convex function.

    Source: DenseDPO (arXiv 2506.03517), eq. 7.
    """
    decided = (labels != 0).any(1)
    return torch.where(decided, dpo_loss(pair_margin(z, labels)), 0.0), decided.long()


def pair_margin(z: Tensor, labels: Tensor) -> Tensor:
    """(P,) mean of label z over the frames that are no ties, 0 where all are; z and labels (P, F)."""
    return (labels * z).sum(1) / labels.abs().sum(1).clamp(min=1)


def usable(labels: Sequence[int], least: float = 0.2) -> bool:
    """Whether more than this share of a pair's segments has a preference (DenseDPO: 0.2); ties are 0."""
    return sum(label != 0 for label in labels) / len(labels) > least


def reward_weights(rewards: Tensor, groups: Tensor, temperature: float, max_weight: float) -> Tensor:
    """(N,) float64 weights exp(r / temperature) over their mean, then at most max_weight; without gradient.

    r is standardised within the samples of a prompt, so that no prompt dominates, and 0 in a group without spread. The
    mean comes before the bound: without it, the bound would depend on the scale of exp.

    Args:
        rewards: (N,) of all samples of an update.
        groups: (N,) int64.
        temperature: > 0; infinite is supervised training, near 0 trains on the best alone.
        max_weight: >= 1, inf for no bound.
    Raises: ValueError for a reward that is not finite.
    Source: Flow-RWR (arXiv 2501.13918).
    """
    if not torch.isfinite(rewards).all():
        raise ValueError(f"rewards have to be finite, found {rewards.tolist()}")
    rewards = rewards.detach().double()
    mean, std, spread = group_statistics(rewards, groups, torch.ones_like(groups, dtype=torch.bool))
    r = torch.where(spread, (rewards - mean) / std, 0.0)
    weights = ((r - r.max()) / temperature).exp()  # the largest is 1: no overflow
    return (weights / weights.mean()).clamp(max=max_weight)
