"""What a reward server and its clients say to each other: clips one way, scores the other. Nothing is unpickled.

A question is the bytes of a safetensors file. Tensor "0", "1", ... is a clip's video, uint8 (F, 3, H, W), already
reduced to the frames that the reward looks at. Its metadata holds "clips", the JSON of four lists, a value a clip:

    {"prompts": ["a red circle"], "fps": [16.0], "groups": [0], "meta": [{}]}

An answer is JSON, a value a clip; null stands for a number that is none, and is never written as NaN:

    {"total": [0.5], "dims": {"speed": [1.2]}, "dense": [[0.4, 0.6]] or null, "valid": [true]}

    F frames, H W pixels, N clips, S segments
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rewards.contract import Clip, RewardError, Scores, one_line

CLIP_KEYS = {"prompts", "fps", "groups", "meta"}
SCORE_KEYS = {"total", "dims", "dense", "valid"}
LARGEST_INTEGER = 2**53  # beyond it JSON readers round


class WireError(ValueError):
    """A question or an answer that is not of the form above."""


class Limits(NamedTuple):
    """What a server accepts in one question."""

    clips: int = 512
    frames: int = 2048  # a clip
    pixels: int = 4096 * 4096  # a frame
    prompt: int = 16384  # characters
    header: int = 8 * 2**20  # bytes of everything but frames


def quantised(video: Tensor) -> Tensor:
    """Float pixels as the nearest of 256 levels, uint8; what overshoots [0, 1] is clipped."""
    return video.detach().float().clamp(0, 1).mul_(255).round_().byte()  # clamp gives a copy to write into


def restored(clip: Clip) -> Clip:
    """A clip of uint8 levels with its pixels in [0, 1] again."""
    return replace(clip, video=clip.video.float().div_(255))


def encode_clips(clips: Sequence[Clip]) -> bytes:
    """Clips of float or uint8 pixels as a question. Raises: WireError for a meta that is no JSON."""
    videos = [clip.video if clip.video.dtype == torch.uint8 else quantised(clip.video) for clip in clips]
    said = {
        "prompts": [clip.prompt for clip in clips],
        "fps": [float(clip.fps) for clip in clips],
        "groups": [int(clip.group) for clip in clips],
        "meta": [dict(clip.meta) for clip in clips],
    }
    try:
        metadata = {"clips": json.dumps(said, allow_nan=False)}
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"a clip's meta is not JSON: {error}") from error
    return safetensors.torch.save({str(i): video.cpu().contiguous() for i, video in enumerate(videos)}, metadata)


def decode_clips(body: bytes, limits: Limits = Limits()) -> list[Clip]:  # noqa: B008 (immutable)
    """A question as clips of uint8 pixels. Raises: WireError, one line, for anything that is not of the form above."""
    said = parse_json(_metadata(body, limits.header), "metadata clips")
    if not isinstance(said, dict) or said.keys() != CLIP_KEYS:
        raise WireError(f"metadata clips: expected an object with {', '.join(sorted(CLIP_KEYS))}")
    counts = {len(values) if isinstance(values, list) else -1 for values in said.values()}
    if len(counts) != 1 or not 1 <= (num := counts.pop()) <= limits.clips:
        raise WireError(f"metadata clips: expected four lists of one length, 1 to {limits.clips}")
    videos = _videos(body, num, limits)
    rows = zip(videos, said["prompts"], said["fps"], said["groups"], said["meta"], strict=True)
    return [_clip(*row, limits) for row in rows]


def _metadata(body: bytes, most: int) -> str:
    """The text under "clips" in the metadata of a safetensors file, whose header is JSON behind its length."""
    length = int.from_bytes(body[:8], "little")
    if not 2 <= length <= min(most, len(body) - 8):
        raise WireError(f"expected the bytes of a safetensors file with a header of at most {most} bytes")
    header = parse_json(body[8 : 8 + length], "safetensors header")
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("clips"), str):
        raise WireError('safetensors header: expected metadata with a text "clips"')
    return metadata["clips"]


def _videos(body: bytes, num: int, limits: Limits) -> list[Tensor]:
    try:
        found = dict(safetensors.deserialize(body))
    except safetensors.SafetensorError as error:
        raise WireError(f"not a safetensors file: {one_line(error)}") from error
    if found.keys() != {str(index) for index in range(num)}:
        raise WireError(f"expected {num} tensors named 0 to {num - 1}, one a clip, got {len(found)} tensors")
    return [_video(found[str(index)], index, limits) for index in range(num)]


def _video(tensor: Mapping[str, Any], index: int, limits: Limits) -> Tensor:
    dtype, shape = tensor["dtype"], tensor["shape"]
    if dtype != "U8" or len(shape) != 4 or shape[1] != 3 or 0 in shape:
        raise WireError(f"tensor {index}: {dtype} {tuple(shape)}, expected U8 (F, 3, H, W)")
    if shape[0] > limits.frames or shape[2] * shape[3] > limits.pixels:
        raise WireError(f"tensor {index}: {tuple(shape)}, at most {limits.frames} frames of {limits.pixels} pixels")
    return torch.frombuffer(tensor["data"], dtype=torch.uint8).view(shape)


def _clip(video: Tensor, prompt: Any, fps: Any, group: Any, meta: Any, limits: Limits) -> Clip:
    if not isinstance(prompt, str) or len(prompt) > limits.prompt:
        raise WireError(f"prompts: expected texts of at most {limits.prompt} characters")
    if not _is_number(fps) or not 0 < fps <= 1000:
        raise WireError("fps: expected numbers above 0, at most 1000")
    if type(group) is not int or abs(group) > LARGEST_INTEGER:
        raise WireError("groups: expected integers")
    if isinstance(meta, dict) and isinstance(meta.get("reference"), str):
        raise WireError("meta: names a reference file, but the server opens no files for its clients; send pixels")
    if not isinstance(meta, dict):
        raise WireError("meta: expected objects")
    return Clip(video, prompt, float(fps), group, meta)


def check_indices(said: Any, length: int) -> list[int]:
    """Frames of a clip of `length` frames, as a reward or a server named them. Raises: WireError for what is none."""
    if not isinstance(said, list) or not said or not all(type(i) is int and 0 <= i < length for i in said):
        raise WireError(f"frames: expected indices from 0 to {length - 1}")
    return said


def encode_scores(scores: Scores) -> dict[str, Any]:
    """Scores as the object of an answer."""
    dense = scores.dense
    return {
        "total": _numbers(scores.total),
        "dims": {name: _numbers(values) for name, values in scores.dims.items()},
        "dense": None if dense is None else [_numbers(row) for row in dense],
        "valid": scores.valid.tolist(),
    }


def decode_scores(body: bytes, num: int) -> Scores:
    """An answer about `num` clips as scores on the CPU. Raises: WireError for anything not of the form above."""
    said = parse_json(body, "answer")
    if not isinstance(said, dict) or said.keys() != SCORE_KEYS or not isinstance(said["dims"], dict):
        raise WireError(f"answer: expected an object with {', '.join(sorted(SCORE_KEYS))}")
    valid, dense = said["valid"], said["dense"]
    if not isinstance(valid, list) or len(valid) != num or not all(type(value) is bool for value in valid):
        raise WireError(f"answer: valid: expected {num} booleans")
    dims = {name: _tensor(values, num, f"dims {name}") for name, values in said["dims"].items()}
    if dense is not None:
        if not isinstance(dense, list) or len(dense) != num or not all(isinstance(row, list) for row in dense):
            raise WireError(f"answer: dense: expected {num} lists")
        dense = torch.stack([_tensor(row, len(dense[0]), "dense") for row in dense])
    return Scores(_tensor(said["total"], num, "total"), dims, dense, torch.tensor(valid))


def read_error(body: bytes) -> str:
    """The line of a refusal, {"error": line}; or what was said instead, cut."""
    try:
        return one_line(parse_json(body, "error")["error"])
    except (WireError, TypeError, KeyError):
        return one_line(body[:200].decode("utf-8", "replace")) or "no reason given"


def parse_json(text: str | bytes, what: str) -> Any:
    """Strict JSON: no NaN, no number beyond a float. Raises: WireError."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise WireError(f"{what}: nested too deeply") from error
    except ValueError as error:  # also JSONDecodeError, and bytes that are no text
        raise WireError(f"{what}: not JSON: {one_line(error)}") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_INTEGER)


def _numbers(values: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _tensor(values: Any, num: int, what: str) -> Tensor:
    if not isinstance(values, list) or len(values) != num:
        raise WireError(f"answer: {what}: expected {num} numbers")
    if not all(value is None or _is_number(value) for value in values):
        raise WireError(f"answer: {what}: expected numbers or null")
    return torch.tensor([math.nan if value is None else float(value) for value in values], dtype=torch.float32)


def read_token(variable: str) -> str:
    """The token that an environment variable holds. Raises: RewardError."""
    token = os.environ.get(variable, "")
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise RewardError(f"environment variable {variable}: expected a token of printable ASCII without spaces")
    return token
