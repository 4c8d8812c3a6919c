"""A reward on noised latents: the first blocks of a pipeline's denoiser and a head on their hidden states.

The pipeline's own code leads to the blocks (see samplers.replay) and is left as soon as they have run. What a run
writes:

    latent_reward/reward.json            the pipeline, its call, how many blocks, the dimensions
    latent_reward/weights.safetensors    the head, and what was trained of the blocks

    B batch, D dimensions; states as the pipeline's loop hands them to its scheduler
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samplers import Recorded, Trajectory
from samplers.transitions import to_clean

from ..config import LoRAConfig, ModelConfig, SamplerConfig
from ..errors import UserError, one_line
from ..files import replacing_folder
from ..lora import LAYERS, add_lora, check_targets
from ..policy import Policy, load_pipeline
from .blocks import Reached, blocks_of, check_layer, leave, width_of
from .head import Head

FOLDER, CARD, WEIGHTS = "latent_reward", "reward.json", "weights.safetensors"
FOUND = ("image_each", "injectable", "levels_each")  # what Policy finds out about a pipeline


class Design(NamedTuple):
    """What a latent reward is made of, beside a pipeline."""

    layer: int  # how many blocks run
    dimensions: tuple[str, ...]
    frozen: bool = False  # the head alone is trained
    fps: float = 16.0  # of the videos that it learned from


class LatentReward(Policy):
    """The first blocks of a pipeline's denoisers with a head, which learn to score noised states.

    Args:
        policy: as `Policy`; `model.trained` says how the blocks are trained, by LoRA or in full. What lies before them,
            embeddings of patches, text and time, is as it was.
    Attributes:
        dimensions: D names.
        head: shared by the denoisers of pipelines that change over from one to another.
    """

    def __init__(self, *policy: Any, design: Design):
        self.design = design
        self.dimensions = list(design.dimensions)
        self.moves_output = not design.frozen
        super().__init__(*policy)
        self.exits = [list(blocks_of(d).values())[design.layer] for d in self.denoisers.values()]
        if self.model.gradient_checkpointing:
            for denoiser in self.denoisers.values():
                denoiser.enable_gradient_checkpointing(self._checkpointed)

    def score(
        self,
        states: Tensor,
        level: float | Tensor,
        prompts: Sequence[str] | None,
        seeds: Sequence[int] = (),
        **call: Any,
    ) -> Tensor:
        """(B, D) float32 rewards of noised states; with the caller's gradients, which reach the states.

        Args:
            states: (B, ...) that lie at `level`, (1 - level) clean + level noise.
            level: of noise in (0, 1]; one, or (B,).
            prompts: B; None where `call` holds their embeddings (prompt_embeds and what else the pipeline takes).
            seeds: B, for what the pipeline draws before its first step; none: 0 for each.
            call: further arguments of the pipeline, as an image.
        """
        levels = torch.as_tensor(level, dtype=torch.float64).detach().reshape(-1).tolist()
        seeds = tuple(seeds) or (0,) * len(states)
        if len(set(levels)) == 1:
            return self.scores(at_level(states, levels[0], self.injectable, seeds), prompts, **call)
        if self.levels_each:
            return self.scores(at_level(states, tuple(levels), self.injectable, seeds), prompts, **call)
        if prompts is None:
            raise ValueError(f"{type(self.pipe).__name__} takes one level for all samples; score them one by one")
        rows = zip(states.split(1), levels, prompts, seeds, strict=True)
        return torch.cat([self.score(x, own, [prompt], [seed], **call) for x, own, prompt, seed in rows])

    def scores(self, trajectory: Trajectory, prompts: Sequence[str] | None, **call: Any) -> Tensor:
        """(B, D) rewards of a trajectory of one step, as `Trajectory.noised` makes it."""
        hidden = self.hidden_states(trajectory, prompts, **call)
        level = torch.as_tensor(trajectory.levels[0], dtype=torch.float32, device=hidden.device).expand(len(hidden))
        return self.head(hidden, level)

    def hidden_states(self, trajectory: Trajectory, prompts: Sequence[str] | None, **call: Any) -> Tensor:
        """(B, N, W) behind the last block that runs; see `scores`."""
        entering = 0 if trajectory.injectable else 1  # passes that only let the state in

        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal entering
            if entering:
                entering -= 1
            else:
                leave(block, args, kwargs)

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in self.exits]
        try:
            self.replay(trajectory, prompts, _never, **call)
        except Reached as reached:
            return reached.hidden
        finally:
            for handle in handles:
                handle.remove()
        raise RuntimeError(f"{type(self.pipe).__name__} ran past block {self.design.layer} without calling it")

    def save(self, folder: Path) -> Path:
        """Write `latent_reward/` for `load`."""
        card = {
            **self.design._asdict(),
            "model": dataclasses.asdict(self.model),
            "sampler": dataclasses.asdict(self.sampler),
            "call": self.call,
            **{name: getattr(self, name) for name in FOUND},
        }
        with replacing_folder(folder / FOLDER) as new:
            save_file({name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}, new / WEIGHTS)
            (new / CARD).write_text(json.dumps(card, indent=1) + "\n", "utf-8")
        return folder / FOLDER

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device | None = None, **model: Any) -> LatentReward:
        """What a run has left, frozen, on a pipeline of its own.

        Args:
            folder: of the run, or its latent_reward/.
            device: None: a GPU where there is one.
            model: keys of a recipe's `model` that are to differ, as path=... where the pipeline has moved, or dtype.
        Raises: UserError where the files are not there or do not fit.
        """
        folder, card = read_card(folder)
        try:
            options = {**card["model"], **model}
            config = ModelConfig(**{**options, "lora": LoRAConfig(**options["lora"])})
            sampler = SamplerConfig(**card["sampler"])
            design = Design(*(card[name] for name in Design._fields))
            design = design._replace(dimensions=tuple(design.dimensions))
            call, found = card["call"], {name: card[name] for name in FOUND}
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / CARD}: is no reward's: {one_line(error)}") from error
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        reward = cls(load_pipeline(config, device), config, sampler, call, device, design=design)
        for name, value in found.items():
            setattr(reward, name, value)
        reward._restore(folder / WEIGHTS)
        return reward

    def _restore(self, file: Path) -> None:
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is missing or damaged ({one_line(error)}); copy the folder again") from error
        shapes = {name: p.shape for name, p in self.parameters.items()}
        if shapes != {name: w.shape for name, w in weights.items()}:
            raise UserError(f"{file}: its weights are not those that {CARD} beside it speaks of, on {self.model.path}")
        for name, p in self.parameters.items():
            p.data = weights[name].to(p)
            p.requires_grad_(False)

    def _make_trainable(self) -> dict[str, nn.Parameter]:
        for denoiser in self.denoisers.values():
            check_layer(denoiser, self.design.layer)
        block = next(iter(blocks_of(next(iter(self.denoisers.values()))).values()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every process starts from the same head, whatever ran in it before
            self.head = Head(width_of(block), len(self.dimensions)).to(self.device)
        parameters = {f"head.{name}": p for name, p in self.head.named_parameters()}
        return parameters | trainable_blocks(self.denoisers, self.model, self.design)

    def _checkpointed(self, module: nn.Module, *args: Any) -> Any:
        """As diffusers does it; but the exit is no part of it: a checkpoint that is left in its middle stays open."""
        if any(module is block for block in self.exits):
            return module(*args)
        return checkpoint(module.__call__, *args, use_reentrant=False)


def trainable_blocks(denoisers: dict[str, nn.Module], model: ModelConfig, design: Design) -> dict[str, nn.Parameter]:
    """Make what is trained of the blocks that run float32 and trainable; by name.

    Raises: UserError where a LoRA target matches no layer of them.
    """
    if design.frozen:
        return {}
    running = {c: dict(list(blocks_of(denoiser).items())[: design.layer]) for c, denoiser in denoisers.items()}
    if model.trained == "full":
        named = [(f"{c}.{name}", block) for c, blocks in running.items() for name, block in blocks.items()]
        for _, block in named:
            block.float().requires_grad_(True)
        return {f"{place}.{name}": p for place, block in named for name, p in block.named_parameters()}
    first = next(iter(running.values()))
    layers = [f"{name}.{n}" for name, b in first.items() for n, m in b.named_modules() if isinstance(m, LAYERS)]
    check_targets(next(iter(running)), layers, model.lora.targets)
    targets = [name for name in layers if any(f".{name}".endswith(f".{target}") for target in model.lora.targets)]
    return add_lora(denoisers, dataclasses.replace(model.lora, targets=targets))


def at_level(states: Tensor, level: float | tuple[float, ...], injectable: bool, seeds: tuple[int, ...]) -> Trajectory:
    """States (B, ...) that lie at a noise level, or at one each, as a trajectory of one step."""
    recorded = Recorded(0, to_clean(level), states, states, states)
    return Trajectory((recorded,), injectable, seeds, (), (level,))


def read_card(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """A reward's folder, given that or its run's, and what its JSON holds. Raises: UserError."""
    folder = Path(folder).expanduser()
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not (folder / CARD).is_file():
        raise UserError(f"{folder}: holds no {CARD}; name the folder of a run of latent_reward, or its {FOLDER}/")
    try:
        card = json.loads((folder / CARD).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / CARD}: cannot be read ({one_line(error)}); copy the folder again") from error
    if not isinstance(card, dict):
        raise UserError(f"{folder / CARD}: is no reward's")
    return folder, card


def _never(*args: Any) -> None:
    raise RuntimeError("the pipeline ran to its scheduler")
