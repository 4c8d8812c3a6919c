"""A folder with videos and rewards, the command run in it, and what it wrote."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np

from rewards.score import main

LOGGED = ("--reward", "logged=my.py:Logged", "--videos", "clips", "--prompts", "gray", "--out", "scores.jsonl")
REWARDS = '''
import json, os
from pathlib import Path
import torch
from rewards import Reward, RewardError, Scores

def bright(videos, prompts):
    return videos.mean((1, 2, 3, 4))

def broken(videos, prompts):
    return videos.no_such_thing

def undecided(videos, prompts):
    return [float("nan") if "odd" in prompt else 1.0 for prompt in prompts]

class Logged(Reward):
    """Brightness of the first and last frame; a line a call in calls.log."""

    name = "logged"

    def __init__(self, scope="clip", refuse="", die=""):
        self.scope, self.refuse, self.die = scope, refuse, die
        (Path(__file__).parent / "loaded").touch()

    def indices(self, length, fps):
        return sorted({0, length - 1})

    def score(self, clips):
        with (Path(__file__).parent / "calls.log").open("a") as log:
            print(json.dumps([clip.prompt for clip in clips]), file=log)
        for clip in clips:
            if self.die and self.die in clip.prompt:
                os._exit(9)
            if self.refuse and self.refuse in clip.prompt:
                raise RewardError(f"reward logged: will not judge {clip.prompt!r}")
        first = torch.stack([clip.video[0].mean() for clip in clips])
        seen = {"frames": [len(c.video) for c in clips], "mark": [float(c.meta.get("mark", 0)) for c in clips]}
        seen |= {"group": [c.group for c in clips], "seconds": [len(c.video) / c.fps for c in clips]}
        dims = {name: torch.tensor([float(value) for value in values]) for name, values in seen.items()}
        return Scores(first, dims, torch.stack([clip.video.mean((1, 2, 3)) for clip in clips]))
'''


def write(path, gray=100, frames=6, size=(48, 32), fps=8):
    video = np.full((frames, size[1], size[0], 3), gray, np.uint8)
    iio.imwrite(path, video, plugin="FFMPEG", fps=fps, macro_block_size=1, output_params=["-crf", "5"])
    return path


def run(*arguments, code=0):
    found = main([str(argument) for argument in arguments])
    assert found == code
    return found


def rows(path="scores.jsonl"):
    return {row["path"]: row for row in map(json.loads, Path(path).read_text("utf-8").splitlines())}


def calls():
    log = Path("calls.log")
    found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def table(name, *lines):
    Path(name).write_text("\n".join(lines) + "\n")
    return name


def refused(capsys, *arguments):
    capsys.readouterr()
    run(*arguments, code=2)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    return [line.removeprefix("error: ") for line in lines]
