"""Measure a pipeline folder with the pixel oracle, and print a table.

python -m examples.tiny_world.evaluate examples/tiny_world/base --steps 8 30 --guidance 1 3
python -m examples.tiny_world.evaluate examples/tiny_world/base --prompts examples/tiny_world/prompts/heldout.txt
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import open_clip
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rewards.contract import Clip
from rewards.sprite import match_readings, measure, read_words, sprite_motion, sprite_smoothness

from . import clip as tiny_clip
from . import world

COLUMNS = ("valid", "shape", "colour", "background", "motion", "speed", "all", "area", "px/frame", "reward", "smooth")


def load(folder: str | Path, device: str = "cpu") -> DiffusionPipeline:
    """The pipeline in fp32, silent."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: DiffusionPipeline, prompts: list[str], seed: int = 0, batch: int = 64, **settings) -> Tensor:
    """Clips (N, F, 3, H, W) in [0, 1]; the noise depends on the seed and the number of prompts only."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), pipe.transformer.config.in_channels, world.FRAMES // 2 + 1, world.SIZE // 4, world.SIZE // 4)
    noise = torch.randn(shape, generator=generator)
    clips = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        made = pipe(
            prompt=prompts[part],
            latents=noise[part],
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            output_type="pt",
            **settings,
        )
        clips.append(made.frames.float().cpu())
    return torch.cat(clips)


def judge(videos: Tensor, prompts: list[str]) -> dict[str, float]:
    """Means over clips (N, F, 3, H, W); an attribute counts only where a prompt names it and the sprite is valid.

    `reward` is sprite_motion's, without its guard, and counts an invalid clip as 0.
    """
    seen = measure(videos)
    readings = match_readings(seen, read_words(prompts))
    valid = seen.valid
    row = {"valid": valid.float().mean().item()}
    row |= {name: (hit * valid).nanmean().item() for name, hit in readings.items()}
    right = torch.stack(list(readings.values())).nan_to_num(1.0).amin(0) * valid
    clips = [Clip(video, prompt) for video, prompt in zip(videos, prompts, strict=True)]
    row |= {"all": right.mean().item(), "area": seen.area[valid].mean().item()}
    row |= {"px/frame": seen.speed[valid].mean().item()}
    row |= {"reward": sprite_motion(area=None)(clips).total.mean().item()}
    return row | {"smooth": sprite_smoothness()(clips).total.mean().item()}


@torch.no_grad()
def judge_vae(vae, num: int = 192, seed: int = 77) -> dict[str, float]:
    """The same means on reconstructions of fresh clips, and `psnr` in dB."""
    sprites = world.sample(num, torch.Generator().manual_seed(seed))
    videos = world.render(sprites)
    latents = vae.encode(2 * videos.transpose(1, 2) - 1).latent_dist.mean
    made = (vae.decode(latents).sample.transpose(1, 2) + 1) / 2
    psnr = -10 * (made - videos).square().mean().log10().item()
    return judge(made, world.captions(sprites)) | {"psnr": psnr}


def judge_clip(folder: Path, num: int = 2048) -> dict[str, float]:
    """Share of fresh frames whose attributes the CLIP in a folder gets right, among captions of all 72 looks."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return tiny_clip.accuracy(model.eval(), open_clip.get_tokenizer(f"local-dir:{folder}"), num)


def full_captions(num: int, seed: int = 4321) -> list[str]:
    """Captions of fresh clips, with all their words."""
    return world.captions(world.sample(num, torch.Generator().manual_seed(seed)))


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table: setting -> column -> mean."""
    lines = ["| setting | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row.get(c, float('nan')):.{1 if c == 'area' else 3}f}" for c in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells).replace("nan", "-") + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a pipeline folder")
    parser.add_argument("--prompts", type=Path, help="one prompt a line; by default captions of fresh clips")
    parser.add_argument("--num", type=int, help="how many prompts (default: all of the file, or 128 captions)")
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0])
    parser.add_argument("--length", type=int, nargs="+", default=[512], help="max_sequence_length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", action="store_true", help="measure the autoencoder, too")
    parser.add_argument("--clip", type=Path, help="a CLIP folder, whose accuracy on 2048 fresh frames is measured, too")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.clip:
        print("CLIP top-1:", judge_clip(args.clip))
    prompts = args.prompts.read_text().splitlines()[: args.num] if args.prompts else full_captions(args.num or 128)
    pipe = load(args.folder, args.device)
    rows = {}
    if args.vae:
        rows["autoencoder"] = judge_vae(pipe.vae)
        print(f"autoencoder PSNR {rows['autoencoder']['psnr']:.1f} dB")
    for steps, guidance, length in itertools.product(args.steps, args.guidance, args.length):
        settings = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": length}
        videos = generate(pipe, prompts, args.seed, **settings)
        rows[f"{steps} steps, guidance {guidance:g}, length {length}"] = judge(videos, prompts)
    print(f"{len(prompts)} prompts, {type(pipe.scheduler).__name__}")
    print(table(rows))


if __name__ == "__main__":
    main()
