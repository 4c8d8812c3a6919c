"""A run folder as a healthy GRPO run on the tiny world leaves it, made in a second."""

import json
import math
import random

import imageio.v3 as iio
import numpy as np

CONFIG = """\
name: tiny-motion
seed: 0
iterations: 24
model:
  path: examples/tiny_world/model
rewards:
  motion: {use: sprite_motion, weight: 1.0}
  shape: {use: sprite_shape, weight: 0.0}
algorithm:
  name: dance_grpo
  clip: 0.001
  group_size: 8
optimizer:
  lr: 0.001
  max_grad_norm: 1.0
versions:
  reelign: 0.1.0
  torch: 2.9.0
  device: cpu
"""


def make_metrics(num: int) -> list[dict]:
    """Lines as a healthy GRPO run on the tiny world logs them."""
    draw = random.Random(0)
    lines = []
    for i in range(1, num + 1):
        p = i / num
        reward = 0.53 + 0.27 * (1 - math.exp(-3 * p)) + draw.gauss(0, 0.02)
        typical = {"rollout": 1.1, "decode": 0.2, "reward": 0.15, "update": 1.5}
        phases = {name: seconds * draw.uniform(0.9, 1.2) for name, seconds in typical.items()}
        share = draw.uniform(0.4, 0.6)
        lines.append(
            {
                "iteration": i,
                "reward/mean": reward,
                "reward/std": 0.2 - 0.08 * p,
                "reward/motion": reward,
                "reward/motion/valid": 1.0,
                "reward/motion/area": 110 + 4 * p,
                "reward/shape": 1.0 - draw.uniform(0, 0.02),
                "advantage/std": 0.98,
                "ratio/mean": 1.0,
                "ratio/max_deviation": draw.uniform(1e-4, 8e-4),
                "ratio/first_deviation": 0.0,
                "clip_fraction": draw.uniform(0.02, 0.12),
                "clip_fraction/before_update": 0.0,
                "kl": None,
                "loss": draw.gauss(0, 0.01),
                "grad_norm": draw.uniform(0.2, 0.6),
                "lr": 1e-3 * min(1, 2 - 2 * p),
                "nfe": 384,
                **{f"time/{name}": seconds for name, seconds in phases.items()},
                "time/iteration": sum(phases.values()) + 0.1,
                "samples_per_second": 48 / sum(phases.values()),
                "groups/zero_spread": 0.0,
                "reward/invalid": 0,
                "gradient_share/step_0": share,
                "gradient_share/step_1": 1 - share,
                "image/edge_density": 0.11 + draw.gauss(0, 0.003),
                "image/colour_entropy": 1.9 + draw.gauss(0, 0.03),
                "image/brightness": 0.41 + draw.gauss(0, 0.01),
                "image/motion": 0.03 * (1 + 0.2 * p) + draw.gauss(0, 0.0005),
                "drift/weights": 0.2 * p,
            }
        )
    return lines


def make_scores(iteration: int, gain: float, prompts: list[str], videos: int) -> dict:
    draw = random.Random(1)
    noise = random.Random(iteration)
    num = len(prompts)
    motion = [min(1.0, max(0.01, draw.gauss(0.53, 0.18) + gain + noise.gauss(0, 0.08))) for _ in range(num)]
    return {
        "iteration": iteration,
        "prompts": prompts,
        "seeds": list(range(num)),
        "values": {
            "reward/mean": motion,
            "reward/motion": motion,
            "reward/motion/valid": [1.0] * num,
            "reward/motion/area": [110 + 10 * gain + noise.gauss(0, 6) for _ in range(num)],
            "reward/motion/speed": [0.94 + 1.6 * gain + noise.gauss(0, 0.1) for _ in range(num)],
            "reward/shape": [1.0 - 0.1 * (noise.random() < 0.05) for _ in range(num)],
            "image/brightness": [0.4 + noise.gauss(0, 0.02) for _ in range(num)],
        },
        "trained": {"motion": 1.0},
        "held_out": ["shape"],
        "videos": [f"{i:02d}.mp4" for i in range(videos)],
    }


def make_clip(path, speed: float, colour) -> None:
    frames = np.full((9, 32, 32, 3), 128, np.uint8)
    y, x = np.mgrid[:32, :32]
    for t in range(9):
        frames[t][(x - 9 - speed * t) ** 2 + (y - 16) ** 2 < 36] = colour
    iio.imwrite(path, frames, plugin="FFMPEG", fps=8, codec="libx264", macro_block_size=1)


PROMPTS = ["a red circle moving right on a gray background", '<script>alert("x")</script> & a blue circle'] + [
    f"a circle moving right, number {i}" for i in range(30)
]


def make_run(folder, iterations: int = 24, evaluations=((0, 0.0), (12, 0.2), (24, 0.27)), videos: int = 2):
    (folder / "config.yaml").write_text(CONFIG)
    lines = [json.dumps(line) for line in make_metrics(iterations)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for iteration, gain in evaluations:
        place = folder / "samples" / f"{iteration:06d}"
        place.mkdir(parents=True)
        (place / "scores.json").write_text(json.dumps(make_scores(iteration, gain, PROMPTS, videos)))
        for i in range(min(videos, 2)):
            make_clip(place / f"{i:02d}.mp4", 0.9 + 2 * gain, [(220, 40, 40), (40, 60, 230)][i])
    return folder
