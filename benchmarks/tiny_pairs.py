"""Pairs of tiny-world videos with planted flaws, as a table in VideoAlign's layout: a benchmark of rewards for a CPU.

    python -m benchmarks.tiny_pairs --out runs/tiny_pairs [--num 256] [--seed 7]      # a minute
    python -m benchmarks.reward_accuracy --data runs/tiny_pairs/pairs.csv --reward sprite_match --reward ...

What is planted is known: the video with fewer flaws of a kind is better in VQ, MQ or TA, the one with fewer in all is
better overall, and as many is a tie. Videos are compressed (H.264), which costs a reward that looks at noise a little.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

FPS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=256, help="pairs (256)")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(arguments)

    import torch

    from alignment.generation import write_video
    from examples.tiny_world.flawed_pairs import DIMENSIONS, draw

    prompts, videos, flaws = draw(options.num, torch.Generator().manual_seed(options.seed))
    (options.out / "videos").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (prompt, both, counts) in enumerate(zip(prompts, videos, flaws, strict=True)):
        names = [f"videos/{i:04d}_{side}.mp4" for side in "AB"]
        for name, video in zip(names, both, strict=True):
            write_video(options.out / name, video, FPS)
        gaps = [*(counts[1] - counts[0]).tolist(), int(counts[1].sum() - counts[0].sum())]
        labels = {dim: word(gap) for dim, gap in zip((*DIMENSIONS, "Overall"), gaps, strict=True)}
        rows.append({"path_A": names[0], "path_B": names[1], "prompt": prompt, **labels, "fps_A": FPS, "fps_B": FPS})
    with (options.out / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    print(f"{options.num} pairs in {options.out / 'pairs.csv'}")
    return 0


def word(gap: int) -> str:
    """Of how many more flaws the second has than the first."""
    return "A" if gap > 0 else "B" if gap < 0 else "same"


if __name__ == "__main__":
    sys.exit(main())
