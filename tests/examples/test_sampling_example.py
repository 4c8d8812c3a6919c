"""The sampling example as its readers run it: on a folder of theirs, on the default one and on none."""

import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest

from tests.pipelines import FAMILIES

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "examples" / "sample_with_log_probs.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.mark.parametrize("name", ["wan", "tiny world"])
def test_two_samples_with_their_log_probs(name, tmp_path):
    arguments, steps = ["--size", 16, 16, 5, "--steps", 4], 3
    if name == "wan":
        FAMILIES["wan"]()[0].save_pretrained(tmp_path / "pipe")
        arguments = [tmp_path / "pipe", *arguments]
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    header, *rows, last = result.stdout.splitlines()
    assert header.split()[:2] == ["step", "std"]
    assert [int(row.split()[0]) for row in rows] == list(range(steps))
    assert all(row.split()[2] != row.split()[3] and float(row.split()[4]) > 0 for row in rows)
    assert last.endswith("wrote samples.mp4")
    assert iio.improps(tmp_path / "samples.mp4", plugin="FFMPEG").shape[-3:] == (16, 32, 3)


def test_folder_without_a_pipeline(tmp_path):
    result = run(tmp_path, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == f"{tmp_path} is not a diffusers pipeline folder (it has no model_index.json)"
