"""From videos to the states that a pipeline's loop would end with, without any model's own code.

Between the state s that the last step leaves and the latents z that the VAE decodes, a pipeline unpacks, transposes and
undoes the normalisation: z = A s + b, where A moves elements and scales each. A run of the pipeline's own code with a
graph there gives products with A and its adjoint, and A^T A is diagonal: s = A^T (z - b) / A^T A 1.

    B batch, F frames, C channels, H W pixels
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .rollout import generators, patched, undecorated
from .schedulers import Moment, sde_scheduler

TOLERANCE = 0.01  # of the tail's products in the mean square, relative; bfloat16 rounds by 0.002


class Encoder:
    """Encodes videos as the pipeline's states; building one takes three evaluations of the network and one decoding.

    Elements of a state that the pipeline overwrites before it decodes (a first frame given as an image) are 0.

    Args:
        pipe: a diffusers pipeline; its scheduler may be of any kind.
        call: its arguments for one prompt, whose text does not matter: size, number of frames, an image where it needs
            one.
    Attributes:
        video_shape: (F, C, H, W) of the videos that the call makes, the only ones that can be encoded.
        state_shape: of one state, without the batch.
        frame_of: LongTensor of the state's shape: the latent frame that each element belongs to, as the VAE counts.
        latent_frames: how many the VAE decodes; 1 for images.
    Raises: ValueError where the pipeline does more between its loop and its VAE than move and scale elements.
    """

    def __init__(self, pipe: Any, **call: Any):
        self.pipe = pipe
        frames = _after_one_step(pipe, lambda moment: moment.x, {**call, "generator": generators([0])[0]})
        self.video_shape = tuple((frames[:, None] if frames.dim() == 4 else frames).shape[1:])
        self._offset = self._captured(0, call)[1].detach()
        self._state, self._latents = self._captured(1, call)
        self.state_shape = tuple(self._state.shape[1:])
        self._weight = torch.ones_like(self._state)
        self._weight = self._adjoint(self._product(self._weight))
        self._check()
        video = self._latents.dim() == 5
        self.latent_frames = self._latents.shape[2] if video else 1
        self.frame_of = torch.zeros(self.state_shape, dtype=torch.long)
        if video:
            numbers = torch.arange(self.latent_frames, device=self._latents.device).view(1, 1, -1, 1, 1)
            self.frame_of = self._inverse(self._product(torch.ones_like(self._state)) * numbers).round().long()[0].cpu()

    def __call__(self, videos: Tensor) -> Tensor:
        """(B, ...) float32 states of videos (B, F, C, H, W) in [0, 1], from the mode of the VAE's posterior."""
        if tuple(videos.shape[1:]) != self.video_shape:
            raise ValueError(f"videos (F, C, H, W) of {tuple(videos.shape[1:])}, the pipeline's are {self.video_shape}")
        vae, device = self.pipe.vae, self._state.device
        pixels = self._preprocessed(videos.to(device, torch.float32)).to(vae.dtype)
        with torch.autocast(device.type, enabled=False):
            encoded = vae.encode(pixels)
            latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        return torch.cat([self._inverse(own[None] - self._offset) for own in latents.float()])

    def _preprocessed(self, videos: Tensor) -> Tensor:
        """As the VAE takes them: (B, C, F, H, W), or images (B, C, H, W), in the range of the pipeline's processor."""
        height, width = self.video_shape[-2:]
        if self._latents.dim() == 5:
            return self.pipe.video_processor.preprocess_video(videos, height, width)
        return self.pipe.image_processor.preprocess(videos[:, 0], height, width)

    def _captured(self, scale: int, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """A state (1, ...), which is noise times `scale`, and the latents that the VAE would decode, with a graph.

        Whatever else is drawn differs from scale to scale: no element that the state reaches may depend on it.
        """
        vae, found = self.pipe.vae, []

        def on_step(moment: Moment) -> Tensor:
            torch.set_grad_enabled(True)
            tail.enter_context(patched(type(vae), "dtype", lambda _: torch.float32))  # that of the latents, not lower
            noise = torch.randn(moment.x.shape, generator=generators([0])[0]).to(moment.x.device)
            found.append((scale * noise).requires_grad_())
            return found[0].clone()  # some pipelines write into it

        def capture(decode: Callable) -> Callable[..., NoReturn]:
            def captured(latents: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
                found.append(latents)
                raise _CapturedError

            return captured

        with contextlib.ExitStack() as tail, patched(vae, "decode", capture), contextlib.suppress(_CapturedError):
            _after_one_step(self.pipe, on_step, {**call, "generator": generators([scale])[0]})
        if len(found) != 2 or found[0].shape[0] != 1 or not found[1].requires_grad:
            raise ValueError(f"{type(self.pipe).__name__} does not hand the state of one prompt to its VAE: {_ADVICE}")
        return found[0], found[1]

    def _adjoint(self, latents: Tensor) -> Tensor:
        """A^T z."""
        given = latents.to(self._latents.dtype)
        return torch.autograd.grad(self._latents, self._state, given, retain_graph=True)[0]

    def _product(self, state: Tensor) -> Tensor:
        """A s: the adjoint of the adjoint, in float32."""
        given = torch.zeros_like(self._latents).requires_grad_()
        adjoint = torch.autograd.grad(self._latents, self._state, given, create_graph=True)[0]
        return torch.autograd.grad(adjoint, given, state)[0].float()

    def _inverse(self, moved: Tensor) -> Tensor:
        """(1, ...) the state s of A s."""
        return torch.where(self._weight > 0, self._adjoint(moved) / self._weight, 0.0)

    def _check(self) -> None:
        """Refuse a tail that bends, mixes or draws what comes from the state."""
        state, name = self._state.detach(), type(self.pipe).__name__
        reached = self._product(torch.ones_like(state)) != 0
        moved, kept = self._product(state), self._weight > 0
        pairs = [((self._latents.detach() - self._offset)[reached], moved[reached])]
        pairs.append((self._inverse(moved)[kept], state[kept]))
        for found, wanted in pairs:
            if not len(found) or (found - wanted).norm() > TOLERANCE * wanted.norm():
                raise ValueError(f"{name} does not just move and scale its last state to decode it: {_ADVICE}")


_ADVICE = "videos cannot be encoded for it (if the call sets decode_noise_scale, set it to 0)"


class _CapturedError(Exception):
    """Leaves the pipeline where its VAE would decode."""


def decode(pipe: Any, states: Tensor, **call: Any) -> Any:
    """What the pipeline makes of clean states, through its own code after the loop; one evaluation of the network.

    Args:
        states: (B, ...).
        call: the pipeline's arguments for B samples, with the images they were made for, if any.
    Returns: videos (B, F, C, H, W) or images (B, C, H, W) in [0, 1], unless `call` asks for another output_type.
    """
    return _after_one_step(pipe, lambda moment: states.to(moment.x), call)


def _after_one_step(pipe: Any, on_step: Callable[[Moment], Tensor], call: dict[str, Any]) -> Any:
    """Run the pipeline for one step, whose next state `on_step` gives, and all that comes after its loop."""
    before = pipe.scheduler
    pipe.scheduler = scheduler = sde_scheduler(before.config)
    scheduler.steps, scheduler.on_step = [0], on_step
    try:
        with torch.no_grad():
            # A grid of one step has no shift to its end: LTX's would divide by zero.
            return undecorated(pipe)(**{"output_type": "pt", **call, "num_inference_steps": 2})[0]
    finally:
        pipe.scheduler = before
