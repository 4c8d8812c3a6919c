"""Real clips of the tiny world: mp4 files and prompts.jsonl, for what learns from given videos.

python -m examples.tiny_world.clips --out runs/tiny_clips [--num 192] [--speed quickly]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from alignment.generation import write_video
from rewards.sprite import SPEEDS

from . import world

FPS = 8


def make(arguments: Sequence[str] | None = None) -> None:
    """Write the clips that the command asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--speed", choices=list(SPEEDS), help="of all sprites; default: any")
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(options.seed)
    sprites = world.sample(options.num * (2 * len(SPEEDS) if options.speed else 1), generator)
    if options.speed:
        fitting = (sprites.speed == list(SPEEDS).index(options.speed)).nonzero().flatten()[: options.num]
        sprites = world.Sprites(*(column[fitting] for column in sprites))
    # Captions leave the speed out, as the training prompts do.
    prompts = [world.describe(row, (True, True, True, True, False)) for row in world.attributes(sprites).tolist()]
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (video, prompt) in enumerate(zip(world.render(sprites), prompts, strict=True)):
        write_video(options.out / f"{i:04d}.mp4", video, FPS)
        rows.append(json.dumps({"path": f"{i:04d}.mp4", "prompt": prompt}))
    (options.out / "prompts.jsonl").write_text("\n".join([*rows, ""]), "utf-8")
    print(f"{options.num} clips in {options.out}")


if __name__ == "__main__":
    make()
