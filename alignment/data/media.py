"""Whether the files behind preferences can be read: before training, not in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rewards.contract import RewardError
from rewards.video_files import read_video

from ..errors import Problems
from .preferences import Group, Pair

DTYPES = ("F32", "BF16")


def check_media(records: Sequence[Pair | Group], key: str = "data.preferences", deep: bool = False) -> None:
    """Open every video and every latent file, once.

    Args:
        records: as read from one file.
        key: what the lines are of; best with the file's name, "data.preferences: pairs.jsonl".
        deep: decode the videos whole, not their first frame alone, and compare their length with `frames`. It takes as
            long as encoding them does without the encoder; files cut short after the first frames show only so.
    Raises: Problems, one line a file: videos that cannot be opened, latent files that are cut short, lack "state", hold
        another type than float32 or bfloat16, or differ in shape within a pair.
    """
    first: dict[Path, Pair | Group] = {}  # where a file is mentioned first
    for record in records:
        for member in record.members:
            for path in filter(None, member[:2]):
                first.setdefault(path, record)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is ffmpeg's
        found = dict(zip(first, pool.map(lambda path: _problem(path, first[path], deep), first), strict=True))
    problems = [(first[path], problem) for path, problem in found.items() if problem]
    problems += [(r, problem) for r in records if isinstance(r, Pair) and (problem := _unlike(r, found))]
    problems.sort(key=lambda pair: pair[0].line)
    if problems:
        raise Problems([f"{key} line {record.line}: {problem}" for record, problem in problems])


def _problem(path: Path, record: Pair | Group, deep: bool) -> str | None:
    if path.suffix.lower() == ".safetensors":
        return _latent_problem(path)
    try:
        video, _ = read_video(path, fps=1, max_frames=None if deep else 1)  # the rate does not matter here
    except RewardError as error:
        return str(error)
    expected = record.frames if deep and isinstance(record, Pair) else None
    if expected in (None, len(video)):
        return None
    return f'{path} has {len(video)} frames, "frames" says {expected}; mend it, or leave it out'


def _latent_problem(path: Path) -> str | None:
    """What is wrong with the header, which also tells the size that the file should have."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            tensors = {name: file.get_slice(name) for name in names & {"state", "noise"}}
            shapes = {name: tensor.get_shape() for name, tensor in tensors.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in tensors.items()}
    except (OSError, SafetensorError) as error:
        return f"{path}: not a safetensors file, or cut short: {error} (encode it again)"
    if "state" not in names:
        return f'{path} has no tensor "state" but {", ".join(sorted(names)) or "none at all"}; encode it again'
    if wrong := [name for name, dtype in dtypes.items() if dtype not in DTYPES]:
        return f'{path}: "{wrong[0]}" is {dtypes[wrong[0]]}; it should be float32 or bfloat16'
    if shapes.get("noise", shapes["state"]) != shapes["state"]:
        return f'{path}: "noise" has shape {shapes["noise"]}, "state" {shapes["state"]}; encode it again'
    return None


def _unlike(pair: Pair, found: dict[Path, str | None]) -> str | None:
    """Latents that cannot be compared, of those that can be read."""
    paths = [member.latent for member in pair.members if member.latent and not found[member.latent]]
    shapes = []
    for path in paths:
        with safe_open(path, "pt") as file:
            shapes.append(file.get_slice("state").get_shape())
    if len(shapes) < 2 or shapes[0] == shapes[1]:
        return None
    return f"the latents of a and b have shapes {shapes[0]} and {shapes[1]}; a pair needs the same"
