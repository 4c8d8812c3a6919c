"""The command on a tiny random pipeline: a saved folder, plain-function rewards, runs of a second."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from alignment.run import main
from tests.alignment.preference_data import make
from tests.pipelines import FAMILIES

REPOSITORY = Path(__file__).parents[2]

REWARDS = '''
"""Rewards for tests. Every load of this file is a module of its own, so `calls` counts those of one run."""

import os
import random
import signal

import numpy as np
import torch

from rewards import Scores

calls = 0


def brightness(videos, prompts):
    return videos.mean((1, 2, 3, 4)) * 100


def contrast(videos, prompts):
    return videos.std((1, 2, 3, 4))


def noisy(videos, prompts):
    return torch.rand(len(videos)) + random.random() + np.random.rand()


def troubled(videos, prompts, at=0, trouble=""):
    """Brightness, until trouble comes at the at-th call: 1 is the evaluation before training, then one an iteration."""
    global calls
    calls += 1
    values = brightness(videos, prompts)
    if calls != at:
        return values
    if trouble == "one nan":
        values[0] = float("nan")
    elif trouble == "all nan":
        values[:] = float("nan")
    elif trouble == "shape":
        return values[:-1]
    elif trouble == "raise":
        raise KeyError("no such judge")
    elif trouble in ("SIGINT", "SIGKILL"):
        os.kill(os.getpid(), getattr(signal, trouble))
    return values


def unbuildable(videos, prompts, limit):
    return videos.mean((1, 2, 3, 4))


class Group:
    name, scope, differentiable = "group", "group", False

    def __call__(self, clips):
        return Scores(torch.tensor([float(clip.group) for clip in clips]))


class NeedsFile:
    def __init__(self, path="/nowhere/weights.pt"):
        open(path)
'''


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path

    def only_line(self) -> str:
        """The one line on stderr that a failure leaves."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A saved WanPipeline with random weights."""
    pipe, _ = FAMILIES["wan"]()
    folder = tmp_path_factory.mktemp("base") / "wan"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def preferences(tmp_path_factory, base) -> Path:
    """A folder with preferences for that pipeline, videos.jsonl and latents.jsonl."""
    return make(tmp_path_factory.mktemp("preferences") / "given", base)


@pytest.fixture(scope="session")
def rewards_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(REWARDS, "utf-8")
    return path


@pytest.fixture
def recipe(tmp_path, base, rewards_file) -> dict[str, Any]:
    """Two iterations of GRPO for brightness, with a held-out reward; to be changed by a test before it is written."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue square\n\na green dot\n", "utf-8")
    return {
        "name": "tiny",
        "output": str(tmp_path / "run"),
        "iterations": 2,
        "fps": 8,
        "model": {"path": str(base), "device": "cpu", "lora": {"rank": 2, "alpha": 4, "targets": ["to_q", "to_v"]}},
        "call": {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 16},
        "sampler": {"steps": 3, "window": [0, 2]},
        "rewards": {
            "bright": {"use": f"{rewards_file}:troubled"},
            "contrast": {"use": f"{rewards_file}:contrast", "weight": 0},
            "noisy": {"use": f"{rewards_file}:noisy", "weight": 0},
        },
        "algorithm": {"name": "grpo", "prompts_per_iteration": 2, "group_size": 2},
        "data": {"prompts": str(prompts)},
        "optimizer": {"lr": 1e-2},
        "evaluation": {"num_prompts": 2, "videos": 1},
        "checkpoint": {"every": 1},
        "tracker": None,
    }


@pytest.fixture
def write(tmp_path, recipe) -> Callable[..., Path]:
    """Write the recipe to a file."""

    def write() -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), "utf-8")
        return path

    return write


@pytest.fixture
def command(write, recipe, capsys) -> Callable[..., Outcome]:
    """`python -m alignment.run RECIPE ...` in this process."""

    def command(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = main([str(write()), *arguments])
        out, err = capsys.readouterr()
        folder = next((a.partition("=")[2] for a in arguments if a.startswith("output=")), recipe["output"])
        return Outcome(code, out, err, Path(folder))

    return command


def in_subprocess(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    # Sums depend on the number of threads, and runs are compared bit for bit.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **(environment or {})}
    command = [sys.executable, "-m", "alignment.run", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)
