"""Frames of videos as a reward model takes them: prepared by threads ahead of time, and kept in a folder.

T frames, h w pixels
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rewards.video_files import read_video

Prepare = Callable[[Tensor, float], tuple[Tensor, float]]  # (F, 3, H, W) uint8, its rate -> frames, see `Frames`


class Frames(NamedTuple):
    """What a model looks at of one clip."""

    pixels: Tensor  # (T, 3, h, w) uint8
    seconds: float  # from one frame to the next


class FrameCache:
    """Prepared frames of video files, one file a video; a video that changes is prepared again.

    Args:
        prepare: chooses and resizes frames, to whole numbers.
        identity: all that the result depends on besides the video.
        limit: bytes that the folder may hold; what is beyond is prepared again whenever it is needed.
        workers: threads.
    """

    def __init__(self, folder: Path, prepare: Prepare, identity: str, limit: float, workers: int):
        self.folder, self.prepare, self.identity, self.limit = folder, prepare, identity, limit
        self.pool = ThreadPoolExecutor(workers)
        self.pending: dict[tuple[Path, float | None], Future[Frames]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.held = sum(file.stat().st_size for file in folder.iterdir())

    def ahead(self, videos: Iterable[tuple[Path, float | None]]) -> None:
        """Begin with videos that will be asked for, each with the rate to believe instead of the file's."""
        for key in videos:
            if key not in self.pending:
                self.pending[key] = self.pool.submit(self._frames, *key)

    def load(self, videos: Iterable[tuple[Path, float | None]]) -> list[Frames]:
        """Frames of videos, in order. Raises: RewardError, one line, for one that cannot be read or is too short."""
        videos = list(videos)
        self.ahead(videos)
        found = {key: self.pending.pop(key).result() for key in dict.fromkeys(videos)}
        return [found[key] for key in videos]

    def _frames(self, video: Path, fps: float | None) -> Frames:
        file = self._file(video, fps)
        try:
            kept = load_file(file)
            return Frames(kept["pixels"], float(kept["seconds"]))
        except (OSError, SafetensorError):  # not there, or damaged by a crash of the machine
            pass
        frames, rate = read_video(video, fps)
        pixels, seconds = self.prepare(frames, rate)
        made = Frames(pixels.byte(), seconds)
        size = made.pixels.numel() + 256
        if self.held + size <= self.limit:
            self.held += size
            temporary = file.with_suffix(f".{uuid.uuid4().hex}")  # processes may write the same file
            tensors = {"pixels": made.pixels.contiguous(), "seconds": torch.tensor(seconds, dtype=torch.float64)}
            save_file(tensors, temporary)
            temporary.replace(file)
        return made

    def _file(self, video: Path, fps: float | None) -> Path:
        known = video.stat()
        key = repr((str(video.absolute()), known.st_size, known.st_mtime_ns, fps, self.identity))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"
