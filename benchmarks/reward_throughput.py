"""Clips a second of rewards, in this process, at several batch sizes.

    python -m benchmarks.reward_throughput [--reward [NAME=]use[:key=value,...] ...] [--size FRAMES HEIGHT WIDTH]
        [--batches 1 8] [--out result.json]
    python -m benchmarks.reward_throughput --true-size video_reward hpsv2 --size 81 480 832     # on a GPU

Without --reward: those of the tiny world on its own size of clips. --true-size makes checkpoints of the published sizes
with random weights in a temporary folder (VideoReward on Qwen2-VL-2B: 4.4 GB; HPSv2's ViT-H-14: 2 GB): their speed is
that of the published ones, their scores mean nothing. One call warms up; the figure is the median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from alignment.policy import synchronize
from alignment.versions import versions
from rewards import Reward, RewardError, load
from rewards.arguments import RewardArgument, parse_rewards

from .random_checkpoints import TRUE_SIZES

TINY = [
    "clip:path=examples/tiny_world/clip,frames=8",
    "hpsv2:path=examples/tiny_world/hpsv2/HPS_tiny.pt,model=examples/tiny_world/hpsv2/open_clip_config.json",
    "video_reward:path=examples/tiny_world/video_reward",
    "sprite_motion",
    "sprite_match",
]
TINY_SIZE = (9, 32, 32)
PROMPT = "a red circle moving left on a gray background"


def measure(rewards: dict[str, RewardArgument], size: tuple[int, int, int], batches: list[int], repeats: int) -> dict:
    """Clips a second: {"clips_per_second": {name: {batch: figure}}, ...}."""
    figures: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    for name, argument in rewards.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        reward = load(argument.use, **argument.options)
        figures[name] = {str(batch): clips_per_second(reward, batch, size, repeats) for batch in batches}
        if torch.cuda.is_available():
            memory[name] = torch.cuda.max_memory_allocated() / 2**30
        del reward
    return {"size": list(size), "repeats": repeats, "clips_per_second": figures, "peak_memory_gib": memory}


def clips_per_second(reward: Reward, batch: int, size: tuple[int, int, int], repeats: int) -> float:
    """Median over the repeats, each on other videos with the same prompts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, height, width = size
    seconds = []
    for repeat in range(repeats + 1):
        videos = torch.rand(batch, frames, 3, height, width, generator=torch.Generator().manual_seed(repeat)).to(device)
        synchronize(device)
        start = time.perf_counter()
        with torch.no_grad():
            reward(videos, [PROMPT] * batch, fps=16.0)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds[1:])


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    figures = result["clips_per_second"]
    batches = list(next(iter(figures.values())))
    width = max(map(len, figures)) + 2
    lines = [f"{'reward':{width}}" + "".join(f"{f'batch {batch}':>12}" for batch in batches) + "   clips a second"]
    lines += [f"{name:{width}}" + "".join(f"{row[batch]:12.3g}" for batch in batches) for name, row in figures.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", action="append", default=[], metavar="[NAME=]use[:key=value,...]")
    parser.add_argument("--true-size", nargs="+", choices=sorted(TRUE_SIZES), default=[])
    parser.add_argument("--size", nargs=3, type=int, default=TINY_SIZE, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rewards = parse_rewards(options.reward or ([] if options.true_size else TINY))
            for name in options.true_size:
                rewards[name] = RewardArgument(name, name, TRUE_SIZES[name](Path(folder)))
            result = measure(rewards, tuple(options.size), options.batches, options.repeats)
    except RewardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"python -m benchmarks.reward_throughput {' '.join(sys.argv[1:])}".strip()
    print(table(result))
    if options.out:
        content = {"command": command, "date": time.strftime("%Y-%m-%d"), "versions": versions(), **result}
        options.out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
