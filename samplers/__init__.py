"""Stochastic samplers for any diffusers pipeline: transition kernels, schedulers, rollout and replay, trees, states."""

from .encoding import Encoder, decode
from .rollout import Recorded, Rollout, Segment, Trajectory, replay, rollout, seed_for
from .schedulers import DDIMSDEScheduler, FlowSDEScheduler, Moment, SDEScheduler, sde_scheduler
from .transitions import KERNELS, Transition, transition
from .tree import Forest, grow

__all__ = [
    "KERNELS",
    "DDIMSDEScheduler",
    "Encoder",
    "FlowSDEScheduler",
    "Forest",
    "Moment",
    "Recorded",
    "Rollout",
    "SDEScheduler",
    "Segment",
    "Trajectory",
    "Transition",
    "decode",
    "grow",
    "replay",
    "rollout",
    "sde_scheduler",
    "seed_for",
    "transition",
]
