"""Score video files with any reward.

python examples/score_clips.py clips/ --reward sprite_motion --prompt "a red circle moving left"
python examples/score_clips.py a.mp4 --reward examples/my_reward.py:calm limit=0.05
python examples/score_clips.py a.mp4 --reward clip path=checkpoints/my_clip frames=4
"""

import argparse
import sys
from pathlib import Path

import imageio.v3 as iio
import torch
from omegaconf import OmegaConf

from rewards import Clip, RewardError, load

SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")


def read_clip(path: Path, prompt: str) -> Clip:
    frames = torch.from_numpy(iio.imread(path, plugin="FFMPEG"))  # (F, H, W, 3) bytes
    fps = iio.immeta(path, plugin="FFMPEG")["fps"]
    return Clip(frames.permute(0, 3, 1, 2).float() / 255, prompt, fps=fps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a video file, or a folder of them")
    parser.add_argument("--reward", required=True, help="a known name, package.module:callable or file.py:callable")
    parser.add_argument("--prompt", help="what the clips should show (default: each file's name)")
    parser.add_argument("options", nargs="*", metavar="name=value", help="options of the reward")
    args = parser.parse_intermixed_args()
    paths = sorted(p for p in args.path.iterdir() if p.suffix in SUFFIXES) if args.path.is_dir() else [args.path]
    if not paths or not paths[0].is_file():
        sys.exit(f"no video at {args.path} (a file, or a folder with {', '.join(SUFFIXES)})")
    try:
        reward = load(args.reward, **OmegaConf.to_container(OmegaConf.from_dotlist(args.options)))
        for path in paths:
            clip = read_clip(path, args.prompt or path.stem.replace("_", " "))
            scores = reward([clip])
            dims = "".join(f"  {name} {values.item():.4f}" for name, values in scores.dims.items())
            print(f"{path}  {reward.name} {scores.total.item():.4f}{dims}")
    except RewardError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
