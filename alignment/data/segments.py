"""Segments of equal duration that a clip is judged in, and the latent frames that each of them is made of.

A clip of n frames lasts (n - 1) / fps seconds: the frame at its very end opens no segment. A causal VAE of temporal
factor r makes latent 0 of the first frame and latent j of the r frames up to frame r j; a latent belongs to the segment
that the centre of its frames lies in.

Source: DenseDPO (arXiv 2506.03517) judges segments of a second and gives a segment's label to all of its latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

ROUNDING = 1e-9  # 0.29 seconds at 100 fps are 28.999999999999996 frames


def num_segments(frames: int, fps: float, seconds: float) -> int:
    """How many segments a clip has; the last may be shorter than the others.

    Args:
        frames: of the clip, >= 1.
        fps: of the clip.
        seconds: duration of a segment.
    Raises: ValueError where a segment would be shorter than a frame.
    """
    return max(math.ceil((frames - 1) / _length(fps, seconds) - ROUNDING), 1)


def segment_bounds(frames: int, fps: float, seconds: float) -> list[tuple[int, int]]:
    """(start, stop) of each segment's frames, stop excluded; together they are the clip. See `num_segments`."""
    length = _length(fps, seconds)
    starts = [math.ceil(i * length - ROUNDING) for i in range(num_segments(frames, fps, seconds))]
    return list(zip(starts, [*starts[1:], frames], strict=True))


def segment_of_latent_frames(frames: int, latent_frames: int, fps: float, seconds: float) -> list[int]:
    """The segment of each latent frame of a causal VAE.

    Args:
        frames, fps, seconds: see `num_segments`.
        latent_frames: (frames - 1) / r + 1 with the VAE's temporal factor r.
    Raises: ValueError where no r fits, or a segment would be shorter than a latent frame.
    """
    length, last = _length(fps, seconds), num_segments(frames, fps, seconds) - 1
    factor, rest = divmod(frames - 1, max(latent_frames - 1, 1))
    if rest or (factor == 0) != (latent_frames == 1):
        raise ValueError(f"{frames} frames do not make {latent_frames} latent frames in a causal VAE")
    if length < factor - ROUNDING:
        raise ValueError(f"segments of {seconds} s at {fps} fps are shorter than a latent frame, {factor} frames")
    centres = [0.0, *(factor * j - (factor - 1) / 2 for j in range(1, latent_frames))]
    return [min(math.floor(centre / length + ROUNDING), last) for centre in centres]


def frame_labels(
    segment_labels: Sequence[int], frames: int, latent_frames: int, fps: float, seconds: float
) -> list[int]:
    """The label of each latent frame, that of its segment.

    Raises: ValueError where the labels are not as many as the segments; see `segment_of_latent_frames`.
    """
    expected = num_segments(frames, fps, seconds)
    if len(segment_labels) != expected:
        raise ValueError(
            f"{len(segment_labels)} labels for the {expected} segments of {seconds} s in {frames} frames at {fps} fps"
        )
    return [segment_labels[i] for i in segment_of_latent_frames(frames, latent_frames, fps, seconds)]


def _length(fps: float, seconds: float) -> float:
    """Frames of a segment, no whole number in general."""
    if fps * seconds < 1 - ROUNDING:
        raise ValueError(f"segments of {seconds} s at {fps} fps are shorter than a frame")
    return fps * seconds
