"""From a folder of videos to a LoRA: the whole program in its smallest size."""

import subprocess
import sys
from pathlib import Path

from examples.tiny_world.clips import make
from rewards.video_files import read_video

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "examples/preferences_from_videos.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_the_whole_program_in_its_smallest_size(tmp_path):
    clips, out = tmp_path / "clips", tmp_path / "out"
    make(["--out", str(clips), "--num", "4"])
    result = run("--videos", clips, "--out", out, "--pairs", 1, "--iterations", 1)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("== ") == 4
    assert (out / "run/lora/pytorch_lora_weights.safetensors").is_file()
    assert (out / "run/report.html").is_file()
    for name in ("before", "after"):
        assert read_video(out / f"{name}.mp4")[0].shape == (9, 3, 256, 256)
    again = run("--videos", clips, "--out", out, "--pairs", 1, "--iterations", 1)
    assert again.returncode == 0, again.stderr
    assert "8 of 8 videos are there already" in again.stdout
    assert "DenseDPO" not in again.stdout


def test_a_missing_folder_ends_it(tmp_path):
    (tmp_path / "empty").mkdir()
    result = run("--videos", tmp_path / "empty", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "empty" in result.stderr.splitlines()[-1]
