"""Pairs of videos with planted flaws: what a reward model of the tiny world is trained on and judged by.

    python -m examples.tiny_world.flawed_videos --out runs/tiny_flawed_videos/train.jsonl      # 2 minutes on one core
    python -m examples.tiny_world.flawed_videos --out runs/tiny_flawed_videos/held_out.jsonl --close --num 288 --seed 1

Both clips of a pair are meant to show what its prompt says, each with flaws of its own: noise, blur and faded colours
(VQ), jitter and stutter (MQ), attributes that are not the prompt's (TA); the one with fewer of a kind is the better one
of that dimension. Close pairs are one small flaw apart, and alike otherwise.

    N pairs, F frames
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from alignment.data import Member, Pair, Prompt, to_json
from alignment.generation import whole, write_video

from . import world
from .flaws import LEVELS, motion_flaw, visual_flaw

DIMENSIONS = ("VQ", "MQ", "TA")
FPS = 8
POOL = 16384  # sprites that clips are picked from


class Drawn(NamedTuple):
    """N pairs."""

    prompts: list[str]
    videos: Tensor  # (N, 2, F, 3, H, W)
    flaws: Tensor  # (N, 2, 3) in the order of DIMENSIONS; 0 is perfect


def draw(num: int, pool: world.Sprites, generator: torch.Generator) -> Drawn:
    """Pairs of clips with flaws of every kind and level, each drawn by itself."""
    rows = world.attributes(world.sample(num, generator))
    flaws = torch.randint(LEVELS, (num, 2, 3), generator=generator)
    videos = []
    for visual, motion, wrong in (flaws[:, side].unbind(1) for side in range(2)):
        sprites = showing(misled(rows, wrong, generator), pool, generator)
        videos.append(visual_flaw(world.render(sprites, motion_flaw(sprites, motion, generator)), visual, generator))
    return Drawn([world.describe(row) for row in rows.tolist()], torch.stack(videos, 1), flaws)


def draw_close(num: int, pool: world.Sprites, generator: torch.Generator) -> Drawn:
    """Pairs of which one clip is perfect and the other differs by one small flaw: of VQ, MQ, TA in turn."""
    rows = world.attributes(world.sample(num, generator))
    sprites, one = showing(rows, pool, generator), torch.ones(num, dtype=torch.long)
    clean = world.render(sprites)
    misshown = showing(misled(rows, one, generator), pool, generator)
    worse = [visual_flaw(clean, one, generator), world.render(sprites, motion_flaw(sprites, one, generator))]
    worse.append(world.render(misshown))
    kind = torch.arange(num) % len(DIMENSIONS)
    better_first = torch.rand(num, generator=generator) < 0.5
    videos = torch.stack([clean, torch.stack(worse)[kind, torch.arange(num)]], 1)
    flaws = torch.stack([torch.zeros(num, 3), torch.eye(3)[kind]], 1)
    flip = torch.where(better_first[:, None], torch.tensor([0, 1]), torch.tensor([1, 0]))
    at = torch.arange(num)[:, None]
    return Drawn([world.describe(row) for row in rows.tolist()], videos[at, flip], flaws[at, flip])


def misled(rows: Tensor, count: Tensor, generator: torch.Generator) -> Tensor:
    """Rows (N, 5) of `world.attributes` with so many (N,) wrong ones."""
    sizes = torch.tensor([len(table) for table in world.TABLES])
    chosen = torch.rand(rows.shape, generator=generator).argsort(1).argsort(1) < count[:, None]
    step = 1 + (torch.rand(rows.shape, generator=generator) * (sizes - 1)).long()
    return torch.where(chosen, (rows + step) % sizes, rows)


def showing(rows: Tensor, pool: world.Sprites, generator: torch.Generator) -> world.Sprites:
    """Sprites with these attributes (N, 5): each moves as one of the pool does, of the same shape."""
    of_pool = world.attributes(pool)[:, 2:]
    same = (of_pool[None] == rows[:, None, 2:]).all(-1)  # (N, pool)
    chosen = torch.multinomial(same.float(), 1, generator=generator).squeeze(1)
    sprites = world.Sprites(*(column[chosen] for column in pool))
    return sprites._replace(background=rows[:, 0], colour=rows[:, 1])


def write(path: Path, num: int, pairs: Callable[[int], Drawn], batch: int = 64) -> None:
    """A preference file of N pairs, and their videos in a folder of its name."""
    folder, lines = path.with_suffix(""), []
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as threads:
        for start in range(0, num, batch):
            drawn = pairs(min(batch, num - start))
            names = [[folder / f"{start + i:05d}{side}.mp4" for side in "ab"] for i in range(len(drawn.prompts))]
            jobs = zip((n for pair in names for n in pair), drawn.videos.flatten(0, 1), strict=True)
            list(threads.map(lambda job: write_video(*job, FPS), jobs))
            for i, (prompt, (a, b), flaws) in enumerate(zip(drawn.prompts, names, drawn.flaws, strict=True)):
                labels = dict(zip(DIMENSIONS, (flaws[1] - flaws[0]).sign().int().tolist(), strict=True))
                scores = {name: tuple(-float(x) for x in flaws[:, k]) for k, name in enumerate(DIMENSIONS)}
                members = Member(a, None), Member(b, None)
                pair = Pair(f"{path.stem}-{start + i}", Prompt(prompt, {}), *members, None, scores, labels)
                lines.append(json.dumps(to_json(pair._replace(annotator="planted flaws"), path.parent)))
    whole(path, lambda new: new.write_text("\n".join(lines) + "\n", "utf-8"))
    print(f"{path}: {num} pairs", flush=True)


def make(arguments: list[str] | None = None) -> None:
    """Write the pairs that the command asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--num", type=int, default=640, help="pairs (640)")
    parser.add_argument("--close", action="store_true", help="pairs that are one small flaw apart")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(options.seed)
    pool = world.sample(POOL, generator)
    pairs = draw_close if options.close else draw
    write(options.out, options.num, lambda num: pairs(num, pool, generator))


if __name__ == "__main__":
    make()
