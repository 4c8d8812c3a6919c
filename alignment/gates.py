"""A gate over LoRA experts: how much each layer takes of each expert, by the timestep of the pass.

    W = W0 + sum_i w_i B_i A_i,    w = softmax over experts of an MLP on (embedding of the timestep, of the layer)

The gate sees the timestep as the denoiser does, sample by sample, and is a part of the denoiser.

    B samples, L adapted layers, K experts
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from .errors import UserError

NAME = "expert_gate"  # of the gate in its denoiser


class Gate(nn.Module):
    """An MLP whose weights are the same for all experts at the start.

    Attributes:
        weights: (B, L, K) of the pass in progress.
    """

    def __init__(self, num_layers: int, num_experts: int, width: int):
        super().__init__()
        self.layers = nn.Parameter(torch.randn(num_layers, width))
        self.hidden = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, num_experts)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.weights: Tensor | None = None

    def forward(self, timesteps: Tensor) -> Tensor:
        """(B, L, K) weights, whose sum over experts is 1, at timesteps (B,) as the denoiser sees them."""
        layers, size = self.layers, (len(timesteps), *self.layers.shape)
        with torch.autocast(layers.device.type, enabled=False):
            time = get_timestep_embedding(timesteps.to(layers.device), size[-1], True, 0).to(layers.dtype)
            features = torch.cat([time[:, None].expand(size), layers.expand(size)], -1)
            return self.out(F.silu(self.hidden(features))).softmax(-1)


def add_gate(denoiser: nn.Module, experts: Sequence[str], width: int) -> Gate:
    """Let a new gate weigh the LoRA adapters of these names; it becomes a part of the denoiser.

    Raises: UserError (see `watch_timesteps`).
    """
    layers = adapted_layers(denoiser, experts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # every process starts from the same gate, whatever ran in it before
        gate = Gate(len(layers), len(experts), width)
    denoiser.add_module(NAME, gate.to(next(denoiser.parameters()).device))

    def look(timesteps: Tensor) -> None:
        gate.weights = gate(timesteps)

    watch_timesteps(denoiser, look)
    for row, layer in enumerate(layers.values()):
        for column, expert in enumerate(experts):
            if expert in layer.lora_A:
                layer.lora_A[expert].register_forward_hook(partial(_weigh, gate, row, column))
    return gate


def adapted_layers(denoiser: nn.Module, experts: Sequence[str]) -> dict[str, LoraLayer]:
    """The layers that any of the experts adapts, by name."""
    found = {name: m for name, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
    return {name: layer for name, layer in found.items() if any(expert in layer.lora_A for expert in experts)}


def watch_timesteps(denoiser: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Before every pass of the denoiser, let `see` have its timesteps: (B,), or (1,) for all samples.

    Raises: UserError where the denoiser sees no timestep.
    """
    arguments = list(inspect.signature(denoiser.forward).parameters)
    if "timestep" not in arguments:
        raise UserError(f"algorithm.experts: {type(denoiser).__name__} takes no timestep that a gate could see")

    def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        see(seen_timesteps(arguments, args, kwargs))

    return denoiser.register_forward_pre_hook(look, with_kwargs=True)


def seen_timesteps(arguments: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Those of a denoiser's call; where tokens have their own, the noisiest one of a sample counts."""
    given = kwargs["timestep"] if "timestep" in kwargs else args[arguments.index("timestep")]
    timesteps = torch.as_tensor(given).detach()
    return timesteps.reshape(len(timesteps) if timesteps.dim() else 1, -1).amax(1)


def _weigh(gate: Gate, row: int, column: int, module: nn.Module, args: tuple, inner: Tensor) -> Tensor:
    """B_i (w A_i x) is w B_i A_i x, for r numbers a token in place of a whole layer's."""
    weights = gate.weights[:, row, column].to(inner.device)
    if len(inner) % len(weights):
        raise ValueError(f"a gate saw {len(weights)} timesteps for {len(inner)} rows of an adapted layer")
    weights = weights.repeat_interleave(len(inner) // len(weights))  # a layer that sees each frame by itself
    return (inner * weights.view(-1, *[1] * (inner.dim() - 1))).to(inner.dtype)
