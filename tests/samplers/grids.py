"""Noise levels written out by hand, to test against: not taken from the code under test."""

import numpy as np

from samplers.transitions import Grid


def shifted(u, shift: float):
    return shift * u / (1 + (shift - 1) * u)


def uniform(steps: int, shift: float) -> list[float]:
    """linspace(1, 0, T + 1), shifted once."""
    return shifted(np.linspace(1, 0, steps + 1), shift).tolist()


def old_unipc(steps: int, shift: float) -> list[float]:
    """UniPC's flow levels in diffusers up to 0.35: they start at 0.99967 for shift 3."""
    return [*np.flip(shifted(1 - np.linspace(1, 1 / 1000, steps + 1), shift))[:-1].tolist(), 0.0]


def new_unipc(steps: int, shift: float) -> list[float]:
    """UniPC's flow levels in diffusers since then: they start at 1 - 1e-6."""
    levels = shifted(np.linspace(1, 1 / 1000, steps + 1)[:-1], shift).tolist()
    return [levels[0] - 1e-6, *levels[1:], 0.0]


def euler(steps: int, shift: float) -> list[float]:
    """FlowMatchEuler's own levels: its last one is shifted twice."""
    return [*shifted(np.linspace(1, shifted(1 / 1000, shift), steps), shift).tolist(), 0.0]


GRIDS = {"uniform": uniform, "old_unipc": old_unipc, "new_unipc": new_unipc, "euler": euler}


def constants(levels: list[float]) -> Grid:
    return Grid(levels[1], levels[-1])
