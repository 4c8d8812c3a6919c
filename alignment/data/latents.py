"""Latents of given videos: read from files, or encoded once and kept.

The cache holds one file a video, named after what the video and the encoder are: a video that moves is found again, one
that changes is encoded again, and so are all where the pipeline's VAE or the size of its videos changes.

    B batch, F frames, H W pixels
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from rewards.contract import RewardError
from rewards.video_files import read_video

from ..errors import Problems, UserError, one_line
from ..fingerprints import sampled_weights

if TYPE_CHECKING:
    from samplers import Encoder


class LatentCache:
    """States of video files, in a folder.

    Args:
        encoder: of the pipeline that learns from the videos.
        fps: frames a second that the pipeline's videos have; files with another rate are resampled to it.
    """

    def __init__(self, folder: Path, encoder: Encoder, fps: float):
        self.folder, self.encoder, self.fps = folder, encoder, fps
        self.identity = _identity(encoder, fps)
        self._paths: dict[Path, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, video: Path) -> Path:
        """The file of this video's state; the video is read once for that."""
        if video not in self._paths:
            digest = hashlib.sha256(video.read_bytes() + self.identity.encode()).hexdigest()
            self._paths[video] = self.folder / f"{digest[:40]}.safetensors"
        return self._paths[video]

    def load(self, video: Path) -> Tensor:
        """The state of a video that has been encoded, memory-mapped."""
        return load_latent(self.path(video), self.encoder.state_shape)[0]

    def encode_all(
        self, videos: Mapping[Path, str], batch_size: int = 1, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Encode those that are missing.

        Args:
            videos: a file -> where it is mentioned, for messages.
            batch_size: videos that the VAE encodes at once.
            progress: called with the number of videos that are done, and of all that are missing.
        Raises: Problems, after all others are encoded, one line a video that cannot be read or is too short.
        """
        problems: list[str] = []
        missing = list(self._missing(videos, problems))
        for start in range(0, len(missing), batch_size):
            batch: dict[Path, Tensor] = {}
            for video in missing[start : start + batch_size]:
                try:
                    batch[self.path(video)] = self._read(video)
                except (RewardError, ValueError) as error:
                    problems.append(f"{videos[video]}: {error}")
            if batch:
                with torch.no_grad():
                    states = self.encoder(torch.stack([*batch.values()])).cpu()
                for path, state in zip(batch, states, strict=True):
                    save_latent(path, state)
            if progress is not None:
                progress(min(start + batch_size, len(missing)), len(missing))
        if problems:
            raise Problems(problems)

    def _missing(self, videos: Mapping[Path, str], problems: list[str]) -> Iterator[Path]:
        """Videos without a state in the folder, equal files once."""
        seen = set()
        for video, where in videos.items():
            try:
                path = self.path(video)
            except OSError as error:
                problems.append(f"{where}: {video}: {error.strerror}")
                continue
            if path not in seen and not _readable(path):
                yield video
            seen.add(path)

    def _read(self, video: Path) -> Tensor:
        num_frames, _, height, width = self.encoder.video_shape
        frames, fps = read_video(video)
        try:
            return fit_video(frames, fps, num_frames, self.fps, height, width)
        except ValueError as error:
            raise ValueError(f"{video} {error}") from error


def fit_video(frames: Tensor, fps: float, num_frames: int, target_fps: float, height: int, width: int) -> Tensor:
    """The first frames of a clip at another rate and size.

    In time the nearest frames are taken. In space the middle of the same aspect ratio is cut out and resized, with
    antialiasing. Where rate or size fit already, nothing changes.

    Args:
        frames: (F, C, H, W) uint8.
        fps: their rate.
    Returns: (num_frames, C, height, width) float32 in [0, 1].
    Raises: ValueError where the clip is too short.
    """
    picked = [int(i * fps / target_fps + 0.5) for i in range(num_frames)]
    if picked[-1] >= len(frames):
        raise ValueError(
            f"is too short: {len(frames)} frames at {fps:g} a second, where {num_frames} at {target_fps:g} are needed; "
            "leave it out, or lower call.num_frames or fps"
        )
    video = _cut(frames[picked], height / width).float() / 255
    if video.shape[-2:] == (height, width):
        return video
    return functional.interpolate(video, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def load_latent(path: Path, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """A latent file's "state", and the "noise" that it was generated from, if it says; memory-mapped.

    Args:
        shape: of the pipeline's states (`Encoder.state_shape`).
    Raises: UserError where the file cannot be read or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            state, noise = (file.get_tensor(name) if name in names else None for name in ("state", "noise"))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a latent file, or damaged: {one_line(error)} (encode it again)") from error
    if state is None:
        raise UserError(f'{path}: has no tensor "state" (encode it again)')
    for name, tensor in (("state", state), ("noise", noise)):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise UserError(_of_another_shape(path, name, tensor.shape, shape))
        if tensor is not None and not (tensor.is_floating_point() and torch.isfinite(tensor).all()):
            raise UserError(f'{path}: "{name}" holds values that are no finite floats (encode it again)')
    return state, noise


def check_shapes(latents: Mapping[Path, str], shape: Sequence[int]) -> None:
    """Compare what latent files say of themselves with the shape of the pipeline's states.

    Args:
        latents: a file that can be read -> where it is mentioned.
    Raises: Problems, one line a file.
    """
    problems = []
    for path, where in latents.items():
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name).get_shape() for name in {"state", "noise"} & set(file.keys())}
        wrong = [name for name, size in found.items() if tuple(size) != tuple(shape)]
        problems += [f"{where}: {_of_another_shape(path, name, found[name], shape)}" for name in wrong[:1]]
    if problems:
        raise Problems(problems)


def has_noise(path: Path) -> bool:
    """Whether a latent file that can be read says what it was generated from."""
    with safe_open(path, "pt") as file:
        return "noise" in set(file.keys())


def save_latent(path: Path, state: Tensor, noise: Tensor | None = None) -> None:
    """Write a latent file; it appears whole or not at all."""
    tensors = {"state": state} if noise is None else {"state": state, "noise": noise}
    temporary = path.with_suffix(f".{uuid.uuid4().hex}")  # a name of its own: processes may write the same file
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def _of_another_shape(path: Path, name: str, found: Sequence[int], shape: Sequence[int]) -> str:
    return (
        f'{path}: "{name}" is {tuple(found)}, the states of this pipeline and call are {tuple(shape)}; encode it '
        "again, or set call.height, call.width and call.num_frames to what it was made with"
    )


def _cut(frames: Tensor, ratio: float) -> Tensor:
    """The largest middle part whose height / width is `ratio`."""
    height, width = frames.shape[-2:]
    kept_height, kept_width = min(height, round(width * ratio)), min(width, round(height / ratio))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return frames[..., top : top + max(1, kept_height), left : left + max(1, kept_width)]


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):  # not there, or damaged by a crash of the machine
        return False


def _identity(encoder: Encoder, fps: float) -> str:
    """All that a state depends on but the video."""
    vae = encoder.pipe.vae
    digest = hashlib.sha256(version("diffusers").encode())
    for sample in sampled_weights(vae):
        digest.update(sample)
    config = json.dumps(dict(vae.config), sort_keys=True, default=str)
    classes = type(encoder.pipe).__name__, type(vae).__name__
    return repr((classes, config, digest.hexdigest(), encoder.video_shape, encoder.state_shape, fps))
