"""Pairs of latents and a network of one matrix in float64, whose policy is away from the reference.

At the reference every loss is log 2, which hides most faults. Here margins are about 1, and differ between pairs.
"""

import torch

from alignment.preference_losses import frame_errors, margin, matching_error

P, C, F = 5, 3, 4


def draws(*shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


WINNERS, LOSERS, NOISE = draws(P, C, F, 2, 3, count=3)
LEVEL = torch.tensor([0.1, 0.35, 0.5, 0.8, 0.95], dtype=torch.float64)
REFERENCE, CHANGE = draws(C, C, count=2)
POLICY = REFERENCE + 0.3 * CHANGE
BETA = 16.0
FRAMES = torch.arange(F).view(F, 1, 1)
LABELS = torch.tensor([[1, 1, -1, 0], [0, 0, 0, 0], [-1, -1, -1, -1], [0, 1, 0, 0], [1, 0, -1, 1]])


def velocity(theta, clean):
    level = LEVEL.to(clean).view(P, 1, 1, 1, 1)
    return torch.einsum("oc,pcfhw->pofhw", theta, (1 - level) * clean + level * NOISE.to(clean))


def error(theta, clean):
    return matching_error(velocity(theta, clean), NOISE, clean)


def own_error(theta, clean):
    """As the definition says, in terms of the residual's elements."""
    return ((velocity(theta, clean) + clean - NOISE) ** 2).mean((1, 2, 3, 4))


def by_frame(theta, clean):
    return frame_errors(velocity(theta, clean), NOISE, clean, FRAMES)


def margins(theta, errors=error, beta=BETA, winners=WINNERS, losers=LOSERS):
    ours, reference = ([errors(at, x) for x in (winners, losers)] for at in (theta, REFERENCE))
    return margin(*ours, *reference, beta)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def gradient(loss, theta):
    """Of a function of the matrix, by autograd."""
    theta = leaf(theta)
    return torch.autograd.grad(loss(theta), theta)[0]


def slope(loss, theta, step=1e-5):
    """The same by central differences, element by element."""
    found = torch.zeros_like(theta)
    for i in range(theta.numel()):
        move = torch.zeros(theta.numel(), dtype=theta.dtype)
        move[i] = step
        move = move.view_as(theta)
        found.view(-1)[i] = (loss(theta + move) - loss(theta - move)) / (2 * step)
    return found
