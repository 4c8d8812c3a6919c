"""Run folders as healthy runs on the tiny world leave them, made in a second: of GRPO, and of pairs that were given."""

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


PAIR_CONFIG = """\
name: tiny-pairs
seed: 0
iterations: 120
model:
  path: examples/tiny_world/model
rewards:
  motion: {use: sprite_motion, weight: 1.0}
  shape: {use: sprite_shape, weight: 0.0}
algorithm:
  name: flow_dpo
  beta: 500.0
  anchor: 0.0
  tie_eps: 0.0
  max_winner_error: null
  renew_reference: 0
  group_size: 4
  updates_per_rollout: 4
  level_law: logit_normal
data:
  prompts: null
  preferences: clips/pairs.jsonl
  held_out: clips/held_out.jsonl
optimizer:
  lr: 0.0001
  max_grad_norm: 1.0
  warmup: 10
"""
RANGES = ("0.00_0.25", "0.25_0.50", "0.50_0.75", "0.75_1.00")  # of noise levels


def make_pair_metrics(num: int = 120, every: int = 40) -> list[dict]:
    """Lines as a healthy Flow-DPO run on given pairs logs them, with an evaluation of held-out ones now and then."""
    draw = random.Random(0)
    lines = []
    for i in range(1, num + 1):
        learned = 1 - math.exp(-3 * (i - 1) / num)
        margin = 0.6 * learned + draw.gauss(0, 0.03)
        levels = dict(zip(RANGES, (0.5, 1.0, 1.3, 1.2), strict=True))
        line = {
            "iteration": i,
            "loss": 0.693 - 0.2 * learned,
            "implicit_accuracy": min(1.0, 0.5 + 0.22 * learned + draw.gauss(0, 0.04)),
            "margin": margin,
            "margin/size": abs(margin) + 0.1,
            **{f"margin/levels_{name}": part * margin for name, part in levels.items()},
            "error/winner": 1 - 0.02 * learned,
            "error/loser": 1 + 0.005 * learned,
            "lr": 1e-4,
            "grad_norm": draw.uniform(0.8, 2.5),
            "nfe": 64,
            "nfe/rollout": 0,
            "nfe/update": 64,
            "time/rollout": 0.0,
            "time/decode": 0.0,
            "time/update": 1.4,
            "time/iteration": 1.45,
            "drift/weights": 0.001 * i,
        }
        if i % every == 0:
            told = {"implicit_accuracy": 0.5 + 0.12 * learned, "margin": 0.4 * learned, "margin/size": 0.5 * learned}
            errors = {"error/winner": 1 - 0.01 * learned, "error/loser": 1.0}
            line |= {f"eval/pairs/{name}": value for name, value in (told | errors).items()}
        lines.append(line)
    return lines


def sampled(metrics: list[dict]) -> list[dict]:
    """As `make_pair_metrics`, where the policy samples the pairs, which are rewarded and some of them tied."""
    online = {"reward/mean": 0.6, "reward/std": 0.2, "reward/invalid": 0, "pairs": 11, "pairs/tied": 1 / 12}
    return [{k: v for k, v in line.items() if not k.startswith("eval/")} | online for line in metrics]


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


def make_pair_run(folder, videos: int = 1):
    """A run on given pairs, evaluated before and after."""
    return make_run(folder, 120, ((0, 0.0), (120, 0.2)), videos, PAIR_CONFIG, make_pair_metrics())


def make_run(
    folder,
    iterations: int = 24,
    evaluations=((0, 0.0), (12, 0.2), (24, 0.27)),
    videos: int = 2,
    config: str = CONFIG,
    metrics: list[dict] | None = None,
):
    (folder / "config.yaml").write_text(config)
    lines = [json.dumps(line) for line in metrics or make_metrics(iterations)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for iteration, gain in evaluations:
        place = folder / "samples" / f"{iteration:06d}"
        place.mkdir(parents=True)
        (place / "scores.json").write_text(json.dumps(make_scores(iteration, gain, PROMPTS, videos)))
        for i in range(min(videos, 2)):
            make_clip(place / f"{i:02d}.mp4", 0.9 + 2 * gain, [(220, 40, 40), (40, 60, 230)][i])
    return folder
