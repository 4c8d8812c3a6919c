"""Stochastic samplers for any diffusers pipeline: transition kernels, schedulers, rollout and replay."""

from .rollout import Recorded, Rollout, Trajectory, replay, rollout, seed_for
from .schedulers import DDIMSDEScheduler, FlowSDEScheduler, Moment, SDEScheduler, sde_scheduler
from .transitions import KERNELS, Transition, transition

__all__ = [
    "KERNELS",
    "DDIMSDEScheduler",
    "FlowSDEScheduler",
    "Moment",
    "Recorded",
    "Rollout",
    "SDEScheduler",
    "Trajectory",
    "Transition",
    "replay",
    "rollout",
    "sde_scheduler",
    "seed_for",
    "transition",
]
