"""From a folder of videos to a LoRA: pairs, labels, DenseDPO, and the tuned model in plain diffusers.

    python examples/preferences_from_videos.py [--videos FOLDER] [--out runs/preferences] [--pairs 2] [--iterations 60]

FOLDER holds mp4 files and prompts.jsonl, a line {"path": "a.mp4", "prompt": "..."} for each. Without one the script
makes clips of the tiny world, 192 sprites that move at any speed. What it teaches is to move fast: labels come from a
reward that measures speed and direction on the pixels. With videos and a model of your own, change RECIPE and REWARD.

Each step is a command that you can run yourself; the script prints it, runs it and says what it is for. What is there
already is not made again, so an interrupted run goes on where it was. Two CPU cores, some five minutes.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import torch

RECIPE = "recipes/tiny_dense_dpo.yaml"
REWARD = "sprite_motion"
PROMPT = "a red circle moving left on a white background"


def step(words: str, *command: str) -> None:
    """Say what a command is for, show it, and run it."""
    print(f"\n== {words}\n   python -m {shlex.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="a folder of videos with prompts.jsonl; default: tiny clips")
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"))
    parser.add_argument("--pairs", type=int, default=2, help="pairs that are made from each video")
    parser.add_argument("--iterations", type=int, default=60)
    options = parser.parse_args()
    clips, guided, run = options.videos or options.out / "clips", options.out / "guided", options.out / "run"

    if not clips.exists():
        step("Real videos: sprites of the tiny world.", "examples.tiny_world.clips", "--out", str(clips))
    step(
        "Pairs: each video is noised and denoised twice, so that both of a pair move like it and differ in detail.",
        *("alignment.generate", RECIPE, f"data.preferences={clips}"),
        *("--guided", str(clips), "--pairs", str(options.pairs), "--out", str(guided)),
    )
    step(
        "Labels: a reward says for each half second which of the two is better, and a table says whether to trust it.",
        *("alignment.annotate", f"{guided}/index.jsonl", "--reward", REWARD, "--segments", "0.5"),
        *("--out", f"{guided}/pairs.jsonl"),
    )
    if not (run / "lora").exists():
        step(
            "DenseDPO: the better half seconds become likelier than under the base model, the worse ones less likely.",
            *("alignment.run", RECIPE, f"data.preferences={guided}/pairs.jsonl", f"output={run}"),
            f"iterations={options.iterations}",
        )
    print(f"\n== The tuned model is an ordinary LoRA; {run}/report.html says what became better and what did not.")
    watch(run / "lora", options.out)


def watch(lora: Path, out: Path) -> None:
    """The same noise before and after, from plain diffusers."""
    import imageio.v3 as iio
    from diffusers import DiffusionPipeline

    from alignment.config import load_recipe

    recipe = load_recipe(RECIPE, ["data.preferences=unused.jsonl"])
    pipe = DiffusionPipeline.from_pretrained(recipe.model.path)
    pipe.set_progress_bar_config(disable=True)
    for name in ("before", "after"):
        if name == "after":
            pipe.load_lora_weights(lora)
        call = {**recipe.call, "num_inference_steps": recipe.sampler.steps, "output_type": "np"}
        video = pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(0), **call).frames[0]
        path = out / f"{name}.mp4"
        frames = (video * 255).round().astype("uint8").repeat(8, axis=1).repeat(8, axis=2)
        iio.imwrite(path, frames, fps=recipe.fps, codec="libx264")
        print(f"   {name}: {path}")


if __name__ == "__main__":
    main()
