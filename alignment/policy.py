"""The policy: an unmodified diffusers pipeline and its trained weights.

Nothing here knows a model's name. Trained are the denoisers, that is, the pipeline's components called transformer* or
unet; everything else is frozen. Trained weights are float32 whatever the dtype of the rest, and a lower dtype computes
under autocast, in rollout and replay alike.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samplers import Encoder, Recorded, Rollout, Trajectory, decode, replay, rollout, sde_scheduler
from samplers.rollout import generators, patched
from samplers.schedulers import Moment
from samplers.stock import is_flow

from .config import ModelConfig, Recipe, SamplerConfig, algorithm_of
from .embeddings import EmbeddingCache
from .errors import UserError
from .files import replacing_folder
from .lora import add_lora, save_lora
from .optimization import other_weights

DENOISERS = ("transformer", "unet")


class Policy:
    """A pipeline that samples, replays and learns.

    Attributes:
        parameters: name -> trained parameter (float32), the same order in every process.
        evaluations: rows that the denoisers have processed so far (function evaluations).
        decode_seconds: time spent in the VAE so far.
        image_each: the pipeline wants an image for each sample, not one for all (the self-check finds out).
        injectable: see `samplers.Trajectory` (the self-check finds out); for `Trajectory.of_clean`.
        levels_each: each sample of an update may have a noise level of its own (found out where one is to have it).
        moves_output: training changes what the pipeline makes, and not only what is read off on the way.
    """

    moves_output = True

    def __init__(self, pipe: Any, model: ModelConfig, sampler: SamplerConfig, call: dict[str, Any], device: Any):
        self.pipe, self.model, self.sampler = pipe, model, sampler
        self.call = {**call, "num_inference_steps": sampler.steps}
        self.device = torch.device(device)
        self.dtype = getattr(torch, model.dtype)
        self.evaluations, self.decode_seconds = 0, 0.0
        self.stock = _shifted(pipe.scheduler, sampler.shift)
        self.embeddings: EmbeddingCache | None = None
        self.image_each, self.injectable, self.levels_each = False, True, False
        self.denoisers = denoisers_of(pipe)
        _freeze(pipe)
        self.parameters = self._make_trainable()
        self.full_reference: dict[str, Tensor] | None = None
        for denoiser in self.denoisers.values():
            denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
            if model.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
            if model.attention:
                _set_attention(denoiser, model.attention)
        if model.vae_tiling:
            pipe.vae.enable_tiling()
        pipe.set_progress_bar_config(disable=True)
        noisy = None if sampler.window is None else self.stochastic_steps
        options: dict[str, Any] = {"noise_level": sampler.noise_level, "stochastic": noisy}
        if is_flow(self.stock.config):
            options |= {"kernel": sampler.kernel, "grid": sampler.grid, "tail": sampler.tail}
        elif sampler.tail is not None:
            raise UserError(f"sampler.tail: {type(self.stock).__name__} is not a flow's; set it to null")
        try:
            self.scheduler = sde_scheduler(self.stock.config, **options)
        except ValueError as error:
            raise UserError(f"sampler: {error}") from error

    @property
    def stochastic_steps(self) -> list[int]:
        """Indices of the rollout's steps that may add noise."""
        start, stop = self.sampler.window or (0, self.sampler.steps - 1)
        return list(range(start, stop))

    def cache_embeddings(self, folder: Path) -> None:
        """Compute prompt embeddings once and keep them in this folder."""
        self.embeddings = EmbeddingCache.install(self.pipe, folder)

    def release_encoders(self, prompts: Sequence[str]) -> None:
        """Embed these prompts, then free the text encoders; the pipeline has to have run once before.

        Raises: UserError where they are needed at every call.
        """
        if self.embeddings is None or not self.embeddings.hold(prompts):
            name = type(self.pipe).__name__
            raise UserError(f"model.drop_encoders: {name} needs its text encoders at every call; set it to false")
        self.embeddings.release_encoders()

    def rollout(
        self,
        prompts: list[str],
        latent_seeds: Sequence[int],
        noise_seeds: Sequence[int | torch.Generator],
        record: Collection[int],
        stochastic: Collection[int] | None = None,
        visit: Callable[[Moment, Recorded], None] | None = None,
        **call: Any,
    ) -> Rollout:
        """Sample with the SDE; one seed a prompt for the initial noise and for the steps' noise.

        Args:
            record: the steps to keep.
            stochastic: the steps that add noise; None for those of the recipe.
            visit: sees every step of `record` with its graph; without it nothing has one (see samplers.rollout).
            call: arguments of the pipeline, and the `segment` of samplers.rollout.
        """
        with self._running(self.scheduler):
            call = self._arguments(prompts, {"output_type": "pt", **call})
            return rollout(self.pipe, record, latent_seeds, noise_seeds, stochastic, visit, **call)

    def replay(
        self, trajectory: Trajectory, prompts: list[str], visit: Callable[[Moment, Recorded], None], **call: Any
    ) -> None:
        """Run the recorded steps again; `visit` sees each with its graph (see samplers.replay)."""
        trajectory = moved(trajectory, self.device)
        with self._running(self.scheduler):
            replay(self.pipe, trajectory, visit, **self._arguments(prompts, {**call, "generator": None}))

    def generate(
        self,
        prompts: list[str],
        seeds: Sequence[int],
        steps: int | None = None,
        trained_share: float = 1.0,
        **call: Any,
    ) -> Tensor:
        """(B, F, C, H, W) videos in [0, 1] from the pipeline's own deterministic scheduler.

        Args:
            trained_share: of the steps, in [0, 1] and rounded up; the others, which are the last, are the reference's
                (MixGRPO's hybrid inference, arXiv 2507.21802, which found that it keeps the reward and hacks it less).
        """
        call = self._arguments(prompts, {"output_type": "pt", **call, "generator": generators(seeds)})
        if steps is not None:
            call["num_inference_steps"] = steps
        with torch.no_grad(), self._running(self.stock), self._handing_over(trained_share):
            return as_videos(self.pipe(**call)[0])

    def encoder(self, prompt: str, **call: Any) -> Encoder:
        """Videos to states; `prompt` is any that the pipeline can embed, with its image where it needs one.

        Raises: ValueError (see samplers.Encoder).
        """
        with self._running(self.scheduler):
            return Encoder(self.pipe, **self._arguments([prompt], call))

    def decode(self, states: Tensor, prompts: list[str], **call: Any) -> Tensor:
        """(B, F, C, H, W) videos in [0, 1] of clean states (B, ...); costs one evaluation of the network (no more)."""
        with torch.no_grad(), self._running(self.scheduler):
            return as_videos(decode(self.pipe, states, **self._arguments(prompts, call)))

    def _arguments(self, prompts: list[str], call: dict[str, Any]) -> dict[str, Any]:
        """The recipe's arguments of the pipeline, and those of one call."""
        call = {**self.call, **call, "prompt": prompts}
        if self.image_each and "image" in call:
            call["image"] = [call["image"]] * len(prompts)
        return call

    @contextlib.contextmanager
    def _handing_over(self, trained_share: float) -> Iterator[None]:
        """The reference takes over after this share of the steps of the pipeline's own scheduler."""
        taken = 0
        with contextlib.ExitStack() as stack:

            def counting(step: Callable) -> Callable:
                @functools.wraps(step)  # pipelines read its signature
                def counted(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
                    nonlocal taken
                    result = step(scheduler, *args, **kwargs)
                    if scheduler is self.stock:  # and not a copy that a pipeline makes for another modality
                        taken += 1
                        if taken == math.ceil(trained_share * len(scheduler.timesteps) - 1e-9):
                            stack.enter_context(self.reference())
                    return result

                return counted

            if trained_share == 0:
                stack.enter_context(self.reference())
            elif trained_share < 1:
                stack.enter_context(patched(type(self.stock), "step", counting))
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The weights before training, without gradients: adapters off, or the copy that `keep_reference` made."""
        if self.model.trained == "full":
            if self.full_reference is None:
                raise RuntimeError("keep_reference has to be called before training")
            with torch.no_grad(), self.using(self.full_reference):
                yield
            return
        for denoiser in self.denoisers.values():
            denoiser.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            for denoiser in self.denoisers.values():
                denoiser.enable_adapters()

    def keep_reference(self) -> None:
        """Make `reference` available; full fine-tuning copies its weights for that."""
        if self.model.trained == "full":
            self.full_reference = {name: p.detach().clone() for name, p in self.parameters.items()}

    def using(self, weights: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """Run with other values of the trained weights (EMA, reference)."""
        return other_weights(self.parameters, weights)

    def save(self, folder: Path) -> Path:
        """Write what plain diffusers loads: `lora/` for load_lora_weights, or the trained components."""
        if self.model.trained == "lora":
            with replacing_folder(folder / "lora") as new:
                save_lora(self.pipe, self.denoisers, new)
            return folder / "lora"
        for name, denoiser in self.denoisers.items():
            with replacing_folder(folder / name) as new:
                denoiser.save_pretrained(new)
        return folder / next(iter(self.denoisers))

    @contextlib.contextmanager
    def _running(self, scheduler: Any) -> Iterator[None]:
        """The pipeline with this scheduler, under autocast where the dtype is not float32; see `_decoding`."""
        before = self.pipe.scheduler
        self.pipe.scheduler = scheduler
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        try:
            with autocast, patched(self.pipe.vae, "decode", self._decoding):
                yield
        finally:
            self.pipe.scheduler = before

    def _decoding(self, decode: Callable) -> Callable:
        """The VAE's decode, timed, and in full precision where the VAE has it: autocast would lower that again."""

        def timed(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)
            start = time.perf_counter()
            full = self.pipe.vae.dtype == torch.float32
            with torch.autocast(self.device.type, self.dtype, enabled=not full and self.dtype != torch.float32):
                result = decode(latents.float() if full else latents, *args, **kwargs)
            synchronize(self.device)
            self.decode_seconds += time.perf_counter() - start
            return result

        return timed

    def _count(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        first = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        self.evaluations += len(first)

    def _make_trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, float32 and with gradients; the rest of the pipeline is frozen already."""
        if self.model.trained == "lora":
            return add_lora(self.denoisers, self.model.lora)
        parameters = {}
        for component, denoiser in self.denoisers.items():
            denoiser.float().requires_grad_(True)
            parameters |= {f"{component}.{name}": p for name, p in denoiser.named_parameters()}
        return parameters


def load_policy(recipe: Recipe, device: torch.device) -> Policy:
    """Load the recipe's pipeline by folder or hub id and make it trainable, as its algorithm does if that has a way."""
    pipe = load_pipeline(recipe.model, device)
    algorithm = algorithm_of(recipe)
    if hasattr(algorithm, "make_policy"):
        return algorithm.make_policy(pipe, recipe, device)
    return Policy(pipe, recipe.model, recipe.sampler, recipe.call, device)


def load_pipeline(model: ModelConfig, device: torch.device) -> Any:
    """The diffusers pipeline that `model` names, on its device (unless a device map places it)."""
    import diffusers

    cls = getattr(diffusers, model.pipeline) if model.pipeline else diffusers.DiffusionPipeline
    dtypes = {"default": getattr(torch, model.dtype), "vae": getattr(torch, model.vae_dtype or model.dtype)}
    options = {"dtype": dtypes, "revision": model.revision, "variant": model.variant}
    if model.device_map:
        options["device_map"] = model.device_map
    try:
        pipe = cls.from_pretrained(model.path, **options)
    except (OSError, ValueError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model.path: cannot load a pipeline from {model.path!r}: {first.strip()}") from error
    return pipe if model.device_map else pipe.to(device)


def moved(trajectory: Trajectory, device: torch.device | str) -> Trajectory:
    """The trajectory on another device. Recorded states of a large model fill it fast, so they wait in host memory."""
    steps = [replace(s, x=s.x.to(device), x_next=s.x_next.to(device), mean=s.mean.to(device)) for s in trajectory.steps]
    return replace(trajectory, steps=tuple(steps))


def as_videos(frames: Tensor) -> Tensor:
    """(B, F, C, H, W) from what a pipeline returns: images (B, C, H, W) become videos of one frame."""
    frames = torch.as_tensor(frames).float()
    return frames[:, None] if frames.dim() == 4 else frames


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read after it is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's networks by the names of their components. Raises: UserError where there is none."""
    found = {n: m for n, m in pipe.components.items() if n.startswith(DENOISERS) and isinstance(m, nn.Module)}
    if not found:
        raise UserError(f"model: {type(pipe).__name__} has no component called {' or '.join(DENOISERS)}")
    return found


def _shifted(scheduler: Any, shift: float | None) -> Any:
    """The pipeline's scheduler, with another time shift if one is asked for."""
    if shift is None:
        return scheduler
    key = next((key for key in ("flow_shift", "shift") if key in scheduler.config), None)
    if key is None or not is_flow(scheduler.config):
        raise UserError(f"sampler.shift: {type(scheduler).__name__} has no time shift; set it to null")
    return type(scheduler).from_config(scheduler.config, **{key: shift})


def _freeze(pipe: Any) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()


def _set_attention(denoiser: nn.Module, backend: str) -> None:
    try:
        denoiser.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention: {backend!r} cannot be used here: {error}") from error
