"""A tiny HPSv2 that knows the tiny world, in the released form of HPSv2: {"state_dict": ...} and an architecture.

The tiny CLIP, tuned as HPSv2 is on choices between two images for a prompt (arXiv 2306.09341): the softmax of the two
scaled cosines is the probability of the choice. The better frame has no noise, blur or faded colours, or shows what the
prompt says. Frames are prepared as HPSv2 does, not as the tiny CLIP does.

    python -m examples.tiny_world.hpsv2 --out runs/tiny_world/hpsv2      # six minutes on a busy CPU core

    B pairs
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from rewards.encoders.images import CLIP_MEAN, CLIP_STD, letterbox

from . import clip as tiny_clip
from . import models, world
from .flaws import visual_flaw
from .optim import Budget, Training

WEIGHTS, ARCHITECTURE = "HPS_tiny.pt", "open_clip_config.json"
CLIP = Path(__file__).parent / "clip"


class Choices(NamedTuple):
    """Two frames for each prompt, the better one first."""

    better: Tensor  # (B, 3, H, W) in [0, 1]
    worse: Tensor
    prompts: list[str]


def draw(num: int, generator: torch.Generator) -> Choices:
    """Half of the worse frames have a visual flaw, half show something else."""
    sprites = world.sample(num, generator)
    video = world.render(sprites)
    when = torch.randint(world.FRAMES, (num,), generator=generator)
    level = torch.randint(1, 3, (num,), generator=generator)
    flawed = visual_flaw(video, level, generator)[torch.arange(num), when]
    clean = video[torch.arange(num), when]
    other = clean.roll(1, dims=0)
    is_flaw = torch.rand(num, generator=generator) < 0.5
    look = tiny_clip.look_index(sprites)
    same = look == look.roll(1)
    worse = torch.where((is_flaw | same)[:, None, None, None], flawed, other)
    is_look = [True, True, True, False, False]
    prompts = [world.describe(row, is_look) for row in world.attributes(sprites).tolist()]
    return Choices(clean, worse, prompts)


def cosines(clip: open_clip.CLIP, tokenizer, frames: Tensor, prompts: list[str]) -> Tensor:
    """(B,)."""
    image = clip.encode_image(letterbox(frames, world.SIZE, CLIP_MEAN, CLIP_STD), normalize=True)
    return (image * clip.encode_text(tiny_clip.tokenise(tokenizer, prompts), normalize=True)).sum(-1)


def train(folder: Path, budget: Budget, seed: int = 0, batch: int = 128) -> open_clip.CLIP:
    """Tune the tiny CLIP on fresh choices; a `state.pt` in `folder` is continued."""
    torch.manual_seed(seed)
    clip, tokenizer = tiny_clip.build(), models.tokenizer()
    clip.load_state_dict({k: v.float() for k, v in load_file(CLIP / "open_clip_model.safetensors").items()})
    generator = torch.Generator().manual_seed(seed)
    training = Training({"clip": clip}, [torch.optim.AdamW(clip.parameters(), lr=1e-3)], budget, folder, generator)
    while not training.done:
        choices = draw(batch, generator)
        better, worse = (cosines(clip, tokenizer, frames, choices.prompts) for frames in choices[:2])
        loss = -F.logsigmoid(clip.logit_scale.exp().clamp(max=100) * (better - worse)).mean()
        training.update(loss)
        if training.step % 50 == 0 or training.done:
            right = (better > worse).float().mean()
            print(f"hpsv2 {training.step} {training.elapsed:.0f}s loss {loss:.4f} right {right:.3f}", flush=True)
        training.save_if_due()
    return clip.eval()


@torch.no_grad()
def accuracy(clip: open_clip.CLIP, num: int = 2048, seed: int = 1234) -> float:
    """Share of fresh choices that it makes as planted."""
    choices = draw(num, torch.Generator().manual_seed(seed))
    better, worse = (cosines(clip, models.tokenizer(), frames, choices.prompts) for frames in choices[:2])
    return (better > worse).float().mean().item()


def save(folder: Path, clip: open_clip.CLIP) -> None:
    """Write the weights as HPSv2 publishes its own, in fp16, and the architecture and tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {name: t.half().contiguous() for name, t in clip.state_dict().items()}}, folder / WEIGHTS)
    (folder / ARCHITECTURE).write_text(json.dumps({"model_cfg": tiny_clip.CONFIG}, indent=2) + "\n")
    models.save_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=math.inf, help="bound on the training time (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    clip = train(args.out / "work", Budget(args.steps, 60 * args.minutes), args.seed)
    print(f"accuracy: {accuracy(clip):.3f}", flush=True)
    save(args.out / "hpsv2", clip)


if __name__ == "__main__":
    main()
