"""Schedulers that make any diffusers pipeline stochastic, recordable and replayable.

A sampler is the pipeline's own scheduler with another `step`: the noise levels come from the stock scheduler (so shift,
dynamic shift, inverted levels and whatever else its configuration says are kept), the step is a kernel of
`samplers.transitions`. Put one on a pipeline and it samples from the SDE:

    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, kernel="flow", noise_level=0.7)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import solvers, transitions
from .stock import build, is_flow, stock_scheduler
from .transitions import Grid, Step

GRIDS = ("stock", "uniform")


@dataclass
class Moment:
    """What one call of `step` sees."""

    index: int  # of the step in the whole grid
    timestep: Tensor
    step: Step
    x: Tensor  # (B, ...) the state, in the pipeline's dtype
    output: Tensor  # (B, ...) the network's output after guidance, with its graph
    generator: Any = None  # what the pipeline handed to step
    offset: Tensor | float = 0.0  # (B, ...) what a solver of higher order adds from the step before

    @cached_property
    def mean(self) -> Tensor:
        """(B, ...) float32 mean of the next state; carries the graph of `output`."""
        return transitions.mean(self.step, self.x, self.output) + self.offset


class SDEScheduler:
    """The pipeline's scheduler with a stochastic step. Use FlowSDEScheduler or DDIMSDEScheduler.

    Args:
        stock: the diffusers scheduler whose noise levels and configuration are kept.
        noise_level: strength of the noise; 0 is the deterministic sampler.
        stochastic: indices of the steps that add noise, the others are deterministic. None: all but the last.
    Attributes:
        steps: indices of the grid to run, None for all of them (a sub-range, or the trained steps of a replay).
        levels_visited: noise levels to run in place of the grid, each a step to the clean estimate; None: the grid. One
            that is a sequence has a level for each sample of the batch: the pipeline sees timesteps (B,) then.
        generators: one torch.Generator a sample for the steps' noise, so that a sample does not depend on its batch;
            None: the pipeline's generator if it passes one, else the global one.
        on_step: called with each Moment; returns the next state. None: `draw`.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, stock: Any, noise_level: float = 0.7, stochastic: Iterable[int] | None = None):
        if noise_level < 0:
            raise ValueError(f"noise_level is {noise_level}, expected >= 0")
        self.stock, self.noise_level = stock, noise_level
        self.stochastic: tuple[int, ...] | None = None if stochastic is None else tuple(stochastic)
        self.steps: Sequence[int] | None = None
        self.levels_visited: Sequence[float | Sequence[float]] | None = None
        self.generators: list[torch.Generator] | None = None
        self.on_step: Callable[[Moment], Tensor] | None = None
        self.begin_index = 0

    def __getattr__(self, name: str) -> Any:
        if name == "stock":
            raise AttributeError(name)
        return getattr(self.stock, name)

    @property
    def config(self) -> Any:
        """The stock scheduler's configuration: pipelines read their shift parameters from it."""
        return self.stock.config

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Lay the grid (arguments as in diffusers) and keep the steps of `self.steps`."""
        given = {"sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        given = {name: value for name, value in given.items() if value is not None}
        accepted = inspect.signature(self.stock.set_timesteps).parameters
        if refused := [name for name in given if name not in accepted]:
            raise ValueError(f"{type(self.stock).__name__}.set_timesteps takes no {', '.join(refused)}")
        if "sigmas" not in given and "timesteps" not in given:
            given["num_inference_steps"] = num_inference_steps
        self.stock.set_timesteps(device=device, **given)
        timesteps, levels = self._lay_grid(mu, device) if self.levels_visited is None else self._lay_visits(mu, device)
        self.num_steps = len(timesteps)
        self.indices = list(range(self.num_steps)) if self.steps is None else list(self.steps)
        if any(not 0 <= i < self.num_steps for i in self.indices):
            raise ValueError(f"steps {self.indices} lie outside the grid of {self.num_steps} steps")
        self.timesteps = timesteps[self.indices]
        ends = [*self.indices, self.indices[-1] + 1] if self.indices else [0]
        self.sigmas = levels[ends]
        self.num_inference_steps = len(self.indices)
        self.begin_index = self._cursor = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this position of `timesteps` (image-to-image pipelines)."""
        self.begin_index = self._cursor = begin_index

    @property
    def step_index(self) -> int:
        return self._cursor

    @property
    def stochastic_steps(self) -> tuple[int, ...]:
        """Indices of the grid whose step adds noise."""
        if self.stochastic is None:
            return tuple(range(self.num_steps - 1))
        if any(not 0 <= i < self.num_steps for i in self.stochastic):
            raise ValueError(f"stochastic steps {self.stochastic} do not fit a grid of {self.num_steps} steps")
        return self.stochastic

    def step_coefficients(self, index: int) -> Step:
        """The affine step at this index of the grid, deterministic where it adds no noise."""
        raise NotImplementedError

    def _lay_grid(self, mu: float | None, device: Any) -> tuple[Tensor, Tensor]:
        """(timesteps (T,), noise levels (T+1,) as the pipeline knows them) of the whole grid."""
        raise NotImplementedError

    def _lay_visits(self, mu: float | None, device: Any) -> tuple[Tensor, Tensor]:
        """The same for `levels_visited`."""
        raise ValueError(f"{type(self).__name__} visits the levels of its grid only; this needs a flow pipeline")

    def _as_output(self, model_output: Tensor) -> Tensor:
        return model_output

    def _offset(self, index: int, x: Tensor, output: Tensor) -> Tensor | float:
        """What this step takes from the one before it; called once a step."""
        return 0.0

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One transition. model_output and sample (B, ...); returns the next state in the sample's dtype."""
        index = self.indices[self._cursor]
        self._cursor += 1
        step, output = self.step_coefficients(index), self._as_output(model_output)
        moment = Moment(index, timestep, step, sample, output, generator, self._offset(index, sample, output))
        x_next = self.on_step(moment) if self.on_step else self.draw(moment)
        return SchedulerOutput(prev_sample=x_next) if return_dict else (x_next,)

    def draw(self, moment: Moment) -> Tensor:
        """Sample the next state, rounded to the pipeline's dtype before anybody takes its log-probability."""
        mean, std = moment.mean, moment.step.std
        if std > 0:
            source = self.generators or moment.generator
            if isinstance(source, list) and len(source) != len(mean):
                raise ValueError(f"{len(source)} generators for a batch of {len(mean)}")
            mean = mean + std * randn_tensor(mean.shape, generator=source, device=mean.device, dtype=torch.float32)
        return mean.to(moment.x.dtype)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return sample

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the stock scheduler: a tuned pipeline is an ordinary pipeline.

        `pipe.save_pretrained` leaves out what is not diffusers' own: set `pipe.scheduler = pipe.scheduler.stock` first.
        """
        self.stock.save_pretrained(*args, **kwargs)


class FlowSDEScheduler(SDEScheduler):
    """For flow-matching pipelines (Wan, HunyuanVideo, LTX, Mochi, SD3, Flux, ...).

    Args:
        kernel: one of samplers.KERNELS.
        grid: "stock", the levels that the pipeline's own scheduler would use (those that it passes included), or
            "uniform", linspace(1, 0, T + 1) shifted once.
        tail: share in (0, 1] of the steps after the last stochastic one that are left, rounded up; they are taken by a
            second-order solver (samplers.solvers), and the steps before them stay as they are. None: all of them, by
            Euler.
    """

    def __init__(
        self,
        stock: Any,
        kernel: str = "flow",
        noise_level: float = 0.7,
        stochastic: Iterable[int] | None = None,
        grid: str = "stock",
        tail: float | None = None,
    ):
        super().__init__(stock, noise_level, stochastic)
        if kernel not in transitions.KERNELS:
            raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(transitions.KERNELS)}")
        if grid not in GRIDS:
            raise ValueError(f"unknown grid {grid!r}; known: {', '.join(GRIDS)}")
        if tail is not None and not 0 < tail <= 1:
            raise ValueError(f"tail is {tail}, expected a share above 0, up to 1, or None")
        self.kernel, self.grid, self.tail = kernel, grid, tail
        self._clean: Tensor | None = None  # estimate that the last step of the tail has left

    @classmethod
    def from_config(
        cls,
        config: Any,
        kernel: str = "flow",
        noise_level: float = 0.7,
        stochastic: Iterable[int] | None = None,
        grid: str = "stock",
        tail: float | None = None,
        **overrides: Any,
    ) -> FlowSDEScheduler:
        """Build from a pipeline's scheduler configuration; overrides (flow_shift, ...) go to the stock scheduler."""
        return cls(stock_scheduler(config, **overrides), kernel, noise_level, stochastic, grid, tail)

    @property
    def _inverted(self) -> bool:
        """Mochi counts its levels upwards and predicts the opposite velocity."""
        return bool(self.config.get("invert_sigmas", False))

    def _lay_grid(self, mu: float | None, device: Any) -> tuple[Tensor, Tensor]:
        levels, timesteps = self.stock.sigmas.cpu(), self.stock.timesteps
        if self.grid == "uniform":
            levels = self._uniform(len(timesteps), mu)
            levels = 1 - levels if self._inverted else levels
            timesteps = (levels[:-1] * self.config.num_train_timesteps).to(device)
        wide = levels.double()
        self.levels: list[float] = (1 - wide if self._inverted else wide).tolist()
        falling = all(high > low for high, low in zip(self.levels, self.levels[1:], strict=False))
        if not falling or self.levels[0] > 1 or self.levels[-1] < 0:
            raise ValueError(f"noise levels must fall from 1 to 0, got {self.levels}; is this a flow pipeline?")
        self.num_steps = len(timesteps)
        return (timesteps, levels) if self.tail is None else self._shortened(timesteps, levels, mu)

    def _shortened(self, timesteps: Tensor, levels: Tensor, mu: float | None) -> tuple[Tensor, Tensor]:
        """The grid whose steps after the noise are those of the tail."""
        start = self.tail_start
        falling = solvers.shortened(self.levels, start, self.tail, self._shift(mu))
        if len(falling) == len(self.levels):
            return timesteps, levels
        self.levels = falling
        wide = torch.tensor(falling[start + 1 :], dtype=torch.float64)
        new = (1 - wide if self._inverted else wide).to(levels)
        counted = (new[:-1] * self.config.num_train_timesteps).to(timesteps)
        return torch.cat([timesteps[: start + 1], counted]), torch.cat([levels[: start + 1], new])

    @property
    def tail_start(self) -> int:
        """Index of the first step of the tail; where there is none, the number of steps."""
        if self.tail is None or self.levels_visited is not None:
            return self.num_steps
        return max(self.stochastic_steps, default=-1) + 1

    def _lay_visits(self, mu: float | None, device: Any) -> tuple[Tensor, Tensor]:
        timesteps, grid = self._lay_grid(mu, device)
        # A level of the grid has the grid's timestep: UniPC rounds its down, which a network notices.
        ends = [*timesteps.tolist(), float(grid[-1]) * self.config.num_train_timesteps]
        falling = np.stack(np.broadcast_arrays(*self.levels_visited, 0.0))  # (S + 1,) or (S + 1, B)
        visited = np.interp(falling[:-1], self.levels[::-1], ends[::-1])
        self.levels = [*self.levels_visited, 0.0]
        falling = falling.reshape(len(falling), -1).mean(1)  # Wan's pipeline names its step's level, one for all
        levels = torch.tensor(1 - falling if self._inverted else falling, dtype=torch.float32)
        return torch.tensor(visited, dtype=torch.float32, device=device), levels

    def _uniform(self, num_steps: int, mu: float | None) -> Tensor:
        u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        shift = self._shift(mu)
        return (shift * u / (1 + (shift - 1) * u)).float()

    def _shift(self, mu: float | None) -> float:
        if self.config.get("use_dynamic_shifting", False):
            return float(torch.tensor(mu).exp()) if self.config.get("time_shift_type") == "exponential" else mu
        return self.config.get("flow_shift", None) or self.stock.shift

    def step_coefficients(self, index: int) -> Step:
        if self.levels_visited is not None:
            return transitions.to_clean(self.levels_visited[index])
        sigma, sigma_next = self.levels[index : index + 2]
        kernel = self.kernel if index in self.stochastic_steps else "ode"
        constants = Grid(self.levels[1], self.levels[-1])  # a tail changes neither where there is noise
        t = transitions.transition(kernel, sigma, sigma_next, self.noise_level, constants)
        t = t._replace(c0=t.c0 + self._second_order_weight(index))
        return transitions.compose(t, transitions.flow_prediction(sigma))

    def _second_order_weight(self, index: int) -> float:
        """0 for steps outside the tail, and where the step before has left no clean estimate."""
        if index <= self.tail_start or index - 1 not in self.indices[self.begin_index :]:
            return 0.0
        return solvers.second_order_weight(*self.levels[index - 1 : index + 2])

    def _offset(self, index: int, x: Tensor, output: Tensor) -> Tensor | float:
        if index < self.tail_start:
            return 0.0
        weight, before = self._second_order_weight(index), self._clean
        self._clean = transitions.mean(transitions.to_clean(self.levels[index]), x, output)
        return -weight * before if weight else 0.0

    def _as_output(self, model_output: Tensor) -> Tensor:
        return -model_output if self._inverted else model_output


class DDIMSDEScheduler(SDEScheduler):
    """For variance-preserving pipelines (CogVideoX, Stable Diffusion): stochastic DDIM with log-probability (DDPO).

    `noise_level` is DDIM's eta in [0, 1]; 1 is ancestral sampling.
    """

    def __init__(self, stock: Any, noise_level: float = 1.0, stochastic: Iterable[int] | None = None):
        super().__init__(stock, noise_level, stochastic)
        if noise_level > 1:
            raise ValueError(f"noise_level is {noise_level}; DDIM's eta lies in [0, 1]")
        if type(stock) is diffusers.DDIMScheduler and (stock.config.clip_sample or stock.config.thresholding):
            raise ValueError("clip_sample and thresholding have no Gaussian step; set both to False in the scheduler")

    @classmethod
    def from_config(
        cls, config: Any, noise_level: float = 1.0, stochastic: Iterable[int] | None = None, **overrides: Any
    ) -> DDIMSDEScheduler:
        """Build from a pipeline's scheduler configuration; overrides go to diffusers' DDIM scheduler."""
        ddim = diffusers.CogVideoXDDIMScheduler if "snr_shift_scale" in config else diffusers.DDIMScheduler
        return cls(build(ddim, config, overrides), noise_level, stochastic)

    def _lay_grid(self, mu: float | None, device: Any) -> tuple[Tensor, Tensor]:
        timesteps = self.stock.timesteps
        stride = self.config.num_train_timesteps // len(timesteps)
        alpha = self.stock.alphas_cumprod.double()
        last = float(self.stock.final_alpha_cumprod)
        now = alpha[timesteps.cpu()]
        after = torch.stack([alpha[t] if t >= 0 else alpha.new_tensor(last) for t in (timesteps.cpu() - stride)])
        self.pairs: list[tuple[float, float]] = list(zip(now.sqrt().tolist(), after.sqrt().tolist(), strict=True))
        return timesteps, (1 - torch.cat([now, after[-1:]])).sqrt().float()

    def step_coefficients(self, index: int) -> Step:
        a, a_next = self.pairs[index]
        eta = self.noise_level if index in self.stochastic_steps else 0.0
        t = transitions.vp_transition(a, a_next, eta)
        return transitions.compose(t, transitions.vp_prediction(self.config.prediction_type, a))


def sde_scheduler(config: Any, **options: Any) -> SDEScheduler:
    """The SDE scheduler for a pipeline's scheduler configuration: flow or variance-preserving, as the keys say."""
    return (FlowSDEScheduler if is_flow(config) else DDIMSDEScheduler).from_config(config, **options)
