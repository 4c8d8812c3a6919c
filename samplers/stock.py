"""Which of diffusers' own schedulers a pipeline's scheduler configuration belongs to."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers


def is_flow(config: Any) -> bool:
    """Whether a scheduler configuration belongs to a flow-matching pipeline (as opposed to variance-preserving)."""
    return bool(config.get("use_flow_sigmas", False)) or "beta_start" not in config


def stock_scheduler(config: Any, **overrides: Any) -> Any:
    """The diffusers flow scheduler that a configuration belongs to.

    A scheduler built in Python does not name its class in its configuration; there the keys tell.
    """
    if not is_flow(config):
        raise ValueError("this scheduler configuration is not a flow's; use DDIMSDEScheduler")
    name = config.get("_class_name", None)
    if name is None:
        if "predict_x0" in config:
            name = "UniPCMultistepScheduler"
        elif "algorithm_type" in config:
            name = "DPMSolverMultistepScheduler"
        else:
            name = "FlowMatchEulerDiscreteScheduler"
    return build(getattr(diffusers, name), config, overrides)


def build(scheduler: type, config: Any, overrides: dict[str, Any]) -> Any:
    """from_config drops keys that the class does not know; an override among them is a mistake: ValueError."""
    if unknown := set(overrides) - set(inspect.signature(scheduler.__init__).parameters):
        raise ValueError(f"{scheduler.__name__} has no parameter {', '.join(sorted(unknown))}")
    return scheduler.from_config(config, **overrides)
