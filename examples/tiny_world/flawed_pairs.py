"""Pairs of clips with planted flaws, encoded by the tiny world's pipeline: what a reward on its latents learns from.

    python -m examples.tiny_world.flawed_pairs --out runs/tiny_flawed/train.jsonl          # two minutes on one CPU core
    python -m examples.tiny_world.flawed_pairs --out runs/tiny_flawed/held_out.jsonl --num 512 --seed 1

Both clips of a pair are meant to show what its prompt says, each with flaws of its own: noise, blur and faded colours
(VQ), jitter and stutter (MQ), wrong attributes (TA); the one with fewer of a kind is the better one of that dimension.
The preference file names latents, in a folder beside it; no video is written, whose compression would be a flaw.

    N pairs, F frames
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import diffusers
import torch
from torch import Tensor

from alignment.data import Member, Pair, Prompt, save_latent, to_json
from samplers import Encoder

from . import world
from .flaws import LEVELS, motion_flaw, visual_flaw

DIMENSIONS = ("VQ", "MQ", "TA")
NAMED = (True, True, True, True, False)  # in the prompts: all but the speed
OPPOSITE = torch.tensor([1, 0, 3, 2, 7, 6, 5, 4])  # of world.DIRECTIONS: the way back lies in the frame, too
CALL = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 16}


def draw(num: int, generator: torch.Generator) -> tuple[list[str], Tensor, Tensor]:
    """N prompts, clips (N, 2, F, 3, H, W) and flaws (N, 2, 3) in the order of DIMENSIONS, 0 is perfect."""
    sprites = world.sample(num, generator)
    prompts = [world.describe(row, NAMED) for row in world.attributes(sprites).tolist()]
    flaws = torch.randint(LEVELS, (num, 2, 3), generator=generator)
    videos = []
    for visual, motion, wrong in (flaws[:, side].unbind(1) for side in range(2)):
        shown = misled(beside(sprites, generator), wrong, generator)
        videos.append(visual_flaw(world.render(shown, motion_flaw(shown, motion, generator)), visual, generator))
    return prompts, torch.stack(videos, 1), flaws


def beside(sprites: world.Sprites, generator: torch.Generator) -> world.Sprites:
    """Others with the same attributes: a little aside, and larger or smaller."""
    num = len(sprites.area)
    aside = 2 * torch.rand(num, 2, generator=generator) - 1
    scale = 0.95 + 0.1 * torch.rand(num, generator=generator)
    return sprites._replace(middle=sprites.middle + aside, area=sprites.area * scale)


def misled(sprites: world.Sprites, count: Tensor, generator: torch.Generator) -> world.Sprites:
    """The sprites with so many (N,) wrong ones among background, colour, shape and direction."""
    places = torch.rand(len(count), 4, generator=generator).argsort(1).argsort(1) < count[:, None]
    found = {}
    for place, (name, table) in enumerate(zip(world.Sprites._fields[:3], world.TABLES[:3], strict=True)):
        right, step = getattr(sprites, name), torch.randint(1, len(table), (len(count),), generator=generator)
        found[name] = torch.where(places[:, place], (right + step) % len(table), right)
    found["direction"] = torch.where(places[:, 3], OPPOSITE[sprites.direction], sprites.direction)
    return sprites._replace(**found)


def make(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="PAIRS.jsonl")
    parser.add_argument("--num", type=int, default=2048, help="pairs (2048)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    pipe = diffusers.DiffusionPipeline.from_pretrained(Path(__file__).parent / "base")
    pipe.set_progress_bar_config(disable=True)
    encoder = Encoder(pipe, prompt="a red circle", **CALL)
    write(options.out, options.num, encoder, torch.Generator().manual_seed(options.seed))


@torch.no_grad()
def write(path: Path, num: int, encoder: Encoder, generator: torch.Generator, batch: int = 64) -> None:
    """A preference file of N pairs, and their latents in a folder of its name."""
    folder, lines = path.with_suffix(""), []
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, num, batch):
        prompts, videos, flaws = draw(min(batch, num - start), generator)
        states = encoder(videos.flatten(0, 1)).unflatten(0, (-1, 2))
        for i, (prompt, both, (a, b)) in enumerate(zip(prompts, states, flaws, strict=True), start):
            members = []
            for side, state in zip("ab", both, strict=True):
                members.append(Member(None, folder / f"{i:05d}{side}.safetensors"))
                save_latent(members[-1].latent, state)
            labels = dict(zip(DIMENSIONS, (b - a).sign().tolist(), strict=True))
            label = int((b - a).sum().sign())
            pair = Pair(f"{path.stem}-{i}", Prompt(prompt, {}), *members, label, {}, labels, annotator="planted flaws")
            lines.append(json.dumps(to_json(pair, path.parent)))
    path.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{path}: {num} pairs", flush=True)


if __name__ == "__main__":
    make()
