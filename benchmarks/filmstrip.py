"""A picture of a run: frames of its held-out videos before and after training, one prompt a row.

python -m benchmarks.filmstrip RUN_FOLDER OUT.png [--rows 3] [--frames 5]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, GAP, TITLE = 96, 6, 26  # pixels


def filmstrip(run: Path, rows: int, frames: int) -> Image.Image:
    """Before on the left, after on the right; the prompt and its reward above each strip."""
    folders = sorted(path.parent for path in (run / "samples").glob("*/scores.json"))
    if len(folders) < 2:
        raise ValueError(f"{run} has no evaluations before and after training")
    sides = [_read(folder, rows, frames) for folder in (folders[0], folders[-1])]
    strip = frames * (SIDE + GAP) + 4 * GAP
    picture = Image.new("RGB", (2 * strip, rows * (SIDE + TITLE + GAP)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for column, (prompts, rewards, videos) in enumerate(sides):
        for row, video in enumerate(videos):
            x, y = column * strip + GAP, row * (SIDE + TITLE + GAP)
            title = f"{prompts[row]}: {rewards[row]:.2f}" if column == 0 else f"after training: {rewards[row]:.2f}"
            draw.text((x, y + 5), title, "black", font)
            for i, frame in enumerate(video):
                tile = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.NEAREST)
                picture.paste(tile, (x + i * (SIDE + GAP), y + TITLE))
    return picture


def _read(folder: Path, rows: int, frames: int) -> tuple[list[str], list[float], list[np.ndarray]]:
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    videos = []
    for name in scores["videos"][:rows]:
        video = iio.imread(folder / name)
        videos.append(video[np.linspace(0, len(video) - 1, frames).round().astype(int)])
    return scores["prompts"], scores["values"]["reward/mean"], videos


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--frames", type=int, default=5)
    options = parser.parse_args()
    try:
        filmstrip(options.run, options.rows, options.frames).save(options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
