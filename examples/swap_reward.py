"""Swap the reward, both ways: our rewards in a script of yours, and a function of yours in a recipe of ours.

    python examples/swap_reward.py [--num 8] [--out runs/swap_reward] [iterations=24]

First a plain diffusers pipeline samples clips of one prompt, two known rewards score them, and the best one is kept.
Then `light`, the function below, trains the same pipeline: what names it in the recipe is its file.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLD = ROOT / "examples" / "tiny_world"
SIZE = {"height": 32, "width": 32, "num_frames": 9}


def light(videos, prompts):
    """A reward of one's own: N numbers for videos (N, F, 3, H, W) in [0, 1] and their prompts. Here: brightness."""
    return videos.mean(dim=(1, 2, 3, 4))


def best_of(num: int, prompt: str, out: Path) -> None:
    """Our rewards in your code: no trainer, no configuration, a callable."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import export_to_video

    import rewards

    pipe = DiffusionPipeline.from_pretrained(WORLD / "base")
    noise = torch.Generator().manual_seed(0)
    sampled = pipe([prompt] * num, **SIZE, num_inference_steps=8, guidance_scale=1.0, generator=noise, output_type="pt")
    videos = sampled.frames  # (N, F, 3, H, W) in [0, 1]

    motion = rewards.load("sprite_motion")  # `python -m rewards.list` shows what there is
    clip = rewards.load("clip", path=str(WORLD / "clip"))
    prompts = [prompt] * num
    chosen, watched = motion(videos, prompts, fps=8), clip(videos, prompts, fps=8)

    print(f"{num} clips of {prompt!r}")
    print("clip   motion     clip   speed")
    for row in range(num):
        numbers = (chosen.total[row], watched.total[row], chosen.dims["speed"][row])
        print(f"{row:4d} " + " ".join(f"{number:8.3f}" for number in numbers))
    best = int(chosen.total.nan_to_num(-torch.inf).argmax())  # a clip that could not be scored is NaN
    print(f"best of {num}: clip {best}, motion {chosen.total[best]:.3f} (mean {chosen.total.nanmean():.3f})")
    frames = videos[best].float().permute(0, 2, 3, 1).cpu().numpy()
    print(f"wrote {export_to_video(list(frames), str(out / 'best.mp4'), fps=8)}")


def train_on_light(overrides: list[str], out: Path) -> int:
    """Your reward in our recipe: `file.py:function`, with a weight; those of weight 0 are watched, not trained on."""
    mine = ["rewards.light.use=examples/swap_reward.py:light", "rewards.light.weight=1", "rewards.motion.weight=0"]
    command = ["-m", "alignment.run", "recipes/tiny_grpo.yaml", *mine, *overrides, f"output={out / 'run'}"]
    print("\npython " + " ".join(command), flush=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT).returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "overrides", nargs="*", default=["iterations=2"], help="key=value for the recipe (iterations=2)"
    )
    parser.add_argument("--prompt", default="a red circle moving left on a black background")
    parser.add_argument("--num", type=int, default=8, help="clips of which the best is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "swap_reward")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    best_of(options.num, options.prompt, out)
    sys.exit(train_on_light(options.overrides, out))
