"""The core of the CLIP family: images and prompts to unit embeddings, and rewards that compare them.

M images, N prompts, D embedding, H W pixels, h w the model's image size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rewards.contract import Clip, RewardError, Scores
from rewards.frames import FrameReward, frame_plan

MAX_CACHED_PROMPTS = 8192  # 32 MB at D = 1024
PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16")


class Towers(NamedTuple):
    """A loaded model, as far as its library matters."""

    model: torch.nn.Module  # frozen, in evaluation mode
    encode_image: Callable[[Tensor], Tensor]  # (M, 3, h, w) prepared -> (M, D)
    encode_text: Callable[[list[str]], Tensor]  # N prompts, cut to the model's context -> (N, D)
    prepare: Callable[[Tensor], Tensor]  # (M, 3, H, W) in [0, 1] -> (M, 3, h, w)
    size: tuple[int, int]  # h, w
    mean: Sequence[float]  # of the three channels
    std: Sequence[float]


class Source(Protocol):
    """Where a model comes from: a checkpoint that was found, and not read yet."""

    def load(self, name: str, precision: str, device: torch.device) -> Towers: ...


class Encoder:
    """A frozen CLIP model that gives unit float32 embeddings.

    Differentiable in the images. Images are encoded `batch_size` at a time, whatever clips they come from; every
    prompt is encoded once, and the last 8192 are kept. `prepare` may be replaced by a reward whose authors prepared
    images in another way.
    """

    def __init__(self, source: Source, name: str, device: str | torch.device | None, precision: str, batch_size: int):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.towers = source.load(name, precision, self.device)
        self.prepare, self.batch_size = self.towers.prepare, batch_size
        low = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = low.get(precision.removeprefix("pure_"), torch.float32)
        self.text_cache: dict[str, Tensor] = {}

    def images(self, images: Sequence[Tensor]) -> Tensor:
        """M images (3, H, W) in [0, 1], of any sizes -> (M, D) unit embeddings on the encoder's device."""
        return torch.cat([self._encoded(part) for part in _batches(images, self.batch_size)])

    def _encoded(self, images: Sequence[Tensor]) -> Tensor:
        runs = [list(run) for _, run in groupby(images, key=lambda image: (image.shape, image.device, image.dtype))]
        prepared = torch.cat([self.prepare(torch.stack(run).to(self.device).float()) for run in runs])
        return normalize(self.towers.encode_image(prepared.to(self.dtype)).float(), dim=-1)

    def prompts(self, prompts: Sequence[str]) -> Tensor:
        """N prompts -> (N, D) unit embeddings. One that is longer than the model's context is cut by the tokenizer."""
        index = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        for part in _batches([prompt for prompt in index if prompt not in self.text_cache], self.batch_size):
            self.text_cache |= zip(part, normalize(self.towers.encode_text(part).float(), dim=-1), strict=True)
        text = torch.stack([self.text_cache[prompt] for prompt in index])
        for oldest in list(self.text_cache)[: max(0, len(self.text_cache) - MAX_CACHED_PROMPTS)]:
            del self.text_cache[oldest]
        return text[[index[prompt] for prompt in prompts]]


class EmbeddingReward(FrameReward):
    """A reward of images through their embeddings. A subclass names a checkpoint and may write `compare`.

    Its options, beside those of `rewards.per_frame` for the choice and the weights of frames:
        device: "cuda" where there is one, else "cpu".
        precision: "fp32", or open_clip's "bf16", "fp16", "pure_bf16", "pure_fp16" (without "pure_", an open_clip model
            keeps its norms in float32). Embeddings and scores are float32 always.
        batch_size: images encoded at once.
    Scores are on the device of the first clip's video.
    """

    differentiable = True

    def __init__(
        self,
        source: Source,
        name: str,
        *,
        frames: int | None,
        select: str,
        weights: str | Mapping[str, float],
        seed: int,
        device: str | torch.device | None,
        precision: str,
        batch_size: int,
    ):
        check_options(name, precision=precision, batch_size=batch_size)
        super().__init__(name, frame_plan(name, frames, select, weights, seed))
        self.encoder = Encoder(source, name, device, precision, batch_size)

    def compare(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score M images, given their unit embeddings (M, D) and M prompts: their cosine. Returns: (M,)."""
        return (image * self.encoder.prompts(prompts)).sum(-1)

    def score_frames(self, frames: Sequence[Clip]) -> Scores:
        # A caller's autocast would silently change the precision asked for, and poison the text cache.
        with torch.autocast(self.encoder.device.type, enabled=False):
            image = self.encoder.images([frame.video[0] for frame in frames])
            total = self.compare(image, [frame.prompt for frame in frames])
        return Scores(total.to(frames[0].video.device))


def check_options(
    name: str,
    *,
    frames: int | None = 8,
    select: str = "uniform",
    weights: str | Mapping[str, float] = "mean",
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int = 64,
    device: str | torch.device | None = None,
) -> None:
    """Validate what all rewards of the family take. Raises: RewardError, one line."""
    frame_plan(name, frames, select, weights, seed)
    if not isinstance(batch_size, int) or batch_size < 1:
        raise RewardError(f"reward {name}: batch_size is {batch_size!r}, expected a positive whole number")
    if precision not in PRECISIONS:
        raise RewardError(f"reward {name}: precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def _batches(items: Sequence, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
