"""The reward examples as their readers run them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from rewards import load
from rewards.score import main

ROOT = Path(__file__).parents[2]
MY_REWARD = ROOT / "examples" / "my_reward.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """still.mp4, gray; moving.mp4, a white half that jumps from side to side."""
    folder = tmp_path_factory.mktemp("clips")
    still = np.full((6, 64, 64, 3), 128, np.uint8)
    moving = np.zeros((6, 64, 64, 3), np.uint8)
    moving[::2, :, :32] = 255
    moving[1::2, :, 32:] = 255
    for name, frames in (("still", still), ("moving", moving)):
        iio.imwrite(folder / f"{name}.mp4", frames, plugin="FFMPEG", fps=8, macro_block_size=16)
    (folder / "notes.txt").write_text("not a video")
    return folder


def scored(folder, out, *rewards):
    arguments = [argument for reward in rewards for argument in ("--reward", reward)]
    assert main([*arguments, "--videos", str(folder), "--prompts", "a red circle", "--out", str(out)]) == 0
    return {Path(row["path"]).stem: row for row in map(json.loads, out.read_text().splitlines())}


def test_my_rewards_through_the_command(folder, tmp_path):
    mine = (f"calm={MY_REWARD}:calm:limit=0.5", f"colourful={MY_REWARD}:Colourful:target_bits=2.0")
    found = scored(folder, tmp_path / "scores.jsonl", *mine, "sprite_colour")
    assert found.keys() == {"still", "moving"}
    assert found["still"]["calm"] > 0.98
    assert found["moving"]["calm"] < 0.1  # every pixel changes by nearly 1, above the limit
    assert found["still"]["colourful"] == pytest.approx(found["still"]["colourful/bits"] / 2, abs=1e-4)
    assert found["still"]["sprite_colour"] == 0  # nothing moves on the gray


def test_my_reward_through_load():
    video = torch.stack([torch.full((2, 3, 8, 8), 0.5), torch.tensor([0.0, 0.05]).view(2, 1, 1, 1).expand(2, 3, 8, 8)])
    found = load(f"{MY_REWARD}:calm")(video, ["", ""])
    assert found.total.tolist() == pytest.approx([1, 0.5])


def test_swapped_both_ways(tmp_path):
    small = ["algorithm.group_size=2", "algorithm.prompts_per_iteration=1", "evaluation.num_prompts=2", "iterations=1"]
    command = [sys.executable, "examples/swap_reward.py", "--num", "3", "--out", str(tmp_path), *small]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    motion = [float(line.split()[1]) for line in result.stdout.splitlines() if re.match(r" +\d ", line)]
    best, value, mean = re.search(r"best of 3: clip (\d), motion (\S+) \(mean (\S+)\)", result.stdout).groups()
    assert len(motion) == 3
    assert motion[int(best)] == max(motion) == float(value)
    assert float(mean) == pytest.approx(np.mean(motion), abs=1e-3)
    assert iio.improps(tmp_path / "best.mp4", plugin="FFMPEG").shape[-3:] == (32, 32, 3)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["reward/mean"] == pytest.approx(row["reward/light"])  # it trained on the function and on nothing else
    assert 0 < row["reward/light"] < 1
    assert {"eval/reward/motion", "eval/reward/light"} <= row.keys()
