"""The reward examples as their readers run them."""

import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from rewards import load

ROOT = Path(__file__).parents[2]
MY_REWARD = ROOT / "examples" / "my_reward.py"


def run(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "score_clips.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


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


def lines(result):
    assert result.returncode == 0, result.stderr
    return {Path(line.split()[0]).stem: line.split()[1:] for line in result.stdout.splitlines()}


def test_scores_a_folder_with_a_function_of_ones_own(folder):
    found = lines(run(folder, "--reward", "examples/my_reward.py:calm", "limit=0.5"))
    assert {name: words[0] for name, words in found.items()} == {"still": "calm", "moving": "calm"}
    assert float(found["still"][1]) > 0.98
    assert float(found["moving"][1]) < 0.1  # every pixel changes by nearly 1, above the limit


def test_scores_a_file_with_a_class_of_ones_own(folder):
    found = lines(run(folder / "still.mp4", "--reward", f"{MY_REWARD}:Colourful", "target_bits=2.0"))
    words = found["still"]
    assert words[::2] == ["colourful", "bits", "saturation"]
    assert float(words[1]) == pytest.approx(float(words[3]) / 2, abs=1e-4)


def test_scores_with_a_known_reward(folder):
    found = lines(run(folder / "still.mp4", "--reward", "sprite_colour", "--prompt", "a red circle"))
    assert float(found["still"][1]) == 0  # nothing moves on the gray


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/absent.mp4", "--reward", "sprite_colour"], "no video at"),
        (["{folder}/still.mp4", "--reward", "sprite_color"], "did you mean 'sprite_colour'?"),
        (["{folder}/still.mp4", "--reward", "examples/my_reward.py:calm", "limt=1"], "did you mean 'limit'?"),
        (["{folder}/still.mp4", "--reward", "clip", "path=/nowhere"], "open_clip_config.json"),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, message):
    result = run(*(argument.format(folder=folder) for argument in arguments))
    assert result.returncode == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_an_empty_folder_is_one_line(tmp_path):
    assert "no video at" in run(tmp_path, "--reward", "sprite_colour").stderr


def test_my_reward_through_load():
    video = torch.stack([torch.full((2, 3, 8, 8), 0.5), torch.tensor([0.0, 0.05]).view(2, 1, 1, 1).expand(2, 3, 8, 8)])
    found = load(f"{MY_REWARD}:calm")(video, ["", ""])
    assert found.total.tolist() == pytest.approx([1, 0.5])
