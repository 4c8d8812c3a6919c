"""Make the tiny world's models from nothing: autoencoder, transformer with its text encoder, CLIP.

    OMP_NUM_THREADS=1 python -m examples.tiny_world.pretrain --out runs/tiny_world

Hardware: one CPU core, about 25 minutes. Run again with the same --out, it continues where
it was stopped. Result: <out>/base (an early checkpoint, with room for alignment), <out>/final (the last one), and
<out>/clip. README.md has their quality.
"""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import clip as tiny_clip
from . import models, vae, world
from . import transformer as denoiser
from .evaluate import judge_clip, judge_vae
from .optim import Budget


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    vae_steps: int = 1700
    clips: int = 16384  # cached latents
    transformer_steps: int = 1800
    base_step: int = 900  # the early checkpoint that becomes `base`
    clip_steps: int = 600
    minutes: float = math.inf  # for all three trainings; they end early where it does not suffice
    seed: int = 0
    save_every: float = 60.0  # seconds between two training states

    def budget(self, steps: int, share: float) -> Budget:
        return Budget(steps, 60 * self.minutes * share, self.save_every)


def run(out: Path, plan: Plan = Plan(), device: str = "cpu") -> None:
    """Do what is left of the plan and write the folders."""
    work = out / "work"
    autoencoder = vae.train(work / "vae", plan.budget(plan.vae_steps, 0.2), plan.seed, device=device)
    latents, sprites = cached_latents(work / "latents.safetensors", autoencoder, plan)
    vae.set_latent_scale(autoencoder, latents)
    print("autoencoder:", {name: round(value, 3) for name, value in judge_vae(autoencoder, 64).items()}, flush=True)

    normalised = vae.normalised(autoencoder, latents)
    budget = plan.budget(plan.transformer_steps, 0.6)
    steps = {plan.base_step}
    last = denoiser.train(work / "transformer", normalised, sprites, budget, steps, plan.seed, device=device)
    for name, step in (("base", min(plan.base_step, last)), ("final", last)):
        snapshot = denoiser.read_snapshot(work / "transformer" / f"step_{step}.safetensors")
        models.save_pipeline(out / name, autoencoder, *snapshot)

    seeing = tiny_clip.train(work / "clip", plan.budget(plan.clip_steps, 0.2), plan.seed, device=device)
    tiny_clip.save(out / "clip", seeing)
    print("clip:", judge_clip(out / "clip", 512), flush=True)


def cached_latents(path: Path, autoencoder, plan: Plan) -> tuple[Tensor, world.Sprites]:
    """Latents of fresh clips and what they show, computed once."""
    if not path.exists():
        latents, sprites = vae.latents_of(autoencoder, plan.clips, plan.seed + 1)
        aside = path.with_suffix(".aside")
        save_file({"latents": latents.contiguous(), **{k: v.contiguous() for k, v in sprites._asdict().items()}}, aside)
        os.replace(aside, path)
    tensors = load_file(path)
    return tensors.pop("latents"), world.Sprites(**tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf, help="bound on the training time (default: none)")
    parser.add_argument("--base-step", type=int, default=Plan.base_step, help="which checkpoint becomes `base`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    run(args.out, Plan(base_step=args.base_step, minutes=args.minutes, seed=args.seed), args.device)


if __name__ == "__main__":
    main()
